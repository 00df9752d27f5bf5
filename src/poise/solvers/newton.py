"""Newton steps whose shift is the gradient's norm over a radius that the method finds: gradient-normalised smoothness.

    x <- x - (H + lambda B)^-1 g,   lambda = |g|_* / gamma,   accepted where   f(x) - f(x+) >= |g+|_*^2 / (8 lambda)

`gamma` is a trust radius, since no step is longer, and it is the only thing to find: it doubles after a step and halves after a trial
that is not accepted. One rule serves the exact Hessian and every positive semidefinite approximation of it, and it attains the best
known rate of the class without being told which class it is.

    GradientNormalizedNewton().minimize(problem)                        an objective of Poise
    GradientNormalizedNewton().minimize_function(f, torch.zeros(20))    a function of one vector
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning, nearest
from poise.objective import Objective
from poise.problem import Certificate, Problem, Step
from poise.solvers.curvature import Curvature, Dense, as_curvature, back, root_of, towards, with_backend
from poise.solvers.flat_problem import KINDS, FlatProblem, Provider

__all__ = ["GradientNormalizedNewton", "NewtonStep", "Smooth", "as_smooth"]

BACKENDS = ("auto", "cholesky", "cg", "rank_one")
RULES = ("search", "constant", "gradient")
# The authors' code adds it to gamma. Alone it would bound lambda by 1e8 |g|, so that no step of a steep function near its minimum
# could be accepted: below 1e-5 it shrinks with gamma.
_SMALL = 1e-8


class Smooth(Protocol):
    """A differentiable function of one vector."""

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return f(x) and its gradient [d]."""
        ...

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
        """Return the curvature of this kind at `x`, as `as_curvature` takes it."""
        ...


@dataclass(frozen=True)
class NewtonStep:
    """One accepted step.

    Attributes:
        value, gradient_norm: where it began.
        gamma: the radius that was accepted, a lower estimate of the gradient-normalised smoothness there.
        shift: lambda.
        length: of the step, in the metric; at most gamma.
        solves, gradients: linear systems and gradients that it took.
    """

    value: float
    gradient_norm: float
    gamma: float
    shift: float
    length: float
    solves: int
    gradients: int


@dataclass
class _Point:
    x: Tensor
    value: float
    gradient: Tensor

    @property
    def norm(self) -> float:
        return float(torch.linalg.vector_norm(self.gradient))


