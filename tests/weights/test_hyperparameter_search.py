"""Searches over runs, and paths of hyperparameters: ranges, order, replay."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from poise.errors import InputError
from poise.weights import Hyperparameter
from poise.weights.hyperparameter_schedule import (
    HyperparameterSchedule,
    PerturbedHyperparameters,
    ReplayedHyperparameters,
)
from poise.weights.hyperparameter_search import BayesianSearch, GridSearch, RandomSearch, from_cube, to_cube


def several() -> list[Hyperparameter]:
    return [
        Hyperparameter("rate", 0.05, 0, 0.9),
        Hyperparameter("decay", 1e-3, 1e-6, 1, scale="log"),
        Hyperparameter("holes", 1, 0, 4, discrete=True),
        Hyperparameter("size", 4, 1, 24, discrete=True, scale="log"),
        Hyperparameter("strength", 0.5, 0, math.inf),
        Hyperparameter("factor", 0.5, 0, math.inf, scale="log"),
    ]


@pytest.mark.parametrize("hyper", several(), ids=lambda h: h.name)
def test_a_share_of_a_range_and_its_value_are_each_others_inverse(hyper: Hyperparameter) -> None:
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        value = from_cube(hyper, share)
        hyper.set(value)
        assert float(hyper) == pytest.approx(value, rel=1e-6)
        if hyper.discrete:
            assert from_cube(hyper, to_cube(hyper, value)) == value
        else:
            assert to_cube(hyper, value) == pytest.approx(share, abs=1e-6)


def test_a_grid_has_every_combination_once() -> None:
    search = GridSearch(several()[:2], 3)
    points = [search.ask() for _ in range(9)]
    assert len({tuple(p.values()) for p in points}) == 9
    with pytest.raises(InputError, match="all 9"):
        search.ask()


def test_a_random_search_is_its_seed_and_remembers_the_best() -> None:
    a, b, c = (RandomSearch(several(), seed) for seed in (0, 0, 1))
    assert [a.ask(), a.ask()] == [b.ask(), b.ask()]
    assert a.ask() != c.ask()
    with pytest.raises(InputError, match="nothing was told"):
        _ = a.best
    for loss in (3.0, math.nan, 1.0, 2.0):
        a.tell({"rate": loss}, loss)
    assert a.best == ({"rate": 1.0}, 1.0)


def test_bayesian_search_finds_a_smooth_minimum_sooner_than_random_draws() -> None:
    hypers = several()[:2]

    def loss(point: dict[str, float]) -> float:
        return (point["rate"] - 0.6) ** 2 + 0.05 * (math.log10(point["decay"]) + 2) ** 2

    def run(search: Any) -> float:
        for _ in range(15):
            point = search.ask()
            search.tell(point, loss(point))
        return search.best[1]

    ours = [run(BayesianSearch(hypers, seed=s, candidates=500)) for s in range(3)]
    theirs = [run(RandomSearch(hypers, seed=s)) for s in range(3)]
    assert sum(ours) < sum(theirs)
    assert max(ours) < 0.02


@pytest.mark.peer
def test_bayesian_search_is_not_behind_the_tree_estimator_of_optuna() -> None:
    optuna = pytest.importorskip("optuna", reason="optuna is not installed (extra 'peers')")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    hypers = several()[:2]

    def loss(rate: float, decay: float) -> float:
        return (rate - 0.6) ** 2 + 0.05 * (math.log10(decay) + 2) ** 2

    ours, theirs = [], []
    for seed in range(3):
        search = BayesianSearch(hypers, seed=seed, candidates=500)
        for _ in range(15):
            point = search.ask()
            search.tell(point, loss(point["rate"], point["decay"]))
        ours.append(search.best[1])
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        study.optimize(
            lambda t: loss(t.suggest_float("rate", 0, 0.9), t.suggest_float("decay", 1e-6, 1, log=True)), n_trials=15
        )
        theirs.append(study.best_value)
    assert sum(ours) <= sum(theirs)


def test_bad_searches_are_refused() -> None:
    with pytest.raises(InputError, match="points must be"):
        GridSearch(several(), 0)
    with pytest.raises(InputError, match="initial must be"):
        BayesianSearch(several(), initial=1)
    with pytest.raises(InputError, match="no hyperparameter"):
        RandomSearch([])


def test_a_recorded_schedule_is_replayed_step_by_step_and_survives_a_file() -> None:
    rate = Hyperparameter("rate", 0.5, 0, 1)
    values = [0.5, 0.2, 0.8]
    raws = [float(rate.unconstrain(v)) for v in values]
    schedule = HyperparameterSchedule(("rate",), (0, 10, 20), tuple((r,) for r in raws), tuple((v,) for v in values))
    assert HyperparameterSchedule.from_dict(schedule.to_dict()) == schedule
    policy = ReplayedHyperparameters(schedule, [rate])
    seen = []
    for step in range(25):
        assert policy.weights(SimpleNamespace(step=step, names=("rate",)))["rate"] == rate.read()  # type: ignore[arg-type]
        seen.append(round(float(rate), 6))
    assert seen == [0.5] * 10 + [0.2] * 10 + [0.8] * 5
    with pytest.raises(InputError, match="no 'other'"):
        ReplayedHyperparameters(schedule, [Hyperparameter("other", 0.5, 0, 1)])
    with pytest.raises(InputError, match="must rise"):
        HyperparameterSchedule(("rate",), (1, 1), ((0.0,),) * 2, ((0.5,),) * 2)
    with pytest.raises(InputError, match="one row"):
        HyperparameterSchedule(("rate",), (1,), (), ())


def test_a_value_is_shaken_around_its_start_by_noise_or_by_a_wave_and_held_by_neither() -> None:
    rate = Hyperparameter("rate", 0.68, 0, 0.9)

    def path(**options: float) -> torch.Tensor:
        policy = PerturbedHyperparameters([rate], **options)  # type: ignore[arg-type]
        found = []
        for step in range(400):
            policy.weights(SimpleNamespace(step=step, names=()))  # type: ignore[arg-type]
            found.append(float(rate))
        return torch.tensor(found)

    assert (path() - 0.68).abs().max() < 1e-6
    noise = path(std=0.05)
    assert float(noise.mean()) == pytest.approx(0.68, abs=0.01)
    assert float(noise.std()) == pytest.approx(0.05, rel=0.15)
    assert torch.equal(noise, path(std=0.05))
    wave = path(amplitude=0.1, period=100)
    assert float(wave[25]) == pytest.approx(0.78)
    assert float(wave[75]) == pytest.approx(0.58)
    assert path(std=5.0).max() <= 0.9  # cut at the ends of the range
    with pytest.raises(InputError, match="period positive"):
        PerturbedHyperparameters([rate], period=0)
