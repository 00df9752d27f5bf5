"""Every gradient, freed of what harms another term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.geometry import nonnegative, rows_of
from poise.weights.pareto.preferences import spread, stated

_HARMLESS = -1e-15


class UPGrad(Balancer):
    """The sum of the gradients' projections on the cone in which no term rises.

    d = sum_i u_i P(g_i),   P(g) = argmin |d - g|  over  <d, g_j> >= 0 for all j

    By duality `P(g_i) = g_i + sum_j v_ij g_j` with `v_i >= 0` from a quadratic program, solved exactly; the weights are
    `w_j = u_j + sum_i u_i v_ij >= u_j`. No term rises to first order, and a term's share of the step grows with its own gradient.

    Args:
        preference: `u`, one number a term, at least 0; by default 1/m each.

    Scale: without conflict the weights are the preference (sum 1 by default: the mean of the gradients); conflicts raise them.

    When it fails: it keeps the scales of the terms, so a term a thousand times larger rules wherever nothing conflicts; give a
    `preference`, or weigh with `normalised`. Where all gradients cancel (no direction helps all), the step is 0.

    Source: arXiv:2406.16232, section 3.

    Example:
        >>> UPGrad().weigh(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.zeros(2))
        tensor([0.7500, 0.7500], dtype=torch.float64)
    """

    formula: ClassVar[str] = "upgrad"
    total: ClassVar[str] = "1"

    def __init__(self, preference: Sequence[float] | None = None) -> None:
        super().__init__()
        self.preference = stated(self.formula, preference)

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return `w` f64 [m], at least the preference."""
        rows = rows_of(gram)
        u = spread(self.formula, self.preference, len(rows.norms), 1 / len(rows.norms))
        weights = u.copy()
        conflicts = (rows.unit @ rows.unit.T).min(1) < _HARMLESS
        # What vanishes constrains nothing, and a column of rounding would be multiplied until it did.
        live = rows.norms > 0
        columns = rows.unit[live].T
        for i in conflicts.nonzero()[0]:
            # In units of length 1: the multipliers of g_i and g_j are in the ratio of their lengths.
            weights[live] += u[i] * rows.norms[i] * nonnegative(columns, -rows.unit[i]) * rows.inverse_norms[live]
        return torch.from_numpy(weights)
