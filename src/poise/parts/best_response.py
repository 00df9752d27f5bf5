"""Layers whose weights answer to hyperparameters: a compact model of how the best weights move as the hyperparameters move.

    W(h) = W_elem + diag(V h) W_hyper          b(h) = b_elem + (C h) * b_hyper

computed on the outputs, so that every example of a batch may have hyperparameters `h_i` of its own:

    y_i = W_elem x_i + b_elem + (V h_i) * (W_hyper x_i) + (C h_i) * b_hyper

`W_elem` and `W_hyper` lie in one matrix, as do `V` and `C`, so a layer is two products instead of four. Where all gates are shut
(`h = 0`) only `W_elem` is used: the plain layer, at the plain layer's price.

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), TunedDropout(rate), nn.Linear(256, 10))
    inputs = make_best_response(model, n_hyper=1)

Source: arXiv:1903.03088, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import InputError
from poise.response_input import ResponseInput

__all__ = ["BestResponse", "BestResponseConv2d", "BestResponseEmbedding", "BestResponseLinear"]

_Plain = TypeVar("_Plain", nn.Linear, nn.Conv2d, nn.Embedding)
GATE_STD = 0.01
"""Standard deviation of `V` and `C` at first: nearly shut, and open enough to learn."""


class BestResponse(nn.Module):
    """What gated layers share: the inputs of the gates, and which rows of each parameter answer.

    Args:
        n_hyper: number of hyperparameters.
        inputs: where the gates read them; layers of one model share one. None makes one.
        batch_axis: the axis of examples in the layer's input.
    """

    def __init__(self, n_hyper: int, inputs: ResponseInput | None, batch_axis: int) -> None:
        super().__init__()
        if inputs is not None and inputs.n_hyper != n_hyper:
            raise InputError(f"{type(self).__name__}: n_hyper is {n_hyper}, and inputs has {inputs.n_hyper}.")
        self.n_hyper, self.batch_axis = n_hyper, batch_axis
        self.inputs = ResponseInput(n_hyper) if inputs is None else inputs

    def _read(self, x: Tensor, h: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the inputs of the gates, shaped against `x`, or None where they are shut."""
        if h is None:
            return self.inputs.read(x, self.batch_axis, dtype)
        explicit = ResponseInput(self.n_hyper)
        explicit.place(h)
        return explicit.read(x, self.batch_axis, dtype)

    def answering(self) -> dict[str, Tensor]:
        """Return by parameter name which entries answer to hyperparameters, bool tensors that broadcast.

        `W_hyper`, `V`, `C` and `b_hyper` do; the others, `W_elem` and `b_elem`, are the weights at `h = 0`.
        """
        raise NotImplementedError

    def plain(self, h: Tensor | None = None) -> nn.Module:
        """Return the plain layer at one `h` [n] (that of the inputs otherwise), detached from this one."""
        raise NotImplementedError

    def effective(self, h: Tensor | None = None) -> Any:
        """Return the weights and the bias at one `h` [n] (that of the inputs otherwise), with their graph."""
        raise NotImplementedError

    def acting(self) -> tuple[Tensor, ...]:
        """Return the matrices or filters that act now, at the first row of the inputs, with their graph."""
        return (self.effective()[0],)

    def _gate_rows(self, h: Tensor | None, response: Tensor) -> Tensor:
        """V h and C h at one h, stacked."""
        return response @ (self.inputs.one() if h is None else h).to(response)


