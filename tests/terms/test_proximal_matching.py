"""Proximal matching: the loss, its limits, its gradient, and the ladder of its width."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import poise
from poise.coefficient import Clock
from poise.errors import FormulaError, InputError, PoiseWarning
from poise.terms import ProximalMatching
from poise.weights import GammaLadder


def pair(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, generator=g).double(), torch.randn(n, 2, 3, generator=g).double()


def test_the_value_is_one_less_a_bump_of_the_distance() -> None:
    f, x = pair()
    u2 = (f - x).flatten(1).square().sum(1)
    value = ProximalMatching(gamma=1.3)(f, x)
    torch.testing.assert_close(value.values, 1 - torch.exp(-u2 / 1.3**2))
    torch.testing.assert_close(value.extras["distance"], u2.sqrt())
    assert float(value.extras["gamma"]) == pytest.approx(1.3)


def test_wide_bumps_are_squared_error() -> None:
    f, x = pair()
    u2 = (f - x).flatten(1).square().sum(1)
    gamma = 1e4
    # gamma^2 m = u^2 - u^4 / (2 gamma^2) + ...
    torch.testing.assert_close(gamma**2 * ProximalMatching(gamma=gamma)(f, x).values, u2, rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(gamma=st.floats(2, 20), seed=st.integers(0, 99))  # below, a far pair has no gradient, which warns
def test_the_gradient_is_the_error_under_the_bump(gamma: float, seed: int) -> None:
    f, x = pair(seed=seed)
    f.requires_grad_()
    ProximalMatching(gamma=gamma)(f, x).values.sum().backward()
    u2 = (f.detach() - x).flatten(1).square().sum(1)[:, None, None]
    torch.testing.assert_close(f.grad, 2 / gamma**2 * (f.detach() - x) * torch.exp(-u2 / gamma**2))


def test_number_by_number_it_is_the_mean_over_numbers() -> None:
    f, x = pair()
    values = ProximalMatching(gamma=0.7, reduce_dims="none")(f, x).values
    torch.testing.assert_close(values, (1 - torch.exp(-((f - x) ** 2) / 0.49)).flatten(1).mean(1))
    one = ProximalMatching(gamma=0.7)(f[:, :1, :1], x[:, :1, :1]).values
    torch.testing.assert_close(one, ProximalMatching(gamma=0.7, reduce_dims="none")(f[:, :1, :1], x[:, :1, :1]).values)


def test_small_widths_choose_the_mode_and_squared_error_the_mean() -> None:
    # One observation whose clean value is 0 in two of three cases and 1 else.
    x = torch.tensor([0.0, 0.0, 1.0]).double()
    f = torch.linspace(-0.5, 1.5, 2001).double()
    spread = f[:, None].expand(-1, 3)

    def best(term: object) -> float:
        return float(f[torch.stack([term(spread[:, i], x[i].expand(2001)) for i in range(3)]).sum(0).argmin()])

    narrow, wide = ProximalMatching(gamma=0.1), ProximalMatching(gamma=100.0)
    assert best(lambda a, b: narrow(a, b).values) == pytest.approx(0.0, abs=1e-3)
    assert best(lambda a, b: wide(a, b).values) == pytest.approx(1 / 3, abs=1e-3)


def test_micro_batches_give_the_mean_over_examples() -> None:
    f, x = pair()
    objective = poise.parse("2*proximal_matching(gamma=1.5)")
    whole = objective(prediction=f, target=x)
    parts = sum(len(a) / 6 * objective(prediction=a, target=b) for a, b in ((f[:2], x[:2]), (f[2:], x[2:])))
    torch.testing.assert_close(whole, parts)


# ---- the ladder -----------------------------------------------------------------------------------------------------


def test_a_geometric_ladder_halves_and_ends_exactly() -> None:
    ladder = GammaLadder(8 * 0.08, 0.08, stages=4, steps=100)
    assert ladder.values == pytest.approx((0.64, 0.32, 0.16, 0.08))
    assert ladder.values[-1] == 0.08
    seen = [ladder.value(Clock(step=s)) for s in range(120)]
    assert [seen.count(v) for v in ladder.values] == [25, 25, 25, 45]


def test_a_linear_ladder_goes_down_in_equal_steps_and_follows_the_clock() -> None:
    ladder = GammaLadder(0.5, 0.1, stages=5, spacing="linear", after=0.5)
    assert ladder.values == pytest.approx((0.5, 0.4, 0.3, 0.2, 0.1))
    assert ladder.value(Clock(step=50, steps=100)) == 0.5
    assert ladder.value(Clock(step=99, steps=100)) == pytest.approx(0.1)
    in_epochs = GammaLadder(4, 1, stages=3, epochs=3)
    assert [in_epochs.value(Clock(step=s, steps_per_epoch=10)) for s in (0, 10, 20)] == [4, 2, 1]


@pytest.mark.parametrize(
    "formula",
    [
        "proximal_matching",
        "proximal_matching(gamma=0.5, reduce_dims='none')",
        "absolute_error + proximal_matching(gamma=gamma_ladder(8, 1, stages=5, spacing='linear', steps=100, after=20))",
        "proximal_matching(gamma=piecewise((0, 1), (5, 0.5)))",
        "gamma_ladder(2, 1)*l2",
    ],
)
def test_a_formula_prints_and_is_read_back(formula: str) -> None:
    assert str(poise.parse(formula)) == formula
    poise.explain(formula)


def test_a_formula_moves_gamma_with_the_run_and_a_copy_goes_on_where_it_was() -> None:
    f, x = pair()
    objective = poise.parse("proximal_matching(gamma=gamma_ladder(4, 1, stages=3, steps=30))")
    objective.clock = Clock(step=10)
    expected = ProximalMatching(gamma=2.0)(f, x).values.mean()
    for each in (objective, copy.deepcopy(objective)):
        torch.testing.assert_close(each(prediction=f, target=x), expected)


def test_a_ladder_over_the_whole_run_asks_for_its_length() -> None:
    f, x = pair()
    objective = poise.parse("proximal_matching(gamma=gamma_ladder(4, 1))")
    with pytest.raises(InputError, match="steps"):
        objective(prediction=f, target=x)
    objective.bind(steps=10)
    assert objective(prediction=f, target=x).isfinite()


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("proximal_matching(gamma=0)", "gamma must be positive"),
        ("proximal_matching(gamma=-1)", "gamma must be positive"),
        ("proximal_matching(gamma='wide')", "a number or a schedule"),
        ("proximal_matching(reduce_dims='some')", "reduce_dims"),
        ("proximal_matching(gamma=gamma_ladder(1, 0))", "start and stop must be positive"),
        ("proximal_matching(gamma=gamma_ladder(1, 0.5, stages=1))", "stages"),
        ("proximal_matching(gamma=gamma_ladder(1, 0.5, spacing='log'))", "spacing"),
        ("proximal_matching(gamma=gamma_ladder(1, 0.5, steps=0))", "length must be positive"),
    ],
)
def test_a_formula_that_does_not_fit_is_refused(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(formula)


def test_a_schedule_that_reaches_zero_and_unequal_shapes_are_refused() -> None:
    objective = poise.parse("proximal_matching(gamma=linear(1, 0, steps=10))")
    objective.clock = Clock(step=10)
    f, x = pair()
    with pytest.raises(InputError, match="gives 0"):
        objective(prediction=f, target=x)
    with pytest.raises(InputError, match="one shape"):
        ProximalMatching()(f, x[:, :1])


def test_a_bump_that_nothing_lies_under_is_warned_of_once() -> None:
    f, x = pair()
    term = ProximalMatching(gamma=1e-3)
    with pytest.warns(PoiseWarning, match="gradient 0"):
        value = term(f, x)
    assert math.isclose(float(value.values.min()), 1.0)
    term(f, x)
