"""Policies in a run: what they are told, how their weights reach the update, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import FormulaError, InputError
from poise.problem import Problem
from poise.readouts import Classification, Regression
from poise.weights.bilevel.online import OnlineBilevel
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto.balancer import Balancer


class Halves(Balancer):
    """Weighs the rows 0.25, 0.75, whatever they are."""

    balances = True

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        return torch.tensor([0.25, 0.75], dtype=torch.float64)


class TwoHeads(nn.Module):
    """A trunk and two heads; each term reads one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.left(h), self.right(h)


def both_heads(model: Any, batch: Any, reads: frozenset[str]) -> Any:
    batch.offer("both", lambda: model(batch["input"]))
    batch.offer("logits", lambda: batch["both"][0])
    batch.offer("right_logits", lambda: batch["both"][1])
    return batch


both_heads.output = "logits"  # type: ignore[attr-defined]
TWO = "cross_entropy.named('left') + cross_entropy.on(logits='right_logits', target='other').named('right')"


def two_tasks(n: int = 12) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "input": torch.randn(n, 4, generator=g),
        "target": torch.randint(0, 3, (n,), generator=g),
        "other": torch.randint(0, 2, (n,), generator=g),
    }


def model_of(kind: type[nn.Module] = TwoHeads) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def problem_on(batches: list[dict[str, Tensor]], model: nn.Module, formula: str = TWO) -> Problem:
    return Problem(model, poise.parse(formula), [{"main": b} for b in batches], both_heads)  # type: ignore[arg-type]


# ---- the table ------------------------------------------------------------------------------------------------------


def test_rows_of_the_table_are_the_gradients_of_the_terms() -> None:
    model, data = model_of(), two_tasks()
    table = problem_on([data], model).table({"left": {"left": 1.0}, "right": {"right": 2.0}})
    for label, factor, row in zip(("left", "right"), (1.0, 2.0), table.rows, strict=True):
        alone = problem_on([data], model).gradient(terms=[label])
        assert row.keys() == alone.keys()
        for name, g in alone.items():
            torch.testing.assert_close(row[name], factor * g)
    assert set(table.shared) == {"trunk.weight", "trunk.bias"}


def test_the_table_of_uneven_micro_batches_is_that_of_the_whole_batch() -> None:
    model, data = model_of(), two_tasks()
    parts = [{k: v[:7] for k, v in data.items()}, {k: v[7:] for k, v in data.items()}]
    rows = {"left": {"left": 1.0}, "right": {"right": 1.0}}
    whole, split = problem_on([data], model).table(rows), problem_on(parts, model).table(rows)
    torch.testing.assert_close(split.gram, whole.gram, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split.values, whole.values, rtol=1e-5, atol=1e-7)


def test_inner_products_are_those_of_the_flat_gradients() -> None:
    rows = [{"a": torch.randn(2, 3), "b": torch.randn(4)}, {"a": torch.randn(2, 3), "c": torch.randn(2)}]
    table = GradientTable(("x", "y"), torch.zeros(2), rows)
    flat = torch.stack([row["a"].flatten() for row in rows]).double()
    torch.testing.assert_close(table.gram, flat @ flat.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table.against({"a": rows[0]["a"]}), (flat @ flat[0]), rtol=1e-5, atol=1e-6)


def test_a_table_without_shared_parameters_names_the_term() -> None:
    with pytest.raises(InputError, match="x has no gradient on a parameter that another term reaches"):
        GradientTable(("x", "y"), torch.zeros(2), [{"a": torch.ones(1)}, {"b": torch.ones(1)}])


# ---- balancers in a run ---------------------------------------------------------------------------------------------


