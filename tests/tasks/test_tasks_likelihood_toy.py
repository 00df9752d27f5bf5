"""The toy model of likelihood dynamics: seeds are runs of their own, and the scenarios show what they should."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.tasks.likelihood_toy import SCENARIOS, LikelihoodToy


def test_a_batch_of_seeds_equals_its_seeds_one_by_one() -> None:
    """Up to the order of float sums in batched products."""
    batch = LikelihoodToy("both_on", seeds=3, fit_steps=30).train("dpo(beta=0.1)", steps=20)
    more = LikelihoodToy("both_on", seeds=2, fit_steps=30).train("dpo(beta=0.1)", steps=20)
    torch.testing.assert_close(batch.log_chosen[:, :2], more.log_chosen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_initial_fit_reaches_the_masses_of_the_scenario(scenario: str) -> None:
    toy = LikelihoodToy(scenario, seeds=2, fit_steps=400)
    curves = toy.train("dpo(beta=0.1)", steps=1)
    chosen, rejected = SCENARIOS[scenario]
    assert curves.chosen[0].tolist() == pytest.approx([chosen] * 2, abs=0.01)
    assert curves.rejected[0].tolist() == pytest.approx([rejected] * 2, abs=0.01)
    total = curves.chosen + curves.rejected + curves.unseen
    torch.testing.assert_close(total, torch.ones_like(total))


def test_with_free_logits_the_chosen_answer_only_rises() -> None:
    curves = LikelihoodToy("both_on", seeds=2, tabular=True).train("dpo(beta=0.1)", steps=200)
    assert bool((curves.log_chosen.diff(dim=0) >= 0).all())
    assert not curves.flags().degradation.any()
    assert not curves.flags().dispersion.any()


def test_with_a_network_the_chosen_answer_falls_and_sft_holds_it() -> None:
    toy = LikelihoodToy("both_on", seeds=6, fit_steps=400)
    dpo, held = toy.train("dpo(beta=0.1)", 300), toy.train("dpo(beta=0.1) + 0.1*sft(reduction='sum')", 300)
    assert float(dpo.chosen[-1].mean()) < float(dpo.chosen.mean(1).max()) - 0.1
    assert float(held.chosen[-1].mean()) > 0.99
    assert bool(dpo.flags().drop[-1].all())
    assert bool(dpo.flags().degradation.any())
    assert bool(dpo.flags().dispersion.any())
    assert not held.flags().degradation[-1].any()
    assert int(dpo.steps_until_rejected().max()) < 100


def test_a_reward_model_on_the_same_pairs_is_stable_and_feeds_a_policy_gradient() -> None:
    toy = LikelihoodToy("both_on", seeds=2, fit_steps=200)
    reward = toy.train_reward(steps=100)
    assert float(reward.gradient.max()) < 1
    assert bool((reward.chosen[-1] > reward.rejected[-1]).all())
    policy = toy.train_policy_gradient(reward.scores, steps=50)
    assert float(policy.rejected[-1].mean()) < float(policy.rejected[0].mean())


def test_bad_scenarios_are_refused() -> None:
    with pytest.raises(InputError, match="scenario is one of both_on"):
        LikelihoodToy("on")
    with pytest.raises(InputError, match="add up to less than 1"):
        LikelihoodToy((0.7, 0.4))
