"""How far a chosen block moves.

    lipschitz         d = -grad_b / L_b, or the proximal step with 1 / L_b
    diagonal          d = -grad_b / D_b with diag(D_b) >= H_b, or the proximal step of each entry
    backtracking      as lipschitz, with an estimate of L_b that doubles until  f(x + d) <= f + <grad_b, d> + L_b/2 ||d||^2
    hessian           the minimiser of the upper model with H_b; the exact minimum where f is quadratic
    exact             the same, for quadratics alone; on a forest by message passing
    newton            the minimiser of the model with the Hessian at x, and a line search on f + h
    projected_newton  another name of newton where there are bounds or kinks
    two_metric        a gradient step on entries held at their bound, a Newton step on the others, projected, with a line search

Models with kinks and bounds are minimised exactly: an active set is guessed by coordinate descent and settled by a linear solve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import IncompatibleError
from poise.solvers.coordinate_losses import State
from poise.solvers.coordinate_penalty import BoundedElasticNet
from poise.solvers.coordinate_rules import Scene
from poise.solvers.message_passing import forest_solve

__all__ = ["UPDATES", "block_minimum"]

SUFFICIENT = 1e-4
NEAR_BOUND = 1e-4
HALVINGS = 60
CUTOFF = 1e-12
"""Eigenvalues of a block below this share of the largest count as 0."""


def lipschitz_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    return _scaled_step(scene, state, block, scene.block_constant(block))


def diagonal_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    return _scaled_step(scene, state, block, scene.diagonal[block])


def _scaled_step(scene: Scene, state: State, block: Tensor, curvature: float | Tensor) -> Tensor:
    x, g = state.x[block], state.gradient_of(block)
    if isinstance(curvature, float) and curvature <= 0:
        return torch.zeros_like(x)
    return scene.charge.prox(x - g / curvature, 1.0 / curvature, block) - x


def backtracking_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    """Double the estimate until the upper bound holds; it is kept for the block, or for its coordinates."""
    if scene.estimates is None:
        scene.estimates = scene.smooth.lipschitz.clone()
        if scene.partition is not None:
            most = scene.smooth.lipschitz.new_zeros(len(scene.partition))
            scene.estimates = most.scatter_reduce(0, scene.partition.owner, scene.smooth.lipschitz, "amax")
    place = block if scene.partition is None else scene.partition.owner[block[:1]]
    curvature = float(scene.estimates[place].max())
    if curvature <= 0:
        return torch.zeros_like(state.x[block])
    g = state.gradient_of(block)
    for _ in range(HALVINGS):
        d = _scaled_step(scene, state, block, curvature)
        change = state.change(block, d)
        scene.evaluations += 1
        slack = 8 * torch.finfo(d.dtype).eps * abs(change) + state.rounding
        if change <= float(g @ d) + 0.5 * curvature * float(d @ d) + slack:
            break
        curvature *= 2.0
    scene.estimates[place] = curvature
    return d


def hessian_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    if scene.partition is not None and scene.partition.forests and scene.charge.free:
        return exact_step(scene, state, block)
    return _minimiser(scene, state, block, scene.smooth.bound(block))


def exact_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    if not scene.smooth.quadratic:
        raise IncompatibleError("BlockCoordinate: update='exact' is for quadratics; use 'newton' (or 'hessian').")
    if scene.charge.free and _is_forest(scene):
        scene.solves += len(block)
        return forest_solve(scene.smooth.h, -state.gradient, block)  # type: ignore[attr-defined]
    return _minimiser(scene, state, block, scene.smooth.bound(block))


def _is_forest(scene: Scene) -> bool:
    return scene.forest_size != 0 if scene.partition is None else scene.partition.forests


def _minimiser(scene: Scene, state: State, block: Tensor, h: Tensor) -> Tensor:
    scene.solves += len(block) ** 3 // 3
    g = state.gradient_of(block)
    if scene.charge.free:
        return -solve_semidefinite(h, g)
    if scene.charge.exact is None:
        raise IncompatibleError(
            "BlockCoordinate: blocks are minimised exactly with l1, l2 and bounds; with this penalty use update='lipschitz', 'diagonal' or "
            "'backtracking'."
        )
    return block_minimum(h, g, state.x[block], scene.charge.exact.at(block))


def newton_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    d = _minimiser(scene, state, block, state.hessian(block))
    if scene.smooth.quadratic:
        return d
    x, g = state.x[block], state.gradient_of(block)
    slope = float(g @ d) + scene.charge.change(x, x + d, block)

    def charged(move: Tensor) -> float:
        return scene.charge.change(x, x + move, block)

    return _search(scene, state, block, lambda length: length * d, lambda length, move: length * slope, charged)


def two_metric_step(scene: Scene, state: State, block: Tensor) -> Tensor:
    """Bertsekas' two-metric projection; `l1` counts as a slope, so entries must not change sign."""
    exact = scene.charge.exact
    if exact is None or not _keeps_sign(exact):
        raise IncompatibleError(
            "BlockCoordinate: update='two_metric' is for bounds, and for l1 on entries that cannot change sign. Use 'projected_newton'."
        )
    h = exact.at(block)
    x = state.x[block]
    sign = torch.where(h.lower >= 0, 1.0, -1.0).to(x)
    g = state.gradient_of(block) + h.l1 * sign + h.l2 * x
    held = ((x < h.lower + NEAR_BOUND) & (g > 0)) | ((x > h.upper - NEAR_BOUND) & (g < 0))
    d = torch.zeros_like(x)
    total = float((scene.smooth.lipschitz[block] + h.l2)[held].sum())
    d[held] = -g[held] / total if total > 0 else 0.0
    work = (~held).nonzero()[:, 0]
    if len(work):
        matrix = state.hessian(block)[work[:, None], work] + torch.diag(h.l2[work])
        d[work] = -solve_semidefinite(matrix, g[work])
        scene.solves += len(work) ** 3 // 3

    def arc(length: float) -> Tensor:
        return torch.minimum(torch.maximum(x + length * d, h.lower), h.upper) - x

    def charged(move: Tensor) -> float:
        # no sign changes, so the charge is a polynomial
        return float((h.l1 * sign + h.l2 * (x + 0.5 * move)) @ move)

    return _search(scene, state, block, arc, lambda length, move: float(g @ move), charged)


