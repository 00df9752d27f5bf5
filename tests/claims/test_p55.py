"""The claim of paper 55: how it judges, and that its study runs."""

from __future__ import annotations

import pytest
import torch

from poise.claims import p55
from poise.claims.p55 import CLAIM, FORMULAS, RATES, Point, _judge


def curves(right: dict[str, float], drift: dict[str, float]) -> dict[tuple[str, float], list[Point]]:
    return {
        (name, rate): [Point(0.3, 0.08, 0.0), Point(right.get(name, 0.4), 0.05, drift.get(name, 0.1))]
        for name in FORMULAS
        for rate in RATES
    }


BETTER = {"RRPO": 0.5, "DPO": 0.4}
LESS = {"RRPO": 0.1, "DPO": 1.0, "masked DPO": 0.3}


@pytest.mark.parametrize(
    ("right", "drift", "verdict", "reason"),
    [
        (BETTER, LESS, "holds", ""),
        ({"RRPO": 0.35}, LESS, "fails", "RRPO is right in 0.350 of the answers and DPO in 0.400"),
        ({"RRPO": 0.29, "DPO": 0.28}, LESS, "fails", "RRPO and DPO do not both gain"),
        (BETTER, {**LESS, "DPO": 0.3}, "fails", "DPO drifts 3.0 times as much as RRPO, and 5 times was asked for"),
        (BETTER, {**LESS, "masked DPO": 0.1}, "fails", "masked DPO drifts 1.00 times as much"),
        ({**BETTER, "RRPO without spans": 0.6}, LESS, "holds", "here the spans bring no accuracy"),
    ],
)
def test_it_judges_by_what_was_fixed_beforehand(
    right: dict[str, float], drift: dict[str, float], verdict: str, reason: str
) -> None:
    finding = _judge(curves(right, drift))
    assert finding.verdict == verdict
    assert reason in finding.reason
    assert "DPO +0.7 and RRPO +2.5 points" in finding.measured


def test_the_pairs_are_mistakes_with_their_digits_marked() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'data')")
    images, labels = p55._digits()
    torch.manual_seed(0)
    model = p55.ClipModel(images)
    g = torch.Generator().manual_seed(0)
    frames, digits = p55._clips(4, torch.arange(100), labels, g)
    texts = [p55._say(d) for d in digits]
    tokens = p55._tokens(frames, texts, "<order>")
    assert model(tokens["ids"]).shape == (4, p55.FRAMES + 1 + 26, len(p55.WORDS))
    assert texts[0].startswith("first a ")
    assert tokens["mask"].sum(1).tolist() == [26] * 4
    later = tokens["ids"].clone()
    later[:, 20] = 3  # what comes later does not matter
    assert torch.equal(model(later)[:, :21], model(tokens["ids"])[:, :21])


@pytest.mark.slow
def test_the_study_runs() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'data')")
    assert CLAIM.run().figures["start/right"] > 0
