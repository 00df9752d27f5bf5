"""A linear program on the simplex, solved exactly: the preferences that guide along a Pareto front are its solution.

    max c'a    subject to    a >= 0,   sum a = 1,   R a >= r

The program has one variable for each objective of the training, so it is tiny, and a general solver spends its time on setting
out. Up to five variables every vertex is visited instead: m - 1 constraints are active at a vertex, each choice of them is
one small linear system, and all systems are solved at once. Above that, HiGHS solves it (`scipy.optimize.linprog`).
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Places = np.ndarray[Any, np.dtype[np.int64]]

MOST_ENUMERATED = 5
"""Variables up to which all vertices are visited: at most 11 choose 4 systems with one row for each variable and one more."""
TOLERANCE = 1e-10
"""By how much a constraint may be missed, in units of its own row's largest entry."""


def maximize_on_simplex(objective: Array, rows: Array, least: Array, tie: Array | None = None) -> Array | None:
    """Return the best point of the simplex under `rows @ a >= least`, or None where no point satisfies that.

    Args:
        objective: f64 [m], c.
        rows: f64 [k, m], R; k may be 0.
        least: f64 [k], r.
        tie: f64 [m, m], positive semidefinite; of several best vertices the one with the least `a' tie a` is taken.

    >>> maximize_on_simplex(np.array([1.0, 3.0]), np.array([[1.0, -1.0]]), np.array([0.0]))     # a_0 >= a_1
    array([0.5, 0.5])
    """
    size = np.abs(rows).max(axis=1, initial=0.0)
    if (least[size == 0] > 0).any():
        return None
    told = size > 0
    rows, least = rows[told] / size[told, None], least[told] / size[told]
    scale = np.abs(objective).max()
    objective = objective / scale if scale > 0 else objective
    if len(objective) > MOST_ENUMERATED:
        return _by_highs(objective, rows, least)
    return _by_vertices(objective, rows, least, tie)


@lru_cache(maxsize=64)
def _choices(constraints: int, active: int) -> Places:
    """Every choice of `active` constraints, int64 [choices, active]."""
    return np.array(list(itertools.combinations(range(constraints), active)), dtype=np.int64).reshape(-1, active)


@lru_cache(maxsize=8)
def _bounds(m: int) -> Array:
    return np.eye(m)


def _by_vertices(objective: Array, rows: Array, least: Array, tie: Array | None) -> Array | None:
    m = len(objective)
    left = np.concatenate([_bounds(m), rows])
    right = np.concatenate([np.zeros(m), least])
    choices = _choices(len(left), m - 1)
    systems = np.empty((len(choices), m, m))
    systems[:, 0], systems[:, 1:] = 1.0, left[choices]
    wanted = np.empty((len(choices), m, 1))
    wanted[:, 0], wanted[:, 1:, 0] = 1.0, right[choices]
    # Constraints that depend on each other meet in no single point; the vertex, if there is one, is found by another choice.
    regular = np.abs(np.linalg.det(systems)) > 1e-12
    points = np.linalg.solve(systems[regular], wanted[regular])[..., 0]
    kept = (points @ left.T >= right - TOLERANCE).all(axis=1) & (np.abs(points.sum(axis=1) - 1) < TOLERANCE)
    points = points[kept]
    if not len(points):
        return None
    worth = points @ objective
    best = points[worth >= worth.max() - TOLERANCE]
    if len(best) > 1 and tie is not None:
        best = best[[((best @ tie) * best).sum(axis=1).argmin()]]
    found: Array = np.maximum(best[0], 0.0)
    found /= found.sum()
    return found


def _by_highs(objective: Array, rows: Array, least: Array) -> Array | None:
    from scipy.optimize import linprog

    m = len(objective)
    answer = linprog(
        -objective,
        A_ub=-rows if len(rows) else None,
        b_ub=-least if len(rows) else None,
        A_eq=np.ones((1, m)),
        b_eq=np.ones(1),
        bounds=(0, None),
        method="highs",
        options={"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
    )
    if answer.status != 0:
        return None
    found: Array = np.maximum(answer.x, 0.0)
    found /= found.sum()
    return found
