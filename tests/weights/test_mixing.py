"""The closed-form share of ground truth (arXiv:2102.13088)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import InputError
from poise.terms.probability import Brier
from poise.terms.self_distillation import Distillation
from poise.weights.mixing import Mixing, MixingWeight, optimal_mixing


def runs(seed: int = 0, shape: tuple[int, ...] = (50, 4)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student, target = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return teacher, student, target


@given(share=st.floats(-5, 5), seed=st.integers(0, 1000))
def test_a_target_on_the_line_gives_back_its_place(share, seed):
    teacher, student, _ = runs(seed)
    found = optimal_mixing(teacher, student, share * teacher + (1 - share) * student, clip=False)
    assert found.alpha == found.raw == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("shape", [(200,), (50, 4)])
def test_the_share_is_the_best_of_a_grid_of_ten_thousand(shape):
    teacher, student, target = runs(3, shape)
    grid = torch.linspace(-1, 2, 10_001, dtype=torch.float64).reshape(-1, *[1] * len(shape))
    errors = (grid * teacher + (1 - grid) * student - target).square().flatten(1).sum(1)
    # Half of the grid's spacing.
    assert optimal_mixing(teacher, student, target).raw == pytest.approx(
        float(grid.flatten()[errors.argmin()]), abs=1.5e-4
    )


def test_the_two_forms_in_the_paper_agree():
    teacher, student, target = runs()
    gap = teacher - student
    second = 1 - float((gap * (teacher - target)).sum() / gap.square().sum())
    assert optimal_mixing(teacher, student, target).raw == pytest.approx(second, rel=1e-12)


@pytest.mark.parametrize(
    ("place", "alpha", "flag"), [(-0.5, 0.0, "below"), (0.0, 0.0, "inside"), (0.4, 0.4, "inside"), (1.5, 1.0, "above")]
)
def test_clipping_keeps_the_raw_share_and_says_what_it_means(place, alpha, flag):
    teacher, student = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    target = torch.full((8,), place, dtype=torch.float64)
    assert optimal_mixing(teacher, student, target) == Mixing(alpha, place, flag)
    assert optimal_mixing(teacher, student, target, clip=False) == Mixing(place, place, flag)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_runs_leave_the_share_undefined(dtype):
    teacher, _, target = (values.to(dtype) for values in runs())
    rounded = teacher * (1 + torch.finfo(dtype).eps)
    assert optimal_mixing(teacher, rounded, target) == Mixing(1.0, 1.0, "undefined")


def test_class_indices_mean_one_hot_targets_and_arrays_are_welcome():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 30, 5, generator=generator).softmax(-1)
    target = torch.randint(5, (30,), generator=generator)
    one_hot = torch.nn.functional.one_hot(target, 5).float()
    expected = optimal_mixing(teacher, student, one_hot)
    assert optimal_mixing(teacher, student, target) == expected
    assert optimal_mixing(teacher.numpy(), student.numpy(), target.numpy().astype(np.int32)) == expected


def test_two_runs_make_the_two_weights_of_an_objective():
    teacher, student, target = runs()
    weight = MixingWeight.from_two_runs(teacher, student, 0.3 * teacher + 0.7 * student)
    assert float(weight) == weight.ground_truth == pytest.approx(0.3)
    assert weight.ground_truth + weight.distillation == 1
    assert MixingWeight.from_two_runs(teacher, student, target).mixing == optimal_mixing(teacher, student, target)


@pytest.mark.parametrize(
    ("share", "formula"), [(0.25, "0.25*brier + 0.75*distillation"), (1.0, "brier"), (0.0, "distillation")]
)
def test_the_objective_weighs_labels_and_teacher_and_leaves_out_what_has_no_weight(share, formula):
    weight = MixingWeight(Mixing(share, share, "inside"))
    assert str(weight.objective(Brier(), Distillation())) == formula


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(3), torch.ones(4), torch.ones(3)), r"\[3\] and \[4\]"),
        ((torch.ones(3), torch.ones(3), torch.ones(4)), "target must have the shape"),
        ((torch.ones(3), torch.zeros(3), torch.tensor([1.0, 2.0, float("nan")])), "target holds infinite"),
        ((torch.ones(3), torch.tensor([1.0, float("inf"), 0.0]), torch.ones(3)), "pred_student holds infinite"),
        ((torch.ones(3, 2), torch.zeros(3, 2), torch.tensor([0, 1, 2])), "indices 0 to 2; the predictions have 2"),
        ((torch.ones(3, dtype=torch.int64), torch.zeros(3), torch.ones(3)), "must be floating point"),
        ((torch.ones(0), torch.ones(0), torch.ones(0)), "at least one example"),
    ],
)
def test_bad_input_is_refused_in_words(arguments, says):
    with pytest.raises(InputError, match=says):
        optimal_mixing(*arguments)
