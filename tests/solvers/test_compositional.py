"""Compositional optimisation: the averages are what the algorithm says, and variance reduction is exact where nothing is random."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import FormulaError, IncompatibleError, InputError, QuantityError
from poise.objective import Objective, Summand
from poise.parts.noise import GaussianNoise, GridNoise, KDENoise
from poise.problem import Problem
from poise.quantities import Quantities
from poise.readouts import Unnormalized
from poise.solvers import Compositional, as_solver
from poise.solvers.compositional import stage_of
from poise.terms import FunctionOfMeans, UnnormalizedNLL


class Line(nn.Module):
    """log p~ = theta . (x, -x^2), with sums for a normaliser that noise must find."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, 0.8], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x.square()], 1) @ self.theta


def data(rows: int = 32) -> Tensor:
    return torch.randn(rows, 1, generator=torch.Generator().manual_seed(0)).double()


def problem(model: nn.Module, term: Any, step: int, x: Tensor | None = None, noise: Any = None) -> Problem:
    x = data() if x is None else x
    noise = GaussianNoise(torch.zeros(1).double(), 1.5) if noise is None else noise
    return Problem(model, Objective([Summand(term)]), [{"main": {"input": x}}], Unnormalized(noise), key=(0, step))


def draws(step: int, rows: int = 32) -> Tensor:
    """The points that the readout draws in a step."""
    found: Tensor = Quantities({}, key=(0, step, 0, 0, 0))._draw(
        "drawn", lambda: GaussianNoise(torch.zeros(1).double(), 1.5).sample(rows)
    )
    return found


def by_hand(theta: Tensor, z: Tensor, x: Tensor, u: float) -> tuple[Tensor, float]:
    """Return the gradient with 1/u in the place of 1/Z, and the mean of the ratios."""
    q = torch.distributions.Normal(torch.zeros(1).double(), 1.5)

    def features(p: Tensor) -> Tensor:
        return torch.cat([p, -p.square()], 1)

    r = (features(z) @ theta - q.log_prob(z).squeeze(1)).exp()
    g = float(r.mean())
    return -features(x).mean(0) + (r[:, None] * features(z)).mean(0) / u, g


# ---- exact ---------------------------------------------------------------------------------------------------------


def test_five_steps_are_those_of_the_algorithm_written_by_hand() -> None:
    gamma, beta, eta = 0.3, 0.4, 0.05
    model, term = Line(), UnnormalizedNLL(gamma=gamma)
    solver = Compositional(grad_momentum=beta, lr=eta)
    solver.bind(model, Objective([Summand(term)]))
    theta, x, u, v = model.theta.detach().clone(), data(), math.nan, torch.zeros(2)
    for step in range(5):
        z = draws(step)
        g = by_hand(theta, z, x, 1.0)[1]
        u = g if step == 0 else (1 - gamma) * u + gamma * g
        slope = by_hand(theta, z, x, u)[0]
        v = slope if step == 0 else (1 - beta) * v + beta * slope
        theta = theta - eta * v
        now = problem(model, term, step)
        solver.step(now)
        now.objective.advance()
        torch.testing.assert_close(model.theta.detach(), theta)
        assert float(term.log_normalizer) == pytest.approx(math.log(u))


def test_variance_reduction_is_that_of_the_algorithm_written_by_hand() -> None:
    gamma, beta, eta = 0.3, 0.4, 0.05
    model, term = Line(), UnnormalizedNLL(gamma=gamma, variance_reduction=True)
    solver = Compositional(grad_momentum=beta, lr=eta, variance_reduction=True)
    solver.bind(model, Objective([Summand(term)]))
    theta, before, x, u, v = model.theta.detach().clone(), None, data(), math.nan, torch.zeros(2)
    for step in range(5):
        z = draws(step)
        g = by_hand(theta, z, x, 1.0)[1]
        last, u_last = before, u
        u = g if last is None else (1 - gamma) * (u - by_hand(last, z, x, 1.0)[1]) + g
        slope = by_hand(theta, z, x, u)[0]
        v = slope if last is None else (1 - beta) * (v - by_hand(last, z, x, u_last)[0]) + slope
        before, theta = theta, theta - eta * v
        now = problem(model, term, step)
        solver.step(now)
        now.objective.advance()
        torch.testing.assert_close(model.theta.detach(), theta)
        assert float(term.log_normalizer) == pytest.approx(math.log(u))


