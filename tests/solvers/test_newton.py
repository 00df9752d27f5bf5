"""Exact checks of gradient-normalised Newton steps (arXiv:2506.13710)."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import poise
from poise import Problem
from poise.errors import IncompatibleError, InputError, NonFiniteError, PoiseWarning
from poise.objective import Objective, Term
from poise.readouts import Classification, Regression
from poise.solvers import (
    GradientNormalizedNewton,
    as_solver,
    cubic_newton,
    gradient_method,
    super_universal_newton,
)
from poise.solvers.curvature import Dense, MatrixFree, RankOne, Zero
from poise.solvers.flat_problem import FlatProblem
from poise.tasks.smooth_functions import ChebyshevChain, LogSumExp, PowerNorm, Rosenbrock, RosenbrockEquations


class Logistic(Term):
    """Logistic loss of a margin, for labels -1 and 1."""

    formula = "logistic_margin"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.softplus(-prediction * target)


class Noisy(Term):
    """Another value each time it is asked."""

    formula = "noisy"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return prediction * float(np.random.default_rng().random()) + prediction**2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_sum_exp(n: int = 60, d: int = 8, mu: float = 0.2) -> LogSumExp:
    return LogSumExp(rand(n, d), rand(n, seed=1), mu)


def breast_cancer() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_breast_cancer()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0))
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), torch.tensor(2.0 * data.target - 1).double()


def linear_problem(x: Tensor, y: Tensor, objective: Objective, bias: bool = False, outputs: int = 1) -> Problem:
    model = nn.Linear(x.shape[1], outputs, bias=bias, dtype=x.dtype)
    for p in model.parameters():
        nn.init.zeros_(p)
    return Problem(
        model, objective, [{"main": {"input": x, "target": y}}], Regression() if outputs == 1 else Classification()
    )


def logistic(weight: float = 1.0, l2: float = 1e-3) -> Objective:
    return weight * Logistic() + l2 * poise.parse("l2(biases=True)")


def classifier(seed: int = 0, hidden: int | None = None) -> Problem:
    """Three classes, 40 examples; with a hidden layer or one linear layer."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 3) if hidden is None else nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    model = model.double()
    y = torch.randint(3, (40,), generator=torch.Generator().manual_seed(seed))
    objective = poise.parse("2*cross_entropy + 0.1*l2(biases=True)")
    return Problem(model, objective, [{"main": {"input": rand(40, 5, seed=seed), "target": y}}], Classification())


# ---- exact checks of the method --------------------------------------------------------------------------------------


def test_on_a_quadratic_with_its_hessian_every_trial_is_accepted_and_the_end_is_superlinear() -> None:
    a = rand(6, 6)
    h, b = a @ a.T + torch.eye(6, dtype=a.dtype), rand(6, seed=1)
    solver = GradientNormalizedNewton(tol=1e-12)
    x, certificate = solver.minimize_function(lambda x: 0.5 * x @ h @ x - b @ x, torch.zeros(6, dtype=a.dtype))
    assert certificate.converged
    torch.testing.assert_close(x, torch.linalg.solve(h, b), rtol=1e-11, atol=1e-12)
    assert all(step.solves == 1 for step in solver.log)
    norms = [step.gradient_norm for step in solver.log] + [certificate.residual]
    least = float(torch.linalg.eigvalsh(h)[0])
    for step, (before, after) in zip(solver.log, itertools.pairwise(norms), strict=True):
        # g+ = lambda (H + lambda I)^-1 g, and lambda falls with |g|
        assert after <= step.shift / (step.shift + least) * before * (1 + 1e-9) + 1e-13
    assert solver.log[-1].shift < 1e-3 * least


@pytest.mark.parametrize("curvature", [0.3, 1.0, 250.0])
def test_without_a_hessian_accepted_shifts_stay_around_the_constant_of_smoothness(curvature: float) -> None:
    solver = GradientNormalizedNewton("zero", tol=1e-8)
    solver.minimize_function(lambda x: 0.5 * curvature * x.square().sum(), rand(5))
    first = solver.log[0].gradient_norm
    for step in solver.log:
        assert 0.5 * curvature <= step.shift * (1 + 1e-6)
        assert step.shift <= max(first, 1.1 * curvature) * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "zero"])
