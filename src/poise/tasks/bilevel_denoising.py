"""Bilevel problems of denoising: how much total variation, or which fields of experts, on crops of a real photograph.

    task = tv_denoising()
    method = MAID(task.levels, task.theta, task.x, step0=0.01, **task.constants)
    method.run(budget=2000)
    task.measures["psnr"](method.x, method.theta)

The photograph is scikit-learn's `china.jpg`, grey, in [0, 1]. Each crop is a training pair of its own: a lower problem with its own
certificate.

Source: arXiv:2308.10098, sections 4.3 and 4.4, at sizes of this library. The code of the paper pads by reflection; here a kernel stays
inside the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError
from poise.metrics import images
from poise.quantities import derive
from poise.tasks.bilevel_task import BilevelTask
from poise.weights.bilevel.levels import Levels, Tensors

__all__ = ["CROP", "china_crops", "foe_denoising", "psnr", "tv_denoising"]

CROP = (150, 200)
"""Row and column of the first crop."""


def china_crops(corners: Sequence[tuple[int, int]] = (CROP,), size: int = 64) -> Tensor:
    """Return square crops of the photograph, float64 [crops, size, size], grey in [0, 1].

    Args:
        corners: row and column of each, of 427 x 640.
        size: of a side.
    """
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).double().mean(2) / 255
    height, width = image.shape
    for row, column in corners:
        if not (0 <= row <= height - size and 0 <= column <= width - size):
            raise InputError(f"A crop of {size} at {(row, column)} leaves the image of {height} x {width}.")
    return torch.stack([image[row : row + size, column : column + size] for row, column in corners])


def tv_denoising(
    corners: Sequence[tuple[int, int]] = (CROP,),
    size: int = 64,
    noise: float = 0.1,
    seed: int = 0,
    start: float = -5.0,
    smoothing: float = 1e-2,
    learn_smoothing: bool = False,
) -> BilevelTask:
    """Return total variation with a weight to be learned, and its smoothing as well if wanted.

        lower = |x - y|^2 / 2 + exp(t) sum sqrt(d^2 + nu^2),    d: differences of neighbours, down and right
        upper = |x - clean|^2 / (2 crops)

    Args:
        corners, size: of the crops.
        noise: standard deviation.
        seed: of the noise.
        start: t at first.
        smoothing: nu, at first or throughout.
        learn_smoothing: whether log nu is a second variable.
    """
    clean, noisy = _pairs(corners, size, noise, seed)
    fixed = torch.tensor(math.log(smoothing), dtype=torch.float64)

    def lower(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        y = noisy if rows is None else noisy[rows]
        square = (2 * (theta[1] if learn_smoothing else fixed)).exp()
        down, right = x[0].diff(dim=1), x[0].diff(dim=2)
        variation = (down.square() + square).sqrt().sum() + (right.square() + square).sqrt().sum()
        return (x[0] - y).square().sum() / 2 + theta[0].exp() * variation

    def smoothness(theta: Tensors) -> Tensor:
        # The differences have norm sqrt(8) at most, and sqrt(d^2 + nu^2) curvature 1/nu.
        return 1 + 8 * (theta[0] - (theta[1] if learn_smoothing else fixed)).exp()

    first = torch.tensor(start, dtype=torch.float64)
    theta = (first, fixed.clone()) if learn_smoothing else (first,)
    return BilevelTask(
        Levels(lower, _squared_error(clean), names=("log weight", "log smoothing")[: len(theta)]),
        theta,
        (noisy.clone(),),
        {"strong_convexity": 1.0, "smoothness": smoothness, "upper_lipschitz": 1 / len(clean), "samples": True},
        {"psnr": lambda x, _: psnr(x[0], clean), "psnr noisy": lambda x, _: psnr(noisy, clean)},
    )


def foe_denoising(
    filters: int = 8,
    kernel: int = 5,
    corners: Sequence[tuple[int, int]] = (CROP, (20, 60), (300, 420), (200, 500)),
    size: int = 64,
    noise: float = 0.1,
    seed: int = 0,
) -> BilevelTask:
    """Return fields of experts whose filters, weights and smoothings are learned: 2 K + 1 logarithms and K kernels.

        lower = |x - y|^2 / 2 + exp(t) sum_k exp(a_k) sum sqrt((c_k * x)^2 + nu_k^2),    log nu_k learned as well
        upper = |x - clean|^2 / (2 crops)

    Args:
        filters: K; 48 of 7 x 7 in the code of the paper.
        kernel: side of a kernel.
        corners, size: of the crops.
        noise: standard deviation.
        seed: of the noise and of the first kernels, which have mean 0.
    """
    if filters < 1 or not 1 < kernel <= size:
        raise InputError(
            f"foe_denoising: filters >= 1 and 1 < kernel <= size are needed; they are {filters}, {kernel}."
        )
    clean, noisy = _pairs(corners, size, noise, seed)
    generator = torch.Generator().manual_seed(derive(seed, "kernels"))
    first = torch.randn(filters, 1, kernel, kernel, generator=generator, dtype=torch.float64) / kernel
    first = first - first.mean((2, 3), keepdim=True)

    def lower(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        y = noisy if rows is None else noisy[rows]
        total, weights, smoothings, kernels = theta
        answers = functional.conv2d(x[0][:, None], kernels)
        experts = (answers.square() + (2 * smoothings).exp()[:, None, None]).sqrt().sum((0, 2, 3))
        return (x[0] - y).square().sum() / 2 + total.exp() * (weights.exp() * experts).sum()

    theta = (
        torch.tensor(-3.0, dtype=torch.float64),
        torch.full((filters,), -1.0, dtype=torch.float64),
        torch.full((filters,), -3.0, dtype=torch.float64),
        first,
    )
    return BilevelTask(
        Levels(
            lower, _squared_error(clean), names=("log weight", "log weights of experts", "log smoothings", "kernels")
        ),
        theta,
        (noisy.clone(),),
        {"strong_convexity": 1.0, "upper_lipschitz": 1 / len(clean), "samples": True},
        {"psnr": lambda x, _: psnr(x[0], clean), "psnr noisy": lambda x, _: psnr(noisy, clean)},
    )


def psnr(x: Tensor, clean: Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels, mean over images, for values in [0, 1]."""
    return float(images.psnr(x, clean).mean())


def _pairs(corners: Sequence[tuple[int, int]], size: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    if noise <= 0:
        raise InputError(f"noise must be positive; it is {noise}.")
    clean = china_crops(corners, size)
    generator = torch.Generator().manual_seed(derive(seed, "noise"))
    return clean, clean + noise * torch.randn(clean.shape, generator=generator, dtype=torch.float64)


def _squared_error(clean: Tensor):  # type: ignore[no-untyped-def]
    return lambda x, theta, _: (x[0] - clean).square().sum() / (2 * len(clean))
