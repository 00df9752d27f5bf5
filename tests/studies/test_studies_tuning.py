from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.studies.tuning import rungs, trials

SETTINGS = {"lr": 0.02, "lr_factor": 10.0}


@given(st.integers(2, 40), st.integers(0, 1000))
def test_every_formula_tries_the_same_learning_rates_however_many_weights_it_has(count, seed):
    none = trials({}, count=count, seed=seed, **SETTINGS)
    two = trials({"a": (1e-3, 1e2), "b": (0.1, 1.0)}, count=count, seed=seed, **SETTINGS)
    assert len(none) == len(two) == count
    assert [trial.lr for trial in none] == [trial.lr for trial in two]


def test_the_first_trial_is_the_default_learning_rate_and_the_middle_of_each_weight():
    first = trials({"a": (1e-3, 1e3)}, count=4, seed=5, **SETTINGS)[0]
    assert first.lr == 0.02
    assert first.weights == {"a": 1.0}


@given(st.integers(0, 100))
def test_trials_stay_in_their_ranges_and_cover_the_log_scale(seed):
    points = trials({"a": (1e-3, 1e2)}, count=64, seed=seed, **SETTINGS)
    weights = np.log10([trial.weights["a"] for trial in points])
    rates = np.log10([trial.lr for trial in points])
    assert weights.min() >= -3
    assert weights.max() <= 2
    # 64 Sobol points put one point into each 64th of a coordinate; the centre replaces one, rounding moves a border.
    assert np.histogram(weights, bins=8, range=(-3, 2))[0].min() >= 6
    assert np.histogram(rates, bins=8, range=(math.log10(0.002), math.log10(0.2)))[0].min() >= 6


def test_another_seed_tries_other_points():
    assert trials({}, count=4, seed=0, **SETTINGS)[1:] != trials({}, count=4, seed=1, **SETTINGS)[1:]


def test_halving_by_hand():
    assert rungs(9, halving=3, count=3) == [(9, pytest.approx(1 / 9)), (3, pytest.approx(1 / 3)), (1, 1.0)]
    assert rungs(2, halving=3, count=3) == [(2, pytest.approx(1 / 9)), (1, pytest.approx(1 / 3)), (1, 1.0)]
    assert rungs(5, halving=2, count=1) == [(5, 1.0)]
