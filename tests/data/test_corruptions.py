"""Corruptions: images stay images, severity 0 is none, draws come from the generator alone."""

from __future__ import annotations

import pytest
import torch

from poise.data.corruptions import CORRUPTIONS, EIGHT, corrupt
from poise.errors import InputError


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [8, 28])
def test_a_corrupted_image_is_an_image_and_severity_0_leaves_it(name: str, side: int) -> None:
    images = torch.rand(6, side, side, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    one = corrupt(images, name, 1.0, generator=torch.Generator().manual_seed(1))
    two = corrupt(images, name, 1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert torch.equal(one, two)
    assert one.shape == images.shape
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    assert torch.equal(one, images) is (name == "identity")
    none = corrupt(images, name, 0.0, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(none, images, atol=1e-5, rtol=0)


def test_there_are_sixteen_and_eight_of_them_suit_small_digits() -> None:
    assert len(CORRUPTIONS) == 16
    assert len(EIGHT) == 8
    assert set(EIGHT) < set(CORRUPTIONS)


def test_what_is_no_corruption_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'rotate'"):
        corrupt(torch.zeros(1, 8, 8), "rotat", generator=torch.Generator())
    with pytest.raises(InputError, match=r"images float \[n, height, width\]"):
        corrupt(torch.zeros(1, 64), "blur", generator=torch.Generator())
