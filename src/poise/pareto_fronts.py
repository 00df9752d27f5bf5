"""Fronts and the volume they dominate: several objectives, all of them to be maximised.

    hypervolume(points, reference)                       # volume between a reference and a set of points
    hypervolume_improvement(point, points, reference)    # what one more point would add
    hypervolume_contributions(points, reference)         # what each point alone accounts for
    front(points), nondominated(points)

The volume is exact:

    two objectives     one sweep over the points by the first, O(n log n)
    three              a sweep over the third that keeps the staircase of the other two, O(n log n) comparisons
    more               sum over points, worst in the last objective first, of
                       last coordinate * (box of the others - volume of the better points cut to that box)

A point that is not above the reference in every objective dominates no volume, so it adds 0, never something negative.
Objectives that are to be minimised change sign first, reference and points alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.pareto_sweep import contributions_3d, kernel, volume_3d

__all__ = ["front", "hypervolume", "hypervolume_contributions", "hypervolume_improvement", "nondominated"]

Points = Any
"""Numbers `[n, m]`: a tensor, an array, or a sequence of sequences."""
Array = np.ndarray[Any, np.dtype[np.float64]]

_BLOCK = 1 << 22
"""Comparisons that are held at once."""


def hypervolume(points: Points, reference: Points) -> float:
    """Return the volume that a set of points dominates above a reference.

    volume of the union over points p of the boxes [reference, p]

    Args:
        points: [n, m], all objectives to be maximised; duplicates and dominated points change nothing.
        reference: [m].

    Raises:
        InputError: sizes that differ, or a number that is not finite.

    >>> hypervolume([[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0])
    3.0

    Source: While, Bradstreet and Barone 2012 (more than three objectives); Beume et al. 2009 (three).
    """
    return _volume(_above(*_checked(points, reference)))


def hypervolume_improvement(point: Points, points: Points, reference: Points) -> float:
    """Return what a point adds to the volume of a set: `volume(points + point) - volume(points)`, at least 0.

    It is computed as the box of the point less the volume of the others cut to that box, so nothing large cancels.

    Args:
        point: [m].
        points: [n, m]; n may be 0.
        reference: [m].

    >>> hypervolume_improvement([2.0, 2.0], [[1.0, 2.0], [2.0, 1.0]], [0.0, 0.0])
    1.0
    """
    one, low = _checked(np.asarray(point, dtype=np.float64)[None], reference)
    others = _checked(points, reference)[0] if len(points) else one[:0]
    return _exclusive(one[0] - low, _above(others, low))


def hypervolume_contributions(points: Points, reference: Points) -> Tensor:
    """Return what the set would lose without each point: `volume(points) - volume(points without it)`, float64 [n].

    0 for a dominated point and for every copy of a duplicate.

    Args:
        points: [n, m].
        reference: [m].

    >>> hypervolume_contributions([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]], [0.0, 0.0])
    tensor([1., 1., 0.], dtype=torch.float64)

    Source: Guerreiro and Fonseca 2018, for the idea of a sweep that keeps exclusive areas (three objectives).
    """
    values, low = _checked(points, reference)
    result = np.zeros(len(values))
    shifted = values - low
    places = np.flatnonzero((shifted > 0).all(1))
    inside = shifted[places]
    if len(inside):
        result[places] = _contributions(inside)
    return torch.from_numpy(result)


def nondominated(points: Points) -> Tensor:
    """Return which points no other one dominates (at least as good everywhere and better somewhere): bool [n].

    Copies of a point do not dominate each other.

    >>> nondominated([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    tensor([ True,  True, False])
    """
    return torch.from_numpy(_nondominated(_checked(points)[0]))


def front(points: Points) -> Tensor:
    """Return the points that no other one dominates, each once, ordered by the first objective: float64 [k, m].

    >>> front([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [2.0, 1.0]])
    tensor([[1., 2.],
            [2., 1.]], dtype=torch.float64)
    """
    values = _checked(points)[0]
    return torch.from_numpy(np.unique(values[_nondominated(values)], axis=0))


# ---- input ----------------------------------------------------------------------------------------------------------


def _checked(points: Points, reference: Points = None) -> tuple[Array, Array]:
    """Return points [n, m] and reference [m] in double precision, or say what is wrong with them."""
    values = _array(points)
    if values.ndim != 2 or values.shape[1] < 1:
        raise InputError(
            f"Points are numbers [n, m], n points with m objectives each, and these are {list(values.shape)}."
        )
    low = np.zeros(values.shape[1]) if reference is None else _array(reference)
    if low.shape != values.shape[1:]:
        raise InputError(
            f"The points have {values.shape[1]} objectives, and the reference is {list(low.shape)}: it needs one number for each."
        )
    wrong = ~np.isfinite(values).all(1)
    if wrong.any():
        raise InputError(
            f"Point {int(wrong.argmax())} is {values[wrong.argmax()].tolist()}: every objective must be finite."
        )
    if not np.isfinite(low).all():
        raise InputError(f"The reference is {low.tolist()}, and it must be finite.")
    return values, low


def _array(numbers: Points) -> Array:
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().cpu().double().numpy()
    return np.asarray(numbers, dtype=np.float64)


def _above(values: Array, low: Array) -> Array:
    """Return the points that dominate some volume, seen from the reference."""
    shifted = values - low
    inside: Array = shifted[(shifted > 0).all(1)]
    return inside


# ---- domination -----------------------------------------------------------------------------------------------------


def _nondominated(p: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    n, m = p.shape
    kept = np.ones(n, dtype=bool)
    if n < 2:
        return kept
    if m == 2:
        return _nondominated_2d(p)
    step = max(1, _BLOCK // (n * m))
    for start in range(0, n, step):
        rows = p[start : start + step, None]
        worse = np.all(p >= rows, axis=2) & np.any(p > rows, axis=2)
        kept[start : start + step] = ~np.any(worse, axis=1)
    return kept


def _nondominated_2d(p: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Sweep by the first objective: a point stays if it is above all that are better there, and the best among its equals."""
    order = np.lexsort((-p[:, 1], -p[:, 0]))
    x, y = p[order].T
    highest = np.maximum.accumulate(y)
    begins = np.concatenate([[True], x[1:] != x[:-1]])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(x)), 0))
    before = np.where(first > 0, highest[first - 1], -np.inf)
    kept = np.empty(len(p), dtype=bool)
    kept[order] = (y > before) & (y == y[first])
    return kept


