"""Positive semidefinite curvature at a point, and the step `(H + shift I)^-1 g` that it takes.

    Dense(H)              Cholesky, d^3/3; after several shifts at the same point one eigendecomposition serves all further ones
    RankOne(a, v)         H = a v v', solved by Sherman and Morrison in O(d)
    MatrixFree(product)   conjugate gradients; `1 + |H| / shift` bounds the condition number
    Zero()                H = 0: a gradient step of length |g| / shift

A solve that meets curvature below `-shift` answers None: the shift is too small there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError

__all__ = ["Curvature", "Dense", "MatrixFree", "RankOne", "Zero", "as_curvature", "with_backend"]

# An eigendecomposition costs as much as about 27 Cholesky factors, and a search rarely needs more than four.
_FACTORS_BEFORE_EIGENVECTORS = 8
LARGEST_DENSE = 10_000
"""Dimensions up to which a dense matrix is made when it is asked for (800 MB in float64)."""
PREFER_DENSE = 2_000
"""Dimensions up to which a dense matrix is made when nothing is asked for."""


class Curvature(Protocol):
    """A symmetric matrix at one point."""

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        """Return `(H + shift I)^-1 g` for `shift > 0`; None where `H + shift I` is not positive definite."""
        ...

    def product(self, h: Tensor) -> Tensor:
        """Return `H h`."""
        ...

    def within(self, root: Tensor) -> Curvature:
        """Return `L^-1 H L^-T` for the Cholesky factor `L` of a metric: [d, d], or [d] where it is diagonal."""
        ...

    @property
    def floor(self) -> float:
        """The shift below which rounding decides."""
        ...


class Dense:
    """A matrix that is held.

    Args:
        matrix: symmetric, [d, d].
        name: what it approximates, for error messages.
        semidefinite: a negative eigenvalue is an error, not a shift that was too small.

    Raises:
        InputError: the matrix is not square or not symmetric; on a solve, it is not positive semidefinite and should be.
        NonFiniteError: an entry is infinite or NaN.
    """

    def __init__(self, matrix: Tensor, name: str = "the Hessian", semidefinite: bool = False) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"newton: {name} must be a square matrix [d, d], but its shape is {list(matrix.shape)}.")
        size = float(matrix.diagonal().abs().max()) if len(matrix) else 0.0
        if not math.isfinite(size):
            raise NonFiniteError(f"newton: {name} has an entry that is infinite or NaN.")
        self.matrix, self.name, self.semidefinite, self.size = matrix, name, semidefinite, size
        self._factors = 0
        self._pairs: tuple[Tensor, Tensor] | None = None

    def check_symmetric(self) -> Dense:
        """Return itself; for a matrix that somebody else made.

        Raises:
            InputError: it is not symmetric.
        """
        gap = float((self.matrix - self.matrix.T).abs().max()) if len(self.matrix) else 0.0
        if not gap <= math.sqrt(torch.finfo(self.matrix.dtype).eps) * max(float(self.matrix.abs().max()), 1e-300):
            raise InputError(f"newton: {self.name} is not symmetric: H - H' has an entry of size {gap:.3g}.")
        return self

    @property
    def floor(self) -> float:
        return torch.finfo(self.matrix.dtype).eps * self.size

    def product(self, h: Tensor) -> Tensor:
        return self.matrix @ h

    def within(self, root: Tensor) -> Dense:
        if root.ndim == 1:
            return Dense(self.matrix / root[:, None] / root, self.name, self.semidefinite)
        left = torch.linalg.solve_triangular(root, self.matrix, upper=False)
        whole = torch.linalg.solve_triangular(root, left.T, upper=False)
        return Dense((whole + whole.T) / 2, self.name, self.semidefinite)

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        if self._pairs is None and self._factors >= _FACTORS_BEFORE_EIGENVECTORS:
            self._pairs = torch.linalg.eigh(self.matrix)
        if self._pairs is not None:
            values, vectors = self._pairs
            if float(values[0]) + shift <= 0:
                self._refuse(shift)
                return None
            return vectors @ ((vectors.T @ g) / (values + shift))
        self._factors += 1
        shifted = self.matrix.clone()
        shifted.diagonal().add_(shift)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            self._refuse(shift)
            return None
        return torch.cholesky_solve(g[:, None], factor)[:, 0]

    def _refuse(self, shift: float) -> None:
        if not self.semidefinite:
            return
        least = float(torch.linalg.eigvalsh(self.matrix)[0])
        if least < -100 * len(self.matrix) * self.floor:
            raise InputError(
                f"newton: {self.name} must be positive semidefinite, and its least eigenvalue is {least:.3g} (the shift was {shift:.3g}). "
                "Give another approximation, such as hessian='gauss_newton' or 'fisher'."
            )


class RankOne:
    """`H = a v v'` with `a >= 0`.

    Raises:
        InputError: `a` is negative or not finite.
    """

    def __init__(self, scale: float, vector: Tensor) -> None:
        if not (math.isfinite(scale) and scale >= 0):
            raise InputError(
                f"newton: the factor of a rank-one Hessian must be finite and at least 0, but it is {scale}."
            )
        self.scale, self.vector = scale, vector
        self._square = float(vector.dot(vector))

    @property
    def floor(self) -> float:
        return torch.finfo(self.vector.dtype).eps * self.scale * self._square

    def product(self, h: Tensor) -> Tensor:
        return (self.scale * self.vector.dot(h)) * self.vector

    def within(self, root: Tensor) -> RankOne:
        return RankOne(self.scale, towards(root, self.vector))

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        # (g - (a <v, g> / (shift + a |v|^2)) v) / shift
        share = self.scale * float(self.vector.dot(g)) / (shift + self.scale * self._square)
        return (g - share * self.vector) / shift


class MatrixFree:
    """A matrix that is known by its products.

    Args:
        product: `h -> H h`, [d] to [d].
        tolerance: relative residual of the linear system.
        iterations: of conjugate gradients, at most; 10 d + 100 where it is None.
        name: what it approximates, for error messages.
        semidefinite: negative curvature is an error, not a shift that was too small.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        tolerance: float = 1e-12,
        iterations: int | None = None,
        name: str = "the Hessian",
        semidefinite: bool = False,
    ) -> None:
        self.product, self.tolerance, self.iterations = product, tolerance, iterations
        self.name, self.semidefinite = name, semidefinite
        self.products = 0
        self.size = 0.0

    @property
    def floor(self) -> float:
        return torch.finfo(torch.float64).eps * self.size

    def within(self, root: Tensor) -> MatrixFree:
        def product(h: Tensor) -> Tensor:
            return towards(root, self.product(back(root, h)))

        return MatrixFree(product, self.tolerance, self.iterations, self.name, self.semidefinite)

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        x, r = torch.zeros_like(g), g.clone()
        p, rr = r.clone(), float(r.dot(r))
        goal = max(self.tolerance, torch.finfo(g.dtype).eps) ** 2 * rr
        for _ in range(10 * len(g) + 100 if self.iterations is None else self.iterations):
            if rr <= goal:
                break
            hp = self.product(p)
            self.products += 1
            pp = float(p.dot(p))
            bend = float(p.dot(hp)) / pp
            self.size = max(self.size, abs(bend))
            if not bend + shift > 0:
                self._refuse(bend, shift)
                return None
            step = rr / ((bend + shift) * pp)
            x.add_(p, alpha=step)
            r.sub_(hp.add(p, alpha=shift), alpha=step)
            rr, before = float(r.dot(r)), rr
            p.mul_(rr / before).add_(r)
        return x

    def _refuse(self, bend: float, shift: float) -> None:
        if math.isnan(bend):
            raise NonFiniteError(f"newton: a product with {self.name} is infinite or NaN.")
        if self.semidefinite:
            raise InputError(
                f"newton: {self.name} must be positive semidefinite, and its curvature is {bend:.3g} along a direction (the shift was "
                f"{shift:.3g}). Give another approximation, such as hessian='gauss_newton' or 'fisher'."
            )


