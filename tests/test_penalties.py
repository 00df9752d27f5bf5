"""Penalties: every proximal map against its definition, every distance 0 where it must be, every conjugate by Fenchel's equality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.operators import Ball, Box, Simplex
from poise.penalties import (
    L0,
    L1,
    MCP,
    SCAD,
    CappedL1,
    ElasticNet,
    GroupLasso,
    Indicator,
    NuclearNorm,
    Scaled,
    SparseSimplex,
    SquaredL2,
    TotalVariation,
)

CONVEX = {
    "l1": L1(),
    "l1 with scales": L1(torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)),
    "squared l2": SquaredL2(),
    "elastic net": ElasticNet(0.3),
    "group lasso": GroupLasso(2),
    "labelled groups": GroupLasso((0, 1, 1, 0, 2, 2)),
    "nuclear norm": NuclearNorm(),
    "total variation": TotalVariation(),
    "box": Indicator(Box(-0.5, 1.0)),
    "simplex": Indicator(Simplex(2.0)),
    "ball": Indicator(Ball(0.8)),
    "l1 and ridge": Scaled(L1(), 0.4, 0.3),
    "groups and ridge": Scaled(GroupLasso(3), 0.4, 0.3),
}
FOLDED = {"mcp": MCP(2.0), "scad": SCAD(1.0, 3.7), "capped l1": CappedL1(1.5)}
SHAPE = (3, 6)


def points(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize("penalty", CONVEX.values(), ids=CONVEX)
@pytest.mark.parametrize("step", [0.05, 0.7, 3.0])
def test_a_proximal_map_is_below_every_other_point(penalty, step):
    p = points(0, *SHAPE)
    u = penalty.prox(p, step)
    least = 0.5 * (u - p).square().sum() + step * penalty.value(u)
    for seed in range(1, 40):
        other = penalty.prox(u + points(seed, *SHAPE) * 10.0 ** -(seed % 5), 1e-3)
        assert 0.5 * (other - p).square().sum() + step * penalty.value(other) >= least - 1e-10


@pytest.mark.parametrize("penalty", CONVEX.values(), ids=CONVEX)
def test_what_a_proximal_map_leaves_is_a_subgradient(penalty):
    """`p - prox(p)` is in the subdifferential at `prox(p)`: Fenchel's equality holds, and the distance is 0."""
    p = points(1, *SHAPE)
    u = penalty.prox(p, 1.0)
    gap = penalty.conjugate(p - u) + penalty.value(u) - ((p - u) * u).sum()
    assert abs(float(gap)) < 1e-9
    if not isinstance(penalty, Indicator | TotalVariation):
        assert float(penalty.distance(u, u - p).max()) < 1e-9
        assert float(penalty.distance(u, u - p + 0.1).max()) > 1e-3


@pytest.mark.parametrize("penalty", [p for p in CONVEX.values() if getattr(p, "norm", False)])
def test_the_polar_is_the_dual_norm(penalty):
    u = points(2, *SHAPE)
    if isinstance(penalty, TotalVariation):
        assert math.isinf(float(penalty.polar(u)))
        u = u - u.mean(-1, keepdim=True)
    if isinstance(penalty, L1) and penalty.scales is not None:
        assert math.isinf(float(penalty.polar(u)))
        u[:, 3] = 0
    size = float(penalty.polar(u))
    assert float(penalty.conjugate(u / (size * 1.001))) == 0.0
    assert math.isinf(float(penalty.conjugate(u / (size * 0.999))))
    reached = max(float((u * x).sum() / penalty.value(x)) for x in (points(s, *SHAPE) for s in range(200)))
    assert 0 < reached <= size + 1e-12
    # the prox of the largest multiple is where the norm first moves
    assert float(penalty.value(penalty.prox(u, size * 1.0001))) < 1e-9
    assert float(penalty.value(penalty.prox(u, size * 0.99))) > 0


@settings(deadline=None, max_examples=60)
@given(st.floats(-8, 8), st.floats(0.01, 6), st.sampled_from(sorted(FOLDED)))
def test_a_folded_penalty_is_minimised_globally(p, step, name):
    penalty = FOLDED[name]
    at = torch.tensor([p], dtype=torch.float64)
    u = penalty.prox(at, step)
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    least = (0.5 * (grid - p).square() + step * penalty.charge(grid.abs())).min()
    assert float(0.5 * (u - at).square().sum() + step * penalty.value(u)) <= float(least) + 1e-9
    assert float(penalty.distance(u, u - at, step).max()) < 1e-9


