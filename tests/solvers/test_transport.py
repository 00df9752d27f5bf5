"""Sparse transport: laws, exact values, certificates, refusals, and where peers go wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import pytest
import torch
from torch import Tensor

from poise.ascent import lbfgs
from poise.errors import InputError, PoiseWarning
from poise.solvers import entropic_transport, linear_transport, sparse_transport
from poise.transport import checked, solve


def problem(m: int = 12, n: int = 9, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(*batch, m, n, generator=generator, dtype=torch.float64)
    a = torch.rand(*batch, m, generator=generator, dtype=torch.float64) + 0.2
    b = torch.rand(*batch, n, generator=generator, dtype=torch.float64) + 0.2
    return cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
@pytest.mark.parametrize("k", [1, 3, 70, None])
def test_compiled_loops_and_plain_operations_agree(formulation: str, k: int | None) -> None:
    cost, a, b = problem(90, 7, batch=(3,))
    given = checked("test", cost, a, b, k, 2.0, feasible=False)
    width = 90 if formulation == "semi_dual" else 97
    x = 0.3 * torch.randn(2, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    which = torch.tensor([2, 0])
    fused = given.oracle(formulation)(x, which)  # type: ignore[arg-type]
    plain = (given.semi_dual if formulation == "semi_dual" else given.dual)(x, which)
    torch.testing.assert_close(fused, plain, atol=1e-12, rtol=1e-12)


def test_the_compiled_ascent_ends_where_the_plain_one_does() -> None:
    cost, a, b = problem(20, 15, batch=(3,))
    given = checked("test", cost, a, b, 8, 0.5)
    start, limit = torch.zeros(3, 20, dtype=torch.float64), torch.full((3,), 1e-9, dtype=torch.float64)
    plain = lbfgs(given.oracle("semi_dual"), start, limit, 500)
    compiled = solve(given, tolerance=1e-9)
    torch.testing.assert_close(compiled.value, plain.value, atol=1e-10, rtol=0)
    assert len(compiled.history) == int(compiled.iterations.max())
    assert compiled.history[-1] == pytest.approx(float(compiled.value.sum()))


@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
@pytest.mark.parametrize("k", [2, 4, None])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_those_of_the_values(formulation: str, k: int | None, entropy: bool) -> None:
    cost, a, b = problem(6, 5)
    given = checked("test", cost, a, b, None if entropy else k, 0.7, entropic=entropy)
    width = 6 if formulation == "semi_dual" else 11
    x = 0.3 * torch.randn(1, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    oracle = given.oracle(formulation)  # type: ignore[arg-type]
    gradient = oracle(x, torch.arange(1))[1]
    for i in range(width):
        nudge = torch.zeros_like(x)
        nudge[0, i] = 1e-6
        slope = (oracle(x + nudge, torch.arange(1))[0] - oracle(x - nudge, torch.arange(1))[0]) / 2e-6
        assert float(slope) == pytest.approx(float(gradient[0, i]), abs=1e-7)


@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
@pytest.mark.parametrize("regularizer", ["squared", "entropy"])
def test_smooth_regularisers_reach_a_tight_certificate(formulation: str, regularizer: str) -> None:
    cost, a, b = problem()
    result = sparse_transport(
        cost, a, b, gamma=0.5, formulation=formulation, regularizer=regularizer, tolerance=1e-9  # type: ignore[arg-type]
    )  # fmt: skip
    assert result.status == ("converged",)
    assert bool(result.converged)
    assert bool(result.feasible)
    assert float(result.gap.abs()) < 1e-8
    certificate = result.certificate()
    assert certificate.converged
    assert certificate.feasible
    assert certificate.support is not None
    assert len(certificate.support) == int((result.plan > 0).sum())


def test_both_formulations_have_one_value_and_one_plan() -> None:
    cost, a, b = problem()
    one, other = (
        sparse_transport(cost, a, b, k=6, gamma=0.5, formulation=f, tolerance=1e-9) for f in ("semi_dual", "dual")
    )
    torch.testing.assert_close(one.value, other.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(one.plan, other.plan, atol=1e-6, rtol=0)
    assert float(one.column_error) < 1e-14


def test_a_limit_of_the_whole_column_is_quadratic_transport_where_the_peer_raises() -> None:
    cost, a, b = problem()
    free = sparse_transport(cost, a, b, gamma=0.5, tolerance=1e-9)
    for k in (12, 50):
        for formulation in ("semi_dual", "dual"):
            limited = sparse_transport(cost, a, b, k=k, gamma=0.5, formulation=formulation, tolerance=1e-9)  # type: ignore[arg-type]
            torch.testing.assert_close(limited.plan, free.plan, atol=1e-6, rtol=0)


def test_one_nonzero_a_column_has_the_value_of_the_linear_program_plus_a_constant() -> None:
    for seed in range(3):
        cost, a, b = problem(seed=seed, m=6, n=9)
        exact = linear_transport(cost, a, b)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)
            result = sparse_transport(cost, a, b, k=1, gamma=0.7)
        torch.testing.assert_close(result.value, exact + 0.35 * b.square().sum(), atol=1e-7, rtol=0)


def test_one_nonzero_a_column_solves_assignment_problems() -> None:
    from scipy.optimize import linear_sum_assignment

    cost, _, _ = problem(15, 15)
    rows, columns = linear_sum_assignment(cost.numpy())
    result = sparse_transport(cost, k=1)
    expected = torch.zeros(15, 15, dtype=torch.float64)
    expected[rows, columns] = 1 / 15
    torch.testing.assert_close(result.plan, expected)
    assert result.status == ("converged",)
    assert int(result.nonzeros.max()) == 1


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("axis", ["column", "row"])
def test_no_line_has_more_than_k_nonzeros_and_the_dual_is_below_every_feasible_plan(k: int, axis: str) -> None:
    for seed in range(4):
        cost, a, b = problem(8, 8, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)
            result = sparse_transport(cost, a, b, k=k, gamma=0.3, axis=axis)  # type: ignore[arg-type]
        assert int(result.nonzeros.max()) <= k
        assert int((result.plan > 0).sum(-2 if axis == "column" else -1).max()) <= k
        if bool(result.feasible):
            assert float(result.gap) >= -1e-5
            torch.testing.assert_close(result.plan.sum(-1), a, atol=1e-5, rtol=0)
            torch.testing.assert_close(result.plan.sum(-2), b, atol=1e-5, rtol=0)
        product = torch.outer(a, b)
        assert float(result.value) <= float((product * cost).sum() + 0.15 * product.square().sum()) + 1e-9


def test_rows_are_limited_as_columns_of_the_transpose() -> None:
    cost, a, b = problem()
    rows = sparse_transport(cost, a, b, k=5, gamma=0.5, axis="row", tolerance=1e-9)
    columns = sparse_transport(cost.mT.contiguous(), b, a, k=5, gamma=0.5, tolerance=1e-9)
    torch.testing.assert_close(rows.plan, columns.plan.mT)
    torch.testing.assert_close(rows.alpha, columns.beta)
    torch.testing.assert_close(rows.value, columns.value)


def test_a_batch_is_its_problems_one_by_one_and_permutations_carry_over() -> None:
    cost, a, b = problem(batch=(2, 3))
    whole = sparse_transport(cost, a, b, k=6, gamma=0.5, tolerance=1e-9)
    assert whole.plan.shape == cost.shape
    assert whole.value.shape == (2, 3)
    assert len(whole.status) == 6
    alone = sparse_transport(cost[1, 2], a[1, 2], b[1, 2], k=6, gamma=0.5, tolerance=1e-9)
    torch.testing.assert_close(whole.plan[1, 2], alone.plan, atol=1e-9, rtol=0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    shuffled = sparse_transport(cost[1, 2][order], a[1, 2][order], b[1, 2], k=6, gamma=0.5, tolerance=1e-9)
    torch.testing.assert_close(shuffled.plan, alone.plan[order], atol=1e-6, rtol=0)


def test_scaling_cost_and_gamma_scales_the_value_and_leaves_the_plan() -> None:
    cost, a, b = problem()
    one = sparse_transport(cost, a, b, k=6, gamma=0.5, tolerance=1e-9)
    ten = sparse_transport(10 * cost, a, b, k=6, gamma=5.0, tolerance=1e-9)
    torch.testing.assert_close(ten.value, 10 * one.value, atol=1e-7, rtol=0)
    torch.testing.assert_close(ten.plan, one.plan, atol=1e-6, rtol=0)


def test_lines_without_mass_stay_empty_and_forbidden_entries_too() -> None:
    cost, a, b = problem()
    a[2], b[[0, 4]] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    cost[5, 1] = torch.inf
    result = sparse_transport(cost, a, b, k=8, gamma=0.5, tolerance=1e-9)
    assert result.status == ("converged",)
    assert float(result.plan[2].sum()) == 0
    assert float(result.plan[:, [0, 4]].sum()) == 0
    assert float(result.plan[5, 1]) == 0
    assert all(bool(getattr(result, n).isfinite().all()) for n in ("alpha", "beta", "plan", "value", "primal"))


def test_ties_are_reported_and_repaired_where_a_plan_exists() -> None:
    # Three rows of one third, two columns of one half: one column must be split, so k = 2, and rows 0 and 1 are alike.
    cost = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    with pytest.warns(PoiseWarning, match="missed their certificate"):
        result = sparse_transport(cost, k=2, gamma=1.0)
    assert bool(result.feasible)
    assert int(result.nonzeros.max()) <= 2
    assert result.ties.any()
    assert result.status[0].startswith("tied at the k-th place: a feasible plan")
    # By hand: every column takes a whole row and shares the third, 2 * (1/9 + 1/36) / 2.
    assert float(result.primal) == pytest.approx(2 * (1 / 9 + 1 / 36) / 2, abs=1e-5)
    assert not result.certificate().converged
    assert result.certificate().measure.startswith("duality gap")


def test_a_limit_without_any_plan_is_flagged_and_never_silent() -> None:
    # Every column must go to one row as a whole, and no subset of the columns weighs what a row weighs.
    a = torch.tensor([0.35, 0.65], dtype=torch.float64)
    cost = torch.rand(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(PoiseWarning, match="no feasible plan"):
        result = sparse_transport(cost, a, k=1)
    assert not bool(result.feasible)
    assert not bool(result.converged)
    assert "Take a larger k" in result.status[0]


def test_a_warm_start_begins_where_the_last_one_ended() -> None:
    cost, a, b = problem()
    for formulation in ("semi_dual", "dual"):
        cold = sparse_transport(cost, a, b, k=6, gamma=0.5, formulation=formulation, tolerance=1e-9)  # type: ignore[arg-type]
        warm = sparse_transport(cost, a, b, k=6, gamma=0.5, formulation=formulation, warm=cold, tolerance=1e-8)  # type: ignore[arg-type]
        assert int(cold.iterations) > 5
        assert int(warm.iterations) == 0
    with pytest.raises(InputError, match="warm has potentials"):
        sparse_transport(cost[:, :5], warm=cold)


def test_adam_makes_its_steps_in_the_dtype_of_the_cost() -> None:
    cost, a, b = (t.float() for t in problem())
    with pytest.warns(PoiseWarning, match="iteration limit"):
        few = sparse_transport(cost, a, b, k=6, method="adam", max_iter=3, repair=False)
    many = sparse_transport(cost, a, b, k=6, method="adam", max_iter=2000, tolerance=1e-2, lr=1e-3)
    assert few.plan.dtype == many.plan.dtype == torch.float32
    assert int(few.iterations) == 3
    exact = sparse_transport(cost, a, b, k=6)
    assert float(many.value) == pytest.approx(float(exact.value), abs=1e-4)


def test_the_iteration_limit_is_said() -> None:
    cost, a, b = problem()
    with pytest.warns(PoiseWarning, match="iteration limit"):
        result = sparse_transport(cost, a, b, max_iter=2, tolerance=1e-9)
    assert int(result.iterations) == 2
    assert not bool(result.converged)
    assert not result.certificate().converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.tensor([0.5, -0.1, 0.6])}, "a is mass, finite and not negative"),
        ({"a": torch.tensor([0.5, torch.nan, 0.6])}, "a is mass, finite"),
        ({"a": torch.tensor([0.5, 0.5, 0.5])}, "equal sums"),
        ({"a": torch.zeros(3), "b": torch.zeros(2)}, "some mass"),
        ({"a": torch.ones(4)}, r"a is \[..., 3\]"),
        ({"k": 1}, "infeasible: 3 rows have mass, and 2 columns with at most k = 1 nonzeros hold 2"),
        ({"k": 0}, "k counts entries"),
        ({"k": 1.5}, "k counts entries"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"formulation": "primal"}, "formulation is one of"),
        ({"regularizer": "entropy", "k": 2}, "the entropy has no limit"),
        ({"tolerance": 0.0}, "tolerance and max_iter must be positive"),
    ],
)
def test_bad_input_is_refused_in_words(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"sparse_transport: .*{message}"):
        sparse_transport(torch.rand(3, 2), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (torch.tensor([[0.0, torch.nan]]), r"it is nan at \[0, 1\]"),
        (torch.tensor([[0.0, -torch.inf]]), "it is -inf"),
        (torch.tensor([[0.0, torch.inf]]), "infeasible: a row or column has mass, and the cost forbids"),
        (torch.ones(3), r"float \[..., m, n\]"),
        (torch.ones(3, 2, dtype=torch.int64), r"float \[..., m, n\]"),
    ],
)
def test_a_broken_cost_is_refused_with_its_place(cost: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sparse_transport(cost)


def test_results_copy_and_a_second_solve_is_the_same_bit_for_bit() -> None:
    cost, a, b = problem()
    one, two = (sparse_transport(cost, a, b, k=6, gamma=0.5) for _ in range(2))
    assert torch.equal(one.plan, two.plan)
    assert torch.equal(copy.deepcopy(one).plan, one.plan)


def test_the_baselines_are_the_limits_of_each_other() -> None:
    cost, a, b = problem()
    plan, value, alpha, beta = linear_transport(cost, a, b)
    torch.testing.assert_close(plan.sum(-1), a)
    torch.testing.assert_close((alpha * a).sum() + (beta * b).sum(), value)
    faint = sparse_transport(cost, a, b, gamma=1e-3, tolerance=1e-8)
    torch.testing.assert_close(faint.linear, value, atol=1e-4, rtol=0)
    soft, error, rounds = entropic_transport(cost, a, b, gamma=0.05, tolerance=1e-10)
    same = sparse_transport(cost, a, b, gamma=0.05, regularizer="entropy", tolerance=1e-10)
    assert float(error) <= 1e-10
    assert rounds < 1000
    torch.testing.assert_close(soft, same.plan, atol=1e-8, rtol=0)


def test_a_linear_program_that_is_too_large_or_infeasible_is_refused() -> None:
    with pytest.raises(InputError, match="too many for a linear program"):
        linear_transport(torch.zeros(1500, 1500))
    corner = torch.tensor([[0.0, torch.inf], [0.0, 0.0]])
    with pytest.raises(InputError, match="forbidden entries"):
        linear_transport(corner, torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5]))


@pytest.mark.peer
def test_peer_plans_agree_where_the_peer_is_right() -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed (extra 'peers')")
    cost, a, b = problem()
    numpy = [t.numpy() for t in (a, b, cost)]
    torch.testing.assert_close(
        linear_transport(cost, a, b)[1], torch.as_tensor(ot.emd2(*numpy), dtype=torch.float64), atol=1e-9, rtol=0
    )
    for formulation, theirs in (("dual", ot.smooth.smooth_ot_dual), ("semi_dual", ot.smooth.smooth_ot_semi_dual)):
        with contextlib.redirect_stdout(io.StringIO()):
            plan = theirs(*numpy, 0.5, reg_type="sparsity_constrained", max_nz=6, stopThr=1e-12, numItermax=2000)
            quadratic = theirs(*numpy, 0.5, reg_type="l2", stopThr=1e-12, numItermax=2000)
        ours = sparse_transport(cost, a, b, k=6, gamma=0.5, formulation=formulation, tolerance=1e-9)  # type: ignore[arg-type]
        torch.testing.assert_close(ours.plan, torch.as_tensor(plan), atol=1e-5, rtol=0)
        free = sparse_transport(cost, a, b, gamma=0.5, formulation=formulation, tolerance=1e-9)  # type: ignore[arg-type]
        torch.testing.assert_close(free.plan, torch.as_tensor(quadratic), atol=1e-5, rtol=0)


@pytest.mark.peer
def test_the_peer_fails_where_this_solver_does_not() -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed (extra 'peers')")
    cost, _, _ = problem(3, 2)
    uniform = [torch.full((n,), 1 / n, dtype=torch.float64).numpy() for n in (3, 2)]
    with pytest.raises(ValueError, match="out of bounds"):
        ot.smooth.smooth_ot_dual(*uniform, cost.numpy(), 1.0, reg_type="sparsity_constrained", max_nz=3)
    assert sparse_transport(cost, k=3, formulation="dual").status == ("converged",)
    with contextlib.redirect_stdout(io.StringIO()):
        plan = ot.smooth.smooth_ot_semi_dual(*uniform, cost.numpy(), 1.0, reg_type="sparsity_constrained", max_nz=1)
    assert abs(plan.sum(1) - uniform[0]).sum() > 0.1
    with pytest.raises(InputError, match="infeasible"):
        sparse_transport(cost, k=1)
