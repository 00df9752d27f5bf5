"""Two classical regularisers of images with their proximal maps: total variation, and sparse wavelet coefficients.

Both follow the contract of penalties: `value(x)` is a number, `prox(point, step)` is `argmin_u 1/2 ||u - point||^2 + step R(u)`. Images may stand
in any batch `[..., height, width]`; values add up over it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["ImageTotalVariation", "WaveletL1"]


class ImageTotalVariation:
    """Isotropic total variation of images: `sum over pixels of sqrt(right^2 + down^2)`, differences of neighbours, none beyond the edge.

    The proximal map has no closed form. It is found on the dual, by accelerated projected gradients, to a duality gap that is a share of the
    value there; the last gap is kept in `gap`.

    Args:
        tolerance: relative duality gap.
        max_iter: most iterations; each costs two passes over the image.

    >>> ImageTotalVariation().value(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    tensor(2.)

    Source: Beck and Teboulle, IEEE Transactions on Image Processing 18 (2009).
    """

    convex, separable = True, False

    def __init__(self, tolerance: float = 1e-5, max_iter: int = 500) -> None:
        if not (tolerance > 0 and max_iter >= 1):
            raise InputError(
                f"ImageTotalVariation: tolerance and max_iter are positive; they are {tolerance} and {max_iter}."
            )
        self.tolerance, self.max_iter, self.gap = tolerance, max_iter, 0.0

    def value(self, x: Tensor) -> Tensor:
        """Return the total variation, 0-dim."""
        return _lengths(_differences(x)).sum()

    def prox(self, point: Tensor, step: float = 1.0) -> Tensor:
        """Return argmin_u 1/2 ||u - point||^2 + step TV(u)."""
        p = point.new_zeros(2, *point.shape)
        q, t = p.clone(), 1.0
        u = point
        for iteration in range(1, self.max_iter + 1):
            u = point + step * _divergence(q)
            moved = q + _differences(u) / (8.0 * step)
            fresh = moved / _lengths(moved).clamp_min(1.0)
            following = 0.5 * (1.0 + (1.0 + 4.0 * t * t) ** 0.5)
            q = fresh + ((t - 1.0) / following) * (fresh - p)
            p, t = fresh, following
            if iteration % 10 == 0 or iteration == self.max_iter:
                u = point + step * _divergence(p)
                d = _differences(u)
                variation = _lengths(d).sum()
                # The gap of the pair is step (TV(u) - <p, D u>), by u = point - step D'p.
                gap = step * (variation - (p * d).sum())
                scale = 0.5 * (u - point).square().sum() + step * variation
                self.gap = float(gap / scale.clamp_min(torch.finfo(scale.dtype).tiny))
                if self.gap <= self.tolerance:
                    break
        return u


def _differences(x: Tensor) -> Tensor:
    """Return right and down differences, [2, ..., height, width], 0 at the last column and row."""
    found = x.new_zeros(2, *x.shape)
    found[0, ..., :-1] = x[..., 1:] - x[..., :-1]
    found[1, ..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    return found


def _divergence(p: Tensor) -> Tensor:
    """Return minus the adjoint of `_differences`."""
    found = torch.zeros_like(p[0])
    right, down = p[0, ..., :-1], p[1, ..., :-1, :]
    found[..., :-1] += right
    found[..., 1:] -= right
    found[..., :-1, :] += down
    found[..., 1:, :] -= down
    return found


def _lengths(p: Tensor) -> Tensor:
    return (p[0].square() + p[1].square()).sqrt()


class WaveletL1:
    """The sum of absolute detail coefficients of the orthonormal Haar transform.

    The transform is orthonormal, so the proximal map is exact: transform, threshold the details, transform back.

    Args:
        levels: how often height and width are halved; both must be divisible by 2^levels.

    >>> WaveletL1(1).value(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor(1.5000)
    """

    convex, separable = True, False

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

    def prox(self, point: Tensor, step: float = 1.0) -> Tensor:
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