def _keeps_sign(h: BoundedElasticNet) -> bool:
    return bool(((h.l1 == 0) | (h.lower >= 0) | (h.upper <= 0)).all())


def _search(
    scene: Scene,
    state: State,
    block: Tensor,
    path: Callable[[float], Tensor],
    promise: Callable[[float, Tensor], float],
    charged: Callable[[Tensor], float],
) -> Tensor:
    """Halve the length until f + h falls by a share of what the slope promises; no move where it never does."""
    length = 1.0
    for _ in range(HALVINGS):
        move = path(length)
        change, promised = state.change(block, move) + charged(move), promise(length, move)
        scene.evaluations += 1
        # a promise below the rounding of the value is taken at its word
        if change <= SUFFICIENT * min(promised, 0.0) or abs(promised) + abs(change) <= state.rounding:
            return move
        length /= 2.0
    return torch.zeros_like(state.x[block])


# ---- models of a block -----------------------------------------------------------------------------------------------


def solve_semidefinite(h: Tensor, g: Tensor) -> Tensor:
    """Return `H^-1 g`, by the pseudo-inverse where H is singular."""
    factor, failed = torch.linalg.cholesky_ex(h)
    pivots = factor.diagonal()
    if int(failed) == 0 and float(pivots.min()) ** 2 > CUTOFF * float(pivots.max()) ** 2:
        return torch.cholesky_solve(g[:, None], factor)[:, 0]
    values, vectors = torch.linalg.eigh(h)
    kept = values > CUTOFF * values[-1].clamp_min(0.0)
    inverse = torch.where(kept & (values > 0), 1.0 / torch.where(values > 0, values, 1.0), 0.0)
    found: Tensor = vectors @ (inverse * (vectors.T @ g))
    return found


