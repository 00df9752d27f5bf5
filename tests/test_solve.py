"""`poise.solve`: the right solver, the peers' answers, paths, and refusals by name."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

import poise
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.solving import choose, minimize, solve, solve_path
from poise.structure import composite_of


def regression(n: int = 80, p: int = 10, seed: int = 0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, p))
    return x, x[:, :3] @ np.array([2.0, -1.0, 0.5]) + 0.3 * g.normal(size=n) + 4.0


def classes(n: int = 120, p: int = 6, number: int = 2, seed: int = 0):
    g = np.random.default_rng(seed)
    x = g.normal(size=(n, p))
    return x, (x[:, :number] + 1.5 * g.normal(size=(n, number))).argmax(1)


@pytest.mark.parametrize(
    ("formula", "sparse", "solver"),
    [
        ("least_squares", False, "normal_equations"),
        ("least_squares + 0.1*l2", False, "normal_equations"),
        ("least_squares + 0.1*l2", True, "lbfgs"),
        ("huber(delta=0.5) + 0.1*l2", False, "newton"),
        ("least_squares + 0.1*nuclear_norm", False, "proximal"),
        ("least_squares + nonnegative", False, "proximal"),
        ("least_squares + 0.1*l1", False, "proximal"),
        ("least_squares + 0.1*l1", True, "coordinate"),
        ("huber(delta=0.5) + 0.1*group_lasso(groups=1)", True, "coordinate"),
    ],
)
def test_the_solver_fits_the_problem_and_says_why(formula, sparse, solver):
    x, y = regression()
    found = solve(formula, (scipy.sparse.csr_matrix(x) if sparse else x, y))
    assert found.solver == solver
    assert found.certificate.converged
    assert found.reason


def test_all_solvers_agree_where_they_can():
    x, y = classes()
    answers = {
        name: solve("cross_entropy + 0.05*l2", (x, y), solver=name, tol=1e-12)
        for name in ("newton", "lbfgs", "proximal")
    }
    for found in answers.values():
        assert found.certificate.converged, found
        torch.testing.assert_close(found.coef, answers["newton"].coef, atol=2e-6, rtol=0)


def test_ridge_and_logistic_are_scikit_learns():
    from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

    x, y = regression()
    peer = Ridge(alpha=0.1 * len(x)).fit(x, y)
    mine = solve("least_squares + 0.1*l2", (x, y))
    np.testing.assert_allclose(mine.coef, peer.coef_, atol=1e-10)
    assert float(mine.intercept) == pytest.approx(peer.intercept_)
    weights = np.random.default_rng(1).random(len(x))
    peer = LinearRegression().fit(x, y, weights)
    np.testing.assert_allclose(solve("least_squares", (x, y), sample_weight=weights).coef, peer.coef_, atol=1e-10)
    for number in (2, 3):
        x, y = classes(number=number)
        peer = LogisticRegression(C=1 / (0.05 * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
        mine = solve("cross_entropy + 0.05*l2", (x, y))
        coef = peer.coef_[0] if number == 2 else peer.coef_
        np.testing.assert_allclose(mine.coef, coef, atol=1e-5)
        assert mine.coef.shape == ((6,) if number == 2 else (3, 6))


def test_rank_deficient_data_give_the_solution_of_least_norm():
    x, y = regression(p=4)
    twice = np.concatenate([x, x], 1)
    found = solve("least_squares", (twice, y))
    assert found.certificate.converged
    torch.testing.assert_close(found.coef[:4], found.coef[4:])
    torch.testing.assert_close(2 * found.coef[:4], solve("least_squares", (x, y)).coef)


def test_squares_join_other_penalties_and_absolutes_an_elastic_net():
    x, y = regression()
    one = solve("least_squares + 0.05*l1 + 0.1*l2", (x, y))
    other = solve("least_squares + 0.1*elastic_net(ratio=0.5) + 0.05*l2", (x, y))
    torch.testing.assert_close(one.coef, other.coef, atol=1e-6, rtol=0)
    twice = solve("2*least_squares + 0.1*l1 + 0.2*l2", (x, y))
    torch.testing.assert_close(one.coef, twice.coef, atol=1e-5, rtol=0)


def test_named_data_are_standardised_training_rows():
    found = solve("least_squares + 0.1*l1", "diabetes")
    assert found.coef.shape == (10,)
    assert found.certificate.converged
    assert 0 < len(found.certificate.support) < 10


def test_separated_classes_are_said_to_have_no_minimum():
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    with pytest.warns(PoiseWarning, match="separated without error"):
        solve("cross_entropy", (x, np.array([0, 0, 1, 1])))


# ---- paths --------------------------------------------------------------------------------------------------------------


def test_a_path_begins_where_everything_is_zero_and_ends_at_the_fit():
    x, y = regression()
    problem = composite_of(poise.parse("least_squares + 0.1*l1"), x, y)
    path = solve_path(problem, 12, smallest=1e-4)
    assert path[0].support == 0
    assert path[-1].support == 10
    assert all(p.solution.certificate.converged for p in path)
    least = solve("least_squares", (x, y))
    torch.testing.assert_close(path[-1].solution.coef, least.coef, atol=2e-3, rtol=0)
    alone = minimize(problem.at(type(problem.penalty)(problem.penalty.penalty, 0.1 * path[5].factor)), tol=1e-10)
    torch.testing.assert_close(path[5].solution.coef, alone.coef, atol=2e-3, rtol=0)


def test_a_path_of_given_weights_tells_each():
    x, y = regression()
    seen = []
    path = solve_path(composite_of(poise.parse("least_squares + 0.1*l2"), x, y), [10.0, 1.0], each=seen.append)
    assert seen == path
    assert path[0].solution.coef.norm() < path[1].solution.coef.norm()


@pytest.mark.parametrize(
    ("formula", "factors", "kind", "words"),
    [
        ("least_squares", 5, IncompatibleError, "no penalty"),
        ("least_squares + nonnegative", 5, IncompatibleError, "is a set"),
        ("least_squares + 0.1*l1", 1, InputError, "at least 2"),
    ],
)
def test_what_has_no_path_is_refused(formula, factors, kind, words):
    with pytest.raises(kind, match=words):
        solve_path(composite_of(poise.parse(formula), *regression()), factors)


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("0.1*l1", "no fit"),
        ("least_squares + huber", "one fit"),
        ("least_squares + auto*l1", "not|auto"),
        ("least_squares + linear(0, 1)*l1", "Give a number"),
        ("least_squares + 0.1*l1 + 0.1*nuclear_norm", "no common proximal map"),
        ("least_squares + 0.1*mcp + nonnegative", "no common proximal map"),
        ("focal + 0.1*l1", "neither a fit"),
        ("least_squares + 0.1*l2(biases=True)", "charges the intercept"),
        ("least_squares.on('other') + 0.1*l1", "another stream"),
        ("absolute_error", "neither a fit"),
    ],
)
def test_what_is_no_linear_model_is_refused_by_name(formula, words):
    with pytest.raises((IncompatibleError, poise.errors.FormulaError), match=words):
        solve(formula, regression())


def test_a_subclass_with_another_loss_does_not_inherit_the_fit():
    class Cubed(poise.terms.LeastSquares):
        def forward(self, prediction, target):
            return (prediction - target).abs() ** 3

    with pytest.raises(IncompatibleError, match="neither a fit"):
        solve(poise.Objective() + Cubed(), regression())


@pytest.mark.parametrize(
    ("solver", "formula", "words"),
    [
        ("newton", "least_squares + 0.1*l1", "corners.*proximal"),
        ("lbfgs", "least_squares + 0.1*l1", "corners.*proximal"),
        ("normal_equations", "huber + 0.1*l2", "Use solver='newton'"),
        ("nwton", "least_squares", "Did you mean 'newton'"),
    ],
)
def test_a_solver_that_does_not_fit_is_refused_with_one_that_does(solver, formula, words):
    with pytest.raises((IncompatibleError, InputError), match=words):
        solve(formula, regression(), solver=solver)


def test_too_many_unknowns_for_a_dense_solver_are_counted():
    x = np.random.default_rng(0).normal(size=(5, 3500))
    with pytest.raises(InputError, match=r"3,000 unknowns.*3,500.*lbfgs"):
        solve("huber + 0.1*l2", (x, np.ones(5)), solver="newton")
    problem = composite_of(poise.parse("huber + 0.1*l2"), x, np.ones(5))
    assert choose(problem)[0] == "lbfgs"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "a pair"),
        ((np.ones((3, 2)), np.ones(4)), "3 examples and 4 targets"),
        ((np.array([[np.nan]]), np.ones(1)), "not finite"),
        ((np.ones((2, 1)), np.array([1.0, np.inf])), "not finite"),
    ],
)
def test_bad_data_are_refused(data, words):
    with pytest.raises(InputError, match=words):
        solve("least_squares + 0.1*l1", data)


def test_a_missed_tolerance_warns():
    with pytest.warns(PoiseWarning, match="misses the tolerance"):
        found = solve("cross_entropy + 0.001*l1", classes(), iterations=2, solver="proximal")
    assert not found.certificate.converged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve("cross_entropy + 0.01*l1", classes())
