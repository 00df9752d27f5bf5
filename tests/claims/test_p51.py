"""The claim of paper 51: how it judges, and that its study runs."""

from __future__ import annotations

import math

import pytest

from poise.claims.p51 import CLAIM, IMPLICIT, OURS, Scores, gradient_order, judge


def rows(*accuracies: float, loss: float = 0.3) -> list[Scores]:
    return [{"accuracy": a, "validation loss": loss, "auroc": 0.97, "seconds": 1.0} for a in accuracies]


def scores(ours: float, loss: float = 0.3) -> dict[str, list[Scores]]:
    return {
        "uniform": rows(0.85, 0.85, 0.85),
        "clean": rows(0.93, 0.93, 0.93),
        OURS: rows(0.94, 0.94, ours, loss=loss),
        IMPLICIT: rows(0.94, 0.94, 0.94),
    }


@pytest.mark.parametrize(
    ("order", "accuracy", "verdict"),
    [(1.0, 0.94, "holds"), (1.0, 0.925, "holds"), (1.0, 0.915, "fails"), (0.6, 0.94, "fails")],
)
def test_the_claim_holds_where_the_order_is_one_and_every_seed_is_cleaned(
    order: float, accuracy: float, verdict: str
) -> None:
    finding = judge(order, scores(accuracy))
    assert finding.verdict == verdict
    assert bool(finding.reason) == (verdict == "fails")


def test_a_validation_loss_above_that_of_implicit_gradients_is_said_and_does_not_decide() -> None:
    finding = judge(1.0, scores(0.94, loss=0.33))
    assert finding.verdict == "holds"
    assert "10.0% above that of implicit gradients" in finding.reason
    assert "0.939/0.937/0.946" in finding.measured
    assert not any(math.isnan(v) for v in finding.figures.values())


def test_the_order_of_the_gradient_is_one_for_several_quadratics() -> None:
    assert gradient_order(1) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
