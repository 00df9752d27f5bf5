"""Penalties with structure: value, proximal map, distance to the subdifferential, conjugate, dual norm.

    prox(p, t) = argmin over u of  1/2 ||u - p||^2 + t h(u)
    distance(x, g, t) = dist(-g, t dh(x))          0 in every entry or block where x solves  min <g, x> + t h(x)  locally
    conjugate(u) = max over x of  <u, x> - h(x)
    polar(u) = max over h(x) <= 1 of  <u, x>         where h is a norm: h*(u) = 0 if polar(u) <= 1, else infinite

A point is a tensor `[..., inputs]`: the weight of a linear layer, `[outputs, inputs]`, or one vector. Maps of several steps at once are
exact, not iterated, but for the total variation of images, whose iteration carries its own gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.operators import Ball, Box, ConvexSet, Simplex, project_sparse_simplex, require_count


class Penalty:
    """A function of weights that a proximal solver can handle.

    Class attributes:
        separable: it is a sum over single entries.
        convex: it is convex; where it is not, `prox` returns a global minimiser and `distance` tells stationary points.
        norm: it is a norm (or a seminorm), so `polar` exists.
        is_set: it is 0 in a set and infinite outside, which no weight changes.
    """

    separable: ClassVar[bool] = False
    convex: ClassVar[bool] = True
    norm: ClassVar[bool] = False
    is_set: ClassVar[bool] = False

    def value(self, x: Tensor) -> Tensor:
        """Return h(x), 0-dim."""
        raise NotImplementedError(f"{type(self).__name__} must say what it charges")

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        """Return the minimiser of `1/2 ||u - point||^2 + step h(u)`."""
        raise NotImplementedError(f"{type(self).__name__} must say its proximal map")

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        """Return how far `-gradient` is from `weight` times the subdifferential at `x`, for each entry or block.

        A penalty that does not say it is judged by the fixed points of its proximal map (`Composite.distance`).
        """
        raise NotImplementedError(f"the subdifferential of {type(self).__name__} is not known in closed form")

    def conjugate(self, u: Tensor) -> Tensor:
        """Return `max <u, x> - h(x)`, 0-dim, infinite where it has no bound."""
        if self.norm:
            return u.new_tensor(0.0 if float(self.polar(u)) <= 1.0 + 64 * torch.finfo(u.dtype).eps else math.inf)
        raise NotImplementedError(f"{type(self).__name__} has no conjugate in closed form")

    def polar(self, u: Tensor) -> Tensor:
        """Return the dual norm, 0-dim."""
        raise NotImplementedError(f"{type(self).__name__} is not a norm")

    def active(self, x: Tensor) -> Tensor:
        """Mark the entries that are not 0."""
        return x != 0


@dataclass(frozen=True, eq=False)
class L1(Penalty):
    """`sum c_j |x_j|`, with `c_j = 1` where no scales are given.

    Args:
        scales: non-negative numbers that broadcast to a point; 0 leaves an entry free.

    >>> L1().prox(torch.tensor([3.0, -0.5, 1.0]), 1.0)
    tensor([2., -0., 0.])
    """

    scales: Tensor | None = None
    separable: ClassVar[bool] = True
    norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scales is not None and not bool((self.scales >= 0).all()):
            raise InputError("l1: scales must not be negative.")

    def value(self, x: Tensor) -> Tensor:
        return (x.abs() if self.scales is None else x.abs() * self.scales.to(x)).sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return soft_threshold(point, step if self.scales is None else step * self.scales.to(point))

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        level = weight if self.scales is None else weight * self.scales.to(x)
        return torch.where(x == 0, (gradient.abs() - level).clamp_min(0.0), (gradient + level * x.sign()).abs())

    def polar(self, u: Tensor) -> Tensor:
        if self.scales is None:
            return u.abs().max()
        scales = self.scales.to(u)
        return torch.where(u == 0, 0.0, u.abs() / scales).max()


@dataclass(frozen=True, eq=False)
class SquaredL2(Penalty):
    """`1/2 sum x^2`.

    >>> SquaredL2().prox(torch.tensor([3.0]), 0.5)
    tensor([2.])
    """

    separable: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return point / (1.0 + step)

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        return (gradient + weight * x).abs()

    def conjugate(self, u: Tensor) -> Tensor:
        return 0.5 * u.square().sum()


@dataclass(frozen=True, eq=False)
class ElasticNet(Penalty):
    """`ratio sum |x| + (1 - ratio)/2 sum x^2`.

    Args:
        ratio: share of the absolute values, in [0, 1].

    Source: Zou and Hastie (2005).
    """

    ratio: float = 0.5
    separable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise InputError(f"elastic_net: ratio is a share in [0, 1], and it is {self.ratio}.")

    def value(self, x: Tensor) -> Tensor:
        return self.ratio * x.abs().sum() + 0.5 * (1 - self.ratio) * x.square().sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return soft_threshold(point, step * self.ratio) / (1.0 + step * (1 - self.ratio))

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        return L1().distance(x, gradient + weight * (1 - self.ratio) * x, weight * self.ratio)

    def conjugate(self, u: Tensor) -> Tensor:
        beyond = (u.abs() - self.ratio).clamp_min(0.0)
        if self.ratio == 1:
            return L1().conjugate(u)
        return beyond.square().sum() / (2 * (1 - self.ratio))


@dataclass(frozen=True, eq=False)
class GroupLasso(Penalty):
    """`sum over groups of sqrt(inputs of the group) ||x_group||`: whole groups of inputs leave together.

    A group takes its inputs with all their outputs, so `groups=1` is the penalty of the multi-task lasso.

    Args:
        groups: inputs of a group, which are neighbours; or the group of every input, as integers.

    Source: Yuan and Lin (2006).

    >>> GroupLasso(2).prox(torch.tensor([3.0, 4.0, 0.1, 0.1]), 1.0)
    tensor([2.1515, 2.8686, 0.0000, 0.0000])
    """

    groups: int | Sequence[int] = 1
    norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.groups, int):
            require_count("group_lasso: groups", self.groups)
        elif len(self.groups) == 0 or min(self.groups) < 0:
            raise InputError("group_lasso: groups gives every input a group, counted from 0.")

    def labels(self, inputs: int, device: torch.device | None = None) -> Tensor:
        """Return the group of every input, int64 [inputs]."""
        if isinstance(self.groups, int):
            if inputs % self.groups:
                raise InputError(
                    f"group_lasso: {inputs} inputs are not groups of {self.groups}. Give their groups one by one."
                )
            return torch.arange(inputs, device=device) // self.groups
        if len(self.groups) != inputs:
            raise InputError(f"group_lasso: groups names {len(self.groups)} inputs, and there are {inputs}.")
        labels: Tensor = torch.unique(torch.as_tensor(self.groups, device=device), return_inverse=True)[1]
        return labels

    def norms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the norm of every group, the root of its size, and the group of every input."""
        labels = self.labels(x.shape[-1], x.device)
        squares = x.square().reshape(-1, x.shape[-1]).sum(0)
        number = int(labels.max()) + 1
        total = squares.new_zeros(number).index_add(0, labels, squares)
        size = torch.bincount(labels, minlength=number).to(x.dtype)
        # the root has no slope at 0, and a group that is 0 pulls nowhere
        norm = torch.where(total > 0, total, 1.0).sqrt() * (total > 0)
        return norm, size.sqrt(), labels

    def value(self, x: Tensor) -> Tensor:
        norm, root, _ = self.norms(x)
        return (root * norm).sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        norm, root, labels = self.norms(point)
        kept = (1.0 - step * root / torch.where(norm > 0, norm, 1.0)).clamp_min(0.0) * (norm > 0)
        return point * kept[labels]

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        norm, root, labels = self.norms(x)
        direction = x / torch.where(norm > 0, norm, 1.0)[labels]
        inside = self.norms(gradient + weight * root[labels] * direction)[0]
        return torch.where(norm > 0, inside, (self.norms(gradient)[0] - weight * root).clamp_min(0.0))

    def polar(self, u: Tensor) -> Tensor:
        norm, root, _ = self.norms(u)
        return (norm / root).max()


