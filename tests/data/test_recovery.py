"""Recovery examples: how deep they go, what is learned, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.recovery import Recovery, pad_sides, recovery_pairs
from poise.errors import InputError

PROMPT, HARMFUL, REFUSAL = [[1, 2, 3], [4]], [[11, 12, 13, 14], [15, 16]], [[21, 22], [23, 24, 25]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=50)
@given(p_zero=st.sampled_from([0.0, 0.3, 1.0]), k_max=st.integers(1, 6), seed=st.integers(0, 99), left=st.booleans())
def test_every_row_is_prompt_then_opening_then_refusal_and_the_refusal_alone_is_learned(
    p_zero: float, k_max: int, seed: int, left: bool
) -> None:
    made = recovery_pairs(
        PROMPT, HARMFUL, REFUSAL, p_zero, k_max, generator(seed), pad=-7, side="left" if left else "right"
    )
    for row, k in enumerate(made["recovery_depth"].tolist()):
        expected = PROMPT[row] + HARMFUL[row][:k] + REFUSAL[row]
        ids, mask = made["response_ids"][row], made["response_mask"][row]
        assert ids[ids != -7].tolist() == expected
        place = ids.shape[0] - len(expected) if left else 0
        assert ids[place : place + len(expected)].tolist() == expected
        assert torch.equal(made["response_attention"][row], ids != -7)
        assert ids[mask].tolist() == REFUSAL[row]
        assert made["response_positions"][row][mask].tolist() == list(range(len(REFUSAL[row])))
        assert bool((made["response_positions"][row][~mask] == -1).all())
        assert 0 <= k <= min(k_max, len(HARMFUL[row]))


def test_half_of_the_examples_are_plain_refusals_and_the_others_go_equally_deep() -> None:
    n, length, k_max = 20_000, 5, 4
    depth = recovery_pairs([[1]] * n, [[2] * length] * n, [[3]] * n, k_max=k_max, generator=generator(1))[
        "recovery_depth"
    ]
    counts = torch.bincount(depth, minlength=k_max + 1).double() / n
    expected = torch.tensor([0.5, *[0.5 / k_max] * k_max], dtype=torch.float64)
    # Four standard deviations of a frequency over 20,000 draws.
    assert bool(((counts - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all())


def test_depth_is_cut_at_the_harmful_answer() -> None:
    n = 3000
    depth = recovery_pairs([[1]] * n, [[2, 2, 2]] * n, [[3]] * n, p_zero=0.0, generator=generator(2))["recovery_depth"]
    assert sorted(depth.unique().tolist()) == [1, 2, 3]


def test_equal_generators_give_equal_examples_and_the_transform_draws_anew() -> None:
    a, b = (recovery_pairs(PROMPT * 20, HARMFUL * 20, REFUSAL * 20, generator=generator(5)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    data = pad_sides(prompt=PROMPT * 20, harmful=HARMFUL * 20, refusal=REFUSAL * 20)
    one = generator(5)
    first, second = Recovery()({**data, "index": torch.arange(40)}, one), Recovery()(data, one)
    assert torch.equal(first["recovery_depth"], a["recovery_depth"])
    assert not torch.equal(first["recovery_depth"], second["recovery_depth"])
    assert torch.equal(first["index"], torch.arange(40))
    assert "harmful_ids" not in first


def test_tensors_and_lists_say_the_same() -> None:
    tensors = [[torch.tensor(row) for row in side] for side in (PROMPT, HARMFUL, REFUSAL)]
    a, b = recovery_pairs(*tensors), recovery_pairs(PROMPT, HARMFUL, REFUSAL)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_empty_prompt_is_allowed_and_an_empty_harmful_answer_where_none_is_used() -> None:
    made = recovery_pairs([[]], [[]], [[3, 4]], p_zero=1.0)
    assert made["response_ids"].tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"p_zero": 1.5}, "p_zero is a probability"),
        ({"k_max": 0}, "k_max must be at least 1"),
        ({"side": "middle"}, "'right' or 'left'"),
        ({"refusal": [[1]]}, "one sequence of token ids an example"),
        ({"refusal": [[1], []]}, "refusal answer of row 1 is empty"),
        ({"harmful": [[], [1]]}, "harmful answer of row 0 is empty"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        recovery_pairs(**{"prompt": PROMPT, "harmful": HARMFUL, "refusal": REFUSAL, **arguments})


def test_a_batch_without_the_sides_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="Recovery reads 'prompt_ids'"):
        Recovery()({"input": torch.zeros(1)}, generator())
