"""Features and logits of both domains in one pass, and a head that learns from labels alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from poise.errors import IncompatibleError, InputError
from poise.objective import Objective
from poise.problem import ModelView, Problem
from poise.quantities import Quantities
from poise.readouts import DomainFeatures
from poise.terms import CrossEntropy, SourceClassification, TargetClassification


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4))


def rows(n: int = 8) -> dict[str, Tensor]:
    domain = torch.where(torch.arange(n) < n // 2, 0, -1)
    return {"input": torch.randn(n, 5), "domain": domain, "target": torch.where(domain >= 0, torch.arange(n) % 4, -1)}


def read(net: nn.Module, readout: DomainFeatures, data: dict[str, Tensor]) -> Quantities:
    return readout(ModelView(net), Quantities(data), frozenset({"logits", "features"}))


def test_the_values_are_those_of_the_plain_model() -> None:
    net, data = model(), rows()
    for readout in (DomainFeatures(), DomainFeatures("2"), DomainFeatures(target_trains_head=True)):
        q = read(net, readout, data)
        torch.testing.assert_close(q["logits"], net(data["input"]))
        torch.testing.assert_close(q["features"], net[:2](data["input"]))
        assert ("frozen_head_logits" in q) is not readout.target_trains_head
        if not readout.target_trains_head:
            torch.testing.assert_close(q["frozen_head_logits"], q["logits"])
    first = read(net, DomainFeatures(), data)  # asked for in the other order
    torch.testing.assert_close(first["features"], net[:2](data["input"]))


def test_one_pass_serves_both_quantities() -> None:
    calls = []
    net = model()
    net[0].register_forward_hook(lambda *_: calls.append(1))
    q = read(net, DomainFeatures(), rows())
    _ = q["features"], q["logits"], q["probabilities"], q["frozen_head_logits"]
    assert len(calls) == 1


def gradient(objective: Objective, readout: DomainFeatures) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = model()
    return Problem(net, objective, [{"main": rows()}], readout).gradient()


def test_an_objective_on_target_rows_moves_the_features_and_not_the_head() -> None:
    guide = 1 * TargetClassification(4, refine="none")
    g = gradient(guide, DomainFeatures())
    assert {"2.weight", "2.bias"}.isdisjoint(g)
    assert float(g["0.weight"].abs().max()) > 0
    free = gradient(guide, DomainFeatures(target_trains_head=True))
    assert float(free["2.weight"].abs().max()) > 0
    torch.testing.assert_close(free["0.weight"], g["0.weight"])
    labels = 1 * SourceClassification()
    a, b = gradient(labels, DomainFeatures()), gradient(labels, DomainFeatures(target_trains_head=True))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_evaluation_elsewhere_replaces_the_head_as_well() -> None:
    net, data = model(), rows()
    problem = Problem(net, 1 * TargetClassification(4, refine="none"), [{"main": data}], DomainFeatures())
    other = model()
    at = dict(other.named_parameters())
    elsewhere = problem.value(at=at)
    torch.testing.assert_close(elsewhere, Problem(other, problem.objective, problem.batches, problem.readout).value())


def test_batches_without_a_domain_are_read_as_a_plain_classifier() -> None:
    net, data = model(), rows()
    objective = 1 * CrossEntropy()
    data = {"input": data["input"], "target": data["target"].clamp(min=0)}
    g = Problem(net, objective, [{"main": data}], DomainFeatures()).gradient()
    assert float(g["2.weight"].abs().max()) > 0


def test_models_without_a_head_are_refused() -> None:
    with pytest.raises(InputError, match="no layer of the model is taken for its head"):
        read(nn.Linear(5, 4), DomainFeatures(), rows())
    with pytest.raises(InputError, match="no submodule 'head'; it has 0, 1, 2"):
        read(model(), DomainFeatures("head"), rows())

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.head(x))
            return out

    with pytest.raises(IncompatibleError, match="called 2 times"):
        _ = read(Twice(), DomainFeatures("head"), rows())["logits"]
