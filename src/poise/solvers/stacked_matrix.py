"""Smooth functions of a stacked matrix, as the low-rank solver asks for them: the contract, any function, and the matrices of a model.

theta = [A, B] or [A; B]      blocks that share a column space or a row space once theta has low rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError
from poise.problem import Problem
from poise.solvers.low_rank import DenseMatrix, LowRank, Matrix, SingularTriplets

__all__ = ["Point", "ProblemMatrix", "SmoothMatrix", "StackedObjective"]

NEEDS = frozenset({"potential", "deterministic"})


class Point(NamedTuple):
    """Where an objective is evaluated: the matrix of low rank, and what is not bound by rank (or None)."""

    theta: LowRank
    free: Tensor | None


class StackedObjective(Protocol):
    """A smooth function of a stacked matrix and of free variables, as the solver asks for it.

    Attributes:
        shape: of the matrix.
        dtype, device: of its entries.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def polishes(self) -> bool:
        """Whether the objective has a faster way to the end once it is near."""
        ...

    @property
    def bound(self) -> float | None:
        """An upper bound of the curvature, or None where it is not known."""
        ...

    def start(self, rank: int, kind: str, generator: torch.Generator) -> Point:
        """Return where to begin."""
        ...

    def value(self, point: Point) -> float:
        """Return the objective."""
        ...

    def stepped(self, point: Point, curvature: float) -> tuple[Matrix, Tensor | None]:
        """Return `theta - grad / curvature` in the metric of that curvature, and the free variables after their own step."""
        ...

    def scaled(self, theta: LowRank, curvature: float, back: bool = False) -> LowRank:
        """Return the matrix in the metric of that curvature, or back from it."""
        ...

    def corrected(self, spectrum: SingularTriplets, point: Point, curvature: float) -> Point:
        """Return the point, or a better one in the same subspace. `spectrum` is that of the scaled matrix."""
        ...

    def polished(self, point: Point, tolerance: float, iterations: int) -> Point:
        """Return the point, or a better one of the same rank; asked for where `polishes` is true."""
        ...


