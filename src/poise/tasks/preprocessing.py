"""From columns to one float32 matrix, fitted on the training rows only.

    number      (x - mean) / std with the median in place of a missing value, and, where the file has missing values in the column,
                one more column that is 1 where the value is missing
    category    one column a category, 1 where it is present; 0 throughout for a category that training never saw

A scikit-learn `ColumnTransformer` is fitted on the training rows. What it learned is then kept as plain numbers (`to_dict`), and
`transform` applies these: the same arithmetic for training, for a saved model and for new files, without unpickling anything.
The width of the matrix is decided by the whole file, so that it is the same for every seed; no value of the arithmetic is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.tasks.table import Categories, Column, Table, missing, number_text

MOST_CATEGORIES = 100
MOST_INPUTS = 20_000


@dataclass(frozen=True)
class Layout:
    """The columns of the matrix, in order: numbers, missing indicators, categories.

    Attributes:
        numbers: number columns.
        indicators: those of them that get an indicator.
        categories: text column -> its categories; None among them stands for a missing value.
    """

    numbers: tuple[str, ...]
    indicators: tuple[str, ...]
    categories: dict[str, tuple[str | None, ...]]

    @property
    def width(self) -> int:
        """Number of columns of the matrix."""
        return len(self.numbers) + len(self.indicators) + sum(len(values) for values in self.categories.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The matrix's columns by name."""
        one_hot = (
            f"{name}={'(missing)' if value is None else value}"
            for name, values in self.categories.items()
            for value in values
        )
        return (*self.numbers, *(f"{name} is missing" for name in self.indicators), *one_hot)


def lay_out(table: Table) -> tuple[Layout, list[str]]:
    """Decide the matrix's columns from the whole file; return them with notes.

    Raises:
        InputError: more than 20,000 columns would come out.
    """
    notes: list[str] = []
    numbers = tuple(name for name in table.names if not isinstance(table[name], Categories))
    indicators = tuple(name for name in numbers if bool(missing(table[name]).any()))
    categories: dict[str, tuple[str | None, ...]] = {}
    for name, column in table.columns.items():
        if isinstance(column, Categories):
            categories[name], note = _vocabulary(name, column)
            notes.extend(note)
    layout = Layout(numbers, indicators, categories)
    if layout.width > MOST_INPUTS:
        raise InputError(
            f"The table would become {layout.width} inputs a row, and Poise takes at most {MOST_INPUTS}. Remove "
            "columns, or merge rare categories."
        )
    if indicators:
        shown = ", ".join(repr(name) for name in indicators[:5]) + (", ..." if len(indicators) > 5 else "")
        notes.append(f"Missing numbers in {shown} become the training median, with a column that marks them.")
    return layout, notes


def _vocabulary(name: str, column: Categories) -> tuple[tuple[str | None, ...], list[str]]:
    present = column.codes[column.codes >= 0]
    counts = torch.bincount(present.long(), minlength=len(column.values))
    # Most frequent first, then by name, so that the cut does not depend on the order of rows.
    order = sorted(
        (code for code, count in enumerate(counts.tolist()) if count), key=lambda code: (-int(counts[code]), code)
    )
    kept = sorted(order[:MOST_CATEGORIES])
    values: tuple[str | None, ...] = tuple(column.values[code] for code in kept)
    if len(present) < len(column.codes):
        values = (*values, None)
    if len(order) <= MOST_CATEGORIES:
        return values, []
    return values, [
        f"Column {name!r} has {len(order)} different texts; the {MOST_CATEGORIES} most frequent are used, the others count as none of them."
    ]


