"""Label noise: exact shares, kept truth, the maps of the literature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.label_noise import CIFAR10_CLASS_MAP, DIGIT_CLASS_MAP, flip_labels, ring
from poise.errors import InputError


@st.composite
def labels(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    classes = draw(st.integers(2, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(classes, (draw(st.integers(1, 200)),), generator=generator), classes


@settings(max_examples=50, deadline=None)
@given(labels(), st.floats(0, 1), st.booleans(), st.integers(0, 1000))
def test_symmetric_noise_draws_an_exact_share_and_keeps_the_truth(
    case: tuple[torch.Tensor, int], rate: float, include_own: bool, seed: int
) -> None:
    target, classes = case
    before = target.clone()
    noisy = flip_labels(target, rate, classes=classes, include_own=include_own, seed=seed)
    assert torch.equal(target, before)
    assert torch.equal(noisy.true_target, before)
    assert int(noisy.drawn.sum()) == round(rate * len(target))
    assert not bool((noisy.wrong & ~noisy.drawn).any())
    assert int(noisy.target.min()) >= 0
    assert int(noisy.target.max()) < classes
    if not include_own:
        assert torch.equal(noisy.wrong, noisy.drawn)


@settings(max_examples=50, deadline=None)
@given(labels(), st.floats(0, 1))
def test_pair_noise_takes_the_same_share_of_every_class_to_the_next(
    case: tuple[torch.Tensor, int], rate: float
) -> None:
    target, classes = case
    noisy = flip_labels(target, rate, "pair", classes=classes)
    assert torch.equal(noisy.target[noisy.wrong], (target[noisy.wrong] + 1) % classes)
    for label in range(classes):
        members = target == label
        assert int(noisy.wrong[members].sum()) == round(rate * int(members.sum()))


def test_symmetric_noise_with_the_own_class_flips_rate_times_one_minus_one_over_c() -> None:
    noisy = flip_labels(torch.arange(100_000) % 10, 0.4, seed=1)
    # 40,000 draws, each wrong with probability 0.9: standard deviation 60 of 36,000; four of them are 0.0024.
    assert noisy.rate == pytest.approx(0.36, abs=0.0024)


def test_symmetric_noise_without_the_own_class_reaches_every_other_class_alike() -> None:
    noisy = flip_labels(torch.zeros(90_000, dtype=torch.long), 1.0, classes=10, include_own=False)
    shares = noisy.transition()[0]
    assert shares[0] == 0
    # 10,000 expected for each of nine classes, standard deviation 94: five of them are 0.0053.
    assert torch.allclose(shares[1:], torch.full((9,), 1 / 9, dtype=torch.float64), atol=0.0053)


@pytest.mark.parametrize("class_map", [CIFAR10_CLASS_MAP, DIGIT_CLASS_MAP])
def test_asymmetric_noise_follows_the_map_and_leaves_other_classes_clean(class_map: dict[int, int]) -> None:
    target = torch.arange(1000) % 10
    noisy = flip_labels(target, 0.4, "asymmetric", class_map=class_map)
    transition = noisy.transition()
    for label in range(10):
        expected = torch.zeros(10, dtype=torch.float64)
        expected[label] = 0.6 if label in class_map else 1.0
        if label in class_map:
            expected[class_map[label]] = 0.4
        assert torch.allclose(transition[label], expected)


def test_a_ring_takes_each_class_for_the_next_of_its_group() -> None:
    assert ring([[0, 3], [1, 2, 4], [5]]) == {0: 3, 3: 0, 1: 2, 2: 4, 4: 1}
    with pytest.raises(InputError, match="one group only"):
        ring([[0, 1], [1, 2]])


def test_the_same_seed_gives_the_same_noise_and_another_seed_does_not() -> None:
    target = torch.arange(100) % 5
    assert torch.equal(flip_labels(target, 0.4, seed=3).target, flip_labels(target, 0.4, seed=3).target)
    assert not torch.equal(flip_labels(target, 0.4, seed=3).target, flip_labels(target, 0.4, seed=4).target)


def test_noise_does_not_move_the_default_generator() -> None:
    before = torch.random.get_rng_state()
    flip_labels(torch.arange(10) % 2, 0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.5}, "must lie in 0..1"),
        ({"rate": float("nan")}, "must lie in 0..1"),
        ({"kind": "symetric"}, "Did you mean 'symmetric'"),
        ({"kind": "asymmetric"}, "needs a class map"),
        ({"kind": "asymmetric", "class_map": {0: 9}}, "must lie in 0..2"),
        ({"kind": "asymmetric", "class_map": {1: 1}}, "differ"),
        ({"classes": 2}, "labels in 0..1"),
        ({"classes": 1}, "at least 2 classes"),
        ({"target": torch.zeros(3)}, "int64"),
    ],
)
def test_noise_that_does_not_fit_is_refused_in_words(arguments: dict[str, object], message: str) -> None:
    given_ = {"target": torch.tensor([0, 1, 2]), "rate": 0.4} | arguments
    with pytest.raises(InputError, match=message):
        flip_labels(**given_)  # type: ignore[arg-type]
