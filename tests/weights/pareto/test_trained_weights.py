"""Weights that move: each follows its rule by hand, and comes to rest where its objective says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto import IMTLL, DynamicAverage, GradNorm, LossScale, NashMTL, Normalised, Uncertainty

F64 = torch.float64
EMPTY = torch.empty(0, dtype=F64)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def test_grad_norm_follows_autograd_and_the_optimiser_of_pytorch() -> None:
    """L_grad differentiated by autograd with the target held, torch.optim.Adam, scaled back to sum m."""
    rule, lr, alpha = GradNorm(alpha=1.5, lr=0.025), 0.025, 1.5
    weight = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=lr)
    generator = torch.Generator().manual_seed(0)
    initial = values(1.0, 2.0, 5.0)
    for t in range(30):
        j = torch.randn(3, 7, generator=generator, dtype=F64) * values(1.0, 3.0, 0.2)[:, None]
        now = initial if t == 0 else initial * (0.5 + torch.rand(3, generator=generator, dtype=F64))
        rule.move(j @ j.T, now)
        norms = j.norm(dim=1)
        rate = now / initial
        target = ((weight * norms).mean() * (rate / rate.mean()) ** alpha).detach()
        optimizer.zero_grad()
        (weight * norms - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            weight.clamp_(min=1e-3).mul_(3 / weight.sum())
        torch.testing.assert_close(rule.weigh(j @ j.T, now), weight.detach(), atol=1e-12, rtol=0)


def test_grad_norm_with_alpha_0_comes_to_equal_norms() -> None:
    rule, gram = GradNorm(alpha=0.0, lr=0.01), torch.diag(values(1.0, 4.0))
    for _ in range(400):
        rule.move(gram, values(1.0, 1.0))
    weighted = rule.weigh(gram, EMPTY) * values(1.0, 2.0)
    assert float(weighted[0] / weighted[1]) == pytest.approx(1, abs=0.05)


def test_grad_norm_weighs_the_term_that_lags_behind() -> None:
    rule, gram = GradNorm(alpha=1.5), torch.eye(2, dtype=F64)
    for t in range(50):
        rule.move(gram, values(1.0, 0.99**t))
    assert float(rule.weigh(gram, EMPTY)[0]) > 1


def test_grad_norm_needs_positive_first_values() -> None:
    with pytest.raises(InputError, match="grad_norm: rates of training"):
        GradNorm().move(torch.eye(2, dtype=F64), values(1.0, -1.0))


def test_uncertainty_rests_at_half_the_inverse_value() -> None:
    for likelihood in ("regression", "classification"):
        rule = Uncertainty(likelihood, lr=0.05)
        for _ in range(600):
            rule.move(EMPTY, values(0.1, 1.0, 8.0))
        torch.testing.assert_close(rule.weigh(EMPTY, values(0, 0, 0)), 0.5 / values(0.1, 1.0, 8.0), atol=0, rtol=1e-2)


def test_uncertainty_descends_on_its_objective() -> None:
    """The first step of Adam is lr in the direction of minus the gradient's sign."""
    rule = Uncertainty("classification", lr=0.01)
    rule.move(EMPTY, values(0.1, 2.0))
    s = torch.zeros(2, dtype=F64, requires_grad=True)
    (torch.exp(-s) * values(0.1, 2.0) + s / 2).sum().backward()
    assert s.grad is not None
    torch.testing.assert_close(rule.s, -0.01 * s.grad.sign(), atol=1e-8, rtol=0)


def test_imtl_l_rests_at_the_inverse_value() -> None:
    rule = IMTLL(lr=0.05)
    for _ in range(600):
        rule.move(EMPTY, values(0.1, 1.0, 8.0))
    torch.testing.assert_close(rule.weigh(EMPTY, values(0, 0, 0)), 1 / values(0.1, 1.0, 8.0), atol=0, rtol=1e-2)


def test_values_at_or_below_zero_stop_at_the_bound() -> None:
    rule = Uncertainty(lr=1.0, bound=5.0)
    for _ in range(50):
        rule.move(EMPTY, values(-1.0, 1.0))
    assert float(rule.s[0]) == -5.0


def test_a_value_that_is_not_finite_moves_nothing() -> None:
    rule = LossScale()
    rule.move(EMPTY, values(1.0, 2.0))
    before = rule.average.clone()
    rule.move(EMPTY, values(float("nan"), 2.0))
    torch.testing.assert_close(rule.average, before)


def test_dynamic_average_is_a_softmax_of_ratios_of_windows() -> None:
    rule = DynamicAverage(temperature=2.0, window=2)
    for pair in ((4.0, 1.0), (2.0, 1.0)):
        rule.move(EMPTY, values(*pair))
        torch.testing.assert_close(rule.weigh(EMPTY, values(1, 1)), values(1.0, 1.0))
    rule.move(EMPTY, values(1.0, 1.0))
    rule.move(EMPTY, values(2.0, 1.0))
    expected = 2 * torch.softmax(values(1.5 / 3.0, 1.0) / 2.0, 0)
    torch.testing.assert_close(rule.weigh(EMPTY, values(9, 9)), expected)


def test_loss_scale_gives_every_term_the_same_share_of_the_value() -> None:
    rule = LossScale(decay=0.9)
    for _ in range(5):
        rule.move(EMPTY, values(0.01, 100.0))
    w = rule.weigh(EMPTY, values(1.0, 1.0))
    torch.testing.assert_close(w * values(0.01, 100.0), torch.full((2,), 50.005, dtype=F64))


def test_nash_mtl_keeps_its_weights_between_bargains() -> None:
    rule = NashMTL(max_norm=0, update_every=2)
    grams = [torch.diag(values(1.0, 1.0 + t)) for t in range(3)]
    found = []
    for gram in grams:
        found.append(rule.weigh(gram, EMPTY))
        rule.move(gram, EMPTY)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], NashMTL(max_norm=0).weigh(grams[2], EMPTY))


def test_an_average_of_norms_lets_a_term_fade() -> None:
    rule = Normalised(decay=0.9)
    for _ in range(20):
        rule.move(torch.diag(values(1.0, 1.0)), EMPTY)
    faded = torch.diag(values(1.0, 1e-6))
    assert float(rule.weigh(faded, EMPTY)[1]) < 2
    assert float(Normalised().weigh(faded, EMPTY)[1]) > 100
