"""Coordinate descent over working sets: against scikit-learn, celer and skglm, against its own certificate, and against bad input."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

from poise.composite import Composite
from poise.datafits import Datafit, Huber, LeastSquares, Logistic, Multinomial
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.operators import Box, NonNegative, Simplex
from poise.penalties import (
    L0,
    L1,
    MCP,
    SCAD,
    ElasticNet,
    GroupLasso,
    Indicator,
    NuclearNorm,
    Penalty,
    Scaled,
    TotalVariation,
)
from poise.solvers import CoordinateDescent, ProximalGradient
from poise.solvers import working_set_loops as kinds
from poise.solvers.working_set_parts import Columns, Separable

ROWS, INPUTS = 80, 30


def draw(seed: int = 0) -> tuple[Any, Any]:
    """Examples whose columns are not centred, one of them empty and two of them alike; and noise."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, INPUTS, generator=g, dtype=torch.float64)
    x = torch.where(x.abs() > 0.8, x, 0.0)
    x[:, ::3] += 0.5
    x[:, 4], x[:, 6] = 0.0, x[:, 5]
    return x, torch.randn(ROWS, generator=g, dtype=torch.float64)


X, NOISE = draw()
SPARSE = scipy.sparse.csc_matrix(X.numpy())
SIGNAL = 2 * X[:, 0] - X[:, 1] + NOISE
WEIGHTS = torch.linspace(0, 2, ROWS, dtype=torch.float64)
FITS: dict[str, tuple[Datafit, Any]] = {
    "least_squares": (LeastSquares(), SIGNAL),
    "three outputs": (LeastSquares(), torch.stack([SIGNAL, NOISE, -SIGNAL], 1)),
    "huber": (Huber(0.7), SIGNAL),
    "logistic": (Logistic(), (SIGNAL > 0.3).double()),
    "multinomial": (Multinomial(3), torch.bucketize(SIGNAL, torch.tensor([-1.0, 1.0], dtype=torch.float64))),
}
CONVEX = {
    "l1": Scaled(L1(), 0.05),
    "l1 with scales": Scaled(L1(torch.linspace(0.5, 2, INPUTS)), 0.05),
    "elastic net": Scaled(ElasticNet(0.5), 0.1),
    "l1 and ridge": Scaled(L1(), 0.05, 0.03),
    "ridge": Scaled(None, 0.0, 0.1),
    "groups": Scaled(GroupLasso(3), 0.04),
    "groups and ridge": Scaled(GroupLasso(3), 0.04, 0.02),
    "mixed groups": Scaled(GroupLasso([i % 7 for i in range(INPUTS)]), 0.04),
    "features": Scaled(GroupLasso(1), 0.05),
    "box": Scaled(Indicator(Box(-0.1, 0.2))),
    "box without 0": Scaled(Indicator(Box(0.05, 0.2))),
}


def solved(problem: Composite, **options: Any) -> Any:
    return CoordinateDescent(**{"tol": 1e-10, **options}).minimize(problem)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("penalty", CONVEX)
@pytest.mark.parametrize("fit", FITS)
def test_a_convex_problem_is_solved_to_the_gap_that_the_composite_measures(fit, penalty, intercept):
    datafit, y = FITS[fit]
    dense, sparse = (Composite(x, y, datafit, CONVEX[penalty], 2.0, intercept, WEIGHTS) for x in (X, SPARSE))
    if CoordinateDescent().refuses(dense) is not None:
        assert dense.outputs is not None  # with one output every pair fits
        return
    found = solved(dense)
    c = found.certificate
    assert c.converged, c
    assert c.measure == "duality gap"
    assert c.value == pytest.approx(dense.value(found.coef, found.intercept), abs=1e-12)
    if not isinstance(CONVEX[penalty].penalty, Indicator):
        assert dense.gap(found.coef, found.intercept) <= c.tolerance + 1e-13
    assert dense.distance(found.coef, found.intercept) <= 1e-4
    again = solved(sparse)
    assert again.certificate.value == pytest.approx(c.value, abs=2 * c.tolerance)
    assert c.support.tolist() == found.coef.nonzero().squeeze(-1).tolist()


