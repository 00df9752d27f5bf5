"""poise.fit trains a language model on pairs by formula alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import poise
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language

transformers = pytest.importorskip("transformers", reason="needs the extra lm")


def model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=12, **shape))


def pairs(n: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 12, (n, 6), generator=g)
    other = ids.clone()
    other[:, 3:] = torch.randint(3, 12, (n, 3), generator=g)
    mask = torch.zeros(n, 6, dtype=torch.bool)
    mask[:, 3:] = True
    return {"chosen_ids": ids, "chosen_mask": mask, "rejected_ids": other, "rejected_mask": mask}


def test_dpo_widens_the_margin_over_the_frozen_start() -> None:
    trained = model()
    start = copy.deepcopy(trained)
    run = poise.fit(trained, "dpo(beta=0.5) + 0.1*sft", pairs(), solver="adamw", lr=3e-3, steps=30, batch_size=8)
    assert run.history["loss"][-1] < run.history["loss"][0]
    assert {"term/dpo", "term/sft"} <= {*run.history}
    batch = Language(FrozenModel(start))(
        ModelView(trained),
        Quantities(pairs()),
        frozenset({"chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"}),
    )
    margin = sum(
        s * (batch[f"{x}_logps"] - batch[f"reference_{x}_logps"]).sum(-1) for s, x in ((1, "chosen"), (-1, "rejected"))
    )
    assert (margin > 1.0).all()


def test_micro_batches_of_uneven_answers_step_as_one_batch_does() -> None:
    data = pairs()
    data["chosen_mask"] = data["chosen_mask"].clone()
    data["chosen_mask"][:3, 4:] = False
    weights = []
    for accumulate in (1, 3):
        trained = model()
        poise.fit(trained, "dpo + sft", data, lr=0.1, steps=2, batch_size=8, accumulate=accumulate)
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_formula_without_a_reference_copies_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr("poise.training.reference_for", lambda m: made.append(1) or FrozenModel(m))
    poise.fit(model(), "sft", pairs(), steps=1)
    assert made == []
    poise.fit(model(), "dpo", pairs(), steps=1)
    assert made == [1]


def test_what_evaluate_measures_is_recorded_and_can_be_monitored() -> None:
    counts = iter((3.0, 2.0, 1.0))
    run = poise.fit(
        model(),
        "sft",
        pairs(),
        steps=3,
        validate_every=1,
        evaluate=lambda m: {"nll": next(counts)},
        monitor="nll",
        restore_best=True,
    )
    assert run.history["valid/nll"] == [3.0, 2.0, 1.0]
    assert run.best == (3, 1.0)
