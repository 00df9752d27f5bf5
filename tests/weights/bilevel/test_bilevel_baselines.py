"""What BO-REP and the penalty method are compared with: every rival finds the solution, and its step is the one of its paper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from poise.errors import InputError
from poise.weights.bilevel.descent import AIDCG, ITD, StocBiO
from poise.weights.bilevel.first_order import BOME, F2SA, VPBGD
from poise.weights.bilevel.levels import Levels
from poise.weights.bilevel.method import BilevelMethod
from poise.weights.bilevel.single_loop import SOBA, TTSA

A, B = 2.0, 1.0
ZERO = torch.zeros(1, dtype=torch.float64)


def scalar() -> Levels:
    return Levels(lambda x, u, _: (x[0] - A * u[0]).square().sum() / 2, lambda x, u, _: (x[0] - B).square().sum() / 2)


METHODS: dict[str, Callable[[], BilevelMethod]] = {
    "AID-CG": lambda: AIDCG(scalar(), [ZERO], [ZERO], lr=0.1, inner_lr=0.5),
    "StocBiO": lambda: StocBiO(scalar(), [ZERO], [ZERO], lr=0.1, inner_lr=0.5, system_lr=0.5),
    "ITD": lambda: ITD(scalar(), [ZERO], [ZERO], lr=0.1, inner_lr=0.5),
    "SOBA": lambda: SOBA(scalar(), [ZERO], [ZERO], lr=0.05, inner_lr=0.5, system_lr=0.5),
    "MA-SOBA": lambda: SOBA(scalar(), [ZERO], [ZERO], lr=0.05, inner_lr=0.5, system_lr=0.5, momentum=0.5),
    "TTSA": lambda: TTSA(scalar(), [ZERO], [ZERO], lr=0.02, inner_lr=0.5, system_lr=0.3),
    "F2SA": lambda: F2SA(scalar(), [ZERO], [ZERO], lr=0.1, inner_lr=0.5),
    "V-PBGD": lambda: VPBGD(scalar(), [ZERO], [ZERO], gamma=5.0, lr=0.05, inner_lr=0.5),
    "BOME": lambda: BOME(scalar(), [ZERO], [ZERO], lr=0.05, inner_lr=0.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_rival_finds_the_best_upper_variable(name: str) -> None:
    assert float(METHODS[name]().run(250).theta[0]) == pytest.approx(B / A, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_rival_equals_the_uninterrupted_one(name: str) -> None:
    whole, half, resumed = METHODS[name]().run(12), METHODS[name]().run(5), METHODS[name]()
    resumed.load_state_dict(half.state_dict())
    for other in (resumed, copy.deepcopy(half)):
        assert torch.equal(other.run(7).theta[0], whole.theta[0])


def test_soba_moves_everything_from_the_old_point() -> None:
    x, u = 0.4, 0.3
    method = SOBA(scalar(), [ZERO + x], [ZERO + u], lr=0.1, inner_lr=0.5, system_lr=0.25)
    method.q = (ZERO + 0.2,)
    method.step()
    assert float(method.x[0]) == pytest.approx(x - 0.5 * (x - A * u))
    assert float(method.q[0]) == pytest.approx(0.2 - 0.25 * (0.2 - (x - B)))
    assert float(method.theta[0]) == pytest.approx(u - 0.1 * (A * 0.2))  # J' = -a


def test_the_randomly_truncated_series_is_right_on_average() -> None:
    levels = Levels(
        lambda x, u, _: 0.8 * x[0].square().sum() / 2 - (x[0] * u[0]).sum(),
        lambda x, u, _: (x[0] - B).square().sum() / 2,
    )
    found = []
    for seed in range(300):
        method = TTSA(levels, [ZERO + 3.0], [ZERO], lr=1.0, inner_lr=1e-12, system_lr=0.5, terms=4, seed=seed)
        method._checked = True
        method.step()
        found.append(-method.theta[0])
    series = sum(0.5 * (1 - 0.5 * 0.8) ** p for p in range(4)) * (3.0 - B)
    assert float(torch.cat(found).mean()) == pytest.approx(series, rel=0.08)


def test_bome_takes_the_multiplier_that_makes_the_gap_fall() -> None:
    method = BOME(scalar(), [ZERO + 1.0], [ZERO], lr=0.1, inner_lr=0.5, inner_steps=50, eta=0.5)
    method.step()
    z = 0.5**50
    gap = torch.tensor([1.0, -A * (1.0 - z)], dtype=torch.float64)  # in x, and in theta with z held
    upper = torch.tensor([0.0, 0.0], dtype=torch.float64)
    weight = max(0.0, float((0.5 * gap @ gap - upper @ gap) / (gap @ gap)))
    assert float(method.x[0]) == pytest.approx(1.0 - 0.1 * weight * float(gap[0]))
    assert float(method.theta[0]) == pytest.approx(-0.1 * weight * float(gap[1]))


def test_vpbgd_descends_on_the_penalised_objective() -> None:
    method = VPBGD(scalar(), [ZERO + 1.0], [ZERO], gamma=3.0, lr=0.1, x_lr=0.05, inner_lr=0.5, inner_steps=1)
    method.step()
    z = 1.0 - 0.5 * 1.0
    assert float(method.x[0]) == pytest.approx(1.0 - 0.05 * (0.0 + 3.0 * 1.0))
    assert float(method.theta[0]) == pytest.approx(-0.1 * 3.0 * (-A * 1.0 + A * z))


def test_f2sa_steps_by_the_rates_of_its_paper() -> None:
    method = F2SA(scalar(), [ZERO + 1.0], [ZERO], lr=0.1, inner_lr=0.2, inner_steps=1)
    method.run(3)
    sigma, k = method.sigma, method.steps
    x, z, u = (float(t[0]) for t in (method.x[0], method.z[0], method.theta[0]))
    method.step()
    new_x = x - 0.2 * (1 + k) ** (-5 / 7) * ((x - B) + (x - A * u) / sigma)
    new_z = z - 0.2 * (1 + k) ** (-4 / 7) * (z - A * u)
    assert float(method.x[0]) == pytest.approx(new_x)
    assert float(method.z[0]) == pytest.approx(new_z)
    assert 1 / sigma == pytest.approx(1 + sum(0.1 * (i + 1) ** (-6 / 7) for i in range(3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VPBGD(scalar(), [ZERO], [ZERO], gamma=0.0, lr=1, inner_lr=1), "gamma must be positive"),
        (lambda: BOME(scalar(), [ZERO], [ZERO], eta=-1.0, lr=1, inner_lr=1), "eta must be positive"),
        (lambda: SOBA(scalar(), [ZERO], [ZERO], lr=0.0, inner_lr=1, system_lr=1), "lr must be positive"),
        (lambda: TTSA(scalar(), [ZERO], [ZERO], lr=1.0, inner_lr=1, terms=0), "terms must be positive"),
        (lambda: AIDCG(scalar(), [ZERO], [ZERO], lr=1.0, inner_lr=1, inner_steps=0), "inner_steps must be positive"),
    ],
)
def test_bad_input_is_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
