"""Gradient steps on a matrix of low rank: step, then cut back to rank r.

    theta <- T_r(theta - (1/L) grad_theta f(theta, gamma)),      gamma <- gamma - (1/L) grad_gamma f(theta, gamma)

`T_r` keeps the r leading singular triplets, so every iterate stays two thin factors. Where f is convex in theta (the lifted form of
supervised dictionary learning is) and well conditioned, this reaches the global minimiser although rank is not a convex constraint.

    LowRankProjectedGradient(rank=5).minimize_function(SupervisedFactors(x, y, xi=0.1))   two data terms that share a factor
    LowRankProjectedGradient(rank=5).minimize_function(SmoothMatrix(f, (30, 40)))         any smooth function of a matrix
    LowRankProjectedGradient(rank=5).minimize(problem)                                    the stacked matrices of a model
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.objective import Objective
from poise.operators import require_count
from poise.problem import Certificate, Problem, Step
from poise.solvers.low_rank import DenseMatrix, LowRank, Matrix, truncated_svd
from poise.solvers.stacked_matrix import NEEDS, Point, ProblemMatrix, SmoothMatrix, StackedObjective

__all__ = ["LowRankProjectedGradient", "LowRankSolution", "Point", "SmoothMatrix", "StackedObjective"]

STEPS = ("auto", "fixed")
STARTS = ("auto", "svd", "classifier", "random")
DECAY, GROWTH = 0.7, 2.0
"""The searched curvature falls by the first after a step and rises by the second after a trial that did not lower the value."""


ROUGH, EXACT = 1e-9, 1e-16
"""Accuracy of the truncation, as relative rise of the kept squares, at first and where no step lowers the value."""
QUIET = 1e-4
"""Relative fall of the value over ten steps below which polishing takes over."""


@dataclass(frozen=True)
class LowRankSolution:
    """What was found.

    Attributes:
        theta: the stacked matrix as two factors.
        free: the free variables, or None.
        certificate: its residual is the norm of the gradient mapping, `L |theta - T_r(theta - grad / L)|`, over that of the
            gradient at 0.
        gap: `(s_r - s_{r+1}) / s_r` of the matrix before the last truncation: 0 where the projection is not unique.
        curvature: the last curvature of the search.
    """

    theta: LowRank
    free: Tensor | None
    certificate: Certificate
    gap: float
    curvature: float

    @property
    def point(self) -> Point:
        """Matrix and free variables."""
        return Point(self.theta, self.free)


class LowRankProjectedGradient:
    """Low-rank projected gradient descent (LPGD) for a smooth objective of a stacked matrix.

    Args:
        rank: r, an integer of at least 1.
        step: "auto" searches the curvature below its bound (a trial that does not lower the value doubles it), "fixed" takes one
            over the bound, and a number is the step itself.
        momentum: extrapolate between steps, with a restart where the value would rise.
        correct: after a step minimise within the found subspace, where the objective knows how.
        polish: end with quasi-Newton steps on the subspace, where the objective knows how.
        tol: of the certificate's residual.
        max_iter: steps at most; polishing makes as many again at most.
        start: "svd", "classifier", "random", or "auto": the better of the first two; a function of which nothing is known starts at 0
            but for "random".
        seed: of everything random.
        stack: for `minimize`: names of the matrices that are stacked; all two-dimensional parameters where it is None.
        dim: along which dimension they are stacked.

    With `momentum=False, correct=False, polish=False` and a number as step this is the paper's algorithm.

    Raises:
        InputError: an argument is out of range.

    >>> LowRankProjectedGradient(2)
    low_rank_projected_gradient(rank=2, step='auto', tol=1e-06)

    Source:
        arXiv:2206.06774, algorithm LPGD. Chosen here: search, momentum, correction, polish and certificate.
    """

    name = "low_rank_projected_gradient"
    needs = NEEDS

    def __init__(
        self,
        rank: int,
        step: str | float = "auto",
        *,
        momentum: bool = True,
        correct: bool = True,
        polish: bool = True,
        tol: float = 1e-6,
        max_iter: int = 500,
        start: str = "auto",
        seed: int = 0,
        stack: Sequence[str] | None = None,
        dim: int = 1,
    ) -> None:
        self.rank = require_count(self.name, rank)
        if isinstance(step, str) and step not in STEPS:
            raise InputError(f"{self.name}: step is 'auto', 'fixed' or a number above 0, and it is {step!r}.")
        for label, number in (("tol", tol), ("step", 1.0 if isinstance(step, str) else step)):
            if not (math.isfinite(number) and number > 0):
                raise InputError(f"{self.name}: {label} must be finite and above 0, and it is {number}.")
        if start not in STARTS:
            raise InputError(f"{self.name}: start is one of {', '.join(STARTS)}, and it is {start!r}.")
        if dim not in (0, 1):
            raise InputError(f"{self.name}: matrices are stacked along dim 0 or 1, and it is {dim!r}.")
        self.step_size, self.momentum, self.correct, self.polish = step, momentum, correct, polish
        self.tol, self.max_iter = tol, require_count(self.name, max_iter)
        self.kind, self.seed, self.stack, self.dim = start, seed, stack, dim
        self.curvature: float | None = None

    def __repr__(self) -> str:
        return f"{self.name}(rank={self.rank}, step={self.step_size!r}, tol={self.tol:g})"

    # ---- an objective ------------------------------------------------------------------------------------------------

    def minimize_function(self, objective: StackedObjective, start: Point | None = None) -> LowRankSolution:
        """Minimise over matrices of rank r.

        Args:
            objective: `SupervisedFactors`, `SmoothMatrix`, or anything that has their methods.
            start: where to begin; the objective's own start where it is None.

        Returns:
            Factors, free variables and a certificate; what misses its tolerance says so in `status` and as a PoiseWarning.

        Raises:
            InputError: the rank exceeds the smaller side of the matrix.
            NonFiniteError: the objective is not finite at the start.
        """
        rows, columns = objective.shape
        if self.rank > min(rows, columns):
            raise InputError(
                f"{self.name}: the stacked matrix is {rows} x {columns}, so its rank is at most {min(rows, columns)}, "
                f"and rank is {self.rank}."
            )
        generator = torch.Generator().manual_seed(self.seed)
        point = objective.start(self.rank, self.kind, generator) if start is None else start
        descent = _Descent(self, objective, point, generator)
        descent.run()
        sure = objective.bound
        tolerance = self.tol
        before = math.inf
        for _ in range(3 if descent.polishes else 1):
            if descent.polishes:
                descent.take(objective.polished(descent.point, tolerance, self.max_iter))
            # Where no bound is known the largest curvature that the search met stands for it.
            curvature = (descent.largest or descent.curvature) if sure is None else sure
            residual, gap = gradient_mapping(objective, descent.point, self.rank, curvature)
            if residual <= self.tol or residual > 0.5 * before:
                break
            tolerance, before = tolerance / 10, residual
        return self._judged(descent, residual, gap)

    def _judged(self, descent: _Descent, residual: float, gap: float) -> LowRankSolution:
        status = "converged" if residual <= self.tol else f"{descent.status} with gradient mapping {residual:.3g}"
        if residual > self.tol:
            warnings.warn(f"{self.name}: {status}; {self.tol:.3g} was asked for.", PoiseWarning, stacklevel=3)
        self.curvature = descent.curvature
        history = descent.history
        certificate = Certificate(
            value=history[-1],
            residual=residual,
            tolerance=self.tol,
            measure="relative norm of the gradient mapping",
            iterations=len(history) - 1,
            status=status,
            history=tuple(history),
        )
        return LowRankSolution(descent.point.theta, descent.point.free, certificate, gap, descent.curvature)

    # ---- a problem of Poise --------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, objective: Objective) -> None:
        """Nothing is held between steps but the curvature."""

    def minimize(self, problem: Problem) -> Certificate:
        """Minimise one problem from where the model stands, its stacked matrices bound by rank; leave the model at the solution.

        Raises:
            IncompatibleError: a term is not smooth or not the same twice, or there is no matrix.
            InputError: matrices that do not stack, or a rank that is too large.
        """
        problem.reports()
        stacked = ProblemMatrix(problem, self.stack, self.dim)
        solution = self.minimize_function(stacked, stacked.start(self.rank, "", torch.Generator()))
        stacked.write(solution.point)
        return solution.certificate

    def step(self, problem: Problem, accept: Callable[[Step], bool] | None = None) -> Step:
        """Make one step of the search on a whole batch; the curvature goes on from the step before."""
        stacked = ProblemMatrix(problem, self.stack, self.dim)
        problem.reports()
        report = problem.step
        if accept is not None and not accept(report):
            report.skipped = True
            return report
        point = stacked.start(self.rank, "", torch.Generator())
        descent = _Descent(self, stacked, point, torch.Generator().manual_seed(self.seed))
        descent.advance()
        self.curvature = descent.curvature
        stacked.write(descent.point)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the curvature that a resumed run goes on with."""
        return {"curvature": self.curvature}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.curvature = state["curvature"]