# ---- volume, of points seen from the reference and above it ------------------------------------------------------------


def _volume(p: Array, work: float | None = None) -> float:
    n, m = p.shape
    if n < 2:
        return float(p.prod(1).sum())
    if m == 1:
        return float(p.max())
    if m == 2:
        return _area(p)
    # The work of the outermost call decides whether compiling pays, also for the many small sweeps below it.
    work = float(n) ** (m - 2) if work is None else work
    if m == 3:
        return float(kernel(volume_3d, work)(p[np.argsort(-p[:, 2], kind="stable")]))
    p = p[_nondominated(p)]
    p = p[np.argsort(p[:, -1], kind="stable")]
    base = p[:, :-1]
    boxes, total = base.prod(1), 0.0
    for k in range(len(p)):
        total += p[k, -1] * (boxes[k] - _volume(np.minimum(base[k + 1 :], base[k]), work))
    return float(total)


def _area(p: Array) -> float:
    """Sum the strips of a staircase: by the first objective, each as high as the best second one from there on."""
    p = p[np.argsort(-p[:, 0], kind="stable")]
    x, height = p[:, 0], np.maximum.accumulate(p[:, 1])
    return float(((x - np.append(x[1:], 0.0)) * height).sum())


def _exclusive(one: Array, others: Array) -> float:
    """Return the volume of a point's box that no other box covers."""
    if not (one > 0).all():
        return 0.0
    return max(0.0, float(one.prod()) - _volume(np.minimum(others, one)))


def _contributions(p: Array) -> Array:
    n, m = p.shape
    if m == 3:
        order = np.lexsort((-p[:, 1], -p[:, 0], -p[:, 2]))
        swept = kernel(contributions_3d, float(n))(p[order])
        if len(swept):
            result = np.empty(n)
            result[order] = swept
            return result
    plain = _nondominated(p)
    if m == 2 and plain.all() and len(np.unique(p, axis=0)) == n:
        order = np.argsort(p[:, 0])
        x, y = p[order].T
        result = np.empty(n)
        result[order] = (x - np.append(0.0, x[:-1])) * (y - np.append(y[1:], 0.0))
        return result
    # A dominated point still covers a part of the one that dominates it, so it counts when that one is taken away.
    return np.array([_exclusive(p[i], np.delete(p, i, 0)) if plain[i] else 0.0 for i in range(n)])
