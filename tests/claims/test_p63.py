"""The claim of paper 63: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims import Finding
from poise.claims.p63 import CLAIM, _conditioned, _judge

ROWS = {
    "third/sdl": [0.85], "third/spread": [0.9], "third/svd_logistic": [0.5], "third/logistic": [0.85],
    "conditioned/spread": [1e-12], "conditioned/gap": [0.0],
    "bases/0.01": [0.8], "bases/0.1": [0.8], "bases/1.0": [0.7], "bases/svd_logistic": [0.7], "bases/logistic": [0.8],
    "bases/error 0.01": [0.73], "bases/error 0.1": [0.72], "bases/error 1.0": [0.7], "bases/spread": [1e-10],
    "cancer/sdl": [0.97], "cancer/svd_logistic": [0.97], "cancer/logistic": [0.97],
    "rare/sdl": [0.6], "rare/svd_logistic": [0.2], "rare/logistic": [0.5],
}  # fmt: skip


def judged(**change: float) -> Finding:
    return _judge(ROWS | {name.replace("_of_", "/"): [value] for name, value in change.items()})


def test_it_holds_and_says_where_starts_differ() -> None:
    finding = judged()
    assert finding.verdict == "holds"
    assert "outside the theorem's condition" in finding.reason
    assert "85.0 / 50.0 / 85.0 %" in finding.measured
    assert judged(third_of_spread=0.0).reason == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"third_of_sdl": 0.55}, "gain over factorising first is 5.0 points"),
        ({"third_of_logistic": 0.9}, "logistic regression 90.0 %"),
        ({"bases_of_svd_logistic": 0.81}, "on two bases"),
        ({"bases_of_spread": 1e-4}, "starts differ by 1.0e-04"),
        ({"conditioned_of_spread": 1e-4}, "starts differ by 1.0e-04"),
    ],
)
def test_it_fails_by_name(change: dict[str, float], reason: str) -> None:
    finding = judged(**change)
    assert finding.verdict == "fails"
    assert reason in finding.reason


def test_where_the_theorem_applies_every_start_is_certified() -> None:
    found = _conditioned(3)
    assert found["conditioned/spread"] <= 1e-9
    assert found["conditioned/gap"] <= 1e-9


@pytest.mark.slow
def test_the_study_holds() -> None:
    assert CLAIM.run().verdict == "holds"
