"""Pairs from several sources: best and worst of samples, and the four scenarios."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poise
from poise.data.preference_scenarios import best_and_worst, mix_sources
from poise.errors import InputError, QuantityError
from poise.readouts.pair_scores import PairScores


def sampled() -> dict[str, torch.Tensor]:
    return {
        "response_ids": torch.arange(12).reshape(6, 2),
        "response_mask": torch.ones(6, 2, dtype=torch.bool),
        "reference_response_logps": -torch.arange(12.0).reshape(6, 2),
        "reward": torch.tensor([1.0, 3.0, 5.0, 0.0, 2.0, 2.0]),
        "group": torch.tensor([4, 9, 4, 9, 7, 7]),
    }


def test_the_best_and_the_worst_answer_of_each_prompt_are_a_pair() -> None:
    pairs = best_and_worst(sampled())
    assert pairs["group"].tolist() == [4, 9]
    assert pairs["chosen_ids"].tolist() == [[4, 5], [2, 3]]
    assert pairs["rejected_ids"].tolist() == [[0, 1], [6, 7]]
    assert pairs["reward_gap"].tolist() == [4.0, 3.0]
    assert pairs["reference_chosen_logps"].tolist() == [[-4.0, -5.0], [-2.0, -3.0]]


@pytest.mark.parametrize("chosen", ["on", "off"])
@pytest.mark.parametrize("rejected", ["on", "off"])
def test_the_four_scenarios_have_the_same_prompts(chosen: str, rejected: str) -> None:
    own = {
        "group": torch.tensor([9, 4, 1]),
        "chosen_ids": torch.tensor([[9], [4], [1]]),
        "rejected_ids": torch.tensor([[-9], [-4], [-1]]),
    }
    others = {
        "group": torch.tensor([4, 9, 2]),
        "chosen_ids": torch.tensor([[40], [90], [20]]),
        "rejected_ids": torch.tensor([[-40], [-90], [-20]]),
    }
    mixed = mix_sources(own, others, chosen=chosen, rejected=rejected)
    assert mixed["group"].tolist() == [4, 9]
    assert mixed["chosen_ids"].flatten().tolist() == ([4, 9] if chosen == "on" else [40, 90])
    assert mixed["rejected_ids"].flatten().tolist() == ([-4, -9] if rejected == "on" else [-40, -90])


def test_what_cannot_be_mixed_is_refused() -> None:
    one = {"group": torch.tensor([1]), "chosen_ids": torch.zeros(1, 1), "rejected_ids": torch.zeros(1, 1)}
    with pytest.raises(InputError, match="chosen is 'on' or 'off'"):
        mix_sources(one, one, chosen="mine")
    with pytest.raises(InputError, match="off_policy needs 'group'"):
        mix_sources(one, {"chosen_ids": torch.zeros(1, 1)})
    with pytest.raises(InputError, match="several pairs for one prompt"):
        mix_sources({**one, "group": torch.tensor([1, 1])}, one)
    with pytest.raises(InputError, match="no prompt is in both"):
        mix_sources(one, {**one, "group": torch.tensor([2])})
    with pytest.raises(InputError, match="best_and_worst reads"):
        best_and_worst({"reward": torch.zeros(2)})
    with pytest.raises(InputError, match="no prompt has answers of different rewards"):
        best_and_worst({**sampled(), "reward": torch.zeros(6)})


class Scorer(nn.Module):
    """A reward for each token, summed over the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.reward = nn.Embedding(12, 1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.reward(ids)[..., 0] * mask).sum(1)


def test_a_reward_model_learns_the_pairs() -> None:
    pairs = best_and_worst(sampled())
    model = Scorer()
    run = poise.fit(model, "bradley_terry", pairs, readout=PairScores(), lr=0.5, steps=60, device="cpu")
    assert run.history["loss"][-1] < 0.2
    uneven = {**pairs, "rejected_ids": pairs["rejected_ids"][:, :1], "rejected_mask": pairs["rejected_mask"][:, :1]}
    poise.fit(model, "bradley_terry", uneven, readout=PairScores(), lr=0.1, steps=1, device="cpu")
    with pytest.raises(QuantityError, match="lacks chosen_mask"):
        poise.fit(
            model,
            "bradley_terry",
            {"chosen_ids": pairs["chosen_ids"], "rejected_ids": pairs["rejected_ids"]},
            readout=PairScores(),
            steps=1,
        )
