"""Claim 07: choosing source tasks by the least absolute sum of weights beats the least-norm rule and uniform sampling.

Simulator: inputs of 20 features, a true representation of rank 4, 40 sources of which two are strong (heads of length 2.5; the others
0.4 N(0, I)), a target halfway between the strong ones, 400 target samples, labels with noise 1, 6,000 source samples, floor 25,
30 seeds. Every allocation trains the same alternating least squares and is measured by its exact excess risk. The adaptive search
knows no head: 30 % of the budget explores, the noise rule sets lam, and exploration samples are used again.

Real data: 8 x 8 digits under eight corruptions, 80 tasks of one digit against the rest, 70 of them sources; 8,000 source samples, 50
target samples, floor 20, rank 10, half of the budget explores; five targets with three seeds each. The error is 1 - AUC on base
images that no source has seen. `--full` runs 150 seeds of the simulator, and adds rank 20 and a small convolutional network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.quantities import derive
from poise.search import (
    ActiveMultiTask,
    LinearMultiTask,
    NeuralMultiTask,
    oracle_counts,
    target_only,
    uniform_counts,
)
from poise.tasks.corrupted_digits import CorruptedDigits
from poise.weights.allocation import risk_bound
from poise.weights.relevance import LassoRelevance

FEATURES, RANK, TASKS, BUDGET, TARGET, FLOOR, SEEDS = 20, 4, 40, 6000, 400, 25, 30
TARGETS = (("rotate", 3), ("blur", 8), ("noise", 5), ("stripe", 1), ("shift", 9))
ORDER = ("target only", "uniform", "L2 known", "L1 known")
Scores = dict[str, list[float]]


class Simulator:
    """One instance: true heads, target samples, and draws of the sources."""

    def __init__(self, seed: int) -> None:
        self.pools: dict[int, tuple[Tensor, Tensor]] = {}
        self.drawn: dict[int, int] = {}
        g = torch.Generator().manual_seed(derive(seed, "instance"))
        self.basis = torch.linalg.qr(torch.randn(FEATURES, RANK, generator=g, dtype=torch.float64)).Q
        self.heads = 0.4 * torch.randn(RANK, TASKS, generator=g, dtype=torch.float64)
        strong = torch.randn(RANK, 2, generator=g, dtype=torch.float64)
        self.heads[:, -2:] = 2.5 * strong / strong.norm(dim=0)
        self.goal = self.heads[:, -2:].mean(1)
        self.seed = seed
        self.target = self._samples(self.goal, TARGET, g)

    def draw(self, task: int, n: int) -> tuple[Tensor, Tensor]:
        """Draw from a source: the same samples in the same order for every allocation, so that these are compared in pairs."""
        if task not in self.pools:
            generator = torch.Generator().manual_seed(derive(self.seed, "source", task))
            self.pools[task] = self._samples(self.heads[:, task], BUDGET, generator)
        first = self.drawn.get(task, 0)
        self.drawn[task] = first + n
        inputs, targets = self.pools[task]
        return inputs[first : first + n], targets[first : first + n]

    def risk(self, model: Tensor) -> float:
        """The excess risk E (x'model - x'B w)^2, exact for these inputs."""
        return float((model - self.basis @ self.goal).square().sum())

    def fixed(self, counts: Tensor) -> float:
        """The excess risk after sampling by a plan."""
        trainer = LinearMultiTask(FEATURES, RANK, TASKS)
        self.drawn.clear()
        for task, n in enumerate(counts.tolist()):
            trainer.add(task, *self.draw(task, n))
        trainer.fit()
        assert trainer.basis is not None
        return self.risk(trainer.basis @ trainer.target_head(*self.target))

    def adaptive(self, relevance: LassoRelevance, epochs: int = 2, exploration: float = 0.3) -> tuple[float, Tensor]:
        """The excess risk of the search that knows no head, and its counts."""
        trainer = LinearMultiTask(FEATURES, RANK, TASKS)
        self.drawn.clear()
        search = ActiveMultiTask(
            trainer, self.draw, BUDGET, epochs, target=self.target, relevance=relevance, exploration=exploration
        )
        found = search.run()
        assert trainer.basis is not None
        return self.risk(trainer.basis @ found.head), found.counts

    def expected(self, counts: Tensor) -> float:
        """The excess risk that is predicted for counts."""
        return risk_bound(self.heads, self.goal, counts, noise=1.0, features=FEATURES, target_samples=TARGET).expected

    def _samples(self, head: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
        return x, x @ self.basis @ head + torch.randn(n, generator=generator, dtype=torch.float64)


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Measure the simulator on 30 seeds and digits on 15 runs (`full`: 150 seeds, and digits with rank 20 and a network too)."""
    told = progress or (lambda fraction, text: None)
    scores: Scores = {}
    seeds = 5 * SEEDS if full else SEEDS
    for number in range(seeds):
        told(0.4 * number / seeds, f"simulator, seed {number}")
        for name, value in _simulate(seed + number).items():
            scores.setdefault(name, []).append(value)
    kinds: dict[str, Callable[[int, int], Any]] = {"rank 10": lambda tasks, s: _linear(10, tasks)}
    if full:
        kinds |= {"rank 20": lambda tasks, s: _linear(20, tasks), "network": _network}
    digits: dict[str, Scores] = {}
    jobs = [(kind, target, s) for kind in kinds for target in TARGETS for s in range(3)]
    for number, (kind, target, s) in enumerate(jobs):
        told(0.4 + 0.6 * number / len(jobs), f"digits, {kind}, {'/'.join(map(str, target))}, seed {s}")
        for name, value in _digits(kinds[kind], target, seed + s).items():
            digits.setdefault(kind, {}).setdefault(name, []).append(value)
    return _judge(scores, digits)


