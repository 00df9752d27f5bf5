"""Projections after a step: weights that left a set are put back on it.

`MaxNorm` and `ClampWeights` are the hard counterparts of companding: the optimiser moves freely, and what went too far is cut. `UnitNorm`
keeps rows on the sphere. All keep the parameters' identity and the optimiser's moments.

A module may ask for it by itself, with an attribute

    parameter_options = {"decoder": {"unit_rows": True}}

and may have methods `project_()`, which puts its weights back into their set, and `after_step()`, which counts what happens once a step.
Every solver that wraps an optimiser of PyTorch sees to
both; a loop of one's own says `follow_requests(model, optimizer)`.
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

__all__ = ["ClampWeights", "MaxNorm", "ProjectModules", "UnitNorm", "follow_requests"]


class ProjectModules:
    """Call `project_()` of every module of a model that has one: the module knows the set, the solver knows when.

    Solvers that wrap an optimiser of PyTorch do it by themselves (`follow_requests`). In a loop of your own, follow the optimiser.

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


class UnitNorm(_Projection):
    """Keep every row at length 1: `g_i <- g_i - <g_i, w_i> w_i / |w_i|^2` before a step, and `w_i <- w_i / |w_i|` after it.

    Without the first, an optimiser with moments spends its step on a length that is undone at once. A row that is 0 has no direction, and
    stays.

    Args:
        model: its parameters of two dimensions or more are held; row `i` of dimension 0 is one unit.
        include: name pattern, such as "*decoder".

    Raises:
        InputError: nothing matches, or weights are parametrized.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> UnitNorm(layer)(); bool(torch.allclose(layer.weight.norm(dim=1), torch.ones(3)))
        True

    Source:
        The dictionaries of sparse autoencoders, as in bartbussmann/BatchTopK; there rows are divided before the step, which
        leaves lengths that are not quite 1.
    """

    def __init__(self, model: nn.Module, include: str = "*") -> None:
        super().__init__(model, 1.0, include)

    @classmethod
    def of(cls, parameters: list[Tensor]) -> UnitNorm:
        """Return the projection of these parameters."""
        made = cls.__new__(cls)
        made.limit, made.include, made.parameters = 1.0, "", parameters
        return made

    def project(self, weight: Tensor) -> None:
        weight.div_(_row_norms(weight))

    @torch.no_grad()
    def make_tangent(self) -> None:
        """Take from every gradient its component along the row."""
        for weight in self.parameters:
            if weight.grad is not None:
                share = (weight.grad * weight).flatten(1).sum(1).view_as(norms := _row_norms(weight)) / norms.square()
                weight.grad.addcmul_(weight, share, value=-1)

    def follow(self, optimizer: Optimizer) -> RemovableHandle:
        before = optimizer.register_step_pre_hook(lambda *_: self.make_tangent())
        return _Both(before, super().follow(optimizer))


def _row_norms(weight: Tensor) -> Tensor:
    """Return the rows' lengths in a form that divides; 1 for a row of zeros."""
    norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return torch.where(norms > 0, norms, 1.0).view(-1, *[1] * (weight.dim() - 1))


class _Both(RemovableHandle):
    """Several hooks that are removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __reduce__(self) -> tuple[type[_Both], tuple[()]]:
        # Hooks belong to one optimiser; a copy of what holds them has none.
        return (_Both, ())


def follow_requests(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Do at each step of an optimiser what the model's modules ask for: rows of length 1, `project_()`, and `after_step()`.

    Returns: a handle whose `remove()` stops it.

    Example:
        >>> from poise.parts import SparseAutoencoder
        >>> sae = SparseAutoencoder(4, 16)
        >>> handle = follow_requests(sae, torch.optim.Adam(sae.parameters()))
    """
    rows: list[Tensor] = []
    counting: list[Any] = []
    for module in model.modules():
        options: dict[str, dict[str, Any]] = getattr(module, "parameter_options", {})
        rows += [p for name, p in module.named_parameters(recurse=False) if options.get(name, {}).get("unit_rows")]
        if callable(getattr(module, "after_step", None)):
            counting.append(module)

    def count(*_: Any) -> None:
        for module in counting:
            module.after_step()

    handles = [UnitNorm.of(rows).follow(optimizer)] if rows else []
    projected = ProjectModules(model)
    if projected.modules:
        handles.append(projected.follow(optimizer))
    if counting:
        handles.append(optimizer.register_step_post_hook(count))
    return _Both(*handles)
