"""The claim of paper 24: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p24 import CLAIM, GRID, SEEDS, Scores, _digits, _judge, _tuned


def scores(
    tuned: float = 0.10, rate: float = 0.4, other: float = 0.45, replay: float = 0.10
) -> dict[tuple[str, int], Scores]:
    """Three seeds with a grid from 0.11 to 0.15, whose first point is the start held fixed."""
    found: dict[tuple[str, int], Scores] = {}
    for n in range(SEEDS):
        for i in range(len(GRID)):
            found[f"fixed {i}", n] = Scores(0.15 - 0.01 * i, 0.15, 0.95)
        found["stn", n] = Scores(tuned, 0.12, 0.96, (rate,) * 3)
        found["replay", n] = Scores(replay, 0.12, 0.96)
        found["random", n] = Scores(0.2, 0.2, 0.95)
    found["stn from 0.3", 0] = Scores(0.1, 0.1, 0.96, (other,) * 3)
    return found


def test_it_holds_where_the_tuned_run_is_as_good_as_the_grid_and_the_rates_moved() -> None:
    finding = _judge(scores())
    assert finding.verdict == "holds"
    assert finding.reason == ""
    assert finding.figures["best of the grid"] == pytest.approx(0.11)
    assert finding.figures["median of the grid"] == pytest.approx(0.13)
    assert finding.figures["spread of starts"] == pytest.approx(0.05)
    assert "STN 0.575" in finding.measured


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tuned": 0.14}, "above the median"),
        ({"tuned": 0.1325}, "a fifth was allowed"),
        ({"tuned": 0.16}, "holding the start value is better"),
        ({"rate": 0.06}, "hardly left their start"),
    ],
)
def test_it_fails_and_says_why(change: dict[str, float], reason: str) -> None:
    finding = _judge(scores(**change))
    assert finding.verdict == "fails"
    assert reason in finding.reason


def test_what_was_expected_beside_it_is_told_where_it_does_not_show() -> None:
    finding = _judge(scores(other=0.6, replay=0.12))
    assert finding.verdict == "holds"
    assert "different starts end within 0.1 (here 0.20 apart)" in finding.reason
    assert "replayed schedule within 5 %" in finding.reason


def test_a_short_tuned_run_gives_scores_and_a_schedule() -> None:
    found: dict[int, object] = {}
    result = _tuned(_digits(0), 0, 40, 0.05, "stn", found)
    assert 0 < result.valid < 3
    assert len(result.rates) == 3
    assert found


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
