"""Claim 04: a bilevel method that chooses accuracy and step on the way ends at the same loss wherever both began, and wastes less.

Study 1, on least squares below and above with the minimum known (200 rows, d = 10, singular values 1 to 3, three seeds, 150 outer
steps): the end from initial accuracies 1e1, 1e-1, 1e-3 and 1e-5, and what fixed accuracies need for the same gap. Study 2, on total
variation denoising of a 64 x 64 crop of a real photograph (noise 0.1, three noise seeds): the PSNR at a budget of 800 lower gradients
and products, beside the best of a grid over the one weight and beside HOAG at the same budget.

`--full` adds the condition number 100, every fixed accuracy of a grid, and the 640 log-weights of a logistic regression on digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from poise.claims import Claim, Finding, Progress
from poise.tasks.bilevel_denoising import tv_denoising
from poise.tasks.bilevel_regression import logistic_weights, quadratic
from poise.tasks.bilevel_task import BilevelTask
from poise.weights.bilevel import HOAG, MAID, AcceleratedGradient

STARTS = (1e1, 1e-1, 1e-3, 1e-5)
LOOSE, STALLS, TIGHT = 1e-1, 1e-3, 1e-7
OUTER, BUDGET, MOST = 150, 800, 40_000
SCHEDULES = ("geometric", "quadratic", "cubic")
NEAR = 1.02
"""A gap is reached where it is within 2 % of the one that is asked for."""


@dataclass
class Measured:
    """What the two studies found: one entry for each seed."""

    spread: list[float] = field(default_factory=list)  # largest final gap over the smallest, over the four starts
    gap: list[float] = field(default_factory=list)
    adaptive: list[float] = field(default_factory=list)  # lower work of MAID to its own final gap
    tight: list[float] = field(default_factory=list)  # of the fixed accuracy 1e-7, to the same gap
    loose_steps: list[int] = field(default_factory=list)  # accepted steps of the fixed accuracy 1e-1
    stalled: list[float] = field(default_factory=list)  # final gap of the fixed accuracy 1e-3, over that of MAID
    noisy: list[float] = field(default_factory=list)
    grid: list[float] = field(default_factory=list)
    maid: list[float] = field(default_factory=list)  # PSNR, the worst over the starts
    hoag: list[float] = field(default_factory=list)  # PSNR, the best over the schedules


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Run both studies on three seeds (`full`: an ill-conditioned problem, a grid of accuracies, and the digits too)."""
    found = Measured()
    extra: dict[str, float] = {}
    seeds = [seed + i for i in range(3)]
    for done, each in enumerate(seeds):
        if progress is not None:
            progress(done / 6, f"least squares, seed {each}")
        _study_quadratic(found, each)
    for done, each in enumerate(seeds):
        if progress is not None:
            progress((3 + done) / 6, f"denoising, seed {each}")
        _study_denoising(found, each)
    if full:
        extra = {**_condition_100(seed), **_digits(seed)}
    return _judge(found, extra)


def _study_quadratic(found: Measured, seed: int) -> None:
    gaps: dict[float, float] = {}
    for eps in STARTS:
        task = quadratic(seed)
        method = _maid(task, eps)
        method.run(max_outer=OUTER)
        gaps[eps] = _gap(task, method)
    target = NEAR * gaps[LOOSE]
    found.spread.append(max(gaps.values()) / min(gaps.values()))
    found.gap.append(gaps[LOOSE])
    for results, eps, fixed in ((found.adaptive, LOOSE, False), (found.tight, TIGHT, True)):
        task = quadratic(seed)
        results.append(work_until(task, _maid(task, eps, fixed), target))
    for eps in (LOOSE, STALLS):
        task = quadratic(seed)
        method = _maid(task, eps, fixed=True)
        method.run(max_outer=OUTER)
        if eps == LOOSE:
            found.loose_steps.append(sum(s.accepted for s in method.trace))
        else:
            found.stalled.append(_gap(task, method) / gaps[LOOSE])


def _study_denoising(found: Measured, seed: int) -> None:
    task = tv_denoising(seed=seed)
    found.noisy.append(task.measures["psnr noisy"](task.x, task.theta))
    found.grid.append(_grid(task, [-5 + 0.125 * i for i in range(25)], "psnr", max))
    ends = []
    for eps in STARTS[:3]:
        task = tv_denoising(seed=seed)
        method = MAID(task.levels, task.theta, task.x, eps0=eps, delta0=eps, **task.constants)
        method.run(budget=BUDGET)
        ends.append(_tight_measure(task, method.theta, "psnr"))
    found.maid.append(min(ends))
    others = []
    for schedule in SCHEDULES:
        task = tv_denoising(seed=seed)
        rival = HOAG(task.levels, task.theta, task.x, schedule)
        rival.run(budget=BUDGET)
        others.append(_tight_measure(task, rival.theta, "psnr"))
    found.hoag.append(max(others))


def _maid(task: BilevelTask, eps: float, fixed: bool = False, **options: Any) -> MAID:
    kind = "fixed" if fixed else "adaptive"
    return MAID(task.levels, task.theta, task.x, eps0=eps, delta0=eps, accuracy=kind, **{**task.constants, **options})


def _gap(task: BilevelTask, method: MAID | HOAG) -> float:
    return task.measures["gap"](method.x, method.theta)


def work_until(task: BilevelTask, method: MAID | HOAG, target: float, most: int = MOST) -> float:
    """Return the lower gradients and products after which the gap is reached; infinity where it is not."""
    while task.levels.counters.lower_work < most:
        method.step()
        if _gap(task, method) <= target:
            return float(task.levels.counters.lower_work)
        if isinstance(method, MAID) and method.stopped:
            break
    return float("inf")


