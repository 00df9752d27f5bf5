"""A table in memory: one tensor a column.

Numbers are float32, except where float32 would lose them: whole numbers of 2^24 and more, and columns whose values lie so close together
that their spread would drown in rounding, are float64. Text is coded: an int32 tensor of codes (-1 where the value is missing) beside the
sorted vocabulary. Dates are float64 seconds since 1970 (UTC). A missing number is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, nearest

_EXACT_IN_FLOAT32 = 2**24
# With |x| <= 1000 * spread the rounding of float32 (6e-8 relative) stays under 1e-4 of the spread.
_OFFSET_LIMIT = 1000.0


@dataclass(frozen=True)
class Categories:
    """A text column: `values[codes[row]]`, with code -1 where the value is missing.

    Attributes:
        codes: int32 `[rows]`, in `-1..len(values)-1`.
        values: the different texts, sorted.
    """

    codes: Tensor
    values: tuple[str, ...]

    def take(self, rows: Tensor) -> Categories:
        """Return the column at `rows` (int64 [n]) with the same vocabulary."""
        return Categories(self.codes[rows], self.values)


Column = Tensor | Categories


@dataclass
class Table:
    """Named columns of equal length.

    Attributes:
        columns: name -> float32 or float64 `[rows]`, or `Categories`.
        integers: the columns that hold whole numbers only.
        dates: the columns that were read as dates.
        notes: what the reader decided by itself, in words.
    """

    columns: dict[str, Column]
    integers: frozenset[str] = frozenset()
    dates: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    @property
    def rows(self) -> int:
        first = next(iter(self.columns.values()), None)
        if first is None:
            return 0
        return len(first.codes) if isinstance(first, Categories) else len(first)

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def take(self, rows: Tensor) -> Table:
        """Return the table at `rows` (int64 [n])."""
        columns: dict[str, Column] = {
            name: column.take(rows) if isinstance(column, Categories) else column[rows]
            for name, column in self.columns.items()
        }
        return Table(columns, self.integers, self.dates, list(self.notes))

    def require(self, name: str, role: str) -> Column:
        """Return column `name`; raise InputError with the nearest names where the table has none."""
        if name not in self.columns:
            shown = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise InputError(
                f"There is no column {name!r} to use as {role}.{nearest(name, self.names)} The columns are: {shown}."
            )
        return self.columns[name]

    def row_hashes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return one 64-bit hash a row, equal for equal rows: uint64 [rows].

        Text enters by its content, so that two tables with different vocabularies compare. Missing values equal each other.
        """
        state = np.full(self.rows, 0x9E3779B97F4A7C15, dtype=np.uint64)
        for column in self.columns.values():
            state = _mix(state ^ _column_bits(column))
        return state


def missing(column: Column) -> Tensor:
    """Return where a column has no value: bool [rows]."""
    return column.codes < 0 if isinstance(column, Categories) else torch.isnan(column)


def number_text(value: float) -> str:
    """A number as the text that names a class or a category: "3", "0.5"."""
    return f"{value:.0f}" if value == round(value) else f"{value:.15g}"


def _column_bits(column: Column) -> np.ndarray[Any, np.dtype[np.uint64]]:
    if isinstance(column, Categories):
        from pandas.util import hash_array

        hashed = hash_array(np.asarray(column.values, dtype=object)) if column.values else np.zeros(0, dtype=np.uint64)
        by_code: np.ndarray[Any, np.dtype[np.uint64]] = np.append(hashed, np.uint64(0))
        by_row: np.ndarray[Any, np.dtype[np.uint64]] = by_code[column.codes.numpy()]
        return by_row
    # Two files may have stored one column as float32 and as float64: fractions compare as float32, whole numbers exactly.
    # Adding 0 turns -0.0 into 0.0.
    values = column.numpy().astype(np.float64) + 0.0
    if column.dtype == torch.float64:
        fractions = values != np.rint(values)
        values[fractions] = values[fractions].astype(np.float32)
    values[np.isnan(values)] = np.nan
    bits: np.ndarray[Any, np.dtype[np.uint64]] = values.view(np.uint64)
    return bits


