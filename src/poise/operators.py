"""Small exact maps that terms, solvers and weights share: projections, thresholds, proximal maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError


def project_on_line(point: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Project a point onto the line through two others and return where on it the foot lies.

    `t = <point - start, end - start> / ||end - start||^2`, so that `start + t * (end - start)` is nearest to `point`;
    inner products run over all entries, in float64 where the device has it.

    Args:
        point, start, end: float tensors of one shape.

    Returns:
        `(t, coincide)`, both 0-dim: `t` is any real number, and 1 where `coincide` says that start and end are equal
        up to rounding, so that they define no line.

    >>> project_on_line(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 0.0]), torch.tensor([4.0, 0.0]))[0]
    tensor(0.2500, dtype=torch.float64)
    """
    rounding = 8.0 * torch.finfo(start.dtype).eps
    accumulate = start.dtype if start.device.type == "mps" else torch.float64
    point, start, end = point.to(accumulate), start.to(accumulate), end.to(accumulate)
    direction = end - start
    length = direction.square().sum()
    coincide = length.sqrt() <= rounding * (start.norm() + end.norm())
    share = ((point - start) * direction).sum() / torch.where(coincide, torch.ones_like(length), length)
    return torch.where(coincide, torch.ones_like(share), share), coincide


def rescaled(x: Tensor, mask: Tensor) -> Tensor:
    """Bring values to [0, 1] over the marked tokens of each row: (x - least) / (largest - least); 1 where all are equal.

    Args:
        x: float [..., time].
        mask: bool [..., time]; outside the result is 0.

    >>> rescaled(torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[True, True, True, False]]))
    tensor([[1.0000, 0.0000, 0.5000, 0.0000]])
    """
    least = torch.where(mask, x, torch.inf).amin(-1, keepdim=True)
    largest = torch.where(mask, x, -torch.inf).amax(-1, keepdim=True)
    span = largest - least
    flat = ~(span > 0)
    found = torch.where(flat, 1.0, (x - least) / torch.where(flat, 1.0, span))
    return torch.where(mask, found, 0.0)


# ---- closed convex sets -------------------------------------------------------------------------------------------------


