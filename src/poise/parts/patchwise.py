"""A denoiser of small images on large ones: overlapping patches, averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError

__all__ = ["Patchwise"]


class Patchwise(nn.Module):
    """Apply a denoiser to overlapping patches and average where they overlap.

    Approximate: a mean of proximal operators of patches is, in general, the proximal operator of nothing, so there is no regulariser to
    report and no theorem of convergence. `exact` says so.

    Args:
        denoiser: from [batch, channels, size, size] to the same.
        size: side of a patch.
        stride: distance of neighbours, at most `size`; the last patches are moved back into the image.
        batch: patches that are denoised at a time.

    Raises:
        InputError: a stride beyond the patch, or an image smaller than it.

    Example:
        >>> Patchwise(nn.Identity(), size=4, stride=2)(torch.ones(1, 1, 7, 9)).sum()
        tensor(63.)

    Source: arXiv:2310.14344, appendix (128 by 128 with a stride of 64).
    """

    exact = False

    def __init__(self, denoiser: nn.Module, size: int = 128, stride: int = 64, batch: int = 256) -> None:
        super().__init__()
        if not 1 <= stride <= size or batch < 1:
            raise InputError(
                f"Patchwise: 1 <= stride <= size and batch >= 1 are needed; got stride {stride}, size {size} and batch {batch}."
            )
        self.denoiser, self.size, self.stride, self.batch = denoiser, size, stride, batch

    def forward(self, y: Tensor) -> Tensor:
        """Return the averaged patches, the shape of y."""
        height, width = y.shape[-2:]
        if min(height, width) < self.size:
            raise InputError(f"Patchwise: the image is {height} x {width}, smaller than a patch of {self.size}.")
        corners = [(r, c) for r in self._starts(height) for c in self._starts(width)]
        n = self.size
        patches = torch.stack([y[..., r : r + n, c : c + n] for r, c in corners])
        flat = patches.flatten(0, 1)
        parts = [self.denoiser(flat[i : i + self.batch]) for i in range(0, len(flat), self.batch)]
        cleaned = torch.cat(parts).view_as(patches)
        total, count = torch.zeros_like(y), y.new_zeros(1, 1, height, width)
        for (r, c), patch in zip(corners, cleaned, strict=True):
            pad = (c, width - c - n, r, height - r - n)
            total = total + F.pad(patch, pad)
            count[..., r : r + n, c : c + n] += 1
        return total / count

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        return [*range(0, last, self.stride), last]