def test_a_balancer_weighs_shared_parameters_and_leaves_the_heads_alone() -> None:
    model, data = model_of(), two_tasks()
    before = copy.deepcopy(model.state_dict())
    alone = {
        label: problem_on([data], model).gradient(terms=[label]) for label in ("left", "right")
    }  # gradients at the start
    run = poise.fit(model, TWO, data, readout=both_heads, solver="sgd", lr=0.1, steps=1, batch_size=12, policy=Halves())  # type: ignore[arg-type]
    moved = {name: (before[name] - p) / 0.1 for name, p in run.model.state_dict().items()}
    torch.testing.assert_close(
        moved["trunk.weight"], 0.25 * alone["left"]["trunk.weight"] + 0.75 * alone["right"]["trunk.weight"]
    )
    torch.testing.assert_close(moved["left.weight"], alone["left"]["left.weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved["right.bias"], alone["right"]["right.bias"], rtol=1e-4, atol=1e-6)
    assert run.weights == {"left": 0.25, "right": 0.75}
    assert str(run.objective).startswith("0.25*cross_entropy")
    assert run.history["policy/weight/right"] == [0.75]


def test_what_a_step_was_worth_is_told_under_its_own_weights() -> None:
    data = two_tasks()
    run = poise.fit(
        model_of(), TWO, data, readout=both_heads, lr=0.1, steps=1, batch_size=12, policy=Halves(), log_every=1
    )  # type: ignore[arg-type]
    history = run.history
    expected = 0.25 * history["term/left"][0] + 0.75 * history["term/right"][0]
    assert history["loss"][0] == pytest.approx(expected, rel=1e-6)


def test_a_fixed_factor_stays_before_a_balanced_term() -> None:
    data = two_tasks()
    whole = poise.parse(TWO.replace(" + ", " + 3*"))
    run = poise.fit(model_of(), whole, data, readout=both_heads, lr=0.1, steps=1, batch_size=12, policy=Halves())  # type: ignore[arg-type]
    assert "2.25*cross_entropy.on" in str(poise.parse(str(run.objective)))


def test_balancing_on_features_gives_the_update_of_its_weights() -> None:
    data = two_tasks()
    ours = poise.fit(
        model_of(), TWO, data, readout=both_heads, lr=0.1, steps=3, batch_size=12, policy=Halves().on("trunk")
    )  # type: ignore[arg-type]
    plain = poise.fit(model_of(), TWO, data, readout=both_heads, lr=0.1, steps=3, batch_size=12, policy=Halves())  # type: ignore[arg-type]
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    text = "auto(policy='pareto', method=\"mgda(on='trunk')\")"
    named = poise.parse(TWO.replace("cross_entropy.", f"{text}*cross_entropy.", 1).replace("+ ", f"+ {text}*"))
    run = poise.fit(model_of(), named, data, readout=both_heads, lr=0.1, steps=3, batch_size=12, accumulate=2)  # type: ignore[arg-type]
    assert sum(run.weights.values()) == pytest.approx(1.0)


def test_a_balancer_needs_two_terms() -> None:
    data = two_tasks()
    with pytest.raises(InputError, match="needs two terms at least, and it has left"):
        poise.fit(
            model_of(), TWO.replace("cross_entropy.named", "auto*cross_entropy.named", 1), data, readout=both_heads,
            steps=1, policy=Halves(),
        )  # type: ignore[arg-type]  # fmt: skip


# ---- bilevel in a run -----------------------------------------------------------------------------------------------


def ridge() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, xv = torch.randn(30, 6, generator=g, dtype=torch.float64), torch.randn(20, 6, generator=g, dtype=torch.float64)
    w = torch.randn(6, generator=g, dtype=torch.float64)
    noise = torch.randn(50, generator=g, dtype=torch.float64)
    return x, x @ w + noise[:30], xv, xv @ w + noise[30:]


def test_the_hypergradient_of_conjugate_gradients_is_the_closed_form_of_ridge() -> None:
    x, y, xv, yv = ridge()
    model = nn.Linear(6, 1, bias=False).double()

    def solution(theta: Tensor) -> Tensor:
        return torch.linalg.solve(x.T @ x / 30 + theta.exp() * torch.eye(6, dtype=torch.float64), x.T @ y / 30)

    start = (1e-3 * 1e2) ** 0.5
    theta = torch.tensor(start, dtype=torch.float64).log().requires_grad_()
    best = solution(theta)
    (0.5 * (xv @ best - yv).square().mean()).backward()
    with torch.no_grad():
        model.weight.copy_(best[None])
    policy = OnlineBilevel("cg", terms=30, damping=0.0, warmup=0.0, every=1)
    run = poise.fit(
        model, "squared_error + auto*l2", (x, y), {"input": xv, "target": yv}, readout=Regression(), lr=1e-12, steps=1,
        batch_size=30, policy=policy,
    )  # fmt: skip
    assert run.history["policy/hypergradient/l2"][0] == pytest.approx(float(theta.grad or 0), rel=1e-8)
    assert run.history["policy/hypergradient_error"][0] < 1e-8


def test_one_step_is_the_derivative_of_the_validation_objective_through_a_step() -> None:
    x, y, xv, yv = ridge()
    model = nn.Linear(6, 1, bias=False).double()
    start, lr = (1e-3 * 1e2) ** 0.5, 1e-5

    def after(theta: float) -> float:
        w = model.weight.detach().clone().requires_grad_()
        t = torch.tensor(theta, dtype=torch.float64)
        loss = 0.5 * (x @ w[0] - y).square().mean() + t.exp() * 0.5 * w.square().sum()
        (g,) = torch.autograd.grad(loss, w)
        return float(0.5 * (xv @ (w - lr * g)[0].detach() - yv).square().mean())

    log = float(torch.tensor(start, dtype=torch.float64).log())
    slope = (after(log + 1e-2) - after(log - 1e-2)) / 2e-2
    policy = OnlineBilevel("one_step", warmup=0.0, every=1)
    run = poise.fit(
        model, "squared_error + auto*l2", (x, y), {"input": xv, "target": yv}, readout=Regression(), solver="sgd",
        lr=lr, steps=1, batch_size=30, policy=policy,
    )  # fmt: skip
    assert run.history["policy/hypergradient/l2"][0] == pytest.approx(slope, rel=1e-3)


def wide_blobs(n: int = 90) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    target = torch.randint(0, 3, (n,), generator=g)
    return {"input": torch.randn(n, 8, generator=g) + torch.eye(3, 8)[target], "target": target}


@pytest.mark.parametrize("method", ["one_step", "neumann(every=5)", "cg(every=5)"])
def test_a_run_that_stops_and_resumes_moves_its_weights_bit_for_bit(method: str, tmp_path: Path) -> None:
    formula = f'cross_entropy + auto(policy="bilevel", method="{method}")*l2'
    data, valid = wide_blobs(), wide_blobs(60)

    def fit(steps: int, **options: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        return poise.fit(model, formula, data, valid, steps=steps, batch_size=30, seed=1, **options)

    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.step == 13:
                state.stop = "here"

    whole = fit(40)
    stopped = fit(40, checkpoint=tmp_path, callbacks=[Stop()])
    assert stopped.steps == 13
    # The reason to stop is part of the state: a resumed run is told to go on.
    from poise import checkpoint

    found = checkpoint.load_newest(tmp_path, torch.device("cpu"))
    assert found is not None
    found["fields"]["stop"] = None
    checkpoint.save(tmp_path, 13, found)
    resumed = fit(40, checkpoint=tmp_path)
    assert resumed.weights == whole.weights
    assert whole.weights["l2"] != (1e-3 * 1e2) ** 0.5
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_weight_beyond_its_use_falls_and_one_that_helps_rises() -> None:
    g = torch.Generator().manual_seed(0)
    x, xv = torch.randn(24, 20, generator=g), torch.randn(200, 20, generator=g)
    w = torch.zeros(20)
    w[0] = 1.0
    y, yv = x @ w + 0.5 * torch.randn(24, generator=g), xv @ w + 0.5 * torch.randn(200, generator=g)
    ends = {}
    for low, high in ((1e-6, 1e-3), (1.0, 100.0)):
        torch.manual_seed(0)
        run = poise.fit(
            nn.Linear(20, 1), f"squared_error + auto(low={low}, high={high}, policy='bilevel')*l2", (x, y),
            {"input": xv, "target": yv}, readout=Regression(), lr=0.05 if high < 1 else 0.005, steps=400, batch_size=24,
        )  # fmt: skip
        ends[high] = run.weights["l2"]
    assert ends[1e-3] == pytest.approx(1e-3, rel=1e-6)
    assert ends[100.0] == pytest.approx(1.0, rel=1e-6)


# ---- what is refused ------------------------------------------------------------------------------------------------


def fit_blobs(formula: str, **options: Any) -> Any:
    options = {"valid": wide_blobs(30), "steps": 2, **options}
    return poise.fit(nn.Linear(8, 3), formula, wide_blobs(), readout=Classification(), **options)


def test_a_policy_that_judges_by_validation_data_refuses_to_go_without() -> None:
    with pytest.raises(InputError, match="no validation data"):
        fit_blobs("cross_entropy + auto(policy='bilevel')*l2", valid=None)


def test_two_policies_for_one_weight_are_refused() -> None:
    one, two = "auto('a', policy='bilevel')", "auto('a', policy='bilevel', method='cg')"
    with pytest.raises(InputError, match="Two policies for one weight: 'a'"):
        fit_blobs(f"cross_entropy + {one}*l2 + {two}*l1")
    with pytest.raises(InputError, match="Two policies for one weight: Halves would weigh every term, and l2"):
        fit_blobs("cross_entropy + auto(policy='bilevel')*l2", policy=Halves())


def test_a_policy_without_a_weight_is_refused() -> None:
    with pytest.raises(InputError, match="the formula has none that is free"):
        fit_blobs("cross_entropy + 0.1*l2", policy=OnlineBilevel())


def test_a_product_of_two_weights_is_refused() -> None:
    with pytest.raises(InputError, match="product of two 'auto' weights"):
        fit_blobs("cross_entropy + auto('a')*(auto('b')*l2)", policy=OnlineBilevel())


def test_a_weight_that_nothing_depends_on_is_named() -> None:
    with pytest.raises(InputError, match="hypergradient of 'idle' is identically zero"):
        fit_blobs("cross_entropy + auto('idle')*l2", policy=OnlineBilevel(warmup=0.0), solver=Frozen())


class Frozen:
    """Keeps the weights at 0, where `l2` has no gradient."""

    needs: frozenset[str] = frozenset()

    def bind(self, model: nn.Module, objective: Any) -> None:
        for p in model.parameters():
            nn.init.zeros_(p)

    def step(self, problem: Problem, accept: Any = None) -> Any:
        raise AssertionError("the policy comes first")


def test_the_validation_objective_must_be_clear() -> None:
    with pytest.raises(InputError, match="validation objective is not clear"):
        fit_blobs("auto(policy='bilevel')*cross_entropy + 0.1*l2")
    run = fit_blobs("auto(policy='bilevel', method=\"one_step(upper='cross_entropy')\")*cross_entropy + 0.1*l2")
    assert set(run.weights) == {"cross_entropy"}


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("auto(policy='bilevl')*l2", "policy 'bilevl' is not known.*Did you mean 'bilevel'"),
        ("auto(policy='bilevel', method='neuman')*l2", "no method 'neuman'.*Did you mean 'neumann'"),
        ("auto(policy='search', method='cg')*l2", "has no method 'cg'; it has no methods"),
        ("auto(low=-1)*l2", "0 < low < high"),
        ("auto(low=1, high=1e999)*l2", "both finite"),
    ],
)
def test_a_wrong_policy_in_a_formula_is_an_error_with_the_nearest_name(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(formula)


def test_an_argument_that_a_method_does_not_take_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"one_step has no argument 'evry'\. Did you mean 'every'"):
        fit_blobs("cross_entropy + auto(policy='bilevel', method='one_step(evry=3)')*l2")
    with pytest.raises(InputError, match="cagrad has no argument 'd'"):
        fit_blobs("cross_entropy + confidence_penalty", policy="cagrad(d=3)")


def test_a_policy_in_a_formula_goes_round() -> None:
    for text in ("auto(policy='bilevel', method='cg(terms=5)')*l2", "auto('a', low=0.1, policy='bilevel')*l2"):
        assert str(poise.parse(text)) == text


def test_a_factor_that_is_a_schedule_moves_the_row_with_it() -> None:
    run = fit_blobs(
        "cross_entropy + linear(0, 1, steps=4)*auto('a')*l2", policy=OnlineBilevel(warmup=0.5, every=1), steps=6
    )
    assert set(run.weights) == {"a"}


# ---- methods that move the model themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("maid(step0=1.0)", 60),
        ("hoag", 60),
        ("penalty(lr=3.0, inner_steps=60, sigma=0.01)", 100),
        ("bo_rep(lr=0.05, inner_steps=60, system_lr=0.2)", 100),
    ],
)
def test_a_method_in_a_formula_finds_the_weight_that_validation_wants(method: str, steps: int) -> None:
    x, y, xv, yv = ridge()

    def judged(log: float) -> float:
        a = x.T @ x / 30 + torch.tensor(log).double().exp() * torch.eye(6, dtype=torch.float64)
        return float(0.5 * (xv @ torch.linalg.solve(a, x.T @ y / 30) - yv).square().mean())

    best = min(judged(log / 50) for log in range(-345, 230))
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    formula = f'squared_error + auto(policy="bilevel", method="{method}")*l2(biases=True)'
    run = poise.fit(
        model, formula, (x, y), {"input": xv, "target": yv}, readout=Regression(), lr=0.3, steps=steps, batch_size=30, seed=0,
    )  # fmt: skip
    start = judged(float(torch.tensor((1e-3 * 1e2) ** 0.5).log()))
    assert judged(float(torch.tensor(run.weights["l2"]).log())) - best < 0.1 * (start - best)
    at = x.T @ x / 30 + run.weights["l2"] * torch.eye(6, dtype=torch.float64)
    gap = model.weight.detach()[0] - torch.linalg.solve(at, x.T @ y / 30)
    assert float(gap.norm()) < 0.1


