"""What compositional likelihood costs: a step beside noise contrast, the average alone, and network passes beside Langevin training.

All sides train the same network on the same data and noise, in turns, on one thread, in CPU time. The passes are counted in points
that went through the network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Ratio, one_thread, paired
from poise.formula import parse
from poise.metrics.density import heldout_nll, quadrature_log_normalizer
from poise.objective import Objective
from poise.parts.noise import GaussianNoise, KDENoise, MixedNoise
from poise.problem import Problem
from poise.readouts import Unnormalized
from poise.solvers import TorchOptimizer
from poise.terms.unnormalized import UnnormalizedNLL
from poise.training import fit
from poise.weights.schedule import cosine

INPUTS, HIDDEN, BATCH = 784, 512, 128
LANGEVIN = ((0.02, 0.03), (0.1, 0.03), (0.1, 0.01))
"""Size of the chain's moves and learning rate."""


def run(quick: bool) -> list[Ratio]:
    """Ratios of steps and of network passes, and the share of a step that the average takes."""
    with one_thread():
        return [_beside_nce(quick), _average(quick), *_beside_langevin(quick)]


class Energy(nn.Module):
    """log p~ by two hidden layers, within a Gaussian, counting the points that pass."""

    def __init__(self, inputs: int, hidden: int, confined: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        self.confined, self.points = confined, 0

    def forward(self, x: Tensor) -> Tensor:
        self.points += len(x)
        out: Tensor = self.layers(x).squeeze(-1)
        return out - x.square().sum(-1) / 8 if self.confined else out


def _stepper(formula: str, block: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, INPUTS, generator=generator)
    model, objective, solver = Energy(INPUTS, HIDDEN), parse(formula), TorchOptimizer("adam", lr=1e-4)
    solver.bind(model, objective)
    readout, step = Unnormalized(GaussianNoise(torch.zeros(INPUTS), 1.0)), 0

    def steps() -> None:
        nonlocal step
        for _ in range(block):
            solver.step(Problem(model, objective, [{"main": {"input": x}}], readout, key=(0, step)))
            if objective.stateful:
                objective.advance()
            step += 1

    return steps


def _beside_nce(quick: bool) -> Ratio:
    block = 2 if quick else 5
    sides = [_stepper(formula, block) for formula in ("unnormalized_nll", "nce")]
    timing = paired(*sides, repeats=5 if quick else 40, clock=time.process_time)
    detail = (
        f"MLP {INPUTS}-{HIDDEN}-{HIDDEN}-1, {BATCH} + {BATCH} points, Adam: {1e3 * timing.first / block:.2f} against "
        f"{1e3 * timing.second / block:.2f} ms"
    )
    return Ratio("step of unnormalized_nll / step of nce", timing.ratio, 1.05, "lower", detail)


def _average(quick: bool) -> Ratio:
    """What the moving average adds to a step: one look ahead and one move, on a number that is there."""
    block, repeats = 2, 5 if quick else 40
    step = _stepper("unnormalized_nll", block)
    average, mean = UnnormalizedNLL().average, torch.tensor(0.3)

    def move() -> None:
        for _ in range(100):
            average.ahead(mean)
            average.store(mean)

    timing = paired(move, step, repeats=repeats, clock=time.process_time)
    share = timing.first / 100 / (timing.second / block)
    detail = f"{1e6 * timing.first / 100:.0f} microseconds of {1e3 * timing.second / block:.2f} ms"
    return Ratio("the average in log space / a step", share, 0.01, "lower", detail)


def _beside_langevin(quick: bool) -> list[Ratio]:
    """Points through the network until the held-out likelihood on the moons is as good as that of MECO after some steps."""
    steps = 40 if quick else 300
    found = []
    for name, make in (("moons", _moons), ("rings", _rings)):
        x = make()
        train, held = x[:2000], x[2000:]
        noise = MixedNoise([KDENoise.fit(train, scale=1.5), GaussianNoise.fit(train, scale=2.0)], (0.9, 0.1))
        nll, points = _train("unnormalized_nll", train, held, noise, steps)
        tried: list[tuple[float, int]] = []
        for factor in (0.25, 0.5, 1.0):
            for size, lr in LANGEVIN:
                formula = f"short_run_langevin(steps=20, step={size}) + 0.001*energy_l2"
                tried.append(_train(formula, train, held, noise, int(steps * factor), lr))
            if min(tried)[0] <= nll:
                break
        reached = [p for value, p in tried if value <= nll]
        best = min(reached) if reached else max(p for _, p in tried)
        detail = (
            f"{name}: {nll:.3f} nats with {points:,} points; Langevin of 20 steps (the best of three settings) "
            f"{'needs' if reached else 'does not reach it with'} {best:,}, its best {min(tried)[0]:.3f} nats"
        )
        found.append(
            Ratio(
                f"points through the network, short_run_langevin / unnormalized_nll, {name}",
                best / points,
                10.0,
                "higher",
                detail,
            )
        )
    return found


def _train(formula: str, train: Tensor, held: Tensor, noise: Any, steps: int, lr: float = 0.03) -> tuple[float, int]:
    model = Energy(2, 64, confined=True)
    objective: Objective = parse(formula)
    fit(
        model, objective, {"input": train}, readout=Unnormalized(noise), solver="adam", lr=lr, lr_schedule=cosine(1, 0), steps=steps,
        batch_size=BATCH, device="cpu", log_every=steps,
    )  # fmt: skip
    points, corner = model.points, torch.full((2,), 5.0)
    found = heldout_nll(model, held, quadrature_log_normalizer(model, -corner, corner, 150))
    return (found if math.isfinite(found) else math.inf), points


def _moons() -> Tensor:
    from sklearn.datasets import make_moons

    return _standard(make_moons(3000, noise=0.1, random_state=0)[0])


def _rings() -> Tensor:
    from sklearn.datasets import make_circles

    return _standard(make_circles(3000, noise=0.08, factor=0.5, random_state=0)[0])


def _standard(points: Sequence[Any]) -> Tensor:
    x = torch.tensor(points, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0)
