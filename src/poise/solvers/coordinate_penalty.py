"""Penalties as coordinate methods see them: `h(x) = sum_i h_i(x_i)`, one block at a time.

    BoundedElasticNet    l1_i |x_i| + l2_i/2 x_i^2  on  [lower_i, upper_i]      kinks and bounds are known, so blocks can be solved exactly
    Entrywise            any other penalty that is a sum over entries           proximal steps
    Blockwise            a group lasso whose groups are the blocks              proximal steps of a whole block

`charge_of` turns what users write (`L1()`, `Scaled(ElasticNet(0.5), 0.1)`, `NonNegative()`, `Box(-1, 1)`, ...) into one of them.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError
from poise.operators import Box, ConvexSet
from poise.penalties import L1, ElasticNet, GroupLasso, Indicator, Penalty, Scaled, SquaredL2, soft_threshold

__all__ = ["Blockwise", "BoundedElasticNet", "Charge", "Entrywise", "charge_of", "group_labels"]


class BoundedElasticNet(Penalty):
    """`sum_i l1_i |x_i| + l2_i/2 x_i^2`, infinite outside `[lower, upper]`: lasso, ridge, box, non-negative lasso and their sums.

    prox(p, t) = clip(soft(p, t l1) / (1 + t l2), lower, upper)

    Args:
        l1, l2: weights, not negative: numbers or tensors that broadcast to a point.
        lower, upper: bounds; infinite where there are none.

    Raises:
        InputError: a weight is negative, or a lower bound exceeds its upper one.

    >>> BoundedElasticNet(l1=1.0, lower=0.0).prox(torch.tensor([3.0, -2.0]), 0.5)
    tensor([2.5000, 0.0000])
    """

    separable: ClassVar[bool] = True

    def __init__(
        self,
        l1: float | Tensor = 0.0,
        l2: float | Tensor = 0.0,
        lower: float | Tensor = -math.inf,
        upper: float | Tensor = math.inf,
    ) -> None:
        parts = [
            torch.as_tensor(v, dtype=torch.float64) if isinstance(v, int | float) else v for v in (l1, l2, lower, upper)
        ]
        self.l1, self.l2, self.lower, self.upper = parts
        if bool((self.l1 < 0).any()) or bool((self.l2 < 0).any()) or not bool((self.lower <= self.upper).all()):
            raise InputError(
                f"BoundedElasticNet: l1 and l2 must not be negative and lower must not exceed upper, but l1 = {l1}, l2 = {l2}, "
                f"lower = {lower}, upper = {upper}."
            )

    def spread(self, like: Tensor, outputs: int = 1, intercept: bool = False) -> BoundedElasticNet:
        """Return it with one number for every coordinate of `like`, a weight [outputs, inputs] whose last input may be an intercept.

        Numbers for inputs serve every output.
        """
        inputs = len(like) // outputs
        free = (0.0, 0.0, -math.inf, math.inf)
        parts = []
        for v, none in zip((self.l1, self.l2, self.lower, self.upper), free, strict=True):
            spread = v.to(like).expand(outputs, inputs - intercept)
            parts.append(
                torch.cat([spread, like.new_full((outputs, 1), none)], 1).flatten() if intercept else spread.flatten()
            )
        return BoundedElasticNet(*parts)

    def at(self, block: Tensor) -> BoundedElasticNet:
        """Return the part of a block, after `spread`."""
        found = BoundedElasticNet.__new__(BoundedElasticNet)
        found.l1, found.l2 = self.l1[block], self.l2[block]
        found.lower, found.upper = self.lower[block], self.upper[block]
        return found

    def value(self, x: Tensor) -> Tensor:
        charge = (self.l1.to(x) * x.abs() + 0.5 * self.l2.to(x) * x.square()).sum()
        inside = ((x >= self.lower.to(x)) & (x <= self.upper.to(x))).all()
        return charge if bool(inside) else x.new_tensor(math.inf)

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        shrunk = soft_threshold(point, step * self.l1.to(point)) / (1.0 + step * self.l2.to(point))
        return torch.minimum(torch.maximum(shrunk, self.lower.to(point)), self.upper.to(point))

    def slopes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the subdifferential `[low, high]` of every entry; infinite at a bound."""
        l1, l2 = self.l1.to(x), self.l2.to(x)
        low = torch.where(x > 0, l1, -l1) + l2 * x
        high = torch.where(x < 0, -l1, l1) + l2 * x
        low = torch.where(x <= self.lower.to(x), -math.inf, low)
        return low, torch.where(x >= self.upper.to(x), math.inf, high)

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        low, high = self.slopes(x)
        return torch.maximum(weight * low + gradient, -gradient - weight * high).clamp_min(0.0)

    def kinks(self, x: Tensor) -> Tensor:
        """Mark the entries that stand at a kink or at a bound."""
        low, high = self.slopes(x)
        return low < high


