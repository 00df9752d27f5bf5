"""Two levels: what is fitted below, what is judged above, and the derivatives that every bilevel method asks for.

    minimise over theta   F(theta) = upper(x*(theta), theta)   where   x*(theta) = argmin over x of lower(x, theta)

    gradient of F = d upper/d theta - J' q,   H q = d upper/d x,   H = d2 lower/dx dx,   J = d2 lower/dx dtheta

Methods differ only in how `q` arises (`hypergradient`), and in when they move `x` and `theta`. Everything here is detached: nothing
differentiates through a solver. `Counters` says what a method cost, so that methods are compared at equal cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors, Tensors, Any], Tensor]
"""`function(x, theta, batch) -> 0-dim tensor`; `batch` is None for the whole of the data."""


@dataclass
class Counters:
    """What a method has cost: evaluations since the beginning, or since `reset`.

    Attributes:
        lower_values, lower_gradients, upper_values, upper_gradients: evaluations of a level and of its gradient.
        hessian_products: products of the lower Hessian with a vector.
        mixed_products: products of the mixed second derivative with a vector.
    """

    lower_values: int = 0
    lower_gradients: int = 0
    upper_values: int = 0
    upper_gradients: int = 0
    hessian_products: int = 0
    mixed_products: int = 0

    @property
    def lower_work(self) -> int:
        """Lower gradients and products with the lower Hessian: the axis on which bilevel methods are compared."""
        return self.lower_gradients + self.hessian_products

    def since(self, before: Counters) -> Counters:
        """Return what was counted after `before`, which is a copy made earlier."""
        return Counters(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))

    def copy(self) -> Counters:
        """Return the counts as they are now."""
        return self.since(Counters())

    def reset(self) -> None:
        """Count from 0 again."""
        for each in fields(self):
            setattr(self, each.name, 0)


@dataclass
class Levels:
    """A bilevel problem in tensors.

    Args:
        lower: `lower(x, theta, batch)`, what `x` minimises.
        upper: `upper(x, theta, batch)`, what `theta` minimises at the best `x`.
        names: of the entries of `theta`, for messages.
        counters: what was evaluated.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: x[0].square().sum() / 2)
    >>> two.lower_gradient((torch.ones(2),), (torch.zeros(2),))
    (tensor([1., 1.]),)
    """

    lower: Function
    upper: Function
    names: tuple[str, ...] = ()
    counters: Counters = field(default_factory=Counters)

    def lower_value(self, x: Tensors, theta: Tensors, batch: Any = None) -> Tensor:
        """Return the lower objective, detached."""
        self.counters.lower_values += 1
        with torch.no_grad():
            return self.lower(x, theta, batch)

    def upper_value(self, x: Tensors, theta: Tensors, batch: Any = None) -> Tensor:
        """Return the upper objective, detached."""
        self.counters.upper_values += 1
        with torch.no_grad():
            return self.upper(x, theta, batch)

    def lower_gradient(self, x: Tensors, theta: Tensors, batch: Any = None) -> Tensors:
        """Return d lower/dx, detached."""
        return self.lower_value_and_gradient(x, theta, batch)[1]

    def lower_value_and_gradient(self, x: Tensors, theta: Tensors, batch: Any = None) -> tuple[Tensor, Tensors]:
        """Return the lower objective and its gradient in x, detached."""
        self.counters.lower_gradients += 1
        points = leaves(x)
        with torch.enable_grad():
            value = self.lower(points, detached(theta), batch)
            return value.detach(), gradients(value, points)

    def lower_gradient_of_theta(self, x: Tensors, theta: Tensors, batch: Any = None) -> Tensors:
        """Return d lower/d theta at fixed x, detached."""
        self.counters.lower_gradients += 1
        points = leaves(theta)
        with torch.enable_grad():
            return gradients(self.lower(detached(x), points, batch), points)

    def upper_gradients(self, x: Tensors, theta: Tensors, batch: Any = None) -> tuple[Tensor, Tensors, Tensors]:
        """Return the upper objective, its gradient in x and its direct gradient in theta, detached."""
        self.counters.upper_gradients += 1
        points, outer = leaves(x), leaves(theta)
        with torch.enable_grad():
            value = self.upper(points, outer, batch)
            both = gradients(value, (*points, *outer))
        return value.detach(), both[: len(points)], both[len(points) :]

    def upper_gradient_of_theta(self, x: Tensors, theta: Tensors, batch: Any = None) -> tuple[Tensor, Tensors]:
        """Return the upper objective and its direct gradient in theta at fixed x, detached: a value alone where it reads no theta."""
        self.counters.upper_gradients += 1
        points = leaves(theta)
        with torch.enable_grad():
            value = self.upper(detached(x), points, batch)
            return value.detach(), gradients(value, points)

    def linearise(self, x: Tensors, theta: Tensors, batch: Any = None) -> Linearised:
        """Return the second derivatives of the lower objective at one point: one graph for any number of products."""
        return Linearised(self, x, theta, batch)


class Linearised:
    """The second derivatives of the lower objective at one point, as products with vectors.

    The graph of d lower/dx is built once, and every product is one backward pass over it.
    """

    def __init__(self, levels: Levels, x: Tensors, theta: Tensors, batch: Any = None) -> None:
        self.counters = levels.counters
        self.counters.lower_gradients += 1
        self._x, self._theta = leaves(x), leaves(theta)
        with torch.enable_grad():
            value = levels.lower(self._x, self._theta, batch)
            self._gradient = gradients(value, self._x, create_graph=True)

    @property
    def gradient(self) -> Tensors:
        """d lower/dx, detached."""
        return detached(self._gradient)

    def hessian_product(self, vector: Tensors) -> Tensors:
        """Return H v, of the form of x."""
        self.counters.hessian_products += 1
        return self._product(vector, self._x)

    def mixed_product(self, vector: Tensors) -> Tensors:
        """Return J' v, of the form of theta."""
        self.counters.mixed_products += 1
        return self._product(vector, self._theta)

    def both_products(self, vector: Tensors) -> tuple[Tensors, Tensors]:
        """Return H v and J' v from one backward pass."""
        self.counters.hessian_products += 1
        self.counters.mixed_products += 1
        both = self._product(vector, (*self._x, *self._theta))
        return both[: len(self._x)], both[len(self._x) :]

    def response_product(self, change: Tensors) -> Tensors:
        """Return J v for a change v of theta, of the form of x: how d lower/dx moves when theta moves."""
        self.counters.mixed_products += 1
        # J' w is linear in w: its derivative along v is J v.
        weights = tuple(torch.zeros_like(g, requires_grad=True) for g in self._gradient)
        pairs = [(g, w) for g, w in zip(self._gradient, weights, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(w) for w in weights)
        outputs, inner = zip(*pairs, strict=True)
        with torch.enable_grad():
            found = torch.autograd.grad(outputs, self._theta, inner, create_graph=True, allow_unused=True)
            total = [(f * v).sum() for f, v in zip(found, change, strict=True) if f is not None]
            if not total:
                return tuple(torch.zeros_like(w) for w in weights)
            return gradients(torch.stack(total).sum(), weights)

    def _product(self, vector: Tensors, to: Tensors) -> Tensors:
        # A lower objective that is linear in one of the parameters has a gradient there without a graph.
        pairs = [(g, v) for g, v in zip(self._gradient, vector, strict=True) if g.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(t) for t in to)
        outputs, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, to, weights, retain_graph=True, allow_unused=True)
        return filled(found, to)


def gradients(value: Tensor, points: Sequence[Tensor], create_graph: bool = False) -> Tensors:
    """Return the gradient at every point, zeros where the value does not depend on it."""
    if value.ndim:
        raise InputError(f"A level must give one number, and it gave a tensor of shape {tuple(value.shape)}.")
    if not value.requires_grad:
        return tuple(torch.zeros_like(p) for p in points)
    found = torch.autograd.grad(value, points, create_graph=create_graph, allow_unused=True)
    return filled(found, points)


def filled(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensors:
    """Return what was found, zeros in place of None."""
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, like, strict=True))


def leaves(tensors: Sequence[Tensor]) -> Tensors:
    """Return detached tensors that gradients can be taken of."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def detached(tensors: Sequence[Tensor]) -> Tensors:
    """Return the tensors without their graph."""
    return tuple(t.detach() for t in tensors)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product, 0-dim."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all tensors jointly, 0-dim."""
    total: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
    return total


def shifted(left: Sequence[Tensor], scale: float | Tensor, right: Sequence[Tensor]) -> Tensors:
    """Return `left + scale * right`."""
    return tuple(a + scale * b for a, b in zip(left, right, strict=True))
