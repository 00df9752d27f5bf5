"""What penalised bilevel steps cost: beside implicit gradients with ten conjugate gradients, in time and in memory; and x and z at once.

Both sides run hyper-cleaning (500 digits, whole batches) from the same point with the same learning rates and three lower steps each. On
the softmax problem both also run to the end, so that the losses that the times buy stand beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Ratio, one_thread, paired, peak_bytes
from poise.tasks.bilevel import HyperCleaning, hyper_cleaning
from poise.weights.bilevel import AIDCG, Levels, PenaltyBilevel, ReciprocalSigma
from poise.weights.bilevel.method import BilevelMethod

LR, INNER, CG = 200.0, 3, 10
MIB = 2**20


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times and of peaks against implicit gradients, and of one forward for x and z against two."""
    with one_thread():
        return [_softmax(quick), _hidden(quick), _memory(quick), *_pairs(quick)]


def _rivals(hidden: int | None) -> tuple[HyperCleaning, PenaltyBilevel, AIDCG]:
    task = hyper_cleaning(0, hidden=hidden)
    both: dict[str, Any] = {"lr": LR, "inner_lr": 1.0 if hidden is None else 0.1, "inner_steps": INNER}
    # A hidden layer makes the lower level nonconvex, and conjugate gradients ask for damping.
    implicit = AIDCG(task.levels, task.x, task.theta, system_steps=CG, damping=0.0 if hidden is None else 1.0, **both)
    schedule = ReciprocalSigma(rate=0.02, least=0.02)
    return task, PenaltyBilevel(task.levels, task.x, task.theta, sigma=schedule, **both), implicit


def _softmax(quick: bool) -> Ratio:
    task, penalty, implicit = _rivals(None)
    timing = paired(_steps(penalty, 5), _steps(implicit, 5), 4 if quick else 60, clock=time.process_time)
    task, penalty, implicit = _rivals(None)
    steps = 50 if quick else 750
    losses = []
    for method in (penalty, implicit):
        method.run(steps)
        losses.append(task.scores(task.solve_lower(method.theta, method.x), method.theta)["validation loss"])
    return Ratio(
        f"outer step, penalty / implicit with {CG} CG, softmax regression",
        timing.ratio,
        0.6,
        "lower",
        f"{_ms(timing.first, 5)} against {_ms(timing.second, 5)} ms; validation loss after {steps} steps {losses[0]:.3f} and "
        f"{losses[1]:.3f}",
    )


def _hidden(quick: bool) -> Ratio:
    _, penalty, implicit = _rivals(32 if quick else 256)
    timing = paired(_steps(penalty, 2), _steps(implicit, 2), 4 if quick else 40, clock=time.process_time)
    return Ratio(
        f"outer step, penalty / implicit with {CG} CG, one hidden layer",
        timing.ratio,
        0.6,
        "lower",
        f"{_ms(timing.first, 2)} against {_ms(timing.second, 2)} ms",
    )


def _memory(quick: bool) -> Ratio:
    _, penalty, implicit = _rivals(32 if quick else 256)
    peaks = [peak_bytes(_steps(method, 1)) for method in (penalty, implicit)]
    # What each keeps between steps: x and z, or x and the last solution of its linear system.
    kept = sum(t.nbytes for t in penalty.x)
    return Ratio(
        f"memory of an outer step, penalty / implicit with {CG} CG, one hidden layer",
        (peaks[0] + kept) / (peaks[1] + kept),
        0.6,
        "lower",
        f"{peaks[0] / MIB:.2f} against {peaks[1] / MIB:.2f} MiB, besides one copy of x ({kept / MIB:.2f} MiB) each",
    )


def _pairs(quick: bool) -> list[Ratio]:
    """One forward for both lower variables against two: where arithmetic fills the time there is nothing to save on one thread."""
    ratios = []
    problems: list[tuple[str, Levels, tuple[Tensor, ...], tuple[Tensor, ...], tuple[str, ...]]] = []
    for hidden, rows in ((None, 500), (32, 32)):
        task = hyper_cleaning(0, hidden=hidden, train=rows)
        name = f"{'softmax' if hidden is None else 'hidden 32'}, {rows} rows"
        problems.append((name, task.levels, task.x, task.theta, ("vmap", "stacked")))
    problems.append(("recurrent 16, 40 steps, 16 rows", *_recurrent(), ("vmap", "stacked")))
    for name, levels, x, theta, ways in problems:
        for way in ways:
            one, two = (_inner(levels, x, theta, pair) for pair in (way, "calls"))
            timing = paired(two, one, 10 if quick else 200, clock=time.process_time)
            ratios.append(
                Ratio(
                    f"inner gradients, two calls / one forward ({way}), {name}",
                    timing.ratio,
                    1.4,
                    "higher",
                    f"{1e6 * timing.first:.0f} against {1e6 * timing.second:.0f} microseconds",
                )
            )
    return ratios


def _recurrent() -> tuple[Levels, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A recurrent cell written out, whose many small operations cost their launch alone."""
    generator = torch.Generator().manual_seed(0)
    data, target = torch.randn(40, 16, 8, generator=generator), torch.randn(16, generator=generator)

    def loss(x: Any, theta: Any, _: Any) -> Tensor:
        state = torch.zeros(*x[0].shape[:-2], 16, 16)
        for letter in data:
            state = torch.tanh(letter @ x[0] + state @ x[1])
        return ((state.mean(-1) - target).square() * theta[0].exp()).mean(-1)

    x = (0.3 * torch.randn(8, 16, generator=generator), 0.2 * torch.randn(16, 16, generator=generator))
    return Levels(loss, lambda x, theta, _: x[0].square().sum()), x, (torch.zeros(16),)


def _inner(levels: Levels, x: Any, theta: Any, pair: Any) -> Callable[[], object]:
    method = PenaltyBilevel(levels, x, theta, lr=1e-6, inner_lr=1e-6, sigma=0.1, pair=pair)
    return lambda: method._inner_gradients(None, None)


def _steps(method: BilevelMethod, count: int) -> Callable[[], object]:
    return lambda: method.run(count, every=1000)


def _ms(seconds: float, steps: int) -> str:
    return f"{1e3 * seconds / steps:.2f}"
