"""Untrained solvers of sparse recovery: certificates, rates, and agreement with exact solutions."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from poise import penalties
from poise.composite import Composite
from poise.data.sparse_signals import BernoulliGaussian, gaussian_matrix
from poise.datafits import LeastSquares
from poise.errors import InputError, PoiseWarning
from poise.operators import NonNegative
from poise.solvers import (
    ProximalGradient,
    TopK,
    approximate_message_passing,
    chebyshev_steps,
    coordinate_lasso,
    lasso_gap,
    recover,
)
from poise.solvers.signal_operators import largest_eigenvalue

WEIGHT = 0.05


def problem(batch: int = 4, m: int = 20, n: int = 40) -> tuple[Tensor, Tensor]:
    drawn = BernoulliGaussian(m, n, p=0.1, dtype=torch.float64)(batch, torch.Generator().manual_seed(0))
    return drawn.operator, drawn.y


@pytest.mark.parametrize(
    "options",
    [{"step": "1/L"}, {"step": "1.9/L"}, {"step": "backtracking"}, {"momentum": True}],
    ids=["1/L", "1.9/L", "search", "fista"],
)
def test_every_way_of_stepping_reaches_the_exact_lasso(options: dict[str, Any]) -> None:
    A, y = problem()
    exact = coordinate_lasso(A, y, WEIGHT, tolerance=1e-13)
    result = recover(A, y, weight=WEIGHT, iterations=20_000, tolerance=1e-6, **options)
    assert result.status == "converged"
    assert bool(result.converged.all())
    assert float(lasso_gap(A, y, result.x, WEIGHT).max()) < 1e-5
    torch.testing.assert_close(result.objective, exact.objective, atol=1e-7, rtol=0)
    certificate = result.certificate()
    assert certificate.converged
    assert certificate.history[-1] == pytest.approx(certificate.value, abs=1e-9)


@pytest.mark.parametrize(
    "penalty", [penalties.L1(), penalties.ElasticNet(0.6), penalties.GroupLasso(4)], ids=lambda p: type(p).__name__
)
def test_a_linear_model_of_one_signal_has_the_same_solution(penalty: Any) -> None:
    A, y = problem()
    here = recover(A, y[0], penalty, weight=WEIGHT, momentum=True, iterations=20_000, tolerance=1e-8)
    model = Composite(A, y[0], LeastSquares(), penalties.Scaled(penalty, WEIGHT), weight=float(len(A)))
    there = ProximalGradient(tol=1e-10).minimize(model)
    torch.testing.assert_close(there.coef, here.x, atol=1e-4, rtol=0)
    assert there.certificate.value == pytest.approx(float(here.objective[0]), abs=1e-8)


def test_the_gap_bounds_the_distance_to_the_least_value() -> None:
    A, y = problem()
    exact = coordinate_lasso(A, y, WEIGHT, tolerance=1e-13).objective
    with pytest.warns(PoiseWarning, match="stopped after 5 iterations: 4 of 4 signals"):
        early = recover(A, y, weight=WEIGHT, iterations=5)
    assert not early.certificate().converged
    assert bool((lasso_gap(A, y, early.x, WEIGHT) >= early.objective - exact - 1e-9).all())


def test_backtracking_never_raises_the_objective_and_steps_further_than_one_over_l() -> None:
    A, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        searched = recover(A, y, weight=WEIGHT, step="backtracking", iterations=60)
        plain = recover(A, y, weight=WEIGHT, iterations=60)
    falls = torch.tensor(searched.history)
    assert bool((falls[1:] <= falls[:-1] + 1e-12).all())
    assert searched.history[-1] < plain.history[-1]


@pytest.mark.parametrize(
    "penalty", [penalties.L0(), TopK(4), penalties.GroupLasso(4), NonNegative()], ids=lambda p: type(p).__name__
)
def test_other_penalties_reach_a_stationary_point(penalty: Any) -> None:
    A, y = problem()
    result = recover(
        A, y, penalty, weight=WEIGHT, iterations=5000, tolerance=1e-4, momentum=bool(getattr(penalty, "convex", True))
    )
    assert result.status == "converged"


def test_chebyshev_steps_reduce_a_quadratic_by_the_chebyshev_polynomial() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(1.0, 9.0, 6, dtype=torch.float64)
    A = (q * values.sqrt()) @ q.T
    y = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    count = 8
    steps = chebyshev_steps(1.0, 9.0, count)
    trace = recover(A, y, weight=0.0, step=steps).x
    exact = torch.linalg.solve(A, y.T).T
    worst = 1 / math.cosh(count * math.acosh((9.0 + 1.0) / (9.0 - 1.0)))
    ratio = ((trace - exact) @ q).abs() / (exact @ q).abs()
    assert float(ratio.max()) <= worst * (1 + 1e-9)
    assert float(ratio[0, 0]) == pytest.approx(worst)  # attained at both ends


def test_message_passing_ends_at_a_lasso_solution() -> None:
    drawn = BernoulliGaussian(250, 500, p=0.06, noise=0.02, dtype=torch.float64)(2, torch.Generator().manual_seed(0))
    result = approximate_message_passing(drawn.operator, drawn.y, kappa=1.6, iterations=200, tolerance=1e-6)
    assert result.status == "converged"
    for i in range(2):  # the lasso of its own weight has this solution
        r = drawn.y[i] - drawn.operator @ result.x[i]
        weight = float((drawn.operator.T @ r).abs().max())
        exact = coordinate_lasso(drawn.operator, drawn.y[i], weight, tolerance=1e-12)
        torch.testing.assert_close(exact.x, result.x[i], atol=1e-4, rtol=0)


def test_float32_and_single_signals_keep_their_shape_and_dtype() -> None:
    A, y = (t.float() for t in problem())
    result = recover(A, y[0], weight=WEIGHT, trace=True, iterations=3000)
    assert result.x.shape == (40,)
    assert result.x.dtype == torch.float32
    assert result.trace is not None
    assert result.trace.shape == (result.iterations, 40)
    assert result.certificate().support is not None
    assert coordinate_lasso(A, y[0], WEIGHT).x.dtype == torch.float32


def test_the_largest_eigenvalue_of_a_batch() -> None:
    A = gaussian_matrix(5, 9, batch=3, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(A.mT @ A)[:, -1]
    torch.testing.assert_close(largest_eigenvalue(A), exact)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A, y: recover(A, y, step=0.0), "finite and above 0"),
        (lambda A, y: recover(A, y, step=[0.1, -0.1]), "finite and above 0"),
        (lambda A, y: recover(A, y, step="L/1"), "step is 'c/L'"),
        (lambda A, y: recover(A, y, step=[0.1], iterations=3), "lists 1 steps"),
        (lambda A, y: recover(A, y, weight=-1.0), "weight must be finite"),
        (lambda A, y: chebyshev_steps(2.0, 1.0, 3), "0 < smallest < largest"),
        (lambda A, y: coordinate_lasso(A, y, 0.0), "weight must be above 0"),
        (lambda A, y: coordinate_lasso(A.cdouble(), y, 0.1), "one real matrix"),
        (lambda A, y: approximate_message_passing(A, y, kappa=0.0), "kappa must be above 0"),
        (lambda A, y: approximate_message_passing(A[None].expand(4, -1, -1).contiguous(), y), "one matrix"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    A, y = problem()
    with pytest.raises(InputError, match=message):
        call(A, y)


@pytest.mark.peer
def test_celer_agrees_with_the_limit() -> None:
    celer = pytest.importorskip("celer")
    A, y = problem()
    result = recover(A, y, weight=WEIGHT, momentum=True, iterations=20_000, tolerance=1e-9)
    for i in range(len(y)):
        peer = celer.Lasso(alpha=WEIGHT / A.shape[0], fit_intercept=False, tol=1e-12).fit(A.numpy(), y[i].numpy())
        torch.testing.assert_close(torch.from_numpy(peer.coef_), result.x[i], atol=1e-5, rtol=0)
