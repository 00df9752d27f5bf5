"""Noise that is drawn anew in every step: clean examples become pairs of noisy input and clean target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["AddNoise"]


class AddNoise:
    """Make `input = x + sigma * noise` and `target = x` of a batch of clean examples, as a `transform` of `poise.fit`.

    Nothing is clipped to the data's range: a cut would change the noise, and with it the proximal operator that is learned.

    Args:
        sigma: standard deviation of the noise, one number; or a pair, between which it is drawn for each example.
        clean: the quantity that holds the clean examples.

    Writes: `input`, `target` and `noise_level` float [batch].

    Raises:
        InputError: sigma is negative, or a pair in the wrong order.

    Example:
        >>> batch = AddNoise(0.1)({"input": torch.zeros(2, 3)}, torch.Generator().manual_seed(0))
        >>> batch["target"].abs().max(), batch["noise_level"]
        (tensor(0.), tensor([0.1000, 0.1000]))
    """

    def __init__(self, sigma: float | tuple[float, float] = 0.1, clean: str = "input") -> None:
        low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        if not 0 <= low <= high:
            raise InputError(f"AddNoise: sigma is a number >= 0 or a pair (low, high) of such, and it is {sigma}.")
        self.low, self.high, self.clean = float(low), float(high), clean

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Return the batch with noise from the generator."""
        x: Tensor = batch[self.clean]
        if not x.is_floating_point():
            raise InputError(f"AddNoise: {self.clean!r} must be float, and it is {x.dtype}.")
        level = torch.full((len(x),), self.low, dtype=x.dtype)
        if self.high > self.low:
            level = self.low + (self.high - self.low) * torch.rand(len(x), generator=generator, dtype=x.dtype)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        level = level.to(x.device)
        noisy = x + level.view(-1, *[1] * (x.dim() - 1)) * noise
        return {**batch, "input": noisy, "target": x, "noise_level": level}
