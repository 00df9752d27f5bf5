"""The claim of paper 19: how it judges, and that its study runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from poise.claims.p19 import CLAIM, Count, _judge


def counts(exact: int = 18, weighted: int = 70, none: int = 1700) -> dict[str, Count]:
    steps = {
        "log-sum-exp/exact": exact,
        "log-sum-exp/gauss_newton": weighted,
        "log-sum-exp/zero": none,
        "rosenbrock p=2/exact": 45,
        "rosenbrock p=2/gauss_newton": 44,
        "rosenbrock p=2/zero": 5000,
        "rosenbrock p=4/gauss_newton": 50,
        "rosenbrock p=4/rank_one": 5000,
        "logistic/exact": 10,
        "logistic/fisher": 218,
        "logistic/zero": 600,
    }
    return {name: Count(n, 2 * n, n < 5000, 1e-9, 0.0) for name, n in steps.items()}


def test_it_holds_where_curvature_saves_two_thirds_of_the_steps_and_scale_does_not_matter() -> None:
    finding = _judge(counts(), 1e-12)
    assert finding.verdict == "holds"
    assert "18 / 70 / 1,700" in finding.measured
    assert ">5,000" in finding.measured
    assert "do not coincide" in finding.reason


@pytest.mark.parametrize("gap", [1e-6, float("nan")])
def test_iterates_that_move_with_the_scale_falsify_it(gap: float) -> None:
    assert _judge(counts(), gap).verdict == "fails"


def test_few_steps_saved_or_a_run_that_does_not_end_falsify_it() -> None:
    assert "only 2.0 times fewer steps" in _judge(counts(weighted=850), 0.0).reason
    assert _judge(counts(weighted=850), 0.0).verdict == "fails"
    rows = counts()
    rows["log-sum-exp/exact"] = replace(rows["log-sum-exp/exact"], reached=False)
    assert _judge(rows, 0.0).verdict == "fails"


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert CLAIM.run().verdict == "holds"
