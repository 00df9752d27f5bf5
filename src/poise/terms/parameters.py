"""Penalties on the model's parameters: 0-dim, sums over weights.

Only weights with two axes or more are charged (`biases=True` charges all), as an intercept is not to be shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from poise.objective import Term


def _charged(parameters: Mapping[str, Tensor], biases: bool) -> list[Tensor]:
    return [p for p in parameters.values() if p.is_floating_point() and (biases or p.ndim > 1)]


class _Penalty(Term):
    capabilities = frozenset({"potential", "deterministic"})

    def __init__(self, biases: bool = False) -> None:
        super().__init__()
        self.biases = biases


class L2(_Penalty):
    """Half the squared norm of the weights: `1/2 sum w^2`. Its gradient is `w`.

    Decoupled weight decay is the solver's `weight_decay`, another thing.

    Args:
        biases: charge vectors (biases, normalisation scales) too.
    """

    formula = "l2"
    equation = "1/2 sum w^2"

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        charged = _charged(parameters, self.biases)
        if not charged:
            return torch.zeros(())
        return 0.5 * torch.stack([p.square().sum() for p in charged]).sum()


class L1(_Penalty):
    """The sum of absolute weights: `sum |w|`.

    Args:
        biases: charge vectors (biases, normalisation scales) too.
    """

    formula = "l1"
    equation = "sum |w|"

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        charged = _charged(parameters, self.biases)
        if not charged:
            return torch.zeros(())
        return torch.stack([p.abs().sum() for p in charged]).sum()
