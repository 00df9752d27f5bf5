"""MAID and HOAG: every certificate against the exact lower solution, and what each does where it cannot go on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from bilevel_problems import Ridge, logistic, ridge
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights.bilevel import HOAG, MAID, AcceleratedGradient, ErrorBound, ImplicitHypergradient, Levels

THETA = torch.linspace(-1, 1, 8, dtype=torch.float64)
ZERO = torch.zeros(8, dtype=torch.float64)


def constants(problem: Ridge) -> dict[str, Any]:
    """The true constants of a ridge problem with weights exp(theta_j)."""
    least, most = torch.linalg.eigvalsh(problem.a.T @ problem.a)[[0, -1]].tolist()
    return {
        "strong_convexity": lambda theta: least + theta[0].exp().min(),
        "smoothness": lambda theta: most + theta[0].exp().max(),
        "upper_lipschitz": float(torch.linalg.matrix_norm(problem.a_valid, 2)) ** 2,
    }


def maid(problem: Ridge, **options: Any) -> MAID:
    return MAID(problem.levels, (THETA,), (ZERO,), **{**constants(problem), **options})


def test_the_hypergradient_is_wrong_by_omega_at_most() -> None:
    # A quadratic lower objective whose J does not change with x: L_J = L_Hinv = 0.
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    hessian, mixed = a.T @ a, a.T @ b
    two = Levels(
        lambda x, t, _: (a @ x[0] + b @ t[0]).square().sum() / 2, lambda x, t, _: (c @ x[0] - 1).square().sum() / 2
    )
    theta = torch.ones(6, dtype=torch.float64)
    exact = -torch.linalg.solve(hessian, mixed @ theta)
    slope = lambda x: c.T @ (c @ x - 1)  # noqa: E731
    true = -mixed.T @ torch.linalg.solve(hessian, slope(exact))
    spectrum = torch.linalg.eigvalsh(hessian)
    mu, condition = float(spectrum[0]), float(spectrum[-1] / spectrum[0])
    bound = ErrorBound(
        two, float(torch.linalg.matrix_norm(c, 2)) ** 2, float(torch.linalg.matrix_norm(mixed, 2)), 0.0, 0.0
    )
    tightest = math.inf
    for _ in range(1000):
        eps, delta = (float(10 ** (4 * torch.rand((), generator=generator) - 3)) for _ in range(2))
        away, error = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
        x = exact + eps * away / away.norm()
        q = torch.linalg.solve(hessian, slope(x) + delta * error / error.norm())
        wrong = float((-mixed.T @ q - true).norm())
        omega = bound.omega(eps, delta, float(slope(x).norm()), mu)
        assert wrong <= omega
        tightest = min(tightest, omega / wrong)
    assert tightest <= condition


@pytest.mark.parametrize("convex", [True, False])
def test_the_upper_objective_lies_in_its_bracket(convex: bool) -> None:
    problem = ridge()
    known = constants(problem)
    bound = ErrorBound(problem.levels, known["upper_lipschitz"], 1.0, 0.0, 0.0, convex_upper=convex)
    exact, value = problem.solution(THETA), float(problem.value(THETA))
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        eps = float(10 ** (4 * torch.rand((), generator=generator) - 3))
        away = torch.randn(8, generator=generator, dtype=torch.float64)
        x = exact + eps * float(torch.rand((), generator=generator)) * away / away.norm()
        found, slope, _ = problem.levels.upper_gradients((x,), (THETA,))
        lower, upper = bound.bracket(float(found), slope, torch.tensor([eps], dtype=torch.float64))
        assert lower <= value <= upper


def test_the_lower_solution_is_as_near_as_it_says() -> None:
    problem = ridge()
    known = constants(problem)
    exact = problem.solution(THETA)
    for smoothness in (known["smoothness"], None):
        solver = AcceleratedGradient(problem.levels, known["strong_convexity"], smoothness)
        for accuracy in (1e1, 1e-1, 1e-4, 1e-8):
            found = solver((ZERO,), (THETA,), accuracy)
            assert found.converged
            assert float((found.x[0] - exact).norm()) <= float(found.distance) <= accuracy


def test_pairs_stop_each_on_its_own_and_leave_the_batch() -> None:
    scale = torch.tensor([1.0, 1e-6, 3.0, 1e3], dtype=torch.float64)[:, None] * torch.ones(4, 5, dtype=torch.float64)
    seen: list[int] = []

    def lower(x: tuple[Tensor, ...], t: tuple[Tensor, ...], rows: Tensor | None) -> Tensor:
        target = scale if rows is None else scale[rows]
        seen.append(len(x[0]))
        curvature = torch.linspace(1, 50, 5, dtype=torch.float64)
        return (curvature * (x[0] - target).square()).sum() / 2 + 0 * t[0].sum()

    two = Levels(lower, lambda x, t, _: x[0].sum())
    solver = AcceleratedGradient(two, 1.0, 50.0, samples=True)
    found = solver((torch.zeros_like(scale),), (torch.zeros(1, dtype=torch.float64),), 1e-3)
    assert found.converged
    assert bool((torch.linalg.vector_norm(found.x[0] - scale, dim=1) <= found.distance).all())
    assert bool((found.distance <= 1e-3).all())
    assert seen[0] == 4
    assert seen[-1] < 4


def test_every_accepted_step_lowers_the_exact_objective_by_what_was_promised() -> None:
    problem = ridge()
    method = maid(problem, eps0=1.0, delta0=1.0, step0=1.0)
    before, theta = float(problem.value(THETA)), THETA
    for _ in range(40):
        made = method.step()
        now = float(problem.value(method.theta[0]))
        if not made.accepted:
            break
        assert now <= before - method.lam * float((method.theta[0] - theta).square().sum()) / made.alpha
        assert made.lower <= now <= made.upper
        before, theta = now, method.theta[0]
    assert sum(s.accepted for s in method.trace) >= 20


def test_with_exact_solutions_it_is_gradient_descent_with_backtracking() -> None:
    problem = ridge()
    method = maid(problem, eps0=1e-11, delta0=1e-11, nu_up=1.0, step0=1.0, check_descent=False)
    theta, alpha = THETA, 1.0
    for _ in range(8):
        method.step()
        z, value = problem.hypergradient(theta), problem.value(theta)
        while problem.value(theta - alpha * z) > value - method.lam * alpha * z.square().sum():
            alpha *= method.rho
        theta, alpha = theta - alpha * z, alpha * method.rho_up
        assert torch.allclose(method.theta[0], theta, rtol=1e-6)


@pytest.mark.slow
def test_the_same_end_is_reached_from_accuracies_and_steps_that_are_far_apart() -> None:
    problem = ridge()
    ends = []
    for start in ({"eps0": 1e1, "delta0": 1e1}, {"eps0": 1e-5, "delta0": 1e-5}, {"step0": 10.0}, {"step0": 1e-4}):
        method = maid(problem, rho_up=1.5, **start)
        method.run(max_outer=60)
        ends.append(float(problem.value(method.theta[0])))
    fall = float(problem.value(THETA)) - min(ends)
    assert max(ends) - min(ends) < 0.1 * fall  # all of them are still on their way after 60 steps


def test_a_fixed_accuracy_that_is_too_loose_stalls_and_says_so() -> None:
    made = maid(ridge(), accuracy="fixed", eps0=1.0, delta0=1.0).run(max_outer=50)
    assert not made.accepted
    assert made.status.startswith("stalled: no step is accepted")


def test_it_ends_where_the_gradient_vanishes() -> None:
    two = Levels(
        lambda x, t, _: (x[0] - t[0]).square().sum() / 2,
        lambda x, t, _: (x[0] - 1).square().sum() / 2,
    )
    start = (torch.zeros(3, dtype=torch.float64),)
    method = MAID(two, start, start, strong_convexity=1.0, step0=0.5, tolerance=1e-6)
    assert method.run(max_outer=200).status == "stationary"
    assert method.stopped
    assert torch.allclose(method.theta[0], torch.ones(3, dtype=torch.float64), atol=1e-6)
    assert method.step() is method.trace[-1]


@pytest.mark.parametrize("given", [True, False])
def test_constants_that_are_not_given_are_measured(given: bool) -> None:
    problem = logistic()
    theta, start = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    options = {"upper_lipschitz": float(torch.linalg.matrix_norm(problem.a_valid, 2)) ** 2 / 4} if given else {}
    method = MAID(problem.levels, (theta,), (start,), strong_convexity=lambda t: t[0].exp().min(), **options)
    before = float(problem.value(theta))
    method.run(max_outer=30)
    assert float(problem.value(method.theta[0])) < before
    method._inexact_gradient()  # measures where the method now stands
    measured = method.bound.measured
    assert measured["jacobian_norm"] == pytest.approx(float((method.theta[0].exp() * method.x[0]).abs().max()), rel=0.2)
    assert measured["inverse_lipschitz"] > 0
    if not given:
        top = float(torch.linalg.matrix_norm(problem.a_valid, 2)) ** 2 / 4
        assert 0.3 * top < measured["upper_lipschitz"] <= top


def test_the_budget_of_lower_work_is_kept() -> None:
    method = maid(ridge())
    made = method.run(budget=300)
    assert 300 <= method.counters.lower_work < 300 + 100
    assert made.work == method.counters.lower_work or made.accepted
    further = method.run(budget=600)
    assert further.step > made.step


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(way: str) -> None:
    problem = ridge()
    whole, first = maid(problem, upper_lipschitz=None), maid(problem, upper_lipschitz=None)
    whole.run(max_outer=12)
    first.run(max_outer=5)
    if way == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = maid(problem, upper_lipschitz=None)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run(max_outer=7)
    assert torch.equal(second.theta[0], whole.theta[0])
    assert second.trace == whole.trace
    assert second.counters == whole.counters


def test_float32_stops_at_its_floor_with_a_message() -> None:
    problem = ridge(dtype=torch.float32)
    method = MAID(
        problem.levels,
        (THETA.float(),),
        (ZERO.float(),),
        **constants(problem),  # type: ignore[arg-type]
    )
    made = method.run(max_outer=400)
    assert "accuracy floor reached: in float32" in made.status
    assert "Use float64" in made.status
    assert float(ridge().value(method.theta[0].double())) < float(ridge().value(THETA))


def test_what_a_step_did_is_in_the_trace() -> None:
    method = maid(ridge())
    method.run(max_outer=5)
    for made in method.trace:
        assert made.accepted
        assert made.ratio <= 1 - method.eta
        assert made.trials >= 1
        assert made.lower <= made.value <= made.upper
        assert made.far == ()
    assert [s.work for s in method.trace] == sorted(s.work for s in method.trace)


def test_weights_that_run_away_are_told_and_can_be_bounded() -> None:
    problem = ridge()
    start = torch.full((8,), -13.0, dtype=torch.float64)
    method = MAID(problem.levels, (start,), (ZERO,), **constants(problem))  # type: ignore[arg-type]
    assert method.step().far == tuple(range(8))
    held = MAID(problem.levels, (start,), (ZERO,), bounds=(-2.0, 2.0), **constants(problem))  # type: ignore[arg-type]
    held.run(max_outer=30)
    assert float(held.theta[0].min()) >= -2
    assert float(held.theta[0].max()) <= 2
    assert sum(s.accepted for s in held.trace) > 3


def test_bad_arguments_are_refused() -> None:
    problem = ridge()
    with pytest.raises(InputError, match="needs strong_convexity"):
        MAID(problem.levels, (THETA,), (ZERO,))
    for options, message in (
        ({"lam": 0.5, "eta": 0.5}, "lam < eta"),
        ({"rho": 1.0}, "rho must lie"),
        ({"nu_up": 0.9}, "nu_up must be at least 1"),
        ({"eps0": 0.0}, "eps0 must be positive"),
        ({"accuracy": "exact"}, "accuracy must be"),
        ({"bounds": (1.0, 0.0)}, "low < high"),
        ({"history": -1}, "must be >= 0"),
        ({"max_backtracks": 0}, "max_backtracks"),
        ({"upper_lipschitz": -1.0}, "upper_lipschitz must be"),
    ):
        with pytest.raises(InputError, match=message):
            maid(problem, **options)
    with pytest.raises(InputError, match="strong convexity of the lower objective must be positive"):
        maid(problem, strong_convexity=0.0).step()
    with pytest.raises(InputError, match="max_outer"):
        maid(problem).run()


def test_a_lower_objective_that_changes_between_calls_is_refused() -> None:
    problem, generator = ridge(), torch.Generator().manual_seed(0)

    def lower(x: Any, t: Any, _: Any) -> Tensor:
        rows = torch.randperm(30, generator=generator)[:10]
        return (problem.a[rows] @ x[0] - problem.y[rows]).square().sum() + (t[0].exp() * x[0].square()).sum()

    with pytest.raises(InputError, match="needs deterministic lower evaluations"):
        MAID(Levels(lower, problem.levels.upper), (THETA,), (ZERO,), strong_convexity=1.0)


def test_a_lower_objective_with_kinks_is_refused() -> None:
    target = torch.linspace(-1, 1, 8, dtype=torch.float64)
    two = Levels(
        lambda x, t, _: (x[0] - target).square().sum() / 2 + (t[0].exp() * x[0].abs()).sum(),
        lambda x, t, _: (x[0] - target).square().sum() / 2,
    )
    with pytest.raises(InputError, match="does not look smooth"):
        MAID(two, (THETA,), (ZERO + 1e-2,), strong_convexity=1.0, eps0=1e-8, delta0=1e-8).run(max_outer=3)


def test_an_upper_objective_that_is_not_finite_is_an_error() -> None:
    problem = ridge()
    two = Levels(problem.levels.lower, lambda x, t, _: (x[0].sum() * 0).log() + float("nan"))
    with pytest.raises(NonFiniteError, match="upper objective is nan"):
        MAID(two, (THETA,), (ZERO,), **constants(problem)).step()  # type: ignore[arg-type]


def test_several_training_pairs_have_certificates_of_their_own() -> None:
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(6, 12, generator=generator, dtype=torch.float64).cumsum(1)
    noisy = clean + torch.randn(6, 12, generator=generator, dtype=torch.float64)

    def lower(x: Any, t: Any, rows: Tensor | None) -> Tensor:
        y = noisy if rows is None else noisy[rows]
        return (x[0] - y).square().sum() / 2 + t[0].exp() * x[0].diff(dim=1).square().sum() / 2

    two = Levels(lower, lambda x, t, _: (x[0] - clean).square().sum() / 2)
    method = MAID(
        two,
        (torch.tensor(-4.0, dtype=torch.float64),),
        (noisy,),
        strong_convexity=1.0,
        smoothness=lambda t: 1 + 4 * t[0].exp(),
        upper_lipschitz=1.0,
        samples=True,
    )
    method.run(max_outer=60)

    def exact(t: float) -> float:
        d = torch.eye(12, dtype=torch.float64).diff(dim=0)
        x = torch.linalg.solve(torch.eye(12, dtype=torch.float64) + math.exp(t) * d.T @ d, noisy.T).T
        return float((x - clean).square().sum() / 2)

    best = min(exact(-6 + 0.01 * i) for i in range(1000))
    assert exact(float(method.theta[0])) <= best * 1.001
    last = [s for s in method.trace if s.accepted][-1]
    assert last.lower <= exact(float(method.theta[0])) <= last.upper


@pytest.mark.parametrize("schedule", ["geometric", "quadratic", "cubic"])
def test_hoag_descends_on_each_schedule_and_its_state_carries_it(schedule: Any) -> None:
    problem = ridge()
    whole = HOAG(problem.levels, (THETA,), (ZERO,), schedule)
    whole.run(max_outer=20)
    first = HOAG(problem.levels, (THETA,), (ZERO,), schedule)
    first.run(max_outer=8)
    second = HOAG(problem.levels, (THETA,), (ZERO,), schedule)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.run(max_outer=12)
    assert torch.equal(whole.theta[0], second.theta[0])
    assert float(problem.value(whole.theta[0])) < float(problem.value(THETA))
    factor = {"geometric": 0.9**19, "quadratic": 1 / 19**2, "cubic": 1 / 19**3}[schedule]
    assert whole.trace[-1].tolerance == pytest.approx(0.01 * factor)


def test_hoag_refuses_bad_arguments() -> None:
    problem = ridge()
    for options in ({"schedule": "linear"}, {"tolerance": 0.0}, {"bounds": (1.0, 0.0)}, {"lipschitz": -1.0}):
        with pytest.raises(InputError, match="HOAG"):
            HOAG(problem.levels, (THETA,), (ZERO,), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_outer"):
        HOAG(problem.levels, (THETA,), (ZERO,)).run()


def test_maid_and_the_plain_hypergradient_agree_where_maid_stands() -> None:
    problem = ridge()
    method = maid(problem)
    method.run(max_outer=10)
    theta = method.theta[0]
    found = ImplicitHypergradient(problem.levels)((problem.solution(theta),), (theta,)).gradient[0]
    assert torch.allclose(found, problem.hypergradient(theta), rtol=1e-8)