def test_maid_refuses_batches_that_differ_and_a_lower_level_that_is_not_strongly_convex() -> None:
    x, y, xv, yv = ridge()
    valid = {"input": xv, "target": yv}
    maid = 'auto(policy="bilevel", method="maid")'
    with pytest.raises(InputError, match="maid needs a lower bound of the curvature"):
        poise.fit(
            nn.Linear(6, 1).double(),
            f"squared_error + {maid}*l2",
            (x, y),
            valid,
            readout=Regression(),
            steps=3,
            batch_size=30,
        )
    with pytest.raises(poise.errors.IncompatibleError, match="deterministic lower evaluations"):
        poise.fit(
            nn.Linear(6, 1).double(), f"squared_error + {maid}*l2(biases=True)", (x, y), valid, readout=Regression(), steps=3,
            batch_size=10,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["maid", "penalty", "bo_rep"])
def test_a_method_that_moves_the_model_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    x, y, xv, yv = ridge()

    def fit(steps: int, **options: Any) -> Any:
        torch.manual_seed(0)
        formula = f'squared_error + auto(policy="bilevel", method="{method}")*l2(biases=True)'
        return poise.fit(
            nn.Linear(6, 1, bias=False).double(), formula, (x, y), {"input": xv, "target": yv}, readout=Regression(), lr=0.1, steps=steps,
            batch_size=30, **options,
        )  # fmt: skip

    class Stop:
        def on_step_end(self, state: Any) -> None:
            if state.step == 5:
                state.stop = "here"

    whole = fit(12)
    fit(12, checkpoint=tmp_path, callbacks=[Stop()])
    from poise import checkpoint

    found = checkpoint.load_newest(tmp_path, torch.device("cpu"))
    assert found is not None
    found["fields"]["stop"] = None
    checkpoint.save(tmp_path, 5, found)
    resumed = fit(12, checkpoint=tmp_path)
    assert resumed.weights == whole.weights
    assert torch.equal(resumed.model.weight, whole.model.weight)


