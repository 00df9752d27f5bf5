"""Laws of the losses on probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from poise.terms.probability import Brier


@settings(deadline=None)
@given(classes=st.integers(2, 12), seed=st.integers(0, 1000))
def test_the_mean_brier_loss_is_the_mean_squared_error_of_the_probabilities_times_half_the_classes(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, classes, generator=generator, dtype=torch.float64) * 5
    target = torch.randint(classes, (7,), generator=generator)
    expected = F.mse_loss(logits.softmax(-1), F.one_hot(target, classes).double()) * classes / 2
    torch.testing.assert_close(Brier()(logits, target).mean(), expected)


def test_the_gradient_is_that_of_a_square_through_the_softmax():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda z: Brier()(z, target), logits)
    p, y = logits.softmax(-1), F.one_hot(target, 4)
    (slope,) = torch.autograd.grad(Brier()(logits, target).sum(), logits)
    torch.testing.assert_close(slope, p * ((p - y) - (p * (p - y)).sum(-1, keepdim=True)))


def test_probability_targets_and_class_indices_agree_and_values_lie_between_zero_and_one():
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 30
    target = torch.arange(50) % 3
    values = Brier()(logits, target)
    torch.testing.assert_close(values, Brier()(logits, F.one_hot(target, 3).float()))
    assert float(values.min()) >= 0
    assert float(values.max()) <= 1


def test_the_expected_loss_is_least_at_the_true_probabilities():
    truth = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def expected(logits: torch.Tensor) -> torch.Tensor:
        return sum(truth[k] * Brier()(logits[None], torch.tensor([k]))[0] for k in range(3))

    logits = truth.log().requires_grad_()
    (slope,) = torch.autograd.grad(expected(logits), logits)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_squared_in_single_precision(dtype):
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = torch.arange(8) % 5
    torch.testing.assert_close(Brier()(logits, target), Brier()(logits.float(), target))


def test_the_formula_of_the_paper_parses_and_prints():
    poise = pytest.importorskip("poise.formula")
    text = '0.3*brier + 0.7*distillation(loss="mse_logit")'
    assert "brier" in str(poise.parse(text))
