"""Exact checks of self-distilled kernel ridge regression (arXiv:2102.13088)."""

from __future__ import annotations

import copy
import io
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import CheckpointError, InputError
from poise.solvers.kernel_distillation import SelfDistillationKRR, distillation_filter

# The eleven noisy points of a sinusoid of Mobahi, Farajtabar and Bartlett (arXiv:2002.05715): the paper's notebook.
SINUSOID = torch.tensor(
    [
        0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.6920159488889518, -0.29756145531871736,
        -0.24189291901377769, -0.7964485769175675, -0.9616480167034174, -0.49672509509916934, -0.3469066003991437,
        0.5589512650600734,
    ],
    dtype=torch.float64,
)  # fmt: skip
PLACES = torch.arange(11, dtype=torch.float64)[:, None] / 10
GRID = torch.arange(101, dtype=torch.float64)[:, None] / 100
TRUTH = torch.sin(2 * torch.pi * GRID[:, 0])

# Mean squared error against the true sinusoid: the paper's repository prints it, 0.25 in its notebook.
TABLE = {
    0.0: ([0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251], 0.49505),
    0.35: ([0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948], 0.14959),
    0.25: ([0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011], 0.15250),
}


def problem(n: int = 40, outputs: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 30, 3, generator=generator, dtype=torch.float64)
    shape = (n + 30,) if outputs is None else (n + 30, outputs)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    signal = torch.sin(2 * x[:, 0]) + x[:, 1]
    y = (signal if outputs is None else signal[:, None] * torch.arange(1, outputs + 1)) + 0.5 * noise
    return x[:n], y[:n], x[n:], y[n:]


def refits(gram: Tensor, cross: Tensor, y: Tensor, ridge: float, shares: list[float]) -> list[Tensor]:
    """Refit from scratch at every step: the definition, and the oracle of this file."""
    shifted = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    target, fits = y, []
    for share in [1.0, *shares]:
        dual = torch.linalg.solve(shifted, share * y + (1 - share) * target)
        target = gram @ dual
        fits.append(cross @ dual)
    return fits


