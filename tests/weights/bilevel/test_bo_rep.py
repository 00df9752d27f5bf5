"""BO-REP: the order of its steps, their length, invariance to scale, unbounded smoothness, state."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning
from poise.weights.bilevel.bo_rep import BOREP, relaxed_smoothness, smoothness_probe, within
from poise.weights.bilevel.levels import Levels, norm, shifted
from poise.weights.bilevel.single_loop import SOBA

G = torch.Generator().manual_seed(0)
H = torch.diag(torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64))
J = torch.randn(3, 2, generator=G, dtype=torch.float64)
GOAL = torch.randn(3, generator=G, dtype=torch.float64)
START, OUTER = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)

SHARED = nn.Parameter(torch.zeros(2))


def quadratic(scale: float = 1.0) -> Levels:
    """lower = x'Hx/2 - x'J theta (+ noise), upper = scale (|x - goal|^2 / 2 + |theta|^2 / 20)."""

    def lower(x: Any, u: Any, noise: Any) -> Tensor:
        shift = 0.0 if noise is None else (noise * x[0]).sum()
        return x[0] @ H @ x[0] / 2 - x[0] @ (J @ u[0]) + shift

    return Levels(lower, lambda x, u, _: scale * ((x[0] - GOAL).square().sum() / 2 + u[0].square().sum() / 20))


def closed_form(u: Tensor) -> Tensor:
    """The hypergradient of the quadratic."""
    x = torch.linalg.solve(H, J @ u)
    return u / 10 + J.T @ torch.linalg.solve(H, x - GOAL)


def make(levels: Levels | None = None, **options: Any) -> BOREP:
    given = {"lr": 0.01, "inner_lr": 1.0, "system_lr": 1.0, **options}
    return BOREP(levels or quadratic(), [START], [OUTER], **given)


# ---- the estimate --------------------------------------------------------------------------------------------------------


def test_at_a_fixed_point_q_converges_linearly_and_the_hypergradient_to_its_closed_form() -> None:
    method = make(lr=1e-12, momentum=0.0, period=1, inner_steps=20).refine(steps=400)
    x = torch.linalg.solve(H, J @ OUTER)
    q = torch.linalg.solve(H, x - GOAL)
    errors = []
    for _ in range(60):
        method.step()
        errors.append(float((method.q[0] - q).norm()))
    assert max(b / a for a, b in itertools.pairwise(errors[:40])) <= 0.701  # 1 - nu * least curvature
    torch.testing.assert_close(method.m[0], closed_form(OUTER), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("system", "steps"), [("cg", 3), ("neumann", 200), ("sgd", 200)])
def test_every_way_to_the_linear_system_gives_the_hypergradient(system: Any, steps: int) -> None:
    method = make(momentum=0.0, system=system, system_steps=steps).refine(steps=400)
    method.step()
    torch.testing.assert_close(method.m[0], closed_form(OUTER), atol=1e-7, rtol=0)


def test_products_with_second_derivatives_equal_differences_of_gradients() -> None:
    def lower(x: Any, u: Any, _: Any) -> Tensor:
        return (torch.tanh(x[0] * u[0].sum()) + x[0].pow(4) / 4).sum() + (x[1] @ x[0]).sin() * u[0][1]

    levels = Levels(lower, lower)
    x = (torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64))
    u, v, h = (
        (OUTER,),
        (torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-1.0, 0.5], dtype=torch.float64)),
        1e-6,
    )
    second = levels.linearise(x, u)
    for found, gradient in (
        (second.hessian_product(v), levels.lower_gradient),
        (second.mixed_product(v), levels.lower_gradient_of_theta),
    ):
        ahead, behind = gradient(shifted(x, h, v), u), gradient(shifted(x, -h, v), u)
        for a, b, c in zip(found, ahead, behind, strict=True):
            torch.testing.assert_close(a, (b - c) / (2 * h), atol=1e-8, rtol=0)


# ---- the step ------------------------------------------------------------------------------------------------------------


def test_every_outer_step_has_exactly_the_length_lr_over_all_upper_variables_jointly() -> None:
    levels = Levels(
        lambda x, u, _: x[0] @ H @ x[0] / 2 - x[0] @ (J @ u[0]) * u[1], lambda x, u, _: (x[0] - GOAL).square().sum() / 2
    )
    theta = [OUTER, torch.tensor(1.0, dtype=torch.float64)]
    method = BOREP(levels, [START], theta, lr=lambda k: 0.1 / (1 + k) ** 0.5, inner_lr=0.5, system_lr=0.1)
    for k in range(6):
        before = method.theta
        method.step()
        assert float(norm(shifted(method.theta, -1.0, before))) == pytest.approx(0.1 / (1 + k) ** 0.5, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e4])
def test_scaling_the_upper_objective_leaves_the_path_of_theta_unchanged(scale: float) -> None:
    paths = [make(quadratic(c)).run(30).theta[0] for c in (1.0, scale)]
    torch.testing.assert_close(*paths, atol=1e-6, rtol=0)


def test_clipping_leaves_short_momenta_and_shortens_long_ones() -> None:
    method = make(scaling="clipped", clip=1e6, momentum=0.0)
    plain = make(scaling="plain", momentum=0.0)
    torch.testing.assert_close(method.run(3).theta[0], plain.run(3).theta[0])
    short = make(scaling="clipped", clip=1e-3, momentum=0.0)
    before = short.theta
    short.step()
    assert float(norm(shifted(short.theta, -1.0, before))) == pytest.approx(0.01 * 1e-3)


def test_plain_steps_with_period_one_and_no_momentum_are_soba() -> None:
    noise = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    soba = SOBA(quadratic(), [START], [OUTER], lr=0.01, inner_lr=0.5, system_lr=0.3, sequential=True)
    ours = make(inner_lr=0.5, system_lr=0.3, momentum=0.0, period=1, inner_steps=1, scaling="plain")
    ours.refine(lambda _: noise[0], steps=1)  # the lower step that stands before the first outer one
    for k in range(12):
        soba.step(noise[k])
        ours.step(noise[k])
        torch.testing.assert_close(ours.theta[0], soba.theta[0])
        torch.testing.assert_close(ours.q[0], soba.q[0])


def test_the_lower_variable_moves_at_refreshes_alone_and_then_by_inner_steps() -> None:
    method = make(period=3, inner_steps=2)
    for k in range(10):
        before, gradients = method.x[0], method.levels.counters.lower_gradients
        method._checked = True
        method.step()
        moved = bool((method.x[0] != before).any())
        assert moved == (k > 0 and k % 3 == 0)
        assert method.levels.counters.lower_gradients - gradients == 1 + (2 if moved else 0)


def test_a_step_costs_one_graph_one_hessian_product_one_mixed_product_and_one_upper_gradient() -> None:
    method = make(period=10, check_stability=False)
    method.run(5)
    counters = method.levels.counters
    assert (counters.hessian_products, counters.mixed_products, counters.upper_gradients) == (5, 5, 5)
    assert counters.lower_gradients == 5


def test_a_refresh_stays_in_its_ball_and_may_return_the_average() -> None:
    method = make(period=1, inner_steps=50, radius=0.05)
    method.step()
    before = method.x
    method.step()
    assert float(norm(shifted(method.x, -1.0, before))) == pytest.approx(0.05)
    one, averaged = make(), make(averaging=True)
    path = [one.refine(steps=1).x[0] for _ in range(4)]
    torch.testing.assert_close(averaged.refine(steps=4).x[0], torch.stack(path).mean(0))
    far = within((torch.tensor([3.0, 4.0]),), (torch.zeros(2),), 1.0)[0]
    torch.testing.assert_close(far, torch.tensor([0.6, 0.8]))


def test_refinement_solves_the_lower_level_to_a_tolerance_and_by_epochs_reduces_its_noise() -> None:
    solved = torch.linalg.solve(H, J @ OUTER)
    assert float((make().refine(steps=10_000, tol=1e-8).x[0] - solved).norm()) < 1e-7
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain, epochs = make(inner_lr=0.5), make(inner_lr=0.5, averaging=True)
    plain.refine(lambda i: noise[i], steps=1984)
    epochs.refine(lambda i: noise[i], steps=64, epochs=5)
    assert float((epochs.x[0] - solved).norm()) < 0.5 * float((plain.x[0] - solved).norm())


def test_the_first_step_refines_by_itself_where_it_is_told_to() -> None:
    by_hand, by_itself = make().refine(steps=7), make(refine_steps=7)
    for _ in range(5):
        by_hand.step()
        by_itself.step()
        assert torch.equal(by_hand.theta[0], by_itself.theta[0])


def test_the_single_loop_moves_everything_at_every_step() -> None:
    method = make(single_loop=True, inner_lr=0.5).refine(steps=5)
    before = method.x[0]
    gradient = method.levels.lower_gradient(method.x, method.theta)[0]
    method.step()
    torch.testing.assert_close(method.x[0], before - 0.5 * gradient)
    count = method.levels.counters.lower_gradients
    method.step()
    assert method.levels.counters.lower_gradients - count == 1  # the gradient of the graph serves


# ---- unbounded smoothness ------------------------------------------------------------------------------------------------


def steep() -> Levels:
    """upper = (x - 1)^4 / 4 + (x - 1)^2 / 2 at x = theta: its curvature grows without bound."""
    return Levels(
        lambda x, u, _: (x[0] - u[0]).square().sum() / 2,
        lambda x, u, _: ((x[0] - 1).pow(4) / 4 + (x[0] - 1).square() / 2).sum(),
    )


def test_far_from_the_optimum_the_largest_step_that_is_stable_near_it_diverges_and_normalised_steps_do_not() -> None:
    one = torch.ones(1, dtype=torch.float64)

    def end(start: float, lr: Any, scaling: Any) -> float:
        method = BOREP(
            steep(),
            [start * one],
            [start * one],
            lr=lr,
            inner_lr=1.0,
            period=1,
            inner_steps=1,
            system_lr=1.0,
            scaling=scaling,
        )
        try:
            return float((method.run(200, every=10).theta[0] - 1).abs())
        except NonFiniteError:
            return math.inf

    largest = max(lr for lr in (4.0, 8.0, 16.0, 32.0, 64.0) if end(1.3, lr, "plain") < 0.01)
    assert largest < 64.0
    assert end(30.0, largest, "plain") == math.inf
    assert end(30.0, lambda k: 1.0 / (1 + k / 50), "normalized") < 0.5


def test_the_probe_sees_smoothness_grow_with_the_gradient() -> None:
    def gradient(theta: Any) -> Any:
        return ((theta[0] - 1).pow(3) + (theta[0] - 1),)

    path = [(torch.full((1,), a, dtype=torch.float64),) for a in (1.0, 2.0, 4.0, 8.0, 16.0)]
    probe = smoothness_probe(gradient, path, reach=1e-4)
    curvature = torch.tensor([3 * (a - 1) ** 2 + 1 for a in (1.0, 2.0, 4.0, 8.0, 16.0)], dtype=torch.float64)
    torch.testing.assert_close(probe[:, 1], curvature, rtol=1e-3, atol=1e-3)
    level, slope = relaxed_smoothness(probe)
    assert slope > 0.1
    flat = smoothness_probe(lambda u: (3 * u[0],), path)
    assert relaxed_smoothness(flat)[1] == pytest.approx(0.0, abs=1e-6)
    assert level > 0


# ---- bad input, state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(period=0), "period is at least 1"),
        (lambda: make(refine_steps=-1), "refine_steps is at least 0"),
        (lambda: make(lr=-1.0), "lr must be positive"),
        (lambda: make(radius=0.0), "radius must be positive"),
        (lambda: make(momentum=1.0), "momentum lies in"),
        (lambda: make(scaling="huge"), "scaling is one of"),
        (lambda: make(system="lu"), "system is one of"),
        (lambda: BOREP(quadratic(), [SHARED], [SHARED], lr=1, inner_lr=1), "stand in x and in theta"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_upper_objective_without_x_is_warned_about() -> None:
    levels = Levels(quadratic().lower, lambda x, u, _: u[0].square().sum())
    with pytest.warns(PoiseWarning, match="direct part alone"):
        make(levels).step()


def test_a_step_of_the_linear_system_that_cannot_converge_is_warned_about_and_then_stopped() -> None:
    method = make(system_lr=3.0, period=1)
    with pytest.warns(PoiseWarning, match="largest curvature is about 1"):
        method.step()
    with pytest.raises(NonFiniteError, match="linear system for q diverges"):
        method.run(50)


def test_an_operation_without_second_derivative_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    levels = Levels(lambda x, u, _: Once.apply(x[0]).sum() * u[0].sum(), quadratic().upper)
    with pytest.raises(IncompatibleError, match="cannot be differentiated twice"):
        make(levels).step()


def test_recurrent_networks_have_the_second_derivatives_that_are_asked_for() -> None:
    torch.manual_seed(0)
    network = nn.GRU(4, 5, batch_first=True)
    names = [n for n, _ in network.named_parameters()]
    data, target = torch.randn(6, 7, 4), torch.randint(3, (6,))

    def logits(x: Any, u: Any) -> Tensor:
        states = torch.func.functional_call(network, dict(zip(names, u, strict=True)), (data,))[0]
        return states[:, -1] @ x[0]

    levels = Levels(
        lambda x, u, _: nn.functional.cross_entropy(logits(x, u), target) + 0.1 * x[0].square().sum(),
        lambda x, u, _: nn.functional.cross_entropy(logits(x, u), target),
    )
    theta = [p.detach() for p in network.parameters()]
    method = BOREP(levels, [torch.zeros(5, 3)], theta, lr=0.05, inner_lr=0.5, system_lr=0.5).refine(steps=20)
    first = method.levels.upper_value(method.x, method.theta)
    assert float(method.run(30).levels.upper_value(method.x, method.theta)) < float(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_resumed_in_the_middle_of_a_period_equals_the_uninterrupted_one(dtype: torch.dtype) -> None:
    noise = torch.randn(30, 3, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    h, j, goal = H.to(dtype), J.to(dtype), GOAL.to(dtype)
    levels = Levels(
        lambda x, u, s: x[0] @ h @ x[0] / 2 - x[0] @ (j @ u[0]) + (0 if s is None else (s * x[0]).sum()),
        lambda x, u, _: (x[0] - goal).square().sum() / 2,
    )

    def begin() -> BOREP:
        return BOREP(levels, [START.to(dtype)], [OUTER.to(dtype)], lr=0.01, inner_lr=0.5, system_lr=0.5, period=4)

    def batches(k: int) -> tuple[Any, Any]:
        return list(noise[k]), None

    whole = begin().run(30, batches)
    half = begin().run(10, batches)  # two steps into the third period
    resumed, twin = begin(), copy.deepcopy(half)
    resumed.load_state_dict(half.state_dict())
    for other in (resumed, twin):
        other.run(20, batches)
        for name in ("x", "theta", "q", "m"):
            assert torch.equal(getattr(other, name)[0], getattr(whole, name)[0])
            assert getattr(other, name)[0].dtype == dtype
    assert math.isfinite(float(whole.theta[0].sum()))
