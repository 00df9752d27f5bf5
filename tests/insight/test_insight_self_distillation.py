"""Laws of the reports on progressive self-distillation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import poise
from poise.errors import InputError, PoiseWarning
from poise.insight.self_distillation import (
    RefinementRecorder,
    gradient_rescaling,
    hard_examples,
    past_predictions,
)
from poise.objective import DataInfo
from poise.terms.self_distillation import ProgressiveSelfDistillation


def logits_of(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1), forgetting=st.floats(0.3, 3))
def test_the_ratio_of_gradients_is_one_minus_alpha_gamma_where_no_class_changes_its_sign(
    seed: int, alpha: float, forgetting: float
) -> None:
    z = logits_of(seed, 30, 4)
    past = (forgetting * z).softmax(-1)
    target = torch.randint(4, (30,), generator=torch.Generator().manual_seed(seed))
    for group in gradient_rescaling(z, past, target, alpha, groups=30).groups:
        if group.exact == 1:
            assert group.ratio == pytest.approx(group.predicted, rel=1e-7, abs=1e-9)
        else:  # sign flips add to the L1 norm
            assert group.ratio > group.predicted - 1e-9


def test_the_ratio_is_the_one_that_autograd_measures() -> None:
    z, past = logits_of(0, 40, 5).requires_grad_(), logits_of(1, 40, 5).softmax(-1)
    target = torch.arange(40) % 5
    term = ProgressiveSelfDistillation(0.8)
    term.bind(DataInfo(examples=40, classes=5))
    assert term.memory is not None
    term.memory.write(torch.arange(40), past)
    (soft,) = torch.autograd.grad(term(z, target, 4, 10, torch.arange(40)).sum(), z)
    (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, target, reduction="sum"), z)
    (group,) = gradient_rescaling(z.detach(), past_predictions(term), target, alpha=0.4, groups=1).groups
    assert group.softened == pytest.approx(float(soft.abs().sum(-1).mean()), rel=1e-6)
    assert group.plain == pytest.approx(float(plain.abs().sum(-1).mean()), rel=1e-6)


def test_an_example_without_progress_keeps_one_minus_alpha_and_an_unseen_one_everything() -> None:
    z = logits_of(2, 10, 3)
    target = z.argmax(1)
    (same,) = gradient_rescaling(z, z.softmax(-1), target, 0.6, groups=1).groups
    assert same.ratio == pytest.approx(0.4)
    assert same.exact == 1
    (unseen,) = gradient_rescaling(z, torch.zeros(10, 3), target, 0.6, groups=1).groups
    assert unseen.ratio == pytest.approx(1.0)
    assert unseen.predicted == pytest.approx(1.0)


def test_groups_are_ordered_by_difficulty_and_hard_examples_weigh_more_when_easy_ones_had_further_to_come() -> None:
    generator = torch.Generator().manual_seed(0)
    now = torch.rand(1000, generator=generator, dtype=torch.float64) * 0.5 + 0.01  # present error of the true class
    past = now * (2 - now / 0.51)  # gamma falls from 2 for the easiest to 1 for the hardest
    z = torch.stack([(1 - now).log(), now.log()], 1)
    report = gradient_rescaling(z, torch.stack([1 - past, past], 1), torch.zeros(1000, dtype=torch.int64), 0.3)
    assert len(report.groups) == 10
    assert [g.examples for g in report.groups] == [100] * 10
    ends = [edge for g in report.groups for edge in (g.low, g.high)]
    assert ends == sorted(ends)
    assert report.emphasis > 1
    assert "1 - alpha*gamma" in str(report)


def test_the_hardest_examples_are_those_whose_label_was_believed_least() -> None:
    term = ProgressiveSelfDistillation()
    term.bind(DataInfo(examples=6, classes=3))
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    z = 4.0 * torch.nn.functional.one_hot(target, 3).float()
    z[4] = torch.tensor([5.0, -5.0, 0.0])  # contradicts its label
    z[2] = torch.tensor([0.0, 0.0, 0.1])  # undecided
    term.advance(logits=z[:5], epoch=0, index=torch.arange(5))
    view = hard_examples(1 * term, target, count=2)
    assert view.index.tolist() == [4, 2]
    assert view.predicted.tolist() == [0, 2]
    assert view.label.tolist() == [1, 2]
    assert view.contradicted == 1
    assert view.examples == 5  # the sixth was never seen
    torch.testing.assert_close(view.label_probability, z[[4, 2]].softmax(-1)[torch.arange(2), target[[4, 2]]])
    assert "1 of 5" in str(view)


def test_positions_of_sequences_are_examples_of_their_own() -> None:
    term = ProgressiveSelfDistillation(time=3)
    term.bind(DataInfo(examples=4, classes=2))
    target = torch.tensor([[0, 1, -100], [1, -100, -100], [0, 0, 0], [1, 1, 1]])
    z = torch.zeros(2, 2, 2)
    z[0, 1, 0] = 3.0
    term.advance(logits=z, epoch=0, index=torch.tensor([0, 1]))
    view = hard_examples(term, target, count=1)
    assert (view.index.tolist(), view.position.tolist()) == ([0], [1])
    assert view.examples == 3


def test_the_recorder_gives_the_mean_error_of_each_epoch_and_warns_once_when_nothing_is_left() -> None:
    torch.manual_seed(0)
    y = torch.arange(40) % 4
    x = torch.eye(4)[y] + 0.01 * torch.randn(40, 4)
    recorder = RefinementRecorder(y)
    objective = poise.parse("progressive_self_distillation")
    with pytest.warns(PoiseWarning, match="nearly the labels") as caught:
        poise.fit(
            nn.Linear(4, 4),
            objective,
            {"input": x, "target": y},
            lr=5.0,
            epochs=12,
            batch_size=8,
            device="cpu",
            callbacks=[recorder],
        )
    assert len([w for w in caught if w.category is PoiseWarning]) == 1
    report = recorder.report()
    assert [row.epoch for row in report.epochs] == list(range(12))
    assert report.epochs[-1].alpha == pytest.approx(0.8)
    expected = 1 - past_predictions(objective)[torch.arange(40), y].mean()
    assert report.epochs[-1].remaining_error == pytest.approx(float(expected), abs=1e-6)
    assert report.saturated_from is not None
    assert "buys nothing" in str(report)


def test_the_recorder_says_when_the_targets_are_too_soft() -> None:
    torch.manual_seed(0)
    y = torch.arange(40) % 4
    x = torch.eye(4)[y]
    recorder = RefinementRecorder(y)
    with pytest.warns(PoiseWarning, match="Lower alpha_max"):
        poise.fit(
            nn.Linear(4, 4),
            "progressive_self_distillation",
            {"input": x, "target": y},
            lr=0.02,
            epochs=12,
            batch_size=8,
            device="cpu",
            callbacks=[recorder],
        )
    last = recorder.report().epochs[-1]
    assert recorder.report().over_softened
    assert last.underconfidence == pytest.approx(last.accuracy - last.confidence)
    assert last.softening == pytest.approx(0.8 * last.remaining_error)
    assert "too soft" in str(recorder.report())


def test_the_recorder_keeps_its_epochs_over_a_resume(tmp_path: Path) -> None:
    class Fail:
        def on_step_end(self, state: object) -> None:
            if state.step == 23:  # type: ignore[attr-defined]
                raise RuntimeError("the machine stops")

    def train(*callbacks: object, folder: Path | None = None) -> str:
        torch.manual_seed(0)
        y = torch.arange(40) % 4
        recorder = RefinementRecorder(y, warn=False)
        poise.fit(
            nn.Linear(4, 4),
            "progressive_self_distillation",
            {"input": torch.eye(4)[y], "target": y},
            epochs=6,
            batch_size=8,
            device="cpu",
            checkpoint=folder,
            checkpoint_steps=4,
            callbacks=[recorder, *callbacks],
        )
        return str(recorder.report())

    class Nothing:
        pass

    with pytest.raises(RuntimeError, match="stops"):
        train(Fail(), folder=tmp_path)
    assert train(Nothing(), folder=tmp_path) == train(Nothing())


def test_what_cannot_be_reported_is_refused() -> None:
    y = torch.tensor([0, 1])
    for objective in (poise.parse("cross_entropy"), poise.parse("progressive_self_distillation(teacher='snapshot')")):
        with pytest.raises(InputError, match="remembers"):
            hard_examples(objective, y)
    term = ProgressiveSelfDistillation()
    term.bind(DataInfo(examples=2, classes=2))
    with pytest.raises(InputError, match="yet"):
        hard_examples(term, y)
    with pytest.raises(InputError, match="labels must be"):
        hard_examples(term, torch.tensor([0, 1, 1]))
    with pytest.raises(InputError, match="alpha"):
        gradient_rescaling(torch.zeros(2, 2), torch.zeros(2, 2), y, alpha=1.5)
    with pytest.raises(InputError, match="groups"):
        gradient_rescaling(torch.zeros(2, 2), torch.zeros(2, 2), y, alpha=0.5)
    with pytest.raises(InputError, match="float"):
        gradient_rescaling(torch.zeros(2, 2), torch.zeros(2, 3), y, alpha=0.5)