def test_every_step_is_within_its_radius_descends_and_makes_the_promised_progress(kind: str) -> None:
    f = log_sum_exp()
    solver = GradientNormalizedNewton(kind, tol=1e-5, iterations=3000)
    _, certificate = solver.minimize_function(f, torch.ones(8, dtype=torch.float64))
    assert certificate.converged
    assert len(solver.log) == certificate.iterations
    norms = [step.gradient_norm for step in solver.log[1:]] + [certificate.residual]
    for step, value, norm in zip(solver.log, certificate.history[1:], norms, strict=True):
        assert step.length <= step.gamma + 1e-8 + 1e-12
        assert step.value - value >= norm**2 / (8 * step.shift) - 1e-14


@pytest.mark.parametrize("kind", ["exact", "gauss_newton"])
@pytest.mark.parametrize("factor", [2.0**-20, 3.7, 1e6])
def test_a_factor_on_the_function_changes_no_iterate_and_no_radius(kind: str, factor: float) -> None:
    f = log_sum_exp()

    class Scaled:
        def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
            value, g = f.value_and_gradient(x)
            return factor * value, factor * g

        def curvature(self, x: Tensor, kind: Any, value: float, gradient: Tensor) -> Any:
            return factor * f.curvature(x, kind, value / factor, gradient / factor)

    start = torch.ones(8, dtype=torch.float64)
    one, two = (GradientNormalizedNewton(kind, tol=1e-6 * c) for c in (1.0, factor))
    x, _ = one.minimize_function(f, start)
    y, _ = two.minimize_function(Scaled(), start)
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
    assert [s.gamma for s in one.log] == [s.gamma for s in two.log]


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "zero"])
def test_coordinates_that_change_with_the_metric_give_the_mapped_iterates(kind: str) -> None:
    f, s = log_sum_exp(), rand(8, 8, seed=3) / 4 + torch.eye(8, dtype=torch.float64)
    metric = f.a.T @ f.a / 10
    inverse = torch.linalg.inv(s)
    mapped = LogSumExp(f.a @ inverse, f.b, f.mu)  # g(y) = f(S^-1 y), y = S x
    start = torch.ones(8, dtype=torch.float64)
    one = GradientNormalizedNewton(kind, metric=metric, iterations=8)
    two = GradientNormalizedNewton(kind, metric=inverse.T @ metric @ inverse, iterations=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        x, _ = one.minimize_function(f, start)
        y, _ = two.minimize_function(mapped, s @ start)
    torch.testing.assert_close(s @ x, y, rtol=1e-8, atol=1e-9)
    assert [step.gamma for step in one.log] == [step.gamma for step in two.log]


def test_a_diagonal_metric_is_the_full_matrix_of_it() -> None:
    f, diagonal = log_sum_exp(), torch.linspace(0.5, 4, 8, dtype=torch.float64)
    start = torch.ones(8, dtype=torch.float64)
    x, a = GradientNormalizedNewton(metric=diagonal).minimize_function(f, start)
    y, b = GradientNormalizedNewton(metric=diagonal.diag()).minimize_function(f, start)
    assert a.iterations == b.iterations
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def test_rank_one_dense_and_conjugate_gradient_back_ends_agree() -> None:
    v, g = rand(30), rand(30, seed=1)
    forms = [RankOne(0.7, v), Dense(0.7 * torch.outer(v, v)), MatrixFree(RankOne(0.7, v).product)]
    for shift in (1e-3, 1.0, 50.0):
        one, *others = (form.solve(shift, g) for form in forms)
        assert one is not None
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        found = [
            GradientNormalizedNewton("rank_one", backend=b, iterations=20).minimize_function(
                PowerNorm(rand(20, 10), rand(20, seed=2)), torch.ones(10, dtype=torch.float64)
            )[0]
            for b in ("rank_one", "cholesky", "cg")
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-10)


def test_many_shifts_at_one_point_are_served_by_one_eigendecomposition() -> None:
    a, g = rand(12, 12), rand(12, seed=1)
    dense = Dense(a @ a.T)
    for shift in [2.0**k for k in range(-6, 8)]:
        expected = torch.linalg.solve(a @ a.T + shift * torch.eye(12, dtype=a.dtype), g)
        found = dense.solve(shift, g)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert dense._factors == 8
    assert Dense(-a @ a.T).solve(1e-3, g) is None
    assert MatrixFree(Dense(-a @ a.T).product).solve(1e-3, g) is None
    torch.testing.assert_close(Zero().solve(2.0, g), g / 2)


# ---- curvature of problems -------------------------------------------------------------------------------------------


def test_the_fisher_matrix_is_that_of_gradients_taken_one_example_at_a_time() -> None:
    for hidden in (None, 4):
        problem = classifier(hidden=hidden)
        flat = FlatProblem(problem)
        x, batch = flat.start, problem.batches[0]["main"]
        rows = []
        for i in range(40):
            one = {"main": {k: v[i : i + 1] for k, v in batch.items()}}
            alone = Problem(problem.model, poise.parse("cross_entropy"), [one], Classification())
            rows.append(flat.flat(alone.gradient()))
        g = torch.stack(rows)
        # the weighted sum of the terms' matrices: 2 Fisher + 0.1 I
        expected = 2 * g.T @ g / 40 + 0.1 * torch.eye(len(x), dtype=x.dtype)
        found = flat.curvature(x, "fisher", 1.0, x)
        assert isinstance(found, Dense)
        torch.testing.assert_close(found.matrix, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "gauss_newton", "expected_fisher", "fisher"])
