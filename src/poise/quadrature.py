"""The midpoint rule on a box: every cell of a grid stands for its middle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["midpoints"]


def midpoints(low: Tensor, high: Tensor, cells: int) -> tuple[Tensor, float]:
    """Return the middles of a grid's cells, float [cells^d, d], and the logarithm of a cell's volume.

    Args:
        low, high: corners of the box, float [d], d at most 3, low < high.
        cells: along each side, at least 1.

    >>> midpoints(torch.tensor([0.0]), torch.tensor([4.0]), 2)[0]
    tensor([[1.],
            [3.]])
    """
    if low.ndim != 1 or low.shape != high.shape or len(low) > 3 or not bool((low < high).all()):
        raise InputError(
            f"midpoints: low and high are corners [d] of a box, d at most 3, with low below high everywhere; got {list(low.shape)} and "
            f"{list(high.shape)}. In more dimensions draw points instead."
        )
    if cells < 1:
        raise InputError(f"midpoints: cells along a side, at least 1; got {cells}.")
    middles = (torch.arange(cells, dtype=low.dtype, device=low.device) + 0.5) / cells
    sides = [a + (b - a) * middles for a, b in zip(low, high, strict=True)]
    points = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(low))
    return points, float((high - low).log().sum()) - len(low) * math.log(cells)
