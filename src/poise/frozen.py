"""A model that answers and does not learn: teacher, reference, snapshot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FrozenModel:
    """A frozen copy of a model: in evaluation mode, without gradients, outside every state and optimiser.

    It is deliberately no `nn.Module`, so that a term or a readout may hold one without its weights becoming parameters
    of the objective.

    Args:
        model: the module to copy.
        copy_weights: False keeps the module itself instead of a copy; it is put into evaluation mode.
        train_mode: True keeps dropout and batch statistics active in the copy (ELR+ asks for that).

    >>> teacher = FrozenModel(nn.Linear(2, 3))
    >>> teacher(torch.ones(1, 2)).requires_grad
    False
    """

    def __init__(self, model: nn.Module, *, copy_weights: bool = True, train_mode: bool = False) -> None:
        self.module = copy.deepcopy(model) if copy_weights else model
        self.train_mode = train_mode
        self.module.train(train_mode)
        self.module.requires_grad_(False)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        with torch.no_grad():
            return self.module(*inputs, **keywords)

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(module, *inputs)`, without gradient."""
        with torch.no_grad():
            return function(self.module, *inputs)

    def refresh(self, model: nn.Module) -> None:
        """Take over the weights and buffers of `model`."""
        self.module.load_state_dict(model.state_dict())

    def to(self, device: torch.device | str) -> FrozenModel:
        """Move to a device."""
        self.module.to(device)
        return self

    def outputs(
        self, inputs: Tensor, *, batch_size: int = 1024, of: Callable[[Any], Tensor] = lambda out: out
    ) -> Tensor:
        """Return the outputs for all rows of `inputs`, computed in batches: what a fixed teacher says once and for all.

        Args:
            inputs: `[examples, ...]`.
            of: picks the tensor out of what the model returns.
        """
        return torch.cat([of(self(inputs[i : i + batch_size])) for i in range(0, len(inputs), batch_size)])

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and buffers."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take saved weights and buffers back."""
        self.module.load_state_dict(state)
