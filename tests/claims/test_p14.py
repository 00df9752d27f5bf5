"""The claim of paper 14: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p14 import ATTACKED, CLAIM, DEPTHS, EVERY, FAMILIAR, PLAIN, SCHEDULE, TASK, UNIFORM, Scores, _judge


def scores(
    ours: float = 0.1, uniform: float = 0.6, plain: float = 0.8, benign: float = 0.95, share: float = 0.7
) -> Scores:
    attacked = {f: [0.0, 0.2, 0.2, 0.2] for f in ATTACKED}
    attacked[PLAIN] = [0.1, plain, 0.99, 0.99]
    attacked[SCHEDULE] = [0.0, ours, 0.2, 0.4]
    attacked[UNIFORM] = [0.1, uniform, 0.9, 0.9]
    tuned = {(TASK, PLAIN): 0.96, (TASK, SCHEDULE): benign, (FAMILIAR, PLAIN): 0.97, (FAMILIAR, SCHEDULE): 0.96}
    return Scores(
        share, 7, {k: 0.0 if k == 0 else 0.8 for k in DEPTHS}, dict.fromkeys(DEPTHS, 0.02), attacked, tuned,
        {PLAIN: 0.2, SCHEDULE: 0.1}, {TASK: -9.0, FAMILIAR: -0.1},
    )  # fmt: skip


def test_the_claim_holds_within_all_bounds_and_shows_the_paper_beside_it() -> None:
    finding = _judge([scores(), scores()])
    assert finding.verdict == "holds"
    assert "88.9" in finding.measured
    assert f"after {2 * EVERY} steps" in finding.measured
    assert finding.figures["steps"] == 2 * EVERY
    assert f"after {4 * EVERY} steps, plain 99% and constrained 40%" in finding.reason


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ours": 0.3}, "constrained fine-tuning lets 30% through"),
        ({"ours": 0.2, "uniform": 0.2}, "uniform beta = 0.1 protects as well"),
        ({"benign": 0.92}, "loses 4.0 points, and less than 3 were expected"),
        ({"share": 0.5}, "the first five tokens hold 50%"),
    ],
)
def test_it_fails_where_one_bound_is_missed_and_says_which(changed: dict[str, float], said: str) -> None:
    finding = _judge([scores(**changed)])
    assert finding.verdict == "fails"
    assert said in finding.reason


def test_an_attack_that_is_too_weak_judges_nothing() -> None:
    weak = scores()
    weak.attacked[PLAIN] = [0.1, 0.2, 0.3, 0.4]
    assert "too weak to judge" in _judge([weak]).reason


@pytest.mark.slow
def test_the_study_runs() -> None:
    assert CLAIM.run().verdict in ("holds", "fails")