class _Descent:
    """The iterates of one run."""

    def __init__(
        self, solver: LowRankProjectedGradient, objective: StackedObjective, point: Point, generator: torch.Generator
    ) -> None:
        self.solver, self.objective, self.generator = solver, objective, generator
        self.point = self.before = point
        first = objective.value(point)
        if not math.isfinite(first):
            raise NonFiniteError(f"{solver.name}: the objective is {first} at the start; it must be finite.")
        self.history = [first]
        self.polishes = solver.polish and objective.polishes
        self.pace, self.precision = 1.0, ROUGH
        self.basis: Tensor | None = None
        self.largest = 0.0
        self.status = f"stopped after {solver.max_iter} steps"
        self.searches = solver.step_size == "auto"
        if not isinstance(solver.step_size, str):
            self.curvature = 1.0 / solver.step_size
        elif solver.curvature is not None and self.searches:
            self.curvature = solver.curvature
        else:
            self.curvature = (objective.bound or 1.0) / (16.0 if self.searches else 1.0)

    def run(self) -> None:
        """Step until the value stands still or the limit is reached."""
        quiet = QUIET if self.polishes else self.solver.tol * 1e-6
        for done in range(1, self.solver.max_iter + 1):
            if not self.advance():
                self.status = f"no step lowers the value after {done} steps"
                return
            if done >= 10 and self.history[-11] - self.history[-1] <= quiet * abs(self.history[-1]):
                self.status = f"the value stands still after {done} steps"
                return

    def advance(self) -> bool:
        """Make one step; False where none lowers the value."""
        momentum = 0.0
        if self.solver.momentum:
            pace = (1.0 + math.sqrt(1.0 + 4.0 * self.pace**2)) / 2.0
            momentum, self.pace = (self.pace - 1.0) / pace, pace
        before = self.curvature
        for _ in range(60):
            found, ceiling = self._trial(momentum)
            value = self.objective.value(found)
            if self.searches and value > ceiling:
                self.curvature *= GROWTH
                continue
            if not self.searches and not self.solver.momentum:
                break
            if value <= self.history[-1]:
                break
            if momentum:
                momentum, self.pace = 0.0, 1.0
            elif self.searches:
                self.curvature *= GROWTH
                if self.objective.bound is not None and self.curvature > 8 * self.objective.bound:
                    # With one over the bound every step lowers the value but for the truncation's error, and then rounding.
                    self.curvature = self.objective.bound
                    if self.precision <= EXACT:
                        return False
                    self.precision = EXACT
            else:
                break
        else:
            # Rounding, not curvature, refuses a step this short.
            self.curvature = before
            return False
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{self.solver.name}: the objective became {value}; step {self.solver.step_size!r} is too long. Use step='auto'."
            )
        self.before, self.point = self.point, found
        self.history.append(value)
        self.largest = max(self.largest, self.curvature)
        if self.searches:
            self.curvature *= DECAY
        return True

    def _trial(self, momentum: float) -> tuple[Point, float]:
        """Return where a step leads, and the value that a sufficient curvature would not exceed there (infinite: not asked)."""
        at = self.point
        if momentum:
            theta = LowRank(at.theta.left, (1 + momentum) * at.theta.right).plus(self.before.theta, -momentum)
            free = (
                at.free
                if at.free is None or self.before.free is None
                else at.free + momentum * (at.free - self.before.free)
            )
            at = Point(theta, free)
        matrix, free = self.objective.stepped(at, self.curvature)
        spectrum = truncated_svd(
            matrix,
            self.solver.rank,
            start=self.basis,
            generator=self.generator,
            dtype=self.objective.dtype,
            device=self.objective.device,
            tolerance=self.precision,
        )
        self.basis = spectrum.left
        found = Point(self.objective.scaled(spectrum.low_rank(), self.curvature, back=True), free)
        if self.searches and isinstance(matrix, DenseMatrix):
            return found, self._ceiling(at, matrix, found)
        return (self.objective.corrected(spectrum, found, self.curvature) if self.solver.correct else found), math.inf

    def _ceiling(self, at: Point, matrix: DenseMatrix, found: Point) -> float:
        """`f(y) + <grad, x - y> + L/2 |x - y|^2 = f(y) + L/2 (|x - s|^2 - |y - s|^2)` with `s = y - grad / L`."""
        s = matrix.entries
        away = (found.theta.dense() - s).double().square().sum() - (at.theta.dense() - s).double().square().sum()
        if at.free is not None and found.free is not None:
            away = away - (found.free - at.free).double().square().sum()
        value = self.objective.value(at)
        return value + self.curvature / 2 * float(away) + 64 * torch.finfo(self.objective.dtype).eps * abs(value)

    def take(self, point: Point) -> None:
        """Go on from a point that is no worse."""
        value = self.objective.value(point)
        # Among values that rounding does not tell apart the polished point is the better one.
        if value <= self.history[-1] + 1e-12 * abs(self.history[-1]):
            self.point = self.before = point
            self.history.append(value)


