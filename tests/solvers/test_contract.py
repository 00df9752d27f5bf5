"""One contract: every solver returns value, residual, measure, tolerance, iterations and a status, and warns where it misses."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import poise
from poise.errors import IncompatibleError, PoiseWarning
from poise.problem import Certificate, Problem
from poise.readouts import Classification, Regression
from poise.solvers import as_solver
from poise.solving import SOLVERS, solve


def linear_data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 5, generator=g, dtype=torch.float64)
    return x, x[:, 0] - x[:, 1] + 0.2 * torch.randn(50, generator=g, dtype=torch.float64)


def by_composite(name: str, **options):
    corners = {"proximal", "coordinate"} & {name}
    return solve(f"least_squares + 0.1*{'l1' if corners else 'l2'}", linear_data(), solver=name, **options).certificate


def by_problem(name: str, **options):
    x, y = linear_data()
    model = nn.Linear(5, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    problem = Problem(model, poise.parse("least_squares + 0.1*l2"), [{"main": {"input": x, "target": y}}], Regression())
    solver = as_solver(name, **options)
    solver.bind(model, problem.objective)
    return solver.minimize(problem)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_solvers_of_linear_models_keep_the_contract(name):
    holds(by_composite(name))


@pytest.mark.parametrize("name", ["newton", "lbfgs", "proximal", "sls", "target_surrogate"])
def test_solvers_of_problems_keep_the_contract(name):
    holds(by_problem(name))


def holds(certificate: Certificate) -> None:
    assert isinstance(certificate, Certificate)
    assert certificate.converged
    assert certificate.status == "converged"
    assert math.isfinite(certificate.value)
    assert 0 <= certificate.residual <= certificate.tolerance
    assert certificate.measure
    assert certificate.iterations >= 0


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"normal_equations"}))
def test_a_miss_is_a_status_and_a_warning(name):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        certificate = solve(
            f"huber(delta=0.3) + 1e-4*{'l2' if name in ('newton', 'lbfgs') else 'l1'}",
            linear_data(),
            solver=name,
            tol=1e-13,
            iterations=1,
        ).certificate
    assert not certificate.converged
    assert certificate.status != "converged"
    assert any(issubclass(w.category, PoiseWarning) for w in said)


def test_all_solvers_of_one_problem_reach_one_value():
    values = [by_problem(name).value for name in ("newton", "lbfgs", "proximal")]
    values += [by_composite(name).value for name in ("newton", "lbfgs", "normal_equations")]
    assert max(values) - min(values) < 1e-8


def classes(number: int) -> tuple[Problem, nn.Linear]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=g, dtype=torch.float64)
    y = (x[:, :number] + torch.randn(60, number, generator=g, dtype=torch.float64)).argmax(1)
    model = nn.Linear(4, number).double()
    return Problem(
        model, poise.parse("cross_entropy + 0.1*l1"), [{"main": {"input": x, "target": y}}], Classification()
    ), model


@pytest.mark.parametrize("number", [2, 3])
def test_a_linear_layer_is_left_at_its_proven_minimum(number):
    problem, model = classes(number)
    certificate = as_solver("proximal").minimize(problem)
    holds(certificate)
    assert certificate.measure == "duality gap"
    assert float(problem.value()) == pytest.approx(certificate.value, abs=1e-9)
    assert bool((model.weight == 0).any())
    with torch.no_grad():
        model.weight.add_(0.01)
    assert float(problem.value()) > certificate.value


def test_a_network_is_refused_with_what_to_use():
    problem, _ = classes(2)
    problem.model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(IncompatibleError, match=r"one linear layer.*poise.fit"):
        as_solver("proximal").minimize(problem)