@dataclass(frozen=True)
class TablePreprocessor:
    """What was learned from the training rows.

    Attributes:
        layout: the matrix's columns.
        medians, means, scales: float64 `[numbers]`, of the training rows.
        seen: bool `[one-hot columns]`, whether training saw the category.
    """

    layout: Layout
    medians: Tensor
    means: Tensor
    scales: Tensor
    seen: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example, as the model reads it."""
        return (self.layout.width,)

    def transform(self, table: Table) -> Tensor:
        """Turn a table with the layout's columns into float32 `[rows, width]`; its text may have another vocabulary.

        Raises:
            InputError: a column is missing, is text where numbers are expected, or holds infinite values.
        """
        check_columns(table, self.layout)
        matrix = torch.zeros(table.rows, self.layout.width)
        at = 0
        for place, name in enumerate(self.layout.numbers):
            values = _numbers(table[name], name).double()
            filled = torch.where(torch.isnan(values), self.medians[place], values)
            matrix[:, at] = ((filled - self.means[place]) / self.scales[place]).float()
            at += 1
        for name in self.layout.indicators:
            matrix[:, at] = torch.isnan(_numbers(table[name], name)).float()
            at += 1
        first = at
        for name, vocabulary in self.layout.categories.items():
            places = _places(table[name], vocabulary)
            rows = (places >= 0).nonzero().squeeze(1)
            matrix[rows, at + places[rows]] = 1.0
            at += len(vocabulary)
        # A weight that was never trained must not act.
        matrix[:, first:] *= self.seen
        return matrix

    def unseen(self, table: Table) -> dict[str, int]:
        """Count, for each text column, the rows whose category training never saw; columns without any are left out."""
        counts: dict[str, int] = {}
        at = 0
        for name, values in self.layout.categories.items():
            column = as_text(table[name])
            places = _places(column, values)
            known = torch.zeros(len(places), dtype=torch.bool)
            rows = places >= 0
            known[rows] = self.seen[at + places[rows]]
            # Beyond the most frequent categories every text is "none of them": that is the layout's choice, not news.
            dropped = (places < 0) & (column.codes >= 0) if len(values) >= MOST_CATEGORIES else torch.zeros_like(known)
            count = int((~known & ~dropped & (column.codes >= 0)).sum())
            counts |= {name: count} if count else {}
            at += len(values)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "kind": "table",
            "numbers": list(self.layout.numbers),
            "indicators": list(self.layout.indicators),
            "categories": {name: list(values) for name, values in self.layout.categories.items()},
            "medians": self.medians.tolist(),
            "means": self.means.tolist(),
            "scales": self.scales.tolist(),
            "seen": self.seen.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TablePreprocessor:
        """Rebuild what `to_dict` returned.

        Raises:
            InputError: the parts do not belong together.
        """
        categories = {name: tuple(values) for name, values in state["categories"].items()}
        layout = Layout(tuple(state["numbers"]), tuple(state["indicators"]), categories)
        texts = [
            *layout.numbers,
            *layout.indicators,
            *(v for values in categories.values() for v in values if v is not None),
        ]
        sizes = [len(state[name]) for name in ("medians", "means", "scales")]
        expected = sum(len(values) for values in categories.values())
        if not all(isinstance(text, str) for text in texts) or not set(layout.indicators) <= set(layout.numbers):
            raise InputError("A column or a category of the preprocessor has no name.")
        if sizes != 3 * [len(layout.numbers)] or len(state["seen"]) != expected or layout.width > MOST_INPUTS:
            raise InputError("The preprocessor has more or fewer numbers than columns.")
        medians, means, scales = (
            torch.tensor(state[name], dtype=torch.float64).flatten() for name in ("medians", "means", "scales")
        )
        if not all(len(values) == len(layout.numbers) for values in (medians, means, scales)):
            raise InputError("The preprocessor has more or fewer numbers than columns.")
        seen = torch.tensor(state["seen"], dtype=torch.bool).flatten()
        if len(seen) != expected:
            raise InputError("The preprocessor has more or fewer categories than it has seen.")
        return cls(layout, medians, means, scales, seen)


@dataclass(frozen=True)
class ArrayPreprocessor:
    """Inputs that are a tensor already: bytes become [0, 1], everything else stays.

    Attributes:
        shape: of one example, as the model reads it.
    """

    shape: tuple[int, ...]

    def transform(self, inputs: Tensor) -> Tensor:
        """Return float32 `[rows, *shape]`.

        Raises:
            InputError: examples of another size.
        """
        if int(np.prod(inputs.shape[1:])) != int(np.prod(self.shape)):
            raise InputError(f"Expected examples of shape {list(self.shape)}, got {list(inputs.shape[1:])}.")
        scaled = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs.float()
        return scaled.reshape(len(inputs), *self.shape)

    def unseen(self, inputs: Tensor) -> dict[str, int]:
        """Return an empty dictionary: an array has no categories."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"kind": "array", "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ArrayPreprocessor:
        """Rebuild what `to_dict` returned."""
        return cls(tuple(state["shape"]))


Preprocessor = TablePreprocessor | ArrayPreprocessor