def _mix(state: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class TableBuilder:
    """Grows a `Table` from Arrow record batches, so that a file is never in memory twice.

    Args:
        kinds: column name -> "integer", "float", "double", "text", "unknown", "boolean" or "date".
        expected_rows: a first guess of the length.
    """

    def __init__(self, kinds: Mapping[str, str], expected_rows: int) -> None:
        self._kinds = dict(kinds)
        self._numbers = {
            name: _Numbers(expected_rows, np.float32 if kind in ("integer", "float") else np.float64)
            for name, kind in kinds.items()
            if kind in ("integer", "float", "double", "date")
        }
        self._texts: dict[str, list[Any]] = {name: [] for name in kinds if name not in self._numbers}
        self.rows = 0

    def append(self, names: Iterable[str], arrays: Iterable[Any]) -> None:
        """Add a batch: Arrow arrays of one length, in the order of `names`."""
        length = 0
        for name, array in zip(names, arrays, strict=True):
            length = len(array)
            if name not in self._numbers:
                self._texts[name].append(array)
            elif self._kinds[name] == "date":
                self._numbers[name].append(_seconds(array))
            elif self._kinds[name] == "integer":
                self._numbers[name].append_whole(_to_numpy(array))
            else:
                self._numbers[name].append(_to_numpy(array))
        self.rows += length

    def finish(self, notes: list[str] | None = None) -> Table:
        """Return the table and let go of the batches."""
        columns: dict[str, Column] = {}
        for name in self._kinds:
            if name in self._numbers:
                columns[name] = self._numbers.pop(name).finish()
            else:
                columns[name] = _text_column(self._texts.pop(name), self._kinds[name] == "unknown")
        integers = frozenset(name for name, kind in self._kinds.items() if kind == "integer")
        dates = frozenset(name for name, kind in self._kinds.items() if kind == "date")
        return Table(columns, integers, dates, list(notes or []))


class _Numbers:
    """One growing column. Memory that is reserved but never written costs nothing."""

    def __init__(self, capacity: int, dtype: Any) -> None:
        self._values = np.empty(max(capacity, 16), dtype=dtype)
        self._length = 0

    def append(self, values: np.ndarray[Any, Any]) -> None:
        end = self._length + len(values)
        if end > len(self._values):
            grown = np.empty(max(end, int(len(self._values) * 1.5)), dtype=self._values.dtype)
            grown[: self._length] = self._values[: self._length]
            self._values = grown
        self._values[self._length : end] = values
        self._length = end

    def append_whole(self, values: np.ndarray[Any, Any]) -> None:
        if self._values.dtype == np.float32 and len(values) and not whole_numbers_fit_float32(values):
            self._values = self._values.astype(np.float64)
        self.append(values)

    def finish(self) -> Tensor:
        return torch.from_numpy(self._values[: self._length])


def whole_numbers_fit_float32(values: np.ndarray[Any, Any]) -> bool:
    """Whether float32 holds every one of these whole numbers exactly."""
    low, high = np.fmin.reduce(values), np.fmax.reduce(values)
    return not (low <= -_EXACT_IN_FLOAT32 or high >= _EXACT_IN_FLOAT32)


def spread_fits_float32(values: np.ndarray[Any, Any]) -> bool:
    """Whether the differences between these numbers survive float32: max |x| <= 1000 (max x - min x)."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return True
    low, high = float(finite.min()), float(finite.max())
    return low == high or max(abs(low), abs(high)) <= _OFFSET_LIMIT * (high - low)


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = array.to_numpy(zero_copy_only=False)
    return values


def _seconds(array: Any) -> np.ndarray[Any, Any]:
    """Arrow dates, timestamps or times -> float64 seconds since 1970 (since midnight for times)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_time(array.type):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[array.type.unit]
        whole = array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64())
        return _to_numpy(pc.divide(pc.cast(whole, pa.float64()), float(per_second)))
    microseconds = pc.cast(pc.cast(array, pa.timestamp("us"), safe=False), pa.int64())
    return _to_numpy(pc.divide(pc.cast(microseconds, pa.float64(), safe=False), 1e6))


def _text_column(chunks: list[Any], may_be_numbers: bool) -> Column:
    import pyarrow as pa
    import pyarrow.compute as pc

    joined = pa.chunked_array(chunks) if chunks else pa.chunked_array([pa.array([], pa.string())])
    if pa.types.is_null(joined.type) or joined.null_count == len(joined):
        return torch.full((len(joined),), float("nan"))
    if may_be_numbers:
        # The first block of the file had no value here, so that the reader could not know the type.
        try:
            return torch.from_numpy(_to_numpy(pc.cast(joined, pa.float64())).astype(np.float32))
        except pa.ArrowInvalid:
            pass
    if pa.types.is_boolean(joined.type):
        joined = pc.if_else(joined, "true", "false")
    if pa.types.is_dictionary(joined.type):
        joined = pc.cast(joined, joined.type.value_type)
    encoded = pc.cast(joined, pa.string()).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    order = pc.array_sort_indices(encoded.dictionary)
    place = np.empty(len(order) + 1, dtype=np.int32)
    place[_to_numpy(order)] = np.arange(len(order), dtype=np.int32)
    place[-1] = -1
    codes = _to_numpy(pc.fill_null(encoded.indices, -1))
    return Categories(torch.from_numpy(place[codes]), tuple(encoded.dictionary.take(order).to_pylist()))
