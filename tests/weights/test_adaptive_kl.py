"""The controlled weight: it follows Ziegler's rule, holds its target, and survives saving and printing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import poise
from poise.errors import InputError
from poise.terms import SquaredError
from poise.weights.adaptive_kl import AdaptiveKL, adaptive_kl


@pytest.mark.parametrize(
    ("measured", "factor"), [(6.0, 1.0), (60.0, 1.02), (0.0, 0.98), (6.6, 1.01), (-3.0, 0.98), (math.nan, 1.0)]
)
def test_the_weight_moves_by_the_clipped_relative_error(measured: float, factor: float) -> None:
    module = AdaptiveKL(target=6.0, initial=0.2)
    module.advance(measured)
    assert float(module.multiplier) == pytest.approx(0.2 * factor)


def test_the_value_is_held_at_its_target_from_both_sides() -> None:
    """minimise -a + beta a^2/2: a = 1/beta, so the divergence a^2/2 is 2 at beta = 1/2, from above and from below."""
    for initial in (0.3, 0.8):
        parameter = nn.Parameter(torch.tensor([1.0]))
        module_objective = adaptive_kl(SquaredError(), target=2.0, initial=initial)
        module = next(iter(module_objective.coefficients.values()))
        for _ in range(400):
            # The minimum at the weight of now, in closed form: what a converged inner loop would give.
            with torch.no_grad():
                parameter.fill_(1.0 / float(module.multiplier))
            module_objective(prediction=parameter, target=torch.zeros(1))
            module_objective.advance()
        assert float(parameter.detach().square() / 2) == pytest.approx(2.0, rel=0.05)


def test_the_weight_is_evaluated_before_it_moves_and_is_that_of_the_formula() -> None:
    objective = poise.parse("cross_entropy + 2*adaptive_kl(kl, target=0.5, initial=0.3)")
    batch = {"logits": torch.zeros(1, 2), "target": torch.tensor([0]), "teacher_logits": torch.tensor([[4.0, 0.0]])}
    report = objective.evaluate(batch)
    assert float(report.terms["kl"].weight) == pytest.approx(0.6)
    before = objective(batch)
    torch.testing.assert_close(objective(batch), before)
    objective.advance()
    assert float(objective.evaluate(batch).terms["kl"].weight) == pytest.approx(0.6 * 1.02)
    assert str(poise.parse(str(objective))) == str(objective)


def test_the_weight_survives_saving_and_copying() -> None:
    objective = adaptive_kl(SquaredError(), target=1.0)
    objective(prediction=torch.ones(1, requires_grad=True), target=torch.full((1,), 5.0))
    objective.advance()
    fresh = adaptive_kl(SquaredError(), target=1.0)
    fresh.load_state_dict(objective.state_dict())
    for other in (fresh, copy.deepcopy(objective)):
        (module,) = other.coefficients.values()
        assert float(module.multiplier) == pytest.approx(0.2 * 1.02)


def test_bad_arguments_are_refused_in_words() -> None:
    for arguments in ({"target": 0.0}, {"initial": -1.0}, {"gain": 0.0}):
        with pytest.raises(InputError, match="must be positive"):
            AdaptiveKL(**arguments)
    with pytest.raises(InputError, match="clip must lie"):
        AdaptiveKL(clip=20.0)
    with pytest.raises(InputError, match="has one already"):
        adaptive_kl(adaptive_kl(SquaredError()))
