"""Solvers of linear models find the same minimum of random problems, and a path finds what each of its points has alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.composite import Composite
from poise.datafits import Huber, LeastSquares, Logistic, Multinomial
from poise.operators import Box
from poise.penalties import L1, ElasticNet, GroupLasso, Indicator, Scaled, SquaredL2
from poise.solving import minimize, solve_path

FITS = {"least_squares": LeastSquares(), "huber": Huber(0.5), "logistic": Logistic(), "multinomial": Multinomial(3)}
PENALTIES = {
    "l1": L1(),
    "l1 with scales": L1(torch.tensor([1.0, 0.3, 2.0, 0.7])),
    "elastic_net": ElasticNet(0.3),
    "l2": SquaredL2(),
    "group_lasso": GroupLasso(2),
    "rows": GroupLasso(1),
    "uneven groups": GroupLasso([0, 1, 1, 1]),
    "box": Indicator(Box(-0.2, 0.3)),
    "nonnegative": Indicator(Box(0.0, math.inf)),
    "none": None,
}


def problem(fit: str, penalty: str, seed: int, ridge: float, intercept: bool) -> Composite:
    g = np.random.default_rng(seed)
    x = g.normal(size=(25, 4)) * np.exp(g.normal(size=4))
    z = x @ g.normal(size=4) + g.normal(size=25)
    y = {"logistic": (z > np.median(z)).astype(int), "multinomial": np.digitize(z, np.quantile(z, [0.3, 0.6]))}.get(
        fit, z
    )
    p = PENALTIES[penalty]
    return Composite(x, y, FITS[fit], Scaled(p, 0.1 if p is not None else 0.0, ridge), 1.0, intercept, g.random(25))


QUICK = ("l1", "group_lasso", "box")


@pytest.mark.parametrize("penalty", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PENALTIES])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(fit=st.sampled_from(sorted(FITS)), seed=st.integers(0, 999), intercept=st.booleans())
def test_coordinates_blocks_and_proximal_steps_agree(penalty, fit, seed, intercept):
    from poise.solvers import CoordinateDescent

    here = problem(fit, penalty, seed, 0.05, intercept)
    best = minimize(here, solver="proximal")
    assert best.certificate.converged
    assert here.gap(best.coef, best.intercept) < 1e-6
    solvers = ["block_coordinate"] if CoordinateDescent().refuses(here) else ["block_coordinate", "coordinate"]
    for solver in solvers:
        found = minimize(here, solver=solver)
        assert found.certificate.converged
        assert found.certificate.value == pytest.approx(best.certificate.value, rel=1e-7)
        torch.testing.assert_close(found.coef, best.coef, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("solver", ["proximal", "coordinate"])
@pytest.mark.parametrize("penalty", ["l1", pytest.param("elastic_net", marks=pytest.mark.slow), "group_lasso"])
@pytest.mark.parametrize("fit", ["least_squares", "logistic"])
def test_warm_paths_end_where_cold_solutions_do(fit, penalty, solver):
    here = problem(fit, penalty, 3, 0.01, True)
    for point in solve_path(here, 6, smallest=1e-2, solver=solver, tol=1e-8):
        h = replace(here.penalty, weight=point.factor * here.penalty.weight, ridge=point.factor * here.penalty.ridge)
        cold = minimize(here.at(h), solver=solver, tol=1e-8)
        assert point.solution.certificate.converged
        assert point.solution.certificate.value == pytest.approx(cold.certificate.value, rel=1e-7)
        torch.testing.assert_close(point.solution.coef, cold.coef, atol=1e-3, rtol=1e-3)