# ---- hyperparameters that are not weights ---------------------------------------------------------------------------


def test_one_step_in_a_hyperparameter_is_the_derivative_through_a_step() -> None:
    from poise.terms import LabelSmoothing
    from poise.weights import Hyperparameter

    data, valid, lr = wide_blobs(), wide_blobs(40), 1e-4
    torch.manual_seed(0)
    model = nn.Linear(8, 3).double()
    x, xv = data["input"].double(), valid["input"].double()
    smoothing = Hyperparameter("smoothing", 0.2, 0, 1, per_example=False)

    def after(raw: float) -> float:
        parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        epsilon = float(smoothing.constrain(torch.tensor(raw, dtype=torch.float64)))
        loss = nn.functional.cross_entropy(x @ parameters[0].T + parameters[1], data["target"], label_smoothing=epsilon)
        moved = [p.detach() - lr * g for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)]
        return float(nn.functional.cross_entropy(xv @ moved[0].T + moved[1], valid["target"]))

    raw = float(smoothing.raw)
    slope = (after(raw + 1e-2) - after(raw - 1e-2)) / 2e-2
    policy = OnlineBilevel("one_step", every=1, warmup=0.0, hypers=[smoothing], upper="cross_entropy")
    run = poise.fit(
        model, LabelSmoothing(smoothing), {"input": x, "target": data["target"]}, {"input": xv, "target": valid["target"]},
        solver="sgd", lr=lr, steps=1, batch_size=len(x), policy=policy,
    )  # fmt: skip
    assert run.history["policy/hypergradient/smoothing"][0] == pytest.approx(slope, rel=1e-3)
    assert run.history["policy/hyperparameter/smoothing"][0] != 0.2