class BestResponseLinear(BestResponse):
    """A linear layer whose weights answer to hyperparameters.

    Args:
        in_features, out_features: sizes.
        n_hyper: number of hyperparameters.
        bias: with `b_elem` and `b_hyper`.
        inputs: where the gates read the hyperparameters; None makes one of its own, `layer.inputs`.
        batch_axis: the axis of examples in x, for inputs of shape [time, batch, features] for instance.

    Trained: `weight` [2 out, in], `W_elem` above `W_hyper`; `gate` [2 out, n] (`V` above `C`; without bias [out, n]); `bias` [out] and
        `bias_hyper` [out].

    Example:
        >>> layer = BestResponseLinear(4, 3, n_hyper=2)
        >>> layer(torch.ones(5, 4), h=torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    bias: nn.Parameter | None
    bias_hyper: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_hyper: int,
        bias: bool = True,
        inputs: ResponseInput | None = None,
        batch_axis: int = 0,
    ) -> None:
        super().__init__(n_hyper, inputs, batch_axis)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(_uniform((2 * out_features, in_features), in_features))
        self.gate = nn.Parameter(GATE_STD * torch.randn((2 if bias else 1) * out_features, n_hyper))
        self.bias = nn.Parameter(_uniform((out_features,), in_features)) if bias else None
        self.bias_hyper = nn.Parameter(_uniform((out_features,), in_features)) if bias else None

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Return y [..., out] of x [..., in], at the hyperparameters of the step, or at `h` [batch, n] where they are given."""
        rows = self._read(x, h)
        if rows is None:
            return functional.linear(x, self.weight[: self.out_features], self.bias)
        elementary, answer = functional.linear(x, self.weight).chunk(2, -1)
        gates = functional.linear(rows, self.gate)
        if self.bias is None or self.bias_hyper is None:
            return torch.addcmul(elementary, gates, answer)
        of_weight, of_bias = gates.chunk(2, -1)
        # The sum of the biases first: it has the size of the gates, which may lack the axes of x beside the examples.
        return torch.addcmul(torch.addcmul(self.bias, of_bias, self.bias_hyper) + elementary, of_weight, answer)

    def answering(self) -> dict[str, Tensor]:
        return _answering(self, self.out_features)

    def effective(self, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return W(h) [out, in] and b(h) [out] at one h [n], with their graph."""
        return _effective(self, h, self.weight[: self.out_features], self.weight[self.out_features :])

    def plain(self, h: Tensor | None = None) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        return _filled(layer, self.effective(h), self.weight)

    @classmethod
    def of(cls, layer: nn.Linear, n_hyper: int, inputs: ResponseInput | None = None, batch_axis: int = 0) -> Any:
        """Return the gated form of a plain layer, whose weights become `W_elem` and `b_elem`."""
        made = cls(layer.in_features, layer.out_features, n_hyper, layer.bias is not None, inputs, batch_axis)
        made.to(layer.weight)
        with torch.no_grad():
            made.weight[: layer.out_features] = layer.weight
            if made.bias is not None:
                made.bias.copy_(layer.bias)
        return made

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n_hyper={self.n_hyper}, bias={self.bias is not None}"


class BestResponseConv2d(BestResponse):
    """A convolution whose filters answer to hyperparameters: the gates multiply output channels.

    Args:
        in_channels, out_channels, kernel_size: as `nn.Conv2d`.
        n_hyper: number of hyperparameters.
        inputs, batch_axis: as `BestResponseLinear`; the axis of examples must be 0.
        **options: the others of `nn.Conv2d`: stride, padding, dilation, groups, bias, padding_mode.

    Trained: `weight` [2 out, in/groups, k, k], in each group its filters of `W_elem` before those of `W_hyper`; `gate`, `bias`,
        `bias_hyper` as in `BestResponseLinear`.

    Example:
        >>> BestResponseConv2d(1, 4, 3, n_hyper=2)(torch.ones(5, 1, 8, 8), h=torch.ones(5, 2)).shape
        torch.Size([5, 4, 6, 6])
    """

    bias: nn.Parameter | None
    bias_hyper: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        n_hyper: int,
        inputs: ResponseInput | None = None,
        **options: Any,
    ) -> None:
        super().__init__(n_hyper, inputs, 0)
        # The plain layer checks the arguments and knows how to pad; its own weights are replaced.
        made = nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, made.groups
        self._arguments = (in_channels, out_channels, kernel_size)
        self._options = {**options}
        fan_in, shape, bias = made.weight[0].numel(), made.weight.shape[1:], made.bias is not None
        self._convolve: Callable[..., Tensor] = _Convolution(made)
        self.weight = nn.Parameter(_uniform((2 * out_channels, *shape), fan_in))
        self.gate = nn.Parameter(GATE_STD * torch.randn((2 if bias else 1) * out_channels, n_hyper))
        self.bias = nn.Parameter(_uniform((out_channels,), fan_in)) if bias else None
        self.bias_hyper = nn.Parameter(_uniform((out_channels,), fan_in)) if bias else None

    def _grouped(self, weight: Tensor) -> Tensor:
        """The stacked filters as [groups, 2, out/groups, in/groups, k, k]."""
        return weight.view(self.groups, 2, self.out_channels // self.groups, *weight.shape[1:])

    def _halves(self) -> tuple[Tensor, Tensor]:
        """W_elem and W_hyper, [out, in/groups, k, k] each."""
        grouped = self._grouped(self.weight)
        return grouped[:, 0].flatten(0, 1), grouped[:, 1].flatten(0, 1)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Return y [batch, out, ...] of x [batch, in, ...], at the hyperparameters of the step, or at `h` [batch, n]."""
        rows = self._read(x, h)
        if rows is None:
            return self._convolve(x, self._halves()[0], self.bias)
        both = self._convolve(x, self.weight, None)
        if self.groups == 1:
            elementary, answer = both.chunk(2, 1)
        else:
            grouped = both.view(len(both), self.groups, 2, -1, *both.shape[2:])
            elementary, answer = grouped[:, :, 0].flatten(1, 2), grouped[:, :, 1].flatten(1, 2)
        gates = functional.linear(rows.flatten(0, -2), self.gate)[:, :, None, None]
        if self.bias is None or self.bias_hyper is None:
            return torch.addcmul(elementary, gates, answer)
        of_weight, of_bias = gates.chunk(2, 1)
        biases = torch.addcmul(self.bias[:, None, None], of_bias, self.bias_hyper[:, None, None])
        return torch.addcmul(elementary + biases, of_weight, answer)

    def answering(self) -> dict[str, Tensor]:
        rows = _answering(self, self.out_channels)
        per_group = torch.tensor([False, True]).repeat_interleave(self.out_channels // self.groups)
        return {**rows, "weight": per_group.repeat(self.groups).view(-1, 1, 1, 1).to(self.weight.device)}

    def effective(self, h: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return W(h) [out, in/groups, k, k] and b(h) [out] at one h [n], with their graph."""
        return _effective(self, h, *self._halves())

    def plain(self, h: Tensor | None = None) -> nn.Conv2d:
        return _filled(nn.Conv2d(*self._arguments, **self._options), self.effective(h), self.weight)

    @classmethod
    def of(cls, layer: nn.Conv2d, n_hyper: int, inputs: ResponseInput | None = None) -> Any:
        """Return the gated form of a plain layer, whose filters become `W_elem`."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(layer, name) for name in names}
        kernel: Any = layer.kernel_size
        made = cls(
            layer.in_channels, layer.out_channels, kernel, n_hyper, inputs, bias=layer.bias is not None, **options
        )
        made.to(layer.weight)
        with torch.no_grad():
            made._grouped(made.weight)[:, 0] = layer.weight.view(made.groups, -1, *layer.weight.shape[1:])
            if made.bias is not None and layer.bias is not None:
                made.bias.copy_(layer.bias)
        return made

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self._options.items())
        return f"{', '.join(map(str, self._arguments))}, n_hyper={self.n_hyper}{options}"


class _Convolution:
    """How a plain convolution pads and convolves, without its weights."""

    def __init__(self, layer: nn.Conv2d) -> None:
        layer.weight, layer.bias = None, None  # type: ignore[assignment]
        self.layer = layer

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.layer._conv_forward(x, weight, bias)
        return y


class BestResponseEmbedding(BestResponse):
    """An embedding whose rows answer to hyperparameters: `e_i = E_elem[t_i] + (V h_i) * E_hyper[t_i]`.

    Args:
        num_embeddings, embedding_dim, padding_idx: as `nn.Embedding`.
        n_hyper: number of hyperparameters.
        inputs, batch_axis: as `BestResponseLinear`.

    Parameters: `weight` [num, 2 dim], `E_elem` beside `E_hyper`; `gate` [dim, n].

    Example:
        >>> BestResponseEmbedding(10, 4, n_hyper=2)(torch.zeros(5, 3, dtype=torch.int64), h=torch.ones(5, 2)).shape
        torch.Size([5, 3, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        n_hyper: int,
        padding_idx: int | None = None,
        inputs: ResponseInput | None = None,
        batch_axis: int = 0,
    ) -> None:
        super().__init__(n_hyper, inputs, batch_axis)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.weight = nn.Parameter(torch.empty(num_embeddings, 2 * embedding_dim).uniform_(-0.1, 0.1))
        self.gate = nn.Parameter(GATE_STD * torch.randn(embedding_dim, n_hyper))
        if padding_idx is not None:
            with torch.no_grad():
                self.weight[padding_idx] = 0

    def forward(self, tokens: Tensor, h: Tensor | None = None) -> Tensor:
        """Return e [..., dim] of tokens int64 [...], at the hyperparameters of the step, or at `h` [batch, n]."""
        rows = self._read(tokens[..., None], h, self.weight.dtype)
        if rows is None:
            return functional.embedding(tokens, self.weight[:, : self.embedding_dim], self.padding_idx)
        elementary, answer = functional.embedding(tokens, self.weight, self.padding_idx).chunk(2, -1)
        return torch.addcmul(elementary, functional.linear(rows, self.gate), answer)

    def answering(self) -> dict[str, Tensor]:
        columns = (torch.arange(2 * self.embedding_dim, device=self.weight.device) >= self.embedding_dim)[None]
        return {"weight": columns, "gate": torch.ones(1, 1, dtype=torch.bool, device=self.weight.device)}

    def effective(self, h: Tensor | None = None) -> tuple[Tensor, None]:
        """Return E(h) [num, dim] at one h [n], with its graph, and None for the bias."""
        elementary, answer = self.weight.chunk(2, -1)
        return elementary + answer * self._gate_rows(h, self.gate), None

    def plain(self, h: Tensor | None = None) -> nn.Embedding:
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        return _filled(layer, self.effective(h), self.weight)

    @classmethod
    def of(cls, layer: nn.Embedding, n_hyper: int, inputs: ResponseInput | None = None, batch_axis: int = 0) -> Any:
        """Return the gated form of a plain layer, whose table becomes `E_elem`.

        Raises:
            InputError: the layer rescales or counts its rows, or has sparse gradients.
        """
        if layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse:
            raise InputError(
                "BestResponseEmbedding: max_norm, scale_grad_by_freq and sparse are not supported; leave the layer out."
            )
        made = cls(layer.num_embeddings, layer.embedding_dim, n_hyper, layer.padding_idx, inputs, batch_axis)
        made.to(layer.weight)
        with torch.no_grad():
            made.weight[:, : layer.embedding_dim] = layer.weight
        return made

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, n_hyper={self.n_hyper}"


def _uniform(shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Weights as plain layers begin with: uniform within 1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return torch.empty(shape).uniform_(-bound, bound)


def _answering(layer: BestResponseLinear | BestResponseConv2d, out: int) -> dict[str, Tensor]:
    device = layer.weight.device
    rows = torch.arange(2 * out, device=device) >= out
    every = torch.ones(1, dtype=torch.bool, device=device)
    named = {"weight": rows.view(-1, *[1] * (layer.weight.ndim - 1)), "gate": every[None]}
    return named if layer.bias is None else {**named, "bias": ~every, "bias_hyper": every}


def _effective(
    layer: BestResponseLinear | BestResponseConv2d, h: Tensor | None, elementary: Tensor, answer: Tensor
) -> tuple[Tensor, Tensor | None]:
    gates = layer._gate_rows(h, layer.gate)
    out = len(elementary)
    weight = elementary + answer * gates[:out].view(-1, *[1] * (answer.ndim - 1))
    if layer.bias is None or layer.bias_hyper is None:
        return weight, None
    return weight, layer.bias + gates[out:] * layer.bias_hyper


def _filled(layer: _Plain, values: tuple[Tensor, Tensor | None], like: Tensor) -> _Plain:
    """Put weights and bias into a plain layer, in the dtype and on the device of the gated one."""
    layer.to(like)
    with torch.no_grad():
        for name, value in zip(("weight", "bias"), values, strict=True):
            if value is not None:
                getattr(layer, name).copy_(value)
    return layer
