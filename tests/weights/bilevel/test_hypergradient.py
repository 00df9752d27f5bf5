"""Every form of the hypergradient against closed forms, differences and peers."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from bilevel_problems import logistic, ridge
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.weights.bilevel import Differences, ImplicitHypergradient, Levels, UnrolledHypergradient

THETA = torch.linspace(-1, 2, 8, dtype=torch.float64)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("solver", ["cg", "lu", "neumann"])
def test_on_ridge_the_hypergradient_is_that_of_the_closed_solution(solver: Any) -> None:
    problem = ridge()
    hypergradient = ImplicitHypergradient(problem.levels, solver, tolerance=1e-10, iterations=5000)
    found = hypergradient((problem.solution(THETA),), (THETA,))
    assert relative(found.gradient[0], problem.hypergradient(THETA)) < 1e-8
    assert found.converged
    assert found.residual <= 1e-10
    assert found.damping == 0


@pytest.mark.parametrize("solver", ["cg", "lu", "neumann"])
def test_on_logistic_regression_the_hypergradient_is_that_of_the_known_hessian(solver: Any) -> None:
    problem = logistic()
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = ImplicitHypergradient(problem.levels, solver, tolerance=1e-10, iterations=5000)(
        (problem.solution(theta),), (theta,)
    )
    assert relative(found.gradient[0], problem.hypergradient(theta)) < 1e-8


@pytest.mark.parametrize("problem", [ridge(), logistic()], ids=["ridge", "logistic"])
def test_the_hypergradient_is_the_central_difference_of_the_upper_value(problem: Any) -> None:
    theta = torch.linspace(-0.5, 0.5, problem.a.shape[1], dtype=torch.float64)
    found = ImplicitHypergradient(problem.levels)((problem.solution(theta),), (theta,)).gradient[0]
    h = 1e-4
    for j in range(len(theta)):
        step = torch.zeros_like(theta)
        step[j] = h
        difference = (problem.value(theta + step) - problem.value(theta - step)) / (2 * h)
        assert found[j] == pytest.approx(float(difference), rel=1e-5, abs=1e-9)


def test_one_scalar_weight_is_differentiated_as_well() -> None:
    problem, theta = ridge(), torch.tensor(0.3, dtype=torch.float64)
    found = ImplicitHypergradient(problem.levels)((problem.solution(theta),), (theta,))
    assert relative(found.gradient[0], problem.hypergradient(theta)) < 1e-8


def test_a_direct_gradient_of_the_upper_objective_is_added() -> None:
    problem = ridge()
    two = problem.levels
    with_direct = Levels(two.lower, lambda x, t, b: two.upper(x, t, b) + t[0].square().sum())
    found = ImplicitHypergradient(with_direct)((problem.solution(THETA),), (THETA,)).gradient[0]
    assert relative(found, problem.hypergradient(THETA) + 2 * THETA) < 1e-8


def test_several_tensors_of_x_are_one_vector() -> None:
    problem = ridge()
    two = problem.levels
    parts = Levels(
        lambda x, t, b: two.lower((torch.cat([x[0].flatten(), x[1]]),), t, b),
        lambda x, t, b: two.upper((torch.cat([x[0].flatten(), x[1]]),), t, b),
    )
    x = problem.solution(THETA)
    for solver in ("cg", "lu"):
        found = ImplicitHypergradient(parts, solver)((x[:6].reshape(2, 3), x[6:]), (THETA,))
        assert relative(found.gradient[0], problem.hypergradient(THETA)) < 1e-8
        assert found.q is not None
        assert [t.shape for t in found.q] == [(2, 3), (2,)]


def test_samples_are_independent_systems_that_stop_each_on_its_own() -> None:
    problems = [ridge(seed=s) for s in range(3)]
    a, y, b, z = (torch.stack([getattr(p, n) for p in problems]) for n in ("a", "y", "a_valid", "y_valid"))
    apply = lambda m, x: torch.einsum("nij,nj->ni", m, x)  # noqa: E731
    many = Levels(
        lambda x, t, _: ((apply(a, x[0]) - y).square().sum() + (t[0].exp() * x[0].square()).sum()) / 2,
        lambda x, t, _: (apply(b, x[0]) - z).square().sum() / 2,
    )
    x = torch.stack([p.solution(THETA) for p in problems])
    exact = torch.stack([p.hypergradient(THETA) for p in problems]).sum(0)
    for solver in ("cg", "lu"):
        found = ImplicitHypergradient(many, solver, samples=True)((x,), (THETA,))
        assert relative(found.gradient[0], exact) < 1e-8
        assert found.residuals is not None
        assert found.residuals.shape == (3,)
        assert float(found.residuals.max()) <= 1e-10
    tolerance = torch.tensor([1e1, 1e-3, 1e-9], dtype=torch.float64)
    found = ImplicitHypergradient(many, samples=True)((x,), (THETA,), tolerance=tolerance)
    assert found.residuals is not None
    assert bool((found.residuals <= tolerance).all())
    assert float(found.residuals[0]) > 1e-9


def test_the_residual_is_absolute_and_true() -> None:
    problem = ridge()
    x = problem.solution(THETA)
    for tolerance in (1e0, 1e-3, 1e-6):
        found = ImplicitHypergradient(problem.levels, tolerance=tolerance)((x,), (THETA,))
        assert found.q is not None
        true = (problem.hessian(THETA) @ found.q[0] - found.upper_gradient[0]).norm()
        assert found.residual == pytest.approx(float(true), rel=1e-6)
        assert found.residual <= tolerance


def test_a_warm_start_saves_products_and_the_state_carries_it() -> None:
    problem = ridge(rows=60, d=40, seed=1)
    theta = torch.zeros(40, dtype=torch.float64)
    first = ImplicitHypergradient(problem.levels, tolerance=1e-6)
    first((problem.solution(theta),), (theta,))
    other = ImplicitHypergradient(problem.levels, tolerance=1e-6)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    near = theta + 1e-5
    again = other((problem.solution(near),), (near,))
    same = first((problem.solution(near),), (near,))
    cold = ImplicitHypergradient(problem.levels, tolerance=1e-6)((problem.solution(near),), (near,))
    assert again.iterations == same.iterations < cold.iterations
    assert torch.equal(again.gradient[0], same.gradient[0])


def test_what_a_call_evaluates_is_counted() -> None:
    problem = ridge()
    hypergradient = ImplicitHypergradient(problem.levels, check=False, warm_start=False)
    found = hypergradient((problem.solution(THETA),), (THETA,))
    assert found.cost.hessian_products == found.iterations
    assert found.cost.mixed_products == 1
    assert found.cost.lower_gradients == 1
    assert found.cost.upper_gradients == 1
    by_lu = ImplicitHypergradient(problem.levels, "lu", check=False)((problem.solution(THETA),), (THETA,))
    assert by_lu.cost.hessian_products == 8
    by_differences = ImplicitHypergradient(problem.levels, products="differences", tolerance=1e-4, check=False)(
        (problem.solution(THETA),), (THETA,)
    )
    assert by_differences.cost.hessian_products == by_differences.cost.mixed_products == 0
    assert by_differences.cost.lower_gradients == 2 * by_differences.iterations + 2


def test_differences_of_gradients_approach_the_second_derivatives() -> None:
    problem = logistic()
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = problem.solution(theta) + 0.1
    v = torch.linspace(1, 2, 6, dtype=torch.float64)
    exact, differences = problem.levels.linearise((x,), (theta,)), Differences(problem.levels, (x,), (theta,))
    # Cube root of epsilon squared is 4e-11: the error of the difference, times third derivatives of order 10.
    assert relative(differences.hessian_product((v,))[0], exact.hessian_product((v,))[0]) < 1e-8
    assert relative(differences.mixed_product((v,))[0], exact.mixed_product((v,))[0]) < 1e-8
    assert not differences.mixed_product((torch.zeros_like(v),))[0].any()
    found = ImplicitHypergradient(problem.levels, products="differences", tolerance=1e-7)(
        (problem.solution(theta),), (theta,)
    )
    assert relative(found.gradient[0], problem.hypergradient(theta)) < 1e-6


def test_one_step_takes_the_hessian_for_the_identity() -> None:
    problem = ridge()
    x = problem.solution(THETA)
    found = ImplicitHypergradient(problem.levels, "one_step", step=0.01)((x,), (THETA,))
    slope = problem.a_valid.T @ (problem.a_valid @ x - problem.y_valid)
    assert torch.allclose(found.gradient[0], -0.01 * THETA.exp() * x * slope)
    assert found.cost.hessian_products == 0
    assert math.isnan(found.residual)
    # It is also the gradient through one unrolled step, with d upper/dx taken at the end of the step.
    step = UnrolledHypergradient(problem.levels, steps=1, lr=0.01)((x,), (THETA,))
    assert torch.allclose(step.gradient[0], found.gradient[0], rtol=1e-5)


def test_k_terms_of_the_neumann_series_are_k_unrolled_steps_at_the_minimum() -> None:
    problem = ridge()
    x = problem.solution(THETA)
    for k in (1, 5, 20):
        neumann = ImplicitHypergradient(problem.levels, "neumann", step=0.01, iterations=k, tolerance=0)((x,), (THETA,))
        unrolled = UnrolledHypergradient(problem.levels, steps=k, lr=0.01)((x,), (THETA,))
        assert torch.allclose(neumann.gradient[0], unrolled.gradient[0], rtol=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_unrolling_is_automatic_differentiation_through_the_steps(momentum: float, keep_graphs: bool) -> None:
    problem = logistic()
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = UnrolledHypergradient(problem.levels, 12, 0.02, momentum, keep_graphs=keep_graphs)(
        (torch.zeros(6, dtype=torch.float64),), (theta,)
    )
    leaf = theta.clone().requires_grad_()
    x, v = torch.zeros(6, dtype=torch.float64, requires_grad=True), torch.zeros(6, dtype=torch.float64)
    for _ in range(12):
        slope = torch.autograd.grad(problem.levels.lower((x,), (leaf,), None), x, create_graph=True)[0]
        v = momentum * v + slope
        x = x - 0.02 * v
    exact = torch.autograd.grad(problem.levels.upper((x,), (leaf,), None), leaf)[0]
    assert torch.allclose(found.gradient[0], exact, rtol=1e-10)
    assert torch.allclose(found.x[0], x.detach())


def test_a_truncated_sweep_goes_back_through_the_last_steps_and_converges_to_the_whole() -> None:
    problem, start = ridge(), (torch.zeros(8, dtype=torch.float64),)
    whole = UnrolledHypergradient(problem.levels, 400, 0.01)(start, (THETA,))
    exact = problem.hypergradient(THETA)
    errors = []
    for length in (5, 20, 80):
        part = UnrolledHypergradient(problem.levels, 400, 0.01, truncate=length, check=False)(start, (THETA,))
        assert part.cost.hessian_products == length
        errors.append(relative(part.gradient[0], exact))
    assert errors[0] > errors[1] > errors[2]
    assert relative(whole.gradient[0], exact) < 1e-6


def test_unrolled_steps_that_diverge_say_so() -> None:
    with pytest.raises(InputError, match="smaller lr than 10"):
        UnrolledHypergradient(ridge().levels, 400, 10.0)((torch.zeros(8, dtype=torch.float64),), (THETA,))


@pytest.mark.parametrize("solver", ["cg", "lu", "neumann"])
def test_negative_curvature_is_an_error(solver: Any) -> None:
    scale = torch.tensor([1.0, 2.0, -1.0])
    two = Levels(lambda x, t, _: (scale * x[0].square()).sum() / 2 - (t[0] * x[0]).sum(), lambda x, t, _: x[0].sum())
    with pytest.raises(InputError, match="lower problem is not strongly convex"):
        ImplicitHypergradient(two, solver)((torch.ones(3),), (torch.ones(3),))


@pytest.mark.parametrize("solver", ["cg", "lu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_hessian_is_damped_and_reported(solver: Any, dtype: torch.dtype) -> None:
    scale = torch.tensor([1.0, 2.0, 0.0], dtype=dtype)
    two = Levels(lambda x, t, _: (scale * x[0].square()).sum() / 2 - (t[0] * x[0]).sum(), lambda x, t, _: x[0].sum())
    with pytest.warns(PoiseWarning, match="singular"):
        found = ImplicitHypergradient(two, solver)((torch.ones(3, dtype=dtype),), (torch.ones(3, dtype=dtype),))
    eps = torch.finfo(dtype).eps
    assert not found.converged
    assert found.damping == pytest.approx(2 * math.sqrt(eps), rel=0.5)
    assert found.q is not None
    assert torch.allclose(found.q[0][:2], torch.tensor([1.0, 0.5], dtype=dtype), rtol=2 * math.sqrt(eps))
    assert found.residual == pytest.approx(1.0, rel=1e-2)  # the part of the right side that H does not reach


def test_damping_that_was_asked_for_is_reported_with_the_residual_of_the_whole_system() -> None:
    problem = ridge()
    x = problem.solution(THETA)
    found = ImplicitHypergradient(problem.levels, damping=0.5)((x,), (THETA,))
    assert found.q is not None
    eye = torch.eye(8, dtype=torch.float64)
    q = torch.linalg.solve(problem.hessian(THETA) + 0.5 * eye, found.upper_gradient[0])
    assert torch.allclose(found.q[0], q)
    assert found.residual == pytest.approx(float(0.5 * q.norm()), rel=1e-6)
    assert found.damping == 0.5
    assert found.converged


def test_a_weight_that_nothing_depends_on_is_named() -> None:
    two = ridge().levels
    idle = Levels(two.lower, two.upper, names=("l2", "mixup"))
    theta = (THETA, torch.zeros((), dtype=torch.float64))
    for method in (ImplicitHypergradient(idle), UnrolledHypergradient(idle, 3, 0.01)):
        with pytest.raises(InputError, match="Nothing depends on mixup"):
            method((torch.ones(8, dtype=torch.float64),), theta)


def test_one_entry_of_a_vector_of_weights_is_named_too() -> None:
    names = tuple(f"weight {i}" for i in range(3))
    two = Levels(lambda x, t, _: (x[0].square() * (1 + t[0][:2].exp())).sum(), lambda x, t, _: x[0].sum(), names)
    with pytest.raises(InputError, match="Nothing depends on weight 2"):
        ImplicitHypergradient(two)((torch.ones(2),), (torch.zeros(3),))


def test_a_weight_that_the_upper_objective_alone_reads_is_learned_from_it() -> None:
    two = ridge().levels
    direct = Levels(two.lower, lambda x, t, b: two.upper(x, t, b) + t[1].square(), names=("l2", "b"))
    theta = (THETA, torch.ones((), dtype=torch.float64))
    found = ImplicitHypergradient(direct)((ridge().solution(THETA),), theta)
    assert found.gradient[1] == pytest.approx(2.0)


def test_a_term_that_rests_at_zero_is_not_taken_for_one_without_effect() -> None:
    problem = ridge()
    found = ImplicitHypergradient(problem.levels)((torch.zeros(8, dtype=torch.float64),), (THETA,))
    assert not found.gradient[0].any()


def test_bad_arguments_are_refused() -> None:
    two = ridge().levels
    for arguments, message in (
        ({"solver": "qr"}, "solver must be"),
        ({"products": "none"}, "products must be"),
        ({"tolerance": -1.0}, "tolerance and damping"),
        ({"iterations": 0}, "iterations must be"),
        ({"solver": "one_step"}, "needs step"),
        ({"step": -1.0}, "step must be positive"),
    ):
        with pytest.raises(InputError, match=message):
            ImplicitHypergradient(two, **arguments)  # type: ignore[arg-type]
    for keywords in ({"steps": 0, "lr": 1.0}, {"steps": 3, "lr": 1.0, "truncate": 4}, {"steps": 3, "lr": 0.0}):
        with pytest.raises(InputError):
            UnrolledHypergradient(two, **keywords)  # type: ignore[arg-type]


def test_a_neumann_series_that_diverges_says_so() -> None:
    problem = ridge()
    with pytest.raises(InputError, match="Neumann series diverges"):
        ImplicitHypergradient(problem.levels, "neumann", step=1.0)((problem.solution(THETA),), (THETA,))


def test_float32_reaches_what_float32_can() -> None:
    problem, exact = ridge(dtype=torch.float32), ridge().hypergradient(THETA)
    for solver in ("cg", "lu"):
        found = ImplicitHypergradient(problem.levels, solver, tolerance=1e-4)(
            (problem.solution(THETA.float()),), (THETA.float(),)
        )
        assert found.gradient[0].dtype == torch.float32
        assert relative(found.gradient[0].double(), exact) < 1e-4


@pytest.mark.peer
def test_torchopt_gives_the_same_implicit_gradient() -> None:
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")
    problem = logistic()
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = ImplicitHypergradient(problem.levels, tolerance=1e-12)((problem.solution(theta),), (theta,)).gradient[0]

    def optimality(x: Tensor, theta: Tensor) -> Tensor:
        return torch.func.grad(lambda w: problem.levels.lower((w,), (theta,), None))(x)

    solver = torchopt.diff.implicit.custom_root(
        optimality, argnums=1, solve=torchopt.linear_solve.solve_normal_cg(maxiter=200, atol=1e-14, rtol=1e-14)
    )(lambda x, theta: problem.solution(theta.detach()))
    leaf = theta.clone().requires_grad_()
    x = solver(torch.zeros(6, dtype=torch.float64), leaf)
    theirs = torch.autograd.grad(problem.levels.upper((x,), (leaf,), None), leaf)[0]
    assert relative(found, theirs) < 1e-8


@pytest.mark.peer
def test_jaxopt_gives_the_same_implicit_gradient() -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    implicit_diff = pytest.importorskip("jaxopt.implicit_diff", reason="jaxopt is not installed")
    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    problem = logistic()
    theta = torch.linspace(-1, 1, 6, dtype=torch.float64)
    found = ImplicitHypergradient(problem.levels, tolerance=1e-12)((problem.solution(theta),), (theta,)).gradient[0]
    a, sign, b, sign_b = (
        jnp.asarray(t.numpy()) for t in (problem.a, problem.sign, problem.a_valid, problem.sign_valid)
    )

    def lower(x: Any, theta: Any) -> Any:
        return jax.nn.softplus(-sign * (a @ x)).sum() + (jnp.exp(theta) * x**2).sum() / 2

    @implicit_diff.custom_root(jax.grad(lower))
    def solve(init: Any, theta: Any) -> Any:
        return jnp.asarray(problem.solution(torch.from_numpy(jax.device_get(theta).copy())).numpy())

    def upper(x: Any) -> Any:
        return jax.nn.softplus(-sign_b * (b @ x)).sum()

    theirs = jax.grad(lambda t: upper(solve(None, t)))(jnp.asarray(theta.numpy()))
    # Its linear solver stops at a residual of 1e-6 relative to the right side.
    assert relative(found, torch.from_numpy(jax.device_get(theirs).copy())) < 1e-5
