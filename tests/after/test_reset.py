"""Half-Reset: a part of a fine-tuned model is put back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.after import half_reset
from poise.errors import InputError
from poise.parameter_masks import draw_mask, matrices_of


def layer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(8, 2, 16)


def test_ratio_zero_gives_the_model_before_and_one_the_tuned_one() -> None:
    before, tuned = layer(0), layer(1)
    for ratio, expected in ((0, before), (1, tuned)):
        result = half_reset(tuned, before, ratio=ratio)
        assert all(torch.equal(result[n], t) for n, t in expected.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), level=st.sampled_from(["category", "model", "element"]))
def test_every_weight_is_one_of_the_two_and_the_complement_gives_the_other(seed: int, level: str) -> None:
    before, tuned = layer(0), layer(1)
    mask = draw_mask(matrices_of(tuned), level, seed=seed)
    ours, other = (half_reset(tuned, before, m) for m in (mask, mask.complement()))
    again = half_reset(tuned, before, ratio=0.5, level=level, seed=seed)
    for name, t in tuned.state_dict().items():
        b, keep = before.state_dict()[name], torch.as_tensor(mask[name])
        assert torch.equal(ours[name], torch.where(keep, t, b))
        assert torch.equal(other[name], torch.where(keep, b, t))
        assert torch.equal(again[name], ours[name])
    tuned.load_state_dict(ours)


def test_rescaling_keeps_the_mean_of_the_change_and_leaves_what_is_not_drawn() -> None:
    before, tuned = {"w": torch.zeros(1000), "b": torch.zeros(3)}, {"w": torch.ones(1000), "b": torch.ones(3)}
    mask = {"w": torch.arange(1000) < 250}
    result = half_reset(tuned, before, mask, rescale=True)
    assert float(result["w"].mean()) == pytest.approx(1.0)
    assert float(result["w"].max()) == pytest.approx(4.0)
    assert torch.equal(result["b"], tuned["b"])


def test_buffers_and_integers_are_taken_from_the_tuned_model() -> None:
    before, tuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    tuned(torch.randn(8, 3))
    result = half_reset(tuned, before, {"weight": False})
    assert int(result["num_batches_tracked"]) == 1
    assert torch.equal(result["running_mean"], tuned.running_mean)  # type: ignore[arg-type]


def test_bad_input_says_what_is_expected() -> None:
    a, b = layer(0), layer(1)
    with pytest.raises(InputError, match="give a mask or a ratio"):
        half_reset(a, b)
    with pytest.raises(InputError, match=r"ratio must be in \[0, 1\]"):
        half_reset(a, b, ratio=1.5)
    with pytest.raises(InputError, match="the mask names 'other'"):
        half_reset(a, b, {"other": True})
    with pytest.raises(InputError, match=r"'weight' is \(2, 2\) in the tuned one and \(3, 2\) before"):
        half_reset(nn.Linear(2, 2), nn.Linear(2, 3), {})