def _simulate(seed: int) -> dict[str, float]:
    world = Simulator(seed)
    one, two = (oracle_counts(world.heads, world.goal, BUDGET, floor=FLOOR, p=p, q=p) for p in (1, 2))
    even = uniform_counts(TASKS, BUDGET)
    adaptive, counts = world.adaptive(LassoRelevance(floor=FLOOR))
    return {
        "target only": world.risk(target_only(*world.target)),
        "uniform": world.fixed(even),
        "L2 known": world.fixed(two),
        "L1 known": world.fixed(one),
        "adaptive": adaptive,
        "adaptive, three epochs": world.adaptive(LassoRelevance(floor=FLOOR), 3, 0.2)[0],
        "adaptive L2": world.adaptive(LassoRelevance(floor=FLOOR, p=2, q=2))[0],
        "predicted uniform": world.expected(even),
        "predicted L2 known": world.expected(two),
        "predicted L1 known": world.expected(one),
        "predicted adaptive": world.expected(counts),
    }


def _digits(make: Callable[[int, int], Any], target: tuple[str, int], seed: int) -> dict[str, float]:
    rules = {
        "uniform": (1, LassoRelevance(floor=20)),
        "L2": (2, LassoRelevance(floor=20, p=2, q=2)),
        "L1": (2, LassoRelevance(floor=20)),
    }
    found: dict[str, float] = {}
    for name, (epochs, relevance) in rules.items():
        tasks = CorruptedDigits("digits", target, target_samples=50, seed=derive(seed, "digits"))
        search = ActiveMultiTask(
            make(len(tasks), seed),
            tasks,
            8000,
            epochs,
            target=tasks.target,
            relevance=relevance,
            exploration=0.5,
            available=tasks.available,
            measure=tasks.error,
        )
        last = search.run().rounds[-1]
        found[name], found[f"{name} tasks"] = last.error, float(last.tasks_used)
    alone = _Alone()
    found["target only"] = tasks.error(alone, target_only(alone.inputs(tasks.target[0]), tasks.target[1], ridge=10.0))
    return found


class _Alone:
    """A linear model of the inputs themselves."""

    def inputs(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones(len(x), 1)], 1).double()

    def predict(self, x: Tensor, head: Tensor) -> Tensor:
        return self.inputs(x) @ head


