"""Classification and regression metrics against scikit-learn and by their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.metrics.classification import accuracy, classification_metrics, macro_f1, negative_log_likelihood
from poise.metrics.regression import mean_absolute_error, r_squared, regression_metrics, root_mean_squared_error


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, classes = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    logits = torch.randn(rows, classes, generator=generator) * 3
    return logits, torch.randint(classes, (rows,), generator=generator)


@settings(max_examples=40, deadline=None)
@given(predictions())
def test_classification_metrics_agree_with_scikit_learn(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    from sklearn import metrics

    logits, target = case
    predicted = logits.argmax(-1)
    # float64 sums on both sides; only the softmax is float32 here.
    assert accuracy(logits, target) == pytest.approx(metrics.accuracy_score(target, predicted), abs=1e-12)
    assert macro_f1(logits, target) == pytest.approx(metrics.f1_score(target, predicted, average="macro"), abs=1e-12)
    probabilities = logits.double().softmax(-1).numpy()
    expected = metrics.log_loss(target, probabilities, labels=list(range(logits.shape[1])))
    assert negative_log_likelihood(logits, target) == pytest.approx(expected, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 50))
def test_regression_metrics_agree_with_scikit_learn(seed: int, rows: int) -> None:
    from sklearn import metrics

    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, rows, generator=generator)
    x, y = prediction.double().numpy(), target.double().numpy()
    found = regression_metrics(prediction.unsqueeze(1), target)
    assert found["rmse"] == pytest.approx(np.sqrt(metrics.mean_squared_error(y, x)), abs=1e-12)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(y, x), abs=1e-12)
    assert found["r2"] == pytest.approx(metrics.r2_score(y, x), abs=1e-9)


def test_a_class_that_does_not_occur_leaves_macro_f1_alone() -> None:
    logits = torch.tensor([[2.0, 0.0, -9.0], [0.0, 2.0, -9.0]])
    assert macro_f1(logits, torch.tensor([0, 1])) == 1.0


def test_r_squared_of_a_constant_target_says_whether_it_was_hit() -> None:
    constant = torch.ones(3)
    assert r_squared(constant, constant) == 1.0
    assert r_squared(constant + 1, constant) == 0.0


def test_a_million_equal_errors_average_to_that_error() -> None:
    # float32 accumulation would drift in the third digit.
    assert mean_absolute_error(torch.full((1_000_000,), 0.1), torch.zeros(1_000_000)) == pytest.approx(0.1, abs=1e-8)
    assert root_mean_squared_error(torch.full((1_000_000,), 0.1), torch.zeros(1_000_000)) == pytest.approx(
        0.1, abs=1e-8
    )


def test_metrics_take_outputs_that_still_carry_a_graph() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    assert set(classification_metrics(logits, torch.tensor([0, 1]))) == {"accuracy", "macro_f1", "nll", "ece"}
    assert set(regression_metrics(logits[:, 0], torch.tensor([0.0, 1.0]))) == {"rmse", "mae", "r2"}


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0, -1])),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
    ],
)
def test_shapes_types_and_ranges_that_do_not_fit_are_refused(logits: torch.Tensor, target: torch.Tensor) -> None:
    with pytest.raises(InputError, match="A classification metric needs"):
        accuracy(logits, target)


def test_a_prediction_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="one shape"):
        regression_metrics(torch.zeros(3), torch.zeros(2))
