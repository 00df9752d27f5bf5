"""The claim of paper 10: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims import Finding
from poise.claims.p10 import CLAIM, Routed, Solved, _judge


def study(iterations: tuple[int, ...] = (900, 900, 500, 200), nonzeros: int = 0, load: float = 1.0) -> Finding:
    solved = {
        (0.1, k): [Solved(min(k, 9) + nonzeros, 1.001, n, 1e-7, 1e-7, True)] * 2
        for k, n in zip((1, 2, 4, 300), iterations, strict=True)
    }
    routed = {
        "dense": [Routed(0.95, 1.0, 0.0)],
        "top-1": [Routed(0.94, 2.0, 0.2)],
        "transport": [Routed(0.95, load, 0.05)],
    }
    return _judge(solved, routed)


def test_it_holds_where_the_limit_holds_and_iterations_fall() -> None:
    finding = study()
    assert finding.verdict == "holds"
    assert finding.reason == ""
    assert finding.figures["top-1/load"] == 2.0
    assert "900 / 900 / 500 / 200" in finding.measured


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nonzeros": 1}, "more than k nonzeros"),
        ({"iterations": (900, 500, 600, 200)}, "iterations do not fall"),
        ({"iterations": (900, 500, 500, 500)}, "iterations do not fall"),
        ({"load": 1.2}, "1.20 times its capacity"),
    ],
)
def test_it_fails_where_one_of_them_does_not(change: dict[str, object], reason: str) -> None:
    finding = study(**change)
    assert finding.verdict == "fails"
    assert reason in finding.reason


@pytest.mark.slow
def test_the_study_runs_and_no_column_exceeds_its_limit() -> None:
    finding = CLAIM.run()
    assert "more than k nonzeros" not in finding.reason
