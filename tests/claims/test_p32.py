"""The claim of paper 32: how it judges, and that its study runs."""

from __future__ import annotations

import math

import pytest

from poise.claims.p32 import CE, CLAIM, MILD, PSKD, STRONG, Scores, _judge


def row(nll: float, ece: float, remaining: float = math.nan) -> Scores:
    return Scores(error=0.05, nll=nll, ece=ece, aurc=0.004, eaurc=0.003, remaining=remaining)


def scores(better: int) -> dict[tuple[str, str], list[Scores]]:
    """Five seeds, of which PS-KD lowers both scores on the first few."""
    plain = [row(0.2, 0.02)] * 5
    ours = [row(0.18, 0.01, 0.03) if i < better else row(0.18, 0.03, 0.03) for i in range(5)]
    return {(MILD.name, CE): plain, (MILD.name, PSKD): ours}


@pytest.mark.parametrize(("better", "verdict"), [(5, "holds"), (4, "holds"), (3, "fails"), (0, "fails")])
def test_the_claim_holds_where_both_scores_fall_in_four_of_five_seeds(better: int, verdict: str) -> None:
    finding = _judge(scores(better))
    assert finding.verdict == verdict
    assert finding.figures["seeds with lower NLL and ECE"] == better
    assert f"both lower in {better} of 5 seeds" in finding.measured
    assert ("four were asked for" in finding.reason) == (verdict == "fails")


def test_the_paper_figures_stand_beside_the_measured_ones_and_an_unchanged_error_is_said() -> None:
    finding = _judge(scores(5))
    assert "11.84 -> 1.77" in finding.measured
    assert "error is unchanged" in finding.reason
    assert not any(math.isnan(value) for value in finding.figures.values())


def test_the_regimes_where_it_should_not_help_are_told_in_the_reason() -> None:
    wide = scores(5)
    wide[STRONG.name, CE], wide[STRONG.name, PSKD] = [row(0.2, 0.02)] * 5, [row(0.3, 0.12, 0.2)] * 5
    assert "ECE 2.00 -> 12.00 %, mean(1 - P_true) at the end 20.0%" in _judge(wide).reason


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (extra 'data')")
    assert CLAIM.run().verdict == "holds"
