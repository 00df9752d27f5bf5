"""The claim of paper 04: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.claims.p04 import CLAIM, LOOSE, Measured, _judge, _maid, work_until
from poise.tasks.bilevel_regression import quadratic

GOOD = Measured(
    spread=[1.1, 1.2, 1.3],
    gap=[0.1, 0.1, 0.1],
    adaptive=[1000.0, 1100.0, 1200.0],
    tight=[2000.0, 2200.0, 2400.0],
    loose_steps=[0, 0, 0],
    stalled=[2.0, 3.0, 4.0],
    noisy=[20.0, 20.0, 20.0],
    grid=[22.5, 22.5, 22.5],
    maid=[22.49, 22.5, 22.51],
    hoag=[22.3, 22.3, 22.3],
)


def test_the_claim_holds_where_ends_agree_work_is_saved_and_the_grid_is_reached() -> None:
    finding = _judge(GOOD, {})
    assert finding.verdict == "holds"
    assert finding.reason == ""
    assert "0.50x" in finding.measured
    assert finding.figures["largest gap over smallest"] == 1.3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"spread": [1.1, 1.6, 1.2]}, "depends on the initial accuracy by a factor 1.60"),
        ({"tight": [500.0, 500.0, 500.0]}, "costs more than the tight fixed accuracy"),
        ({"maid": [22.5, 22.44, 22.5]}, "0.06 dB below the grid"),
    ],
)
def test_the_claim_fails_where_one_of_them_does_not_and_says_which(changed: dict[str, list[float]], said: str) -> None:
    finding = _judge(replace(GOOD, **changed), {})
    assert finding.verdict == "fails"
    assert said in finding.reason


def test_a_rival_that_does_as_well_is_told() -> None:
    finding = _judge(replace(GOOD, hoag=[22.5, 22.5, 22.5]), {})
    assert finding.verdict == "holds"
    assert "HOAG with its best schedule does as well" in finding.reason


def test_work_is_counted_up_to_the_gap() -> None:
    task = quadratic(0, rows=30, d=4)
    first = task.measures["gap"](task.x, task.theta)
    few = work_until(task, _maid(task, LOOSE), 0.5 * first)
    task = quadratic(0, rows=30, d=4)
    many = work_until(task, _maid(task, LOOSE), 0.1 * first)
    assert 0 < few < many
    task = quadratic(0, rows=30, d=4)
    assert work_until(task, _maid(task, 1.0, fixed=True), 1e-9 * first) == float("inf")


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
