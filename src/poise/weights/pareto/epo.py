"""To the point of the front where the terms stand in a given ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.geometry import Array, array
from poise.weights.pareto.preferences import spread, stated
from poise.weights.pareto.simplex_program import maximize_on_simplex


class EPO(Balancer):
    """Exact Pareto optimal search: descend towards the front along the ray where all `r_i L_i` are equal.

    u_i = r_i L_i/sum_j r_j L_j,   mu = KL(u || 1/m) = sum_i u_i log(m u_i),   a_i = r_i (log(m u_i) - mu),   c = G a

    off the ray (`mu > tolerance`), with J = {i: c_i > 0}:
        max <w, c>      over the simplex, `(G w)_i >= 0` for the largest `u_i`, free for the rest of J, `(G w)_i >= c_i` outside J;
                        where J is empty, `(G w)_i >= 0` for all
    on the ray:
        max sum_i (G w)_i    over the simplex, `(G w)_i >= 0` for all, `<w, c> >= min(0, max_i c_i)`

    Linear programs in m unknowns, solved exactly at a vertex.

    Args:
        preference: `r`, one positive number a term: the term with twice the number ends at half the value. By default equal: equal values.
        tolerance: `mu` up to which the ratio counts as reached.
        relax: leave out the last condition on the ray.

    Scale: the weights sum to 1.

    When it fails: values must be at least 0, and comparable: the ratio is one of values, so a term with an offset never reaches
    it. Where the ray misses the front it ends at a point of the front near the ray. Vertices make weights jump from step to
    step. Where the program has no solution (gradients that depend on each other) the weights are `r/sum r`.

    Source: Mahapatra and Rajan, ICML 2020; arXiv:2108.00597, section 4.

    Example:
        >>> EPO().weigh(torch.eye(2), torch.tensor([3.0, 1.0]))
        tensor([1., 0.], dtype=torch.float64)
    """

    formula: ClassVar[str] = "epo"
    total: ClassVar[str] = "1"

    def __init__(self, preference: Sequence[float] | None = None, tolerance: float = 1e-4, relax: bool = False) -> None:
        super().__init__()
        if not 0 < tolerance < float("inf"):
            raise InputError(f"epo: tolerance is positive and finite, and it is {tolerance}.")
        self.preference = stated(self.formula, preference, positive=True)
        self.tolerance, self.relax = float(tolerance), relax

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m] on the simplex.

        Raises:
            InputError: a value that is negative.
        """
        g, levels = array(gram), array(values)
        if (levels < 0).any():
            raise InputError(
                f"epo: a ratio of values needs values of at least 0, and they are {levels.tolist()}. Shift the term."
            )
        r = spread(self.formula, self.preference, len(levels), 1.0)
        mu, adjustment = non_uniformity(levels, r)
        c = g @ adjustment
        if mu > self.tolerance:
            found = self._balance(g, c, r * levels)
        else:
            found = self._descend(g, c)
        return torch.from_numpy(r / r.sum() if found is None else found)

    def _balance(self, g: Array, c: Array, weighted: Array) -> Array | None:
        # What serves the ratio may rise freely, but for the term that is farthest above it.
        held = (c <= 0) | (weighted == weighted.max()) if (c > 0).any() else np.ones(len(c), dtype=bool)
        least = np.where((c <= 0) & (weighted < weighted.max()) & (c > 0).any(), c, 0.0)
        return maximize_on_simplex(c, g[held], least[held], tie=g)

    def _descend(self, g: Array, c: Array) -> Array | None:
        rows, least = g, np.zeros(len(c))
        if not self.relax:
            rows, least = np.vstack([g, c]), np.append(least, min(0.0, float(c.max())))
        return maximize_on_simplex(g.sum(0), rows, least, tie=g)


def non_uniformity(values: Array, preference: Array) -> tuple[float, Array]:
    """Return `mu = KL(u || 1/m)` of the preference-weighted values, and the direction `a` of its descent; values of 0 give 0 and 0."""
    weighted = preference * values
    total = float(weighted.sum())
    if total == 0:
        return 0.0, np.zeros_like(values)
    u = weighted / total
    logs = np.log(np.maximum(u * len(u), np.finfo(np.float64).tiny))
    mu = float((u * logs).sum())
    return mu, preference * (logs - mu)
