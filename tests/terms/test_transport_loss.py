"""The transport loss: its value, its gradients by Danskin's theorem, and what it refuses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import poise
from poise.errors import InputError, PoiseWarning, QuantityError
from poise.terms import TransportLoss
from poise.terms.transport import pairwise_cost
from poise.transport import transport_value


def clouds(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, n, 2, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 7))
    return x, y


@pytest.mark.parametrize("k", [4, None])
def test_gradients_in_cost_and_masses_are_the_plan_and_the_potentials(k: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.rand(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.rand(2, 6, generator=generator, dtype=torch.float64).softmax(-1)

    def value(cost: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return transport_value(cost, logits.softmax(-1), b, k=k, gamma=1.0, tolerance=1e-11)[0]

    assert torch.autograd.gradcheck(value, (cost, logits), atol=1e-5)
    (gradient,) = torch.autograd.grad(value(cost, logits).sum(), cost)
    plan = transport_value(cost, logits.softmax(-1), b, k=k, tolerance=1e-11)[1]
    torch.testing.assert_close(gradient, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost", ["squared_euclidean", "euclidean", "cosine"])
def test_the_gradient_reaches_the_points_in_their_dtype(cost: str, dtype: torch.dtype) -> None:
    x, y = clouds(dtype)
    x.requires_grad_()
    found = TransportLoss(gamma=0.5, cost=cost)(x, y)  # type: ignore[arg-type]
    assert found.values.shape == (3,)
    assert found.values.dtype == found.extras["plan"].dtype == dtype
    found.values.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())
    torch.testing.assert_close(found.extras["plan"].sum(-1), torch.full((3, 6), 1 / 6, dtype=dtype), atol=1e-4, rtol=0)


def test_points_move_onto_the_target() -> None:
    x, y = clouds()
    moving = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([moving], lr=0.1)
    objective = poise.parse("transport(k=3, gamma=0.05)")
    before = float(objective(prediction=moving, target=y).detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoiseWarning)
        for _ in range(40):
            optimizer.zero_grad()
            objective(prediction=moving, target=y).backward()
            optimizer.step()
    assert float(objective(prediction=moving, target=y).detach()) < 0.3 * before


def test_a_given_cost_is_read_instead_of_points_and_the_formula_prints_back() -> None:
    objective = poise.parse("transport(k=3, cost='given')")
    assert objective.reads == ("transport_cost",)
    assert poise.parse("transport").reads == ("prediction", "target")
    assert str(poise.parse(str(objective))) == str(objective)
    cost = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0))
    copied = copy.deepcopy(objective)
    torch.testing.assert_close(objective(transport_cost=cost), copied(transport_cost=cost))
    with pytest.raises(QuantityError, match="transport"):
        objective(transport_cost=cost[0])


def test_costs_are_those_of_their_names() -> None:
    x, y = clouds()
    torch.testing.assert_close(pairwise_cost(x, y), 0.5 * torch.cdist(x, y).square())
    torch.testing.assert_close(
        pairwise_cost(x, y, "cosine"), 1 - torch.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k counts entries"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"cost": "taxi"}, "cost is one of"),
        ({"tolerance": 0.0}, "tolerance and max_iter"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"transport: {message}"):
        TransportLoss(**arguments)  # type: ignore[arg-type]


def test_an_example_without_a_plan_is_refused() -> None:
    with pytest.raises(InputError, match="transport: infeasible"):
        TransportLoss(k=1)(torch.rand(1, 5, 2), torch.rand(1, 3, 2))


def test_ties_are_told_once() -> None:
    term = TransportLoss(k=2, gamma=1.0)
    points = torch.zeros(1, 3, 2)
    with pytest.warns(PoiseWarning, match="transport: 1 of 1 examples have a marginal error"):
        term(points, torch.zeros(1, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term(points, torch.zeros(1, 2, 2))
