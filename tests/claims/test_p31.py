"""The claim of paper 31: how it judges, and that its study runs."""

from __future__ import annotations

import pytest

from poise.claims.p31 import CLAIM, Tuned, _digits, judge, scale_difference


def tuned(small: float, large: float, rate: float = 2e-4) -> dict[tuple[str, int], Tuned]:
    return {
        ("AdamW", 32): Tuned({"lr": 1e-3, "weight_decay": 0.01}, [0.95, 0.95]),
        ("Lion", 32): Tuned({"lr": rate, "weight_decay": 0.05}, [small, small]),
        ("AdamW", 1000): Tuned({"lr": 1e-2, "weight_decay": 0.01}, [0.90, 0.90]),
        ("Lion", 1000): Tuned({"lr": 2e-3, "weight_decay": 0.05}, [large, large]),
    }


@pytest.mark.parametrize(
    ("small", "large", "rate", "scaled", "verdict"),
    [
        (0.946, 0.91, 2e-4, 0.0, "holds"),
        (0.944, 0.91, 2e-4, 0.0, "fails"),
        (0.95, 0.899, 2e-4, 0.0, "fails"),
        (0.95, 0.91, 1e-3, 0.0, "fails"),
        (0.95, 0.91, 2e-4, 1e-9, "fails"),
    ],
)
def test_each_look_can_contradict_the_claim(
    small: float, large: float, rate: float, scaled: float, verdict: str
) -> None:
    finding = judge(tuned(small, large, rate), scaled)
    assert finding.verdict == verdict
    assert bool(finding.reason) == (verdict == "fails")


def test_the_scale_of_the_loss_changes_nothing() -> None:
    assert scale_difference(0, *_digits()) == 0


@pytest.mark.slow
def test_the_study_runs() -> None:
    finding = CLAIM.run()
    assert finding.verdict in ("holds", "fails")
    assert finding.figures["difference at another scale"] == 0
