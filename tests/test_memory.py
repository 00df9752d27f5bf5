"""The per-example memory: exact rows, exact errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError, QuantityError, StateError
from poise.memory import PerExampleMemory


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_what_is_written_is_read_and_the_rest_stays(index: list[int], dtype: torch.dtype) -> None:
    memory = PerExampleMemory(width=3, dtype=dtype, initial=0.5).bind(10)
    at = torch.tensor(index)
    rows = torch.arange(3.0 * len(index)).view(-1, 3)
    memory.write(at, rows)
    assert torch.equal(memory.read(at).float(), rows)
    others = torch.tensor([i for i in range(10) if i not in index], dtype=torch.int64)
    assert bool((memory.read(others) == 0.5).all())
    assert memory.visits.sum() == len(index)
    assert memory.values.element_size() * memory.values.nelement() == 30 * torch.empty(0, dtype=dtype).element_size()


def test_permuting_the_rows_of_a_write_changes_nothing() -> None:
    at, rows = torch.tensor([3, 0, 7]), torch.rand(3, 2)
    first, second = (PerExampleMemory(2).bind(8) for _ in range(2))
    first.write(at, rows)
    order = torch.tensor([2, 0, 1])
    second.write(at[order], rows[order])
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (torch.tensor([0, 8]), QuantityError, r"8 lies outside \[0, 8\)"),
        (torch.tensor([-1]), QuantityError, "-1 lies outside"),
        (torch.tensor([2, 5, 2]), QuantityError, "2 stands more than once"),
        (torch.tensor([1.0]), QuantityError, r"int64 \[batch\]"),
        (torch.tensor([[1]]), QuantityError, r"int64 \[batch\]"),
    ],
)
def test_a_wrong_index_is_named_and_nothing_is_written(index: torch.Tensor, error: type[Exception], words: str) -> None:
    memory = PerExampleMemory(2).bind(8)
    with pytest.raises(error, match=words):
        memory.write(index, torch.ones(index.numel(), 2))
    assert memory.visits.sum() == 0
    assert not memory.values.any()


def test_a_memory_must_be_bound_and_must_know_its_width() -> None:
    with pytest.raises(StateError, match="bind"):
        PerExampleMemory(2).read(torch.tensor([0]))
    with pytest.raises(InputError, match="number of classes"):
        PerExampleMemory().bind(3)
    with pytest.raises(InputError, match="holds 3 examples"):
        PerExampleMemory(2).bind(3).bind(4)
    with pytest.raises(InputError, match="floating"):
        PerExampleMemory(2, dtype=torch.int64)


def test_loading_binds_and_copies_are_apart() -> None:
    memory = PerExampleMemory(2, dtype=torch.bfloat16).bind(4)
    memory.write(torch.tensor([1]), torch.tensor([[0.25, 0.5]]))
    fresh = PerExampleMemory(2, dtype=torch.bfloat16)
    fresh.load_state_dict(memory.state_dict())
    assert torch.equal(fresh.values, memory.values)
    twin = copy.deepcopy(memory)
    twin.write(torch.tensor([1]), torch.zeros(1, 2))
    assert memory.read(torch.tensor([1])).tolist() == [[0.25, 0.5]]
