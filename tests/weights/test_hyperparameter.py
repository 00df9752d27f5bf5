"""Hyperparameters: ranges, their inverses, what is read of them, and the errors of bad ranges."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from poise.errors import InputError
from poise.terms import L2, CrossEntropy
from poise.weights.hyperparameter import Hyperparameter, check_names

RANGES: dict[str, dict[str, Any]] = {
    "interval": {"start": 0.3, "low": -1, "high": 2},
    "half-line": {"start": 0.3, "low": 0, "high": math.inf},
    "shifted half-line": {"start": 7.0, "low": 2, "high": math.inf},
    "log interval": {"start": 1e-3, "low": 1e-6, "high": 1.0, "scale": "log"},
    "log half-line": {"start": 0.5, "low": 0, "high": math.inf, "scale": "log"},
    "shifted log half-line": {"start": 3.0, "low": 1, "high": math.inf, "scale": "log"},
}


@pytest.mark.parametrize("kind", RANGES)
def test_the_start_is_the_value_at_first(kind: str) -> None:
    hyper = Hyperparameter("h", **RANGES[kind])
    assert float(hyper) == pytest.approx(RANGES[kind]["start"], rel=1e-12)


@pytest.mark.parametrize("kind", RANGES)
@settings(max_examples=30, deadline=None)
@given(raw=st.floats(-12, 12))
def test_the_inverse_gives_the_variable_back_and_every_value_lies_in_the_range(kind: str, raw: float) -> None:
    hyper = Hyperparameter("h", **RANGES[kind])
    value = hyper.constrain(torch.tensor(raw, dtype=torch.float64))
    assert hyper.low < float(value) < hyper.high
    # near an end of the interval 1 - sigmoid has lost digits, e^12 of them
    assert float(hyper.unconstrain(value)) == pytest.approx(raw, abs=1e-9)


@pytest.mark.parametrize("kind", RANGES)
def test_the_value_rises_with_the_variable_and_its_gradient_is_the_difference_quotient(kind: str) -> None:
    hyper = Hyperparameter("h", **RANGES[kind])
    raw = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert (hyper.constrain(raw).diff() > 0).all()
    assert torch.autograd.gradcheck(hyper.constrain, raw)


@settings(max_examples=30, deadline=None)
@given(raw=st.floats(-1e3, 1e3), high=st.integers(1, 30))
def test_a_discrete_value_is_a_whole_number_of_its_range(raw: float, high: int) -> None:
    hyper = Hyperparameter("holes", 1, 0, high, discrete=True)
    value = float(hyper.constrain(torch.tensor(raw, dtype=torch.float64)))
    assert value == int(value)
    assert 0 <= value <= high


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_every_discrete_value_comes_back_from_its_own_variable(scale: Any) -> None:
    hyper = Hyperparameter("holes", 1, 1, 24, discrete=True, scale=scale)
    values = torch.arange(1, 25, dtype=torch.float64)
    assert torch.equal(hyper.constrain(hyper.unconstrain(values)), values)
    half = Hyperparameter("holes", 3, 0, math.inf, discrete=True)
    assert torch.equal(half.constrain(half.unconstrain(values)), values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.0}, "low must lie below high"),
        ({"low": 0.0, "high": 0.0}, "low must lie below high"),
        ({"low": -math.inf, "high": 0.0}, "must end below"),
        ({"low": math.nan, "high": 0.0}, "must be numbers"),
        ({"low": 0.0, "high": 0.4}, "lies outside"),
        ({"low": 0.5, "high": 1.0}, "never reached"),
        ({"low": 0.0, "high": 1.0, "scale": "log"}, "on a log scale the range must be positive"),
        ({"low": -1.0, "high": math.inf, "scale": "log"}, "on a log scale"),
        ({"low": 0.0, "high": 1.0, "scale": "cube"}, "'linear' or 'log'"),
        ({"low": 0.0, "high": 4.0, "discrete": True}, "whole numbers"),
    ],
)
def test_a_bad_range_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Hyperparameter("rate", 0.5, **arguments)


def test_a_discrete_range_of_one_value_and_a_start_beside_it_are_refused() -> None:
    with pytest.raises(InputError, match="two values at least"):
        Hyperparameter("holes", 2, 2, 2, discrete=True)
    with pytest.raises(InputError, match="outside the range"):
        Hyperparameter("holes", 5, 0, 4, discrete=True)
    with pytest.raises(InputError, match="name has letters"):
        Hyperparameter("two words", 0.5, 0, 1)


def test_placed_variables_are_read_one_for_each_example_until_they_are_taken_away() -> None:
    rate = Hyperparameter("rate", 0.5, 0, 1)
    x = torch.zeros(3, 4, 5)
    assert rate.read(x).shape == ()
    rate.place(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    assert rate.read(x).shape == (3, 1, 1)
    assert rate.read(x.transpose(0, 1), axis=1).shape == (1, 3, 1)
    assert rate.read(x).dtype == torch.float32
    with pytest.raises(InputError, match="3 values"):
        rate.read(torch.zeros(4, 3))
    rate.place(None)
    assert float(rate.read()) == 0.5


def test_what_examples_share_takes_one_value() -> None:
    decay = Hyperparameter("decay", 0.5, 0, 1, per_example=False)
    decay.place(torch.tensor(0.0))
    with pytest.raises(InputError, match="shared by the examples"):
        decay.place(torch.zeros(3))


def test_a_gradient_flows_through_what_is_placed_with_a_graph() -> None:
    rate = Hyperparameter("rate", 0.5, 0, 2)
    h = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    rate.place(h)
    (gradient,) = torch.autograd.grad(rate.read().sum(), h)
    assert float(gradient) == pytest.approx(0.5)
    copy.deepcopy(rate)  # a placed graph does not stand in the way


def test_it_is_a_weight_whose_value_is_read_at_each_evaluation() -> None:
    decay = Hyperparameter("decay", 0.5, 0, 1, per_example=False)
    objective = CrossEntropy() + decay * L2()
    quantities = {
        "logits": torch.zeros(2, 3),
        "target": torch.tensor([0, 1]),
        "parameters": {"w": torch.ones(2, 2)},
    }
    assert float(objective(quantities)) == pytest.approx(math.log(3) + 0.5 * 2)
    decay.set(0.25)
    assert float(objective(quantities)) == pytest.approx(math.log(3) + 0.25 * 2)
    assert "<decay>" in str(objective)


def test_one_value_for_each_example_weighs_each_example() -> None:
    weight = Hyperparameter("weight", 1.0, 0, 4)
    weight.place(weight.unconstrain(torch.tensor([1.0, 3.0])))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    values = nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    got = (weight * CrossEntropy())(logits=logits, target=torch.tensor([0, 0]))
    torch.testing.assert_close(got, (values * torch.tensor([1.0, 3.0], dtype=torch.float64)).mean())


def test_it_is_saved_and_copied_with_a_model_and_stays_in_float64() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Hyperparameter("rate", 0.25, 0, 1))
    model.half()
    assert model[1].raw.dtype == torch.float64
    other = copy.deepcopy(model)
    other[1].set(0.75)
    model.load_state_dict(other.state_dict())
    assert float(model[1]) == pytest.approx(0.75)
    assert not list(model[1].parameters())


def test_a_move_that_is_not_finite_is_refused() -> None:
    rate = Hyperparameter("rate", 0.25, 0, 1)
    rate.move(torch.tensor(0.0))
    assert float(rate) == 0.5
    with pytest.raises(InputError, match="would become nan"):
        rate.move(math.nan)
    with pytest.raises(InputError, match="inside"):
        rate.set(1.0)


def test_names_are_given_once() -> None:
    rate = Hyperparameter("rate", 0.25, 0, 1)
    assert check_names([rate], "a policy") == (rate,)
    with pytest.raises(InputError, match="no hyperparameter"):
        check_names([], "a policy")
    with pytest.raises(InputError, match="two hyperparameters are called 'rate'"):
        check_names([rate, copy.deepcopy(rate)], "a policy")
    with pytest.raises(InputError, match="tunes Hyperparameters"):
        check_names([0.3], "a policy")  # type: ignore[list-item]
