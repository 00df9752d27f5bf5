"""The core of preference objectives: laws that hold for every method on pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import poise
from poise.errors import FormulaError, QuantityError
from poise.terms.preference import DPO, RPO, SFT, PreferenceMargin, TokenKL, sequence_sum


def pairs(batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Token records of pairs: chosen answers of 6 places, rejected ones of 5, some of them padding."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for side, time in (("chosen", 6), ("rejected", 5)):
        length = torch.randint(1, time + 1, (batch,), generator=g)
        mask = torch.arange(time) < length[:, None]
        found[f"{side}_mask"] = mask
        found[f"{side}_spans"] = torch.randint(0, 3, (batch, time), generator=g) * mask
        for name in (f"{side}_logps", f"reference_{side}_logps"):
            found[name] = -torch.rand(batch, time, generator=g, dtype=dtype).mul(3) * mask
        found[f"{side}_kl"] = torch.rand(batch, time, generator=g, dtype=dtype) * mask
        found[f"{side}_token_weight"] = torch.rand(batch, time, generator=g, dtype=dtype) * mask
    return found


def test_dpo_of_two_sums_is_the_worked_example() -> None:
    sums = [torch.tensor([x], dtype=torch.float64) for x in (-42.0, -45.0, -40.0, -38.0)]
    found = DPO(beta=0.1)(*sums)
    assert found.values.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.5))), abs=1e-12)
    assert found.extras["margin"].item() == pytest.approx(0.5)
    assert found.extras["weight"].item() == pytest.approx(1 / (1 + math.exp(0.5)))
    assert found.extras["accuracy"].item() == 1


def test_tokens_and_their_sums_give_the_same_loss() -> None:
    q = pairs()
    objective = poise.parse("dpo(beta=0.3)")
    sums = {k: v.sum(-1) for k, v in q.items() if k.endswith("_logps")}
    assert objective(q).item() == pytest.approx(objective(sums).item(), abs=1e-12)
    half = {**q, **{k: v for k, v in sums.items() if k.startswith("reference")}}
    assert objective(half).item() == pytest.approx(objective(sums).item(), abs=1e-12)


def test_the_gradient_pushes_both_answers_by_beta_times_the_weight() -> None:
    q = pairs()
    for side in ("chosen", "rejected"):
        q[f"{side}_logps"].requires_grad_()
    found = DPO(beta=0.3)(*(q[f"{r}{s}_logps"] for r in ("", "reference_") for s in ("chosen", "rejected")))
    found.values.sum().backward()
    w = found.extras["weight"][:, None]
    assert torch.allclose(q["chosen_logps"].grad, -0.3 * w.expand(-1, 6))
    assert torch.allclose(q["rejected_logps"].grad, 0.3 * w.expand(-1, 5))


def test_weights_of_one_and_spans_over_everything_are_dpo() -> None:
    q = pairs()
    ones = {f"{s}_token_weight": torch.ones_like(q[f"{s}_kl"]) for s in ("chosen", "rejected")}
    everything = {f"{s}_spans": q[f"{s}_mask"].long() for s in ("chosen", "rejected")}
    dpo = poise.parse("dpo(beta=0.3)")(q)
    for text, more in (("data", ones), ("spans", everything)):
        assert poise.parse(f"preference_margin(beta=0.3, token_weight='{text}')")({**q, **more}).equal(dpo)


def test_a_plain_loss_does_not_read_the_weights_that_a_batch_holds() -> None:
    assert not any("token_weight" in name or "spans" in name for name in poise.parse("dpo + sft").plan())
    assert "reference_chosen_logps" in poise.parse("dpo").reads
    assert poise.parse("dpo(reference_free=True)").reads == ("chosen_logps", "rejected_logps")
    assert not any("reference" in name for name in poise.parse("dpo(reference_free=True)").plan())


def test_tokens_outside_the_spans_have_no_gradient() -> None:
    q = pairs()
    q["rejected_logps"].requires_grad_()
    poise.parse("preference_margin(token_weight='spans')")(q).backward()
    assert (q["rejected_logps"].grad[q["rejected_spans"] == 0] == 0).all()
    assert (q["rejected_logps"].grad[q["rejected_spans"] > 0] > 0).all()


def test_no_gradient_flows_into_the_reference() -> None:
    q = pairs()
    q["reference_chosen_logps"].requires_grad_()
    q["chosen_logps"].requires_grad_()
    poise.parse("dpo")(q).backward()
    assert q["reference_chosen_logps"].grad is None


def test_what_stands_outside_the_mask_does_not_matter() -> None:
    q = pairs()
    noisy = {
        k: torch.where(q["chosen_mask"], v, float("nan")) if k.endswith("chosen_logps") else v for k, v in q.items()
    }
    assert poise.parse("dpo + sft(on='chosen')")(noisy).equal(poise.parse("dpo + sft(on='chosen')")(q))


@pytest.mark.parametrize("reduction", ["sum", "sequence_mean", "token_mean"])
def test_the_reductions_of_sft_are_the_three_of_public_code(reduction: str) -> None:
    q = pairs()
    logps, mask = q["chosen_logps"], q["chosen_mask"]
    expected = {
        "sum": -logps.sum(-1).mean(),
        "sequence_mean": -(logps.sum(-1) / mask.sum(-1)).mean(),
        "token_mean": -logps[mask].mean(),
    }[reduction]
    assert poise.parse(f"sft(on='chosen', reduction='{reduction}')")(q).item() == pytest.approx(expected.item())
    sums = {"chosen_logps": logps.sum(-1), "chosen_mask": mask}
    assert poise.parse(f"sft(on='chosen', reduction='{reduction}')")(sums).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("on", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_kl_reduces_by_side(on: str, weighted: bool) -> None:
    q = pairs()
    sides = ("chosen", "rejected") if on == "both" else (on,)
    kl = {s: q[f"{s}_kl"] * (q[f"{s}_token_weight"] if weighted else 1) for s in sides}
    lengths = {s: q[f"{s}_mask"].sum(-1) for s in sides}

    def value(reduction: str) -> float:
        return poise.parse(f"token_kl(on='{on}', reduction='{reduction}', token_weight={weighted})")(q).item()

    assert value("sum") == pytest.approx(sum(kl[s].sum(-1).mean().item() for s in sides))
    assert value("token_mean") == pytest.approx(
        sum(kl[s].sum().item() for s in sides) / sum(lengths[s].sum().item() for s in sides)
    )
    means = [(kl[s].sum(-1) / lengths[s]).mean().item() for s in sides]
    assert value("sequence_mean") == pytest.approx(sum(means) / len(means))


def test_the_reverse_direction_reads_the_reverse_divergence() -> None:
    assert poise.parse("token_kl(direction='reverse')").reads == ("chosen_reverse_kl",)
    assert poise.parse("token_kl(on='response', reduction='token_mean')").reads == ("response_kl", "response_mask")


def test_rpo_is_its_visible_sum() -> None:
    objective = poise.parse("rpo(beta=0.5, eta=0.2)")
    assert str(objective) == "dpo(beta=0.5) + 0.1*sft(on='chosen', reduction='sum')"
    assert poise.parse(str(objective)).equals(objective)
    assert str(poise.parse("2*rpo(beta=0.5, eta=0)")) == "2*dpo(beta=0.5)"
    assert str(poise.parse("rpo")) == str(RPO())


def test_terms_print_and_parse_and_can_be_bound_to_streams() -> None:
    for text in ("sft(on='chosen')", "token_kl(on='both', direction='reverse')", "sft.on('anchor')", "sft"):
        assert str(poise.parse(text)) == text
    assert str(SFT(on="chosen").on("anchor")) == "sft(on='chosen').on('anchor')"
    assert "on='chosen'" in poise.explain("sft(on='chosen')")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo(beta=0)", "dpo: beta must be positive, and it is 0."),
        ("dpo(beta=-1)", "dpo: beta must be positive, and it is -1."),
        ("dpo(label_smoothing=0.5)", "dpo: label_smoothing is the share of wrong labels"),
        ("preference_margin(beta=0)", "preference_margin: beta must be positive"),
        ("preference_margin(token_weight='all')", "token_weight is one of 'none', 'data', 'spans', and it is 'all'"),
        ("token_kl(on='prompt')", "token_kl: on is one of"),
        ("sft(reduction='mean')", "sft: reduction is one of 'sum', 'sequence_mean', 'token_mean', and it is 'mean'."),
        ("rpo(eta=-1)", "rpo: eta must be at least 0, and it is -1."),
        ("rpo(beta=0)", "rpo: beta must be positive"),
    ],
)
def test_bad_arguments_are_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message.replace("(", r"\(")):
        poise.parse(text)


def test_a_missing_reference_is_named() -> None:
    q = {k: v for k, v in pairs().items() if not k.startswith("reference")}
    with pytest.raises(QuantityError, match="reference_chosen_logps"):
        poise.parse("dpo")(q)
    with pytest.raises(QuantityError, match="reference_chosen_logps"):
        DPO()(q["chosen_logps"], q["rejected_logps"])


def test_weights_for_tokens_that_are_summed_already_are_refused() -> None:
    q = pairs()
    with pytest.raises(QuantityError, match="log-probability for each token"):
        sequence_sum(q["chosen_logps"].sum(-1), weight=q["chosen_token_weight"])


def test_an_empty_answer_is_worth_zero() -> None:
    logps, mask = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool)
    assert SFT(reduction="sequence_mean")(logps, mask).item() == 0
    assert poise.parse("sft")(response_logps=logps, response_mask=mask).item() == 0
    assert TokenKL(on="chosen")(chosen_kl=logps, chosen_mask=mask).item() == 0
    assert PreferenceMargin()(logps, logps, logps, logps).values.item() == pytest.approx(math.log(2))
