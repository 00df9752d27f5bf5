"""Paper 55: the loss on phrases, exactly; by dense logits written out, and through the language readout."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import poise
from poise.errors import FormulaError, QuantityError
from poise.terms.preference import RRPO, PhraseMargin, PreferenceMargin, SegmentMargin

from .records import pairs

BETA, ALPHA = 0.3, 0.05
V = 11


def dense(seed: int = 0) -> dict[str, Tensor]:
    """Policy and reference logits [batch, time, V] of both answers, with masks, labels and phrases."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for side, time in (("chosen", 7), ("rejected", 6)):
        found[f"{side}_logits"] = torch.randn(3, time, V, generator=g, dtype=torch.float64)
        found[f"reference_{side}_logits"] = torch.randn(3, time, V, generator=g, dtype=torch.float64)
        found[f"{side}_ids"] = torch.randint(V, (3, time), generator=g)
        mask = torch.ones(3, time, dtype=torch.bool)
        mask[:, 0] = False
        mask[1, -2:] = False
        found[f"{side}_mask"] = mask
        spans = torch.zeros(3, time, dtype=torch.int64)
        spans[:, 2], spans[0, 3], spans[2, 4:6] = 1, 1, 2
        found[f"{side}_spans"] = spans
    return found


def record(d: dict[str, Tensor]) -> dict[str, Tensor]:
    """The token record of dense logits."""
    q = {k: v for k, v in d.items() if k.endswith(("mask", "spans"))}
    for side in ("chosen", "rejected"):
        mask, ids = d[f"{side}_mask"], d[f"{side}_ids"][..., None]
        log_p, log_r = (d[f"{r}{side}_logits"].log_softmax(-1) for r in ("", "reference_"))
        q[f"{side}_logps"] = log_p.gather(-1, ids)[..., 0] * mask
        q[f"reference_{side}_logps"] = log_r.gather(-1, ids)[..., 0] * mask
        q[f"{side}_kl"] = (log_r.exp() * (log_r - log_p)).sum(-1) * mask
    return q


