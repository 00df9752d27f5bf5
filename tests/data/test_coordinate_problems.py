"""The problems on which coordinate methods are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from poise.data.coordinate_problems import (
    ill_scaled_classes,
    ill_scaled_regression,
    ill_scaled_softmax,
    lattice,
    two_moons,
)
from poise.errors import InputError


def test_designs_are_sparse_ill_scaled_and_reproducible() -> None:
    a, y = ill_scaled_regression(400, 200, seed=1)
    assert a.dtype == y.dtype == torch.float64
    density = float((a != 0).double().mean())
    assert density == pytest.approx(10 * np.log(400) / 400, rel=0.05)
    sizes = a.square().sum(0)
    assert float(sizes.max() / sizes.min()) > 1e3
    assert torch.equal(a, ill_scaled_regression(400, 200, seed=1)[0])
    assert not torch.equal(a, ill_scaled_regression(400, 200, seed=2)[0])


def test_classes_and_softmax_have_their_labels() -> None:
    _, y = ill_scaled_classes(200, 100)
    assert set(y.tolist()) == {0.0, 1.0}
    _, classes = ill_scaled_softmax(200, 30, 7)
    assert classes.dtype == torch.int64
    assert int(classes.max()) < 7


def test_a_lattice_joins_neighbours_with_its_weight() -> None:
    weights, labels, known = lattice(4, 5, 3)
    assert weights.shape == (20, 20)
    assert int(known.sum()) == 3
    assert set(weights.tocoo().data.tolist()) == {1e5}
    assert weights.nnz == 2 * (3 * 5 + 4 * 4)
    assert bool((labels[~known] == 0).all())


def test_moons_are_joined_to_their_neighbours() -> None:
    edges, labels, known = two_moons(200, 20)
    assert abs(edges - edges.T).max() == 0
    assert edges.diagonal().sum() == 0
    assert int(edges.sum(1).min()) >= 5
    assert set(labels.tolist()) == {1.0, 2.0}
    assert int(known.sum()) == 20


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="at least 2 examples"):
        ill_scaled_regression(1, 3)
    with pytest.raises(InputError, match="must be labelled and some not"):
        lattice(3, 3, 9)
