"""Self-tuning networks: closed forms on ridge regression, what moves in which step, state, and errors."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError, NonFiniteError
from poise.objective import Objective
from poise.parts import BestResponseLinear, TunedDropout, drop_connect, fold_best_response, make_best_response
from poise.problem import Problem
from poise.readouts.supervised import Classification, Regression
from poise.response_input import response_input_of
from poise.terms import L2, ConfidencePenalty, CrossEntropy, SquaredError
from poise.weights import Hyperparameter, ReplayedHyperparameters
from poise.weights.bilevel.hypergradient import ImplicitHypergradient
from poise.weights.bilevel.levels import Levels
from poise.weights.bilevel.response_step import linearised_outputs
from poise.weights.bilevel.self_tuning import SelfTuning, perturbation_entropy


class Loop:
    """A loop of one's own around a policy: draws batches, updates by gradient descent, tells the policy what it may look at."""

    def __init__(self, model: nn.Module, policy: Any, objective: Objective | None = None, **options: Any) -> None:
        g = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(40, 6, generator=g), torch.randint(0, 3, (40,), generator=g)
        self.model, self.policy, self.objective = model, policy, objective or 1 * CrossEntropy()
        self.step, self.steps, self.lr = 0, options.get("steps", 100), options.get("lr", 0.1)
        self.validate = options.get("validate", True)

    def problem(self, objective: Any, low: int, high: int) -> Problem:
        batch = {"main": {"input": self.x[low:high], "target": self.y[low:high]}}
        return Problem(self.model, objective, [batch], Classification(), key=(0, self.step), record=False)

    def signals(self, problem: Problem) -> Any:
        valid = self.problem(1 * CrossEntropy(), 20, 40) if self.validate else None
        return SimpleNamespace(
            names=(), rows={}, problem=problem, validation=valid, step=self.step, steps=self.steps, lr=self.lr
        )

    def one(self) -> None:
        self.model.train()
        problem = self.problem(self.objective, 0, 16)
        signals = self.signals(problem)
        self.policy.weights(signals)
        gradient = problem.gradient()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in gradient:
                    p -= self.lr * gradient[name]
        self.policy.advance(signals)
        self.step += 1


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *layers, nn.Linear(8, 3))


def tuned(**options: Any) -> tuple[nn.Sequential, SelfTuning]:
    rate = Hyperparameter("rate", 0.3, 0, 0.9)
    model = network(TunedDropout(rate))
    make_best_response(model, 1)
    return model, SelfTuning([rate], **{"warmup": 0, **options})


# ---- ridge regression: w minimises |X w - y|^2/2 + lambda |w|^2/2, with lambda ~ N(lambda_0, sigma^2) ---------------


def ridge() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in ((12, 4), (12,), (9, 4), (9,)))  # type: ignore[return-value]


NODES = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
SHARES = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
"""Three points that have the first five moments of N(0, 1): the loss is cubic in the perturbation."""


def expected_loss(weight: Tensor, start: float, sigma: float, shift: Any = lambda e: e) -> Tensor:
    """E of the training loss at `W_elem + e W_hyper`, the two rows of `weight`; `shift(e)` is lambda - lambda_0 at e."""
    x, y, _, _ = ridge()
    total = torch.zeros((), dtype=torch.float64)
    for e, share in zip(sigma * NODES, SHARES, strict=True):
        w = weight[0] + e * weight[1]
        total = total + share * (x @ w - y).square().sum() / 2 + share * (start + shift(e)) * w.square().sum() / 2
    return total


def gated() -> BestResponseLinear:
    """A layer whose answer is one free direction in weight space: `v W_hyper` with v = 1."""
    layer = BestResponseLinear(4, 1, 1, bias=False).double()
    with torch.no_grad():
        layer.gate.fill_(1.0)
    return layer


