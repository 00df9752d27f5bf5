"""Regularising noise whose strength is tuned, and may differ from example to example.

Each strength is a number or a `poise.weights.Hyperparameter`, which a policy moves, and for which it may place a value for each example of
a step. All act in training mode only, draw from PyTorch's generator as `nn.Dropout` does (`poise.fit` derives it from the seed), and are
layers of the model: what changes the input stands in front of the first layer, so that it sees the values that the gates see.

    rate = Hyperparameter("dropout", 0.05, 0, 0.9)
    model = nn.Sequential(TunedCutout(holes, length), nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), TunedDropout(rate), nn.Linear(256, 10))

Source: arXiv:1903.03088, section 5 and its code (ranges of the input scale, of jitters and of cutout).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.errors import InputError
from poise.quantities import describe

if TYPE_CHECKING:
    from poise.weights.hyperparameter import Hyperparameter

__all__ = [
    "TunedChannelDropout",
    "TunedColourJitter",
    "TunedCutout",
    "TunedDropout",
    "TunedInputScale",
    "TunedNoise",
    "drop_connect",
]


class _Tuned(nn.Module):
    """What acts in training mode, with strengths that are read when it acts.

    Args:
        batch_axis: the axis of examples.
        **strengths: numbers, or hyperparameters, which become submodules and so are saved with the model.
    """

    lowest, highest = 0.0, math.inf

    def __init__(self, batch_axis: int, **strengths: float | Hyperparameter) -> None:
        super().__init__()
        self.batch_axis = batch_axis
        for name, strength in strengths.items():
            self._check(name, strength)
            setattr(self, name, strength)

    def _check(self, name: str, strength: float | Hyperparameter) -> None:
        low, high = (strength, strength) if isinstance(strength, int | float) else (strength.low, strength.high)
        if not self.lowest <= low <= high <= self.highest:
            raise InputError(
                f"{type(self).__name__}: {name} must lie in [{self.lowest:g}, {self.highest:g}], and it is {strength!r}."
            )

    def _read(self, name: str, x: Tensor) -> Tensor:
        """Return the strength, 0-dim or broadcasting against x."""
        strength = getattr(self, name)
        if isinstance(strength, int | float):
            return torch.tensor(float(strength), dtype=x.dtype, device=x.device)
        value: Tensor = strength.read(x, self.batch_axis)
        return value

    def forward(self, x: Tensor) -> Tensor:
        """Return x in evaluation mode, and x with noise in training mode."""
        return self._act(x) if self.training else x

    def _act(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _uniform(self, x: Tensor) -> Tensor:
        """One uniform number in [0, 1) for each example, shaped to broadcast against x."""
        shape = [1] * x.ndim
        shape[self.batch_axis] = x.shape[self.batch_axis]
        return torch.rand(shape, dtype=x.dtype, device=x.device)


class TunedDropout(_Tuned):
    """Drop entries and scale the rest: `y = x m / (1 - p_i)`, `m ~ Bernoulli(1 - p_i)`.

    Args:
        rate: `p` in [0, 1], shared or of each example.
        shared_axes: axes along which one mask serves: (1,) for a mask that is the same at every time step of [batch, time, features].
        batch_axis: the axis of examples.

    Example:
        >>> TunedDropout(0.5).eval()(torch.ones(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    highest = 1.0

    def __init__(self, rate: float | Hyperparameter, shared_axes: Sequence[int] = (), batch_axis: int = 0) -> None:
        super().__init__(batch_axis, rate=rate)
        self.shared_axes = tuple(shared_axes)

    def _mask_shape(self, x: Tensor) -> list[int]:
        shared = {axis % x.ndim for axis in self.shared_axes}
        return [1 if i in shared else size for i, size in enumerate(x.shape)]

    def _act(self, x: Tensor) -> Tensor:
        rate = self._read("rate", x)
        kept = torch.rand(self._mask_shape(x), dtype=x.dtype, device=x.device) >= rate
        # At a rate of 1 nothing is kept, and 0/0 would be NaN.
        return x * (kept / (1 - rate).clamp_min(torch.finfo(x.dtype).tiny))


class TunedChannelDropout(TunedDropout):
    """Drop whole channels of [batch, channels, ...]: `TunedDropout` with one mask for all places.

    Args: as `TunedDropout`, without `shared_axes`.
    """

    def __init__(self, rate: float | Hyperparameter) -> None:
        super().__init__(rate)

    def _mask_shape(self, x: Tensor) -> list[int]:
        if x.ndim < 3:
            raise InputError(f"TunedChannelDropout reads [batch, channels, ...], and it was given {describe(x)}.")
        return [*x.shape[:2], *[1] * (x.ndim - 2)]


class TunedNoise(_Tuned):
    """Add normal noise: `y = x + s_i e`, `e ~ N(0, 1)`.

    Args:
        std: `s`, at least 0.
        batch_axis: the axis of examples.

    Example:
        >>> TunedNoise(0.0)(torch.ones(2, 1))
        tensor([[1.],
                [1.]])
    """

    def __init__(self, std: float | Hyperparameter, batch_axis: int = 0) -> None:
        super().__init__(batch_axis, std=std)

    def _act(self, x: Tensor) -> Tensor:
        return x + self._read("std", x) * torch.randn_like(x)


class TunedInputScale(_Tuned):
    """Multiply each example by one number: `y_i = u_i x_i`, `u_i` uniform on [1/(1 + s_i), 1 + s_i].

    Args:
        strength: `s`, at least 0.
        batch_axis: the axis of examples.

    Example:
        >>> TunedInputScale(0.0)(torch.ones(2, 1))
        tensor([[1.],
                [1.]])
    """

    def __init__(self, strength: float | Hyperparameter, batch_axis: int = 0) -> None:
        super().__init__(batch_axis, strength=strength)

    def _act(self, x: Tensor) -> Tensor:
        most = 1 + self._read("strength", x)
        return x * (1 / most + (most - 1 / most) * self._uniform(x))


class TunedColourJitter(_Tuned):
    """Change brightness, contrast, saturation and hue of images [batch, channels, height, width] by chance.

        brightness  u x                      contrast    m + u (x - m), m the image's mean grey
        saturation  g + u (x - g), g the grey of each pixel       hue   a turn by 2 pi v of the chroma plane (YIQ)

    with `u_i` uniform on [max(0, 1 - s_i), 1 + s_i] and `v_i` uniform on [-s_i, s_i]. Values are not cut at 0 and 1.

    Args:
        brightness, contrast, saturation, hue: `s`, at least 0; 0 leaves it out. Saturation and hue need three channels.

    Example:
        >>> TunedColourJitter(brightness=0.2)(torch.ones(2, 1, 4, 4)).shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(
        self,
        brightness: float | Hyperparameter = 0.0,
        contrast: float | Hyperparameter = 0.0,
        saturation: float | Hyperparameter = 0.0,
        hue: float | Hyperparameter = 0.0,
    ) -> None:
        super().__init__(0, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)

    def _act(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(
                f"TunedColourJitter reads images [batch, channels, height, width], and it was given {describe(x)}."
            )
        coloured = [name for name in ("saturation", "hue") if isinstance(s := getattr(self, name), nn.Module) or s]
        if coloured and x.shape[1] != 3:
            raise InputError(f"TunedColourJitter: {coloured[0]} needs three channels, and the image is {describe(x)}.")
        x = x * self._factor("brightness", x)
        mean = _grey(x).mean((1, 2, 3), keepdim=True)
        x = torch.lerp(mean.expand_as(x), x, self._factor("contrast", x))
        if "saturation" in coloured:
            x = torch.lerp(_grey(x).expand_as(x), x, self._factor("saturation", x))
        if "hue" in coloured:
            x = _turned(x, 2 * math.pi * self._read("hue", x) * (2 * self._uniform(x) - 1))
        return x

    def _factor(self, name: str, x: Tensor) -> Tensor:
        strength = self._read(name, x)
        low = (1 - strength).clamp_min(0)
        return low + (1 + strength - low) * self._uniform(x)


class TunedCutout(_Tuned):
    """Blank `n_i` squares of side `l_i` in each image, centred anywhere; parts that fall outside are lost.

    Args:
        holes: `n`, at least 0: a whole number, or a discrete hyperparameter with an end.
        length: `l` in pixels, at least 0: a whole number, or a hyperparameter.
        shape: `(channels, height, width)` of flat inputs; None for [batch, channels, height, width].

    Example:
        >>> TunedCutout(holes=1, length=9)(torch.ones(1, 1, 4, 4)).sum()
        tensor(0.)

    Source: arXiv:1708.04552 (cutout); arXiv:1903.03088 (its numbers tuned).
    """

    def __init__(
        self,
        holes: float | Hyperparameter,
        length: float | Hyperparameter,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(0, holes=holes, length=length)
        most = holes if isinstance(holes, int | float) else holes.high
        if not most < math.inf:
            raise InputError("TunedCutout: holes needs a range with an end: give its hyperparameter a finite high.")
        self.most, self.shape = int(most), shape

    def _act(self, x: Tensor) -> Tensor:
        image = x if self.shape is None else x.view(len(x), *self.shape)
        if image.ndim != 4:
            raise InputError(
                f"TunedCutout reads images [batch, channels, height, width], or flat ones with shape=..., and it was given {describe(x)}."
            )
        length, holes = self._read("length", image).view(-1, 1, 1), self._read("holes", image).view(-1, 1)
        inside = []
        for size in image.shape[2:]:
            centre = torch.randint(size, (len(x), self.most, 1), device=x.device)
            place = torch.arange(size, device=x.device)
            low = centre - (length / 2).floor()
            inside.append((place >= low) & (place < low + length))
        acting = torch.arange(self.most, device=x.device) < holes
        blank = (inside[0][..., :, None] & inside[1][..., None, :] & acting[..., None, None]).any(1)
        return image.masked_fill(blank[:, None], 0).view(x.shape)


class _DropConnect(nn.Module):
    """A weight with entries, or whole rows, dropped in training mode; one mask for the batch."""

    def __init__(self, rate: float | Hyperparameter, rows: bool) -> None:
        super().__init__()
        self.rate, self.rows = rate, rows

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        rate = self.rate if isinstance(self.rate, int | float) else self.rate.read().to(weight)
        shape = [len(weight), *[1] * (weight.ndim - 1)] if self.rows else list(weight.shape)
        kept = torch.rand(shape, dtype=weight.dtype, device=weight.device) >= rate
        return weight * (kept / (1 - rate)).to(weight.dtype)


def drop_connect(layer: nn.Module, name: str, rate: float | Hyperparameter, rows: bool = False) -> nn.Module:
    """Drop entries of a weight in training mode: `W m / (1 - p)`, one mask for the whole batch.

    Args:
        layer: the layer, changed in place.
        name: its weight: "weight", or "weight_hh_l0" of a `BestResponseLSTM` (PyTorch's own LSTM does not see a changed weight).
        rate: `p` in [0, 1); a hyperparameter must have `per_example=False`, as the examples share the weight.
        rows: drop whole rows: words of an embedding.

    Returns:
        The layer.

    Raises:
        InputError: the layer has no such weight, or the rate is out of range or of each example.

    Example:
        >>> drop_connect(nn.Linear(4, 3), "weight", 0.5)(torch.ones(2, 4)).shape
        torch.Size([2, 3])

    Source: arXiv:1708.02182 (weight-dropped LSTM).
    """
    if not isinstance(layer._parameters.get(name), nn.Parameter):
        known = ", ".join(n for n, p in layer._parameters.items() if p is not None)
        raise InputError(f"drop_connect: the layer has no weight {name!r}; it has {known or 'none'}.")
    if isinstance(layer, nn.RNNBase):
        raise InputError(
            "drop_connect: PyTorch's recurrent layers hand their weights to one kernel and pass a changed one by. Use BestResponseLSTM."
        )
    high = rate if isinstance(rate, int | float) else rate.high
    low = rate if isinstance(rate, int | float) else rate.low
    if not (low >= 0 and (high < 1 or (high <= 1 and low < high))):
        raise InputError(f"drop_connect: rate must lie in [0, 1), and it is {rate!r}.")
    if not isinstance(rate, int | float) and rate.per_example:
        raise InputError(
            f"drop_connect: the examples of a batch share the weight, so {rate.name!r} cannot differ between them: per_example=False."
        )
    # The mask changes nothing about the weight that is stored, so what is saved stays what it was but for its name.
    parametrize.register_parametrization(layer, name, _DropConnect(rate, rows), unsafe=True)
    return layer


def _grey(x: Tensor) -> Tensor:
    """Return the luma of RGB images, or the mean of the channels of others, [batch, 1, height, width]."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    weights = x.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (x * weights).sum(1, keepdim=True)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Return RGB images with their chroma turned by an angle for each."""
    to = x.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = torch.einsum("rc,bchw->rbhw", to, x).unsqueeze(2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    moved = torch.stack([y, cos * i - sin * q, sin * i + cos * q]).squeeze(2)
    return torch.einsum("cr,rbhw->bchw", torch.linalg.inv(to), moved)
