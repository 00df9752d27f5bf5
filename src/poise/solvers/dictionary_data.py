"""The data matrix of dictionary learning, known by its products: dense, sparse, centred, weighted, with missing entries.

    X = diag(scale) (raw - mean) diag(root weight)        [features, samples]

Centring, scaling and weights act on the thin side of each product, so a sparse matrix stays sparse and a dense one is never copied.
Only missing entries need a copy of their own, in which they hold what the model says of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.solvers.low_rank import LowRank

__all__ = ["DataMatrix"]

_BLOCK = 1 << 22


class DataMatrix:
    """A data matrix `[p, n]`, one column for each sample.

    Args:
        raw: float tensor [p, n] (a transposed view will do), or a SciPy sparse matrix of that shape. NaN marks a missing entry.
        mean: [p], taken off every column; None for 0.
        scale: [p], multiplies every row after centring; None for 1.
        root: [n], multiplies every column: square roots of sample weights; None for 1.

    Attributes:
        missing: places of missing entries in the flattened matrix, or None.

    Raises:
        InputError: it is no matrix, or an entry is infinite.
    """

    def __init__(
        self, raw: Any, mean: Tensor | None = None, scale: Tensor | None = None, root: Tensor | None = None
    ) -> None:
        self.sparse = not isinstance(raw, Tensor)
        if len(raw.shape) != 2:
            raise InputError(f"The data are a matrix [features, samples], and they are {list(raw.shape)}.")
        self.mean, self.scale, self.root = mean, scale, root
        self.missing: Tensor | None = None
        if self.sparse:
            self.dtype, self.device = torch.from_numpy(raw.data[:0]).dtype, torch.device("cpu")
        else:
            self.dtype, self.device = raw.dtype, raw.device
            hidden = torch.isnan(raw)
            if bool(hidden.any()):
                raw = self._owned(raw, hidden)
        self.raw = raw
        self.shape: tuple[int, int] = (int(raw.shape[0]), int(raw.shape[1]))
        self._squared: Tensor | None = None

    def _owned(self, raw: Tensor, hidden: Tensor) -> Tensor:
        """Take a copy with everything applied, and 0 where an entry is missing."""
        own = raw.clone(memory_format=torch.contiguous_format)
        for factor, side in ((self.mean, "-"), (self.scale, "*")):
            if factor is not None:
                own = own.sub_(factor[:, None]) if side == "-" else own.mul_(factor[:, None])
        if self.root is not None:
            own = own.mul_(self.root)
        own[hidden] = 0.0
        self.missing = hidden.flatten().nonzero()[:, 0]
        self.mean = self.scale = None
        self._weighted = self.root
        return own

    # ---- products ----------------------------------------------------------------------------------------------------

    def times(self, x: Tensor) -> Tensor:
        """Return `X x` for `x` [n, c]."""
        if self.root is not None and self.missing is None:
            x = x * self.root[:, None]
        y = self._product(self.raw, x)
        if self.mean is not None:
            y = y - self.mean[:, None] * x.sum(0)
        return y if self.scale is None else y * self.scale[:, None]

    def transposed_times(self, y: Tensor) -> Tensor:
        """Return `X' y` for `y` [p, c]."""
        if self.scale is not None:
            y = y * self.scale[:, None]
        x = self._product(self.raw.T if self.sparse else self.raw.mT, y)
        if self.mean is not None:
            x = x - (self.mean @ y)
        return x * self.root[:, None] if self.root is not None and self.missing is None else x

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm, 0-dim, summed in blocks of columns."""
        if self._squared is None:
            self._squared = self._sum_of_squares()
        return self._squared

    def _sum_of_squares(self) -> Tensor:
        if self.sparse:
            return self._sparse_sum_of_squares()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, self.shape[1], max(1, _BLOCK // max(1, self.shape[0]))):
            stop = start + max(1, _BLOCK // max(1, self.shape[0]))
            total += self.columns(start, stop).double().square().sum()
        return total

    def columns(self, start: int, stop: int) -> Tensor:
        """Return some columns of a dense matrix, everything applied."""
        block = self.raw[:, start:stop]
        if self.mean is not None:
            block = block - self.mean[:, None]
        if self.scale is not None:
            block = block * self.scale[:, None]
        whole: Tensor = block if self.root is None or self.missing is not None else block * self.root[start:stop]
        return whole

    def _sparse_sum_of_squares(self) -> Tensor:
        """`sum_ij s_i^2 w_j (x_ij - m_i)^2`, without writing the centred matrix out."""
        p, n = self.shape
        ones = torch.ones(1, dtype=self.dtype)
        weight = (torch.ones(n, dtype=self.dtype) if self.root is None else self.root.square()).double()
        row = (ones.expand(p) if self.scale is None else self.scale.square()).double()
        mean = (torch.zeros(p, dtype=self.dtype) if self.mean is None else self.mean).double()
        coordinates = self.raw.tocoo()
        i, j = (torch.from_numpy(c.astype("int64")) for c in (coordinates.row, coordinates.col))
        x = torch.from_numpy(coordinates.data).double()
        stored = (row[i] * weight[j] * (x.square() - 2 * mean[i] * x)).sum()
        return (stored + (row * mean.square()).sum() * weight.sum()).clamp_min(0.0)

    def _product(self, matrix: Any, x: Tensor) -> Tensor:
        if not self.sparse:
            found: Tensor = matrix @ x
            return found
        return torch.from_numpy(matrix @ x.detach().cpu().numpy())

    # ---- missing entries ---------------------------------------------------------------------------------------------

    def fill(self, b: LowRank) -> None:
        """Put what `left @ right` says at the missing entries; nothing where none is missing."""
        if self.missing is None:
            return
        n = self.shape[1]
        flat = self.raw.view(-1)
        step = max(1, _BLOCK // max(1, b.left.shape[1]))
        for places in torch.split(self.missing, step):
            flat[places] = (b.left[places // n] * b.right[:, places % n].mT).sum(1)
        self._squared = None

    def swap(self, values: Tensor | None) -> Tensor:
        """Put values (None for 0) at the missing entries, and return those that stood there."""
        flat = self.raw.view(-1)
        before: Tensor = flat[self.missing].clone()
        flat[self.missing] = 0.0 if values is None else values
        self._squared = None
        return before
