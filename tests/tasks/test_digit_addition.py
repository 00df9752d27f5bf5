"""Additions: spelling, verifiable rewards, the prior, and policy gradients on several rewards."""

from __future__ import annotations

import pytest
import torch

import poise
from poise.errors import InputError
from poise.readouts.on_policy import OnPolicy
from poise.tasks.digit_addition import (
    LONGEST,
    PROMPT,
    RunningConciseness,
    addition_prompts,
    additions,
    answer,
    fit_addition,
    measure_additions,
    read,
    score_additions,
    spell,
)
from poise.tasks.words import WordReadout, mask_of


def scored(texts: list[str], totals: list[int]) -> dict[str, list[float]]:
    ids = spell(texts)
    batch = {"response_ids": ids, "response_mask": mask_of(ids), "total": torch.tensor(totals)}
    return {name: column.tolist() for name, column in score_additions(batch).items()}


def test_additions_are_spelt_and_read_back() -> None:
    texts = additions(200, seed=1)
    assert read(spell(texts)) == texts
    with pytest.raises(InputError, match="these have '-a'"):
        spell(["3-a"])


def test_prompts_are_all_sums_of_two_digits() -> None:
    prompts = addition_prompts()
    assert read(prompts["prompt_ids"])[38] == "3+8="
    assert int(prompts["total"][38]) == 11
    assert len(prompts["total"]) == 100


def test_the_last_number_decides_accuracy_and_only_a_worked_answer_has_the_format() -> None:
    texts = ["3+4=7", "3+4=[7]", "3+4=3.4.[7]", "3+4=3.4.7", "3+4=8", "3+4=", "3+4=7]", "3+4=3.4.[8]", "3+4=77"]
    found = scored(texts, [7] * len(texts))
    assert found["accuracy"] == [1, 1, 1, 1, 0, 0, 1, 0, 0]
    assert found["format"] == [0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert found["length"] == [2, 4, 8, 6, 2, 1, 3, 8, 3]
    assert found["brevity"][0] == 1.0
    assert found["brevity"][2] == pytest.approx(1 - 6 / (LONGEST - 2))


def test_conciseness_compares_with_the_mean_of_all_answers_so_far_and_resumes() -> None:
    conciseness = RunningConciseness(lambda batch: {"length": batch["length"], "accuracy": batch["length"] * 0})
    assert conciseness({"length": torch.tensor([2.0, 4.0])})["brevity"].tolist() == [1.0, 0.0]
    other = RunningConciseness(conciseness.score)
    other.load_state_dict(conciseness.state_dict())
    assert other({"length": torch.tensor([5.0, 2.0])})["brevity"].tolist() == [0.0, 1.0]
    assert other.state_dict() == {"total": 13.0, "answers": 4}


def test_a_prior_answers_in_the_ways_of_its_corpus_and_several_rewards_train_it() -> None:
    model = fit_addition(seed=0, hidden=32, steps=60)
    before = measure_additions(model, seed=0)
    assert before["length"] <= LONGEST
    prompts = addition_prompts()
    drawn = answer(model, prompts, torch.Generator().manual_seed(0))
    assert not bool(drawn["response_mask"][:, :PROMPT].any())
    stream = OnPolicy(prompts, answer, score_additions, samples=4, batch_size=16)
    reward = "0.5*score.on(reward='brevity').named('brevity') + 0.5*score.on(reward='accuracy').named('accuracy')"
    poise.fit(
        model, f"grpo(reward={reward})", {"main": stream}, readout=WordReadout(), solver="adam", lr=3e-3, clip=1.0, steps=25,
        device="cpu",
    )  # fmt: skip
    assert measure_additions(model, seed=0)["brevity"] > before["brevity"]