def test_it_ends_where_proximal_gradient_ends():
    for name in ("least_squares", "logistic", "multinomial"):
        datafit, y = FITS[name]
        problem = Composite(X, y, datafit, CONVEX["l1"], intercept=True)
        other = ProximalGradient(tol=1e-9).minimize(problem)
        assert abs(solved(problem).certificate.value - other.certificate.value) <= 2 * other.certificate.tolerance


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("penalty", [MCP(0.3), MCP(0.01), SCAD(0.3), SCAD(0.01)], ids=repr)
@pytest.mark.parametrize("fit", ["least_squares", "huber", "logistic"])
def test_a_concave_penalty_ends_where_no_coordinate_can_move(fit, penalty, intercept):
    datafit, y = FITS[fit]
    problem = Composite(X, y, datafit, Scaled(penalty, 0.1, 0.01), intercept=intercept, sample_weight=WEIGHTS)
    found = solved(problem)
    c = found.certificate
    assert c.converged
    assert c.measure == "distance to the subdifferential"
    assert problem.distance(found.coef, found.intercept) <= c.tolerance * (1 + 1e-6) + 1e-14
    assert c.value <= problem.value(*problem.zeros())


@pytest.mark.parametrize("kind", ["mcp", "scad", "l1"])
@pytest.mark.parametrize("step", [0.05, 1.0, 30.0])
def test_one_coordinate_is_set_to_its_minimiser(kind, step):
    penalty: Penalty = {"mcp": MCP(0.7), "scad": SCAD(0.4, 3.0), "l1": L1()}[kind]
    code = {"mcp": kinds.MCP, "scad": kinds.SCAD, "l1": kinds.SEPARABLE}[kind]
    knee, a = getattr(penalty, "knee", 1.0), getattr(penalty, "a", 3.0)
    loops = kinds.loops()
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    h = Scaled(penalty, 0.5, 0.1)
    charge = torch.stack([h.value(g) for g in grid[::10]])
    for v in torch.linspace(-4, 4, 41).tolist():
        x = loops._step(code, v, step, 0.5, 0.1, -math.inf, math.inf, knee, a)
        one = np.array([x])
        cost = (x - v) ** 2 / (2 * step) + float(h.value(torch.tensor(x, dtype=torch.float64)))
        assert cost <= float(((grid[::10] - v) ** 2 / (2 * step) + charge).min()) + 1e-12
        numbers = (np.array([0.5]), np.array([0.1]), np.array([-np.inf]), np.array([np.inf]))
        ours = loops.penalty_value(code, one, *numbers, knee, a)
        assert ours == pytest.approx(float(h.value(torch.from_numpy(one))))
        room = np.empty(1)
        loops.rooms(code, one, np.array([(v - x) / step]), *numbers, knee, a, room)
        assert room[0] >= -1e-9 / step


def test_the_intercept_is_that_of_centred_columns():
    problem = Composite(SPARSE, SIGNAL, LeastSquares(), Scaled(L1(), 0.05), intercept=True)
    centred = Composite(X - X.mean(0), SIGNAL - SIGNAL.mean(), LeastSquares(), Scaled(L1(), 0.05))
    one, other = solved(problem), solved(centred)
    torch.testing.assert_close(one.coef, other.coef, atol=1e-6, rtol=0)
    assert float(one.intercept) == pytest.approx(float(SIGNAL.mean() - X.mean(0) @ other.coef), abs=1e-6)


def test_a_weight_of_two_is_the_example_twice():
    twice = torch.cat([torch.arange(ROWS), torch.arange(10)])
    s = torch.ones(ROWS, dtype=torch.float64)
    s[:10] = 2
    for name in ("least_squares", "logistic"):
        datafit, y = FITS[name]
        one = solved(Composite(X, y, datafit, CONVEX["l1"], intercept=True, sample_weight=s))
        other = solved(Composite(X[twice], y[twice], datafit, CONVEX["l1"], intercept=True))
        assert one.certificate.value == pytest.approx(other.certificate.value, abs=1e-9)


