"""Supervised dictionary learning: the lifted objective, its solver, and the blocks."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import poise
from poise.data.factor_simulators import feature_model, filter_model, third_direction
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.problem import Problem
from poise.readouts import Regression
from poise.solvers import (
    BlockCoordinateDescent,
    Coder,
    DataMatrix,
    FactorPenalty,
    LowRank,
    LowRankProjectedGradient,
    SmoothMatrix,
    SupervisedFactors,
)
from poise.solvers.low_rank import DenseMatrix, truncated_svd
from poise.solvers.ridge_logistic import probabilities, ridge_logistic
from poise.solvers.stacked_matrix import Point

VARIANTS = ("filter", "feature")


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(
    variant: str = "filter", xi: float = 0.1, nu: float = 0.3, n: int = 60, p: int = 12, classes: int = 2, **options
):  # type: ignore[no-untyped-def]
    data = filter_model(n, p, 3, classes=classes, covariates=2, seed=1)
    z = torch.cat([torch.ones(1, n, dtype=torch.float64), data.covariates.mT])  # type: ignore[union-attr]
    return SupervisedFactors(data.x.mT, data.y, xi=xi, nu=nu, variant=variant, covariates=z, **options)


def solve(objective: SupervisedFactors, rank: int = 3, **options):  # type: ignore[no-untyped-def]
    return LowRankProjectedGradient(rank, **options).minimize_function(objective)


def dense_value(o: SupervisedFactors, a: Tensor, b: Tensor, gamma: Tensor) -> Tensor:
    """F, written out from the formula."""
    x = o.data.raw
    logits = (a.mT @ x if o.filters else a) + gamma.mT @ o.z
    full = torch.cat([torch.zeros_like(logits[:1]), logits])
    loss = (o.weights * (full.logsumexp(0) - (o.y * logits).sum(0))).sum()
    return loss + o.xi * (x - b).square().sum() + o.nu / 2 * (a.square().sum() + gamma.square().sum())


# ---- the objective -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("classes", [2, 4])
def test_value_and_gradients_are_those_of_the_formula(variant: str, classes: int) -> None:
    o = problem(variant, classes=classes, weights=torch.linspace(0.5, 2.0, 60))
    g = torch.Generator().manual_seed(0)
    left = torch.randn(o.shape[0], 3, generator=g, dtype=torch.float64)
    right = 0.3 * torch.randn(3, o.shape[1], generator=g, dtype=torch.float64)
    gamma = torch.randn(3, o.kappa, generator=g, dtype=torch.float64).requires_grad_()
    a, b = o.blocks(LowRank(left, right))
    a = a.clone().requires_grad_()
    value = dense_value(o, a, b.dense(), gamma)
    in_a, in_gamma = torch.autograd.grad(value, (a, gamma))
    assert o.value(Point(LowRank(left, right), gamma.detach())) == pytest.approx(float(value.detach()), rel=1e-12)
    found = o.gradients(a.detach(), gamma.detach())
    torch.testing.assert_close(found[0], in_a)
    torch.testing.assert_close(found[1], in_gamma)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_over_the_basis_is_that_of_the_eliminated_objective(variant: str) -> None:
    o = problem(variant)
    rows = o.shape[0] if variant == "filter" else o.shape[1]
    g = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(rows, 3, generator=g, dtype=torch.float64))[0]
    direction = torch.randn(rows, 3, generator=g, dtype=torch.float64)
    _, gradient, _ = o.reduced(basis, None)
    h = 1e-5
    above, below = (o.reduced(torch.linalg.qr(basis + s * direction)[0], None)[0] for s in (h, -h))
    assert float((gradient * direction).sum()) == pytest.approx((above - below) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bound_is_above_every_curvature(variant: str) -> None:
    o = problem(variant, scale=None)
    g = torch.Generator().manual_seed(0)
    for seed in range(5):
        point = o.start(3, "random", g.manual_seed(seed))
        a, gamma = o.blocks(point.theta)[0], point.free
        assert gamma is not None
        d = [torch.randn(*s, generator=g, dtype=torch.float64) for s in (a.shape, gamma.shape)]
        near, at = o.gradients(a + 1e-4 * d[0], gamma + 1e-4 * d[1]), o.gradients(a, gamma)
        change = sum(float((x - y).square().sum()) for x, y in zip(near, at, strict=True)) ** 0.5
        assert change <= o.bound * 1e-4 * sum(float(x.square().sum()) for x in d) ** 0.5


@pytest.mark.parametrize("variant", VARIANTS)
def test_rescaling_the_factors_changes_nothing(variant: str) -> None:
    o = problem(variant)
    found = solve(o)
    for c in (0.1, 7.0):
        scaled = LowRank(c * found.theta.left, found.theta.right / c)
        assert o.value(Point(scaled, found.free)) == pytest.approx(found.certificate.value, rel=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_rebuild_the_solution(variant: str) -> None:
    o = problem(variant)
    found = solve(o)
    f = o.factors(found.theta, found.free)
    a, b = o.blocks(found.theta)
    assert float(f.dictionary.norm()) == pytest.approx(1.0)
    torch.testing.assert_close(f.dictionary @ f.codes, b.dense())
    torch.testing.assert_close(f.dictionary @ f.coefficients if variant == "filter" else f.coefficients.mT @ f.codes, a)


# ---- what the solution is known to be ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("classes", [2, 3])
def test_at_full_rank_it_reproduces_the_data_and_is_ridge_regression(variant: str, classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    n, p = 40, 6
    o = problem(variant, nu=0.5, n=n, p=p, classes=classes)
    rank = min(o.shape)
    found = solve(o, rank, tol=1e-9)
    a, b = o.blocks(found.theta)
    torch.testing.assert_close(b.dense(), o.data.raw, atol=1e-6, rtol=1e-6)
    if classes > 2:
        # scikit-learn has no reference class: its ridge lies on all classes, so the comparison is with Newton's method alone.
        inputs = torch.cat([o.data.raw if variant == "filter" else torch.eye(n, dtype=torch.float64), o.z])
        expected = ridge_logistic(inputs, o.y, o.weights, o.nu)
    else:
        inputs = torch.cat([o.data.raw if variant == "filter" else torch.eye(n, dtype=torch.float64), o.z])
        peer = LogisticRegression(C=1 / 0.5, fit_intercept=False, tol=1e-12, solver="newton-cholesky", max_iter=200)
        expected = torch.from_numpy(peer.fit(inputs.mT.numpy(), o.y[0].numpy().astype(int)).coef_.T)
    own = torch.cat([a if variant == "filter" else a.mT, found.free])
    torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_weight_gives_the_truncated_decomposition_of_the_data(variant: str) -> None:
    o = problem(variant, xi=1e7)
    found = solve(o, 4)
    _, b = o.blocks(found.theta)
    u, s, vt = torch.linalg.svd(o.data.raw, full_matrices=False)
    torch.testing.assert_close(b.dense(), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_exchanging_two_classes_changes_the_sign_alone(variant: str) -> None:
    data = filter_model(60, 12, 3, seed=1)
    z = torch.ones(1, 60, dtype=torch.float64)
    one, other = (SupervisedFactors(data.x.mT, y, xi=0.1, variant=variant, covariates=z) for y in (data.y, 1 - data.y))
    first, second = solve(one, tol=1e-7), solve(other, tol=1e-7)
    assert first.certificate.value == pytest.approx(second.certificate.value, rel=1e-10)
    torch.testing.assert_close(one.blocks(first.theta)[0], -other.blocks(second.theta)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ten_starts_end_at_one_value(variant: str, rank: int) -> None:
    o = problem(variant)
    values = [solve(o, rank, start="random", seed=s).certificate.value for s in range(10)]
    assert max(values) - min(values) <= 1e-6 * min(values)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", ["auto", None])
def test_plain_steps_of_one_over_the_bound_never_raise_the_value(variant: str, scale: str | None) -> None:
    o = problem(variant, scale=scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        found = solve(o, step="fixed", momentum=False, correct=False, polish=False, max_iter=60, start="random")
    assert np.diff(found.certificate.history).max() <= 1e-9 * found.certificate.history[0]
    assert found.certificate.history[-1] < found.certificate.history[0]


def test_plain_steps_agree_with_dense_ones_written_out() -> None:
    o = problem(scale=None)
    point = o.start(3, "random", torch.Generator().manual_seed(5))
    a, b = o.blocks(point.theta)
    b, gamma, step = b.dense(), point.free, 1.0 / (2 * o.bound)
    solver = LowRankProjectedGradient(3, step, momentum=False, correct=False, polish=False, max_iter=20)
    with pytest.warns(PoiseWarning):
        found = solver.minimize_function(o, point)
    for _ in range(20):
        in_a, in_gamma = o.gradients(a, gamma)  # type: ignore[arg-type]
        whole = torch.cat([a - step * in_a, b - step * 2 * o.xi * (b - o.data.raw)], 1)
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        whole = (u[:, :3] * s[:3]) @ vt[:3]
        a, b, gamma = whole[:, :1], whole[:, 1:], gamma - step * in_gamma  # type: ignore[operator]
    torch.testing.assert_close(found.theta.dense(), torch.cat([a, b], 1), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found.free, gamma)


def test_one_step_for_both_blocks_stalls_where_scaled_ones_do_not() -> None:
    data = third_direction(300, 20, spread=2.0, seed=0)
    values = []
    for scale in (None, "auto"):
        o = SupervisedFactors(data.x.mT, data.y, xi=0.01, scale=scale)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)
            found = solve(o, 2, step="fixed", momentum=False, correct=False, polish=False, max_iter=100)
        values.append(found.certificate.value)
    best = solve(SupervisedFactors(data.x.mT, data.y, xi=0.01), 2, tol=1e-4).certificate.value
    assert best < values[1] < values[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_random_point_is_below_the_bound_and_a_strong_ridge_certifies(variant: str) -> None:
    o = problem(variant, nu=20.0)
    found = solve(o)
    bound = o.global_bound(found.point)
    assert bound.certified
    assert bound.lower <= bound.value
    weak = problem(variant, nu=0.01)
    lower = weak.global_bound(weak.start(3, "svd", torch.Generator())).lower
    assert lower <= min(solve(weak, start="random", seed=s).certificate.value for s in range(3))


@pytest.mark.peer
def test_at_full_rank_it_agrees_with_cvxpy() -> None:
    cvxpy = pytest.importorskip("cvxpy")
    o = problem(nu=0.5, n=30, p=5)
    x, z, y = (t.numpy() for t in (o.data.raw, o.z, o.y[0]))
    a, gamma = cvxpy.Variable(5), cvxpy.Variable(3)
    logits = x.T @ a + z.T @ gamma
    loss = cvxpy.sum(cvxpy.logistic(logits)) - y @ logits
    peer = cvxpy.Problem(cvxpy.Minimize(loss + 0.25 * (cvxpy.sum_squares(a) + cvxpy.sum_squares(gamma))))
    peer.solve(solver="CLARABEL")
    assert solve(o, 5).certificate.value == pytest.approx(peer.value, rel=1e-6)


# ---- data ----------------------------------------------------------------------------------------------------------------


def test_sparse_data_are_never_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy import sparse

    g = np.random.default_rng(0)
    x = sparse.random_array((300, 200), density=0.05, rng=g, format="csr")
    y = torch.from_numpy((np.asarray(x[:3].sum(0)).ravel() > np.median(x[:3].sum(0))).astype(np.int64))
    y[:5] = 1
    mean = torch.from_numpy(np.asarray(x.mean(1)).ravel())
    for variant in VARIANTS:
        dense = SupervisedFactors(DataMatrix(torch.from_numpy(x.toarray()), mean), y, xi=0.5, nu=0.1, variant=variant)
        expected = solve(dense, 4).certificate.value
        with monkeypatch.context() as patch:
            for kind in (sparse.csr_array, sparse.csc_array, sparse.coo_array):
                patch.setattr(kind, "toarray", lambda *_: pytest.fail("written out"))
                patch.setattr(kind, "todense", lambda *_: pytest.fail("written out"))
            o = SupervisedFactors(DataMatrix(x, mean), y, xi=0.5, nu=0.1, variant=variant)
            found = solve(o, 4)
        assert found.certificate.value == pytest.approx(expected, rel=1e-8)
        assert found.theta.left.shape[1] == 4


def test_products_of_data_are_those_of_the_matrix() -> None:
    from scipy import sparse

    g = torch.Generator().manual_seed(0)
    raw = torch.randn(7, 9, generator=g, dtype=torch.float64)
    raw[raw.abs() < 0.5] = 0.0
    mean, scale = raw.mean(1), 1 / raw.std(1)
    root = torch.rand(9, generator=g, dtype=torch.float64)
    whole = scale[:, None] * (raw - mean[:, None]) * root
    x, y = (torch.randn(k, 2, generator=g, dtype=torch.float64) for k in (9, 7))
    for data in (raw, sparse.csc_array(raw.numpy())):
        m = DataMatrix(data, mean, scale, root)
        torch.testing.assert_close(m.times(x), whole @ x)
        torch.testing.assert_close(m.transposed_times(y), whole.mT @ y)
        torch.testing.assert_close(m.squared_norm(), whole.square().sum())


@pytest.mark.parametrize("variant", VARIANTS)
def test_missing_entries_are_completed(variant: str) -> None:
    data = filter_model(120, 20, 2, noise=0.0, seed=0)
    x = data.x.mT.clone()
    hidden = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    x[hidden] = torch.nan
    o = SupervisedFactors(x, data.y, xi=10.0, nu=0.1, variant=variant)
    found = solve(o, 2, tol=1e-4)
    _, b = o.blocks(found.theta)
    error = (b.dense() - data.x.mT)[hidden].norm() / data.x.mT[hidden].norm()
    assert float(error) < 0.05
    assert bool(torch.isnan(x).any()), "the caller's data are not touched"
    assert np.diff(found.certificate.history).max() <= 1e-9 * found.certificate.history[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision_ends_at_the_same_value(variant: str) -> None:
    data = filter_model(60, 12, 3, seed=1)
    doubles = SupervisedFactors(data.x.mT, data.y, xi=0.1, variant=variant)
    singles = SupervisedFactors(data.x.mT.float(), data.y, xi=0.1, variant=variant)
    found = solve(singles, tol=1e-3)
    assert found.theta.left.dtype == torch.float32
    assert found.certificate.value == pytest.approx(solve(doubles).certificate.value, rel=1e-4)


def test_the_subspace_iteration_finds_the_leading_triplets() -> None:
    g = torch.Generator().manual_seed(0)
    m = torch.randn(300, 250, generator=g, dtype=torch.float64) * torch.logspace(0, -2, 250, dtype=torch.float64)
    found = truncated_svd(DenseMatrix(m), 5, generator=g, tolerance=1e-15, powers=200)
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    torch.testing.assert_close(found.values, s[:5], atol=0, rtol=1e-8)
    torch.testing.assert_close(found.low_rank().dense(), (u[:, :5] * s[:5]) @ vt[:5], atol=1e-5, rtol=1e-4)
    assert found.following == pytest.approx(float(s[5]), rel=1e-4)


# ---- blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("decay", [None, 0.5, 1.0])
def test_no_block_raises_the_value(variant: str, decay: float | None) -> None:
    o = problem(variant)
    solver = BlockCoordinateDescent(3, decay=decay, radius=None if decay is None else 5.0, max_iter=15, tol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        found = solver.minimize(o)
    assert max(b - a for a, b in zip(found.blocks, found.blocks[1:], strict=False)) <= 0
    assert found.certificate.value < found.blocks[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_and_lifting_end_at_one_value(variant: str) -> None:
    o = problem(variant)
    lifted = solve(o).certificate.value
    found = BlockCoordinateDescent(3, max_iter=400, tol=1e-4).minimize(o)
    assert lifted <= found.certificate.value * (1 + 1e-9)
    assert found.certificate.value == pytest.approx(lifted, rel=1e-4)
    assert float(found.factors.dictionary.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_constraints_and_penalties_are_kept(variant: str) -> None:
    data = feature_model(60, 12, 3, seed=1)
    x = data.x.mT - data.x.min()
    o = SupervisedFactors(x, data.y, xi=0.1, variant=variant)
    solver = BlockCoordinateDescent(
        3, dictionary=FactorPenalty(nonnegative=True), codes=FactorPenalty(l1=0.5, nonnegative=True),
        coefficients=FactorPenalty(l1=0.05, l2=0.1), max_iter=40, tol=1e-2,
    )  # fmt: skip
    found = solver.minimize(o)
    assert found.certificate.feasible
    assert bool((found.factors.dictionary >= 0).all() and (found.factors.codes >= 0).all())
    assert int((found.factors.codes == 0).sum()) > 0
    assert max(b - a for a, b in zip(found.blocks, found.blocks[1:], strict=False)) <= 0


def test_a_block_start_from_lifted_factors_stays_there() -> None:
    o = problem()
    lifted = solve(o)
    found = BlockCoordinateDescent(3, max_iter=20, tol=1e-4).minimize(o, o.factors(lifted.theta, lifted.free))
    assert found.certificate.value == pytest.approx(lifted.certificate.value, rel=1e-8)
    assert found.certificate.converged


# ---- codes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_coding_the_training_samples_with_their_labels_gives_their_codes(classes: int) -> None:
    o = problem("feature", classes=classes)
    found = solve(o, tol=1e-7)
    f = o.factors(found.theta, found.free)
    coder = Coder(f.dictionary, f.coefficients, o.xi, o.nu, FactorPenalty())
    offset = f.covariate_coefficients.mT @ o.z
    cross = o.data.transposed_times(f.dictionary).mT
    codes, _ = coder.joint_code(cross, coder.code(o.data), offset, o.y)
    torch.testing.assert_close(codes, f.codes, atol=1e-4, rtol=1e-4)
    fitted = probabilities(f.coefficients.mT @ f.codes + offset)
    torch.testing.assert_close(probabilities(f.coefficients.mT @ codes + offset), fitted, atol=1e-5, rtol=1e-5)


def test_the_exhaustive_label_has_the_least_loss_and_both_ways_of_coding_agree() -> None:
    o = problem("feature")
    found = solve(o)
    f = o.factors(found.theta, found.free)
    offset = f.covariate_coefficients.mT @ o.z
    free = Coder(f.dictionary, f.coefficients, o.xi, o.nu, FactorPenalty())
    # A penalty this small acts on nothing but the choice of the algorithm.
    proximal = Coder(f.dictionary, f.coefficients, o.xi, o.nu, FactorPenalty(l2=1e-14))
    cross, h = o.data.transposed_times(f.dictionary).mT, free.code(o.data)
    for y in (torch.zeros_like(o.y), torch.ones_like(o.y)):
        exact, loss = free.joint_code(cross, h, offset, y)
        other, _ = proximal.joint_code(cross, h, offset, y)
        torch.testing.assert_close(exact, other, atol=1e-3 * float(exact.abs().max()), rtol=1e-3)
        nearby = free.joint_code(cross, h, offset, y)[0] + 1e-3
        a = f.coefficients.mT @ nearby
        away = nearby - h
        full = torch.cat([torch.zeros_like(a), a + offset]).logsumexp(0) - (y * (a + offset)).sum(0)
        assert bool((full + o.nu / 2 * a.square().sum(0) + o.xi * (away * (free.gram @ away)).sum(0) >= loss).all())
    scores = free.predict(o.data, offset, "exhaustive").scores
    losses = torch.stack(
        [free.joint_code(cross, h, offset, y)[1] for y in (torch.zeros_like(o.y), torch.ones_like(o.y))]
    )
    assert torch.equal(scores.argmax(0), losses.argmin(0))


# ---- any smooth function, and problems of Poise --------------------------------------------------------------------------


def test_any_smooth_function_of_a_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.randn(12, 9, generator=g, dtype=torch.float64)
    shift = torch.zeros(9, dtype=torch.float64)
    f = SmoothMatrix(lambda t, s: 0.5 * (t + s - target).square().sum(), (12, 9), shift, dtype=torch.float64)
    found = LowRankProjectedGradient(3, tol=1e-6).minimize_function(f)
    centred = target - target.mean(0)
    best = 0.5 * float(torch.linalg.svdvals(centred)[3:].square().sum())
    assert found.certificate.converged
    assert found.certificate.value == pytest.approx(best, rel=1e-6)
    assert 0 < found.gap < 1


def test_it_minimises_a_problem_to_reduced_rank_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(80, 6, generator=g, dtype=torch.float64))[0] * 80**0.5
    y = x @ torch.randn(6, 5, generator=g, dtype=torch.float64) + torch.randn(80, 5, generator=g, dtype=torch.float64)
    model = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    task = Problem(model, poise.parse("squared_error"), [{"main": {"input": x, "target": y}}], Regression())
    certificate = LowRankProjectedGradient(2, tol=1e-6).minimize(task)
    assert certificate.converged
    assert int(torch.linalg.matrix_rank(model.weight.detach(), rtol=1e-8)) == 2
    # With white inputs the best matrix of rank 2 is the truncated least-squares solution.
    u, s, vt = torch.linalg.svd((x.mT @ y / 80).mT, full_matrices=False)
    torch.testing.assert_close(model.weight.detach(), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5, rtol=1e-4)


def test_it_steps_inside_fit_and_its_state_survives() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=g)
    y = x @ torch.randn(6, 1, generator=g) @ torch.randn(1, 4, generator=g)
    model = nn.Linear(6, 4)
    solver = LowRankProjectedGradient(1)
    run = poise.fit(
        model,
        "squared_error",
        {"input": x, "target": y},
        solver=solver,
        readout=Regression(),
        epochs=30,
        batch_size=40,
        device="cpu",
    )
    assert run is not None
    assert int(torch.linalg.matrix_rank(model.weight.detach(), rtol=1e-4)) == 1
    assert float((model(x) - y).square().mean()) < 0.05 * float(y.square().mean())
    other = copy.deepcopy(solver)
    again = LowRankProjectedGradient(1)
    again.load_state_dict(solver.state_dict())
    assert again.curvature == other.curvature == solver.curvature
    assert solver.curvature is not None


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "integer of at least 1"),
        ({"rank": 2, "step": "long"}, "'auto', 'fixed' or a number"),
        ({"rank": 2, "step": -1.0}, "step must be finite and above 0"),
        ({"rank": 2, "tol": 0.0}, "tol must be finite"),
        ({"rank": 2, "start": "pca"}, "start is one of"),
        ({"rank": 2, "dim": 2}, "dim 0 or 1"),
    ],
)
def test_arguments_of_the_solver_are_checked(arguments: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(InputError, match=message):
        LowRankProjectedGradient(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xi": -1.0}, "xi must be finite and not below 0"),
        ({"nu": math.nan}, "nu must be finite"),
        ({"variant": "wrapper"}, "'filter' or 'feature'"),
        ({"scale": "big"}, "scale is 'auto' or None"),
        ({"y": torch.zeros(10, dtype=torch.int64)}, "all samples have class 0"),
        ({"y": torch.zeros(9, dtype=torch.int64)}, r"int64 \[10\]"),
        ({"covariates": torch.ones(2, 9)}, r"\[q, 10\]"),
        ({"weights": -torch.ones(10)}, "not below 0"),
    ],
)
def test_arguments_of_the_objective_are_checked(change: dict, message: str) -> None:  # type: ignore[type-arg]
    arguments = {"y": torch.arange(10) % 2, **change}
    with pytest.raises(InputError, match=message):
        SupervisedFactors(torch.randn(4, 10), **arguments)


def test_a_rank_beyond_the_stacked_matrix_is_refused() -> None:
    with pytest.raises(InputError, match="12 x 61, so its rank is at most 12"):
        solve(problem(), 13)


def test_penalties_on_factors_are_not_for_the_lifted_solver() -> None:
    model = nn.Linear(3, 2)
    task = Problem(
        model,
        poise.parse("squared_error + 0.1*l1"),
        [{"main": {"input": torch.randn(5, 3), "target": torch.randn(5, 2)}}],
        Regression(),
    )
    with pytest.raises(IncompatibleError, match=r"'l1' has corners.*block solver"):
        LowRankProjectedGradient(1).minimize(task)


def test_negative_data_do_not_fit_factors_without_a_sign() -> None:
    both = {"dictionary": FactorPenalty(nonnegative=True), "codes": FactorPenalty(nonnegative=True)}
    with pytest.raises(InputError, match="go down to"):
        BlockCoordinateDescent(2, **both).minimize(problem())


def test_without_reconstruction_it_says_so_and_is_low_rank_regression() -> None:
    with pytest.warns(PoiseWarning, match="xi is 0"):
        o = problem(xi=0.0)
    found = LowRankProjectedGradient(3, tol=1e-2).minimize_function(o)
    inputs = torch.cat([o.data.raw, o.z])
    best = ridge_logistic(inputs, o.y, o.weights, o.nu)
    expected = dense_value(o, best[:12], o.data.raw, best[12:])
    # One direction is enough for two classes.
    assert found.certificate.value == pytest.approx(float(expected), rel=1e-3)


def test_a_step_that_is_too_long_is_named() -> None:
    f = SmoothMatrix(lambda t: (t - 1).square().sum() ** 2, (4, 4))
    with pytest.raises(poise.errors.NonFiniteError, match="too long"):
        LowRankProjectedGradient(1, 1e3, momentum=False, max_iter=50, start="random").minimize_function(f)
