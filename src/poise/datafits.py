"""How far predictions are from targets, as solvers with structure need it: value, slope, curvature, conjugate.

Each is a function of one example's prediction z (a number, or `[outputs]`), convex and smooth:

    value(z, y)        f(z; y)                                       [n]
    gradient(z, y)     df/dz                                         [n] or [n, outputs]
    curvature(z, y)    a bound on d^2 f / dz^2 at z, by outputs      [n] or [n, outputs]
    conjugate(v, y)    max over z of <v, z> - f(z; y)                [n], infinite outside its domain
    smoothness         sup of the largest eigenvalue of the Hessian
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from poise.errors import InputError


class Datafit:
    """A convex, smooth function of one prediction.

    Class attributes:
        name: in words.
        smoothness: of the gradient.
    """

    name: ClassVar[str] = ""
    smoothness: ClassVar[float] = 1.0

    def check(self, y: Tensor) -> Tensor:
        """Return the targets as this fit reads them.

        Raises:
            InputError: they are not what it reads.
        """
        if not y.is_floating_point():
            y = y.to(torch.get_default_dtype())
        if not bool(torch.isfinite(y).all()):
            raise InputError(
                f"{self.name}: {int((~torch.isfinite(y)).sum())} targets are not finite. Remove or impute these rows."
            )
        return y

    def outputs(self, y: Tensor) -> int | None:
        """Return how many predictions an example has; None for one number."""
        return None if y.ndim == 1 else y.shape[1]

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError

    def conjugate(self, v: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


def _sum(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.sum(1)


@dataclass(frozen=True)
class LeastSquares(Datafit):
    """`1/2 ||z - y||^2`."""

    name: ClassVar[str] = "least_squares"

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return 0.5 * _sum((z - y).square())

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(z)

    def conjugate(self, v: Tensor, y: Tensor) -> Tensor:
        return _sum(0.5 * v.square() + v * y)


@dataclass(frozen=True)
class Huber(Datafit):
    """`e^2/2` where `|e| <= delta`, else `delta (|e| - delta/2)`, `e = z - y`, summed over outputs.

    Args:
        delta: where it turns straight, > 0.

    Source: Huber (1964).
    """

    delta: float = 1.0
    name: ClassVar[str] = "huber"

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return _sum(F.huber_loss(z, y, reduction="none", delta=self.delta))

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).clamp(-self.delta, self.delta)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y).abs() <= self.delta).to(z.dtype)

    def conjugate(self, v: Tensor, y: Tensor) -> Tensor:
        inside = v.abs() <= self.delta * (1 + 8 * torch.finfo(v.dtype).eps)
        return _sum(torch.where(inside, 0.5 * v.square() + v * y, math.inf))


@dataclass(frozen=True)
class Logistic(Datafit):
    """`log(1 + e^z) - y z`, y in {0, 1}: the cross-entropy of two classes with one logit, in nats."""

    name: ClassVar[str] = "logistic"
    smoothness: ClassVar[float] = 0.25

    def check(self, y: Tensor) -> Tensor:
        y = super().check(y)
        found = torch.unique(y).tolist()
        if not set(found) <= {0.0, 1.0}:
            raise InputError(f"logistic: classes are 0 and 1, and the targets hold {found[:5]}.")
        if len(found) < 2:
            raise InputError(
                "logistic: all examples are of one class, so the intercept has no bound. Two classes are needed."
            )
        return y

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return F.softplus(z) - y * z

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) - y

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        p = torch.sigmoid(z)
        return p * (1 - p)

    def conjugate(self, v: Tensor, y: Tensor) -> Tensor:
        p = v + y
        rounding = 1e-12 if v.dtype == torch.float64 else 1e-6
        inside = (p >= -rounding) & (p <= 1 + rounding)
        p = p.clamp(0, 1)
        return torch.where(inside, torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p), math.inf)


@dataclass(frozen=True)
class Multinomial(Datafit):
    """`logsumexp(z) - z_y`: cross-entropy of the softmax with class indices, in nats."""

    classes: int
    name: ClassVar[str] = "cross_entropy"
    smoothness: ClassVar[float] = 0.5

    def check(self, y: Tensor) -> Tensor:
        if y.is_floating_point() and bool((y != y.round()).any()):
            raise InputError("cross_entropy: targets are class indices, and some are not whole numbers.")
        y = y.long()
        if bool((y < 0).any()) or bool((y >= self.classes).any()):
            raise InputError(
                f"cross_entropy: class indices run from 0 to {self.classes - 1}, and they reach from {y.min()} to {y.max()}."
            )
        return y

    def outputs(self, y: Tensor) -> int | None:
        return self.classes

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none")

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        return z.softmax(1) - F.one_hot(y, self.classes).to(z)

    def curvature(self, z: Tensor, y: Tensor) -> Tensor:
        p = z.softmax(1)
        return p * (1 - p)

    def conjugate(self, v: Tensor, y: Tensor) -> Tensor:
        p = v + F.one_hot(y, self.classes).to(v)
        rounding = 1e-9 if v.dtype == torch.float64 else 1e-5
        inside = (p >= -1e-3 * rounding).all(1) & ((p.sum(1) - 1).abs() <= rounding)
        p = p.clamp_min(0)
        return torch.where(inside, torch.special.xlogy(p, p).sum(1), math.inf)
