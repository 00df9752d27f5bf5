"""The loops of coordinate descent that NumPy cannot fuse: epochs over a working set, with Anderson's extrapolation.

Every loop minimises a quadratic model of the loss over the columns of a working set,

    sum_i  h_i (dz_i)^2 / 2 - u_i dz_i + penalty(w),      dz = X dw + db,

where `u` is the negative gradient of the loss by the predictions. `u` is kept up to date for `dw`; the intercept is the minimiser for
every `w` and stands apart in `shift`, so that the columns are centred without becoming dense: the true residual is `u - h * shift`.

The functions stand here as they are written; `loops()` compiles them when they are first wanted. `sparse` says whether the columns
are in `data, indices, indptr` (compressed columns) or in `X` (dense, Fortran order); the other is empty.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

SEPARABLE, MCP, SCAD = 0, 1, 2
"""Kinds of penalty of one coordinate: `l1 |x| + l2 x^2 / 2` within [low, high]; minimax concave; smoothly clipped."""

_EXACT = 32
"""Groups up to this size are minimised exactly, larger ones by a proximal step."""


@cache
def loops() -> ModuleType:
    """Compile the loops of this file, each when it is first called, and return the file."""
    import sys

    import numba

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    found = globals()
    for name in _COMPILED:
        if hasattr(found[name], "py_func"):  # another thread came first
            continue
        try:
            found[name] = numba.njit(**options, cache=True)(found[name])
        except RuntimeError:  # the folder of the package cannot be written and there is no other cache
            found[name] = numba.njit(**options)(found[name])
    return sys.modules[__name__]


# ---- columns ---------------------------------------------------------------------------------------------------------


def _dot(sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, j: int, r: Any) -> float:
    """Return the product of column j and r."""
    total = 0.0
    if sparse:
        for e in range(indptr[j], indptr[j + 1]):
            total += data[e] * r[indices[e]]
    else:
        for i in range(X.shape[0]):
            total += X[i, j] * r[i]
    return total


def _subtract(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, j: int, d: float, h: Any, same: bool, r: Any
) -> None:
    """r -= d * h * column j; `same` where all of h is h[0]."""
    if same:
        d = d * h[0]
        if sparse:
            for e in range(indptr[j], indptr[j + 1]):
                r[indices[e]] -= d * data[e]
        else:
            for i in range(X.shape[0]):
                r[i] -= d * X[i, j]
    elif sparse:
        for e in range(indptr[j], indptr[j + 1]):
            i = indices[e]
            r[i] -= d * h[i] * data[e]
    else:
        for i in range(X.shape[0]):
            r[i] -= d * h[i] * X[i, j]


def products(sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, r: Any, out: Any) -> None:
    """out[k] = column cols[k] times r."""
    for k in range(len(cols)):
        out[k] = _dot(sparse, X, data, indices, indptr, cols[k], r)


def all_products(sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, r: Any, skip: Any, out: Any) -> None:
    """out[j] = column j times r, where not skipped; r is [n, outputs] flat, out [p, outputs] flat."""
    outputs = len(out) // len(skip)
    for j in range(len(skip)):
        if skip[j]:
            continue
        if outputs == 1:
            out[j] = _dot(sparse, X, data, indices, indptr, j, r)
        else:
            _dots(sparse, X, data, indices, indptr, j, r, outputs, out[j * outputs : (j + 1) * outputs])


def add_columns(sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, w: Any, z: Any) -> None:
    """z += X[:, cols] w; w is [len(cols), outputs] flat, z is [n, outputs] flat."""
    if len(cols) == 0:
        return
    outputs = len(w) // len(cols)
    for k in range(len(cols)):
        j = cols[k]
        for c in range(outputs):
            a = w[k * outputs + c]
            if a == 0.0:
                continue
            if sparse:
                for e in range(indptr[j], indptr[j + 1]):
                    z[indices[e] * outputs + c] += a * data[e]
            else:
                for i in range(X.shape[0]):
                    z[i * outputs + c] += a * X[i, j]


def curvatures(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, h: Any, inv: float, L: Any, hs: Any
) -> None:
    """L[k] = sum h x^2 - (sum h x)^2 inv and hs[k] = sum h x, of column cols[k]."""
    for k in range(len(cols)):
        j = cols[k]
        first = 0.0
        second = 0.0
        if sparse:
            for e in range(indptr[j], indptr[j + 1]):
                a = h[indices[e]] * data[e]
                first += a
                second += a * data[e]
        else:
            for i in range(X.shape[0]):
                a = h[i] * X[i, j]
                first += a
                second += a * X[i, j]
        rest = second - first * first * inv
        # A column that the intercept explains has no curvature left but rounding.
        L[k] = rest if rest > 1e-12 * second else 0.0
        hs[k] = first if inv > 0.0 else 0.0


# ---- one coordinate --------------------------------------------------------------------------------------------------


def _step(
    kind: int, v: float, step: float, l1: float, l2: float, low: float, high: float, knee: float, a: float
) -> float:
    """Return the minimiser of `(x - v)^2 / (2 step) + penalty(x)`."""
    shrink = 1.0 / (1.0 + step * l2)
    v, t = v * shrink, step * shrink * l1
    s = abs(v)
    sign = 1.0 if v > 0 else -1.0
    if kind == SEPARABLE:
        return min(max(sign * max(s - t, 0.0), low), high)
    if kind == MCP:
        bend = 1.0 - t / knee
        if bend <= 0.0:
            return v if s * s > t * knee else 0.0
        if s <= t:
            return 0.0
        return sign * (s - t) / bend if s <= knee else v
    bend = 1.0 - t / ((a - 1.0) * knee)
    if bend > 0.0:
        if s <= knee + t:
            return sign * max(s - t, 0.0)
        return sign * (s - t * a / (a - 1.0)) / bend if s <= a * knee else v
    near = min(max(s - t, 0.0), knee)
    far = max(s, a * knee)
    at_near = 0.5 * (near - s) ** 2 + t * near
    at_far = 0.5 * (far - s) ** 2 + t * knee * (a + 1.0) / 2.0
    return sign * (near if at_near <= at_far else far)


def _value(kind: int, x: float, l1: float, l2: float, low: float, high: float, knee: float, a: float) -> float:
    s = abs(x)
    value = 0.5 * l2 * x * x
    if kind == SEPARABLE:
        return value + l1 * s if low <= x <= high else math.inf
    if kind == MCP:
        s = min(s, knee)
        return value + l1 * (s - 0.5 * s * s / knee)
    if s <= knee:
        return value + l1 * s
    if s <= a * knee:
        return value + l1 * (2.0 * a * knee * s - s * s - knee * knee) / (2.0 * (a - 1.0) * knee)
    return value + 0.5 * l1 * knee * (a + 1.0)


def _room(kind: int, x: float, v: float, l1: float, l2: float, low: float, high: float, knee: float, a: float) -> float:
    """Return how far v is from leaving the subdifferential at a corner x; minus the distance where it is outside.

    A coordinate that is at no corner and meets its condition returns 0.
    """
    if low == high:
        return math.inf
    v -= l2 * x
    s = abs(x)
    slope = l1
    if kind == MCP:
        slope = l1 * max(1.0 - s / knee, 0.0)
    elif kind == SCAD:
        slope = l1 * min(max((a - s / knee) / (a - 1.0), 0.0), 1.0)
    most = slope if x >= 0.0 else -slope
    least = slope if x > 0.0 else -slope
    if x <= low:
        least = -math.inf
    if x >= high:
        most = math.inf
    return min(most - v, v - least)


def rooms(kind: int, w: Any, v: Any, l1: Any, l2: Any, low: Any, high: Any, knee: float, a: float, out: Any) -> None:
    """out[j] = `_room` of every coordinate."""
    for j in range(len(w)):
        out[j] = _room(kind, w[j], v[j], l1[j], l2[j], low[j], high[j], knee, a)


def penalty_value(kind: int, w: Any, l1: Any, l2: Any, low: Any, high: Any, knee: float, a: float) -> float:
    """Return the sum over coordinates."""
    total = 0.0
    for j in range(len(w)):
        total += _value(kind, w[j], l1[j], l2[j], low[j], high[j], knee, a)
    return total


def largest_scale(v: Any, l1: Any, l2: Any, low: Any, high: Any) -> float:
    """Return the largest c in [0, 1] for which the conjugates of all coordinates are finite at c v."""
    c = 1.0
    for j in range(len(v)):
        if l2[j] > 0.0:
            continue
        if (v[j] > l1[j] and high[j] == math.inf) or (-v[j] > l1[j] and low[j] == -math.inf):
            c = min(c, l1[j] / abs(v[j]))
    return c


def conjugate_sum(c: float, v: Any, l1: Any, l2: Any, low: Any, high: Any) -> float:
    """Return the sum over coordinates of `sup over x in [low, high] of c v x - l1 |x| - l2 x^2 / 2`."""
    total = 0.0
    for j in range(len(v)):
        a = c * v[j]
        over = abs(a) - l1[j]
        x = 0.0
        if over > 0.0:
            x = math.inf if l2[j] == 0.0 else over / l2[j]
            x = x if a > 0 else -x
        x = min(max(x, low[j]), high[j])
        # Rounding may leave a coordinate a hair above what the scale allows.
        if math.isfinite(x) and x != 0.0:
            total += a * x - l1[j] * abs(x) - 0.5 * l2[j] * x * x
    return total


# ---- extrapolation ---------------------------------------------------------------------------------------------------


def _coefficients(W: Any, c: Any) -> bool:
    """Solve for the weights, summing to 1, that make the combined step smallest; return whether there are such."""
    slots, m = W.shape
    K = slots - 1
    gram = np.zeros((K, K))
    for a in range(K):
        for b in range(a + 1):
            total = 0.0
            for k in range(m):
                total += (W[a + 1, k] - W[a, k]) * (W[b + 1, k] - W[b, k])
            gram[a, b] = total
            gram[b, a] = total
    trace = 0.0
    for a in range(K):
        trace += gram[a, a]
    if not trace > 0.0:
        return False
    for a in range(K):
        gram[a, a] += 1e-12 * trace
        c[a] = 1.0
    if not _solve(gram, c, K):
        return False
    total = 0.0
    for a in range(K):
        total += c[a]
    if not abs(total) > 0.0:
        return False
    for a in range(K):
        c[a] /= total
        if not math.isfinite(c[a]):
            return False
    return True


def _solve(A: Any, b: Any, k: int) -> bool:
    """Solve A x = b for a positive definite A [k, k] by Cholesky's factors; both are overwritten."""
    for i in range(k):
        for j in range(i + 1):
            total = A[i, j]
            for e in range(j):
                total -= A[i, e] * A[j, e]
            if i == j:
                if not total > 0.0:
                    return False
                A[i, i] = math.sqrt(total)
            else:
                A[i, j] = total / A[j, j]
    for i in range(k):
        total = b[i]
        for e in range(i):
            total -= A[i, e] * b[e]
        b[i] = total / A[i, i]
    for i in range(k - 1, -1, -1):
        total = b[i]
        for e in range(i + 1, k):
            total -= A[e, i] * b[e]
        b[i] = total / A[i, i]
    return True


