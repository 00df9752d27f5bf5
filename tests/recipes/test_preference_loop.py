"""The loop: which data a loss gets, what it costs, what it records, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import poise
from poise.errors import InputError
from poise.readouts.on_policy import Choices, collect
from poise.recipes import pairs_from_rewards, preference_loop
from poise.tasks.bandit_arms import BanditArms, TabularAgent, draw_arms

BANDIT = BanditArms("near")


def loop(loss: str, **options):
    agent = options.pop("agent", TabularAgent(BANDIT.reference, 2))
    settings = {
        "prompts": 2,
        "readout": Choices,
        "samples": 4,
        "batch": 2,
        "steps": 4,
        "lr": 0.5,
        "device": "cpu",
        **options,
    }
    return agent, preference_loop(agent, None, draw_arms, BANDIT.score, loss, **settings)


@pytest.mark.parametrize(
    "loss",
    [
        "best_of_n",
        "best_of_n(negative='worst', constrained=True)",
        "reward_weighted",
        "reinforce",
        "reinforce(baseline='running')",
        "reinforce(negative=False)",
        "ppo_clip",
        "grpo + 0.04*sampled_kl",
        "rloo",
        "sft",
        "dpo(beta=0.1)",
        "ipo",
        "dpo(beta=0.1) + 0.2*sft",
        "rloo + 0.1*token_kl(on='response', direction='reverse')",
    ],
)
def test_every_loss_runs_on_policy_offline_and_mixed_with_reuse(loss: str) -> None:
    for on_policy in (1.0, 0.5, 0.0):
        _, done = loop(loss, on_policy=on_policy, reuse=2)
        assert done.gradient_steps == 4
        assert done.queries == {1.0: 16, 0.5: 8 + 8, 0.0: 8}[on_policy]


def test_the_loop_is_one_fit_with_its_seed() -> None:
    first, again, other = (loop("rloo", seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(first.w, again.w)
    assert not torch.equal(first.w, other.w)


def test_winners_and_losers_are_recorded_beside_the_curves() -> None:
    _, done = loop("best_of_n(negative='worst')", steps=30, samples=8, watch=10, lr=0.05)
    history = done.run.history
    assert history.steps("preference/margin") == [10, 20, 30]
    assert history["preference/margin"][-1] > 0
    assert "mean reward" in str(done)
    assert "term/best_of_n" in history


def test_offline_dpo_lowers_winners_and_losers_while_its_margin_grows_and_fresh_samples_raise_the_winners() -> None:
    """The known complaint about DPO, and what cures it: the reward peaks where the data are rare."""
    far, found = BanditArms("far"), {}
    for on_policy in (0.0, 1.0):
        agent = TabularAgent(far.reference, 5)
        done = preference_loop(
            agent, None, draw_arms, far.score, "dpo(beta=0.1)", prompts={"input": torch.arange(5).repeat_interleave(16)},
            readout=Choices, samples=8, batch=80, on_policy=on_policy, offline_groups=4, threshold=0.01, shuffle=False, steps=100,
            lr=15.0, watch=25, device="cpu",
        )  # fmt: skip
        found[on_policy] = {n: done.run.history[f"preference/{n}"] for n in ("winners_gain", "losers_gain", "margin")}
    offline, fresh = found[0.0], found[1.0]
    assert offline["margin"][-1] > offline["margin"][0] > 0
    assert offline["winners_gain"][-1] < 0
    assert offline["losers_gain"][-1] < 0
    assert fresh["winners_gain"][-1] > fresh["winners_gain"][0] > 0


def test_the_budget_ends_the_loop() -> None:
    _, done = loop("rloo", steps=None, budget=30, reuse=3)
    assert (done.queries, done.gradient_steps) == (24, 9)


def test_ties_are_skipped_and_counted() -> None:
    agent = TabularAgent(BANDIT.reference, 2)
    done = preference_loop(
        agent,
        None,
        draw_arms,
        lambda b: torch.zeros(len(b["input"])),
        "dpo",
        prompts=2,
        readout=Choices,
        samples=4,
        steps=3,
        lr=1.0,
    )
    assert done.tied == 6
    assert "6 groups tied" in str(done)
    assert float(agent.w.detach().abs().max()) == 0


def test_a_loss_that_compares_answers_needs_two_of_them() -> None:
    for loss in ("dpo", "best_of_n", "grpo", "rloo"):
        with pytest.raises(InputError, match="compares the answers to a prompt, and samples is 1"):
            loop(loss, samples=1)
    loop("reward_weighted", samples=1)


def test_offline_answers_without_their_samplers_log_probabilities_are_refused_where_a_ratio_is_asked() -> None:
    data = collect(TabularAgent(BANDIT.reference, 2), 2, draw_arms, BANDIT.score, samples=4)
    del data["behaviour_logps"]
    with pytest.raises(InputError, match="offline data lack 'behaviour_logps'"):
        loop("ppo_clip", on_policy=0.0, offline=data)
    loop("reinforce", on_policy=0.0, offline=data)


def test_a_loop_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="give budget="):
        loop("rloo", steps=None)


def test_pairs_have_one_home() -> None:
    assert len(pairs_from_rewards(torch.tensor([[0.0, 1.0]]))) == 1
    assert poise.OnPolicy is poise.readouts.OnPolicy