@dataclass(frozen=True, eq=False)
class NuclearNorm(Penalty):
    """The sum of the singular values of a matrix `[outputs, inputs]`: few directions leave together.

    >>> NuclearNorm().prox(torch.diag(torch.tensor([3.0, 0.5])), 1.0)
    tensor([[2., 0.],
            [0., 0.]])
    """

    norm: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        value: Tensor = torch.linalg.matrix_norm(_matrix(x), "nuc")
        return value

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        u, s, v = torch.linalg.svd(_matrix(point), full_matrices=False)
        found: Tensor = (u * (s - step).clamp_min(0.0)) @ v
        return found.reshape(point.shape)

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        """`-g` splits into the part in the spaces of x, which must be `weight U V'`, and the rest, of spectral norm `weight` at most."""
        u, s, v = torch.linalg.svd(_matrix(x), full_matrices=False)
        rank = int((s > s.max() * 1e-10).sum()) if float(s.max()) > 0 else 0
        u, v = u[:, :rank], v[:rank]
        g = -_matrix(gradient)
        outside = g - u @ (u.T @ g)
        outside = outside - (outside @ v.T) @ v
        inside = torch.linalg.vector_norm(g - outside - weight * (u @ v))
        singular = torch.linalg.svdvals(outside)
        return torch.cat([inside[None], (singular - weight).clamp_min(0.0)])

    def polar(self, u: Tensor) -> Tensor:
        size: Tensor = torch.linalg.matrix_norm(_matrix(u), 2)
        return size


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1)