def _combine(W: Any, U: Any, B: Any, c: Any, w: Any, u: Any, b: Any) -> None:
    """Put the combination of the iterates after the first into w, u, b."""
    for k in range(len(w)):
        total = 0.0
        for a in range(len(c)):
            total += c[a] * W[a + 1, k]
        w[k] = total
    for i in range(len(u)):
        total = 0.0
        for a in range(len(c)):
            total += c[a] * U[a + 1, i]
        u[i] = total
    for q in range(len(b)):
        total = 0.0
        for a in range(len(c)):
            total += c[a] * B[a + 1, q]
        b[q] = total


def _keep(w: Any, u: Any, b: Any, W: Any, U: Any, B: Any, slot: int) -> None:
    # Loops, because the general assignment of slices takes seconds to compile.
    for k in range(len(w)):
        W[slot, k] = w[k]
    for i in range(len(u)):
        U[slot, i] = u[i]
    for q in range(len(b)):
        B[slot, q] = b[q]


def _take(w_new: Any, u_new: Any, b_new: Any, w: Any, u: Any, b: Any) -> None:
    for k in range(len(w)):
        w[k] = w_new[k]
    for i in range(len(u)):
        u[i] = u_new[i]
    for q in range(len(b)):
        b[q] = b_new[q]


def _model(u: Any, h: Any, shift: Any) -> float:
    """Return the quadratic model up to a constant: sum (u - h shift)^2 / (2 h)."""
    outputs = len(shift)
    total = 0.0
    if outputs == 1:
        b = shift[0]
        for i in range(len(h)):
            if h[i] > 0.0:
                r = u[i] - h[i] * b
                total += r * r / h[i]
    else:
        for i in range(len(h)):
            if h[i] > 0.0:
                for c in range(outputs):
                    r = u[i * outputs + c] - h[i] * shift[c]
                    total += r * r / h[i]
    return 0.5 * total


