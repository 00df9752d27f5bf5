"""The claim of paper 6: how it judges, that its texts and policy are what it says, and that its study runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from poise.claims import p06
from poise.claims.p06 import CLAIM, LENGTH, R3, RANDOM, RELEVANCE, VARIETY, Checkpoint, Policy, Vocabulary, _judge
from poise.insight.reward_audit import RewardAudit

START = Checkpoint(copied=0.1, tokens=18, unique=0.97, proxy=0.02, gold=0.06, closed_gold=0.05)
ENDS = {
    RELEVANCE: replace(START, copied=0.5, tokens=8),
    R3: replace(START, copied=0.15, gold=0.09, proxy=0.06),
    RANDOM: replace(START, gold=0.07),
}


def audit(**won: float) -> RewardAudit:
    names = ("answer", "copy", "repeat", "off_topic", "doubled", "empty")
    shares = {name: won.get(name, 0.0) for name in names}
    return RewardAudit("a reward", {name: torch.zeros(1) for name in names}, shares, {}, {})


AUDITS = {
    RELEVANCE: audit(copy=0.6, answer=0.4),
    LENGTH: audit(repeat=0.97, off_topic=0.03),
    VARIETY: audit(answer=0.2, doubled=0.4, off_topic=0.4),
}


def paths(**ends: Checkpoint) -> dict[str, list[list[Checkpoint]]]:
    """Three seeds; every number goes from the start to the end in ten equal steps."""
    result = {}
    for name, end in {**ENDS, **{getattr(p06, key): value for key, value in ends.items()}}.items():
        path = [
            Checkpoint(
                **{
                    k: getattr(START, k) + t / 10 * (getattr(end, k) - getattr(START, k))
                    for k in Checkpoint.__annotations__
                }
            )
            for t in range(11)
        ]
        result[name] = [path] * 3
    return result


def test_the_claim_holds_where_relevance_is_hacked_and_the_whole_reward_is_not() -> None:
    finding = _judge(AUDITS, paths(), 0.9)
    assert finding.verdict == "holds", finding.reason
    assert finding.reason == ""
    assert finding.figures["spearman"] == 1
    assert "paper: relevance alone copies in about 40 %" in finding.measured
    assert not any(math.isnan(value) for value in finding.figures.values())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"RELEVANCE": replace(START, tokens=8)}, "relevance alone copies"),
        ({"RELEVANCE": replace(ENDS[RELEVANCE], tokens=30)}, "shorter"),
        ({"R3": replace(ENDS[R3], copied=0.4)}, "copies no more"),
        ({"R3": replace(ENDS[R3], unique=0.6)}, "trigrams"),
        ({"R3": replace(ENDS[R3], gold=0.05)}, "gold rises"),
        ({"RANDOM": replace(START, gold=0.2)}, "random types"),
    ],
)
def test_each_failing_check_is_named(changed: dict[str, Checkpoint], why: str) -> None:
    finding = _judge(AUDITS, paths(**changed), 0.9)
    assert finding.verdict == "fails"
    assert why in finding.reason


def test_a_gold_that_likes_copies_is_told_in_the_reason() -> None:
    reason = _judge(
        AUDITS, paths(RELEVANCE=replace(ENDS[RELEVANCE], gold=0.2), RANDOM=replace(START, gold=0.1)), 0.9
    ).reason
    assert "gold tells less than it should" in reason
    assert "copies 50% of the query" in reason


def test_an_audit_that_pays_no_shortcut_contradicts_the_claim() -> None:
    finding = _judge({**AUDITS, RELEVANCE: audit(answer=0.9, copy=0.1)}, paths(), 0.9)
    assert finding.verdict == "fails"
    assert "pays for the copy" in finding.reason


def test_log_probabilities_are_those_from_which_answers_are_drawn() -> None:
    torch.manual_seed(0)
    policy = Policy(size=12, embedding=6, hidden=8).double()
    query = torch.tensor([[5, 7, 0], [9, 5, 6]])
    answer = torch.tensor([[7, 2, 0], [5, 6, 2]])
    logps = policy.logps(query, answer)
    state = policy.begin(query)
    last = torch.full((2, 1), Vocabulary.BEGIN)
    for t in range(3):
        logits, state = policy(query, last, state)
        step = logits[:, 0].log_softmax(-1).gather(1, answer[:, t : t + 1])[:, 0]
        torch.testing.assert_close(logps[:, t], step * (answer[:, t] != 0))
        last = answer[:, t : t + 1]


def test_an_answer_ends_at_its_end_and_is_drawn_from_the_generator_alone() -> None:
    torch.manual_seed(0)
    policy = Policy(size=12, embedding=6, hidden=8)
    batch = {"query": torch.tensor([[5, 7, 0]] * 50)}
    one, two = (p06.generate(policy, batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one["response_ids"], two["response_ids"])
    for row in one["response_ids"].tolist():
        if Vocabulary.END in row:
            assert not any(row[row.index(Vocabulary.END) + 1 :])


def test_queries_and_answers_come_from_installed_texts() -> None:
    paragraphs = p06.help_paragraphs()
    assert len(paragraphs) > 300
    assert len({row.query for row in paragraphs}) == len(paragraphs)
    words = Vocabulary(["a b a", "b c"])
    assert words.texts(words.ids(["b a"], 5, end=True)) == ["b a"]
    assert words.texts(words.ids(["z"], 2)) == ["<other>"]


@pytest.mark.slow
def test_a_small_study_runs_from_end_to_end_and_repeats_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SEEDS": 1, "EACH": 24, "EPOCHS": 1, "STEPS": 10, "PROMPTS": 4, "MODULES": "math json"}
    for name, value in small.items():
        monkeypatch.setattr(p06, name, value)
    told: list[float] = []
    one = CLAIM.run(progress=lambda fraction, text: told.append(fraction))
    assert one.figures == CLAIM.run().figures
    assert told == sorted(told)
    assert not any(math.isnan(value) for name, value in one.figures.items() if name != "spearman")


@pytest.mark.slow
def test_the_study_runs_and_measures_every_check() -> None:
    finding = CLAIM.run()
    assert finding.verdict in ("holds", "fails")
    assert finding.figures[f"{RELEVANCE}/copied"] > finding.figures["supervised/copied"]
