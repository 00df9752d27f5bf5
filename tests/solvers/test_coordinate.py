"""Block coordinate descent: rules, partitions, updates, losses, penalties, state."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from poise.composite import Composite
from poise.data.coordinate_problems import ill_scaled_classes, ill_scaled_regression, lattice, two_moons
from poise.datafits import Huber, LeastSquares, Logistic, Multinomial
from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning, StateError
from poise.operators import Box, NonNegative
from poise.penalties import L1, MCP, ElasticNet, GroupLasso, NuclearNorm, Scaled
from poise.solvers.coordinate import BlockCoordinate, CoordinateResult
from poise.solvers.coordinate_losses import block_lipschitz
from poise.solvers.coordinate_partitions import Partition, part
from poise.solvers.coordinate_penalty import BoundedElasticNet, charge_of
from poise.solvers.coordinate_rules import RULES, Scene
from poise.solvers.coordinate_updates import block_minimum, solve_semidefinite
from poise.solvers.linear_model import LinearModel
from poise.solvers.quadratic_graph import QuadraticGraph


def design(n: int = 30, p: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-0.5, 0.5, p, dtype=torch.float64)
    return torch.randn(n, p, generator=g, dtype=torch.float64) * scales, torch.randn(
        n, generator=g, dtype=torch.float64
    )


def sparse_design(n: int = 60, p: int = 20) -> sparse.csc_array:
    return sparse.csc_array(sparse.random(n, p, 0.2, random_state=0, data_rvs=np.random.default_rng(0).standard_normal))


def losses() -> dict[str, Any]:
    a, y = design()
    s = sparse_design()
    ys = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    far = LinearModel(s, ys)
    far.keeps_gram = False
    dense = LinearModel(a, y)
    dense.keeps_gram = False
    edges, labels, known = two_moons(60, 10, seed=2)
    return {
        "least squares": LinearModel(a, y, share=torch.linspace(0.5, 1.5, 30)),
        "least squares without a Gram matrix": dense,
        "least squares, sparse": far,
        "logistic": LinearModel(a, (y > 0).double(), Logistic()),
        "logistic, sparse": LinearModel(s, (ys > 0).double(), Logistic()),
        "softmax": LinearModel(a, (y * 2).round().clamp(0, 2).long(), Multinomial(3)),
        "softmax, sparse": LinearModel(s, (ys * 2).round().clamp(0, 2).long(), Multinomial(3)),
        "huber": LinearModel(a, y, Huber(0.5)),
        "graph": QuadraticGraph.propagation(edges, labels, known),
    }


def solve(smooth: Any, penalty: Any = None, **options: Any) -> CoordinateResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        found: CoordinateResult = BlockCoordinate(**options).minimize(smooth, penalty)
    return found


def scene_of(
    smooth: Any, size: int, partition: Partition | None = None, penalty: Any = None, rows: bool = True
) -> Scene:
    owner = None if partition is None else partition.owner
    charge = charge_of(penalty, smooth.lipschitz, owner)
    return Scene(smooth, charge, size, partition, torch.Generator().manual_seed(0), rows=rows)


# ---- 7(a) ------------------------------------------------------------------------------------------------------------


def test_one_block_of_everything_is_newton_in_one_step() -> None:
    a, y = design()
    found = solve(LinearModel(a, y), block_size=8)
    assert found.certificate.iterations == 1
    assert (found.x - torch.linalg.lstsq(a, y).solution).abs().max() <= 1e-12
    assert found.certificate.status == "converged"


def test_single_coordinates_of_gsl_are_the_classical_rule() -> None:
    model = LinearModel(*design())
    state = model.at(torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    best = int((state.gradient.abs() / model.lipschitz.sqrt()).argmax())
    assert RULES["gsl"](scene_of(model, 1), state).tolist() == [best]
    # with one coordinate a block, all rules of the Lipschitz family agree
    assert RULES["gsq"](scene_of(model, 1), state).tolist() == [best]
    assert RULES["gsd"](scene_of(model, 1, rows=False), state).tolist() == [best]
    assert RULES["gs"](scene_of(model, 1), state).tolist() == [int(state.gradient.abs().argmax())]


@pytest.mark.parametrize("seed", range(5))
def test_gsq_makes_the_most_progress_of_all_blocks_and_gsd_finds_its_own_maximum(seed: int) -> None:
    model = LinearModel(*design(seed=seed))
    state = model.at(torch.zeros(8, dtype=torch.float64))
    g = state.gradient
    blocks = [torch.tensor(b) for b in itertools.combinations(range(8), 3)]
    progress = {tuple(b.tolist()): float(g[b] @ torch.linalg.solve(model.bound(b), g[b])) for b in blocks}
    assert tuple(RULES["gsq"](scene_of(model, 3), state).tolist()) == max(progress, key=progress.__getitem__)
    for rows in (True, False):
        scene = scene_of(model, 3, rows=rows)
        score = {tuple(b.tolist()): float((g[b].square() / scene.diagonal[b]).sum()) for b in blocks}
        chosen = tuple(RULES["gsd"](scene, state).tolist())
        assert score[chosen] == pytest.approx(max(score.values()), rel=1e-14)
        # diag(D_b) bounds H_b, so its score is guaranteed progress: below that of gsq
        assert score[chosen] <= max(progress.values()) * (1 + 1e-12)
        for b in blocks:
            assert torch.linalg.eigvalsh(torch.diag(scene.diagonal[b]) - model.bound(b))[0] >= -1e-9
    niht = tuple(RULES["gsq_niht"](scene_of(model, 3), state).tolist())
    gsl = tuple(RULES["gsl"](scene_of(model, 3), state).tolist())
    assert progress[niht] >= 0.999 * progress[gsl] * (niht == gsl)
    assert progress[niht] > 0


@pytest.mark.parametrize("name", list(losses()))
@pytest.mark.parametrize("partition", [None, "sort"])
def test_every_step_decreases_by_what_is_guaranteed(name: str, partition: str | None) -> None:
    model = losses()[name]
    split = None if partition is None else part(partition, model, 3)
    scene = scene_of(model, 3, split)
    from poise.solvers.coordinate_updates import UPDATES

    for update in ("lipschitz", "diagonal", "backtracking", "hessian"):
        state = model.at(torch.zeros_like(model.lipschitz))
        for _ in range(8):
            block = RULES["gsl"](scene, state)
            g, before = state.gradient_of(block).clone(), state.value()
            d = UPDATES[update](scene, state, block)
            bound = {
                "lipschitz": float(g @ g) / (2 * block_lipschitz(model, block)),
                "hessian": 0.5 * float(g @ solve_semidefinite(model.bound(block), g)),
                "diagonal": 0.5 * float((g.square() / scene.diagonal[block]).sum()),
                "backtracking": 0.0 if scene.estimates is None else float(g @ g) / (2 * float(_estimate(scene, block))),
            }[update]
            change = state.change(block, d)
            state.move(block, d)
            assert state.value() - before == pytest.approx(change, abs=1e-10 * max(1, abs(before)))
            assert before - state.value() >= bound * (1 - 1e-9) - 1e-12 * max(1, abs(before))


def _estimate(scene: Scene, block: Tensor) -> float:
    assert scene.estimates is not None
    place = block if scene.partition is None else scene.partition.owner[block[:1]]
    return float(scene.estimates[place].max())


@pytest.mark.parametrize("name", list(losses()))
def test_an_incremental_gradient_is_the_fresh_one(name: str) -> None:
    model = losses()[name]
    g = torch.Generator().manual_seed(0)
    state = model.at(torch.randn(model.size, generator=g, dtype=torch.float64))
    for _ in range(50):
        block = torch.randperm(model.size, generator=g)[:3]
        state.move(block, torch.randn(3, generator=g, dtype=torch.float64))
        assert (state.gradient_of(block) - model.at(state.x).gradient[block]).abs().max() <= 1e-10
    fresh = model.at(state.x)
    assert (state.gradient - fresh.gradient).abs().max() <= 1e-10 * max(1, float(fresh.gradient.abs().max()))
    assert state.refresh() <= 1e-13
    assert state.touched > 0
    assert state.work > 0


@pytest.mark.parametrize("name", list(losses()))
def test_gradient_hessian_and_bounds_are_those_of_the_value(name: str) -> None:
    model = losses()[name]
    x = 0.3 * torch.randn(model.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, step = model.at(x), 1e-5
    block = torch.tensor([0, 2, model.size - 1])
    for i in block.tolist():
        move = torch.zeros_like(x)
        move[i] = step
        slope = (model.at(x + move).value() - model.at(x - move).value()) / (2 * step)
        assert slope == pytest.approx(float(state.gradient[i]), abs=1e-6, rel=1e-6)
        bend = (model.at(x + move).gradient[block] - model.at(x - move).gradient[block]) / (2 * step)
        # at a kink of the Huber loss's slope the difference quotient is between both sides
        tolerance = 0.1 if name == "huber" else 1e-5
        assert (bend - state.hessian(block)[:, block.tolist().index(i)]).abs().max() <= tolerance * (
            1 + bend.abs().max()
        )
    every = torch.arange(model.size)
    bound = model.bound(every)
    assert torch.linalg.eigvalsh(bound - state.hessian(every))[0] >= -1e-9
    assert torch.linalg.eigvalsh(model.bound(block) - state.hessian(block))[0] >= -1e-9
    d = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (model.bound_times(block, d) - bound[:, block] @ d).abs().max() <= 1e-10 * bound.abs().max()
    assert (model.row_sums - bound.abs().sum(1)).abs().max() <= 1e-9 * bound.abs().max()
    assert model.largest == pytest.approx(float(torch.linalg.eigvalsh(bound)[-1]), rel=2e-3)
    assert bool((model.lipschitz >= state.hessian(every).diagonal() - 1e-12).all())


def test_a_lasso_path_is_scikit_learns() -> None:
    from sklearn.linear_model import Lasso

    a, y = design(60, 12)
    top = float((a.T @ y).abs().max()) / 60
    for share in (0.5, 0.02):
        peer = Lasso(alpha=share * top, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(a.numpy(), y.numpy())
        problem = Composite(a, y, LeastSquares(), Scaled(L1(), share * top))
        for options in (
            {"select": "gs_q"},
            {"select": "gsl", "update": "lipschitz"},
            {"select": "cyclic", "partition": "sort"},
        ):
            found = BlockCoordinate(block_size=3, tol=1e-12, **options).minimize(problem)
            assert found.certificate.converged
            assert (found.coef - torch.from_numpy(peer.coef_)).abs().max() <= 1e-6 * np.abs(peer.coef_).max()


def test_with_the_support_in_one_block_a_quadratic_ends_in_one_more_step() -> None:
    a, y = ill_scaled_regression(100, 60, seed=3)
    model, h = LinearModel(a, y), BoundedElasticNet(l1=3000.0, lower=0.0)
    found = solve(model, h, select="gs_q", update="hessian", block_size=40, iterations=100, tol=1e-8)
    assert found.certificate.status == "converged"
    assert 0 < found.active_sets[-1] <= 40
    assert found.certificate.iterations <= found.identified + 2
    after = model.at(found.x).gradient + h.l1
    assert after[found.x > 0].abs().max() <= 1e-10 * float(model.at(torch.zeros(60)).gradient.abs().max())
    smooth = solve(LinearModel(*design()), select="gsl", update="hessian", block_size=8, tol=1e-10)
    assert smooth.certificate.residual <= 1e-10
    assert smooth.certificate.iterations == 1
    one = solve(model, h, select="gs_q", update="lipschitz", block_size=40, iterations=100, tol=1e-8)
    assert one.certificate.status != "converged"


# ---- rules, partitions, updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", [r for r in RULES if r != "forest"])
def test_every_rule_finds_the_minimum(select: str) -> None:
    model = LinearModel(*design())
    best = solve(model, block_size=8).certificate.value
    for partition in (None, "order", "avg", "sort_rows"):
        if partition and select in ("gsq_iht", "gsq_niht"):
            continue
        found = solve(model, select=select, partition=partition, block_size=3, iterations=2000, tol=1e-7)
        assert found.certificate.status == "converged", (select, partition)
        assert found.certificate.value == pytest.approx(best, abs=1e-10)
        assert all(b <= a + 1e-10 for a, b in itertools.pairwise(found.history))


@pytest.mark.parametrize("name", ["logistic", "softmax", "logistic, sparse"])
def test_all_updates_agree_on_a_penalised_loss(name: str) -> None:
    model = losses()[name]
    for penalty in (BoundedElasticNet(l1=1.0, lower=0.0), BoundedElasticNet(l1=0.5, l2=1.0)):
        values = []
        for update in ("hessian", "newton", "projected_newton", "two_metric", "backtracking", "lipschitz"):
            if update == "two_metric" and penalty.lower < 0:
                continue
            found = solve(model, penalty, select="gs_q", update=update, block_size=4, iterations=250, tol=1e-4)
            values.append(found.certificate.value)
        assert max(values) - min(values) <= 1e-5 * abs(min(values))


def test_partitions_hold_every_coordinate_and_keep_their_order() -> None:
    model = LinearModel(*design(p=8))
    order = part("order", model, 3)
    assert [b.tolist() for b in order.blocks] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    by_size = model.lipschitz.argsort().tolist()
    assert torch.cat(part("sort", model, 3).blocks).tolist() == by_size
    assert torch.cat(part("avg", model, 3).blocks).tolist()[:4] == [by_size[0], by_size[7], by_size[1], by_size[6]]
    assert torch.cat(part("sort_rows", model, 4).blocks).tolist() == model.row_sums.argsort().tolist()
    for rule in ("order", "sort", "avg", "sort_rows", "avg_rows"):
        assert torch.cat(part(rule, model, 3).blocks).sort().values.tolist() == list(range(8))


def test_like_with_like_keeps_block_constants_small() -> None:
    model = LinearModel(*ill_scaled_regression(100, 200))

    def total(rule: str) -> float:
        return sum(block_lipschitz(model, b) for b in part(rule, model, 5).blocks)

    assert total("sort") < total("order")


def test_greedy_beats_random_and_variable_blocks_beat_fixed_ones() -> None:
    model = LinearModel(*ill_scaled_regression(150, 200, seed=1))
    left = {
        (select, partition): solve(
            model, select=select, update="lipschitz", partition=partition, iterations=80, tol=0
        ).history[-1]
        for select in ("random", "gs", "gsl")
        for partition in (None, "sort")
    }
    assert left["gsl", None] < left["gs", None] < left["random", None]
    assert left["gsl", "sort"] < left["gs", "sort"] < left["random", "sort"]
    assert left["gsl", None] < left["gsl", "sort"]


def test_lipschitz_sampling_follows_the_constants() -> None:
    model = LinearModel(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)), torch.ones(2))
    scene = scene_of(model, 1)
    state = model.at(torch.zeros(2))
    drawn = sum(int(RULES["lipschitz"](scene, state)) for _ in range(2000)) / 2000
    assert abs(drawn - 0.9) < 0.03


def test_a_pass_of_permuted_blocks_visits_everything_once() -> None:
    model = LinearModel(*design(p=8))
    scene = scene_of(model, 3)
    state = model.at(torch.zeros(8))
    seen = []
    for _ in range(3):
        seen += RULES["perm"](scene, state).tolist()
        scene.turn += 1
    assert sorted(seen) == list(range(8))


def test_a_column_of_zeros_is_left_alone_and_the_penalty_decides() -> None:
    a, y = design()
    a[:, 2] = 0
    model = LinearModel(a, y)
    for select in ("random", "gsl", "gs_q", "cyclic", "perm", "lipschitz", "gsd"):
        found = BlockCoordinate(select, iterations=3000).minimize(
            model, L1(), torch.full((8,), 0.5, dtype=torch.float64)
        )
        assert found.x[2] == 0
    assert BlockCoordinate("gsl").minimize(model, None, torch.full((8,), 0.5, dtype=torch.float64)).x[2] == 0.5


def test_singular_blocks_are_solved_by_the_pseudo_inverse() -> None:
    a, y = design()
    a = torch.cat([a, a[:, :1]], 1)
    found = solve(LinearModel(a, y), block_size=9)
    assert found.certificate.status == "converged"
    assert found.x[0] == pytest.approx(float(found.x[8]), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_block_with_kinks_and_bounds_is_minimised_exactly(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(25, 12, generator=g, dtype=torch.float64)
    h, slope = root.T @ root, 10 * torch.randn(12, generator=g, dtype=torch.float64)
    x = torch.randn(12, generator=g, dtype=torch.float64).clamp(-0.2, 0.2)
    for penalty in (
        BoundedElasticNet(l1=3.0),
        BoundedElasticNet(l1=2.0, lower=0.0),
        BoundedElasticNet(l2=1.0, lower=-0.2, upper=0.3),
        BoundedElasticNet(),
    ):
        spread = penalty.spread(x)
        start = x.clamp_min(0.0) if float(penalty.lower) == 0 else x
        d = block_minimum(h, slope, start, spread)
        left = spread.distance(start + d, slope + h @ d)
        assert left.max() <= 1e-11


# ---- forests -----------------------------------------------------------------------------------------------------------


def test_forests_need_fewer_steps_than_blocks_of_the_same_price() -> None:
    edges, labels, known = two_moons(200, 20, seed=1)
    graph = QuadraticGraph.propagation(edges, labels, known)
    exact = torch.linalg.solve(torch.from_numpy(graph.h.toarray()), graph.b)
    best = graph.at(exact).value()
    steps = {}
    for name, options in {
        "forest": {"select": "forest"},
        "blocks": {"select": "gsl", "block_size": round(graph.size ** (1 / 3))},
        "trees": {"select": "cyclic", "partition": "forest"},
    }.items():
        found = solve(graph, update="exact", iterations=3000, tol=1e-6, **options)
        gap = np.array(found.history) - best
        steps[name] = int(np.argmax(gap <= 1e-6 * gap[0]))
        assert gap[-1] <= 1e-6 * gap[0]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found.history))
    assert 5 * steps["forest"] <= steps["blocks"]


def test_the_lattice_is_solved_as_a_linear_system() -> None:
    weights, labels, known = lattice(12, 12, 20)
    graph = QuadraticGraph.propagation(weights, labels, known)
    dense = torch.linalg.solve(torch.from_numpy(graph.h.toarray()), graph.b)
    found = solve(graph, select="forest", update="exact", tol=1e-6, iterations=2000)
    assert (found.x - dense).abs().max() <= 1e-8 * dense.abs().max()
    energy = 0.5 * sum(
        float(w) * float(f[i] - f[j]) ** 2
        for f in [_filled(found.x, labels, known)]
        for i, j, w in zip(*sparse.triu(weights).nonzero(), sparse.triu(weights).tocoo().data, strict=True)
    )
    assert found.certificate.value == pytest.approx(energy, rel=1e-9)


def _filled(x: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    full = labels.clone()
    full[~known] = x
    return full


def test_label_propagation_names_what_it_cannot_reach() -> None:
    two = sparse.block_diag([np.ones((2, 2)), np.ones((2, 2))]).tocsr()
    with pytest.raises(InputError, match="1 parts of the graph hold no label"):
        QuadraticGraph.propagation(two, torch.ones(4), torch.tensor([True, False, False, False]))
    with pytest.raises(InputError, match="weights must not be negative"):
        QuadraticGraph.propagation(-two, torch.ones(4), torch.tensor([True, False, True, False]))


# ---- composites --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("fit", ["least squares", "softmax"])
def test_composites_are_solved_to_their_gap(intercept: bool, fit: str) -> None:
    from poise.solvers.proximal import ProximalGradient

    a, y = design(40, 9)
    a = a + 1.0
    kind, target = (
        (LeastSquares(), y + 2.0) if fit == "least squares" else (Multinomial(3), (y + 1).round().clamp(0, 2).long())
    )
    for penalty, options in (
        (Scaled(L1(), 0.05), {"select": "gs_q", "update": "newton"}),
        (Scaled(ElasticNet(0.5), 0.2), {"select": "gsl", "update": "newton"}),
        (Scaled(GroupLasso(3), 0.1), {"select": "gsl", "update": "lipschitz", "partition": "groups"}),
        (Scaled(GroupLasso(3), 0.1), {"select": "gs_q", "update": "backtracking", "partition": "groups"}),
    ):
        problem = Composite(a, target, kind, penalty, intercept=intercept)
        found = BlockCoordinate(tol=1e-6, iterations=6000, block_size=3, **options).minimize(problem)
        assert found.certificate.converged, options
        peer = ProximalGradient(tol=1e-7).minimize(problem)
        assert found.certificate.value == pytest.approx(peer.certificate.value, rel=1e-5)
        assert found.coef.shape == peer.coef.shape
        assert found.extras["result"].counters.iterations == found.certificate.iterations


def test_other_penalties_take_proximal_steps() -> None:
    model = LinearModel(*design())
    found = solve(model, Scaled(MCP(3.0), 1.0), select="gs_q", update="lipschitz", block_size=2, tol=1e-8)
    assert found.certificate.status == "converged"
    bounded = solve(model, NonNegative(), select="gs_q", update="two_metric", block_size=4)
    assert bounded.certificate.status == "converged"
    assert bool((bounded.x >= 0).all())
    from scipy.optimize import lsq_linear, nnls

    a, y = design()
    assert (bounded.x - torch.from_numpy(nnls(a.numpy(), y.numpy())[0])).abs().max() <= 1e-8
    boxed = solve(model, Box(-0.05, 0.05), select="gsl", update="projected_newton", block_size=4)
    peer = lsq_linear(a.numpy(), y.numpy(), (-0.05, 0.05), tol=1e-14).x
    assert (boxed.x - torch.from_numpy(peer)).abs().max() <= 1e-6


# ---- numbers, state, errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["gsl", "perm", "random", "gs_q"])
@pytest.mark.parametrize("update", ["hessian", "backtracking"])
def test_a_run_that_stops_and_goes_on_is_the_uninterrupted_run(select: str, update: str) -> None:
    model = LinearModel(*ill_scaled_classes(80, 40), Logistic())
    h = L1()

    def make(blocks: int) -> BlockCoordinate:
        return BlockCoordinate(select, update, 3, "sort" if select == "perm" else None, iterations=blocks, tol=0.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        first = make(17)
        first.minimize(model, h)
        saved = copy.deepcopy(first.state_dict())
        again = [make(13), make(13)]
        results = []
        for solver in again:
            solver.load_state_dict(copy.deepcopy(saved))
            results.append(solver.minimize(model, h))
        whole = make(30).minimize(model, h)
    assert torch.equal(results[0].x, results[1].x)
    assert torch.equal(results[0].x, whole.x)
    assert results[0].history[1:] == whole.history[18:]


def test_float32_is_kept() -> None:
    a, y = design()
    model = LinearModel(a.float(), y.float())
    found = solve(model, L1(), select="gs_q", tol=1e-3)
    assert found.x.dtype == torch.float32
    assert found.certificate.status == "converged"
    assert (found.x - solve(LinearModel(a, y), L1(), select="gs_q").x).abs().max() <= 1e-3


def test_counters_count() -> None:
    found = solve(LinearModel(*design()), select="gsl", block_size=2)
    c = found.counters
    assert c.iterations == found.certificate.iterations == len(found.history) - 1 == len(found.active_sets) - 1
    assert c.gradient_entries >= 8 * c.iterations
    assert c.flops > c.gradient_entries
    assert c.seconds > 0
    touched = solve(losses()["graph"], select="gsl", update="exact", block_size=2, iterations=10, tol=0).counters
    # a graph's move touches neighbours, not everything
    assert touched.gradient_entries < 10 * losses()["graph"].size


def test_a_limit_that_is_missed_is_said() -> None:
    with pytest.warns(PoiseWarning, match="stopped after 2 blocks; the least subgradient has norm"):
        found = BlockCoordinate(block_size=1, iterations=2).minimize(LinearModel(*design()))
    assert found.certificate.status == "stopped after 2 blocks"
    assert not found.certificate.converged


def test_data_that_change_under_way_are_noticed() -> None:
    a, y = design()
    model = LinearModel(a, y)
    state = model.at(torch.ones(8, dtype=torch.float64))
    assert state.refresh() <= 1e-15
    a *= 1.001
    assert state.refresh() > 1e-6
    solver = BlockCoordinate(block_size=2, iterations=3, tol=0.0)
    model = LinearModel(a, y)
    model.keeps_gram = False
    calls = [0]
    original = model.columns

    def columns(inputs: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            a.mul_(1.01)
        return original(inputs)

    model.columns = columns  # type: ignore[method-assign]
    with pytest.raises(StateError, match="the residual had drifted by"):
        solver.minimize(model)


ERRORS: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "there is no select 'gls'": (InputError, lambda: BlockCoordinate("gls")),
    "there is no update 'hesian'. Did you mean 'hessian'": (InputError, lambda: BlockCoordinate(update="hesian")),
    "there is no partition 'sorted'. Did you mean 'sort'": (
        InputError,
        lambda: solve(LinearModel(*design()), partition="sorted"),
    ),
    "block_size is 9, and there are only 8 coordinates": (
        InputError,
        lambda: solve(LinearModel(*design()), block_size=9),
    ),
    "block_size counts coordinates, from 1, and it is 0": (InputError, lambda: BlockCoordinate(block_size=0)),
    "NuclearNorm is no sum over coordinates": (IncompatibleError, lambda: solve(LinearModel(*design()), NuclearNorm())),
    "with a group lasso the blocks are its groups": (
        IncompatibleError,
        lambda: solve(LinearModel(*design()), GroupLasso(2)),
    ),
    "takes the groups of a group lasso, and there is none": (
        IncompatibleError,
        lambda: solve(LinearModel(*design()), partition="groups"),
    ),
    "gsq would look at": (InputError, lambda: solve(LinearModel(*design(40, 60)), select="gsq", block_size=10)),
    "gsq knows no penalty": (
        IncompatibleError,
        lambda: solve(LinearModel(*design()), L1(), select="gsq", block_size=2),
    ),
    "update='exact' is for quadratics": (IncompatibleError, lambda: solve(losses()["logistic"], update="exact")),
    "update='two_metric' is for bounds": (
        IncompatibleError,
        lambda: solve(LinearModel(*design()), L1(), update="two_metric"),
    ),
    "needs the graph of a sparse Hessian": (IncompatibleError, lambda: solve(LinearModel(*design()), select="forest")),
    "blocks are minimised exactly with l1": (
        IncompatibleError,
        lambda: solve(LinearModel(*design()), MCP(1.0), update="hessian"),
    ),
    "x0 must have [8] entries": (
        InputError,
        lambda: BlockCoordinate().minimize(LinearModel(*design()), None, torch.zeros(3)),
    ),
    "x0 must be finite and within the bounds": (
        NonFiniteError,
        lambda: BlockCoordinate().minimize(LinearModel(*design()), NonNegative(), -torch.ones(8)),
    ),
    "Lipschitz constants must be finite and not negative, and that of coordinate 1": (
        InputError,
        lambda: solve(_negative()),
    ),
    "h must be symmetric": (InputError, lambda: QuadraticGraph(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.ones(2))),
    "h must be positive semidefinite": (InputError, lambda: QuadraticGraph(-torch.eye(2), torch.ones(2))),
    "A partition holds every coordinate": (
        InputError,
        lambda: solve(LinearModel(*design()), partition=[torch.arange(8), torch.tensor([1])]),
    ),
    "lower must not exceed upper": (InputError, lambda: BoundedElasticNet(lower=1.0, upper=0.0)),
    "a penalty or None was expected": (InputError, lambda: solve(LinearModel(*design()), 3.0)),
}


def _negative() -> LinearModel:
    model = LinearModel(*design())
    model.__dict__["lipschitz"] = torch.tensor([1.0, -1.0, *[1.0] * 6])
    return model


@pytest.mark.parametrize("message", list(ERRORS))
def test_errors_say_what_is_wrong(message: str) -> None:
    import re

    kind, call = ERRORS[message]
    with pytest.raises(kind, match=re.escape(message)):
        call()
