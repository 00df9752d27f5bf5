"""Laws of the optimiser's groups and of projections after a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import poise
from poise.errors import InputError
from poise.parts import compand
from poise.solvers import ClampWeights, MaxNorm, parameter_groups
from poise.solvers.torch_optimizers import TorchOptimizer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3))


def test_every_trained_parameter_stands_in_exactly_one_group() -> None:
    net = model()
    net[3].bias.requires_grad_(False)
    net.append(net[3])  # shared: listed once
    groups = parameter_groups(net, weight_decay=0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted({id(p) for p in net.parameters() if p.requires_grad})


def test_matrices_and_kernels_decay_and_nothing_else_does() -> None:
    groups = {g["name"]: g for g in parameter_groups(model(), weight_decay=0.1)}
    assert [p.dim() for p in groups["decay"]["params"]] == [4, 2]
    assert groups["decay"]["weight_decay"] == 0.1
    assert groups["no_decay"]["weight_decay"] == 0
    assert "lr" not in groups["decay"]


def test_the_gain_of_weight_normalisation_does_not_decay() -> None:
    groups = {g["name"]: g for g in parameter_groups(weight_norm(nn.Linear(4, 3)), weight_decay=0.1)}
    assert [tuple(p.shape) for p in groups["decay"]["params"]] == [(3, 4)]


def test_slow_parameters_need_a_learning_rate_and_keep_their_ratio_under_a_schedule() -> None:
    net = model()
    compand(net, learn=True)
    with pytest.raises(InputError, match=r"lr=\.\.\. must be given"):
        parameter_groups(net)
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.5, multiplier=0.02), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["slow"] == pytest.approx(0.02 * rates["decay"])


def test_weights_that_decay_in_their_own_space_stand_apart() -> None:
    net = model()
    compand(net, decay_on="w")
    groups = {g["name"]: g for g in parameter_groups(net, weight_decay=0.1)}
    assert groups["weight_space"]["weight_decay"] == 0
    assert groups["weight_space"]["weight_space_decay"] == 0.1
    assert len(groups["weight_space"]["params"]) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", -1.0), ("lr", -0.1), ("multiplier", -0.1), ("lr", float("nan"))]
)
def test_a_negative_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        parameter_groups(model(), **{name: value})


def test_a_named_optimiser_keeps_a_and_b_slow_and_free_of_decay() -> None:
    net = model()
    handle = compand(net, learn=True)
    solver = TorchOptimizer("adam", lr=0.01, weight_decay=0.1)
    solver.bind(net, poise.parse("cross_entropy"))
    assert solver.optimizer is not None
    curve = {id(p) for c in handle.companders.values() for p in (c.log_a, c.log_b)}
    for group in solver.optimizer.param_groups:
        slow = {id(p) in curve for p in group["params"]}
        assert slow in ({True}, {False})
        assert (group["lr"], group["weight_decay"]) == ((pytest.approx(0.001), 0.0) if slow == {True} else (0.01, 0.1))


def test_a_named_optimiser_of_a_plain_model_has_the_single_group_of_pytorch() -> None:
    net = model()
    solver = TorchOptimizer("sgd", lr=0.1, weight_decay=0.1)
    solver.bind(net, poise.parse("cross_entropy"))
    assert solver.optimizer is not None
    assert [len(g["params"]) for g in solver.optimizer.param_groups] == [len(list(net.parameters()))]


def test_a_named_optimiser_refuses_decay_that_it_cannot_apply() -> None:
    net = model()
    compand(net, decay_on="w")
    TorchOptimizer("sgd", lr=0.1).bind(net, poise.parse("cross_entropy"))
    with pytest.raises(InputError, match=r"decay_on='w'.*handle\.follow"):
        TorchOptimizer("sgd", lr=0.1, weight_decay=0.1).bind(net, poise.parse("cross_entropy"))


def test_max_norm_bounds_rows_and_leaves_short_ones_as_they_are() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[1].mul_(0.01)
    before = layer.weight.detach().clone()
    MaxNorm(layer, 1.0)()
    scale = (1.0 / before.norm(dim=1)).clamp(max=1.0)
    torch.testing.assert_close(layer.weight, before * scale[:, None], rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.weight[1], before[1])


def test_projections_follow_every_step_and_stop_when_removed() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    handle = ClampWeights(layer, 0.25).follow(optimizer)
    layer.weight.grad = torch.full_like(layer.weight, 100.0)
    optimizer.step()
    assert bool((layer.weight == -0.25).all())
    handle.remove()
    optimizer.step()
    assert float(layer.weight.abs().max()) > 1


def test_projections_refuse_what_they_cannot_bound() -> None:
    with pytest.raises(InputError, match="limit must be finite"):
        MaxNorm(nn.Linear(2, 2), 0.0)
    with pytest.raises(InputError, match="no weight of two dimensions"):
        ClampWeights(nn.Linear(2, 2), 1.0, include="conv*")
    companded = nn.Linear(2, 2)
    compand(companded)
    with pytest.raises(InputError, match="parametrized"):
        MaxNorm(companded, 1.0)
