"""Parquet files into column tensors, batch by batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poise.errors import InputError
from poise.tasks.delimited import reject_duplicates
from poise.tasks.table import Table, TableBuilder

_BATCH_ROWS = 65_536


def read_parquet(path: str | os.PathLike[str]) -> Table:
    """Read a Parquet file of flat columns into a `Table`.

    Args:
        path: a Parquet file whose columns are numbers, text, booleans, dates or dictionaries of these.
    Raises:
        InputError: an empty, truncated or nested file, duplicate column names.

        >>> table = read_parquet("wine.parquet")  # doctest: +SKIP
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = Path(path)
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. Expected a Parquet file.")
    try:
        with parquet.ParquetFile(path) as file:
            reject_duplicates(path, tuple(file.schema_arrow.names))
            if not file.metadata.num_rows:
                raise InputError(f"{path} has no rows.")
            kinds = {entry.name: _kind(path, entry) for entry in file.schema_arrow}
            builder = TableBuilder(kinds, file.metadata.num_rows)
            for batch in _batches(file):
                builder.append(batch.schema.names, (_plain(array) for array in batch.columns))
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: names that are no UTF-8
        raise InputError(
            f"{path} is not a whole Parquet file; it may be truncated or of another format: {str(error).splitlines()[0]}"
        ) from error
    return builder.finish()


def _batches(file: Any) -> Iterator[Any]:
    yield from file.iter_batches(batch_size=_BATCH_ROWS)


def _kind(path: Path, entry: Any) -> str:
    import pyarrow as pa

    kind = entry.type.value_type if pa.types.is_dictionary(entry.type) else entry.type
    if (
        pa.types.is_dictionary(entry.type)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    ):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return "float"
    if pa.types.is_float64(kind) or pa.types.is_decimal(kind):
        # Nothing is known of the values before they are read; float64 loses nothing.
        return "double"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind):
        return "date"
    if pa.types.is_null(kind):
        return "unknown"
    raise InputError(
        f"Column {entry.name!r} of {path} has the type {entry.type}; Poise reads numbers, text, booleans and dates. "
        "Flatten or drop that column."
    )


def _plain(array: Any) -> Any:
    """Decimals as float64, any dictionary as its values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_decimal(array.type):
        return pc.cast(array, pa.float64())
    if pa.types.is_dictionary(array.type):
        return pc.cast(pc.cast(array, array.type.value_type), pa.string())
    return array
