"""Exact solves on forests: blocks of a sparse matrix whose graph has no cycle cost as many operations as they have nodes.

    H_bb x_b = b_b - H_b,rest x_rest       leaves to root:  d_p -= w^2 / d_c,   c_p -= w c_c / d_c
                                           root to leaves:  x_c = (c_c - w x_p) / d_c

Gaussian belief propagation on a forest gives the same. A block of this kind may hold most of the nodes of a sparse graph, so a coordinate
method that chooses forests does in one exact step what blocks of the same price need many for.

    greedy_forest(scores, graph)     the nodes of highest score whose graph stays a forest
    forest_solve(h, b, block)        the block's exact solution, other nodes fixed
    red_black(graph)                 a partition into independent sets
    forest_partition(graph)          a partition into forests
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["forest_partition", "forest_solve", "greedy_forest", "lattice_combs", "red_black"]


def forest_solve(h: Any, b: Tensor, block: Tensor | None = None, x: Tensor | None = None) -> Tensor:
    """Solve `H_bb x_b = b_b - H_b,rest x_rest` where the graph of `H_bb` is a forest, in O(|b| + its edges).

    Args:
        h: symmetric [n, n], positive definite on the block: a SciPy sparse matrix, a sparse or a dense tensor.
        b: float [n].
        block: int64 [k], nodes without repetition; all where it is None.
        x: float [n], the values of the nodes outside the block; 0 where it is None.

    Returns:
        float [k], in the order of `block`; float64 arithmetic, then the dtype of `b`.

    Raises:
        InputError: the block has a cycle (an edge that closes it is named), shapes do not fit, or it is not positive definite.

    >>> h = torch.tensor([[2.0, -1.0, 0.0], [-1.0, 2.0, -1.0], [0.0, -1.0, 2.0]])
    >>> forest_solve(h, torch.tensor([1.0, 0.0, 1.0]))
    tensor([1., 1., 1.])

    Source: arXiv:1712.08859, section 4.
    """
    indptr, indices, data = csr_of("forest_solve", h)
    n = len(indptr) - 1
    if b.shape != (n,) or (x is not None and x.shape != (n,)):
        raise InputError(
            f"forest_solve: h is [{n}, {n}], so b and x are [{n}], but they are {list(b.shape)} and "
            f"{None if x is None else list(x.shape)}."
        )
    nodes = np.empty(0, np.int64) if block is None else _nodes("forest_solve", block, n)
    if block is not None and len(nodes) == 0:
        return b[:0]
    fixed = np.zeros(0) if x is None else _numpy(x)
    solved, place, wrong = _loops()["solve"](indptr, indices, data, data.view(np.int64), nodes, _numpy(b), fixed)
    if wrong:
        raise _failure(indptr, indices, data, nodes, place, wrong)
    return torch.from_numpy(solved).to(dtype=b.dtype, device=b.device)


def _failure(indptr: Any, indices: Any, data: Any, nodes: Any, place: int, wrong: int) -> InputError:
    if wrong == 1:
        node = int(nodes[place]) if len(nodes) else place
        return InputError(
            f"forest_solve: the block is not positive definite: nothing above 0 is left of the diagonal at node {node}."
        )
    inside = np.ones(len(indptr) - 1, np.bool_) if len(nodes) == 0 else np.isin(np.arange(len(indptr) - 1), nodes)
    first, second = _loops()["closing_edge"](indptr, indices, data, inside)
    if wrong == 2 or first < 0:
        return InputError(
            "forest_solve: h must be symmetric with one entry an edge, and it is not. Give (h + h.T) / 2, duplicates summed."
        )
    return InputError(
        f"forest_solve: the block's graph is no forest: the edge ({first}, {second}) closes a cycle. "
        "Choose the block with greedy_forest, or solve it with a sparse factorisation."
    )


def greedy_forest(scores: Tensor, graph: Any, size: int | None = None) -> Tensor:
    """Choose nodes by falling score, each where it closes no cycle with those chosen before it.

    A node enters where its chosen neighbours lie in different trees; among equal scores the lower index goes first.

    Args:
        scores: float [n]; nodes with -inf stay out.
        graph: symmetric [n, n] as in `forest_solve`; the diagonal is ignored.
        size: most nodes; all that fit where it is None.

    Returns:
        int64 [k], ascending.

    Raises:
        InputError: shapes do not fit, or a score is NaN.

    >>> triangle = torch.ones(3, 3)
    >>> greedy_forest(torch.tensor([1.0, 3.0, 2.0]), triangle)
    tensor([1, 2])

    Source: arXiv:1712.08859, section 4; union-find with path compression instead of the authors' O(n^2).
    """
    indptr, indices, _ = csr_of("greedy_forest", graph)
    n = len(indptr) - 1
    values = _numpy(scores)
    if values.shape != (n,) or np.isnan(values).any():
        raise InputError(
            f"greedy_forest: one score without NaN for each of {n} nodes was expected; scores are {list(scores.shape)}."
        )
    order = np.argsort(-values, kind="stable")
    order = order[: int((values > -np.inf).sum())]
    most = n if size is None else size
    return torch.from_numpy(_loops()["greedy"](indptr, indices, order, most)).to(scores.device)


def red_black(graph: Any, order: Tensor | None = None) -> list[Tensor]:
    """Part the nodes into independent sets, first-fit: on a lattice the red and the black squares.

    Args:
        graph: symmetric [n, n].
        order: int64 [n], in which nodes choose their set, for instance by falling Lipschitz constant; 0 to n - 1 where it is None.

    Returns:
        Sets of nodes, int64, ascending.

    >>> path = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> red_black(path)
    [tensor([0, 2]), tensor([1])]
    """
    return _first_fit("red_black", graph, order, independent=True)


def forest_partition(graph: Any, order: Tensor | None = None) -> list[Tensor]:
    """Part the nodes into forests, first-fit; see `red_black`.

    >>> triangle = torch.ones(3, 3)
    >>> forest_partition(triangle)
    [tensor([0, 1]), tensor([2])]
    """
    return _first_fit("forest_partition", graph, order, independent=False)


def lattice_combs(rows: int, columns: int) -> list[Tensor]:
    """Part a lattice into two combs: trees that hold every other column, and a border that joins them.

    Node `c * rows + r` is row r of column c. The spines are the first and the last row; each comb's teeth stop before the other's spine.

    >>> lattice_combs(3, 2)
    [tensor([0, 1, 3]), tensor([2, 4, 5])]

    Source: arXiv:1712.08859, figure 2.
    """
    node = torch.arange(rows * columns)
    row, column = node % rows, node // rows
    first = (row == 0) | ((column % 2 == 0) & (row < rows - 1))
    return [node[first], node[~first]]


# ---- reading ---------------------------------------------------------------------------------------------------------


def csr_of(name: str, matrix: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return row pointers and columns (int32 or int64) and values (float64) of a square matrix.

    Raises:
        InputError: it is not square; the message begins with `name`.
    """
    if isinstance(matrix, Tensor):
        matrix = _scipy(matrix.detach().cpu())
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"{name}: a square matrix was expected, and its shape is {list(matrix.shape)}.")
    matrix = matrix.tocsr()
    indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    indptr, indices = (np.ascontiguousarray(v, v.dtype if v.dtype == np.int32 else np.int64) for v in (indptr, indices))
    return indptr, indices, np.ascontiguousarray(data, np.float64)


