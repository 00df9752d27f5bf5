"""What MAID costs in lower-level work beside fixed accuracies and HOAG, and what a hypergradient costs beside torchopt.

Work is lower gradients and products with the lower Hessian until the same gap F - min F, on least squares whose minimum is known. Times
are CPU seconds of one thread. Memory is the peak of what PyTorch holds during a call, from its own record of allocations.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread, paired
from poise.claims.p04 import NEAR, work_until
from poise.tasks.bilevel_denoising import tv_denoising
from poise.tasks.bilevel_regression import quadratic
from poise.weights.bilevel import HOAG, MAID, AcceleratedGradient, ImplicitHypergradient, Levels

ACCURACIES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def run(quick: bool) -> list[Ratio]:
    """Ratios of lower-level work, of seconds and of bytes."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchopt announces what functorch became
        results = [ratio for largest in (3.0, 10.0) for ratio in _work(largest, 1 if quick else 3)]
        return [*results, *_against_torchopt(quick), _against_a_plain_loop(quick)]


def _work(largest: float, seeds: int) -> list[Ratio]:
    adaptive, mixed, tight, best, hoag, names = [], [], [], [], [], []
    for seed in range(seeds):
        task = quadratic(seed, largest)
        method = MAID(task.levels, task.theta, task.x, **task.constants)
        method.run(max_outer=75)
        target = NEAR * task.measures["gap"](method.x, method.theta)
        task = quadratic(seed, largest)
        adaptive.append(work_until(task, MAID(task.levels, task.theta, task.x, **task.constants), target))
        mixed.append(task.levels.counters.mixed_products)
        fixed = {}
        for eps in ACCURACIES:
            task = quadratic(seed, largest)
            rival: Any = MAID(task.levels, task.theta, task.x, eps0=eps, delta0=eps, accuracy="fixed", **task.constants)
            fixed[eps] = work_until(task, rival, target)
        tight.append(fixed[1e-7])
        best.append(min(fixed.values()))
        rivals = {}
        for schedule in ("geometric", "quadratic", "cubic"):
            task = quadratic(seed, largest)
            rivals[schedule] = work_until(task, HOAG(task.levels, task.theta, task.x, schedule), target, 8_000)
        hoag.append(min(rivals.values()))
        names.append(min(rivals, key=lambda name: rivals[name]))
    condition = f"condition {largest**2:.0f}"
    sizes = f"{seeds} seeds, d = 10, to one gap; mixed products besides: {fmean(mixed):.0f}"
    each = f"MAID {_listed(adaptive)}, fixed 1e-7 {_listed(tight)}, best fixed {_listed(best)}; {sizes}"
    rivals_text = f"MAID {_listed(adaptive)}, HOAG {_listed(hoag)} ({', '.join(names)}; inf: not reached with 8,000)"
    mean = lambda rows: fmean(a / b for a, b in zip(adaptive, rows, strict=True))  # noqa: E731
    worst = max(a / b for a, b in zip(adaptive, best, strict=True))
    return [
        Ratio(f"lower work of MAID / of a fixed accuracy of 1e-7, {condition}", mean(tight), 0.6, "lower", each),
        Ratio(f"lower work of MAID / of the best fixed accuracy, worst seed, {condition}", worst, 1.1, "lower", each),
        Ratio(
            f"lower work of MAID / of HOAG with its best schedule, {condition}", mean(hoag), 1.0, "lower", rivals_text
        ),
    ]


def _listed(values: list[float]) -> str:
    return "/".join(f"{v:.0f}" for v in values)


