"""The claim of paper 20: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.claims.p20 import CLAIM, TOY, ToyResult, WordResult, _judge
from poise.tasks.likelihood_toy import SCENARIOS

FALLS = ToyResult(0.5, 0.0, 0.5, 0.9, (1.0, 0.9, 0.8), 12)
HELD = ToyResult(0.9, 0.0, 0.1, 0.9, (1.0, 0.1, 0.0), 12)
WORDS = WordResult(-10.0, -28.0, -20.0, 0.9999, 0.995, 4.2, 0.92, 0.006, "shared parameters")


def toy(**changes: ToyResult) -> dict[str, dict[str, ToyResult]]:
    results = {name: FALLS if name == "DPO" else HELD for name in TOY} | changes
    return {s: {**results, "DPO": replace(results["DPO"], chosen=0.5 if s == "both_on" else 0.3)} for s in SCENARIOS}


def judge(table: dict[str, dict[str, ToyResult]], words: WordResult = WORDS) -> object:
    lm = {"DPO": words, "Flex .02": replace(WORDS, chosen=1.0), "DPO + sft": replace(WORDS, chosen=0.7)}
    return _judge(table, dict.fromkeys(SCENARIOS, 0.5), lm, (0.99, 0.004))


def test_the_claim_holds_where_all_three_appear_and_the_remedies_help() -> None:
    finding = judge(toy())
    assert finding.verdict == "holds"
    assert "3.85" in finding.measured
    assert "-KL" in finding.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"DPO": replace(FALLS, flags=(1.0, 0.1, 0.8))}, "some D never shows"),
        ({"Flex .02": replace(HELD, chosen=0.5)}, "Flex-DPO does not raise"),
        ({"DPO + sft": replace(HELD, chosen=0.5)}, "sft does not raise"),
    ],
)
def test_each_part_of_the_toy_can_contradict_it(changes: dict[str, ToyResult], reason: str) -> None:
    finding = judge(toy(**changes))
    assert finding.verdict == "fails"
    assert reason in finding.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"chosen": -0.5}, "do not fall by 1 nat"), ({"unseen": 0.99}, "in no pair does not rise")],
)
def test_words_can_contradict_it(changes: dict[str, float], reason: str) -> None:
    finding = judge(toy(), replace(WORDS, **changes))
    assert finding.verdict == "fails"
    assert reason in finding.reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
