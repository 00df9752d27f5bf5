"""Hyperparameter optimisation with an approximate gradient (HOAG): accuracies from a schedule, steps from a guess that adapts.

    solve the lower problem by L-BFGS to  norm(grad h) <= tol_k norm(grad h at the start)
    solve H q = grad g to                 norm(H q - grad g) <= tol_k norm(grad g at the start)
    theta <- theta - (1/L) z,             z = d g/d theta - J' q

    tol_k = tol_0 factor^k (geometric),   tol_0 / k^2 (quadratic),   tol_0 / k^3 (cubic)

The accuracies have to be summable, and are chosen beforehand; L rises where g rose and falls a little where g fell enough. It is the
method that MAID is measured against.

Source: arXiv:1602.02355, Algorithm 1 and section 3; its public code for the initial L, the factors and the bounds of theta. That code
compares two names of one array, so that the length of its step is always 0 in the test that adapts L; here it is the true length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights.bilevel.hypergradient import ImplicitHypergradient, packed, unpacked
from poise.weights.bilevel.levels import Counters, Levels, Tensors, detached, norm, shifted

__all__ = ["HOAG", "HOAGStep"]

Schedule = Literal["geometric", "quadratic", "cubic"]
LEAST = 1e-12


@dataclass(frozen=True)
class HOAGStep:
    """What one outer step did.

    Attributes:
        step: its number, from 1.
        value: the upper objective at the lower solution of the theta before the step.
        tolerance: relative, of the lower solution and of the linear system.
        alpha: the step size 1/L.
        norm: of the hypergradient.
        cg_iterations: of the linear system.
        work: lower gradients and products with the lower Hessian since the beginning.
    """

    step: int
    value: float
    tolerance: float
    alpha: float
    norm: float
    cg_iterations: int
    work: int


class HOAG:
    """The method of approximate gradients with accuracies from a schedule.

    Args:
        levels: lower objective, twice differentiable, and upper objective.
        theta: the upper variables, logarithms of weights.
        x: where the lower level begins.
        schedule: `"geometric"`, `"quadratic"` or `"cubic"`.
        tolerance: tol_0.
        factor: of the geometric schedule.
        bounds: of every entry of theta.
        lipschitz: the first L; by default norm(z) times the number of upper variables, or 1 where z is below 1e-3.
        adaptive: whether L adapts.
        max_lower: gradients in one lower solution.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: (x[0] - 1).square().sum() / 2)
    >>> zero = (torch.zeros(2, dtype=torch.float64),)
    >>> round(HOAG(two, zero, zero).run(max_outer=60).value, 3)
    0.0
    """

    def __init__(
        self,
        levels: Levels,
        theta: Tensors,
        x: Tensors,
        schedule: Schedule = "geometric",
        tolerance: float = 0.01,
        factor: float = 0.9,
        bounds: tuple[float, float] = (-10.0, 6.0),
        lipschitz: float | None = None,
        adaptive: bool = True,
        max_lower: int = 10_000,
    ) -> None:
        if schedule not in ("geometric", "quadratic", "cubic"):
            raise InputError(f"HOAG: schedule must be 'geometric', 'quadratic' or 'cubic'; it is {schedule!r}.")
        if tolerance <= 0 or not 0 < factor < 1:
            raise InputError(
                f"HOAG: tolerance must be positive and factor in (0, 1); they are {tolerance} and {factor}."
            )
        if not bounds[0] < bounds[1]:
            raise InputError(f"HOAG: bounds must be (low, high) with low < high; they are {bounds}.")
        if lipschitz is not None and lipschitz <= 0:
            raise InputError(f"HOAG: lipschitz must be positive; it is {lipschitz}.")
        self.levels, self.theta, self.x = levels, detached(theta), detached(x)
        self.schedule, self.first_tolerance, self.factor, self.bounds = schedule, tolerance, factor, bounds
        self.lipschitz, self.adaptive, self.max_lower = lipschitz, adaptive, max_lower
        self.implicit = ImplicitHypergradient(levels, "cg")
        self.trace: list[HOAGStep] = []
        self._tolerance_before, self._value_before = tolerance, math.inf
        self._lower_scale: float | None = None
        self._upper_scale: float | None = None

    @property
    def counters(self) -> Counters:
        """What was evaluated so far."""
        return self.levels.counters

    @property
    def tolerance(self) -> float:
        """The relative accuracy of the next step."""
        k = len(self.trace)
        if self.schedule == "geometric":
            return max(self.first_tolerance * self.factor**k, LEAST)
        power = 2 if self.schedule == "quadratic" else 3
        return max(self.first_tolerance / float(max(k, 1) ** power), LEAST)

    def run(self, max_outer: int | None = None, budget: int | None = None) -> HOAGStep:
        """Make outer steps until so many are made or the budget of lower work is spent; return the last one."""
        if max_outer is None and budget is None:
            raise InputError("HOAG.run needs max_outer=... or budget=...")
        made = 0
        while (max_outer is None or made < max_outer) and (budget is None or self.counters.lower_work < budget):
            self.step()
            made += 1
        if not self.trace:
            raise InputError(f"The budget of {budget} lower gradients is spent before the first step.")
        return self.trace[-1]

    def step(self) -> HOAGStep:
        """Make one outer step."""
        tolerance = self.tolerance
        if self._lower_scale is None:
            self._lower_scale = float(norm(self.levels.lower_gradient(self.x, self.theta)))
        self.x = lbfgs(self.levels, self.x, self.theta, tolerance * self._lower_scale, self.max_lower)
        if self._upper_scale is None:
            self._upper_scale = float(norm(self.levels.upper_gradients(self.x, self.theta)[1]))
        found = self.implicit(self.x, self.theta, tolerance=tolerance * self._upper_scale)
        value, size = float(found.value), float(norm(found.gradient))
        if not math.isfinite(value):
            raise NonFiniteError(f"HOAG: the upper objective is {value} at the current point. It must be finite.")
        if self.lipschitz is None:
            self.lipschitz = size * sum(t.numel() for t in self.theta) if size > 1e-3 else 1.0
        alpha = 1 / self.lipschitz
        before = self.theta
        moved = shifted(before, -alpha, found.gradient)
        self.theta = tuple(t.clamp(*self.bounds) for t in moved)
        if self.adaptive:
            self._adapt(value, float(norm(shifted(self.theta, -1, before))), tolerance)
        self._value_before, self._tolerance_before = value, tolerance
        made = HOAGStep(len(self.trace) + 1, value, tolerance, alpha, size, found.iterations, self.counters.lower_work)
        self.trace.append(made)
        return made

    def _adapt(self, value: float, length: float, tolerance: float) -> None:
        """Let the step grow where g fell as a step of 1/L should make it fall, and halve it where g rose."""
        assert self.lipschitz is not None
        slack = self._tolerance_before * (1 + length) + tolerance
        if value <= self._value_before + slack - self.lipschitz / 2 * length**2:
            self.lipschitz *= 0.95
        elif value > self._value_before:
            self.lipschitz *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, and the trace."""
        return {
            "theta": [t.clone() for t in self.theta],
            "x": [t.clone() for t in self.x],
            "lipschitz": self.lipschitz,
            "before": (self._tolerance_before, self._value_before),
            "scales": (self._lower_scale, self._upper_scale),
            "implicit": self.implicit.state_dict(),
            "counters": {f.name: getattr(self.counters, f.name) for f in fields(self.counters)},
            "trace": [{f.name: getattr(each, f.name) for f in fields(each)} for each in self.trace],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.theta, self.x = tuple(t.clone() for t in state["theta"]), tuple(t.clone() for t in state["x"])
        self.lipschitz = state["lipschitz"]
        self._tolerance_before, self._value_before = state["before"]
        self._lower_scale, self._upper_scale = state["scales"]
        self.implicit.load_state_dict(state["implicit"])
        for name, value in state["counters"].items():
            setattr(self.counters, name, value)
        self.trace = [HOAGStep(**each) for each in state["trace"]]


class _Reached(Exception):
    """The gradient is small enough; carries the point."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


def lbfgs(levels: Levels, x: Tensors, theta: Tensors, tolerance: float, most: int = 10_000) -> Tensors:
    """Minimise the lower objective by L-BFGS with ten pairs until `norm(gradient) <= tolerance`, from x.

    Args:
        levels: the two levels.
        x, theta: the point.
        tolerance: absolute, of the Euclidean norm.
        most: gradients.
    """
    from scipy.optimize import minimize

    rows = packed(detached(x), False)

    def function(flat: Any) -> tuple[float, Any]:
        point = torch.as_tensor(flat, dtype=rows.dtype, device=rows.device).reshape(rows.shape).clone()
        value, gradient = levels.lower_value_and_gradient(unpacked(point, x, False), theta)
        slope = packed(gradient, False)
        if float(torch.linalg.vector_norm(slope)) <= tolerance:
            raise _Reached(point)
        return float(value), slope.double().cpu().numpy().ravel()

    try:
        found = minimize(
            function,
            rows.double().cpu().numpy().ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 10, "ftol": 0.0, "gtol": 0.0, "maxfun": most, "maxiter": most},
        )
    except _Reached as reached:
        return unpacked(reached.rows, x, False)
    return unpacked(torch.as_tensor(found.x, dtype=rows.dtype, device=rows.device).reshape(rows.shape), x, False)
