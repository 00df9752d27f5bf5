"""What a working-set solver is made of: the columns, the loss by its predictions, and the penalty by its blocks.

    weight * mean_i f(x_i w + b, y_i) + penalty(w)

A loss knows its value, its negative gradient `u` and its curvature `h` by the predictions, and its part of the dual objective. A penalty
knows its blocks (a coordinate, a group, a feature with all its outputs): how far each is from its condition, where the dual objective is
finite, and which compiled loop runs over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from poise.solvers.working_set_loops import SEPARABLE, loops

__all__ = [
    "Columns",
    "Grouped",
    "HuberLoss",
    "LogisticLoss",
    "Loss",
    "MultinomialLoss",
    "Rows",
    "Separable",
    "SquaredLoss",
    "Structure",
]

Array = Any


@dataclass
class Columns:
    """A matrix by its columns: dense in Fortran order, or compressed.

    Attributes:
        n, p: rows and columns.
        pack: what every compiled loop takes first.
        norms: Euclidean norm of every column, f64 [p].
    """

    n: int
    p: int
    pack: tuple[bool, Array, Array, Array, Array]

    @classmethod
    def of(cls, X: Array) -> Columns:
        """Take a NumPy array or a SciPy sparse matrix of float32 or float64; what is in the right order is not copied."""
        if hasattr(X, "tocsc"):
            csc = X.tocsc()
            if not csc.has_canonical_format:
                csc = csc.copy() if csc is X else csc
                csc.sum_duplicates()
            # Unsigned indices spare the loops a test for negative ones.
            indices = np.ascontiguousarray(csc.indices, dtype=np.int32).view(np.uint32)
            # Of two rows and columns, so that it has the type of a dense matrix in Fortran order and nothing is compiled twice.
            dense = np.zeros((2, 2), csc.data.dtype, order="F")
            return cls(X.shape[0], X.shape[1], (True, dense, csc.data, indices, csc.indptr.astype(np.int64)))
        empty = np.zeros(0, X.dtype)
        return cls(
            X.shape[0], X.shape[1], (False, np.asfortranarray(X), empty, np.zeros(0, np.uint32), np.zeros(0, np.int64))
        )  # fmt: skip

    @property
    def dtype(self) -> Any:
        return self.pack[1].dtype

    @cached_property
    def norms(self) -> Array:
        L, hs = np.empty(self.p), np.empty(self.p)
        loops().curvatures(*self.pack, np.arange(self.p), np.ones(self.n), 0.0, L, hs)
        return np.sqrt(L)

    def products(self, r: Array, skip: Array, out: Array) -> None:
        """out[j] = column j times r for the columns that are not skipped; r [n, outputs] and out [p, outputs] are flat."""
        loops().all_products(*self.pack, r, skip, out)

    def predictions(self, w: Array, outputs: int = 1) -> Array:
        """Return X w, f64 [n * outputs]; columns whose coefficients are 0 cost nothing."""
        z = np.zeros(self.n * outputs)
        used = np.flatnonzero(w.reshape(self.p, outputs).any(axis=1))
        loops().add_columns(*self.pack, used, w.reshape(self.p, outputs)[used].ravel(), z)
        return z


# ---- losses ----------------------------------------------------------------------------------------------------------


class Loss(Protocol):
    """A sum over examples `sum_i s_i f(z_i, y_i)`; `s` are the examples' weights, z is [n, outputs] flat.

    Attributes:
        outputs: predictions of one example.
        quadratic: whether one quadratic model is exact.
    """

    @property
    def outputs(self) -> int: ...
    @property
    def quadratic(self) -> bool: ...

    def value(self, z: Array) -> float:
        """Return the loss."""
        ...

    def pieces(self, z: Array) -> tuple[Array, Array]:
        """Return the negative gradient u [n * outputs] and curvatures h [n] that bound the Hessian of an example."""
        ...

    def intercept_curvature(self, z: Array, h: Array) -> Array:
        """Return the Hessian by the intercepts, [outputs, outputs], or its diagonal where it is one number for all."""
        ...

    def dual(self, c: float, u: Array) -> float:
        """Return minus the conjugate's sum at `-c u`: the loss' part of the dual objective."""
        ...


@dataclass
class SquaredLoss:
    """f(z, y) = (z - y)^2 / 2, summed over outputs."""

    y: Array
    s: Array
    outputs: int = 1
    quadratic = True

    @cached_property
    def _wide(self) -> Array:
        return np.repeat(self.s, self.outputs) if self.outputs > 1 else self.s

    def value(self, z: Array) -> float:
        r = self.y - z
        return 0.5 * float(r @ (self._wide * r))

    def pieces(self, z: Array) -> tuple[Array, Array]:
        return self._wide * (self.y - z), self.s

    def intercept_curvature(self, z: Array, h: Array) -> Array:
        return h.sum()

    def dual(self, c: float, u: Array) -> float:
        used = self._wide > 0
        return float(c * (u @ self.y) - 0.5 * c * c * np.sum(u[used] ** 2 / self._wide[used]))


@dataclass
class LogisticLoss:
    """f(z, y) = log(1 + exp(-y z)), y in {-1, 1}."""

    y: Array
    s: Array
    outputs = 1
    quadratic = False

    def value(self, z: Array) -> float:
        m = self.y * z
        return float(self.s @ (np.log1p(np.exp(-np.abs(m))) + np.maximum(-m, 0.0)))

    def pieces(self, z: Array) -> tuple[Array, Array]:
        e = np.exp(-np.abs(z))
        small = e / (1.0 + e)
        # The probability of the other label; small where the margin is large, without cancellation.
        wrong = np.where(self.y * z > 0, small, 1.0 - small)
        return self.s * self.y * wrong, self.s * np.maximum(small * (1.0 - small), 1e-10)

    def intercept_curvature(self, z: Array, h: Array) -> Array:
        return h.sum()

    def dual(self, c: float, u: Array) -> float:
        from scipy.special import xlogy

        used = self.s > 0
        q = np.clip(c * (u * self.y)[used] / self.s[used], 0.0, 1.0)
        return -float(self.s[used] @ (xlogy(q, q) + xlogy(1.0 - q, 1.0 - q)))


@dataclass
class HuberLoss:
    """f(z, y) = (z - y)^2 / 2 within delta, delta |z - y| - delta^2 / 2 beyond."""

    y: Array
    s: Array
    delta: float
    outputs = 1
    quadratic = False

    def value(self, z: Array) -> float:
        r = np.abs(self.y - z)
        return float(self.s @ np.where(r <= self.delta, 0.5 * r * r, self.delta * (r - 0.5 * self.delta)))

    def pieces(self, z: Array) -> tuple[Array, Array]:
        r = self.y - z
        u = np.clip(r, -self.delta, self.delta)
        # Halfway between the true curvature, which is 0 beyond delta, and the weight that bounds the loss from above.
        bound = self.delta / np.maximum(np.abs(r), self.delta)
        return self.s * u, self.s * np.where(np.abs(r) <= self.delta, 1.0, 0.5 * bound)

    def intercept_curvature(self, z: Array, h: Array) -> Array:
        return h.sum()

    def dual(self, c: float, u: Array) -> float:
        used = self.s > 0
        v = c * u[used]
        return float(v @ self.y[used] - 0.5 * np.sum(v * v / self.s[used]))


@dataclass
class MultinomialLoss:
    """f(z, y) = logsumexp(z) - z_y, y in 0 .. outputs - 1."""

    y: Array
    s: Array
    outputs: int
    quadratic = False

    def _log_probabilities(self, z: Array) -> Array:
        z = z.reshape(-1, self.outputs)
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    def value(self, z: Array) -> float:
        return -float(self.s @ self._log_probabilities(z)[np.arange(len(self.y)), self.y])

    def pieces(self, z: Array) -> tuple[Array, Array]:
        p = np.exp(self._log_probabilities(z))
        # diag(p) - p p' is no larger than 2 max p (1 - p) times the identity.
        h = self.s * np.maximum(2.0 * (p * (1.0 - p)).max(axis=1), 1e-10)
        u = -p
        u[np.arange(len(self.y)), self.y] += 1.0
        return (self.s[:, None] * u).ravel(), h

    def intercept_curvature(self, z: Array, h: Array) -> Array:
        p = np.exp(self._log_probabilities(z))
        q = self.s[:, None] * p
        return np.diag(q.sum(axis=0)) - q.T @ p

    def dual(self, c: float, u: Array) -> float:
        from scipy.special import xlogy

        used = self.s > 0
        v = -c * u.reshape(-1, self.outputs)[used] / self.s[used][:, None]
        v[np.arange(len(v)), self.y[used]] += 1.0
        v = np.clip(v, 0.0, 1.0)
        return -float(self.s[used] @ xlogy(v, v).sum(axis=1))


# ---- penalties -------------------------------------------------------------------------------------------------------


class Structure(Protocol):
    """A penalty by its blocks.

    Attributes:
        blocks: how many.
        gap: whether the dual objective can be made finite by scaling, so that there is a duality gap.
        limit: f64 [blocks]; a block of zeros whose `reach` is below it meets its condition and adds nothing to the dual objective.
    """

    @property
    def blocks(self) -> int: ...
    @property
    def gap(self) -> bool: ...
    @property
    def limit(self) -> Array: ...

    def value(self, w: Array) -> float: ...
    def reach(self, v: Array) -> Array:
        """Return the size of every block of v = X' u, f64 [blocks]."""
        ...

    def rooms(self, w: Array, v: Array) -> Array:
        """Return how far every block of v is from leaving the subdifferential at w, negative where it is outside."""
        ...

    def active(self, w: Array) -> Array:
        """Return which blocks are not 0."""
        ...

    def columns_of(self, blocks: Array) -> Array: ...
    def scale(self, v: Array) -> float:
        """Return the largest c in [0, 1] for which the dual objective is finite at c u."""
        ...

    def conjugate(self, c: float, v: Array) -> float: ...
    def bounds(self, norms: Array) -> Array:
        """Return the norm of every block of columns."""
        ...

    def spread(self, flags: Array) -> Array:
        """Return the flags of blocks as flags of columns."""
        ...

    def local(self, blocks: Array) -> tuple[Structure, Array]:
        """Return the penalty of some blocks alone, and the places of their coefficients."""
        ...

    def smooth_part(self, w: Array) -> tuple[Array, Array, Array] | None:
        """Return where w is at no corner, and the penalty's gradient [k] and Hessian [k, k] there; None where it is concave.

        Only places count where w can move either way.
        """
        ...

    def within(self, w: Array, new: Array) -> Array:
        """Return `new` with what has crossed a corner since w put on it."""
        ...

    def runner(self, columns: Columns, cols: Array, h: Array, inv: float) -> Callable[..., tuple[int, float]]:
        """Return the loop over these blocks under curvatures h: `run(w, u, shift, epochs, tolerance) -> (epochs, largest step)`."""
        ...


