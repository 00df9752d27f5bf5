"""How long a proximal or coordinate method needs until the zeros of its iterates are those of the solution.

    delta = min over entries at a kink or bound of  dist(-grad_i f(x*), border of dh_i(x*_i))       l1: lambda - |grad_i f(x*)|

An entry at a kink stays where the solution has it once `||x - x*|| <= delta / (2 L)`: its step with a constant of at most L then lands
on the kink. With a linear rate `||x_k - x*|| <= (1 - 1/kappa)^k ||x_0 - x*||` this takes at most `kappa log(2 L ||x_0 - x*|| / delta)`
steps; methods that move blocks need as many more as it takes to visit every coordinate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError
from poise.solvers.coordinate_losses import CoordinateSmooth
from poise.solvers.coordinate_penalty import BoundedElasticNet, charge_of

__all__ = ["ActiveSetReport", "active_set_complexity"]


@dataclass(frozen=True)
class ActiveSetReport:
    """What is known about the identification of a solution's zeros.

    Attributes:
        delta: the nondegeneracy; 0 where the solution is degenerate and nothing is promised.
        weakest: the entry where it is attained, or None where no entry stands at a kink.
        support: entries that stand at no kink and no bound, int64.
        radius: `delta / (2 L)`: within this distance of the solution its zeros are found by one step.
        predicted: whole-vector proximal steps with 1 / L until they must be found, from `x0`; infinite where delta is 0.
        random: blocks of a uniform random rule until then, on average, from the bound `(1 - mu / (N L_b))^k` on the objective.
        visits: blocks until every coordinate was visited since: one pass of a cyclic rule, and a random rule's with probability 0.99.
        observed: the iteration after which a run's support did not change, where a run was given.
    """

    delta: float
    weakest: int | None
    support: Tensor
    radius: float
    predicted: float
    random: float
    visits: tuple[int, int]
    observed: int | None = None

    def __str__(self) -> str:
        seen = "" if self.observed is None else f"; observed: {self.observed}"
        where = "nowhere at a kink" if self.weakest is None else f"delta = {self.delta:.3g} at entry {self.weakest}"
        return f"{len(self.support)} free entries, {where}; found within {self.predicted:,.0f} proximal steps{seen}"


def active_set_complexity(
    smooth: CoordinateSmooth,
    penalty: Any,
    x_star: Tensor,
    L: float | None = None,
    mu: float = 0.0,
    *,
    x0: Tensor | None = None,
    block_size: int = 1,
    result: Any = None,
) -> ActiveSetReport:
    """Predict when the zeros of a solution are found, and compare with a run.

    Args:
        smooth: f.
        penalty: l1, l2, bounds or a sum of them.
        x_star: [size], the solution, exact to well below delta / L.
        L: of the gradient of f; computed where it is None.
        mu: strong convexity of f + h; 0 for none, and then no number of steps is promised.
        x0: [size], where the method began; 0 where it is None.
        block_size: coordinates of a block.
        result: a `CoordinateResult` whose observed identification is reported beside.

    Raises:
        IncompatibleError: the penalty's kinks are not known.
        InputError: x_star is no solution, or constants are out of range.

    >>> from poise.solvers import LinearModel
    >>> model = LinearModel(torch.eye(2, dtype=torch.float64), torch.tensor([3.0, 0.4]))
    >>> report = active_set_complexity(model, BoundedElasticNet(l1=1.0), torch.tensor([2.0, 0.0]), L=1.0, mu=1.0)
    >>> round(report.delta, 6), report.weakest, report.predicted
    (0.6, 1, 2.0)

    Source: arXiv:1712.08859, section 6, and arXiv:1712.03577. The random rule's term is the coupon collector's bound.
    """
    lipschitz = smooth.lipschitz
    h = charge_of(penalty, lipschitz).exact
    if h is None:
        raise IncompatibleError(
            f"active_set_complexity: kinks are known for l1, l2 and bounds, not for {type(penalty).__name__}."
        )
    L = 1.001 * smooth.largest if L is None else L
    if not (L > 0 and 0 <= mu <= L * (1 + 1e-9)):
        raise InputError(
            f"active_set_complexity: constants must satisfy 0 <= mu <= L and L > 0, but L = {L} and mu = {mu}."
        )
    x_star = x_star.to(lipschitz)
    gradient = smooth.at(x_star).gradient
    delta, weakest, kinked = _nondegeneracy(h, x_star, gradient, smooth.at(torch.zeros_like(x_star)).gradient)
    start = torch.zeros_like(x_star) if x0 is None else x0.to(lipschitz)
    distance = float((start - x_star).norm())
    predicted = _steps(L / mu if mu > 0 else math.inf, 2 * L * distance, delta)
    passes = math.ceil(smooth.size / block_size)
    block_constant = min(L, block_size * float(lipschitz.max()))
    drop = smooth.at(start).value() - smooth.at(x_star).value() + float(h.value(start) - h.value(x_star))
    # half the squared distance, times mu, is at most the gap of the objective
    reach = 2 * L * math.sqrt(2 * max(drop, 0.0) / mu) if mu > 0 else math.inf
    blocks = _steps(2 * passes * block_constant / mu if mu > 0 else math.inf, reach, delta)
    log_miss = math.log1p(-1.0 / passes) if passes > 1 else -math.inf
    visits = math.ceil(math.log(0.01 / passes) / log_miss) if passes > 1 else 1
    return ActiveSetReport(
        delta=delta,
        weakest=weakest,
        support=(~kinked).nonzero()[:, 0],
        radius=delta / (2 * L) if weakest is not None else math.inf,
        predicted=predicted,
        random=blocks + visits if blocks > 0 else 0.0,
        visits=(passes, visits),
        observed=None if result is None else int(result.identified),
    )


def _nondegeneracy(
    h: BoundedElasticNet, x: Tensor, gradient: Tensor, at_zero: Tensor
) -> tuple[float, int | None, Tensor]:
    """Return delta, where it is attained, and which entries stand at a kink or a bound."""
    off = float(h.distance(x, gradient).max())
    size = max(float(gradient.abs().max()), float(at_zero.abs().max()))
    if off > 1e-6 * size:
        raise InputError(
            f"active_set_complexity: x_star is no solution: its least subgradient has an entry of {off:.3g}, and gradients have entries of "
            f"{size:.3g}. Solve to a smaller tolerance."
        )
    low, high = h.slopes(x)
    kinked = low < high
    if not bool(kinked.any()):
        return math.inf, None, kinked
    room = torch.where(kinked, torch.minimum(-gradient - low, high + gradient).clamp_min(0.0), math.inf)
    return float(room.min()), int(room.argmin()), kinked


def _steps(condition: float, reach: float, delta: float) -> float:
    """Return `condition log(reach / delta)`, 0 where the start is near enough."""
    if delta == math.inf or reach <= delta:
        return 0.0
    if delta <= 0 or condition == math.inf:
        return math.inf
    return float(math.ceil(condition * math.log(reach / delta)))
