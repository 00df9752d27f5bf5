"""Paths through objective space: who owns the front, from which step on, and who dominates whom."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.insight import pareto_paths


def test_fronts_steps_and_coverage_are_those_of_counting() -> None:
    paths = {
        "early": torch.tensor([[0.0, 0.0], [2.0, 1.0], [1.0, 1.0]]),
        "late": torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 3.0]]),
    }
    report = pareto_paths(paths, steps=[0, 10, 20])
    assert [(c.run, c.step, c.point) for c in report.front] == [("early", 10, (2.0, 1.0)), ("late", 20, (1.0, 3.0))]
    assert report.runs["early"].volume == 2.0
    assert report.runs["late"].volume == 3.0
    assert (report.runs["early"].first_step, report.runs["late"].first_step) == (10, 20)
    assert report.coverage["early", "late"] == pytest.approx(2 / 3)
    assert report.coverage["late", "early"] == pytest.approx(2 / 3)
    assert report.runs["late"].last == (1.0, 3.0)
    assert "late" in str(report).splitlines()[1]


def test_a_run_without_a_checkpoint_on_the_front_says_never() -> None:
    report = pareto_paths(
        {"good": torch.tensor([[1.0, 1.0]]), "bad": torch.tensor([[0.0, 0.0]])}, reference=[-1.0, -1.0]
    )
    assert report.runs["bad"].first_step is None
    assert report.runs["bad"].dominated == 1.0
    assert report.runs["bad"].volume == 1.0
    assert "never" in str(report)


def test_one_run_alone_is_compared_with_itself() -> None:
    report = pareto_paths({"only": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
    assert report.runs["only"].dominated == 0.0
    assert report.runs["only"].optimal == 1


def test_paths_of_different_forms_are_refused() -> None:
    with pytest.raises(InputError, match="runs of one form"):
        pareto_paths({"a": torch.zeros(2, 2), "b": torch.zeros(3, 2)})
    with pytest.raises(InputError, match="runs of one form"):
        pareto_paths({})
    with pytest.raises(InputError, match="2 checkpoints need as many steps"):
        pareto_paths({"a": torch.zeros(2, 2)}, steps=[1])