def test_folded_penalties_are_the_textbooks():
    """MCP and SCAD at lambda 0.5, by their integrals: lambda int_0^|x| (1 - t/(gamma lambda))_+ dt, and Fan and Li's slope."""
    x, lam, gamma, a = 1.1, 0.5, 3.0, 3.7
    t = torch.linspace(0, x, 200001, dtype=torch.float64)
    mcp = lam * torch.trapezoid((1 - t / (gamma * lam)).clamp_min(0), t)
    assert lam * float(MCP(gamma * lam).value(torch.tensor([x], dtype=torch.float64))) == pytest.approx(
        float(mcp), abs=1e-8
    )
    slope = torch.where(t <= lam, lam, (a * lam - t).clamp_min(0) / (a - 1))
    scad = torch.trapezoid(slope, t)
    assert lam * float(SCAD(lam, a).value(torch.tensor([x], dtype=torch.float64))) == pytest.approx(
        float(scad), abs=1e-5
    )


def test_counting_keeps_what_is_worth_its_price():
    assert L0().prox(torch.tensor([1.4, 1.5, -3.0]), 1.0).tolist() == [0.0, 1.5, -3.0]
    assert float(L0().value(torch.tensor([0.0, 2.0]))) == 1
    assert L0().distance(torch.tensor([0.0, 2.0]), torch.tensor([5.0, 0.5])).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("length", [2, 3, 7, 200])
def test_total_variation_of_signals_is_exact(length):
    penalty = TotalVariation()
    for y in (points(3, 4, length), points(3, 4, length).round()):
        for step in (0.01, 0.5, 100.0):
            u = penalty.prox(y, step)
            assert float(penalty.polar((y - u) / step)) <= 1 + 1e-10
            assert float(((y - u) * u).sum() - step * penalty.value(u)) == pytest.approx(0, abs=1e-9 * max(1, step))
    flat = torch.full((1, length), 2.0, dtype=torch.float64)
    torch.testing.assert_close(penalty.prox(flat, 0.5), flat)


def test_total_variation_of_images_has_the_gap_that_was_asked_for():
    y = points(4, 2, 12, 15)
    u = TotalVariation(2, tolerance=1e-8).prox(y, 0.4)
    objective = 0.5 * (u - y).square().sum() + 0.4 * TotalVariation(2).value(u)
    near = TotalVariation(2, tolerance=1e-12, iterations=20000).prox(y, 0.4)
    least = 0.5 * (near - y).square().sum() + 0.4 * TotalVariation(2).value(near)
    assert 0 <= float(objective - least) < 1e-5 * float(least)
    flat = TotalVariation(2).prox(y, 1e4)
    torch.testing.assert_close(flat, y.mean((-1, -2), keepdim=True).expand_as(y), atol=1e-3, rtol=0)


def test_a_sparse_simplex_is_met():
    u = SparseSimplex(2).prox(points(5, 3, 6))
    assert float(SparseSimplex(2).value(u)) == 0
    assert math.isinf(float(SparseSimplex(1).value(torch.full((1, 2), 0.5))))


def test_images_of_float32_stay_float32():
    for penalty in (*CONVEX.values(), *FOLDED.values(), TotalVariation(2)):
        assert penalty.prox(points(6, *SHAPE).float(), 0.3).dtype == torch.float32, penalty


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GroupLasso(0), "integer"),
        (lambda: GroupLasso(()), "counted from 0"),
        (lambda: GroupLasso(4).value(torch.ones(6)), "not groups of 4"),
        (lambda: GroupLasso((0, 1)).value(torch.ones(6)), "names 2 inputs"),
        (lambda: ElasticNet(1.5), "share"),
        (lambda: MCP(0), "positive"),
        (lambda: SCAD(1, 2), "above 2"),
        (lambda: CappedL1(-1), "positive"),
        (lambda: SparseSimplex(0), "integer"),
        (lambda: TotalVariation(3), "images"),
        (lambda: L1(torch.tensor([-1.0])), "negative"),
        (lambda: Scaled(L1(), -1.0), "no bound"),
    ],
)
def test_what_makes_no_penalty_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
