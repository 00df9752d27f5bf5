"""Tuned noise: each example has a strength of its own, evaluation is untouched, and the laws of each kind of noise hold."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.parts import (
    BestResponseLSTM,
    TunedChannelDropout,
    TunedColourJitter,
    TunedCutout,
    TunedDropout,
    TunedInputScale,
    TunedNoise,
    drop_connect,
)
from poise.weights import Hyperparameter


def placed(values: list[float], low: float = 0, high: float = 1, **options: Any) -> Hyperparameter:
    hyper = Hyperparameter("h", values[0], low, high, **options)
    hyper.place(hyper.unconstrain(torch.tensor(values, dtype=torch.float64)))
    return hyper


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_each_example_is_dropped_at_its_own_rate_and_keeps_its_mean() -> None:
    y = TunedDropout(placed([0.1, 0.5, 0.8]))(torch.ones(3, 40_000))
    # three standard deviations of a mean over 40,000 draws
    torch.testing.assert_close((y == 0).float().mean(1), torch.tensor([0.1, 0.5, 0.8]), atol=0.008, rtol=0)
    torch.testing.assert_close(y.mean(1), torch.ones(3), atol=0.03, rtol=0)
    assert set(y[1].unique().tolist()) == {0.0, 2.0}


def test_a_shared_axis_has_one_mask_and_a_channel_is_dropped_whole() -> None:
    y = TunedDropout(0.5, shared_axes=(1,))(torch.ones(4, 7, 50))
    assert torch.equal(y, y[:, :1].expand_as(y))
    z = TunedChannelDropout(placed([0.2, 0.8]))(torch.ones(2, 5000, 2, 2))
    assert torch.equal(z, z[..., :1, :1].expand_as(z))
    torch.testing.assert_close((z == 0).float().mean((1, 2, 3)), torch.tensor([0.2, 0.8]), atol=0.02, rtol=0)
    assert not TunedDropout(1.0)(torch.ones(2, 3)).any()


def test_noise_and_scale_have_the_strength_of_each_example() -> None:
    y = TunedNoise(placed([0.1, 2.0], high=math.inf))(torch.zeros(2, 40_000))
    torch.testing.assert_close(y.std(1), torch.tensor([0.1, 2.0]), rtol=0.02, atol=0)
    scale = placed([0.5] * 20_000, high=math.inf)
    u = TunedInputScale(scale)(torch.ones(20_000, 2))
    assert torch.equal(u[:, 0], u[:, 1])
    assert u.min() >= 1 / 1.5 - 1e-6
    assert u.max() <= 1.5 + 1e-6
    assert float(u.mean()) == pytest.approx((1 / 1.5 + 1.5) / 2, abs=0.01)


def test_cutout_blanks_as_many_squares_of_the_length_as_each_example_has() -> None:
    holes = placed([0, 1, 1, 3], high=4, discrete=True)
    length = placed([3, 0, 5, 1], high=24, discrete=True)
    layer = TunedCutout(holes, length)
    most = torch.zeros(4)
    for _ in range(50):
        most = torch.maximum(most, (layer(torch.ones(4, 2, 40, 40)) == 0).sum((1, 2, 3)) / 2)
    assert most.tolist() == [0, 0, 25, 3]
    flat = TunedCutout(1, 100, shape=(1, 4, 4))
    assert not flat(torch.ones(2, 16)).any()


def test_colour_jitter_of_no_strength_is_the_identity_and_keeps_what_it_must() -> None:
    image = torch.rand(3, 3, 5, 5)
    torch.testing.assert_close(TunedColourJitter()(image), image)
    zero = placed([1e-9] * 3, high=1.0)
    layer = TunedColourJitter(zero, zero, zero, zero)
    torch.testing.assert_close(layer(image), image, atol=1e-5, rtol=0)
    grey = torch.tensor([0.299, 0.587, 0.114])
    luma = torch.einsum("c,bchw->bhw", grey, image)
    turned = TunedColourJitter(saturation=0.9, hue=0.5)(image)
    assert not torch.allclose(turned, image)
    torch.testing.assert_close(torch.einsum("c,bchw->bhw", grey, turned), luma, atol=1e-5, rtol=0)
    contrasted = TunedColourJitter(contrast=0.9)(image)
    torch.testing.assert_close(
        torch.einsum("c,bchw->bhw", grey, contrasted).mean((1, 2)), luma.mean((1, 2)), atol=1e-5, rtol=0
    )


def test_dropped_weights_are_one_mask_for_the_batch_and_for_every_time_step() -> None:
    layer = drop_connect(nn.Linear(50, 40, bias=False), "weight", Hyperparameter("p", 0.5, 0, 0.9, per_example=False))
    with torch.no_grad():
        layer.parametrizations.weight.original.fill_(1.0)  # type: ignore[union-attr]
    y = layer(torch.eye(50))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(layer.eval()(torch.eye(50)), torch.ones(50, 40))
    rows = drop_connect(nn.Embedding(500, 4), "weight", 0.5, rows=True)
    dropped = (rows(torch.arange(500)) == 0).float().mean(1)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    lstm = drop_connect(BestResponseLSTM(3, 4, 1), "weight_hh_l0", 0.5)
    assert lstm(torch.zeros(5, 2, 3))[0].shape == (5, 2, 4)


@pytest.mark.parametrize("layer", [TunedDropout(0.5), TunedNoise(1.0), TunedInputScale(1.0), TunedCutout(1, 3)])
def test_nothing_happens_in_evaluation(layer: nn.Module) -> None:
    x = torch.rand(2, 1, 8, 8)
    assert layer.eval()(x) is x
    assert not torch.equal(layer.train()(x), x)


def test_the_value_is_saved_with_the_model_and_a_copy_stands_alone() -> None:
    rate = Hyperparameter("rate", 0.25, 0, 0.9)
    model = nn.Sequential(nn.Linear(2, 2), TunedDropout(rate))
    assert [name for name in model.state_dict() if "rate" in name] == ["1.rate.raw"]
    twin = copy.deepcopy(model)
    rate.set(0.5)
    assert float(twin[1].rate) == pytest.approx(0.25)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TunedDropout(1.5), r"rate must lie in \[0, 1\]"),
        (lambda: TunedNoise(-1.0), "std must lie"),
        (lambda: TunedDropout(Hyperparameter("r", 2, 0, 3)), "rate must lie"),
        (lambda: TunedCutout(Hyperparameter("n", 2, 0, math.inf, discrete=True), 3), "finite high"),
        (lambda: TunedColourJitter(hue=0.1)(torch.ones(2, 1, 3, 3)), "three channels"),
        (lambda: TunedChannelDropout(0.1)(torch.ones(2, 3)), "channels"),
        (lambda: TunedCutout(1, 2)(torch.ones(2, 3)), "images"),
        (lambda: TunedColourJitter()(torch.ones(2, 3)), "images"),
        (lambda: drop_connect(nn.Linear(2, 2), "wait", 0.1), "no weight 'wait'"),
        (lambda: drop_connect(nn.Linear(2, 2), "weight", 1.0), r"\[0, 1\)"),
        (lambda: drop_connect(nn.LSTM(2, 2), "weight_hh_l0", 0.1), "pass a changed one by"),
        (lambda: drop_connect(nn.Linear(2, 2), "weight", Hyperparameter("r", 0.1, 0, 0.9)), "per_example=False"),
    ],
)
def test_bad_strengths_and_inputs_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_float64_stays_float64() -> None:
    x = torch.rand(2, 3, 8, 8).double()
    jitter = TunedColourJitter(0.1, 0.1, 0.1, 0.1)
    y: Tensor = nn.Sequential(TunedDropout(placed([0.1, 0.2])), jitter, TunedCutout(1, 2), TunedInputScale(0.1))(x)
    assert y.dtype == torch.float64
