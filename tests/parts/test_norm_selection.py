"""The choice of k by the norm: equal to a full sort, on every path."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError
from poise.parts import norm_selection
from poise.parts.norm_selection import norm_mask


def by_sort(
    a: Tensor, norms: Tensor, t: Tensor, nearest: bool = True, max_k: int | None = None, guard: float = math.inf
) -> tuple[Tensor, Tensor]:
    """The rule as the paper's code has it: sort a row whole, add up, put the guard last, take the nearest."""
    s = (a.double().clamp_min(0) * norms.double()).square()
    values, index = torch.sort(s, dim=1, descending=True, stable=True)
    c = values.cumsum(1).sqrt()
    c[:, -1] = guard
    t = t.double()[:, None]
    k = ((c - t).abs().argmin(1) if nearest else (c >= t).int().argmax(1)) + 1
    k = k if max_k is None else k.clamp_max(max_k)
    rank = torch.arange(a.shape[1]) < k[:, None]
    return torch.zeros_like(s, dtype=torch.bool).scatter(1, index, rank) & (s > 0), k


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_selection, "_loop", lambda: None)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 70), st.booleans(), st.sampled_from((None, 1, 3)),
    st.sampled_from((math.inf, 3.0)), st.sampled_from((torch.float32, torch.float64)), st.booleans(),
)  # fmt: skip
def test_mask_and_k_are_those_of_a_full_sort(
    seed: int, h: int, nearest: bool, max_k: int | None, guard: float, dtype: torch.dtype, ties: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(5, h, generator=g, dtype=dtype)
    a = (2 * a).round() / 2 if ties else a
    norms = torch.rand(h, generator=g, dtype=dtype) + 0.5 if not ties else torch.ones(h, dtype=dtype)
    t = 1.5 * torch.rand(5, generator=g, dtype=dtype) * torch.linalg.vector_norm(a, dim=1)
    if not nearest:
        guard = math.inf
    mask, k = by_sort(a, norms, t, nearest, max_k, guard)
    found = norm_mask(a, norms, t, nearest=nearest, max_k=max_k, guard=guard)
    assert torch.equal(found[1], k)
    assert torch.equal(found[0], mask)
    most = h if max_k is None else max_k
    alike = norm_selection._by_largest(a, norms, t.double(), nearest, min(most, h), guard)
    assert torch.equal(alike[1], k)
    kept = [torch.where(m, a, 0).sort(1).values for m in (alike[0], mask)]
    assert torch.equal(*kept)  # of equal entries PyTorch keeps any


@pytest.mark.parametrize("nearest", [True, False])
def test_a_row_of_zeros_that_is_asked_for_nothing_gives_one_entry(nearest: bool) -> None:
    a, t = torch.tensor([[0.0, -1.0, 0.0]]), torch.tensor([0.0])
    assert norm_mask(a, None, t, nearest=nearest)[1].tolist() == [1]
    assert norm_selection._by_largest(a, None, t.double(), nearest, 3, math.inf)[1].tolist() == [1]


@pytest.mark.parametrize("h", [300, 1000])
def test_rows_of_many_features_take_the_same_choice(h: int) -> None:
    g = torch.Generator().manual_seed(h)
    a = torch.randn(200, h, generator=g)
    t = torch.rand(200, generator=g) * torch.linalg.vector_norm(a, dim=1)
    expected = by_sort(a, torch.ones(h), t)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = norm_mask(a, None, t)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    slow = norm_selection._by_largest(a, None, t.double(), True, h, math.inf)
    assert torch.equal(slow[0], expected[0])
    assert torch.equal(slow[1], expected[1])


@pytest.mark.parametrize("change", [lambda m: None, alone])
def test_the_tutorials_example_keeps_two_of_three(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    acts = torch.tensor([[5.0, 4.0, 3.0], [1.0, 1.0, 1.0], [1.0, 10.0, 2.0]])
    decoder = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    target = torch.linalg.vector_norm(acts @ decoder, dim=1)
    for guard in (100.0, math.inf):  # sqrt(1e4), as the notebook puts its guard in before the root
        mask, k = norm_mask(acts, decoder.norm(dim=1), target, guard=guard)
        assert k.tolist() == [2, 2, 2]
        assert torch.where(mask, acts, 0).tolist() == [[0, 4, 3], [0, 1, 1], [0, 10, 2]]


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_k_rises_with_the_target(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(1, 40, generator=g).expand(20, 40)
    t = torch.linspace(0, 10, 20)
    for nearest in (True, False):
        k = norm_mask(a, None, t, nearest=nearest)[1]
        assert bool((k.diff() >= 0).all())


@pytest.mark.parametrize("change", [lambda m: None, alone])
def test_a_row_without_activity_keeps_nothing(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    mask, k = norm_mask(-torch.ones(2, 5), None, torch.tensor([0.0, 3.0]))
    assert not bool(mask.any())
    assert k.tolist() == [1, 1]


def test_no_rows_give_no_rows() -> None:
    mask, k = norm_mask(torch.zeros(0, 5), None, torch.zeros(0))
    assert mask.shape == (0, 5)
    assert len(k) == 0


@pytest.mark.parametrize("change", [lambda m: None, alone])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_with_its_row(
    change: Callable[[pytest.MonkeyPatch], None], bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    a = torch.ones(3, 4)
    a[1, 2] = bad
    if bad != -math.inf or norm_selection._loop() is not None:
        with pytest.raises(InputError, match="row 1 of the batch"):
            norm_mask(a, None, torch.ones(3))
    with pytest.raises(InputError, match="row 0 of the batch"):
        norm_mask(torch.ones(3, 4), None, torch.tensor([bad, 1.0, 1.0]))


def test_one_feature_is_no_dictionary() -> None:
    with pytest.raises(InputError, match="two features at least"):
        norm_mask(torch.ones(3, 1), None, torch.ones(3))


def test_half_precision_is_chosen_in_float32() -> None:
    a = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    t = torch.full((6,), 2.0)
    assert torch.equal(norm_mask(a, None, t)[0], norm_mask(a.float(), None, t)[0])