# ---- epochs ----------------------------------------------------------------------------------------------------------


def scalar_epochs(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, w: Any, u: Any, h: Any, same: bool, L: Any, hs: Any,
    inv: float, shift: Any, kind: int, l1: Any, l2: Any, low: Any, high: Any, knee: float, a: float,
    slots: int, epochs: int, tolerance: float,
) -> tuple[int, float]:  # fmt: skip
    """Run epochs over single coordinates until no step is above `tolerance` in units of the gradient; return how many, and the largest."""
    m, n = len(cols), len(u)
    W, U, B = np.empty((slots, m), w.dtype), np.empty((slots, n), u.dtype), np.empty((slots, 1))
    w_new, u_new, b_new, c = np.empty(m, w.dtype), np.empty(n, u.dtype), np.empty(1), np.empty(slots - 1)
    filled, largest = 0, 0.0
    for epoch in range(epochs):
        largest = 0.0
        for k in range(m):
            if L[k] <= 0.0:
                continue
            j = cols[k]
            old = w[k]
            g = _dot(sparse, X, data, indices, indptr, j, u) - shift[0] * hs[k]
            new = _step(kind, old + g / L[k], 1.0 / L[k], l1[k], l2[k], low[k], high[k], knee, a)
            d = new - old
            if d != 0.0:
                w[k] = new
                d = w[k] - old
                _subtract(sparse, X, data, indices, indptr, j, d, h, same, u)
                shift[0] -= d * hs[k] * inv
                largest = max(largest, abs(d) * L[k])
        if largest <= tolerance:
            return epoch + 1, largest
        _keep(w, u, shift, W, U, B, filled)
        filled += 1
        if filled == slots:
            filled = 0  # as a variable below too: a literal would be compiled apart
            if _coefficients(W, c):
                _combine(W, U, B, c, w_new, u_new, b_new)
                before = _model(u, h, shift) + penalty_value(kind, w, l1, l2, low, high, knee, a)
                if _model(u_new, h, b_new) + penalty_value(kind, w_new, l1, l2, low, high, knee, a) < before:
                    _take(w_new, u_new, b_new, w, u, shift)
            _keep(w, u, shift, W, U, B, filled)
            filled = 1
    return epochs, largest


