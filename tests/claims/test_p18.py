"""The claim of paper 18: its linear theory exactly, its verdicts, and one small study from end to end."""

from __future__ import annotations

import pytest
import torch

from poise.claims import p18


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_model_learns_the_truth_first_and_interpolates_every_wrong_label_in_the_end(seed: int) -> None:
    dynamics = p18.linear_demonstration(seed=seed)
    assert bool((dynamics.seen_through[:10] == 1).all())
    assert float(dynamics.seen_through[-1]) == 0
    assert float(dynamics.fitted[-1]) == 1
    # The first step is the mean of label * x, which points along v; what interpolates is nearly orthogonal to it.
    assert float(dynamics.cosine[0]) > 0.95
    assert float(dynamics.cosine[-1]) < 0.15


def test_the_limit_of_the_linear_model_is_that_of_scikit_learns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, _, label = p18._two_gaussians(200, 240, 0.3, 0.1, seed=0)
    peer = linear_model.LogisticRegression(C=1e6, fit_intercept=False, max_iter=5000).fit(x.numpy(), label.numpy())
    assert peer.score(x.numpy(), label.numpy()) == 1  # separable with its wrong labels, as the theorem's regime says
    w = torch.from_numpy(peer.coef_[0])
    ours = p18.linear_demonstration(seed=0)
    # Both tend to the direction of largest margin, slowly: their angles to v agree to two hundredths.
    assert float(w[0] / w.norm()) == pytest.approx(float(ours.cosine[-1]), abs=0.02)


def test_a_larger_ratio_of_examples_to_dimensions_is_not_memorised() -> None:
    dynamics = p18.linear_demonstration(dimension=20, examples=2000, steps=500)
    assert float(dynamics.seen_through[-1]) > 0.95


def figures(**changed: float) -> dict[str, float]:
    usual = {
        "ce_best": 0.89,
        "ce_final": 0.71,
        "elr_best": 0.93,
        "elr_final": 0.88,
        "gap": 0.17,
        "ce_peak_drop": 0.18,
        "ce_memorised": 0.99,
        "elr_memorised": 0.3,
        "precision": 0.98,
        "recall": 0.7,
        "linear_early": 1.0,
        "linear_late": 0.0,
    }
    return {**usual, **changed}


def problem() -> p18.Problem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(20)
    images = torch.eye(10)[labels] + 0.3 * torch.randn(200, 10, generator=generator)
    return p18.Problem("toy", images, labels, test=50, epochs=10, lr=0.05)


def test_the_verdict_follows_the_figures() -> None:
    assert p18._judge(problem(), figures(), full=False).verdict == "holds"
    for changed, words in (
        ({"gap": 0.07}, "less than 10 points"),
        ({"ce_peak_drop": 0.0}, "no peak"),
        ({"elr_memorised": 0.6}, "more than half"),
        ({"linear_early": 0.9}, "within ten steps"),
        ({"linear_late": 0.1}, "does not interpolate"),
    ):
        finding = p18._judge(problem(), figures(**changed), full=False)
        assert finding.verdict == "fails"
        assert words in finding.reason


@pytest.mark.parametrize("full", [False, True])
def test_the_study_runs_from_end_to_end_on_a_toy(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p18, "_problem", problem)
    monkeypatch.setattr(p18, "SEEDS", 2)
    told: list[float] = []
    finding = p18.run(full=full, progress=lambda share, text: told.append(share))
    assert told == sorted(told)
    assert 0 <= told[0] < told[-1] < 1
    assert finding.measured.startswith("toy")
    assert ("ELR+" in finding.figures) == full
    assert len(told) == (4 if not full else 4 + 20)


@pytest.mark.slow
def test_the_claim_holds_on_this_machine() -> None:
    finding = p18.CLAIM.run()
    assert finding.verdict == "holds", finding.reason
