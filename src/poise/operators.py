"""Small exact maps that terms, solvers and weights share: projections, thresholds, proximal maps."""

from __future__ import annotations

import torch
from torch import Tensor


def project_on_line(point: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Project a point onto the line through two others and return where on it the foot lies.

    `t = <point - start, end - start> / ||end - start||^2`, so that `start + t * (end - start)` is nearest to `point`;
    inner products run over all entries, in float64 where the device has it.

    Args:
        point, start, end: float tensors of one shape.

    Returns:
        `(t, coincide)`, both 0-dim: `t` is any real number, and 1 where `coincide` says that start and end are equal
        up to rounding, so that they define no line.

    >>> project_on_line(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.0]))[0]
    tensor(0.2500, dtype=torch.float64)
    """
    rounding = 8.0 * torch.finfo(start.dtype).eps
    accumulate = start.dtype if start.device.type == "mps" else torch.float64
    point, start, end = point.to(accumulate), start.to(accumulate), end.to(accumulate)
    direction = end - start
    length = direction.square().sum()
    coincide = length.sqrt() <= rounding * (start.norm() + end.norm())
    share = ((point - start) * direction).sum() / torch.where(coincide, torch.ones_like(length), length)
    return torch.where(coincide, torch.ones_like(share), share), coincide


def rescaled(x: Tensor, mask: Tensor) -> Tensor:
    """Bring values to [0, 1] over the marked tokens of each row: (x - least) / (largest - least); 1 where all are equal.

    Args:
        x: float [..., time].
        mask: bool [..., time]; outside the result is 0.

    >>> rescaled(torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[1.0000, 0.0000, 0.5000, 0.0000]])
    """
    least = torch.where(mask, x, torch.inf).amin(-1, keepdim=True)
    largest = torch.where(mask, x, -torch.inf).amax(-1, keepdim=True)
    span = largest - least
    flat = ~(span > 0)
    found = torch.where(flat, 1.0, (x - least) / torch.where(flat, 1.0, span))
    return torch.where(mask, found, 0.0)