def test_without_randomness_variance_reduction_is_gradient_descent() -> None:
    """On a grid, u_t - g_t(theta_t) = (1 - gamma)(u_{t-1} - g(theta_{t-1})) = 0, and the same for v."""
    grid = GridNoise(torch.tensor([-6.0]).double(), torch.tensor([6.0]).double(), 200)
    made = {}
    for name, formula, solver in (
        (
            "reduced",
            "unnormalized_nll(gamma=0.2, variance_reduction=True)",
            "compositional(grad_momentum=0.2, variance_reduction=True)",
        ),
        ("descent", "unnormalized_nll(gamma=1.0)", "compositional(grad_momentum=1.0)"),
    ):
        model = Line()
        poise.fit(
            model,
            formula,
            {"input": data()},
            readout=Unnormalized(grid),
            solver=solver,
            lr=0.1,
            steps=20,
            batch_size=32,
            device="cpu",
        )
        made[name] = model.theta.detach()
    torch.testing.assert_close(made["reduced"], made["descent"], rtol=1e-10, atol=1e-12)


def test_stages_grow_and_rates_fall_together() -> None:
    assert [stage_of(t, 3, 2.0) for t in (0, 2, 3, 8, 9, 20, 21)] == [0, 0, 1, 1, 2, 2, 3]
    model, term = Line(), UnnormalizedNLL(gamma=0.8)
    solver = Compositional(grad_momentum=0.6, lr=0.1, stage_steps=2, stage_factor=0.5, stage_growth=2.0)
    solver.bind(model, Objective([Summand(term)]))
    rates: list[float] = []
    for step in range(7):
        now = problem(model, term, step)
        theta = model.theta.detach().clone()
        solver.step(now)
        rates.append(term.average.rate)
        torch.testing.assert_close(theta - model.theta.detach(), solver.averaged["theta"] * 0.1 * solver_factor(step))
        now.objective.advance()
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.4, 0.4, 0.2]
    assert solver.optimizer is not None
    assert solver.optimizer.param_groups[0]["lr"] == 0.1


def solver_factor(step: int) -> float:
    return 0.5 ** stage_of(step, 2, 2.0)


def test_a_certificate_on_a_grid_is_the_maximum_of_the_likelihood() -> None:
    grid = GridNoise(torch.tensor([-8.0]).double(), torch.tensor([8.0]).double(), 400)
    model, term, x = Line(), UnnormalizedNLL(gamma=0.5), data()
    solver = Compositional(grad_momentum=0.5, lr=0.3)
    certificate = solver.minimize(problem(model, term, 0, x, grid), tolerance=1e-8, iterations=1000)
    assert certificate.converged
    variance = float(x.var(correction=0))
    expected = torch.tensor([float(x.mean()) / variance, 0.5 / variance]).double()
    torch.testing.assert_close(model.theta.detach(), expected, rtol=1e-5, atol=1e-6)
    assert certificate.value == pytest.approx(0.5 * math.log(2 * math.pi * variance) + 0.5, abs=1e-6)


def test_a_skipped_step_moves_neither_average() -> None:
    model, term = Line(), UnnormalizedNLL(gamma=0.5, variance_reduction=True)
    solver = Compositional(lr=0.1, variance_reduction=True)
    solver.bind(model, Objective([Summand(term)]))
    step = solver.step(problem(model, term, 0), accept=lambda _: False)
    assert step.skipped
    assert not solver.averaged
    assert not solver.before
    assert solver.steps == 0


def test_a_schedule_of_the_learning_rate_and_clipping_go_along() -> None:
    from poise.weights.schedule import cosine

    x = data(64)
    model = Line()
    poise.fit(
        model, "unnormalized_nll", {"input": x}, readout=Unnormalized(KDENoise.fit(x)), solver="compositional", lr=0.1, clip=0.1,
        lr_schedule=cosine(1, 0), steps=10, batch_size=32, device="cpu",
    )  # fmt: skip
    assert bool(torch.isfinite(model.theta).all())
    # Ten steps of at most lr times the clipped norm.
    assert float((model.theta.detach() - Line().theta.detach()).norm()) <= 10 * 0.1 * 0.1


def test_gamma_is_handed_to_the_terms() -> None:
    term = UnnormalizedNLL(gamma=0.5)
    Compositional(inner_momentum=0.1, lr=0.1).bind(Line(), Objective([Summand(term)]))
    assert term.average.rate == 0.1


# ---- functions of means ----------------------------------------------------------------------------------------------


def test_with_gamma_one_a_function_of_means_is_the_plug_in_value_and_gradient() -> None:
    g = (torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double().exp()).requires_grad_()
    term = FunctionOfMeans(("log", "square", "sqrt"), weights=(1.0, -2.0, 0.5), gamma=1.0)
    loss = Objective([Summand(term)])(inner=g)
    means = g.mean(0)
    plain = means[0].log() - 2 * means[1] ** 2 + 0.5 * means[2].sqrt()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, g)[0], torch.autograd.grad(plain, g)[0])


