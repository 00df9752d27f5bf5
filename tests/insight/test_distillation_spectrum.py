"""The spectrum report says what the closed forms say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from poise.errors import InputError
from poise.insight.distillation_spectrum import distillation_spectrum
from poise.solvers.kernel_distillation import SelfDistillationKRR


def data(n: int = 25) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2 * n, 1, generator=generator, dtype=torch.float64)
    truth = torch.sin(2 * torch.pi * x[:, 0])
    y = truth + 0.5 * torch.randn(2 * n, generator=generator, dtype=torch.float64)
    return x[:n], y[:n], x[n:], truth[n:]


def test_the_rows_are_the_steps_the_limit_and_the_fixed_ridge_which_equals_the_limit():
    x, y, new, truth = data()
    model = SelfDistillationKRR("rbf", 0.2, gamma=20.0).fit(x, y, 0.35, 4)
    *steps, limit, baseline = distillation_spectrum(model, new, truth).rows
    assert [row.name for row in steps] == ["1", "2", "3", "4"]
    assert [row.alpha for row in steps] == [None, 0.35, 0.35, 0.35]
    assert baseline.name == "ridge 0.571"
    assert baseline.equivalent_ridge == limit.equivalent_ridge == pytest.approx(0.2 / 0.35)
    for name in ("freedom", "directions", "train_error", "error", "plain_error"):
        assert getattr(limit, name) == pytest.approx(getattr(baseline, name), rel=1e-9)
    for step, row in enumerate(steps, start=1):
        assert row.error == pytest.approx(float((model.predict(new, step) - truth).square().mean()), rel=1e-12)
        assert row.train_error == pytest.approx(float((model.predict(step=step) - y).square().mean()), rel=1e-12)
    assert steps[0].error == pytest.approx(steps[0].plain_error, rel=1e-6)


def test_every_step_spends_freedom_and_directions():
    x, y, _, _ = data()
    rows = distillation_spectrum(SelfDistillationKRR("rbf", 0.2, gamma=20.0).fit(x, y, 0.0, 6)).rows[:6]
    for earlier, later in itertools.pairwise(rows):
        assert later.freedom < earlier.freedom
        assert later.directions < earlier.directions
        assert later.equivalent_ridge > earlier.equivalent_ridge
        assert later.error is None


def test_ratios_are_those_of_neighbouring_directions_without_rounding():
    x, y, _, _ = data()
    x = torch.cat([x, x])  # half of the eigenvalues are zero up to rounding
    model = SelfDistillationKRR("linear", 0.2).fit(torch.cat([x, x**2], 1), torch.cat([y, y]), 0.0, 3)
    report = distillation_spectrum(model)
    assert len(report.eigenvalues) == 2
    a = report.eigenvalues / (report.eigenvalues + 0.2)
    torch.testing.assert_close(report.ratios[:, 0], torch.stack([(a[0] / a[1]) ** k for k in (1, 2, 3)]))
    assert bool(report.limit_ratios.isnan().all())


def test_without_labels_the_limit_is_the_zero_function_and_its_error_the_mean_square_of_the_truth():
    x, y, new, truth = data()
    *_, limit, baseline = distillation_spectrum(SelfDistillationKRR("rbf", 0.2).fit(x, y, 0.0, 3), new, truth).rows
    assert math.isinf(limit.equivalent_ridge)
    assert limit.freedom == baseline.freedom == limit.directions == 0
    assert limit.error == baseline.error == pytest.approx(float(truth.square().mean()))


def test_the_report_prints_as_a_table():
    x, y, new, truth = data()
    model = SelfDistillationKRR("rbf", 0.2).fit(x, y, 0.3, 2)
    lines = str(distillation_spectrum(model, new, truth)).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["step", "alpha"]


def test_another_ridge_from_the_same_decomposition_equals_a_new_fit():
    x, y, new, _ = data()
    for decomposition in ("eigh", "cholesky"):
        model = SelfDistillationKRR("rbf", 0.2, decomposition=decomposition).fit(x, y, [0.1, 0.6])
        fresh = SelfDistillationKRR("rbf", 5.0).fit(x, y, [0.1, 0.6])
        for step in (1, 2, 3, 9, "limit"):
            torch.testing.assert_close(
                model.with_ridge(5.0).predict(new, step), fresh.predict(new, step), rtol=0, atol=1e-10
            )
    with pytest.raises(InputError, match="ridge must be"):
        model.with_ridge(-1.0)


def test_half_a_data_set_is_refused():
    x, y, new, _ = data()
    with pytest.raises(InputError, match="X and Y together"):
        distillation_spectrum(SelfDistillationKRR().fit(x, y), new)
    with pytest.raises(InputError, match="not fitted"):
        distillation_spectrum(SelfDistillationKRR())