@pytest.mark.parametrize(("start", "sigma"), [(2.0, 0.7), (5.0, 1.5)])
def test_full_expectation_reaches_the_closed_fixed_point_of_ridge_regression(start: float, sigma: float) -> None:
    x, y, _, _ = ridge()
    layer = gated()
    steepest = float(torch.linalg.eigvalsh(x.T @ x)[-1]) + start + 2 * sigma
    scale = torch.tensor([[1.0], [sigma**2]], dtype=torch.float64)  # the answer's share of the loss has sigma^2 in it
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(expected_loss(layer.weight, start, sigma), layer.weight)
        with torch.no_grad():
            layer.weight -= gradient / scale / steepest
        if gradient.abs().max() < 1e-13:
            break
    a = x.T @ x + start * torch.eye(4, dtype=torch.float64)
    w0 = torch.linalg.solve(a - sigma**2 * torch.linalg.inv(a), x.T @ y)
    answer = -torch.linalg.solve(a, w0)
    torch.testing.assert_close(layer.weight[0], w0, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.weight[1], answer, rtol=1e-9, atol=1e-11)


def test_as_the_perturbation_vanishes_the_hypergradient_is_the_implicit_one() -> None:
    x, y, xv, yv = ridge()
    hyper = Hyperparameter("l2", 2.0, 0, math.inf, per_example=False, scale="log")
    start, sigma = 2.0, 1e-4
    layer = gated()

    def loss_of(scaled: Tensor) -> Tensor:  # lambda = exp(h)
        return expected_loss(scaled / unit, start, sigma, lambda e: start * torch.expm1(e))

    unit = torch.tensor([[1.0], [sigma]], dtype=torch.float64)
    at = torch.zeros(2, 4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(loss_of, at).view(8, 8)
    (gradient,) = torch.autograd.grad(loss_of(at.requires_grad_()), at)
    with torch.no_grad():
        layer.weight.copy_(-torch.linalg.solve(hessian, gradient.flatten()).view(2, 4) / unit)
    a = x.T @ x + start * torch.eye(4, dtype=torch.float64)
    w = torch.linalg.solve(a, x.T @ y)
    answer = -torch.linalg.solve(a, w)  # d w*/d lambda
    torch.testing.assert_close(layer.weight[1], start * answer, rtol=1e-6, atol=0)
    policy = SelfTuning([hyper], learn_scale=False, variant="delta")
    model = nn.Sequential(layer)
    valid = Problem(model, 1 * SquaredError(), [{"main": {"input": xv, "target": yv}}], Regression(), record=False)
    loss, of_raw, _ = policy.hypergradient(valid)
    residual = xv @ w - yv
    assert loss == pytest.approx(float(residual.square().mean() / 2), rel=1e-6)
    implicit = start * float(answer @ (xv.T @ residual) / len(yv))  # dL_V/dh, h = log lambda
    assert float(of_raw) == pytest.approx(implicit, rel=1e-6)
    levels = Levels(
        lambda w, h, _: (x @ w[0] - y).square().sum() / 2 + h[0].exp() * w[0].square().sum() / 2,
        lambda w, h, _: (xv @ w[0] - yv).square().mean() / 2,
    )
    (same,) = ImplicitHypergradient(levels, solver="lu")((w,), (hyper.raw,)).gradient
    assert float(of_raw) == pytest.approx(float(same), rel=1e-6)


# ---- what moves when ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["stn", "delta"])
@pytest.mark.parametrize("learn_scale", [True, False])
def test_the_hypergradient_is_the_difference_quotient_of_the_validation_loss(variant: Any, learn_scale: bool) -> None:
    model, policy = tuned(variant=variant, learn_scale=learn_scale, entropy=0.3)
    loop = Loop(model.double(), policy)
    loop.x = loop.x.double()
    for _ in range(3):
        loop.one()
    valid, inputs = loop.problem(1 * CrossEntropy(), 20, 40), response_input_of(model)
    loss, of_raw, of_scale = policy.hypergradient(valid, step=7)
    base, scale = policy.raw, policy.free_scale.clone()

    def value(raw: float, free: float) -> float:
        # The perturbation that h_i - stop(h) sees: the gates move, h does not.
        rows = base + raw + nn.functional.softplus(scale + free) * draws if learn_scale else base + raw
        inputs.place(rows - (base if variant == "delta" else policy.origin))
        model.eval()
        with torch.no_grad():
            got = valid.value()
        inputs.place(None)
        return float(got) - 0.3 * float(perturbation_entropy(nn.functional.softplus(scale + free)))

    draws = (policy._rows(valid, policy.raw, torch.ones(1).double(), 7, "valid 0") - policy.raw).detach()
    e = 1e-5
    assert float(of_raw) == pytest.approx((value(e, 0) - value(-e, 0)) / (2 * e), rel=1e-6, abs=1e-10)
    expected = (value(0, e) - value(0, -e)) / (2 * e) if learn_scale else float(of_scale)
    assert float(of_scale) == pytest.approx(expected, rel=1e-6)
    assert loss == pytest.approx(value(0, 0) + 0.3 * float(perturbation_entropy(nn.functional.softplus(scale))))


def test_the_entropy_has_the_gradient_one_over_the_scale() -> None:
    scale = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(perturbation_entropy(scale), scale)
    torch.testing.assert_close(gradient, 1 / scale.detach())
    assert float(perturbation_entropy(torch.ones(1))) == pytest.approx(0.5 * math.log(2 * math.pi * math.e))


@pytest.mark.parametrize("variant", ["stn", "delta"])
def test_training_steps_move_weights_alone_and_validation_steps_hyperparameters_alone(variant: Any) -> None:
    model, policy = tuned(variant=variant, train_steps=3)
    loop = Loop(model, policy)
    before = policy.raw.clone(), policy.free_scale.clone()
    for _ in range(2):  # two training steps of the cycle
        loop.one()
        assert torch.equal(policy.raw, before[0])
        assert torch.equal(policy.free_scale, before[1])
        assert not policy.tuned[0].raw.requires_grad
    seen: dict[str, Any] = {}
    original = policy.hypergradient

    def watched(*arguments: Any) -> Any:
        seen["weights"] = {n: p.clone() for n, p in model.named_parameters()}
        return original(*arguments)

    policy.hypergradient = watched  # type: ignore[method-assign]
    loop.one()
    for name, p in model.named_parameters():
        assert torch.equal(p, seen["weights"][name])
        assert p.grad is None
    assert not torch.equal(policy.raw, before[0])
    assert not torch.equal(policy.free_scale, before[1])
    assert model.training


def test_each_example_has_a_perturbation_of_its_own_and_shared_ones_have_one() -> None:
    own, shared = Hyperparameter("own", 0.3, 0, 0.9), Hyperparameter("shared", 0.3, 0, 0.9, per_example=False)
    model = network(TunedDropout(own), TunedDropout(shared))
    inputs = make_best_response(model, 2)
    policy = SelfTuning([own, shared], scale={"own": 1.0, "shared": 0.1})
    loop = Loop(model, policy)
    problem = loop.problem(loop.objective, 0, 16)
    policy.weights(loop.signals(problem))
    rows = inputs.read(loop.x[:16])
    assert rows is not None
    assert len(rows[:, 0].unique()) == 16
    assert len(rows[:, 1].unique()) == 1
    assert own.read().shape == (16,)
    torch.testing.assert_close(own.read(), own.constrain(rows[:, 0].double() + policy.origin[0]), rtol=1e-5, atol=1e-6)
    assert shared.read().shape == ()
    # the same step has the same draws, so that a resumed run is the uninterrupted one
    policy.weights(loop.signals(problem))
    assert torch.equal(inputs.read(loop.x[:16]), rows)
    policy.discard(loop.signals(problem))
    assert own.read().shape == ()


def test_a_cycle_begins_after_the_warm_up_and_the_schedule_is_logged() -> None:
    model, policy = tuned(warmup=0.1, train_steps=2, valid_steps=2)
    loop = Loop(model, policy, steps=40)
    for _ in range(9):
        loop.one()
    # warm-up of 4 steps, then validation after steps 6 and 8, two each
    assert policy.counts.tolist() == [9, 4]
    assert policy.schedule.steps == (0, 6, 8)
    assert policy.schedule.at(5)["rate"] == pytest.approx(0.3)
    assert policy.schedule.at(8)["rate"] == pytest.approx(policy.values["rate"])
    assert policy.losses[0] == (6, 8)
    assert set(policy.report()) == {"hyperparameter/rate", "scale/rate", "validation_loss"}


def test_the_best_stretch_is_the_lowest_mean_of_the_validation_losses() -> None:
    model, policy = tuned(window=3, train_steps=1)
    loop = Loop(model, policy)
    for _ in range(2):
        loop.one()
    assert policy.best is None
    for _ in range(8):
        loop.one()
    losses = policy.losses[1]
    means = [sum(losses[i : i + 3]) / 3 for i in range(8)]
    assert policy.best is not None
    assert policy.best.loss == pytest.approx(min(means))
    assert policy.best.step == means.index(min(means)) + 3


@pytest.mark.parametrize("variant", ["stn", "delta"])
def test_a_stopped_run_goes_on_as_the_uninterrupted_one(variant: Any) -> None:
    model, policy = tuned(variant=variant)
    loop = Loop(model, policy)
    for _ in range(5):
        loop.one()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(policy.state_dict())
    for _ in range(5):
        loop.one()
    model2, policy2 = tuned(variant=variant)
    model2.load_state_dict(weights)
    policy2.load_state_dict(state)
    other = Loop(model2, policy2)
    other.step = 5
    for _ in range(5):
        other.one()
    assert torch.equal(policy.raw, policy2.raw)
    assert torch.equal(policy.free_scale, policy2.free_scale)
    assert policy.schedule == policy2.schedule
    for name, value in model.state_dict().items():
        assert torch.equal(value, model2.state_dict()[name]), name
    twin = copy.deepcopy(policy)
    assert twin.schedule == policy.schedule


def test_the_trained_model_evaluates_at_its_own_hyperparameters_without_the_policy() -> None:
    model, policy = tuned()
    loop = Loop(model, policy)
    for _ in range(6):
        loop.one()
    model.eval()
    point = next(m.inputs.point for m in model.modules() if isinstance(m, BestResponseLinear))
    torch.testing.assert_close(point, policy.raw - policy.origin)
    assert torch.equal(copy.deepcopy(model)(loop.x), model(loop.x))


def test_gates_put_into_a_trained_model_leave_it_as_it_is_at_the_first_hyperparameters() -> None:
    model, policy = tuned()
    loop = Loop(model, policy)
    model.eval()
    before = model(loop.x)
    problem = loop.problem(loop.objective, 0, 16)
    policy.weights(loop.signals(problem))
    policy.discard(loop.signals(problem))
    assert torch.equal(model(loop.x), before)
    _, authors = tuned(origin="zero")
    assert not authors.origin.any()


# ---- Delta-STN ------------------------------------------------------------------------------------------------------


def test_the_linearised_network_is_the_tangent_at_shut_gates() -> None:
    model, policy = tuned(variant="delta")
    model = model.double()
    loop = Loop(model, policy)
    loop.x = loop.x.double()
    model.eval()
    problem = loop.problem(loop.objective, 0, 16)
    inputs = next(m.inputs for m in model.modules() if isinstance(m, BestResponseLinear))
    shift = torch.randn(16, 1, dtype=torch.float64)
    (got,) = linearised_outputs(problem, inputs, shift)
    inputs.place(None)
    outputs = []
    for e in (1e-5, -1e-5):
        inputs.place(e * shift)
        outputs.append(model(loop.x[:16]))
    inputs.place(None)
    tangent = (outputs[0] - outputs[1]) / 2e-5
    torch.testing.assert_close(got, model(loop.x[:16]) + tangent, rtol=1e-6, atol=1e-8)


def test_under_delta_the_optimiser_trains_what_is_elementary_and_the_policy_what_answers() -> None:
    model, policy = tuned(variant="delta", train_steps=100)
    loop = Loop(model, policy)
    layer = model[0]
    assert isinstance(layer, BestResponseLinear)
    before = {n: p.clone() for n, p in layer.named_parameters()}
    problem = loop.problem(loop.objective, 0, 16)
    policy.weights(loop.signals(problem))
    gradient = problem.gradient()
    assert not gradient["0.weight"][8:].any()
    assert gradient["0.weight"][:8].any()
    assert "0.gate" not in gradient
    policy.advance(loop.signals(problem))
    assert torch.equal(layer.weight[:8], before["weight"][:8])
    assert torch.equal(layer.bias, before["bias"])  # type: ignore[arg-type]
    assert not torch.equal(layer.weight[8:], before["weight"][8:])
    assert not torch.equal(layer.gate, before["gate"])


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_a_model_without_gates_has_no_hypergradient() -> None:
    rate = Hyperparameter("rate", 0.3, 0, 0.9)
    with pytest.raises(IncompatibleError, match="identically zero"):
        Loop(network(TunedDropout(rate)), SelfTuning([rate])).one()


def test_gates_that_the_validation_loss_does_not_reach_are_told_so() -> None:
    model, policy = tuned()
    loop = Loop(model, policy)
    loop.one()
    apart = nn.Linear(6, 3)
    apart.add_module("aside", model)
    valid = Problem(apart, 1 * CrossEntropy(), [{"main": {"input": loop.x, "target": loop.y}}], Classification())
    for p in apart.parameters():
        p.requires_grad_(False)
    with pytest.raises(IncompatibleError, match="does not depend on the gates"):
        policy.hypergradient(valid)


def test_missing_validation_data_unused_hyperparameters_and_wrong_numbers_are_refused() -> None:
    model, policy = tuned()
    with pytest.raises(InputError, match="no validation data"):
        Loop(model, policy, validate=False).one()
    rate, idle = Hyperparameter("rate", 0.3, 0, 0.9), Hyperparameter("idle", 0.3, 0, 0.9)
    model = network(TunedDropout(rate))
    make_best_response(model, 2)
    with pytest.raises(InputError, match="Nothing uses the hyperparameter 'idle'"):
        Loop(model, SelfTuning([rate, idle])).one()
    with pytest.raises(InputError, match="n_hyper=1"):
        Loop(model, SelfTuning([rate])).one()


def test_one_weight_for_each_example_of_a_penalty_on_parameters_is_refused_and_one_for_all_works() -> None:
    def loop(per_example: bool, variant: Any = "stn") -> Loop:
        decay = Hyperparameter("decay", 1e-3, 1e-6, 1, scale="log", per_example=per_example)
        model = network()
        make_best_response(model, 1)
        policy = SelfTuning([decay], warmup=0, train_steps=1, variant=variant)
        return Loop(model, policy, CrossEntropy() + decay * L2())

    with pytest.raises(InputError, match="one value for the batch"):
        loop(True).one()
    with pytest.raises(IncompatibleError, match="use variant='stn'"):
        loop(False, "delta").one()
    whole = loop(False)
    whole.one()
    assert whole.policy.counts.tolist() == [1, 1]


def test_a_weight_on_data_is_one_for_each_example() -> None:
    weight = Hyperparameter("smooth", 0.5, 0, 2)
    model = network()
    make_best_response(model, 1)
    policy = SelfTuning([weight], warmup=0)
    loop = Loop(model, policy, CrossEntropy() + weight * ConfidencePenalty())
    for _ in range(4):
        loop.one()
    assert weight.used
    assert policy.values["smooth"] != 0.5


def test_several_micro_batches_and_a_loss_that_is_not_finite_are_refused() -> None:
    model, policy = tuned()
    loop = Loop(model, policy)
    batch = {"main": {"input": loop.x[:4], "target": loop.y[:4]}}
    problem = Problem(model, loop.objective, [batch, batch], Classification())
    with pytest.raises(IncompatibleError, match="accumulate=1"):
        policy.weights(loop.signals(problem))
    loop.one()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="hyperparameters cannot move"):
        policy.hypergradient(loop.problem(loop.objective, 20, 40))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "gamma"}, "'stn' or 'delta'"),
        ({"origin": "end"}, "'start' or 'zero'"),
        ({"lr": 0}, "learning rates"),
        ({"response_lr": -1.0}, "learning rates"),
        ({"entropy": -1}, "entropy and warmup"),
        ({"train_steps": 0}, "at least 1"),
        ({"scale": 0.0}, "must be positive"),
        ({"scale": {"other": 1.0}}, "scale names 'other'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tuned(**options)


def test_weights_that_are_auto_get_hyperparameters_of_their_own() -> None:
    policy = SelfTuning()
    policy.bind({"l2": 1e-2}, {"l2": (1e-4, 1.0)})
    (hyper,) = policy.tuned
    assert (hyper.name, hyper.scale, hyper.low, hyper.high) == ("l2", "log", 1e-4, 1.0)
    model = network()
    make_best_response(model, 1)
    loop = Loop(model, policy, CrossEntropy() + 1e-2 * L2())
    signals = loop.signals(loop.problem(loop.objective, 0, 16))
    signals.names, signals.rows = ("l2",), {"l2": {"l2": 1.0}}
    weights = policy.weights(signals)
    assert not hyper.per_example  # the penalty has one value for the batch
    assert torch.as_tensor(weights["l2"]).ndim == 0
    with pytest.raises(InputError, match="no hyperparameter"):
        SelfTuning().bind({}, {})


# ---- within fit -----------------------------------------------------------------------------------------------------


def data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=g), torch.randint(0, 3, (60,), generator=g)
    return {"input": x[:30], "target": y[:30]}, {"input": x[30:], "target": y[30:]}