def rbf(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    return torch.exp(-gamma * (a[:, None, :] - b[None, :, :]).square().sum(-1))


@pytest.mark.parametrize("alpha", sorted(TABLE))
def test_the_papers_sinusoid_table_reappears_to_five_digits(alpha):
    steps, limit = TABLE[alpha]
    model = SelfDistillationKRR("rbf", ridge=0.2, gamma=80.0).fit(PLACES, SINUSOID, alpha=alpha, steps=6)
    measured = [float((model.predict(GRID, step=k) - TRUTH).square().mean()) for k in range(1, 7)]
    # The table is printed with five decimals.
    assert measured == pytest.approx(steps, abs=0.5e-5)
    assert float((model.predict(GRID, step="limit") - TRUTH).square().mean()) == pytest.approx(limit, abs=0.5e-5)
    assert model.errors([alpha], 6, GRID, TRUTH)[0].tolist() == pytest.approx(measured, abs=1e-14)


@pytest.mark.parametrize("decomposition", ["eigh", "cholesky"])
@pytest.mark.parametrize("outputs", [None, 3])
def test_ten_steps_of_a_random_schedule_equal_explicit_refits(decomposition, outputs):
    x, y, new, _ = problem(outputs=outputs)
    shares = torch.rand(9, generator=torch.Generator().manual_seed(1)).tolist()
    model = SelfDistillationKRR("rbf", ridge=0.3, gamma=0.5, decomposition=decomposition).fit(x, y, alpha=shares)
    gram = rbf(x, x, 0.5)
    on_train = refits(gram, gram, y, 0.3, shares)
    on_new = refits(gram, rbf(new, x, 0.5), y, 0.3, shares)
    for step in range(1, 11):
        torch.testing.assert_close(model.predict(step=step), on_train[step - 1], rtol=0, atol=1e-10)
        torch.testing.assert_close(model.predict(new, step=step), on_new[step - 1], rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    alpha=st.floats(0, 1),
    ridge=st.floats(1e-3, 1e2),
    step=st.integers(1, 12),
    fitted=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_jumping_to_a_step_equals_walking_there(alpha, ridge, step, fitted, seed):
    x, y, new, _ = problem(n=12, seed=seed)
    walked = SelfDistillationKRR("rbf", ridge=ridge, gamma=1.0).fit(x, y, alpha=alpha, steps=12)
    jumped = SelfDistillationKRR("rbf", ridge=ridge, gamma=1.0).fit(x, y, alpha=alpha, steps=fitted)
    torch.testing.assert_close(jumped.predict(new, step=step), walked.predict(new, step=step), rtol=0, atol=1e-10)
    values, recursion = walked.spectrum().eigenvalues, walked.spectrum().shrinkage[step - 1]
    closed = values * distillation_filter(values, ridge, alpha, step)
    torch.testing.assert_close(closed, recursion, rtol=1e-10, atol=1e-14)


def test_the_recursion_of_the_paper_is_the_closed_form_written_out():
    # B^(tau) = ((1-alpha) A)^(tau-1) A + alpha A sum_{k<tau-1} ((1-alpha) A)^k
    d, ridge, alpha = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5, 0.7, 0.3
    a = d / (d + ridge)
    for tau in range(1, 9):
        written = ((1 - alpha) * a) ** (tau - 1) * a + alpha * a * sum(((1 - alpha) * a) ** k for k in range(tau - 1))
        torch.testing.assert_close(d * distillation_filter(d, ridge, alpha, tau), written, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.35, 1.0])
def test_two_thousand_steps_reach_the_limit(alpha):
    # Where alpha is 0 the largest eigenvalue's factor, 0.98, needs 2,000 steps to fall to 1e-18.
    x, y, new, _ = problem()
    model = SelfDistillationKRR("rbf", ridge=0.5, gamma=0.5).fit(x, y, alpha=alpha, steps=2000)
    torch.testing.assert_close(model.predict(new), model.predict(new, step="limit"), rtol=0, atol=1e-10)
    torch.testing.assert_close(model.predict(step=10**6), model.predict(step="limit"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.05, 0.35, 0.9])
def test_the_limit_is_scikit_learns_kernel_ridge_at_the_amplified_ridge(alpha):
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")
    x, y, new, _ = problem(outputs=2)
    for kernel, arguments in (
        ("rbf", {"gamma": 0.4}),
        ("linear", {}),
        ("polynomial", {"gamma": 0.3, "degree": 2, "coef0": 1.5}),
    ):
        model = SelfDistillationKRR(kernel, ridge=0.6, **arguments).fit(x, y, alpha=alpha, steps=2)
        assert model.equivalent_ridge() == pytest.approx(0.6 / alpha, rel=1e-15)
        oracle = kernel_ridge.KernelRidge(alpha=0.6 / alpha, kernel=kernel, **arguments).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(model.predict(new, step="limit").numpy(), oracle.predict(new.numpy()), atol=1e-9)


def test_the_first_step_is_scikit_learns_kernel_ridge_and_default_gamma_is_the_same():
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")
    x, y, new, _ = problem()
    for kernel in ("rbf", "polynomial"):
        model = SelfDistillationKRR(kernel, ridge=0.6).fit(x, y)
        oracle = kernel_ridge.KernelRidge(alpha=0.6, kernel=kernel).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(model.predict(new, step=1).numpy(), oracle.predict(new.numpy()), atol=1e-9)


def test_the_linear_kernel_is_ridge_regression_without_an_intercept():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, new, _ = problem()
    model = SelfDistillationKRR("linear", ridge=2.0).fit(x, y, alpha=0.5)
    oracle = linear_model.Ridge(alpha=4.0, fit_intercept=False).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(model.predict(new, step="limit").numpy(), oracle.predict(new.numpy()), atol=1e-10)


def test_a_share_of_one_repeats_the_first_fit():
    x, y, new, _ = problem()
    model = SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=1.0, steps=5)
    for step in (2, 5, 50, "limit"):
        torch.testing.assert_close(model.predict(new, step=step), model.predict(new, step=1), rtol=0, atol=1e-12)


def test_a_share_of_zero_raises_the_shrinkage_to_the_power_of_the_step():
    x, y, _, _ = problem()
    spectrum = SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=0.0, steps=8).spectrum()
    a = spectrum.eigenvalues / (spectrum.eigenvalues + 0.3)
    for step in range(1, 9):
        torch.testing.assert_close(spectrum.shrinkage[step - 1], a**step, rtol=1e-12, atol=0)
    assert not spectrum.limit.any()


