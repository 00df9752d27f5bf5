"""Coordinate descent over growing working sets: linear models with penalties that make coordinates 0.

    minimise over w, b    weight * mean_i f(x_i w + b, y_i)  +  penalty(w)

One coordinate (or group) after another is set to its minimiser, over a set of columns that grows until the others are certified to stay 0.
Iterates are extrapolated every few epochs (Anderson), losses that are not quadratic are met by Newton models with a line search, and a path
over the penalty's weight goes on where the last two solutions point. The intercept is never penalised and is exact at every step.

    found = CoordinateDescent().minimize(Composite(x, y, LeastSquares(), Scaled(L1(), 0.1), intercept=True))
    path = CoordinateDescent(tol=1e-6).path(problem, 50)

The certificate is the duality gap, or for concave penalties and sets without bounds the largest distance from a subdifferential.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.composite import Composite, Solution
from poise.datafits import Huber, LeastSquares, Logistic, Multinomial
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.operators import Box
from poise.penalties import L1, MCP, SCAD, ElasticNet, GroupLasso, Indicator, SquaredL2
from poise.problem import Certificate
from poise.solvers import working_set_loops as kinds
from poise.solvers.working_set_parts import (
    Columns,
    Grouped,
    HuberLoss,
    LogisticLoss,
    Loss,
    MultinomialLoss,
    Rows,
    Separable,
    SquaredLoss,
    Structure,
)
from poise.solvers.working_set_search import Found, Search

__all__ = ["CoordinateDescent"]

FITS = (LeastSquares, Logistic, Multinomial, Huber)
PENALTIES = (L1, ElasticNet, SquaredL2, GroupLasso, MCP, SCAD)


class CoordinateDescent:
    """Cyclic coordinate descent over working sets, with Anderson's extrapolation, to a certificate.

    Fits: `LeastSquares`, `Logistic`, `Multinomial`, `Huber`. Penalties: `L1` (with scales), `ElasticNet`, `SquaredL2`, `GroupLasso`,
    `MCP`, `SCAD`, and the indicator of a `Box`, each also beside a ridge. With several outputs: `L1`, `ElasticNet` and
    `GroupLasso(1)`, a feature with all its outputs. Examples may be sparse; they are neither centred nor copied to dense.

    Args:
        tol: of the certificate, relative: to the objective at 0 for a duality gap, to the largest slope there for a distance.
        iterations: epochs at most, for one penalty; an epoch visits the working set once.
        positive: no coefficient below 0, beside L1, ElasticNet or a ridge.
        working_sets: at most, for one penalty.

    Raises:
        InputError: an argument is out of range.

    >>> from poise.composite import Composite
    >>> from poise.datafits import LeastSquares
    >>> from poise.penalties import L1, Scaled
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> problem = Composite(x, torch.tensor([1.0, 0.1]), LeastSquares(), Scaled(L1(), 0.1))
    >>> CoordinateDescent().minimize(problem).coef
    tensor([0.8000, 0.0000], dtype=torch.float64)

    Source:
        Working sets and priorities: Massias, Gramfort and Salmon (2018); safe screening: Ndiaye et al. (2017); extrapolated coordinate
        descent: Bertrand and Massias (2021). Chosen here: the intercept is minimised out of every single step; groups of up to 32 are
        minimised exactly; a path extrapolates coefficients and correlations from its last two solutions.
    """

    name = "coordinate"
    needs: frozenset[str] = frozenset({"linear model", "penalty by coordinates or groups"})

    def __init__(
        self, tol: float = 1e-8, iterations: int = 100_000, positive: bool = False, working_sets: int = 100
    ) -> None:
        if not (tol > 0 and math.isfinite(tol) and iterations >= 1 and working_sets >= 1):
            raise InputError(
                f"coordinate: tol is finite and positive, iterations and working_sets are at least 1; they are {tol}, {iterations} and "
                f"{working_sets}."
            )
        self.tol, self.iterations, self.positive, self.working_sets = float(tol), iterations, positive, working_sets

    # ---- one problem -------------------------------------------------------------------------------------------------

    def refuses(self, problem: Composite) -> str | None:
        """Return, in words, why this solver does not fit a problem, with one that does; None where it fits."""
        fit, inner = problem.datafit, problem.penalty.penalty
        kind = type(inner.region if isinstance(inner, Indicator) else inner).__name__
        instead = "Use solver='proximal'."
        if problem.design.device.type != "cpu":
            return f"coordinate works on the CPU, and the examples are on {problem.design.device}. {instead}"
        if find_spec("numba") is None:  # it lags behind new Python versions
            return f"coordinate needs numba, which is not installed. {instead}"
        if not isinstance(fit, FITS):
            known = ", ".join(f.__name__ for f in FITS)
            return f"coordinate reads the fits {known}, and not {type(fit).__name__}. {instead}"
        box = isinstance(inner, Indicator) and isinstance(inner.region, Box)
        if not (inner is None or box or isinstance(inner, PENALTIES)):
            known = ", ".join(k.__name__ for k in PENALTIES)
            return f"coordinate needs a penalty by single coordinates or groups ({known}, Box), and {kind} is none of them. {instead}"
        if isinstance(inner, L1) and inner.scales is not None and inner.scales.numel() not in (1, problem.inputs):
            raise InputError(
                f"coordinate: l1 has scales for {inner.scales.numel()} inputs, and the examples have {problem.inputs}."
            )
        if self.positive and not (inner is None or isinstance(inner, L1 | ElasticNet | SquaredL2)):
            return (
                f"coordinate: positive=True goes with L1, ElasticNet or SquaredL2, and the penalty is {kind}. {instead}"
            )
        if problem.outputs is None:
            return None
        if isinstance(fit, Huber):
            return f"coordinate reads Huber with one output, and there are {problem.outputs}. {instead}"
        rows = isinstance(inner, GroupLasso) and int(inner.labels(problem.inputs).max()) + 1 == problem.inputs
        plain = (
            inner is None
            or isinstance(inner, ElasticNet | SquaredL2)
            or (isinstance(inner, L1) and inner.scales is None)
        )
        if self.positive or not (rows or plain):
            return (
                f"coordinate takes several outputs with L1 without scales, ElasticNet or GroupLasso(1), and here are {problem.outputs} "
                f"outputs with {'positive=True' if self.positive else kind}. {instead}"
            )
        return None

    def minimize(self, problem: Composite, start: tuple[Tensor, Tensor] | None = None) -> Solution:
        """Minimise one problem to a certificate.

        A concave penalty has more than one place to end: without `start` it begins at 0 and at the solution of the absolute values that
        it bends, and keeps the better end.

        Args:
            problem: the fit and the penalty.
            start: weights and intercept; 0 by default.

        Returns:
            The solution; a tolerance that is missed is said in its status and as a PoiseWarning.

        Raises:
            IncompatibleError: the fit or the penalty is not one of those above; by name.
        """
        began = time.perf_counter()
        structure, search = self._begin(problem)
        if start is not None:
            search.start(*(_flat(t) for t in start))
        found = search.solve(structure)
        if start is None and isinstance(structure, Separable) and structure.kind != kinds.SEPARABLE:
            found = self._better(search, structure, found)
        return self._solution(problem, structure, found, began)

    def path(
        self,
        problem: Composite,
        factors: Sequence[float] | int = 50,
        smallest: float = 1e-2,
        each: Callable[[float, Solution], None] | None = None,
    ) -> list[Solution]:
        """Minimise a problem for many weights of its penalty, each from where the solutions before point.

        Args:
            problem: with the penalty at the weight that is called 1.
            factors: of that weight, in falling order to be fast; or how many: then they fall geometrically, from where every coefficient
                is 0 to `smallest` of that.
            smallest: see `factors`.
            each: is told every factor with its solution as it is found.

        Raises:
            IncompatibleError: see `minimize`; or the penalty is a set, which no weight changes.
            InputError: factors are negative, not finite, or none.
        """
        if isinstance(problem.penalty.penalty, Indicator) or (
            problem.penalty.penalty is None and problem.penalty.ridge == 0
        ):
            raise IncompatibleError("coordinate: there is no penalty whose weight could vary along a path.")
        structure, search = self._begin(problem)
        if isinstance(factors, int):
            factors = _grid(search, structure, factors, smallest)
        values = [float(f) for f in factors]
        if not values or not all(math.isfinite(f) and f >= 0 for f in values):
            raise InputError(
                f"coordinate: the factors of a path are finite and not negative, and they are {values[:5]}."
            )
        solutions = []
        for factor in values:
            began = time.perf_counter()
            inner = problem.penalty
            here = problem.at(replace(inner, weight=inner.weight * factor, ridge=inner.ridge * factor))
            structure = _structure(here, self.positive)
            solutions.append(self._solution(here, structure, search.follow(structure, factor), began))
            if each is not None:
                each(factor, solutions[-1])
        return solutions

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _begin(self, problem: Composite) -> tuple[Structure, Search]:
        refusal = self.refuses(problem)
        if refusal is not None:
            raise IncompatibleError(refusal)
        structure = _structure(problem, self.positive)
        columns = _columns(problem)
        tol = max(self.tol, 32 * torch.finfo(problem.design.dtype).eps)  # as `Composite.tolerance` does
        search = Search(columns, _loss(problem), structure, problem.intercept, tol, self.working_sets, self.iterations)
        if isinstance(structure, Separable):
            inside = np.clip(0.0, structure.low, structure.high)
            if inside.any():
                search.start(inside, search.b)
        return structure, search

    def _better(self, search: Search, structure: Separable, found: Found) -> Found:
        convex = replace(structure, kind=kinds.SEPARABLE)
        search.solve(convex)
        other = search.solve(structure)
        return min((found, other), key=lambda f: (f.residual > f.tolerance, f.value))

    def _solution(self, problem: Composite, structure: Structure, found: Found, began: float) -> Solution:
        dtype, outputs = problem.design.dtype, problem.outputs
        w, b = torch.from_numpy(found.w), torch.from_numpy(found.b)
        coef = w if outputs is None else w.view(problem.inputs, outputs).T.contiguous()
        coef, intercept = coef.to(dtype), (b[0] if outputs is None else b).to(dtype)
        measure = "duality gap" if structure.gap else "distance to the subdifferential"
        if found.residual > found.tolerance:
            warnings.warn(
                f"coordinate: {measure} {found.residual:.3g} misses the tolerance {found.tolerance:.3g}: {found.status}.",
                PoiseWarning,
                stacklevel=3,
            )
        certificate = Certificate(
            value=found.value,
            residual=max(found.residual, 0.0),
            tolerance=found.tolerance,
            measure=measure,
            iterations=found.epochs,
            status=found.status,
            support=problem.penalty.active(coef).nonzero().squeeze(-1),
            history=tuple(found.history),
        )
        extras = {"working_sets": found.working_sets, "working_set": found.largest}
        return Solution(coef, intercept, certificate, self.name, seconds=time.perf_counter() - began, extras=extras)

    def __repr__(self) -> str:
        return f"coordinate(tol={self.tol:g}, iterations={self.iterations}, positive={self.positive})"


def _flat(t: Tensor) -> Any:
    """Return weights [outputs, inputs] or [inputs] as the loops have them: a feature with its outputs, one after another."""
    t = t.detach().cpu().double()
    return (t.T.contiguous() if t.ndim > 1 else t).numpy().ravel()


def _columns(problem: Composite) -> Columns:
    matrix = problem.design.matrix
    if problem.design.sparse:
        return Columns.of(matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float32))
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    return Columns.of(matrix.detach().numpy())


def _loss(problem: Composite) -> Loss:
    fit, s = problem.datafit, problem.share.double().numpy()
    y = problem.y.numpy()
    if isinstance(fit, Multinomial):
        return MultinomialLoss(y, s, fit.classes)
    y = np.ascontiguousarray(y, dtype=np.float64)
    if isinstance(fit, LeastSquares):
        return SquaredLoss(y.ravel(), s, problem.outputs or 1)
    if isinstance(fit, Logistic):
        return LogisticLoss(2.0 * y - 1.0, s)
    assert isinstance(fit, Huber)
    return HuberLoss(y, s, fit.delta)


def _structure(problem: Composite, positive: bool) -> Structure:
    """Read a penalty with its weight and ridge as blocks."""
    p, inner, weight, ridge = problem.inputs, problem.penalty.penalty, problem.penalty.weight, problem.penalty.ridge
    if isinstance(inner, GroupLasso):
        labels = inner.labels(p).numpy()
        sizes = np.bincount(labels)
        if len(sizes) < p:
            ptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            return Grouped(np.argsort(labels, kind="stable"), ptr, weight * np.sqrt(sizes), ridge)
        if problem.outputs is not None:
            return Rows(np.full(p, weight), problem.outputs, True, ridge)
    l1 = np.full(p, weight)
    low, high = np.full(p, 0.0 if positive else -np.inf), np.full(p, np.inf)
    kind, knee, a = kinds.SEPARABLE, 1.0, 3.7
    if isinstance(inner, L1) and inner.scales is not None:
        l1 = weight * np.broadcast_to(inner.scales.double().numpy(), p)
    elif isinstance(inner, ElasticNet):
        l1, ridge = l1 * inner.ratio, ridge + weight * (1 - inner.ratio)
    elif isinstance(inner, SquaredL2):
        l1, ridge = np.zeros(p), ridge + weight
    elif isinstance(inner, MCP):
        kind, knee = kinds.MCP, inner.knee
    elif isinstance(inner, SCAD):
        kind, knee, a = kinds.SCAD, inner.knee, inner.a
    elif isinstance(inner, Indicator):
        bounds: Any = inner.region
        l1 = np.zeros(p)
        low, high = (np.broadcast_to(b.numpy(), p).copy() for b in bounds._bounds(torch.zeros(1, dtype=torch.float64)))
    elif inner is None:
        l1 = np.zeros(p)
    if problem.outputs is not None:
        return Rows(l1, problem.outputs, False, ridge)
    return Separable(l1, np.full(p, ridge), low, high, kind, knee, a)


def _grid(search: Search, structure: Structure, count: int, smallest: float) -> list[float]:
    """Return geometrically falling factors, from where every coefficient is 0."""
    if count < 2 or not 0 < smallest < 1:
        raise InputError("coordinate: a path has at least 2 points, and its smallest weight is a share in (0, 1).")
    reach, limit = structure.reach(search.v), structure.limit
    used = limit > 0
    top = float((reach[used] / limit[used]).max(initial=0.0))
    top = top if math.isfinite(top) and top > 0 else 100.0
    return [float(f) for f in np.geomspace(top, top * smallest, count)]