def by_hand(d: dict[str, Tensor], beta: float = BETA, alpha: float = ALPHA) -> Tensor:
    """The loss phrase by phrase, as the paper writes it."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        u = torch.zeros((), dtype=torch.float64)
        for phrase in (1, 2):
            for side, sign in (("chosen", 1), ("rejected", -1)):
                for t in (d[f"{side}_spans"][row] == phrase).nonzero()[:, 0].tolist():
                    y = d[f"{side}_ids"][row, t]
                    ratio = d[f"{side}_logits"][row, t].log_softmax(-1)[y]
                    ratio = ratio - d[f"reference_{side}_logits"][row, t].log_softmax(-1)[y]
                    u = u + sign * beta * ratio
        kl = torch.zeros((), dtype=torch.float64)
        for t in d["chosen_mask"][row].nonzero()[:, 0].tolist():
            p, r = (d[f"{x}chosen_logits"][row, t].log_softmax(-1) for x in ("", "reference_"))
            kl = kl + F.kl_div(p, r, log_target=True, reduction="sum")
        total = total - F.logsigmoid(u) + alpha * kl
    return total / 3


def test_it_prints_as_its_visible_sum_and_alpha_is_a_weight_like_any_other() -> None:
    objective = poise.parse("rrpo(beta=0.3, alpha=0.05)")
    assert str(objective) == "preference_margin(beta=0.3, token_weight='spans') + 0.05*token_kl"
    assert poise.parse(str(objective)).equals(objective)
    assert str(RRPO()) == str(poise.parse("rrpo"))
    assert "auto" in str(poise.parse("rrpo(alpha=auto)"))
    assert "linear" in str(poise.parse("rrpo(alpha=linear(0, 0.1, steps=10))"))
    assert {"chosen_spans", "rejected_spans", "chosen_kl"} <= set(objective.reads)
    assert "rejected_kl" not in objective.plan()


def test_value_and_gradient_are_those_of_the_loss_written_out() -> None:
    d = dense()
    leaves = [d["chosen_logits"].requires_grad_(), d["rejected_logits"].requires_grad_()]
    ours, theirs = RRPO(BETA, ALPHA)(record(d)), by_hand(d)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_gradients_at_other_positions_are_zero_on_the_rejected_and_pure_divergence_on_the_chosen_answer() -> None:
    d = dense()
    d["chosen_logits"].requires_grad_()
    d["rejected_logits"].requires_grad_()
    chosen, rejected = torch.autograd.grad(3 * RRPO(BETA, ALPHA)(record(d)), [d["chosen_logits"], d["rejected_logits"]])
    assert (rejected[d["rejected_spans"] == 0] == 0).all()
    assert (rejected[d["rejected_spans"] > 0] != 0).all()
    outside = (d["chosen_spans"] == 0) & d["chosen_mask"]
    pull = ALPHA * (d["chosen_logits"].softmax(-1) - d["reference_chosen_logits"].softmax(-1))
    torch.testing.assert_close(chosen[outside], pull[outside].detach(), rtol=1e-10, atol=1e-14)
    assert (chosen[~d["chosen_mask"]] == 0).all()


def test_at_the_reference_it_is_log_2_without_divergence_or_its_gradient() -> None:
    d = dense()
    for side in ("chosen", "rejected"):
        d[f"{side}_logits"] = d[f"reference_{side}_logits"].clone().requires_grad_()
    objective = RRPO(BETA, ALPHA)
    report = objective.evaluate(record(d))
    assert report.total.item() == pytest.approx(math.log(2), abs=1e-14)
    assert report.terms["token_kl"].value.item() == pytest.approx(0, abs=1e-14)
    kl = poise.parse("token_kl")(record(d))
    assert torch.autograd.grad(kl, d["chosen_logits"])[0].abs().max() < 1e-15


def test_the_gradient_agrees_with_finite_differences() -> None:
    d = dense()
    base = d["chosen_logits"]

    def loss(x: Tensor) -> Tensor:
        return RRPO(BETA, ALPHA)(record({**d, "chosen_logits": x}))

    assert torch.autograd.gradcheck(loss, base.clone().requires_grad_())


def test_phrases_over_everything_without_divergence_are_dpo() -> None:
    q = pairs()
    everything = {**q, **{f"{s}_spans": q[f"{s}_mask"].long() for s in ("chosen", "rejected")}}
    dpo = poise.parse("dpo(beta=0.3)")(q)
    assert poise.parse("rrpo(beta=0.3, alpha=0)")(everything).equal(dpo)
    assert poise.parse("rrpo(beta=0.3, alpha=0, margin='answer')")(q).equal(dpo)
    # No background token is needed: a batch that is one phrase throughout loses nothing.
    full = {k: v.clone() for k, v in everything.items()}
    for s in ("chosen", "rejected"):
        full[f"{s}_spans"], full[f"{s}_mask"] = torch.ones_like(q[f"{s}_spans"]), torch.ones_like(q[f"{s}_mask"])
    assert PreferenceMargin(token_weight="spans").forward(**_of(full)).extras["phrase_margin"].shape == (4, 1)
    assert poise.parse("rrpo(beta=0.3, alpha=0)")(full).item() == pytest.approx(dpo.item(), abs=1e-14)


def _of(q: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [f"{r}{s}_logps" for r in ("", "reference_") for s in ("chosen", "rejected")]
    return {n: q[n] for n in [*names, "chosen_spans", "rejected_spans", "chosen_mask", "rejected_mask"]}


def test_the_numbers_of_phrases_change_nothing_and_their_margins_add_up() -> None:
    q = record(dense())
    renamed = {k: torch.where(v > 0, 3 - v, 0) if k.endswith("spans") else v for k, v in q.items()}
    assert RRPO(BETA, ALPHA)(renamed).equal(RRPO(BETA, ALPHA)(q))
    found = PreferenceMargin(BETA, "spans")(**_of(q)).extras
    torch.testing.assert_close(found["phrase_margin"].sum(-1), found["margin"])
    assert found["phrase_margin"][:2, 1].eq(0).all()  # their pairs have one phrase
    negative = {k: torch.where(v > 0, v, -100) if k.endswith("spans") else v for k, v in q.items()}
    assert RRPO(BETA, ALPHA)(negative).equal(RRPO(BETA, ALPHA)(q))


def test_a_pair_without_phrases_counts_as_no_margin_and_is_reported() -> None:
    q = record(dense())
    for side in ("chosen", "rejected"):
        q[f"{side}_spans"][1] = 0
        q[f"{side}_logps"].requires_grad_()
    value = PreferenceMargin(BETA, "spans")(**_of(q))
    assert value.values[1].item() == pytest.approx(math.log(2))
    assert value.extras["without_phrase"].tolist() == [0, 1, 0]
    value.values.sum().backward()
    assert (q["chosen_logps"].grad[1] == 0).all()
    assert PhraseMargin()(*_first(q)).values[1].item() == pytest.approx(math.log(2))


def _first(q: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return q["chosen_logps"], q["rejected_logps"], q["chosen_spans"], q["rejected_spans"]


def test_the_gradient_of_the_ranking_part_is_bounded_by_the_phrases() -> None:
    # |d loss / d log pi(y_t)| = beta sigma(-u) <= beta, so the sum over tokens is at most beta times the tokens in phrases.
    q = record(dense())
    for side in ("chosen", "rejected"):
        q[f"{side}_logps"].requires_grad_()
    PreferenceMargin(BETA, "spans")(**_of(q)).values.sum().backward()
    total = sum(q[f"{s}_logps"].grad.abs().sum().item() for s in ("chosen", "rejected"))
    assert total <= BETA * sum((q[f"{s}_spans"] > 0).sum().item() for s in ("chosen", "rejected"))


def test_segments_weigh_phrases_and_divide_by_the_weight() -> None:
    q = record(dense())
    u = []
    for side in ("chosen", "rejected"):
        w = torch.where(q[f"{side}_spans"] > 0, 5.0, 1.0) * q[f"{side}_mask"]
        u.append((w * (q[f"{side}_logps"] - q[f"reference_{side}_logps"])).sum(-1) / w.sum(-1))
    expected = -F.logsigmoid(0.5 * (u[0] - u[1]))
    torch.testing.assert_close(SegmentMargin()(**_of(q)).values, expected)
    plain = poise.parse("dpo(beta=0.5, length_normalized=True)")(q)
    assert poise.parse("segment_margin(gamma=1)")(q).item() == pytest.approx(plain.item())
    assert poise.parse("rrpo(beta=0.5, alpha=0, margin='segments')")(q).item() == pytest.approx(expected.mean().item())


def test_phrases_apart_are_probabilities_of_one_against_the_other() -> None:
    q = record(dense())
    values = PhraseMargin()(*_first(q)).values
    for row, phrases in ((0, 1), (2, 2)):
        sums = [[q[f"{s}_logps"][row][q[f"{s}_spans"][row] == i].sum() for s in ("chosen", "rejected")] for i in (1, 2)]
        shares = [-(c.exp() / (c.exp() + r.exp())).log().item() for c, r in sums[:phrases]]
        assert values[row].item() == pytest.approx(sum(shares) / phrases, abs=1e-12)
    # With one phrase and the reference it is the margin on phrases.
    assert PhraseMargin(BETA, reference_free=False)(**_of(q)).values[0].item() == pytest.approx(
        PreferenceMargin(BETA, "spans")(**_of(q)).values[0].item()
    )


def test_it_copies_and_has_no_state() -> None:
    objective = RRPO()
    assert copy.deepcopy(objective).equals(objective)
    assert not list(objective.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected_spans": (0, 2, 0), }, "phrase 1 of row 0 stands in the chosen answer and not in the rejected one"),
        ({"chosen_spans": (0, 0, 1)}, "token 0 of the chosen answer in row 0 belongs to phrase 1, and 'chosen_mask' says"),
        ({"chosen_spans": (0, 2, 20_000)}, "number the phrases of each pair from 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("term", ["rrpo", "rrpo(margin='phrases')", "rrpo(margin='segments')"])
def test_phrases_without_a_counterpart_or_outside_the_answer_are_refused(
    change: dict[str, tuple[int, int, int]], message: str, term: str
) -> None:
    q = record(dense())
    for name, (row, time, value) in change.items():
        q[name][row, time] = value
        if value == 0:
            q[name][row] = 0
    with pytest.raises(QuantityError, match=message):
        poise.parse(term)(q)


def test_sums_and_missing_spans_and_bad_arguments_are_refused() -> None:
    q = record(dense())
    with pytest.raises(QuantityError, match="chosen_spans"):
        RRPO()({k: v for k, v in q.items() if "spans" not in k})
    sums = {k: v.sum(-1) if "logps" in k else v for k, v in q.items()}
    with pytest.raises(QuantityError, match="Spans need a log-probability for each token"):
        RRPO()(sums)
    odd = {k: v[:2] if k.startswith("rejected") else v for k, v in q.items()}
    with pytest.raises(QuantityError, match="batch = 3"):
        RRPO()(odd)
    for text, message in (
        ("rrpo(alpha=-1)", "rrpo: alpha must be at least 0, and it is -1"),
        ("rrpo(beta=0)", "rrpo: beta must be positive"),
        ("rrpo(gamma=0)", "rrpo: gamma must be positive"),
        ("rrpo(margin='words')", "rrpo: margin is one of 'spans', 'answer', 'phrases', 'segments', and it is 'words'"),
        ("rrpo(kl='both')", "rrpo: kl is one of 'forward', 'reverse'"),
        ("segment_margin(gamma=-1)", "segment_margin: gamma must be positive"),
    ):
        with pytest.raises(FormulaError, match=message):
            poise.parse(text)


def test_through_the_language_readout_it_is_the_loss_of_dense_logits() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra lm")
    from poise.frozen import FrozenModel
    from poise.problem import ModelView
    from poise.quantities import Quantities
    from poise.readouts.language import Language

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    policy, reference = (transformers.LlamaForCausalLM(config).double() for _ in range(2))
    d = dense()
    batch = {k: v for k, v in d.items() if k.endswith(("ids", "mask", "spans"))}
    objective = RRPO(BETA, ALPHA)
    quantities = Language(FrozenModel(reference))(ModelView(policy), Quantities(batch), objective.plan())
    ours = objective(quantities)
    for side in ("chosen", "rejected"):
        for name, module in (("", policy), ("reference_", reference)):
            logits = module(input_ids=d[f"{side}_ids"]).logits
            d[f"{name}{side}_logits"] = F.pad(logits[:, :-1], (0, 0, 1, 0))
    theirs = by_hand({k: v.detach() if k.startswith("reference") else v for k, v in d.items()})
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    parameters = list(policy.parameters())
    for mine, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
