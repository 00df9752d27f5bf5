"""What gated layers are told about the hyperparameters: one module that a policy writes and the layers of a model read.

The layers and the policy live in rooms that do not know each other; this is where they meet. Between steps the layers see `point`, which
is saved with the model, so a trained model evaluates at the hyperparameters where it stands without any policy. During a step a policy
may `place` a row for each example, with a graph where it wants a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError
from poise.quantities import describe

__all__ = ["ResponseInput", "response_input_of"]


class ResponseInput(nn.Module):
    """The inputs of gates, n numbers for each example.

    Args:
        n_hyper: how many hyperparameters, at least 1.

    Buffers: `point`, float64 [n], what the gates see where nothing is placed.

    >>> inputs = ResponseInput(2)
    >>> inputs.read(torch.zeros(3, 5)) is None                      # a point of zeros: the gates are shut
    True
    >>> inputs.settle(torch.tensor([0.5, 0.0])); inputs.read(torch.zeros(3, 5))
    tensor([[0.5000, 0.0000]])
    """

    point: Tensor

    def __init__(self, n_hyper: int) -> None:
        super().__init__()
        if n_hyper < 1:
            raise InputError(f"ResponseInput: n_hyper must be at least 1, and it is {n_hyper}.")
        self.n_hyper = n_hyper
        self.register_buffer("point", torch.zeros(n_hyper, dtype=torch.float64))
        self._placed: Tensor | None = None
        self._shut: bool | None = True

    @torch.no_grad()
    def settle(self, point: Tensor) -> None:
        """Say what the gates see from now on, [n]."""
        self.point.copy_(point)
        self._shut = None

    def place(self, rows: Tensor | None) -> None:
        """Say what the gates see until the next call: [batch, n], or [n] for all examples, or None for `point`.

        Raises:
            InputError: another number of hyperparameters.
        """
        if rows is not None and (rows.ndim not in (1, 2) or rows.shape[-1] != self.n_hyper):
            raise InputError(
                f"The gates of this model have {self.n_hyper} inputs, and they were given {describe(rows)}. Give as many "
                "hyperparameters as make_best_response(model, n_hyper) was told."
            )
        self._placed = rows

    def read(self, like: Tensor, axis: int = 0, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return the rows shaped to broadcast against a layer's input, [..., n], or None where all gates are shut.

        Args:
            like: the layer's input, with examples along `axis` and features last.
            axis: the axis of examples.
            dtype: of the result; that of `like` otherwise.

        Raises:
            InputError: other examples than those for which rows were placed.
        """
        rows = self._placed
        if rows is None:
            if self._shut is None:
                self._shut = not bool(self.point.any())
            if self._shut:
                return None
            rows = self.point
        rows = rows.to(like.device, dtype or like.dtype)
        if rows.ndim == 1:
            rows = rows[None]
        if len(rows) != 1 and len(rows) != like.shape[axis]:
            raise InputError(
                f"The gates have rows for {len(rows)} examples, and a layer was given {describe(like)} with examples along axis "
                f"{axis}. Say batch_axis=... of the layer, or leave it out of make_best_response where it mixes examples with time."
            )
        shape = [1] * (like.ndim - 1) + [self.n_hyper]
        shape[axis] = len(rows)
        return rows.view(shape)

    def one(self) -> Tensor:
        """Return one row [n] for what examples share: the first that is placed, or `point`."""
        if self._placed is None:
            return self.point
        return self._placed if self._placed.ndim == 1 else self._placed[0]

    def __getstate__(self) -> dict[str, Any]:
        # What is placed belongs to the running step, and may hang on a graph.
        return {**self.__dict__, "_placed": None}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._shut = None

    def _apply(self, fn: Any, recurse: bool = True) -> ResponseInput:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.point = self.point.double()
        return self

    def extra_repr(self) -> str:
        return f"n_hyper={self.n_hyper}"


def response_input_of(model: nn.Module) -> ResponseInput:
    """Return the inputs of a model's gates.

    Raises:
        IncompatibleError: the model has no gated layer, or layers with inputs of their own.
    """
    found = {id(m): m for m in model.modules() if isinstance(m, ResponseInput)}
    if not found:
        raise IncompatibleError(
            "The model has no gated layer, so its weights do not answer to hyperparameters and the hypergradient is identically zero. "
            "Put gates in with poise.parts.make_best_response(model, n_hyper)."
        )
    if len(found) > 1:
        raise IncompatibleError(
            f"The gated layers of the model have {len(found)} inputs of their own, and a policy writes one. Build them with "
            "make_best_response(model, n_hyper), or hand all of them the same inputs=ResponseInput(n_hyper)."
        )
    return next(iter(found.values()))
