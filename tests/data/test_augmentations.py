"""Laws of the augmentations."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.data.augmentations import Chain, CutMix, Cutout, GaussianNoise, Mixup, RandomFlip, RandomShift
from poise.errors import InputError

SHAPE = (2, 5, 6)
ALL = [
    RandomShift(2),
    RandomFlip(0.5),
    GaussianNoise(0.3),
    Cutout(3),
    Mixup(0.4, classes=3),
    CutMix(1.0, classes=3),
    Chain(RandomShift(1), CutMix(1.0, classes=3), GaussianNoise(0.1)),
]


def images(n: int = 7, seed: int = 0) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.1


def batch_of(x: Tensor) -> dict[str, Tensor]:
    return {"input": x, "target": torch.arange(len(x)) % 3, "index": torch.arange(len(x))}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_equal_generators_give_equal_batches_and_the_given_batch_stays_as_it_was(transform: object) -> None:
    batch = batch_of(images())
    before = {name: value.clone() for name, value in batch.items()}
    torch.manual_seed(0)
    here = transform(batch, seeded(3))  # type: ignore[operator]
    torch.manual_seed(1)  # the global generator has no say
    there = pickle.loads(pickle.dumps(transform))(batch, seeded(3))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert batch.keys() == before.keys()
    other = transform(batch, seeded(4))  # type: ignore[operator]
    assert not torch.equal(here["input"], other["input"])


@pytest.mark.parametrize(
    "make",
    [lambda s: RandomShift(2, s), lambda s: RandomFlip(0.5, s), lambda s: Cutout(3, s), lambda s: CutMix(1.0, 3, s)],
)
def test_flat_images_are_treated_like_images(make: object) -> None:
    x = images()
    flat = make(SHAPE)(batch_of(x.flatten(1)), seeded(5))["input"]  # type: ignore[operator]
    square = make(None)(batch_of(x), seeded(5))["input"]  # type: ignore[operator]
    assert torch.equal(flat, square.flatten(1))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), pixels=st.integers(0, 3))
def test_a_shift_moves_each_image_by_whole_pixels_and_fills_with_zero(seed: int, pixels: int) -> None:
    x = images(4, seed)
    moved = RandomShift(pixels)(batch_of(x), seeded(seed))["input"]
    for before, after in zip(x, moved, strict=True):
        found = 0
        for dy in range(-pixels, pixels + 1):
            for dx in range(-pixels, pixels + 1):
                expected = torch.zeros_like(before)
                ys = slice(max(0, -dy), min(5, 5 - dy)), slice(max(0, dy), min(5, 5 + dy))
                xs = slice(max(0, -dx), min(6, 6 - dx)), slice(max(0, dx), min(6, 6 + dx))
                expected[:, ys[0], xs[0]] = before[:, ys[1], xs[1]]
                found += torch.equal(after, expected)
        assert found == 1


def test_all_shifts_are_equally_likely() -> None:
    x = torch.zeros(9000, 1, 3, 3)
    x[:, :, 1, 1] = 1
    where = RandomShift(1)(batch_of(x), seeded(0))["input"].flatten(1).argmax(1)
    # 9 places, 1000 each; the standard deviation is 30, five of them are allowed
    assert (torch.bincount(where, minlength=9) - 1000).abs().max() < 150


def test_a_flip_mirrors_the_share_that_was_asked_for() -> None:
    x = images(2000)
    out = RandomFlip(0.3)(batch_of(x), seeded(0))["input"]
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    assert ((out == x).flatten(1).all(1) ^ flipped).all()
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.05)  # five standard deviations


def test_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    out = GaussianNoise(0.3)({"input": torch.zeros(1000, 100, dtype=torch.float64)}, seeded(0))["input"]
    assert out.dtype == torch.float64
    assert float(out.std()) == pytest.approx(0.3, rel=0.02)


def test_a_cutout_blanks_at_most_a_square_and_in_the_middle_exactly_one() -> None:
    x = torch.ones(500, 1, 9, 9)
    out = Cutout(3)(batch_of(x), seeded(0))["input"]
    blanked = (out == 0).flatten(1).sum(1)
    assert int(blanked.max()) == 9
    assert int(blanked.min()) == 4  # centred on a corner: rows -1..1 leave two
    assert ((out == 0) | (out == 1)).all()


def test_mixing_mixes_inputs_and_labels_with_the_same_share() -> None:
    batch = batch_of(images())
    out = Mixup(0.4, classes=3)(batch, seeded(1))
    share, partner = out["share"], out["partner"]
    assert torch.equal(share, share[0].expand(7))
    labels = torch.nn.functional.one_hot(batch["target"], 3).float()
    for mixed, plain in ((out["input"], batch["input"]), (out["target"], labels)):
        torch.testing.assert_close(mixed, share[0] * plain + (1 - share[0]) * plain[partner])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_cutmix_takes_from_the_partner_exactly_the_share_of_pixels_that_the_label_says(seed: int) -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 10).clone() + 1
    out = CutMix(1.0, classes=3)(batch_of(x), seeded(seed))
    partner, share = out["partner"], out["share"]
    for i in range(4):
        own = (out["input"][i] == i + 1).float().mean()
        theirs = (out["input"][i] == int(partner[i]) + 1).float().mean()
        assert float(own) == pytest.approx(1.0 if partner[i] == i else float(share[i]), abs=1e-6)
        assert float(theirs) == pytest.approx(1.0 if partner[i] == i else 1 - float(share[i]), abs=1e-6)
    torch.testing.assert_close(out["target"].sum(1), torch.ones(4))


def test_what_is_no_image_or_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="shape="):
        RandomShift(1)({"input": torch.zeros(2, 60)}, seeded(0))
    with pytest.raises(InputError, match="images"):
        Cutout(1, shape=(1, 8, 8))({"input": torch.zeros(2, 60)}, seeded(0))
    for make in (
        lambda: RandomShift(-1),
        lambda: RandomFlip(1.5),
        lambda: GaussianNoise(-0.1),
        lambda: GaussianNoise(float("nan")),
        lambda: Cutout(0),
        lambda: Mixup(0.0, 3),
        lambda: CutMix(1.0, 1),
    ):
        with pytest.raises(InputError):
            make()


def test_dominant_mixup_keeps_each_row_the_larger_part_of_its_mixture() -> None:
    batch = {"input": torch.eye(4), "target": torch.arange(4)}
    for seed in range(20):
        mixed = Mixup(1.0, classes=4, dominant=True)(batch, torch.Generator().manual_seed(seed))
        assert bool((mixed["share"] >= 0.5).all())
