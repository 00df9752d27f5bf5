"""The win rate, with and without the advantage of length."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.metrics.win_rate import win_rate


def test_wins_that_length_alone_explains_are_taken_out() -> None:
    g = torch.Generator().manual_seed(0)
    gap = torch.randint(-5, 15, (4000,), generator=g)  # ours are longer
    won = (
        torch.rand(4000, generator=g) < torch.sigmoid(1.5 * torch.tanh(gap / gap.double().std(correction=0)))
    ).float()
    found = win_rate(won, gap + 20, torch.full_like(gap, 20))
    assert found.raw > 0.6
    assert found.controlled == pytest.approx(0.5, abs=0.04)
    assert "length-controlled" in str(found)


def test_it_equals_an_unpenalised_logistic_regression() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(1)
    gap, won = torch.randint(-9, 10, (500,), generator=g), torch.rand(500, generator=g) < 0.6
    x = torch.tanh(gap.double() / gap.double().std(correction=0))[:, None].numpy()
    reference = linear.LogisticRegression(C=1e9, tol=1e-10).fit(x, won.numpy())
    wanted = torch.sigmoid(torch.tensor(reference.intercept_[0])).item()
    zero = torch.zeros_like(gap)
    assert win_rate(won.float(), gap, zero, penalty=1e-12).controlled == pytest.approx(wanted, abs=1e-4)


def test_equal_lengths_and_perfect_separation_stay_finite() -> None:
    same = torch.full((4,), 3)
    assert win_rate(torch.tensor([1.0, 0.0, 0.5, 1.0]), same, same).controlled == pytest.approx(0.625)
    apart = win_rate(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([5, 6, 1, 2]), same)
    assert 0 < apart.controlled < 1


def test_what_does_not_fit_is_said() -> None:
    one = torch.ones(2)
    with pytest.raises(InputError, match="three tensors"):
        win_rate(torch.ones(3), one, one)
    with pytest.raises(InputError, match="some do not"):
        win_rate(2 * one, one, one)
