"""Matrices of low rank as two factors, and the best approximation of rank r from products with a matrix alone.

    theta = left @ right                    never written out
    truncated_svd(matrix, rank, start)      subspace iteration from where the last one ended, or at random

A matrix that is only multiplied with thin ones may be a data matrix plus something of low rank, sparse, centred or scaled, without
a second copy of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DenseMatrix", "LowRank", "Matrix", "SingularTriplets", "truncated_svd"]

OVERSAMPLING = 8
EXACT = 40_000
"""Entries up to which a matrix is written out and decomposed exactly."""


class Matrix(Protocol):
    """What is known of a matrix: its shape and its products."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """Return `M x` for `x` [columns, c]."""
        ...

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return `M' y` for `y` [rows, c]."""
        ...


@dataclass(frozen=True)
class DenseMatrix:
    """A matrix that is there."""

    entries: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.entries.shape[0], self.entries.shape[1]

    def times(self, x: Tensor) -> Tensor:
        """Return `M x`."""
        return self.entries @ x

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return `M' y`."""
        return self.entries.mT @ y


@dataclass(frozen=True)
class LowRank:
    """`left @ right`, with `left` [m, r] and `right` [r, k].

    >>> LowRank(torch.ones(2, 1), torch.ones(1, 3)).dense().shape
    torch.Size([2, 3])
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], self.right.shape[1]

    def times(self, x: Tensor) -> Tensor:
        """Return `left (right x)`."""
        return self.left @ (self.right @ x)

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return `right' (left' y)`."""
        return self.right.mT @ (self.left.mT @ y)

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return self.left @ self.right

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm, 0-dim."""
        return ((self.left.mT @ self.left) * (self.right @ self.right.mT)).sum().clamp_min(0.0)

    def plus(self, other: LowRank, factor: float = 1.0) -> LowRank:
        """Return `self + factor other`, of up to twice the rank."""
        return LowRank(torch.cat([self.left, other.left], 1), torch.cat([self.right, factor * other.right]))


@dataclass(frozen=True)
class SingularTriplets:
    """The leading part of a singular value decomposition.

    Attributes:
        left, values, right: `U` [m, r], `s` [r] falling, `V'` [r, k].
        following: the next singular value; 0 where there is none.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    following: float

    def low_rank(self) -> LowRank:
        """Return `U (s V')`."""
        return LowRank(self.left, self.values[:, None] * self.right)


def truncated_svd(
    matrix: Matrix,
    rank: int,
    *,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    tolerance: float = 1e-9,
    powers: int = 30,
) -> SingularTriplets:
    """Return the `rank` leading singular triplets of a matrix that is known by its products.

        Q <- orth(M (M' Q))   until the sum of the r leading squared singular values rises by less than a tolerance,
        then the decomposition of `Q' M`

    Small matrices, and ranks close to full, are decomposed exactly.

    Args:
        matrix: see `Matrix`.
        rank: r, at most the smaller side.
        start: [m, any] orthonormal columns near the leading left singular vectors; random ones are added to them.
        generator: of the random columns.
        dtype, device: of the products.
        tolerance: relative rise between two iterations.
        powers: iterations at most.

    >>> truncated_svd(DenseMatrix(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 1, dtype=torch.float32).following
    2.0
    """
    rows, columns = matrix.shape
    width = rank + OVERSAMPLING
    if rows * columns <= EXACT or width >= min(rows, columns):
        if columns <= rows:
            dense = matrix.times(torch.eye(columns, dtype=dtype, device=device))
        else:
            dense = matrix.transposed_times(torch.eye(rows, dtype=dtype, device=device)).mT
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        return SingularTriplets(u[:, :rank], s[:rank], vt[:rank], float(s[rank]) if len(s) > rank else 0.0)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    known = None if start is None else start[:, :width]
    fresh = torch.randn(
        rows, width - (0 if known is None else known.shape[1]), generator=generator, dtype=torch.float64
    )
    fresh = fresh.to(device=device, dtype=dtype)
    q = _orthonormal(fresh if known is None else torch.cat([known, fresh], 1))
    energy = -1.0
    z = matrix.transposed_times(q)
    for _ in range(powers):
        q = _orthonormal(matrix.times(_orthonormal(z)))
        z = matrix.transposed_times(q)
        leading = torch.linalg.eigvalsh(z.mT @ z)[-rank:].sum().item()
        if leading - energy <= tolerance * abs(leading):
            break
        energy = leading
    v, s, ut = torch.linalg.svd(z, full_matrices=False)
    return SingularTriplets(q @ ut.mT[:, :rank], s[:rank], v.mT[:rank], float(s[rank]))


def _orthonormal(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x)[0]
    return q