def test_an_example_without_weight_does_not_count():
    s = torch.ones(ROWS, dtype=torch.float64)
    s[5:9] = 0
    y = SIGNAL.clone()
    y[5:9] = 1e6
    one = solved(Composite(X, y, LeastSquares(), CONVEX["l1"], sample_weight=s))
    other = solved(Composite(X[s > 0], y[s > 0], LeastSquares(), CONVEX["l1"]))
    torch.testing.assert_close(one.coef, other.coef, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_single_precision_is_solved_to_what_it_can_tell(sparse):
    x = SPARSE.astype(np.float32) if sparse else X.float()
    found = CoordinateDescent(tol=1e-5).minimize(
        Composite(x, SIGNAL.float(), LeastSquares(), CONVEX["l1"], intercept=True)
    )
    assert found.coef.dtype == torch.float32
    assert found.certificate.converged
    exact = solved(Composite(X, SIGNAL, LeastSquares(), CONVEX["l1"], intercept=True))
    torch.testing.assert_close(found.coef.double(), exact.coef, atol=5e-3, rtol=0)
    finer = CoordinateDescent(tol=1e-12).minimize(
        Composite(x, SIGNAL.float(), LeastSquares(), CONVEX["l1"], intercept=True)
    )
    assert finer.certificate.converged
    assert finer.certificate.tolerance == pytest.approx(
        32 * torch.finfo(torch.float32).eps / 1e-5 * found.certificate.tolerance, rel=1e-3
    )


# ---- what is safe, and what is kept ----------------------------------------------------------------------------------


def wide(seed: int, rows: int = 150, inputs: int = 2000) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = scipy.sparse.random(rows, inputs, 0.05, format="csc", random_state=rng, data_rvs=rng.standard_normal)
    w = np.zeros(inputs)
    w[rng.choice(inputs, 15, replace=False)] = rng.standard_normal(15) + 1
    y = x @ w
    return x, y + 0.2 * y.std() * rng.standard_normal(rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fit", ["least_squares", "logistic"])
def test_a_path_is_certified_at_every_point_by_all_columns(fit, seed):
    x, y = wide(seed)
    datafit: Datafit = LeastSquares() if fit == "least_squares" else Logistic()
    target = torch.from_numpy(y if fit == "least_squares" else (y > 0) * 1.0)
    problem = Composite(x, target, datafit, L1(), intercept=True)
    factors = problem.largest_weight() * np.geomspace(1, 0.05, 15)
    found = CoordinateDescent(tol=1e-7).path(problem, list(factors))
    assert not found[0].coef.any()
    for factor, solution in zip(factors, found, strict=True):
        here = Composite(x, target, datafit, Scaled(L1(), float(factor)), intercept=True)
        # the gap over all columns, with nothing left out as safe
        assert here.gap(solution.coef, solution.intercept) <= here.tolerance(1e-7) * (1 + 1e-6)
    alone = CoordinateDescent(tol=1e-7).minimize(here)
    assert alone.certificate.value == pytest.approx(found[-1].certificate.value, abs=2 * alone.certificate.tolerance)
    assert alone.extras["working_set"] < 1000  # not all 2,000 columns were visited


def test_a_path_chooses_its_weights_and_tells_each():
    problem = Composite(SPARSE, SIGNAL, LeastSquares(), Scaled(L1(), 0.3), intercept=True)
    told: list[float] = []
    found = CoordinateDescent(tol=1e-8).path(problem, 5, smallest=0.1, each=lambda factor, _: told.append(factor))
    assert len(found) == len(told) == 5
    assert told[-1] == pytest.approx(0.1 * told[0])
    assert told[0] * 0.3 == pytest.approx(problem.largest_weight())
    assert not found[0].coef.any()
    assert found[1].coef.any()


def test_a_path_of_groups_and_one_of_features():
    for name, penalty in (("least_squares", GroupLasso(3)), ("three outputs", GroupLasso(1))):
        datafit, y = FITS[name]
        for solution in CoordinateDescent(tol=1e-8).path(Composite(SPARSE, y, datafit, penalty, intercept=True), 6):
            assert solution.certificate.converged


def test_a_start_at_the_solution_is_kept():
    problem = Composite(X, SIGNAL, LeastSquares(), CONVEX["l1"], intercept=True)
    first = solved(problem)
    again = CoordinateDescent(tol=1e-9).minimize(problem, (first.coef, first.intercept))
    assert again.certificate.iterations == 0
    torch.testing.assert_close(again.coef, first.coef)


def test_data_that_are_already_in_order_are_not_copied():
    assert np.shares_memory(Columns.of(SPARSE).pack[2], SPARSE.data)
    fortran = np.asfortranarray(X.numpy())
    assert np.shares_memory(Columns.of(fortran).pack[1], fortran)
    before = SPARSE.copy()
    solved(Composite(SPARSE, SIGNAL, LeastSquares(), CONVEX["l1"], intercept=True))
    assert (before != SPARSE).nnz == 0


def test_entries_given_twice_are_added():
    twice = scipy.sparse.coo_matrix(([1.0, 1.0, 3.0], ([0, 0, 1], [0, 0, 1])), shape=(2, 2))
    found = solved(Composite(twice, torch.tensor([2.0, 3.0]).double(), LeastSquares(), Scaled(None, 0.0, 1e-9)))
    torch.testing.assert_close(found.coef, torch.ones(2).double(), atol=1e-4, rtol=0)


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_lasso_and_the_elastic_net_are_scikit_learns(sparse, intercept):
    from sklearn.linear_model import ElasticNet as TheirNet
    from sklearn.linear_model import Lasso

    x, y = wide(4)
    x = x if sparse else x.toarray()
    options: dict[str, Any] = {"fit_intercept": intercept, "tol": 1e-12, "max_iter": 10**6}
    a = 0.1 * np.abs(x.T @ y).max() / len(y)
    peer = Lasso(a, **options).fit(x, y)
    mine = solved(Composite(x, y, LeastSquares(), Scaled(L1(), a), intercept=intercept), tol=1e-13)
    np.testing.assert_allclose(mine.coef.numpy(), peer.coef_, atol=1e-6)
    assert float(mine.intercept) == pytest.approx(float(peer.intercept_), abs=1e-6)
    peer = TheirNet(a, l1_ratio=0.7, **options).fit(x, y)
    mine = solved(Composite(x, y, LeastSquares(), Scaled(ElasticNet(0.7), a), intercept=intercept), tol=1e-13)
    np.testing.assert_allclose(mine.coef.numpy(), peer.coef_, atol=1e-6)
    peer = Lasso(a, positive=True, **options).fit(x, y)
    mine = solved(Composite(x, y, LeastSquares(), Scaled(L1(), a), intercept=intercept), tol=1e-13, positive=True)
    np.testing.assert_allclose(mine.coef.numpy(), peer.coef_, atol=1e-6)
    assert mine.certificate.measure == "duality gap"


def test_several_outputs_are_scikit_learns_multi_task_lasso():
    from sklearn.linear_model import MultiTaskLasso

    y = FITS["three outputs"][1]
    peer = MultiTaskLasso(0.05, tol=1e-12, max_iter=10**6).fit(X.numpy(), y.numpy())
    # theirs takes half the squares over the rows, as here
    mine = solved(Composite(X, y, LeastSquares(), Scaled(GroupLasso(1), 0.05), intercept=True), tol=1e-13)
    assert mine.coef.shape == (3, INPUTS)
    np.testing.assert_allclose(mine.predict(X).numpy(), peer.predict(X.numpy()), atol=1e-5)


def test_logistic_regression_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    datafit, y = FITS["logistic"]
    penalty = Scaled(L1(), 0.02)
    mine = solved(Composite(SPARSE, y, datafit, penalty, intercept=True), tol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = LogisticRegression(
            penalty="l1", C=1 / (0.02 * ROWS), solver="saga", tol=1e-10, max_iter=100_000, random_state=0
        ).fit(X.numpy(), y.numpy())  # fmt: skip
    np.testing.assert_allclose(mine.predict(X).numpy(), peer.decision_function(X.numpy()), atol=1e-4)


def test_coefficients_that_are_not_negative_are_scipys():
    from scipy.optimize import nnls

    found = solved(Composite(X, SIGNAL, LeastSquares(), Scaled(Indicator(NonNegative()))), tol=1e-11)
    peer, _ = nnls(X.numpy(), SIGNAL.numpy())
    np.testing.assert_allclose((X @ found.coef).numpy(), X.numpy() @ peer, atol=1e-7)
    assert found.certificate.measure == "distance to the subdifferential"


@pytest.mark.peer
def test_groups_are_those_of_celer():
    celer = pytest.importorskip("celer")
    y = SIGNAL - SIGNAL.mean()
    weights = np.full(INPUTS // 3, math.sqrt(3))
    peer = celer.GroupLasso(groups=3, alpha=0.05, weights=weights, fit_intercept=False, tol=1e-12)
    peer.fit(np.asfortranarray(X.numpy()), y.numpy())
    mine = solved(Composite(X, y, LeastSquares(), Scaled(GroupLasso(3), 0.05)), tol=1e-13)
    np.testing.assert_allclose(X.numpy() @ mine.coef.numpy(), X.numpy() @ peer.coef_, atol=1e-5)


@pytest.mark.peer
def test_the_minimax_concave_penalty_is_no_worse_than_skglms():
    skglm = pytest.importorskip("skglm")
    weight, gamma = 0.1, 3.0
    peer = skglm.MCPRegression(alpha=weight, gamma=gamma, fit_intercept=False, tol=1e-10)
    peer.fit(np.asfortranarray(X.numpy()), SIGNAL.numpy())
    problem = Composite(X, SIGNAL, LeastSquares(), Scaled(MCP(gamma * weight), weight))
    mine = solved(problem)
    w = torch.from_numpy(peer.coef_)
    assert mine.certificate.value <= problem.value(w) + 1e-9


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [NuclearNorm(), TotalVariation(), L0(), Indicator(Simplex())], ids=repr)
def test_a_penalty_that_is_not_by_coordinates_is_refused_by_name(penalty):
    problem = Composite(X, SIGNAL, LeastSquares(), penalty)
    name = type(getattr(penalty, "region", penalty)).__name__
    with pytest.raises(IncompatibleError, match=rf"coordinate needs a penalty .* {name} .*solver='proximal'"):
        CoordinateDescent().minimize(problem)


def test_what_does_not_go_together_is_refused_by_name():
    y = FITS["three outputs"][1]
    with pytest.raises(IncompatibleError, match="several outputs with L1 without scales"):
        CoordinateDescent().minimize(Composite(X, y, LeastSquares(), MCP()))
    with pytest.raises(IncompatibleError, match="Huber with one output"):
        CoordinateDescent().minimize(Composite(X, y, Huber(), L1()))
    with pytest.raises(IncompatibleError, match="positive=True goes with"):
        CoordinateDescent(positive=True).minimize(Composite(X, SIGNAL, LeastSquares(), GroupLasso(3)))

    class Poisson(LeastSquares):
        pass

    class Other(Datafit):
        outputs = LeastSquares.outputs

    assert CoordinateDescent().refuses(Composite(X, SIGNAL, Poisson(), L1())) is None
    with pytest.raises(IncompatibleError, match=r"reads the fits .* and not Other"):
        CoordinateDescent().minimize(Composite(X, SIGNAL, Other(), L1()))


def test_a_set_has_no_path_and_factors_are_numbers():
    with pytest.raises(IncompatibleError, match="no penalty whose weight could vary"):
        CoordinateDescent().path(Composite(X, SIGNAL, LeastSquares(), Indicator(Box(0, 1))))
    problem = Composite(X, SIGNAL, LeastSquares(), L1())
    for factors in ([], [-1.0], [math.nan]):
        with pytest.raises(InputError, match="factors of a path"):
            CoordinateDescent().path(problem, factors)
    with pytest.raises(InputError, match="at least 2 points"):
        CoordinateDescent().path(problem, 1)


@pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": math.nan}, {"iterations": 0}, {"working_sets": 0}])
def test_an_argument_out_of_range_is_refused(options):
    with pytest.raises(InputError, match="coordinate: tol is finite"):
        CoordinateDescent(**options)


def test_numbers_that_are_not_finite_and_shapes_that_do_not_match_are_refused():
    bad = SPARSE.copy()
    bad.data[3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        CoordinateDescent().minimize(Composite(bad, SIGNAL, LeastSquares(), L1()))
    with pytest.raises(InputError, match=r"examples and .* targets"):
        CoordinateDescent().minimize(Composite(SPARSE, SIGNAL[:-1], LeastSquares(), L1()))
    with pytest.raises(InputError, match="classes are 0 and 1"):
        CoordinateDescent().minimize(Composite(SPARSE, SIGNAL.sign(), Logistic(), L1()))
    with pytest.raises(InputError, match="scales for 3 inputs"):
        CoordinateDescent().minimize(Composite(SPARSE, SIGNAL, LeastSquares(), L1(torch.ones(3))))


def test_too_few_epochs_are_said_in_the_status_and_as_a_warning():
    problem = Composite(X, SIGNAL, LeastSquares(), Scaled(L1(), 1e-4), intercept=True)
    with pytest.warns(PoiseWarning, match="misses the tolerance"):
        found = CoordinateDescent(tol=1e-12, iterations=2).minimize(problem)
    assert not found.certificate.converged
    assert "stopped after" in found.certificate.status


def test_free_coordinates_are_certified_by_their_slopes():
    scales = torch.ones(INPUTS)
    scales[:3] = 0
    found = solved(Composite(X, SIGNAL, LeastSquares(), Scaled(L1(scales), 0.3), intercept=True))
    assert found.certificate.measure == "distance to the subdifferential"
    assert found.coef[:3].all()


def test_least_squares_without_a_penalty_and_more_inputs_than_rows():
    found = CoordinateDescent(tol=1e-8).minimize(Composite(X[:10], SIGNAL[:10], LeastSquares(), Scaled(None)))
    assert found.certificate.converged
    assert found.certificate.value <= 1e-10


def test_coefficients_stay_where_columns_are_empty():
    found = solved(Composite(SPARSE, SIGNAL, LeastSquares(), CONVEX["l1"], intercept=True))
    assert float(found.coef[4]) == 0.0
    empty = scipy.sparse.csc_matrix((ROWS, 3))
    found = solved(Composite(empty, SIGNAL, LeastSquares(), CONVEX["l1"], intercept=True))
    assert not found.coef.any()
    assert float(found.intercept) == pytest.approx(float(SIGNAL.mean()))


def test_blocks_know_their_limits():
    one = Separable(np.ones(2), np.zeros(2), np.array([-np.inf, 1.0]), np.full(2, np.inf))
    assert one.limit.tolist() == [1.0, -1.0]  # what cannot be 0 is never left out


@pytest.mark.parametrize("penalty", [L1(), GroupLasso(4)], ids=["l1", "groups"])
@pytest.mark.parametrize("logistic", [False, True])
def test_inputs_that_hardly_differ_need_no_thousands_of_epochs(logistic, penalty):
    g = torch.Generator().manual_seed(0)
    n, p = 100, 60
    x = torch.randn(n, 1, generator=g, dtype=torch.float64) + 0.03 * torch.randn(n, p, generator=g, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, p, dtype=torch.float64)[torch.randperm(p, generator=g)]
    y = x[:, :20].sum(1) + 0.1 * torch.randn(n, generator=g, dtype=torch.float64)
    fit: Datafit = Logistic() if logistic else LeastSquares()
    problem = Composite(x, (y > 0).double() if logistic else y, fit, penalty, intercept=True)
    found = CoordinateDescent(tol=1e-9).minimize(problem.at(Scaled(penalty, 1e-3 * problem.largest_weight())))
    assert found.certificate.converged
    assert found.certificate.iterations < 3000
