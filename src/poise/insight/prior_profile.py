"""What a learned prior thinks of spoiled images: it should rise the further they are from the data.

    profile = prior_profile(prox, images)
    profile.curves["noise"].mean          # R(spoiled) - R(clean), level by level
    profile.curves["noise"].monotone      # whether its mean rises at every level

Three ways of spoiling, from the paper: Gaussian noise, a Gaussian blur, and convex mixtures of two images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.errors import InputError
from poise.linear_maps import Blur, gaussian_kernel

__all__ = ["PriorCurve", "PriorProfile", "prior_profile"]

NOISE, BLUR, MIXING = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


class _HasRegularizer(Protocol):
    def regularizer(self, x: Tensor, **how: Any) -> Tensor: ...


@dataclass(frozen=True)
class PriorCurve:
    """The prior along one way of spoiling.

    Attributes:
        levels: strengths, from 0.
        rise: R(spoiled) - R(clean), float64 [levels, images].
        clean: R(clean) less the mean over images, float64 [images]: how images differ among themselves.
    """

    levels: tuple[float, ...]
    rise: Tensor
    clean: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over images, float64 [levels]."""
        return self.rise.mean(1)

    @property
    def monotone(self) -> bool:
        """Whether the mean rises from level to level."""
        return bool((self.mean.diff() > 0).all())

    @property
    def monotone_share(self) -> float:
        """The share of pairs of neighbouring levels, over all images, where the prior rises."""
        return float((self.rise.diff(dim=0) > 0).double().mean())


@dataclass(frozen=True)
class PriorProfile:
    """Curves by name: "noise", "blur", "mixing"; those whose images allow it."""

    curves: Mapping[str, PriorCurve]

    def __str__(self) -> str:
        rows = []
        for name, curve in self.curves.items():
            shown = ", ".join(f"{level:g}: {rise:+.4g}" for level, rise in zip(curve.levels, curve.mean, strict=True))
            rows.append(f"{name:7s} {shown}   ({100 * curve.monotone_share:.0f} % of steps rise)")
        return "\n".join(rows)


def prior_profile(
    prox: _HasRegularizer,
    images: Tensor,
    noise: Sequence[float] = NOISE,
    blur: Sequence[float] = BLUR,
    mixing: Sequence[float] = MIXING,
    seed: int = 0,
    **how: Any,
) -> PriorProfile:
    """Measure a learned prior on images that are spoiled more and more.

    Args:
        prox: a `LearnedProx`.
        images: float [batch, ...]; blur needs [batch, channels, height, width].
        noise: standard deviations; the noise of an image is one draw that is scaled.
        blur: standard deviations of the bell, in pixels.
        mixing: shares t in [0, 0.5] of another image: (1 - t) x + t x'.
        seed: of noise and pairs.
        how: arguments of `LearnedProx.regularizer`, such as `tol`.

    Raises:
        InputError: levels do not begin with 0, or there are fewer than two images to mix.

    Source: arXiv:2310.14344, section 5 (MNIST).
    """
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(images.shape, generator=generator, dtype=torch.float64).to(images)
    others = images.roll(1, 0)
    spoil: dict[str, tuple[Sequence[float], Callable[[float], Tensor]]] = {
        "noise": (noise, lambda s: images + s * draw)
    }
    if images.dim() == 4 and min(images.shape[-2:]) >= 3:
        spoil["blur"] = (blur, lambda s: _blurred(images, s))
    if len(images) > 1:
        spoil["mixing"] = (mixing, lambda t: (1 - t) * images + t * others)
    clean = prox.regularizer(images, **how)
    curves = {}
    for name, (levels, make) in spoil.items():
        if not levels or levels[0] != 0:
            raise InputError(f"prior_profile: the levels of {name} begin with 0, and they are {tuple(levels)}.")
        rows = [torch.zeros_like(clean)]
        rows += [prox.regularizer(make(level), **how) - clean for level in levels[1:]]
        curves[name] = PriorCurve(tuple(map(float, levels)), torch.stack(rows), clean - clean.mean())
    return PriorProfile(curves)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    side = min(images.shape[-2:])
    size = min(2 * int(2 * sigma + 1) + 1, side - 1 if side % 2 == 0 else side)
    return Blur(gaussian_kernel(size, sigma), images.shape[1:])(images)