def _grid(task: BilevelTask, values: Sequence[float], measure: str, best: Callable[[list[float]], float]) -> float:
    """The best measure over one value for every entry of theta, each solved from its neighbour."""
    solver = _lower(task)
    x, results = task.x, []
    for value in values:
        theta = tuple(torch.full_like(t, value) for t in task.theta)
        x = solver(x, theta, 1e-3).x
        results.append(task.measures[measure](x, theta))
    return best(results)


def _tight_measure(task: BilevelTask, theta: tuple[torch.Tensor, ...], measure: str) -> float:
    return task.measures[measure](_lower(task)(task.x, theta, 1e-3).x, theta)


def _lower(task: BilevelTask) -> AcceleratedGradient:
    known = task.constants
    return AcceleratedGradient(
        task.levels, known["strong_convexity"], known["smoothness"], 20_000, bool(known.get("samples"))
    )


def _condition_100(seed: int) -> dict[str, float]:
    """Lower work to one gap at condition number 100: MAID, and every fixed accuracy."""
    task = quadratic(seed, largest=10.0)
    method = _maid(task, LOOSE)
    method.run(max_outer=75)
    target = NEAR * _gap(task, method)
    figures = {}
    for eps in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        task = quadratic(seed, largest=10.0)
        figures[f"condition 100/fixed {eps:.0e}"] = work_until(task, _maid(task, eps, fixed=True), target)
    task = quadratic(seed, largest=10.0)
    figures["condition 100/adaptive"] = work_until(task, _maid(task, LOOSE), target)
    return {name: value for name, value in figures.items() if value != float("inf")}


def _digits(seed: int) -> dict[str, float]:
    """Validation and test loss of 640 learned log-weights, beside the best single weight of a grid."""
    task = logistic_weights(seed, start=-8.0)
    best = _grid(task, [-4.0 - 0.5 * i for i in range(13)], "validation loss", min)
    method = _maid(task, LOOSE, step0=100.0, rho_up=2.0)
    method.run(budget=20_000)
    figures = {f"digits/{name}": value(method.x, method.theta) for name, value in task.measures.items()}
    return {**figures, "digits/validation loss of the best single weight": best}


def _judge(found: Measured, extra: dict[str, float]) -> Finding:
    ratio = fmean(a / t for a, t in zip(found.adaptive, found.tight, strict=True))
    behind = max(g - m for g, m in zip(found.grid, found.maid, strict=True))
    spread = max(found.spread)
    figures = {
        "largest gap over smallest": spread,
        "gap": fmean(found.gap),
        "lower work, adaptive": fmean(found.adaptive),
        "lower work, fixed 1e-7": fmean(found.tight),
        "lower work, adaptive over fixed 1e-7": ratio,
        "accepted steps, fixed 1e-1": fmean(found.loose_steps),
        "gap of fixed 1e-3 over adaptive": fmean(found.stalled),
        "PSNR noisy": fmean(found.noisy),
        "PSNR grid": fmean(found.grid),
        "PSNR MAID": fmean(found.maid),
        "PSNR HOAG": fmean(found.hoag),
        **extra,
    }
    measured = (
        f"final gaps from eps0 = 1e1 ... 1e-5 within a factor {spread:.2f}; {fmean(found.adaptive):.0f} lower gradients and products "
        f"against {fmean(found.tight):.0f} of a fixed 1e-7 ({ratio:.2f}x; a prototype of the paper's method: 0.35 to 0.5); fixed 1e-1 "
        f"accepts {fmean(found.loose_steps):.0f} steps, fixed 1e-3 ends at {fmean(found.stalled):.2f} times the gap. Denoising: "
        f"{fmean(found.noisy):.2f} -> {fmean(found.maid):.2f} dB (grid {fmean(found.grid):.2f}, HOAG {fmean(found.hoag):.2f}) with "
        f"{BUDGET} (the paper shows curves only)"
    )
    reasons = []
    if spread > 1.5:
        reasons.append(f"the end depends on the initial accuracy by a factor {spread:.2f}; 1.5 was allowed")
    if not ratio <= 1:
        reasons.append("it costs more than the tight fixed accuracy")
    if behind > 0.05:
        reasons.append(f"the denoised image is {behind:.2f} dB below the grid on one seed; 0.05 was allowed")
    holds = not reasons
    ahead = fmean(found.maid) - fmean(found.hoag)
    if ahead < 0.005:
        reasons.append(f"HOAG with its best schedule does as well on this one weight ({-ahead:+.3f} dB)")
    return Finding("holds" if holds else "fails", measured, "; ".join(reasons), figures)


CLAIM = Claim(
    number=4,
    statement=(
        "Choosing the accuracy of the lower solutions and the step size on the way, a bilevel method ends at the same loss from very "
        "different initial accuracies, where a fixed loose accuracy stalls and a fixed tight one wastes lower-level work (figures: "
        "curves only)."
    ),
    expected=(
        "Final gaps within a factor 1.5 over initial accuracies from 1e1 to 1e-5, at 0.35 to 0.6 of the lower work of a fixed 1e-7; a "
        "fixed 1e-1 accepts no step; total variation within 0.05 dB of the best weight of a grid."
    ),
    falsified=(
        "The final gap depends on the initial accuracy by more than a factor 1.5, or the method costs more than the fixed accuracy 1e-7, "
        "or denoising ends more than 0.05 dB below the grid."
    ),
    run=run,
)