def _linear(rank: int, tasks: int) -> LinearMultiTask:
    return LinearMultiTask(64, rank, tasks, bias=True, ridge=0.03, sweeps=12, tolerance=1e-4)


def _network(tasks: int, seed: int) -> NeuralMultiTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        encoder = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip
    return NeuralMultiTask(encoder, 10, tasks, steps=400, seed=seed)


def _judge(scores: Scores, digits: dict[str, Scores]) -> Finding:
    means = {name: fmean(values) for name, values in scores.items()}
    paired = [b - a for a, b in zip(scores["L1 known"], scores["L2 known"], strict=True)]
    gain, error = fmean(paired), stdev(paired) / math.sqrt(len(paired))
    ratio = means["adaptive"] / means["L1 known"]
    ordered = all(means[a] > means[b] for a, b in itertools.pairwise(ORDER))
    holds = gain > 2 * error and ordered and ratio <= 1.5
    measured = (
        "excess risk, target only / uniform / L2 / L1 / adaptive: "
        + " / ".join(f"{means[name]:.4f}" for name in (*ORDER, "adaptive"))
        + f" (a first run elsewhere: 0.0460 / 0.0335 / 0.0149 / 0.0113 / 0.0148); L2 - L1 = {gain:.4f} +- {error:.4f} paired over "
        f"{len(paired)} seeds; adaptive {ratio:.2f} of L1 (1.10 asked for), with three epochs "
        f"{means['adaptive, three epochs'] / means['L1 known']:.2f}. Paper: lower bound and corrupted MNIST, up to 30 % less error "
        "(third-party summary)"
    )
    reasons = []
    if gain <= 2 * error:
        reasons.append("L1 is not clearly below L2 over the seeds, paired")
    if not ordered:
        reasons.append("the order target only > uniform > L2 > L1 does not appear")
    if ratio > 1.5:
        reasons.append("the adaptive search is more than 1.5 times the known relevance")
    figures = {**means, "L2 - L1": gain, "standard error of L2 - L1": error, "adaptive / L1": ratio}
    for kind, rows in digits.items():
        figures |= {f"digits/{kind}/{name}": fmean(values) for name, values in rows.items()}
        reasons.append(_of_digits(kind, rows))
    return Finding("holds" if holds else "fails", measured, "; ".join(reasons), figures)


def _of_digits(kind: str, rows: Scores) -> str:
    """The real data in words; they do not decide, and what is against the claim is said."""
    means = {name: fmean(values) for name, values in rows.items()}
    pairs = [b - a for a, b in zip(rows["L1"], rows["L2"], strict=True)]
    error = stdev(pairs) / math.sqrt(len(pairs))
    said = "in the paper's order" if means["L1"] <= means["L2"] <= means["uniform"] else "not in the paper's order"
    if abs(fmean(pairs)) < 2 * error:
        said += ", and L1 and L2 within their noise"
    if means["target only"] < means["L1"]:
        said += "; 50 target samples alone do better than any representation"
    return (
        f"digits, {kind}, 1 - AUC of L1 / L2 / uniform / target only: {means['L1']:.3f} / {means['L2']:.3f} / {means['uniform']:.3f} / "
        f"{means['target only']:.3f}, {said} (L2 - L1 = {fmean(pairs):.3f} +- {error:.3f}); tasks above the floor {means['L1 tasks']:.0f} "
        f"/ {means['L2 tasks']:.0f}"
    )


CLAIM = Claim(
    number=7,
    statement=(
        "Sampling source tasks in proportion to |nu1|, the least absolute sum of weights that builds the target's head, needs fewer "
        "samples than the least-norm rule and uniform sampling, known or estimated by LASSO (corrupted MNIST: lower target error, up "
        "to 30 %)."
    ),
    expected=(
        "Excess risk in the order L1 < L2 < uniform < target only, the adaptive search within 1.5 times L1; re-using exploration samples, "
        "within 1.1 times."
    ),
    falsified="L1 is not below L2 by two standard errors over 30 seeds, paired; or the order or the factor 1.5 fails.",
    run=run,
)