def test_every_step_minimises_the_papers_objective():
    x, y, _, _ = problem(n=20)
    shares, ridge = [0.2, 0.7], 0.4
    for decomposition in ("eigh", "cholesky"):
        model = SelfDistillationKRR("rbf", ridge, gamma=0.5, decomposition=decomposition).fit(x, y, alpha=shares)
        gram = rbf(x, x, 0.5)
        for step, share, previous in ((1, 1.0, y), (2, 0.2, model.predict(step=1)), (3, 0.7, model.predict(step=2))):
            dual = torch.linalg.solve(gram, model.predict(step=step)).requires_grad_()
            fitted = gram @ dual
            value = (
                share * (fitted - y).square().sum()
                + (1 - share) * (fitted - previous).square().sum()
                + ridge * dual @ gram @ dual
            ) / 2
            (slope,) = torch.autograd.grad(value, dual)
            assert value.item() == pytest.approx(model.objective_value(step), rel=1e-9)
            assert float(slope.abs().max()) < 1e-8


def test_the_certificate_shows_that_the_normal_equations_hold_and_when_they_do_not():
    x, y, _, _ = problem(n=20)
    for kernel, inputs in (("rbf", x), ("precomputed", rbf(x, x, 0.5)), ("linear", x)):
        model = SelfDistillationKRR(kernel, 0.4).fit(inputs, y, alpha=[0.2, 0.7])
        for step in (1, 2, 3):
            certificate = model.certificate(step)
            assert certificate.converged
            assert certificate.residual < 1e-12
            assert certificate.value == model.objective_value(step)
    # Single precision at a ridge far below the largest eigenvalue's rounding.
    rough = SelfDistillationKRR("linear", 1e-5, dtype=torch.float32).fit(100 * x, y, 0.2, 2).certificate()
    assert not rough.converged
    assert "ill-conditioned" in rough.status


@settings(max_examples=50, deadline=None)
@given(alpha=st.floats(0, 0.99), ridge=st.floats(1e-2, 1e2), seed=st.integers(0, 10**6))
def test_small_directions_are_suppressed_progressively_and_labels_dampen_it(alpha, ridge, seed):
    generator = torch.Generator().manual_seed(seed)
    d = (torch.rand(8, dtype=torch.float64, generator=generator) * 10 + 0.01).sort(descending=True)[0]
    steps = torch.arange(1, 15, dtype=torch.float64)[:, None]

    def ratios(share: float) -> Tensor:
        shrinkage = d * distillation_filter(d, ridge, share, steps)
        return shrinkage[:, :-1] / shrinkage[:, 1:]

    with_labels, without = ratios(alpha), ratios(0.0)
    # Without labels each step multiplies a ratio by the same factor A_j / A_k > 1: strict growth without bound.
    a = d / (d + ridge)
    torch.testing.assert_close(without[1:] / without[:-1], (a[:-1] / a[1:]).expand(13, 7), rtol=1e-9, atol=0)
    # With them it stays above the first step's, below the ratio without labels, and below 1 / alpha times the first.
    rounding = 1 + 1e-10
    assert bool((with_labels * rounding >= with_labels[0]).all())
    assert bool((with_labels[1] * rounding >= with_labels[0]).all())
    assert bool((with_labels <= without * rounding).all())
    if alpha > 0:
        assert bool((with_labels <= with_labels[0] / alpha * rounding).all())


def test_with_labels_a_ratio_may_pass_its_limit_and_fall_back():
    # Exact: d = 8 and 1, ridge 1, share 1/2. The small direction settles first, then the large one still sinks.
    def path(d: int) -> list[Fraction]:
        a, b = Fraction(d, d + 1), [Fraction(d, d + 1)]
        for _ in range(7):
            b.append(a * (b[-1] / 2 + Fraction(1, 2)))
        return b

    exact = [large / small for large, small in zip(path(8), path(1), strict=True)]
    limit = Fraction(8, 10) / Fraction(1, 3)
    assert exact[:5] == sorted(exact[:5])
    assert exact[4] > exact[5] > exact[6] > limit
    d = torch.tensor([8.0, 1.0], dtype=torch.float64)
    steps = torch.arange(1, 9, dtype=torch.float64)[:, None]
    shrinkage = d * distillation_filter(d, 1.0, 0.5, steps)
    assert (shrinkage[:, 0] / shrinkage[:, 1]).tolist() == pytest.approx([float(r) for r in exact], rel=1e-14)


