"""How near an image is to the one it should be: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError

__all__ = ["denoising_metrics", "psnr", "ssim"]


def psnr(image: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """The peak signal-to-noise ratio of each image, in decibels.

        10 log10( data_range^2 / mean (image - reference)^2 )

    Args:
        image, reference: float `[batch, ...]` of one shape.
        data_range: largest minus smallest value that an image can have.
    Returns:
        float64 `[batch]`; infinite where both are equal.
    Raises:
        InputError: where shapes differ.

        >>> psnr(torch.full((1, 4), 0.1), torch.zeros(1, 4))
        tensor([20.0000], dtype=torch.float64)
    """
    _check(image, reference, 1, data_range)
    error = (image.detach().double() - reference.double()).flatten(1).square().mean(1)
    return -10.0 * (error / data_range**2).log10()


def ssim(
    image: Tensor, reference: Tensor, data_range: float = 1.0, window: int = 7, gaussian: float | None = None
) -> Tensor:
    """The structural similarity of each image, the mean over windows that lie inside it and over channels.

        (2 m_a m_b + c_1) (2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1) (s_a^2 + s_b^2 + c_2)),   c_1 = (0.01 L)^2,  c_2 = (0.03 L)^2

    Args:
        image, reference: float `[batch, height, width]` or `[batch, channels, height, width]`.
        data_range: L, largest minus smallest value that an image can have.
        window: side of the square window, odd; variances divide by one less than its pixels, as in scikit-image.
        gaussian: standard deviation of a Gaussian window in pixels, of `window` by `window` (the original paper: 1.5 and 11);
            then variances are weighted means.
    Returns:
        float64 `[batch]`, at most 1.
    Raises:
        InputError: where shapes differ or an image is smaller than the window.

        >>> ssim(torch.eye(8)[None], torch.eye(8)[None])
        tensor([1.], dtype=torch.float64)

    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13 (2004).
    """
    _check(image, reference, 3, data_range)
    height, width = image.shape[-2:]
    if window % 2 == 0 or window < 3 or min(height, width) < window:
        raise InputError(
            f"ssim: the window has an odd side of at least 3 and fits into the image; it is {window}, the image {height} x {width}."
        )
    a, b = (t.detach().double().reshape(len(t), -1, height, width).flatten(0, 1)[:, None] for t in (image, reference))
    kernel = _kernel(window, gaussian).to(a.device)
    mean_a, mean_b, aa, bb, ab = (F.conv2d(t, kernel) for t in (a, b, a * a, b * b, a * b))
    unbiased = 1.0 if gaussian else window**2 / (window**2 - 1)
    var_a, var_b = unbiased * (aa - mean_a.square()), unbiased * (bb - mean_b.square())
    covariance = unbiased * (ab - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    return (top / bottom).flatten(1).mean(1).view(len(image), -1).mean(1)


def denoising_metrics(output: Tensor, target: Tensor) -> dict[str, float]:
    """Mean PSNR, and mean SSIM where images are at least 7 x 7, by name; values are taken to lie in [0, 1].

    Hand it to `poise.fit(..., metrics=denoising_metrics, monitor="psnr")`.

        >>> sorted(denoising_metrics(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)))
        ['psnr', 'ssim']
    """
    found = {"psnr": float(psnr(output, target).mean())}
    if output.ndim > 2 and min(output.shape[-2:]) >= 7:
        found["ssim"] = float(ssim(output, target).mean())
    return found


def _kernel(window: int, gaussian: float | None) -> Tensor:
    if gaussian is None:
        return torch.full((1, 1, window, window), 1.0 / window**2, dtype=torch.float64)
    place = torch.arange(window, dtype=torch.float64) - window // 2
    bell = torch.exp(-0.5 * (place / gaussian) ** 2)
    bell = bell / bell.sum()
    return (bell[:, None] * bell)[None, None]


def _check(image: Tensor, reference: Tensor, dims: int, data_range: float) -> None:
    if image.shape != reference.shape or image.ndim < max(2, dims) or not len(image):
        raise InputError(
            f"An image metric needs image and reference of one shape [batch, ...], got {list(image.shape)} and {list(reference.shape)}."
        )
    if not data_range > 0:
        raise InputError(f"An image metric needs a positive data_range, and it is {data_range}.")
