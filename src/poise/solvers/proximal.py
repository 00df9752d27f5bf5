"""Proximal gradient steps: exact zeros, exact groups, exact constraints.

    x+ = prox(x - eta grad f(x), eta h)        f everything that is smooth, h the penalty

`minimize` works on a whole problem with momentum (FISTA), restarts and a line search for eta, to a certificate; `step` is the
stochastic form for training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn

from poise.composite import Composite, Solution
from poise.errors import IncompatibleError, InputError, NonFiniteError
from poise.objective import Objective
from poise.penalties import Penalty, Scaled
from poise.problem import Certificate, Problem, Step
from poise.solvers.projection import ProjectModules
from poise.structure import composite_of_problem, write_to_layer


class ProximalGradient:
    """Proximal gradient descent.

    minimize    x is the weights and b / unit, the intercept in the size of the inputs
                y = x + (t - 1)/t+ (x - x-),   x+ = prox(y - eta grad f(y), eta h)
                the momentum starts again where `<y - x+, x+ - x> > 0`, and where h is not convex and P does not fall enough
                eta halves until f(x+) <= f(y) + <grad f(y), x+ - y> + ||x+ - y||^2 / (2 eta)
    step        x+ = prox(x - lr grad f(x) + momentum (x - x-), lr weight h),   h every term that has a proximal map

    Args:
        tol: of the certificate, relative to its size at weights of 0.
        iterations: of `minimize` at most.
        every: iterations between certificates.
        lr, momentum: of `step`.

    Raises:
        InputError: an argument is out of range.

    Source: Beck and Teboulle (2009), with the restarts of O'Donoghue and Candes (2015), and the monitor of Li and Lin (2015);
        `step` as in Ochs et al. (2014).
    """

    name = "proximal"
    needs: frozenset[str] = frozenset()
    meets_sets = True

    def __init__(
        self, tol: float = 1e-8, iterations: int = 20_000, every: int = 10, lr: float = 0.01, momentum: float = 0.9
    ) -> None:
        if not (tol > 0 and iterations >= 1 and every >= 1 and lr > 0 and 0 <= momentum < 1):
            raise InputError(
                "proximal: tol and lr are positive, iterations and every at least 1, and momentum is in [0, 1)."
            )
        self.tol, self.iterations, self.every, self.lr, self.momentum = tol, iterations, every, lr, momentum
        self._moved: dict[str, Tensor] = {}
        self._project = ProjectModules(None)

    # ---- a whole problem ---------------------------------------------------------------------------------------------

    @overload
    def minimize(self, problem: Composite, start: tuple[Tensor, Tensor] | None = None) -> Solution: ...

    @overload
    def minimize(self, problem: Problem) -> Certificate: ...

    def minimize(
        self, problem: Composite | Problem, start: tuple[Tensor, Tensor] | None = None
    ) -> Solution | Certificate:
        """Minimise one problem to a certificate.

        Where the penalty is not convex there is more than one place to end: without `start` it begins at 0 and at the minimum of the
        fit alone, and keeps the better end.

        Args:
            problem: the fit and the penalty; or one step of a linear layer, which is left at the minimum.
            start: weights and intercept; 0 by default.

        Raises:
            IncompatibleError: a step of another model, or terms that do not fit one.
            NonFiniteError: the objective is not finite on the way.
        """
        if isinstance(problem, Problem):
            composite, layer = composite_of_problem(problem)
            solved = self.minimize(composite)
            write_to_layer(layer, solved.coef, solved.intercept)
            return solved.certificate
        began = time.perf_counter()
        if start is None and not problem.penalty.is_convex:
            ends = [self._from(problem, problem.zeros()), self._from(problem, self._fit_alone(problem))]
            found, done, history, why = min(ends, key=lambda end: problem.value(*end[0]))
        else:
            found, done, history, why = self._from(problem, start or problem.zeros())
        certified = problem.certify(*found, self.tol, done, history, why)
        return Solution(*found, certified, self.name, seconds=time.perf_counter() - began)

    def _fit_alone(self, problem: Composite) -> tuple[Tensor, Tensor]:
        """Return near the minimum of the fit, without the penalty, where the search for a better end begins."""
        alone = problem.at(Scaled(None, 0.0, max(problem.penalty.ridge, 1e-6 * problem.lipschitz)))
        return ProximalGradient(1e-4, min(self.iterations, 2000), self.every)._from(alone, alone.zeros())[0]

    def _from(
        self, problem: Composite, start: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], int, list[float], str]:
        """Return where the iteration from a start ends, how many steps it took, the values on the way, and what stopped it."""
        w, b = start[0].clone(), start[1].clone()
        w = problem.penalty.prox(w, 0.0)  # into the set, where the penalty is one
        if not problem.intercept:
            b = torch.zeros_like(b)
        else:
            b = problem.settle(problem.design.predict(w), b)
        eta = 1.0 / problem.step_bound
        tolerance, convex = problem.tolerance(self.tol), problem.penalty.is_convex
        # y is the extrapolated point
        yw, yb, t, history, status = w, b, 1.0, [problem.value(w, b)], ""
        done, now = 0, history[0]
        for done in range(1, self.iterations + 1):
            fresh_w, fresh_b, eta = self._move(problem, yw, yb, eta)
            if not convex:
                # where momentum does not pay as a plain step would, the plain step is made, so the value only falls
                moved = (fresh_w - w).square().sum() + ((fresh_b - b) / problem.unit).square().sum()
                value = problem.value(fresh_w, fresh_b)
                if t > 1 and value > now - 1e-4 * float(moved) / eta:
                    fresh_w, fresh_b, eta = self._move(problem, w, b, eta)
                    value, t = problem.value(fresh_w, fresh_b), 1.0
                now = value
            turned = ((yw - fresh_w) * (fresh_w - w)).sum() + ((yb - fresh_b) * (fresh_b - b)).sum() / problem.unit**2
            if bool(turned > 0):
                t = 1.0
            t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
            beta = (t - 1) / t_next
            yw, yb = fresh_w + beta * (fresh_w - w), fresh_b + beta * (fresh_b - b)
            still = bool((fresh_w == w).all()) and bool((fresh_b == b).all())
            w, b, t = fresh_w, fresh_b, t_next
            if done % self.every == 0 or done == self.iterations or still:
                settled = problem.settle(problem.design.predict(w), b)
                history.append(problem.value(w, settled))
                if not math.isfinite(history[-1]):
                    raise NonFiniteError(f"proximal: the objective is {history[-1]} after {done} iterations.")
                if problem.residual(w, settled) <= tolerance:
                    break
                if still:
                    status = "no entry moves any more: the tolerance is below what this precision can tell"
                    break
        b = problem.settle(problem.design.predict(w), b)
        return (w, b), done, history, status or f"stopped after {done} iterations"

    def _move(self, problem: Composite, yw: Tensor, yb: Tensor, eta: float) -> tuple[Tensor, Tensor, float]:
        """Return the next point, and the step that its upper bound held for."""
        z = problem.predict(yw, yb)
        value, slope = problem.fit_value(z), problem.slope(z)
        gw = problem.design.correlate(slope)
        gb = slope.sum(0) if problem.intercept else torch.zeros_like(yb)
        while True:
            w, b = problem.penalty.prox(yw - eta * gw, eta), yb - eta * problem.unit**2 * gb
            dw, db = w - yw, b - yb
            length = dw.square().sum() + (db / problem.unit).square().sum()
            bound = value + (gw * dw).sum() + (gb * db).sum() + length / (2 * eta)
            rounding = 1e-12 * value.abs() if w.dtype == torch.float64 else 1e-5 * value.abs()
            if bool(problem.fit_value(problem.predict(w, b)) <= bound + rounding) or eta < 1e-300:
                return w, b, eta
            eta /= 2

    # ---- training ----------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Bring the parameters into the sets that the objective demands."""
        self._moved = {}
        self._project = ProjectModules(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for term in _terms(objective).values():
                penalty = proximal_part(term)
                if penalty is not None and penalty.is_set:
                    for p in term.charged(trained).values():
                        p.copy_(penalty.prox(p))

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one stochastic step: along the gradient of what is smooth, then the proximal maps.

        Raises:
            IncompatibleError: two terms with proximal maps charge one parameter; their sum's map is not that of its parts.
        """
        gradients = problem.gradient()
        report = problem.step
        charged: dict[str, tuple[str, float, Penalty]] = {}
        parameters = problem.parameters
        for label, term in _terms(problem.objective).items():
            penalty = proximal_part(term)
            if penalty is None:
                continue
            weight = float(report.terms[label].weight)
            own = term.charged(parameters)
            with torch.enable_grad():
                value = term(dict(parameters))
                slopes = (
                    torch.autograd.grad(value, list(own.values()), allow_unused=True) if value.requires_grad else ()
                )
            # what the penalty pulls is left to its proximal map
            for name, slope in zip(own, slopes, strict=False):
                if slope is not None:
                    gradients[name] = gradients[name] - weight * slope
            for name in own:
                if name in charged:
                    raise IncompatibleError(
                        f"proximal: {charged[name][0]!r} and {label!r} both have a proximal map and charge {name}; the map of a sum is not "
                        "that of its parts. Use one of them, or 'elastic_net' for l1 and l2."
                    )
                charged[name] = (label, weight, penalty)
        report.gradient_norm = (
            torch.stack([g.norm() for g in gradients.values()]).norm() if gradients else torch.zeros(())
        )
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        with torch.no_grad():
            for name, p in parameters.items():
                if name not in gradients and name not in charged:
                    continue
                fresh = p.clone()
                if name in self._moved:
                    fresh.add_(self._moved[name], alpha=self.momentum)
                if name in gradients:
                    fresh.sub_(gradients[name], alpha=self.lr)
                if name in charged:
                    _, weight, penalty = charged[name]
                    fresh = penalty.prox(_flat(fresh), self.lr * weight).view_as(p)
                self._moved[name] = fresh - p
                p.copy_(fresh)
        self._project()
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the last moves and the learning rate."""
        return {"moved": {n: d.clone() for n, d in self._moved.items()}, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._moved, self.lr = dict(state["moved"]), float(state["lr"])

    def __repr__(self) -> str:
        return f"proximal(lr={self.lr:g}, momentum={self.momentum:g}, tol={self.tol:g})"


def _terms(objective: Objective) -> dict[str, Any]:
    return dict(objective.terms.items())


def proximal_part(term: Any) -> Penalty | None:
    """Return the penalty of a term that is not smooth and has a proximal map."""
    penalty = getattr(term, "penalty", None)
    return penalty if isinstance(penalty, Penalty) and not getattr(term, "smooth", False) else None


def _flat(p: Tensor) -> Tensor:
    """A parameter as a penalty sees it, [outputs, inputs]."""
    return p.flatten(1) if p.ndim > 2 else p