def test_the_optimal_share_beats_a_grid_of_ten_thousand():
    x, y, new, truth = problem(outputs=2)
    model = SelfDistillationKRR(ridge=0.05, gamma=0.5).fit(
        x, y, alpha="optimal", steps=4, X_val=new, Y_val=truth, extrapolate=True
    )
    grid = torch.linspace(-3, 4, 10_001, dtype=torch.float64)
    for step in (2, 3, 4):
        taken = list(model.alphas[: step - 2])
        ends = [
            SelfDistillationKRR(ridge=0.05, gamma=0.5).fit(x, y, alpha=[*taken, share]).predict(new)
            for share in (0.0, 1.0)
        ]
        errors = ((1 - grid)[:, None, None] * ends[0] + grid[:, None, None] * ends[1] - truth).square().mean((1, 2))
        # The grid's spacing is 7e-4, so its best lies within half of that.
        assert model.alphas[step - 2] == pytest.approx(float(grid[errors.argmin()]), abs=3.6e-4)
        assert model.validation_errors[step - 1] <= float(errors.min()) + 1e-12


def test_the_error_is_exactly_quadratic_in_the_share():
    x, y, new, truth = problem()
    shares = torch.tensor([0.0, 0.3, 0.8, 0.55], dtype=torch.float64)
    errors = torch.stack(
        [
            (SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=[0.4, float(s)]).predict(new) - truth).square().mean()
            for s in shares
        ]
    )
    powers = torch.stack([shares**k for k in range(3)], dim=1)
    coefficients = torch.linalg.solve(powers[:3], errors[:3])
    assert float(powers[3] @ coefficients) == pytest.approx(float(errors[3]), rel=1e-11)


def test_an_over_smooth_teacher_asks_for_a_share_beyond_one_and_a_rough_one_for_a_negative_share():
    x, y, new, truth = problem(n=60)
    smooth = SelfDistillationKRR(ridge=300.0).fit(x, y, "optimal", 3, new, truth)
    assert smooth.flags[0] == "above"
    assert smooth.raw_alphas[0] > 1
    assert smooth.alphas[0] == 1.0
    rough = SelfDistillationKRR(ridge=1e-3, gamma=1.0).fit(x, y, "optimal", 3, new, truth)
    assert rough.flags[0] == "below"
    assert rough.raw_alphas[0] < 0
    assert rough.alphas[0] == 0.0
    free = SelfDistillationKRR(ridge=1e-3, gamma=1.0).fit(x, y, "optimal", 3, new, truth, extrapolate=True)
    assert free.alphas[0] == rough.raw_alphas[0]
    assert free.validation_errors[1] < rough.validation_errors[1]


def test_equal_predictions_leave_the_share_undefined_and_keep_the_labels():
    x, y, new, truth = problem(n=10)
    model = SelfDistillationKRR(ridge=0.0, gamma=1.0).fit(x, y, "optimal", 2, new, truth)
    assert model.flags == ("undefined",)
    assert model.alphas == (1.0,)


def test_the_stop_rule_ends_after_patience_steps_without_a_better_validation_error():
    full = SelfDistillationKRR(ridge=0.2, gamma=80.0).fit(PLACES, SINUSOID, 0.0, 20, GRID, TRUTH)
    assert full.steps == 20
    assert full.best_step == 3
    stopped = SelfDistillationKRR(ridge=0.2, gamma=80.0).fit(PLACES, SINUSOID, 0.0, 20, GRID, TRUTH, patience=2)
    assert stopped.steps == 5
    assert stopped.best_step == 3
    assert stopped.validation_errors == full.validation_errors[:5]
    torch.testing.assert_close(stopped.predict(GRID, step="best"), full.predict(GRID, step=3))


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(0.01, 1), tolerance=st.sampled_from([1e-2, 1e-4, 1e-8]), fitted=st.integers(1, 30))
def test_steps_to_limit_is_the_first_step_within_the_tolerance(alpha, tolerance, fitted):
    x, y, _, _ = problem(n=15)
    model = SelfDistillationKRR(ridge=0.1).fit(x, y, alpha=alpha, steps=fitted)
    spectrum = model.spectrum()
    step = model.steps_to_limit(tolerance)

    def gap(tau: int) -> float:
        shrinkage = spectrum.eigenvalues * distillation_filter(spectrum.eigenvalues, 0.1, alpha, tau)
        return float((shrinkage - spectrum.limit).abs().max())

    assert gap(step) <= tolerance * (1 + 1e-6)
    assert step == 1 or gap(step - 1) > tolerance * (1 - 1e-6)


