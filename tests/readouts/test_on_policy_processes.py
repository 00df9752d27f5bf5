"""An on-policy run on two real processes equals that of one: groups stay whole, and every process draws the same round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import poise
from poise.readouts.on_policy import Choices, OnPolicy
from poise.tasks.bandit_arms import BanditArms, TabularAgent, draw_arms
from two_processes import on_two


def train(formula: str, pairs: float | None, accumulate: int) -> dict[str, torch.Tensor]:
    bandit = BanditArms("near")
    agent = TabularAgent(bandit.reference, 5)
    # Rounds of 3 and 2 prompts: in the second one, some micro-batch of some process has no group of its own.
    stream = OnPolicy(5, draw_arms, bandit.score, samples=4, reuse=2, pairs=pairs, batch_size=3)
    reference = poise.FrozenModel(agent)
    poise.fit(
        agent,
        formula,
        {"main": stream},
        readout=Choices(reference),
        steps=8,
        lr=1.0,
        accumulate=accumulate,
        device="cpu",
    )
    return {"w": agent.w.detach(), "queries": torch.tensor(stream.queries)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("formula", "pairs"), [("grpo + 0.1*sampled_kl", None), ("best_of_n(negative='mean')", None), ("dpo", 0.0)]
)
def test_two_processes_train_as_one(tmp_path: Path, formula: str, pairs: float | None) -> None:
    one = train(formula, pairs, 1)
    for state in on_two(train, tmp_path, formula, pairs, 2):
        assert not isinstance(state, str), state
        torch.testing.assert_close(state["w"], one["w"], rtol=1e-4, atol=1e-6)
        assert int(state["queries"]) == int(one["queries"])
