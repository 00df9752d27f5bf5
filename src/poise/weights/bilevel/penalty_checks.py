"""Is the penalty exact here? Three looks at a small problem before (or while) a penalty method is trusted.

    penalty_sweep         psi_sigma and its gradient for sigma = sigma_0 2^-i: orders (1 is expected), ||x - z|| / sigma (bounded)
    hypergradient_exact   the limit of the gradients, by the pseudo-inverse of the KKT matrix: many solutions and constraints allowed
    error_bound_modulus   mu in  ||x - prox(x)|| / rho >= mu dist(x, argmin sigma upper + lower), sampled around solutions

All three solve the lower level to `tol` without noise: give whole batches, and float64.

Source: arXiv:2309.01753, sections 3 and 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.operators import ConvexSet
from poise.weights.bilevel.levels import Levels, Tensors, detached, gradients, leaves, norm, shifted
from poise.weights.bilevel.projected import Minimum, Sets, sets_of, spectral_projected_gradient

Active = Callable[[Tensors], Tensor]
"""`active(x) -> [m]`, the constraints that hold with equality (each <= 0 in the set)."""


# ---- the sweep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PenaltyRow:
    """One sigma of a sweep.

    Attributes:
        sigma: the weight of the upper objective.
        value: psi_sigma, 0-dim.
        gradient: of psi_sigma in theta.
        gap: `||x - z|| / sigma`.
        residual: the larger projected gradient that the two inner solutions were left with, divided by sigma.
        x: the minimiser of `sigma upper + lower`.
        z: the lower solution that descent from there reaches: of many, one near the best for the upper objective.
    """

    sigma: float
    value: float
    gradient: Tensors
    gap: float
    residual: float
    x: Tensors
    z: Tensors


@dataclass(frozen=True)
class PenaltySweep:
    """What happens as sigma falls.

    Attributes:
        rows: one for each sigma, the largest first.
        value_order, gradient_order: p in `error ~ sigma^p`, fitted to the differences between neighbours; 1 where theory holds.
            NaN where the differences are rounding: nothing is left to converge.
        warnings: what speaks against exactness, in words; empty where the penalty is exact as far as one can see.
    """

    rows: tuple[PenaltyRow, ...]
    value_order: float
    gradient_order: float
    warnings: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing speaks against the penalty."""
        return not self.warnings

    def __str__(self) -> str:
        lines = [f"{'sigma':>10} {'psi_sigma':>14} {'|gradient|':>12} {'|x-z|/sigma':>12}"]
        lines += [f"{r.sigma:10.3g} {r.value:14.6g} {float(norm(r.gradient)):12.5g} {r.gap:12.5g}" for r in self.rows]
        lines.append(f"orders: value {self.value_order:.2f}, gradient {self.gradient_order:.2f}")
        return "\n".join([*lines, *self.warnings])


def penalty_sweep(
    levels: Levels,
    x: Sequence[Tensor],
    theta: Sequence[Tensor],
    sigmas: Sequence[float] | None = None,
    *,
    lower_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
    lower_batch: Any = None,
    upper_batch: Any = None,
    tol: float = 1e-10,
    max_steps: int = 5000,
) -> PenaltySweep:
    """Solve the penalised problem for falling sigma and look whether value and gradient converge as they should.

    Args:
        levels: the problem.
        x: where the inner minimisations begin.
        theta: where the hyper-objective is looked at.
        sigmas: each half of the last; `2^0 ... 2^-7` where nothing is said.
        lower_set: of x.
        tol: of the projected gradients, relative to sigma.

    Raises:
        InputError: fewer than three sigmas, or some that do not fall at one ratio, or are not positive.

    >>> two = Levels(lambda x, t, _: (x[0] - 2*t[0]).square().sum() / 2, lambda x, t, _: (x[0] - 1).square().sum() / 2)
    >>> sweep = penalty_sweep(two, [torch.zeros(1, dtype=torch.float64)], [torch.ones(1, dtype=torch.float64)])
    >>> sweep.exact, round(sweep.rows[0].value, 6)                       # (2 - 1)^2 / (2 (1 + sigma))
    (True, 0.25)
    """
    given = [2.0**-i for i in range(8)] if sigmas is None else [float(s) for s in sigmas]
    _check_sigmas(given)
    theta, start = detached(theta), detached(x)
    sets = sets_of(lower_set, start, "lower_set")
    below = _solve(levels, start, theta, 0.0, sets, lower_batch, upper_batch, tol * given[-1], max_steps)
    rows = []
    for sigma in given:
        # From the solution below, so that both stay in one basin where there are several.
        above = _solve(levels, below.point, theta, sigma, sets, lower_batch, upper_batch, tol * sigma, max_steps)
        # Of many lower solutions the nearest one: the gradient is the same, and the gap says how far x is from all of them.
        near = _solve(levels, above.point, theta, 0.0, sets, lower_batch, upper_batch, tol * sigma, max_steps).point
        direct = levels.upper_gradients(above.point, theta, upper_batch)[2]
        at_x = levels.lower_gradient_of_theta(above.point, theta, lower_batch)
        at_z = levels.lower_gradient_of_theta(near, theta, lower_batch)
        rows.append(
            PenaltyRow(
                sigma=sigma,
                value=float((above.value - below.value) / sigma),
                gradient=shifted(direct, 1 / sigma, shifted(at_x, -1.0, at_z)),
                gap=float(norm(shifted(above.point, -1.0, near))) / sigma,
                residual=max(above.residual, below.residual) / sigma,
                x=above.point,
                z=near,
            )
        )
    return _judged(tuple(rows), tol)


