"""When the zeros of a solution are found: nondegeneracy, prediction, observation."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from poise.data.coordinate_problems import ill_scaled_regression
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.insight.active_set import active_set_complexity
from poise.penalties import L1, MCP
from poise.solvers.coordinate import BlockCoordinate, CoordinateResult
from poise.solvers.coordinate_penalty import BoundedElasticNet
from poise.solvers.linear_model import LinearModel


def problem(seed: int = 0) -> LinearModel:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(60, 20, generator=g, dtype=torch.float64)
    w = torch.randn(20, generator=g, dtype=torch.float64) * (torch.arange(20) < 5)
    return LinearModel(a, a @ w + 0.1 * torch.randn(60, generator=g, dtype=torch.float64))


def solve(model: LinearModel, h: BoundedElasticNet, **options: object) -> CoordinateResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        found: CoordinateResult = BlockCoordinate(**options).minimize(model, h)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "h", [BoundedElasticNet(l1=10.0), BoundedElasticNet(lower=0.0), BoundedElasticNet(l1=5.0, l2=1.0)]
)
def test_proximal_steps_find_the_zeros_within_the_bound(seed: int, h: BoundedElasticNet) -> None:
    model = problem(seed)
    best = solve(model, h, select="gs_q", block_size=20, tol=1e-11)
    values = torch.linalg.eigvalsh(model.bound(torch.arange(20)))
    run = solve(
        model, h, select="cyclic", update="lipschitz", partition="order", block_size=20, iterations=3000, tol=1e-9
    )
    report = active_set_complexity(model, h, best.x, float(values[-1]), float(values[0]) + float(h.l2), result=run)
    assert report.observed is not None
    assert 0 < report.delta < math.inf
    assert report.observed <= report.predicted < math.inf
    assert report.support.tolist() == (best.x != 0).nonzero()[:, 0].tolist()


def test_delta_is_the_distance_of_the_gradient_from_the_weight() -> None:
    model, h = problem(), L1()
    best = solve(model, BoundedElasticNet(l1=1.0), select="gs_q", block_size=20, tol=1e-11)
    report = active_set_complexity(model, h, best.x)
    gradient = model.at(best.x).gradient
    zero = best.x == 0
    assert report.delta == pytest.approx(float((1.0 - gradient.abs())[zero].min()), rel=1e-12)
    assert report.weakest is not None
    assert best.x[report.weakest] == 0
    assert report.radius == pytest.approx(report.delta / (2 * 1.001 * model.largest))
    # no strong convexity was stated, so no number of steps is promised
    assert report.predicted == math.inf
    assert "found within" in str(report)


def test_a_step_from_within_the_radius_lands_on_the_zeros() -> None:
    model, h = problem(), BoundedElasticNet(l1=10.0)
    best = solve(model, h, select="gs_q", block_size=20, tol=1e-11)
    curvature = float(torch.linalg.eigvalsh(model.bound(torch.arange(20)))[-1])
    report = active_set_complexity(model, h, best.x, curvature)
    for seed in range(20):
        away = torch.randn(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = best.x + away / away.norm() * report.radius * 0.999
        landed = h.prox(x - model.at(x).gradient / curvature, 1.0 / curvature)
        assert bool((landed[best.x == 0] == 0).all())
        # a single coordinate's own constant serves as well
        own = h.prox(x - model.at(x).gradient / model.lipschitz, 1.0 / model.lipschitz)
        assert bool((own[best.x == 0] == 0).all())


def test_random_blocks_find_the_zeros_within_their_bound() -> None:
    model, h = problem(), BoundedElasticNet(l1=10.0)
    values = torch.linalg.eigvalsh(model.bound(torch.arange(20)))
    best = solve(model, h, select="gs_q", block_size=20, tol=1e-11)
    for seed in range(3):
        run = solve(
            model,
            h,
            select="random",
            update="lipschitz",
            partition="order",
            block_size=4,
            seed=seed,
            iterations=4000,
            tol=1e-9,
        )
        report = active_set_complexity(model, h, best.x, float(values[-1]), float(values[0]), block_size=4, result=run)
        assert report.observed is not None
        assert report.observed <= report.random
        assert report.visits[0] == 5
        assert report.visits[1] >= 5


def test_a_solution_without_zeros_has_nothing_to_find() -> None:
    model = problem()
    best = solve(model, BoundedElasticNet(), block_size=20, tol=1e-9)
    report = active_set_complexity(model, None, best.x, mu=0.1)
    assert report.delta == math.inf
    assert report.weakest is None
    assert report.predicted == 0.0
    assert "nowhere at a kink" in str(report)


def test_bad_input_is_named() -> None:
    model = problem()
    with pytest.raises(InputError, match="x_star is no solution"):
        active_set_complexity(model, L1(), torch.ones(20))
    with pytest.raises(InputError, match="0 <= mu <= L"):
        active_set_complexity(model, L1(), torch.zeros(20), L=1.0, mu=2.0)
    with pytest.raises(IncompatibleError, match="kinks are known for l1"):
        active_set_complexity(model, MCP(1.0), torch.zeros(20))


def test_an_exact_solver_ends_soon_after_the_zeros_are_found() -> None:
    model = LinearModel(*ill_scaled_regression(100, 60, seed=3))
    found = solve(model, BoundedElasticNet(l1=3000.0, lower=0.0), select="gs_q", block_size=40, iterations=100)
    assert found.certificate.iterations <= found.identified + 2
    assert found.active_sets[found.identified :] == (found.active_sets[-1],) * (
        len(found.active_sets) - found.identified
    )