def _against_torchopt(quick: bool) -> list[Ratio]:
    """One hypergradient of a logistic regression with a log-weight for each coefficient, at one lower minimum."""
    try:
        import torchopt
    except ImportError:
        return []
    rows, d = (200, 50) if quick else (2000, 500)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for _ in range(2))
    truth = torch.randn(d, generator=generator, dtype=torch.float64) / d**0.5
    y, z = (a @ truth).sign(), (b @ truth).sign()
    theta = torch.zeros(d, dtype=torch.float64)

    def lower(x: Any, t: Any, _: Any) -> Tensor:
        return functional.softplus(-y * (a @ x[0])).sum() + (t[0].exp() * x[0].square()).sum() / 2

    def upper(x: Any, t: Any, _: Any) -> Tensor:
        return functional.softplus(-z * (b @ x[0])).sum()

    levels = Levels(lower, upper)
    least = AcceleratedGradient(levels, 1.0)((torch.zeros(d, dtype=torch.float64),), (theta,), 1e-9).x[0]
    right = float(levels.upper_gradients((least,), (theta,))[1][0].norm())
    tolerance = 1e-8
    ours = ImplicitHypergradient(levels, tolerance=tolerance * right, warm_start=False, check=False)

    def optimality(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.grad(lambda w: lower((w,), (t,), None))(x)

    solver = torchopt.diff.implicit.custom_root(
        optimality, argnums=1, solve=torchopt.linear_solve.solve_cg(maxiter=1000, rtol=tolerance, atol=0.0)
    )(lambda x, t: least.clone())

    def theirs() -> Tensor:
        leaf = theta.clone().requires_grad_()
        return torch.autograd.grad(upper((solver(least, leaf),), None, None), leaf)[0]

    def mine() -> Tensor:
        return ours((least,), (theta,)).gradient[0]

    error = float((mine() - theirs()).norm() / theirs().norm())
    timing = paired(mine, theirs, 5 if quick else 20, clock=time.process_time)
    detail = (
        f"logistic regression {rows} x {d}, conjugate gradients to 1e-8: {timing.first * 1e3:.1f} against "
        f"{timing.second * 1e3:.1f} ms, torchopt {torchopt.__version__}; relative difference {error:.1e}"
    )
    held, other = _peak(mine), _peak(theirs)
    return [
        Ratio("seconds of a hypergradient / torchopt", timing.ratio, 1.0, "lower", detail),
        Ratio(
            "peak bytes of a hypergradient / torchopt",
            held / other,
            1.0,
            "lower",
            f"{held / 1024:.0f} against {other / 1024:.0f} KiB on the same problem",
        ),
    ]


def _peak(call: Callable[[], object]) -> int:
    """The most that was allocated at once during a call, beyond what was there before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = top = 0
    for _, change in changes:
        held += change
        top = max(top, held)
    return top


def _against_a_plain_loop(quick: bool) -> Ratio:
    """Accelerated gradients with certificates over four crops, beside the same iteration written by hand."""
    corners = ((150, 200), (20, 60), (300, 420), (200, 500))
    task = tv_denoising(corners, 32 if quick else 64)
    theta, start = (torch.tensor(-3.0, dtype=torch.float64),), task.x[0]
    smooth = float(task.constants["smoothness"](theta))
    beta = (smooth**0.5 - 1) / (smooth**0.5 + 1)
    solver = AcceleratedGradient(task.levels, 1.0, task.constants["smoothness"], samples=True)
    count = solver((start,), theta, 1e-4).iterations
    # All samples stay in the batch, so that both sides take gradients of one size.
    solver = AcceleratedGradient(task.levels, 1.0, task.constants["smoothness"], max_iterations=count, samples=True)

    def ours() -> None:
        for _ in range(5):
            solver((start,), theta, 1e-12)

    def plain() -> None:
        for _ in range(5):
            y, before = start, start
            for _ in range(count):
                leaf = y.detach().requires_grad_()
                gradient = torch.autograd.grad(task.levels.lower((leaf,), theta, None), leaf)[0]
                if float(gradient.norm()) < 1e-12:
                    break
                x = y - gradient / smooth
                y, before = x + beta * (x - before), x

    timing = paired(ours, plain, 5 if quick else 20, clock=time.process_time)
    detail = (
        f"TV on {len(corners)} crops of {start.shape[1]} x {start.shape[2]}, {count} gradients: "
        f"{timing.first / 5 / count * 1e6:.0f} against {timing.second / 5 / count * 1e6:.0f} microseconds a gradient"
    )
    return Ratio("seconds per lower gradient / plain PyTorch loop", timing.ratio, 1.2, "lower", detail)
