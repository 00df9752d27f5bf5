"""Constraints: the rules, the points they reach, and that nothing depends on how a batch was cut up."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import poise
from poise.errors import FormulaError, InputError
from poise.objective import Objective, Term
from poise.terms import ErrorRate, SquaredError
from poise.weights.constraint import Constraint, constraint
from test_processes import train as train_on_rows
from two_processes import on_two

# Most runs here are a few steps long, and whoever watches them rightly says that their bounds do not hold yet.
pytestmark = pytest.mark.filterwarnings("ignore::poise.errors.PoiseWarning")


class Quadratic(Term):
    """`x' A x / 2 - b' x`."""

    formula = "quadratic_of_the_tests"

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return 0.5 * x @ self.a @ x - self.b @ x


class Linear(Term):
    """`c' x`."""

    formula = "linear_of_the_tests"

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.c = c

    def forward(self, x):
        return self.c @ x


class Ball(Term):
    """`|x|^2`."""

    formula = "ball_of_the_tests"

    def forward(self, x):
        return x.square().sum()


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solve(objective: Objective, size: int, lr: float, steps: int) -> tuple[Tensor, list[Constraint]]:
    """Descend on x while the objective moves its multipliers."""
    x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=lr)
    objective.follow(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(x=x).backward()
        optimizer.step()
    return x.detach(), list(objective.coefficients.values())  # type: ignore[arg-type]


# Values are measured in float32, so a violation is known to about 1e-7 of the constrained value.
CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 2e-6}

WAYS: dict[str, dict[str, Any]] = {
    "dual": {"lr": 0.1},
    "damped": {"lr": 0.1, "damping": 0.4},
    "augmented": {"lr": 0.1, "method": "augmented", "rho": 0.8},
}


# ---- the points that the rules reach ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("bound", "x", "multiplier"),
    [
        ({"upper": 1.0}, (0.5, 0.5), 1.5),  # |x - 2|^2/2 on the half-plane x1 + x2 <= 1
        ({"upper": 9.0}, (2.0, 2.0), 0.0),  # the bound has room: complementary slackness
        ({"lower": 6.0}, (3.0, 3.0), 1.0),
        ({"equal": 1.0}, (0.5, 0.5), 1.5),
        ({"equal": 6.0}, (3.0, 3.0), -1.0),
    ],
    ids=["upper", "inactive", "lower", "equal-above", "equal-below"],
)
def test_one_linear_constraint_reaches_the_kkt_point(
    way: str, bound: dict[str, float], x: tuple[float, ...], multiplier: float
) -> None:
    term = Quadratic(torch.eye(2, dtype=torch.float64), double(2, 2))
    found, (module,) = solve(term + constraint(Linear(double(1, 1)), **bound, **WAYS[way]), 2, 0.2, 400)
    torch.testing.assert_close(found, double(*x), **CLOSE)
    assert float(module.multiplier) == pytest.approx(multiplier, abs=1e-5)


@pytest.mark.parametrize(("way", "lr"), [("dual", 0.02), ("damped", 0.1), ("augmented", 0.1)])
def test_a_nonlinear_constraint_reaches_the_kkt_point(way: str, lr: float) -> None:
    """minimise -x1 - 2 x2 on |x|^2 <= 4: x = 2 (1, 2)/sqrt(5), multiplier sqrt(5)/4."""
    constrained = constraint(Ball(), upper=4, initial=1, **{**WAYS[way], "lr": lr})
    found, (module,) = solve(Linear(double(-1, -2)) + constrained, 2, 0.05, 2000)
    torch.testing.assert_close(found, 2 * double(1, 2) / math.sqrt(5), **CLOSE)
    assert float(module.multiplier) == pytest.approx(math.sqrt(5) / 4, abs=1e-5)


def test_damping_and_penalty_settle_where_plain_ascent_of_the_same_step_still_circles() -> None:
    distances = {}
    for way, arguments in WAYS.items():
        found, _ = solve(Linear(double(-1, -2)) + constraint(Ball(), upper=4, initial=1, **arguments), 2, 0.05, 600)
        distances[way] = float((found - 2 * double(1, 2) / math.sqrt(5)).norm())
    assert distances["dual"] > 0.1
    assert max(distances["damped"], distances["augmented"]) < 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_a_box_and_an_equality_at_once_reach_the_kkt_point(way: str) -> None:
    """Project (3, -1, 0) onto the simplex `x >= 0, sum x = 1`: (1, 0, 0), with the multipliers of the inequalities (0, 3, 2)."""
    unit = torch.eye(3, dtype=torch.float64)
    objective = Quadratic(unit, double(3, -1, 0)) + constraint(Linear(double(1, 1, 1)), equal=1, **WAYS[way])
    for row in unit:
        objective = objective + constraint(Linear(row), lower=0, **WAYS[way])
    found, (equality, *box) = solve(objective, 3, 0.2, 1000)
    torch.testing.assert_close(found, double(1, 0, 0), **CLOSE)
    assert float(equality.multiplier) == pytest.approx(2, abs=2e-5)
    assert [float(m.multiplier) for m in box] == pytest.approx([0, 3, 2], abs=2e-5)


def kkt(a: Tensor, b: Tensor, rows: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Solve `min x'Ax/2 - b'x, rows x <= bounds` by trying every active set: exact for a strictly convex problem."""
    for chosen in range(2 ** len(rows)):
        active = [i for i in range(len(rows)) if chosen >> i & 1]
        n, m = len(b), len(active)
        system = torch.zeros(n + m, n + m, dtype=torch.float64)
        system[:n, :n], system[:n, n:], system[n:, :n] = a, rows[active].T, rows[active]
        if torch.linalg.matrix_rank(system) < n + m:
            continue
        solution = torch.linalg.solve(system, torch.cat([b, bounds[active]]))
        x, multipliers = solution[:n], torch.zeros(len(rows), dtype=torch.float64)
        multipliers[active] = solution[n:]
        if (rows @ x <= bounds + 1e-9).all() and (multipliers >= -1e-9).all():
            return x, multipliers
    raise AssertionError("no active set fits")


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from(["damped", "augmented"]))
def test_drawn_convex_quadratic_programs_reach_their_kkt_points(seed: int, number: int, way: str) -> None:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    a = torch.eye(3, dtype=torch.float64) + 0.2 * root @ root.T
    b = torch.randn(3, generator=draw, dtype=torch.float64)
    rows = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64))[0][:number]
    bounds = torch.randn(number, generator=draw, dtype=torch.float64)
    x, multipliers = kkt(a, b, rows, bounds)
    objective = Quadratic(a, b) + Objective()
    for row, bound in zip(rows, bounds, strict=True):
        objective = objective + constraint(Linear(row), upper=float(bound), **{**WAYS[way], "lr": 0.3})
    found, modules = solve(objective, 3, 0.3, 500)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([m.multiplier for m in modules]), multipliers, rtol=1e-5, atol=3e-5)