def test_its_logarithm_is_the_noise_part_of_the_unnormalised_likelihood() -> None:
    log_r = torch.randn(8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    nll, means = UnnormalizedNLL(gamma=0.3), FunctionOfMeans("log", gamma=0.3)
    for step in range(3):
        moved = log_r + 0.1 * step
        one = nll(torch.zeros(1).double(), moved, torch.zeros(8).double())
        other = means(moved.exp())
        slopes = [torch.autograd.grad(v.surrogate.mean(), log_r, retain_graph=True)[0] for v in (one, other)]
        torch.testing.assert_close(slopes[0], slopes[1])
        torch.testing.assert_close(one.values.mean(), other.values.mean())
        nll.advance(moved.detach(), torch.zeros(8).double())
        means.advance(moved.detach().exp())


def test_a_function_of_means_is_minimised_with_variance_reduction() -> None:
    """min over a of log E[exp(a x)] - a, whose solution for a Gaussian is a = (1 - mean)/variance."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([(self.a * x[:, 0]).exp(), self.a.expand(len(x))], 1)

    class Inner:
        output = "inner"

        def __call__(self, model: Any, batch: Quantities, reads: frozenset[str]) -> Quantities:
            batch.offer("inner", lambda: model(batch["input"]))
            return batch

    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    model = Scale()
    formula = "function_of_means(functions=('log', 'identity'), weights=(1, -1), gamma=0.2, variance_reduction=True)"
    assert str(poise.parse(formula)) == formula
    poise.fit(
        model, formula, {"input": x}, readout=Inner(), solver="compositional(grad_momentum=0.2, variance_reduction=True)", lr=0.2,
        steps=150, batch_size=200, device="cpu",
    )  # fmt: skip
    assert model.a.item() == pytest.approx(0.5, abs=0.08)


def test_padding_rows_count_nothing_in_a_mean() -> None:
    term = FunctionOfMeans("square", gamma=1.0)
    g = torch.tensor([[1.0], [3.0], [100.0]])
    assert float(term(g, sample_weight=torch.tensor([1.0, 1.0, 0.0])).values[0]) == 4.0


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_momentum": 0.0}, r"compositional: grad_momentum"),
        ({"inner_momentum": 2.0}, r"compositional: inner_momentum"),
        ({"stage_steps": 0}, r"compositional: stage_steps"),
        ({"stage_factor": 1.5}, r"compositional: stage_factor"),
        ({"optimizer": "lbfgs"}, r"compositional: lbfgs evaluates several times"),
        ({"optimizer": "sdg"}, r"Did you mean 'sgd'"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Compositional(**options)


def test_a_bound_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="name or a class"):
        Compositional(optimizer=torch.optim.SGD(Line().parameters(), lr=0.1))  # type: ignore[arg-type]


def test_the_name_is_known_to_text() -> None:
    assert (
        repr(as_solver("compositional(optimizer='adam')", lr=1e-3))
        == "compositional(adam(lr=0.001), grad_momentum=0.1)"
    )


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("function_of_means(functions='lg')", "no outer function 'lg'.*Did you mean 'log'"),
        ("function_of_means(functions=('log', 'exp'), weights=(1.0, 2.0, 3.0))", "2 functions and 3 weights"),
        ("function_of_means(functions=())", "functions is empty"),
    ],
)
def test_functions_that_do_not_fit_are_named(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(formula)


def test_means_that_do_not_fit_are_named() -> None:
    with pytest.raises(QuantityError, match="2 functions, and 'inner' has 1 columns"):
        FunctionOfMeans(("log", "exp"))(torch.ones(3, 1))
    with pytest.raises(QuantityError, match="log needs a positive mean"):
        FunctionOfMeans("log")(-torch.ones(3))


def test_a_function_of_means_refuses_micro_batches() -> None:
    class Inner:
        output = "inner"

        def __call__(self, model: Any, batch: Quantities, reads: frozenset[str]) -> Quantities:
            batch.offer("inner", lambda: model(batch["input"]).exp())
            return batch

    with pytest.raises(IncompatibleError, match="accumulate=1"):
        poise.fit(
            Line(),
            "function_of_means",
            {"input": data()},
            readout=Inner(),
            steps=1,
            batch_size=32,
            accumulate=2,
            device="cpu",
        )


def test_variance_reduction_without_its_solver_says_what_is_missing() -> None:
    x = data()
    with pytest.raises(QuantityError, match="previous_drawn_log_density"):
        poise.fit(
            Line(),
            "unnormalized_nll(variance_reduction=True)",
            {"input": x},
            readout=Unnormalized(KDENoise.fit(x)),
            steps=1,
            device="cpu",
        )
