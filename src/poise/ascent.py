"""Maximise many concave functions side by side: limited-memory BFGS and Adam over a batch, each row a problem of its own.

    oracle(x, which) -> (value [p], gradient [p, d])      x [p, d] holds the points of the problems in `which`

Rows converge, stall and leave the batch one by one, so that nobody waits for the slowest and one Python step moves them all.
The line search asks for descent and slope alone (weak Wolfe conditions, by bisection): it also works where the function has kinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ascent", "Oracle", "adam", "lbfgs", "nonlinear_cg", "slope_search"]

Oracle = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_DECREASE, _SLOPE, _TRIALS, _ROUNDING = 1e-4, 0.9, 30, 1e-13


@dataclass
class Ascent:
    """Where an ascent ended.

    Attributes:
        x: float [problems, d].
        value: float [problems].
        residual: float [problems], the sum of the gradient's absolute entries.
        iterations: int64 [problems].
        stalled: bool [problems], no step along the last direction was an ascent: a kink, or the limit of rounding.
        history: the sum of the values after each iteration.
    """

    x: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor
    stalled: Tensor
    history: list[float]


def lbfgs(oracle: Oracle, start: Tensor, tolerance: Tensor, max_iter: int, memory: int = 10) -> Ascent:
    """Ascend until every row's gradient has an L1 norm within its tolerance.

    Args:
        oracle: value and gradient of some of the functions.
        start: float64 [problems, d].
        tolerance: float64 [problems].
        max_iter: most iterations of each row.
        memory: pairs of steps and gradient changes that the inverse Hessian is made of.
    """
    problems = len(start)
    which = torch.arange(problems, device=start.device)
    x = start.clone()
    value, gradient = oracle(x, which)
    end = Ascent(x.clone(), value.clone(), gradient.abs().sum(-1), torch.zeros_like(which), which < 0, [])
    steps = x.new_zeros(problems, 0, x.shape[1])
    changes, fresh = steps.clone(), which >= 0
    for _ in range(max_iter):
        going = (end.residual[which] > tolerance[which]) & ~end.stalled[which]
        if not bool(going.all()):
            which, x, value, gradient, fresh = (t[going] for t in (which, x, value, gradient, fresh))
            steps, changes = steps[going], changes[going]
        if not len(which):
            break
        direction = _two_sided(gradient, steps, changes)
        slope = (direction * gradient).sum(-1)
        uphill = slope > 0
        direction = torch.where(uphill[:, None], direction, gradient)
        first = torch.where(fresh | ~uphill, 1.0 / gradient.abs().sum(-1), 1.0)
        step, next_value, next_gradient, found = _line_search(oracle, which, x, value, gradient, direction, first)
        moved = step[:, None] * direction
        change = gradient - next_gradient
        sound = found & ((moved * change).sum(-1) > 1e-14 * change.square().sum(-1).clamp_min(1e-300))
        moved_pair, change_pair = (torch.where(sound[:, None], t, 0.0) for t in (moved, change))
        steps = torch.cat([steps[:, -(memory - 1) :], moved_pair[:, None]], 1)
        changes = torch.cat([changes[:, -(memory - 1) :], change_pair[:, None]], 1)
        # A row without a step forgets its curvature and tries the gradient once; without one there, it is done.
        end.stalled[which] = ~found & fresh
        steps[~found], changes[~found] = 0.0, 0.0
        fresh = ~found
        x = torch.where(found[:, None], x + moved, x)
        value = torch.where(found, next_value, value)
        gradient = torch.where(found[:, None], next_gradient, gradient)
        residual = gradient.abs().sum(-1)
        end.value[which], end.residual[which] = value, residual
        end.x[which] = x
        end.iterations[which] += 1
        end.history.append(float(end.value.sum()))
    return end


def nonlinear_cg(oracle: Oracle, start: Tensor, tolerance: Tensor, max_iter: int) -> Ascent:
    """Ascend by nonlinear conjugate gradients (Polak and Ribiere, restarted) until every row's gradient is within its tolerance.

    d <- g + max(0, <g, g - g_before> / ||g_before||^2) d

    Arguments as `lbfgs`.
    """
    which = torch.arange(len(start), device=start.device)
    x = start.clone()
    value, gradient = oracle(x, which)
    end = Ascent(x.clone(), value.clone(), gradient.abs().sum(-1), torch.zeros_like(which), which < 0, [])
    direction, length = gradient.clone(), torch.ones_like(value)
    for _ in range(max_iter):
        going = (end.residual[which] > tolerance[which]) & ~end.stalled[which]
        if not bool(going.all()):
            which, x, gradient, direction, length = (t[going] for t in (which, x, gradient, direction, length))
        if not len(which):
            break
        uphill = (direction * gradient).sum(-1) > 0
        direction = torch.where(uphill[:, None], direction, gradient)
        steepest = (direction == gradient).all(-1)
        first = torch.where(steepest, 1.0 / gradient.abs().sum(-1).clamp_min(1e-300), length)
        step, found = slope_search(lambda p, w: oracle(p, w)[1], which, x, gradient, direction, first, 0.1, 0.1)
        x = torch.where(found[:, None], x + step[:, None] * direction, x)
        value, fresh = oracle(x, which)
        factor = (fresh * (fresh - gradient)).sum(-1) / gradient.square().sum(-1).clamp_min(1e-300)
        end.stalled[which] = ~found & steepest
        direction = torch.where(found[:, None], fresh + factor.clamp_min(0.0)[:, None] * direction, fresh)
        gradient, length = fresh, step
        end.x[which], end.value[which], end.residual[which] = x, value, gradient.abs().sum(-1)
        end.iterations[which] += 1
        end.history.append(float(end.value.sum()))
    return end


def slope_search(
    gradient_at: Callable[[Tensor, Tensor], Tensor], which: Tensor, x: Tensor, gradient: Tensor, direction: Tensor, first: Tensor,
    short: float, far: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Find steps along which the slope of a concave function has nearly fallen to 0, by doubling and bisection.

    On a line the slope of a concave function only falls, so it alone says whether a step is too short or too long; values, which drown in
    rounding near the top, are not needed.

    Args:
        gradient_at: gradients of some of the functions at some points.
        which, x, gradient, direction: the problems, where they are, the gradient there, and where to.
        first: steps that are tried first, positive.
        short: a step is too short where more than this share of the first slope is left.
        far: and too long where minus this share is passed.

    Returns:
        Steps, and whether each was found.
    """
    slope = (gradient * direction).sum(-1)
    step, low, high = first.clone(), torch.zeros_like(first), torch.full_like(first, torch.inf)
    rows = (slope > 0).nonzero()[:, 0]
    for _ in range(_TRIALS + 10):
        if not len(rows):
            break
        tried = gradient_at(x[rows] + step[rows, None] * direction[rows], which[rows])
        left = (tried * direction[rows]).sum(-1) / slope[rows]
        is_short, is_far = left > short, left < -far
        low[rows[is_short]], high[rows[is_far]] = step[rows[is_short]], step[rows[is_far]]
        rows = rows[is_short | is_far]
        bounded = high[rows].isfinite()
        step[rows] = torch.where(bounded, 0.5 * (low[rows] + high[rows]), 2.0 * step[rows])
    found = slope > 0
    found[rows] = False
    return step, found


