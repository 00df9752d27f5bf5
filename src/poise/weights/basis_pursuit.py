"""Least absolute sum under linear equations, and the path of the LASSO that leads there.

    nu(lam) = argmin  1/2 |W nu - w|^2 + lam |nu|_1                  the LASSO
    nu(0+)  = argmin  |nu|_1   subject to   W nu = w                 basis pursuit, a linear program

The homotopy follows nu(lam) from lam = max |W'w|, where it leaves 0, down to the lam that is asked for. It is linear in lam between
breakpoints, at which one column enters or leaves; each costs one product with W, and K to 3 K of them are usual. At lam = 0 it
ends in a vertex of the linear program, with at most K entries that are not 0.

Every answer is certified by its dual: `y` with |W'y| <= 1 proves that no nu has a smaller sum than y'w. Where columns tie so
that the path is not defined, the linear program is solved by SciPy's HiGHS, and the LASSO by coordinate descent.

Sources: Osborne, Presnell and Turlach, IMA J. Numer. Anal. 20 (2000); Efron et al., Ann. Statist. 32 (2004), section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poise.errors import InputError

__all__ = ["LassoPath", "Pursuit", "basis_pursuit", "lasso", "lasso_path"]

Array = NDArray[np.float64]
EXACT = 1e-9
"""Relative size of what counts as 0: a gap, a residual, a pivot."""


@dataclass(frozen=True)
class Pursuit:
    """An answer with its proof.

    Attributes:
        coefficients: nu, float64 (T,).
        dual: y, float64 (K,): at lam = 0 the price of each equation, at lam > 0 the residual over lam. `|W'y| <= 1`.
        reduced_costs: `1 - |W'y|`, float64 (T,): 0 in the support; a 0 elsewhere means that another answer is as good.
        residual: |W nu - w|.
        gap: primal minus dual value, relative to the primal; 0 at an optimum.
        lam: the weight of |nu|_1.
        breakpoints: how many the homotopy passed; 0 for the other methods.
        method: "homotopy", "linear program" or "coordinate descent".
    """

    coefficients: Array
    dual: Array
    reduced_costs: Array
    residual: float
    gap: float
    lam: float
    breakpoints: int
    method: str

    @property
    def support(self) -> NDArray[np.int64]:
        """Where nu is not 0."""
        return np.flatnonzero(self.coefficients).astype(np.int64)

    @property
    def alternates(self) -> NDArray[np.int64]:
        """Columns outside the support that could enter at no cost: the answer is not the only one."""
        free = (self.reduced_costs < 1e-7) & (self.coefficients == 0)
        return np.flatnonzero(free).astype(np.int64)


@dataclass(frozen=True)
class LassoPath:
    """The path nu(lam), from 0 at `lams[0]` to `lams[-1]`; linear in between.

    Attributes:
        lams: float64 (breakpoints,), falling.
        supports: the active columns of the piece that ends at each breakpoint.
        values: their coefficients at the breakpoint.
        columns: T.
        complete: whether the path reached the end that was asked for; False where columns tied on the way.
    """

    lams: Array
    supports: tuple[NDArray[np.int64], ...]
    values: tuple[Array, ...]
    columns: int
    complete: bool

    def coefficients(self, number: int) -> Array:
        """Return nu at one breakpoint, float64 (T,)."""
        nu = np.zeros(self.columns)
        nu[self.supports[number]] = self.values[number]
        return nu

    def at(self, lam: float) -> Array:
        """Return nu(lam), float64 (T,).

        Raises:
            InputError: lam lies below the end of the path.
        """
        if lam >= self.lams[0]:
            return np.zeros(self.columns)
        if lam < self.lams[-1]:
            raise InputError(f"The path ends at lam={self.lams[-1]:.3g}, and lam={lam:.3g} lies below.")
        after = int(np.searchsorted(-self.lams, -lam, side="left"))
        high, low = self.lams[after - 1], self.lams[after]
        share = (high - lam) / (high - low) if high > low else 1.0
        return (1 - share) * self.coefficients(after - 1) + share * self.coefficients(after)


def basis_pursuit(columns: Array, target: Array) -> Pursuit:
    """Solve `min |nu|_1  s.t.  W nu = w`.

    Args:
        columns: W, float64 (K, T).
        target: w, float64 (K,).

    Raises:
        InputError: w is not in the span of the columns; it says by how much.

    >>> basis_pursuit(np.array([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]), np.array([1.0, 0.0])).coefficients
    array([1., 0., 0.])
    """
    merged, members = _merge(columns)
    found = _pursue(merged, target)
    return _shared(found, columns, target, members)


def lasso(columns: Array, target: Array, lam: float) -> Pursuit:
    """Solve the LASSO at one lam > 0: `argmin 1/2 |W nu - w|^2 + lam |nu|_1`, W float64 (K, T), w float64 (K,)."""
    merged, members = _merge(columns)
    path = lasso_path(merged, target, lam)
    nu, method = (path.at(lam), "homotopy") if path.complete else (_descend(merged, target, lam), "coordinate descent")
    found = _certified(nu, merged, target, lam, len(path.lams) if path.complete else 0, method)
    if method == "homotopy" and found.gap > EXACT:
        found = _certified(_descend(merged, target, lam), merged, target, lam, 0, "coordinate descent")
    return _shared(found, columns, target, members)


def lasso_path(columns: Array, target: Array, lam: float = 0.0, steps: int | None = None) -> LassoPath:
    """Follow nu from 0 down to `lam`.

    Args:
        columns: W, float64 (K, T).
        target: w, float64 (K,).
        lam: where to stop, >= 0.
        steps: at most so many breakpoints; 20 K + 100 by default.
    """
    walk = _Walk(columns, target)
    limit = steps if steps is not None else 20 * len(target) + 100
    complete = True
    while walk.lam > lam and complete:
        complete = len(walk.lams) <= limit and walk.step(lam)
    return LassoPath(np.array(walk.lams), tuple(walk.supports), tuple(walk.values), columns.shape[1], complete)


class _Walk:
    """The homotopy between two breakpoints: the active columns, their coefficients, and all correlations W'r."""

    def __init__(self, columns: Array, target: Array) -> None:
        self.columns, self.target = columns, target
        self.correlations = target @ columns
        first = int(np.abs(self.correlations).argmax())
        self.start = self.lam = float(abs(self.correlations[first]))
        self.active, self.signs = [first], [float(np.sign(self.correlations[first]))]
        self.nu = np.zeros(1)
        self.left: tuple[int, float] | None = None
        self.lams: list[float] = [self.lam]
        self.supports: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self.values: list[Array] = [np.zeros(0)]

    def step(self, end: float) -> bool:
        """Go to the next breakpoint, or to `end`; False where the active columns depend on each other."""
        own = self.columns[:, self.active]
        try:
            factor = np.linalg.cholesky(own.T @ own)
        except np.linalg.LinAlgError:
            return False
        if factor.diagonal().min() < 1e-7 * factor.diagonal().max():
            return False
        # nu_A grows by `direction`, and every correlation falls by `slopes`, for each unit by which lam falls
        direction = np.linalg.solve(factor.T, np.linalg.solve(factor, np.array(self.signs)))
        slopes = (own @ direction) @ self.columns
        join, entering = self._next_to_join(slopes)
        drop, leaving = self._next_to_leave(direction)
        rest = self.lam - end
        if join >= rest - 1e-10 * self.start or len(self.active) == len(self.target):
            # Once the equations hold up to lam, every correlation reaches 0 together with lam: nobody joins there.
            join = np.inf
        length = min(join, drop, rest)
        self.nu = self.nu + length * direction
        self.correlations = self.correlations - length * slopes
        self.lam = end if length == rest else self.lam - length
        self.lams.append(self.lam)
        self.supports.append(np.array(self.active, np.int64))
        self.values.append(self.nu)
        self.left = None
        if drop <= min(join, length):
            self.left = (self.active.pop(leaving), self.signs.pop(leaving))
            self.nu = np.delete(self.nu, leaving)
        elif join <= length:
            self.active.append(entering)
            self.signs.append(float(np.sign(self.correlations[entering])))
            self.nu = np.append(self.nu, 0.0)
        return bool(self.active)

    def _next_to_join(self, slopes: Array) -> tuple[float, int]:
        """Return after which fall of lam the next correlation reaches it, and whose."""
        with np.errstate(divide="ignore", invalid="ignore"):
            above = (self.lam - self.correlations) / (1 - slopes)
            below = (self.lam + self.correlations) / (1 + slopes)
        # A slope of 1 keeps its distance to lam for ever.
        above[~((1 - slopes) > 1e-12)] = np.inf
        below[~((1 + slopes) > 1e-12)] = np.inf
        if self.left is not None:  # the column that has just left stands at the bound that it comes from
            (above if self.left[1] > 0 else below)[self.left[0]] = np.inf
        above[self.active] = below[self.active] = np.inf
        both = np.maximum(np.minimum(above, below), 0.0)
        place = int(both.argmin())
        return float(both[place]), place

    def _next_to_leave(self, direction: Array) -> tuple[float, int]:
        """Return after which fall of lam the next coefficient reaches 0, and its place."""
        with np.errstate(divide="ignore", invalid="ignore"):
            fall = np.where(direction * self.signs < 0, -self.nu / direction, np.inf)
        fall[(fall <= 0) & (self.nu == 0)] = np.inf
        place = int(fall.argmin())
        return float(fall[place]), place