SLOTS = 6
"""Iterates that an extrapolation combines, and one more."""


def _curvatures(columns: Columns, cols: Array, h: Array, inv: float) -> tuple[Array, Array]:
    L, hs = np.empty(len(cols)), np.empty(len(cols))
    loops().curvatures(*columns.pack, cols, h, inv, L, hs)
    return L, hs


@dataclass
class Separable:
    """A penalty of single coordinates: `l1 |x| + l2 x^2 / 2` within bounds, or a concave one.

    Args:
        l1, l2, low, high: f64 [p].
        kind: SEPARABLE, MCP or SCAD.
        knee, a: where a concave penalty bends; see `poise.penalties.MCP` and `SCAD`.
    """

    l1: Array
    l2: Array
    low: Array
    high: Array
    kind: int = SEPARABLE
    knee: float = 1.0
    a: float = 3.7

    @property
    def blocks(self) -> int:
        return len(self.l1)

    @cached_property
    def gap(self) -> bool:
        if self.kind != SEPARABLE:
            return False
        bounded = np.isfinite(self.low) & np.isfinite(self.high)
        return bool(np.all((self.l1 > 0) | (self.l2 > 0) | bounded))

    @cached_property
    def limit(self) -> Array:
        return np.where((self.low <= 0) & (self.high >= 0), self.l1, -1.0)

    @property
    def _numbers(self) -> tuple[Array, Array, Array, Array]:
        return self.l1, self.l2, self.low, self.high

    def value(self, w: Array) -> float:
        return float(loops().penalty_value(self.kind, w, *self._numbers, self.knee, self.a))

    def reach(self, v: Array) -> Array:
        return np.abs(v)

    def rooms(self, w: Array, v: Array) -> Array:
        out = np.empty(len(w))
        loops().rooms(self.kind, w, v, *self._numbers, self.knee, self.a, out)
        return out

    def active(self, w: Array) -> Array:
        return w != 0

    def columns_of(self, blocks: Array) -> Array:
        return blocks

    def scale(self, v: Array) -> float:
        return float(loops().largest_scale(v, *self._numbers))

    def conjugate(self, c: float, v: Array) -> float:
        return float(loops().conjugate_sum(c, v, *self._numbers))

    def bounds(self, norms: Array) -> Array:
        return norms

    def spread(self, flags: Array) -> Array:
        return flags

    def local(self, blocks: Array) -> tuple[Separable, Array]:
        l1, l2, low, high = (a[blocks] for a in self._numbers)
        some = Separable(l1, l2, low, high, self.kind, self.knee, self.a)
        return some, blocks

    def smooth_part(self, w: Array) -> tuple[Array, Array, Array] | None:
        if self.kind != SEPARABLE:
            return None
        used = np.flatnonzero((w != 0) & (w > self.low) & (w < self.high))
        slope = self.l1[used] * np.sign(w[used]) + self.l2[used] * w[used]
        return used, slope, np.diag(self.l2[used])

    def within(self, w: Array, new: Array) -> Array:
        return np.clip(np.where(w * new < 0, 0.0, new), self.low, self.high)

    def runner(self, columns: Columns, cols: Array, h: Array, inv: float) -> Callable[..., tuple[int, float]]:
        L, hs = _curvatures(columns, cols, h, inv)
        same = bool(np.all(h == h[0]))
        h = h.astype(columns.dtype, copy=False)

        def run(w: Array, u: Array, shift: Array, epochs: int, tolerance: float) -> tuple[int, float]:
            # A column without curvature leaves its coefficient to the penalty alone.
            for k in np.flatnonzero(L <= 0):
                w[k] = min(max(0.0, self.low[k]), self.high[k])
            made: tuple[int, float] = loops().scalar_epochs(
                *columns.pack, cols, w, u, h, same, L, hs, inv, shift, self.kind, *self._numbers, self.knee, self.a,
                SLOTS, epochs, tolerance,
            )  # fmt: skip
            return made

        return run


