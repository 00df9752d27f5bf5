"""Agreement with TRL's own code, in value and in gradient, for every loss that both have.

TRL computes its losses inside a method of the trainer. That method is called here as it is, on a stand-in for the trainer
whose model returns given log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import poise

pytestmark = pytest.mark.peer
trl = pytest.importorskip("trl")

BATCH, TIME = 5, 7
TOLERANCE = 1e-5  # relative, in float32


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    def gather_for_metrics(self, x: Tensor) -> Tensor:
        return x

    gather = gather_for_metrics


class Model:
    """Returns the log-probabilities that it was made with, one record after the other."""

    training = True

    def __init__(self, *records: Tensor) -> None:
        self.records: Iterator[Tensor] = iter(records)

    def __call__(self, **_: Any) -> SimpleNamespace:
        logps = next(self.records)
        zero = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, entropy=zero, mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=zero, aux_loss=None
        )


def record(seed: int, scale: float = 1.5) -> dict[str, Tensor]:
    """Float32 log-probabilities of chosen and rejected answers, [BATCH, TIME] each, and masks."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, TIME + 1, (2, BATCH), generator=g)
    mask = torch.arange(TIME) < length[..., None]
    found: dict[str, Tensor] = {}
    for row, side in enumerate(("chosen", "rejected")):
        found[f"{side}_mask"] = mask[row]
        for name in (f"{side}_logps", f"reference_{side}_logps"):
            found[name] = -scale * torch.rand(BATCH, TIME, generator=g) * mask[row]
        found[f"{side}_logps"].requires_grad_()
    return found


def of_both(q: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([q[name.format("chosen")], q[name.format("rejected")]])


def dpo_trainer(q: dict[str, Tensor], loss_type: str, **settings: Any) -> Tensor:
    mask = of_both(q, "{}_mask").long()
    completion = torch.cat([torch.zeros(2 * BATCH, 1, dtype=torch.long), mask], dim=1)
    model = Model(of_both(q, "{}_logps"))
    trainer = SimpleNamespace(
        model=model, ref_model=Model(of_both(q, "reference_{}_logps")), accelerator=Accelerator(), aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
        loss_types=[loss_type], loss_weights=[1.0], beta=0.1, label_smoothing=0.0, use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05), _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    vars(trainer).update(settings)
    inputs = {
        "input_ids": torch.ones_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion, "ref_chosen_logps": q["reference_chosen_logps"].sum(-1),
        "ref_rejected_logps": q["reference_rejected_logps"].sum(-1),
    }  # fmt: skip
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, False)


def gradients(loss: Tensor, q: dict[str, Tensor]) -> list[Tensor]:
    leaves = [q["chosen_logps"], q["rejected_logps"]]
    return [
        torch.zeros_like(x) if g is None else g * q[f"{side}_mask"]
        for x, g, side in zip(
            leaves,
            torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True),
            ("chosen", "rejected"),
            strict=True,
        )
    ]


def agree(formula: str, theirs: Tensor, q: dict[str, Tensor]) -> None:
    ours = poise.parse(formula)(q)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
    for mine, other in zip(gradients(ours, q), gradients(theirs, q), strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE, atol=TOLERANCE * float(other.abs().max()))