def test_the_augmented_lagrangian_convexifies_where_the_lagrangian_has_no_minimum() -> None:
    """minimise x1 x2 on x1 + x2 = 2: the Lagrangian has no minimum in x, with rho > 1/2 the augmented one has."""

    class Product(Term):
        formula = "product_of_the_tests"

        def forward(self, x):
            return x.prod()

    for way, settles in ((WAYS["dual"], False), ({"lr": 0.1, "method": "augmented", "rho": 2.0}, True)):
        objective = Product() * -1 + constraint(Linear(double(1, 1)), equal=2, **way)
        x = nn.Parameter(double(1.2, 0.7))
        optimizer = torch.optim.SGD([x], lr=0.05)
        objective.follow(optimizer)
        for _ in range(600):
            optimizer.zero_grad()
            objective(x=x).backward()
            optimizer.step()
        distance = float((x.detach() - 1).abs().max())
        assert (distance < 1e-4) is settles


@pytest.mark.parametrize(("stiffness", "settles"), [(0.95, True), (1.05, False)])
def test_the_penalty_is_stable_up_to_the_limit_that_its_lag_of_one_step_sets(stiffness: float, settles: bool) -> None:
    """x_{t+1} = x_t - s x_{t-1} with s = step size * rho * |grad g|^2: the roots lie in the unit circle for s < 1."""
    held = constraint(Linear(double(0.6, 0.8)), equal=1, lr=1e-9, method="augmented", rho=stiffness / 0.1)
    found, _ = solve(held + Objective(), 2, 0.1, 400)
    assert (abs(float(found @ double(0.6, 0.8)) - 1) < 1e-2) is settles


# ---- the rules, step by step -----------------------------------------------------------------------------------------


def moved(module: Constraint, *measured: float) -> list[float]:
    found = []
    for value in measured:
        module.advance(value)
        found.append(float(module.multiplier))
    return found