@dataclass
class Grouped:
    """`sum_g lam_g |w_g| + ridge |w|^2 / 2` over disjoint groups of coordinates.

    Args:
        order: int64 [p], the coordinates, group after group.
        ptr: int64 [groups + 1], where each group begins in `order`.
        lam: f64 [groups].
        ridge: of the squared norm.
    """

    order: Array
    ptr: Array
    lam: Array
    ridge: float = 0.0

    @property
    def blocks(self) -> int:
        return len(self.lam)

    @cached_property
    def gap(self) -> bool:
        return self.ridge > 0 or bool(np.all(self.lam > 0))

    @property
    def limit(self) -> Array:
        return self.lam

    def _norms(self, v: Array) -> Array:
        out = np.empty(self.blocks)
        loops().group_norms(v[self.order], self.ptr, out)
        return out

    def value(self, w: Array) -> float:
        return float(self.lam @ self._norms(w)) + 0.5 * self.ridge * float(w @ w)

    def reach(self, v: Array) -> Array:
        return self._norms(v)

    def rooms(self, w: Array, v: Array) -> Array:
        v = v - self.ridge * w
        norms, reach = self._norms(w), self._norms(v)
        used = norms > 0
        ratio = np.where(used, self.lam / np.where(used, norms, 1.0), 0.0)
        wide = np.empty(len(w))
        wide[self.order] = np.repeat(ratio, np.diff(self.ptr))
        return np.where(used, -self._norms(v - wide * w), self.lam - reach)

    def active(self, w: Array) -> Array:
        return self._norms(w) > 0

    def columns_of(self, blocks: Array) -> Array:
        return self.order[_ranges(self.ptr, blocks)]

    def scale(self, v: Array) -> float:
        if self.ridge > 0:
            return 1.0
        reach = self.reach(v)
        over = reach > self.lam
        return float((self.lam[over] / reach[over]).min(initial=1.0))

    def conjugate(self, c: float, v: Array) -> float:
        if self.ridge == 0:
            return 0.0
        return float(np.sum(np.maximum(c * self.reach(v) - self.lam, 0.0) ** 2)) / (2 * self.ridge)

    def bounds(self, norms: Array) -> Array:
        return self._norms(norms)

    def spread(self, flags: Array) -> Array:
        out = np.empty(len(self.order), bool)
        out[self.order] = np.repeat(flags, np.diff(self.ptr))
        return out

    def local(self, blocks: Array) -> tuple[Grouped, Array]:
        sizes = np.diff(self.ptr)[blocks]
        ptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return Grouped(np.arange(ptr[-1]), ptr, self.lam[blocks], self.ridge), self.columns_of(blocks)

    def smooth_part(self, w: Array) -> tuple[Array, Array, Array] | None:
        norms = self._norms(w)
        wide = np.empty(len(w))
        wide[self.order] = np.repeat(norms, np.diff(self.ptr))
        used = self.order[np.flatnonzero(wide[self.order] > 0)]
        hessian, at = np.zeros((len(used), len(used))), 0
        for g in np.flatnonzero(norms > 0):
            x = w[self.order[self.ptr[g] : self.ptr[g + 1]]] / norms[g]
            block = slice(at, at + len(x))
            hessian[block, block] = self.lam[g] / norms[g] * (np.eye(len(x)) - np.outer(x, x))
            at += len(x)
        hessian += self.ridge * np.eye(len(used))
        charge = np.empty(len(w))
        charge[self.order] = np.repeat(self.lam, np.diff(self.ptr))
        return used, charge[used] * w[used] / wide[used] + self.ridge * w[used], hessian

    def within(self, w: Array, new: Array) -> Array:
        return new

    def runner(self, columns: Columns, cols: Array, h: Array, inv: float) -> Callable[..., tuple[int, float]]:
        _, hs = _curvatures(columns, cols, h, inv)
        squares = np.diff(self.ptr) ** 2
        where = np.concatenate([[0], np.cumsum(squares)]).astype(np.int64)
        G, L = np.empty(where[-1]), np.empty(self.blocks)
        loops().group_grams(*columns.pack, cols, self.ptr, h, hs, inv, self.ridge, where, G, L)
        same = bool(np.all(h == h[0]))
        h = h.astype(columns.dtype, copy=False)

        def run(w: Array, u: Array, shift: Array, epochs: int, tolerance: float) -> tuple[int, float]:
            for g in np.flatnonzero(L <= 0):
                w[self.ptr[g] : self.ptr[g + 1]] = 0.0
            made: tuple[int, float] = loops().group_epochs(
                *columns.pack, cols, self.ptr, w, u, h, same, where, G, L, hs, inv, shift, self.lam, self.ridge, SLOTS, epochs, tolerance
            )  # fmt: skip
            return made

        return run


