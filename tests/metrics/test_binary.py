"""Rates, F-score, area under the ROC curve and Youden's threshold, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as peer

from poise.errors import InputError
from poise.metrics.binary import area_under_roc, binary_report, youden_threshold


def sample(seed: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(60, generator=g) < 0.3).long()
    scores = (0.6 * torch.rand(60, generator=g, dtype=torch.float64) + 0.2 * y).clamp(0, 1)
    return (scores * 8).round() / 8 if ties else scores, y


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_scikit_learn(seed: int, ties: bool) -> None:
    scores, y = sample(seed, ties)
    s, t = scores.numpy(), y.numpy()
    found = binary_report(scores, y, 0.4, beta=2.0)
    predicted = s >= 0.4
    assert found.area == pytest.approx(peer.roc_auc_score(t, s))
    assert found.accuracy == pytest.approx(peer.accuracy_score(t, predicted))
    assert found.sensitivity == pytest.approx(peer.recall_score(t, predicted))
    assert found.specificity == pytest.approx(peer.recall_score(t, predicted, pos_label=0))
    assert found.precision == pytest.approx(peer.precision_score(t, predicted, zero_division=0))
    assert found.f_score == pytest.approx(peer.fbeta_score(t, predicted, beta=2.0, zero_division=0))
    false, true, thresholds = peer.roc_curve(t, s, drop_intermediate=False)
    own = binary_report(scores, y, youden_threshold(scores, y))
    assert own.sensitivity + own.specificity - 1 == pytest.approx((true - false).max())
    assert np.isin(own.threshold, thresholds)


def test_a_weight_counts_an_example_that_often() -> None:
    scores, y = sample(0, True)
    weights = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(1))
    repeated = youden_threshold(scores.repeat_interleave(weights), y.repeat_interleave(weights))
    assert youden_threshold(scores, y, weights) == repeated


def test_nothing_predicted_is_zero_and_no_division() -> None:
    found = binary_report(torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0.9)
    assert (found.precision, found.f_score, found.specificity) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        (torch.ones(3), torch.ones(2), "scores float"),
        (torch.ones(2), torch.ones(2), "both of them"),
        (torch.ones(2), torch.tensor([0, 2]), "targets 0 and 1"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([0, 1]), "NaN"),
    ],
)
def test_bad_input_is_named(scores: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        area_under_roc(scores, target)
