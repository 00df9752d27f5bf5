"""Balancers in a run: every name works, and micro-batches, processes and interruptions change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.weights.policies import METHODS
from two_processes import on_two

_GRADIENTS = ["mgda", "pcgrad", "cagrad", "upgrad", "nash_mtl", "grad_norm", "normalised", "imtl_g", "epo"]
_VALUES = ["uncertainty", "dynamic_average", "loss_scale", "imtl_l", "random", "fixed"]
NAMES = _GRADIENTS + _VALUES
TWO = "cross_entropy.named('left') + 50*cross_entropy.on(logits='right_logits', target='other').named('right')"


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.left(h), self.right(h)


def both_heads(model: Any, batch: Any, reads: frozenset[str]) -> Any:
    batch.offer("both", lambda: model(batch["input"]))
    batch.offer("logits", lambda: batch["both"][0])
    batch.offer("right_logits", lambda: batch["both"][1])
    return batch


both_heads.output = "logits"  # type: ignore[attr-defined]


def train(policy: str, accumulate: int = 1, features: bool = False, **options: Any) -> dict[str, Tensor]:
    from poise.weights.policies import find_policy

    g = torch.Generator().manual_seed(0)
    data = {
        "input": torch.randn(24, 4, generator=g).double(),
        "target": torch.randint(0, 3, (24,), generator=g),
        "other": torch.randint(0, 2, (24,), generator=g),
    }
    made = find_policy(policy)
    made = made.on("trunk") if features else made
    model = TwoHeads()
    run = poise.fit(
        model, TWO, data, readout=both_heads, policy=made, batch_size=8, accumulate=accumulate, lr=0.05, device="cpu", log_every=1,
        **{"steps": 6, **options},
    )  # fmt: skip
    weights = torch.tensor([run.history[f"policy/weight/{name}"] for name in ("left", "right")], dtype=torch.float64)
    return {**model.state_dict(), "weights": weights}


def test_every_method_has_a_name_in_formulas() -> None:
    assert set(NAMES) <= set(METHODS["pareto"])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains(name: str) -> None:
    found = train(name, steps=4)
    assert bool(torch.isfinite(found["weights"]).all())
    assert bool(torch.isfinite(found["trunk.0.weight"]).all())


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", ["normalised", "upgrad", "grad_norm"])
def test_micro_batches_have_the_weights_of_one_big_batch(name: str, features: bool) -> None:
    one, four = train(name, features=features), train(name, accumulate=4, features=features)
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("features", [False, True])
def test_two_processes_have_the_weights_of_one(tmp_path: Path, features: bool) -> None:
    first, second = on_two(train, tmp_path, "normalised(decay=0.5)", 2, features)
    one = train("normalised(decay=0.5)", features=features)
    for key, value in one.items():
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)
        torch.testing.assert_close(first[key], value, rtol=1e-7, atol=1e-9)


def test_the_same_norm_means_the_same_whatever_the_scale_of_a_loss() -> None:
    """The right term is charged fifty times, and its weight is what undoes that: weighted norms are equal in every step."""
    weights = train("normalised")["weights"]
    assert bool((weights[0] > 3 * weights[1]).all())