def group_grams(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, ptr: Any, h: Any, hs: Any, inv: float,
    ridge: float, where: Any, G: Any, L: Any,
) -> None:  # fmt: skip
    """G at where[g] = X_g' diag(h) X_g + ridge I less the intercept's part, flat; L[g] bounds its largest eigenvalue."""
    work = np.zeros(len(h))
    for g in range(len(ptr) - 1):
        size = ptr[g + 1] - ptr[g]
        for a in range(size):
            j = cols[ptr[g] + a]
            if sparse:
                for e in range(indptr[j], indptr[j + 1]):
                    work[indices[e]] = h[indices[e]] * data[e]
            else:
                for i in range(len(h)):
                    work[i] = h[i] * X[i, j]
            for b in range(a, size):
                value = _dot(sparse, X, data, indices, indptr, cols[ptr[g] + b], work)
                value -= hs[ptr[g] + a] * hs[ptr[g] + b] * inv
                G[where[g] + a * size + b] = value
                G[where[g] + b * size + a] = value
            if sparse:
                for e in range(indptr[j], indptr[j + 1]):
                    work[indices[e]] = 0.0
        # The largest row sum of a symmetric matrix is no less than its largest eigenvalue.
        L[g] = 0.0
        for a in range(size):
            G[where[g] + a * size + a] += ridge
            row = 0.0
            for b in range(size):
                row += abs(G[where[g] + a * size + b])
            L[g] = max(L[g], row)