def _two_sided(gradient: Tensor, steps: Tensor, changes: Tensor) -> Tensor:
    """Return the inverse Hessian that the pairs span times the gradient, in the compact form of Byrd, Nocedal and Schnabel.

    H = c I + [S  cY] [[R^-T (D + c Y'Y) R^-1, -R^-T], [-R^-1, 0]] [S  cY]'      R = upper part of S'Y, D its diagonal

    A pair of zeros counts as absent.
    """
    if not steps.shape[1]:
        return gradient
    products = steps @ changes.mT
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    absent = diagonal <= 0
    upper = products.triu() + torch.diag_embed(absent.to(products.dtype))
    inner = changes @ changes.mT
    lengths = inner.diagonal(dim1=-2, dim2=-1)
    last_place = (~absent * torch.arange(1, absent.shape[1] + 1, device=absent.device)).argmax(-1, keepdim=True)
    c = torch.where(
        absent.all(-1, keepdim=True),
        1.0,
        diagonal.gather(-1, last_place) / lengths.gather(-1, last_place).clamp_min(1e-300),
    )[..., None]
    g = gradient[..., None]
    p = torch.linalg.solve_triangular(upper, steps @ g, upper=True)
    right = diagonal[..., None] * p + c * (inner @ p) - c * (changes @ g)
    q = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    ascent: Tensor = c * g + steps.mT @ q - c * (changes.mT @ p)
    return ascent[..., 0]


def _line_search(
    oracle: Oracle, which: Tensor, x: Tensor, value: Tensor, gradient: Tensor, direction: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find steps with enough ascent and a slope that has fallen, by doubling and bisection; rows that have one wait."""
    slope = (direction * gradient).sum(-1)
    step, low, high = first.clone(), torch.zeros_like(first), torch.full_like(first, torch.inf)
    next_value, next_gradient = value.clone(), gradient.clone()
    best = torch.zeros_like(first)
    rows = torch.arange(len(which), device=which.device)
    for _ in range(_TRIALS):
        t = step[rows]
        tried_value, tried_gradient = oracle(x[rows] + t[:, None] * direction[rows], which[rows])
        tried_slope = (tried_gradient * direction[rows]).sum(-1)
        rises = tried_value >= value[rows] + _DECREASE * t * slope[rows]
        # Near the top the ascent drowns in rounding, and the slope alone says that the step is not too long.
        level = tried_value >= value[rows] - _ROUNDING * value[rows].abs()
        rises |= level & (tried_slope >= -(1.0 - 2.0 * _DECREASE) * slope[rows])
        flat = tried_slope <= _SLOPE * slope[rows]
        kept = rows[rises]
        best[kept] = t[rises]
        next_value[kept], next_gradient[kept] = tried_value[rises], tried_gradient[rises]
        low[kept] = t[rises]
        high[rows[~rises]] = t[~rises]
        rows = rows[~(rises & flat)]
        if not len(rows):
            break
        bounded = high[rows].isfinite()
        step[rows] = torch.where(bounded, 0.5 * (low[rows] + high[rows]), 2.0 * step[rows])
    return best, next_value, next_gradient, best > 0


def adam(oracle: Oracle, start: Tensor, steps: int, lr: float) -> Ascent:
    """Make a fixed number of Adam steps; every row makes all of them.

    Args:
        oracle: value and gradient.
        start: float [problems, d].
        steps: how many.
        lr: learning rate, in units of x.
    """
    which = torch.arange(len(start), device=start.device)
    x, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    history: list[Tensor] = []
    value, gradient = oracle(x, which)
    for t in range(1, steps + 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        x = x + lr * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        value, gradient = oracle(x, which)
        history.append(value.sum())
    made = torch.full_like(which, steps)
    values = torch.stack(history).tolist() if history else []
    return Ascent(x, value, gradient.abs().sum(-1), made, which < 0, values)
