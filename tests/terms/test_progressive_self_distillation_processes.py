"""Progressive self-distillation on two real processes: what one worker stored, the other reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import poise
from two_processes import on_two

FORMULAS = ("progressive_self_distillation", "progressive_self_distillation(teacher='snapshot')")


def train(formula: str) -> dict[str, Tensor]:
    """Weights and memory after four epochs of 33 examples in batches of 8: the last batch has one row, the other process none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(33, 6, generator=generator, dtype=torch.float64)
    y = x[:, :3].argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    objective = poise.parse(formula)
    poise.fit(model, objective, {"input": x, "target": y}, lr=0.2, epochs=4, batch_size=8, device="cpu")
    return {**model.state_dict(), **{k: v for k, v in objective.state_dict().items() if isinstance(v, Tensor)}}


def train_all() -> list[dict[str, Tensor]]:
    return [train(formula) for formula in FORMULAS]


def test_two_processes_end_with_the_weights_and_the_memory_of_one(tmp_path: Path) -> None:
    firsts, seconds = on_two(train_all, tmp_path)
    for formula, first, second in zip(FORMULAS, firsts, seconds, strict=True):
        alone = train(formula)
        assert first.keys() == alone.keys()
        for name, value in alone.items():
            # weights are float64 and sums run in another order; rows are stored in float32
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(first[name], second[name]), name