@pytest.mark.parametrize("hidden", [None, 4])
def test_dense_matrices_and_products_are_one_curvature(kind: str, hidden: int | None) -> None:
    problem = classifier(hidden=hidden)
    dense, free = FlatProblem(problem), FlatProblem(problem, backend="cg")
    x = dense.start
    one, two = (f.curvature(x, kind, 1.0, x) for f in (dense, free))
    assert isinstance(one, Dense)
    assert isinstance(two, MatrixFree)
    for seed in range(3):
        h = rand(len(x), seed=seed)
        torch.testing.assert_close(one.product(h), two.product(h), rtol=1e-9, atol=1e-11)
    if kind == "exact":
        product = problem.product(dense.named(rand(len(x))), "hessian")
        torch.testing.assert_close(one.product(rand(len(x))), dense.flat(product), rtol=1e-9, atol=1e-11)


def test_the_fast_matrix_of_a_linear_layer_is_the_hessian() -> None:
    problem = classifier()
    flat = FlatProblem(problem)
    assert flat._design is not None
    found = flat.curvature(flat.start, "exact", 1.0, flat.start)
    identity = torch.eye(flat.dimension, dtype=torch.float64)
    columns = torch.stack([flat.flat(problem.hessian()(flat.named(e))) for e in identity])
    torch.testing.assert_close(found.matrix, columns, rtol=1e-10, atol=1e-12)


# ---- measured counts of the paper's method ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps", "solves"), [("exact", 10, 11), ("fisher", 218, 456)])
def test_breast_cancer_takes_the_known_number_of_steps(kind: str, steps: int, solves: int) -> None:
    x, y = breast_cancer()
    solver = GradientNormalizedNewton(kind)
    certificate = solver.minimize(linear_problem(x, y, logistic()))
    assert certificate.converged
    assert certificate.value == pytest.approx(0.0598294718818, abs=1e-12)
    # The long run depends on rounding in its last steps.
    assert abs(certificate.iterations - steps) <= steps // 50
    assert abs(solver.solves - solves) <= solves // 50


def test_rosenbrock_as_equations_takes_the_known_number_of_steps() -> None:
    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    for p, steps in ((2, 44), (4, 50)):
        _x, certificate = GradientNormalizedNewton("gauss_newton", tol=1e-10).minimize_function(
            RosenbrockEquations(p), start
        )
        assert certificate.converged
        assert certificate.iterations == steps
    with pytest.warns(PoiseWarning, match="stopped after 200 steps"):
        _, slow = GradientNormalizedNewton("zero", tol=1e-10, iterations=200).minimize_function(
            RosenbrockEquations(2), start
        )
    assert not slow.converged
    assert "gradient norm" in slow.status


