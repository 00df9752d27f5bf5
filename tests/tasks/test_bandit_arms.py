"""The bandits are the paper's, their agents share nothing between seeds, and lengths have the probabilities they say."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.readouts.on_policy import Choices, collect, pairs_from_rewards
from poise.recipes.preference_loop import preference_loop
from poise.tasks.bandit_arms import (
    BanditArms,
    LearnedReward,
    LengthAgent,
    LengthTask,
    NetworkAgent,
    SequenceAgent,
    SequenceBandit,
    TabularAgent,
    draw_arms,
    draw_sequences,
    squashed_cauchy,
)


def test_the_data_distribution_has_the_papers_masses() -> None:
    p = squashed_cauchy()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert float(p.min()) > 0
    assert int(p.argmax()) == 0
    assert float(p[60:81].sum()) == pytest.approx(0.0457, abs=5e-5)
    for peak, expected in (("far", 0.0390), ("near", 0.3772)):
        bandit = BanditArms(peak)
        assert float((p * bandit.rewards).sum()) == pytest.approx(expected, abs=5e-5)


def test_the_distribution_is_that_of_the_squashed_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tanh(-0.7 + 0.4 * torch.empty(200_000).cauchy_(generator=generator))
    share = torch.histc(draws, 100, -1, 1) / 200_000
    torch.testing.assert_close(share.double(), squashed_cauchy(), rtol=0, atol=0.002)


def test_widths_and_peaks_of_your_own() -> None:
    assert float(BanditArms("wide").rewards[90]) == pytest.approx(float(torch.exp(torch.tensor(-1.0))), abs=1e-6)
    assert int(BanditArms((33.0, 5.0)).rewards.argmax()) == 33
    with pytest.raises(InputError, match="peak is one of far, near"):
        BanditArms("middle")


def test_the_report_of_the_data_is_the_data() -> None:
    bandit = BanditArms("far")
    (found,) = bandit.report(TabularAgent(bandit.reference))
    assert found.reward == pytest.approx(0.0390, abs=1e-4)
    assert found.forward_kl == pytest.approx(0, abs=1e-6)
    assert found.reverse_kl == pytest.approx(0, abs=1e-6)


def test_networks_of_several_seeds_are_several_networks() -> None:
    bandit = BanditArms("far")
    contexts = bandit.contexts(states=3, seeds=2, width=8)
    both = NetworkAgent(contexts, feature=6, hidden=7).fit_to(bandit.reference, steps=5)
    one = NetworkAgent(contexts[1:], feature=6, hidden=7)
    fresh = NetworkAgent(contexts, feature=6, hidden=7)
    with torch.no_grad():
        for own, joint in zip(one.parameters(), fresh.parameters(), strict=True):
            own.copy_(joint[1:])
    one.fit_to(bandit.reference, steps=5)
    torch.testing.assert_close(both.table()[3:], one.table(), rtol=1e-4, atol=1e-5)
    assert both(torch.tensor([0, 4])).shape == (2, 100)
    torch.testing.assert_close(both(None), both.table())


def test_the_network_starts_at_the_data() -> None:
    bandit = BanditArms("near")
    agent = NetworkAgent(bandit.contexts(states=10, seeds=2)).fit_to(bandit.reference)
    for found in bandit.report(agent, 2):
        assert found.reverse_kl < 0.02
        assert found.reward == pytest.approx(0.377, abs=0.03)


def test_a_rate_of_its_own_is_a_learning_rate_of_the_cell() -> None:
    bandit = BanditArms("near")
    agent = TabularAgent(bandit.reference, 2, rates=torch.tensor([1.0, 4.0]))
    agent.table()[:, 20].sum().backward()
    with torch.no_grad():
        agent.w -= agent.w.grad
    moved = agent.table()[:, 20] - agent.start[20]
    torch.testing.assert_close(moved, torch.tensor([-1.0, -4.0]), rtol=1e-5, atol=1e-5)


def test_the_sequence_agent_gives_each_choice_the_probability_it_was_drawn_with() -> None:
    agent = SequenceAgent(arms=12, length=4, width=12, heads=2, layers=1).eval()
    with torch.no_grad():
        out = draw_sequences(agent, {"input": torch.zeros(16, dtype=torch.int64)}, torch.Generator().manual_seed(0))
        again = agent(out["response_ids"]).log_softmax(-1).gather(-1, out["response_ids"][..., None]).squeeze(-1)
    torch.testing.assert_close(out["behaviour_logps"], again, rtol=1e-4, atol=1e-5)


def test_the_sequence_bandit_is_learned_on_policy() -> None:
    bandit = SequenceBandit((9.0, 2.0), arms=12, length=4)
    agent = SequenceAgent(arms=12, length=4, width=12, heads=2, layers=1).fit_to(bandit.one_step.reference, steps=60)
    data = collect(agent, 1, draw_sequences, bandit.score, samples=256)
    loop = preference_loop(
        agent, None, draw_sequences, bandit.score, "grpo + 0.01*sampled_kl", prompts=8,
        readout=lambda reference: Choices(reference, sequences=True), samples=8, batch=8, reuse=2, budget=2560, solver="adamw",
        lr=3e-3, device="cpu",
    )  # fmt: skip
    after = collect(agent, 1, draw_sequences, bandit.score, samples=256)
    assert loop.queries == 2560
    assert float(after["reward"].mean()) > float(data["reward"].mean()) + 0.2


@pytest.mark.parametrize("kind", ["min", "mode", "skew"])
def test_lengths_are_drawn_with_the_probabilities_of_the_data(kind: str) -> None:
    task = LengthTask(kind, target=6)
    assert float(task.reference.sum()) == pytest.approx(1, abs=1e-9)
    agent = LengthAgent(task.reference)
    torch.testing.assert_close(agent.lengths().double(), task.reference, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        out = task.draw(agent, {"input": torch.zeros(20_000, dtype=torch.int64)}, torch.Generator().manual_seed(0))
    length = out["response_mask"].sum(1)
    share = torch.bincount(length, minlength=25)[1:] / 20_000
    assert float((share - task.reference).abs().max()) < 0.015
    torch.testing.assert_close(out["behaviour_logps"].sum(1).exp(), agent.lengths()[length - 1], rtol=1e-3, atol=1e-6)


def test_the_three_lengths_differ_in_where_the_best_answer_lies() -> None:
    coverage = {}
    for kind in ("min", "mode", "skew"):
        task = LengthTask(kind)
        best = task.rewards >= task.rewards.max() - 0.25
        coverage[kind] = float(task.reference[best].sum())
    assert coverage["min"] < 0.02 < coverage["skew"]
    assert coverage["mode"] > 0.4
    assert int(LengthTask("mode").reference.argmax()) == 19  # length 20
    with pytest.raises(InputError, match="kind is 'min', 'mode' or 'skew'"):
        LengthTask("max")
    with pytest.raises(InputError, match="at least 2 words"):
        LengthTask("min", target=1)


def test_a_length_is_learned_from_its_reward() -> None:
    task = LengthTask("min", target=6)
    agent = LengthAgent(task.reference)
    before = float((agent.lengths().detach().double() * task.rewards).sum())
    preference_loop(
        agent, None, task.draw, task.score, "rloo(clip=None)", prompts=16,
        readout=lambda reference: Choices(reference, sequences=True), samples=8, batch=16, steps=40, lr=2.0, device="cpu",
    )  # fmt: skip
    assert float((agent.lengths().double() * task.rewards).sum().detach()) > before + 0.3


def test_arms_of_a_model_without_a_table_are_drawn_too() -> None:
    model = torch.nn.Linear(2, 3)
    with torch.no_grad():
        out = draw_arms(model, {"input": torch.ones(5, 2)}, torch.Generator().manual_seed(0))
        expected = model(torch.ones(5, 2)).log_softmax(-1).gather(1, out["response_ids"])
    torch.testing.assert_close(out["behaviour_logps"], expected)


def test_a_learned_reward_orders_lengths_as_the_true_one() -> None:
    task = LengthTask("mode", target=6)
    agent = LengthAgent(task.reference)
    answers = collect(agent, 64, task.draw, task.score, samples=4)
    learned = LearnedReward(longest=24).learn(answers, samples=4, steps=100)
    with torch.no_grad():
        held_out = collect(agent, 64, task.draw, learned.both(task), samples=4, seed=1)
    pairs = pairs_from_rewards(held_out["true_reward"].view(-1, 4))
    scores = held_out["reward"].view(-1, 4)
    right = scores[pairs.prompt, pairs.winner] > scores[pairs.prompt, pairs.loser]
    assert float(right.double().mean()) > 0.85
    with pytest.raises(InputError, match="no preferences to learn from"):
        learned.learn({**answers, "reward": torch.zeros(256)}, samples=4)
