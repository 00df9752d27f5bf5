"""Augmentations: what happens to a batch between the data and the model.

Each is a small immutable object that `poise.fit(..., transform=...)` calls as `transform(batch, generator)`: it reads and
replaces entries of the batch (`input`, sometimes `target`), draws from the generator alone, and leaves the given batch as
it was. `Chain` puts several in a row:

    transform = Chain(RandomShift(1, shape=(1, 28, 28)), GaussianNoise(0.1))

Images are `[batch, channels, height, width]`, or flat `[batch, channels*height*width]` with the shape given.
`Mixup` and `CutMix` mix each example with a partner of the batch, mix the labels, and leave `partner` and `share` in the
batch for terms that remember something per example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.quantities import describe

__all__ = ["Chain", "CutMix", "Cutout", "GaussianNoise", "Mixup", "RandomFlip", "RandomShift"]

Batch = dict[str, Any]
Transform = Callable[[Batch, torch.Generator], Batch]
Shape = tuple[int, int, int]


class Chain:
    """Several transforms, one after the other, on one generator.

    Args:
        transforms: called in this order.

    >>> Chain(GaussianNoise(0.0))({"input": torch.ones(1, 2)}, torch.Generator())["input"]
    tensor([[1., 1.]])
    """

    def __init__(self, *transforms: Transform) -> None:
        self.transforms = transforms

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        for transform in self.transforms:
            batch = transform(batch, generator)
        return batch

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.transforms))})"


@dataclass(frozen=True)
class RandomShift:
    """Move each image by up to `pixels` in both directions; what comes in is 0. Padding and cropping at random is the same.

        x'[c, i, j] = x[c, i + dy, j + dx],    dy, dx uniform on {-pixels, ..., pixels}

    Args:
        pixels: at least 0; 1 is mild on 28 x 28 digits, 4 usual on CIFAR.
        shape: `(channels, height, width)` of flat inputs; None for `[batch, channels, height, width]`.

    >>> RandomShift(1)({"input": torch.zeros(2, 1, 4, 4)}, torch.Generator())["input"].shape
    torch.Size([2, 1, 4, 4])
    """

    pixels: int
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise InputError(f"RandomShift: pixels must be at least 0, and it is {self.pixels}.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        image = _images("RandomShift", batch["input"], self.shape)
        b, c, h, w = image.shape
        p = self.pixels
        offset = torch.randint(0, 2 * p + 1, (2, b, 1), generator=generator).to(image.device)
        wide = w + 2 * p
        rows, columns = torch.arange(h, device=image.device)[:, None], torch.arange(w, device=image.device)
        # positions in the padded image, as one gather along its flattened pixels
        at = (rows * wide + columns).reshape(1, -1) + offset[0] * wide + offset[1]
        padded = F.pad(image, (p, p, p, p)).flatten(2)
        moved = padded.gather(2, at[:, None].expand(b, c, h * w))
        return {**batch, "input": moved.view(batch["input"].shape)}


@dataclass(frozen=True)
class RandomFlip:
    """Mirror each image left to right with a probability.

    Args:
        probability: in [0, 1].
        shape: `(channels, height, width)` of flat inputs; None for `[batch, channels, height, width]`.

    >>> RandomFlip(1.0)({"input": torch.tensor([[[[1.0, 2.0]]]])}, torch.Generator())["input"].flatten()
    tensor([2., 1.])
    """

    probability: float = 0.5
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise InputError(f"RandomFlip: probability must lie in [0, 1], and it is {self.probability}.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        image = _images("RandomFlip", batch["input"], self.shape)
        flip = (torch.rand(len(image), generator=generator) < self.probability).to(image.device)
        flipped = torch.where(flip[:, None, None, None], image.flip(-1), image)
        return {**batch, "input": flipped.view(batch["input"].shape)}


@dataclass(frozen=True)
class GaussianNoise:
    """Add independent normal noise: `x' = x + std * e`, `e ~ N(0, 1)`.

    Args:
        std: in units of the input, at least 0.

    >>> GaussianNoise(0.3)({"input": torch.zeros(2, 3)}, torch.Generator())["input"].shape
    torch.Size([2, 3])
    """

    std: float

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise InputError(f"GaussianNoise: std must be at least 0, and it is {self.std}.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x: Tensor = batch["input"]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return {**batch, "input": x + self.std * noise}


@dataclass(frozen=True)
class Cutout:
    """Blank one square of each image, centred anywhere (at the border a part of it falls outside).

    Args:
        size: side of the square in pixels, at least 1.
        shape: `(channels, height, width)` of flat inputs; None for `[batch, channels, height, width]`.

    >>> Cutout(9)({"input": torch.ones(1, 1, 4, 4)}, torch.Generator())["input"].sum()
    tensor(0.)

    Source: DeVries and Taylor 2017 (arXiv:1708.04552).
    """

    size: int
    shape: Shape | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"Cutout: size must be at least 1 pixel, and it is {self.size}.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        image = _images("Cutout", batch["input"], self.shape)
        b, _, h, w = image.shape
        inside = []
        for length in (h, w):
            centre = torch.randint(length, (b, 1), generator=generator).to(image.device)
            place = torch.arange(length, device=image.device)
            low = centre - self.size // 2
            inside.append((place >= low) & (place < low + self.size))
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return {**batch, "input": image.masked_fill(hole, 0).view(batch["input"].shape)}


@dataclass(frozen=True)
class Mixup:
    """Mix each example with a partner of the batch: `x' = s x + (1-s) x_j`, `y' = s y + (1-s) y_j`, `s ~ Beta(a, a)`.

    One share for the batch. The labels become distributions `[batch, classes]`; `partner` `int64 [batch]` (the position j in
    the batch) and `share` `float [batch]` join the batch.

    Args:
        a: both parameters of the Beta distribution, positive; 1 is uniform.
        classes: number of classes.
        dominant: take max(s, 1-s), so that each row stays the larger part of its mixture (ELR+, MixMatch).

    >>> batch = {"input": torch.zeros(2, 3), "target": torch.tensor([0, 1])}
    >>> Mixup(0.2, classes=2)(batch, torch.Generator())["target"].sum(1)
    tensor([1., 1.])

    Source: Zhang et al. 2018 (arXiv:1710.09412).
    """

    a: float
    classes: int
    dominant: bool = False

    def __post_init__(self) -> None:
        _check_mixing("Mixup", self.a, self.classes)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        x: Tensor = batch["input"]
        partner, share = _draw_partners(len(x), self.a, generator)
        share = max(share, 1 - share) if self.dominant else share
        mixed = share * x + (1 - share) * x[partner.to(x.device)]
        return _mixed(batch, mixed, partner, share, self.classes)


@dataclass(frozen=True)
class CutMix:
    """Paste a rectangle of a partner into each image, and mix the labels by area.

        x' = x outside a box, x_j inside;   y' = s y + (1-s) y_j,   1 - s the box's share of the image

    The box has sides `sqrt(1-l)` of the image's, `l ~ Beta(a, a)`, centred anywhere and cut at the border; one box for the
    batch. `partner` and `share` join the batch as in `Mixup`.

    Args:
        a: both parameters of the Beta distribution, positive; the paper uses 1.
        classes: number of classes.
        shape: `(channels, height, width)` of flat inputs; None for `[batch, channels, height, width]`.

    >>> batch = {"input": torch.zeros(2, 1, 4, 4), "target": torch.tensor([0, 1])}
    >>> sorted(CutMix(1.0, classes=2)(batch, torch.Generator()))
    ['input', 'partner', 'share', 'target']

    Source: Yun et al. 2019 (arXiv:1905.04899).
    """

    a: float
    classes: int
    shape: Shape | None = None

    def __post_init__(self) -> None:
        _check_mixing("CutMix", self.a, self.classes)

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        image = _images("CutMix", batch["input"], self.shape)
        b, _, h, w = image.shape
        partner, kept = _draw_partners(b, self.a, generator)
        ranges = []
        for length in (h, w):
            half = int(length * (1 - kept) ** 0.5) // 2
            centre = int(torch.randint(length, (), generator=generator))
            ranges.append(slice(max(0, centre - half), min(length, centre + half)))
        mixed = image.clone()
        mixed[:, :, ranges[0], ranges[1]] = image[partner.to(image.device)][:, :, ranges[0], ranges[1]]
        area = (ranges[0].stop - ranges[0].start) * (ranges[1].stop - ranges[1].start)
        return _mixed(batch, mixed.view(batch["input"].shape), partner, 1 - area / (h * w), self.classes)


def _images(what: str, x: Tensor, shape: Shape | None) -> Tensor:
    """The input as `[batch, channels, height, width]`."""
    if shape is not None and x.ndim == 2 and x.shape[1] == shape[0] * shape[1] * shape[2]:
        return x.view(len(x), *shape)
    if x.ndim == 4 and (shape is None or tuple(x.shape[1:]) == shape):
        return x
    raise InputError(
        f"{what}: the input must be images [batch, channels, height, width], or flat with shape=(channels, height, width) "
        f"given; it is {describe(x)} and shape={shape}."
    )


def _check_mixing(what: str, a: float, classes: int) -> None:
    if not a > 0:
        raise InputError(f"{what}: a must be positive, and it is {a}.")
    if classes < 2:
        raise InputError(f"{what}: classes must be at least 2, and it is {classes}.")


def _draw_partners(examples: int, a: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """A permutation of the batch and a share from Beta(a, a), which PyTorch draws from no generator of ours."""
    partner = torch.randperm(examples, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    return partner, float(np.random.default_rng(seed).beta(a, a))


def _mixed(batch: Batch, mixed: Tensor, partner: Tensor, share: float, classes: int) -> Batch:
    target: Tensor = batch["target"]
    partner = partner.to(target.device)
    labels = target if target.is_floating_point() else F.one_hot(target, classes).to(mixed.dtype)
    return {
        **batch,
        "input": mixed,
        "target": share * labels + (1 - share) * labels[partner],
        "partner": partner,
        "share": torch.full((len(target),), share, dtype=mixed.dtype, device=mixed.device),
    }
