"""Solvers of sparse recovery that nobody trains: what learned steps are compared with, and where they can be taken to.

    min over x  1/2 ||y - A x||^2 + weight h(x)

`recover` takes constant steps, a list of steps (learned ones too), backtracking or momentum, for all signals of a batch at once.
Its certificate is the proximal gradient, `L max |x - prox(x - A'(A x - y) / L)|`, which is 0 exactly at stationary points; for
the l1 norm `lasso_gap` bounds how far the value is from the least.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.penalties import L0
from poise.problem import Certificate
from poise.solvers.signal_operators import SignalOperator, as_signal_operator
from poise.solvers.unfolded import Unfolded
from poise.solvers.unfolded_layers import TopK
from poise.solvers.unfolded_pass import rows_of

__all__ = ["Recovery", "lasso_gap", "plain_model", "recover"]


EVERY = 10
"""Iterations between two looks at the residual."""
GROWTH = 1.5
"""By how much backtracking tries to lengthen a step, every iteration."""


@dataclass(frozen=True)
class Recovery:
    """What a solver found, signal by signal.

    Attributes:
        x: `[batch, n]`, or `[n]`.
        objective: `[batch]`.
        residual: `[batch]`, what `measure` names, 0 at a solution.
        tolerance: of the residual.
        iterations: that were made.
        status: "converged", or why not.
        history: the mean objective after every tenth iteration and at the end.
        trace: every iterate `[iterations, batch, n]` where it was asked for.
    """

    x: Tensor
    objective: Tensor
    residual: Tensor
    tolerance: float
    iterations: int
    status: str
    history: tuple[float, ...] = ()
    trace: Tensor | None = None
    measure: str = "largest entry of the proximal gradient"

    @property
    def converged(self) -> Tensor:
        """Which signals are within the tolerance, bool `[batch]`."""
        return self.residual <= self.tolerance

    def certificate(self) -> Certificate:
        """Return the certificate of the whole batch: mean value, largest residual, and the support of a single signal."""
        support = self.x.nonzero().flatten() if self.x.ndim == 1 else None
        return Certificate(
            float(self.objective.mean()), float(self.residual.max()), self.tolerance, self.measure, self.iterations, self.status,
            support=support, history=self.history,
        )  # fmt: skip


def recover(
    operator: Any,
    y: Tensor,
    penalty: Any = None,
    *,
    weight: float = 0.1,
    step: str | float | Sequence[float] = "1/L",
    momentum: bool = False,
    iterations: int | None = None,
    tolerance: float = 1e-4,
    x0: Tensor | None = None,
    trace: bool = False,
) -> Recovery:
    """Minimise by proximal gradient steps: ISTA, IHT, FISTA, or the steps that an unfolded solver learned.

    Args:
        operator: A: `[m, n]`, `[batch, m, n]` or a `SignalOperator`.
        y: `[batch, m]` or `[m]`.
        penalty: h; the l1 norm by default.
        weight: of h.
        step: "c/L" for a number c ("1/L", "1.9/L"), a number, a list with a step for every iteration, or "backtracking" (halves a signal's
            step until its quadratic model bounds it, and tries a longer one each time).
        momentum: Nesterov's (FISTA).
        iterations: at most; the length of a list of steps, 1000 otherwise. A list is never stopped early.
        tolerance: of the residual.
        x0: where to start; 0 by default.
        trace: keep every iterate.

    Raises:
        InputError: a step that is not above 0, fewer steps than iterations, or what `Unfolded` refuses.

    >>> recover(torch.eye(2), torch.tensor([2.0, 0.1]), weight=0.5).x
    tensor([1.5000, 0.0000])
    """
    A = as_signal_operator(operator)
    # the plain model checks arguments, and knows objective and proximal map
    model = plain_model(penalty, weight)
    rows, start = rows_of(A, y, x0)
    steps, most = _steps(step, A, iterations)
    x = torch.zeros(len(rows), A.shape[1], dtype=rows.dtype, device=rows.device) if start is None else start
    with torch.no_grad():
        x, made, history, kept = _iterate(model, A, rows, x, steps, most, momentum, tolerance, trace)
        residual = _residual(model, A, rows, x)
        objective = model.objective(A, rows, x)
    status = status_of(residual, tolerance, made)
    if steps is None or len(steps) == 1:  # a list is a number of layers, and is judged by who asks for it
        warn_of("recover", status)
    single = y.ndim == 1
    return Recovery(
        x[0] if single else x, objective, residual, tolerance, made, status, tuple(history),
        None if not trace else torch.stack(kept)[:, 0] if single else torch.stack(kept),
    )  # fmt: skip


def _iterate(
    model: Unfolded, A: SignalOperator, y: Tensor, x: Tensor, steps: list[Tensor] | None, most: int, momentum: bool, tolerance: float,
    trace: bool,
) -> tuple[Tensor, int, list[float], list[Tensor]]:  # fmt: skip
    history: list[float] = []
    kept: list[Tensor] = []
    point, inertia = x, 1.0
    backtracked = torch.full((len(y), 1), 2.0, dtype=y.real.dtype, device=y.device) / A.lipschitz.to(y.real.dtype)
    made = 0
    while made < most:
        slope = -A.adjoint(A.residual(point, y))
        if steps is None:
            fresh, backtracked = _backtrack(model, A, y, point, slope, backtracked)
        else:
            alpha = steps[made if len(steps) > 1 else 0]
            fresh = model.prox(point - alpha * slope, alpha)
        following = 0.5 * (1 + math.sqrt(1 + 4 * inertia**2)) if momentum else 1.0
        point = fresh + (inertia - 1) / following * (fresh - x) if momentum else fresh
        x, inertia, made = fresh, following, made + 1
        if trace:
            kept.append(x)
        if made % EVERY and made < most:
            continue
        history.append(float(model.objective(A, y, x).mean()))
        looks = steps is None or len(steps) == 1
        if looks and bool((_residual(model, A, y, x) <= tolerance).all()):
            break
    return x, made, history, kept


def _backtrack(
    model: Unfolded, A: SignalOperator, y: Tensor, x: Tensor, slope: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """Halve a signal's step until `f(z) <= f(x) + <f'(x), z - x> + ||z - x||^2 / (2 alpha)`; 1/L always does."""
    before = A.residual(x, y).abs().square().sum(-1) / 2
    least = 1.0 / A.lipschitz.to(y.real.dtype)
    alpha = GROWTH * alpha
    while True:
        fresh = model.prox(x - alpha * slope, alpha)
        moved = fresh - x
        after = A.residual(fresh, y).abs().square().sum(-1) / 2
        linear = (slope.conj() * moved).real.sum(-1)
        bound = before + linear + moved.abs().square().sum(-1) / (2 * alpha[:, 0])
        rounding = 8 * torch.finfo(before.dtype).eps * before
        fails = (after > bound + rounding) & (alpha[:, 0] > least.reshape(-1))
        if not bool(fails.any()):
            return fresh, alpha
        alpha = torch.where(fails[:, None], (alpha / 2).maximum(least), alpha)


def _residual(model: Unfolded, A: SignalOperator, y: Tensor, x: Tensor) -> Tensor:
    bound = A.lipschitz.to(y.real.dtype)
    moved = x - model.prox(x + A.adjoint(A.residual(x, y)) / bound, 1.0 / bound)
    return bound.reshape(-1) * moved.abs().amax(-1)


def _steps(step: Any, A: SignalOperator, iterations: int | None) -> tuple[list[Tensor] | None, int]:
    bound = A.lipschitz
    if step == "backtracking":
        return None, iterations or 1000
    if isinstance(step, str):
        try:
            numbers = [float(step.removesuffix("/L")) / bound]
        except ValueError:
            raise InputError(
                f"recover: step is 'c/L' with a number c, a number, a list or 'backtracking', and it is {step!r}."
            ) from None
        most = iterations or 1000
    elif isinstance(step, int | float):
        numbers, most = [torch.as_tensor(float(step), dtype=bound.dtype, device=bound.device)], iterations or 1000
    else:
        numbers = [torch.as_tensor(float(s), dtype=bound.dtype, device=bound.device) for s in step]
        most = iterations if iterations is not None else len(numbers)
        if most > len(numbers):
            raise InputError(f"recover: {most} iterations are asked for, and step lists {len(numbers)} steps.")
    if not numbers or not all(bool((s > 0).all() & torch.isfinite(s).all()) for s in numbers):
        raise InputError("recover: every step must be finite and above 0.")
    if most < 1:
        raise InputError(f"recover: iterations must be at least 1, and it is {most}.")
    return numbers, most


def plain_model(penalty: Any, weight: float) -> Unfolded:
    """Return the untrained model that knows objective and proximal map of a penalty (the l1 norm where it is None)."""
    return Unfolded("iht" if isinstance(penalty, L0 | TopK) else "ista", 1, penalty, weight=weight)


def status_of(residual: Tensor, tolerance: float, made: int) -> str:
    """Say in words whether every signal converged."""
    missed = int((~(residual <= tolerance)).sum())
    if not missed:
        return "converged"
    return (
        f"stopped after {made} iterations: {missed} of {len(residual)} signals have a residual above {tolerance:g}, the largest "
        f"{float(residual.max()):.2g}"
    )


def warn_of(name: str, status: str) -> None:
    """Warn where not."""
    if status != "converged":
        warnings.warn(f"{name}: {status}. Allow more iterations or a larger tolerance.", PoiseWarning, stacklevel=3)


def lasso_gap(operator: Any, y: Tensor, x: Tensor, weight: float) -> Tensor:
    """Return the duality gap of `1/2 ||y - A x||^2 + weight ||x||_1` of every signal, `[batch]`: how far its value can be from the least.

    gap = P(x) - D(r s),   D(u) = 1/2 ||y||^2 - 1/2 ||y - u||^2,   r = y - A x,  s = min(1, weight / max |A' r|)

    >>> lasso_gap(torch.eye(2), torch.tensor([[2.0, 0.25]]), torch.tensor([[1.5, 0.0]]), 0.5)
    tensor([0.])
    """
    A = as_signal_operator(operator)
    r = A.residual(x, y)
    steepest = A.adjoint(r).abs().amax(-1)
    share = (weight / torch.where(steepest > 0, steepest, 1.0)).clamp_max(1.0)
    dual = share[:, None] * r
    primal = r.abs().square().sum(-1) / 2 + weight * x.abs().sum(-1)
    bound = (y.abs().square().sum(-1) - (y - dual).abs().square().sum(-1)) / 2
    return primal - bound