def _group_step(G: Any, size: int, v: Any, w: Any, lam: float, L: float, x: Any, A: Any, b: Any) -> None:
    """Put into x the minimiser of `(x - w)' G (x - w) / 2 - v' (x - w) + lam |x|`, for large groups one proximal step towards it."""
    if size > _EXACT:
        norm = 0.0
        for a in range(size):
            x[a] = w[a] + v[a] / L
            norm += x[a] * x[a]
        norm = math.sqrt(norm)
        shrink = max(1.0 - lam / (L * norm), 0.0) if norm > 0.0 else 0.0
        for a in range(size):
            x[a] *= shrink
        return
    norm = 0.0
    start = 0.0
    for a in range(size):
        total = v[a]
        for e in range(size):
            total += G[a * size + e] * w[e]
        x[a] = total
        norm += total * total
        start += w[a] * w[a]
    norm = math.sqrt(norm)
    if norm <= lam:
        for a in range(size):
            x[a] = 0.0
        return
    # x = (G + lam / t I)^-1 a with t = |x|: 1 / |(t G + lam I)^-1 a| - 1 is concave and rising in t, so Newton's method finds its root.
    t = math.sqrt(start)
    if t == 0.0:
        t = (norm - lam) / L
    for _ in range(30):
        for a in range(size):
            for e in range(size):
                A[a, e] = t * G[a * size + e]
            A[a, a] += lam + 1e-14 * L * t
            b[a] = x[a]
        _solve(A, b, size)
        square = 0.0
        slope = 0.0
        for a in range(size):
            square += b[a] * b[a]
        length = math.sqrt(square)
        # The slope is b' G (t G + lam I)^-1 b; one more solve with the factor that A holds.
        for a in range(size):
            total = 0.0
            for e in range(size):
                total += G[a * size + e] * b[e]
            A[size, a] = total
        for a in range(size):
            total = A[size, a]
            for e in range(a):
                total -= A[a, e] * A[size, e]
            A[size, a] = total / A[a, a]
        for a in range(size):
            total = b[a]
            for e in range(a):
                total -= A[a, e] * A[size + 1, e]
            A[size + 1, a] = total / A[a, a]
        for a in range(size):
            slope += A[size, a] * A[size + 1, a]
        move = length * length * (length - 1.0) / slope if slope > 0.0 else 0.0
        close = abs(length - 1.0) <= 1e-12
        if close or not slope > 0.0:
            break
        t = max(t + move, 1e-3 * t)
    for a in range(size):
        x[a] = t * b[a]


