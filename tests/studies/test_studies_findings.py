from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from studies_fakes import make_record, task

from poise.studies import Study, summarize
from poise.studies.findings import _curve
from poise.studies.intervals import Estimate
from poise.studies.recommendation import difference_sentence, term_sentence
from poise.studies.spec import failed_record
from poise.studies.summary import Metric

SPREAD = (-0.004, 0.001, 0.003, -0.002, 0.002)


@pytest.fixture
def summary_of(fake_task, tmp_path):
    """Summarise a study whose formulas reach the given accuracies, one list of values a formula."""

    def make(accuracies, *, share_of_fail=(), curves=None, **settings):
        seeds = len(next(iter(accuracies.values())))
        study = Study("digits", list(accuracies), seeds, out=tmp_path, leave_one_out=False, **settings)
        plan = study.plan()
        for spec in plan.wanted():
            if (spec.formula, spec.seed) in share_of_fail:
                plan.feed([failed_record(spec, "It failed.")])
            else:
                plan.feed([make_record(spec, accuracies[spec.formula][spec.seed])])
        return summarize(plan, study.describe(), curves)

    return make


def around(mean, shift=0.0):
    return [mean + shift * (i % 2) + s for i, s in enumerate(SPREAD)]


def test_the_differences_are_paired_and_those_of_scipy(summary_of):
    base, other = around(0.7), [0.75, 0.73, 0.74, 0.78, 0.76]
    summary = summary_of({"cross_entropy": base, "l2": other})
    (difference,) = [d for d in summary.differences if d.metric == "accuracy"]
    test = stats.ttest_rel(other, base)
    interval = test.confidence_interval(0.95)
    # Accuracies are doubles; the differences of a few hundredths keep about 14 digits.
    assert difference.p == pytest.approx(test.pvalue, rel=1e-9)
    assert (difference.estimate.lower, difference.estimate.upper) == pytest.approx((interval.low, interval.high))
    assert difference.resampled.upper > difference.estimate.upper


def test_the_adjustment_counts_the_comparisons_of_one_metric(summary_of):
    summary = summary_of({"cross_entropy": around(0.7), "l2": around(0.71, 0.01), "l1": around(0.7, 0.002)})
    ps = [d.p for d in summary.differences if d.metric == "accuracy"]
    holm = [d.p_holm for d in summary.differences if d.metric == "accuracy"]
    assert holm == pytest.approx([min(1, 2 * min(ps)) if p == min(ps) else max(2 * min(ps), p) for p in ps])


def test_a_clear_winner_is_recommended_with_its_interval_and_against_every_other_one(summary_of):
    summary = summary_of(
        {
            "cross_entropy": around(0.7),
            "cross_entropy + 0.1*l2": [0.81, 0.80, 0.82, 0.80, 0.81],
            "cross_entropy + 0.2*l2": [0.80, 0.81, 0.81, 0.80, 0.81],
        }
    )
    recommendation = summary.recommendation
    assert (recommendation.kind, recommendation.formula) == ("better", 1)
    assert recommendation.text.startswith(
        "cross_entropy + 0.1*l2 is better than cross_entropy by 10.8 points accuracy (95 %"
    )
    assert "cross_entropy + 0.1*l2 and cross_entropy + 0.2*l2 cannot be told apart" in recommendation.text
    assert [(d.formula, d.baseline) for d in summary.between] == [(1, 2)]


def test_where_nothing_can_be_told_apart_the_simpler_formula_is_kept(summary_of):
    summary = summary_of({"cross_entropy + 0.1*l2": around(0.7, 0.004), "cross_entropy": around(0.702)})
    assert (summary.recommendation.kind, summary.recommendation.formula) == ("undecided", 1)
    assert "with 5 seeds; keep the simpler: cross_entropy." in summary.recommendation.text


def test_a_baseline_that_beats_all_others_is_kept(summary_of):
    summary = summary_of({"cross_entropy": around(0.8), "l2": [0.5, 0.52, 0.51, 0.5, 0.53]})
    assert (summary.recommendation.kind, summary.recommendation.formula) == ("keep", 0)
    assert summary.recommendation.text.startswith("Keep cross_entropy. l2 is worse than cross_entropy by 28.8 points")


def test_one_seed_names_no_winner(summary_of):
    summary = summary_of({"cross_entropy": [0.5], "l2": [0.9]})
    assert (summary.recommendation.kind, summary.recommendation.formula) == ("no interval", None)
    assert "One seed gives no interval" in summary.recommendation.text
    assert any("One seed" in warning for warning in summary.warnings)
    assert {d.verdict for d in summary.differences} == {"no interval"}


def test_one_formula_is_reported_with_its_interval(summary_of):
    summary = summary_of({"cross_entropy": around(0.8)})
    assert summary.recommendation.kind == "single"
    assert summary.recommendation.text.startswith("cross_entropy reaches 80.0 % accuracy (95 % interval ")


def test_nothing_finished_is_said(summary_of):
    fails = {(text, seed) for text in ("cross_entropy", "l2") for seed in range(2)}
    summary = summary_of({"cross_entropy": [0, 0], "l2": [0, 0]}, share_of_fail=fails)
    assert summary.recommendation.kind == "failed"
    assert len(summary.failed) == 4
    json.dumps(summary.to_dict())


