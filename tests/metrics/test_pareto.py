"""Fronts and hypervolumes: against counting by hand, their laws, and moocore."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from poise.errors import InputError
from poise.metrics.pareto import (
    front,
    hypervolume,
    hypervolume_contributions,
    hypervolume_improvement,
    nondominated,
)
from poise.pareto_sweep import contributions_3d, kernel, volume_3d

SIZES = [(n, m) for m in (1, 2, 3, 4, 5) for n in (1, 2, 5, 11)]


def draw(n: int, m: int, seed: int = 0, integers: bool = False) -> np.ndarray:
    """Points on both sides of the reference 0; integers bring ties, duplicates and dominated points."""
    random = np.random.default_rng([n, m, seed])
    return random.integers(-1, 4, (n, m)).astype(float) if integers else random.normal(0.5, 1.0, (n, m))


def by_inclusion_exclusion(points: np.ndarray) -> float:
    """The union of boxes from 0: boxes less intersections of two, plus those of three, ..."""
    clipped = points[(points > 0).all(1)]
    return math.fsum(
        (-1) ** (k + 1) * float(np.min(subset, axis=0).prod())
        for k in range(1, len(clipped) + 1)
        for subset in combinations(clipped, k)
    )


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("integers", [False, True])
def test_the_volume_is_that_of_inclusion_and_exclusion(n: int, m: int, integers: bool) -> None:
    points = draw(n, m, integers=integers)
    assert hypervolume(points, np.zeros(m)) == pytest.approx(by_inclusion_exclusion(points), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_volume_of_integer_points_is_a_number_of_cells(m: int) -> None:
    points = np.random.default_rng(m).integers(0, 6, (12, m))
    cells = np.stack(np.meshgrid(*[np.arange(6)] * m), -1).reshape(-1, 1, m)
    assert hypervolume(points, np.zeros(m)) == int((points > cells).all(2).any(1).sum())


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("integers", [False, True])
def test_a_contribution_is_what_is_lost_without_the_point(n: int, m: int, integers: bool) -> None:
    points, low = draw(n, m, 1, integers), np.zeros(m)
    whole = hypervolume(points, low)
    rest = [np.delete(points, i, 0) for i in range(n)]
    lost = [whole - (hypervolume(r, low) if len(r) else 0.0) for r in rest]
    found = hypervolume_contributions(points, low)
    torch.testing.assert_close(found, torch.tensor(lost, dtype=torch.float64), rtol=1e-10, atol=1e-11)
    again = [hypervolume_improvement(points[i], rest[i], low) for i in range(n)]
    torch.testing.assert_close(found, torch.tensor(again, dtype=torch.float64), rtol=1e-10, atol=1e-11)
    assert bool((found >= 0).all())


def test_a_front_of_three_objectives_has_the_contributions_that_removal_gives() -> None:
    points = np.abs(np.random.default_rng(0).normal(size=(60, 3)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    low = [0.1, 0.0, 0.2]
    one_by_one = [hypervolume_improvement(p, np.delete(points, i, 0), low) for i, p in enumerate(points)]
    found = hypervolume_contributions(points, low)
    torch.testing.assert_close(found, torch.tensor(one_by_one, dtype=torch.float64), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_duplicates_dominated_points_and_points_below_the_reference_change_nothing(m: int) -> None:
    points, low = np.abs(draw(8, m)) + 0.1, np.zeros(m)
    whole = hypervolume(points, low)
    more = np.concatenate([points, points[:3], points[:3] * 0.9, -np.ones((2, m))])
    assert hypervolume(more, low) == pytest.approx(whole, rel=1e-12)
    half_below = np.full((1, m), 5.0)
    half_below[0, 0] = -0.1
    assert hypervolume(np.concatenate([points, half_below]), low) == pytest.approx(whole, rel=1e-12)


def test_a_point_on_one_side_below_the_reference_has_no_volume_and_no_negative_one() -> None:
    assert hypervolume([[0.3, -0.9]], [0.0, 0.0]) == 0.0
    assert hypervolume_improvement([0.3, -0.9], [[0.1, 0.1]], [0.0, 0.0]) == 0.0
    assert hypervolume_contributions([[0.3, -0.9], [0.1, 0.1]], [0.0, 0.0]).tolist() == [0.0, 0.1 * 0.1]


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_volume_never_falls_and_scales_with_its_axes(m: int) -> None:
    points, low = draw(10, m, 3), np.full(m, -2.0)
    volumes = [hypervolume(points[:k], low) for k in range(1, 11)]
    assert all(b >= a - 1e-12 for a, b in pairwise(volumes))
    scale = np.arange(1.0, m + 1)
    assert hypervolume(points * scale, low * scale) == pytest.approx(volumes[-1] * scale.prod(), rel=1e-12)
    order = np.random.default_rng(0).permutation(m)
    assert hypervolume(points[:, order], low) == pytest.approx(volumes[-1], rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SIZES if m > 1] + [(80, 2), (80, 3)])
@pytest.mark.parametrize("integers", [False, True])
def test_what_is_not_dominated_is_found_by_comparing_all_pairs(n: int, m: int, integers: bool) -> None:
    points = draw(n, m, 2, integers)
    slow = [not any((q >= p).all() and (q > p).any() for q in points) for p in points]
    assert nondominated(points).tolist() == slow
    expected = np.unique(points[np.array(slow)], axis=0)
    assert front(points).tolist() == expected.tolist()


def test_compiled_loops_agree_with_plain_ones_to_the_last_bit() -> None:
    points = np.abs(np.random.default_rng(1).normal(size=(40, 3)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points = points[np.argsort(-points[:, 2])]
    for loop in (volume_3d, contributions_3d):
        assert np.array_equal(kernel(loop, 1e9)(points), loop(points))


def test_tensors_of_any_type_are_read_and_an_empty_set_has_no_volume() -> None:
    points = torch.tensor([[1.0, 2.0], [2.0, 1.0]], requires_grad=True)
    assert hypervolume(points, torch.zeros(2)) == 3.0
    assert hypervolume(torch.zeros(0, 3), torch.zeros(3)) == 0.0
    assert hypervolume_improvement([1.0, 1.0], [], [0.0, 0.0]) == 1.0
    assert hypervolume_contributions(points.half(), [0, 0]).dtype == torch.float64


def test_wrong_sizes_and_numbers_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"have 2 objectives, and the reference is \[3\]"):
        hypervolume([[1.0, 2.0]], [0.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"n points with m objectives each, and these are \[2\]"):
        hypervolume([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(InputError, match=r"Point 1 is \[nan, 1.0\]: every objective must be finite"):
        hypervolume([[1.0, 2.0], [math.nan, 1.0]], [0.0, 0.0])
    with pytest.raises(InputError, match=r"The reference is \[0.0, inf\], and it must be finite"):
        hypervolume([[1.0, 2.0]], [0.0, math.inf])


@pytest.mark.peer
@pytest.mark.parametrize("m", [2, 3, 4, 5])
@pytest.mark.parametrize("integers", [False, True])
def test_moocore_finds_the_same_volumes_and_contributions(m: int, integers: bool) -> None:
    moocore = pytest.importorskip("moocore", reason="moocore is not installed (extra 'peers')")
    points, low = draw(70, m, 4, integers), np.zeros(m)
    theirs = moocore.hypervolume(points, ref=low, maximise=True)
    assert hypervolume(points, low) == pytest.approx(theirs, rel=1e-10)
    lost = moocore.hv_contributions(points, ref=low, maximise=True, ignore_dominated=False)
    torch.testing.assert_close(
        hypervolume_contributions(points, low), torch.from_numpy(lost), rtol=1e-9, atol=1e-10 * theirs
    )
    kept = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    assert nondominated(points).tolist() == kept.tolist()
