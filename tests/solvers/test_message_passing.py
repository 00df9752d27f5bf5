"""Forests: exact solves, greedy choice, partitions."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from poise.errors import InputError
from poise.solvers.message_passing import (
    forest_partition,
    forest_solve,
    greedy_forest,
    lattice_combs,
    red_black,
)


def random_forest(n: int, seed: int, cut: float = 0.05) -> sparse.csr_matrix:
    """A positive definite matrix whose graph is a forest under a random numbering."""
    rng = np.random.default_rng(seed)
    name = rng.permutation(n)
    kept = np.arange(1, n)[rng.random(n - 1) > cut]
    parents = np.array([rng.integers(0, i) for i in kept])
    weights = rng.standard_normal(len(kept))
    ends = np.r_[name[kept], name[parents]], np.r_[name[parents], name[kept]]
    edges = sparse.csr_matrix((np.r_[weights, weights], ends), shape=(n, n))
    return (edges + sparse.diags(np.asarray(abs(edges).sum(1)).ravel() + 0.1)).tocsr()


def random_graph(n: int, seed: int, density: float = 0.01) -> sparse.csr_matrix:
    half = sparse.random(n, n, density, format="csr", random_state=seed)
    return (half + half.T).tocsr()


def is_forest(graph: sparse.csr_matrix, nodes: Tensor) -> bool:
    part = graph[nodes.numpy()][:, nodes.numpy()].tolil()
    part.setdiag(0)
    part = part.tocsr()
    part.eliminate_zeros()
    trees: int = connected_components(part)[0]
    return part.nnz // 2 == len(nodes) - trees


def belief_propagation(h: Tensor, b: Tensor, rounds: int = 60) -> Tensor:
    """Gaussian belief propagation: messages of precision and mean along the edges, until they have crossed every tree."""
    n = len(b)
    precision, mean = torch.zeros(n, n, dtype=h.dtype), torch.zeros(n, n, dtype=h.dtype)
    for _ in range(rounds):
        for i, j in (h != 0).nonzero().tolist():
            if i != j:
                inside = [k for k in range(n) if k != j and k != i and h[k, i] != 0]
                p = h[i, i] + sum(precision[k, i] for k in inside)
                m = (b[i] + sum(precision[k, i] * mean[k, i] for k in inside)) / p
                precision[i, j] = -(h[i, j] ** 2) / p
                mean[i, j] = p * m / h[i, j]
    total = h.diagonal() + precision.sum(0)
    return (b + (precision * mean).sum(0)) / total


@pytest.mark.parametrize("seed", range(3))
def test_a_forest_solve_is_the_dense_solve(seed: int) -> None:
    h = random_forest(1000, seed)
    b = torch.from_numpy(np.random.default_rng(seed).standard_normal(1000))
    dense = torch.linalg.solve(torch.from_numpy(h.toarray()), b)
    assert (forest_solve(h, b) - dense).abs().max() <= 1e-12 * dense.abs().max()
    by_tensor = forest_solve(torch.from_numpy(h.toarray()), b)
    assert (by_tensor - dense).abs().max() <= 1e-12 * dense.abs().max()


def test_a_block_is_solved_with_its_neighbours_fixed() -> None:
    graph = random_graph(300, 1)
    h = (graph + sparse.diags(np.asarray(graph.sum(1)).ravel() + 1)).tocsr()
    b, x = torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    block = greedy_forest(torch.rand(300), h).flip(0)
    found = x.clone()
    found[block] = forest_solve(h, b, block, x)
    left = torch.from_numpy(h @ found.numpy()) - b
    assert left[block].abs().max() <= 1e-12
    assert forest_solve(h, b.float(), block, x.float()).dtype == torch.float32


def test_it_agrees_with_gaussian_belief_propagation() -> None:
    h = torch.from_numpy(random_forest(25, 3).toarray())
    b = torch.randn(25, dtype=torch.float64)
    assert (forest_solve(h, b) - belief_propagation(h, b)).abs().max() <= 1e-10


def test_time_grows_with_the_number_of_nodes() -> None:
    def cost(n: int) -> float:
        h, b = random_forest(n, 0), torch.ones(n, dtype=torch.float64)
        forest_solve(h, b)
        times = []
        for _ in range(5):
            started = time.process_time()
            for _ in range(10):
                forest_solve(h, b)
            times.append(time.process_time() - started)
        return min(times)

    # Eight times the nodes: 8 where linear, 64 where quadratic; memory beyond the cache may double it.
    assert cost(16_000) / cost(2_000) < 20


def test_a_cycle_is_named_by_the_edge_that_closes_it() -> None:
    ring = torch.eye(4) * 3 - torch.roll(torch.eye(4), 1, 0) - torch.roll(torch.eye(4), -1, 0)
    with pytest.raises(InputError, match=r"the edge \((\d), (\d)\) closes a cycle") as caught:
        forest_solve(ring, torch.ones(4))
    i, j = (int(c) for c in str(caught.value).split("edge (")[1][:4].split(", "))
    assert ring[i, j] != 0
    assert forest_solve(ring, torch.ones(4), torch.tensor([0, 1, 2])).shape == (3,)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="not positive definite: nothing above 0 is left of the diagonal at node"):
        forest_solve(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.ones(2))
    with pytest.raises(InputError, match=r"b and x are \[3\]"):
        forest_solve(torch.eye(3), torch.ones(2))
    with pytest.raises(InputError, match="each at most once"):
        forest_solve(torch.eye(3), torch.ones(3), torch.tensor([1, 1]))
    with pytest.raises(InputError, match="must be symmetric"):
        forest_solve(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.0], [0.1, 0.0, 1.0]]), torch.ones(3))
    with pytest.raises(InputError, match="square"):
        forest_solve(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(InputError, match="one score without NaN"):
        greedy_forest(torch.tensor([1.0, float("nan")]), torch.eye(2))
    with pytest.raises(InputError, match="must list all 3 nodes"):
        red_black(torch.eye(3), torch.tensor([0]))


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_forest_has_no_cycle_and_no_node_more_would_fit(seed: int) -> None:
    graph = random_graph(400, seed)
    scores = torch.rand(400, generator=torch.Generator().manual_seed(seed))
    chosen = greedy_forest(scores, graph)
    assert is_forest(graph, chosen)
    assert int(scores.argmax()) in chosen.tolist()
    for node in sorted(set(range(400)) - set(chosen.tolist()))[:30]:
        assert not is_forest(graph, torch.cat([chosen, torch.tensor([node])]))
    assert len(greedy_forest(scores, graph, size=7)) == 7
    assert greedy_forest(torch.full((3,), -torch.inf), torch.eye(3)).numel() == 0


def test_equal_scores_go_to_the_lower_index() -> None:
    assert greedy_forest(torch.ones(3), torch.ones(3, 3)).tolist() == [0, 1]


def test_partitions_hold_every_node_once_and_keep_their_promise() -> None:
    graph = random_graph(300, 2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for parts in (red_black(graph, order), forest_partition(graph, order), forest_partition(graph)):
        assert torch.cat(parts).sort().values.tolist() == list(range(300))
        assert all(is_forest(graph, part) for part in parts)
    off = graph - sparse.diags(graph.diagonal())
    assert all(abs(off[p.numpy()][:, p.numpy()]).sum() == 0 for p in red_black(graph))


def test_a_lattice_falls_into_red_and_black_and_into_two_combs() -> None:
    rows, columns = 5, 6
    grid = sparse.kron(sparse.eye(columns), _path(rows)) + sparse.kron(_path(columns), sparse.eye(rows))
    assert len(red_black(grid.tocsr())) == 2
    combs = lattice_combs(rows, columns)
    assert torch.cat(combs).sort().values.tolist() == list(range(rows * columns))
    for comb in combs:
        part = grid.tocsr()[comb.numpy()][:, comb.numpy()]
        assert is_forest(grid.tocsr(), comb)
        assert connected_components(part)[0] == 1


def _path(n: int) -> sparse.csr_matrix:
    return sparse.diags([np.ones(n - 1), np.ones(n - 1)], [1, -1]).tocsr()
