"""Problems on which coordinate methods are compared, at any size: ill-scaled designs, lattices, label propagation.

    A  ill_scaled_regression     sparse columns of very different sizes, targets of a sparse weight and noise
    B  ill_scaled_classes        the same design, the sign of the score, 10 % of the labels flipped
    C  ill_scaled_softmax        the same design, the largest of several noisy scores
    D  lattice                   a grid with heavy edges, a few labelled nodes
    E  two_moons                 neighbours in the plane, a few labelled nodes

Source: the experiments of arXiv:1712.08859, after the recipes that its authors publish.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["ill_scaled_classes", "ill_scaled_regression", "ill_scaled_softmax", "lattice", "two_moons"]


def ill_scaled_regression(
    n: int = 1000, inputs: int = 10_000, seed: int = 0, scale: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Return a design [n, inputs] and targets [n], float64: the paper's data set A.

    Entries are `N(1, 1)`, kept with probability `10 log(n) / n`; column j is multiplied by `scale N(0, 1)`, so Lipschitz constants
    differ by many orders of magnitude. One weight in ten is not 0.

    >>> a, y = ill_scaled_regression(50, 20)
    >>> a.shape, y.shape
    (torch.Size([50, 20]), torch.Size([50]))
    """
    generator = torch.Generator().manual_seed(seed)
    a = _design(n, inputs, scale, generator)
    w = _sparse_weight(inputs, generator)
    return a, a @ w + torch.randn(n, generator=generator, dtype=torch.float64)


def ill_scaled_classes(
    n: int = 1000, inputs: int = 10_000, seed: int = 0, scale: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Return a design and classes 0 and 1 [n], float64: data set B; one label in ten is wrong."""
    generator = torch.Generator().manual_seed(seed)
    a = _design(n, inputs, scale, generator)
    y = (a @ _sparse_weight(inputs, generator) > 0).double()
    flip = torch.rand(n, generator=generator) < 0.1
    return a, torch.where(flip, 1 - y, y)


def ill_scaled_softmax(
    n: int = 1000, inputs: int = 1000, classes: int = 50, seed: int = 0, scale: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Return a design and class indices [n], int64: data set C."""
    generator = torch.Generator().manual_seed(seed)
    a = _design(n, inputs, scale, generator)
    scores = a @ torch.randn(inputs, classes, generator=generator, dtype=torch.float64)
    return a, (scores + torch.randn(n, classes, generator=generator, dtype=torch.float64)).argmax(1)


def _design(n: int, inputs: int, scale: float, generator: torch.Generator) -> Tensor:
    if n < 2 or inputs < 1:
        raise InputError(f"A design needs at least 2 examples and 1 input, and {n} and {inputs} were asked for.")
    a = torch.randn(n, inputs, generator=generator, dtype=torch.float64) + 1.0
    a *= scale * torch.randn(inputs, generator=generator, dtype=torch.float64)
    kept: Tensor = a * (torch.rand(n, inputs, generator=generator) < 10.0 * math.log(n) / n)
    return kept


def _sparse_weight(inputs: int, generator: torch.Generator) -> Tensor:
    w = torch.randn(inputs, generator=generator, dtype=torch.float64)
    return w * (torch.rand(inputs, generator=generator) < 0.1)


def lattice(
    rows: int = 50, columns: int = 50, labelled: int = 100, seed: int = 0, weight: float = 1e5
) -> tuple[Any, Tensor, Tensor]:
    """Return edge weights (SciPy, [n, n]), labels [n] from `N(0, 100)` and which are known: data set D.

    Node `c * rows + r` is row r of column c.
    """
    from scipy import sparse

    path = [
        sparse.diags_array([np.ones(k - 1), np.ones(k - 1)], offsets=[1, -1], shape=(k, k)) for k in (rows, columns)
    ]
    grid = sparse.kron(sparse.eye_array(columns), path[0]) + sparse.kron(path[1], sparse.eye_array(rows))
    known, labels = _labels(rows * columns, labelled, seed)
    return (weight * grid).tocsr(), torch.where(known, 10.0 * labels, 0.0), known


def two_moons(
    n: int = 2000, labelled: int = 100, neighbours: int = 5, seed: int = 0, noise: float = 0.2
) -> tuple[Any, Tensor, Tensor]:
    """Return edges of weight 1 between neighbours (SciPy, [n, n]), labels 1 and 2 [n] and which are known: data set E.

    Two half circles in the plane with Gaussian noise; nodes are joined where one is among the other's nearest. Labels of unlabelled nodes
    are returned too, as what propagation should find.
    """
    from scipy import sparse
    from scipy.spatial import cKDTree

    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(n, generator=generator) < 0.5
    angle = math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    x = torch.where(first, angle.cos(), 1 + angle.cos())
    y = torch.where(first, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x, y], 1) + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    _, nearest = cKDTree(points.numpy()).query(points.numpy(), neighbours + 1)
    start, end = np.repeat(np.arange(n), neighbours), nearest[:, 1:].reshape(-1)
    edges = sparse.coo_array((np.ones(len(start)), (start, end)), shape=(n, n)).tocsr()
    known, _ = _labels(n, labelled, seed)
    return edges.maximum(edges.T).tocsr(), torch.where(first, 1.0, 2.0).double(), known


def _labels(n: int, labelled: int, seed: int) -> tuple[Tensor, Tensor]:
    if not 0 < labelled < n:
        raise InputError(f"Some of {n} nodes must be labelled and some not, and {labelled} were asked for.")
    generator = torch.Generator().manual_seed(seed + 1)
    known = torch.zeros(n, dtype=torch.bool)
    known[torch.randperm(n, generator=generator)[:labelled]] = True
    return known, torch.randn(n, generator=generator, dtype=torch.float64)
