"""Laws of distillation from a frozen teacher and between examples of a class."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.objective import Objective
from poise.terms.self_distillation import ClassWiseSelfDistillation, Distillation

LOSSES = ("mse_prob", "mse_logit", "kl", "ce")


def logits_of(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_each_loss_equals_its_formula(temperature: float) -> None:
    z, teacher = logits_of(0, 6, 5), logits_of(1, 6, 5)
    p, q = (z / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    expected = {
        "mse_prob": temperature**2 * 0.5 * ((p - q) ** 2).sum(-1),
        "mse_logit": 0.5 * ((z - teacher) ** 2).sum(-1),
        "kl": temperature**2 * (q * (q.log() - p.log())).sum(-1),
        "ce": -(temperature**2) * (q * p.log()).sum(-1),
    }
    for loss in LOSSES:
        torch.testing.assert_close(Distillation(loss, temperature)(z, teacher), expected[loss], rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


def test_mse_loss_of_pytorch_is_two_over_classes_times_the_squared_losses() -> None:
    z, teacher = logits_of(0, 6, 5), logits_of(1, 6, 5)
    torch.testing.assert_close(
        (2 / 5) * Distillation("mse_prob")(z, teacher).mean(),
        F.mse_loss(z.softmax(-1), teacher.softmax(-1)),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        (2 / 5) * Distillation("mse_logit")(z, teacher).mean(), F.mse_loss(z, teacher), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_kl_and_ce_is_T_times_p_minus_q(temperature: float) -> None:
    z, teacher = logits_of(2, 4, 6).requires_grad_(), logits_of(3, 4, 6)
    expected = temperature * ((z.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    for loss in ("kl", "ce"):
        (gradient,) = torch.autograd.grad(Distillation(loss, temperature)(z, teacher).sum(), z)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_at_high_temperature_kl_becomes_squared_error_of_centred_logits_over_the_classes() -> None:
    # Hinton et al., eq. 4: gradient -> (z - teacher) / classes, for logits of mean zero; the error is of order 1/T
    z, teacher = logits_of(4, 5, 4), logits_of(5, 5, 4)
    z = (z - z.mean(-1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(Distillation("kl", temperature=1e4)(z, teacher).sum(), z)
    torch.testing.assert_close(gradient, (z.detach() - teacher) / 4, rtol=0, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_gradient_and_the_teacher_never_has_one(loss: str) -> None:
    z = logits_of(6, 3, 4).requires_grad_()
    teacher = z.detach().clone().requires_grad_()
    value = Distillation(loss)(z, teacher).sum()  # type: ignore[arg-type]
    value.backward()
    assert float(z.grad.abs().max()) < 1e-14  # type: ignore[union-attr]
    assert teacher.grad is None
    if loss != "ce":
        assert float(value.detach()) == pytest.approx(0.0, abs=1e-14)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), loss=st.sampled_from(LOSSES), temperature=st.floats(0.25, 20))
def test_values_are_not_negative_and_ignore_a_shift_of_the_logits_unless_they_compare_logits(
    seed: int, loss: str, temperature: float
) -> None:
    z, teacher = logits_of(seed, 3, 4), logits_of(seed + 1, 3, 4)
    term = Distillation(loss, temperature)  # type: ignore[arg-type]
    values = term(z, teacher)
    assert (values >= -1e-12).all()
    if loss != "mse_logit":
        torch.testing.assert_close(term(z + 7, teacher - 3), values, rtol=1e-9, atol=1e-9)


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    z, teacher = logits_of(7, 8, 10).half(), logits_of(8, 8, 10).half()
    for loss in LOSSES:
        values = Distillation(loss)(z, teacher)  # type: ignore[arg-type]
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, Distillation(loss)(z.float(), teacher.float()), rtol=0, atol=0)  # type: ignore[arg-type]


def test_sequences_are_averaged_over_their_real_positions() -> None:
    z, teacher = logits_of(9, 2, 3, 5), logits_of(10, 2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    values = Distillation("kl")(z, teacher)
    expected = values[mask].mean()
    target = torch.zeros(2, 3, dtype=torch.int64)
    objective: Objective = 1 * Distillation("kl")
    torch.testing.assert_close(objective(logits=z, teacher_logits=teacher, target=target, mask=mask), expected)
    padded = target.masked_fill(~mask, -100)
    torch.testing.assert_close(objective(logits=z, teacher_logits=teacher, target=padded), expected)
    torch.testing.assert_close(objective(logits=z, teacher_logits=teacher, mask=mask), expected)


def test_padding_duplicates_have_no_share() -> None:
    z, teacher = logits_of(11, 4, 3), logits_of(12, 4, 3)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    objective: Objective = 1 * Distillation("ce")
    expected = Distillation("ce")(z, teacher)[:3].mean()
    torch.testing.assert_close(objective(logits=z, teacher_logits=teacher, sample_weight=weight), expected)


def test_teacher_free_self_distillation_is_a_formula_with_a_frozen_copy_as_teacher() -> None:
    # Yuan et al., arXiv:1909.11723: (1-a) CE + a KL(teacher || student) at a temperature, teacher = the same net trained before
    from poise.frozen import FrozenModel
    from poise.terms.supervised import CrossEntropy

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).double()
    teacher = FrozenModel(model)
    x, y = logits_of(13, 6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = 0.1 * CrossEntropy() + 0.9 * Distillation("kl", temperature=20.0)
    loss = objective(logits=model(x), target=y, teacher_logits=teacher(x))
    loss.backward()
    # at the copy itself only cross-entropy pulls
    (expected,) = torch.autograd.grad(0.1 * F.cross_entropy(model(x), y), model.weight)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_a_class_wise_partner_is_another_example_of_the_class_and_partners_are_a_permutation() -> None:
    from poise.terms.self_distillation import _next_of_class

    generator = torch.Generator().manual_seed(0)
    for classes in (1, 3, 40):
        target = torch.randint(classes, (50,), generator=generator)
        partner = _next_of_class(target)
        assert (target[partner] == target).all()
        assert sorted(partner.tolist()) == list(range(50))
        alone = torch.bincount(target, minlength=classes)[target] == 1
        assert ((partner == torch.arange(50)) == alone).all()


def test_class_wise_self_distillation_equals_its_formula_on_pairs() -> None:
    z = logits_of(14, 5, 4).requires_grad_()
    target = torch.tensor([2, 0, 2, 0, 1])
    objective: Objective = 1 * ClassWiseSelfDistillation(temperature=4.0)
    p = (z / 4).softmax(-1)
    q = p.detach()[[2, 3, 0, 1]]
    expected = 16 * (q * (q.log() - p[:4].log())).sum(-1).mean()  # the last example is alone and has no share
    loss = objective(logits=z, target=target)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (ours,) = torch.autograd.grad(loss, z)
    (theirs,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_any_partner_the_class_wise_term_is_zero_and_finite() -> None:
    z = logits_of(15, 3, 3).requires_grad_()
    loss = (1 * ClassWiseSelfDistillation())(logits=z, target=torch.tensor([0, 1, 2]))
    loss.backward()
    assert float(loss) == 0.0
    assert float(z.grad.abs().max()) == 0.0  # type: ignore[union-attr]


def test_the_class_wise_term_does_not_depend_on_the_order_of_a_batch_of_pairs() -> None:
    z, target = logits_of(16, 6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    shuffle = torch.tensor([5, 2, 0, 4, 1, 3])
    objective: Objective = 1 * ClassWiseSelfDistillation()
    torch.testing.assert_close(
        objective(logits=z, target=target), objective(logits=z[shuffle], target=target[shuffle]), rtol=1e-12, atol=1e-12
    )


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"mse_prob.*Did you mean 'mse_logit'"):
        Distillation("mse_logits")  # type: ignore[arg-type]
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="temperature"):
            Distillation(temperature=temperature)
        with pytest.raises(InputError, match="temperature"):
            ClassWiseSelfDistillation(temperature=temperature)
    with pytest.raises(QuantityError, match="teacher_logits"):
        (1 * Distillation())(logits=torch.zeros(2, 3))
    with pytest.raises(QuantityError, match="teacher_logits"):
        (1 * Distillation())(logits=torch.zeros(2, 3), teacher_logits=torch.zeros(2, 4))


def test_terms_print_as_formulas_and_copy() -> None:
    from poise import parse

    text = "cross_entropy + 0.5*distillation(loss='kl', temperature=4.0) + class_wise_self_distillation"
    objective = parse(text)
    assert parse(str(objective)).equals(objective)
    assert str(copy.deepcopy(objective)) == str(objective)
