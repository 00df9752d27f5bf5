"""Exact checks of target-based surrogates (arXiv:2302.02607)."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import poise
from poise import Problem
from poise.errors import IncompatibleError, InputError, PoiseWarning
from poise.objective import Objective, Term
from poise.readouts import Classification, Regression
from poise.solvers import SVRG, OracleProblem, StochasticLineSearch, TargetSurrogate, TorchOptimizer, as_solver
from poise.solvers.target_divergence import Euclidean, divergence_at
from poise.solvers.target_split import ProblemSplit
from poise.solvers.target_surrogate import LinearSurrogate, Surrogate, smoothness_of


class Logistic(Term):
    """Logistic loss of a margin, for labels -1 and 1."""

    formula = "logistic_margin"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return functional.softplus(-prediction * target)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(inputs: int = 5, outputs: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def linear(inputs: int = 5, outputs: int = 3, seed: int = 0, bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, bias=bias).double()


def classes(model: nn.Module, formula: Any = "cross_entropy", rows: int = 40, seed: int = 3) -> Problem:
    x = rand(rows, 5, seed=seed)
    y = (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()
    return problem(model, formula, x, y, Classification())


def numbers(model: nn.Module, formula: Any = "squared_error", rows: int = 40, seed: int = 3) -> Problem:
    x = rand(rows, 5, seed=seed)
    return problem(model, formula, x, torch.sin(x[:, 0]) + 0.3 * x[:, 1], Regression())


def margins(model: nn.Module, rows: int = 40) -> Problem:
    x = rand(rows, 5, seed=3)
    return problem(
        model, 1.0 * Logistic(), x, torch.where(x[:, 0] + 0.5 * rand(rows) > 0, 1.0, -1.0).double(), Regression()
    )


def problem(
    model: nn.Module, formula: Any, x: Tensor, y: Tensor, readout: Any, key: tuple[int, int] = (0, 0)
) -> Problem:
    objective = formula if isinstance(formula, Objective) else poise.parse(formula)
    batch: Mapping[str, Any] = {"input": x, "target": y, "index": torch.arange(len(x))}
    return Problem(model, objective, [{"main": batch}], readout, key=key)


def surrogate_of(p: Problem, eta: float, divergence: str = "euclidean") -> Surrogate:
    split = ProblemSplit(p)
    at = split.begin()
    return Surrogate(split, at, eta, at.g, divergence_at(divergence, at.z, split))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


KINDS = [(classes, 3, 2.0), (numbers, 1, 1.0), (margins, 1, 4.0)]


# ---- 1, 2, 8: the first gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "outputs", "eta"), KINDS)
@pytest.mark.parametrize("divergence", ["euclidean", "newton"])
def test_the_first_inner_gradient_is_that_of_the_objective(
    make: Any, outputs: int, eta: float, divergence: str
) -> None:
    model = network(outputs=outputs)
    expected = list(make(model).gradient().values())
    s = surrogate_of(make(model), eta, divergence)
    for g, e in zip(s.start_gradient(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)
    assert s.evaluate() == pytest.approx(float(make(model).value()), abs=1e-12)
    for g, e in zip(s.gradient(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14)


def test_penalties_stay_outside_the_surrogate_with_their_weight() -> None:
    model = network()
    expected = classes(model, "cross_entropy + 0.3*l2").gradient()
    s = surrogate_of(classes(model, "cross_entropy + 0.3*l2"), 2.0)
    s.evaluate()
    for g, e in zip(s.gradient(), expected.values(), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_one_inner_step_of_an_optimiser_is_that_optimiser(name: str) -> None:
    ours, theirs = network(), network()
    options = {"momentum": 0.0} if name == "sgd" else {}
    solver = TargetSurrogate(inner_steps=1, eta=2.0, inner=name, inner_lr=0.1, inner_options=options)
    rival = TorchOptimizer(name, lr=0.1, **options)
    for step in range(4):
        solver.step(classes(ours, seed=step))
        p = classes(theirs, seed=step)
        if step == 0:
            rival.bind(theirs, p.objective)
        rival.step(p)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-10, atol=1e-12)
    assert solver.oracle_calls == solver.cheap_steps == 4
    assert solver.backwards == 0


def test_targets_and_their_gradient_are_constants() -> None:
    model = network()
    split = ProblemSplit(classes(model))
    at = split.begin()
    assert not any(t.requires_grad for t in (*at.z, *at.g, *at.gradient))
    s = Surrogate(split, at, 2.0, at.g, Euclidean(at.z))
    before = [t.clone() for t in (*at.z, *at.g)]
    s.evaluate()
    s.gradient()
    assert all(torch.equal(a, b) for a, b in zip(before, (*at.z, *at.g), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_no_graph_leads_from_the_loss_of_an_oracle_to_the_model() -> None:
    seen: list[Tensor] = []

    def oracle(z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        seen.append(z)
        return (z - 1).requires_grad_()

    TargetSurrogate(inner_steps=5, eta=1.0).step(OracleProblem(network(), rand(9, 5), oracle))
    assert len(seen) == 1
    assert not seen[0].requires_grad


# ---- 3, 4, 7: closed forms ----------------------------------------------------------------------------------------------


def test_least_squares_are_solved_in_one_outer_step() -> None:
    model = linear(outputs=1)
    TargetSurrogate(eta=1.0, inner="exact").step(numbers(model))
    batch = numbers(model).batches[0]["main"]
    x = torch.cat([batch["input"], torch.ones(40, 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(x, batch["target"][:, None]).solution[:, 0]
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rows", [40, 4])
def test_an_exact_inner_step_is_eta_times_the_pseudo_inverse_of_the_gradient(rows: int) -> None:
    model = linear(bias=False)
    p = classes(model, rows=rows)
    start = model.weight.detach().clone()
    g = ProblemSplit(p).begin().g[0]
    x = p.batches[0]["main"]["input"]
    TargetSurrogate(eta=0.7, inner="exact").step(classes(model, rows=rows))
    expected = start - 0.7 * (torch.linalg.pinv(x) @ g).T
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-9, atol=1e-11)


def test_a_newton_step_on_a_logistic_loss_is_iteratively_reweighted_least_squares() -> None:
    model = linear(outputs=1)
    w, batch = flat(model), margins(model).batches[0]["main"]
    for _ in range(3):
        TargetSurrogate(eta=1.0, divergence="newton", inner="exact").step(margins(model))
        x = torch.cat([batch["input"], torch.ones(40, 1, dtype=torch.float64)], 1)
        q = torch.sigmoid(x @ w)
        g = q - (batch["target"] + 1) / 2
        h = q * (1 - q) + 1e-5
        w = w - torch.linalg.solve(x.T @ (x * h[:, None]), x.T @ g)
        torch.testing.assert_close(flat(model), w, rtol=1e-8, atol=1e-10)


def test_the_newton_divergence_of_a_softmax_has_its_full_hessian() -> None:
    model = linear(bias=False)
    p = classes(model)
    z = ProblemSplit(p).begin().z[0]
    q = z.softmax(-1)
    expected = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    torch.testing.assert_close(ProblemSplit(classes(model)).target_hessian([z])[0], expected, rtol=1e-10, atol=1e-12)
    solver = TargetSurrogate(eta=1.0, divergence="newton", inner="exact")
    certificate = solver.minimize(classes(model, "cross_entropy + 0.01*l2"), tolerance=1e-9, iterations=30)
    assert certificate.converged
    assert certificate.iterations < 15


def test_an_exact_inner_step_with_l2_is_where_the_surrogate_has_no_gradient() -> None:
    model = linear()
    solver = TargetSurrogate(eta=2.0, inner="exact")
    s = surrogate_of(classes(model, "cross_entropy + 0.1*l2"), 2.0)
    solver.step(classes(model, "cross_entropy + 0.1*l2"))
    s.evaluate()
    assert max(float(g.abs().max()) for g in s.gradient()) < 1e-10


def test_exact_and_lbfgs_reach_the_same_surrogate_minimum() -> None:
    ends = []
    for inner, steps in (("exact", 1), ("lbfgs", 200)):
        model = linear()
        TargetSurrogate(steps, eta=2.0, inner=inner, tol=1e-11).step(classes(model, "cross_entropy + 0.1*l2"))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_the_gram_matrix_gives_the_steps_of_the_rows() -> None:
    for inner in ("gd", "adam"):
        ends = []
        for gram in (True, False):
            model = linear()
            solver = TargetSurrogate(25, eta=2.0, inner=inner, gram=gram)
            for _ in range(3):
                solver.step(classes(model, "cross_entropy + 0.1*l2"))
            ends.append(flat(model))
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-10)


def test_the_gram_matrix_is_made_once_for_the_same_inputs() -> None:
    model = linear(outputs=1)
    solver = TargetSurrogate(20, eta=1.0, gram=True)
    p = numbers(model)
    solver.step(p)
    assert solver._design is not None
    first = solver._design[1]
    solver.step(p.fresh())
    assert solver._design[1] is first
    assert solver.forwards == 1  # the look at the outputs of the first step
    p.batches[0]["main"]["input"].mul_(2)
    solver.step(p.fresh())
    assert solver._design[1] is not first


# ---- 5, 6: the upper bound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "outputs", "eta"), KINDS)
@pytest.mark.parametrize("model", [network, linear])
def test_the_surrogate_lies_above_the_objective_up_to_one_over_l_and_not_at_four_times_that(
    make: Any, outputs: int, eta: float, model: Any
) -> None:
    net = model(outputs=outputs)
    tight, loose = surrogate_of(make(net), eta), surrogate_of(make(net), 4 * eta)
    start, violated = [p.detach().clone() for p in net.parameters()], 0
    generator = torch.Generator().manual_seed(1)
    truth = make(net)
    for k in range(1000):
        size = 10 ** (-2 + 3 * k / 1000)
        with torch.no_grad():
            for p, s in zip(net.parameters(), start, strict=True):
                p.copy_(s + size * torch.randn(s.shape, generator=generator, dtype=s.dtype))
            h = float(truth.value())
            f = tight.split.outputs()
            assert h <= float(tight(f)) + 1e-10
            violated += k % 10 == 0 and h > float(loose(f)) + 1e-10
    assert violated > 0


def test_the_softmax_surrogate_of_a_cross_entropy_is_the_cross_entropy_at_eta_one() -> None:
    net = network()
    s = surrogate_of(classes(net), 1.0, "softmax")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.5 * rand(*p.shape, seed=7))
    assert s.evaluate() == pytest.approx(float(classes(net).value()), abs=1e-12)


@pytest.mark.parametrize("inner", ["gd", "lbfgs", "exact"])
@pytest.mark.parametrize("formula", ["cross_entropy", "cross_entropy + 0.05*l2"])
def test_the_objective_falls_in_every_outer_step(inner: str, formula: str) -> None:
    net = linear() if inner == "exact" else network()
    solver = TargetSurrogate(10, eta=2.0, inner=inner, monotone=True, check=True)
    values = []
    for _ in range(15):
        p = classes(net, formula)
        solver.step(p)
        values.append(float(p.step.value))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    for step, after in zip(solver.trace, values[1:], strict=False):
        assert step.reached == pytest.approx(after, abs=1e-10)
        assert step.bounded
        assert step.reached <= step.surrogate + 1e-12 <= step.value + 1e-9


def test_a_surrogate_below_the_objective_is_said() -> None:
    model = linear(outputs=1)
    solver = TargetSurrogate(eta=6.0, inner="exact", check=True)
    with pytest.warns(PoiseWarning, match="eta is above 1/L"):
        solver.step(numbers(model))
    assert solver.trace[-1].bounded is False


def test_smoothness_is_known_for_weighted_sums() -> None:
    p = classes(network(), "2*cross_entropy + 0.5*label_smoothing + 3*l2")
    assert smoothness_of(p, ProblemSplit(p).readers) == pytest.approx(1.25)
    unknown = classes(network(), "cross_entropy + focal")
    assert smoothness_of(unknown, ProblemSplit(unknown).readers) is None
    with pytest.raises(InputError, match="smoothness"):
        TargetSurrogate(eta=1.0, monotone=True).step(classes(network(), "focal"))


def test_a_row_that_counts_more_lowers_the_largest_eta() -> None:
    p = classes(network())
    p.batches[0]["main"]["sample_weight"] = torch.cat([torch.full((20,), 3.0), torch.ones(20)]).double()  # type: ignore[index]
    with pytest.raises(InputError, match=r"1/L = 1\.333"):  # 2 over 3 / mean weight 2
        TargetSurrogate(eta=1.5, monotone=True).step(p)
    solver = TargetSurrogate(50, eta=4 / 3, monotone=True, check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            solver.step(p.fresh())
    assert all(step.bounded for step in solver.trace)


def test_more_inner_steps_are_better_for_the_same_number_of_oracle_calls() -> None:
    values = []
    for m in (1, 5, 20, 100):
        net = linear()
        torch.nn.init.zeros_(net.weight)
        # Columns of very different sizes: what costs plain descent its time, and the surrogate nothing.
        x = rand(40, 5, seed=3) * torch.logspace(0, -1, 5, dtype=torch.float64)
        p = problem(net, "cross_entropy", x, (x[:, 1] > 0).long() + (x[:, 4] > 0).long(), Classification())
        solver = TargetSurrogate(m, eta=2.0)
        for _ in range(20):
            solver.step(p.fresh())
        values.append(float(p.fresh().value()))
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]


# ---- rules for eta ----------------------------------------------------------------------------------------------------------


def test_schedules_of_eta_are_those_of_the_paper() -> None:
    for rule, expected in (
        ("constant", [3.0, 3.0, 3.0]),
        ("stochastic", [3.0, 3 / math.sqrt(2), 3 / math.sqrt(3)]),
        ("exponential", [3 * 4 ** (-1 / 4), 3 * 4 ** (-2 / 4), 3 * 4 ** (-3 / 4)]),
        (lambda t: 1.0 / t, [1.0, 0.5, 1 / 3]),
    ):
        net = network()
        solver = TargetSurrogate(1, eta=rule, eta0=3.0, total_steps=4)
        for _ in range(3):
            solver.step(classes(net))
        assert [s.eta for s in solver.trace] == pytest.approx(expected)


def test_armijo_takes_the_largest_step_of_its_grid_that_decreases_enough() -> None:
    net = network()
    solver = TargetSurrogate(1, eta="armijo", eta0=1.0)
    split = ProblemSplit(classes(net))
    at = split.begin()
    solver.step(classes(net))
    eta, square = solver.trace[-1].eta, float(at.g[0].square().sum()) / at.rows

    def enough(step: float) -> bool:
        return split.target_value([at.z[0] - step * at.g[0]]) <= at.value - 0.5 * step * square

    assert enough(eta)
    assert eta == pytest.approx(1.8 * 0.9 ** round(math.log(eta / 1.8) / math.log(0.9)))
    assert eta == 1.8 or not enough(eta / 0.9)
    assert eta >= 0.9 * min(2.0, 1.8)  # 1/L = 2, where half the squared norm is always gained


def test_armijo_on_a_squared_error_ends_at_one() -> None:
    net = network(outputs=1)
    solver = TargetSurrogate(1, eta="armijo")
    for _ in range(5):
        solver.step(numbers(net))
    assert all(0.9 <= s.eta <= 1 + 1e-9 for s in solver.trace)
    assert solver.value_calls > 5


def test_adagrad_norm_divides_by_the_root_of_the_summed_squares() -> None:
    net, squares = network(), 0.0
    solver = TargetSurrogate(1, eta="adagrad_norm", eta0=0.5)
    for _ in range(3):
        at = ProblemSplit(classes(net)).begin()
        squares += float(at.g[0].square().sum()) / at.rows
        solver.step(classes(net))
        assert solver.trace[-1].eta == pytest.approx(0.5 / math.sqrt(squares))


def test_diagonal_rules_keep_their_sums_by_the_rows_number() -> None:
    for rule in ("adagrad", "adam"):
        whole, parts = linear(), linear()
        x, y = rand(20, 5, seed=3), torch.arange(20) % 3
        a, b = (TargetSurrogate(3, eta=rule, eta0=0.5) for _ in range(2))
        for _ in range(2):
            a.step(problem(whole, "cross_entropy", x, y, Classification()))
            order = torch.randperm(20, generator=torch.Generator().manual_seed(a.rule.t))
            batch = {"input": x[order], "target": y[order], "index": order}
            b.step(Problem(parts, poise.parse("cross_entropy"), [{"main": batch}], Classification()))
        torch.testing.assert_close(flat(whole), flat(parts), rtol=1e-9, atol=1e-12)


def test_adam_in_target_space_begins_with_a_step_of_signs() -> None:
    model = linear(outputs=1)
    x, y = torch.eye(5, dtype=torch.float64), rand(5)
    with torch.no_grad():
        model.bias.zero_()
    start = model(x).detach()[:, 0]
    solver = TargetSurrogate(400, eta="adam", eta0=0.1, inner="lbfgs", tol=1e-13)
    solver.step(problem(model, "squared_error", x, y, Regression()))
    torch.testing.assert_close(model(x).detach()[:, 0], start - 0.1 * torch.sign(start - y), rtol=1e-4, atol=1e-5)


# ---- divergences, oracles, replay ---------------------------------------------------------------------------------------------


def test_kl_is_the_multiplicative_step_of_a_policy() -> None:
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(rand(4, 3))

        def forward(self, state: Tensor) -> Tensor:
            return self.logits[state].softmax(-1)

    policy, states, reward = Tabular(), torch.arange(4), rand(4, 3, seed=2)
    p = policy(states).detach()
    solver = TargetSurrogate(300, eta=0.8, divergence="kl", inner="lbfgs", tol=1e-12)
    solver.step(OracleProblem(policy, states, lambda z, batch: -reward))
    expected = p * torch.exp(0.8 * reward)
    torch.testing.assert_close(policy(states).detach(), expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_a_divergence_may_be_a_function() -> None:
    ends = []
    for divergence in ("euclidean", lambda f, z: 0.5 * (f - z).square().sum(-1)):
        net = network()
        TargetSurrogate(5, eta=1.0, divergence=divergence).step(classes(net))
        ends.append(flat(net))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-10, atol=1e-12)


def test_an_oracle_gives_what_a_formula_gives() -> None:
    ours, theirs = network(), network()
    x = rand(40, 5, seed=3)
    y = (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0).long()
    one_hot = functional.one_hot(y, 3).double()
    asked = 0

    def oracle(z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        nonlocal asked
        asked += 1
        return z.softmax(-1) - batch["target"]

    def loss(z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return functional.cross_entropy(z, batch["target"], reduction="none")

    a, b = TargetSurrogate(7), TargetSurrogate(7)
    for _ in range(3):
        a.step(OracleProblem(ours, x, oracle, {"target": one_hot}, target_loss=loss))
        b.step(problem(theirs, "cross_entropy", x, y, Classification()))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-12)
    assert asked == a.oracle_calls == 3
    assert a.oracle_rows == 120
    assert a.cheap_steps == 21


def test_fit_takes_an_oracle_in_place_of_the_terms_that_read_the_output() -> None:
    asked: list[int] = []

    def expert(z: Tensor, batch: Mapping[str, Any]) -> Tensor:
        asked.append(len(z))
        return z - batch["input"].sum(1)

    x = rand(64, 5).float()
    model = nn.Linear(5, 1)
    solver = TargetSurrogate(20, eta=1.0, target_grad=expert)
    poise.fit(model, "squared_error + 1e-6*l2", (x, torch.zeros(64)), solver=solver, batch_size=16, epochs=3)
    assert sum(asked) == 3 * 64 == solver.oracle_rows
    assert float((model(x)[:, 0] - x.sum(1)).detach().abs().max()) < 0.05


def test_any_optimiser_takes_an_oracle_problem() -> None:
    net, x = network(outputs=2), rand(30, 5)
    want = torch.stack([x[:, 0], x[:, 1]], 1)
    solver = TorchOptimizer("adam", lr=0.05)
    solver.bind(net, poise.parse("squared_error"))
    for _ in range(200):
        solver.step(OracleProblem(net, x, lambda z, batch: z - want))  # type: ignore[arg-type]
    assert float((net(x) - want).detach().square().mean()) < 0.01


def test_replay_keeps_the_outputs_of_other_batches_where_they_were() -> None:
    forgotten = []
    for anchor in (0.0, 5.0):
        net = network(outputs=1)
        solver = TargetSurrogate(30, eta=1.0, anchor=anchor, replay=64)
        first = problem(net, "squared_error", rand(32, 5, seed=1) + 1, torch.ones(32).double(), Regression())
        for _ in range(6):
            solver.step(first.fresh())
        low = float(first.fresh().value())
        solver.step(problem(net, "squared_error", rand(4, 5, seed=2) - 1, -torch.ones(4).double(), Regression()))
        forgotten.append(float(first.fresh().value()) - low)
    assert forgotten[1] < 0.5 * forgotten[0]


# ---- frozen masks ---------------------------------------------------------------------------------------------------------------


def noisy_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)
        ).double()


def test_dropout_masks_and_batch_statistics_stay_fixed_within_a_step() -> None:
    net = noisy_network()
    p = classes(net)
    solver = TargetSurrogate(10, eta=2.0, monotone=True, check=True)
    before = net[1].running_mean.clone()  # type: ignore[index, operator, union-attr]
    solver.step(p)
    step = solver.trace[-1]
    assert step.bounded
    assert step.reached < step.value
    assert int(net[1].num_batches_tracked) == 1  # type: ignore[index, arg-type, union-attr]
    assert not torch.equal(before, net[1].running_mean)  # type: ignore[index, arg-type, union-attr]


def test_an_oracle_problem_keeps_them_too() -> None:
    net, x = noisy_network(), rand(40, 5)
    solver = TargetSurrogate(10, eta=1.0, check=True)
    target = rand(40, 3, seed=4)
    loss = lambda z, batch: 0.5 * (z - target).square().sum(-1)  # noqa: E731
    solver.step(OracleProblem(net, x, lambda z, batch: z - target, target_loss=loss))
    assert solver.trace[-1].bounded
    assert solver.trace[-1].reached < solver.trace[-1].value
    assert int(net[1].num_batches_tracked) == 1  # type: ignore[index, arg-type, union-attr]


def test_a_model_that_is_no_function_is_refused() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(5, 3).double(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x) + 0.1 * self.calls

    with pytest.raises(IncompatibleError, match="between two passes at the same parameters"):
        TargetSurrogate(eta=1.0).step(classes(Drifting()))


# ---- fit, minimise, state ------------------------------------------------------------------------------------------------------


def test_fit_minimises_ordinary_formulas_on_batches() -> None:
    x = rand(200, 5).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 2))
    run = poise.fit(
        net, "cross_entropy + 0.001*l2", (x, y), solver="target_surrogate(inner_steps=10)", batch_size=50, epochs=30
    )
    assert run.history["loss"][-1] < 0.5 * run.history["loss"][0]


def test_micro_batches_give_the_step_of_one_batch() -> None:
    ends = []
    for cuts in ([40], [25, 15]):
        net = network()
        batch = classes(net).batches[0]["main"]
        micro = [
            {"main": dict(zip(batch, parts, strict=True))}
            for parts in zip(*(v.split(cuts) for v in batch.values()), strict=True)
        ]
        solver = TargetSurrogate(5, eta="armijo")
        for _ in range(3):
            solver.step(Problem(net, poise.parse("cross_entropy + 0.1*l2"), micro, Classification()))
        ends.append(flat(net))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def test_minimise_returns_a_certificate() -> None:
    net = linear()
    solver = TargetSurrogate(20, eta=2.0, inner="lbfgs", tol=1e-10)
    found = solver.minimize(classes(net, "cross_entropy + 0.1*l2"), tolerance=1e-6)
    assert found.converged
    assert found.residual <= 1e-6
    assert list(found.history) == sorted(found.history, reverse=True)
    with pytest.warns(PoiseWarning, match="stopped after 2 outer steps"):
        short = TargetSurrogate(1, eta=2.0).minimize(classes(linear()), iterations=2)
    assert not short.converged


@pytest.mark.parametrize("eta", ["armijo", "adam", "adagrad_norm"])
@pytest.mark.parametrize("inner", ["gd", "adam"])
def test_a_run_that_is_saved_and_resumed_goes_on_as_if_it_had_not_stopped(eta: str, inner: str) -> None:
    net = network()
    options = {"eta": eta, "eta0": 0.3, "inner": inner, "anchor": 0.5, "replay": 30}
    solver = TargetSurrogate(3, **options)  # type: ignore[arg-type]
    solver.bind(net, poise.parse("cross_entropy"))
    for k in range(3):
        solver.step(classes(net, seed=k))
    twin, again = copy.deepcopy(net), TargetSurrogate(3, **options)  # type: ignore[arg-type]
    again.bind(twin, poise.parse("cross_entropy"))
    again.load_state_dict(copy.deepcopy(solver.state_dict()))
    for k in range(3):
        solver.step(classes(net, seed=5 + k))
        again.step(classes(twin, seed=5 + k))
    assert torch.equal(flat(net), flat(twin))
    assert again.oracle_calls == solver.oracle_calls == 6
    copy.deepcopy(solver)


def test_float32_follows_float64() -> None:
    wide, narrow = network(), network().float()
    a, b = TargetSurrogate(10, eta=2.0, inner="adam"), TargetSurrogate(10, eta=2.0, inner="adam")
    p = classes(wide)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in p.batches[0]["main"].items()}
    a.step(p)
    b.step(Problem(narrow, poise.parse("cross_entropy"), [{"main": batch}], Classification()))
    torch.testing.assert_close(flat(wide).float(), flat(narrow), rtol=1e-3, atol=1e-4)


def test_solvers_by_name() -> None:
    assert repr(as_solver("target_surrogate(inner_steps=3)", lr=0.5)) == (
        "target_surrogate(inner_steps=3, eta='armijo', divergence='euclidean', inner='gd')"
    )
    assert as_solver("target_surrogate", lr=0.5).rule.eta == 0.5
    assert repr(as_solver("sls", lr=2.0)) == "sls(lr=2.0, c=0.5)"


# ---- baselines -----------------------------------------------------------------------------------------------------------------


def test_a_searched_step_decreases_every_batch_enough() -> None:
    net = network()
    solver = StochasticLineSearch(lr=10.0)
    for k in range(10):
        p = classes(net, seed=k)
        before = flat(net)
        solver.step(p)
        square = float((before - flat(net)).square().sum())
        assert p.step.gradient_norm is not None
        drop = float(p.step.value) - float(p.value())
        assert drop >= 0.5 * square / solver.search.size - 1e-12
    found = StochasticLineSearch().minimize(classes(linear(), "cross_entropy + 0.1*l2"), tolerance=1e-4)
    assert found.converged


def test_svrg_takes_the_full_gradient_at_its_snapshot_and_converges() -> None:
    net, objective = linear(outputs=1), poise.parse("squared_error + 0.01*l2")
    whole = numbers(net, objective)
    batch = whole.batches[0]["main"]

    def part(k: int) -> Problem:
        chosen = torch.arange(8 * (k % 5), 8 * (k % 5) + 8)
        return Problem(net, objective, [{"main": {n: v[chosen] for n, v in batch.items()}}], Regression())

    solver = SVRG(lambda: whole.fresh(), period=5, lr=0.1)
    start, full, small = flat(net), whole.fresh().gradient(), part(0).gradient()
    solver.step(part(0))
    moved = torch.cat([g.flatten() for g in full.values()])
    torch.testing.assert_close(flat(net), start - 0.1 * moved, rtol=1e-10, atol=1e-12)
    assert small.keys() == full.keys()
    for k in range(1, 400):
        solver.step(part(k))
    assert float(torch.cat([g.flatten() for g in whole.fresh().gradient().values()]).norm()) < 1e-4
    assert solver.oracle_rows == 400 * 16 + 80 * 40


# ---- errors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, "above 0"),
        ({"eta": "armija"}, "Did you mean 'armijo'"),
        ({"eta": "exponential"}, "total_steps"),
        ({"inner_steps": 0}, "at least 1"),
        ({"divergence": "euclid"}, "Did you mean 'euclidean'"),
        ({"inner": "lbfsg"}, "Did you mean 'lbfgs'"),
        ({"inner": "exact", "inner_lr": 0.1}, "finds its own step"),
        ({"smoothness": -1.0}, "smoothness"),
        ({"anchor": -1.0}, "anchor"),
        ({"gram": "yes"}, "gram"),
        ({"iner_steps": 3}, "Did you mean 'inner_steps'"),
        ({"growth": 0.5}, "growth >= 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        TargetSurrogate(**options)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="eta is 3"):
        TargetSurrogate(eta=3.0, monotone=True).step(classes(network()))
    with pytest.raises(InputError, match="End the model with a softmax"):
        TargetSurrogate(eta=1.0, divergence="kl").step(classes(network()))
    with pytest.raises(IncompatibleError, match="inner='exact'"):
        TargetSurrogate(eta=1.0, inner="exact").step(classes(network()))
    with pytest.raises(IncompatibleError, match="'l1' too"):
        TargetSurrogate(eta=1.0, inner="exact").step(classes(linear(), "cross_entropy + 0.1*l1"))
    with pytest.raises(IncompatibleError, match="reads the model's output 'logits'"):
        TargetSurrogate(eta=1.0).step(classes(linear(), "l2"))
    with pytest.raises(IncompatibleError, match="Give target_loss"):
        TargetSurrogate(eta="armijo").step(OracleProblem(network(), rand(4, 5), lambda z, batch: z))
    with pytest.raises(InputError, match=r"float \[4, 3\]"):
        TargetSurrogate(eta=1.0).step(OracleProblem(network(), rand(4, 5), lambda z, batch: z.mean(0)))
    with pytest.raises(InputError, match="infinite or NaN"):
        TargetSurrogate(eta=1.0).step(OracleProblem(network(), rand(4, 5), lambda z, batch: z / 0))
    with pytest.raises(IncompatibleError, match="policy has weighed"):
        poise.fit(
            network().float(), "auto*cross_entropy + auto*label_smoothing", (rand(20, 5).float(), torch.arange(20) % 3),
            policy="mgda", solver=TargetSurrogate(eta=1.0), steps=1,
        )  # fmt: skip


def test_a_term_without_a_potential_is_refused_where_eta_is_searched() -> None:
    x, y = rand(20, 5).float(), torch.arange(20) % 3
    with pytest.raises(IncompatibleError, match="potential"):
        poise.fit(nn.Linear(5, 3), "cross_entropy + 3*early_learning", (x, y), solver=TargetSurrogate(), steps=1)
    poise.fit(nn.Linear(5, 3), "cross_entropy + 3*early_learning", (x, y), solver=TargetSurrogate(eta=0.5), steps=2)


class Pulled(Term):
    """A penalty whose gradient is not that of its value."""

    formula = "pulled"
    capabilities = frozenset({"deterministic"})

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([p.detach().square().sum() + p.sum() - p.sum().detach() for p in parameters.values()]).sum()


def test_a_penalty_without_a_potential_is_refused_where_inner_steps_are_searched() -> None:
    formula = poise.parse("cross_entropy") + 0.1 * Pulled()
    with pytest.raises(IncompatibleError, match="'pulled' is not that of its value"):
        TargetSurrogate(eta=1.0).step(classes(network(), formula))
    TargetSurrogate(eta=1.0, inner="adam").step(classes(network(), formula))


def test_a_surrogate_of_one_linear_layer_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver = TargetSurrogate(5, eta=2.0)
        p = classes(linear())
        split = solver._split(p)
        at = split.begin()
        made = solver._surrogate(split, at, 2.0, at.g, Euclidean(at.z))
    assert isinstance(made, LinearSurrogate)


# ---- peers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.peer
def test_the_minimum_is_that_of_scikit_learn_and_of_lbfgs() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, y = rand(80, 5), torch.arange(80) % 3
    model, rival = linear(), linear()
    solver = TargetSurrogate(eta=1.0, divergence="newton", inner="exact")
    found = solver.minimize(problem(model, "cross_entropy + 0.05*l2", x, y, Classification()), tolerance=1e-9)
    peer = linear_model.LogisticRegression(C=1 / (80 * 0.05), tol=1e-10, max_iter=1000).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(model.weight.detach(), torch.from_numpy(peer.coef_), rtol=1e-5, atol=1e-6)
    theirs = TorchOptimizer("lbfgs").minimize(problem(rival, "cross_entropy + 0.05*l2", x, y, Classification()), 1e-8)
    assert found.converged
    assert found.value == pytest.approx(theirs.value, abs=1e-10)
