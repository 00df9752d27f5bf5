"""Laws of early-learning regularisation (arXiv:2007.00151)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import poise
from poise.errors import InputError, QuantityError, StateError
from poise.objective import DataInfo
from poise.terms import CrossEntropy, EarlyLearning, RefinedCrossEntropy

# float64 throughout a value of ten operations: what remains is rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def bound(examples: int = 12, classes: int = 5, **arguments: object) -> EarlyLearning:
    term = EarlyLearning(**{"dtype": "float64", **arguments})  # type: ignore[arg-type]
    term.bind(DataInfo(examples=examples, classes=classes))
    return term


def random_logits(rows: int, classes: int = 5, seed: int = 0, scale: float = 1.5) -> Tensor:
    # Within +-4 no probability of 5 classes leaves [1e-4, 1 - 1e-4]: the clamp is not active.
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).clamp(-4, 4)


def visit(term: EarlyLearning, logits: Tensor, index: Tensor, **more: Tensor) -> None:
    with torch.no_grad():
        term.advance(logits, index, **more)


class PublishedLoss:
    """The authors' loss written anew from its description (README of shengliu66/ELR): an oracle, not their code."""

    def __init__(self, examples: int, classes: int, beta: float, weight: float) -> None:
        self.memory = torch.zeros(examples, classes, dtype=torch.float64)
        self.beta, self.weight = beta, weight

    def __call__(self, index: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        prob = functional.softmax(logits, dim=1).clamp(1e-4, 1 - 1e-4)
        fresh = prob.detach() / prob.detach().sum(1, keepdim=True)
        self.memory[index] = self.beta * self.memory[index] + (1 - self.beta) * fresh
        agreement = (self.memory[index] * prob).sum(1)
        return functional.cross_entropy(logits, label) + self.weight * (1 - agreement).log().mean()


@settings(deadline=None)  # the first example pays for imports
@given(beta=st.floats(0, 0.99), weight=st.floats(0.1, 10), seed=st.integers(0, 10_000))
def test_values_and_gradients_equal_the_authors_loss_step_by_step(beta: float, weight: float, seed: int) -> None:
    term = bound(examples=8, beta=beta)
    objective = CrossEntropy() + weight * term
    oracle = PublishedLoss(8, 5, beta, weight)
    generator = torch.Generator().manual_seed(seed)
    for step in range(4):
        logits = 6 * torch.randn(6, 5, generator=generator, dtype=torch.float64)  # large enough for the clamp to act
        index = torch.randperm(8, generator=generator)[:6]
        target = torch.randint(5, (6,), generator=generator)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value, expected = objective(logits=ours, target=target, index=index), oracle(index, theirs, target)
        value.backward()
        expected.backward()
        objective.advance()
        # log(1 - s) loses digits where s is close to 1: 1e-4 of distance costs four of the sixteen.
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=f"step {step}")
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(term.targets(), oracle.memory, **EXACT)


@settings(deadline=None)  # the first example pays for imports
@given(beta=st.floats(0, 0.99), seed=st.integers(0, 10_000))
def test_the_gradient_is_minus_p_times_t_minus_s_over_one_minus_s(beta: float, seed: int) -> None:
    term = bound(beta=beta)
    index = torch.arange(12)
    visit(term, random_logits(12, seed=seed + 1), index)
    logits = random_logits(12, seed=seed).requires_grad_()
    value = term(logits, index)
    (gradient,) = torch.autograd.grad(value.values.sum(), logits)
    p, t = torch.softmax(logits, 1).detach(), value.extras["target"]
    s = (p * t).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, -p * (t - s) / (1 - s), **EXACT)
    pairwise = p / (1 - s) * ((t[:, None, :] - t[:, :, None]) * p[:, None, :]).sum(2)  # the paper's sum over classes
    torch.testing.assert_close(gradient, pairwise, **EXACT)


@settings(deadline=None)  # the first example pays for imports
@given(seed=st.integers(0, 10_000))
def test_a_gradient_step_moves_the_prediction_towards_the_largest_target(seed: int) -> None:
    term = bound()
    index = torch.arange(12)
    visit(term, random_logits(12, seed=seed + 1), index)
    logits = random_logits(12, seed=seed).requires_grad_()
    value = term(logits, index)
    (gradient,) = torch.autograd.grad(value.values.sum(), logits)
    best = value.extras["target"].argmax(1, keepdim=True)
    assert bool((gradient.gather(1, best) <= 0).all())


