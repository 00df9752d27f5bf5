"""Preferences along the Pareto front that a guide sets: the program, its branches, and what the policy keeps."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto import GuidedPareto
from poise.weights.pareto.guided import least_descent
from poise.weights.pareto.simplex_program import maximize_on_simplex

TIGHT = 1e-9
"""What the constraints of a solution must hold to, in units of the largest entry."""


def gradients(m: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(m, width, generator=generator, dtype=torch.float64)
    return g, torch.randn(width, generator=generator, dtype=torch.float64)


def program(gram: Tensor, guide: Tensor, branch: str) -> tuple[Any, Any, Any]:
    """Write the program of the specification down: the objective, the rows and the least values of `rows a >= least`."""
    c, a = gram.numpy(), guide.numpy()
    if branch == "dominance":
        return c.sum(0), np.vstack([c, a]), np.append(np.zeros(len(c)), min(0.0, a.max()))
    positive = {j for j in range(len(a)) if a[j] > 0}
    best = int(a.argmax())
    rows, least = [], []
    for i in range(len(a)):
        if not positive or i == best:
            rows.append(c[i])
            least.append(0.0)
        elif i not in positive:
            rows.append(c[i])
            least.append(a[i])
    return a, np.array(rows), np.array(least)


problems = st.tuples(st.integers(2, 6), st.integers(1, 9), st.integers(0, 10_000))


@given(problems, st.sampled_from(["balance", "dominance"]))
@settings(max_examples=80, deadline=None)
def test_preferences_stand_on_the_simplex_and_keep_every_constraint(size: tuple[int, int, int], branch: str) -> None:
    g, v = gradients(*size)
    choice = GuidedPareto(branch=branch).choose(g @ g.T, g @ v, 1.0)  # type: ignore[arg-type]
    assert float(choice.alpha.sum()) == pytest.approx(1, abs=1e-12)
    assert float(choice.alpha.min()) >= 0
    _, rows, least = program(g @ g.T, g @ v, branch)
    if choice.branch != "fallback":
        missed = np.max(least - rows @ choice.alpha.numpy(), initial=0.0)
        assert missed <= TIGHT * np.abs(rows).max()


@given(problems, st.sampled_from(["balance", "dominance"]))
@settings(max_examples=60, deadline=None)
def test_the_value_is_that_of_a_general_solver(size: tuple[int, int, int], branch: str) -> None:
    linprog = pytest.importorskip("scipy.optimize").linprog
    g, v = gradients(*size)
    value, rows, least = program(g @ g.T, g @ v, branch)
    answer = linprog(-value, A_ub=-rows, b_ub=-least, A_eq=np.ones((1, size[0])), b_eq=[1.0], bounds=(0, None))
    choice = GuidedPareto(branch=branch).choose(g @ g.T, g @ v, 1.0)  # type: ignore[arg-type]
    assert (choice.branch == "fallback") == (answer.status != 0)
    if answer.status == 0:
        # HiGHS may miss a constraint by 1e-7, and gain by it.
        assert float(value @ choice.alpha.numpy()) == pytest.approx(-answer.fun, abs=1e-6 * max(1, np.abs(value).max()))


@pytest.mark.peer
@pytest.mark.parametrize("branch", ["balance", "dominance"])
def test_the_value_is_that_of_cvxpy(branch: str) -> None:
    cvxpy = pytest.importorskip("cvxpy")
    for seed in range(10):
        g, v = gradients(3, 7, seed)
        value, rows, least = program(g @ g.T, g @ v, branch)
        a = cvxpy.Variable(3, nonneg=True)
        peer = cvxpy.Problem(cvxpy.Maximize(value @ a), [cvxpy.sum(a) == 1, rows @ a >= least])
        peer.solve(solver="CLARABEL")
        choice = GuidedPareto(branch=branch).choose(g @ g.T, g @ v, 1.0)  # type: ignore[arg-type]
        if peer.status == "optimal":
            assert float(value @ choice.alpha.numpy()) == pytest.approx(peer.value, rel=1e-6, abs=1e-6)
        else:
            assert choice.branch == "fallback"


def test_many_objectives_are_solved_as_exactly_as_few() -> None:
    for m in (5, 6, 9):
        g, v = gradients(m, 12, m)
        value, rows, least = program(g @ g.T, g @ v, "balance")
        alpha = maximize_on_simplex(value, rows, least)
        assert alpha is not None
        assert np.all(rows @ alpha >= least - TIGHT * np.abs(rows).max())
    # A sixth objective that copies the fifth changes no value.
    g, v = gradients(5, 12, 0)
    twice = torch.cat([g, g[4:]])
    few, many = (GuidedPareto(branch="balance").choose(x @ x.T, x @ v, 1.0) for x in (g, twice))
    assert float(few.alpha @ (g @ v)) == pytest.approx(float(many.alpha @ (twice @ v)), rel=1e-8)


def of_two(gram: Tensor, guide: Tensor) -> float:
    """Return the first of two preferences under balance, by hand: the better end of an interval."""
    a1, a2 = guide.tolist()
    least = [0.0, 0.0]
    if max(a1, a2) > 0:
        best = int(a2 > a1)
        least = [0.0 if i == best else (-math.inf if a > 0 else a) for i, a in enumerate((a1, a2))]
    low, high = 0.0, 1.0
    for (first, second), r in zip(gram.tolist(), least, strict=True):
        # first t + second (1 - t) >= r
        slope = first - second
        if slope > 0:
            low = max(low, (r - second) / slope)
        elif slope < 0:
            high = min(high, (r - second) / slope)
    return high if a1 > a2 else low


@given(st.integers(0, 5000))
@settings(max_examples=80, deadline=None)
def test_two_objectives_have_a_closed_form(seed: int) -> None:
    g, v = gradients(2, 3, seed)
    choice = GuidedPareto(branch="balance").choose(g @ g.T, g @ v, 1.0)
    assert float(choice.alpha[0]) == pytest.approx(of_two(g @ g.T, g @ v), abs=1e-8)


def test_where_all_gradients_agree_balance_follows_the_one_that_helps_the_guide_most() -> None:
    g = torch.tensor([[1.0, 0.2], [1.0, 0.5], [1.0, 0.9]], dtype=torch.float64)
    choice = GuidedPareto(branch="balance").choose(g @ g.T, g @ torch.tensor([0.1, 1.0], dtype=torch.float64), 1.0)
    assert choice.alpha.tolist() == [0, 0, 1]
    assert choice.weights.tolist() == [0, 0, 3]
    assert choice.conflicts == 0


def test_the_scale_of_the_guide_changes_no_constraint_but_the_bounded_losses() -> None:
    guide = np.array([0.4, 0.7, -0.2])
    once, often = least_descent(guide), least_descent(100 * guide)
    assert np.array_equal(np.isfinite(once), np.isfinite(often))
    assert np.array_equal(once == 0, often == 0)
    assert often[2] == pytest.approx(100 * once[2])
    assert np.array_equal(least_descent(-np.abs(guide)), np.zeros(3))


def test_a_rotation_of_the_parameters_changes_nothing() -> None:
    g, v = gradients(3, 6, 1)
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    for branch in ("balance", "dominance"):
        policy = GuidedPareto(branch=branch)
        first = policy.choose(g @ g.T, g @ v, 1.0)
        second = policy.choose((g @ q) @ (g @ q).T, (g @ q) @ (q.T @ v), 1.0)
        torch.testing.assert_close(first.alpha, second.alpha, rtol=0, atol=1e-8)


def test_descent_is_what_the_direction_does_to_first_order() -> None:
    g, v = gradients(3, 6, 3)
    choice = GuidedPareto(branch="dominance", relaxed=True).choose(g @ g.T, g @ v, 1.0)
    d = choice.weights @ g
    torch.testing.assert_close(choice.descent, g @ d)
    assert choice.guide_descent == pytest.approx(float(v @ d))
    assert float(choice.descent.min()) >= -TIGHT * float(choice.descent.abs().max())
    cosines = torch.nn.functional.cosine_similarity(g[:, None], g[None], dim=-1)
    assert choice.conflicts == int((cosines.triu(1) < 0).sum())


def test_equal_preferences_are_the_plain_sum_and_no_solution_falls_back_on_it() -> None:
    # Opposed gradients whose only stationary mixture goes against the guide of dominance.
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    solved = GuidedPareto(branch="dominance").choose(gram, torch.zeros(2), 0.0)
    assert solved.branch == "dominance"
    assert solved.weights.tolist() == [1, 1]
    refused = GuidedPareto(branch="dominance").choose(gram, torch.tensor([-1.0, 1e-3]), 0.0)
    assert refused.branch == "fallback"
    assert refused.weights.tolist() == [1, 1]
    assert (
        GuidedPareto(branch="dominance", relaxed=True).choose(gram, torch.tensor([-1.0, 1e-3]), 0.0).branch
        == "dominance"
    )


def test_of_equally_good_preferences_the_shorter_step_is_taken() -> None:
    gram = torch.diag(torch.tensor([1.0, 9.0]))
    assert GuidedPareto(branch="balance").choose(gram, torch.zeros(2), 1.0).alpha.tolist() == [1, 0]


def test_auto_takes_balance_until_the_guide_is_satisfied_and_refuses_a_guide_below_its_minimum() -> None:
    gram, guide = torch.eye(2), torch.tensor([1.0, 0.5])
    policy = GuidedPareto(guide_minimum=-math.log(10))
    assert policy.choose(gram, guide, -1.0).branch == "balance"
    assert policy.choose(gram, guide, -math.log(10) + 5e-4).branch == "dominance"
    # As the authors' code has it: minus the mutual information against 0. It would always be "satisfied".
    with pytest.raises(InputError, match=r"guide_minimum \(minus the logarithm of the number of classes"):
        GuidedPareto().choose(gram, guide, -1.0)
    assert GuidedPareto(branch="dominance").choose(gram, guide, -1.0).branch == "dominance"


@pytest.mark.parametrize("normalize", ["l2", "loss"])
def test_normalised_preferences_do_not_feel_the_units_of_an_objective(normalize: Any) -> None:
    values, scales = torch.tensor([2.0, 0.7, 1.3]), torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    policy, raw, moved = GuidedPareto(branch="balance", normalize=normalize), GuidedPareto(branch="balance"), []
    for seed in range(8):
        g, v = gradients(3, 3, seed)
        h = scales[:, None] * g
        plain = policy.choose(g @ g.T, g @ v, 1.0, values)
        scaled = policy.choose(h @ h.T, h @ v, 1.0, values * scales)
        torch.testing.assert_close(plain.alpha, scaled.alpha, rtol=0, atol=1e-7)  # the values are float32
        # The geometric mean of these scales is 1, so that even the step is the same.
        torch.testing.assert_close(plain.weights @ g, scaled.weights @ h, rtol=1e-6, atol=1e-6)
        before, after = raw.choose(g @ g.T, g @ v, 1.0), raw.choose(h @ h.T, h @ v, 1.0)
        moved.append(float((before.alpha - after.alpha).abs().max()))
    assert max(moved) > 0.1


def test_a_gradient_that_is_zero_has_no_scale_and_breaks_nothing() -> None:
    g, v = gradients(3, 8, 5)
    g[1] = 0
    for normalize in ("none", "l2"):
        choice = GuidedPareto(branch="balance", normalize=normalize).choose(g @ g.T, g @ v, 1.0)
        assert torch.isfinite(choice.weights).all()
        assert choice.branch == "balance"


# ---- as a policy ----------------------------------------------------------------------------------------------------


def signals(g: Tensor, v: Tensor, value: float = 1.0, names: tuple[str, ...] = ("a", "b", "c")) -> Any:
    table = GradientTable(names, torch.ones(len(g)), [{"w": row} for row in g])
    guide = SimpleNamespace(gradient=lambda: {"w": v}, latest_value=torch.tensor(value))
    return SimpleNamespace(gradients=table, validation=guide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_policy_weighs_what_the_table_and_the_guide_say(dtype: torch.dtype) -> None:
    g, v = (x.to(dtype) for x in gradients(3, 6, 7))
    policy = GuidedPareto(branch="balance")
    assert policy.needs == {"gradients", "validation"}
    told = signals(g, v)
    weights = policy.weights(told)
    assert list(weights) == ["a", "b", "c"]
    assert sum(weights.values()) == pytest.approx(3)
    assert policy.log == []
    policy.advance(told)
    policy.advance(told)
    assert len(policy.log) == 1
    expected = policy.choose((g @ g.T).double(), (g @ v).double(), 1.0)
    torch.testing.assert_close(policy.log[0].alpha, expected.alpha, rtol=1e-5, atol=1e-6)


def test_what_is_added_counts_once_more_as_in_the_released_code() -> None:
    g, v = gradients(3, 6, 7)
    clean, code = GuidedPareto(branch="balance"), GuidedPareto(branch="balance", added=("a", "b"))
    first, second = clean.weights(signals(g, v)), code.weights(signals(g, v))
    assert [float(second[n]) - float(first[n]) for n in "abc"] == pytest.approx([1, 1, 0])
    with pytest.raises(InputError, match="added names z, and the objectives are a, b, c"):
        GuidedPareto(added=("z",)).weights(signals(g, v))


def run_of(policy: GuidedPareto, steps: int = 4) -> GuidedPareto:
    for seed in range(steps):
        told = signals(*gradients(3, 4, seed))
        policy.weights(told)
        policy.advance(told)
    return policy


def test_the_summary_says_what_the_weights_did() -> None:
    policy = run_of(GuidedPareto(branch="balance"), 30)
    found = policy.summary()
    alpha = torch.stack([c.alpha for c in policy.log])
    assert found.alpha == pytest.approx(tuple(alpha.mean(0).tolist()))
    assert found.steps == 30
    assert found.branches["balance"] == 30
    assert max(found.rising) <= found.any_rising
    assert found.fallbacks == 0
    assert policy.summary(last=1).alpha == pytest.approx(tuple(policy.log[-1].alpha.tolist()))
    assert run_of(GuidedPareto(branch="dominance", relaxed=True), 30).summary().any_rising == 0
    assert set(policy.report()) == {
        *(f"{kind}/{n}" for kind in ("alpha", "descent") for n in "abc"), "descent/guide", "conflicts",
    }  # fmt: skip
    with pytest.raises(InputError, match="no step was made yet"):
        GuidedPareto().summary()


def test_one_share_near_one_over_many_steps_is_called_what_it_is() -> None:
    policy = GuidedPareto(branch="balance")
    g = torch.tensor([[1000.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    for _ in range(20):
        told = signals(g, torch.tensor([1.0, 0.1]))
        policy.weights(told)
        policy.advance(told)
    assert "its gradient is of another scale" in policy.summary().warning


def test_the_log_survives_saving_and_copying_and_what_waits_does_not() -> None:
    policy = run_of(GuidedPareto(branch="balance"))
    waiting = signals(*gradients(3, 4, 99))
    policy.weights(waiting)
    buffer = io.BytesIO()
    torch.save(policy.state_dict(), buffer)
    buffer.seek(0)
    fresh = GuidedPareto(branch="balance")
    fresh.load_state_dict(torch.load(buffer))
    for twin in (fresh, copy.deepcopy(policy)):
        assert twin.summary() == policy.summary()
        assert torch.equal(twin.log[-1].descent, policy.log[-1].descent)
        twin.advance(waiting)
        assert len(twin.log) == len(policy.log)
    empty = GuidedPareto()
    empty.load_state_dict(GuidedPareto().state_dict())
    assert empty.log == []


def test_the_guide_is_no_part_of_the_policy() -> None:
    guide = torch.nn.Linear(2, 2)
    policy = GuidedPareto(upper=guide)
    assert policy.upper is guide
    assert list(policy.parameters()) == []


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_options_out_of_range_are_refused_by_name() -> None:
    for keywords, said in (
        ({"branch": "best"}, "branch is 'auto', 'balance' or 'dominance'"),
        ({"normalize": "max"}, "normalize is 'none', 'l2' or 'loss'"),
        ({"satisfied": -1.0}, "satisfied is a distance"),
        ({"valid_batch": 0}, "valid_batch is a number of held-out rows"),
    ):
        with pytest.raises(InputError, match=f"guided: {said}"):
            GuidedPareto(**keywords)  # type: ignore[arg-type]


def test_one_objective_and_a_missing_guide_are_refused() -> None:
    with pytest.raises(InputError, match="two objectives at least"):
        GuidedPareto().choose(torch.ones(1, 1), torch.ones(1), 1.0)
    told = signals(*gradients(3, 4, 0))
    told.validation = None
    with pytest.raises(InputError, match="follow a guide on held-out data, and there is none"):
        GuidedPareto().weights(told)
    with pytest.raises(InputError, match="`choose` needs"):
        GuidedPareto().weigh(torch.eye(2), torch.ones(2))
    with pytest.raises(InputError, match="needs the values"):
        GuidedPareto(normalize="loss").choose(torch.eye(2), torch.ones(2), 1.0)
    with pytest.raises(InputError, match=r"guide_dot \[m\]"):
        GuidedPareto().choose(torch.eye(2), torch.ones(3), 1.0)


def test_a_term_without_a_gradient_on_shared_parameters_is_named() -> None:
    with pytest.raises(InputError, match="b has no gradient on a parameter that another term reaches"):
        GradientTable(
            ("a", "b", "c"), torch.ones(3), [{"w": torch.ones(1)}, {"v": torch.ones(1)}, {"w": torch.ones(1)}]
        )


def test_a_gradient_that_is_not_finite_names_its_term() -> None:
    g, v = gradients(3, 4, 0)
    g[1, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the gradient of b is not finite"):
        GuidedPareto().weights(signals(g, v))
    g, v = gradients(3, 4, 0)
    v[0] = math.inf
    with pytest.raises(NonFiniteError, match="the guide or its gradient is not finite"):
        GuidedPareto().weights(signals(g, v))
    with pytest.raises(NonFiniteError, match="the guide or its gradient is not finite"):
        GuidedPareto().weights(signals(*gradients(3, 4, 0), value=math.nan))
