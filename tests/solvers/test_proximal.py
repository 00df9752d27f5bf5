"""Proximal steps in training: exact zeros, exact sets, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import poise
from poise.errors import IncompatibleError, InputError
from poise.readouts import Regression
from poise.solvers import ProximalGradient


def regression(n: int = 80, p: int = 8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, p, generator=g)
    return {"input": x, "target": (x[:, :2].sum(1) + 0.1 * torch.randn(n, generator=g))}


def train(formula: str, solver="proximal(lr=0.05)", **options):
    data = regression()
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    run = poise.fit(
        model, formula, data, readout=Regression(), solver=solver, steps=300, batch_size=80, seed=0, **options
    )
    return run, model.weight.detach()[0]


def test_full_batch_training_ends_where_minimisation_does():
    from poise.composite import Composite
    from poise.datafits import LeastSquares
    from poise.penalties import L1, Scaled

    _, w = train("least_squares + 0.1*l1")
    data = regression()
    best = ProximalGradient().minimize(
        Composite(data["input"].double(), data["target"].double(), LeastSquares(), Scaled(L1(), 0.1), intercept=True)
    )
    torch.testing.assert_close(w.double(), best.coef, atol=1e-4, rtol=0)
    assert (w == 0).tolist() == (best.coef == 0).tolist()
    _, shrunk = train("least_squares + 0.1*l1", "sgd(lr=0.05)")
    assert bool((shrunk != 0).all())  # a gradient method leaves no zero


@pytest.mark.parametrize(
    ("formula", "holds"),
    [
        ("least_squares + nonnegative", lambda w: bool((w >= 0).all())),
        ("least_squares + box(lower=-0.1, upper=0.4)", lambda w: bool((w >= -0.1).all() and (w <= 0.4).all())),
        ("least_squares + simplex", lambda w: bool((w >= 0).all()) and abs(float(w.sum()) - 1) < 1e-5),
        ("least_squares + sparse_simplex(k=2)", lambda w: int((w > 0).sum()) == 2 and abs(float(w.sum()) - 1) < 1e-5),
        ("least_squares + 0.5*group_lasso(groups=2)", lambda w: bool((w[2:] == 0).all())),
        ("least_squares + 0.05*l0", lambda w: int((w != 0).sum()) == 2),
        ("least_squares + 0.1*mcp(knee=0.3)", lambda w: int((w != 0).sum()) == 2),
        ("least_squares + 0.3*fused_lasso", lambda w: len(torch.unique(w)) <= 4),
        ("least_squares + 0.2*elastic_net(ratio=0.8)", lambda w: int((w != 0).sum()) == 2),
    ],
)
def test_what_a_proximal_map_promises_holds_exactly(formula, holds):
    run, w = train(formula)
    assert holds(w), w
    assert run.history.terms if hasattr(run.history, "terms") else True


def test_a_set_is_refused_by_a_gradient_method():
    with pytest.raises(IncompatibleError, match=r"nonnegative.*solver=.proximal"):
        train("least_squares + nonnegative", "sgd")


def test_two_proximal_maps_on_one_parameter_are_refused():
    with pytest.raises(IncompatibleError, match="elastic_net"):
        train("least_squares + 0.1*l1 + nonnegative")


def test_state_survives():
    solver = ProximalGradient(lr=0.1)
    train("least_squares + 0.1*l1", solver)
    state = solver.state_dict()
    again = ProximalGradient()
    again.load_state_dict(state)
    assert again.lr == 0.1
    assert set(again.state_dict()["moved"]) == {"weight", "bias"}


def test_arguments_out_of_range_are_refused():
    for wrong in ({"lr": 0}, {"tol": -1.0}, {"momentum": 1.0}, {"iterations": 0}):
        with pytest.raises(InputError, match="proximal"):
            ProximalGradient(**wrong)