def test_ten_to_twenty_steps_are_enough_at_the_papers_share():
    model = SelfDistillationKRR("rbf", 0.2, gamma=80.0).fit(PLACES, SINUSOID, 0.35, 2)
    assert 10 <= model.steps_to_limit(1e-3) <= 20


def test_the_equivalent_ridge_grows_from_the_ridge_to_the_ridge_over_the_share():
    x, y, _, _ = problem()
    model = SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=0.25, steps=10)
    ridges = [model.equivalent_ridge(step) for step in range(1, 11)]
    assert ridges[0] == pytest.approx(0.3, rel=1e-9)
    assert ridges == sorted(ridges)
    assert ridges[-1] < model.equivalent_ridge() == pytest.approx(1.2)
    assert model.equivalent_ridge(3000) == pytest.approx(1.2, rel=1e-9)
    assert SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=0.0).equivalent_ridge() == float("inf")


def test_equal_degrees_of_freedom_define_the_equivalent_ridge_of_a_step():
    x, y, _, _ = problem()
    model = SelfDistillationKRR(ridge=0.3).fit(x, y, alpha=0.25, steps=4)
    spectrum = model.spectrum()
    freedom = float((spectrum.eigenvalues / (spectrum.eigenvalues + model.equivalent_ridge(4))).sum())
    assert freedom == pytest.approx(float(spectrum.shrinkage[3].sum()), rel=1e-9)


def test_the_path_holds_what_predict_says_for_every_share_and_step():
    for outputs in (None, 2):
        x, y, new, truth = problem(outputs=outputs)
        shares = [0.0, 0.3, 1.0]
        base = SelfDistillationKRR(ridge=0.3).fit(x, y)
        path, errors = base.path(shares, 6, new), base.errors(shares, 6, new, truth)
        on_train, train_errors = base.path(shares, 6), base.errors(shares, 6)
        for i, share in enumerate(shares):
            model = SelfDistillationKRR(ridge=0.3).fit(x, y, share, 6)
            for step in range(1, 7):
                torch.testing.assert_close(path[i, step - 1], model.predict(new, step), rtol=0, atol=1e-12)
                torch.testing.assert_close(on_train[i, step - 1], model.predict(step=step), rtol=0, atol=1e-12)
                gap, train_gap = model.predict(new, step) - truth, model.predict(step=step) - y
                assert float(errors[i, step - 1]) == pytest.approx(float(gap.square().mean()), rel=1e-11)
                assert float(train_errors[i, step - 1]) == pytest.approx(float(train_gap.square().mean()), rel=1e-10)