@pytest.mark.parametrize("variant", ["stn", "delta"])
def test_fit_tunes_what_the_layers_of_a_model_read_and_draws_its_path(variant: Any) -> None:
    train, valid = data()
    model, policy = tuned(variant=variant, train_steps=1)
    run = poise.fit(model, "cross_entropy", train, valid, policy=policy, steps=8, batch_size=10, lr=0.1, log_every=1)
    assert policy.counts.tolist() == [8, 8]
    assert policy.values["rate"] != pytest.approx(0.3, abs=1e-6)
    assert run.history["policy/hyperparameter/rate"][-1] == pytest.approx(policy.values["rate"])
    assert run.predict(valid["input"]).shape == (30, 3)
    plain = network(TunedDropout(rate := Hyperparameter("rate", 0.3, 0, 0.9)))
    replay = ReplayedHyperparameters(policy.schedule, [rate])
    poise.fit(plain, "cross_entropy", train, policy=replay, steps=8, batch_size=10)
    assert float(rate) == pytest.approx(policy.schedule.at(7)["rate"])


def test_a_run_that_is_resumed_from_its_checkpoint_is_the_uninterrupted_one(tmp_path: Any) -> None:
    train, valid = data()

    class Breakdown:
        def on_step_end(self, state: Any) -> None:
            if state.step == 6:
                raise RuntimeError("the machine went down")

    def run(folder: Any, callbacks: Any = ()) -> tuple[nn.Module, SelfTuning]:
        model, policy = tuned()
        poise.fit(
            model, "cross_entropy", train, valid, policy=policy, steps=10, batch_size=10, lr=0.1, checkpoint=folder,
            checkpoint_steps=5, callbacks=callbacks,
        )  # fmt: skip
        return model, policy

    whole, policy = run(None)
    with pytest.raises(RuntimeError, match="went down"):
        run(tmp_path, [Breakdown()])
    model, resumed = run(tmp_path)
    assert resumed.schedule == policy.schedule
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("variant", ["stn", "delta"])
def test_an_auto_weight_of_a_formula_is_tuned_for_each_example(variant: Any) -> None:
    train, valid = data()
    policy = SelfTuning(variant=variant, warmup=0, train_steps=1)
    formula = "cross_entropy + auto(low=0.01, high=1)*confidence_penalty with best_response(n_hyper=1)"
    run = poise.fit(network(), formula, train, valid, policy=policy, steps=6, batch_size=10, lr=0.1)
    assert list(policy.values) == ["confidence_penalty"]
    assert policy.values["confidence_penalty"] != pytest.approx(0.1, abs=1e-6)
    assert isinstance(run.model[0], BestResponseLinear)  # type: ignore[index]
    assert policy.tuned[0].per_example