class ConvexSet:
    """A closed convex set C of tensors, known by its projection.

        project(p) = argmin over c in C of ||c - p||      (the proximal map of the set's indicator, for every step)

    A set says three more things: whether a point belongs to it, how the projection changes along a direction, and which of
    its constraints hold with equality at a point, as a function of the point.
    """

    def project(self, point: Tensor) -> Tensor:
        """Return the nearest point of the set."""
        raise NotImplementedError(f"{type(self).__name__} must say how it projects")

    def derivative(self, point: Tensor, direction: Tensor) -> Tensor:
        """Return the directional derivative of the projection at a point where it is differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must say how its projection changes")

    def active(self, point: Tensor, tolerance: float = 1e-8) -> Callable[[Tensor], Tensor] | None:
        """Return `q(point) -> [m]`, the constraints that hold with equality there, or None where there is none."""
        raise NotImplementedError(f"{type(self).__name__} must say which of its constraints are active")

    def contains(self, point: Tensor, tolerance: float = 1e-8) -> bool:
        """Return whether a point is in the set, up to a distance."""
        return bool((self.project(point) - point).norm() <= tolerance)

    def value(self, point: Tensor) -> Tensor:
        """Return the indicator: 0 in the set, infinite outside; 0-dim."""
        return point.new_tensor(0.0 if self.contains(point) else torch.inf)

    def prox(self, point: Tensor, step: float = 1.0) -> Tensor:
        """Return the proximal map of the indicator: the projection, whatever the step."""
        return self.project(point)


@dataclass(frozen=True, eq=False)
class Box(ConvexSet):
    """Every entry in `[lower, upper]`; bounds are numbers or tensors that broadcast, and may be infinite.

    >>> Box(-1, 1).project(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """

    lower: float | Tensor = -torch.inf
    upper: float | Tensor = torch.inf

    def __post_init__(self) -> None:
        if not bool((torch.as_tensor(self.lower) <= torch.as_tensor(self.upper)).all()):
            raise InputError(f"Box: lower must not exceed upper, and the bounds are {self.lower} and {self.upper}.")

    def project(self, point: Tensor) -> Tensor:
        lower, upper = self._bounds(point)
        return torch.minimum(torch.maximum(point, lower), upper)

    def derivative(self, point: Tensor, direction: Tensor) -> Tensor:
        lower, upper = self._bounds(point)
        return torch.where((point > lower) & (point < upper), direction, 0.0)

    def active(self, point: Tensor, tolerance: float = 1e-8) -> Callable[[Tensor], Tensor] | None:
        lower, upper = (b.expand_as(point).flatten() for b in self._bounds(point))
        low, high = point.flatten() <= lower + tolerance, point.flatten() >= upper - tolerance
        high = high & ~low  # where both bounds coincide, one equation says it
        if not bool((low | high).any()):
            return None
        return lambda p: torch.cat([lower[low] - p.flatten()[low], p.flatten()[high] - upper[high]])

    def _bounds(self, point: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.as_tensor(b, dtype=point.dtype, device=point.device) for b in (self.lower, self.upper))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class NonNegative(Box):
    """No entry below 0.

    >>> NonNegative().project(torch.tensor([-3.0, 0.5]))
    tensor([0.0000, 0.5000])
    """

    lower: float | Tensor = 0.0


@dataclass(frozen=True, eq=False)
class Ball(ConvexSet):
    """All tensors within a Euclidean distance `radius` of `center`.

    >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """

    radius: float
    center: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not self.radius > 0:
            raise InputError(f"Ball: radius must be positive, and it is {self.radius}.")

    def project(self, point: Tensor) -> Tensor:
        away = point - self.center
        foot: Tensor = self.center + away * (self.radius / away.norm().clamp_min(self.radius))
        return foot

    def derivative(self, point: Tensor, direction: Tensor) -> Tensor:
        away = point - self.center
        length = away.norm()
        if length <= self.radius:
            return direction
        normal = away / length
        tangent: Tensor = direction - normal * (normal * direction).sum()
        moved: Tensor = tangent * (self.radius / length)
        return moved

    def active(self, point: Tensor, tolerance: float = 1e-8) -> Callable[[Tensor], Tensor] | None:
        if (point - self.center).norm() < self.radius - tolerance:
            return None
        return lambda p: (((p - self.center).square().sum() - self.radius**2) / 2)[None]


@dataclass(frozen=True, eq=False)
class Simplex(ConvexSet):
    """Rows (the last dimension) without negative entries that add up to `total`.

    project(p) = max(p - threshold, 0),   threshold such that the row adds up to `total`

    >>> Simplex().project(torch.tensor([1.0, 0.6, -2.0]))
    tensor([0.7000, 0.3000, 0.0000])

    Source: Held, Wolfe and Crowder (1974).
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        if not self.total > 0:
            raise InputError(f"Simplex: total must be positive, and it is {self.total}.")

    def project(self, point: Tensor) -> Tensor:
        falling = point.sort(-1, descending=True).values
        excess = falling.cumsum(-1) - self.total
        place = torch.arange(1, point.shape[-1] + 1, device=point.device)
        kept = (falling * place > excess).sum(-1, keepdim=True)
        threshold = excess.gather(-1, kept - 1) / kept
        return (point - threshold).clamp_min(0)

    def derivative(self, point: Tensor, direction: Tensor) -> Tensor:
        support = self.project(point) > 0
        inside = torch.where(support, direction, 0.0)
        return torch.where(support, inside - inside.sum(-1, keepdim=True) / support.sum(-1, keepdim=True), 0.0)

    def active(self, point: Tensor, tolerance: float = 1e-8) -> Callable[[Tensor], Tensor] | None:
        zero = point <= tolerance
        return lambda p: torch.cat([(p.sum(-1) - self.total).reshape(-1), -p[zero]])


# ---- at most k entries -----------------------------------------------------------------------------------------------


def largest(s: Tensor, k: int, dim: int = -1) -> Tensor:
    """Mark the k largest entries along a dimension; among equals the first ones, so that the choice is reproducible.

    Args:
        s: float [...].
        k: from 1; at least the length of the dimension marks everything.

    >>> largest(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)
    tensor([False,  True,  True, False])
    """
    if k >= s.shape[dim]:
        return torch.ones_like(s, dtype=torch.bool)
    return _first(s, s.topk(k, dim=dim).values.narrow(dim, k - 1, 1), k, dim)


def _first(s: Tensor, last: Tensor, k: int, dim: int) -> Tensor:
    """Mark the first k entries that are at least `last`, the k-th largest."""
    marked = s >= last
    if not bool((marked.sum(dim) > k).any()):
        return marked
    above, tied = s > last, s == last
    room = k - above.sum(dim, keepdim=True)
    return above | (tied & (tied.cumsum(dim) <= room))


def project_sparse_simplex(v: Tensor, k: int | None = None, total: float | Tensor = 1.0, dim: int = -1) -> Tensor:
    """Project onto the vectors of the simplex with at most k entries that are not 0.

        P_k(v) = argmin ||p - v||^2   subject to   p >= 0,  sum(p) = total,  ||p||_0 <= k
               = max(v - theta, 0) on the k largest entries of v, 0 elsewhere

    Exact, although the set is not convex. Differentiable: on its support S the Jacobian is `diag(1_S) - 1_S 1_S' / |S|`, and
    the derivative in `total` is `1_S / |S|`. Where the k-th and the next value are equal the first one is kept.

    Args:
        v: float [...]; -inf forbids an entry.
        k: most entries that may be positive; None for no limit.
        total: the sum, >= 0: a number, or a tensor of `v`'s shape without `dim`.
        dim: along which dimension.

    Raises:
        InputError: k is not an integer of at least 1, or total is negative.

    >>> project_sparse_simplex(torch.tensor([0.9, 0.8, 0.1, 0.7]), k=2)
    tensor([0.5500, 0.4500, 0.0000, 0.0000])

    Source: Kyrillidis et al., Sparse projections onto the simplex, ICML 2013.
    """
    count = v.shape[dim] if k is None else min(require_count("project_sparse_simplex", k), v.shape[dim])
    total = torch.as_tensor(total, dtype=v.dtype, device=v.device)
    if bool((total < 0).any()):
        raise InputError(
            f"project_sparse_simplex: total must not be negative, and its least is {total.min().item():g}."
        )
    if total.dim():
        total = total.unsqueeze(dim)
    with torch.no_grad():
        falling = v.topk(count, dim=dim).values
        excess = falling.cumsum(dim) - total
        shape = [1] * v.dim()
        shape[dim] = count
        place = torch.arange(1, count + 1, device=v.device, dtype=v.dtype).reshape(shape)
        # falling * place > excess holds for the first entry alone where the total is 0, up to rounding
        kept = (falling * place > excess).sum(dim, keepdim=True).clamp_min(1)
        threshold = excess.gather(dim, kept - 1) / kept
        support = v > threshold
        if count < v.shape[dim]:
            support &= _first(v, falling.narrow(dim, count - 1, 1), count, dim)
        size = support.sum(dim, keepdim=True).clamp_min(1)
    inside = torch.where(support, v, 0.0)
    theta = (inside.sum(dim, keepdim=True) - total) / size
    return torch.where(support, (inside - theta).clamp_min(0.0), 0.0)


def topk_conjugate(s: Tensor, k: int | None = None, gamma: float = 1.0, dim: int = -1) -> Tensor:
    """Return the conjugate of a squared norm with at most k entries: `(1 / 2 gamma) sum over the k largest of max(s_i, 0)^2`.

        Omega*(s) = max <s, t> - (gamma/2) ||t||^2   subject to   t >= 0,  ||t||_0 <= k

    Convex in s although Omega is not. Its gradient is the maximiser, `max(s_i, 0) / gamma` on the k largest entries.

    Args:
        s: float [...].
        k: most entries of t that may be positive; None for no limit.
        gamma: strength, > 0.
        dim: along which dimension.

    Returns:
        float, the shape of `s` without `dim`.

    Raises:
        InputError: k is not an integer of at least 1, or gamma is not positive.

    >>> topk_conjugate(torch.tensor([2.0, 1.0, -1.0]), k=1)
    tensor(2.)

    Source: arXiv:2209.15466, section 3.
    """
    if not gamma > 0:
        raise InputError(f"topk_conjugate: gamma must be positive, and it is {gamma}.")
    positive = s.clamp_min(0.0)
    if k is not None:
        positive = torch.where(largest(s, require_count("topk_conjugate", k), dim), positive, 0.0)
    return positive.square().sum(dim) / (2.0 * gamma)


def require_count(name: str, k: object) -> int:
    """Return k where it is an integer of at least 1.

    Raises:
        InputError: it is not; the message begins with `name`.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"{name}: k counts entries, so it is an integer of at least 1 (or None), and it is {k!r}.")
    return k