def group_epochs(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, ptr: Any, w: Any, u: Any, h: Any, same: bool, where: Any,
    G: Any, L: Any, hs: Any, inv: float, shift: Any, lam: Any, ridge: float, slots: int, epochs: int, tolerance: float,
) -> tuple[int, float]:  # fmt: skip
    """Run epochs over groups of coordinates under `lam_g |w_g|`; see `scalar_epochs`."""
    m, n, groups = len(cols), len(u), len(ptr) - 1
    most = 1
    for g in range(groups):
        most = max(most, ptr[g + 1] - ptr[g])
    v, x, b = np.empty(most), np.empty(most), np.empty(most)
    A = np.empty((most + 2, most))
    old = np.empty(most)
    W, U, B = np.empty((slots, m), w.dtype), np.empty((slots, n), u.dtype), np.empty((slots, 1))
    w_new, u_new, b_new, c = np.empty(m, w.dtype), np.empty(n, u.dtype), np.empty(1), np.empty(slots - 1)
    filled, largest = 0, 0.0
    for epoch in range(epochs):
        largest = 0.0
        for g in range(groups):
            if L[g] <= 0.0:
                continue
            first, size = ptr[g], ptr[g + 1] - ptr[g]
            norm, zero = 0.0, True
            for a in range(size):
                v[a] = _dot(sparse, X, data, indices, indptr, cols[first + a], u) - shift[0] * hs[first + a]
                old[a] = w[first + a]
                v[a] -= ridge * old[a]
                norm += v[a] * v[a]
                zero = zero and old[a] == 0.0
            if zero and math.sqrt(norm) <= lam[g]:
                continue
            _group_step(G[where[g] : where[g] + size * size], size, v, old, lam[g], L[g], x, A, b)
            moved = 0.0
            for a in range(size):
                w[first + a] = x[a]
                d = w[first + a] - old[a]
                if d != 0.0:
                    _subtract(sparse, X, data, indices, indptr, cols[first + a], d, h, same, u)
                    shift[0] -= d * hs[first + a] * inv
                    moved += d * d
            largest = max(largest, math.sqrt(moved) * L[g])
        if largest <= tolerance:
            return epoch + 1, largest
        _keep(w, u, shift, W, U, B, filled)
        filled += 1
        if filled == slots:
            filled = 0
            if _coefficients(W, c):
                _combine(W, U, B, c, w_new, u_new, b_new)
                before = _model(u, h, shift) + group_value(w, ptr, lam, ridge)
                if _model(u_new, h, b_new) + group_value(w_new, ptr, lam, ridge) < before:
                    _take(w_new, u_new, b_new, w, u, shift)
            _keep(w, u, shift, W, U, B, filled)
            filled = 1
    return epochs, largest


def group_norms(v: Any, ptr: Any, out: Any) -> None:
    """out[g] = Euclidean norm of v between ptr[g] and ptr[g + 1]."""
    for g in range(len(ptr) - 1):
        total = 0.0
        for k in range(ptr[g], ptr[g + 1]):
            total += v[k] * v[k]
        out[g] = math.sqrt(total)


def group_value(w: Any, ptr: Any, lam: Any, ridge: float) -> float:
    """Return the sum of lam_g |w_g| + ridge |w_g|^2 / 2."""
    value = 0.0
    for g in range(len(ptr) - 1):
        total = 0.0
        for k in range(ptr[g], ptr[g + 1]):
            total += w[k] * w[k]
        value += lam[g] * math.sqrt(total) + 0.5 * ridge * total
    return value


def _dots(sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, j: int, r: Any, outputs: int, out: Any) -> None:
    """out = column j times r, where r is [n, outputs] flat."""
    for c in range(outputs):
        out[c] = 0.0
    if sparse:
        for e in range(indptr[j], indptr[j + 1]):
            a, at = data[e], indices[e] * outputs
            for c in range(outputs):
                out[c] += a * r[at + c]
    else:
        for i in range(X.shape[0]):
            a = X[i, j]
            for c in range(outputs):
                out[c] += a * r[i * outputs + c]