def _judged(rows: tuple[PenaltyRow, ...], tol: float) -> PenaltySweep:
    size = max(float(norm(r.gradient)) for r in rows)
    values = [abs(b.value - a.value) for a, b in itertools.pairwise(rows)]
    turned = [float(norm(shifted(b.gradient, -1.0, a.gradient))) for a, b in itertools.pairwise(rows)]
    sigmas = [r.sigma for r in rows[:-1]]
    least = 100 * max(tol, *(r.residual for r in rows))
    value_order = _order(sigmas, values, least * max(1.0, max(abs(r.value) for r in rows)))
    gradient_order = _order(sigmas, turned, least * max(1.0, size))
    found = []
    for name, order in (("value", value_order), ("gradient", gradient_order)):
        if order < 0.5:
            found.append(
                f"penalty not exact here: the {name} converges with order {order:.2f} in sigma, where 1 is expected"
            )
    gaps, norms = [r.gap for r in rows], [float(norm(r.gradient)) for r in rows]
    for name, path in (("||x - z|| / sigma", gaps), ("the gradient's norm", norms)):
        tail = path[-3:]
        if all(b > 1.2 * a and b > least for a, b in itertools.pairwise(tail)):
            found.append(f"penalty not exact here: {name} grows as sigma falls, from {path[0]:.3g} to {path[-1]:.3g}")
    return PenaltySweep(rows, value_order, gradient_order, tuple(found))