def gradient_mapping(objective: StackedObjective, point: Point, rank: int, curvature: float) -> tuple[float, float]:
    """Return `|theta - T_r(theta - grad / L)|` over `|grad(0)| / L`, and the gap between the r-th and the next singular value."""
    matrix, free = objective.stepped(point, curvature)
    start = torch.linalg.qr(objective.scaled(point.theta, curvature).left)[0]
    spectrum = truncated_svd(
        matrix, rank, start=start, dtype=objective.dtype, device=objective.device, tolerance=EXACT, powers=300
    )
    moved = spectrum.low_rank().plus(objective.scaled(point.theta, curvature), -1.0)
    # The difference of two nearly equal products loses half the digits in its Gram form, so the left sides are made orthonormal first.
    r = torch.linalg.qr(moved.left)[1]
    squared = (r @ moved.right).square().sum()
    zero = Point(LowRank(0 * point.theta.left, 0 * point.theta.right), None if point.free is None else 0 * point.free)
    at_zero, free_at_zero = objective.stepped(zero, curvature)
    scale = _squared_norm(at_zero)
    if free is not None and point.free is not None and free_at_zero is not None:
        squared = squared + (free - point.free).square().sum()
        scale = scale + free_at_zero.square().sum()
    last = float(spectrum.values[-1])
    gap = (last - spectrum.following) / last if last > 0 else 0.0
    return math.sqrt(float(squared) / max(float(scale), torch.finfo(torch.float64).tiny)), gap


def _squared_norm(matrix: Matrix) -> Tensor:
    if isinstance(matrix, DenseMatrix):
        return matrix.entries.square().sum()
    found: Tensor = matrix.squared_norm()  # type: ignore[attr-defined]
    return found
