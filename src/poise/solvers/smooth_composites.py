"""Composites without corners, a fit and squared norms: the normal equations, Newton's method, or L-BFGS.

X' S X w + ridge w = X' S y        least squares, S = weight diag(s) / sum s, columns and target centred where there is an intercept
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poise.composite import Composite, Solution
from poise.datafits import LeastSquares, Logistic
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.solvers.curvature import Dense
from poise.solvers.newton import GradientNormalizedNewton

MOST_UNKNOWNS = 3000
"""Unknowns up to which a dense system is solved: 3,000 take a matrix of 72 MB."""


def require_smooth(problem: Composite, name: str) -> None:
    """Refuse, by name, a penalty with corners.

    Raises:
        IncompatibleError: with the solver that fits.
    """
    if problem.penalty.penalty is not None:
        kind = type(problem.penalty.penalty).__name__
        raise IncompatibleError(
            f"{name} needs a gradient everywhere, and {kind} has none at its corners. Use solver='proximal'."
        )


def _unknowns(problem: Composite) -> int:
    return problem.inputs * (problem.outputs or 1)


def _require_small(problem: Composite, name: str) -> None:
    if problem.design.sparse or _unknowns(problem) > MOST_UNKNOWNS:
        form = "sparse inputs" if problem.design.sparse else f"{_unknowns(problem):,} unknowns"
        raise InputError(
            f"{name} holds a dense matrix of at most {MOST_UNKNOWNS:,} unknowns, and here are {form}. Use solver='lbfgs'."
        )


class NormalEquations:
    """Least squares with a squared norm, in one linear system; without one, the solution of least norm.

    Args:
        tol: of the certificate, relative to the gradient at weights of 0 (or the objective there, for a gap).
    """

    name = "normal_equations"
    needs: frozenset[str] = frozenset()

    def __init__(self, tol: float = 1e-8) -> None:
        self.tol = tol

    def minimize(self, problem: Composite) -> Solution:
        """Solve the system.

        Raises:
            IncompatibleError: the fit is not least squares, or the penalty has corners.
            InputError: too many unknowns for a dense system.
        """
        began = time.perf_counter()
        require_smooth(problem, self.name)
        if not isinstance(problem.datafit, LeastSquares):
            raise IncompatibleError(
                f"{self.name} solves least squares, and the fit is {problem.datafit.name}. Use solver='newton'."
            )
        if problem.design.sparse or problem.inputs > MOST_UNKNOWNS:
            _require_small(problem, self.name)
        x, y, s = problem.design.matrix, problem.y, problem.share
        y = y if y.ndim > 1 else y[:, None]
        root = s.sqrt()[:, None]
        center = (
            (s @ x / s.sum(), s @ y / s.sum())
            if problem.intercept
            else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
        )
        a, t = root * (x - center[0]), root * (y - center[1])
        if problem.penalty.ridge > 0:
            identity = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
            a, t = (
                torch.cat([a, problem.penalty.ridge**0.5 * identity]),
                torch.cat([t, t.new_zeros(a.shape[1], t.shape[1])]),
            )
        w = (
            (torch.linalg.pinv(a) @ t).T
            if a.device.type != "cpu"
            else torch.linalg.lstsq(a, t, driver="gelsd").solution.T
        )
        b = center[1] - w @ center[0]
        w, b = (w[0], b[0]) if problem.outputs is None else (w, b)
        return Solution(w, b, problem.certify(w, b, self.tol, 1), self.name, seconds=time.perf_counter() - began)


class _Flat:
    """A composite without corners as a function of one vector: weights times the size of their inputs first, intercepts after.

    With `unit_j^2 = (sum_i s_i x_ij^2 + ridge / smoothness) / sum s` no direction is steeper for the unit that an input has.
    """

    def __init__(self, problem: Composite) -> None:
        self.problem = problem
        self.zeros = problem.zeros()
        squares = problem.design.squared_norms(problem.share) + problem.penalty.ridge / problem.datafit.smoothness
        unit = (squares / problem.weight).sqrt()
        self.unit = torch.where(unit > 0, unit, 1.0)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, b = self.zeros
        fresh = x[: w.numel()].view_as(w) / self.unit
        return fresh, x[w.numel() :].view_as(b) if self.problem.intercept else b

    def start(self) -> Tensor:
        """Return weights of 0 with the best intercept."""
        w, b = self.zeros
        if not self.problem.intercept:
            return w.flatten()
        return torch.cat([w.flatten(), self.problem.settle(self.problem.design.predict(w), b).flatten()])

    def goal(self, tol: float, size: Callable[[Tensor], Tensor]) -> float:
        """Return the size of a gradient at which a certificate of that tolerance is likely met."""
        w, b = self.zeros
        raw = torch.cat([w.flatten(), b.flatten()]) if self.problem.intercept else w.flatten()
        precision = torch.finfo(raw.dtype)
        at_start, at_zero = (float(size(self.value_and_gradient(x)[1])) for x in (self.start(), raw))
        tol = max(0.01 * tol, precision.eps)
        return max(tol * (at_start if at_start > 64 * precision.eps * at_zero else at_zero), precision.tiny)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        w, b = self.split(x)
        z = self.problem.predict(w, b)
        slope = self.problem.slope(z)
        g = (self.problem.design.correlate(slope) + self.problem.penalty.ridge * w) / self.unit
        value = float(self.problem.fit_value(z) + self.problem.penalty.value(w))
        return value, torch.cat([g.flatten(), slope.sum(0).flatten()]) if self.problem.intercept else g.flatten()

    def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Dense:
        """`X' S X` of the fit, blocks by outputs, and the ridge."""
        problem = self.problem
        w, b = self.split(x)
        z = problem.predict(w, b)
        design = problem.design.matrix / self.unit
        if problem.intercept:
            design = torch.cat([design, design.new_ones(len(design), 1)], 1)
        width, outputs = design.shape[1], problem.outputs or 1
        s = self._blocks(z)
        whole = design.new_empty(outputs, width, outputs, width)
        for i in range(outputs):
            for j in range(i, outputs):
                block = design.T @ (design * s[:, i, j, None])
                whole[i, :, j], whole[j, :, i] = block, block.T
        order = torch.arange(outputs * width).view(outputs, width)
        if problem.intercept:
            order = torch.cat([order[:, :-1].flatten(), order[:, -1]])
        order = order.flatten().to(design.device)
        matrix = whole.reshape(outputs * width, outputs * width)[order][:, order]
        count = self.zeros[0].numel()
        matrix.diagonal()[:count].add_((problem.penalty.ridge / self.unit.square()).repeat(outputs))
        return Dense((matrix + matrix.T) / 2, "the Hessian of the fit", semidefinite=True)

    def _blocks(self, z: Tensor) -> Tensor:
        share = self.problem.share
        if self.problem.datafit.name == "cross_entropy":
            p = z.softmax(1)
            return share[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
        c = self.problem.datafit.curvature(z, self.problem.y)
        return (share * c)[:, None, None] if c.ndim == 1 else torch.diag_embed(share[:, None] * c)


class CompositeNewton:
    """Newton's method with gradient-normalised regularisation (arXiv:2506.13710) on a composite without corners.

    Args:
        tol: of the certificate, relative.
        iterations: at most.
    """

    name = "newton"
    needs: frozenset[str] = frozenset()

    def __init__(self, tol: float = 1e-8, iterations: int = 500) -> None:
        self.tol, self.iterations = tol, iterations

    def minimize(self, problem: Composite) -> Solution:
        """Minimise one problem.

        Raises:
            IncompatibleError: the penalty has corners.
            InputError: too many unknowns for a dense Hessian.
        """
        began = time.perf_counter()
        require_smooth(problem, self.name)
        _require_small(problem, self.name)
        flat = _Flat(problem)
        goal = flat.goal(self.tol, torch.linalg.vector_norm)
        newton = GradientNormalizedNewton(gamma0=10.0, backend="cholesky", tol=goal, iterations=self.iterations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)  # the composite's own certificate decides
            x, inner = newton.minimize_function(flat, flat.start())
        return _finished(problem, flat, x, self.tol, inner.iterations, inner.status, self.name, began, inner.history)


class CompositeLBFGS:
    """SciPy's L-BFGS on a composite without corners: for sparse inputs, and for many unknowns.

    Args:
        tol: of the certificate, relative.
        iterations: at most.
    """

    name = "lbfgs"
    needs: frozenset[str] = frozenset()

    def __init__(self, tol: float = 1e-8, iterations: int = 20_000) -> None:
        self.tol, self.iterations = tol, iterations

    def minimize(self, problem: Composite) -> Solution:
        """Minimise one problem.

        Raises:
            IncompatibleError: the penalty has corners.
        """
        from scipy.optimize import minimize

        began = time.perf_counter()
        require_smooth(problem, self.name)
        flat = _Flat(problem)
        start = flat.start()

        def both(x: Any) -> tuple[float, Any]:
            value, gradient = flat.value_and_gradient(torch.from_numpy(x).to(start))
            return value, gradient.double().cpu().numpy()

        goal = flat.goal(self.tol, lambda g: g.abs().max())
        options = {"maxiter": self.iterations, "maxfun": 2 * self.iterations, "gtol": goal, "ftol": 0.0, "maxcor": 20}
        found = minimize(both, start.double().cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
        x = torch.from_numpy(found.x).to(start)
        why = "" if found.success else f"stopped after {found.nit} iterations: {str(found.message).lower()}"
        return _finished(problem, flat, x, self.tol, int(found.nit), why, self.name, began)


def _finished(
    problem: Composite,
    flat: _Flat,
    x: Tensor,
    tol: float,
    iterations: int,
    why: str,
    name: str,
    began: float,
    history: Any = (),
) -> Solution:
    w, b = flat.split(x)
    b = problem.settle(problem.design.predict(w), b)
    certificate = problem.certify(w, b, tol, iterations, history, why)
    _warn_of_separation(problem, w, b)
    return Solution(w, b, certificate, name, seconds=time.perf_counter() - began)


def _warn_of_separation(problem: Composite, w: Tensor, b: Tensor) -> None:
    """Say it where classes are separated and nothing is charged: the infimum is 0, and no weights reach it."""
    if problem.penalty.ridge > 0 or problem.datafit.name not in ("logistic", "cross_entropy"):
        return
    z = problem.predict(w, b)
    right = (z > 0) == (problem.y > 0.5) if isinstance(problem.datafit, Logistic) else z.argmax(1) == problem.y
    if bool(right[problem.share > 0].all()):
        warnings.warn(
            "The classes are separated without error, so the objective has no minimum: weights grow without bound, and these stopped "
            "where the tolerance was met. Add a penalty, such as 0.01*l2.",
            PoiseWarning,
            stacklevel=4,
        )
