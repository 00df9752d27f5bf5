"""Single loops with second derivatives: one step of everything, each iteration.

    SOBA     x, q and theta step together, all at the present point; a moving average of the upper direction is MA-SOBA
    TTSA     x steps, then theta by a much smaller step against a randomly truncated Neumann series: two time scales

Source: arXiv:2201.13409 (SOBA), arXiv:2306.12067 (MA-SOBA), arXiv:2007.05170 (TTSA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quantities import derive
from poise.weights.bilevel.levels import Levels, Tensors, norm, shifted
from poise.weights.bilevel.method import BilevelMethod, Outer, rate_at, turn, zeros_like
from poise.weights.bilevel.projected import project

Rate = float | Callable[[int], float]


class SOBA(BilevelMethod):
    """x, the linear system q and theta step at once.

        x <- x - inner_lr lower'(x),   q <- q - system_lr (H q - d upper/dx),   m <- momentum m + (1 - momentum) (d upper/d theta - J' q)
        theta <- theta - lr m

    Args:
        levels, x, theta, and the sets: see `BilevelMethod`.
        lr, inner_lr, system_lr: steps; or functions of the outer step.
        momentum: 0 is SOBA, larger is MA-SOBA.
        sequential: whether each step sees the result of the one before, x then q then theta, instead of the old point.
    """

    moving: ClassVar[tuple[str, ...]] = ("x", "theta", "q", "m")

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: Rate,
        inner_lr: Rate,
        system_lr: Rate,
        momentum: float = 0.0,
        sequential: bool = False,
        **sets: Any,
    ) -> None:
        super().__init__(levels, x, theta, **sets)
        _check_rates(type(self).__name__, lr=lr, inner_lr=inner_lr, system_lr=system_lr)
        if not 0 <= momentum < 1:
            raise InputError(f"SOBA: momentum lies in [0, 1), and it is {momentum}.")
        self.lr, self.inner_lr, self.system_lr = lr, inner_lr, system_lr
        self.momentum, self.sequential = momentum, sequential
        self.q: Tensors = zeros_like(self.x)
        self.m: Tensors = zeros_like(self.theta)

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        batch, inner_lr = turn(lower_batch, 0), rate_at(self.inner_lr, self.steps)
        if self.sequential:
            gradient = self.levels.lower_gradient(self.x, self.theta, batch)
            self.x = project(self.lower_sets, shifted(self.x, -inner_lr, gradient))
        second = self.levels.linearise(self.x, self.theta, batch)
        upper, b, direct = self.levels.upper_gradients(self.x, self.theta, upper_batch)
        residual = shifted(second.hessian_product(self.q), -1.0, b)
        q = shifted(self.q, -rate_at(self.system_lr, self.steps), residual)
        h = shifted(direct, -1.0, second.mixed_product(q if self.sequential else self.q))
        if not self.sequential:
            self.x = project(self.lower_sets, shifted(self.x, -inner_lr, second.gradient))
        self.q = q
        self.m = shifted(tuple(self.momentum * t for t in self.m), 1 - self.momentum, h)
        self.theta = project(self.upper_sets, shifted(self.theta, -rate_at(self.lr, self.steps), self.m))
        return Outer(upper, norm(h), residual=norm(residual))


class TTSA(BilevelMethod):
    """Two-timescale stochastic approximation: one lower step, then an upper step with a randomly truncated Neumann series.

        q = terms * system_lr * (I - system_lr H)^p d upper/dx,    p uniform in {0, ..., terms - 1}

    which is, in expectation, the first `terms` terms of the series.

    Args:
        levels, x, theta, and the sets: see `BilevelMethod`.
        lr: of theta, much smaller than inner_lr; or a function of the step, falling faster than that of inner_lr.
        inner_lr: of x.
        system_lr: of the series.
        terms: the largest number of them.
        seed: p of a step is derived from it and the step.
    """

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        lr: Rate,
        inner_lr: Rate,
        system_lr: float = 1e-2,
        terms: int = 5,
        seed: int = 0,
        **sets: Any,
    ) -> None:
        super().__init__(levels, x, theta, **sets)
        _check_rates(type(self).__name__, lr=lr, inner_lr=inner_lr, system_lr=system_lr, terms=terms)
        self.lr, self.inner_lr, self.system_lr, self.terms, self.seed = lr, inner_lr, system_lr, terms, seed

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        gradient = self.levels.lower_gradient(self.x, self.theta, turn(lower_batch, 0))
        self.x = project(self.lower_sets, shifted(self.x, -rate_at(self.inner_lr, self.steps), gradient))
        second = self.levels.linearise(self.x, self.theta, turn(lower_batch, -1))
        upper, q, direct = self.levels.upper_gradients(self.x, self.theta, upper_batch)
        generator = torch.Generator().manual_seed(derive(self.seed, "terms", self.steps))
        for _ in range(int(torch.randint(self.terms, (), generator=generator))):
            q = shifted(q, -self.system_lr, second.hessian_product(q))
        q = tuple(self.terms * self.system_lr * t for t in q)
        h = shifted(direct, -1.0, second.mixed_product(q))
        self.theta = project(self.upper_sets, shifted(self.theta, -rate_at(self.lr, self.steps), h))
        return Outer(upper, norm(h))


def _check_rates(own: str, **rates: Any) -> None:
    for name, value in rates.items():
        if not callable(value) and not value > 0:
            raise InputError(f"{own}: {name} must be positive, and it is {value}.")
