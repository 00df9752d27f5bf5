"""The label column: which one it is, what kind it is, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.tasks.table import Categories, Column, Table, missing, number_text

CLASSIFICATION, REGRESSION = "classification", "regression"
USUAL_NAMES = ("label", "target", "class", "y")
# Whole numbers with more different values than this are taken for a quantity, not for classes.
MOST_INFERRED_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """What a model is to predict.

    Attributes:
        values: int64 `[rows]` class indices, or float32 `[rows]` in the label's own unit.
        classes: the classes' names in the order of their indices; None for regression.
        notes: how the kind was found, in words.
    """

    values: Tensor
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


def find_label(table: Table, label: str | None, source: str) -> tuple[str, list[str]]:
    """Return the label column's name and what was decided about it; raise InputError where it is missing."""
    if label is not None:
        table.require(label, "label")
        return label, []
    for name in table.names:
        if name.lower() in USUAL_NAMES:
            return name, [f"No label column was named; {name!r} is taken."]
    shown = ", ".join(table.names[:20]) + (", ..." if len(table.names) > 20 else "")
    raise InputError(
        f"Say which column of {source} is the label: --label NAME, or label=NAME in Python. The columns are: {shown}."
    )


def read_labels(column: Column, name: str, target_type: str | None) -> Labels:
    """Turn the label column into class indices or numbers.

    Text is always classes. Whole numbers with at most 20 different values are classes, all other numbers a quantity (regression);
    `target_type` overrides this.

    Args:
        column: the label column.
        name: its name, for messages.
        target_type: "classification", "regression", or None to infer.
    Raises:
        InputError: missing, infinite or constant labels; text where regression was asked for.
    """
    if target_type not in (None, CLASSIFICATION, REGRESSION):
        raise InputError(f"target_type must be 'classification' or 'regression', got {target_type!r}.")
    _check_values(column, name)
    if isinstance(column, Categories):
        if target_type == REGRESSION:
            raise InputError(
                f"The label column {name!r} holds text, for instance {column.values[0]!r}; regression needs numbers."
            )
        return _text_labels(column, name)
    different = torch.unique(column)
    if len(different) < 2:
        raise InputError(
            f"The label column {name!r} is constant: every row holds {float(different[0]):g}. There is nothing to "
            "learn; name another column."
        )
    whole = bool((different == different.round()).all())
    inferred = CLASSIFICATION if whole and len(different) <= MOST_INFERRED_CLASSES else REGRESSION
    kind = target_type or inferred
    note = _reason(name, different, whole, kind, asked=target_type is not None)
    if kind == REGRESSION:
        return Labels(column.float(), None, (note,))
    classes = tuple(number_text(value) for value in different.tolist())
    return Labels(torch.searchsorted(different, column).long(), classes, (note,))


def check_class_sizes(labels: Labels, name: str, parts: int) -> None:
    """Raise InputError where a class has fewer rows than there are parts to stand in."""
    if labels.classes is None:
        return
    counts = torch.bincount(labels.values, minlength=len(labels.classes))
    small = (counts < parts).nonzero().squeeze(1).tolist()
    if small:
        shown = ", ".join(f"{labels.classes[label]!r} ({int(counts[label])})" for label in small[:5]) + (
            ", ..." if len(small) > 5 else ""
        )
        quantity = (
            " If the column is a quantity, pass target_type='regression'."
            if labels.classes[small[0]].replace(".", "").isdigit()
            else ""
        )
        raise InputError(
            f"{len(small)} of the {len(labels.classes)} classes in {name!r} have fewer rows than the {parts} parts of the split: {shown}."
            f" Merge or remove these classes, or give more rows.{quantity}"
        )


def _check_values(column: Column, name: str) -> None:
    absent = missing(column)
    count = int(absent.sum())
    if count == len(absent):
        raise InputError(f"The label column {name!r} is empty: no row has a value. Name another column.")
    if count:
        row = int(absent.nonzero()[0]) + 1
        raise InputError(
            f"The label column {name!r} has no value in {count} of {len(absent)} rows (NaN or empty; the first is "
            f"row {row}). Fill in or remove these rows."
        )
    if isinstance(column, Tensor) and bool(torch.isinf(column).any()):
        raise InputError(
            f"The label column {name!r} holds {int(torch.isinf(column).sum())} infinite values. Correct or remove these rows."
        )


def _text_labels(column: Categories, name: str) -> Labels:
    present = torch.unique(column.codes)
    if len(present) < 2:
        raise InputError(
            f"The label column {name!r} is constant: every row holds {column.values[int(present[0])]!r}. There is "
            "nothing to learn; name another column."
        )
    classes = tuple(column.values[code] for code in present.tolist())
    note = f"{name!r} holds text with {len(classes)} different values: classification."
    return Labels(torch.searchsorted(present, column.codes).long(), classes, (note,))


def _reason(name: str, different: Tensor, whole: bool, kind: str, asked: bool) -> str:
    numbers = "whole numbers" if whole else "numbers with fractions"
    what = f"{name!r} holds {numbers} with {len(different)} different values"
    if asked:
        return f"{what}: {kind}, as asked for."
    other = REGRESSION if kind == CLASSIFICATION else CLASSIFICATION
    return f"{what}: {kind}. For {other} pass target_type={other!r} (--target-type {other})."
