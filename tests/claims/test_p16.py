"""The claim of paper 16: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.claims.p16 import CLAIM, Collapse, Even, _judge

FALLEN = Collapse(0.39, 0.99, -3.8, 0.8, {0.05: -0.9, 1.0: 0.398}, 1e-12, (12.0, 0.1))
EVENS = [Even(dpo=1.2, rpo=0.6, reference=0.0)]


def test_the_claim_holds_where_dpo_falls_and_some_eta_keeps_the_reward() -> None:
    finding = _judge(FALLEN, EVENS)
    assert finding.verdict == "holds"
    assert "the guard costs 0.60" in finding.reason
    assert "83.75" in finding.measured


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"last": 0.2}, "DPO did not fall"),
        ({"rpo": {0.05: -0.9, 1.0: 0.38}}, "no eta kept"),
        ({"gap": 1e-3}, "orders of play disagree"),
    ],
)
def test_each_part_can_contradict_the_claim(changes: dict[str, object], reason: str) -> None:
    finding = _judge(replace(FALLEN, **changes), EVENS)
    assert finding.verdict == "fails"
    assert reason in finding.reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    finding = CLAIM.run()
    assert finding.verdict == "holds"
    assert finding.figures["DPO"] == pytest.approx(-3.80, abs=0.01)
    assert finding.figures["RPO eta 1"] == pytest.approx(0.398, abs=1e-3)
