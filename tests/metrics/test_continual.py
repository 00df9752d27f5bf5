"""Figures of a sequence of tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from poise.errors import InputError
from poise.metrics.continual import (
    backward_transfer,
    continual_report,
    distance_by_category,
    forgetting,
    forward_transfer,
    learning,
    overall_performance,
    retention,
)
from poise.parameter_masks import matrices_of

R = [[0.8, 0.1, 0.2], [0.6, 0.9, 0.3], [0.7, 0.5, 0.7]]


def test_the_figures_are_those_worked_out_by_hand() -> None:
    assert overall_performance(R) == pytest.approx(1.9 / 3)
    assert backward_transfer(R) == pytest.approx((-0.1 - 0.4) / 2)
    assert forgetting(R) == pytest.approx((0.1 + 0.4) / 2)
    assert learning(R) == pytest.approx(2.4 / 3)
    assert forward_transfer(R, [0.1, 0.05, 0.1]) == pytest.approx((0.05 + 0.2) / 2)
    assert retention(23.0, 18.0, floor=3.0) == pytest.approx(0.75)


def test_overall_performance_is_learning_plus_what_later_tasks_did() -> None:
    r = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = continual_report(r)
    assert report.overall == pytest.approx(report.learning + report.backward * 4 / 5)
    assert report.forward is None
    assert report.forgetting >= -report.backward


def test_a_single_task_has_nothing_to_forget() -> None:
    assert continual_report([[0.5]], before=[0.1]).backward == 0.0


def test_distance_is_measured_by_category() -> None:
    before, after = nn.TransformerEncoderLayer(8, 2, 16), nn.TransformerEncoderLayer(8, 2, 16)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        after.linear1.weight[0, 0] += 3.0
        after.linear2.bias[0] -= 4.0
    distance = distance_by_category(after, before, matrices_of(after))
    assert distance["feed_forward"] == pytest.approx(5.0, rel=1e-6)
    assert distance["attention"] == distance["norm"] == 0.0


def test_bad_input_says_what_is_expected() -> None:
    with pytest.raises(InputError, match=r"scores must be float \[tasks, tasks\]"):
        overall_performance([[0.1, 0.2]])
    with pytest.raises(InputError, match="one score a task"):
        forward_transfer(R, [0.1])
    with pytest.raises(InputError, match="nothing to keep"):
        retention(0.1, 0.2, floor=0.1)
