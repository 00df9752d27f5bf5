"""The claim of paper 9: how it judges, and that every method of its study trains."""

from __future__ import annotations

import pytest
import torch

from poise.claims import p09
from poise.claims.p09 import (
    FULL,
    HALF,
    METHODS,
    SHORTER,
    SLOWER,
    STEPS,
    Outcome,
    Text,
    _at_equal_plasticity,
    _judge,
    _sequence,
)

NEGATIVE = {"full, 60 steps": (0.79, 0.56, -0.31), "matrices, 120 steps": (0.74, 0.49, -0.33)}


def outcome(learned: float, backward: float, knowledge: float) -> Outcome:
    return Outcome(-2.0, backward, 0.0, learned, knowledge, 0.0, 0.01)


def outcomes(half: Outcome) -> dict[tuple[str, int], list[Outcome]]:
    """Full fine-tuning that learns more and forgets more the longer it runs."""
    full = {n: outcome(-3.0 + n / 60, -n / 60, -n / 60) for n in (*SHORTER, STEPS)}
    return {**{(FULL, n): [o] * 5 for n, o in full.items()}, (HALF, STEPS): [half] * 5, (SLOWER, STEPS): [full[30]] * 5}


@pytest.mark.parametrize(
    ("half", "verdict", "reason"),
    [
        (outcome(-2.25, -0.5, -0.5), "holds", ""),
        (outcome(-2.25, -0.9, -0.5), "fails", "20 % was asked for"),
        (outcome(-2.25, -0.5, -1.1), "fails", "0 of 5 seeds at equal steps"),
        (outcome(-2.25, -0.7, -0.8), "fails", "keeps as much in 5 of 5 seeds"),
    ],
)
def test_the_claim_needs_less_forgetting_at_equal_steps_and_at_equal_plasticity(
    half: Outcome, verdict: str, reason: str
) -> None:
    finding = _judge(outcomes(half), NEGATIVE)
    assert finding.verdict == verdict
    assert reason in finding.reason
    assert "no gain at matched plasticity" in finding.reason
    assert "-10.2 -> -5.6" in finding.measured


def test_equal_plasticity_is_found_between_two_lengths() -> None:
    full = {15: outcome(-2.75, 0, -0.25), 30: outcome(-2.5, 0, -0.5), 60: outcome(-2.0, 0, -1.0)}
    assert _at_equal_plasticity(full, -2.25, "knowledge") == pytest.approx(-0.75)
    assert _at_equal_plasticity(full, -9.0, "knowledge") == -0.25
    assert _at_equal_plasticity(full, 0.0, "knowledge") == -1.0


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_two_phases(name: str) -> None:
    if name == "LoRA":
        pytest.importorskip("peft", reason="peft is not installed (extra 'lm')")
    letters = {"base": "what is known ", "a": "abcdefgh ", "b": "hgfe dcba "}
    texts = {each: Text.of(text * 700) for each, text in letters.items()}
    start = p09.CharacterModel(0)
    before = {n: p.clone() for n, p in start.named_parameters()}
    result = _sequence(start, METHODS[name], texts, ["a", "b"], 2, seed=0)
    assert result.learned < 0
    assert all(torch.equal(p, before[n]) for n, p in start.named_parameters())


@pytest.mark.slow
def test_the_texts_are_there_and_differ() -> None:
    texts = p09._texts()
    assert all(len(text) > 100_000 for text in texts.values())
    assert len({text[:1000] for text in texts.values()}) == 5


@pytest.mark.slow
def test_the_study_runs() -> None:
    assert p09.CLAIM.run().figures["step time, half / full"] < 1.2
