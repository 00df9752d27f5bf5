"""The conflict report says what autograd and a small step say."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.insight import conflict_report
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto import UPGrad

F64 = torch.float64


def terms(w: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": (w - 1).square().sum(), "b": (w + torch.tensor([1.0, -2.0, 0.5])).square().sum(), "c": w.sin().sum()}


def table() -> tuple[torch.Tensor, GradientTable]:
    w = torch.tensor([0.3, -0.2, 0.7], dtype=F64, requires_grad=True)
    return w, GradientTable.of(terms(w), {"w": w})


def test_first_order_changes_are_those_of_a_small_step() -> None:
    w, gradients = table()
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    report = conflict_report(gradients, weights, lr=1e-6)
    moved = terms(w.detach() - 1e-6 * gradients.combine(weights)["w"])
    before = terms(w.detach())
    change = torch.stack([moved[k] - before[k] for k in before])
    torch.testing.assert_close(report.changes, change, atol=1e-9, rtol=0)
    assert report.rising == tuple(k for k in before if moved[k] > before[k])


def test_conflicts_are_the_pairs_with_negative_cosines_the_worst_first() -> None:
    _, gradients = table()
    report = conflict_report(gradients)
    cosines = [cosine for _, _, cosine in report.conflicts]
    assert cosines == sorted(cosines)
    assert len(cosines) == int((report.cosines.triu(1) < 0).sum())
    torch.testing.assert_close(report.cosines.diagonal(), torch.ones(3, dtype=F64))
    assert float(report.shares.sum()) == pytest.approx(1)


def test_no_term_rises_under_upgrad() -> None:
    _, gradients = table()
    assert not conflict_report(gradients, UPGrad().weigh(gradients.gram, gradients.values)).rising


def test_weights_by_name_are_those_of_the_table() -> None:
    _, gradients = table()
    by_name = conflict_report(gradients, {"c": 3.0, "a": 1.0, "b": 2.0})
    torch.testing.assert_close(by_name.weights, torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    with pytest.raises(InputError, match="no weight for b, c"):
        conflict_report(gradients, {"a": 1.0})
    with pytest.raises(InputError, match="one number a term"):
        conflict_report(gradients, torch.ones(2))


def test_a_gradient_that_vanishes_is_in_no_conflict() -> None:
    w = torch.ones(2, dtype=F64, requires_grad=True)
    report = conflict_report(GradientTable.of({"a": (0 * w).sum(), "b": w.sum()}, {"w": w}))
    assert report.conflicts == ()
    assert report.rising == ()
    assert float(report.shares[1]) == 1
