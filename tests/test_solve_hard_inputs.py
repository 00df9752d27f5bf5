"""Inputs that users bring and solvers dislike: extreme units, constant targets, half a precision, text, tables, shapes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch

from poise.composite import Composite
from poise.datafits import Multinomial
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.formula import parse
from poise.penalties import L1, Scaled
from poise.solvers import QuadraticGraph
from poise.solving import choose, minimize, solve
from poise.structure import composite_of
from poise.training import fit
from test_solve import classes, regression

UNITS = (1e-12, 1e-6, 1e6, 1e12)


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", PoiseWarning)
        yield


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("solver", ["proximal", "coordinate"])
@pytest.mark.parametrize("fit", ["least_squares", "huber", "cross_entropy"])
def test_the_unit_of_the_inputs_changes_the_weights_alone(unit, solver, fit):
    x, y = classes() if fit == "cross_entropy" else regression()
    one = solve(f"{fit} + 0.05*l1", (x, y), solver=solver)
    other = solve(f"{fit} + {0.05 * unit}*l1", (x * unit, y), solver=solver)
    torch.testing.assert_close(other.coef * unit, one.coef, atol=2e-4, rtol=0)
    torch.testing.assert_close(other.intercept, one.intercept, atol=2e-4, rtol=0)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
@pytest.mark.parametrize("fit", ["least_squares", "huber", "cross_entropy"])
def test_so_it_is_without_corners(unit, solver, fit):
    x, y = classes() if fit == "cross_entropy" else regression()
    one = solve(f"{fit} + 0.05*l2", (x, y), solver=solver)
    other = solve(f"{fit} + {0.05 * unit**2}*l2", (x * unit, y), solver=solver)
    torch.testing.assert_close(other.coef * unit, one.coef, atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
def test_inputs_of_many_units_are_met(solver):
    x, y = classes(n=300)
    units = np.logspace(-6, 6, x.shape[1])
    found = solve("cross_entropy", (x * units, y), solver=solver)
    torch.testing.assert_close(
        found.coef * torch.from_numpy(units), solve("cross_entropy", (x, y)).coef, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("solver", [None, "proximal", "coordinate", "lbfgs"])
@pytest.mark.parametrize("fit", ["least_squares", "huber"])
def test_constant_targets_are_the_intercept(solver, fit):
    x, _ = regression()
    penalty = "l2" if solver == "lbfgs" else "l1"
    found = solve(f"{fit} + 0.1*{penalty}", (x, np.full(len(x), 3.0)), solver=solver)
    assert float(found.coef.abs().max()) < 1e-6
    assert float(found.intercept) == pytest.approx(3.0)


@pytest.mark.parametrize(
    "formula", ["least_squares + 0.1*l1", "cross_entropy + 0.02*l1", "huber + 0.1*l2", "least_squares"]
)
def test_float32_is_judged_by_what_it_can_tell(formula):
    x, y = classes(number=3) if "cross" in formula else regression()
    fine = solve(formula, (x, y))
    for form in (lambda t: torch.from_numpy(t).float(), lambda t: scipy.sparse.csr_matrix(t.astype(np.float32))):
        if formula != "least_squares + 0.1*l1" and not isinstance(form(x), torch.Tensor):
            continue
        found = solve(formula, (form(x), y))
        assert found.coef.dtype == torch.float32
        assert found.certificate.converged
        assert found.certificate.tolerance == pytest.approx(380 * fine.certificate.tolerance, rel=0.1)
        torch.testing.assert_close(found.coef.double(), fine.coef, atol=2e-2, rtol=0)


def test_a_softmax_has_a_gap_in_float32():
    x, y = classes(number=3)
    problem = Composite(x.astype(np.float32), y, Multinomial(3), Scaled(L1(), 0.02), 1.0, True)
    assert 0 <= minimize(problem).certificate.residual < 1e-4


def test_a_missed_certificate_never_says_converged():
    x, y = classes(n=20, p=30)
    x[:, 0] *= 1e8
    with pytest.warns(PoiseWarning, match="misses"):
        found = solve("cross_entropy + 1e-9*l2", (x, y), iterations=2)
    assert not found.certificate.converged
    assert "converge" not in found.certificate.status
    with pytest.warns(PoiseWarning, match="stopped after"):
        found = solve("cross_entropy + 1e-3*l2", (x, y), iterations=1, solver="lbfgs")
    assert "stopped after" in found.certificate.status


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([["a", "b"], ["c", "d"]], [0.0, 1.0], "inputs are .*Encode"),
        ([[1.0, 2.0], [3.0]], [0.0, 1.0], "not one table of numbers"),
        (np.array([[1.0, "b"], [2.0, 3.0]], dtype=object), [0.0, 1.0], "not one table of numbers"),
        (np.eye(2) + 1j, [0.0, 1.0], "numbers are needed"),
        (torch.eye(2).to_sparse(), [0.0, 1.0], "sparse tensor"),
        (scipy.sparse.eye(2).astype(complex).tocsr(), [0.0, 1.0], "real numbers"),
        (np.eye(2), ["no", "yes"], "targets are .*Encode"),
        (np.eye(2), np.array([1j, 0]), "numbers are needed"),
        (np.eye(2), np.ones((2, 2, 2)), r"\[rows, outputs\]"),
        (np.eye(2), np.ones((2, 0)), r"\[rows, outputs\]"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(x, y, words):
    with pytest.raises(InputError, match=words):
        solve("least_squares + 0.1*l1", (x, y))


def test_tables_lists_and_half_precision_are_read():
    pandas = pytest.importorskip("pandas")
    x, y = regression()
    best = solve("least_squares + 0.1*l1", (x, y)).coef
    for form in (pandas.DataFrame(x), x.tolist(), x.astype(object), torch.from_numpy(x).requires_grad_()):
        torch.testing.assert_close(solve("least_squares + 0.1*l1", (form, pandas.Series(y))).coef, best)
    half = solve("least_squares + 0.1*l1", (torch.from_numpy(x).half(), y))
    assert half.certificate.converged
    torch.testing.assert_close(half.coef.double(), best, atol=5e-3, rtol=0)


@pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": -1.0}, {"tol": float("nan")}, {"iterations": 0}])
@pytest.mark.parametrize("formula", ["least_squares", "huber + 0.1*l2", "least_squares + 0.1*l1"])
def test_a_tolerance_and_a_limit_are_positive(options, formula):
    with pytest.raises(InputError, match="tol is positive"):
        solve(formula, regression(), **options)


@pytest.mark.parametrize(("s", "words"), [(-1.0, "80 negative"), (np.nan, "80 are not finite"), (0.0, "80 are 0")])
def test_bad_weights_of_examples_are_counted(s, words):
    x, y = regression()
    with pytest.raises(InputError, match=words):
        solve("least_squares", (x, y), sample_weight=np.full(80, s))


# ---- the choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["least_squares", "huber"])
def test_bounds_of_many_coordinates_are_met_by_coordinates_where_that_is_safe(fit):
    g = np.random.default_rng(0)
    x = g.normal(size=(300, 200))
    y = x[:, :5].sum(1) + 0.1 * g.normal(size=300)
    problem = composite_of(parse(f"{fit} + nonnegative"), x, y)
    assert choose(problem)[0] == ("coordinate" if fit == "least_squares" else "proximal")
    found, other = minimize(problem), minimize(problem, solver="proximal")
    torch.testing.assert_close(found.coef, other.coef, atol=1e-6, rtol=0)


def test_blocks_of_a_group_lasso_are_its_groups():
    x, y = regression()
    found = solve("least_squares + 0.1*group_lasso(groups=2)", (x, y), solver="block_coordinate")
    best = solve("least_squares + 0.1*group_lasso(groups=2)", (x, y), solver="proximal")
    torch.testing.assert_close(found.coef, best.coef, atol=1e-4, rtol=0)


@pytest.mark.parametrize("penalty", ["l0", "capped_l1", "mcp", "scad"])
def test_penalties_that_bend_are_met_in_few_steps(penalty):
    x, y = classes(n=60, number=3)
    found = solve(f"cross_entropy + 0.05*{penalty}", (x, y))
    assert found.certificate.converged
    assert found.certificate.iterations < 3000


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("fit", ["least_squares", "huber(delta=0.5)", "cross_entropy"])
def test_a_box_without_end_has_a_gap(fit, intercept, sparse):
    x, y = classes() if fit == "cross_entropy" else regression()
    problem = composite_of(parse(f"{fit} + nonnegative"), scipy.sparse.csr_matrix(x) if sparse else x, y, intercept)
    found = minimize(problem, solver="proximal", tol=1e-10)
    rough = minimize(problem, solver="proximal", tol=1e-3)
    assert -1e-12 < problem.gap(found.coef, found.intercept) < 1e-8 * problem.scale
    above = rough.certificate.value - found.certificate.value
    assert above - 1e-12 <= problem.gap(rough.coef, rough.intercept)


def test_weights_that_leave_one_class_are_refused():
    x, y = classes()
    with pytest.raises(InputError, match="one class"):
        solve("cross_entropy + 0.1*l1", (x, y), sample_weight=(y == 1) * 1.0)


@pytest.mark.parametrize("solver", ["coordinate", "block_coordinate", "normal_equations"])
def test_training_names_where_solvers_of_linear_models_are(solver):
    data = {"input": torch.zeros(4, 2), "target": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(IncompatibleError, match=f"poise.solve.*solver='{solver}'"):
        fit(torch.nn.Linear(2, 2), parse("cross_entropy"), data, solver=solver)


@pytest.mark.parametrize(
    ("h", "words"), [([[1.0, 2.0], [2.0, 1.0]], "no bound below"), ([[1.0, np.nan], [np.nan, 1.0]], "must be finite")]
)
def test_a_quadratic_without_a_minimum_is_refused(h, words):
    with pytest.raises(InputError, match=words):
        QuadraticGraph(torch.tensor(h, dtype=torch.float64), torch.ones(2))