def test_weight_zero_is_plain_cross_entropy() -> None:
    logits, target = random_logits(4), torch.tensor([0, 1, 2, 3])
    objective = CrossEntropy() + 0 * EarlyLearning()
    assert objective.labels == ("cross_entropy",)
    torch.testing.assert_close(
        objective(logits=logits, target=target), functional.cross_entropy(logits, target), **EXACT
    )


def test_without_memory_the_target_is_the_prediction_itself() -> None:
    term, logits, index = bound(beta=0.0), random_logits(12), torch.arange(12)
    visit(term, random_logits(12, seed=5), index)  # forgotten at once
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(term(logits, index).values, torch.log1p(-(p * p).sum(1)), **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 0.9])
def test_the_target_sums_to_one_minus_beta_to_the_visits(beta: float) -> None:
    term, index = bound(beta=beta), torch.arange(12)
    for k in range(1, 6):
        visit(term, random_logits(12, seed=k), index)
        torch.testing.assert_close(term.targets().sum(1), torch.full((12,), 1 - beta**k, dtype=torch.float64), **EXACT)
    assert bool((term.memory.visits == 5).all())


def test_two_equal_visits_give_one_minus_beta_squared_times_the_prediction() -> None:
    term, logits, index = bound(beta=0.7), random_logits(12), torch.arange(12)
    visit(term, logits, index)
    visit(term, logits, index)
    torch.testing.assert_close(term.targets(), (1 - 0.7**2) * torch.softmax(logits, 1), **EXACT)


def test_bias_correction_makes_the_target_sum_to_one_from_the_first_visit() -> None:
    term, index = bound(bias_correction=True), torch.arange(12)
    for k in range(3):
        logits = random_logits(12, seed=k)
        total = term(logits, index).extras["target"].sum(1)
        torch.testing.assert_close(total, torch.ones(12, dtype=torch.float64), **EXACT)
        visit(term, logits, index)


def test_no_gradient_reaches_the_target() -> None:
    term, index = bound(), torch.arange(12)
    logits = random_logits(12).requires_grad_()
    value = term(logits, index)
    assert not value.extras["target"].requires_grad
    assert value.values.requires_grad
    teacher = torch.softmax(random_logits(12, seed=3), 1).requires_grad_()
    taught = bound(teacher=True)
    (gradient,) = torch.autograd.grad(taught(logits, index, teacher).values.sum(), teacher, allow_unused=True)
    assert gradient is None


