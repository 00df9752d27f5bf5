"""Linear programs on the simplex: the vertices, all of them where terms are few.

max <objective, x>   over   x >= 0,  sum x = 1,  matrix x >= bound
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from poise.weights.pareto.geometry import Array

FEW = 5
"""Up to as many unknowns every vertex is looked at: 462 small systems, solved at once."""


def simplex_program(objective: Array, matrix: Array, bound: Array, slack: float = 1e-9) -> Array | None:
    """Return the best vertex, or None where no point satisfies the constraints.

    Args:
        objective: [m].
        matrix: [k, m].
        bound: [k]; minus infinity means no constraint.
        slack: by how much of its row's largest entry a constraint may be missed.

    Among vertices that are equally good the one with the largest smallest slack of the constraints is returned.
    """
    bounded = np.isfinite(bound)
    size = np.maximum(np.abs(matrix[bounded]).max(1, initial=0.0), np.abs(bound[bounded]))
    size[size == 0] = 1.0
    rows, least = matrix[bounded] / size[:, None], bound[bounded] / size
    return (_by_vertices if len(objective) <= FEW else _by_solver)(objective, rows, least, slack)


def _by_vertices(objective: Array, rows: Array, least: Array, slack: float) -> Array | None:
    m = len(objective)
    everything = np.vstack([np.eye(m), rows])
    levels = np.concatenate([np.zeros(m), least])
    chosen = _choices(len(everything), m - 1)
    systems = np.concatenate([everything[chosen], np.ones((len(chosen), 1, m))], axis=1)
    right = np.concatenate([levels[chosen], np.ones((len(chosen), 1))], axis=1)
    # A vertex is where m - 1 constraints and the sum meet in one point; systems that do not are left out.
    regular = np.abs(np.linalg.det(systems)) > 1e-13
    points = np.linalg.solve(systems[regular], right[regular][..., None])[..., 0]
    excess = points @ everything.T - levels
    points, excess = points[fine := (excess >= -slack).all(1)], excess[fine]
    if not len(points):
        return None
    worth = points @ objective
    best = worth >= worth.max() - 1e-12 * max(1.0, float(np.abs(objective).max()))
    found: Array = points[best][excess[best].min(1).argmax()]
    found = np.maximum(found, 0.0)
    return found / found.sum()


def _by_solver(objective: Array, rows: Array, least: Array, slack: float) -> Array | None:
    from scipy.optimize import linprog

    scale = float(np.abs(objective).max()) or 1.0
    answer = linprog(-objective / scale, A_ub=-rows, b_ub=slack - least, A_eq=np.ones((1, len(objective))), b_eq=[1.0])
    if not answer.success:
        return None
    found: Array = np.maximum(answer.x, 0.0)
    return found / found.sum()


@lru_cache(maxsize=64)
def _choices(total: int, chosen: int) -> NDArray[np.int64]:
    return np.array(list(combinations(range(total), chosen)), dtype=np.int64).reshape(-1, chosen)
