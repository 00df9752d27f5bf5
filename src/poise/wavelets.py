"""The sum of absolute wavelet coefficients as a penalty of images: what is sparse after a Haar transform is cheap."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.penalties import Penalty

__all__ = ["WaveletL1"]


class WaveletL1(Penalty):
    """The sum of absolute detail coefficients of the orthonormal Haar transform.

    The transform is orthonormal, so the proximal map is exact: transform, threshold the details, transform back.

    Args:
        levels: how often height and width are halved; both must be divisible by 2^levels.

    Images may stand in any batch [..., height, width]; the value adds up over it.

    >>> WaveletL1(1).value(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor(1.5000)
    """

    convex: ClassVar[bool] = True

    def __init__(self, levels: int = 3) -> None:
        if levels < 1:
            raise InputError(f"WaveletL1: levels is at least 1, and it is {levels}.")
        self.levels = levels

    def value(self, x: Tensor) -> Tensor:
        """Return the sum over all details, 0-dim."""
        total = x.new_zeros(())
        for _ in range(self.levels):
            x, details = self._split(x)
            total = total + details.abs().sum()
        return total

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return argmin_u 1/2 ||u - point||^2 + step R(u)."""
        kept, x = [], point
        for _ in range(self.levels):
            x, details = self._split(x)
            kept.append(details.sign() * (details.abs() - step).clamp_min(0.0))
        for details in reversed(kept):
            x = _joined(x, details)
        return x

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the halved image and its three details, [3, ..., height / 2, width / 2]."""
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            raise InputError(
                f"WaveletL1: height and width must be divisible by {2**self.levels}; a level of {list(x.shape[-2:])} came up."
            )
        a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
        c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
        return (a + b + c + d) / 2, torch.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def _joined(low: Tensor, details: Tensor) -> Tensor:
    h, v, d = details
    x = low.new_zeros(*low.shape[:-2], 2 * low.shape[-2], 2 * low.shape[-1])
    x[..., ::2, ::2] = (low + h + v + d) / 2
    x[..., ::2, 1::2] = (low - h + v - d) / 2
    x[..., 1::2, ::2] = (low + h - v - d) / 2
    x[..., 1::2, 1::2] = (low - h - v + d) / 2
    return x
