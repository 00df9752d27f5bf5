"""Closed convex sets: what a projection must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.operators import Ball, Box, ConvexSet, NonNegative, Simplex

SETS: list[ConvexSet] = [Box(-0.5, 0.3), Ball(0.7, 0.1), Simplex(1.5), NonNegative()]
numbers = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(lambda v: torch.tensor(v, dtype=torch.float64))


@pytest.mark.parametrize("convex", SETS, ids=repr)
@settings(max_examples=30, deadline=None)
@given(point=numbers, other=numbers)
def test_a_projection_lies_in_the_set_and_no_point_of_the_set_is_nearer(
    convex: ConvexSet, point: torch.Tensor, other: torch.Tensor
) -> None:
    foot, inside = convex.project(point), convex.project(other)
    assert convex.contains(foot)
    assert convex.value(foot) == 0
    # The angle between what was taken away and any way into the set is obtuse: that makes it the nearest point.
    assert float(((point - foot) * (inside - foot)).sum()) <= 1e-9


@pytest.mark.parametrize("convex", SETS, ids=repr)
def test_the_derivative_of_a_projection_equals_its_difference_quotient(convex: ConvexSet) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        point = torch.randn(5, generator=generator, dtype=torch.float64)
        direction = torch.randn(5, generator=generator, dtype=torch.float64)
        h = 1e-7
        quotient = (convex.project(point + h * direction) - convex.project(point - h * direction)) / (2 * h)
        torch.testing.assert_close(convex.derivative(point, direction), quotient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("convex", SETS, ids=repr)
def test_active_constraints_vanish_at_the_projection_and_are_met_with_inequality_inside(convex: ConvexSet) -> None:
    foot = convex.project(torch.tensor([3.0, -2.0, 0.1, 0.05], dtype=torch.float64))
    active = convex.active(foot)
    assert active is not None
    torch.testing.assert_close(active(foot), torch.zeros_like(active(foot)), atol=1e-9, rtol=0)


def test_the_inside_of_a_set_has_no_active_constraint_and_its_outside_an_infinite_value() -> None:
    inside = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert Box(0, 1).active(inside) is None
    assert Ball(1.0).active(inside) is None
    assert Box(0, 0.15).value(inside) == torch.inf


def test_a_simplex_projects_each_row_by_itself() -> None:
    rows = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(Simplex().project(rows)[1], Simplex().project(rows[1]))
    torch.testing.assert_close(Simplex().project(rows).sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(1, 0), "lower must not exceed upper"),
        (lambda: Ball(0.0), "radius must be positive"),
        (lambda: Simplex(-1.0), "total must be positive"),
    ],
)
def test_empty_sets_are_refused(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
