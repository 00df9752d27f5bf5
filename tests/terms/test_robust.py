"""Laws of the losses that tolerate wrong labels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from poise.errors import InputError, QuantityError
from poise.formula import parse
from poise.terms.robust import (
    Bootstrap,
    ForwardCorrection,
    GeneralizedCrossEntropy,
    SymmetricCrossEntropy,
    estimate_transition,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, a handful of operations


def batch(rows: int = 6, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (rows,), generator=generator)


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("seed", range(3))
def test_full_trust_in_the_label_is_cross_entropy(seed: int) -> None:
    logits, target = batch(seed=seed)
    for term in (
        Bootstrap(beta=1.0),
        Bootstrap(beta=1.0, hard=True),
        GeneralizedCrossEntropy(q=0.0),
        SymmetricCrossEntropy(alpha=1.0, beta=0.0),
        ForwardCorrection(noise=0.0),
    ):
        torch.testing.assert_close(term(logits, target), cross_entropy(logits, target), **EXACT)


def test_bootstrap_equals_its_published_sum() -> None:
    logits, target = batch()
    p = torch.softmax(logits, dim=1)
    y = functional.one_hot(target, 4).double()
    z = functional.one_hot(p.argmax(1), 4).double()
    torch.testing.assert_close(Bootstrap(0.95)(logits, target), -((0.95 * y + 0.05 * p) * p.log()).sum(1), **EXACT)
    torch.testing.assert_close(
        Bootstrap(0.8, hard=True)(logits, target), -((0.8 * y + 0.2 * z) * p.log()).sum(1), **EXACT
    )


@given(q=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_the_gradient_of_generalized_cross_entropy_is_that_of_cross_entropy_times_p_to_the_q(
    q: float, seed: int
) -> None:
    logits, target = batch(seed=seed)
    logits.requires_grad_()
    p = torch.softmax(logits, dim=1).gather(1, target[:, None]).detach()
    (ours,) = torch.autograd.grad(GeneralizedCrossEntropy(q)(logits, target).sum(), logits)
    (plain,) = torch.autograd.grad(cross_entropy(logits, target).sum(), logits)
    torch.testing.assert_close(ours, p**q * plain, **EXACT)


def test_generalized_cross_entropy_at_one_is_half_the_absolute_error() -> None:
    logits, target = batch()
    error = (torch.softmax(logits, 1) - functional.one_hot(target, 4)).abs().sum(1)
    torch.testing.assert_close(GeneralizedCrossEntropy(1.0)(logits, target), error / 2, **EXACT)


def test_truncation_silences_exactly_the_disbelieved_examples() -> None:
    logits, target = batch(rows=40)
    logits.requires_grad_()
    p = torch.softmax(logits, 1).gather(1, target[:, None]).squeeze(1)
    values = GeneralizedCrossEntropy(0.7, truncate=0.5)(logits, target)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(((gradient.abs().sum(1) == 0) == (p < 0.5)).all())
    torch.testing.assert_close(values[p < 0.5], torch.full_like(values[p < 0.5], (1 - 0.5**0.7) / 0.7), **EXACT)


def test_symmetric_cross_entropy_equals_its_published_sum() -> None:
    logits, target = batch()
    p = torch.softmax(logits, 1)
    y = functional.one_hot(target, 4).double()
    reverse = -(p * torch.where(y > 0, 0.0, -4.0)).sum(1)
    torch.testing.assert_close(
        SymmetricCrossEntropy(0.1, 1.0)(logits, target), 0.1 * cross_entropy(logits, target) + reverse, **EXACT
    )


def test_forward_correction_scores_the_label_under_the_noise_process() -> None:
    logits, target = batch(classes=3)
    transition = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    noisy = torch.softmax(logits, 1) @ transition
    expected = -noisy.gather(1, target[:, None]).squeeze(1).log()
    torch.testing.assert_close(ForwardCorrection(transition=transition)(logits, target), expected, **EXACT)
    nested = tuple(tuple(row) for row in transition.tolist())
    torch.testing.assert_close(ForwardCorrection(transition=nested)(logits, target), expected, **EXACT)


def test_forward_correction_is_minimised_at_the_clean_distribution() -> None:
    # Patrini's theorem 2: the population minimiser under noisy labels is the clean posterior.
    clean = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    term = ForwardCorrection(noise=0.4)
    noisy = clean @ ((1 - 0.4) * torch.eye(3).double() + 0.2 * (1 - torch.eye(3).double()))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        loss = (noisy * term(logits.expand(3, 3), torch.arange(3))).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    torch.testing.assert_close(
        torch.softmax(logits, 0).detach(), clean, rtol=1e-4, atol=1e-4
    )  # gradient descent, 2000 steps


def test_the_noise_kinds_make_the_matrices_they_name() -> None:
    logits, target = batch(classes=3)
    pair = ForwardCorrection(transition=((0.6, 0.4, 0.0), (0.0, 0.6, 0.4), (0.4, 0.0, 0.6)))
    torch.testing.assert_close(ForwardCorrection(noise=0.4, kind="pair")(logits, target), pair(logits, target), **EXACT)


def test_the_matrix_follows_copies_and_precision() -> None:
    term = ForwardCorrection(noise=0.4)
    logits, target = batch()
    twin = copy.deepcopy(term)
    torch.testing.assert_close(twin(logits, target), term(logits, target), rtol=0, atol=0)
    single = term(logits.float(), target)
    torch.testing.assert_close(single, term(logits, target).float(), rtol=1e-5, atol=1e-5)  # float32 rounding
    assert term.state_dict() == {}


def test_every_loss_has_a_formula_that_round_trips() -> None:
    for text in (
        "bootstrap(beta=0.8, hard=True)",
        "generalized_cross_entropy(q=0.5, truncate=0.5)",
        "symmetric_cross_entropy(alpha=6.0, beta=0.1)",
        "forward_correction(noise=0.4, kind='pair')",
        "forward_correction(transition=((0.9, 0.1), (0.0, 1.0)))",
    ):
        objective = parse(text)
        assert parse(str(objective)).equals(objective)


def test_every_loss_stays_finite_at_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    target = torch.tensor([1, 1])
    for term in (
        Bootstrap(),
        Bootstrap(hard=True),
        GeneralizedCrossEntropy(),
        GeneralizedCrossEntropy(truncate=0.5),
        SymmetricCrossEntropy(),
        ForwardCorrection(noise=0.2),
    ):
        value = term(logits, target)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert bool((value >= 0).all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Bootstrap(1.5), "trust in the given label"),
        (lambda: GeneralizedCrossEntropy(q=2), "q lies in"),
        (lambda: GeneralizedCrossEntropy(truncate=1.0), "truncate"),
        (lambda: SymmetricCrossEntropy(alpha=-1), "weights >= 0"),
        (lambda: SymmetricCrossEntropy(log_zero=1), "negative"),
        (lambda: ForwardCorrection(noise=1.0), "share of wrong labels"),
        (lambda: ForwardCorrection(kind="ring"), "transition="),  # type: ignore[arg-type]
        (lambda: ForwardCorrection(transition=((0.5, 0.6), (0.0, 1.0))), "sums to 1"),
        (lambda: ForwardCorrection(transition=((1.0, 0.0), (1.0, 0.0))), "label 1"),
        (lambda: ForwardCorrection(transition=((1.0, 0.0),)), "square"),
    ],
)
def test_wrong_arguments_are_refused_in_words(make, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_another_number_of_classes_is_refused() -> None:
    with pytest.raises(QuantityError, match="2 classes, but logits have 4"):
        ForwardCorrection(transition=((1.0, 0.0), (0.0, 1.0)))(*batch())


def test_the_transition_is_read_off_the_most_confident_example() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    torch.testing.assert_close(estimate_transition(probabilities, quantile=1.0), torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    torch.testing.assert_close(estimate_transition(probabilities, quantile=0.6)[0], torch.tensor([0.6, 0.4]))
    with pytest.raises(InputError, match="quantile"):
        estimate_transition(probabilities, quantile=math.inf)