@dataclass(frozen=True, eq=False)
class TotalVariation(Penalty):
    """`sum |x_{j+1} - x_j|` along the last axis (`dims=1`), or the isotropic total variation of images (`dims=2`).

    dims=1    the proximal map is exact: the taut string through a tube of radius `step` round the running sum
    dims=2    sum over pixels of sqrt(dx^2 + dy^2), differences forward and 0 at the border; accelerated projection of the dual,
              until the duality gap is at most `tolerance * step * max(value, 1)`

    Args:
        dims: axes that vary, 1 or 2.
        tolerance, iterations: of the iteration for images.

    Source: Condat (2013) for one axis, Beck and Teboulle (2009) for two.

    >>> TotalVariation().prox(torch.tensor([0.0, 0.0, 4.0, 4.0]), 1.0)
    tensor([0.5000, 0.5000, 3.5000, 3.5000])
    """

    dims: int = 1
    tolerance: float = 1e-6
    iterations: int = 2000
    norm: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dims not in (1, 2):
            raise InputError(f"total variation: dims is 1 (signals) or 2 (images), and it is {self.dims}.")

    def value(self, x: Tensor) -> Tensor:
        if self.dims == 1:
            return x.diff(dim=-1).abs().sum()
        square = _differences(x).square().sum(0)
        return (torch.where(square > 0, square, 1.0).sqrt() * (square > 0)).sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        if self.dims == 1:
            return _taut_string(point, float(step))
        return _denoise_image(point, float(step), self.tolerance, self.iterations)

    def polar(self, u: Tensor) -> Tensor:
        """Infinite where u does not add up to 0 along the axis, as a constant costs nothing."""
        if self.dims == 2:
            raise NotImplementedError("the dual norm of the total variation of images has no closed form")
        run = u.cumsum(-1)
        scale = u.abs().sum(-1).max().clamp_min(torch.finfo(u.dtype).tiny)
        if bool((run[..., -1].abs() > 1e-10 * scale).any()):
            return u.new_tensor(math.inf)
        return run.abs().max()

    def active(self, x: Tensor) -> Tensor:
        """Mark the entries that differ from the one before."""
        return torch.cat([torch.zeros_like(x[..., :1], dtype=torch.bool), x.diff(dim=-1) != 0], -1)


