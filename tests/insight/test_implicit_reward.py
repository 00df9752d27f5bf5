"""Readings of logits as rewards and values, their link to DPO, and the learning-rate study."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from poise.errors import InputError, QuantityError
from poise.formula import parse
from poise.insight.implicit_reward import (
    advantages,
    implicit_reward,
    q_values,
    sft_learning_rate_study,
    token_rewards,
    value,
    value_correlation,
)
from poise.readouts.tokens import TokenReadout
from poise.tasks.finite_space import FiniteSpace

ONE = torch.float64


def test_q_less_v_is_the_log_policy() -> None:
    logits = torch.randn(3, 5, dtype=ONE, generator=torch.Generator().manual_seed(0))
    beta = 0.3
    torch.testing.assert_close(q_values(logits, beta) - value(logits, beta)[:, None], beta * logits.log_softmax(-1))
    torch.testing.assert_close(advantages(logits, beta), beta * logits.log_softmax(-1))


def test_differences_of_implicit_rewards_are_dpo_margins() -> None:
    g = torch.Generator().manual_seed(1)
    chosen, rejected, of_chosen, of_rejected = (-torch.rand(4, 6, generator=g, dtype=ONE) for _ in range(4))
    term = parse("dpo(beta=0.3)").terms["dpo"]
    margin = term(chosen, rejected, of_chosen, of_rejected).extras["margin"]
    rewards = [implicit_reward(x, y, 0.3, level="sequence") for x, y in ((chosen, of_chosen), (rejected, of_rejected))]
    torch.testing.assert_close(rewards[0] - rewards[1], margin)


def test_a_fine_tuned_policy_is_the_posterior_of_its_own_reward() -> None:
    """SFT and DPO search one family: tilting the reference by the implicit reward gives the policy back, and DPO has nothing to add."""
    space = FiniteSpace([0.5, 0.3, 0.2])
    tuned = space.minimize("sft(reduction='sum')", space.responses_of(torch.tensor([[0.2, 0.2, 0.6]], dtype=ONE)))
    beta = 0.4
    reward = implicit_reward(tuned.logps, space.prior_logps, beta)
    again = FiniteSpace(space.prior, reward)
    torch.testing.assert_close(again.posterior(beta), tuned.logps)
    problem = again.problem(f"dpo(beta={beta})", again.pairs(), again.policy(tuned.logps))
    assert float(problem.gradient()["logits"].abs().max()) < 1e-9


def test_token_rewards_telescope() -> None:
    g = torch.Generator().manual_seed(2)
    logits, reference = (torch.randn(2, 5, 4, generator=g, dtype=ONE) for _ in range(2))
    ids = torch.randint(4, (2, 5), generator=g)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    rewards = token_rewards(logits, reference, ids, mask, 0.5)
    ratio = (logits.log_softmax(-1) - reference.log_softmax(-1)).gather(-1, ids[..., None])[..., 0]
    start = value(logits, 0.5)[[0, 1], [1, 2]]
    torch.testing.assert_close(rewards.sum(-1) - start, 0.5 * (ratio * mask).sum(-1))
    assert not rewards[~mask].any()


def test_value_correlation_is_spearman_by_position_and_overall() -> None:
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]]).bool()
    values = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 0.0], [4.0, 3.0]])
    found = value_correlation(values, torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert found.by_position == pytest.approx((1.0, -1.0))
    assert -1 < found.overall < 1


def test_bad_input_is_refused_by_name() -> None:
    one, two = torch.zeros(1, 2), torch.zeros(1, 3)
    with pytest.raises(InputError, match="beta must be positive"):
        implicit_reward(one, one, 0.0)
    with pytest.raises(InputError, match="beta must be positive"):
        value(one, -1.0)
    with pytest.raises(InputError, match="level is 'token' or 'sequence'"):
        implicit_reward(one, one, level="word")
    with pytest.raises(InputError, match="belongs to a whole answer"):
        implicit_reward(one, one, log_z=1.0)
    with pytest.raises(QuantityError, match="same answers"):
        implicit_reward(one, two)
    with pytest.raises(QuantityError, match="one vocabulary"):
        token_rewards(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2).long(), torch.ones(1, 2).bool())
    with pytest.raises(QuantityError, match="values and mask are"):
        value_correlation(one, torch.zeros(2), torch.ones(1, 2).bool())
    with pytest.raises(InputError, match="rates are positive"):
        sft_learning_rate_study(nn.Linear(1, 1), (), {}, {})


def test_the_study_travels_further_with_a_larger_rate_and_leaves_the_model_alone() -> None:
    space = FiniteSpace([[0.4, 0.3, 0.3], [0.2, 0.5, 0.3]], [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], dtype=torch.float32)
    model = space.policy()
    before = copy.deepcopy(model.state_dict())
    data, pairs = space.responses_of(), {k: v for k, v in space.pairs().items() if k != "sample_weight"}
    good = {name: column[data["reward"] == 2] for name, column in data.items()}
    better = (
        space.reward[pairs["group"], pairs["chosen_ids"][:, 1]]
        > space.reward[pairs["group"], pairs["rejected_ids"][:, 1]]
    )
    study = sft_learning_rate_study(
        model, (0.01, 0.1, 1.0), good, {name: column[better] for name, column in pairs.items()},
        readout=lambda reference: TokenReadout(reference), sft_steps=10, preference_steps=20, preference_rate=0.05, device="cpu",
        evaluate=lambda m: {"reward": float(space.expectation(m.logps.detach(), space.reward).mean())},
    )  # fmt: skip
    kls = [row.kl for row in study.rows]
    assert kls == sorted(kls)
    assert all(row.after_preference["reward"] > row.after_sft["reward"] for row in study.rows)
    assert study.best("reward", "sft").rate == 1.0
    assert "reward_accuracy" in str(study)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(InputError, match="no metric 'wins'"):
        study.best("wins")