def _scipy(matrix: Tensor) -> Any:
    from scipy import sparse

    if matrix.ndim != 2 or matrix.layout == torch.strided:
        return sparse.csr_array(matrix.numpy()) if matrix.ndim == 2 else matrix
    if matrix.layout == torch.sparse_csr:
        parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
        return sparse.csr_array(tuple(p.numpy() for p in parts), shape=matrix.shape)
    matrix = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse()).coalesce()
    return sparse.coo_array((matrix.values().numpy(), matrix.indices().numpy()), shape=matrix.shape)


def _numpy(values: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values.detach().cpu().numpy(), np.float64)


def _nodes(name: str, block: Tensor, n: int) -> np.ndarray[Any, Any]:
    nodes = np.ascontiguousarray(block.detach().cpu().numpy(), np.int64)
    if nodes.ndim != 1 or (len(nodes) and (nodes.min() < 0 or nodes.max() >= n)) or len(np.unique(nodes)) != len(nodes):
        raise InputError(f"{name}: a block lists nodes from 0 to {n - 1}, each at most once.")
    return nodes


def _first_fit(name: str, graph: Any, order: Tensor | None, independent: bool) -> list[Tensor]:
    indptr, indices, _ = csr_of(name, graph)
    n = len(indptr) - 1
    turns = np.arange(n) if order is None else _nodes(name, order, n)
    if len(turns) != n:
        raise InputError(f"{name}: order must list all {n} nodes, and it lists {len(turns)}.")
    owner = torch.from_numpy(_loops()["first_fit"](indptr, indices, turns, independent))
    return [(owner == part).nonzero()[:, 0] for part in range(int(owner.max()) + 1)] if n else []


# ---- loops -----------------------------------------------------------------------------------------------------------


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    """Compile the loops when the first is used."""
    from numba import njit

    compiled = njit(cache=True, nogil=True)
    loops: dict[str, Callable[..., Any]] = {
        "closing_edge": _closing_edge,
        "first_fit": _first_fit_loop,
        "greedy": _greedy,
        "solve": _solve,
    }
    return {name: compiled(f) for name, f in loops.items()}