def test_a_nonconvex_function_and_a_chain_of_chebyshev_polynomials_reach_stationary_points() -> None:
    x, certificate = GradientNormalizedNewton().minimize_function(Rosenbrock(), torch.tensor([-2.0, 2.0]).double())
    assert certificate.converged
    torch.testing.assert_close(x, torch.ones(2, dtype=torch.float64))
    start = torch.ones(4, dtype=torch.float64)
    start[0] = -1
    assert GradientNormalizedNewton(tol=1e-9).minimize_function(ChebyshevChain(2.0), start)[1].converged


@pytest.mark.parametrize(
    "f", [RosenbrockEquations(2.0), RosenbrockEquations(3.0), ChebyshevChain(4.0), Rosenbrock(), log_sum_exp(12, 3)]
)
def test_derivatives_of_the_test_functions_are_those_of_their_values(f: Any) -> None:
    x = rand(2 if "Rosen" in type(f).__name__ else 3, seed=5)
    value, g = f.value_and_gradient(x)
    eps = 1e-6
    units = torch.eye(len(x), dtype=x.dtype)
    slopes = [(f.value_and_gradient(x + eps * e)[0] - f.value_and_gradient(x - eps * e)[0]) / (2 * eps) for e in units]
    torch.testing.assert_close(g, torch.tensor(slopes, dtype=x.dtype), rtol=1e-5, atol=1e-6)
    columns = [(f.value_and_gradient(x + eps * e)[1] - f.value_and_gradient(x - eps * e)[1]) / (2 * eps) for e in units]
    found = f.curvature(x, "exact", value, g)
    matrix = found if isinstance(found, Tensor) else found.matrix
    torch.testing.assert_close(matrix, torch.stack(columns), rtol=1e-5, atol=1e-5)
    assert (
        torch.linalg.eigvalsh(GradientNormalizedNewton("gauss_newton")._curvature(f, _point(f, x)).matrix)[0] >= -1e-9
    )


def _point(f: Any, x: Tensor) -> Any:
    return GradientNormalizedNewton()._at(f, x)


def test_rivals_reach_the_same_minimum() -> None:
    f, start = log_sum_exp(), torch.ones(8, dtype=torch.float64)
    x, certificate = GradientNormalizedNewton().minimize_function(f, start)
    for found in (
        gradient_method(f, start, 1e-6),
        gradient_method(f, start, 1e-6, fast=True),
        cubic_newton(f, start, 1e-6),
        super_universal_newton(f, start, 1e-6),
    ):
        assert found.certificate.converged
        assert found.certificate.value == pytest.approx(certificate.value, abs=1e-10)
        torch.testing.assert_close(found.x, x, rtol=1e-3, atol=1e-4)


def test_fixed_rules_follow_their_formula() -> None:
    f, start = log_sum_exp(mu=1.0), torch.zeros(8, dtype=torch.float64)
    for rule in ("constant", "gradient"):
        solver = GradientNormalizedNewton(rule=rule, gamma0=0.5, tol=1e-7)
        assert solver.minimize_function(f, start)[1].converged
        for step in solver.log:
            gamma = 0.5 if rule == "constant" else 0.5 * step.gradient_norm
            assert step.gamma == pytest.approx(gamma)
            assert step.shift == pytest.approx(step.gradient_norm / (gamma + min(1e-8, gamma / 1000)))
            assert step.solves == 1


# ---- as a solver -----------------------------------------------------------------------------------------------------