class SmoothMatrix:
    """A smooth function of a matrix (and of free variables), differentiated by PyTorch.

    Args:
        function: `f(theta)` or `f(theta, free)`, 0-dim.
        shape: of theta.
        free: where the free variables begin, or None.
        bound: an upper bound of the curvature, where one is known.
        dtype: of theta.

    >>> from poise.solvers.dictionary import LowRankProjectedGradient
    >>> target = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> f = SmoothMatrix(lambda t: 0.5 * (t - target).square().sum(), (3, 3), bound=1.0)
    >>> round(LowRankProjectedGradient(2).minimize_function(f).certificate.value, 4)
    0.5
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, int],
        free: Tensor | None = None,
        bound: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.function, self.shape, self.free, self.dtype = function, shape, free, dtype
        self._bound = bound
        self.device = torch.device("cpu") if free is None else free.device

    @property
    def bound(self) -> float | None:
        """The bound that was given."""
        return self._bound

    def start(self, rank: int, kind: str, generator: torch.Generator) -> Point:
        """Return 0, or a random matrix."""
        left, right = (torch.randn(*s, generator=generator) for s in ((self.shape[0], rank), (rank, self.shape[1])))
        factor = float(kind == "random")
        theta = LowRank(left.to(self.device, self.dtype), factor * right.to(self.device, self.dtype))
        return Point(theta, None if self.free is None else self.free.detach().clone())

    def value(self, point: Point) -> float:
        """Return `f`."""
        with torch.no_grad():
            return float(self._call(point.theta.dense(), point.free))

    def stepped(self, point: Point, curvature: float) -> tuple[DenseMatrix, Tensor | None]:
        """Return `theta - grad / L`, and the free variables after the same step."""
        theta = point.theta.dense().requires_grad_()
        free = None if point.free is None else point.free.clone().requires_grad_()
        with torch.enable_grad():
            found = torch.autograd.grad(self._call(theta, free), [theta, *([] if free is None else [free])])
        moved = None if free is None else free.detach() - found[1] / curvature
        return DenseMatrix(theta.detach() - found[0] / curvature), moved

    def scaled(self, theta: LowRank, curvature: float, back: bool = False) -> LowRank:
        """Return the matrix as it is: one metric for all entries."""
        return theta

    def corrected(self, spectrum: SingularTriplets, point: Point, curvature: float) -> Point:
        """Return the point as it is."""
        return point

    def polished(self, point: Point, tolerance: float, iterations: int) -> Point:
        """Return the point as it is."""
        return point

    @property
    def polishes(self) -> bool:
        """No: nothing is known of the function."""
        return False

    def _call(self, theta: Tensor, free: Tensor | None) -> Tensor:
        return self.function(theta) if free is None else self.function(theta, free)


class ProblemMatrix(SmoothMatrix):
    """The matrices of a model, stacked, and its other parameters as free variables.

    Args:
        problem: the step.
        names: of the matrices; all two-dimensional parameters where it is None.
        dim: along which they are stacked.

    Raises:
        IncompatibleError: there is no matrix, or a term is not smooth or not the same twice.
        InputError: a name that is not there, or sides that do not fit.
    """

    def __init__(self, problem: Problem, names: Sequence[str] | None, dim: int) -> None:
        for label, term in problem.objective.terms.items():
            lacking = NEEDS - term.capabilities  # type: ignore[operator]
            if lacking or getattr(term, "smooth", True) is False or getattr(term, "formula", "") in ("l1", "mask_l1"):
                why = f"is not {', '.join(sorted(lacking))}" if lacking else "has corners"
                raise IncompatibleError(
                    f"low_rank_projected_gradient needs smooth terms that are the same twice, and {label!r} {why}. Use 'adamw', "
                    "or for penalties on single factors the block solver (poise.solvers.BlockCoordinateDescent)."
                )
        self.problem, self.dim = problem, dim
        self.parameters: Mapping[str, Tensor] = problem.parameters
        self.names = [n for n, p in self.parameters.items() if p.ndim == 2] if names is None else list(names)
        wrong = [n for n in self.names if n not in self.parameters or self.parameters[n].ndim != 2]
        if wrong or not self.names:
            known = [n for n, p in self.parameters.items() if p.ndim == 2]
            raise (InputError if wrong else IncompatibleError)(
                f"low_rank_projected_gradient: stack names matrices of the model ({', '.join(known) or 'it has none'}), "
                f"and it is {names!r}."
            )
        sides = {self.parameters[n].shape[1 - dim] for n in self.names}
        if len(sides) > 1:
            shapes = ", ".join(f"{n} {list(self.parameters[n].shape)}" for n in self.names)
            raise InputError(f"low_rank_projected_gradient: matrices do not stack along dim {dim}: {shapes}.")
        self.others = [n for n in self.parameters if n not in self.names]
        stacked = self._stacked(self.parameters)
        free = torch.cat([self.parameters[n].detach().flatten() for n in self.others]) if self.others else None
        super().__init__(self._never, (stacked.shape[0], stacked.shape[1]), free, None, stacked.dtype)
        self.device = stacked.device

    def start(self, rank: int, kind: str, generator: torch.Generator) -> Point:
        """Return the model's matrices, cut to rank r."""
        stacked = self._stacked(self.parameters)
        if rank > min(stacked.shape):
            raise InputError(
                f"low_rank_projected_gradient: the stacked matrix is {stacked.shape[0]} x {stacked.shape[1]}, and rank is {rank}."
            )
        u, s, vt = torch.linalg.svd(stacked, full_matrices=False)
        return Point(LowRank(u[:, :rank], s[:rank, None] * vt[:rank]), self.free)

    def value(self, point: Point) -> float:
        """Return the objective there."""
        return float(self.problem.value(at=self.named(point.theta.dense(), point.free)))

    def stepped(self, point: Point, curvature: float) -> tuple[DenseMatrix, Tensor | None]:
        """Return matrix and free variables after a gradient step."""
        theta = point.theta.dense()
        named = self.named(theta, point.free)
        gradient = {n: torch.zeros_like(p) for n, p in named.items()} | dict(self.problem.gradient(at=named))
        free = point.free
        if free is not None:
            free = free - torch.cat([gradient[n].flatten() for n in self.others]) / curvature
        return DenseMatrix(theta - self._stacked(gradient) / curvature), free

    def named(self, theta: Tensor, free: Tensor | None) -> dict[str, Tensor]:
        """Return parameters by name."""
        blocks = torch.split(theta, [self.parameters[n].shape[self.dim] for n in self.names], self.dim)
        found = {n: b.contiguous() for n, b in zip(self.names, blocks, strict=True)}
        if free is not None:
            parts = torch.split(free, [self.parameters[n].numel() for n in self.others])
            found |= {n: p.view_as(self.parameters[n]) for n, p in zip(self.others, parts, strict=True)}
        return found

    def write(self, point: Point) -> None:
        """Move the model's parameters there."""
        with torch.no_grad():
            for name, value in self.named(point.theta.dense(), point.free).items():
                self.parameters[name].copy_(value)

    def _stacked(self, named: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([named[n].detach() for n in self.names], self.dim)

    @staticmethod
    def _never(*_: Tensor) -> Tensor:
        raise NotImplementedError("a problem is asked for its own value")