def test_the_multiplier_follows_each_rule() -> None:
    assert moved(Constraint(upper=1, lr=0.5), 3, 0, -9, 2) == pytest.approx([1, 0.5, 0, 0.5])
    assert moved(Constraint(lower=1, lr=0.5), 3, 0, -1) == pytest.approx([0, 0.5, 1.5])
    assert moved(Constraint(equal=1, lr=0.5), 3, 0, -3) == pytest.approx([1, 0.5, -1.5])
    # integral 0.5 v and proportional 2 v, with v = 1, 2, 0: the second telescopes to its last value
    assert moved(Constraint(upper=1, lr=0.5, damping=2), 2, 3, 1) == pytest.approx([2.5, 5.5, 1.5])
    # smoothed v: 0.5, 1.25
    assert moved(Constraint(upper=1, lr=0.5, damping=2, smoothing=0.5), 2, 3) == pytest.approx([1.5, 4.0])


def test_the_weight_of_the_augmented_lagrangian_is_multiplier_plus_penalty_times_violation_and_never_below_zero() -> (
    None
):
    module = Constraint(upper=1, lr=0.5, method="augmented", rho=4)
    assert float(module.weight) == 0
    module.advance(3)
    assert float(module.weight) == pytest.approx(1 + 4 * 2)
    module.advance(0)
    assert float(module.multiplier) == pytest.approx(0.5)
    assert float(module.weight) == 0
    module = Constraint(lower=1, lr=0.5, method="augmented", rho=4)
    module.advance(0)
    assert float(module.weight) == pytest.approx(-(0.5 + 4))