class Charge:
    """A penalty split over coordinates or blocks.

    Attributes:
        exact: kinks and bounds, spread over the coordinates; None where only proximal steps are known.
        free: there is no penalty at all.
        convex: it is convex.
    """

    exact: BoundedElasticNet | None = None
    free = False
    convex = True

    def value(self, x: Tensor, block: Tensor | None = None) -> float:
        """Return h at x [size], or of a block's entries at x [block]."""
        raise NotImplementedError

    def change(self, x: Tensor, fresh: Tensor, block: Tensor) -> float:
        """Return `h(fresh) - h(x)` of a block's entries."""
        return self.value(fresh, block) - self.value(x, block)

    def shares(self, x: Tensor) -> Tensor:
        """Return what every entry (or every block) is charged."""
        raise NotImplementedError

    def prox(self, point: Tensor, step: float | Tensor, block: Tensor | None = None) -> Tensor:
        """Return the proximal map on a block, or of every entry."""
        raise NotImplementedError

    def distance(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the norm of the least subgradient of every entry (or of every block), the gradient of f included."""
        raise NotImplementedError


class _Exact(Charge):
    def __init__(self, e: BoundedElasticNet) -> None:
        self.exact = e
        free = (e.l1 == 0).all() & (e.l2 == 0).all() & (e.lower == -math.inf).all() & (e.upper == math.inf).all()
        self.free = bool(free)

    def value(self, x: Tensor, block: Tensor | None = None) -> float:
        assert self.exact is not None
        if self.free:
            return 0.0
        if block is None:
            return float(self.exact.value(x))
        # steps end within the bounds, up to rounding that must not cost infinity
        h = self.exact.at(block)
        return float((h.l1 * x.abs() + 0.5 * h.l2 * x.square()).sum())

    def change(self, x: Tensor, fresh: Tensor, block: Tensor) -> float:
        if self.free:
            return 0.0
        assert self.exact is not None
        # entry by entry, so that rounding is that of an entry and not of the sum
        h = self.exact.at(block)
        return float((h.l1 * (fresh.abs() - x.abs()) + 0.5 * h.l2 * (fresh - x) * (fresh + x)).sum())

    def shares(self, x: Tensor) -> Tensor:
        e = self.exact
        assert e is not None
        # a point of the proximal map is within the bounds
        return e.l1 * x.abs() + 0.5 * e.l2 * x.square()

    def prox(self, point: Tensor, step: float | Tensor, block: Tensor | None = None) -> Tensor:
        assert self.exact is not None
        return point if self.free else (self.exact if block is None else self.exact.at(block)).prox(point, step)

    def distance(self, x: Tensor, gradient: Tensor) -> Tensor:
        assert self.exact is not None
        return gradient.abs() if self.free else self.exact.distance(x, gradient)


class Entrywise(Charge):
    """A penalty that is a sum over entries, all charged alike.

    Args:
        penalty: with `separable`.
    """

    def __init__(self, penalty: Scaled) -> None:
        self.penalty = penalty
        self.convex = penalty.is_convex

    def value(self, x: Tensor, block: Tensor | None = None) -> float:
        return float(self.penalty.value(x))

    def shares(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.penalty.value)(x[:, None])

    def prox(self, point: Tensor, step: float | Tensor, block: Tensor | None = None) -> Tensor:
        return self.penalty.prox(point, step)

    def distance(self, x: Tensor, gradient: Tensor) -> Tensor:
        return self.penalty.distance(x, gradient)


class Blockwise(Charge):
    """`weight sum over groups of sqrt(inputs of the group) ||x_group||`, where every block is one group.

    Args:
        penalty: the group lasso with its weight and a ridge.
        groups: int64 [size], the group of every coordinate.
        outputs: of the model; a group holds its inputs with all their outputs.
        intercept: the last group is free.
    """

    def __init__(self, penalty: Scaled, groups: Tensor, outputs: int = 1, intercept: bool = False) -> None:
        self.groups = groups
        self.number = int(groups.max()) + 1
        self.levels = penalty.weight * (torch.bincount(groups, minlength=self.number).double() / outputs).sqrt()
        self.ridges = torch.full_like(self.levels, penalty.ridge)
        if intercept:
            self.levels[-1] = self.ridges[-1] = 0.0

    def norms(self, x: Tensor) -> Tensor:
        """Return the norm of every group, [groups]."""
        return x.new_zeros(self.number).index_add(0, self.groups, x.square()).sqrt()

    def value(self, x: Tensor, block: Tensor | None = None) -> float:
        if block is None:
            return float(self.shares(x).sum())
        group = self.groups[block[0]]
        return float(self.levels[group] * x.norm() + 0.5 * self.ridges[group] * x.square().sum())

    def shares(self, x: Tensor) -> Tensor:
        norm = self.norms(x)
        return self.levels.to(x) * norm + 0.5 * self.ridges.to(x) * norm.square()

    def prox(self, point: Tensor, step: float | Tensor, block: Tensor | None = None) -> Tensor:
        """The step is one number, or one for every coordinate that is the same within a group."""
        group = self.groups if block is None else self.groups[block[:1]]
        damping = 1.0 + step * self.ridges.to(point)[group]
        shrunk = point / damping
        level = self.levels.to(point)[group] * step / damping
        norm = self.norms(shrunk)[self.groups] if block is None else shrunk.norm()
        return torch.where(norm > level, 1.0 - level / torch.where(norm > 0, norm, 1.0), 0.0) * shrunk

    def distance(self, x: Tensor, gradient: Tensor) -> Tensor:
        norm, level = self.norms(x), self.levels.to(x)
        slope = gradient + self.ridges.to(x)[self.groups] * x
        direction = x / torch.where(norm > 0, norm, 1.0)[self.groups]
        inside = self.norms(slope + level[self.groups] * direction)
        return torch.where(norm > 0, inside, (self.norms(slope) - level).clamp_min(0.0))


def charge_of(
    penalty: Any, like: Tensor, groups: Tensor | None = None, outputs: int = 1, intercept: bool = False
) -> Charge:
    """Split a penalty over the coordinates of `like`.

    Args:
        penalty: None, a `Penalty`, a `Scaled` one, or a convex set of `poise.operators`.
        like: [size], a weight [outputs, inputs] that is flattened.
        groups: the block of every coordinate, where blocks are fixed.
        outputs: of the model.
        intercept: the last input is a constant, which costs nothing.

    Raises:
        IncompatibleError: it is no sum over coordinates, or a group lasso whose groups are not the blocks.
    """
    scaled = penalty if isinstance(penalty, Scaled) else Scaled(_as_penalty(penalty))
    inner = scaled.penalty
    found = _bounded(inner, scaled.weight, scaled.ridge)
    if found is not None:
        return _Exact(found.spread(like, outputs, intercept))
    if isinstance(inner, GroupLasso):
        labels = group_labels(inner, len(like) // outputs, outputs, intercept)
        assert labels is not None
        if groups is None or not _same_parts(labels, groups):
            raise IncompatibleError(
                "BlockCoordinate: with a group lasso the blocks are its groups. Give partition='groups' and a rule for fixed blocks."
            )
        return Blockwise(scaled, groups, outputs, intercept)
    if scaled.is_separable and not intercept:
        return Entrywise(scaled)
    if scaled.is_separable:
        raise IncompatibleError(
            "BlockCoordinate: with an intercept the penalty is l1, l2, bounds or a group lasso, and it is "
            f"{type(inner).__name__}. Centre the data "
            "and leave the intercept out."
        )
    raise IncompatibleError(
        f"BlockCoordinate: {type(inner).__name__} is no sum over coordinates, so a block cannot be moved alone. Use a "
        "proximal method that takes "
        "whole steps, or a penalty such as l1, elastic_net, box, mcp."
    )


def group_labels(penalty: Any, inputs: int, outputs: int, intercept: bool) -> Tensor | None:
    """Return the group of every coordinate of a weight [outputs, inputs], int64 [outputs * inputs]; None where it is no group lasso.

    With an intercept the last input is a group of its own.
    """
    inner = penalty.penalty if isinstance(penalty, Scaled) else penalty
    if not isinstance(inner, GroupLasso):
        return None
    labels = inner.labels(inputs - intercept)
    if intercept:
        labels = torch.cat([labels, labels.max()[None] + 1])
    return labels.repeat(outputs)


def _same_parts(one: Tensor, other: Tensor) -> bool:
    width = int(other.max()) + 1
    pairs = len(torch.unique(one * width + other))
    return pairs == width and pairs == int(one.max()) + 1


def _as_penalty(penalty: Any) -> Penalty | None:
    if isinstance(penalty, ConvexSet):
        return Indicator(penalty)
    if penalty is None or isinstance(penalty, Penalty):
        return penalty
    raise InputError(f"BlockCoordinate: a penalty or None was expected, and {type(penalty).__name__} came.")


def _bounded(inner: Penalty | None, weight: float, ridge: float) -> BoundedElasticNet | None:
    if inner is None or weight == 0:
        return BoundedElasticNet(l2=ridge)
    if isinstance(inner, L1):
        return BoundedElasticNet(weight if inner.scales is None else weight * inner.scales.double(), ridge)
    if isinstance(inner, SquaredL2):
        return BoundedElasticNet(l2=weight + ridge)
    if isinstance(inner, ElasticNet):
        return BoundedElasticNet(weight * inner.ratio, weight * (1 - inner.ratio) + ridge)
    if isinstance(inner, Indicator) and isinstance(inner.region, Box):
        return BoundedElasticNet(l2=ridge, lower=inner.region.lower, upper=inner.region.upper)
    if isinstance(inner, BoundedElasticNet):
        return BoundedElasticNet(weight * inner.l1, weight * inner.l2 + ridge, inner.lower, inner.upper)
    return None
