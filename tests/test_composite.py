"""Datafits and composites: slopes and conjugates against autograd and definition, certificates against known minima."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch

from poise.composite import Composite, Design
from poise.datafits import Huber, LeastSquares, Logistic, Multinomial
from poise.errors import InputError, PoiseWarning
from poise.operators import Box, Simplex
from poise.penalties import (
    L0,
    L1,
    MCP,
    SCAD,
    ElasticNet,
    GroupLasso,
    Indicator,
    NuclearNorm,
    Scaled,
    SparseSimplex,
    TotalVariation,
)
from poise.solvers import ProximalGradient

FITS = {
    "least_squares": (LeastSquares(), lambda n, g: torch.randn(n, generator=g, dtype=torch.float64)),
    "least_squares of two": (LeastSquares(), lambda n, g: torch.randn(n, 2, generator=g, dtype=torch.float64)),
    "huber": (Huber(0.7), lambda n, g: torch.randn(n, generator=g, dtype=torch.float64)),
    "logistic": (Logistic(), lambda n, g: (torch.rand(n, generator=g) < 0.4).double()),
    "multinomial": (Multinomial(3), lambda n, g: torch.randint(3, (n,), generator=g)),
}


def data(fit: str, n: int = 60, p: int = 12, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    datafit, draw = FITS[fit]
    return datafit, torch.randn(n, p, generator=g, dtype=torch.float64), draw(n, g)


@pytest.mark.parametrize("name", FITS)
def test_slope_curvature_and_conjugate_of_a_fit(name):
    fit, _, y = data(name)
    shape = (len(y),) if fit.outputs(y) is None else (len(y), fit.outputs(y))
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = fit.value(z, y)
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(fit.gradient(z, y), slope)
    z = z.detach()
    v = fit.gradient(z, y)
    inner = v * z if z.ndim == 1 else (v * z).sum(1)
    torch.testing.assert_close(fit.conjugate(v, y), inner - fit.value(z, y))  # Fenchel's equality
    assert float(fit.curvature(z, y).max()) <= {"multinomial": 0.25}.get(name, fit.smoothness) + 1e-12
    far = fit.conjugate(torch.full_like(v, 9.0), y)
    assert bool(torch.isinf(far).all()) == (name not in ("least_squares", "least_squares of two"))


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gap_bounds_the_distance_to_the_minimum(name, intercept, sparse):
    fit, x, y = data(name)
    given = scipy.sparse.csc_matrix(np.where(np.abs(x.numpy()) > 1, x.numpy(), 0)) if sparse else x
    weights = torch.rand(len(x), generator=torch.Generator().manual_seed(3))
    problem = Composite(given, y, fit, Scaled(L1(), 0.03, 0.01), 2.0, intercept, weights)
    best = ProximalGradient(tol=1e-10).minimize(problem)
    assert best.certificate.converged
    assert best.certificate.measure == "duality gap"
    rough = ProximalGradient(tol=1e-2, every=1).minimize(problem)
    above = rough.certificate.value - best.certificate.value
    assert -1e-9 <= above <= rough.certificate.residual + 1e-9
    assert rough.certificate.residual > 1e-8


@pytest.mark.parametrize(
    "penalty", [L1(), ElasticNet(0.5), GroupLasso(3), NuclearNorm(), Indicator(Box(0.0, 0.2)), Indicator(Simplex()), TotalVariation(),
                MCP(1.0), SCAD(0.1), L0(), SparseSimplex(2)], ids=lambda p: type(getattr(p, "region", p)).__name__
)  # fmt: skip
def test_every_penalty_is_certified(penalty):
    fit, x, y = data("least_squares of two" if isinstance(penalty, NuclearNorm) else "least_squares", p=6)
    problem = Composite(x, y + x[:, :1] if y.ndim > 1 else y + x[:, 0], fit, Scaled(penalty, 0.05), intercept=True)
    found = ProximalGradient(tol=1e-8).minimize(problem)
    assert found.certificate.converged, found.certificate
    # nearby points that the penalty allows are not better
    g = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-2, 1e-3):
        w = problem.penalty.prox(
            found.coef + size * torch.randn(found.coef.shape, generator=g, dtype=torch.float64), 1e-6
        )
        assert problem.value(w, found.intercept) >= found.certificate.value - 1e-7


def test_the_lasso_is_scikit_learns():
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import Lasso

    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), y / y.std()
    peer = Lasso(alpha=0.05, tol=1e-14, max_iter=10**6).fit(x, y)
    mine = ProximalGradient(tol=1e-13).minimize(Composite(x, y, LeastSquares(), Scaled(L1(), 0.05), intercept=True))
    np.testing.assert_allclose(mine.coef.numpy(), peer.coef_, atol=1e-6)
    assert float(mine.intercept) == pytest.approx(peer.intercept_, abs=1e-6)
    assert mine.certificate.support.tolist() == np.flatnonzero(peer.coef_).tolist()
    np.testing.assert_allclose(mine.predict(x[:5]).numpy(), peer.predict(x[:5]), atol=1e-5)


def test_the_largest_weight_is_where_everything_leaves():
    for name in ("least_squares", "logistic", "multinomial"):
        fit, x, y = data(name)
        largest = Composite(x, y, fit, L1(), intercept=True).largest_weight()
        at = ProximalGradient().minimize(Composite(x, y, fit, Scaled(L1(), largest * 1.0001), intercept=True))
        below = ProximalGradient().minimize(Composite(x, y, fit, Scaled(L1(), largest * 0.98), intercept=True))
        assert not at.coef.any()
        assert below.coef.any()


def test_a_missed_tolerance_says_so():
    fit, x, y = data("logistic")
    with pytest.warns(PoiseWarning, match="duality gap .* misses the tolerance"):
        found = ProximalGradient(tol=1e-12, iterations=3).minimize(Composite(x, y, fit, Scaled(L1(), 0.01)))
    assert not found.certificate.converged
    assert "stopped after 3 iterations" in found.certificate.status


def test_products_of_a_design():
    dense = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sparse = Design(scipy.sparse.csr_matrix(dense.numpy()))
    s = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for design in (Design(dense), sparse):
        w, r = torch.ones(3, 5, dtype=torch.float64), torch.ones(7, 3, dtype=torch.float64)
        torch.testing.assert_close(design.predict(w), dense @ w.T)
        torch.testing.assert_close(design.correlate(r), (dense.T @ r).T)
        torch.testing.assert_close(design.squared_norms(s), (s[:, None] * dense**2).sum(0))
        top = torch.linalg.eigvalsh(dense.T @ (s[:, None] * dense))[-1]
        assert design.largest_eigenvalue(s) == pytest.approx(float(top), rel=2e-3)
        wide = torch.cat([dense, torch.ones(7, 1, dtype=torch.float64)], 1)
        top = torch.linalg.eigvalsh(wide.T @ (s[:, None] * wide))[-1]
        assert design.largest_eigenvalue(s, constant=1.0) == pytest.approx(float(top), rel=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Design(torch.tensor([[math.nan]])), "not finite"),
        (lambda: Design(torch.zeros(3)), "matrix"),
        (lambda: Design(torch.zeros(0, 3)), "at least one"),
        (lambda: Composite(torch.ones(3, 2), torch.ones(2), LeastSquares(), L1()), "3 examples and 2 targets"),
        (
            lambda: Composite(torch.ones(2, 2), torch.tensor([0.0, math.inf]), LeastSquares(), L1()),
            "targets are not finite",
        ),
        (lambda: Composite(torch.ones(2, 2), torch.tensor([0, 2]), Logistic(), L1()), "0 and 1"),
        (lambda: Composite(torch.ones(2, 2), torch.tensor([1, 1]), Logistic(), L1()), "one class"),
        (lambda: Composite(torch.ones(2, 2), torch.tensor([0, 5]), Multinomial(3), L1()), "from 0 to 2"),
        (lambda: Composite(torch.ones(2, 2), torch.ones(2), LeastSquares(), L1(), -1.0), "no bound"),
        (
            lambda: Composite(
                torch.ones(2, 2), torch.ones(2), LeastSquares(), L1(), sample_weight=torch.tensor([-1.0, 1.0])
            ),
            "negative",
        ),
    ],
)
def test_what_makes_no_problem_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