def _differences(x: Tensor) -> Tensor:
    """Forward differences along the last two axes, 0 at the border, [2, ...]."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    right[..., :, :-1] = x[..., :, 1:] - x[..., :, :-1]
    return torch.stack([down, right])


def _differences_transposed(p: Tensor) -> Tensor:
    down, right = p
    out = torch.zeros_like(down)
    out[..., :-1, :] -= down[..., :-1, :]
    out[..., 1:, :] += down[..., :-1, :]
    out[..., :, :-1] -= right[..., :, :-1]
    out[..., :, 1:] += right[..., :, :-1]
    return out


def _denoise_image(point: Tensor, step: float, tolerance: float, iterations: int) -> Tensor:
    """Minimise `1/2 ||u - point||^2 + step TV(u)` over the dual `u = point - step D' p`, `||p|| <= 1` at every pixel."""
    if step <= 0:
        return point.clone()
    p = _differences(torch.zeros_like(point))
    momentum, t = p, 1.0
    for iteration in range(iterations):
        u = point - step * _differences_transposed(momentum)
        moved = momentum + _differences(u) / (8.0 * step)
        fresh = moved / moved.square().sum(0).sqrt().clamp_min(1.0)
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = fresh + (t - 1) / t_next * (fresh - p)
        p, t = fresh, t_next
        if iteration % 10 == 9:
            u = point - step * _differences_transposed(p)
            d = _differences(u)
            lengths = d.square().sum(0).sqrt().sum()
            gap = step * (lengths - (d * p).sum())
            if float(gap) <= tolerance * step * max(float(lengths), 1.0):
                break
    return point - step * _differences_transposed(p)


def _taut_string(point: Tensor, step: float) -> Tensor:
    """Minimise `1/2 sum (u - y)^2 + step sum |u_{j+1} - u_j|` over every row of the last axis."""
    if step <= 0 or point.shape[-1] < 2:
        return point.clone()
    from poise.penalty_loops import taut_strings

    rows = point.detach().to("cpu", torch.float64).reshape(-1, point.shape[-1]).contiguous()
    return torch.from_numpy(taut_strings(rows.numpy(), step)).reshape(point.shape).to(point)


# ---- penalties that are not convex --------------------------------------------------------------------------------------


class _Folded(Penalty):
    """A function of `|x|` that rises more slowly the further it is; its proximal map compares the minima of its pieces.

    separable; not convex.
    """

    separable: ClassVar[bool] = True
    convex: ClassVar[bool] = False

    def charge(self, size: Tensor) -> Tensor:
        """Return what an entry of this size (>= 0) costs."""
        raise NotImplementedError

    def slope(self, size: Tensor) -> Tensor:
        """Return the derivative of `charge` at sizes above 0."""
        raise NotImplementedError

    def minima(self, size: Tensor, step: float | Tensor) -> list[Tensor]:
        """Return, for every piece, where `1/2 (u - size)^2 + step charge(u)` is least on it."""
        raise NotImplementedError

    def value(self, x: Tensor) -> Tensor:
        return self.charge(x.abs()).sum()

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        size = point.abs()
        found = torch.stack([torch.zeros_like(size), *self.minima(size, step)])
        cost = 0.5 * (found - size).square() + step * self.charge(found)
        best = found.gather(0, cost.argmin(0, keepdim=True))[0]
        return best * point.sign()

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        at_zero = weight * self.slope(torch.full_like(x, torch.finfo(x.dtype).tiny))
        there = (gradient + weight * self.slope(x.abs()) * x.sign()).abs()
        return torch.where(x == 0, (gradient.abs() - at_zero).clamp_min(0.0), there)


@dataclass(frozen=True, eq=False)
class MCP(_Folded):
    """Minimax concave: `|x| - x^2 / (2 knee)` up to `knee`, then `knee / 2`.

    The usual penalty of parameters `lambda` and `gamma` is `lambda` times this one with `knee = gamma lambda`.

    Args:
        knee: from where on a weight is not shrunk any more, > 0.

    Source: Zhang (2010).

    >>> MCP(2.0).prox(torch.tensor([0.5, 1.5, 3.0]), 1.0)
    tensor([0., 1., 3.])
    """

    knee: float = 3.0

    def __post_init__(self) -> None:
        _positive("mcp", "knee", self.knee)

    def charge(self, size: Tensor) -> Tensor:
        near = size.clamp_max(self.knee)
        return near - near.square() / (2 * self.knee)

    def slope(self, size: Tensor) -> Tensor:
        return (1.0 - size / self.knee).clamp_min(0.0)

    def minima(self, size: Tensor, step: float | Tensor) -> list[Tensor]:
        bend = torch.as_tensor(1.0 - step / self.knee, dtype=size.dtype, device=size.device)
        # where the piece bends down its least value is at an end, and both ends are among the others
        inner = torch.where(bend > 0, (size - step) / torch.where(bend > 0, bend, 1.0), 0.0).clamp(0.0, self.knee)
        return [inner, size.clamp_min(self.knee)]


@dataclass(frozen=True, eq=False)
class SCAD(_Folded):
    """Smoothly clipped absolute deviation: `|x|` up to `knee`, bending over until `a knee`, then `knee (a + 1) / 2`.

    The usual penalty of parameters `lambda` and `a` is `lambda` times this one with `knee = lambda`.

    Args:
        knee: where it begins to bend, > 0.
        a: where it is flat, in knees; > 2.

    Source: Fan and Li (2001).
    """

    knee: float = 1.0
    a: float = 3.7

    def __post_init__(self) -> None:
        _positive("scad", "knee", self.knee)
        if not self.a > 2:
            raise InputError(f"scad: a must be above 2, and it is {self.a}.")

    def charge(self, size: Tensor) -> Tensor:
        k, a = self.knee, self.a
        between = size.clamp(k, a * k)
        bent = (2 * a * k * between - between.square() - k * k) / (2 * (a - 1) * k)
        return torch.where(size <= k, size, bent)

    def slope(self, size: Tensor) -> Tensor:
        return ((self.a - size / self.knee) / (self.a - 1)).clamp(0.0, 1.0)

    def minima(self, size: Tensor, step: float | Tensor) -> list[Tensor]:
        k, a = self.knee, self.a
        first = (size - step).clamp(0.0, k)
        bend = torch.as_tensor(1.0 - step / ((a - 1) * k), dtype=size.dtype, device=size.device)
        middle = (size - step * a / (a - 1)) / torch.where(bend > 0, bend, 1.0)
        middle = torch.where(bend > 0, middle, k).clamp(k, a * k)
        return [first, middle, size.clamp_min(a * k)]


@dataclass(frozen=True, eq=False)
class CappedL1(_Folded):
    """`min(|x|, cap)`.

    Args:
        cap: from where on a weight costs no more, > 0.

    Source: Zhang (2008).
    """

    cap: float = 1.0

    def __post_init__(self) -> None:
        _positive("capped_l1", "cap", self.cap)

    def charge(self, size: Tensor) -> Tensor:
        return size.clamp_max(self.cap)

    def slope(self, size: Tensor) -> Tensor:
        return (size < self.cap).to(size.dtype)

    def minima(self, size: Tensor, step: float | Tensor) -> list[Tensor]:
        return [(size - step).clamp(0.0, self.cap), size.clamp_min(self.cap)]


@dataclass(frozen=True, eq=False)
class L0(Penalty):
    """The number of entries that are not 0.

    >>> L0().prox(torch.tensor([1.0, 2.0]), 1.0)
    tensor([0., 2.])
    """

    separable: ClassVar[bool] = True
    convex: ClassVar[bool] = False

    def value(self, x: Tensor) -> Tensor:
        return (x != 0).sum().to(x.dtype)

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return torch.where(point.square() > 2.0 * step, point, 0.0)

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        """0 where an entry is 0: its subdifferential there is everything."""
        return torch.where(x == 0, 0.0, gradient.abs())


@dataclass(frozen=True, eq=False)
class SparseSimplex(Penalty):
    """Rows without negative entries that add up to `total`, of which at most `k` are not 0; the indicator of that set.

    Args:
        k: most entries that may be positive.
        total: what a row adds up to, > 0.
    """

    k: int = 1
    total: float = 1.0
    convex: ClassVar[bool] = False
    is_set: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("sparse_simplex", self.k)
        _positive("sparse_simplex", "total", self.total)

    def value(self, x: Tensor) -> Tensor:
        inside = (x >= 0).all() & ((x.sum(-1) - self.total).abs() <= 1e-6 * self.total).all()
        inside &= ((x > 0).sum(-1) <= self.k).all()
        return x.new_tensor(0.0 if bool(inside) else math.inf)

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return project_sparse_simplex(point, self.k, self.total)


def _positive(name: str, argument: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name}: {argument} must be positive, and it is {value}.")


def soft_threshold(point: Tensor, level: float | Tensor) -> Tensor:
    """`sign(p) max(|p| - level, 0)`.

    >>> soft_threshold(torch.tensor([2.0, 0.5]), 1.0)
    tensor([1., 0.])
    """
    return point.sign() * (point.abs() - level).clamp_min(0.0)


# ---- convex sets as penalties, and sums ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Indicator(Penalty):
    """0 in a closed convex set, infinite outside; its proximal map is the projection, whatever the step.

    Args:
        region: the set.
        tolerance: how far outside a point still counts as in it.
    """

    region: ConvexSet
    tolerance: float = 1e-8
    is_set: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return x.new_tensor(0.0 if self.region.contains(x, self.tolerance) else math.inf)

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return self.region.project(point)

    def conjugate(self, u: Tensor) -> Tensor:
        """The support function `max <u, x>` over the set."""
        region = self.region
        if isinstance(region, Simplex):
            return region.total * u.amax(-1).sum()
        if isinstance(region, Ball):
            center = torch.as_tensor(region.center, dtype=u.dtype, device=u.device).expand_as(u)
            support: Tensor = (center * u).sum() + region.radius * torch.linalg.vector_norm(u)
            return support
        if isinstance(region, Box):
            lower, upper = region._bounds(u)
            highest = torch.where(u > 0, upper * u.clamp_min(0), 0.0) + torch.where(u < 0, lower * u.clamp_max(0), 0.0)
            return highest.sum()
        raise NotImplementedError(f"the support function of {type(region).__name__} is not known")


@dataclass(frozen=True, eq=False)
class Scaled(Penalty):
    """`weight h(x) + ridge/2 ||x||^2`: a penalty with its weight, and what squared norms beside it add.

    prox(p, t) = prox of h at `p / (1 + t ridge)` with step `t weight / (1 + t ridge)`

    Args:
        penalty: h, or None for the squared norm alone.
        weight: of h, >= 0.
        ridge: of the squared norm, >= 0.
    """

    penalty: Penalty | None
    weight: float = 1.0
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.ridge >= 0):
            raise InputError(
                f"A penalty's weight must not be negative, and it is {min(self.weight, self.ridge)}: the sum has no bound."
            )

    @property
    def is_separable(self) -> bool:
        return self.penalty is None or self.penalty.separable

    @property
    def is_convex(self) -> bool:
        return self.penalty is None or self.penalty.convex or self.weight == 0

    def value(self, x: Tensor) -> Tensor:
        squared = 0.5 * self.ridge * x.square().sum()
        return squared if self.penalty is None or self.weight == 0 else self.weight * self.penalty.value(x) + squared

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        shrunk = point / (1.0 + step * self.ridge)
        if self.penalty is None or self.weight == 0:
            return shrunk
        return self.penalty.prox(shrunk, step * self.weight / (1.0 + step * self.ridge))

    def distance(self, x: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
        slope = gradient + weight * self.ridge * x
        if self.penalty is None or self.weight == 0:
            return slope.abs()
        return self.penalty.distance(x, slope, weight * self.weight)

    @property
    def has_distance(self) -> bool:
        """Whether the subdifferential is known in closed form."""
        return self.penalty is None or self.weight == 0 or type(self.penalty).distance is not Penalty.distance

    def conjugate(self, u: Tensor) -> Tensor:
        """With a ridge the maximiser is a proximal map, so the value is exact and finite; without, that of the penalty."""
        if self.ridge > 0:
            x = self._maximiser(u)
            return (u * x).sum() - self.value(x)
        if self.penalty is None or self.weight == 0:
            return u.new_tensor(0.0 if float(u.abs().max()) == 0 else math.inf)
        return self.weight * self.penalty.conjugate(u / self.weight)

    def _maximiser(self, u: Tensor) -> Tensor:
        if self.penalty is None or self.weight == 0:
            return u / self.ridge
        return self.penalty.prox(u / self.ridge, self.weight / self.ridge)

    def feasible_share(self, u: Tensor) -> float:
        """Return the largest share of `u`, at most 1, whose conjugate is finite (0 where only `0` is, or none can be found)."""
        if self.ridge > 0:
            return 1.0
        if self.penalty is None or self.weight == 0:
            return 1.0 if float(u.abs().max()) == 0 else 0.0
        if self.penalty.norm:
            size = float(self.penalty.polar(u)) / self.weight
            return 1.0 if size <= 1.0 else (1.0 / size if math.isfinite(size) else 0.0)
        return 1.0

    def active(self, x: Tensor) -> Tensor:
        return x != 0 if self.penalty is None else self.penalty.active(x)
