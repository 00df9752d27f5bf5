"""How far outputs are from those at which the oracle was asked: the divergences of target-space surrogates.

    euclidean   1/2 |f - z|^2
    newton      1/2 (f - z)' (H + 1e-5 I) (f - z),   H the Hessian of a row's loss in its output
    kl          sum_c f_c log(f_c / z_c) - f_c + z_c,   f and z distributions (a policy's probabilities)
    softmax     KL(softmax(z) || softmax(f)) = lse(f) - lse(z) - <softmax(z), f - z>,   f and z logits

`softmax` is the Bregman divergence of the log-sum-exp, and a cross-entropy is the log-sum-exp less something linear: at eta = 1 its
surrogate is the cross-entropy itself. `kl` turns a step into a multiplicative one, `p <- p exp(-eta g)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError, nearest
from poise.solvers.target_split import Split

__all__ = ["DIVERGENCES", "Divergence", "Eta", "divergence_at"]

Eta = float | list[Tensor]
"""A step in the space of outputs: one number, or one for every output."""
DIVERGENCES = ("euclidean", "newton", "kl", "softmax")
DAMPING = 1e-5
"""Added to a Hessian's diagonal, as the authors do."""


class Divergence(Protocol):
    """A divergence from fixed outputs `z`; parts are micro-batches."""

    name: str

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        """Return `sum over rows D(f, z) / eta`."""
        ...

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        """Return where `<g, f - z> + D(f, z) / eta` is least over all outputs: the step in the space of the outputs."""
        ...


class Euclidean:
    name = "euclidean"

    def __init__(self, z: list[Tensor]) -> None:
        self.z = z

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        if isinstance(eta, float):
            return sum((0.5 / eta * (a - b).square().sum() for a, b in zip(f, self.z, strict=True)), torch.zeros(()))
        return sum(
            (0.5 * ((a - b).square() / e).sum() for a, b, e in zip(f, self.z, eta, strict=True)), torch.zeros(())
        )

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        return [z - eta * part for z, part in zip(self.z, g, strict=True)]


class Newton:
    """The loss's own curvature; where it bends down it counts as flat."""

    name = "newton"

    def __init__(self, z: list[Tensor], hessian: list[Tensor]) -> None:
        self.z = z
        self.h = []
        for block in hessian:
            values, vectors = torch.linalg.eigh((block + block.mT) / 2)
            values = values.clamp(min=0) + DAMPING
            self.h.append((vectors * values[:, None, :]) @ vectors.mT)

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        total = torch.zeros(())
        for a, b, h in zip(f, self.z, self.h, strict=True):
            d = (a - b).reshape(len(h), -1, 1)
            total = total + 0.5 * (d * (h @ d)).sum()
        return total / _number(eta, self.name)

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        steps = [torch.linalg.solve(h, part.reshape(len(h), -1, 1)) for h, part in zip(self.h, g, strict=True)]
        return [z - eta * s.reshape(z.shape) for z, s in zip(self.z, steps, strict=True)]


class KL:
    """Generalised Kullback-Leibler divergence of distributions, the Bregman divergence of the negative entropy.

    Raises:
        InputError: outputs are no distributions.
    """

    name = "kl"

    def __init__(self, z: list[Tensor]) -> None:
        for part in z:
            self._check(part)
        self.z = z

    @staticmethod
    def _check(z: Tensor) -> None:
        off = (z.sum(-1) - 1).abs().max() if z.ndim > 1 else z.new_tensor(1.0)
        least = float(z.min())
        if z.ndim < 2 or least < 0 or float(off) > 1e-3:
            raise InputError(
                "target_surrogate: divergence='kl' needs outputs that are distributions, [rows, classes] with entries >= 0 and sum 1; "
                f"these are {list(z.shape)}, the least entry is {least:.3g} and a sum is off by {float(off):.3g}. End the model with a "
                "softmax, or use divergence='softmax' for logits."
            )

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        total = torch.zeros(())
        for a, z in zip(f, self.z, strict=True):
            tiny = torch.finfo(a.dtype).tiny
            total = total + (torch.xlogy(a, a) - a * z.clamp(min=tiny).log() - a + z).sum()
        return total / _number(eta, self.name)

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        found = []
        for z, part in zip(self.z, g, strict=True):
            found.append((z.clamp(min=torch.finfo(z.dtype).tiny).log() - eta * part).softmax(-1))
        return found


class Softmax:
    name = "softmax"

    def __init__(self, z: list[Tensor]) -> None:
        if any(part.ndim < 2 for part in z):
            raise InputError(
                "target_surrogate: divergence='softmax' needs logits [rows, classes], and the outputs are one number a row."
            )
        self.z, self.p = z, [part.softmax(-1) for part in z]

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        total = torch.zeros(())
        for a, z, p in zip(f, self.z, self.p, strict=True):
            total = total + (a.logsumexp(-1) - z.logsumexp(-1)).sum() - (p * (a - z)).sum()
        return total / _number(eta, self.name)

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        raise _no_search(self.name)


class Custom:
    """A divergence that the user wrote: `(f, z) -> one value a row`."""

    name = "custom"

    def __init__(self, z: list[Tensor], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.z, self.function = z, function

    def value(self, f: list[Tensor], eta: Eta) -> Tensor:
        total = sum((self.function(a, z).sum() for a, z in zip(f, self.z, strict=True)), torch.zeros(()))
        return total / _number(eta, self.name)

    def move(self, g: list[Tensor], eta: float) -> list[Tensor]:
        raise _no_search(self.name)


def divergence_at(which: str | Callable[[Tensor, Tensor], Tensor], z: list[Tensor], split: Split) -> Divergence:
    """Return a divergence from the outputs `z`.

    Raises:
        InputError: it is not known, or the outputs do not fit.
    """
    if not isinstance(which, str):
        return Custom(z, which)
    if which == "euclidean":
        return Euclidean(z)
    if which == "newton":
        return Newton(z, split.target_hessian(z))
    if which == "kl":
        return KL(z)
    if which == "softmax":
        return Softmax(z)
    raise InputError(
        f"target_surrogate: there is no divergence {which!r}."
        + (
            nearest(which, DIVERGENCES)
            or f" There are: {', '.join(DIVERGENCES)}; or a function (f, z) -> one value a row."
        )
    )


def _number(eta: Eta, name: str) -> float:
    if isinstance(eta, float):
        return eta
    raise IncompatibleError(
        f"target_surrogate: a step for every output (eta='adagrad', 'adam') goes with divergence='euclidean', and it is {name!r}."
    )


def _no_search(name: str) -> IncompatibleError:
    return IncompatibleError(
        f"target_surrogate: divergence={name!r} has no step in the space of outputs to search along. Give eta a number."
    )