def row_epochs(
    sparse: bool, X: Any, data: Any, indices: Any, indptr: Any, cols: Any, w: Any, u: Any, h: Any, L: Any, hs: Any, inv: float,
    shift: Any, lam: Any, ridge: float, together: bool, slots: int, epochs: int, tolerance: float,
) -> tuple[int, float]:  # fmt: skip
    """Run epochs over rows of coefficients [len(cols), outputs], one feature with all its outputs.

    The penalty is `lam_k |w_k|` where the outputs go together, else `lam_k |w_k|_1`; see `scalar_epochs`.
    """
    outputs = len(shift)
    m, n = len(w), len(u)
    W, U, B = np.empty((slots, m), w.dtype), np.empty((slots, n), u.dtype), np.empty((slots, outputs))
    w_new, u_new, b_new, c = np.empty(m, w.dtype), np.empty(n, u.dtype), np.empty(outputs), np.empty(slots - 1)
    d = np.empty(outputs)
    filled, largest = 0, 0.0
    for epoch in range(epochs):
        largest = 0.0
        for k in range(len(cols)):
            if L[k] <= 0.0:
                continue
            j, at = cols[k], k * outputs
            _dots(sparse, X, data, indices, indptr, j, u, outputs, d)
            norm = 0.0
            for q in range(outputs):
                d[q] += w[at + q] * L[k] - shift[q] * hs[k]
                norm += d[q] * d[q]
            bend = L[k] + ridge
            shrink = max(1.0 - lam[k] / math.sqrt(norm), 0.0) / bend if norm > 0.0 else 0.0
            moved = 0.0
            for q in range(outputs):
                x = d[q] * shrink if together else max(abs(d[q]) - lam[k], 0.0) / (bend if d[q] > 0 else -bend)
                old = w[at + q]
                w[at + q] = x
                d[q] = w[at + q] - old
                moved += d[q] * d[q]
            if moved == 0.0:
                continue
            if sparse:
                for e in range(indptr[j], indptr[j + 1]):
                    i = indices[e]
                    a = h[i] * data[e]
                    for q in range(outputs):
                        u[i * outputs + q] -= a * d[q]
            else:
                for i in range(len(h)):
                    a = h[i] * X[i, j]
                    for q in range(outputs):
                        u[i * outputs + q] -= a * d[q]
            for q in range(outputs):
                shift[q] -= d[q] * hs[k] * inv
            largest = max(largest, math.sqrt(moved) * L[k])
        if largest <= tolerance:
            return epoch + 1, largest
        _keep(w, u, shift, W, U, B, filled)
        filled += 1
        if filled == slots:
            filled = 0
            if _coefficients(W, c):
                _combine(W, U, B, c, w_new, u_new, b_new)
                before = _model(u, h, shift) + row_value(w, lam, ridge, outputs, together)
                if _model(u_new, h, b_new) + row_value(w_new, lam, ridge, outputs, together) < before:
                    _take(w_new, u_new, b_new, w, u, shift)
            _keep(w, u, shift, W, U, B, filled)
            filled = 1
    return epochs, largest


def row_value(w: Any, lam: Any, ridge: float, outputs: int, together: bool) -> float:
    """Return the sum over rows of lam_k |w_k|, or of lam_k |w_k|_1, and of ridge |w_k|^2 / 2."""
    value = 0.0
    for k in range(len(lam)):
        squares = 0.0
        sizes = 0.0
        for q in range(outputs):
            x = w[k * outputs + q]
            squares += x * x
            sizes += abs(x)
        value += lam[k] * (math.sqrt(squares) if together else sizes) + 0.5 * ridge * squares
    return value


_COMPILED = (
    "_dot", "_subtract", "_dots", "products", "all_products", "add_columns", "curvatures", "_step", "_value", "_room", "rooms",
    "penalty_value", "largest_scale", "conjugate_sum", "_solve", "_coefficients", "_combine", "_keep", "_take", "_model", "scalar_epochs",
    "group_grams", "_group_step", "group_norms", "group_value", "group_epochs", "row_value", "row_epochs",
)  # fmt: skip
