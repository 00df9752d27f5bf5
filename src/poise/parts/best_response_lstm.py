"""An LSTM whose weights answer to hyperparameters: gates on the outputs of all four blocks, input and recurrent.

    a_t = W(h) x_t + U(h) s_{t-1} + b(h),     W(h) x = W_elem x + (V h) * (W_hyper x), and so for U and b

Source: arXiv:1903.03088, section 3 and appendix on the LSTM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.errors import InputError
from poise.parts.best_response import GATE_STD, BestResponse, _uniform
from poise.quantities import describe
from poise.response_input import ResponseInput

__all__ = ["BestResponseLSTM"]

State = tuple[Tensor, Tensor]


class BestResponseLSTM(BestResponse):
    """An LSTM in the place of `nn.LSTM` (one direction, no projection), whose weights answer to hyperparameters.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout: as `nn.LSTM`.
        n_hyper: number of hyperparameters.
        inputs: where the gates read the hyperparameters; None makes one of its own.

    Parameters, for each layer k: `weight_ih_lk` [8 hidden, in] and `weight_hh_lk` [8 hidden, hidden], elementary above answering, blocks in
        PyTorch's order (input, forget, cell, output); `gate_lk` [12 hidden, n] for input products, recurrent products and bias (8
        without bias); `bias_lk` and `bias_hyper_lk` [4 hidden].

    Example:
        >>> output, (s, c) = BestResponseLSTM(3, 4, n_hyper=2, batch_first=True)(torch.ones(5, 7, 3), h=torch.ones(5, 2))
        >>> output.shape, s.shape
        (torch.Size([5, 7, 4]), torch.Size([1, 5, 4]))
    """

    weight_ih_l0: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_hyper: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        inputs: ResponseInput | None = None,
    ) -> None:
        super().__init__(n_hyper, inputs, 0 if batch_first else 1)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        width = 4 * hidden_size
        for k in range(num_layers):
            entering = input_size if k == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{k}", nn.Parameter(_uniform((2 * width, entering), hidden_size)))
            self.register_parameter(f"weight_hh_l{k}", nn.Parameter(_uniform((2 * width, hidden_size), hidden_size)))
            gates = GATE_STD * torch.randn((3 if bias else 2) * width, n_hyper)
            self.register_parameter(f"gate_l{k}", nn.Parameter(gates))
            if bias:
                self.register_parameter(f"bias_l{k}", nn.Parameter(_uniform((width,), hidden_size)))
                self.register_parameter(f"bias_hyper_l{k}", nn.Parameter(_uniform((width,), hidden_size)))

    def forward(self, x: Tensor, state: State | None = None, h: Tensor | None = None) -> tuple[Tensor, State]:
        """Return the outputs [time, batch, hidden] (or batch first) and the last state ([layers, batch, hidden] twice).

        Args:
            x: float [time, batch, in], or [batch, time, in] with `batch_first`.
            state: the first hidden and cell state; zeros otherwise.
            h: float [batch, n], in place of the hyperparameters of the step.

        Raises:
            InputError: x has not three axes.
        """
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise InputError(f"BestResponseLSTM reads float [time, batch, in], and it was given {describe(x)}.")
        rows = self._read(x, h)
        rows = None if rows is None else rows.flatten(0, 1)  # [batch or 1, n]
        steps = x.transpose(0, 1) if self.batch_first else x
        batch = steps.shape[1]
        if state is None:
            zeros = x.new_zeros(self.num_layers, batch, self.hidden_size)
            state = zeros, zeros
        hidden, cells = [], []
        for k in range(self.num_layers):
            if k and self.dropout:
                steps = functional.dropout(steps, self.dropout, self.training)
            steps, s, c = self._layer(k, steps, state[0][k], state[1][k], rows)
            hidden.append(s)
            cells.append(c)
        output = steps.transpose(0, 1) if self.batch_first else steps
        return output, (torch.stack(hidden), torch.stack(cells))

    def _layer(self, k: int, steps: Tensor, s: Tensor, c: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer over time: [time, batch, in] -> [time, batch, hidden], and its last state."""
        width = 4 * self.hidden_size
        # Read once, so that a mask on the weights is the same at every time step.
        entering, recurrent = getattr(self, f"weight_ih_l{k}"), getattr(self, f"weight_hh_l{k}")
        bias = getattr(self, f"bias_l{k}") if self.bias else None
        if rows is None:
            drive, recurrent, gate = functional.linear(steps, entering[:width], bias), recurrent[:width], None
        else:
            gates = functional.linear(rows, getattr(self, f"gate_l{k}")).chunk(3 if self.bias else 2, -1)
            elementary, answer = functional.linear(steps, entering).chunk(2, -1)
            drive, gate = torch.addcmul(elementary, gates[0], answer), gates[1]
            if bias is not None:
                drive = drive + torch.addcmul(bias, gates[2], getattr(self, f"bias_hyper_l{k}"))
        outputs = []
        for driven in drive.unbind(0):
            product = functional.linear(s, recurrent)
            if gate is not None:
                elementary, answer = product.chunk(2, -1)
                product = torch.addcmul(elementary, gate, answer)
            i, f, g, o = (driven + product).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            s = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(s)
        return torch.stack(outputs), s, c

    def answering(self) -> dict[str, Tensor]:
        device = self.weight_ih_l0.device
        rows = (torch.arange(8 * self.hidden_size, device=device) >= 4 * self.hidden_size)[:, None]
        every = torch.ones(1, dtype=torch.bool, device=device)
        named: dict[str, Tensor] = {}
        for k in range(self.num_layers):
            named |= {f"weight_ih_l{k}": rows, f"weight_hh_l{k}": rows, f"gate_l{k}": every[None]}
            if self.bias:
                named |= {f"bias_l{k}": ~every, f"bias_hyper_l{k}": every}
        return named

    def effective(self, h: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return W(h), U(h) and b(h) of each layer at one h [n], with their graph."""
        found = []
        for k in range(self.num_layers):
            gates = self._gate_rows(h, getattr(self, f"gate_l{k}")).chunk(3 if self.bias else 2)
            pair = []
            for name, gate in zip((f"weight_ih_l{k}", f"weight_hh_l{k}"), gates, strict=False):
                elementary, answer = getattr(self, name).chunk(2, 0)
                pair.append(elementary + gate[:, None] * answer)
            bias = getattr(self, f"bias_l{k}") + gates[2] * getattr(self, f"bias_hyper_l{k}") if self.bias else None
            found.append((pair[0], pair[1], bias))
        return found

    def acting(self) -> tuple[Tensor, ...]:
        return tuple(weight for layer in self.effective() for weight in layer[:2])

    def plain(self, h: Tensor | None = None) -> nn.LSTM:
        layer = nn.LSTM(
            self.input_size, self.hidden_size, self.num_layers, self.bias, self.batch_first, self.dropout
        ).to(self.weight_ih_l0)
        with torch.no_grad():
            for k, (entering, recurrent, bias) in enumerate(self.effective(h)):
                getattr(layer, f"weight_ih_l{k}").copy_(entering)
                getattr(layer, f"weight_hh_l{k}").copy_(recurrent)
                if bias is not None:
                    getattr(layer, f"bias_ih_l{k}").copy_(bias)
                    getattr(layer, f"bias_hh_l{k}").zero_()
        return layer

    @classmethod
    def of(cls, layer: nn.LSTM, n_hyper: int, inputs: ResponseInput | None = None) -> Any:
        """Return the gated form of a plain LSTM, whose weights become the elementary ones.

        Raises:
            InputError: it runs in two directions or projects its state.
        """
        if layer.bidirectional or layer.proj_size:
            raise InputError("BestResponseLSTM: two directions and projections are not supported; leave the layer out.")
        made = cls(
            layer.input_size, layer.hidden_size, n_hyper, layer.num_layers, layer.bias, layer.batch_first, layer.dropout, inputs
        )  # fmt: skip
        first: Any = layer.weight_ih_l0
        made.to(first)
        width = 4 * layer.hidden_size
        with torch.no_grad():
            for k in range(layer.num_layers):
                for name in (f"weight_ih_l{k}", f"weight_hh_l{k}"):
                    getattr(made, name)[:width] = getattr(layer, name)
                if layer.bias:
                    getattr(made, f"bias_l{k}").copy_(getattr(layer, f"bias_ih_l{k}") + getattr(layer, f"bias_hh_l{k}"))
        return made

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, n_hyper={self.n_hyper}, num_layers={self.num_layers}"
