"""The exact flows of both divergences, the meter that tells them apart, and the planner."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import InputError
from poise.insight.mode_seeking import (
    flow,
    flow_steps,
    forward_kl_step,
    mode_seeking,
    preference_statistics,
    recommend,
    reverse_kl_step,
    tilted,
)
from poise.tasks.bandit_arms import BanditArms


def distributions(bins: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, bins, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_identities_are_the_gradients_of_both_divergences(seed: int) -> None:
    logits, q = distributions(seed=seed)
    log_p = logits.log_softmax(-1)
    forward = (q * (q.log() - log_p)).sum()
    reverse = (log_p.exp() * (log_p - q.log())).sum()
    down = {"rtol": 1e-6, "atol": 1e-12}
    expected = -torch.autograd.grad(forward, logits, retain_graph=True)[0]
    torch.testing.assert_close(forward_kl_step(logits, q, 0.3), 0.3 * expected, **down)
    expected = -torch.autograd.grad(reverse, logits)[0]
    torch.testing.assert_close(reverse_kl_step(logits, q, 0.3), 0.3 * expected, **down)


@pytest.mark.parametrize("seed", range(5))
def test_a_forward_step_is_bounded_and_a_reverse_one_is_not(seed: int) -> None:
    logits, q = distributions(seed=seed)
    assert float(forward_kl_step(logits.detach(), q).abs().max()) <= 1
    point = torch.tensor([30.0, 0.0], dtype=torch.float64)
    assert float(reverse_kl_step(point / 3, torch.tensor([1e-30, 1 - 1e-30], dtype=torch.float64)).abs().max()) > 0
    # heavy on the wrong bin: p (1 - p) log-ratio exceeds the bound of the other flow
    heavy = torch.tensor([0.0, 0.0], dtype=torch.float64)
    target = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    assert float(reverse_kl_step(heavy, target).abs().max()) > 1 > float(forward_kl_step(heavy, target).abs().max())


@pytest.mark.parametrize(
    ("peak", "beta", "forward", "reverse"),
    [("far", 0.1, 138, 68), ("near", 0.1, 75, 20), ("near", 0.2, 85, 44), ("far", 0.2, 138, 186)],
)
def test_the_flows_on_the_bandit_take_the_computed_number_of_steps(
    peak: str, beta: float, forward: int, reverse: int
) -> None:
    bandit = BanditArms(peak)
    target = tilted(bandit.reference, bandit.rewards, beta)
    assert flow_steps(target, bandit.reference, "forward", bandit.rewards) == forward
    assert flow_steps(target, bandit.reference, "reverse", bandit.rewards) == reverse


def test_a_flow_that_does_not_arrive_says_so() -> None:
    bandit = BanditArms("far")
    target = tilted(bandit.reference, bandit.rewards, 0.1)
    assert flow_steps(target, bandit.reference, "reverse", bandit.rewards, most=10) is None


@pytest.mark.parametrize(("direction", "score"), [("forward", 0.0), ("reverse", 1.0)])
@pytest.mark.parametrize("peak", ["far", "near"])
def test_the_meter_recognises_a_step_of_each_flow(direction: str, score: float, peak: str) -> None:
    bandit = BanditArms(peak)
    target = tilted(bandit.reference, bandit.rewards, 0.1)
    path = flow(target, bandit.reference, direction, steps=1)
    found = mode_seeking(path[0], path[1], target)
    assert found.score == pytest.approx(score, abs=1e-6)
    assert getattr(found, direction) == pytest.approx(1.0, abs=1e-6)
    assert ("mode-seeking" in str(found)) == (direction == "reverse")


def test_the_meter_refuses_what_has_no_direction() -> None:
    p = torch.tensor([0.4, 0.6])
    with pytest.raises(InputError, match="Nothing changed"):
        mode_seeking(p, p, torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match="no probability may be 0"):
        mode_seeking(p, torch.tensor([0.0, 1.0]), p)
    with pytest.raises(InputError, match="at its target already"):
        mode_seeking(p, torch.tensor([0.3, 0.7]), p)
    with pytest.raises(InputError, match="'forward' or 'reverse'"):
        flow(p, p, "sideways", 1)
    with pytest.raises(InputError, match="beta must be positive"):
        tilted(p, p, 0.0)


# ---- winners and losers ---------------------------------------------------------------------------------------------


def test_the_statistics_are_of_the_best_and_the_worst_answer_where_they_differ() -> None:
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    rewards = torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    found = preference_statistics(logps, rewards, logps + torch.tensor([0.5, 0.25, 0.0]))
    assert (found.winners, found.losers) == (-2.0, -1.0)
    assert (found.winners_gain, found.losers_gain, found.margin) == (-0.25, -0.5, 0.25)
    assert found.both_fall
    assert preference_statistics(logps, rewards).margin == -1.0
    with pytest.raises(InputError, match="neither winners nor losers"):
        preference_statistics(logps[1:], rewards[1:])
    with pytest.raises(InputError, match="alike"):
        preference_statistics(logps, rewards[:1])


# ---- the planner ----------------------------------------------------------------------------------------------------


def test_the_planner_knows_the_two_bandits() -> None:
    """Exact: what is wanted are the bins within one width of the peak."""
    answers = {}
    for peak in ("far", "near"):
        bandit = BanditArms(peak)
        wanted = bandit.rewards[bandit.rewards >= math.exp(-1) - 1e-12]
        answers[peak] = recommend(
            reference_rewards=bandit.rewards,
            preferred_rewards=wanted.min()[None] - 1e-12,
            probabilities=bandit.reference,
        )
    assert answers["far"].coverage == pytest.approx(0.0457, abs=1e-4)
    assert answers["far"].on_policy
    assert answers["far"].negative_gradient
    assert answers["near"].answer == "offline data are enough"
    assert "sample on-policy" in str(answers["far"])


def test_the_planner_answers_from_samples_and_from_preferences_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    own = -20 + torch.randn(500, generator=generator)
    assert recommend(reference_logps=own, preferred_logps=own + 0.1).answer == "offline data are enough"
    unlikely = recommend(reference_logps=own, preferred_logps=own - 10)
    assert unlikely.on_policy
    assert unlikely.overlap == pytest.approx(0.0, abs=0.01)
    assert unlikely.coverage is None
    rewards = torch.rand(1000, generator=generator)
    assert not recommend(reference_rewards=rewards, samples=16).on_policy  # a tenth of the answers are near the best
    with pytest.raises(InputError, match="nothing can be said"):
        recommend(reference_logps=own)
    with pytest.raises(InputError, match="probabilities are of the bins"):
        recommend(reference_rewards=rewards, probabilities=torch.ones(3) / 3)
