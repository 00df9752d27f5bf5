"""Penalties that a tuned strength stands before: of the weights that a gated network has at present, and of activations.

    objective = CrossEntropy() + decay * ResponseL2() + ar * ActivationL2() + tar * TemporalActivationL2()

with `decay`, `ar` and `tar` each a `poise.weights.Hyperparameter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import QuantityError
from poise.objective import Term
from poise.parts.best_response import BestResponse
from poise.quantities import describe

__all__ = ["ActivationL2", "ResponseL2", "TemporalActivationL2"]


class ResponseL2(Term):
    """Half the squared norm of the weights that a network has at the hyperparameters of the step: `1/2 sum W(h)^2`.

    On gated layers (`poise.parts.make_best_response`) `l2` would charge the parts W_elem, W_hyper and the gates; this charges
    `W_elem + diag(V h) W_hyper`, the weights that act, at the first example's h (it is the same for all examples where the strength is
    shared, as it must be). On plain layers it is `l2`: matrices and filters, no biases.

    Returns: 0-dim.

    Example:
        >>> ResponseL2()(nn.Linear(2, 2, bias=False).requires_grad_(False)).shape
        torch.Size([])

    Source: arXiv:1903.03088, section 4 (hyperparameters that act on shared objects).
    """

    formula = "response_l2"
    equation = "1/2 sum W(h)^2"
    source = "arXiv:1903.03088, section 4"
    capabilities = frozenset({"potential", "deterministic"})

    def forward(self, model: Callable[..., Any]) -> Tensor:
        run = getattr(model, "run", None)
        total: Tensor = _half_squares(model) if run is None else run(_half_squares)
        return total


def _half_squares(model: Any) -> Tensor:
    squares = [w.square().sum() for w in _weights(model)]
    return 0.5 * torch.stack(squares).sum() if squares else torch.zeros(())


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Give the matrices and filters that act."""
    gated = [m for m in model.modules() if isinstance(m, BestResponse)]
    inside = {id(p) for layer in gated for p in layer.parameters()}
    for layer in gated:
        yield from layer.acting()
    for p in model.parameters():
        if p.ndim > 1 and id(p) not in inside and p.is_floating_point():
            yield p


class ActivationL2(Term):
    """Half the mean square of each example's activations: `1/2 mean f_i^2`, over all axes but that of examples.

    Reads: `features` float [batch, ...].
    Returns: float [batch].

    Example:
        >>> ActivationL2()(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
        tensor([2.5000, 1.0000])

    Source: arXiv:1708.02182, section 4.2 (there without the half).
    """

    formula = "activation_l2"
    equation = "1/2 mean f^2"
    source = "arXiv:1708.02182"

    def forward(self, features: Tensor) -> Tensor:
        return 0.5 * features.square().flatten(1).mean(1)


class TemporalActivationL2(Term):
    """Half the mean square of the steps of each example's activations over time: `1/2 mean (f_t - f_{t+1})^2`.

    Reads: `features` float [batch, time, ...], two steps at least.
    Returns: float [batch].

    Example:
        >>> TemporalActivationL2()(torch.tensor([[[1.0], [3.0], [3.0]]]))
        tensor([1.])

    Source: arXiv:1708.02182, section 4.3 (there without the half).
    """

    formula = "temporal_activation_l2"
    equation = "1/2 mean (f_t - f_{t+1})^2"
    source = "arXiv:1708.02182"

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim < 3 or features.shape[1] < 2:
            raise QuantityError(
                f"temporal_activation_l2 reads 'features' as float [batch, time, ...] with two steps at least, and it was offered "
                f"{describe(features)}."
            )
        return 0.5 * features.diff(dim=1).square().flatten(1).mean(1)
