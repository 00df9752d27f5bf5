"""What `auto` is worth: one run that finds its weights beside 30 runs that search them, on three real data sets.

Both sides train the task's usual model for the same number of epochs with the same learning rate. The search draws 30 weights, log-uniform
in the range of `auto`, trains a model with each from the same start, and keeps the one with the best validation value; `auto` is one run of
`OnlineBilevel` with its defaults, which looks at the same validation rows. Both are judged once on the test rows: negative log-likelihood,
or the root mean squared error. Cost is processor time of this process. Splits, starts and searches are redrawn with every seed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

import poise
from benchmarks.harness import Ratio, one_thread
from poise.quantities import derive
from poise.studies.intervals import t_interval
from poise.tasks import load_task

TRIALS, SEEDS = 30, 5
LOW, HIGH = 1e-6, 1.0


@dataclass(frozen=True)
class Case:
    """One data set with the formula whose weights are to be found; `{name}` stands where a weight does."""

    data: str
    formula: str
    weights: tuple[str, ...]
    metric: str
    epochs: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.data}{' with wrong labels' if self.options else ''}, {' and '.join(self.weights)}"


CASES = (
    Case("digits", "cross_entropy + {l2}*l2", ("l2",), "nll", 160, {"label_noise": 0.3}),
    Case("breast_cancer", "cross_entropy + {l2}*l2", ("l2",), "nll", 300),
    Case("diabetes", "squared_error + {l2}*l2", ("l2",), "rmse", 300),
    Case(
        "digits", "cross_entropy + {l2}*l2 + {l1}*l1 + {confidence_penalty}*confidence_penalty",
        ("l2", "l1", "confidence_penalty"), "nll", 160, {"label_noise": 0.3},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run: what validation and test rows said, and seconds of processor time."""

    valid: float
    test: float
    seconds: float


def run(quick: bool) -> list[Ratio]:
    """For each case: cost of `auto` over that of the search, and the difference of the test values over the search's interval."""
    found: list[Ratio] = []
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES[:1] if quick else CASES:
            pairs = [_pair(case, seed, 3 if quick else TRIALS, quick) for seed in range(2 if quick else SEEDS)]
            found += _judge(case, pairs)
    return found


def _pair(case: Case, seed: int, trials: int, quick: bool) -> tuple[Outcome, list[Outcome]]:
    task = load_task(case.data, **case.options)
    split = task.split(seed)
    epochs = 10 if quick else case.epochs
    auto = f"auto(low={LOW}, high={HIGH:g}, policy='bilevel')"
    ours = _train(case, task, split, dict.fromkeys(case.weights, auto), seed, epochs)
    generator = torch.Generator().manual_seed(derive(seed, "search"))
    searched = []
    for _ in range(trials):
        u = torch.rand(len(case.weights), generator=generator, dtype=torch.float64).tolist()
        values = {name: f"{LOW * (HIGH / LOW) ** x:.6g}" for name, x in zip(case.weights, u, strict=True)}
        searched.append(_train(case, task, split, values, seed, epochs))
    return ours, searched


def _train(case: Case, task: Any, split: Any, weights: Mapping[str, str], seed: int, epochs: int) -> Outcome:
    begun = time.process_time()
    run = poise.fit(
        objective=case.formula.format(**weights), **task.arguments(split, "mlp", seed), epochs=epochs, lr=0.02, seed=seed, device="cpu",
        validate_every=1e9,
    )  # fmt: skip
    seconds = time.process_time() - begun
    values = [split.measure(run, part)[case.metric] for part in ("valid", "test")]
    return Outcome(*(v if math.isfinite(v) else math.inf for v in values), seconds)


def _judge(case: Case, pairs: list[tuple[Outcome, list[Outcome]]]) -> list[Ratio]:
    best = [min(trials, key=lambda t: t.valid) for _, trials in pairs]
    cost = fmean(ours.seconds / sum(t.seconds for t in trials) for ours, trials in pairs)
    plain = fmean(ours.seconds / fmean(t.seconds for t in trials) for ours, trials in pairs)
    difference = t_interval([ours.test - other.test for (ours, _), other in zip(pairs, best, strict=True)])
    half = (
        math.nan if difference.lower is None or difference.upper is None else (difference.upper - difference.lower) / 2
    )
    means = fmean(ours.test for ours, _ in pairs), fmean(b.test for b in best)
    # What the same search would have reached with the runs that fit into the cost of `auto`.
    budget = max(1, round(plain))
    equal = fmean(min(trials[:budget], key=lambda t: t.valid).test for _, trials in pairs)
    detail = (
        f"{case.metric} on test rows: auto {means[0]:.4f}, search of {len(pairs[0][1])} {means[1]:.4f}, search of {budget} (equal cost) "
        f"{equal:.4f}, mean of the trials {fmean(fmean(t.test for t in trials if math.isfinite(t.test)) for _, trials in pairs):.4f}; "
        f"difference {difference.mean:+.4f} +- {half:.4f} over {len(pairs)} seeds"
    )
    return [
        Ratio(f"{case.title}: processor time of auto / random search of {len(pairs[0][1])}", cost, 0.2, "lower", f"{plain:.2f} plain runs"),
        Ratio(
            f"{case.title}: test value of auto less that of the search / its half interval", difference.mean / half if half else 0.0, 1.0,
            "lower", detail,
        ),
    ]  # fmt: skip
