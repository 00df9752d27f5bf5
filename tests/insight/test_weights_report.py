"""Laws of the weight diagnostics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from poise.errors import InputError
from poise.insight import decay_pull, effective_lr_profile, weight_drop_robustness, weight_report
from poise.parts import Compander, compand


def layer_with(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def test_participation_is_one_for_equal_magnitudes_a_third_for_gaussians_and_one_over_n_for_a_single_weight() -> None:
    torch.manual_seed(0)
    signs = torch.where(torch.rand(50, 40) < 0.5, -0.3, 0.3)
    assert weight_report(layer_with(signs))["weight"].participation == pytest.approx(1, rel=1e-6)
    gaussian = weight_report(layer_with(torch.randn(500, 400)))["weight"]
    # The standard error of sum w^4 at n = 2e5 is about 0.7 %.
    assert gaussian.participation == pytest.approx(1 / 3, rel=0.03)
    assert gaussian.kurtosis == pytest.approx(3, rel=0.05)
    single = torch.zeros(5, 4)
    single[0, 0] = 2.0
    assert weight_report(layer_with(single))["weight"].participation == pytest.approx(1 / 20, rel=1e-6)


def test_the_distribution_figures_are_those_of_the_definition() -> None:
    weight = torch.linspace(-1, 1, 201).reshape(3, 67)
    figures = weight_report(layer_with(weight), threshold=0.1)["weight"]
    assert figures.count == 201
    assert figures.max_abs == 1
    assert figures.near_zero == pytest.approx(int((weight.abs() < 0.1).sum()) / 201)
    assert figures.std == pytest.approx(float(weight.double().std(correction=0)), rel=1e-6)
    assert figures.quantiles[0.5] == pytest.approx(float(weight.abs().median()), rel=0.02)
    assert math.isnan(weight_report(layer_with(torch.zeros(2, 2)))["weight"].participation)


def test_a_companded_layer_is_described_by_the_weight_it_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plain = weight_report(model)
    compand(model, include="0.*")
    companded = weight_report(model)
    assert list(companded) == ["0.weight", "1.weight"]
    assert companded["0.weight"].max_abs == pytest.approx(plain["0.weight"].max_abs, rel=1e-5)
    assert companded["0.weight"].w_max < math.inf
    assert companded["1.weight"].w_max == math.inf
    assert hasattr(model[0], "parametrizations")


def test_saturation_counts_weights_whose_slope_fell_below_a_twentieth() -> None:
    layer = nn.Linear(2, 2)
    compand(layer, a=1.0)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(
            torch.tensor([[0.0, 4.0], [4.5, -9.0]])
        )  # 1/(1+v^2) < 0.05 from 4.36 on
    assert weight_report(layer)["weight"].saturated == 0.5


def test_dropping_nothing_changes_nothing_and_the_same_seed_drops_the_same_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    total = lambda m: float(m.weight.abs().sum())  # noqa: E731
    before = layer.weight.detach().clone()
    first = weight_drop_robustness(layer, total, (0.0, 0.5), repeats=3, seed=4)
    assert first.mean[0] == pytest.approx(first.intact)
    assert first.std[0] == 0
    assert first.mean[1] == pytest.approx(0.5 * first.intact, rel=0.1)
    assert first == weight_drop_robustness(layer, total, (0.0, 0.5), repeats=3, seed=4)
    assert torch.equal(layer.weight, before)


def test_the_effective_learning_rate_is_the_squared_slope_and_falls_to_the_bound() -> None:
    bend = Compander("arctan", torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    w, factor = effective_lr_profile(bend)
    torch.testing.assert_close(factor, (0.6 / 0.3) ** 2 * torch.cos(w / 0.6) ** 4, rtol=1e-6, atol=1e-12)
    assert bool((factor.diff() < 0).all())


def test_decay_seen_from_w_is_v_times_the_slope_and_plain_when_w_decays() -> None:
    bend = Compander("arctan", torch.tensor(0.6, dtype=torch.float64))
    w = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64)
    v = 0.6 * torch.tan(w / 0.6)
    torch.testing.assert_close(decay_pull(bend, w, 0.1), 0.1 * v / (1 + (v / 0.6) ** 2))
    assert float(decay_pull(bend, w[-1:])) < float(w[-1])
    bend.decay_on = "w"
    torch.testing.assert_close(decay_pull(bend, w, 0.1), 0.1 * w)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match="threshold"):
        weight_report(nn.Linear(2, 2), threshold=-1)
    with pytest.raises(InputError, match="rates"):
        weight_drop_robustness(nn.Linear(2, 2), lambda m: 0.0, rates=[1.0])
    with pytest.raises(InputError, match="single a and b"):
        effective_lr_profile(Compander(a=torch.ones(3, 1)))