def test_steps_of_a_fit_are_those_of_minimize_and_go_on_after_state_is_saved() -> None:
    x, y = rand(50, 4), torch.sign(rand(50, seed=1))
    problem = linear_problem(x, y, logistic(l2=1e-2))
    solver = as_solver("newton(hessian='exact', tol=1e-9)")
    certificate = GradientNormalizedNewton(iterations=4, tol=1e-30)
    with pytest.warns(PoiseWarning):
        whole = certificate.minimize(linear_problem(x, y, logistic(l2=1e-2)))
    for _ in range(2):
        report = solver.step(problem.fresh())
    assert report.gradient_norm > 0
    assert not report.skipped
    other = as_solver("newton")
    other.load_state_dict(copy.deepcopy(solver.state_dict()))
    for _ in range(2):
        other.step(problem.fresh())
    assert float(problem.value()) == pytest.approx(whole.value, rel=1e-12)


def test_fit_takes_the_solver_by_name_and_a_step_is_refused_by_accept() -> None:
    x, y = rand(60, 3), torch.randint(2, (60,), generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 2).double()
    run = poise.fit(model, "cross_entropy + 0.01*l2", (x, y), solver="newton", batch_size=60, steps=12, device="cpu")
    problem = Problem(
        run.model, poise.parse("cross_entropy + 0.01*l2"), [{"main": {"input": x, "target": y}}], Classification()
    )
    gradient = torch.cat([g.flatten() for g in problem.gradient().values()])
    assert float(gradient.norm()) < 1e-8
    report = as_solver("newton").step(problem.fresh(), accept=lambda step: False)
    assert report.skipped


def test_other_data_in_the_next_step_are_refused() -> None:
    x, y = rand(50, 4), torch.sign(rand(50, seed=1))
    solver = as_solver("newton")
    order = torch.randperm(50)
    solver.step(linear_problem(x, y, logistic()))
    solver.step(linear_problem(x[order], y[order], logistic()))
    with pytest.raises(IncompatibleError, match=r"full batches.*batch_size"):
        solver.step(linear_problem(x[:25], y[:25], logistic()))


def test_float32_reaches_what_its_rounding_allows() -> None:
    x, y = rand(80, 5).float(), torch.sign(rand(80, seed=1)).float()
    certificate = GradientNormalizedNewton(tol=1e-6).minimize(linear_problem(x, y, logistic(l2=1e-2)))
    assert certificate.converged
    reference = GradientNormalizedNewton().minimize(linear_problem(x.double(), y.double(), logistic(l2=1e-2)))
    assert certificate.value == pytest.approx(reference.value, rel=1e-5)