def test_where_the_clamp_acts_the_gradient_of_that_entry_is_zero() -> None:
    # Two classes: both entries are clamped, so the whole row is silent although s < 1.
    term = bound(examples=1, classes=2)
    logits = torch.tensor([[20.0, -20.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(term(logits, torch.tensor([0])).values.sum(), logits)
    assert float(gradient.abs().max()) == 0.0


@settings(deadline=None)  # the first example pays for imports
@given(
    scale=st.floats(0.0, 1e4),
    visits=st.integers(0, 40),
    seed=st.integers(0, 100),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_the_value_is_finite_and_lies_between_log_eps_and_zero(
    scale: float, visits: int, seed: int, dtype: str
) -> None:
    term = bound(dtype=dtype)
    index = torch.arange(12)
    logits = random_logits(12, seed=seed).sign().float() * scale
    for _ in range(visits):
        visit(term, logits, index)
    logits.requires_grad_()
    values = term(logits, index).values
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(gradient).all()
    assert bool((values <= 0).all())
    assert bool((values >= -9.2104).all())  # log(1e-4) = -9.21034...


@pytest.mark.parametrize("form", ["log", "kl", "ce"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision_gives_finite_values_and_gradients(form: str, dtype: torch.dtype) -> None:
    term = bound(form=form, dtype="float32")
    logits = torch.tensor([[3e4, -3e4, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=dtype, requires_grad=True)
    for _ in range(3):
        visit(term, logits.detach(), torch.tensor([0, 1]))
    values = term(logits, torch.tensor([0, 1])).values
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    assert gradient.dtype == dtype


def test_both_ablations_have_the_gradient_that_vanishes_at_the_target() -> None:
    index = torch.arange(12)
    for form in ("ce", "kl"):
        term = bound(form=form)
        visit(term, random_logits(12, seed=9), index)
        logits = random_logits(12).requires_grad_()
        value = term(logits, index)
        (gradient,) = torch.autograd.grad(value.values.sum(), logits)
        t = value.extras["target"]
        torch.testing.assert_close(gradient, t.sum(1, keepdim=True) * torch.softmax(logits, 1).detach() - t, **EXACT)


def test_the_divergence_form_is_the_cross_entropy_form_less_the_entropy_of_the_target() -> None:
    index, logits = torch.arange(12), random_logits(12)
    kl, ce = bound(form="kl", bias_correction=True), bound(form="ce", bias_correction=True)
    t = ce(logits, index).extras["target"]
    torch.testing.assert_close(kl(logits, index).values, ce(logits, index).values + (t * t.log()).sum(1), **EXACT)
    assert bool((kl(logits, index).values >= -1e-12).all())  # a divergence between distributions; 0 where p = t


def test_forward_moves_nothing_and_advance_stores_what_forward_looked_ahead_at() -> None:
    term, index, logits = bound(), torch.arange(12), random_logits(12)
    before = copy.deepcopy(term.state_dict())
    first, second = term(logits, index), term(logits, index)
    assert torch.equal(first.values, second.values)
    assert all(torch.equal(before[k], v) for k, v in term.state_dict().items())
    visit(term, logits, index)
    torch.testing.assert_close(term.targets(), first.extras["target"], **EXACT)


def test_what_forward_worked_out_is_stored_only_for_the_very_same_tensors() -> None:
    # `advance` may reuse the look-ahead of `forward`; whatever differs (a prefix, changed contents, other tensors) is worked out anew.
    index, logits = torch.arange(12), random_logits(12)

    def check(change: str) -> None:
        term, given_logits, given_index = bound(), logits.clone(), index.clone()
        term(given_logits, given_index)
        if change == "prefix":
            given_logits, given_index = given_logits[:5], given_index[:5]
        elif change == "contents":
            given_logits.mul_(2)
        elif change == "memory":
            visit(term, random_logits(12, seed=1), index)
        elif change == "other":
            given_logits = random_logits(12, seed=2)
        fresh = bound()
        if change == "memory":
            visit(fresh, random_logits(12, seed=1), index)
        visit(term, given_logits, given_index)
        visit(fresh, given_logits, given_index)
        assert torch.equal(term.targets(), fresh.targets()), change

    for change in ("none", "prefix", "contents", "memory", "other"):
        check(change)


@settings(deadline=None)  # the first example pays for imports
@given(seed=st.integers(0, 1000))
def test_permuting_the_batch_leaves_loss_and_memory_unchanged(seed: int) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    logits, index = random_logits(12, seed=seed), torch.arange(12)
    straight, shuffled = bound(), bound()
    assert torch.equal(straight(logits, index).values[order], shuffled(logits[order], index[order]).values)
    visit(straight, logits, index)
    visit(shuffled, logits[order], index[order])
    assert torch.equal(straight.targets(), shuffled.targets())


def test_the_memory_survives_saving_copying_and_pickling_bit_for_bit() -> None:
    objective = CrossEntropy() + 3 * EarlyLearning()
    objective.bind(examples=12, classes=5)
    objective(
        logits=random_logits(12).float().requires_grad_(),
        target=torch.zeros(12, dtype=torch.int64),
        index=torch.arange(12),
    )
    objective.advance()
    fresh = poise.parse(str(objective))
    fresh.load_state_dict(objective.state_dict())  # loading binds
    for twin in (fresh, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        for (name, saved), (_, loaded) in zip(objective.state_dict().items(), twin.state_dict().items(), strict=True):
            assert not isinstance(saved, Tensor) or torch.equal(saved, loaded), name
    assert objective.terms["early_learning"].memory.visits.sum() == 12


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8)])
def test_the_memory_takes_examples_times_classes_numbers_of_its_dtype(dtype: str, size: int) -> None:
    term = bound(examples=1000, classes=10, dtype=dtype)
    values = term.memory.values
    assert values.numel() * values.element_size() == 1000 * 10 * size
    term.to(torch.float64)
    assert term.memory.values.dtype == getattr(torch, dtype)


def test_a_half_precision_memory_stays_close_to_the_exact_one() -> None:
    exact, half, index = bound(), bound(dtype="bfloat16"), torch.arange(12)
    for k in range(20):
        for term in (exact, half):
            visit(term, random_logits(12, seed=k), index)
    # Each store rounds to 8 bits of mantissa (2^-9 of a value below 1), and earlier errors fade by beta: 2^-9 / (1 - 0.7).
    torch.testing.assert_close(half.targets().double(), exact.targets(), rtol=0, atol=2**-9 / 0.3)


def test_a_sparse_memory_of_all_classes_is_the_dense_one_and_a_smaller_one_keeps_the_largest() -> None:
    dense, full, two = bound(), bound(top=5), bound(top=2)
    index = torch.arange(12)
    for k in range(3):
        for term in (dense, full, two):
            visit(term, random_logits(12, seed=k), index)
    torch.testing.assert_close(full.targets(), dense.targets(), **EXACT)
    assert bool(((two.targets() > 0).sum(1) == 2).all())
    assert two.memory.values.shape == (12, 2)
    loaded = EarlyLearning(top=2, dtype="float64")
    loaded.load_state_dict(two.state_dict())
    logits = random_logits(12, seed=7)
    torch.testing.assert_close(loaded(logits, index).values, two(logits, index).values, rtol=0, atol=0)


def test_a_teacher_replaces_the_prediction_as_the_source_of_targets() -> None:
    term, index, logits = bound(teacher=True, beta=0.9), torch.arange(12), random_logits(12)
    teacher = torch.softmax(random_logits(12, seed=4), 1)
    visit(term, logits, index, teacher_probabilities=teacher)
    torch.testing.assert_close(term.targets(), 0.1 * teacher, **EXACT)
    assert "teacher_probabilities" in (1.0 * term).plan()
    assert "teacher_probabilities" not in (1.0 * bound()).plan()


def test_a_mixed_input_meets_the_mixed_target() -> None:
    term, index, logits = bound(), torch.arange(12), random_logits(12)
    visit(term, random_logits(12, seed=2), index)
    plain = term(logits, index).extras["target"]
    partner, share = torch.arange(11, -1, -1), torch.full((12,), 0.8, dtype=torch.float64)
    mixed = term(logits, index, partner=partner, share=share)
    torch.testing.assert_close(mixed.extras["target"], 0.8 * plain + 0.2 * plain[partner], **EXACT)


def test_refined_labels_shift_to_the_class_that_the_target_believes_and_one_hot_labels_stay() -> None:
    logits, index = random_logits(2), torch.tensor([0, 1])
    objective = poise.parse("refined_cross_entropy.on(early_target='early_learning.target') + 2*early_learning")
    objective.bind(examples=2, classes=5)
    hard = torch.eye(5, dtype=torch.float64)[[1, 4]]
    mixed = 0.6 * hard + 0.4 * torch.eye(5, dtype=torch.float64)[[2, 0]]
    for label in (hard, mixed):
        report = objective.evaluate(logits=logits, target=label, index=index)
        t = 0.3 * torch.softmax(logits, 1)  # the first visit
        refined = label * t / (label * t).sum(1, keepdim=True)
        expected = -(refined * torch.log_softmax(logits, 1)).sum(1).mean()
        torch.testing.assert_close(report.terms["refined_cross_entropy"].value, expected, **EXACT)
    nobody = torch.zeros(2, 5, dtype=torch.float64)
    torch.testing.assert_close(
        RefinedCrossEntropy()(logits, mixed, nobody), functional.cross_entropy(logits, mixed, reduction="none"), **EXACT
    )


def test_derivatives_by_transforms_leave_nothing_behind() -> None:
    term, logits, index = bound(), random_logits(3), torch.arange(3)
    expected = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(expected, index).values.sum(), expected)
    by_transform = torch.func.grad(lambda z: term(z, index).values.sum())(logits)
    torch.testing.assert_close(by_transform, gradient, **EXACT)
    visit(term, logits, index)
    torch.testing.assert_close(term.targets(torch.arange(3)), 0.3 * torch.softmax(logits, 1), **EXACT)


def test_a_padding_duplicate_is_not_a_visit() -> None:
    padded, plain, logits = bound(), bound(), random_logits(4)
    visit(plain, logits[:3], torch.tensor([0, 1, 2]))
    objective = 1 * padded
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    objective(logits=logits.clone().requires_grad_(), index=torch.tensor([0, 1, 2, 0]), sample_weight=weight)
    objective.advance()
    assert torch.equal(padded.targets(), plain.targets())
    assert torch.equal(padded.memory.visits, plain.memory.visits)


def test_uneven_micro_batches_give_the_loss_and_memory_of_one_batch() -> None:
    logits, target, index = random_logits(12), torch.zeros(12, dtype=torch.int64), torch.arange(12)
    whole, parts = bound(), bound()
    together, apart = CrossEntropy() + 3 * whole, CrossEntropy() + 3 * parts
    value = together(logits=logits.clone().requires_grad_(), target=target, index=index)
    pieces = [
        apart(logits=logits[rows].clone().requires_grad_(), target=target[rows], index=index[rows]) * len(rows) / 12
        for rows in (index[:7], index[7:])
    ]
    torch.testing.assert_close(sum(pieces), value, **EXACT)
    together.advance()
    apart.advance()
    assert torch.equal(whole.targets(), parts.targets())


def test_the_formula_names_every_argument() -> None:
    text = "cross_entropy + 3*early_learning(beta=0.9, form='kl', bias_correction=True, dtype='bfloat16', top=3)"
    objective = poise.parse(text)
    assert poise.parse(str(objective)).equals(objective)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"eps": 0.0}, "eps"),
        ({"form": "mse"}, "form"),
        ({"dtype": "int8"}, "dtype"),
        ({"top": -1}, "top"),
    ],
)
def test_arguments_out_of_range_are_refused_in_words(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        EarlyLearning(**arguments)


def test_wrong_data_is_refused_in_words() -> None:
    term = bound(examples=4)
    logits = random_logits(2)
    with pytest.raises(QuantityError, match=r"4.*outside \[0, 4\)"):
        term(logits, torch.tensor([0, 4]))
    with pytest.raises(QuantityError, match="more than once"):
        visit(term, logits, torch.tensor([1, 1]))
    with pytest.raises(QuantityError, match="bound to 5 classes, but the model gives 3"):
        term(random_logits(2, classes=3), torch.tensor([0, 1]))
    with pytest.raises(QuantityError, match="'index'"):
        term(logits, torch.tensor([0.0, 1.0]))
    with pytest.raises(StateError, match="bind"):
        EarlyLearning()(logits, torch.tensor([0, 1]))
    with pytest.raises(QuantityError, match="'index'"):
        (1.0 * term)(logits=logits)
    with pytest.raises(InputError, match="belongs to one training set"):
        term.bind(DataInfo(examples=5, classes=5))
    with pytest.raises(InputError, match="of 5"):
        EarlyLearning(top=6).bind(DataInfo(examples=4, classes=5))
    with pytest.raises(InputError, match="negative weight"):
        (CrossEntropy() - 3 * term).check_weights()


def test_a_resume_with_another_data_set_size_is_refused() -> None:
    saved = (1.0 * bound(examples=4)).state_dict()
    other = 1.0 * bound(examples=5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(saved)


def test_non_finite_logits_show_in_the_value_and_are_not_hidden_by_the_clamp() -> None:
    logits = random_logits(2)
    logits[0, 0] = float("nan")
    assert torch.isnan(bound()(logits, torch.tensor([0, 1])).values).tolist() == [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_values_of_the_processor() -> None:
    term, logits, index = bound(dtype="float32"), random_logits(12).float(), torch.arange(12)
    visit(term, logits, index)
    there = copy.deepcopy(term).cuda()
    values = there(logits.cuda(), index.cuda()).values
    torch.testing.assert_close(values.cpu(), term(logits, index).values, rtol=1e-5, atol=1e-6)  # float32 rounding
