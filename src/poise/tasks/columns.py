"""Which columns become inputs, and which are left out and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.tasks.table import Categories, Table, missing

# Fewer rows than this say nothing about whether a column numbers the rows.
_FEWEST_ROWS_FOR_IDS = 20
_ID_NAME = re.compile(
    r"(^|[_\-. ])(id|ids|uuid|guid|index|row|rownum|key|nr|no)$|^(id|index|uuid)([_\-. ]|$)|^column_1$|^unnamed",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Inputs:
    """The input columns with what was decided (notes) and what looks wrong (warnings)."""

    table: Table
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def choose_inputs(table: Table, apart: tuple[str, ...]) -> Inputs:
    """Return the columns that a model may read.

    Left out: the columns of `apart` (label, group, time), columns without any value, constant columns, and columns that number the rows
    (text that differs in every row, counters, whole numbers that differ in every row under a name such as `id`).

    Args:
        table: the whole file.
        apart: columns with a role of their own.
    Raises:
        InputError: infinite values; no column left.
    """
    notes: list[str] = []
    warnings: list[str] = []
    kept: list[str] = []
    for name in table.names:
        if name in apart:
            continue
        column = table[name]
        if isinstance(column, Tensor) and bool(torch.isinf(column).any()):
            rows = torch.isinf(column).nonzero().squeeze(1)
            raise InputError(
                f"Column {name!r} holds {len(rows)} infinite values (the first in row {int(rows[0]) + 1}). Correct "
                "them, or leave the cells empty where the value is unknown."
            )
        reason = _uninformative(table, name)
        if reason:
            notes.append(f"Column {name!r} {reason} and is left out.")
            continue
        verdict = _numbers_the_rows(table, name)
        if verdict == "left out":
            warnings.append(
                f"Column {name!r} looks like an identifier: its value differs in every row. It is left out."
            )
            continue
        if verdict == "kept":
            warnings.append(
                f"Column {name!r} holds a different whole number in every row, as an identifier would. It is used "
                "as a quantity; remove it from the file if it is none."
            )
        if name in table.dates:
            notes.append(f"Column {name!r} holds dates and is used as a number of seconds.")
        kept.append(name)
    if not kept:
        raise InputError(
            "No input column is left beside the label: the others are empty, constant or identifiers. Give a file "
            "with at least one informative column."
        )
    chosen = Table({name: table[name] for name in kept}, table.integers, table.dates)
    return Inputs(chosen, tuple(notes), tuple(warnings))


def _uninformative(table: Table, name: str) -> str | None:
    column = table[name]
    absent = missing(column)
    if bool(absent.all()):
        return "has no values"
    if bool(absent.any()):
        # Whether a value is missing is information in itself.
        return None
    values = column.codes if isinstance(column, Categories) else column
    return "holds the same value in every row" if bool((values == values[0]).all()) else None


def _numbers_the_rows(table: Table, name: str) -> str | None:
    column = table[name]
    if table.rows < _FEWEST_ROWS_FOR_IDS or bool(missing(column).any()):
        return None
    if isinstance(column, Categories):
        return (
            "left out" if len(column.values) == table.rows and len(torch.unique(column.codes)) == table.rows else None
        )
    if name not in table.integers:
        return None
    ordered = column.sort().values
    steps = ordered[1:] - ordered[:-1]
    if bool((steps == 0).any()):
        return None
    counter = bool((steps == 1).all())
    return "left out" if counter or _ID_NAME.search(name) else "kept"