def test_a_tolerance_below_rounding_is_said_and_never_infinite() -> None:
    f = log_sum_exp()
    with pytest.warns(PoiseWarning, match=r"rounding|stopped"):
        x, certificate = GradientNormalizedNewton(tol=1e-19, iterations=60).minimize_function(
            f, torch.ones(8, dtype=torch.float64)
        )
    assert bool(x.isfinite().all())
    assert certificate.residual < 1e-12
    assert not certificate.converged


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hessian": "exakt"}, "Did you mean 'exact'"),
        ({"backend": "lu"}, "backend is one of"),
        ({"rule": "armijo"}, "rule is one of"),
        ({"gamma0": 0.0}, "gamma0 must be finite and above 0"),
        ({"tol": float("nan")}, "tol must be finite"),
        ({"power": 1.0}, "power must be"),
        ({"max_search": 0}, "at least 1"),
        ({"momentum": 0.1}, "no option 'momentum'"),
        ({"metric": torch.tensor([1.0, -1.0])}, "diagonal metric"),
        ({"metric": torch.tensor([[1.0, 2.0], [2.0, 1.0]])}, "no Cholesky factor"),
        ({"metric": torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, "the metric is not symmetric"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GradientNormalizedNewton(**options)


def test_an_approximation_that_is_not_positive_semidefinite_or_not_symmetric_is_refused() -> None:
    start, f = torch.ones(3, dtype=torch.float64), lambda x: x.square().sum()

    def indefinite(x: Tensor) -> Tensor:
        return torch.diag(x.new_tensor([1.0, -1e6, 2.0]))

    def skewed(x: Tensor) -> Tensor:
        return x.new_tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

    with pytest.raises(InputError, match=r"positive semidefinite.*least eigenvalue is -1e\+06"):
        GradientNormalizedNewton(indefinite).minimize_function(f, start)
    with pytest.raises(InputError, match="curvature is -"):
        GradientNormalizedNewton(lambda x: lambda h: -1e6 * h).minimize_function(f, start)
    with pytest.raises(InputError, match="not symmetric"):
        GradientNormalizedNewton(skewed).minimize_function(f, start)
    with pytest.raises(InputError, match="factor of a rank-one"):
        GradientNormalizedNewton(lambda x: (-1.0, x)).minimize_function(f, start)


def test_a_dimension_too_large_for_a_dense_matrix_says_how_large_and_what_to_use() -> None:
    x, y = torch.ones(2, 12_000), torch.ones(2)
    with pytest.raises(InputError, match=r"12,000 parameters would take 1\.1 GiB.*backend='cg'"):
        GradientNormalizedNewton(backend="cholesky").minimize(linear_problem(x, y, logistic()))
    with pytest.raises(InputError, match="backend='rank_one' needs"):
        GradientNormalizedNewton(backend="rank_one").minimize_function(
            log_sum_exp(), torch.ones(8, dtype=torch.float64)
        )


def test_terms_without_curvature_and_changing_or_infinite_objectives_are_refused_by_name() -> None:
    x, y = rand(20, 3), torch.sign(rand(20, seed=1))
    with pytest.raises(IncompatibleError, match=r"'l1' has corners.*proximal"):
        GradientNormalizedNewton().minimize(linear_problem(x, y, 1.0 * Logistic() + poise.parse("l1")))
    with pytest.raises(IncompatibleError, match="when asked again"):
        GradientNormalizedNewton().minimize(_noisy(x, y))
    with pytest.raises(NonFiniteError, match="both must be finite"):
        GradientNormalizedNewton().minimize_function(lambda x: x.log().sum(), -torch.ones(2, dtype=torch.float64))
    with pytest.raises(InputError, match="no 'fisher' Hessian"):
        GradientNormalizedNewton("fisher").minimize_function(lambda x: x.square().sum(), torch.ones(2))


def _noisy(x: Tensor, y: Tensor) -> Problem:
    problem = linear_problem(x, y, 1.0 * Noisy())
    nn.init.ones_(problem.model.weight)  # type: ignore[arg-type]
    return problem


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.peer
def test_scikit_learn_finds_the_same_classifier() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = breast_cancer()
    x = x[:, :-1]
    problem = linear_problem(x, y, 1.0 * Logistic() + 1e-2 * poise.parse("l2"), bias=True)
    certificate = GradientNormalizedNewton(tol=1e-10).minimize(problem)
    peer = linear_model.LogisticRegression(C=1 / (len(x) * 1e-2), solver="newton-cholesky", tol=1e-10, max_iter=100)
    peer.fit(x.numpy(), y.numpy())
    assert certificate.converged
    np.testing.assert_allclose(problem.model.weight.detach().numpy()[0], peer.coef_[0], atol=1e-7)  # type: ignore[union-attr,operator]
    np.testing.assert_allclose(float(problem.model.bias), peer.intercept_[0], atol=1e-7)  # type: ignore[arg-type]


@pytest.mark.peer
@pytest.mark.parametrize("method", ["trust-exact", "Newton-CG"])
def test_scipy_finds_the_same_minimum(method: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    f = log_sum_exp()

    def at(x: Any) -> Tensor:
        return torch.as_tensor(x)

    peer = optimize.minimize(
        lambda x: f.value_and_gradient(at(x))[0],
        np.ones(8),
        jac=lambda x: f.value_and_gradient(at(x))[1].numpy(),
        hess=lambda x: f.curvature(at(x), "exact", *f.value_and_gradient(at(x))).numpy(),
        method=method,
        options={"xtol": 1e-10} if method == "Newton-CG" else {"gtol": 1e-9},
    )
    x, certificate = GradientNormalizedNewton().minimize_function(f, torch.ones(8, dtype=torch.float64))
    assert certificate.value == pytest.approx(peer.fun, abs=1e-12)
    np.testing.assert_allclose(x.numpy(), peer.x, atol=1e-6)
