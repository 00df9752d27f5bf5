"""Corruptions of grey images, after MNIST-C: what makes many related tasks of one data set.

    corrupted = CORRUPTIONS["rotate"](images, 1.0, torch.Generator().manual_seed(0))

Every one takes images float [n, height, width] in [0, 1], a severity >= 0 (0 leaves the image as it is, 1 is usual) and a generator, and
returns new images in [0, 1]. What they look like follows the names of Mu and Gilmer, arXiv:1906.02337; sizes are relative to the image,
so that 8 x 8 and 28 x 28 digits both work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, nearest

__all__ = ["CORRUPTIONS", "EIGHT", "corrupt"]

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def corrupt(images: Tensor, name: str, severity: float = 1.0, *, generator: torch.Generator) -> Tensor:
    """Corrupt images by name.

    Args:
        images: float [n, height, width] in [0, 1].
        name: a name of `CORRUPTIONS`.
        severity: >= 0.
        generator: where the random numbers come from.

    Raises:
        InputError: no such corruption, or images of another form.

    >>> corrupt(torch.ones(1, 4, 4), "identity", generator=torch.Generator()).sum()
    tensor(16.)
    """
    if name not in CORRUPTIONS:
        raise InputError(
            f"There is no corruption {name!r}.{nearest(name, CORRUPTIONS)} There are: {', '.join(CORRUPTIONS)}."
        )
    if images.ndim != 3 or not images.is_floating_point() or severity < 0:
        raise InputError(
            f"corrupt: images float [n, height, width] and severity >= 0 were expected; got {images.dtype} "
            f"{list(images.shape)} and {severity}."
        )
    return CORRUPTIONS[name](images, severity, generator).clamp(0, 1)


def _uniform(shape: tuple[int, ...], generator: torch.Generator, low: float = -1.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _identity(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x.clone()


def _smear(x: Tensor, kernel: Tensor) -> Tensor:
    rows, columns = kernel.shape
    padded = F.pad(x[:, None], (columns // 2, columns // 2, rows // 2, rows // 2))
    return F.conv2d(padded, kernel[None, None].to(x.dtype))[:, 0]


def _blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of a tenth of the image's width."""
    width = max(1e-3, 0.1 * severity * x.shape[-1])
    reach = math.ceil(2 * width)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / width) ** 2)
    bell = bell / bell.sum()
    return _smear(x, bell[:, None] * bell)


def _motion_blur(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A streak along the rows, a third of the image long."""
    reach = max(0, round(severity * x.shape[-1] / 6))
    return _smear(x, torch.full((1, 2 * reach + 1), 1 / (2 * reach + 1)))


def _noise(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x + 0.25 * severity * torch.randn(x.shape, generator=generator).to(x.dtype)


def _impulse(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Pixels that are black or white."""
    chance = torch.rand(x.shape, generator=generator)
    share = min(0.15 * severity, 1.0)
    return torch.where(chance < share / 2, 0.0, torch.where(chance < share, 1.0, x))


def _contrast(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return mean + (x - mean) * math.exp(-1.2 * severity)


def _brightness(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x + 0.4 * severity


def _fog(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A smooth random veil."""
    n, h, w = x.shape
    veil = F.interpolate(torch.rand(n, 1, 3, 3, generator=generator), (h, w), mode="bilinear", align_corners=True)[:, 0]
    share = min(0.5 * severity, 1.0)
    return (1 - share) * x + share * veil.to(x.dtype)


def _stripe(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """An inverted band across the columns of the middle."""
    width = x.shape[-1]
    half = severity * width / 8
    middle = (torch.arange(width) - (width - 1) / 2).abs() < half
    return torch.where(middle, 1 - x, x)


def _occlusion(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """A black square, three eighths of the image wide, somewhere."""
    n, h, w = x.shape
    side = min(severity * 3 / 8, 1.0)
    top = (torch.rand(n, 1, 1, generator=generator) * (1 - side) * h).round()
    left = (torch.rand(n, 1, 1, generator=generator) * (1 - side) * w).round()
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    inside = (rows >= top) & (rows < top + round(side * h)) & (columns >= left) & (columns < left + round(side * w))
    return torch.where(inside, 0.0, x)


def _dots(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """White dots on a line through the image, at a random height."""
    n, h, w = x.shape
    period = max(2, w // 4)
    start, slope = torch.rand(n, 1, generator=generator) * h, _uniform((n, 1), generator, -0.5, 0.5)
    row = (start + slope * torch.arange(w)).round().long() % h
    column = torch.arange(w)
    lit = F.one_hot(row, h).transpose(1, 2).bool() & (column % period == 0)
    return torch.where(lit, (x + severity).clamp_max(1), x)


def _edges(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Where the image changes, in place of the image."""
    padded = F.pad(x[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    share = min(severity, 1.0)
    return (1 - share) * x + share * (across**2 + down**2).sqrt()


def _warp(x: Tensor, matrix: Tensor) -> Tensor:
    """The image at positions that an affine map [n, 2, 3] gives, bilinear, 0 outside."""
    grid = F.affine_grid(matrix.to(x.dtype), [len(x), 1, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


def _affine(n: int, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    rows = [[a, b, dx], [c, d, dy]]
    return torch.stack([torch.stack([v.expand(n) for v in row], 1) for row in rows], 1)


_ONE, _NONE = torch.ones(1), torch.zeros(1)


def _shift(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """By up to an eighth of the image in both directions."""
    move = 0.25 * severity * _uniform((2, len(x)), generator)
    return _warp(x, _affine(len(x), _ONE, _NONE, _NONE, _ONE, move[0], move[1]))


def _rotate(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """By 30 degrees, one way."""
    angle = torch.full((1,), math.radians(30) * severity)
    return _warp(x, _affine(len(x), angle.cos(), -angle.sin(), angle.sin(), angle.cos(), _NONE, _NONE))


def _scale(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    """Smaller by a third."""
    factor = torch.full((1,), 1 + 0.5 * severity)
    return _warp(x, _affine(len(x), factor, _NONE, _NONE, factor, _NONE, _NONE))


def _shear(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    slant = torch.full((1,), 0.4 * severity)
    return _warp(x, _affine(len(x), _ONE, slant, _NONE, _ONE, _NONE, _NONE))


CORRUPTIONS: dict[str, Corruption] = {
    "identity": _identity,
    "blur": _blur,
    "noise": _noise,
    "contrast": _contrast,
    "shift": _shift,
    "stripe": _stripe,
    "occlusion": _occlusion,
    "rotate": _rotate,
    "dots": _dots,
    "motion_blur": _motion_blur,
    "impulse": _impulse,
    "brightness": _brightness,
    "fog": _fog,
    "edges": _edges,
    "scale": _scale,
    "shear": _shear,
}
"""Sixteen, with the uncorrupted image among them, as in MNIST-C."""

EIGHT = ("blur", "noise", "contrast", "shift", "stripe", "occlusion", "rotate", "dots")
"""Those that suit 8 x 8 digits."""
