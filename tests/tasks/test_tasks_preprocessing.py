"""Preprocessing: scikit-learn as the oracle, training rows as the only source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.tasks.preprocessing import (
    MOST_CATEGORIES,
    column_transformer,
    fit_preprocessor,
    lay_out,
    preprocessor_from_dict,
    stacked,
)
from poise.tasks.table import Categories, Table


def mixed_table(seed: int, rows: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    holes = torch.randn(rows, generator=generator) * 5 + 100
    holes[torch.rand(rows, generator=generator) < 0.3] = float("nan")
    codes = torch.randint(-1, 4, (rows,), generator=generator, dtype=torch.int32)
    return Table(
        {
            "plain": torch.randn(rows, generator=generator),
            "holes": holes,
            "offset": torch.randn(rows, generator=generator).double() + 1e6,
            "text": Categories(codes, ("a", "b", "c", "d")),
        }
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(12, 80))
def test_the_matrix_equals_scikit_learns(seed: int, rows: int) -> None:
    table = mixed_table(seed, rows)
    layout, _ = lay_out(table)
    train, other = table.take(torch.arange(rows // 2)), table.take(torch.arange(rows // 2, rows))
    fitted = fit_preprocessor(layout, train)
    transformer = column_transformer(layout)
    transformer.fit(stacked(layout, train))
    expected = transformer.transform(stacked(layout, other))
    # scikit-learn has no column for a category that training lacks; ours is all zero.
    dense = len(layout.numbers) + len(layout.indicators)
    kept = [*range(dense), *(dense + torch.nonzero(fitted.seen).squeeze(1)).tolist()]
    found = fitted.transform(other)
    # float32 output of float64 arithmetic.
    np.testing.assert_allclose(found[:, kept].numpy(), expected, rtol=1e-5, atol=1e-6)
    unseen = [dense + place for place in torch.nonzero(~fitted.seen).squeeze(1).tolist()]
    assert not bool(found[:, unseen].any())


def test_nothing_of_the_other_rows_enters_the_fit() -> None:
    table = mixed_table(0, 60)
    layout, _ = lay_out(table)
    train = table.take(torch.arange(30))
    changed = mixed_table(0, 60)
    changed.columns["plain"][30:] += 1000.0  # type: ignore[index]
    first = fit_preprocessor(layout, train).transform(train)
    second = fit_preprocessor(layout, changed.take(torch.arange(30))).transform(train)
    assert torch.equal(first, second)


def test_training_columns_have_mean_zero_and_deviation_one() -> None:
    table = mixed_table(1, 500)
    layout, _ = lay_out(table)
    matrix = fit_preprocessor(layout, table).transform(table)[:, :3].double()
    # float32 rounding of 500 values.
    assert torch.allclose(matrix.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(matrix.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_categories_that_training_never_saw_are_counted_and_count_as_none() -> None:
    train = Table({"c": Categories(torch.tensor([0, 1, 0], dtype=torch.int32), ("a", "b", "z"))})
    new = Table({"c": Categories(torch.tensor([0, 1, 1], dtype=torch.int32), ("b", "new"))})
    whole = Table({"c": Categories(torch.tensor([0, 1, 2], dtype=torch.int32), ("a", "b", "z"))})
    fitted = fit_preprocessor(lay_out(whole)[0], train)
    assert fitted.unseen(new) == {"c": 2}
    assert fitted.transform(new).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert fitted.unseen(train) == {}


def test_a_column_without_training_values_keeps_its_place() -> None:
    table = Table({"x": torch.tensor([float("nan"), float("nan"), 3.0]), "y": torch.arange(3).float()})
    fitted = fit_preprocessor(lay_out(table)[0], table.take(torch.tensor([0, 1])))
    matrix = fitted.transform(table)
    assert matrix.shape == (3, 3)
    assert bool(torch.isfinite(matrix).all())


def test_a_saved_preprocessor_gives_the_same_matrix() -> None:
    table = mixed_table(2, 50)
    fitted = fit_preprocessor(lay_out(table)[0], table)
    again = preprocessor_from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert torch.equal(again.transform(table), fitted.transform(table))  # type: ignore[arg-type]


def test_many_categories_are_cut_to_the_most_frequent_and_the_cut_is_stated() -> None:
    count = MOST_CATEGORIES + 20
    codes = torch.cat([torch.arange(count), torch.arange(MOST_CATEGORIES)]).int()
    table = Table({"c": Categories(codes, tuple(f"{place:03d}" for place in range(count)))})
    layout, notes = lay_out(table)
    assert layout.width == MOST_CATEGORIES
    assert any("120 different texts" in note for note in notes)
    fitted = fit_preprocessor(layout, table)
    assert fitted.transform(table)[MOST_CATEGORIES:count].abs().sum() == 0
    assert fitted.unseen(table) == {}


def test_a_table_of_absurd_width_is_refused() -> None:
    column = Categories(torch.arange(100).int(), tuple(map(str, range(100))))
    with pytest.raises(InputError, match="at most 20000"):
        lay_out(Table({f"c{place}": column for place in range(201)}))


def test_columns_that_do_not_fit_the_training_are_refused() -> None:
    table = mixed_table(3, 30)
    fitted = fit_preprocessor(lay_out(table)[0], table)
    with pytest.raises(InputError, match=r"lacks 1 columns.*'plain'"):
        fitted.transform(Table({name: table[name] for name in table.names if name != "plain"}))
    with pytest.raises(InputError, match="infinite"):
        fitted.transform(Table(table.columns | {"plain": torch.full((30,), float("inf"))}))
    with pytest.raises(InputError, match="holds text"):
        fitted.transform(Table(table.columns | {"plain": table["text"]}))


def test_categories_that_are_all_numbers_in_a_new_file_still_match() -> None:
    train = Table({"c": Categories(torch.tensor([0, 1, 2], dtype=torch.int32), ("1", "2", "x"))})
    fitted = fit_preprocessor(lay_out(train)[0], train)
    assert fitted.transform(Table({"c": torch.tensor([2.0, 1.0])})).tolist() == [[0, 1, 0], [1, 0, 0]]
