"""Bilevel learning with lower problems that are solved just accurately enough: MAID.

    minimise F(theta) = g(x*(theta)),   x*(theta) = argmin h(x, theta),   h strongly convex in x

A hypergradient z that was taken at a distance eps from the lower minimum, with a linear system solved to delta, is wrong by at most
omega (`error_bound`). Two tests choose the accuracy and the step on the way, and nothing has to be guessed beforehand:

    omega <= (1 - eta) norm(z)                                          -z is a direction of descent of F; else tighten both
    U(theta - alpha z) - Lo(theta) + lam alpha norm(z)^2 <= 0           F falls by lam alpha norm(z)^2 at least; else backtrack
    Lo <= g(x*) <= U                                                    what the upper objective can be, given eps

After a step that was accepted, the accuracy is *relaxed* and the step grows: early on, where the gradient is large, a rough solution
is enough, and most of the work of a fixed accuracy is saved.

    maid = MAID(Levels(lower, upper), theta, x, strong_convexity=lambda theta: theta[0].exp())
    maid.run(budget=5000)                                               # lower gradients and products with the Hessian
    maid.theta, maid.trace[-1]

Source: arXiv:2308.10098, Algorithms 3.1 and 3.2. Departures, each of which keeps the guarantee: the distance that was really reached
takes the place of the one that was asked for; warm starts follow a secant model of what x and q did before (`prediction`); and
backtracking ends where the bracket is wider than any decrease that a shorter step can bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights.bilevel.accelerated import AcceleratedGradient, Constant, LowerSolution
from poise.weights.bilevel.error_bound import ErrorBound
from poise.weights.bilevel.hypergradient import Hypergradient, ImplicitHypergradient
from poise.weights.bilevel.levels import Counters, Levels, Linearised, Tensors, detached, dot, norm, shifted
from poise.weights.bilevel.prediction import Prediction

__all__ = ["MAID", "MAIDStep"]

FAR = 12.0
"""A log-weight beyond this is a weight below 6e-6 or above 160,000: it runs to 0 or to infinity, and the trace says so."""

MEASURE = 5
"""How J and the inverse of H change is measured anew after so many steps; norm(J) in each."""


@dataclass(frozen=True)
class MAIDStep:
    """What one outer step did.

    Attributes:
        step: its number, from 1.
        value: the upper objective at the new point.
        lower, upper: between what the upper objective lies at the exact lower minimum.
        eps: bound of the distance to the lower minimum at the new point, over all samples jointly.
        delta: residual of the linear system of the hypergradient.
        alpha: the step size; 0 where no step was accepted.
        omega: bound of the error of the hypergradient.
        norm: of the hypergradient.
        trials: step sizes that were tried.
        refinements: times that the accuracy was tightened.
        cg_iterations: of the hypergradients of this step.
        work: lower gradients and products with the lower Hessian since the beginning.
        far: places in theta (flat) beyond +-12.
        status: "accepted", or why the method stopped.
    """

    step: int
    value: float
    lower: float
    upper: float
    eps: float
    delta: float
    alpha: float
    omega: float
    norm: float
    trials: int
    refinements: int
    cg_iterations: int
    work: int
    far: tuple[int, ...]
    status: str

    @property
    def accepted(self) -> bool:
        """Whether theta moved."""
        return self.status == "accepted"

    @property
    def ratio(self) -> float:
        """Bound of the error of the hypergradient, relative to it."""
        return self.omega / self.norm if self.norm else math.inf


@dataclass
class _Gradient:
    """A hypergradient with its certificate."""

    found: Hypergradient
    norm: float
    omega: float
    eps: float
    lower: float
    upper: float


class _Stop(Exception):
    """The method ends here; carries the status."""


class MAID:
    """The method of adaptive inexact descent.

    Args:
        levels: lower objective, twice differentiable and strongly convex in x, and upper objective. Both must be deterministic.
        theta: the upper variables; log-weights, where weights must be positive.
        x: where the lower level begins.
        strong_convexity: mu of the lower objective: a number, one for each sample, or a function of theta. Every certificate
            stands on it, so give a true lower bound (`theta[0].exp().min()` for weights on squares).
        smoothness: L of the lower objective likewise; measured where it is not given.
        upper_lipschitz: L_g: how fast the gradient of the upper objective changes with x; measured where it is not given.
        jacobian_norm, jacobian_lipschitz, inverse_lipschitz: constants of the bound omega, measured where they are not given. A
            quadratic lower objective has 0 for the last two.
        convex_upper: whether the upper objective is convex in x.
        eps0, delta0: accuracy of the lower solution and of the linear system at first.
        step0: the first step size.
        rho, rho_up: factors of the step size when a trial fails, and after an accepted step.
        nu, nu_up: factors of both accuracies when a test fails, and after an accepted step.
        eta: in (0, 1), what the hypergradient must keep after its error is taken away.
        lam: in (0, eta), part of the expected decrease that must be certain.
        max_backtracks: trials before the accuracy is tightened; each tightening allows one more.
        max_refine: tightenings in one step.
        max_lower: gradients in one lower solution.
        check_descent: whether the test with omega is made. Without it a step is still accepted only where F surely falls.
        accuracy: `"adaptive"`, or `"fixed"` for the same method at eps0 and delta0 throughout, which stalls where they are too
            loose.
        tolerance: stop where norm(z) + omega is below it.
        samples: whether every tensor of x has a leading dimension of independent training pairs. Each pair has a certificate of
            its own and stops on its own; the lower objective is called with the places of those that are left as `batch`.
        bounds: of every entry of theta, or None.
        history: moves of theta that warm starts are predicted from; 0 starts from the last x and q. Each holds a copy of both.
        solve: the lower solver, `(x, theta, accuracy) -> LowerSolution`; accelerated gradients by default.

    State: `state_dict` and `load_state_dict` carry everything, so that a run continues as if it had not stopped.

    Raises:
        InputError: factors out of range; mu missing or not positive; lower objective that is not deterministic, not smooth, not
            strongly convex (negative curvature); an entry of theta that nothing depends on.
        NonFiniteError: an upper objective that is not finite where the method stands.

    >>> two = Levels(lambda x, t, _: (x[0] - t[0]).square().sum() / 2, lambda x, t, _: (x[0] - 1).square().sum() / 2)
    >>> zero = (torch.zeros(2, dtype=torch.float64),)
    >>> round(MAID(two, zero, zero, strong_convexity=1.0, step0=0.5).run(max_outer=40).value, 3)
    0.0
    """

    def __init__(
        self,
        levels: Levels,
        theta: Tensors,
        x: Tensors,
        strong_convexity: Constant | None = None,
        smoothness: Constant | None = None,
        upper_lipschitz: float | None = None,
        jacobian_norm: float | None = None,
        jacobian_lipschitz: float | None = None,
        inverse_lipschitz: float | None = None,
        convex_upper: bool = True,
        eps0: float = 1e-1,
        delta0: float = 1e-1,
        step0: float = 1e-2,
        rho: float = 0.5,
        rho_up: float = 10 / 9,
        nu: float = 0.5,
        nu_up: float = 1.05,
        eta: float = 0.5,
        lam: float = 0.1,
        max_backtracks: int = 20,
        max_refine: int = 50,
        max_lower: int = 2000,
        check_descent: bool = True,
        accuracy: Literal["adaptive", "fixed"] = "adaptive",
        tolerance: float = 1e-10,
        samples: bool = False,
        bounds: tuple[float, float] | None = None,
        history: int = 5,
        solve: Callable[[Tensors, Tensors, float], LowerSolution] | None = None,
    ) -> None:
        if strong_convexity is None:
            raise InputError(
                "MAID needs strong_convexity=..., a lower bound of the curvature of the lower objective in x: its certificates "
                "stand on it. It is a number or a function of theta."
            )
        _check_factors(eps0, delta0, step0, rho, rho_up, nu, nu_up, eta, lam)
        _check_sizes(max_backtracks, max_refine, accuracy, bounds)
        self.levels, self.theta, self.x = levels, detached(theta), detached(x)
        self.eps, self.delta, self.alpha = eps0, delta0, step0
        self.rho, self.rho_up, self.nu, self.nu_up, self.eta, self.lam = rho, rho_up, nu, nu_up, eta, lam
        self.max_backtracks, self.max_refine, self.bounds, self.tolerance = (
            max_backtracks,
            max_refine,
            bounds,
            tolerance,
        )
        self.fixed = accuracy == "fixed"
        self.check_descent = check_descent and not self.fixed
        self.samples = samples
        self._lower = AcceleratedGradient(levels, strong_convexity, smoothness, max_lower, samples)
        self._solve = self._lower if solve is None else solve
        self.implicit = ImplicitHypergradient(levels, "cg", samples=samples)
        self.bound = ErrorBound(
            levels, upper_lipschitz, jacobian_norm, jacobian_lipschitz, inverse_lipschitz, convex_upper, samples
        )
        self.prediction = Prediction(history)
        self.trace: list[MAIDStep] = []
        self.status = ""
        self._distance: Tensor | None = None  # of x at theta; None where it is not known
        self._move: Tensors | None = None  # of theta since q was solved for
        self._limit = math.inf
        self._tried = self._refined = self._cg = 0
        self._excess = 1.0  # how much wider the bracket was than a step can bring, in the last line search
        if self.bounds is not None:
            self.theta = self._projected(self.theta)
        _check_deterministic(levels, self.x, self.theta)

    @property
    def counters(self) -> Counters:
        """What was evaluated so far."""
        return self.levels.counters

    @property
    def stopped(self) -> bool:
        """Whether the method has ended, for the reason in `status`."""
        return bool(self.status) and self.status != "budget"

    def run(self, max_outer: int | None = None, budget: int | None = None) -> MAIDStep:
        """Make outer steps until so many are made, the budget is spent, or the method ends; return the last one.

        Args:
            max_outer: steps of this call.
            budget: lower gradients and products with the lower Hessian, counted from the beginning.
        """
        if max_outer is None and budget is None:
            raise InputError("MAID.run needs max_outer=... or budget=...")
        self._limit = math.inf if budget is None else budget
        self.status = "" if self.status == "budget" else self.status
        made = 0
        try:
            while not self.stopped and (max_outer is None or made < max_outer):
                if self.counters.lower_work >= self._limit:
                    break
                self.step()
                made += 1
        finally:
            self._limit = math.inf
        if not self.trace:
            raise InputError(f"The budget of {budget} lower gradients is spent before the first step.")
        return self.trace[-1]

    def step(self) -> MAIDStep:
        """Make one outer step: Algorithm 3.1. Where none is accepted, theta stays and `status` says why."""
        if self.stopped:
            return self.trace[-1]
        self._tried = self._refined = self._cg = 0
        gradient: _Gradient | None = None
        try:
            while True:
                gradient = self._inexact_gradient()
                accepted = self._line_search(gradient)
                if accepted is not None:
                    return self._accept(gradient, *accepted)
                self._tighten("no step is accepted at this accuracy", self._excess)
        except _Stop as stop:
            self.status = str(stop)
            return self._record(gradient, self.status)

    def _inexact_gradient(self) -> _Gradient:
        """Algorithm 3.2: tighten both accuracies until the hypergradient surely points downhill."""
        measured = False
        derivatives: Linearised | None = None
        while True:
            if self._distance is None or float(self._distance.max()) > self.eps:
                self._solve_lower()
                derivatives = None
            if derivatives is None:
                derivatives = self.levels.linearise(self.x, self.theta)
            found = self._linear_system(derivatives)
            gradient = self._certified(found, derivatives, measure=not measured)
            measured = True
            if gradient.norm + gradient.omega <= self.tolerance:
                raise _Stop("stationary")
            if not self.check_descent or gradient.omega <= (1 - self.eta) * gradient.norm:
                return gradient
            allowed = (1 - self.eta) * gradient.norm
            self._tighten("the error of the hypergradient is not below it", gradient.omega / max(allowed, 1e-300))

    def _linear_system(self, derivatives: Linearised) -> Hypergradient:
        """Solve for q from where it should be by now, and tell the model where it is."""
        before, move = self.implicit.q, self._move
        if before is not None and move is not None:
            self.implicit.q = self.prediction.q(before, move)
        found = self.implicit(self.x, self.theta, tolerance=self.delta, derivatives=derivatives)
        self._cg += found.iterations
        if before is not None and move is not None and found.q is not None:
            self.prediction.complete(shifted(found.q, -1, before))
        self._move = None
        return found

    def _solve_lower(self) -> None:
        """Bring x to the accuracy eps, or as near as the arithmetic allows."""
        solution = self._solve(self.x, self.theta, self.eps)
        if solution.status == "not finite":
            raise NonFiniteError("MAID: the gradient of the lower objective is not finite at the current theta.")
        self.x, self._distance = solution.x, solution.distance
        if solution.status == "accuracy floor":
            raise _Stop(self._floor(float(solution.distance.max())))
        self._check_budget()

    def _certified(self, found: Hypergradient, derivatives: Linearised, measure: bool) -> _Gradient:
        assert self._distance is not None
        value = float(found.value)
        if not math.isfinite(value):
            raise NonFiniteError(f"MAID: the upper objective is {value} at the current point. It must be finite.")
        if found.damping:
            raise _Stop(f"no certificate: {found.status}")
        mu = self._mu()
        eps = float(torch.linalg.vector_norm(self._distance))
        if measure:
            self.bound.measure_upper(self.x, self.theta, times=1 if self.trace else 10)
            if self.check_descent:
                self.bound.measure_jacobian(self.theta, derivatives)
                if len(self.trace) % MEASURE == 0:
                    self.bound.measure_lower(self.x, self.theta, None, derivatives, found, eps, mu)
        self.bound.see(found)
        omega = self.bound.omega(eps, found.residual, float(norm(found.upper_gradient)), mu)
        lower, upper = self.bound.bracket(value, found.upper_gradient, self._distance)
        return _Gradient(found, float(norm(found.gradient)), omega, eps, lower, upper)

    def _line_search(self, gradient: _Gradient) -> tuple[float, Tensors, LowerSolution, float, float, float] | None:
        """Return step size, theta, lower solution, value and bracket of the first trial that is accepted, or None."""
        self._excess = 1.0
        for i in range(self.max_backtracks + self._refined):
            alpha = self.alpha * self.rho**i
            theta = self._projected(shifted(self.theta, -alpha, gradient.found.gradient))
            change = shifted(theta, -1, self.theta)
            solution = self._solve(self.prediction.x(self.x, change), theta, self.eps)
            self._tried += 1
            value, slope, _ = self.levels.upper_gradients(solution.x, theta)
            lower, upper = self.bound.bracket(float(value), slope, solution.distance)
            psi = upper - gradient.lower + self.lam / alpha * float(dot(change, change))
            if psi <= 0 and math.isfinite(upper):
                return alpha, theta, solution, float(value), lower, upper
            self._check_budget()
            # A shorter step can bring twice the first-order decrease at most; it has to be seen through the bracket.
            visible, width = 2 * alpha * self.rho * gradient.norm**2, float(gradient.found.value) - gradient.lower
            if visible < width:
                self._excess = width / max(visible, 1e-300)
                return None
        return None

    def _accept(
        self,
        gradient: _Gradient,
        alpha: float,
        theta: Tensors,
        solution: LowerSolution,
        value: float,
        lower: float,
        upper: float,
    ) -> MAIDStep:
        self._move = shifted(theta, -1, self.theta)
        self.prediction.remember(self._move, shifted(solution.x, -1, self.x), None)
        self.theta, self.x, self._distance = theta, solution.x, solution.distance
        self.alpha = self.rho_up * alpha
        if not self.fixed:
            self.eps, self.delta = self.nu_up * self.eps, self.nu_up * self.delta
        eps = float(torch.linalg.vector_norm(solution.distance))
        return self._record(gradient, "accepted", alpha=alpha, value=value, lower=lower, upper=upper, eps=eps)

    def _tighten(self, why: str, excess: float = 1.0) -> None:
        """Multiply both accuracies by nu, or stop where that is not possible.

        What fails by a factor `excess`, nearly linear in the accuracies, cannot succeed before they have fallen by as much: the powers of
        nu in between are skipped.
        """
        if self.fixed:
            raise _Stop(f"stalled: {why}, and it is fixed")
        if self._refined >= self.max_refine:
            raise _Stop(f"stalled: {why} after {self._refined} refinements")
        floor = torch.finfo(self.x[0].dtype).eps * max(1e-8, float(norm(self.x)))
        if self.eps * self.nu < floor:
            raise _Stop(self._floor(self.eps))
        powers = max(1, math.floor(math.log(max(excess, 1.0)) / -math.log(self.nu)))
        factor = self.nu ** min(powers, 8)
        self._refined += 1
        self.eps, self.delta = max(factor * self.eps, floor), factor * self.delta
        self._check_budget()

    def _floor(self, reached: float) -> str:
        kind = str(self.x[0].dtype).removeprefix("torch.")
        hint = " Use float64 for more." if kind != "float64" else ""
        return (
            f"accuracy floor reached: in {kind} the lower problem is known to {reached:.1e}, and a smaller error is needed to go on "
            f"({self.eps:.1e} was asked for).{hint}"
        )

    def _check_budget(self) -> None:
        if self.counters.lower_work >= self._limit:
            raise _Stop("budget")

    def _mu(self) -> float:
        return float(self._lower.mu(self.theta, self.x[0].reshape(len(self.x[0]) if self.samples else 1, -1)).min())

    def _projected(self, theta: Tensors) -> Tensors:
        return theta if self.bounds is None else tuple(t.clamp(*self.bounds) for t in theta)

    def _record(self, gradient: _Gradient | None, status: str, **changed: float) -> MAIDStep:
        found = None if gradient is None else gradient.found
        values = {
            "value": float(found.value) if found else math.nan,
            "lower": gradient.lower if gradient else math.nan,
            "upper": gradient.upper if gradient else math.nan,
            "eps": gradient.eps if gradient else math.nan,
            "alpha": 0.0,
        }
        flat = torch.cat([t.flatten() for t in self.theta])
        made = MAIDStep(
            step=len(self.trace) + 1,
            delta=found.residual if found else math.nan,
            omega=gradient.omega if gradient else math.nan,
            norm=gradient.norm if gradient else math.nan,
            trials=self._tried,
            refinements=self._refined,
            cg_iterations=self._cg,
            work=self.counters.lower_work,
            far=tuple((flat.abs() > FAR).nonzero().flatten().tolist()),
            status=status,
            **{**values, **changed},
        )
        self.trace.append(made)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, and the trace."""
        return {
            "theta": [t.clone() for t in self.theta],
            "x": [t.clone() for t in self.x],
            "distance": None if self._distance is None else self._distance.clone(),
            "eps": self.eps,
            "delta": self.delta,
            "alpha": self.alpha,
            "status": self.status,
            "move": None if self._move is None else [t.clone() for t in self._move],
            "prediction": self.prediction.state_dict(),
            "implicit": self.implicit.state_dict(),
            "bound": self.bound.state_dict(),
            "lower": self._lower.state_dict(),
            "counters": {f.name: getattr(self.counters, f.name) for f in fields(self.counters)},
            "trace": [{f.name: getattr(each, f.name) for f in fields(each)} for each in self.trace],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.theta, self.x = tuple(t.clone() for t in state["theta"]), tuple(t.clone() for t in state["x"])
        self._distance = None if state["distance"] is None else state["distance"].clone()
        self.eps, self.delta, self.alpha, self.status = state["eps"], state["delta"], state["alpha"], state["status"]
        self._move = None if state["move"] is None else tuple(t.clone() for t in state["move"])
        self.prediction.load_state_dict(state["prediction"])
        self.implicit.load_state_dict(state["implicit"])
        self.bound.load_state_dict(state["bound"])
        self._lower.load_state_dict(state["lower"])
        for name, value in state["counters"].items():
            setattr(self.counters, name, value)
        self.trace = [MAIDStep(**{**each, "far": tuple(each["far"])}) for each in state["trace"]]


def _check_factors(
    eps0: float, delta0: float, step0: float, rho: float, rho_up: float, nu: float, nu_up: float, eta: float, lam: float
) -> None:
    for name, value in (("eps0", eps0), ("delta0", delta0), ("step0", step0)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"MAID: {name} must be positive and finite; it is {value}.")
    for name, value in (("rho", rho), ("nu", nu)):
        if not 0 < value < 1:
            raise InputError(f"MAID: {name} must lie in (0, 1); it is {value}.")
    for name, value in (("rho_up", rho_up), ("nu_up", nu_up)):
        if not 1 <= value < math.inf:
            raise InputError(f"MAID: {name} must be at least 1; it is {value}.")
    if not 0 < lam < eta < 1:
        raise InputError(
            f"MAID: 0 < lam < eta < 1 is needed, so that an accurate enough step exists; they are {lam} and {eta}."
        )


def _check_sizes(max_backtracks: int, max_refine: int, accuracy: str, bounds: tuple[float, float] | None) -> None:
    if max_backtracks < 1 or max_refine < 0:
        raise InputError(
            f"MAID: max_backtracks must be >= 1 and max_refine >= 0; they are {max_backtracks}, {max_refine}."
        )
    if accuracy not in ("adaptive", "fixed"):
        raise InputError(f"MAID: accuracy must be 'adaptive' or 'fixed'; it is {accuracy!r}.")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise InputError(f"MAID: bounds must be (low, high) with low < high; they are {bounds}.")


def _check_deterministic(levels: Levels, x: Tensors, theta: Tensors) -> None:
    """Raise where the same lower gradient comes out different: a mini-batch, or dropout."""
    first, second = levels.lower_gradient(x, theta), levels.lower_gradient(x, theta)
    size = float(norm(first))
    # Sums in another order may differ by rounding.
    if float(norm(shifted(first, -1, second))) > 1e4 * torch.finfo(x[0].dtype).eps * size:
        raise InputError(
            "MAID needs deterministic lower evaluations, and the gradient of the lower objective came out different twice at one "
            "point. Give it the whole of the data in place of mini-batches, and switch dropout off."
        )