def test_a_precomputed_matrix_and_a_function_give_the_named_kernel():
    x, y, new, truth = problem()
    named = SelfDistillationKRR("rbf", 0.3, gamma=0.5).fit(x, y, "optimal", 4, new, truth)
    matrices = SelfDistillationKRR("precomputed", 0.3).fit(rbf(x, x, 0.5), y, "optimal", 4, rbf(new, x, 0.5), truth)
    function = SelfDistillationKRR(lambda a, b: rbf(a, b, 0.5), 0.3).fit(x, y, "optimal", 4, new, truth)
    assert matrices.alphas == pytest.approx(named.alphas, rel=1e-8)
    for step in (1, 4, 9, "limit"):
        expected = named.predict(new, step)
        torch.testing.assert_close(matrices.predict(rbf(new, x, 0.5), step), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(function.predict(new, step), expected, rtol=0, atol=1e-9)


def test_cholesky_and_eigenvectors_give_one_model():
    x, y, new, truth = problem(outputs=2)
    slow = SelfDistillationKRR(ridge=0.3).fit(x, y, "optimal", 4, new, truth)
    fast = SelfDistillationKRR(ridge=0.3, decomposition="cholesky").fit(x, y, "optimal", 4, new, truth)
    assert fast.alphas == pytest.approx(slow.alphas, rel=1e-8)
    for step in (1, 3, 4, 7, "limit"):
        torch.testing.assert_close(fast.predict(new, step), slow.predict(new, step), rtol=0, atol=1e-10)
        torch.testing.assert_close(fast.predict(step=step), slow.predict(step=step), rtol=0, atol=1e-10)
    assert fast.objective_value(3) == pytest.approx(slow.objective_value(3), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions_work_and_a_singular_kernel_divides_nothing_by_zero(dtype):
    x, y, new, _ = problem()
    x = torch.cat([x, x[:5]])  # doubled rows: five eigenvalues are zero
    y = torch.cat([y, y[:5]])
    exact = SelfDistillationKRR("linear", 0.3).fit(x, y, 0.2, 6)
    model = SelfDistillationKRR("linear", 0.3, dtype=dtype).fit(x, y, 0.2, 6)
    assert model.predict(new).dtype == dtype
    # Single precision keeps about seven digits of values near three.
    atol = 1e-4 if dtype == torch.float32 else 1e-12
    for step in (1, 6, 40, "limit"):
        torch.testing.assert_close(model.predict(new, step).double(), exact.predict(new, step), rtol=0, atol=atol)


@pytest.mark.parametrize("decomposition", ["eigh", "cholesky"])
def test_state_survives_saving_copying_and_pickling_bit_for_bit(decomposition):
    x, y, new, truth = problem()

    def fresh() -> SelfDistillationKRR:
        return SelfDistillationKRR("rbf", 0.05, gamma=0.5, decomposition=decomposition)

    model = fresh().fit(x, y, "optimal", 5, new, truth, extrapolate=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = fresh()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.alphas == model.alphas
        assert twin.raw_alphas == model.raw_alphas
        assert twin.flags == model.flags
        assert twin.validation_errors == model.validation_errors
        for step in (1, 5, "best", 8):
            assert torch.equal(twin.predict(new, step), model.predict(new, step))


def test_a_state_with_other_settings_or_missing_parts_is_refused():
    x, y, _, _ = problem()
    state = SelfDistillationKRR("rbf", 0.3).fit(x, y).state_dict()
    with pytest.raises(CheckpointError, match=r"ridge is 0\.3 there and 0\.4 here"):
        SelfDistillationKRR("rbf", 0.4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="lacks basis"):
        SelfDistillationKRR("rbf", 0.3).load_state_dict({k: v for k, v in state.items() if k != "basis"})


def test_numpy_arrays_are_welcome():
    x, y, new, truth = problem()
    model = SelfDistillationKRR(ridge=0.3).fit(
        x.numpy(), y.numpy(), np.array([0.2, 0.4]), None, new.numpy(), truth.numpy()
    )
    assert model.steps == 3
    assert SelfDistillationKRR().fit(x.numpy(), y.numpy(), np.float32(0.25)).alphas[0] == 0.25
    torch.testing.assert_close(
        model.predict(new.numpy()), SelfDistillationKRR(ridge=0.3).fit(x, y, lambda k: 0.2 * (k - 1), 3).predict(new)
    )


def test_a_diverging_extrapolation_has_no_limit_and_says_so():
    x, y, new, _ = problem()
    model = SelfDistillationKRR(ridge=0.01).fit(x, y, alpha=-0.5, steps=4, extrapolate=True)
    walked = SelfDistillationKRR(ridge=0.01).fit(x, y, alpha=-0.5, steps=9, extrapolate=True)
    torch.testing.assert_close(model.predict(new, 9), walked.predict(new, 9), rtol=1e-9, atol=0)
    with pytest.raises(InputError, match="no limit"):
        model.predict(new, "limit")


X, Y = problem()[:2]
BROKEN = torch.full((4, 3), float("nan"))
LOPSIDED = torch.tensor([[1.0, 0.5], [0.2, 1.0]])
INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
PAIR = torch.ones(2)


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: SelfDistillationKRR("gaussian"), "kernel must be one of rbf, linear"),
        (lambda: SelfDistillationKRR(ridge=-1.0), "ridge must be"),
        (lambda: SelfDistillationKRR(gamma=0.0), "gamma must be positive"),
        (lambda: SelfDistillationKRR(decomposition="qr"), "decomposition"),
        (lambda: SelfDistillationKRR(dtype=torch.float16), "dtype"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha=1.2), r"lies in \[0, 1\]; got 1.2"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha=[0.2, -0.1]), r"alpha\[1\] is the share"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha=lambda step: step), r"alpha\(2\) is the share"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha="best"), "or 'optimal'"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha="optimal"), "give X_val and Y_val"),
        (lambda: SelfDistillationKRR().fit(X, Y, patience=2), "give X_val and Y_val"),
        (lambda: SelfDistillationKRR().fit(X, Y, X_val=X), "belong together"),
        (lambda: SelfDistillationKRR().fit(X, Y, X_val=X, Y_val=Y[:, None]), r"Y_val must be \[40\]"),
        (lambda: SelfDistillationKRR().fit(X, Y, X_val=X, Y_val=Y, patience=0), "at least 1"),
        (lambda: SelfDistillationKRR().fit(X, Y, steps=0), "counted from 1"),
        (lambda: SelfDistillationKRR().fit(X, Y, alpha=[0.1, 0.1], steps=5), "2 values make 3 steps"),
        (lambda: SelfDistillationKRR().fit(X[:, 0], Y), r"reshape\(-1, 1\)"),
        (lambda: SelfDistillationKRR().fit(X, Y[:-1]), "they have 40 and 39"),
        (lambda: SelfDistillationKRR().fit(BROKEN, torch.ones(4)), "X holds infinite or NaN"),
        (lambda: SelfDistillationKRR().fit(torch.ones(4, 3), BROKEN), "Y holds infinite or NaN"),
        (lambda: SelfDistillationKRR("precomputed").fit(X, Y), "square"),
        (lambda: SelfDistillationKRR("precomputed").fit(LOPSIDED, PAIR), "must be symmetric"),
        (lambda: SelfDistillationKRR(lambda a, b: a @ b.T + a[:, :1]).fit(X, Y), "must be symmetric"),
        (lambda: SelfDistillationKRR(lambda a, b: a).fit(X, Y), r"of shape \[40, 40\]"),
        (lambda: SelfDistillationKRR("precomputed").fit(INDEFINITE, PAIR), "not positive semi-definite"),
        (lambda: SelfDistillationKRR("linear", ridge=0.0).fit(X, Y), "singular, so ridge = 0"),
        (lambda: SelfDistillationKRR("linear", 0.0, decomposition="cholesky").fit(X, Y), "singular, so ridge = 0"),
        (lambda: SelfDistillationKRR().predict(X), "not fitted"),
        (lambda: SelfDistillationKRR().fit(X, Y).predict(X[:, :2]), "X must have 3 columns"),
        (lambda: SelfDistillationKRR().fit(X, Y).predict(X, step=0), "counted from 1"),
        (lambda: SelfDistillationKRR().fit(X, Y).predict(X, step="end"), "'limit'"),
        (lambda: SelfDistillationKRR().fit(X, Y).predict(X, step="best"), "validation data"),
        (lambda: SelfDistillationKRR().fit(X, Y).errors([0.1], 2, X), "X and Y together"),
        (lambda: SelfDistillationKRR().fit(X, Y).errors([1.1], 2), "lies in"),
        (lambda: SelfDistillationKRR().fit(X, Y).steps_to_limit(0.0), "tolerance must be positive"),
    ],
)
def test_bad_input_is_refused_in_words(act, says):
    with pytest.raises(InputError, match=says):
        act()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_model():
    x, y, new, truth = problem(outputs=2)
    host = SelfDistillationKRR(ridge=0.3).fit(x, y, "optimal", 4, new, truth)
    device = SelfDistillationKRR(ridge=0.3).fit(x.cuda(), y.cuda(), "optimal", 4, new.cuda(), truth.cuda())
    assert device.alphas == pytest.approx(host.alphas, rel=1e-8)
    for step in (1, 4, 9, "limit"):
        torch.testing.assert_close(device.predict(new.cuda(), step).cpu(), host.predict(new, step), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        host.to("cuda").predict(new.cuda(), 9), device.predict(new.cuda(), 9), rtol=0, atol=1e-10
    )
