"""The claim of paper 13: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p13 import CLAIM, FIXED, LOSSES, ON_POLICY, REUSE_LOSSES, REUSES, Cell, _judge


def scores(far: float = 0.5, near: float = 0.05, lost: float = 0.2):
    coverage = {}
    for name in LOSSES:
        for peak, gap in (("far", far), ("near", near)):
            coverage[Cell(peak, name, FIXED)], coverage[Cell(peak, name, ON_POLICY)] = 0.4, 0.4 + gap
    reuse = {(name, t): 0.9 - lost * (t > 1) for name in REUSE_LOSSES for t in REUSES}
    return coverage, reuse


@pytest.mark.parametrize(
    ("change", "verdict", "word"),
    [
        ({}, "holds", ""),
        ({"far": 0.2}, "holds", "below the 0.3 that a reference study expected"),
        ({"near": 0.2}, "holds", "above the 0.1"),
        ({"far": 0.02, "near": 0.0}, "fails", "offline equals on-policy"),
        ({"far": 0.2, "near": 0.3}, "fails", "0.300 on 'near'"),
        ({"near": -0.1}, "fails", "worse than offline"),
        ({"lost": 0.0}, "fails", "reuse has no effect"),
    ],
)
def test_the_claim_is_judged_by_gaps_and_by_the_fall(change: dict[str, float], verdict: str, word: str) -> None:
    finding = _judge(*scores(**change))
    assert finding.verdict == verdict
    assert word in finding.reason
    assert "BoN 0.400 -> " in finding.measured
    assert finding.figures["reuse/BoN/1"] == 0.9


def test_another_order_of_falling_than_the_papers_is_said() -> None:
    coverage, reuse = scores()
    reuse["PPO", 50] = 0.1
    finding = _judge(coverage, reuse)
    assert finding.verdict == "holds"
    assert "likelihood falls first and PPO later, as the paper reports, does not appear" in finding.reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
