"""Laws of the calibration and ranking metrics."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError
from poise.metrics.calibration import (
    brier_score,
    calibration_error,
    negative_log_likelihood,
    reliability,
    risk_coverage,
)


def predictions(
    n: int, classes: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=dtype)
    labels = torch.where(
        torch.rand(n, generator=generator) < 0.6,
        logits.argmax(1),
        torch.randint(classes, (n,), generator=generator),
    )
    return logits, labels


def naive_calibration_error(probs: Tensor, labels: Tensor, bins: int) -> float:
    """The definition read aloud: one loop over bins, one mask per bin, edges (lo, hi]."""
    confidence, prediction = probs.max(1)
    correct = (prediction == labels).double()
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            error += float(inside.double().mean() * (confidence[inside].mean() - correct[inside].mean()).abs())
    return error


def naive_area(confidence: list[float], correct: list[bool]) -> tuple[float, float]:
    """AURC and E-AURC by two plain loops over examples in the order of falling confidence."""
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    errors, area = 0, 0.0
    for rank, i in enumerate(order, start=1):
        errors += not correct[i]
        area += errors / rank
    n = len(order)
    best = sum(i / (n - errors + i) for i in range(1, errors + 1))
    return area / n, (area - best) / n


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), classes=st.integers(2, 7), bins=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_calibration_error_equals_its_definition(n: int, classes: int, bins: int, seed: int) -> None:
    logits, labels = predictions(n, classes, seed)
    probs = logits.softmax(1)
    # float64 sums of at most 200 numbers below 1
    assert calibration_error(probs, labels, bins) == pytest.approx(
        naive_calibration_error(probs, labels, bins), abs=1e-12
    )


@pytest.mark.peer
@pytest.mark.parametrize(("norm", "name"), [(1, "l1"), (2, "l2"), (math.inf, "max")])
@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_error_agrees_with_torchmetrics(norm: float, name: str, bins: int) -> None:
    torchmetrics = pytest.importorskip(
        "torchmetrics.classification", reason="torchmetrics is not installed (extra 'peers')"
    )
    logits, labels = predictions(4000, 10, seed=3, dtype=torch.float32)
    probs = logits.softmax(1)
    peer = torchmetrics.MulticlassCalibrationError(num_classes=10, n_bins=bins, norm=name)(probs, labels)
    # the peer accumulates in float32; no confidence lies on an edge, where the peer takes [lo, hi) and Poise (lo, hi]
    assert calibration_error(probs, labels, bins, norm) == pytest.approx(float(peer), abs=2e-6)


@pytest.mark.peer
def test_binary_calibration_error_of_the_prediction_agrees_with_two_classes_of_torchmetrics() -> None:
    torchmetrics = pytest.importorskip(
        "torchmetrics.classification", reason="torchmetrics is not installed (extra 'peers')"
    )
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(3000, generator=generator)
    labels = (torch.rand(3000, generator=generator) < p**2).long()
    peer = torchmetrics.MulticlassCalibrationError(num_classes=2, n_bins=10, norm="l1")(
        torch.stack([1 - p, p], 1), labels
    )
    assert calibration_error(p, labels) == pytest.approx(float(peer), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_confidence_on_an_edge_belongs_to_the_lower_bin_in_every_dtype(dtype: torch.dtype) -> None:
    for bins in (4, 5, 10):
        for edge in range(math.ceil(bins / 2) + 1, bins + 1):
            p = torch.tensor([edge / bins], dtype=torch.float64).to(dtype)
            assert int(reliability(p, torch.tensor([1]), bins).examples.argmax()) == edge - 1


def test_a_perfectly_sure_and_right_model_has_no_calibration_error() -> None:
    labels = torch.tensor([0, 2, 1])
    probs = torch.nn.functional.one_hot(labels, 3).float()
    assert calibration_error(probs, labels) == 0.0
    assert brier_score(probs, labels) == 0.0


def test_a_sure_and_wrong_model_has_calibration_error_one_and_brier_two() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    labels = torch.tensor([1, 1])
    assert calibration_error(probs, labels) == 1.0
    assert brier_score(probs, labels) == 2.0


def test_the_maximum_norm_bounds_the_others() -> None:
    logits, labels = predictions(500, 5, seed=1)
    probs = logits.softmax(1)
    one, two, top = (calibration_error(probs, labels, norm=norm) for norm in (1, 2, math.inf))
    assert one <= two <= top


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 1, width=16), st.booleans()), min_size=1, max_size=60, unique_by=lambda row: row[0]
    )
)
def test_risk_coverage_equals_its_definition_where_no_confidence_repeats(rows: list[tuple[float, bool]]) -> None:
    confidence, correct = [row[0] for row in rows], [row[1] for row in rows]
    _, aurc, eaurc = risk_coverage(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct))
    expected = naive_area(confidence, correct)
    assert aurc == pytest.approx(expected[0], abs=1e-12)
    assert eaurc == pytest.approx(expected[1], abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40),
    seed=st.integers(0, 1000),
)
def test_risk_coverage_does_not_depend_on_the_order_of_the_examples_even_with_ties(
    rows: list[tuple[int, bool]], seed: int
) -> None:
    confidence = torch.tensor([float(row[0]) for row in rows])
    correct = torch.tensor([row[1] for row in rows])
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    here, there = risk_coverage(confidence, correct), risk_coverage(confidence[shuffle], correct[shuffle])
    torch.testing.assert_close(here.curve, there.curve, rtol=0, atol=1e-12)
    assert here.eaurc >= -1e-12  # the optimum is one of the orders that the expectation averages over


def test_averaged_ties_are_the_mean_over_all_orders_of_the_tie() -> None:
    from itertools import permutations

    confidence = [0.9, 0.5, 0.5, 0.5, 0.5, 0.2]
    correct = [True, False, True, True, False, False]
    curves = [
        risk_coverage(
            torch.tensor(confidence),
            torch.tensor([correct[0], *(correct[i] for i in inner), correct[5]]),
            ties="stable",
        ).curve
        for inner in permutations(range(1, 5))
    ]
    averaged = risk_coverage(torch.tensor(confidence), torch.tensor(correct)).curve
    torch.testing.assert_close(averaged, torch.stack(curves).mean(0), rtol=0, atol=1e-12)


def test_stable_ties_keep_the_order_of_the_examples() -> None:
    tied = torch.tensor([0.5, 0.5])
    assert risk_coverage(tied, torch.tensor([False, True]), ties="stable").curve.tolist() == [1.0, 0.5]
    assert risk_coverage(tied, torch.tensor([True, False]), ties="stable").curve.tolist() == [0.0, 0.5]


@given(n=st.integers(1, 50), m=st.integers(0, 50))
def test_a_perfect_ranking_has_no_excess_area(n: int, m: int) -> None:
    m = min(m, n)
    confidence = torch.linspace(1, 0, n, dtype=torch.float64)
    correct = torch.arange(n) < n - m
    assert risk_coverage(confidence, correct).eaurc == pytest.approx(0.0, abs=1e-12)


def test_the_last_point_of_the_curve_is_the_error_rate() -> None:
    logits, labels = predictions(300, 4, seed=5)
    confidence, prediction = logits.softmax(1).max(1)
    correct = prediction == labels
    assert float(risk_coverage(confidence, correct).curve[-1]) == pytest.approx(
        1 - float(correct.double().mean()), abs=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_log_likelihood_equals_cross_entropy(dtype: torch.dtype) -> None:
    logits, labels = predictions(400, 6, seed=2, dtype=dtype)
    expected = float(torch.nn.functional.cross_entropy(logits, labels))
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-6)
    assert negative_log_likelihood(logits.log_softmax(1), labels) == pytest.approx(expected, rel=1e-6)


def test_negative_log_likelihood_survives_logits_that_overflow_a_softmax() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert negative_log_likelihood(logits, torch.tensor([0, 0])) == pytest.approx(1e4)
    assert negative_log_likelihood(torch.tensor([[0.0, -math.inf]]), torch.tensor([1])) == math.inf


def test_brier_score_equals_its_definition() -> None:
    logits, labels = predictions(200, 5, seed=4)
    probs = logits.softmax(1)
    expected = float((probs - torch.nn.functional.one_hot(labels, 5)).square().sum(1).mean())
    assert brier_score(probs, labels) == pytest.approx(expected, abs=1e-12)


def test_metrics_do_not_depend_on_the_order_of_the_examples() -> None:
    logits, labels = predictions(500, 5, seed=6)
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    for metric in (lambda z, y: calibration_error(z.softmax(1), y), negative_log_likelihood):
        assert metric(logits, labels) == pytest.approx(metric(logits[shuffle], labels[shuffle]), abs=1e-12)


def test_half_precision_rows_are_accepted_although_they_miss_the_sum_of_one() -> None:
    logits, labels = predictions(200, 100, seed=7, dtype=torch.float32)
    exact = calibration_error(logits.softmax(1), labels)
    # fp16 keeps 11 bits: a confidence moves by at most 2^-12 relative, and a few may cross an edge
    assert calibration_error(logits.softmax(1).half(), labels) == pytest.approx(exact, abs=2e-2)


@pytest.mark.parametrize(
    ("probs", "labels", "complaint"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "softmax"),
        (torch.tensor([[0.5, 0.2]]), torch.tensor([0]), "sum 1"),
        (torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), "distribution"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"0\.\.1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), r"0\.\.1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "int64"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), "one length"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "no examples"),
    ],
)
def test_what_is_no_distribution_is_refused_with_the_reason(probs: Tensor, labels: Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        calibration_error(probs, labels)


def test_arguments_out_of_range_are_refused() -> None:
    probs, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    with pytest.raises(InputError, match="bins"):
        calibration_error(probs, labels, bins=0)
    with pytest.raises(InputError, match="norm"):
        calibration_error(probs, labels, norm=0.5)
    with pytest.raises(InputError, match="ties"):
        risk_coverage(torch.tensor([0.5]), torch.tensor([True]), ties="random")
    with pytest.raises(InputError, match="NaN"):
        risk_coverage(torch.tensor([math.nan]), torch.tensor([True]))
    with pytest.raises(InputError, match="0 and 1"):
        risk_coverage(torch.tensor([0.5]), torch.tensor([3]))
    with pytest.raises(InputError, match="no examples"):
        risk_coverage(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(InputError, match="NaN"):
        negative_log_likelihood(torch.tensor([[math.nan, 0.0]]), labels)


def test_numpy_free_of_loops_a_hundred_thousand_rows_take_a_moment() -> None:
    probs = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(10), 100_000))
    labels = torch.zeros(100_000, dtype=torch.int64)
    start = time.perf_counter()
    calibration_error(probs, labels)
    risk_coverage(*probs.max(1)[:1], probs.argmax(1) == labels)
    # about 0.03 s on one core; two orders of magnitude of room keep a busy machine from failing it
    assert time.perf_counter() - start < 3.0
