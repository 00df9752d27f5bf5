"""Quadratics on a sparse graph, label propagation among them: what a move of a block costs is the number of its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.solvers.coordinate_losses import State, power_iteration
from poise.solvers.message_passing import csr_of

__all__ = ["QuadraticGraph"]


class QuadraticGraph:
    """`1/2 x' H x - b' x + c`, with `H` sparse and positive semidefinite: an energy on a graph.

    Args:
        h: symmetric [n, n]: a SciPy sparse matrix, a sparse or a dense tensor.
        b: float [n].
        constant: c.
        check: whether to verify that `h` is symmetric.

    Raises:
        InputError: `h` is not square or symmetric, has a negative diagonal, or shapes do not fit.

    Source: arXiv:1712.08859, section 4.
    """

    quadratic = True

    def __init__(self, h: Any, b: Tensor, constant: float = 0.0, check: bool = True) -> None:
        from scipy import sparse

        self.indptr, self.indices, self.data = csr_of("QuadraticGraph", h)
        self.size = len(self.indptr) - 1
        self.h: Any = sparse.csr_array((self.data, self.indices, self.indptr), shape=(self.size, self.size))
        if b.shape != (self.size,):
            raise InputError(f"QuadraticGraph: h is [{self.size}, {self.size}] and b has the shape {list(b.shape)}.")
        self.b, self.constant = b.detach().to("cpu", torch.float64), constant
        diagonal = self.h.diagonal()
        if (diagonal < 0).any():
            raise InputError(
                f"QuadraticGraph: h must be positive semidefinite, and its diagonal is {diagonal.min():g} at {int(diagonal.argmin())}."
            )
        if not np.isfinite(self.data).all() or not bool(torch.isfinite(self.b).all()):
            raise InputError("QuadraticGraph: h and b must be finite, and they hold numbers that are not.")
        entries = self.h.tocoo()
        over = entries.data**2 > (1 + 1e-9) * diagonal[entries.row] * diagonal[entries.col]
        if check and over.any():
            i, j = int(entries.row[over][0]), int(entries.col[over][0])
            raise InputError(
                f"QuadraticGraph: h must be positive semidefinite, and h[{i}, {j}]^2 exceeds h[{i}, {i}] h[{j}, {j}], so the "
                "function has no bound below."
            )
        if check and abs(self.h - self.h.T).max() > 1e-12 * abs(self.h).max():
            raise InputError("QuadraticGraph: h must be symmetric, and it is not. Give (h + h.T) / 2.")

    @classmethod
    def propagation(cls, weights: Any, labels: Tensor, known: Tensor) -> QuadraticGraph:
        """Return label propagation: `1/2 sum over i < j of w_ij (y_i - y_j)^2` over the nodes whose label is not known.

        Args:
            weights: symmetric, not negative, [n, n], as `h`; the diagonal is ignored.
            labels: float [n], read where known.
            known: bool [n].

        Raises:
            InputError: a weight is negative, or a part of the graph holds no label, so its values are free.
        """
        from scipy import sparse
        from scipy.sparse.csgraph import connected_components

        indptr, indices, data = csr_of("QuadraticGraph.propagation", weights)
        n = len(indptr) - 1
        w = sparse.csr_array((data, indices, indptr), shape=(n, n))
        w = w - sparse.diags_array(w.diagonal())
        if w.nnz and w.data.min() < 0:
            raise InputError(
                f"QuadraticGraph.propagation: weights must not be negative, and the least is {w.data.min():g}."
            )
        part = connected_components(w, directed=False)[1]
        seen = known.numpy()
        lost = np.setdiff1d(np.unique(part[~seen]), part[seen])
        if len(lost):
            node = int(np.flatnonzero(part == lost[0])[0])
            raise InputError(
                f"QuadraticGraph.propagation: {len(lost)} parts of the graph hold no label (one is that of node {node}): their values are "
                "free. Label a node there, or leave these parts out."
            )
        degree = np.asarray(w.sum(1)).ravel()
        y = labels.double().numpy() * seen
        laplacian = (sparse.diags_array(degree) - w).tocsr()
        h = laplacian[~seen][:, ~seen]
        b = torch.from_numpy(np.asarray(w[~seen][:, seen] @ y[seen]))
        return cls(h, b, constant=0.5 * float(y[seen] @ (laplacian[seen][:, seen] @ y[seen])), check=False)

    @cached_property
    def lipschitz(self) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.h.diagonal()))

    def bound(self, block: Tensor) -> Tensor:
        return torch.from_numpy(_loops()["block"](self.indptr, self.indices, self.data, block.numpy()))

    def bound_times(self, block: Tensor, d: Tensor) -> Tensor:
        found = np.zeros(self.size)
        _loops()["spread"](self.indptr, self.indices, self.data, block.numpy(), d.numpy(), found)
        return torch.from_numpy(found)

    @cached_property
    def row_sums(self) -> Tensor:
        return torch.from_numpy(np.asarray(abs(self.h).sum(1)).ravel())

    @cached_property
    def largest(self) -> float:
        return power_iteration(lambda v: torch.from_numpy(self.h @ v.numpy()), self.b)

    def at(self, x: Tensor) -> State:
        if x.shape != (self.size,):
            raise InputError(f"QuadraticGraph: x has [{self.size}] entries, but its shape is {list(x.shape)}.")
        return _GraphState(self, x.to("cpu", torch.float64).clone())


class _GraphState:
    def __init__(self, graph: QuadraticGraph, x: Tensor) -> None:
        self.rounding = 0.0
        self.graph, self.x, self.touched, self.work = graph, x, 0, 0
        self.gradient = self._fresh()

    def _fresh(self) -> Tensor:
        return torch.from_numpy(self.graph.h @ self.x.numpy()) - self.graph.b

    def gradient_of(self, block: Tensor) -> Tensor:
        return self.gradient[block]

    def value(self) -> float:
        return float(0.5 * self.x @ (self.gradient - self.graph.b)) + self.graph.constant

    def change(self, block: Tensor, d: Tensor) -> float:
        g = self.graph
        return float(self.gradient[block] @ d) + 0.5 * float(
            _loops()["charge"](g.indptr, g.indices, g.data, block.numpy(), d.numpy())
        )

    def hessian(self, block: Tensor) -> Tensor:
        return self.graph.bound(block)

    def move(self, block: Tensor, d: Tensor) -> None:
        g = self.graph
        self.x[block] += d
        spread = _loops()["spread"]
        touched = int(spread(g.indptr, g.indices, g.data, block.numpy(), d.numpy(), self.gradient.numpy()))
        self.touched += touched
        self.work += touched

    def refresh(self) -> float:
        before, self.gradient = self.gradient, self._fresh()
        size = float(self.graph.b.norm()) + self.graph.largest * float(self.x.norm())
        return float((self.gradient - before).norm()) / max(size, 1e-300)

    def state_dict(self) -> dict[str, Tensor]:
        return {"x": self.x.clone(), "gradient": self.gradient.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.x, self.gradient = state["x"].clone(), state["gradient"].clone()


# ---- loops -----------------------------------------------------------------------------------------------------------


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    from numba import njit

    compiled = njit(cache=True, nogil=True)
    return {name: compiled(f) for name, f in (("block", _block), ("spread", _spread), ("charge", _charge))}


def _block(indptr: Any, indices: Any, data: Any, block: Any) -> Any:
    k = len(block)
    place = np.full(len(indptr) - 1, -1, np.int64)
    for t in range(k):
        place[block[t]] = t
    found = np.zeros((k, k))
    for t in range(k):
        for e in range(indptr[block[t]], indptr[block[t] + 1]):
            if place[indices[e]] >= 0:
                found[t, place[indices[e]]] += data[e]
    return found


def _spread(indptr: Any, indices: Any, data: Any, block: Any, d: Any, gradient: Any) -> int:
    touched = 0
    for t in range(len(block)):
        for e in range(indptr[block[t]], indptr[block[t] + 1]):
            gradient[indices[e]] += data[e] * d[t]
        touched += indptr[block[t] + 1] - indptr[block[t]]
    return touched


def _charge(indptr: Any, indices: Any, data: Any, block: Any, d: Any) -> float:
    """Return `d' H_bb d`."""
    moves = np.zeros(len(indptr) - 1)
    for t in range(len(block)):
        moves[block[t]] = d[t]
    total = 0.0
    for t in range(len(block)):
        for e in range(indptr[block[t]], indptr[block[t] + 1]):
            total += d[t] * data[e] * moves[indices[e]]
    return total
