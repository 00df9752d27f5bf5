"""Reports on unfolded solvers: the same signals for all, paired with the plain solver's limit."""

from __future__ import annotations

import pytest
import torch

from poise.data.sparse_signals import BernoulliGaussian, ImagePatches
from poise.errors import InputError
from poise.insight import layer_report, mismatch_report, plain_solvers, step_figure, transfer_report
from poise.penalties import L0, L1
from poise.solvers import Incremental, Unfolded, train_unfolded

SAMPLER = BernoulliGaussian(15, 30, p=0.1)
WEIGHT = 0.05


@pytest.fixture(scope="module")
def learned() -> Unfolded:
    model = Unfolded("ista", 8, weight=WEIGHT)
    train_unfolded(model, SAMPLER, "objective", Incremental(batches=15, batch_size=60))
    return model


def test_layers_are_compared_with_the_exact_end(learned: Unfolded) -> None:
    batch = SAMPLER(200, torch.Generator().manual_seed(3))
    report = layer_report({"learned": learned, **plain_solvers(8, WEIGHT)}, batch, weight=WEIGHT)
    assert len(report.rows) == 5 * 8
    assert all(row.excess.mean > -1e-5 for row in report.rows)  # nothing is below the lasso's optimum
    last = {name: report.last(name) for name in ("learned", "1/L", "1.9/L", "FISTA", "backtracking")}
    assert last["learned"].excess.mean < last["FISTA"].excess.mean < last["1/L"].excess.mean
    assert last["1.9/L"].objective.mean < last["1/L"].objective.mean
    assert last["learned"].distance < last["1/L"].distance
    assert [row.layer for row in report.path("1/L")] == list(range(1, 9))
    one = report.last("learned")
    assert one.error is not None
    assert one.nmse is not None
    power = float(batch.x.square().mean())  # type: ignore[union-attr]
    assert 10 ** (one.nmse / 10) * power == pytest.approx(one.error.mean, rel=1e-4)
    assert "layer   8" in str(report)


def test_the_plain_contestant_is_the_untrained_model() -> None:
    batch = SAMPLER(50, torch.Generator().manual_seed(3))
    for penalty, form in ((L1(), "ista"), (L0(), "iht")):
        both = {"model": Unfolded(form, 5, weight=WEIGHT), "1/L": plain_solvers(5, WEIGHT, penalty)["1/L"]}  # type: ignore[arg-type, dict-item]
        report = layer_report(both, batch, weight=WEIGHT)  # type: ignore[arg-type]
        for one, other in zip(report.path("model"), report.path("1/L"), strict=True):
            assert one.objective.mean == pytest.approx(other.objective.mean, rel=1e-5)


def test_mismatch_and_transfer_take_the_training_condition_first(learned: Unfolded) -> None:
    changes = {"p = 20 %": {"p": 0.2}, "10 dB": {"snr": 10.0}}
    report = mismatch_report(
        {"learned": learned, **plain_solvers(8, WEIGHT)}, SAMPLER, changes, weight=WEIGHT, size=200
    )
    assert report.row("as trained", "learned").ratio == 1
    harder = report.row("p = 20 %", "learned")
    assert harder.ratio is not None
    assert harder.ratio > 1
    moved = transfer_report(
        learned, SAMPLER, {"other": SAMPLER.changed(matrix_seed=5), "30 x 50": BernoulliGaussian(30, 50)}, size=200
    )
    for condition in ("as trained", "other", "30 x 50"):
        assert moved.row(condition, "learned").objective.mean < moved.row(condition, "1/L").objective.mean
    assert "30 x 50" in str(moved)


def test_signals_that_nobody_knows_are_compared_by_the_objective() -> None:
    patches = ImagePatches([torch.rand(20, 20)], side=4, atoms=6)
    report = layer_report(plain_solvers(3, 0.01), patches(20, torch.Generator().manual_seed(0)), weight=0.01)
    assert report.last("1/L").error is None
    assert report.limit_error is None


def test_steps_are_drawn_with_the_lines_of_the_plain_step_and_of_the_stable_range(learned: Unfolded) -> None:
    drawn = step_figure({"learned": learned, "plain": Unfolded(layers=3)})
    assert drawn.layers == tuple(range(1, 9))
    assert drawn.lines == {"1/L": 1.0, "2/L": 2.0}
    assert drawn.steps["learned"] == pytest.approx(tuple(learned.steps.tolist()))
    assert len(drawn.figure().data) == 2


def test_nothing_to_report_is_refused() -> None:
    with pytest.raises(InputError, match="nobody to compare"):
        layer_report({}, SAMPLER(2, torch.Generator()), weight=WEIGHT)
    with pytest.raises(InputError, match="no model to draw"):
        step_figure({})
