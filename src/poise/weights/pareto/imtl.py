"""Impartial weights: every term's gradient counts alike, or every term's value does."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.geometry import rows_of

_RANK = 1e-12
"""Eigenvalues of the cosines below this share of the largest are rounding: the row depends on the others."""


class IMTLG(Balancer):
    """The combination with equal projections on all gradients.

    <d, g_i/|g_i|> equal for all i,   d = sum_i w_i g_i,   sum_i w_i = 1

    With the matrix of cosines `C` and `b = C^+ 1`, `w_i = b_i/|g_i|`, scaled to sum 1.

    Scale: the weights sum to 1. They may be negative.

    When it fails: gradients that point nearly alike but differ in length get large weights of both signs; where the weights would sum to
    0 the scale is not defined and the weights are 0 (no step). Where a gradient depends on the others, equal projections may not
    exist, and the least-squares answer is returned; a gradient that vanishes gets weight 0.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, eq. 3; dependent rows as arXiv:2406.16232, appendix.

    Example:
        >>> IMTLG().weigh(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
        tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    formula: ClassVar[str] = "imtl_g"
    total: ClassVar[str] = "1"

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return `w` f64 [m]; sum 1, of any sign."""
        rows = rows_of(gram)
        ones = (rows.norms > 0).astype(np.float64)
        sure = rows.eigenvalues > _RANK * rows.eigenvalues[-1]
        basis = rows.eigenvectors[:, sure]
        weights = (basis / rows.eigenvalues[sure]) @ (ones @ basis) * rows.inverse_norms
        total = weights.sum()
        if abs(total) <= 1e-12 * np.abs(weights).sum():
            return torch.zeros(len(weights), dtype=torch.float64)
        return torch.from_numpy(weights / total)
