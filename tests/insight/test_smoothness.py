"""Gradient-normalised smoothness of functions whose radius is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import poise
from poise import Problem
from poise.errors import InputError, NonFiniteError
from poise.insight import gradient_normalized_smoothness, smoothness_profile
from poise.readouts import Regression
from poise.solvers import GradientNormalizedNewton
from poise.tasks.smooth_functions import LogSumExp


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("m", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("x", [0.2, 3.0])
def test_of_a_cubic_it_is_the_root_of_twice_the_gradient_over_the_constant(m: float, x: float) -> None:
    found = gradient_normalized_smoothness(lambda x: m / 6 * x.pow(3).sum(), vector(x))
    assert found.gradient_norm == pytest.approx(m / 2 * x * x)
    assert found.gamma == pytest.approx(math.sqrt(2 * found.gradient_norm / m), rel=1e-6)


def test_of_a_quadratic_with_its_hessian_it_is_infinite_and_without_one_the_gradient_over_the_largest_curvature() -> (
    None
):
    h = vector(0.5, 2.0, 8.0)

    def f(x: Tensor) -> Tensor:
        return 0.5 * (h * x * x).sum()

    x = vector(1.0, -1.0, 2.0)
    assert gradient_normalized_smoothness(f, x).gamma == math.inf
    found = gradient_normalized_smoothness(f, x, "zero")
    # the coordinate of the largest curvature is among the directions
    assert found.gamma == pytest.approx(float((h * x).norm()) / 8, rel=1e-6)
    assert found.direction is not None
    assert float(found.direction[2].abs()) == pytest.approx(1.0)


def test_a_factor_changes_nothing_and_a_wrong_hessian_obeys_the_harmonic_rule() -> None:
    def f(x: Tensor) -> Tensor:
        return x.pow(4).sum() / 4 + x.square().sum()

    x = vector(1.0, 2.0)
    one = gradient_normalized_smoothness(f, x, directions=64)
    assert gradient_normalized_smoothness(lambda x: 1e4 * f(x), x, directions=64).gamma == pytest.approx(
        one.gamma, rel=1e-6
    )
    error = 3.0
    hessian = torch.func.hessian(f)(x) + error * torch.eye(2, dtype=torch.float64)
    two = gradient_normalized_smoothness(f, x, lambda x: hessian, directions=64)
    # |H1 - H2| <= |g| / gamma_12  =>  gamma_2 >= 1 / (1/gamma_1 + 1/gamma_12)
    assert two.gamma >= 1 / (1 / one.gamma + error / one.gradient_norm) * (1 - 1e-9)


def test_admissible_directions_never_lower_it() -> None:
    generator = torch.Generator().manual_seed(0)
    f = LogSumExp(torch.randn(30, 4, generator=generator).double(), torch.randn(30, generator=generator).double(), 0.3)
    x = torch.ones(4, dtype=torch.float64)
    every = gradient_normalized_smoothness(f, x, directions=64)
    some = gradient_normalized_smoothness(f, x, directions=64, admissible=True)
    assert some.gamma >= every.gamma * (1 - 1e-9)
    # the Gauss-Newton Hessian is off by grad grad' / mu, which bounds gamma by mu / |grad|
    rough = gradient_normalized_smoothness(f, x, "gauss_newton", directions=64)
    assert rough.gamma <= 0.3 / rough.gradient_norm * (1 + 1e-6)


def test_a_problem_and_a_path_are_taken() -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(2, 1, dtype=torch.float64)
    problem = Problem(model, poise.parse("squared_error"), [{"main": {"input": x, "target": x[:, 0]}}], Regression())
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert gradient_normalized_smoothness(problem, start, directions=8).gamma == math.inf
    assert GradientNormalizedNewton(tol=1e-10).minimize(problem).converged
    profile = smoothness_profile(lambda x: x.pow(4).sum(), [vector(2.0), vector(1.0)], directions=2)
    # for the quartic everything scales with x
    assert profile[0].gamma == pytest.approx(2 * profile[1].gamma, rel=1e-6)


def test_what_has_no_radius_is_refused() -> None:
    with pytest.raises(InputError, match="gradient is 0"):
        gradient_normalized_smoothness(lambda x: x.square().sum(), vector(0.0))
    with pytest.raises(InputError, match="directions must be at least 1"):
        gradient_normalized_smoothness(lambda x: x.square().sum(), vector(1.0), directions=0)
    with pytest.raises(NonFiniteError):
        gradient_normalized_smoothness(lambda x: x.log().sum(), vector(-1.0))
