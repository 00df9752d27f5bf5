"""The first-order rivals of the penalty method: no second derivative in any of them.

F2SA     the double loop with step sizes that fall at their own rates, and 1/sigma that rises slowly     (arXiv:2301.10945)
VPBGD    upper + gamma (lower - min lower), gamma fixed, x and theta stepping together                    (arXiv:2302.05185)
BOME     the weight of (lower - min lower) chosen at each step so that the gap falls                      (arXiv:2209.08709)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.bilevel.levels import Levels, Tensors, dot, norm, shifted
from poise.weights.bilevel.method import BilevelMethod, Outer, turn
from poise.weights.bilevel.penalty import PenaltyBilevel
from poise.weights.bilevel.projected import project
from poise.weights.bilevel.sigma import PowerSigma


class F2SA(PenaltyBilevel):
    """Fully first-order stochastic approximation: `PenaltyBilevel` with the schedules of its authors.

        1/sigma_{k+1} = 1/sigma_k + rate (k + 1)^(-6/7)      so that 1/sigma grows like k^(1/7), as fast as the steps of z and x part
        steps:  x  inner_lr (1 + k)^(-5/7),    z  inner_lr (1 + k)^(-4/7),    theta  lr (1 + k)^(-4/7)

    where the step of x is on `upper + lower / sigma`.

    Args:
        rate: of the rise of 1/sigma, from 1.
        options: as for `PenaltyBilevel`.
    """

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: float = 0.01,
        inner_lr: float = 0.01,
        rate: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(
            levels, x, theta, lr=lr, inner_lr=inner_lr, sigma=PowerSigma(rate=rate, exponent=6 / 7), **options
        )

    def step_size(self, variable: Literal["theta", "x", "z"]) -> float:
        exponent = 5 / 7 if variable == "x" else 4 / 7
        base = self.lr if variable == "theta" else self.inner_lr
        # x moves by step * (upper' + lower' / sigma); `_move` multiplies by (sigma upper' + lower') / (1 + sigma).
        factor = (1 + self.sigma) / self.sigma if variable == "x" else 1.0
        return float(base * factor * (1 + self.steps) ** -exponent)


class _Gap(BilevelMethod):
    """What both gap methods share: z, `inner_steps` gradient steps on the lower objective from where it (or x) stands."""

    moving: ClassVar[tuple[str, ...]] = ("x", "theta", "z")

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: float,
        inner_lr: float,
        inner_steps: int = 10,
        **sets: Any,
    ) -> None:
        super().__init__(levels, x, theta, **sets)
        for name, value in (("lr", lr), ("inner_lr", inner_lr), ("inner_steps", inner_steps)):
            if not value > 0:
                raise InputError(f"{type(self).__name__}: {name} must be positive, and it is {value}.")
        self.lr, self.inner_lr, self.inner_steps = lr, inner_lr, inner_steps
        self.z: Tensors = tuple(t.clone() for t in self.x)

    def _gap_gradients(self, start: Tensors, lower_batch: Any) -> tuple[Tensors, Tensors]:
        """Move z, and return the gradients of `lower(x) - lower(z)` in x and in theta, z held."""
        self.z = start
        for i in range(self.inner_steps):
            gradient = self.levels.lower_gradient(self.z, self.theta, turn(lower_batch, i))
            self.z = project(self.lower_sets, shifted(self.z, -self.inner_lr, gradient))
        batch = turn(lower_batch, -1)
        at_x = self.levels.lower_gradient_of_theta(self.x, self.theta, batch)
        at_z = self.levels.lower_gradient_of_theta(self.z, self.theta, batch)
        return self.levels.lower_gradient(self.x, self.theta, batch), shifted(at_x, -1.0, at_z)


class VPBGD(_Gap):
    """Value-function penalty: x and theta descend on `upper + gamma (lower(x) - lower(z))`.

    Args:
        gamma: the fixed weight of the gap, 1/sigma in the terms of `PenaltyBilevel`.
        x_lr: step of x on the penalised objective; lr where nothing is said.
        lr, inner_lr, inner_steps: of theta, of z, and its steps from where it stands.
    """

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        gamma: float,
        x_lr: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(levels, x, theta, **options)
        if not gamma > 0:
            raise InputError(f"VPBGD: gamma must be positive, and it is {gamma}.")
        self.gamma, self.x_lr = gamma, self.lr if x_lr is None else x_lr

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        gap_x, gap_theta = self._gap_gradients(self.z, lower_batch)
        upper, upper_x, direct = self.levels.upper_gradients(self.x, self.theta, upper_batch)
        gradient = shifted(direct, self.gamma, gap_theta)
        self.x = project(self.lower_sets, shifted(self.x, -self.x_lr, shifted(upper_x, self.gamma, gap_x)))
        self.theta = project(self.upper_sets, shifted(self.theta, -self.lr, gradient))
        return Outer(upper, norm(gradient), gap=self.gamma * norm(shifted(self.x, -1.0, self.z)))


class BOME(_Gap):
    """Bilevel optimisation made easy: the multiplier that makes the gap fall, at each step.

        (x, theta) <- (x, theta) - lr (upper' + lambda gap'),    lambda = max(0, (eta ||gap'||^2 - <upper', gap'>) / ||gap'||^2)

    Args:
        eta: how fast the gap has to fall.
        lr, inner_lr, inner_steps: of x and theta jointly, of z, and its steps from x.
    """

    def __init__(
        self, levels: Levels, x: Sequence[Tensor], theta: Sequence[Tensor], *, eta: float = 0.5, **options: Any
    ) -> None:
        super().__init__(levels, x, theta, **options)
        if not eta > 0:
            raise InputError(f"BOME: eta must be positive, and it is {eta}.")
        self.eta = eta

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        gap_x, gap_theta = self._gap_gradients(self.x, lower_batch)
        upper, upper_x, direct = self.levels.upper_gradients(self.x, self.theta, upper_batch)
        gap, both = (*gap_x, *gap_theta), (*upper_x, *direct)
        size = dot(gap, gap)
        weight = ((self.eta * size - dot(both, gap)) / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0.0)
        moved = shifted(both, weight, gap)
        n = len(self.x)
        self.x = project(self.lower_sets, shifted(self.x, -self.lr, moved[:n]))
        self.theta = project(self.upper_sets, shifted(self.theta, -self.lr, moved[n:]))
        return Outer(upper, norm(moved[n:]))