PAIRED = [
    ("dpo(beta=0.1)", "sigmoid", {}),
    ("dpo(beta=0.5)", "sigmoid", {"beta": 0.5}),
    ("dpo(beta=0.3, length_normalized=True)", "sigmoid_norm", {"beta": 0.3}),
    ("dpo(beta=0.3, divergence='forward_kl')", "sigmoid", {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    ("dpo(beta=0.3, divergence='js')", "sigmoid", {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    ("dpo(beta=0.3, divergence='alpha', alpha=0.5)", "sigmoid", {"beta": 0.3, "f_divergence_type": "alpha_divergence"}),
    ("robust_dpo(beta=0.2, label_smoothing=0.1)", "robust", {"beta": 0.2, "label_smoothing": 0.1}),
    ("ipo(beta=0.2, length_normalized=True)", "ipo", {"beta": 0.2}),
    ("slic(beta=0.2)", "hinge", {"beta": 0.2}),
    ("exo_pair(beta=0.2, label_smoothing=0.01)", "exo_pair", {"beta": 0.2, "label_smoothing": 0.01}),
    ("nca_pair(beta=0.2)", "nca_pair", {"beta": 0.2}),
    ("bco_pair(beta=0.2)", "bco_pair", {"beta": 0.2}),
    ("sppo_hard(beta=0.2)", "sppo_hard", {"beta": 0.2}),
    ("aot(beta=0.2)", "aot", {"beta": 0.2}),
    ("aot(beta=0.2, label_smoothing=0.1)", "aot", {"beta": 0.2, "label_smoothing": 0.1}),
    ("aot(beta=0.2, unpaired=True)", "aot_unpaired", {"beta": 0.2}),
    ("apo_zero(beta=0.2)", "apo_zero", {"beta": 0.2}),
    ("apo_down(beta=0.2)", "apo_down", {"beta": 0.2}),
    ("discopop(beta=0.2)", "discopop", {"beta": 0.2}),
    ("sft(on='chosen')", "sft", {}),
]


@pytest.mark.parametrize(("formula", "loss_type", "settings"), PAIRED, ids=[f"{p[1]}-{p[0]}" for p in PAIRED])
def test_the_losses_of_the_dpo_trainer(formula: str, loss_type: str, settings: dict[str, Any]) -> None:
    for seed in range(5):
        q = record(seed)
        agree(formula, dpo_trainer(q, loss_type, **settings), q)


def test_every_loss_type_of_the_dpo_trainer_has_its_term() -> None:
    known = set(trl.DPOConfig.__dataclass_fields__["loss_type"].metadata.get("choices", ())) or {
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    }  # fmt: skip
    assert known <= {loss_type for _, loss_type, _ in PAIRED}


def test_the_sum_of_dpo_and_sft_is_that_of_two_loss_types() -> None:
    q = record(7)
    theirs = dpo_trainer(q, "", loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    agree("dpo + 0.2*sft(on='chosen')", theirs, q)
    agree("rpo(eta=2, normalize='token_mean')", theirs, q)


@pytest.mark.parametrize(
    ("formula", "loss_type", "smoothing"),
    [
        ("simpo(beta=2, gamma=0.5)", "simpo", 0.0),
        ("dpo(beta=0.2, reference_free=True)", "sigmoid", 0.0),
        ("cdpo(beta=0.2, label_smoothing=0.1)", "sigmoid", 0.1),
        ("slic(beta=0.2, reference_free=True)", "hinge", 0.0),
        ("ipo(beta=0.2, length_normalized=True, reference_free=True)", "ipo", 0.0),
    ],
)
def test_the_losses_of_the_cpo_trainer(formula: str, loss_type: str, smoothing: float) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    for seed in range(5):
        q = record(seed)
        beta = 2.0 if loss_type == "simpo" else 0.2
        trainer = SimpleNamespace(
            alpha=0.0,
            accelerator=Accelerator(),
            loss_type=loss_type,
            simpo_gamma=0.5,
            beta=beta,
            label_smoothing=smoothing,
        )
        sums = [q[f"{s}_logps"].sum(-1) for s in ("chosen", "rejected")]
        if "cdpo" in formula:  # their loss has no reference: it enters as the difference
            sums = [x - q[f"reference_{s}_logps"].sum(-1) for x, s in zip(sums, ("chosen", "rejected"), strict=True)]
        if loss_type in ("ipo", "simpo"):
            sums = [x / q[f"{s}_mask"].sum(-1) for x, s in zip(sums, ("chosen", "rejected"), strict=True)]
        losses, chosen, rejected = cpo.CPOTrainer.cpo_loss(trainer, *sums)
        agree(formula, losses.mean(), q)
        if loss_type != "ipo":
            term = poise.parse(formula)
            read = {k: q[k] for k in (*term.reads, "chosen_mask", "rejected_mask")}
            published = next(iter(term.terms.values()))(**read).extras
            torch.testing.assert_close(published["chosen_reward"], chosen, rtol=TOLERANCE, atol=1e-6)
            torch.testing.assert_close(published["rejected_reward"], rejected, rtol=TOLERANCE, atol=1e-6)


def test_the_odds_ratio_of_the_orpo_trainer() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    for seed in range(5):
        q = record(seed)
        means = [q[f"{s}_logps"].sum(-1) / q[f"{s}_mask"].sum(-1) for s in ("chosen", "rejected")]
        trainer = SimpleNamespace(beta=0.1, accelerator=Accelerator())
        losses = orpo.ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
        nll = -q["chosen_logps"][q["chosen_mask"]].mean()
        agree("orpo(weight=0.1)", nll - losses.mean(), q)


@pytest.mark.parametrize("baseline", ["mismatched", "none"])
def test_the_loss_of_the_kto_trainer(baseline: str) -> None:
    for seed in range(5):
        q, other = record(seed), record(seed + 100, scale=0.5)
        label = torch.tensor([True, False, True, True, False])
        completion = torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), q["chosen_mask"].long()], dim=1)
        ones = torch.ones_like(completion)
        reference = other["reference_chosen_logps"] - 0.1 * other["chosen_mask"]
        model = Model(other["chosen_logps"].detach(), q["chosen_logps"])
        if baseline == "none":
            next(model.records)
        trainer = SimpleNamespace(
            model=model, accelerator=Accelerator(), calculate_KL=baseline != "none", aux_loss_enabled=False,
            precompute_ref_logps=True, loss_type="kto" if baseline != "none" else "apo_zero_unpaired", beta=0.3,
            desirable_weight=1.0, undesirable_weight=1.5, _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0, _tp_size=1,
        )  # fmt: skip
        trainer._compute_kl_logps = lambda m, b, t=trainer: trl.KTOTrainer._compute_kl_logps(t, m, b)
        inputs = {
            "input_ids": ones, "attention_mask": ones, "completion_mask": completion, "KL_input_ids": ones,
            "KL_attention_mask": ones, "KL_completion_mask": completion, "label": label,
            "ref_logps": q["reference_chosen_logps"].sum(-1), "ref_KL_logps": reference.sum(-1),
        }  # fmt: skip
        theirs = trl.KTOTrainer._compute_loss(trainer, model, inputs, False)
        ours = poise.parse(f"kto(beta=0.3, undesirable=1.5, baseline='{baseline}')")(
            response_logps=q["chosen_logps"], reference_response_logps=q["reference_chosen_logps"], label=label,
            response_mask=q["chosen_mask"], mismatched_logps=other["chosen_logps"].detach(),
            reference_mismatched_logps=reference,
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=0)
        found, expected = (torch.autograd.grad(x, q["chosen_logps"])[0] * q["chosen_mask"] for x in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