def test_a_formula_may_name_the_method_and_put_in_the_gates() -> None:
    train, valid = data()
    formula = (
        "cross_entropy + auto(low=0.01, high=1, policy='bilevel', method='self_tuning(warmup=0.0, train_steps=1)')*confidence_penalty "
        "with best_response(n_hyper=1)"
    )
    run = poise.fit(network(), formula, train, valid, steps=6, batch_size=10, lr=0.1)
    assert run.history["policy/hyperparameter/confidence_penalty"][-1] != pytest.approx(0.1, abs=1e-6)


def test_fit_without_validation_data_refuses() -> None:
    model, policy = tuned()
    with pytest.raises(InputError, match="no validation data"):
        poise.fit(model, "cross_entropy", data()[0], policy=policy, steps=2)


class Reader(nn.Module):
    """A small recurrent classifier of token sequences, with everything tuned that a recurrent network has."""

    def __init__(self, words: Hyperparameter, outputs: Hyperparameter, recurrent: Hyperparameter) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn, self.head = nn.Embedding(9, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)
        self.inputs = make_best_response(self, 3)
        drop_connect(self.rnn, "weight_hh_l0", recurrent)
        self.words, self.outputs = TunedDropout(words, shared_axes=(1,)), TunedDropout(outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.words(self.embed(tokens)))
        return self.head(self.outputs(states[:, -1]))


@pytest.mark.parametrize("variant", ["stn", "delta"])
def test_a_recurrent_network_is_tuned_with_dropped_weights_and_folds_into_a_plain_one(variant: Any) -> None:
    hypers = [Hyperparameter(n, 0.2, 0, 0.9, per_example=n != "recurrent") for n in ("words", "outputs", "recurrent")]
    model, policy = Reader(*hypers), SelfTuning(hypers, warmup=0, train_steps=1, variant=variant)
    g = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(9, (40, 5), generator=g), torch.randint(3, (40,), generator=g)
    before = model.rnn.parametrizations.weight_hh_l0.original.clone()  # type: ignore[union-attr]
    poise.fit(
        model, "cross_entropy", (tokens[:20], target[:20]), (tokens[20:], target[20:]), policy=policy, steps=5, batch_size=10, lr=0.1
    )  # fmt: skip
    moved = model.rnn.parametrizations.weight_hh_l0.original != before  # type: ignore[union-attr]
    assert moved[:32].any()
    assert moved[32:].any()
    assert all(value != pytest.approx(0.2, abs=1e-7) for value in policy.values.values())
    model.eval()
    folded = fold_best_response(model)
    torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-4, atol=1e-5)
