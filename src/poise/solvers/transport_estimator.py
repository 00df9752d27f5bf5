"""Sparse transport as a scikit-learn transformer: every row is shared out to a few prototypes, each of which takes its full share."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from poise.errors import InputError, PoiseWarning
from poise.operators import project_sparse_simplex
from poise.solvers.transport import sparse_transport


class SparseTransport(TransformerMixin, BaseEstimator):
    """Transport rows to prototypes, at most `k` for a row, so that every prototype receives its mass.

        min over T    sum_ij T_ij ||x_j - t_i||^2 / mean + gamma/2 sum_j ||T_j||^2
        subject to    sum_i T_ij = 1,   sum_j T_ij = n weight_i,   ||T_j||_0 <= k

    The potentials of `fit` share out new rows one by one, so `transform` needs no other row beside it.

    Args:
        k: most prototypes of a row.
        gamma: strength of the squared norm, > 0, in units of the mean cost; the larger, the more even the shares.
        targets: prototypes [m, inputs]; None takes `n_prototypes` centres of k-means.
        weights: mass of every prototype, not negative, adding up to 1; None for equal ones.
        n_prototypes: number of centres.
        tol, max_iter: of the dual ascent.
        random_state: of k-means.

    Attributes:
        prototypes_: [m, inputs]. potentials_: [m], by which new rows are shared out. scale_: the mean cost.
        marginal_error_: L1 distance of the prototypes' mass from what they should have, as a share of the mass.
        status_: "converged" or why not.

    >>> import numpy as np
    >>> x = np.array([[0.0], [0.1], [0.2], [5.0]])
    >>> SparseTransport(k=1, targets=[[0.0], [5.0]], gamma=0.01).fit_transform(x).sum(0)  # two for each, although three are near the first
    array([2., 2.])

    Source: Liu, Puigcerver and Blondel, arXiv:2209.15466.
    """

    def __init__(
        self,
        k: int = 2,
        gamma: float = 1.0,
        targets: Any = None,
        weights: Any = None,
        n_prototypes: int = 4,
        tol: float = 1e-6,
        max_iter: int = 500,
        random_state: int | None = 0,
    ) -> None:
        self.k = k
        self.gamma = gamma
        self.targets = targets
        self.weights = weights
        self.n_prototypes = n_prototypes
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(self, x: Any, y: Any = None) -> SparseTransport:
        """Find prototypes and potentials for rows [n, inputs].

        Raises:
            InputError: targets do not match the rows' inputs, or weights are no shares.
        """
        x = validate_data(self, x, dtype=np.float64, ensure_min_samples=2)
        if self.targets is None:
            number = min(self.n_prototypes, len(np.unique(x, axis=0)))
            self.prototypes_ = KMeans(number, random_state=self.random_state, n_init=3).fit(x).cluster_centers_
        else:
            self.prototypes_ = check_array(self.targets, dtype=np.float64)
            if self.prototypes_.shape[1] != x.shape[1]:
                raise InputError(
                    f"SparseTransport: rows have {x.shape[1]} inputs, and targets have {self.prototypes_.shape[1]}."
                )
        m = len(self.prototypes_)
        weights = np.full(m, 1 / m) if self.weights is None else np.asarray(self.weights, dtype=np.float64)
        if weights.shape != (m,) or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
            raise InputError(f"SparseTransport: weights are {m} shares that are not negative and add up to 1.")
        cost = self._cost(x)
        self.scale_ = float(cost.mean()) or 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)  # judged below, on the rows themselves
            found = sparse_transport(
                cost / self.scale_, torch.from_numpy(weights * len(x)), torch.ones(len(x), dtype=torch.float64), k=min(self.k, m),
                gamma=self.gamma, tolerance=self.tol, max_iter=self.max_iter, repair=False,
            )  # fmt: skip
        self.potentials_ = found.alpha.numpy()
        self.n_iter_ = max(int(found.iterations), 1)
        shares = self.transform(x).sum(0)
        self.marginal_error_ = float(np.abs(shares - weights * len(x)).sum() / len(x))
        self.status_ = found.status[0]
        if self.marginal_error_ > 0.05:
            text = f"prototypes are {self.marginal_error_:.0%} of the mass away from their shares: {self.status_}"
            warnings.warn(f"SparseTransport: {text}. Raise k or gamma.", PoiseWarning, stacklevel=2)
        return self

    def transform(self, x: Any) -> Any:
        """Return the shares of every row, [n, m]: not negative, adding up to 1, at most k of them not 0."""
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=np.float64)
        scores = (torch.from_numpy(self.potentials_)[:, None] - self._cost(x) / self.scale_).T / self.gamma
        return project_sparse_simplex(scores, min(self.k, scores.shape[1])).numpy()

    def transport(self, x: Any) -> Any:
        """Return where every row goes, [n, inputs]: the mean of its prototypes, weighed by its shares."""
        return self.transform(x) @ self.prototypes_

    def _cost(self, x: Any) -> torch.Tensor:
        return torch.cdist(torch.from_numpy(self.prototypes_), torch.from_numpy(x)).square()

    @property
    def _n_features_out(self) -> int:
        return len(self.prototypes_)
