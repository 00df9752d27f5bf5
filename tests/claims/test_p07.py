"""The claim of paper 07: how it judges, and that its study runs."""

from __future__ import annotations

import pytest
import torch

from poise.claims.p07 import CLAIM, Simulator, _judge

DIGITS = {
    "rank 10": {
        "L1": [0.10, 0.12, 0.11],
        "L2": [0.11, 0.13, 0.13],
        "uniform": [0.15, 0.15, 0.15],
        "target only": [0.09, 0.09, 0.09],
        "L1 tasks": [12.0, 13.0, 14.0],
        "L2 tasks": [30.0, 30.0, 30.0],
    }
}


def scores(
    l1: float = 0.011, l2: float = 0.014, adaptive: float = 0.012, spread: float = 1e-4
) -> dict[str, list[float]]:
    means = {
        "target only": 0.05,
        "uniform": 0.04,
        "L2 known": l2,
        "L1 known": l1,
        "adaptive": adaptive,
        "adaptive, three epochs": adaptive,
    }
    return {
        name: [mean + (spread if name == "L2 known" else 0) * (-1) ** seed for seed in range(30)]
        for name, mean in means.items()
    }


@pytest.mark.parametrize(
    ("given", "verdict", "reason"),
    [
        ({}, "holds", ""),
        ({"l2": 0.011}, "fails", "not clearly below L2"),
        ({"spread": 0.05}, "fails", "not clearly below L2"),
        ({"adaptive": 0.018}, "fails", "more than 1.5 times"),
        ({"l2": 0.045}, "fails", "order"),
    ],
)
def test_the_claim_asks_for_a_paired_gain_the_order_and_the_factor(
    given: dict[str, float], verdict: str, reason: str
) -> None:
    finding = _judge(scores(**given), DIGITS)
    assert finding.verdict == verdict
    assert reason in finding.reason


def test_digits_are_told_with_what_speaks_against_the_claim() -> None:
    finding = _judge(scores(), DIGITS)
    assert "0.110 / 0.123 / 0.150 / 0.090, in the paper's order" in finding.reason
    assert "50 target samples alone do better" in finding.reason
    assert finding.figures["digits/rank 10/L1"] == pytest.approx(0.11)


def test_every_allocation_draws_the_same_samples_however_many_at_once() -> None:
    world = Simulator(0)
    whole = world.draw(3, 10)
    world.drawn.clear()
    parts = [world.draw(3, 4), world.draw(3, 6)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts]))
    assert torch.equal(whole[1], torch.cat([p[1] for p in parts]))


@pytest.mark.slow
def test_the_study_runs_and_the_claim_holds() -> None:
    assert CLAIM.run().verdict == "holds"
