"""How far two scorers agree: worked numbers, ties, missing answers, and agreement with SciPy and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.consistency import _AT_A_TIME, label_of_strength, rank_consistency, rank_correlation

NOW = torch.tensor([[-1.2, 0.3, 0.9, -0.4, 2.1]])
BEFORE = torch.tensor([[-0.8, 0.5, 0.1, -1.5, 1.0]])


def tied_scores(prompts: int = 60, answers: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores among a few numbers, so that most rows have ties."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 4, (prompts, answers), generator=g).double() for _ in range(2))
    return a, b


def test_the_worked_example_has_tau_six_tenths_and_consistency_eight_tenths() -> None:
    assert rank_correlation(NOW.double(), BEFORE.double()).item() == pytest.approx(0.6, abs=1e-12)
    assert rank_consistency(NOW.double(), BEFORE.double()).item() == pytest.approx(0.8, abs=1e-12)


def test_tau_b_of_tied_scores_is_that_of_the_textbook() -> None:
    a, b = torch.tensor([[1.0, 1, 2, 3]]), torch.tensor([[1.0, 2, 2, 3]])
    assert rank_correlation(a, b).item() == pytest.approx(0.8)
    assert rank_correlation(a, b, ties="a").item() == pytest.approx(4 / 6)


@pytest.mark.parametrize("method", ["kendall", "spearman", "top_order"])
def test_the_same_order_gives_one_the_reverse_zero_and_both_scorers_count_alike(method: str) -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(20, 5, generator=g), torch.randn(20, 5, generator=g)
    torch.testing.assert_close(rank_consistency(a, 3 * a.exp(), method), torch.ones(20))
    torch.testing.assert_close(rank_consistency(a, -a, method), torch.zeros(20))
    assert torch.equal(rank_consistency(a, b, method), rank_consistency(b, a, method))
    order = torch.randperm(5, generator=g)
    torch.testing.assert_close(rank_consistency(a[:, order], b[:, order], method), rank_consistency(a, b, method))


@pytest.mark.parametrize("method", ["kendall", "spearman", "top_order"])
def test_where_everything_is_tied_or_one_answer_is_left_the_rate_is_undefined(method: str) -> None:
    a = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    b = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])
    assert rank_consistency(a, b, method, mask=mask).isnan().tolist() == [True, True, True]


@pytest.mark.parametrize("method", ["kendall", "spearman", "top_order"])
def test_a_missing_answer_counts_as_if_it_had_never_been_there(method: str) -> None:
    a, b = tied_scores()
    mask = torch.rand(a.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    found = rank_consistency(a.masked_fill(~mask, torch.nan), b.masked_fill(~mask, 99.0), method, mask=mask)
    for row in range(len(a)):
        kept = mask[row]
        if kept.sum() < 2:
            assert found[row].isnan()
            continue
        alone = rank_consistency(a[row, kept][None], b[row, kept][None], method)
        torch.testing.assert_close(found[row], alone[0], equal_nan=True)


def test_top_order_looks_at_the_best_and_the_worst_wherever_they_stand() -> None:
    a = torch.tensor([[2.0, 9.0, 1.0, 5.0], [2.0, 9.0, 1.0, 5.0]])
    b = torch.tensor([[5.0, 9.0, 1.0, 2.0], [1.0, 9.0, 2.0, 5.0]])  # the first and the last answer are in other places
    assert rank_consistency(a, b, "top_order").tolist() == [1.0, 0.0]


def test_infinite_scores_have_an_order_too_and_no_gradient_flows_through_scores() -> None:
    a = torch.tensor([[-torch.inf, -torch.inf, 0.0, torch.inf]], requires_grad=True)
    found = rank_consistency(a, a)
    assert found.item() == 1.0
    assert not found.requires_grad


def test_many_answers_are_compared_in_parts_with_the_same_result() -> None:
    g = torch.Generator().manual_seed(3)
    prompts, answers = 6, int((_AT_A_TIME / 2) ** 0.5)  # two prompts at a time
    a, b = torch.randn(prompts, answers, generator=g), torch.randn(prompts, answers, generator=g)
    alone = torch.cat([rank_consistency(x[None], y[None]) for x, y in zip(a, b, strict=True)])
    assert torch.equal(rank_consistency(a, b), alone)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_rate_keeps_the_dtype_of_the_scores(kind: torch.dtype) -> None:
    assert rank_consistency(NOW.to(kind), BEFORE.to(kind)).dtype == kind


@pytest.mark.parametrize("method", ["kendall", "spearman"])
def test_it_equals_scipy_row_by_row_with_ties(method: str) -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = tied_scores()
    reference = {"kendall": stats.kendalltau, "spearman": stats.spearmanr}[method]
    wanted = [
        float(reference(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    torch.testing.assert_close(rank_correlation(a, b, method), torch.tensor(wanted).double(), equal_nan=True)


@pytest.mark.peer
def test_it_equals_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    g = torch.Generator().manual_seed(4)
    a, b = torch.randn(20, 5, generator=g), torch.randint(0, 4, (20, 5), generator=g).float()
    b[(b == b[:, :1]).all(1), 0] = 9.0
    wanted = functional.kendall_rank_corrcoef(a.T, b.T, variant="b")
    torch.testing.assert_close(rank_correlation(a, b), wanted)


def test_a_penalty_on_the_distance_from_uniform_amounts_to_a_label() -> None:
    """(1 + l/2) f(z) + (l/2) f(-z) with f = -log sigma, which is dpo + l KL(uniform || P) up to a constant."""
    strength = 0.8
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)
    dpo, reverse = torch.nn.functional.softplus(-z), torch.nn.functional.softplus(z)
    label = label_of_strength(strength)
    soft = label * dpo + (1 - label) * reverse
    divergence = 0.5 * dpo + 0.5 * reverse - math.log(2)
    torch.testing.assert_close((1 + strength) * soft, dpo + strength * (divergence + math.log(2)))
    assert label_of_strength(0) == 1.0
    assert label_of_strength(1e9) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_consistency(torch.zeros(2, 1), torch.zeros(2, 1)), "at least two answers"),
        (lambda: rank_consistency(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\] and \[2, 4\]"),
        (lambda: rank_consistency(NOW, BEFORE, "cosine"), "method is one of"),
        (lambda: rank_consistency(NOW, BEFORE, ties="c"), "ties is 'a' or 'b'"),
        (lambda: rank_consistency(NOW, BEFORE, mask=torch.ones(1, 4)), "mask is bool"),
        (lambda: rank_consistency(NOW * torch.nan, BEFORE), "a score is NaN"),
        (lambda: label_of_strength(-1), "at least 0"),
    ],
)
def test_what_does_not_fit_is_said(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
