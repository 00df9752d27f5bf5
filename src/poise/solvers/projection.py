"""Projections after a step: weights that left a set are put back on its edge.

These are the hard counterparts of companding: the optimiser moves freely, and what went too far is cut. Both keep the parameters'
identity and the optimiser's moments.
"""

from __future__ import annotations

import fnmatch
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from poise.errors import InputError

__all__ = ["ClampWeights", "MaxNorm", "ProjectModules"]


class ProjectModules:
    """Call `project_()` of every module of a model that has one: the module knows the set, the solver knows when.

    The solvers of `torch.optim` do it by themselves after each step. In a loop of your own, follow the optimiser.

    Args:
        model: whose modules are looked through; a module whose parent projects it already is left to the parent.

    Example:
        >>> from poise.parts import ICNN
        >>> net = ICNN(2, hidden=3)
        >>> with torch.no_grad():
        ...     _ = net.positive[0].fill_(-1.0)
        >>> ProjectModules(net)(); float(net.positive[0].detach().min())
        0.0
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.modules: list[Any] = []
        covered: set[nn.Module] = set()
        for module in () if model is None else model.modules():
            if module not in covered and callable(getattr(module, "project_", None)):
                self.modules.append(module)
                covered.update(module.modules())

    @torch.no_grad()
    def __call__(self) -> None:
        """Project now."""
        for module in self.modules:
            module.project_()

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        """Project after each step of this optimiser; `remove()` on the result stops it."""

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self()

        return optimizer.register_step_post_hook(after)


class _Projection:
    def __init__(self, model: nn.Module, limit: float, include: str = "*") -> None:
        name = type(self).__name__
        if not (math.isfinite(limit) and limit > 0):
            raise InputError(f"{name}: limit must be finite and above 0, but it is {limit}.")
        self.limit, self.include = limit, include
        self.parameters: list[Tensor] = []
        for module in model.modules():
            # What a parametrization starts from is not the weight: cutting it would not bound the weight.
            if isinstance(module, parametrize.ParametrizationList):
                raise InputError(
                    f"{name}: {model.__class__.__name__} has parametrized weights; project plain ones, or fold the model first."
                )
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and fnmatch.fnmatchcase(parameter_name, include):
                self.parameters.append(parameter)
        if not self.parameters:
            raise InputError(f"{name}: no weight of two dimensions or more matches include={include!r}.")

    def project(self, weight: Tensor) -> None:
        """Put one weight back into the set, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self) -> None:
        """Project every weight now."""
        for weight in self.parameters:
            self.project(weight)

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        """Project after each step of this optimiser; `remove()` on the result stops it."""

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self()

        return optimizer.register_step_post_hook(after)


class MaxNorm(_Projection):
    """Bound the norm of every output unit's incoming weights: `w_i <- w_i * min(1, limit/|w_i|)`.

    Args:
        model: its parameters of two dimensions or more are bounded; row `i` of dimension 0 is one unit.
        limit: largest Euclidean norm, above 0; 3 or 4 are customary with dropout.
        include: name pattern.

    Raises:
        InputError: `limit` is not positive, nothing matches, or weights are parametrized.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> MaxNorm(layer, 0.1)(); bool((layer.weight.norm(dim=1) < 0.1001).all())
        True

    Source:
        Srivastava et al., "Dropout", JMLR 15 (2014), section 5.1.
    """

    def project(self, weight: Tensor) -> None:
        weight.copy_(torch.renorm(weight, p=2, dim=0, maxnorm=self.limit))


class ClampWeights(_Projection):
    """Bound every weight: `w <- min(limit, max(-limit, w))`, the hard form of companding's bound.

    Args:
        model: its parameters of two dimensions or more are bounded.
        limit: largest absolute weight, above 0.
        include: name pattern.

    Raises:
        InputError: `limit` is not positive, nothing matches, or weights are parametrized.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> ClampWeights(layer, 0.125)(); bool((layer.weight.abs() <= 0.125).all())
        True
    """

    def project(self, weight: Tensor) -> None:
        weight.clamp_(-self.limit, self.limit)
