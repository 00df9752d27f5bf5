"""A short run with dropout, draws and a validation, told to any tracker; and a tracker that keeps what it hears."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import poise
from poise.trackers import TrackedRun, track

FORMULA = "cross_entropy + 0.01*l2"
SECRETS = {
    "solver": {"name": "sgd", "lr": 0.1},
    "data": {"source": "/home/anna/private data/quality.csv"},
    "api_key": "hf_abcdefghijklmnopqrstu",
    "server": "http://anna:pw0rd@example.org/x",
}
LEAKS = ("/home/", "anna", "private data", "hf_abc", "pw0rd")


def run(tracker: Any, formula: str = FORMULA, config: Mapping[str, Any] = SECRETS, **options: Any) -> poise.Run:
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    x, y = torch.randn(96, 4), torch.randint(0, 3, (96,))

    def jitter(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        # Python's own generator: what a careless tracker would move.
        return {**batch, "input": batch["input"] + 0.01 * random.random()}

    with track(tracker, config=config) as follower:
        found = poise.fit(
            model, formula, (x, y), (x[:32], y[:32]), steps=12, batch_size=32, lr=0.1, transform=jitter, log_every=2, seed=7,
            device="cpu", progress=follower, **options,
        )  # fmt: skip
        follower.verdict["test/accuracy"] = 0.5
    return found


def same(first: poise.Run, second: poise.Run) -> bool:
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and first.history.curves() == second.history.curves()


class Kept:
    """Keep everything."""

    def __init__(self) -> None:
        self.runs: list[TrackedRun] = []
        self.points: list[list[tuple[int, str, float]]] = []
        self.verdicts: list[dict[str, Any]] = []

    def begin(self, run: TrackedRun) -> None:
        self.runs.append(run)
        self.points.append([])

    def log(self, values: Mapping[str, float], step: int) -> None:
        random.random(), torch.rand(1)
        self.points[-1] += [(step, name, value) for name, value in values.items()]

    def end(self, verdict: Mapping[str, Any]) -> None:
        self.verdicts.append(dict(verdict))

    def curves(self, number: int = -1) -> dict[str, tuple[list[int], list[float]]]:
        found: dict[str, tuple[list[int], list[float]]] = {}
        for step, name, value in self.points[number]:
            steps, values = found.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
        return found