def preprocessor_from_dict(state: Mapping[str, Any]) -> Preprocessor:
    """Rebuild a preprocessor from its `to_dict`.

    Raises:
        InputError: its parts do not belong together.
    """
    return TablePreprocessor.from_dict(state) if state["kind"] == "table" else ArrayPreprocessor.from_dict(state)


def fit_preprocessor(layout: Layout, train: Table) -> TablePreprocessor:
    """Fit a scikit-learn pipeline on the training rows and keep what it learned.

    Args:
        layout: the matrix's columns, from `lay_out`.
        train: the training rows.
    """
    transformer = column_transformer(layout)
    transformer.fit(stacked(layout, train))
    medians = means = scales = np.zeros(0)
    if layout.numbers:
        numbers = transformer.named_transformers_["numbers"]
        medians, means, scales = numbers["impute"].statistics_, numbers["scale"].mean_, numbers["scale"].scale_
    seen: list[bool] = []
    if layout.categories:
        encoder = transformer.named_transformers_["categories"]
        for values, learned in zip(layout.categories.values(), encoder.categories_, strict=True):
            codes = set(learned.tolist())
            seen.extend(place in codes for place in range(len(values)))
    learned = [torch.from_numpy(np.asarray(values, dtype=np.float64).copy()) for values in (medians, means, scales)]
    return TablePreprocessor(layout, learned[0], learned[1], learned[2], torch.tensor(seen, dtype=torch.bool))


def column_transformer(layout: Layout) -> Any:
    """The unfitted scikit-learn pipeline of a layout; it reads the matrix of `stacked`."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import MissingIndicator, SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    # A column without any value in the training rows must keep its place in the matrix.
    impute = SimpleImputer(strategy="median", keep_empty_features=True)
    count = len(layout.numbers)
    steps = [
        ("numbers", Pipeline([("impute", impute), ("scale", StandardScaler())]), list(range(count))),
        (
            "missing",
            MissingIndicator(features="all", sparse=False),
            [layout.numbers.index(name) for name in layout.indicators],
        ),
        (
            "categories",
            OneHotEncoder(handle_unknown="ignore", sparse_output=False),
            list(range(count, count + len(layout.categories))),
        ),
    ]
    return ColumnTransformer([step for step in steps if step[2]])


def stacked(layout: Layout, table: Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return numbers and category places as one float64 matrix `[rows, numbers + text columns]`, what `column_transformer` reads."""
    matrix = np.empty((table.rows, len(layout.numbers) + len(layout.categories)))
    for place, name in enumerate(layout.numbers):
        matrix[:, place] = _numbers(table[name], name).numpy()
    for place, (name, values) in enumerate(layout.categories.items(), start=len(layout.numbers)):
        matrix[:, place] = _places(table[name], values).numpy()
    return matrix


def check_columns(table: Table, layout: Layout) -> None:
    """Raise InputError where a table lacks columns that the layout reads, or holds infinite values in them."""
    needed = (*layout.numbers, *layout.categories)
    absent = [name for name in needed if name not in table.columns]
    if absent:
        shown = ", ".join(repr(name) for name in absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(
            f"The file lacks {len(absent)} columns that training used: {shown}. Add them, or train without them."
        )
    for name in layout.numbers:
        if bool(torch.isinf(_numbers(table[name], name)).any()):
            raise InputError(
                f"Column {name!r} holds infinite values. Correct them, or leave the cells empty where the value is unknown."
            )


def _numbers(column: Column, name: str) -> Tensor:
    if isinstance(column, Categories):
        raise InputError(f"Column {name!r} holds text, for instance {column.values[0]!r}, where training had numbers.")
    return column


def as_text(column: Column) -> Categories:
    """A number column where training had text: a file in which every category happens to be a number."""
    if isinstance(column, Categories):
        return column
    present = ~torch.isnan(column)
    values, codes = torch.unique(column[present], return_inverse=True)
    all_codes = torch.full((len(column),), -1, dtype=torch.int32)
    all_codes[present] = codes.int()
    return Categories(all_codes, tuple(number_text(value) for value in values.tolist()))


def _places(column: Column, values: Sequence[str | None]) -> Tensor:
    """Each row's place among the layout's categories, -1 where it has none: int64 `[rows]`."""
    text = as_text(column)
    place = {value: at for at, value in enumerate(values)}
    lookup = torch.tensor([*(place.get(value, -1) for value in text.values), place.get(None, -1)])
    return lookup[text.codes.long()]
