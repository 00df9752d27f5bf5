"""What all balancers share: scale as stated, no order but the formula's, odd gradients, saving and copying, clear errors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_gradients import Array, gradients, gram, make
from torch import Tensor

from poise.errors import InputError, NonFiniteError
from poise.weights import pareto
from poise.weights.pareto import (
    EPO,
    IMTLG,
    IMTLL,
    MGDA,
    Balancer,
    CAGrad,
    DynamicAverage,
    FixedPreference,
    GradNorm,
    LossScale,
    NashMTL,
    Normalised,
    PCGrad,
    RandomWeights,
    Uncertainty,
    UPGrad,
)

RULES: list[Callable[[], Balancer]] = [
    MGDA, PCGrad, CAGrad, UPGrad, NashMTL, GradNorm, Normalised, Uncertainty, DynamicAverage, LossScale, IMTLG, IMTLL, EPO,
    RandomWeights, FixedPreference,
    lambda: PCGrad(order="random"), lambda: NashMTL(update_every=3), lambda: Normalised(decay=0.9),
    lambda: DynamicAverage(window=2),
]  # fmt: skip
EXACT = [MGDA, CAGrad, UPGrad, NashMTL, Normalised, EPO]


def signals(j: Array, values: Tensor) -> Any:
    names = tuple("abcdefghijkl"[: len(j)])
    table = SimpleNamespace(labels=names, values=values, gram=gram(j))
    return SimpleNamespace(names=names, values=values, gradients=table)


def steps(rule: Balancer, count: int, start: int = 0) -> list[dict[str, Any]]:
    found = []
    for t in range(start, start + count):
        told = signals(make(t, 3, 3, 0.5, "agree"), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) / (1 + 0.1 * t))
        found.append(dict(rule.weights(told)))
        rule.advance(told)
    return found


def test_every_method_of_the_issue_has_its_name_in_formulas() -> None:
    found = {getattr(getattr(pareto, name), "formula", "") for name in pareto.__all__}
    named = (
        "mgda pcgrad cagrad upgrad nash_mtl grad_norm normalised uncertainty dynamic_average imtl_g imtl_l epo random"
    )
    assert found >= {*named.split()}


@pytest.mark.parametrize("make_rule", RULES)
def test_asking_twice_in_a_step_changes_nothing(make_rule: Callable[[], Balancer]) -> None:
    rule = make_rule()
    steps(rule, 3)
    told = signals(make(9, 3, 3, 0.5, "none"), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert rule.weights(told) == rule.weights(told)


@pytest.mark.parametrize("make_rule", RULES)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_run_that_was_saved_goes_on_as_if_it_had_not_stopped(make_rule: Callable[[], Balancer], way: str) -> None:
    rule = make_rule()
    steps(rule, 5)
    if way == "deepcopy":
        other = copy.deepcopy(rule)
    else:
        file = io.BytesIO()
        torch.save(rule.state_dict(), file)
        file.seek(0)
        other = make_rule()
        other.load_state_dict(torch.load(file, weights_only=True))
    assert steps(rule, 5, start=5) == steps(other, 5, start=5)


@pytest.mark.parametrize("make_rule", RULES)
def test_state_keeps_its_digits_when_the_model_is_cast(make_rule: Callable[[], Balancer]) -> None:
    rule = make_rule()
    steps(rule, 2)
    before = {k: v.dtype for k, v in rule.state_dict().items()}
    rule.half()
    assert {k: v.dtype for k, v in rule.state_dict().items()} == before
    assert not list(rule.parameters())


@pytest.mark.parametrize("make_rule", RULES)
def test_weights_without_conflict_have_the_stated_sum(make_rule: Callable[[], Balancer]) -> None:
    """Gradients of equal length at equal angles that agree, and equal values: by symmetry all weights are equal."""
    rule = make_rule()
    g = torch.full((4, 4), 0.5, dtype=torch.float64) + 0.5 * torch.eye(4, dtype=torch.float64)
    weights = rule.weigh(g, torch.ones(4, dtype=torch.float64))
    expected = {"1": 1.0, "m": 4.0}.get(rule.total)
    if expected is not None:
        assert float(weights.sum()) == pytest.approx(expected)
    if not isinstance(rule, EPO | RandomWeights):
        torch.testing.assert_close(weights, weights[0].expand(4), atol=1e-9, rtol=0)


@pytest.mark.parametrize("rule", [MGDA(), CAGrad(), UPGrad(), NashMTL(), Normalised(), IMTLG(), GradNorm()])
@given(j=gradients(most=5, flaws="none agree"), data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_step_does_not_depend_on_the_order_of_the_terms(rule: Balancer, j: Array, data: Any) -> None:
    order = data.draw(st.permutations(range(len(j))))
    j = j / np.linalg.norm(j, axis=1).max()
    if np.linalg.matrix_rank(j / np.linalg.norm(j, axis=1, keepdims=True), tol=1e-2) < len(j):
        return  # dependent rows amplify rounding in those rules that divide by angles
    ones = torch.ones(len(j), dtype=torch.float64)
    plain = rule.weigh(gram(j), ones).numpy() @ j
    turned = rule.weigh(gram(j[order]), ones).numpy() @ j[order]
    np.testing.assert_allclose(turned, plain, atol=1e-6 * (1 + np.linalg.norm(plain)))


@pytest.mark.parametrize("make_rule", RULES)
@given(j=gradients())
@settings(max_examples=15, deadline=None)
def test_weights_are_finite_whatever_the_gradients(make_rule: Callable[[], Balancer], j: Array) -> None:
    rule = make_rule()
    weights = rule.weigh(gram(j), torch.ones(len(j), dtype=torch.float64))
    assert bool(torch.isfinite(weights).all())
    if not isinstance(rule, IMTLG):
        assert bool((weights >= 0).all())


@pytest.mark.parametrize("make_rule", RULES)
def test_gradients_that_all_vanish_give_finite_weights(make_rule: Callable[[], Balancer]) -> None:
    weights = make_rule().weigh(torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert bool(torch.isfinite(weights).all())


@pytest.mark.parametrize("rule_class", EXACT)
def test_a_gram_matrix_in_float32_gives_the_same_weights_to_its_precision(rule_class: Callable[[], Balancer]) -> None:
    j, values = make(4, 4, 4, 0.3, "agree"), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    exact = rule_class().weigh(gram(j), values)
    rounded = rule_class().weigh(gram(j).float(), values.float())
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, atol=1e-4, rtol=1e-4)


def test_pcgrad_projects_one_conflict_after_the_other() -> None:
    j = make(5, 4, 4, 0.5, "none")
    expected = np.zeros(12)
    for i, g in enumerate(j):
        g = g.copy()
        for k, other in enumerate(j):
            if k != i and g @ other < 0:
                g -= g @ other / (other @ other) * other
        expected += g
    np.testing.assert_allclose(PCGrad().weigh(gram(j), torch.zeros(4)).numpy() @ j, expected, atol=1e-10)


def test_normalised_gives_every_gradient_its_share() -> None:
    j = make(6, 3, 3, 2.0, "none")
    lengths = np.linalg.norm(j, axis=1)
    w = Normalised(preference=[1, 2, 5]).weigh(gram(j), torch.zeros(3)).numpy()
    np.testing.assert_allclose(w * lengths, lengths.sum() * np.array([1, 2, 5]) / 8, rtol=1e-12)
    fixed = Normalised(norm=2.0).weigh(gram(j), torch.zeros(3)).numpy()
    np.testing.assert_allclose(fixed * lengths, np.full(3, 2 / 3), rtol=1e-12)


def test_normalised_leaves_out_a_gradient_that_vanishes() -> None:
    w = Normalised().weigh(torch.diag(torch.tensor([1.0, 0.0, 4.0])), torch.zeros(3))
    torch.testing.assert_close(w, torch.tensor([1.5, 0.0, 0.75], dtype=torch.float64))


def test_random_weights_change_with_every_step_and_repeat_with_their_seed() -> None:
    first, again = steps(RandomWeights(seed=1), 3), steps(RandomWeights(seed=1), 3)
    assert first == again
    assert first[0] != first[1]


def test_uniform_weights_on_the_simplex_have_mean_one_over_m() -> None:
    rule = RandomWeights("dirichlet")
    drawn = []
    for _ in range(2000):
        drawn.append(rule.weigh(torch.empty(0), torch.ones(3)))
        rule.move(torch.empty(0), torch.ones(3))
    w = torch.stack(drawn)
    torch.testing.assert_close(w.sum(1), torch.ones(2000, dtype=torch.float64))
    # Variance of a coordinate of Dirichlet(1, 1, 1) is 1/18: five standard errors of the mean.
    assert float((w.mean(0) - 1 / 3).abs().max()) < 5 * (1 / 18 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: CAGrad(c=-1), "cagrad: c is at least 0"),
        (lambda: MGDA(normalize="l1"), "mgda: normalize is"),
        (lambda: PCGrad(order="best"), "pcgrad: order is"),
        (lambda: NashMTL(max_norm=-1), "nash_mtl: max_norm"),
        (lambda: NashMTL(update_every=0), "nash_mtl: update_every"),
        (lambda: GradNorm(alpha=-1), "grad_norm: alpha"),
        (lambda: GradNorm(lr=0), "grad_norm: lr"),
        (lambda: GradNorm(smallest=0), "grad_norm: smallest"),
        (lambda: Normalised(decay=1), "normalised: decay"),
        (lambda: Normalised(norm=0), "normalised: norm"),
        (lambda: Uncertainty(likelihood="poisson"), "uncertainty: likelihood"),
        (lambda: Uncertainty(bound=1e4), "uncertainty: bound"),
        (lambda: IMTLL(lr=-1), "imtl_l: lr"),
        (lambda: DynamicAverage(temperature=0), "dynamic_average: temperature"),
        (lambda: DynamicAverage(window=0), "dynamic_average: window"),
        (lambda: LossScale(decay=-0.1), "loss_scale: decay"),
        (lambda: EPO(preference=[1, 0]), "epo: preference"),
        (lambda: EPO(tolerance=0), "epo: tolerance"),
        (lambda: UPGrad(preference=[-1, 1]), "upgrad: preference"),
        (lambda: UPGrad(preference=[]), "upgrad: preference"),
        (lambda: RandomWeights("cauchy"), "random: distribution"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(bad: Callable[[], Balancer], says: str) -> None:
    with pytest.raises(InputError, match=says):
        bad()


def test_a_preference_for_another_number_of_terms_is_refused() -> None:
    with pytest.raises(InputError, match="2 numbers and 3 terms"):
        UPGrad(preference=[1, 2]).weigh(torch.eye(3), torch.zeros(3))


def test_one_term_alone_and_a_gradient_that_is_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="two terms at least"):
        MGDA().weights(signals(make(0, 1, 1, 0.0, "none"), torch.ones(1)))
    j = make(0, 2, 2, 0.0, "none")
    j[1, 0] = np.nan
    with pytest.raises(NonFiniteError, match="gradient of b is not finite"):
        MGDA().weights(signals(j, torch.ones(2)))
