"""The ready bilevel problems: their constants are true, and MAID improves each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.errors import InputError
from poise.tasks.bilevel_denoising import china_crops, foe_denoising, psnr, tv_denoising
from poise.tasks.bilevel_regression import logistic_weights, quadratic
from poise.tasks.bilevel_task import BilevelTask
from poise.weights.bilevel import MAID
from poise.weights.bilevel.linear_systems import largest_eigenvalue

CORNERS = ((150, 200), (20, 60))


def tasks() -> list[Any]:
    return [
        pytest.param(lambda: quadratic(largest=10.0), "gap", {"step0": 0.1}, id="quadratic"),
        pytest.param(lambda: tv_denoising(CORNERS, 24), "psnr", {"step0": 0.1}, id="tv"),
        pytest.param(lambda: tv_denoising(CORNERS, 24, learn_smoothing=True), "psnr", {"step0": 0.1}, id="tv2"),
        pytest.param(lambda: foe_denoising(4, 3, CORNERS, 24), "psnr", {}, id="foe"),
        pytest.param(lambda: logistic_weights(train=300), "validation loss", {"step0": 10.0}, id="digits"),
    ]


def curvature(task: BilevelTask, x: torch.Tensor) -> float:
    derivatives = task.levels.linearise((x,), task.theta)
    return largest_eigenvalue(
        lambda v: derivatives.hessian_product((v.reshape(x.shape),))[0].reshape(1, -1), x.reshape(1, -1)
    )


@pytest.mark.parametrize(("build", "measure", "options"), tasks())
def test_maid_improves_every_task(build: Any, measure: str, options: dict[str, float]) -> None:
    task = build()
    method = MAID(task.levels, task.theta, task.x, **{**task.constants, **options})
    method.run(max_outer=2)
    before = task.measures[measure](method.x, method.theta)
    method.run(budget=300)
    after = task.measures[measure](method.x, method.theta)
    assert (after > before) == (measure == "psnr")
    assert any(s.accepted for s in method.trace)


@pytest.mark.parametrize(("build", "measure", "options"), tasks())
def test_the_constants_of_every_task_are_bounds(build: Any, measure: str, options: dict[str, float]) -> None:
    task = build()
    x = task.x[0]
    smooth = task.constants.get("smoothness")
    if smooth is not None:
        for point in (x, x + 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))):
            bound = float(smooth(task.theta)) if callable(smooth) else smooth
            assert curvature(task, point) <= bound * (1 + 1e-9)
    upper = task.constants["upper_lipschitz"]
    one, two = x, x + 0.1
    slope = lambda p: task.levels.upper_gradients((p,), task.theta)[1][0]  # noqa: E731
    assert float((slope(two) - slope(one)).norm()) <= upper * float((two - one).norm()) * (1 + 1e-9)


def test_crops_are_grey_and_of_the_size_that_was_asked_for() -> None:
    crops = china_crops(CORNERS, 32)
    assert crops.shape == (2, 32, 32)
    assert 0 <= float(crops.min()) < float(crops.max()) <= 1
    assert psnr(crops, crops + 0.1) == pytest.approx(20.0)


def test_what_does_not_fit_is_refused() -> None:
    for call in (
        lambda: china_crops(((400, 0),)),
        lambda: tv_denoising(noise=0.0),
        lambda: foe_denoising(filters=0),
        lambda: quadratic(largest=0.5),
        lambda: logistic_weights(train=1500, valid=500),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.slow
def test_640_learned_weights_beat_the_best_single_weight_of_a_grid() -> None:
    from poise.claims.p04 import _digits

    figures = _digits(0)
    assert figures["digits/validation loss"] < figures["digits/validation loss of the best single weight"]
