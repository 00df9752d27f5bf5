"""The audit of a reward: who wins, and the measures of answers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import InputError, NonFiniteError
from poise.insight import (
    answer_metrics,
    audit_cases,
    audit_reward,
    closed_accuracy,
    copy_rate,
    monotonicity,
)
from poise.insight.reward_audit import AuditCase
from poise.terms.rewards import LengthIncentive, Relevance, RepetitionPenalty, r3_reward

QUERIES = ["what is a cat", "where do birds fly", "who ran home"]
ANSWERS = ["a small animal with whiskers", "they fly high above", "the old dog ran home"]


def letters(batch: list[str]) -> list[list[float]]:
    return [[text.count(c) / (1 + len(text)) for c in "abcdefgh"] for text in batch]


def common(x: str, y: str) -> int:
    """The textbook table."""
    row = [0] * (len(y) + 1)
    for a in x:
        new = [0]
        for j, b in enumerate(y):
            new.append(row[j] + 1 if a == b else max(row[j + 1], new[-1]))
        row = new
    return row[-1]


@given(st.text("abc", max_size=80), st.text("abc", max_size=80))
def test_copy_rate_is_the_longest_common_subsequence_over_the_query(x: str, y: str) -> None:
    expected = common(x, y) / len(x) if x else 0.0
    assert copy_rate(" ".join(x), " ".join(y)) == pytest.approx(expected)


def test_a_copy_is_copied_whole_and_an_empty_answer_not_at_all() -> None:
    assert copy_rate("What is a cat?", "what IS a cat?") == 1
    assert copy_rate("What is a cat?", "") == 0
    assert copy_rate("", "anything") == 0


def test_length_pays_for_repeating_and_variety_for_rambling() -> None:
    cases = audit_cases(QUERIES, ANSWERS, others=2)
    assert audit_reward(LengthIncentive(), cases).winner == "repeat"
    both = audit_reward(LengthIncentive() * RepetitionPenalty(), audit_cases(QUERIES, ANSWERS, others=2, repeats=3))
    assert both.won["repeat"] == 0
    assert both.shortcut == "off_topic"


def test_shares_add_up_to_one_and_ties_are_split() -> None:
    def constant(response: list[str]) -> list[float]:
        return [1.0] * len(response)

    audit = audit_reward(constant, audit_cases(QUERIES, ANSWERS))
    assert sum(audit.won.values()) == pytest.approx(1)
    assert list(audit.won.values()) == pytest.approx([1 / 6] * 6)


def test_factors_and_elasticities_of_every_candidate_are_told() -> None:
    reward = Relevance(letters) * LengthIncentive() * RepetitionPenalty()
    audit = audit_reward(reward, audit_cases(QUERIES, ANSWERS))
    assert audit.factors["empty"]["length_incentive"] == 0
    assert audit.factors["answer"]["repetition_penalty"] == 1
    assert audit.elasticity["copy"] == {
        "relevance_query": 1,
        "length_incentive": 1,
        "repetition_penalty": 1,
    }
    frame = audit.frame()
    assert list(frame.index) == ["answer", "copy", "repeat", "off_topic", "doubled", "empty"]
    assert {"won", "reward", "relevance_query"} <= set(frame.columns)
    assert "the true answer, once or twice, wins" in str(audit)


def test_an_audit_reads_types_and_references() -> None:
    cases = audit_cases(QUERIES, ANSWERS, types=["open-ended", "constrained", "open-ended"])
    audit = audit_reward(r3_reward(letters), cases)
    assert not math.isnan(audit.factors["answer"]["relevance_reference"])
    with pytest.raises(NonFiniteError):
        audit_reward(lambda response: [math.nan] * len(response), cases)


def test_negative_true_answers_are_reported_as_a_reason_to_say_nothing() -> None:
    def unhappy(response: list[str]) -> list[float]:
        return [-float(len(text)) for text in response]

    audit = audit_reward(unhappy, audit_cases(QUERIES, ANSWERS))
    assert audit.winner == "empty"
    assert audit.negative == 1
    assert "floor=0" in str(audit)


def test_off_topic_answers_are_those_of_other_queries() -> None:
    for case, own in zip(audit_cases(QUERIES, ANSWERS, others=2), ANSWERS, strict=True):
        assert own not in case.candidates["off_topic"]
        assert sum(other in case.candidates["off_topic"] for other in ANSWERS) == 2
    many = [f"answer {i}." for i in range(200)]
    for case, own in zip(audit_cases(many, many, others=4), many, strict=True):
        assert own not in case.candidates["off_topic"]
        assert len(set(case.candidates["off_topic"].split("."))) == 5


def test_cases_that_make_no_audit_are_refused() -> None:
    with pytest.raises(InputError, match="no case"):
        audit_reward(LengthIncentive(), [])
    with pytest.raises(InputError, match="'answer'"):
        audit_reward(LengthIncentive(), [AuditCase("q", {"copy": "q"})])
    with pytest.raises(InputError, match="1 queries came with 2 answers"):
        audit_cases(["a"], ["b", "c"])
    with pytest.raises(InputError, match="two queries"):
        audit_cases(["a"], ["b"])


def test_monotonicity_is_the_rank_correlation_over_checkpoints() -> None:
    assert monotonicity([1, 2, 3], [0.1, 0.5, 0.9]).spearman == 1
    assert monotonicity([1, 2, 3], [0.9, 0.5, 0.1]).spearman == -1
    found = monotonicity([1, 2, 3, 4], [0.1, 0.9, 0.5, 0.4])
    assert (found.peak, found.overoptimised, found.gained) == (1, pytest.approx(0.5), pytest.approx(0.3))
    assert math.isnan(monotonicity([1, 1, 1], [1, 2, 3]).spearman)
    with pytest.raises(InputError, match="three checkpoints"):
        monotonicity([1, 2], [1, 2])


def test_closed_accuracy_finds_whole_words_only() -> None:
    assert closed_accuracy(["It is in Paris!", "the cart"], ["paris", "art"]) == 0.5
    with pytest.raises(InputError, match="one for each"):
        closed_accuracy(["a"], [])


def test_metrics_of_answers_are_means() -> None:
    found = answer_metrics(QUERIES, QUERIES, Relevance(letters))
    assert found.copied == 1
    assert found.tokens == pytest.approx(11 / 3)
    assert found.uniqueness == 1
    assert found.relevance > 0
    with pytest.raises(InputError):
        answer_metrics(["a"], [])
