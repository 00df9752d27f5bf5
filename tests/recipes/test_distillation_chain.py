"""The deep chain: what it trains, against whom, with which share, and when it stops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.readouts.supervised import Classification
from poise.recipes.distillation_chain import distillation_chain, distillation_grid
from poise.terms.parameters import L2
from poise.terms.probability import Brier
from poise.terms.self_distillation import Distillation
from poise.weights.mixing import optimal_mixing


def data(n: int = 120, noise: float = 0.3) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, 4, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    wrong = torch.rand(2 * n, generator=generator) < noise
    y[wrong] = torch.randint(3, (int(wrong.sum()),), generator=generator)
    return (x[:n], y[:n]), (x[n:], y[n:])


class Recorder:
    """Makes models and remembers their first weights."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []
        self.seeds: list[int] = []

    def __call__(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Linear(4, 3)
        self.first.append(model.weight.detach().clone())
        self.seeds.append(seed)
        return model


OPTIONS: dict[str, Any] = {"epochs": 4, "solver": "sgd", "lr": 0.5, "batch_size": 30}
LONGER: dict[str, Any] = OPTIONS | {"epochs": 20}


def test_a_given_share_trains_one_model_a_step_and_an_estimated_one_two():
    train, valid = data()
    make = Recorder()
    given = distillation_chain(make, train, valid, steps=3, alpha=[0.2, 0.6], **OPTIONS)
    assert given.alphas == (0.2, 0.6)
    assert given.trainings == len(make.first) == 3
    # A rough teacher of noisy labels: the share is between 0 and 1, so probe and student are two trainings.
    estimated = distillation_chain(Recorder(), train, valid, steps=2, penalty=0.003 * L2(), **LONGER)
    assert 0 < estimated.alphas[0] < 1
    assert estimated.trainings == 3
    assert [student.trainings for student in estimated.students] == [1, 2]


def test_students_start_from_fresh_weights_the_same_or_new_ones():
    train, valid = data()
    same, new = Recorder(), Recorder()
    chain = distillation_chain(same, train, valid, steps=3, alpha=0.3, **OPTIONS)
    distillation_chain(new, train, valid, steps=3, alpha=0.3, same_start=False, **OPTIONS)
    assert len(set(same.seeds)) == 1
    assert all(torch.equal(weights, same.first[0]) for weights in same.first)
    assert len(set(new.seeds)) == 3
    assert len({id(student.model) for student in chain.students}) == 3


def test_the_same_seed_gives_the_same_chain_and_another_seed_another():
    train, valid = data()
    runs = [distillation_chain(Recorder(), train, valid, steps=2, alpha=0.4, seed=s, **OPTIONS) for s in (0, 0, 1)]
    errors = [[student.squared_error for student in chain.students] for chain in runs]
    assert errors[0] == errors[1] != errors[2]


def test_a_share_of_one_repeats_the_teacher():
    train, valid = data()
    teacher, student = distillation_chain(Recorder(), train, valid, steps=2, alpha=1.0, **OPTIONS).students
    assert torch.equal(teacher.model.weight, student.model.weight)


@pytest.mark.parametrize("loss", ["mse_prob", "mse_logit", "kl", "ce"])
def test_a_student_of_the_teacher_alone_comes_to_predict_what_it_predicts(loss):
    train, valid = data()
    options = OPTIONS | {"epochs": 100}
    teacher, student = distillation_chain(Recorder(), train, valid, steps=2, alpha=0.0, loss=loss, **options).students
    gap = teacher.run.predict(valid[0]).softmax(-1) - student.run.predict(valid[0]).softmax(-1)
    # 400 steps on a convex problem whose optimum is the teacher.
    assert float(gap.abs().max()) < 0.05
    assert student.run.objective.labels == ("distillation",)


def test_the_student_minimises_the_papers_objective():
    train, valid = data()
    chain = distillation_chain(
        Recorder(),
        train,
        valid,
        steps=2,
        alpha=0.3,
        penalty=0.01 * L2(),
        **(OPTIONS | {"batch_size": 120, "epochs": 2}),
    )
    teacher, student = chain.students
    with torch.no_grad():
        z, t = student.model(train[0]), teacher.model(train[0])
    written = 0.3 * Brier()(z, train[1]).mean() + 0.7 * Distillation()(z, t).mean()
    written = written + 0.01 * 0.5 * student.model.weight.square().sum()
    value = student.run.objective(
        logits=z, target=train[1], teacher_logits=t, parameters=dict(student.model.named_parameters())
    )
    torch.testing.assert_close(value, written)
    assert str(student.run.objective) == "0.3*brier + 0.7*distillation + 0.01*l2"


def test_the_estimate_is_the_closed_form_on_validation_probabilities():
    train, valid = data()
    grid = distillation_grid(Recorder(), train, valid, alphas=[0.0, 0.5], penalty=0.003 * L2(), **LONGER)
    teacher, probe = grid.teacher.run, grid.students[0].run
    by_hand = optimal_mixing(
        teacher.predict(valid[0]).softmax(-1),
        probe.predict(valid[0]).softmax(-1),
        nn.functional.one_hot(valid[1], 3).float(),
    )
    assert grid.estimate == by_hand
    chain = distillation_chain(Recorder(), train, valid, steps=2, penalty=0.003 * L2(), **LONGER)
    assert chain.students[1].mixing == by_hand
    assert chain.alphas == (by_hand.alpha,)


def test_the_grid_is_the_chains_second_step_at_every_share():
    train, valid = data()
    grid = distillation_grid(Recorder(), train, valid, alphas=[0.0, 0.3, 1.0], **OPTIONS)
    assert grid.trainings == 4
    assert [student.alpha for student in grid.students] == [0.0, 0.3, 1.0]
    chain = distillation_chain(Recorder(), train, valid, steps=2, alpha=0.3, **OPTIONS)
    assert chain.students[1].squared_error == grid.students[1].squared_error
    assert grid.best.squared_error == min(student.squared_error for student in grid.students)


class Spy(nn.Module):
    """A linear model that counts its training-mode and evaluation-mode batches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear, self.calls = nn.Linear(4, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, x.sum().item()))
        return self.linear(x)


def test_the_teacher_sees_the_same_augmented_batch_in_evaluation_mode_and_does_not_move():
    train, valid = data()
    seen: list[tuple[float, float]] = []

    class Watching(Classification):
        def __call__(self, model, batch, reads):
            if "teacher_logits" in reads:
                frozen = self.teacher.module
                offered = super().__call__(model, batch, reads)
                assert not frozen.training
                assert not any(p.requires_grad for p in frozen.parameters())
                offered["teacher_logits"], offered["logits"]
                seen.append((frozen.calls[-1][1], batch["input"].sum().item()))
                return offered
            return super().__call__(model, batch, reads)

    def jitter(batch, generator):
        return {**batch, "input": batch["input"] + torch.randn(batch["input"].shape, generator=generator)}

    chain = distillation_chain(Spy, train, valid, steps=2, alpha=0.5, readout=Watching, transform=jitter, **OPTIONS)
    teacher = chain.students[0].model.linear.weight
    alone = distillation_chain(Spy, train, valid, steps=1, transform=jitter, **OPTIONS)
    assert torch.equal(teacher, alone.students[0].model.linear.weight)
    assert len(seen) == 16
    assert all(told == had for told, had in seen)


def test_an_answer_once_for_all_equals_an_answer_batch_by_batch():
    train, valid = data()

    class Plain(Classification):
        pass

    once = distillation_chain(Recorder(), train, valid, steps=2, alpha=0.2, **OPTIONS).students[1]
    by_batch = distillation_chain(Recorder(), train, valid, steps=2, alpha=0.2, readout=Plain, **OPTIONS).students[1]
    torch.testing.assert_close(once.model.weight, by_batch.model.weight)


def test_an_over_regularised_teacher_ends_the_chain_because_labels_alone_are_best():
    train, valid = data(noise=0.0)
    chain = distillation_chain(Recorder(), train, valid, steps=4, penalty=0.1 * L2(), **(OPTIONS | {"epochs": 40}))
    assert len(chain.students) == 1
    assert "wants the labels alone" in chain.stopped
    assert chain.trainings == 2


def test_the_stop_rule_ends_after_patience_steps_without_a_lower_error():
    train, valid = data(noise=0.0)
    chain = distillation_chain(
        Recorder(), train, valid, steps=6, alpha=0.0, patience=2, penalty=0.1 * L2(), **(OPTIONS | {"epochs": 40})
    )
    # Without labels an over-regularised model only shrinks.
    assert len(chain.students) == 3
    assert chain.best.step == 1
    assert "no lower squared error for 2 steps" in chain.stopped


def test_a_chain_with_checkpoints_resumes_to_the_same_students(tmp_path):
    train, valid = data()
    make = Recorder()
    chain = distillation_chain(make, train, valid, steps=2, alpha=0.2, checkpoint=tmp_path, **OPTIONS)
    assert len(list(tmp_path.iterdir())) == 2
    again = distillation_chain(make, train, valid, steps=2, alpha=0.2, checkpoint=tmp_path, **OPTIONS)
    for one, other in zip(chain.students, again.students, strict=True):
        assert torch.equal(one.model.weight, other.model.weight)


def test_a_finished_chain_prints_as_a_table():
    train, valid = data()
    lines = str(distillation_chain(Recorder(), train, valid, steps=2, alpha=0.2, **OPTIONS)).splitlines()
    assert lines[0].split() == ["step", "alpha", "raw", "squared", "error", "accuracy"]
    assert lines[-1].startswith("2 trainings")
    grid = distillation_grid(Recorder(), train, valid, alphas=[0.0], **OPTIONS)
    assert "estimate from two runs" in str(grid)
    assert math.isfinite(grid.seconds)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": 1.5}, "lies in"),
        ({"alpha": [0.1]}, "3 steps need 2 shares"),
        ({"alpha": "best"}, "'estimate'"),
        ({"steps": 0}, "at least 1"),
        ({"patience": 0}, "patience"),
        ({"loss": "mae"}, "mae"),
        ({"valid": {"input": torch.ones(2, 4)}}, "valid must hold"),
    ],
)
def test_bad_input_is_refused_in_words(change, says):
    train, valid = data()
    arguments = {"valid": valid, "steps": 3, "alpha": 0.5, **OPTIONS, **change}
    with pytest.raises(InputError, match=says):
        distillation_chain(Recorder(), train, **arguments)
    with pytest.raises(InputError, match="needs the share 0"):
        distillation_grid(Recorder(), train, valid, alphas=[0.5], **OPTIONS)