class Zero:
    """`H = 0`."""

    floor = 0.0

    def product(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    def within(self, root: Tensor) -> Zero:
        return self

    def solve(self, shift: float, g: Tensor) -> Tensor | None:
        return g / shift


def towards(root: Tensor, g: Tensor) -> Tensor:
    """Return `L^-1 g`: a gradient in the coordinates in which the metric `L L'` is the identity."""
    return g / root if root.ndim == 1 else torch.linalg.solve_triangular(root, g[:, None], upper=False)[:, 0]


def back(root: Tensor, y: Tensor) -> Tensor:
    """Return `L^-T y`: the point that has the coordinates `y`."""
    return y / root if root.ndim == 1 else torch.linalg.solve_triangular(root.T, y[:, None], upper=True)[:, 0]


def root_of(metric: Tensor) -> Tensor:
    """Return the Cholesky factor of a metric: [d] of a diagonal one, else [d, d].

    Raises:
        InputError: the metric is not symmetric positive definite.
    """
    if metric.ndim == 1:
        if not bool((metric > 0).all() & metric.isfinite().all()):
            raise InputError("newton: a diagonal metric must be finite and above 0 everywhere.")
        return metric.sqrt()
    Dense(metric, "the metric").check_symmetric()
    factor, info = torch.linalg.cholesky_ex(metric)
    if int(info):
        raise InputError("newton: the metric must be symmetric positive definite, and it has no Cholesky factor.")
    root: Tensor = factor
    return root


def as_curvature(given: Any, name: str = "the Hessian approximation") -> Curvature:
    """Return a curvature of what a user's function gave: a matrix, a pair `(scale, vector)`, a product, None for 0, or a curvature.

    Raises:
        InputError: it is none of these, or not symmetric.
    """
    if given is None:
        return Zero()
    if isinstance(given, Dense | RankOne | MatrixFree | Zero):
        return given
    if isinstance(given, Tensor):
        return Dense(given, name, semidefinite=True).check_symmetric()
    if isinstance(given, tuple) and len(given) == 2:
        return RankOne(float(given[0]), given[1])
    if callable(given):
        return MatrixFree(given, name=name, semidefinite=True)
    raise InputError(
        f"newton: {name} must be a tensor [d, d], a pair (scale, vector [d]), a function h -> H h or None for 0, and it is "
        f"{type(given).__name__}."
    )


def with_backend(curvature: Curvature, backend: str, like: Tensor, tolerance: float) -> Curvature:
    """Return the same matrix for the back-end that is asked for: "auto" takes it as it is.

    Raises:
        InputError: the matrix has no rank-one form.
    """
    if backend == "auto" or isinstance(curvature, Zero):
        return curvature
    name, semidefinite = getattr(curvature, "name", "the Hessian"), getattr(curvature, "semidefinite", True)
    if backend == "cholesky" and not isinstance(curvature, Dense):
        check_size(len(like))
        columns = [curvature.product(e) for e in torch.eye(len(like), dtype=like.dtype, device=like.device)]
        matrix = torch.stack(columns)
        return Dense((matrix + matrix.T) / 2, name, semidefinite)
    if backend == "cg" and not isinstance(curvature, MatrixFree):
        return MatrixFree(curvature.product, tolerance, None, name, semidefinite)
    if backend == "rank_one" and not isinstance(curvature, RankOne):
        raise InputError(
            f"newton: backend='rank_one' needs a Hessian a v v', and {name} is another: use hessian='rank_one' or another backend."
        )
    return curvature


def check_size(dimension: int) -> None:
    """Refuse a dense matrix that is too large.

    Raises:
        InputError: with the dimension, the memory that it would take, and the back-end to use.
    """
    if dimension > LARGEST_DENSE:
        raise InputError(
            f"newton: a dense Hessian of {dimension:,} parameters would take {dimension**2 * 8 / 2**30:,.1f} GiB; the largest that is "
            f"made has {LARGEST_DENSE:,}. Use backend='cg' (products only), or hessian='rank_one'."
        )
