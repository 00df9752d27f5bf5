"""Paper 16: the closed forms of RPO on finite problems, and the game that it solves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import poise
from poise.errors import FormulaError, InputError
from poise.insight import preference_coverage
from poise.terms.preference import FinitePreferences, adversarial_policy, adversarial_value

from .records import pairs


def two_actions(p: float) -> FinitePreferences:
    wins = torch.tensor([[0, p], [1 - p, 0]], dtype=torch.float64)
    return FinitePreferences(wins, torch.tensor([0.5, 0.5], dtype=torch.float64))


def as_records(policy: Tensor, data: FinitePreferences) -> dict[str, Tensor]:
    """Every compared pair once, as answers of one token, weighted by how often it was seen."""
    preferred, other = (data.wins > 0).nonzero(as_tuple=True)
    log_p, log_ref = policy.log(), data.reference.double().log()
    return {
        "chosen_logps": log_p[preferred, None],
        "rejected_logps": log_p[other, None],
        "reference_chosen_logps": log_ref[preferred, None],
        "reference_rejected_logps": log_ref[other, None],
        "sample_weight": data.shares[preferred, other],
    }


TABLE = [
    (0.8, 0.1, 0.0, 13.862944), (0.8, 0.1, 0.5, 8.477931), (0.8, 0.1, 1, 4.510053), (0.8, 0.1, 5, 1.744818),
    (0.9, 0.5, 0.2, 4.050506),
]  # fmt: skip


@pytest.mark.parametrize(("p", "beta", "eta", "optimum"), TABLE)
def test_the_gradient_of_rpo_vanishes_at_the_closed_form_optimum(
    p: float, beta: float, eta: float, optimum: float
) -> None:
    def slope(s: float) -> float:
        x = torch.tensor(s, dtype=torch.float64, requires_grad=True)
        policy = torch.stack([torch.sigmoid(x), torch.sigmoid(-x)])
        loss = poise.parse(f"rpo(beta={beta}, eta={eta})")(as_records(policy, two_actions(p)))
        return torch.autograd.grad(loss, x)[0].item()

    assert slope(optimum) == pytest.approx(0, abs=1e-7)
    s = 1.3  # and elsewhere it is beta [sigma(beta s) - p + eta (sigma(s) - p)]
    sigma = [1 / (1 + math.exp(-z)) for z in (beta * s, s)]
    assert slope(s) == pytest.approx(beta * (sigma[0] - p + eta * (sigma[1] - p)), abs=1e-12)


@pytest.mark.parametrize(("p", "beta", "eta", "optimum"), TABLE[1:])
def test_the_solver_of_the_game_finds_the_same_optimum(p: float, beta: float, eta: float, optimum: float) -> None:
    policy = adversarial_policy(two_actions(p), eta, beta).policy
    assert float((policy[0] / policy[1]).log()) == pytest.approx(optimum, abs=1e-6)


def test_a_strong_adversary_leaves_the_supervised_solution() -> None:
    policy = adversarial_policy(two_actions(0.8), eta=1e6, beta=0.1).policy
    assert float((policy[0] / policy[1]).log()) == pytest.approx(math.log(4), abs=1e-4)
    assert adversarial_policy(two_actions(0.8), 1.0, 0.1).policy[0].item() == pytest.approx(0.989122, abs=1e-6)


def problem(k: int, seed: int) -> FinitePreferences:
    g = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 6, (k, k), generator=g).double().fill_diagonal_(0)
    wins[0, 1] += 1
    reference = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    base = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    return FinitePreferences(wins, reference / reference.sum(), base / base.sum())


@given(k=st.integers(2, 5), seed=st.integers(0, 999), eta=st.floats(0.05, 3), beta=st.floats(0.1, 1))
@settings(max_examples=25, deadline=None)
def test_both_orders_of_play_agree_and_the_solution_minimises_the_rpo_loss(
    k: int, seed: int, eta: float, beta: float
) -> None:
    data = problem(k, seed)
    found = adversarial_policy(data, eta, beta)
    assert abs(found.gap) < 1e-6
    # min over policies of the RPO loss, by another road, equals the value of the game less eta beta E_base log pi_ref
    logits = data.reference.double().log().clone().requires_grad_()

    def loss() -> Tensor:
        log_p = logits.log_softmax(-1)
        return data.loss(beta * (log_p - data.reference.double().log())) - eta * beta * (data.baseline * log_p).sum()

    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    constant = eta * beta * float((data.baseline * data.reference.double().log()).sum())
    assert float(loss().detach()) + constant == pytest.approx(found.value, abs=1e-6)
    assert torch.allclose(logits.detach().softmax(-1), found.policy, atol=2e-3)


def test_the_finite_loss_is_that_of_the_terms() -> None:
    data = FinitePreferences(torch.tensor([[0.0, 20, 1], [5, 0, 0], [0, 2, 0]]), torch.tensor([0.49, 0.49, 0.02]))
    policy = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    terms = poise.parse("rpo(beta=0.3, eta=0.7)")(as_records(policy, data))
    ratio = policy.log() - data.reference.double().log()
    finite = data.loss(0.3 * ratio) - 0.7 * 0.3 * (data.baseline * policy.log()).sum()
    assert terms.item() == pytest.approx(finite.item(), abs=1e-12)


@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_no_other_policy_has_a_better_worst_case(seed: int) -> None:
    data = problem(4, seed)
    best = adversarial_policy(data, eta=0.5, beta=0.2)
    other = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert adversarial_value(other / other.sum(), data, 0.5, 0.2) <= best.value + 1e-9


def test_the_worst_case_of_an_answer_that_nobody_compared_is_unbounded() -> None:
    wins = torch.zeros(3, 3)
    wins[0, 1], wins[1, 0] = 4, 1
    data = FinitePreferences(wins, torch.full((3,), 1 / 3))
    assert adversarial_value(torch.tensor([0.7, 0.2, 0.1]), data, eta=1.0, beta=0.1) == -torch.inf
    assert adversarial_value(torch.tensor([0.8, 0.2, 0.0]), data, eta=1.0, beta=0.1) > -torch.inf


def test_a_finite_class_of_rewards_is_searched() -> None:
    data, p = two_actions(0.8), torch.tensor([0.9, 0.1])
    rewards = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 1.0]])
    values = [float(data.game(p, r.double(), 0.5, 0.1)) for r in rewards]
    assert adversarial_value(p, data, 0.5, 0.1, rewards) == pytest.approx(min(values))
    assert adversarial_value(p, data, 0.5, 0.1) <= min(values)


def test_no_adversary_is_dpo_bit_for_bit() -> None:
    q = pairs()
    assert poise.parse("rpo(beta=0.3, eta=0)")(q).equal(poise.parse("dpo(beta=0.3)")(q))


def test_the_gradient_of_both_parts() -> None:
    """-beta [w (grad log pi(chosen) - grad log pi(rejected)) + eta grad log pi(chosen)]."""
    q = pairs()
    leaves = [q[f"{s}_logps"].requires_grad_() for s in ("chosen", "rejected")]
    objective = poise.parse("rpo(beta=0.3, eta=0.2)")
    w = next(iter(objective.terms.values()))(
        *leaves, q["reference_chosen_logps"], q["reference_rejected_logps"]
    ).extras["weight"]
    found = torch.autograd.grad(objective(q), leaves)
    batch = len(w)
    for g, factor, side in zip(found, (-0.3 * (w + 0.2), 0.3 * w), ("chosen", "rejected"), strict=True):
        assert torch.allclose(g, (factor / batch)[:, None] * q[f"{side}_mask"], atol=1e-12)


def test_eta_may_be_scheduled_and_the_baseline_may_be_a_stream() -> None:
    objective = poise.parse("rpo(beta=0.5, eta=linear(0, 1, steps=10), base='samples')")
    assert str(objective) == "dpo(beta=0.5) + 0.5*linear(0, 1, steps=10)*sft(reduction='sum').on('samples')"
    assert "samples" in objective.streams
    held = poise.parse("dpo + constraint(sft(on='chosen', reduction='sum'), upper=12)")
    assert poise.parse(str(held)).equals(held)


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(FormulaError, match="rpo: eta must be at least 0"):
        poise.parse("rpo(eta=-0.1)")
    with pytest.raises(FormulaError, match="rpo: normalize is one of"):
        poise.parse("rpo(normalize='mean')")
    with pytest.raises(InputError, match="eta must be positive"):
        adversarial_policy(two_actions(0.8), eta=0.0, beta=0.1)
    with pytest.raises(InputError, match="at least one comparison"):
        FinitePreferences(torch.zeros(2, 2), torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match="reference is a distribution"):
        FinitePreferences(torch.ones(2, 2), torch.tensor([0.5, 0.6]))
    with pytest.raises(InputError, match="positive probability"):
        FinitePreferences(torch.ones(2, 2), torch.tensor([1.0, 0.0]))


def test_coverage_counts_what_comparisons_know() -> None:
    wins = torch.tensor([[0.0, 20, 0, 0], [5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    base = torch.tensor([20.0, 5, 2, 0]) / 27
    assert preference_coverage(base, wins).coefficient == pytest.approx(0, abs=1e-12)
    rare = preference_coverage(torch.tensor([0.0, 0, 1, 0]), wins)
    assert (rare.unseen, rare.rare) == (0, 1)
    assert rare.coefficient > preference_coverage(torch.tensor([1.0, 0, 0, 0]), wins).coefficient
    assert preference_coverage(torch.tensor([0.5, 0.3, 0.0, 0.2]), wins).coefficient == math.inf
    assert "never compared" in str(rare)
    with pytest.raises(InputError, match="at least one comparison"):
        preference_coverage(base, torch.zeros(4, 4))


def test_the_coverage_coefficient_is_the_largest_ratio_over_errors_of_the_reward() -> None:
    wins = torch.tensor([[0.0, 3, 1], [1, 0, 2], [0, 4, 0]], dtype=torch.float64)
    policy = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    base, shares = wins.sum(1) / wins.sum(), wins / wins.sum()
    errors = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ratio = (errors @ (policy - base)).square() / (shares * (errors[:, :, None] - errors[:, None, :]).square()).sum(
        (1, 2)
    )
    found = preference_coverage(policy, wins).coefficient
    assert ratio.max().item() == pytest.approx(found, rel=1e-3)
    assert ratio.max().item() <= found