def test_weights_and_hyperparameters_are_moved_together() -> None:
    from poise.terms import L2, LabelSmoothing
    from poise.weights import Hyperparameter

    smoothing = Hyperparameter("smoothing", 0.2, 0, 1, per_example=False)
    objective = LabelSmoothing(smoothing) + poise.auto * L2()
    policy = OnlineBilevel("one_step", every=1, warmup=0.0, hypers=[smoothing], upper="cross_entropy")
    run = poise.fit(nn.Linear(8, 3), objective, wide_blobs(), wide_blobs(30), steps=5, policy=policy)
    assert float(smoothing) != 0.2
    assert run.weights["l2"] != (1e-3 * 1e2) ** 0.5


def test_a_hyperparameter_that_nothing_reads_or_that_is_discrete_is_refused() -> None:
    from poise.weights import Hyperparameter

    idle = Hyperparameter("idle", 0.5, 0, 1)
    with pytest.raises(InputError, match="hypergradient of 'idle' is identically zero"):
        fit_blobs("cross_entropy", policy=OnlineBilevel(hypers=[idle], warmup=0.0))
    with pytest.raises(InputError, match="'holes' is discrete"):
        fit_blobs("cross_entropy", policy=OnlineBilevel(hypers=[Hyperparameter("holes", 1, 0, 4, discrete=True)]))


def test_a_gradient_that_is_not_finite_stops_the_run_by_name_or_skips_the_step() -> None:
    data = two_tasks()
    data["input"][3] = float("inf")
    arguments: dict[str, Any] = {"readout": both_heads, "lr": 0.1, "steps": 4, "batch_size": 4, "policy": Halves()}
    with pytest.raises(poise.errors.NonFiniteError, match="The gradient of left, right is not finite"):
        poise.fit(model_of(), TWO, data, **arguments)
    run = poise.fit(model_of(), TWO, data, **{**arguments, "policy": Halves()}, on_nonfinite="skip")
    assert 0 < run.skipped < 4
