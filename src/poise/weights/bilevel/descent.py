"""Descent on a hypergradient: the double loops that everything newer is compared with.

    AIDCG     D lower steps, the linear system by N conjugate gradients from the last solution          (arXiv:2010.07962)
    StocBiO   D lower steps, the linear system by Q terms of the Neumann series                          (arXiv:2010.07962)
    ITD       D lower steps, differentiated through: unrolling                                           (arXiv:1703.01785)

They are one loop, and differ in how the hypergradient arises (`hypergradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from poise.errors import InputError
from poise.weights.bilevel.hypergradient import ImplicitHypergradient, UnrolledHypergradient
from poise.weights.bilevel.levels import Levels, norm, shifted
from poise.weights.bilevel.method import BilevelMethod, Outer, rate_at, turn
from poise.weights.bilevel.projected import project


class HypergradientDescent(BilevelMethod):
    """`inner_steps` gradient steps below, one step of theta against an implicit hypergradient above.

    Args:
        levels, x, theta, and the sets: see `BilevelMethod`.
        hypergradient: how it arises, with its own warm start.
        lr, inner_lr: steps of theta and of x; or functions of the outer step.
        inner_steps: lower steps before each hypergradient.

    Raises:
        InputError: an argument that is not positive, and what `BilevelMethod` refuses.
    """

    moving = ("x", "theta")

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        hypergradient: ImplicitHypergradient | UnrolledHypergradient,
        *,
        lr: float | Callable[[int], float],
        inner_lr: float | Callable[[int], float],
        inner_steps: int = 10,
        **sets: Any,
    ) -> None:
        super().__init__(levels, x, theta, **sets)
        for name, value in (("lr", lr), ("inner_lr", inner_lr), ("inner_steps", inner_steps)):
            if not callable(value) and not value > 0:
                raise InputError(f"{type(self).__name__}: {name} must be positive, and it is {value}.")
        self.hypergradient, self.lr, self.inner_lr, self.inner_steps = hypergradient, lr, inner_lr, inner_steps

    def _step(self, lower_batch: Any, upper_batch: Any) -> Outer:
        if isinstance(self.hypergradient, ImplicitHypergradient):
            for i in range(self.inner_steps):
                gradient = self.levels.lower_gradient(self.x, self.theta, turn(lower_batch, i))
                self.x = project(self.lower_sets, shifted(self.x, -rate_at(self.inner_lr, self.steps), gradient))
        found = self.hypergradient(self.x, self.theta, turn(lower_batch, -1), upper_batch)
        self.x = found.x
        self.theta = project(self.upper_sets, shifted(self.theta, -rate_at(self.lr, self.steps), found.gradient))
        residual = norm(found.gradient).new_tensor(found.residual)
        return Outer(found.value, norm(found.gradient), residual=residual)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that moves, the last solution of the linear system included."""
        own = self.hypergradient.state_dict() if isinstance(self.hypergradient, ImplicitHypergradient) else None
        return {**super().state_dict(), "hypergradient": own}

    def load_state_dict(self, state: Any) -> None:
        """Go on from a saved state."""
        super().load_state_dict(state)
        if isinstance(self.hypergradient, ImplicitHypergradient):
            self.hypergradient.load_state_dict(state["hypergradient"])


class AIDCG(HypergradientDescent):
    """Approximate implicit differentiation with `system_steps` conjugate gradients from the last solution; `damping` on the Hessian."""

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        system_steps: int = 10,
        damping: float = 0.0,
        **options: Any,
    ) -> None:
        implicit = ImplicitHypergradient(levels, "cg", 0.0, system_steps, damping=damping, check=False)
        super().__init__(levels, x, theta, implicit, **options)


class StocBiO(HypergradientDescent):
    """Stochastic bilevel descent with `system_steps` terms of the Neumann series of step `system_lr`."""

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        system_steps: int = 5,
        system_lr: float = 1e-2,
        **options: Any,
    ) -> None:
        implicit = ImplicitHypergradient(
            levels, "neumann", 0.0, system_steps, warm_start=False, step=system_lr, check=False
        )
        super().__init__(levels, x, theta, implicit, **options)


class ITD(HypergradientDescent):
    """Iterative differentiation: back through the last `truncate` (all) of `inner_steps` lower steps, which begin where the last ended."""

    def __init__(
        self,
        levels: Levels,
        x: Sequence[Tensor],
        theta: Sequence[Tensor],
        *,
        inner_lr: float,
        inner_steps: int = 10,
        truncate: int | None = None,
        **options: Any,
    ) -> None:
        unrolled = UnrolledHypergradient(levels, inner_steps, inner_lr, truncate=truncate, check=False)
        super().__init__(levels, x, theta, unrolled, inner_lr=inner_lr, inner_steps=inner_steps, **options)
