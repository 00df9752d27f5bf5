"""Minimise a formula of a linear model to a certificate, at one weight or along a path.

found = poise.solve("least_squares + 0.1*l1", (x, y))
found.coef, found.intercept, found.certificate, found.reason
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from poise.composite import Composite, Solution
from poise.datafits import LeastSquares
from poise.errors import IncompatibleError, InputError, nearest
from poise.formula import parse
from poise.objective import Objective
from poise.penalties import L1, ElasticNet, GroupLasso, Indicator, SquaredL2
from poise.solvers.coordinate import BlockCoordinate
from poise.solvers.proximal import ProximalGradient
from poise.solvers.smooth_composites import MOST_UNKNOWNS, CompositeLBFGS, CompositeNewton, NormalEquations
from poise.solvers.working_sets import CoordinateDescent
from poise.structure import composite_of

SOLVERS: dict[str, Callable[..., Any]] = {
    "block_coordinate": BlockCoordinate,
    "coordinate": CoordinateDescent,
    "lbfgs": CompositeLBFGS,
    "newton": CompositeNewton,
    "normal_equations": NormalEquations,
    "proximal": ProximalGradient,
}
"""Solvers of linear models, by name."""


def solve(
    formula: str | Objective,
    data: Any,
    *,
    intercept: bool = True,
    sample_weight: Any = None,
    classes: int | None = None,
    solver: str | None = None,
    tol: float = 1e-8,
    iterations: int | None = None,
) -> Solution:
    """Minimise an objective of a linear model.

        minimise over w, b    weight * mean_i f(w x_i + b; y_i)  +  penalties(w)

    Args:
        formula: one fit (`least_squares`, `huber`, `cross_entropy`) and penalties, with numbers for weights.
        data: a pair (examples [n, inputs], targets [n]); examples may be a SciPy sparse matrix. Or the name or path of data, as
            `poise.load_task` reads it; its training part of seed 0 is used, standardised.
        intercept: whether there is a free intercept.
        sample_weight: of the examples.
        classes: number of classes, where the targets may not show all.
        solver: one of `SOLVERS`; by default the first that fits, and `reason` says why.
        tol: relative tolerance of the certificate; 32 units of rounding at least, 4e-6 in float32.
        iterations: at most; the solver's own default where it is None.

    Returns:
        Weights, intercept, certificate, the solver's name and the reason for it.

    Raises:
        IncompatibleError: the formula is not that of a linear model, or the solver does not fit it; by name.
        InputError: data or arguments are not what is said above.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    >>> found = solve("least_squares + 0.1*l1", (x, torch.tensor([1.0, 0.1])), intercept=False)
    >>> found.coef
    tensor([0.8000, 0.0000], dtype=torch.float64)
    >>> found.certificate.measure
    'duality gap'
    """
    x, y, s = _arrays(data)
    problem = composite_of(
        parse(formula) if isinstance(formula, str) else formula,
        x,
        y,
        intercept,
        s if sample_weight is None else sample_weight,
        classes,
    )
    return minimize(problem, solver=solver, tol=tol, iterations=iterations)


def minimize(
    problem: Composite,
    *,
    solver: str | None = None,
    tol: float = 1e-8,
    iterations: int | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> Solution:
    """Minimise a composite with the solver that fits it; see `solve`.

    Args:
        start: weights and intercept from which a solver that can begin anywhere begins.
    """
    name, reason = choose(problem) if solver is None else (solver, "asked for")
    if name not in SOLVERS:
        raise InputError(
            f"There is no solver {name!r} of linear models."
            + (nearest(name, SOLVERS) or f" There are: {', '.join(SOLVERS)}.")
        )
    if not (tol > 0 and math.isfinite(tol)) or (iterations is not None and iterations < 1):
        raise InputError(
            f"solve: tol is positive and finite, and iterations at least 1; they are {tol} and {iterations}."
        )
    options: dict[str, Any] = {"tol": tol}
    if iterations is not None and name != "normal_equations":
        options["iterations"] = iterations
    inner = problem.penalty.penalty
    if name == "block_coordinate" and not (inner is None or isinstance(inner, L1 | ElasticNet | SquaredL2 | Indicator)):
        # blocks are minimised exactly where kinks and bounds are known alone
        options |= {"update": "lipschitz", "partition": "groups" if isinstance(inner, GroupLasso) else None}
    made = SOLVERS[name](**options)
    found: Solution = made.minimize(problem, start) if start is not None and name in STARTED else made.minimize(problem)
    return replace(found, reason=reason)


STARTED = ("coordinate", "proximal")
"""Solvers that can begin at any point."""

MANY_ENTRIES = 50_000
"""Entries of a dense matrix from which single coordinates are worth their compiled loops; below, all methods take moments."""


def choose(problem: Composite) -> tuple[str, str]:
    """Return the name of the solver that fits a problem, and why, in words."""
    smooth = problem.penalty.penalty is None
    unknowns = problem.inputs * (problem.outputs or 1)
    if not smooth and _by_coordinates(problem):
        inner = problem.penalty.penalty
        if isinstance(inner, Indicator):
            return "coordinate", "bounds hold coordinates, and only those that move need to be visited"
        return (
            "coordinate",
            f"{type(inner).__name__} makes coordinates 0, and only those that are not need to be visited",
        )
    if not smooth:
        return "proximal", f"{type(problem.penalty.penalty).__name__} has corners, and its proximal map is known"
    if isinstance(problem.datafit, LeastSquares) and not problem.design.sparse and problem.inputs <= MOST_UNKNOWNS:
        return "normal_equations", "squares alone are one linear system"
    if not problem.design.sparse and unknowns <= MOST_UNKNOWNS:
        return "newton", f"everything is smooth, and a Hessian of {unknowns:,} unknowns is small"
    size = "the inputs are sparse" if problem.design.sparse else f"{unknowns:,} unknowns are too many for a Hessian"
    return "lbfgs", f"everything is smooth, and {size}"


def _by_coordinates(problem: Composite) -> bool:
    large = problem.design.sparse or math.prod(problem.design.shape) >= MANY_ENTRIES
    # within bounds that hold most coordinates, a curved loss of separated classes leaves single coordinates standing
    bounded = isinstance(problem.penalty.penalty, Indicator) and not isinstance(problem.datafit, LeastSquares)
    return large and not bounded and CoordinateDescent().refuses(problem) is None


def _arrays(data: Any) -> tuple[Any, Any, Any]:
    """Return examples, targets and the weights of the examples or None."""
    if isinstance(data, str | os.PathLike):
        from poise.tasks import load_task

        data = load_task(data)
    if hasattr(data, "split") and hasattr(data, "target_type"):
        data = data.split(0)
    if hasattr(data, "train") and isinstance(data.train, dict):
        part = data.train
        return part["input"].flatten(1).double(), part["target"], part.get("sample_weight")
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1], None
    raise InputError("solve: data is a pair (examples, targets), a task, or the name or path of data.")


# ---- paths --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathPoint:
    """One weight of a path.

    Attributes:
        factor: what multiplies every penalty of the formula.
        solution: there.
        support: weights (or groups of them along the inputs) that are not 0.
    """

    factor: float
    solution: Solution
    support: int


def solve_path(
    problem: Composite,
    factors: Sequence[float] | int = 30,
    *,
    smallest: float = 1e-3,
    solver: str | None = None,
    tol: float = 1e-6,
    iterations: int | None = None,
    each: Callable[[PathPoint], None] | None = None,
) -> list[PathPoint]:
    """Minimise a composite for many weights of its penalty, each from the solution before.

    Args:
        problem: with the penalty at the weight that is called 1.
        factors: of that weight, or how many: then they fall geometrically, from where every weight is 0 to `smallest` of that where
            the penalty is a norm, else from 100 to `100 * smallest`.
        solver, tol, iterations: see `solve`.
        each: is told every point as it is found.

    Raises:
        IncompatibleError: there is no penalty to vary, or it is a set, which no weight changes.
    """
    inner = problem.penalty
    if inner.penalty is None and inner.ridge == 0:
        raise IncompatibleError("The formula has no penalty, so there is no weight to vary along a path.")
    if inner.penalty is not None and inner.penalty.is_set:
        raise IncompatibleError(
            f"{type(inner.penalty).__name__} is a set, which no weight changes, so there is no path."
        )
    if isinstance(factors, int):
        if factors < 2 or not 0 < smallest < 1:
            raise InputError("A path has at least 2 points, and its smallest weight is a share in (0, 1).")
        top = problem.largest_weight() / inner.weight if inner.weight > 0 else math.inf
        # a touch above, so that rounding lets nothing in at the first point
        top = top * (1 + 1e-6) if math.isfinite(top) and top > 0 else 100.0
        factors = [float(f) for f in np.geomspace(top, top * smallest, factors)]
    found: list[PathPoint] = []

    def tell(factor: float, solution: Solution) -> None:
        active = inner.active(solution.coef)
        found.append(PathPoint(factor, solution, int((active.any(0) if active.ndim > 1 else active).sum())))
        if each is not None:
            each(found[-1])

    name, reason = choose(problem) if solver is None else (solver, "asked for")
    if name == "coordinate":
        options = {"tol": tol} if iterations is None else {"tol": tol, "iterations": iterations}
        made = CoordinateDescent(**options)  # type: ignore[arg-type]
        made.path(problem, factors, each=lambda factor, solution: tell(factor, replace(solution, reason=reason)))
        return found
    start = None
    for factor in factors:
        here = problem.at(replace(inner, weight=factor * inner.weight, ridge=factor * inner.ridge))
        convex = here.penalty.is_convex
        solution = minimize(here, solver=solver, tol=tol, iterations=iterations, start=start if convex else None)
        tell(factor, solution)
        start = solution.coef, solution.intercept
    return found


__all__ = ["SOLVERS", "PathPoint", "choose", "minimize", "solve", "solve_path"]