def _pursue(columns: Array, target: Array) -> Pursuit:
    size = float(np.linalg.norm(target))
    if size == 0:
        count = columns.shape[1]
        return Pursuit(np.zeros(count), np.zeros_like(target), np.ones(count), 0.0, 0.0, 0.0, 0, "homotopy")
    _refuse_outside(columns, target)
    path = lasso_path(columns, target)
    if path.complete:
        found = _vertex(path, columns, target)
        if found is not None and found.gap <= EXACT and found.residual <= EXACT * size:
            return found
    return _linear_program(columns, target)


def _vertex(path: LassoPath, columns: Array, target: Array) -> Pursuit | None:
    """The end of the path, solved once more without the rounding of the way: nu_A = A^+ w, y = A^{+T} sign."""
    active, values = path.supports[-1], path.values[-1]
    inverse = np.linalg.pinv(columns[:, active])
    nu = np.zeros(columns.shape[1])
    nu[active] = inverse @ target
    nu[active[np.abs(nu[active]) < 1e-12 * np.abs(nu).max()]] = 0.0
    dual = np.asarray(inverse.T @ np.sign(values), dtype=np.float64)
    prices = np.abs(dual @ columns)
    if prices.max() > 1 + EXACT:
        return None
    total = float(np.abs(nu).sum())
    residual = float(np.linalg.norm(columns @ nu - target))
    gap = abs(total - float(dual @ target)) / total
    return Pursuit(nu, dual, np.maximum(1 - prices, 0.0), residual, gap, 0.0, len(path.lams), "homotopy")


