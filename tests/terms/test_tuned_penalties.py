"""Penalties of what acts: the weights of a gated network at its hyperparameters, and activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.errors import QuantityError
from poise.objective import Objective
from poise.parts import BestResponseLSTM, make_best_response
from poise.problem import Problem
from poise.readouts.supervised import Classification
from poise.terms import L2, ActivationL2, CrossEntropy, ResponseL2, TemporalActivationL2
from poise.weights import Hyperparameter
from poise.weights.bilevel.self_tuning import SelfTuning


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()


def test_on_plain_layers_and_on_shut_gates_it_is_l2() -> None:
    model = network()
    expected = L2()(dict(model.named_parameters()))
    torch.testing.assert_close(ResponseL2()(model), expected)
    make_best_response(model, 2)
    torch.testing.assert_close(ResponseL2()(model), expected)


def test_it_charges_the_weights_that_act_with_a_gradient_in_the_gates() -> None:
    model = network()
    inputs = make_best_response(model, 2)
    h = torch.tensor([1.0, -2.0], dtype=torch.float64)
    inputs.settle(h)
    by_hand = sum(w.square().sum() / 2 for w in (model[1].effective(h)[0], model[3].effective(h)[0]))  # type: ignore[operator, misc]
    value = ResponseL2()(model)
    torch.testing.assert_close(value, by_hand)
    value.backward()
    assert model[1].gate.grad[:2].any()
    lstm = BestResponseLSTM(2, 3, 1).double()
    plain = lstm.plain()
    matrices = sum(p.square().sum() / 2 for p in plain.parameters() if p.ndim == 2)
    torch.testing.assert_close(ResponseL2()(lstm), matrices)


def test_a_tuned_decay_is_shared_and_reads_the_perturbed_weights_of_the_step() -> None:
    decay = Hyperparameter("decay", 1e-2, 1e-6, 1, scale="log", per_example=False)
    model = network()
    make_best_response(model, 1)
    policy = SelfTuning([decay], warmup=0, train_steps=1)
    objective: Objective = CrossEntropy() + decay * ResponseL2()
    batch = {"main": {"input": torch.randn(5, 16).double(), "target": torch.tensor([0, 1, 2, 0, 1])}}

    from types import SimpleNamespace

    def problem(which: Objective) -> Problem:
        return Problem(model, which, [batch], Classification(), record=False)

    step = problem(objective)
    signals = SimpleNamespace(
        names=(), rows={}, problem=step, validation=problem(1 * CrossEntropy()), step=0, steps=10, lr=0.1
    )
    policy.weights(signals)  # type: ignore[arg-type]
    whole, fit = float(step.value()), float(step.value(terms=["cross_entropy"]))
    assert whole - fit == pytest.approx(float(decay.read() * ResponseL2()(model).detach()), rel=1e-9)
    assert "1.gate" in step.gradient(terms=["response_l2"])
    policy.advance(signals)  # type: ignore[arg-type]
    assert policy.counts.tolist() == [1, 1]


def test_activations_are_charged_example_by_example() -> None:
    features = torch.randn(4, 5, 3)
    torch.testing.assert_close(ActivationL2()(features), features.square().mean((1, 2)) / 2)
    steps = (features[:, 1:] - features[:, :-1]).square().mean((1, 2)) / 2
    torch.testing.assert_close(TemporalActivationL2()(features), steps)
    with pytest.raises(QuantityError, match="two steps at least"):
        TemporalActivationL2()(features[:, :1])