def block_minimum(h: Tensor, g: Tensor, x: Tensor, penalty: BoundedElasticNet) -> Tensor:
    """Minimise `<g, d> + 1/2 d' H d + h(x + d)` to rounding; `penalty` is that of the block.

    Coordinate descent guesses which entries stand at a kink or a bound; a linear solve over the others settles the rest where it keeps
    their signs and leaves no slope at those that stand.
    """
    like = x
    matrix, slope, start = (v.detach().cpu().double().numpy().copy() for v in (h, g, x))
    l1, l2, lower, upper = (
        v.detach().cpu().double().numpy() for v in (penalty.l1, penalty.l2, penalty.lower, penalty.upper)
    )
    matrix[np.diag_indices(len(start))] += l2
    y = start.copy()
    # the gradient of the smooth part of the model at y, ridge included
    left = slope + l2 * start
    scale = np.abs(slope).max() + l1.max() + np.abs(left).max()
    sweep = _loops()["sweep"]
    for rounds in range(200):
        sweep(matrix, l1, lower, upper, y, left, 20 if rounds else 5)
        settled = _settle(matrix, l1, lower, upper, y, left)
        if settled is not None:
            y, left = settled
        if _stationary(l1, lower, upper, y, left) <= 1e-14 * scale:
            break
    return torch.from_numpy(y - start).to(like)


def _settle(matrix: Any, l1: Any, lower: Any, upper: Any, y: Any, left: Any) -> tuple[Any, Any] | None:
    """Solve over the entries that stand nowhere, or return None where that crosses a kink or a bound, or is singular."""
    free = (y > lower) & (y < upper) & ((y != 0) | (l1 == 0))
    if not free.any():
        return None
    inner = matrix[np.ix_(free, free)]
    right = left[free] + l1[free] * np.sign(y[free])
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(inner))
    if int(failed):
        return None
    d = -torch.cholesky_solve(torch.from_numpy(right)[:, None], factor)[:, 0].numpy()
    moved = y[free] + d
    crossed = (l1[free] > 0) & (np.sign(moved) != np.sign(y[free]))
    if crossed.any() or (moved <= lower[free]).any() or (moved >= upper[free]).any():
        return None
    fresh, step = y.copy(), np.zeros_like(y)
    fresh[free], step[free] = moved, d
    return fresh, left + matrix @ step


def _stationary(l1: Any, lower: Any, upper: Any, y: Any, left: Any) -> float:
    low = np.where(y > 0, l1, -l1)
    high = np.where(y < 0, -l1, l1)
    below = np.where(y <= lower, -np.inf, low) + left
    above = -left - np.where(y >= upper, np.inf, high)
    return float(np.maximum(np.maximum(below, above), 0.0).max())


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    from numba import njit

    return {"sweep": njit(cache=True, nogil=True)(_sweep)}


def _sweep(h: Any, l1: Any, lower: Any, upper: Any, y: Any, left: Any, sweeps: int) -> None:
    """Minimise over one entry after the other; `left` is the smooth part's gradient at y."""
    k = len(y)
    for _ in range(sweeps):
        moved = 0.0
        for i in range(k):
            if h[i, i] <= 0.0:
                continue
            at = y[i] - left[i] / h[i, i]
            level = l1[i] / h[i, i]
            fresh = max(abs(at) - level, 0.0)
            if at < 0.0:
                fresh = -fresh
            fresh = min(max(fresh, lower[i]), upper[i])
            d = fresh - y[i]
            if d != 0.0:
                for j in range(k):
                    left[j] += h[j, i] * d
                y[i] = fresh
                moved = max(moved, abs(d))
        if moved == 0.0:
            break


Update = Callable[[Scene, State, Tensor], Tensor]
UPDATES: dict[str, Update] = {
    "backtracking": backtracking_step,
    "diagonal": diagonal_step,
    "exact": exact_step,
    "hessian": hessian_step,
    "lipschitz": lipschitz_step,
    "newton": newton_step,
    "projected_newton": newton_step,
    "two_metric": two_metric_step,
}
