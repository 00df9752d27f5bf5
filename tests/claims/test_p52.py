"""The claim of paper 52: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims import Finding
from poise.claims.p52 import CLAIM, available, judge

CALLS = {"1": 100, "5": 54, "20": 43, "100": 35, "exact": 29}
BATCHES = {
    "ours 1": 0.07,
    "ours 10": 0.06,
    "ours 50": 0.06,
    "sgd": 0.07,
    "sls": 0.07,
    "adam": 0.065,
    "adagrad": 0.07,
    "svrg": 0.08,
}


def finding(
    calls: dict[str, int] | None = None,
    sgd: int = 500,
    adam: float = 4000.0,
    hopper: dict[str, float] | None = None,
) -> Finding:
    return judge(
        calls or CALLS, CALLS, BATCHES, [(20, sgd), (30, sgd), (25, sgd)], {"ours": 300.0, "adam": adam}, hopper
    )


def test_it_holds_where_inner_steps_save_oracle_calls_everywhere() -> None:
    found = finding(hopper={"ours": 3000.0, "adam": 250.0, "expert": 3100.0})
    assert found.verdict == "holds"
    assert "100 / 54 / 43 / 35 / 29" in found.measured
    assert "best rival adam 0.0650" in found.reason
    assert found.figures["times better/Hopper"] == pytest.approx(12.0)


def test_a_rival_that_never_gets_there_counts_as_if_he_came_at_the_limit() -> None:
    found = finding(sgd=2000, adam=6000.0)
    assert found.verdict == "holds"
    assert "more than 2,000" in found.measured
    assert "more than 6,000" in found.measured
    assert "not installed" in found.measured


def test_calls_that_do_not_fall_or_a_small_factor_falsify_it() -> None:
    assert "needed more oracle calls" in finding({**CALLS, "20": 60}).reason
    assert finding({**CALLS, "20": 60}).verdict == "fails"
    assert finding(sgd=60).verdict == "fails"
    assert "cart-pole: 1.0 times" in finding(adam=300.0).reason
    assert finding(hopper={"ours": 300.0, "adam": 250.0, "expert": 3100.0}).verdict == "fails"


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    found = CLAIM.run()
    assert found.verdict == "holds"
    assert ("Hopper/ours" in found.figures) == available()
