"""Relevance of sources and what follows from it: scores, allocations, costs, reasons."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.weights import LassoRelevance, efficiency, optimal_counts, planner_score, plug_in_score, risk_bound
from poise.weights.basis_pursuit import basis_pursuit


def heads(rank: int = 4, tasks: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, tasks, generator=generator, dtype=torch.float64),
        torch.randn(rank, generator=generator, dtype=torch.float64),
    )


def least(w: Tensor, target: Tensor) -> float:
    return float(np.abs(basis_pursuit(w.numpy(), target.numpy()).coefficients).sum()) ** 2


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_no_allocation_beats_the_least_absolute_sum() -> None:
    w, target = heads()
    generator = torch.Generator().manual_seed(1)
    bound = least(w, target)
    for _ in range(1000):
        counts = torch.rand(12, generator=generator, dtype=torch.float64) ** 4
        assert planner_score(w, target, counts / counts.sum()) >= bound - 1e-9


def test_the_best_allocation_reaches_it_and_follows_the_relevance() -> None:
    for seed in range(5):
        w, target = heads(seed=seed)
        nu = LassoRelevance(lam=0.0).fit(w, target)
        bound = least(w, target)
        assert planner_score(w, target, nu.abs() / nu.abs().sum()) == pytest.approx(bound, rel=1e-9)
        found = optimal_counts(w, target, 1.0, rounds=20_000)
        assert planner_score(w, target, found) == pytest.approx(bound, rel=1e-3)
        assert efficiency(w, target, nu.abs()) == pytest.approx(1.0)


@pytest.mark.peer
def test_the_planner_agrees_with_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    w, target = heads()
    nu, n = cvxpy.Variable(12), cvxpy.Variable(12)
    cost = sum(cvxpy.quad_over_lin(nu[t], n[t]) for t in range(12))
    solved = cvxpy.Problem(cvxpy.Minimize(cost), [w.numpy() @ nu == target.numpy(), cvxpy.sum(n) == 100, n >= 2])
    value = solved.solve(solver="CLARABEL")
    counts = optimal_counts(w, target, 100.0, 2.0)
    assert planner_score(w, target, counts) == pytest.approx(value, rel=1e-5)


def test_the_scores_of_the_three_rules_are_those_of_cauchy_and_schwarz() -> None:
    w, target = heads()
    nu = LassoRelevance(p=2).fit(w, target)
    size, one, two = float(nu.count_nonzero()), float(nu.abs().sum()), float((nu**2).sum())
    assert plug_in_score(nu, nu.abs() / one) == pytest.approx(one**2)
    assert plug_in_score(nu, nu**2 / two) == pytest.approx(size * two)
    assert plug_in_score(nu, torch.full_like(nu, 1 / 12)) == pytest.approx(12 * two)
    assert one**2 <= size * two


def test_the_plug_in_score_can_be_far_off_where_the_planner_is_not() -> None:
    tasks = 400
    w = torch.full((1, tasks), tasks**-0.5, dtype=torch.float64)
    w[0, 0] = 1.0
    target = torch.ones(1, dtype=torch.float64)
    nu = LassoRelevance(p=2).fit(w, target)
    counts = nu**2 / (nu**2).sum()
    assert plug_in_score(nu, counts) == pytest.approx(tasks / 2, rel=0.01)
    assert planner_score(w, target, counts) == pytest.approx(2, rel=0.01)
    assert least(w, target) == pytest.approx(1)


def test_a_target_that_nobody_sampled_spans_has_infinite_risk() -> None:
    w, target = torch.eye(2), torch.tensor([1.0, 1.0])
    assert planner_score(w, target, torch.tensor([5, 0])) == float("inf")
    assert plug_in_score(torch.tensor([1.0, 1.0]), torch.tensor([5, 0])) == float("inf")
    assert efficiency(w, target, torch.tensor([5, 0])) == 0


def test_the_bound_knows_the_uniform_allocation() -> None:
    w, target = heads()
    even = risk_bound(w, target, torch.full((12,), 100), noise=2.0, features=20, target_samples=50)
    assert even.ratio_to_uniform == pytest.approx(1)
    score = planner_score(w, target, torch.full((12,), 100))
    assert even.expected == pytest.approx(4 * (16 * score + 4 / 50))
    assert even.bound == pytest.approx(4 * (4 * 32 * score + 4 / 50))


# ---- relevance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relevance_reproduces_the_target_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    w, target = heads()
    for p in (1, 2):
        nu = LassoRelevance(lam=0.0, p=p).fit(w.to(dtype), target.to(dtype))
        assert nu.dtype == dtype
        torch.testing.assert_close(w.to(dtype) @ nu, target.to(dtype), atol=1e-5, rtol=1e-5)


def test_a_rotation_of_the_representation_changes_nothing() -> None:
    w, target = heads()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    for options in ({"lam": 0.0}, {"lam": 0.1}, {"p": 2}):
        one, two = LassoRelevance(**options), LassoRelevance(**options)
        torch.testing.assert_close(one.fit(turn @ w, turn @ target), two.fit(w, target), atol=1e-9, rtol=1e-9)


def test_scaling_labels_leaves_the_relevance_of_the_noise_rule() -> None:
    w, target = heads()
    one = LassoRelevance().fit(w, target, noise=0.5, samples=50)
    ten = LassoRelevance().fit(10 * w, 10 * target, noise=5.0, samples=50)
    torch.testing.assert_close(one, ten)


def test_the_noise_rule_finds_nothing_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    silent = 0
    for _ in range(50):
        w = torch.nn.functional.normalize(torch.randn(6, 40, generator=generator, dtype=torch.float64), dim=0)
        head = (
            torch.randn(6, generator=generator, dtype=torch.float64) / 20
        )  # the head of labels that are noise, n = 400
        silent += not LassoRelevance().fit(w, head, noise=1.0, samples=400).any()
    assert silent >= 48


def test_a_target_that_is_unlike_every_source_gains_little() -> None:
    # isotropic sources in a space that they fill: the best allocation has no sparse mix to find
    gains = []
    for seed in range(10):
        w, target = heads(rank=3, tasks=300, seed=seed)
        w = torch.nn.functional.normalize(w, dim=0)
        nu = LassoRelevance(lam=0.0).fit(w, target)
        gains.append(planner_score(w, target, torch.full((300,), 1 / 300)) / float(nu.abs().sum()) ** 2)
    assert max(gains) < 3.5  # at most the rank: w'(WW')^-1 w T -> K |w|^2 against |w|^2


def test_discrepancy_stops_where_the_rest_is_noise() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam="discrepancy")
    relevance.fit(w, target, noise=0.5, samples=10)
    assert relevance.residual**2 == pytest.approx(0.25 * 4 / 10)
    assert not relevance.fit(w, target, noise=100.0, samples=10).any()


def test_top_keeps_the_largest_and_fits_them_anew() -> None:
    w, target = heads()
    full = LassoRelevance(p=2).fit(w, target)
    nu = LassoRelevance(p=2, top=3).fit(w, target)
    kept = full.abs().topk(3).indices.sort().values
    assert nu.nonzero().flatten().tolist() == kept.tolist()
    torch.testing.assert_close(nu[kept], torch.linalg.lstsq(w[:, kept], target[:, None]).solution[:, 0])


def test_the_path_and_the_reasons_are_there_to_look_at() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=0.0, floor=5)
    nu = relevance.fit(w, target)
    np.testing.assert_allclose(relevance.path().at(0.0), nu.numpy(), atol=1e-8)
    counts = relevance.allocate(1000)
    report = relevance.report(counts, [f"task {t}" for t in range(12)])
    assert sum(row.risk_share for row in report.rows) == pytest.approx(1)
    assert sum(row.samples for row in report.rows) == 1000
    assert "in the mix" in report.rows[0].reason
    # a task that is out enters as soon as its head is as much larger as the reason says
    out = next(row for row in report.rows if row.relevance == 0)
    task = int(out.task.split()[1])
    for factor, inside in ((0.99, False), (1.01, True)):
        larger = w.clone()
        larger[:, task] *= factor / (1 - out.reduced_cost)
        assert bool(LassoRelevance(lam=0.0).fit(larger, target)[task] != 0) is inside
    assert "of that of uniform sampling" in report.top(3)
    assert "9 more tasks" in report.top(3)
    assert report.efficiency == pytest.approx(efficiency(w, target, counts))


def test_alternates_name_a_source_that_would_do_as_well() -> None:
    relevance = LassoRelevance(lam=0.0)
    relevance.fit(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]), torch.tensor([1.0, 1.0]))
    assert len(relevance.alternates) >= 1


# ---- allocation -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(60, 5000), st.integers(0, 5), st.sampled_from([0.0, 1.0, 2.0]))
def test_counts_sum_exactly_and_keep_floors_and_caps(seed: int, budget: int, floor: int, q: float) -> None:
    w, target = heads(seed=seed)
    relevance = LassoRelevance(lam=0.0, floor=floor, q=q)
    relevance.fit(w, target)
    available = torch.randint(5, 2000, (12,), generator=torch.Generator().manual_seed(seed))
    budget = min(budget, int(available.sum()))
    counts = relevance.allocate(budget, available)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == budget
    assert bool((counts >= torch.minimum(torch.tensor(floor), available)).all() and (counts <= available).all())


def test_the_allocation_minimises_the_plug_in_score() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=0.0, floor=10)
    nu = relevance.fit(w, target)
    counts = relevance.allocate(100_000).double()
    best = plug_in_score(nu, counts)
    for one, two in itertools.permutations(nu.nonzero().flatten().tolist(), 2):
        moved = counts.clone()
        moved[one] += 50
        moved[two] -= 50
        assert plug_in_score(nu, moved) >= best


@pytest.mark.peer
def test_the_allocation_agrees_with_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    w, target = heads()
    relevance = LassoRelevance(lam=0.0, floor=100)
    nu = relevance.fit(w, target).numpy()
    n = cvxpy.Variable(12)
    available = [3000] * 12
    cost = sum(nu[t] ** 2 * cvxpy.inv_pos(n[t]) for t in range(12) if nu[t])
    cvxpy.Problem(cvxpy.Minimize(1e4 * cost), [cvxpy.sum(n) == 10_000, n >= 100, n <= 3000]).solve(solver="CLARABEL")
    used = nu != 0
    np.testing.assert_allclose(relevance.allocate(10_000, available).numpy()[used], n.value[used], atol=3)


def test_dearer_samples_are_bought_less() -> None:
    w, target = heads()
    costs = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    relevance = LassoRelevance(lam=0.0, costs=costs)
    nu = relevance.fit(w, target)
    counts = relevance.allocate(10_000)
    spent = float((counts * costs).sum())
    assert 10_000 - float(costs.max()) < spent <= 10_000
    # value (sum sqrt(c)|nu|)^2 / C, and no random feasible nu has a smaller one
    value = float((costs.sqrt() * nu.abs()).sum()) ** 2 / 10_000
    assert plug_in_score(nu, counts) == pytest.approx(value, rel=5e-3)
    kernel = torch.linalg.svd(w, full_matrices=True).Vh[4:]
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = nu + kernel.T @ torch.randn(8, generator=generator, dtype=torch.float64) * 0.1
        assert float((costs.sqrt() * other.abs()).sum()) ** 2 / 10_000 >= value


def test_opening_costs_choose_few_tasks_nearly_as_well_as_brute_force() -> None:
    ratios = []
    for seed in range(20):
        w, target = heads(rank=3, tasks=8, seed=seed)
        opening = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 200
        relevance = LassoRelevance(lam=0.0, opening=opening)
        relevance.fit(w, target)
        counts = relevance.allocate(1000)
        assert int(counts.sum()) == int(1000 - float(opening[relevance.relevance != 0].sum()))
        assert not counts[relevance.relevance == 0].any()
        best = min(
            float(np.abs(np.linalg.solve(w[:, list(s)].numpy(), target.numpy())).sum()) ** 2 / left
            for s in itertools.combinations(range(8), 3)
            if (left := 1000 - float(opening[list(s)].sum())) > 0
        )
        nu = relevance.relevance
        ratios.append(float(nu.abs().sum()) ** 2 / (1000 - float(opening[nu != 0].sum())) / best)
    assert min(ratios) >= 1 - 1e-9
    # a heuristic: exact in 99 of the first 100 seeds, and 4 % above in the other
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 19
    assert max(ratios) < 1.05


def test_samples_that_are_there_count_and_are_never_given_back() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=0.0, floor=10)
    relevance.fit(w, target)
    drawn = torch.full((12,), 40)
    counts = relevance.allocate(1000, drawn=drawn)
    assert int(counts.sum()) == 1000
    assert bool((counts >= drawn).all())
    # what is drawn in two steps is what is drawn in one, where the first step stays below it
    grown = relevance.allocate(2000, drawn=counts)
    assert torch.equal(grown, relevance.allocate(2000, drawn=drawn))


def test_one_task_gets_everything() -> None:
    relevance = LassoRelevance()
    relevance.fit(torch.tensor([[2.0]]), torch.tensor([1.0]))
    assert relevance.allocate(123).tolist() == [123]


def test_a_relevance_of_zero_warns_and_samples_evenly() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=1e6, floor=3)
    assert not relevance.fit(w, target).any()
    with pytest.warns(PoiseWarning, match=r"no source is relevant at lam=1e\+06"):
        counts = relevance.allocate(120)
    assert counts.tolist() == [10] * 12
    assert "says nothing" in relevance.report(counts).rows[0].reason or relevance.reduced_costs.min() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": "loud"}, "lam is 'noise', 'discrepancy' or a number"),
        ({"lam": -1.0}, "finite number >= 0"),
        ({"p": 3}, "p is 1 or 2"),
        ({"q": -1.0}, "q >= 0"),
        ({"floor": -1}, "floor must be >= 0"),
        ({"costs": [1.0, -2.0]}, "costs must be finite and positive"),
        ({"opening": [float("nan")]}, "opening must be finite"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LassoRelevance(**options)


def test_bad_heads_and_budgets_are_refused_by_name() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=0.0, floor=10)
    with pytest.raises(InputError, match="not known yet"):
        relevance.allocate(100)
    with pytest.raises(InputError, match=r"\(K, T\)"):
        relevance.fit(w, target[:2])
    broken = w.clone()
    broken[1, 7] = float("nan")
    with pytest.raises(InputError, match="heads of tasks 7 are not finite"):
        relevance.fit(broken, target)
    with pytest.raises(InputError, match="costs has 3 entries, and there are 12 tasks"):
        LassoRelevance(costs=[1.0, 1.0, 1.0]).fit(w, target)
    with pytest.raises(InputError, match="needs samples"):
        LassoRelevance().fit(w, target, noise=1.0)
    with pytest.raises(InputError, match="residual of"):
        LassoRelevance(p=2).fit(torch.zeros(4, 3), target)
    relevance.fit(w, target)
    with pytest.raises(InputError, match="floors of 12 tasks alone need 120"):
        relevance.allocate(119)
    with pytest.raises(InputError, match="have 1200 to give"):
        relevance.allocate(1201, [100] * 12)
    with pytest.raises(InputError, match="whole number"):
        relevance.allocate(200.5)
    with pytest.raises(InputError, match="one name for each"):
        relevance.report(relevance.allocate(200), ["a"])


def test_state_survives_saving_and_copying() -> None:
    w, target = heads()
    relevance = LassoRelevance(lam=0.05, floor=3)
    relevance.fit(w, target)
    other = LassoRelevance(lam=0.05, floor=3)
    other.load_state_dict(relevance.state_dict())
    for twin in (other, copy.deepcopy(relevance)):
        assert torch.equal(twin.allocate(500), relevance.allocate(500))
        assert str(twin.report(twin.allocate(500))) == str(relevance.report(relevance.allocate(500)))