@dataclass
class Rows:
    """`sum_j lam_j |w_j| + ridge |w_j|^2 / 2` over features with all their outputs, or with `|w_j|_1`.

    Args:
        lam: f64 [p].
        outputs: of one feature.
        together: whether the outputs of a feature are a group.
        ridge: of the squared norm.
    """

    lam: Array
    outputs: int
    together: bool = True
    ridge: float = 0.0

    @property
    def blocks(self) -> int:
        return len(self.lam)

    @cached_property
    def gap(self) -> bool:
        return self.ridge > 0 or bool(np.all(self.lam > 0))

    @property
    def limit(self) -> Array:
        return self.lam

    def value(self, w: Array) -> float:
        return float(loops().row_value(w, self.lam, self.ridge, self.outputs, self.together))

    def reach(self, v: Array) -> Array:
        rows = v.reshape(-1, self.outputs)
        return np.sqrt((rows * rows).sum(axis=1)) if self.together else np.abs(rows).max(axis=1)

    def rooms(self, w: Array, v: Array) -> Array:
        v = v - self.ridge * w
        rows, u = w.reshape(-1, self.outputs), v.reshape(-1, self.outputs)
        if not self.together:
            lam = self.lam[:, None]
            return np.where(rows != 0, -np.abs(u - lam * np.sign(rows)), lam - np.abs(u)).min(axis=1)
        norms = np.sqrt((rows * rows).sum(axis=1))
        used = norms > 0
        away = u - (self.lam / np.where(used, norms, 1.0))[:, None] * rows
        return np.where(used, -np.sqrt((away * away).sum(axis=1)), self.lam - self.reach(v))

    def active(self, w: Array) -> Array:
        return w.reshape(-1, self.outputs).any(axis=1)

    def columns_of(self, blocks: Array) -> Array:
        return blocks

    def scale(self, v: Array) -> float:
        if self.ridge > 0:
            return 1.0
        reach = self.reach(v)
        over = reach > self.lam
        return float((self.lam[over] / reach[over]).min(initial=1.0))

    def conjugate(self, c: float, v: Array) -> float:
        if self.ridge == 0:
            return 0.0
        sizes = self.reach(v) if self.together else np.abs(v)
        lam = self.lam if self.together else np.repeat(self.lam, self.outputs)
        return float(np.sum(np.maximum(c * sizes - lam, 0.0) ** 2)) / (2 * self.ridge)

    def bounds(self, norms: Array) -> Array:
        return norms

    def spread(self, flags: Array) -> Array:
        return flags

    def local(self, blocks: Array) -> tuple[Rows, Array]:
        places = (blocks[:, None] * self.outputs + np.arange(self.outputs)).ravel()
        return replace(self, lam=self.lam[blocks]), places

    def smooth_part(self, w: Array) -> tuple[Array, Array, Array] | None:
        return None

    def within(self, w: Array, new: Array) -> Array:
        return new

    def runner(self, columns: Columns, cols: Array, h: Array, inv: float) -> Callable[..., tuple[int, float]]:
        L, hs = _curvatures(columns, cols, h, inv)
        h = h.astype(columns.dtype, copy=False)

        def run(w: Array, u: Array, shift: Array, epochs: int, tolerance: float) -> tuple[int, float]:
            w.reshape(-1, self.outputs)[L <= 0] = 0.0
            made: tuple[int, float] = loops().row_epochs(
                *columns.pack, cols, w, u, h, L, hs, inv, shift, self.lam, self.ridge, self.together, SLOTS, epochs, tolerance
            )  # fmt: skip
            return made

        return run


def _ranges(ptr: Array, blocks: Array) -> Array:
    """Return the concatenated ranges `ptr[b] .. ptr[b + 1]` of some blocks."""
    first, sizes = ptr[blocks], np.diff(ptr)[blocks]
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - (ends - sizes), sizes)