class GradientNormalizedNewton:
    """Newton's method with gradient-normalised regularisation, for the exact Hessian or an approximation.

    Args:
        hessian: "exact", "gauss_newton", "fisher" (of the examples' gradients), "expected_fisher" (of the output's distribution),
            "rank_one", "zero", or a function `(problem, parameters by name) -> H`, where `H` is a tensor [d, d], a pair
            `(scale, vector)` for `scale v v'`, a function `h -> H h`, or None for 0. It must be positive semidefinite.
        metric: `B`, symmetric positive definite [d, d], or its diagonal [d]; the identity where it is None.
        gamma0: the first radius, above 0.
        backend: "cholesky" (dense), "cg" (products only), "rank_one", or "auto": dense up to 2,000 parameters, else products.
        max_search: trials of one step at most.
        tol: norm of the gradient `|g|_*` that is asked for.
        iterations: steps of `minimize` at most.
        rule: "search"; or without one, "constant" (gamma = gamma0 throughout) and "gradient" (gamma = gamma0 |g|, lambda = 1/gamma0).
        power: `p` of hessian="rank_one", for objectives `|u|^p / p`; at least 2.
        cg_tolerance: relative residual of the linear systems that "cg" solves.
        lr: the same as gamma0, under the name by which a study gives every solver its step size.

    Attributes:
        gamma: the next trial's radius.
        log: every accepted step as `NewtonStep`.

    Raises:
        InputError: an argument is out of range.

    >>> GradientNormalizedNewton("gauss_newton", tol=1e-6)
    newton(hessian='gauss_newton', backend='auto', tol=1e-06)

    Source:
        arXiv:2506.13710, algorithm 1. Chosen here: a Hessian that is not positive definite under its shift halves the radius; a trial
        within rounding of the value is judged by its gradient; a search that fails moves nothing and says so.
    """

    name = "newton"
    needs = frozenset({"potential", "deterministic"})

    def __init__(
        self,
        hessian: str | Provider = "exact",
        metric: Tensor | None = None,
        gamma0: float = 1.0,
        backend: str = "auto",
        max_search: int = 40,
        tol: float = 1e-8,
        iterations: int = 1000,
        rule: str = "search",
        power: float = 4.0,
        cg_tolerance: float = 1e-12,
        lr: float | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = [n for n in inspect.signature(type(self)).parameters if n != "unknown"]
            raise InputError(
                f"newton has no option {next(iter(unknown))!r}."
                + (nearest(next(iter(unknown)), known) or f" It has: {', '.join(known)}.")
            )
        gamma0 = gamma0 if lr is None else lr
        if isinstance(hessian, str) and hessian not in KINDS:
            raise InputError(
                f"newton: there is no hessian {hessian!r}."
                + (nearest(hessian, KINDS) or f" There are: {', '.join(KINDS)}.")
            )
        for name, value, choices in (("backend", backend, BACKENDS), ("rule", rule, RULES)):
            if value not in choices:
                raise InputError(f"newton: {name} is one of {', '.join(choices)}, and it is {value!r}.")
        for name, number in (("gamma0", gamma0), ("tol", tol), ("cg_tolerance", cg_tolerance)):
            if not (math.isfinite(number) and number > 0):
                raise InputError(f"newton: {name} must be finite and above 0, but it is {number}.")
        if not (math.isfinite(power) and power >= 2):
            raise InputError(f"newton: power must be finite and at least 2, but it is {power}.")
        if max_search < 1 or iterations < 1:
            raise InputError(
                f"newton: max_search and iterations must be at least 1, but they are {max_search} and {iterations}."
            )
        self.hessian, self.metric, self.gamma0, self.backend = hessian, metric, float(gamma0), backend
        self.max_search, self.tol, self.iterations, self.rule = max_search, tol, iterations, rule
        self.power, self.cg_tolerance = power, cg_tolerance
        self._root = None if metric is None else root_of(metric)
        self.reset()

    def reset(self) -> None:
        """Forget every step: the next one begins with `gamma0`."""
        self.gamma = self.gamma0
        self.log: list[NewtonStep] = []
        self.solves = self.gradients = 0
        self._scale = 0.0  # the largest value seen, whose rounding is that of every value
        self._seen: tuple[float, float] | None = None  # value and data of the step before

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Nothing is held between steps but the radius."""

    # ---- one problem -------------------------------------------------------------------------------------------------

    def minimize(self, problem: Problem) -> Certificate:
        """Minimise one problem from where the model stands, and leave the model at what was found.

        Returns:
            The value and the gradient's norm; a search or a limit that was not enough is said in `status` and as a PoiseWarning.

        Raises:
            IncompatibleError: a term has no curvature to offer, or the value is not the same twice.
            InputError: a dense Hessian would be too large, or an approximation is not positive semidefinite.
            NonFiniteError: value or gradient are infinite or NaN at the start.
        """
        flat = FlatProblem(problem, self.power, self.backend)
        problem.reports()
        x, certificate = self.minimize_function(flat, flat.start)
        flat.write(x)
        return certificate

    def minimize_function(
        self, function: Smooth | Callable[[Tensor], Tensor], start: Tensor
    ) -> tuple[Tensor, Certificate]:
        """Minimise a function of one vector; see `minimize`.

        Args:
            function: a `Smooth`, or a function of a tensor [d] that returns a 0-dim tensor.
            start: float [d].

        Returns:
            The point found and its certificate.
        """
        self.reset()
        smooth = self._coordinates(as_smooth(function), start)
        point = self._at(smooth, start if self._root is None else _into(self._root, start))
        self._check_start(smooth, point)
        history, status = [point.value], ""
        for _ in range(self.iterations):
            if point.norm <= self.tol:
                break
            found = self._advance(smooth, point)
            if isinstance(found, str):
                status = found
                break
            point = found
            history.append(point.value)
        residual, done = point.norm, len(history) - 1
        if residual <= self.tol:
            status = "converged"
        else:
            status = status or f"stopped after {done} steps with gradient norm {residual:.3g}"
            warnings.warn(f"newton: {status}; {self.tol:.3g} was asked for.", PoiseWarning, stacklevel=2)
        x = point.x if self._root is None else back(self._root, point.x)
        return x, Certificate(
            point.value, residual, self.tol, "gradient norm", done, status, history=tuple(history)
        )  # fmt: skip

    def _check_start(self, smooth: Smooth, point: _Point) -> None:
        if not (math.isfinite(point.value) and math.isfinite(point.norm)):
            raise NonFiniteError(
                f"newton: the objective is {point.value} and its gradient has norm {point.norm} at the start; both must be finite."
            )
        again = self._at(smooth, point.x)
        if abs(again.value - point.value) > self._noise(point, again):
            raise IncompatibleError(
                f"newton: the objective is {point.value:.10g} at the start and {again.value:.10g} when asked again: its data or its random "
                "numbers change. Use the whole data set and no dropout, or a stochastic solver such as 'adamw'."
            )

    # ---- one step ----------------------------------------------------------------------------------------------------

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step on the whole data set; the radius goes on from the step before.

        Raises:
            IncompatibleError: the data are others than those of the step before: the method is for full batches.
        """
        flat = FlatProblem(problem, self.power, self.backend)
        value, gradient = flat.value_and_gradient(None)
        self.gradients += 1
        report = problem.step
        report.gradient_norm = torch.linalg.vector_norm(gradient)
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        smooth = self._coordinates(flat, flat.start)
        start = flat.start if self._root is None else _into(self._root, flat.start)
        point = _Point(start, value, gradient if self._root is None else towards(self._root, gradient))
        if not (math.isfinite(point.value) and math.isfinite(point.norm)):
            raise NonFiniteError(
                f"newton: the objective is {value} and its gradient has norm {point.norm}; both must be finite."
            )
        self._refuse_other_data(problem)
        if point.norm > 0:
            found = self._advance(smooth, point)
            if isinstance(found, _Point):
                flat.write(found.x if self._root is None else back(self._root, found.x))
        return report

    def _refuse_other_data(self, problem: Problem) -> None:
        """Compare the sums of the data with those of the step before: an order that changed is the same data."""
        total = float(
            sum(
                float(v.double().sum())
                for batch in problem.batches
                for stream in batch.values()
                for v in stream.values()
                if isinstance(v, Tensor)
            )
        )
        rows = float(sum(len(next(iter(s.values()), ())) for b in problem.batches for s in b.values()))
        before, self._seen = self._seen, (rows, total)
        if before is not None and (before[0] != rows or abs(before[1] - total) > 1e-6 * max(1.0, abs(total))):
            raise IncompatibleError(
                f"newton is for full batches, and the {rows:.0f} rows of this step are not those of the step before ({before[0]:.0f}). "
                "Set batch_size to the number of examples and transform=None, or use a stochastic solver such as 'adamw'."
            )

    def _advance(self, smooth: Smooth, point: _Point) -> _Point | str:
        """Find a radius that is accepted; return where its step leads, or why there is none."""
        curvature = self._curvature(smooth, point)
        norm, solves, trials = point.norm, 0, 0
        if self.rule == "gradient":
            self.gamma = self.gamma0 * norm
        for _ in range(self.max_search):
            shift = max(norm / (self.gamma + min(_SMALL, 1e-3 * self.gamma)), curvature.floor)
            direction = curvature.solve(shift, point.gradient)
            solves += 1
            if direction is not None:
                trial = self._at(smooth, point.x - direction)
                trials += 1
                if self.rule != "search" or self._accepts(point, trial, shift):
                    return self._take(point, trial, direction, shift, solves, trials)
            if self.rule != "search":
                break
            self.gamma /= 2
        self.solves += solves
        if trials == 0:
            return f"the Hessian is not positive definite under any shift up to {shift:.3g}: use hessian='gauss_newton' or 'fisher'"
        return (
            f"no step was accepted in {solves} trials, down to a radius of {self.gamma:.3g}: gradient norm {norm:.3g} is the limit of the "
            f"values' rounding ({self._noise(point):.1g}), or the objective has a corner there"
        )

    def _take(self, point: _Point, trial: _Point, direction: Tensor, shift: float, solves: int, trials: int) -> _Point:
        length = float(torch.linalg.vector_norm(direction))
        self.log.append(NewtonStep(point.value, point.norm, self.gamma, shift, length, solves, trials))
        self.solves += solves
        if self.rule == "search":
            self.gamma = min(2 * self.gamma, 1e100)
        if not (math.isfinite(trial.value) and math.isfinite(trial.norm)):
            raise NonFiniteError(
                f"newton: a step of length {length:.3g} led to the value {trial.value}; use rule='search'."
            )
        return trial

    def _accepts(self, point: _Point, trial: _Point, shift: float) -> bool:
        """`f(x) - f(x+) >= |g+|^2 / (8 lambda)`; within rounding of the value, `|g+| <= |g|`."""
        if not (math.isfinite(trial.value) and math.isfinite(trial.norm)):
            return False
        decrease = point.value - trial.value
        if decrease >= trial.norm**2 / (8 * shift):
            return True
        return abs(decrease) <= self._noise(point, trial) and trial.norm <= point.norm

    def _noise(self, *points: _Point) -> float:
        self._scale = max(self._scale, *(abs(p.value) for p in points if math.isfinite(p.value)))
        # A mean over many examples is accurate to a few units of its last place, not of those of its parts.
        return 8 * torch.finfo(points[0].gradient.dtype).eps * self._scale

    def _at(self, smooth: Smooth, x: Tensor) -> _Point:
        self.gradients += 1
        return _Point(x, *smooth.value_and_gradient(x))

    def _curvature(self, smooth: Smooth, point: _Point) -> Curvature:
        found = as_curvature(smooth.curvature(point.x, self.hessian, point.value, point.gradient))
        return with_backend(found, self.backend, point.x, self.cg_tolerance)

    def _coordinates(self, smooth: Smooth, start: Tensor) -> Smooth:
        if self._root is None:
            return smooth
        if len(self._root) != len(start):
            raise InputError(f"newton: the metric is for {len(self._root)} parameters, and there are {len(start)}.")
        return _InMetric(smooth, self._root.to(start))

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return radius, counters and what is known about the objective's size."""
        return {
            "gamma": self.gamma, "solves": self.solves, "gradients": self.gradients, "scale": self._scale, "seen": self._seen,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.gamma, self.solves, self.gradients = state["gamma"], state["solves"], state["gradients"]
        self._scale = state["scale"]
        self._seen = None if state["seen"] is None else (state["seen"][0], state["seen"][1])

    def __repr__(self) -> str:
        kind = self.hessian if isinstance(self.hessian, str) else getattr(self.hessian, "__name__", "function")
        return f"newton(hessian={kind!r}, backend={self.backend!r}, tol={self.tol:g})"


class _InMetric:
    """The function in coordinates `y = L' x`, in which the metric `B = L L'` is the identity."""

    def __init__(self, smooth: Smooth, root: Tensor) -> None:
        self.smooth, self.root = smooth, root

    def value_and_gradient(self, y: Tensor) -> tuple[float, Tensor]:
        value, g = self.smooth.value_and_gradient(back(self.root, y))
        return value, towards(self.root, g)

    def curvature(self, y: Tensor, kind: Any, value: float, gradient: Tensor) -> Curvature:
        g = gradient * self.root if self.root.ndim == 1 else self.root @ gradient
        return as_curvature(self.smooth.curvature(back(self.root, y), kind, value, g)).within(self.root)


def _into(root: Tensor, x: Tensor) -> Tensor:
    """Return `y = L' x`."""
    return root.to(x) * x if root.ndim == 1 else root.to(x).T @ x


class _Differentiated:
    """A function of a tensor with its derivatives by automatic differentiation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            value = self.function(leaf)
            (g,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), g

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
        if kind == "exact":
            matrix: Tensor = torch.func.hessian(self.function)(x.detach())
            return Dense((matrix + matrix.T) / 2, "the exact Hessian")
        if kind == "zero":
            return None
        if not isinstance(kind, str):
            return kind(x)
        raise InputError(
            f"newton: a plain function has no {kind!r} Hessian. Use 'exact' or 'zero', a function x -> H, or an object with curvature(...)."
        )


def as_smooth(function: Any) -> Smooth:
    """Return a function with value, gradient and curvature: a `Smooth` as it is, a `Problem` flattened, a plain function differentiated.

    Raises:
        InputError: it is none of these.
    """
    if hasattr(function, "value_and_gradient"):
        smooth: Smooth = function
        return smooth
    if isinstance(function, Problem):
        return FlatProblem(function)
    if not callable(function):
        raise InputError(f"newton: a function or a problem was expected, and {type(function).__name__} came.")
    return _Differentiated(function)
