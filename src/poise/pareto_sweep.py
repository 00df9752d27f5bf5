"""Sweeps over three objectives, as loops that run plain or compiled.

Points come one by one, highest in the third objective first. What they dominate in the other two is a staircase:

    x ascending, y descending, with (0, inf) before and (inf, 0) behind

so a new point takes the place of a run of steps that lies below it and to its left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Loop = Callable[[Any], Any]

_WORTH_COMPILING = 300.0
"""Points swept, from where on a compiled loop is worth the second that it takes to compile (once a machine)."""


def kernel(loop: Loop, work: float) -> Loop:
    """Return a loop, compiled where there is enough to do and numba is installed."""
    return _compiled(loop) if work > _WORTH_COMPILING else loop


@functools.cache
def _compiled(loop: Loop) -> Loop:
    try:
        import numba
    except ImportError:  # numba lags behind new Python versions; the loop then runs as it is
        return loop
    try:
        compiled: Loop = numba.njit(loop, cache=True)
    except RuntimeError:  # no folder to keep what was compiled
        compiled = numba.njit(loop)
    return compiled


def volume_3d(p: Any) -> Any:
    """Return the volume that points float64 [n, 3] dominate above 0: sum of area * (height until the next point).

    Args:
        p: positive, ordered by the third coordinate, falling; dominated points are allowed.
    """
    n = len(p)
    xs, ys = np.empty(n + 2), np.empty(n + 2)
    xs[0], ys[0], xs[1], ys[1] = 0.0, np.inf, np.inf, 0.0
    size, area, volume, height = 2, 0.0, 0.0, p[0, 2]
    for i in range(n):
        x, y = p[i, 0], p[i, 1]
        high = np.searchsorted(xs[:size], x)
        if ys[high] >= y:
            continue
        volume += area * (height - p[i, 2])
        height = p[i, 2]
        low = high
        while ys[low - 1] <= y:
            low -= 1
        if xs[high] == x:
            high += 1
        left = xs[low - 1]
        for k in range(low, high):
            area += (xs[k] - left) * (y - ys[k])
            left = xs[k]
        area += (x - left) * (y - ys[high])
        moved = size - high
        xs[low + 1 : low + 1 + moved] = xs[high:size].copy()
        ys[low + 1 : low + 1 + moved] = ys[high:size].copy()
        xs[low], ys[low] = x, y
        size = low + 1 + moved
    return volume + area * height


def contributions_3d(p: Any) -> Any:
    """Return the volume that each of the points float64 [n, 3] dominates alone, float64 [n].

    A step of the staircase dominates alone the rectangle between its neighbours, less what the steps that it replaced cover
    of it: those had only this one above them. Its volume grows by that area times the height until the area changes.

    Args:
        p: positive, ordered by the third coordinate, falling, then by the first and the second.

    Returns nothing (no entries) where a point is dominated or there twice: this way of counting does not know them.
    """
    n = len(p)
    xs, ys, step = np.empty(n + 2), np.empty(n + 2), np.empty(n + 2, dtype=np.int64)
    xs[0], ys[0], xs[1], ys[1] = 0.0, np.inf, np.inf, 0.0
    step[0], step[1] = -1, -1
    size = 2
    volume, area, since = np.zeros(n), np.zeros(n), np.zeros(n)
    covered, following = np.full(n, -1), np.full(n, -1)  # the steps that a point replaced, as a chain by rising x
    for i in range(n):
        x, y, z = p[i, 0], p[i, 1], p[i, 2]
        high = np.searchsorted(xs[:size], x)
        if ys[high] >= y:
            return volume[:0]
        low = high
        while ys[low - 1] <= y:
            low -= 1
        if xs[high] == x:
            high += 1
        for k in range(low, high):
            q = step[k]
            volume[q] += area[q] * (since[q] - z)
            area[q] = 0.0
            following[q] = step[k + 1] if k + 1 < high else -1
        if low < high:
            covered[i] = step[low]
        moved = size - high
        xs[low + 1 : low + 1 + moved] = xs[high:size].copy()
        ys[low + 1 : low + 1 + moved] = ys[high:size].copy()
        step[low + 1 : low + 1 + moved] = step[high:size].copy()
        xs[low], ys[low], step[low] = x, y, i
        size = low + 1 + moved
        since[i] = z
        for k in range(low - 1, low + 2):
            q = step[k]
            if q < 0:
                continue
            volume[q] += area[q] * (since[q] - z)
            since[q] = z
            left, bottom = xs[k - 1], ys[k + 1]
            alone = (xs[k] - left) * (ys[k] - bottom)
            c = covered[q]
            while c >= 0:
                if p[c, 0] > left and p[c, 1] > bottom:
                    alone -= (p[c, 0] - left) * (p[c, 1] - bottom)
                    left = p[c, 0]
                c = following[c]
            area[q] = alone
    for k in range(1, size - 1):
        q = step[k]
        volume[q] += area[q] * since[q]
    return volume
