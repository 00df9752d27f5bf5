"""What a layer of an unfolded solver does after its gradient step: thresholds of real and complex signals, row by row.

    soft(u, t) = u max(1 - t / |u|, 0)          L1:   prox of t |.|
    hard(u, t) = u 1{|u| > sqrt(2 t)}           L0:   prox of t |.|_0
    keep(u)    = u on its k largest entries     TopK: projection onto k-sparse signals

The derivative of a hard threshold in its level is 0 almost everywhere, and so is that of the number of nonzeros: an unfolded IHT learns
through its gradient steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.operators import Box, Simplex, largest, require_count
from poise.penalties import L0, L1, Indicator, Penalty, SparseSimplex

__all__ = ["TopK", "charge_by_row", "hard_threshold", "prox_by_row", "shrink"]

Prox = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TopK(Penalty):
    """The indicator of signals with at most `k` entries that are not 0; its proximal map keeps the k largest of every row.

    Args:
        k: most entries, at least 1. Among equals the first are kept.

    >>> TopK(1).prox(torch.tensor([1.0, -3.0, 2.0]))
    tensor([ 0., -3.,  0.])
    """

    k: int
    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count("TopK", self.k)

    def value(self, x: Tensor) -> Tensor:
        most = (x != 0).sum(-1).max()
        return torch.where(most > self.k, torch.inf, 0.0).to(x.real.dtype)

    def prox(self, point: Tensor, step: float | Tensor = 1.0) -> Tensor:
        return torch.where(largest(point.detach().abs(), self.k), point, 0.0)


def shrink(point: Tensor, level: Tensor) -> Tensor:
    """Move every entry towards 0 by `level`, and not beyond; of complex entries the modulus.

    >>> shrink(torch.tensor([3.0 + 4.0j]), torch.tensor(1.0))
    tensor([2.4000+3.2000j])
    """
    if not point.is_complex():
        return point - torch.clamp(point, -level, level)
    size = point.abs()
    # where() keeps the slope of 1/|u| away from 0
    kept = 1 - level / torch.where(size > 0, size, 1.0)
    return torch.where(size > level, kept, 0.0) * point


def hard_threshold(point: Tensor, level: Tensor, temperature: float | None = None) -> Tensor:
    """Keep the entries larger than `level`.

    Args:
        point: float or complex.
        level: where it cuts, >= 0.
        temperature: None for the derivative that holds almost everywhere, `1{|u| > level}` in u and 0 in the level. A number > 0 lends
            the backward pass that of `u sigmoid((|u| - level) / temperature)`: straight through, for study.
    """
    kept = torch.where(point.abs() > level, point, 0.0)
    if temperature is None:
        return kept
    smooth = point * torch.sigmoid((point.abs() - level) / temperature)
    return smooth + (kept - smooth).detach()


def prox_by_row(penalty: Any, temperature: float | None = None) -> Prox:
    """Return `prox(point [batch, n], step)`, every row by itself; `step` is 0-dim or `[batch, 1]` and contains the weight."""
    if isinstance(penalty, L1) and penalty.scales is None:
        return shrink
    # named functions, as a model that is pickled holds this map
    if isinstance(penalty, L0):
        return partial(_hard, temperature=temperature)
    if _rows_are_apart(penalty):
        prox: Prox = penalty.prox
        return prox
    return partial(_each_row, penalty.prox)


def _hard(point: Tensor, step: Tensor, temperature: float | None) -> Tensor:
    return hard_threshold(point, (2 * step).sqrt(), temperature)


def charge_by_row(penalty: Any, x: Tensor) -> Tensor:
    """Return h of every row, `[batch]`."""
    if isinstance(penalty, L1) and penalty.scales is None:
        return x.abs().sum(-1)
    if isinstance(penalty, L0):
        return (x != 0).sum(-1).to(x.real.dtype)
    if isinstance(penalty, TopK):
        return torch.where((x != 0).sum(-1) > penalty.k, torch.inf, 0.0).to(x.real.dtype)
    return _each_row(penalty.value, x)


def _rows_are_apart(penalty: Any) -> bool:
    if isinstance(penalty, Indicator):
        return _rows_are_apart(penalty.region)
    entries = getattr(penalty, "separable", False) or getattr(penalty, "is_separable", False)
    return bool(entries) or isinstance(penalty, Box | Simplex | SparseSimplex | TopK)


def _each_row(function: Callable[..., Tensor], point: Tensor, *steps: Tensor) -> Tensor:
    """Apply a function of one signal to every row: at once where it allows that, else one after the other."""
    wide = [step.reshape(-1).expand(len(point)) for step in steps]
    try:
        return torch.func.vmap(function)(point, *wide)
    except (RuntimeError, ValueError):  # it looks at values, as a loop that stops at a tolerance does
        return torch.stack([function(*row) for row in zip(point, *wide, strict=True)])


def require_gradient(penalty: Any, point: Tensor, result: Tensor) -> None:
    """Refuse to train through a proximal map that stops gradients.

    Raises:
        InputError: the point has a gradient and the result has none.
    """
    if point.requires_grad and not result.requires_grad:
        raise InputError(
            f"unfolded: the proximal map of {type(penalty).__name__} passes no gradient on, so its steps cannot be learned. Run it under "
            "torch.no_grad(), or unfold L1, L0, ElasticNet, GroupLasso, MCP, SCAD or CappedL1."
        )
