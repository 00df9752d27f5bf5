"""A weight for every training example: what it weighs, how gradients reach it, state, bad input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import poise
from poise.errors import InputError, QuantityError
from poise.objective import Objective
from poise.quantities import Quantities
from poise.terms import L2, CrossEntropy, EarlyLearning
from poise.weights.per_sample import PerSampleWeight

LOGITS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
TARGET, INDEX = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 2, 2, 0])


def numbers(n: int = 6) -> PerSampleWeight:
    weight = PerSampleWeight(n)
    weight.raw.copy_(torch.linspace(-2, 2, n))
    return weight


@pytest.mark.parametrize("transform", ["sigmoid", "softplus", "exp", "identity"])
def test_the_objective_is_the_mean_of_weights_found_by_index_times_values(transform: str) -> None:
    weight = PerSampleWeight(6, init=0.3, transform=transform)  # type: ignore[arg-type]
    weight.raw.copy_(torch.linspace(-1, 1, 6))
    values = nn.functional.cross_entropy(LOGITS, TARGET, reduction="none")
    expected = (weight.values[INDEX].float() * values).mean()
    for objective in (weight * CrossEntropy(), CrossEntropy() * weight):
        assert isinstance(objective, Objective)
        torch.testing.assert_close(objective(logits=LOGITS, target=TARGET, index=INDEX), expected)


def test_equal_weights_scale_the_term_and_the_rest_of_the_sum_stays() -> None:
    weight = PerSampleWeight(6, init=0.0)
    objective = 2 * (weight * CrossEntropy()) + CrossEntropy()
    total = objective(logits=LOGITS, target=TARGET, index=INDEX)
    torch.testing.assert_close(total, 2 * nn.functional.cross_entropy(LOGITS, TARGET))
    assert objective.labels == ("cross_entropy", "cross_entropy#2")
    assert "index" in objective.reads


def test_gradients_reach_only_the_weights_of_the_batch_through_a_functional_call() -> None:
    weight = numbers()
    objective = weight * CrossEntropy()
    raw = weight.raw.clone().requires_grad_()
    given = Quantities({"logits": LOGITS, "target": TARGET, "index": INDEX})
    loss = torch.func.functional_call(objective, {weight.name_in(objective): raw}, (given,))
    (gradient,) = torch.autograd.grad(loss, raw)
    s = raw.detach().sigmoid()
    values = nn.functional.cross_entropy(LOGITS, TARGET, reduction="none").double()
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, INDEX, values / 4) * s * (1 - s)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert (gradient[[1, 3, 4]] == 0).all()


def test_in_a_run_the_weights_stand_still_and_decide_which_examples_teach() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    truth = (x[:, 0] > 0).long()
    wrong = truth.clone()
    wrong[:24] = 1 - wrong[:24]
    weight = PerSampleWeight(60, init=5.0)
    weight.raw[:24] = -20.0
    run = poise.fit(
        nn.Linear(5, 2), weight * CrossEntropy(), {"input": x, "target": wrong}, solver="sgd", lr=0.5, epochs=30
    )
    assert float((run.predict(x).argmax(1) == truth).float().mean()) > 0.9
    assert float(weight.raw[0]) == -20.0


def test_memories_of_the_weighed_term_advance_and_its_state_is_saved() -> None:
    weight = numbers()
    objective = weight * EarlyLearning()
    objective.bind(examples=6, classes=3)
    index = torch.tensor([5, 2, 1, 0])
    objective(logits=LOGITS, target=TARGET, index=index)
    objective.advance()
    twin = copy.deepcopy(objective)
    assert set(twin.state_dict()) == set(objective.state_dict())
    held = io.BytesIO()
    torch.save(objective, held)
    held.seek(0)
    again = torch.load(held, weights_only=False)
    with torch.no_grad():
        expected = objective.eval()(logits=LOGITS, target=TARGET, index=index)
        torch.testing.assert_close(again.eval()(logits=LOGITS, target=TARGET, index=index), expected)


def test_a_batch_without_sample_ids_is_named() -> None:
    with pytest.raises(QuantityError, match="reads 'index'"):
        (numbers() * CrossEntropy())(logits=LOGITS, target=TARGET)


def test_an_index_beyond_the_weights_is_named() -> None:
    with pytest.raises(QuantityError, match="weights for examples 0 to 2"):
        (PerSampleWeight(3) * CrossEntropy())(logits=LOGITS, target=TARGET, index=INDEX)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerSampleWeight(0), "at least 1"),
        (lambda: PerSampleWeight(3, transform="square"), "transform is one of"),
        (lambda: PerSampleWeight(3, init=float("nan")), "init must be finite"),
        (lambda: PerSampleWeight(3) * L2(), "no values per example"),
        (lambda: PerSampleWeight(3).name_in(nn.Linear(1, 1)), "does not hold"),
    ],
)
def test_bad_input_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


def test_weights_are_no_trained_parameters() -> None:
    weight = numbers()
    assert not list(weight.parameters())
    assert isinstance(weight.raw, Tensor)
    assert not list((weight * CrossEntropy()).parameters())