def _order(sigmas: Sequence[float], differences: Sequence[float], least: float) -> float:
    """Return the slope of log difference against log sigma, where three differences or more stand above rounding."""
    pairs = [(math.log(s), math.log(d)) for s, d in zip(sigmas, differences, strict=True) if d > least]
    if len(pairs) < 3:
        return math.nan
    # The smaller half: a rate is a statement about the limit.
    pairs = pairs[-max(3, len(pairs) // 2) :]
    a, b = sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)
    return sum((p - a) * (q - b) for p, q in pairs) / sum((p - a) ** 2 for p, _ in pairs)


def _check_sigmas(sigmas: Sequence[float]) -> None:
    if len(sigmas) < 3 or min(sigmas) <= 0:
        raise InputError(f"penalty_sweep: give three positive sigmas or more, and these are {list(sigmas)}.")
    ratios = [b / a for a, b in itertools.pairwise(sigmas)]
    if max(ratios) >= 1 or max(ratios) / min(ratios) > 1.001:
        raise InputError(
            f"penalty_sweep: sigmas must fall at one ratio, such as 1, 1/2, 1/4, and these are {list(sigmas)}."
        )


def _solve(
    levels: Levels,
    start: Tensors,
    theta: Tensors,
    sigma: float,
    sets: Sets,
    lower_batch: Any,
    upper_batch: Any,
    tol: float,
    max_steps: int,
    anchor: Tensors | None = None,
    rho: float = 1.0,
) -> Minimum:
    """Minimise `sigma upper + lower` in x, with `||x - anchor||^2 / (2 rho)` where an anchor is given."""

    def value_and_gradient(x: Tensors) -> tuple[Tensor, Tensors]:
        points = leaves(x)
        levels.counters.lower_gradients += 1
        with torch.enable_grad():
            value = levels.lower(points, theta, lower_batch)
            if sigma:
                levels.counters.upper_gradients += 1
                value = value + sigma * levels.upper(points, theta, upper_batch)
            if anchor is not None:
                value = value + norm(shifted(points, -1.0, anchor)).square() / (2 * rho)
            return value.detach(), gradients(value, points)

    return spectral_projected_gradient(value_and_gradient, start, sets, tol, max_steps)


# ---- the exact hypergradient ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactHypergradient:
    """The gradient of psi from the KKT system of the lower level.

    Attributes:
        gradient: d psi / d theta.
        multipliers: of the active constraints, float [m]; negative ones say that a constraint is not active after all.
        rank: of the KKT matrix, of `size` rows.
        size: constraints and lower variables together.
        outside: share of d2 lower/dx dtheta that lies outside of the KKT matrix's range; 0 is what the formula asks for.
    """

    gradient: Tensors
    multipliers: Tensor
    rank: int
    size: int
    outside: float

    @property
    def valid(self) -> bool:
        """Whether the mixed derivative lies in the range of the KKT matrix: only there does psi have this gradient."""
        return self.outside < 1e-6


def hypergradient_exact(
    levels: Levels,
    x: Sequence[Tensor],
    theta: Sequence[Tensor],
    active: ConvexSet | Sequence[ConvexSet | None] | Active | None = None,
    *,
    lower_batch: Any = None,
    upper_batch: Any = None,
    rcond: float = 1e-9,
) -> ExactHypergradient:
    """Return the hypergradient at a lower solution, also where there are many or constraints hold; for small problems.

        d upper/d theta - [0, d2 lower/dtheta dx] K^+ [0; d upper/dx],    K = [[0, Q], [Q', d2(lower + lambda q)/dx2]],   Q = dq/dx

    Args:
        x: the solution of the lower level that is best for the upper objective, as the `z` of a sweep's last row.
        active: the closed convex sets of x, whose active constraints at x are found, or `active(x) -> [m]` of your own.
        rcond: singular values below this share of the largest are 0.

    Raises:
        InputError: x is far from solving the lower level.

    >>> two = Levels(lambda x, t, _: (x[0].sum() - t[0]).square().sum() / 2, lambda x, t, _: x[0].square().sum() / 2)
    >>> x, t = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    >>> round(float(hypergradient_exact(two, [x], [t]).gradient[0]), 8)           # many solutions: psi = theta^2 / 4
    0.5

    Source: arXiv:2309.01753, theorem 3.2 and proposition 3.1.
    """
    x, theta = detached(tuple(x)), detached(tuple(theta))
    flat, n = _joined(x), sum(t.numel() for t in x)
    constraints = _constraints(active, x)
    value, upper_x, direct = levels.upper_gradients(x, theta, upper_batch)

    def lower(point: Tensor, outer: Tensor) -> Tensor:
        return levels.lower(_split(point, x), _split(outer, theta), lower_batch)

    def q(point: Tensor) -> Tensor:
        return point.new_zeros(0) if constraints is None else constraints(_split(point, x))

    outer = _joined(theta)
    slope = torch.func.grad(lower)(flat, outer)
    jacobian = torch.func.jacrev(q)(flat) if constraints is not None else flat.new_zeros(0, n)
    m = len(jacobian)
    multipliers = torch.linalg.lstsq(jacobian.T, -slope[:, None]).solution[:, 0] if m else flat.new_zeros(0)
    _check_solution(slope + jacobian.T @ multipliers, slope, value)

    def lagrangian(point: Tensor) -> Tensor:
        return lower(point, outer) + (q(point) * multipliers).sum()

    hessian = torch.func.hessian(lagrangian)(flat)
    mixed = torch.func.jacrev(torch.func.grad(lower), argnums=1)(flat, outer)
    kkt = torch.cat([torch.cat([flat.new_zeros(m, m), jacobian], 1), torch.cat([jacobian.T, hessian], 1)])
    inverse = torch.linalg.pinv(kkt, hermitian=True, rtol=rcond)
    padded = torch.cat([flat.new_zeros(m, mixed.shape[1]), mixed])
    left_out = (padded - kkt @ (inverse @ padded)).norm() / padded.norm().clamp_min(torch.finfo(flat.dtype).tiny)
    indirect = padded.T @ (inverse @ torch.cat([flat.new_zeros(m), _joined(upper_x)]))
    return ExactHypergradient(
        gradient=shifted(direct, -1.0, _split(indirect, theta)),
        multipliers=multipliers,
        rank=int(torch.linalg.matrix_rank(kkt, hermitian=True, rtol=rcond)),
        size=m + n,
        outside=float(left_out),
    )


def _constraints(active: Any, x: Tensors) -> Active | None:
    if active is None or (callable(active) and not isinstance(active, ConvexSet)):
        return active
    found = [None if s is None else s.active(t) for s, t in zip(sets_of(active, x, "active"), x, strict=True)]
    if all(f is None for f in found):
        return None
    return lambda point: torch.cat([f(t) for f, t in zip(found, point, strict=True) if f is not None])


def _check_solution(residual: Tensor, slope: Tensor, value: Tensor) -> None:
    far = float(residual.norm())
    if far > 1e-4 * max(1.0, float(slope.norm()), abs(float(value))):
        raise InputError(
            f"hypergradient_exact: x does not solve the lower level: the gradient of its Lagrangian has norm {far:.3g}. "
            "Solve it first (penalty_sweep(...).rows[-1].z), and name every active constraint."
        )


def _joined(tensors: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _split(flat: Tensor, like: Tensors) -> Tensors:
    parts = torch.split(flat, [t.numel() for t in like])
    return tuple(p.view_as(t) for p, t in zip(parts, like, strict=True))


# ---- the error bound --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorBound:
    """The modulus that was found at one sigma.

    Attributes:
        sigma: 0 is the lower objective itself.
        modulus: the smallest ratio over the samples; NaN where no sample had a proximal residual of at most `delta`.
        samples: how many counted.
    """

    sigma: float
    modulus: float
    samples: int


def error_bound_modulus(
    levels: Levels,
    x: Sequence[Tensor],
    theta: Sequence[Tensor],
    sigmas: Sequence[float] = (0.0, 0.01, 0.1, 1.0),
    *,
    rho: float = 0.1,
    radius: float = 0.1,
    delta: float = 1.0,
    samples: int = 20,
    seed: int = 0,
    lower_set: ConvexSet | Sequence[ConvexSet | None] | None = None,
    lower_batch: Any = None,
    upper_batch: Any = None,
    tol: float = 1e-9,
    max_steps: int = 5000,
) -> tuple[ErrorBound, ...]:
    """Estimate mu of the proximal error bound around solutions, for each sigma.

        ||x - prox_{rho h}(x)|| / rho >= mu dist(x, argmin h),    h = sigma upper + lower,    only where the left side is <= delta

    The distance is taken to the solution that descent from x reaches, which is no nearer than the nearest one: so the estimate is from
    below for each sample, and from above over samples. The theory needs one mu for all sigma in [0, sigma_0]; a mu that falls with
    sigma says that the penalised gradients need not converge.

    Args:
        x: where the search for a solution begins.
        rho: of the proximal map.
        radius: of the normal perturbations around the solution.
        delta: residuals above it do not count.
        samples: how many points for each sigma.
    """
    theta, start = detached(theta), detached(x)
    sets = sets_of(lower_set, start, "lower_set")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for sigma in sigmas:
        solved = _solve(levels, start, theta, sigma, sets, lower_batch, upper_batch, tol, max_steps).point
        ratios = []
        for _ in range(samples):
            shift = tuple(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in solved)
            point = tuple(
                t if s is None else s.project(t) for s, t in zip(sets, shifted(solved, radius, shift), strict=True)
            )
            near = _solve(levels, point, theta, sigma, sets, lower_batch, upper_batch, tol, max_steps, point, rho).point
            residual = float(norm(shifted(point, -1.0, near))) / rho
            goal = _solve(levels, point, theta, sigma, sets, lower_batch, upper_batch, tol, max_steps).point
            distance = float(norm(shifted(point, -1.0, goal)))
            if residual <= delta and distance > 100 * tol:
                ratios.append(residual / distance)
        found.append(ErrorBound(sigma, min(ratios, default=math.nan), len(ratios)))
    return tuple(found)
