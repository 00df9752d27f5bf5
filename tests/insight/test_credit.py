"""Token rewards in numbers."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import InputError
from poise.insight import attribution, token_credit

REWARDS = [torch.tensor([0.42, -0.18]), torch.tensor([0.12])]


def test_sum_share_histogram_and_correlation_are_those_of_all_tokens() -> None:
    found = token_credit(
        REWARDS, implied=[2 * r for r in REWARDS], labels=[torch.tensor([True, False]), torch.tensor([False])]
    )
    assert (found.answers, found.tokens) == (2, 3)
    assert found.total == pytest.approx(0.18)
    assert found.negative == pytest.approx(1 / 3)
    assert found.histogram.sum() == 3
    assert found.histogram[18] == found.histogram[6] == found.histogram[12] == 1
    assert found.correlation == pytest.approx(1.0)
    assert found.auc == 1.0
    assert "33% negative" in str(found)


def test_the_auc_equals_that_of_scikit_learn_with_ties() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randint(-5, 5, (200,), generator=g) / 10, torch.rand(200, generator=g) < 0.3
    assert token_credit([scores], labels=[labels]).auc == pytest.approx(metrics.roc_auc_score(labels, scores))


def test_what_is_undefined_is_nan() -> None:
    same = [torch.zeros(3)]
    found = token_credit(same, implied=same, labels=[torch.ones(3, dtype=torch.bool)])
    assert math.isnan(found.correlation)
    assert math.isnan(found.auc)


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InputError, match="at least one token"):
        token_credit([])
    with pytest.raises(InputError, match="implied must have"):
        token_credit(REWARDS, implied=REWARDS[:1])
    with pytest.raises(InputError, match="2 tokens and 1 rewards"):
        attribution(["a", "b"], torch.zeros(1))