def _solve(indptr: Any, indices: Any, data: Any, bits: Any, nodes: Any, b: Any, fixed: Any) -> tuple[Any, int, int]:
    """Return the solution, and a node with what is wrong there (0: nothing; 1: a pivot; 2: not symmetric; 3: a cycle).

    Leaves are peeled without a list of neighbours: a node keeps the exclusive or of its neighbours' numbers, and of the bits of the
    weights, and a leaf has but one left. So every row is read once, in order. What belongs to a node lies in one line of memory:
    diagonal, right-hand side, weight, and its degree above the number. `nodes` is empty where all are meant.
    """
    n = len(indptr) - 1
    whole = len(nodes) == 0
    k = n if whole else len(nodes)
    place = np.empty(0 if whole else n, np.int64)
    if not whole:
        place[:] = -1
        for t in range(k):
            place[nodes[t]] = t
    at = np.zeros((k, 4))
    raw = at.view(np.int64)
    one, low = np.int64(1) << 40, (np.int64(1) << 40) - 1
    for t in range(k):
        i = t if whole else nodes[t]
        right, diagonal, number, weight = b[i], 0.0, np.int64(0), np.int64(0)
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j == i:
                diagonal += data[e]
                continue
            u = j if whole else place[j]
            if u < 0:
                if len(fixed) > 0:
                    right -= data[e] * fixed[j]
            elif data[e] != 0.0:
                number = (number ^ u) + one
                weight ^= bits[e]
        at[t, 0], at[t, 1] = diagonal, right
        raw[t, 2], raw[t, 3] = weight, number
    order, count = np.empty(k, np.int32), 0
    x = np.empty(k)
    for start in range(k):
        t = start
        while t <= start and raw[t, 3] >> 40 == 1:
            if not at[t, 0] > 0.0:
                return x, t, 1
            p = raw[t, 3] & low
            if p >= k or raw[p, 3] >> 40 < 1:
                return x, t, 2
            order[count] = t
            count += 1
            share = at[t, 2] / at[t, 0]
            at[p, 0] -= share * at[t, 2]
            at[p, 1] -= share * at[t, 1]
            raw[p, 2] ^= raw[t, 2]
            raw[p, 3] = (raw[p, 3] ^ t) - one
            raw[t, 3] = -1 - p
            t = p
    for t in range(k):
        # what was not peeled has no neighbour left: a root
        if raw[t, 3] >= 0:
            if raw[t, 3] >> 40 > 0:
                return x, t, 3
            if not at[t, 0] > 0.0:
                return x, t, 1
            x[t] = at[t, 1] / at[t, 0]
    for c in range(count - 1, -1, -1):
        t = order[c]
        x[t] = (at[t, 1] - at[t, 2] * x[-1 - raw[t, 3]]) / at[t, 0]
    return x, -1, 0


def _closing_edge(indptr: Any, indices: Any, data: Any, inside: Any) -> tuple[int, int]:
    """Return an edge between nodes inside whose ends are joined without it already."""
    n = len(indptr) - 1
    tree = np.arange(n)
    for i in range(n):
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j <= i or data[e] == 0.0 or not (inside[i] and inside[j]):
                continue
            first, second = i, j
            while tree[first] != first:
                first = tree[first]
            while tree[second] != second:
                second = tree[second]
            if first == second:
                return i, j
            tree[first] = second
    return -1, -1


def _greedy(indptr: Any, indices: Any, order: Any, most: int) -> Any:
    n = len(indptr) - 1
    tree = np.full(n, -1, np.int64)  # -1: not chosen; else the way to the root of its tree
    mark = np.full(n, -1, np.int64)
    count = 0
    for turn in range(len(order)):
        if count >= most:
            break
        i = order[turn]
        fits = True
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j == i or tree[j] < 0:
                continue
            root = j
            while tree[root] != root:
                tree[root] = tree[tree[root]]
                root = tree[root]
            if mark[root] == i:
                fits = False
                break
            mark[root] = i
        if not fits:
            continue
        tree[i] = i
        count += 1
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j == i or tree[j] < 0:
                continue
            root = j
            while tree[root] != root:
                root = tree[root]
            tree[root] = i
    chosen = np.empty(count, np.int64)
    place = 0
    for i in range(n):
        if tree[i] >= 0:
            chosen[place] = i
            place += 1
    return chosen


def _first_fit_loop(indptr: Any, indices: Any, order: Any, independent: bool) -> Any:
    """Give every node the first part in which it closes no cycle (or has no neighbour at all)."""
    n = len(indptr) - 1
    owner = np.full(n, -1, np.int64)
    tree = np.arange(n)
    mark = np.full(n, -1, np.int64)
    barred = np.full(n + 1, -1, np.int64)
    for turn in range(n):
        i = order[turn]
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j == i or owner[j] < 0:
                continue
            root = j
            while tree[root] != root:
                tree[root] = tree[tree[root]]
                root = tree[root]
            # A root belongs to one part, so a second neighbour of the same tree bars its part.
            if independent or mark[root] == i:
                barred[owner[j]] = i
            mark[root] = i
        part = 0
        while barred[part] == i:
            part += 1
        owner[i] = part
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            if j == i or owner[j] != part:
                continue
            root = j
            while tree[root] != root:
                root = tree[root]
            tree[root] = i
    return owner
