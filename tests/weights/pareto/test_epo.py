"""EPO: its programs are those of the paper, and descent along it ends on the ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from random_gradients import gram, make
from scipy.optimize import linprog

from poise.errors import InputError
from poise.weights.pareto.epo import EPO, non_uniformity

F64 = torch.float64


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("m", [2, 3, 4, 7])
def test_off_the_ray_the_weights_solve_the_program_of_the_paper(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    j, values, r = make(seed, m, m, 0.5, "none"), rng.uniform(0.1, 5, m), rng.uniform(0.2, 3, m)
    g = j @ j.T
    mu, a = non_uniformity(values, r)
    c = g @ a
    least = np.where(c > 0, -np.inf, c)
    least[np.argmax(r * values)] = 0.0
    least = least if (c > 0).any() else np.zeros(m)
    held = np.isfinite(least)
    answer = linprog(-c, A_ub=-g[held], b_ub=-least[held], A_eq=np.ones((1, m)), b_eq=[1])
    w = EPO(preference=r.tolist()).weigh(torch.from_numpy(g), torch.from_numpy(values)).numpy()
    assert mu > 1e-4
    if answer.status == 0:
        assert w @ c == pytest.approx(-answer.fun, rel=1e-6, abs=1e-7)
        assert (g[held] @ w >= least[held] - 1e-7 * np.abs(g).max()).all()
    else:
        np.testing.assert_allclose(w, r / r.sum())


def test_on_the_ray_all_terms_fall() -> None:
    j = make(1, 3, 3, 0.3, "agree")
    w = EPO().weigh(gram(j), torch.ones(3, dtype=F64)).numpy()
    assert (gram(j).numpy() @ w > 0).all()


@pytest.mark.parametrize("preference", [(1.0, 1.0), (1.0, 4.0), (5.0, 1.0)])
def test_descent_ends_on_the_front_where_the_weighted_values_are_equal(preference: tuple[float, float]) -> None:
    """Two non-convex terms of Lin et al., whose front is concave: no fixed weights reach its middle."""
    n = 4
    rule, x = EPO(preference), torch.full((n,), 0.3, dtype=F64) * torch.tensor([1.0, -1.0, 1.0, 0.5], dtype=F64)

    def terms(point: torch.Tensor) -> torch.Tensor:
        return torch.stack([1 - torch.exp(-((point - s / n**0.5) ** 2).sum()) for s in (1, -1)])

    for t in range(500):
        rows = torch.autograd.functional.jacobian(terms, x)
        w = rule.weigh(rows @ rows.T, terms(x))
        x = x - 0.1 / (1 + t / 150) * (w @ rows)
    weighted = terms(x) * torch.tensor(preference, dtype=F64)
    assert float(weighted[0] / weighted[1]) == pytest.approx(1, abs=0.05)
    # The front is the segment between the two minima: all coordinates equal.
    assert float(x.std()) < 0.02


def test_values_below_zero_have_no_ratio() -> None:
    with pytest.raises(InputError, match="epo: a ratio of values"):
        EPO().weigh(torch.eye(2, dtype=F64), torch.tensor([1.0, -1.0], dtype=F64))


def test_values_that_are_all_zero_are_on_every_ray() -> None:
    w = EPO().weigh(torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64))
    assert float(w.sum()) == pytest.approx(1)