def test_less_is_better_where_the_metric_says_so(fake_task, monkeypatch, tmp_path):
    rmse = task(primary="rmse", direction="min", target_type="regression")
    monkeypatch.setattr(Study, "task", rmse)
    study = Study("diabetes", ["squared_error", "huber"], 3, out=tmp_path, leave_one_out=False)
    plan = study.plan()
    for spec in plan.wanted():
        record = make_record(spec)
        record.metrics = {"test/rmse": (55.0 if spec.formula == "squared_error" else 50.0) + 0.1 * spec.seed**2}
        record.metrics["test/rmse"] += 0.05 * spec.seed if spec.formula == "huber" else 0
        plan.feed([record])
    summary = summarize(plan, study.describe())
    assert summary.primary.direction == "min"
    (difference,) = summary.differences
    assert difference.verdict == "better"
    assert difference.sentence.startswith(
        "huber is better than squared_error by 4.95 in root mean squared error (95 % interval 4.826 to 5.074"
    )


def test_what_a_term_bought_is_said_in_words_that_fit_the_metric():
    accuracy = Metric("accuracy", "accuracy", "max", percent=True)
    error = Metric("ece", "calibration error", "min", percent=True)
    gain, loss = Estimate(0.1, 0.05, 0.15, 0.02, 5), Estimate(-0.1, -0.15, -0.05, 0.02, 5)
    interval = "(95 % interval 5.0 to 15.0, 5 seeds)."
    assert term_sentence(accuracy, "l2", gain, "better") == f"l2 bought 10.0 points accuracy {interval}"
    assert term_sentence(accuracy, "l2", loss, "worse") == f"l2 cost 10.0 points accuracy {interval}"
    assert term_sentence(error, "l2", loss, "better") == f"l2 lowered calibration error by 10.0 points {interval}"
    assert term_sentence(error, "l2", gain, "worse") == f"l2 raised calibration error by 10.0 points {interval}"


def test_two_equal_formulas_have_a_difference_of_zero_and_no_winner():
    metric = Metric("accuracy", "accuracy", "max", percent=True)
    sentence = difference_sentence(metric, "a", "b", Estimate(0.0, 0.0, 0.0, 0.0, 5), "undecided")
    assert sentence == "a and b cannot be told apart: +0.0 points accuracy (95 % interval +0.0 to +0.0, 5 seeds)."


def test_curves_are_averaged_over_seeds_with_a_t_band():
    steps = np.array([0, 10, 20])
    values = np.array([[1.0, 2.0, np.inf], [3.0, 2.5, 1.0], [2.0, 4.0, 2.0]], dtype=np.float32)
    curve = _curve("loss", {seed: (steps, row) for seed, row in enumerate(values)})
    assert curve.steps == (0, 10, 20)
    lower, upper = stats.t.interval(0.95, 2, np.mean(values[:, 1]), stats.sem(values[:, 1]))
    assert (curve.lower[1], curve.mean[1], curve.upper[1]) == pytest.approx((lower, 17 / 6, upper))
    # An infinite value counts as not recorded.
    assert curve.mean[2] == pytest.approx(1.5)
    assert curve.per_seed[0] == (1.0, 2.0, None)


def test_curves_of_different_lengths_are_averaged_over_the_seeds_that_are_there():
    curve = _curve("loss", {0: (np.array([0, 1]), np.array([1.0, 3.0])), 1: (np.array([0, 2]), np.array([2.0, 5.0]))})
    assert curve.steps == (0, 1, 2)
    assert curve.mean == (1.5, 3.0, 5.0)
    assert curve.lower[1:] == (None, None)
    assert curve.per_seed[1] == (2.0, None, 5.0)


def test_weights_paths_are_found_under_the_terms_names(summary_of):
    def curves(runs):
        for run in runs:
            yield run, {"weight/l2": (np.array([0, 1]), np.array([0.0, 0.5])), "loss": (np.array([0]), np.array([1.0]))}

    summary = summary_of({"cross_entropy": around(0.8)}, curves=curves)
    assert list(summary.formulas[0].curves_of("weight")) == ["l2"]
    assert summary.formulas[0].curves_of("weight")["l2"].mean == (0.0, 0.5)


def test_a_summary_is_plain_json(summary_of):
    summary = summary_of({"cross_entropy": around(0.8), "l2": around(0.5, 0.01)})
    assert json.loads(json.dumps(summary.to_dict()))["recommendation"]["kind"] == "keep"


def test_an_incomplete_study_is_summarised_and_says_so(fake_task, tmp_path):
    study = Study("digits", ["cross_entropy", "l2"], 3, out=tmp_path)
    plan = study.plan()
    specs = plan.wanted()
    plan.feed([make_record(spec) for spec in specs[:4]])
    summary = summarize(plan, study.describe())
    assert (summary.runs_done, summary.runs_planned) == (4, 6)
    assert any("4 of 6 runs" in warning for warning in summary.warnings)


def test_runs_of_different_torch_versions_are_pointed_out(fake_task, tmp_path):
    study = Study("digits", ["cross_entropy"], 2, out=tmp_path)
    plan = study.plan()
    for number, spec in enumerate(plan.wanted()):
        record = make_record(spec)
        record.versions = {"torch": f"2.{number}"}
        plan.feed([record])
    assert (
        "The runs were made with different versions of torch: 2.0, 2.1." in summarize(plan, study.describe()).warnings
    )