def test_neither_multiplier_nor_weight_exceeds_the_largest() -> None:
    assert moved(Constraint(upper=1, lr=1, largest=3), 3, 3, 3, 0) == [2, 3, 3, 2]
    module = Constraint(equal=1, lr=1, largest=3, method="augmented", rho=9)
    module.advance(-3)
    assert float(module.weight) == float(module.multiplier) + 0 == -3


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=8))
def test_while_the_constraint_is_violated_damping_and_penalty_are_one_rule(violations: list[float]) -> None:
    damped, augmented = (
        Constraint(upper=0, lr=0.2, damping=0.7),
        Constraint(upper=0, lr=0.2, method="augmented", rho=0.7),
    )
    for violation in violations:
        damped.advance(violation)
        augmented.advance(violation)
    assert float(damped.weight) == pytest.approx(float(augmented.weight), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("method", [{}, {"damping": 0.5}, {"method": "augmented", "growth": 2, "every": 1}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_moves_nothing(method: dict[str, Any], value: float) -> None:
    module = Constraint(upper=1, **method)
    module.advance(2)
    before = float(module.multiplier), float(module.weight)
    module.advance(value)
    assert (float(module.multiplier), float(module.weight)) == pytest.approx(before)


def penalties(module: Constraint, *violations: float) -> list[float]:
    found = []
    for violation in violations:
        module.advance(module.bound + violation)
        found.append(float(module.rho))
    return found


def test_the_penalty_grows_only_where_a_window_brought_too_little() -> None:
    new: Callable[[], Constraint] = lambda: Constraint(upper=1, lr=1e-9, method="augmented", growth=2, every=2)  # noqa: E731
    assert penalties(new(), *[1.0] * 6) == [1, 1, 1, 2, 2, 4]
    assert penalties(new(), 1, 1, 0.7, 0.7, 0.4, 0.4) == [1] * 6  # falls fast enough
    assert penalties(new(), 1, -1, 1, -1, 1, -1) == [1] * 6  # the steps overshoot
    assert penalties(new(), *[-1.0] * 6) == [1] * 6  # room to spare
    assert penalties(new(), *[0.009] * 6) == [1] * 6  # within the tolerance of 1 % of the bound
    assert max(penalties(new(), *[1.0] * 60)) == 1000


def test_the_value_is_exact_in_the_step_that_sets_it_and_its_gradient_is_that_of_its_value() -> None:
    """Law 7: evaluated twice the same; and the step's objective is f + weight*g, so a finite difference gives its gradient."""
    objective = Ball() + constraint(Linear(double(1, 2)), upper=-1, method="augmented", rho=3)
    x = double(1, 1).requires_grad_()
    objective(x=x)
    objective.advance()
    first, second = objective(x=x), objective(x=x)
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first, x)
    # weight = lr*4 + rho*4 = 12.2 from the step before
    torch.testing.assert_close(gradient, 2 * x.detach() + 12.2 * double(1, 2), rtol=1e-6, atol=1e-6)
    step = 1e-4 * double(1, 0)
    with torch.no_grad():
        slope = (objective(x=x + step) - objective(x=x - step)) / 2e-4
    assert float(slope) == pytest.approx(float(gradient[0]), rel=1e-4)


# ---- proxies ---------------------------------------------------------------------------------------------------------


def test_a_proxy_carries_the_weight_and_the_measured_term_moves_it() -> None:
    objective = poise.parse("brier + constraint(cross_entropy, measured=error_rate, upper=0.25, lr=0.5, initial=2)")
    batch = {"logits": torch.tensor([[1.0, 0.0]] * 4, requires_grad=True), "target": torch.tensor([0, 1, 1, 1])}
    report = objective.evaluate(batch)
    assert report.terms["cross_entropy"].weight == pytest.approx(2)
    assert report.terms["error_rate"].weight == 0
    assert float(report.terms["error_rate"].value) == 0.75
    plain = poise.parse("brier + 2*cross_entropy")(batch)
    torch.testing.assert_close(objective(batch), plain)
    objective.advance()
    (module,) = objective.coefficients.values()
    assert float(module.violation) == pytest.approx(0.5)
    assert float(module.multiplier) == pytest.approx(2.25)
    assert [*objective.coefficients] == ["error_rate"]


class Steep(Term):
    """The square root, whose slope at 0 is infinite."""

    formula = "steep_of_the_tests"

    def forward(self, x):
        return x.abs().sum().sqrt()


def test_a_measured_term_brings_no_gradient_not_even_an_infinite_one() -> None:
    objective = Quadratic(torch.eye(2, dtype=torch.float64), double(1, 1)) + constraint(
        Ball(), measured=Steep(), upper=1
    )
    for one in (objective, copy.deepcopy(objective)):
        x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        one(x=x).backward()
        torch.testing.assert_close(x.grad, double(-1, -1))
        assert not one.terms["steep_of_the_tests"].forward(x=x).requires_grad


def test_a_true_error_rate_is_held_by_its_proxy() -> None:
    draw = torch.Generator().manual_seed(0)
    rare = torch.cat([torch.randn(270, 2, generator=draw), torch.randn(30, 2, generator=draw) + 1.2])
    target = torch.cat([torch.zeros(270, dtype=torch.int64), torch.ones(30, dtype=torch.int64)])
    data = {"main": {"input": rare, "target": target}, "rare": {"input": rare[270:], "target": target[270:]}}
    plain, held = (
        "cross_entropy",
        "cross_entropy + constraint(cross_entropy.on('rare'), measured=error_rate.on('rare'), upper=0.2, lr=0.02, damping=0.5)",
    )
    wrong = {}
    for formula in (plain, held):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        poise.fit(model, formula, data, steps=400, batch_size=300, lr=0.5, device="cpu")
        wrong[formula] = float(ErrorRate()(model(rare[270:]), target[270:]).mean())
    assert wrong[plain] > 0.5
    assert wrong[held] == pytest.approx(0.2, abs=0.04)  # one example of the 30 is 0.033


def test_taking_out_either_half_of_a_proxy_constraint_takes_out_the_constraint() -> None:
    objective = poise.parse("brier + constraint(cross_entropy, measured=error_rate, upper=0.25)")
    for label in ("cross_entropy", "error_rate"):
        assert str(objective.without(label)) == "brier"


# ---- writing, saving, cutting up -------------------------------------------------------------------------------------


FORMULAS = [
    "cross_entropy + constraint(l2, equal=2)",
    "cross_entropy + constraint(l2, upper=2, lr=0.1, initial=1, damping=0.5, smoothing=0.9)",
    "cross_entropy + constraint(l2, lower=2, method='augmented', rho=3, growth=2, every=20, largest=9, tolerance=0.1)",
    "cross_entropy + constraint(brier + 0.5*focal, measured=2*error_rate, upper=0.1)",
    "cross_entropy + 2*constraint(brier.on('rare'), measured=error_rate.on('rare'), upper=0.1, method='augmented')",
    "cross_entropy + constraint(l2, upper=2) + constraint(l2.named('floor'), lower=1)",
    "cross_entropy + constraint(auto*l1 + l2, measured=error_rate.named('true'), upper=2)",
    "cross_entropy + adaptive_kl(kl, target=2)",
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_constraint_prints_as_it_was_written(formula: str) -> None:
    objective = poise.parse(formula)
    assert str(objective) == formula
    assert poise.parse(str(objective)).equals(objective)
    assert str(copy.deepcopy(objective)) == formula
    assert str(pickle.loads(pickle.dumps(objective))) == formula
    assert poise.formula.explain(formula)


def test_auto_weights_inside_a_proxy_constraint_are_resolved() -> None:
    resolved = poise.parse(FORMULAS[6]).resolve({"l1": 0.5})
    assert str(resolved) == FORMULAS[6].replace("auto", "0.5")
    assert resolved.summands[1].weight.owner is resolved.summands[3].weight.owner  # type: ignore[union-attr]


STATEFUL = (
    "cross_entropy + constraint(l2, upper=1, lr=0.3, damping=0.5, smoothing=0.5) "
    "+ constraint(confidence_penalty, upper=-1.2, method='augmented', growth=2, every=3) "
    "+ constraint(brier, measured=error_rate, upper=0.1, lr=0.5)"
)


def batch(rows: int = 24, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "input": torch.randn(rows, 5, generator=draw),
        "target": torch.randint(0, 3, (rows,), generator=draw),
    }


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def trained(steps: int = 10, **options: Any) -> tuple[nn.Module, Objective]:
    model, objective = net(), poise.parse(STATEFUL)
    poise.fit(model, objective, batch(), steps=steps, batch_size=8, lr=0.1, device="cpu", **options)
    return model, objective


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_the_state_of_every_rule_survives_and_moves_on_alike(way: str) -> None:
    model, objective = trained()
    if way == "state_dict":
        twin = poise.parse(STATEFUL)
        twin.load_state_dict(copy.deepcopy(objective.state_dict()))
    else:
        twin = copy.deepcopy(objective) if way == "deepcopy" else pickle.loads(pickle.dumps(objective))
    for one in (objective, twin):
        for step in range(4):
            data = batch(seed=step)
            logits = model(data["input"])
            one(logits=logits, target=data["target"], parameters=dict(model.named_parameters()))
            one.advance()
    states = [{k: v for k, v in o.state_dict().items() if isinstance(v, Tensor)} for o in (objective, twin)]
    assert len(states[0]) == 3 * 3 + 1 + 2
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        assert value.dtype == torch.float64


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Any) -> None:
    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.step == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(12, checkpoint=tmp_path, checkpoint_steps=5, callbacks=[Stop()])
    model, objective = trained(12, checkpoint=tmp_path)
    whole_model, whole = trained(12)
    for one, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert torch.equal(one, other)
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, objective.state_dict()[name]), name


def test_micro_batches_give_the_multipliers_of_the_whole_batch() -> None:
    _, whole = trained()
    _, parts = trained(accumulate=3)
    for name, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            # The sums run in another order, in float32.
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_move_every_multiplier_as_one(tmp_path: Path) -> None:
    formula = STATEFUL.replace("+ constraint(l2", "+ 0.5*early_learning(beta=0.6) + constraint(l2")
    first, second = on_two(train_on_rows, tmp_path, 3, formula)
    for name, value in train_on_rows(1, formula).items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(first[name], second[name]), name


def test_a_change_of_dtype_leaves_the_multiplier_whole() -> None:
    module = Constraint(upper=1, lr=1 / 3)
    module.advance(2)
    before = module.multiplier.clone()
    assert torch.equal(module.to(torch.bfloat16).multiplier, before)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "exactly one of 'upper', 'lower' and 'equal'"),
        ("upper=1, equal=1", "exactly one of"),
        ("upper=1, lr=0", "lr must be positive"),
        ("upper=1, initial=-1", "initial must be >= 0"),
        ("upper=1, method='penalty'", "method is 'dual' or 'augmented', and it is 'penalty'"),
        ("upper=1, rho=2", "rho belongs to method='augmented'"),
        ("upper=1, method='augmented', damping=1", "damping belongs to method='dual'"),
        ("upper=1, damping=-1", "damping must be >= 0"),
        ("upper=1, smoothing=0.5", "smoothing is that of the damping"),
        ("upper=1, damping=1, smoothing=1", "smoothing must be in"),
        ("upper=1, method='augmented', rho=0", "rho must be positive"),
        ("upper=1, method='augmented', growth=0.5", "growth must be >= 1"),
        ("upper=1, method='augmented', every=0", "every must be >= 1"),
        ("upper=1, largest=0", "largest must be positive"),
        ("upper=1, tolerance=-1", "tolerance must be >= 0"),
        ("upper=1, measured=constraint(l1, upper=1)", "cannot be constrained again"),
        ("upper=1, measured=0*l1", "measured has no term"),
    ],
)
def test_what_does_not_fit_is_said(arguments: str, words: str) -> None:
    with pytest.raises(FormulaError, match="constraint: ") as error:
        poise.parse(f"constraint(l2, {arguments})")
    assert words in str(error.value)


def test_a_constraint_whose_terms_all_have_weight_0_is_none() -> None:
    assert str(poise.parse("cross_entropy + constraint(0*l2, upper=1)")) == "cross_entropy"


def test_a_bound_that_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="upper must be a finite number"):
        constraint(SquaredError(), upper=math.nan)
