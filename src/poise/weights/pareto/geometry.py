"""The two exact problems that balancers share, both solved by nonnegative least squares on a factor of the Gram matrix.

    min |sum_i w_i g_i|     over the simplex                the shortest vector of the convex hull
    min |p - d|             over d with <d, g_i> >= 0       the projection on the dual cone

A matrix `A` with `A A' = G` stands for the gradients, so nothing here is longer than the number of terms. It is taken from the matrix
of cosines, whose digits do not suffer where one gradient is a million times longer than another. Lawson and Hanson's active sets
(`scipy.optimize.nnls`) are independent by construction, so copies, opposites and vanishing rows need no regularisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_ROUNDING = float(np.finfo(np.float64).eps)
"""Eigenvalues of a matrix of cosines up to this, for every row, are rounding."""
_RUNAWAY, _PRICE = 1e5, 1e-8
"""Solutions longer than this are of dependent columns; what their length is then charged, squared."""
_RESTARTS = 4
"""How often the shortest vector is solved again in its own units: each time wins the digits that its smallness had cost."""


class Rows(NamedTuple):
    """Gradients up to rotation.

    Attributes:
        unit: of length 1 or 0, [m, m].
        norms: their lengths, [m].
        eigenvalues, eigenvectors: of the matrix of cosines, rising, [m] and [m, m].
    """

    unit: Array
    norms: Array
    eigenvalues: Array
    eigenvectors: Array

    @property
    def scaled(self) -> Array:
        """The rows in their lengths, [m, m]."""
        return self.unit * self.norms[:, None]

    @property
    def inverse_norms(self) -> Array:
        """One over the lengths, 0 for a row that vanishes, [m]."""
        return np.divide(1.0, self.norms, out=np.zeros_like(self.norms), where=self.norms > 0)


def array(values: Tensor) -> Array:
    """Return f64 numbers of a tensor on the host."""
    found: Array = values.detach().cpu().double().numpy()
    return found


def rows_of(gram: Tensor) -> Rows:
    """Factor a Gram matrix; what rounding made negative counts as 0."""
    g = array(gram)
    norms = np.sqrt(np.maximum(g.diagonal(), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    eigenvalues, eigenvectors = np.linalg.eigh(g * inverse * inverse[:, None])
    # Eigenvalues that are rounding would give dependent rows a direction of their own, along which multipliers grow without end.
    eigenvalues[eigenvalues < _ROUNDING * len(g)] = 0.0
    unit = eigenvectors * np.sqrt(eigenvalues)
    unit[norms == 0] = 0.0
    return Rows(unit, norms, eigenvalues, eigenvectors)


def shortest(points: Array) -> Array:
    """Return the weights on the simplex of the shortest vector in the hull of `points` [m, r].

    `min |A'x|^2 + (1'x - 1)^2` over `x >= 0` has its solution on the same ray, because for `x = s w` the best `s` leaves
    `f/(1 + f)`, which grows with `f = |A'w|^2`. Units are chosen so that `f` is about 1 and no digit is lost in the difference.
    """
    lengths = np.sqrt((points * points).sum(1))
    unit = float(lengths.min())
    if unit == 0.0:
        weights: Array = (lengths == 0.0) / np.count_nonzero(lengths == 0.0)
        return weights
    for _ in range(_RESTARTS):
        stacked = np.vstack([points.T / unit, np.ones(len(points))])
        x = nonnegative(stacked, _last(len(stacked)))
        weights = x / x.sum()
        length = float(np.linalg.norm(weights @ points))
        if length > 1e-2 * unit or length <= 1e-9 * float(lengths.max()):
            break
        unit = length
    return weights


def nonnegative(matrix: Array, target: Array) -> Array:
    """Return the `x >= 0` with the smallest `|matrix x - target|`; where opposite columns leave it open, a short one."""
    from scipy.optimize import nnls

    columns = matrix.shape[1]
    solution: Any = nnls(matrix, target, maxiter=100 * columns)
    found: Array = solution[0]
    if found.max(initial=0.0) > _RUNAWAY * float(np.abs(target).max()):
        # Columns that depend on each other up to rounding: a tiny price on length settles which of all solutions is meant.
        priced = np.vstack([matrix, _PRICE * np.eye(columns)])
        solution = nnls(priced, np.concatenate([target, np.zeros(columns)]), maxiter=100 * columns)
        found = solution[0]
    return found


def _last(length: int) -> Array:
    found = np.zeros(length)
    found[-1] = 1.0
    return found
