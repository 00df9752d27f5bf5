"""The laws of random, group and time splits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.tasks.splits import (
    Rows,
    check_fractions,
    generator_for,
    group_split,
    random_split,
    stratified_split,
    time_split,
)

SHARES = st.sampled_from([(0.6, 0.2, 0.2), (0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.75, 0.25, 0.0)])


def assert_partition(rows: Rows, count: int) -> None:
    together = torch.cat([rows.train, rows.valid, rows.test])
    assert torch.equal(together.sort().values, torch.arange(count))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 60), min_size=2, max_size=8), SHARES, st.integers(0, 1000))
def test_a_stratified_split_keeps_every_class_and_every_share(
    sizes: list[int], shares: tuple[float, ...], seed: int
) -> None:
    target = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    target = target[torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))]
    rows = stratified_split(target, shares, generator_for(seed, "split"))
    assert_partition(rows, len(target))
    for part, share in zip((rows.train, rows.valid, rows.test), shares, strict=True):
        counts = torch.bincount(target[part], minlength=len(sizes))
        if share == 0:
            assert len(part) == 0
            continue
        assert int(counts.min()) >= 1
        # Within two rows a class: one for rounding, one that a neighbour had to give up.
        assert bool(((counts - share * torch.tensor(sizes)).abs() < 2.01).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 300), SHARES, st.integers(0, 1000))
def test_a_random_split_deals_out_every_row_by_the_shares(count: int, shares: tuple[float, ...], seed: int) -> None:
    rows = random_split(count, shares, generator_for(seed, "split"))
    assert_partition(rows, count)
    for part, share in zip((rows.train, rows.valid, rows.test), shares, strict=True):
        # One row for rounding; of three rows the largest part gives one more up, so that no part is empty.
        assert abs(len(part) - share * count) <= (2.01 if count < 10 else 1.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 30), st.integers(0, 1000), SHARES)
def test_groups_never_cross(groups: int, seed: int, shares: tuple[float, ...]) -> None:
    numbers = torch.cat(
        [torch.arange(groups), torch.randint(groups, (100,), generator=torch.Generator().manual_seed(seed))]
    )
    rows = group_split(numbers, shares, seed)
    assert_partition(rows, len(numbers))
    parts = [set(numbers[part].tolist()) for part in (rows.train, rows.valid, rows.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert all(part for part, share in zip(parts, shares, strict=True) if share)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=80), SHARES)
def test_training_lies_before_validation_and_that_before_the_test(
    moments: list[int], shares: tuple[float, ...]
) -> None:
    time = torch.tensor(moments, dtype=torch.float64)
    if len(set(moments)) < 3:
        if shares[2]:
            with pytest.raises(InputError, match="different moments"):
                time_split(time, shares)
        return
    rows = time_split(time, shares)
    assert_partition(rows, len(moments))
    assert time[rows.train].max() < time[rows.valid].min()
    if shares[2]:
        assert time[rows.valid].max() < time[rows.test].min()


def test_time_shares_are_exact_where_every_moment_differs() -> None:
    rows = time_split(torch.arange(100).double().flip(0), (0.6, 0.2, 0.2))
    assert [len(rows.train), len(rows.valid), len(rows.test)] == [60, 20, 20]
    assert rows.test.tolist() == list(range(20))


def test_seeds_differ_and_repeat() -> None:
    target = torch.arange(200) % 4
    draws = [stratified_split(target, (0.6, 0.2, 0.2), generator_for(seed, "split")).test for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(InputError, match="2 groups, and 3 parts"):
        group_split(torch.tensor([0, 0, 1, 1]), (0.6, 0.2, 0.2), 0)


@pytest.mark.parametrize(
    "split", [(0.6, 0.4), (0.6, 0.3, 0.2), (0.8, 0.2, 0.0), (1.2, -0.1, -0.1), (0.5, 0.25, 0.2, 0.05)]
)
def test_shares_that_do_not_fit_are_refused(split: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="three shares"):
        check_fractions(split, separate_test=False)


def test_a_test_file_leaves_the_other_two_shares_in_proportion() -> None:
    assert check_fractions((0.6, 0.2, 0.2), separate_test=True) == pytest.approx((0.75, 0.25, 0.0))
    assert check_fractions((0.8, 0.2), separate_test=True) == pytest.approx((0.8, 0.2, 0.0))