def _refuse_outside(columns: Array, target: Array) -> None:
    left, sizes, _ = np.linalg.svd(columns @ columns.T)
    span = left[:, sizes > 1e-13 * sizes[0]]
    residual = float(np.linalg.norm(target - span @ (span.T @ target)))
    if residual > 1e-7 * float(np.linalg.norm(target)):
        raise InputError(
            f"The target's head is not a combination of the source heads: a residual of {residual:.3g} is left of "
            f"{np.linalg.norm(target):.3g} (rank {span.shape[1]} of {len(target)}). Add sources, or allow an error with "
            "lam='noise' or a number above 0."
        )


def _linear_program(columns: Array, target: Array) -> Pursuit:
    """min 1'(u + v)  s.t.  W (u - v) = w,  u, v >= 0, by HiGHS."""
    from scipy.optimize import linprog

    count = columns.shape[1]
    solved = linprog(np.ones(2 * count), A_eq=np.hstack([columns, -columns]), b_eq=target, method="highs")
    if solved.x is None:
        raise InputError(f"The linear program of the relevance has no answer: {solved.message}")
    nu = solved.x[:count] - solved.x[count:]
    dual = np.asarray(solved.eqlin.marginals, dtype=np.float64)
    prices = np.abs(dual @ columns)
    total = float(np.abs(nu).sum())
    return Pursuit(
        nu,
        dual,
        np.maximum(1 - prices, 0.0),
        float(np.linalg.norm(columns @ nu - target)),
        abs(total - float(dual @ target)) / max(total, 1e-300),
        0.0,
        0,
        "linear program",
    )


