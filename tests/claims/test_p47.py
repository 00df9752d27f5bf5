"""The claim of paper 47: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from poise.claims import Finding
from poise.claims.p47 import CHANGES, SMALL, Outcome, judge, study
from poise.solvers.unfolded import Incremental


def outcome(
    *,
    near: float = 1.005,
    supervised: float = 1.02,
    error: float = 0.8,
    gain: float = 5.0,
    slip: float = 1.0,
    late: float = 1.0,
) -> Outcome:
    """One seed in which the claim holds, unless it is told otherwise; objectives relative to a limit of 1."""
    path = [1.5 / t**0.1 for t in range(1, 11)]
    trained = {(c, loss): rise for c in CHANGES for loss, rise in (("supervised", 2.0 * slip), ("objective", 2.0))}
    return Outcome(
        {"plain": 1.3, "limit": 1.0, "FISTA": 1.1, "supervised": supervised, "objective": near},
        {"plain": gain, "limit": 0.9, "FISTA": 2.0, "supervised": error, "objective": 1.0},
        {"plain": path, "supervised": path, "objective": [v * 0.9 for v in path[:-1]] + [path[-1] * 0.9 * late]},
        {("as trained", "supervised"): 1.0, ("as trained", "objective"): 1.0, **trained},
        {
            "supervised": 0.5,
            "objective": 0.4,
            ("as trained", "supervised"): 0.5,
            ("as trained", "objective"): 0.5,
            **trained,
        },
    )


def finding(**changes: Any) -> Finding:
    return judge({"ISTA": [outcome(**changes)] * 3, "IHT": [outcome(**changes)] * 3})


def test_it_holds_where_every_look_agrees() -> None:
    found = finding(slip=1.1)
    assert found.verdict == "holds"
    assert found.reason == ""
    assert found.figures["ISTA/objective/objective"] == pytest.approx(1.005)
    assert "paper" in found.measured


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"near": 1.015}, "1.5 % above its limit"),
        ({"supervised": 1.001}, "higher objective"),
        ({"error": 1.1, "gain": 5.0}, "larger error"),
        ({"gain": 2.0}, "only 2.5 times lower"),
        ({"slip": 0.8}, "rises more"),
        ({"late": 1.2}, "in 3 of 3 seeds"),
    ],
)
def test_it_fails_where_one_does_not(changes: dict[str, Any], reason: str) -> None:
    found = finding(**changes)
    assert found.verdict == "fails"
    assert reason in found.reason


def test_a_small_study_measures_everything_that_is_judged() -> None:
    size = replace(SMALL, m=10, n=20, layers=6, schedule=Incremental(batches=2, batch_size=20), seeds=1)
    found = judge({name: [study(form, 0.1, size, 3)] for name, form in (("ISTA", "ista"), ("IHT", "iht"))})  # type: ignore[arg-type]
    assert all(value == value for value in found.figures.values())


@pytest.mark.slow
def test_the_study_runs_and_trained_iht_beats_plain_iht() -> None:
    from poise.claims.p47 import CLAIM

    assert "times lower" not in CLAIM.run().reason
