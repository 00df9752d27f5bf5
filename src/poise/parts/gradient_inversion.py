"""Invert the gradient of a convex function: `f(y) = grad psi(y) = x`, many examples side by side.

    y = argmin psi(y) - <x, y>         convex; its gradient is f(y) - x, and its Hessian the Jacobian of f

Examples that have converged leave the batch, so nobody waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from poise.ascent import lbfgs, nonlinear_cg, slope_search

__all__ = ["METHODS", "invert_gradient"]

METHODS = ("newton", "cg", "ls")
Of = Callable[[Tensor, Tensor], Tensor]
_SHORT, _FAR = 0.5, 0.1


def invert_gradient(
    potential: Of, gradient: Of, x: Tensor, start: Tensor, method: str, tol: float, max_iter: int | None
) -> tuple[Tensor, Tensor]:
    """Return y and `||f(y) - x||` of each example.

    Args:
        potential: `psi(y, which) -> [p]` of the examples in `which`.
        gradient: `f(y, which) -> [p, n]`, differentiable.
        x, start: float64 [batch, n].
        method: one of `METHODS`.
        tol: the residual that is asked for.
        max_iter: most iterations.
    """
    if method == "newton":
        y = _newton(gradient, x, start, tol, max_iter or 100)
    else:
        oracle = _squares(gradient, x) if method == "ls" else _dual(potential, gradient, x)
        ascend = lbfgs if method == "ls" else nonlinear_cg
        # The ascent stops by the sum of absolute entries of its own gradient. That of the squares is J (f(y) - x): ask for less.
        wanted = x.new_full((len(x),), tol if method == "cg" else 1e-3 * tol)
        y = ascend(oracle, start, wanted, max_iter or 2000).x
    with torch.no_grad():
        every = torch.arange(len(x), device=x.device)
        return y, (gradient(y, every) - x).norm(dim=1)


def _dual(potential: Of, gradient: Of, x: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return value and gradient of <x, y> - psi(y), to be maximised."""

    def oracle(y: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return (x[which] * y).sum(1) - potential(y, which), x[which] - gradient(y, which)

    return oracle


def _squares(gradient: Of, x: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return value and gradient of -1/2 ||f(y) - x||^2, to be maximised."""

    def oracle(y: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            f = gradient(point, which)
            away = (f - x[which]).detach()
            (found,) = torch.autograd.grad(f, point, away)
        return -0.5 * away.square().sum(1), -found

    return oracle


def _newton(gradient: Of, x: Tensor, start: Tensor, tol: float, max_iter: int) -> Tensor:
    """Newton's method whose steps are found by conjugate gradients, with a line search by the slope alone."""
    end = start.clone()
    which = torch.arange(len(x), device=x.device)
    y = end.clone()

    def uphill(y: Tensor, which: Tensor) -> Tensor:
        with torch.no_grad():
            return x[which] - gradient(y, which)

    for _ in range(max_iter):
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            f = gradient(point, which)
        away = f.detach() - x[which]
        length = away.norm(dim=1)
        going = length > tol
        if not bool(going.any()):
            break
        direction = _step(f, point, away, length)
        share, moved = slope_search(uphill, which, y, -away, direction, torch.ones_like(length), _SHORT, _FAR)
        y = torch.where((moved & going)[:, None], y + share[:, None] * direction, y)
        end[which] = y
        # A row that finds no step is at the limit of rounding.
        keep = going & moved
        which, y = which[keep], y[keep]
        if not len(which):
            break
    return end


def _step(f: Tensor, point: Tensor, away: Tensor, length: Tensor) -> Tensor:
    """Solve (J + damping) d = -(f - x) by conjugate gradients, to a share of the residual that falls with it."""
    damping = (1e-3 * length.clamp(max=1.0))[:, None]

    def times(v: Tensor) -> Tensor:
        return torch.autograd.grad(f, point, v, retain_graph=True)[0] + damping * v

    wanted = (length.sqrt().clamp(max=0.1) * length).square()
    d, r = torch.zeros_like(away), -away
    p, square = r.clone(), r.square().sum(1)
    for _ in range(min(2 * away.shape[1] + 10, 250)):
        active = square > wanted
        if not bool(active.any()):
            break
        moved = times(p)
        share = torch.where(active, square / (p * moved).sum(1).clamp_min(1e-300), 0.0)[:, None]
        d, r = d + share * p, r - share * moved
        fresh = r.square().sum(1)
        p = r + (fresh / square.clamp_min(1e-300))[:, None] * p
        square = torch.where(active, fresh, square)
    return d