def _certified(nu: Array, columns: Array, target: Array, lam: float, breakpoints: int, method: str) -> Pursuit:
    """A LASSO's answer with its duality gap: y = r/lam, scaled into |W'y| <= 1."""
    rest = target - columns @ nu
    prices = np.abs(rest @ columns) / lam
    dual = rest / lam
    inside = dual / max(1.0, float(prices.max(initial=0.0)))
    primal = 0.5 * float(rest @ rest) + lam * float(np.abs(nu).sum())
    bound = lam * float(inside @ target) - 0.5 * lam**2 * float(inside @ inside)
    gap = (primal - bound) / max(primal, 1e-300)
    costs = np.maximum(1 - prices, 0.0)
    return Pursuit(nu, dual, costs, float(np.linalg.norm(rest)), max(gap, 0.0), lam, breakpoints, method)


def _merge(columns: Array) -> tuple[Array, NDArray[np.int64] | None]:
    """Keep one of every group of equal (or opposite) columns; for each column its kept one, or None where all differ."""
    # Equal columns have equal products with any vector, so only neighbours in that order are compared.
    keys = np.abs(np.random.default_rng(0).standard_normal(len(columns)) @ columns)
    order = np.argsort(keys, kind="stable")
    near = np.flatnonzero(np.diff(keys[order]) <= 1e-12 * float(keys.max(initial=0.0)))
    kept_of = np.arange(columns.shape[1])
    for place in near:
        one, other = columns[:, order[place]], columns[:, order[place + 1]]
        apart = min(float(np.abs(one - other).max()), float(np.abs(one + other).max()))
        if apart <= 1e-12 * float(np.abs(one).max()):
            kept_of[order[place + 1]] = kept_of[order[place]]
    kept = np.unique(kept_of)
    return (columns, None) if len(kept) == len(kept_of) else (columns[:, kept], kept_of)


def _shared(found: Pursuit, columns: Array, target: Array, kept_of: NDArray[np.int64] | None) -> Pursuit:
    """Give every one of several equal columns the same part, and its opposite the opposite part."""
    if kept_of is None:
        return found
    _, place, sizes = np.unique(kept_of, return_inverse=True, return_counts=True)
    signs = np.where((columns * columns[:, kept_of]).sum(0) < 0, -1.0, 1.0)
    nu = signs * found.coefficients[place] / sizes[place]
    residual = float(np.linalg.norm(columns @ nu - target))
    return replace(found, coefficients=nu, reduced_costs=found.reduced_costs[place], residual=residual)


def _descend(columns: Array, target: Array, lam: float, sweeps: int = 100_000) -> Array:
    return np.asarray(_descent()(np.asfortranarray(columns), target, lam, sweeps, 1e-13))


@functools.cache
def _descent() -> Callable[..., Any]:
    """Compile cyclic coordinate descent for the LASSO, on first use."""
    import numba

    @numba.njit(cache=False)
    def descend(columns: Any, target: Any, lam: Any, sweeps: Any, tolerance: Any) -> Any:
        count = columns.shape[1]
        nu, rest = np.zeros(count), target.copy()
        squares = np.zeros(count)
        for t in range(count):
            squares[t] = (columns[:, t] ** 2).sum()
        for _ in range(sweeps):
            largest = 0.0
            for t in range(count):
                if squares[t] == 0.0:
                    continue
                pull = (columns[:, t] * rest).sum() + squares[t] * nu[t]
                new = np.sign(pull) * max(abs(pull) - lam, 0.0) / squares[t]
                move = new - nu[t]
                if move != 0.0:
                    rest -= move * columns[:, t]
                    nu[t] = new
                    largest = max(largest, abs(move) * np.sqrt(squares[t]))
            if largest <= tolerance * np.sqrt((target**2).sum()):
                break
        return nu

    return descend
