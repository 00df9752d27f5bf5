"""Least absolute sum under linear equations: against brute force, the linear program, and its own certificate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.weights.basis_pursuit import basis_pursuit, lasso, lasso_path


def problem(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, columns)), generator.standard_normal(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 10_000))
def test_the_answer_equals_brute_force_over_all_bases(rows: int, more: int, seed: int) -> None:
    w, goal = problem(rows, rows + more, seed)
    best = min(
        float(np.abs(np.linalg.solve(w[:, list(basis)], goal)).sum())
        for basis in itertools.combinations(range(rows + more), rows)
    )
    found = basis_pursuit(w, goal)
    assert np.abs(found.coefficients).sum() == pytest.approx(best, rel=1e-9)
    assert len(found.support) <= rows
    assert found.residual < 1e-9 * np.linalg.norm(goal)
    assert found.gap < 1e-9


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (20, 400), (50, 1000)])
def test_the_homotopy_equals_the_linear_program(rows: int, columns: int) -> None:
    from scipy.optimize import linprog

    w, goal = problem(rows, columns)
    found = basis_pursuit(w, goal)
    assert found.method == "homotopy"
    solved = linprog(np.ones(2 * columns), A_eq=np.hstack([w, -w]), b_eq=goal, method="highs")
    assert np.abs(found.coefficients).sum() == pytest.approx(solved.fun, rel=1e-9)
    np.testing.assert_allclose(found.dual, solved.eqlin.marginals, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_the_dual_certifies_every_answer(seed: int) -> None:
    w, goal = problem(6, 30, seed)
    found = basis_pursuit(w, goal)
    assert np.abs(found.dual @ w).max() <= 1 + 1e-9
    assert found.dual @ goal == pytest.approx(np.abs(found.coefficients).sum(), rel=1e-9)
    np.testing.assert_allclose(found.reduced_costs[found.support], 0, atol=1e-9)


def test_the_norms_of_the_two_relevances_stand_in_their_order() -> None:
    for seed in range(50):
        w, goal = problem(5, 20, seed)
        one, two = basis_pursuit(w, goal).coefficients, np.linalg.pinv(w) @ goal
        assert np.abs(one).sum() <= np.abs(two).sum() + 1e-9
        assert np.linalg.norm(two) <= np.linalg.norm(one) + 1e-9


def test_the_lasso_goes_to_the_linear_program_as_lam_goes_to_0() -> None:
    w, goal = problem(6, 40)
    exact = basis_pursuit(w, goal).coefficients
    apart = [np.abs(lasso(w, goal, lam).coefficients - exact).max() for lam in (1e-2, 1e-4, 1e-6)]
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 1e-5


@pytest.mark.parametrize("lam", [0.01, 0.1, 1.0])
def test_the_lasso_equals_scikit_learn(lam: float) -> None:
    from sklearn.linear_model import Lasso, LassoLars

    w, goal = problem(8, 50, 3)
    found = lasso(w, goal, lam)
    # its objective is 1/(2K) |.|^2 + alpha |nu|
    options = {"alpha": lam / len(goal), "fit_intercept": False, "max_iter": 100_000}
    np.testing.assert_allclose(found.coefficients, Lasso(tol=1e-12, **options).fit(w, goal).coef_, atol=1e-5)
    np.testing.assert_allclose(found.coefficients, LassoLars(**options).fit(w, goal).coef_, atol=1e-8)
    assert found.gap < 1e-9


@pytest.mark.peer
def test_the_lasso_equals_celer() -> None:
    celer = pytest.importorskip("celer")
    w, goal = problem(10, 200, 4)
    theirs = celer.Lasso(0.05 / 10, fit_intercept=False, tol=1e-12).fit(np.asfortranarray(w), goal).coef_
    np.testing.assert_allclose(lasso(w, goal, 0.05).coefficients, theirs, atol=1e-6)


def test_where_columns_tie_the_lasso_falls_back_to_coordinate_descent() -> None:
    w = np.array([[1.0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1]])
    found = lasso(w, np.ones(3), 0.1)
    assert found.gap < 1e-6
    assert 0.5 * found.residual**2 + 0.1 * np.abs(found.coefficients).sum() == pytest.approx(0.1 * 1.5 - 0.005 * 0.75)


def test_the_path_is_linear_between_its_breakpoints() -> None:
    w, goal = problem(6, 30, 2)
    path = lasso_path(w, goal)
    assert path.complete
    for high, low in itertools.pairwise(path.lams):
        lam = 0.3 * high + 0.7 * low
        np.testing.assert_allclose(path.at(lam), lasso(w, goal, lam).coefficients, atol=1e-9)
    assert not path.at(2 * path.lams[0]).any()
    with pytest.raises(InputError, match="The path ends"):
        lasso_path(w, goal, 0.5).at(0.1)


def test_equal_and_opposite_columns_share() -> None:
    w, goal = problem(4, 12)
    found = basis_pursuit(w, goal)
    task = int(found.support[0])
    doubled = basis_pursuit(np.hstack([w, w[:, [task]], -w[:, [task]]]), goal)
    third = found.coefficients[task] / 3
    np.testing.assert_allclose(doubled.coefficients[[task, 12, 13]], [third, third, -third], atol=1e-12)
    assert np.abs(doubled.coefficients).sum() == pytest.approx(np.abs(found.coefficients).sum())
    assert doubled.residual < 1e-9


def test_scaling_the_target_scales_the_answer() -> None:
    w, goal = problem(5, 20)
    np.testing.assert_allclose(
        basis_pursuit(w, 3 * goal).coefficients, 3 * basis_pursuit(w, goal).coefficients, atol=1e-9
    )


def test_where_columns_tie_the_linear_program_takes_over() -> None:
    # the six corners of an octahedron all tie for a target on its axis of symmetry
    w = np.array([[1.0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 1]])
    found = basis_pursuit(w, np.ones(3))
    assert np.abs(found.coefficients).sum() == pytest.approx(1.5)
    assert found.residual < 1e-9
    assert found.gap < 1e-9


def test_a_tie_is_reported_as_an_alternate() -> None:
    w = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    found = basis_pursuit(w, np.array([1.0, 1.0]))
    assert np.abs(found.coefficients).sum() == pytest.approx(2.0)
    assert len(found.alternates) + len(found.support) == 3


def test_a_target_of_lower_rank_needs_fewer_columns() -> None:
    w, _ = problem(5, 20)
    found = basis_pursuit(w, 2 * w[:, 3])
    assert np.abs(found.coefficients).sum() <= 2 + 1e-9
    assert found.residual < 1e-9
    assert not basis_pursuit(w, np.zeros(5)).coefficients.any()


def test_a_target_outside_the_span_is_refused_with_its_residual() -> None:
    w = np.array([[1.0, 2.0], [0.0, 0.0]])
    with pytest.raises(InputError, match=r"residual of 3 .*rank 1 of 2.*lam='noise'"):
        basis_pursuit(w, np.array([1.0, 3.0]))
    assert lasso(w, np.array([1.0, 3.0]), 0.1).coefficients[1] > 0
