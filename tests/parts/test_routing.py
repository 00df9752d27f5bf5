"""Routing: capacity is never exceeded, padding goes nowhere, gradients reach the router."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from poise.errors import InputError
from poise.parts import TopKRouter, TransportRouter, expert_capacity


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def skewed(router: torch.nn.Module) -> None:
    """Make one expert everybody's favourite."""
    with torch.no_grad():
        router.logits.weight.normal_(generator=torch.Generator().manual_seed(1))
        router.logits.weight[0] *= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_no_expert_is_even_asked_beyond_its_capacity_while_top_k_overflows(factor: float, dtype: torch.dtype) -> None:
    router, plain = TransportRouter(16, 8, capacity_factor=factor, multiple=1), TopKRouter(16, 8, 1, factor, 1)
    for each in (router, plain):
        skewed(each)
        each.to(dtype)
    routing, other = router(tokens(dtype)), plain(tokens(dtype))
    assert routing.load.capacity == math.ceil(5 * factor)
    assert bool((routing.load.demand <= routing.load.capacity).all())
    assert not routing.load.overflow.any()
    assert routing.plan is not None
    torch.testing.assert_close(routing.plan.sum(-2), torch.full((3, 8), 5.0, dtype=dtype))
    assert bool(other.load.overflow.any())
    assert other.load.largest <= other.load.capacity
    assert routing.load.dropped.sum() <= other.load.dropped.sum()


def test_tokens_may_be_limited_instead() -> None:
    router = TransportRouter(16, 8, per_token=2, by="token", multiple=1)
    skewed(router)
    routing = router(tokens())
    assert routing.plan is not None
    assert int((routing.plan > 0).sum(-1).max()) <= 2
    torch.testing.assert_close(routing.plan.sum(-1), torch.ones(3, 40))
    assert routing.load.largest <= routing.load.capacity


def test_padding_goes_nowhere_and_takes_no_place() -> None:
    router = TransportRouter(16, 8, multiple=1)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 10:] = False
    mask[1] = False
    routing = router(tokens(), mask)
    assert not routing.dispatch[~mask].any()
    assert not routing.combine[~mask].any()
    assert int(routing.load.dropped[1]) == 0


@pytest.mark.parametrize("router", [TransportRouter(16, 4), TopKRouter(16, 4), TransportRouter(16, 4, by="token")])
def test_gradients_reach_the_router_through_the_gates(router: torch.nn.Module) -> None:
    routing = router(tokens())
    torch.testing.assert_close(routing.combine, torch.where(routing.dispatch, routing.gates, 0.0))
    routing.combine.square().sum().backward()
    assert bool(router.logits.weight.grad.any())


def test_plan_weights_sum_to_at_most_one_and_copies_route_alike() -> None:
    router = TransportRouter(16, 4, combine="plan")
    routing, again = router(tokens()), copy.deepcopy(router)(tokens())
    assert float(routing.combine.sum(-1).max()) <= 1 + 1e-6
    assert torch.equal(routing.combine, again.combine)
    other = TransportRouter(16, 4, combine="plan")
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(tokens()).dispatch, routing.dispatch)


def test_capacity_is_rounded_up_to_what_hardware_likes() -> None:
    assert [expert_capacity(100, 8, c) for c in (1.0, 0.5, 100.0)] == [16, 8, 100]
    load = TransportRouter(16, 4)(tokens()).load
    assert load.least <= load.mean <= load.largest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 1}, "experts at least 2"),
        ({"experts": 4, "per_token": 5}, "more than 4 experts"),
        ({"experts": 4, "capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"experts": 4, "by": "row"}, "by is 'expert' or 'token'"),
        ({"experts": 4, "gamma": 0.0}, "gamma, steps and lr"),
        ({"experts": 4, "per_token": 0}, "k counts entries"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TransportRouter(16, **arguments)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    router = TransportRouter(16, 4)
    with pytest.raises(InputError, match=r"tokens are float \[..., n, 16\]"):
        router(torch.randn(3, 5))
    with pytest.raises(InputError, match="mask is bool"):
        router(tokens(), torch.ones(3, 40))
