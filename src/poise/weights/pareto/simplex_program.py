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
    if not size.all():
        if (least[size == 0] > 0).any():
            return None
        told = size > 0
        rows, least, size = rows[told], least[told], size[told]
    # On the simplex `R a >= r` is `(R - r 1') a >= 0`.
    cone = (rows - least[:, None]) / size[:, None]
    scale = float(np.abs(objective).max())
    if len(objective) > MOST_ENUMERATED:
        return _by_highs(objective / (scale or 1.0), cone)
    return _by_vertices(objective, scale, cone, tie)


@lru_cache(maxsize=64)
def _choices(constraints: int, active: int) -> Places:
    """Every choice of `active` constraints, int64 [choices, active]."""
    return np.array(list(itertools.combinations(range(constraints), active)), dtype=np.int64).reshape(-1, active)


@lru_cache(maxsize=8)
def _corner(m: int) -> tuple[Array, Array]:
    """The bounds `a >= 0` as rows, and the right side of `sum a = 1` above m - 1 active constraints."""
    return np.eye(m), np.eye(m, 1)


def _by_vertices(objective: Array, scale: float, cone: Array, tie: Array | None) -> Array | None:
    m = len(objective)
    bounds, wanted = _corner(m)
    rows = np.concatenate([bounds, cone])
    choices = _choices(len(rows), m - 1)
    systems = np.ones((len(choices), m, m))
    systems[:, 1:] = rows[choices]
    # Constraints that depend on each other meet in no single point; the vertex, if there is one, is found by another choice.
    regular = np.abs(np.linalg.det(systems)) > 1e-12
    points = np.linalg.solve(systems[regular], wanted)[..., 0]
    points = points[(points @ rows.T >= -TOLERANCE).all(axis=1)]
    if not len(points):
        return None
    worth = points @ objective
    best = points[worth >= worth.max() - TOLERANCE * scale]
    if len(best) > 1 and tie is not None:
        best = best[[((best @ tie) * best).sum(axis=1).argmin()]]
    found: Array = np.maximum(best[0], 0.0)
    found /= found.sum()
    return found


def _by_highs(objective: Array, cone: Array) -> Array | None:
    from scipy.optimize import linprog

    m = len(objective)
    answer = linprog(
        -objective,
        A_ub=-cone if len(cone) else None,
        b_ub=np.zeros(len(cone)) if len(cone) else None,
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
