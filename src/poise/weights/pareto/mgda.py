"""The shortest combination of gradients: a direction that lowers every term, or the proof that none does."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.balancer import Balancer
from poise.weights.pareto.geometry import rows_of, shortest


class MGDA(Balancer):
    """The point of the convex hull of the gradients that is nearest to 0.

    w = argmin |sum_i w_i g_i|  over  w >= 0, sum_i w_i = 1

    With `d = sum_i w_i g_i`, every term falls along `-d` at the same or a higher rate: `<d, g_i> >= |d|^2`, with equality where
    `w_i > 0`. Exact: no Frank-Wolfe steps that stop a percent short.

    Args:
        normalize: "none", or "l2" to give every gradient length 1 first, so that the shortest no longer decides alone. The weights
            still multiply the gradients as they are, and sum to 1.

    Scale: the weights sum to 1, so the step is at most that of the mean of the gradients; the learning rate of the plain sum can be
    raised by up to the number of terms.

    When it fails: the shortest gradient draws nearly all weight (the answer for gradients of lengths 1 and 1000 is the first, almost), so
    a term that is nearly solved, or merely small, holds back the others; one gradient that vanishes makes the point Pareto stationary
    and the step 0. It slows down on the front and stops at any point of it. Copies of one gradient have no unique weights, only
    a unique `d`; the weight then falls on one of them.

    Source: Désidéri, C. R. Acad. Sci. Paris 350 (2012); for deep networks arXiv:1810.04650.

    Example:
        >>> MGDA().weigh(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """

    formula: ClassVar[str] = "mgda"
    total: ClassVar[str] = "1"

    def __init__(self, normalize: str = "none") -> None:
        super().__init__()
        if normalize not in ("none", "l2"):
            raise InputError(f"mgda: normalize is 'none' or 'l2', and it is {normalize!r}.")
        self.normalize = normalize

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return `w` f64 [m] on the simplex."""
        rows = rows_of(gram)
        if self.normalize == "none":
            return torch.from_numpy(shortest(rows.scaled))
        weights = shortest(rows.unit) * rows.inverse_norms
        return torch.from_numpy(weights / weights.sum()) if weights.any() else torch.from_numpy(shortest(rows.scaled))
