"""Penalty methods for two levels: closed forms, limits in sigma, noise, sets, state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.errors import InputError, NonFiniteError, PoiseWarning
from poise.operators import Ball, Box, ConvexSet, NonNegative, Simplex
from poise.weights.bilevel.levels import Levels, norm, shifted
from poise.weights.bilevel.penalty import PenaltyBilevel
from poise.weights.bilevel.penalty_checks import error_bound_modulus, hypergradient_exact, penalty_sweep
from poise.weights.bilevel.sigma import AdaptiveSigma, ConstantSigma, PowerSigma, ReciprocalSigma

A, B = 3.0, 1.0


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def scalar() -> Levels:
    """lower = (x - a theta)^2 / 2, upper = (x - b)^2 / 2."""
    return Levels(lambda x, u, _: (x[0] - A * u[0]).square().sum() / 2, lambda x, u, _: (x[0] - B).square().sum() / 2)


def many() -> Levels:
    """Lower solutions on a line: lower = (x1 + x2 - theta)^2 / 2, upper = (x1 - 1)^2 / 2 + (x2 + 1)^2 / 2."""
    return Levels(
        lambda x, u, _: (x[0].sum() - u[0]).square().sum() / 2,
        lambda x, u, _: ((x[0][0] - 1).square() + (x[0][1] + 1).square()) / 2,
    )


def wavy() -> Levels:
    """A nonconvex lower level with the Polyak-Lojasiewicz property."""
    return Levels(
        lambda x, u, _: ((x[0] - u[0]).square() / 2 + 3 * torch.sin(x[0] - u[0]).square()).sum(),
        lambda x, u, _: (x[0] - 1).square().sum() / 2,
    )


def quadratic(n: int = 4) -> Levels:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(n, n, generator=g, dtype=torch.float64)
    h = root @ root.T + torch.eye(n, dtype=torch.float64)
    j = torch.randn(n, 2, generator=g, dtype=torch.float64)
    c = torch.randn(n, generator=g, dtype=torch.float64)
    return Levels(
        lambda x, u, _: x[0] @ h @ x[0] / 2 - x[0] @ (j @ u[0] + c),
        lambda x, u, _: (x[0] - 1).square().sum() / 2 + u[0].square().sum() / 2,
    )


# ---- the hyper-objective and its gradient -------------------------------------------------------------------------------


def test_value_and_gradient_of_the_penalty_equal_their_closed_form() -> None:
    u = 0.7
    for row in penalty_sweep(scalar(), [t(0.0)], [t(u)]).rows:
        assert row.value == pytest.approx((A * u - B) ** 2 / (2 * (1 + row.sigma)), abs=1e-12)
        assert float(row.gradient[0]) == pytest.approx(A * (A * u - B) / (1 + row.sigma), abs=1e-11)


@pytest.mark.parametrize("start", [(5.0, -2.0), (0.0, 0.0), (-3.0, 8.0)])
def test_with_many_lower_solutions_every_start_gives_the_same_gradient(start: tuple[float, float]) -> None:
    u = 0.7
    sweep = penalty_sweep(many(), [t(*start)], [t(u)], [2.0**-i for i in range(5)])
    assert sweep.exact
    for row in sweep.rows:
        assert row.value == pytest.approx(u**2 / (2 * (2 + row.sigma)), abs=1e-9)
        assert float(row.gradient[0]) == pytest.approx(u / (2 + row.sigma), abs=1e-9)
    exact = hypergradient_exact(many(), sweep.rows[-1].z, [t(u)])
    assert exact.valid
    assert exact.rank == 1
    assert float(exact.gradient[0]) == pytest.approx(u / 2, abs=1e-9)


@pytest.mark.parametrize("z", [(4.0, 4.0), (-7.0, 1.0)])
def test_the_method_gives_one_gradient_whichever_lower_solution_z_sits_at(z: tuple[float, float]) -> None:
    method = PenaltyBilevel(many(), [t(0, 0)], [t(0.7)], lr=1e-9, inner_lr=0.4, sigma=0.5, inner_steps=300, z=[t(*z)])
    method.step()
    assert float(method.hypergradient()[1][0]) == pytest.approx(0.7 / 2.5, abs=1e-8)


@pytest.mark.parametrize("convex", [Box(-0.3, 0.3), Simplex(), NonNegative(), Ball(0.2)], ids=repr)
def test_in_a_set_the_penalised_gradient_comes_to_the_exact_one_with_order_one(convex: ConvexSet) -> None:
    levels, u = quadratic(), t(1.0, 2.0)
    sigmas = [2.0**-i for i in range(2, 10)]
    sweep = penalty_sweep(levels, [torch.zeros(4, dtype=torch.float64)], [u], sigmas, lower_set=convex)
    assert sweep.exact
    exact = hypergradient_exact(levels, sweep.rows[-1].z, [u], convex)
    errors = [float(norm(shifted(r.gradient, -1.0, exact.gradient))) for r in sweep.rows]
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(1.0, abs=0.1)
    assert sweep.gradient_order == pytest.approx(1.0, abs=0.1)


def test_without_constraints_the_exact_gradient_is_the_implicit_one() -> None:
    levels, u = quadratic(), t(1.0, 2.0)
    x = penalty_sweep(levels, [torch.zeros(4, dtype=torch.float64)], [u]).rows[-1].z
    second = levels.linearise(x, (u,))
    hessian = torch.stack([second.hessian_product((e,))[0] for e in torch.eye(4, dtype=torch.float64)])
    _, upper_x, direct = levels.upper_gradients(x, (u,))
    implicit = direct[0] - second.mixed_product((torch.linalg.solve(hessian, upper_x[0]),))[0]
    torch.testing.assert_close(hypergradient_exact(levels, x, [u]).gradient[0], implicit, atol=1e-8, rtol=0)


def test_a_nonconvex_lower_level_that_obeys_the_error_bound_gives_the_limit() -> None:
    sweep = penalty_sweep(wavy(), [t(0.3)], [t(0.3)], [1.0, 0.1, 0.01, 0.001])
    for row, expected in zip(sweep.rows, (-0.612, -0.690, -0.699, -0.6999), strict=True):
        assert float(row.gradient[0]) == pytest.approx(expected, abs=5e-4)
    assert float(hypergradient_exact(wavy(), [t(0.3)], [t(0.3)]).gradient[0]) == pytest.approx(-0.7, abs=1e-12)


def test_the_penalty_stays_below_the_hyper_objective_and_falls_in_sigma() -> None:
    for levels, x, u, psi in (
        (scalar(), t(0.0), t(0.7), (A * 0.7 - B) ** 2 / 2),
        (many(), t(0, 0), t(0.7), 0.7**2 / 4),
    ):
        values = [r.value for r in penalty_sweep(levels, [x], [u]).rows]
        assert values == sorted(values)
        assert values[-1] <= psi + 1e-12


def test_the_error_bound_modulus_of_a_quadratic_is_its_curvature_over_one_plus_rho_times_it() -> None:
    curvature, rho = 2.0, 0.1
    levels = Levels(
        lambda x, u, _: curvature * (x[0] - u[0]).square().sum() / 2, lambda x, u, _: (x[0] - 1).square().sum() / 2
    )
    for found in error_bound_modulus(levels, [t(0.0)], [t(1.0)], sigmas=(0.0, 0.5), rho=rho, samples=5):
        h = curvature + found.sigma
        assert found.samples == 5
        assert found.modulus == pytest.approx(h / (1 + rho * h), rel=1e-5)


def test_where_the_gradients_do_not_converge_the_sweep_says_so() -> None:
    # lower = x^4 is flat at its solution: x_sigma moves like sigma^(1/3), and the mixed derivative in theta makes that visible.
    flat = Levels(lambda x, u, _: (x[0] - u[0]).pow(4).sum() / 4, lambda x, u, _: (x[0] - 1).square().sum() / 2)
    sweep = penalty_sweep(flat, [t(0.1)], [t(0.0)], tol=1e-13, max_steps=20000)
    assert not sweep.exact
    assert any("penalty not exact here" in w for w in sweep.warnings)
    assert "penalty not exact here" in str(sweep)


# ---- noise ---------------------------------------------------------------------------------------------------------------


def test_sharing_the_batch_lowers_the_variance_by_more_than_one_over_sigma() -> None:
    sigma = 1e-2
    # The batch is a random slope: lower = x^2/2 - x theta + noise * theta * (1 + x).
    levels = Levels(
        lambda x, u, s: ((x[0] - u[0]).square() / 2 + (0.0 if s is None else s) * u[0] * (1 + 0.1 * x[0])).sum(),
        lambda x, u, _: (x[0] - 1).square().sum() / 2,
    )
    generator = torch.Generator().manual_seed(0)
    found: dict[bool, list[float]] = {True: [], False: []}
    for share in found:
        method = PenaltyBilevel(levels, [t(0.0)], [t(0.2)], lr=1e-3, inner_lr=0.5, sigma=sigma, share_batch=share)
        for _ in range(100):
            method._inner(None, None)
        for _ in range(200):
            noise = torch.randn(2, generator=generator, dtype=torch.float64)
            batch = noise[0] if share else (noise[0], noise[1])
            found[share].append(float(method.hypergradient(batch)[1][0]))
    variance = {share: float(torch.tensor(v).var()) for share, v in found.items()}
    assert variance[False] / variance[True] >= 1 / sigma


# ---- the loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"prox": 1.0, "prox_steps": 2, "inner_steps": 4}, {"mode": "single", "momentum": 0.5}], ids=str
)
def test_every_loop_finds_the_best_upper_variable(options: dict[str, Any], dtype: torch.dtype) -> None:
    method = PenaltyBilevel(
        scalar(),
        [torch.zeros(1, dtype=dtype)],
        [torch.zeros(1, dtype=dtype)],
        lr=0.05,
        inner_lr=0.5,
        sigma=ReciprocalSigma(least=0.2),
        **options,
    )
    method.run(150)
    assert method.theta[0].dtype == dtype
    assert float(method.theta[0]) == pytest.approx(B / A, abs=1e-3)


def test_one_outer_step_of_the_double_loop_is_that_of_the_paper() -> None:
    method = PenaltyBilevel(scalar(), [t(0.0)], [t(1.0)], lr=0.1, inner_lr=0.5, sigma=0.5, inner_steps=1)
    method.step()
    z = 0.0 - 0.5 * (0.0 - A)
    x = 0.0 - 0.5 / 1.5 * (0.5 * (0.0 - B) + (0.0 - A))
    gradient = (-A * (x - A) + A * (z - A)) / 0.5
    assert float(method.z[0]) == pytest.approx(z)
    assert float(method.x[0]) == pytest.approx(x)
    assert float(method.theta[0]) == pytest.approx(1.0 - 0.1 * gradient)


def test_tolerance_driven_loops_stop_when_both_residuals_are_small_against_sigma() -> None:
    method = PenaltyBilevel(
        scalar(), [t(0.0)], [t(1.0)], lr=1e-6, inner_lr=0.9, sigma=0.1, inner_steps=1000, inner_tol=1e-3
    )
    outer = method.step()
    assert outer.residual is not None
    assert float(outer.residual) <= 1e-4
    before = method.levels.counters.lower_gradients
    method.step()
    assert method.levels.counters.lower_gradients - before <= 6


def test_the_proximal_term_anchors_at_the_iterate_of_the_outer_step() -> None:
    method = PenaltyBilevel(scalar(), [t(0.0)], [t(1.0)], lr=1e-9, inner_lr=0.2, sigma=0.5, inner_steps=500, prox=2.0)
    method.step()
    # z = argmin (z - a)^2 / 2 + z^2 / (2 rho)
    assert float(method.z[0]) == pytest.approx(A / (1 + 1 / 2.0), abs=1e-6)


def test_without_momentum_the_single_loop_takes_plain_gradients_and_with_it_the_recursive_ones() -> None:
    noise = t(0.3, -0.2, 0.5)
    levels = Levels(
        lambda x, u, s: ((x[0] - u[0] - s).square() / 2).sum(), lambda x, u, _: (x[0] - B).square().sum() / 2
    )

    def moved(momentum: float) -> list[float]:
        method = PenaltyBilevel(
            levels, [t(0.0)], [t(1.0)], lr=0.1, inner_lr=0.5, sigma=1.0, mode="single", momentum=momentum
        )
        path = []
        for s in noise:
            method.step(s)
            path.append(float(method.z[0]))
        return path

    # By hand, for z: v_k = (z_k - u_k - s_k) + m (v_{k-1} - (z_{k-1} - u_{k-1} - s_k)).
    for momentum in (0.0, 0.6):
        method = PenaltyBilevel(
            levels, [t(0.0)], [t(1.0)], lr=0.1, inner_lr=0.5, sigma=1.0, mode="single", momentum=momentum
        )
        z, v, previous, expected = 0.0, None, None, []
        for s in noise.tolist():
            u = float(method.theta[0])
            now = z - u - s
            v = now if v is None else now + momentum * (v - (previous[0] - previous[1] - s))
            previous = (z, u)
            z -= 0.5 * v
            expected.append(z)
            method.step(t(s)[0])
        assert moved(momentum) == pytest.approx(expected)


@pytest.mark.parametrize("pair", ["vmap", "stacked"])
def test_x_and_z_in_one_forward_move_as_in_two_calls(pair: Any) -> None:
    levels = Levels(lambda x, u, _: (x[0] - u[0]).square().sum(-1) / 2, lambda x, u, _: (x[0] - 1).square().sum() / 2)
    runs = [
        PenaltyBilevel(levels, [t(0.0, 2.0)], [t(1.0, -1.0)], lr=0.1, inner_lr=0.5, pair=p).run(5)
        for p in ("calls", pair)
    ]
    torch.testing.assert_close(runs[0].theta[0], runs[1].theta[0])
    torch.testing.assert_close(runs[0].x[0], runs[1].x[0])


def test_both_variables_stay_in_their_sets() -> None:
    method = PenaltyBilevel(
        scalar(), [t(9.0)], [t(9.0)], lr=1.0, inner_lr=0.5, lower_set=Box(-2, 0.5), upper_set=[NonNegative()]
    )
    for _ in range(20):
        method.step()
        assert -2 <= float(method.x[0]) <= 0.5
        assert float(method.theta[0]) >= 0


# ---- sigma ---------------------------------------------------------------------------------------------------------------


def test_schedules_follow_their_formulas() -> None:
    sigma, power = 1.0, 1.0
    reciprocal, powers = ReciprocalSigma(rate=0.5, least=0.2), PowerSigma(rate=0.1)
    for k in range(20):
        sigma, power = reciprocal.after(sigma, k, 0.0), powers.after(power, k, 0.0)
    assert sigma == 0.2
    assert 1 / power == pytest.approx(1 + sum(0.1 * (k + 1) ** (-6 / 7) for k in range(20)))
    assert ConstantSigma(0.3).after(0.3, 5, 0.0) == 0.3


def test_the_adaptive_schedule_falls_only_where_the_gradient_is_small_against_sigma() -> None:
    method = PenaltyBilevel(
        scalar(), [t(0.0)], [t(0.0)], lr=0.05, inner_lr=0.5, sigma=AdaptiveSigma(threshold=1.0, least=1e-3)
    )
    sigmas = [method.sigma]
    for _ in range(200):
        before = method.sigma
        outer = method.step()
        fell = method.sigma < before
        assert fell == (float(outer.gradient_norm) <= before and before > 1e-3)
        sigmas.append(method.sigma)
    assert sigmas[-1] < 0.05 < sigmas[3]


def test_a_gap_that_does_not_shrink_with_sigma_is_named() -> None:
    # Many lower solutions, and z at another one than x.
    method = PenaltyBilevel(
        many(), [t(0, 0)], [t(0.7)], lr=1e-6, inner_lr=0.4, sigma=ReciprocalSigma(rate=1.0), z=[t(4.0, -4.0)]
    )
    with pytest.warns(PoiseWarning, match="penalty not exact here"):
        method.run(40)


# ---- bad input, state ----------------------------------------------------------------------------------------------------


def make(**options: Any) -> PenaltyBilevel:
    levels = options.pop("levels", scalar())
    return PenaltyBilevel(levels, [t(0.0)], [t(0.0)], **{"lr": 0.1, "inner_lr": 0.1, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(sigma=0.0), "sigma must begin positive"),
        (lambda: make(sigma=-1.0), "sigma must begin positive"),
        (lambda: make(lower_set="box"), "needs a projection|sets"),
        (lambda: make(lower_set=object()), "a set needs a projection"),
        (lambda: make(upper_set=[None, None]), "1 tensors need 1 sets"),
        (lambda: make(z=[t(0.0, 1.0)]), "z must have the shapes of x"),
        (lambda: make(mode="triple"), "mode is 'double' or 'single'"),
        (lambda: make(inner_steps=0), "inner_steps must be positive"),
        (lambda: make(momentum=1.0), r"momentum lies in \[0, 1\)"),
        (lambda: make(pair="twice"), "pair is"),
        (lambda: PenaltyBilevel(scalar(), [], [t(0.0)], lr=1, inner_lr=1), "sequence of one tensor or more"),
        (lambda: PenaltyBilevel(scalar(), [t(math.nan)], [t(0.0)], lr=1, inner_lr=1), "finite"),
        (
            lambda: make(levels=Levels(lambda x, u, _: x[0].sum(), lambda x, u, _: x[0].sum() + u[0].sum())).step(),
            "depends on no upper",
        ),
        (
            lambda: make(levels=Levels(lambda x, u, _: u[0].sum(), lambda x, u, _: x[0].sum())).step(),
            "does not depend on x",
        ),
        (lambda: make(levels=Levels(lambda x, u, _: x[0] * u[0], lambda x, u, _: x[0].sum())).step(), "one number"),
        (lambda: penalty_sweep(scalar(), [t(0.0)], [t(0.0)], [1.0, 0.5]), "three positive sigmas"),
        (lambda: penalty_sweep(scalar(), [t(0.0)], [t(0.0)], [1.0, 0.5, 0.1]), "at one ratio"),
        (lambda: hypergradient_exact(scalar(), [t(5.0)], [t(0.0)]), "does not solve the lower level"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_upper_variable_that_nothing_depends_on_is_named() -> None:
    levels = Levels(
        lambda x, u, _: (x[0] - u[0]).square().sum(), lambda x, u, _: x[0].square().sum(), names=("a", "idle")
    )
    with pytest.raises(InputError, match="nothing depends on idle"):
        PenaltyBilevel(levels, [t(0.0)], [t(0.0), t(0.0)], lr=0.1, inner_lr=0.1).step()


def test_a_sigma_too_small_for_the_precision_is_warned_about() -> None:
    with pytest.warns(PoiseWarning, match="mostly rounding"):
        PenaltyBilevel(scalar(), [torch.zeros(1)], [torch.zeros(1)], lr=0.1, inner_lr=0.1, sigma=1e-5)


def test_divergence_is_an_error_that_says_which_step_to_lower() -> None:
    with pytest.raises(NonFiniteError, match="smaller inner_lr"):
        make(inner_lr=1e6).run(100)


@pytest.mark.parametrize("mode", ["double", "single"])
def test_a_resumed_run_and_a_copy_equal_the_uninterrupted_run(mode: Any) -> None:
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = Levels(
        lambda x, u, s: (x[0] - u[0] - 0.1 * s).square().sum() / 2, lambda x, u, _: (x[0] - B).square().sum() / 2
    )

    def begin() -> PenaltyBilevel:
        return PenaltyBilevel(
            levels, [t(0.0)], [t(0.0)], lr=0.1, inner_lr=0.5, mode=mode, sigma=ReciprocalSigma(rate=0.3)
        )

    def batches(k: int) -> tuple[Any, Any]:
        return noise[k], None

    whole = begin().run(20, batches)
    half = begin().run(7, batches)
    twin, resumed = copy.deepcopy(half), begin()
    resumed.load_state_dict(half.state_dict())
    for other in (twin, resumed):
        other.run(13, batches)
        assert torch.equal(other.theta[0], whole.theta[0])
        assert torch.equal(other.z[0], whole.z[0])
        assert other.sigma == whole.sigma
    with pytest.raises(InputError, match="lacks"):
        begin().load_state_dict({"x": []})
