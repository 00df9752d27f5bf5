from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from poise.studies.intervals import holm, t_interval, t_test

finite = st.floats(-1e3, 1e3, allow_nan=False)
samples = st.lists(finite, min_size=2, max_size=12).filter(lambda v: np.std(v) > 1e-6)


@given(samples)
def test_the_interval_is_that_of_scipy(values):
    estimate = t_interval(values)
    lower, upper = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    # Both are double precision; the relative error of a quantile is about 1e-12.
    assert estimate.lower == pytest.approx(lower, rel=1e-9, abs=1e-9)
    assert estimate.upper == pytest.approx(upper, rel=1e-9, abs=1e-9)


@given(samples)
def test_the_p_value_is_that_of_scipy_and_agrees_with_the_interval(values):
    p = t_test(values)
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-7, abs=1e-12)
    assert t_interval(values).excludes_zero() == (p < 0.05) or p == pytest.approx(0.05, rel=1e-6)


def test_a_worked_example_by_hand():
    # mean 2, sd 1, n 3: half width 4.30265 / sqrt(3)
    estimate = t_interval([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.sd) == (2.0, 1.0)
    assert estimate.upper - 2 == pytest.approx(4.302652729911275 / math.sqrt(3))


def test_the_corrected_resampled_interval_is_wider_by_the_stated_factor():
    values = [0.1, 0.3, 0.2, 0.5, 0.1]
    plain, corrected = t_interval(values), t_interval(values, variance_factor=1 / 5 + 0.2 / 0.6)
    ratio = (corrected.upper - corrected.mean) / (plain.upper - plain.mean)
    assert ratio == pytest.approx(math.sqrt((1 / 5 + 1 / 3) / (1 / 5)))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "no run finished"),
        ([0.5], "one seed gives no interval"),
        ([0.5, 0.5, 0.5], "same on every seed"),
        ([0.5, math.nan], "not finite"),
    ],
)
def test_where_the_spread_is_unknown_there_is_no_interval_but_a_reason(values, reason):
    estimate = t_interval(values)
    assert not estimate.has_interval
    assert reason in estimate.reason
    assert t_test(values) is None


def test_an_interval_is_cut_to_the_range_that_the_quantity_cannot_leave():
    estimate = t_interval([0.95, 0.99])
    assert estimate.upper > 1
    cut = estimate.within(0.0, 1.0)
    assert (cut.lower, cut.mean, cut.upper) == (estimate.lower, estimate.mean, 1.0)
    assert t_interval([0.5]).within(0.0, 1.0) == t_interval([0.5])


def test_two_formulas_that_agree_on_every_seed_have_a_difference_of_exactly_zero():
    estimate = t_interval([0.0, 0.0, 0.0])
    assert (estimate.lower, estimate.mean, estimate.upper) == (0.0, 0.0, 0.0)
    assert t_test([0.0, 0.0, 0.0]) == 1.0


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # the example of R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


def test_holm_does_not_count_comparisons_without_a_test():
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]
    assert holm([None]) == [None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_never_below_the_plain_value_and_never_above_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p)
    order = np.argsort(p_values, kind="stable")
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(order))
