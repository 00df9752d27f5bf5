"""Sparse transport as an estimator: scikit-learn's checks, balance, sparsity, and rows that are shared out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from poise.errors import InputError
from poise.solvers import SparseTransport, sparse_transport


@pytest.mark.filterwarnings("ignore")
def test_it_passes_the_checks_of_scikit_learn():
    check_estimator(SparseTransport())


def rows(n: int = 90):
    g = np.random.default_rng(0)
    return np.concatenate([g.normal(0, 1, (2 * n // 3, 2)), g.normal(4, 1, (n // 3, 2))])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_prototype_gets_its_share(k):
    x = rows()
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    fitted = SparseTransport(k=k, weights=weights, gamma=0.5).fit(x)
    plan = fitted.transform(x)
    np.testing.assert_allclose(plan.sum(1), 1)
    assert (plan > 0).sum(1).max() <= k
    assert np.abs(plan.sum(0) / len(x) - weights).sum() == pytest.approx(fitted.marginal_error_, abs=1e-12)
    assert fitted.marginal_error_ < (0.06 if k == 1 else 0.01)


def test_it_is_the_plan_of_the_solver():
    """Without ties, which k below the number of prototypes brings: the potentials then give the plan that is read off."""
    import torch

    x = rows()
    fitted = SparseTransport(k=4, gamma=0.5).fit(x)
    cost = torch.cdist(torch.from_numpy(fitted.prototypes_), torch.from_numpy(x)).square()
    rows_each = torch.full((4,), len(x) / 4, dtype=torch.float64)
    found = sparse_transport(cost / cost.mean(), rows_each, torch.ones(len(x)).double(), k=4, gamma=0.5)
    np.testing.assert_allclose(fitted.transform(x), found.plan.numpy().T, atol=1e-4)
    np.testing.assert_allclose(fitted.transport(x), fitted.transform(x) @ fitted.prototypes_)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": [[0.0]]}, "targets have 1"),
        ({"weights": [1.0, 1.0, 1.0, 1.0]}, "add up to 1"),
        ({"weights": [1.0]}, "4 shares"),
        ({"k": 0}, "integer of at least 1"),
    ],
)
def test_mistakes_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        SparseTransport(**options).fit(rows())
