"""Text tables (CSV, TSV) into column tensors, in blocks and on several threads.

A large file is cut at line ends into blocks of 2 MB; Arrow parses the blocks in threads; the main thread puts them, in order, into the
columns. So the memory that grows is the tensors and a handful of blocks. Types come from the first block; a later value that does not
fit widens its column (whole number -> number -> text) and the file is read again. A file with quotation marks may hold line ends inside
values; it is read by Arrow's streaming reader instead.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.errors import InputError
from poise.tasks.memory import check_memory
from poise.tasks.table import Table, TableBuilder, spread_fits_float32

MISSING_WORDS = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null", "<NA>", "?")

_BLOCK = 2 << 20
_HEAD = 1 << 20
_LONGEST_LINE = 1 << 20
_MOST_COLUMNS = 20_000


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    decimal_point: str
    names: tuple[str, ...]
    header_bytes: int


class _NotThisType(Exception):
    """A value does not fit the type of its column; `column` is the position."""

    def __init__(self, column: int, value: str) -> None:
        super().__init__(value)
        self.column = column
        self.value = value


class _Quoted(Exception):
    """The file has quotation marks, so that a line end may stand inside a value."""


def read_delimited(path: str | os.PathLike[str], *, threads: int | None = None) -> Table:
    """Read a comma-, semicolon- or tab-separated text file with a header line into a `Table`.

    Args:
        path: a UTF-8 text file.
        threads: parsing threads; None takes the machine's cores, at most 8.
    Returns:
        The table; its notes say which delimiter was found and which columns changed their type on the way.
    Raises:
        InputError: an empty, truncated, non-UTF-8 or binary file, duplicate column names, a missing header.

        >>> table = read_delimited("wine.csv")  # doctest: +SKIP
        >>> table["alcohol"]                    # doctest: +SKIP
    """
    path = Path(path)
    head = _head(path)
    dialect, notes = _dialect(path, head)
    kinds = _kinds(path, head, dialect)
    threads = threads or min(os.cpu_count() or 1, 8)
    # Quotation marks round the names alone do not matter.
    quoted = b'"' in head[_line_end(head) or len(head) :]
    # Each round widens one column at least by one step, and there are two steps.
    for _ in range(2 * len(kinds) + 2):
        try:
            return _read(path, dialect, kinds, notes, 0 if quoted else threads)
        except _Quoted:
            quoted = True
        except _NotThisType as misfit:
            name = dialect.names[misfit.column]
            kinds[name] = _WIDER[kinds[name]]
            if kinds[name] == "text":
                notes.append(
                    f"Column {name!r} holds values that are not numbers or dates, for instance {misfit.value!r}, and is read as categories."
                )
    raise AssertionError("every column has been widened to text, which takes any value")


_WIDER = {"integer": "double", "float": "text", "double": "text", "boolean": "text", "date": "text", "unknown": "text"}


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.strip():
        raise InputError(f"{path} is empty. A table needs a header line with the column names and at least a few rows.")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            f"{path} is not UTF-8: it begins with a UTF-16 mark. Save it as UTF-8 (in a spreadsheet: 'CSV UTF-8') and try again."
        )
    if b"\x00" in head:
        raise InputError(
            f"{path} is not a text table: it holds zero bytes. Expected CSV or TSV text in UTF-8; a binary table "
            "may be Parquet, NPZ or NPY."
        )
    return head.removeprefix(b"\xef\xbb\xbf")


def _dialect(path: Path, head: bytes) -> tuple[_Dialect, list[str]]:
    import csv

    end = _line_end(head)
    if end is None and len(head) >= _LONGEST_LINE - 3:
        raise InputError(f"{path} has no line end in its first megabyte, so it is not a table with one row a line.")
    header = _decode(path, head[:end] if end is not None else head)
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else _delimiter(header)
    try:
        names = tuple(name.strip() for name in next(csv.reader([header.rstrip("\r\n")], delimiter=delimiter)))
    except csv.Error as error:
        raise InputError(
            f"{path} is broken in its header line: {error}. Write each name in quotation marks or without any."
        ) from error
    if len(names) > _MOST_COLUMNS:
        raise InputError(
            f"{path} has {len(names)} columns; Poise reads tables of at most {_MOST_COLUMNS}. Is it transposed, or is the delimiter wrong?"
        )
    if all(_is_number(name) for name in names):
        raise InputError(
            f"{path} has no header: its first line is {header.strip()[:80]!r}, all numbers. Add a first line with the name of each column."
        )
    named = tuple(name or f"column_{place}" for place, name in enumerate(names, start=1))
    reject_duplicates(path, named)
    notes = [] if delimiter in (",", "\t") else [f"The columns of {path.name} are separated by {delimiter!r}."]
    decimal_point = "," if delimiter == ";" and _decimal_comma(head[end or 0 :]) else "."
    if decimal_point == ",":
        notes.append("Numbers are written with a decimal comma.")
    bom = 3 if path.open("rb").read(3) == b"\xef\xbb\xbf" else 0
    return _Dialect(delimiter, decimal_point, named, (end if end is not None else len(head)) + bom), notes


def reject_duplicates(path: Path, names: tuple[str, ...]) -> None:
    """Raise InputError where two columns share a name."""
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        listed = ", ".join(repr(name) for name in repeated[:5])
        raise InputError(
            f"{path} has more than one column named {listed}. Rename or remove the duplicates, so that every column has its own name."
        )


def _line_end(head: bytes) -> int | None:
    """The position after the header's line end; quotation marks may hold line ends of their own."""
    inside = False
    for place, byte in enumerate(head):
        if byte == 0x22:
            inside = not inside
        elif byte in (0x0A, 0x0D) and not inside:
            return place + (2 if head[place : place + 2] == b"\r\n" else 1)
    return None


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(_not_utf8(path)) from error


def _not_utf8(path: Path) -> str:
    return (
        f"{path} is not UTF-8 text. Save it as UTF-8 (in a spreadsheet: 'CSV UTF-8'; "
        "on a shell: iconv -f latin1 -t utf-8) and try again."
    )


def _delimiter(header: str) -> str:
    outside = re.sub(r'"[^"]*"', "", header)
    counts = {mark: outside.count(mark) for mark in (",", ";", "\t", "|")}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ","


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _decimal_comma(body: bytes) -> bool:
    sample = body[:100_000].decode("utf-8", errors="replace")
    return bool(re.search(r"(^|[;\n])-?\d+,\d+([;\r\n]|$)", sample)) and not re.search(
        r"(^|[;\n])-?\d+\.\d+([;\r\n]|$)", sample
    )


def _kinds(path: Path, head: bytes, dialect: _Dialect) -> dict[str, str]:
    """Infer each column's kind from the whole lines of the file's first megabyte."""
    body = head[_line_end(head) or len(head) :]
    whole = body if path.stat().st_size <= _HEAD else body[: body.rfind(b"\n") + 1]
    if not whole.strip():
        raise InputError(f"{path} has a header line but no rows.")
    table = _parse(path, whole, dialect, None)
    return {name: _kind(table.column(place)) for place, name in enumerate(dialect.names)}


def _kind(column: Any) -> str:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float" if spread_fits_float32(column.to_numpy(zero_copy_only=False)) else "double"
    if pa.types.is_temporal(kind):
        return "date"
    if pa.types.is_boolean(kind):
        return "boolean"
    return "unknown" if pa.types.is_null(kind) else "text"


def _arrow_types(dialect: _Dialect, kinds: dict[str, str] | None) -> dict[str, Any] | None:
    import pyarrow as pa

    if kinds is None:
        return None
    types = {"integer": pa.int64(), "float": pa.float32(), "double": pa.float64(), "boolean": pa.bool_()}
    types |= {"text": pa.string(), "unknown": pa.string(), "date": pa.timestamp("us")}
    return {name: types[kinds[name]] for name in dialect.names}


def _convert_options(dialect: _Dialect, kinds: dict[str, str] | None) -> Any:
    from pyarrow import csv

    return csv.ConvertOptions(
        column_types=_arrow_types(dialect, kinds),
        null_values=list(MISSING_WORDS),
        strings_can_be_null=True,
        decimal_point=dialect.decimal_point,
    )


def _parse(path: Path, block: bytes, dialect: _Dialect, kinds: dict[str, str] | None, rows_before: int = 0) -> Any:
    """Parse whole lines into an Arrow table."""
    import pyarrow as pa
    from pyarrow import csv

    quoted = b'"' in block
    try:
        return csv.read_csv(
            pa.BufferReader(block),
            read_options=csv.ReadOptions(
                column_names=list(dialect.names), use_threads=False, block_size=len(block) + 1
            ),
            parse_options=csv.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=quoted),
            convert_options=_convert_options(dialect, kinds),
        )
    except pa.ArrowInvalid as error:
        raise _explained(path, error, rows_before) from error


def _explained(path: Path, error: Exception, rows_before: int) -> Exception:
    """Turn Arrow's message into a widening of one column, or into a message for the person who has the file."""
    text = str(error)
    misfit = re.search(
        r"In CSV column #(\d+).*?(?:conversion error to [^:]*: (?:invalid value )?'?(.*?)'?)?$", text, re.DOTALL
    )
    if "invalid UTF8" in text:
        return InputError(_not_utf8(path))
    if misfit:
        return _NotThisType(int(misfit.group(1)), (misfit.group(2) or "")[:40])
    shape = re.search(r"(?:Row #(\d+): )?Expected (\d+) columns, got (\d+)", text)
    if shape:
        row, expected, got = shape.groups()
        place = f" in row {int(row) + rows_before} after the header" if row else ""
        return InputError(
            f"{path} is truncated or broken{place}: expected {expected} values, as the header has names, and found "
            f"{got}. Complete or remove that line."
        )
    return InputError(f"{path} cannot be read as a table: {text.splitlines()[0]}")


def _read(path: Path, dialect: _Dialect, kinds: dict[str, str], notes: list[str], threads: int) -> Table:
    batches = _blocks(path, dialect, kinds, threads) if threads else _stream(path, dialect, kinds)
    builder: TableBuilder | None = None
    for table, bytes_read in batches:
        if builder is None:
            left = path.stat().st_size / max(bytes_read, 1)
            expected = int(table.num_rows * left * 1.02) + 64
            check_memory(expected * len(kinds) * 4, f"Reading {path}")
            builder = TableBuilder(kinds, expected)
        builder.append(dialect.names, (_one_array(column) for column in table.columns))
    if builder is None or not builder.rows:
        raise InputError(f"{path} has a header line but no rows.")
    return builder.finish(notes)


def _one_array(column: Any) -> Any:
    import pyarrow as pa

    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _blocks(path: Path, dialect: _Dialect, kinds: dict[str, str], threads: int) -> Iterator[tuple[Any, int]]:
    """Yield parsed blocks in the file's order; a few are in flight at a time."""

    def parse(start: int, end: int) -> Any:
        block = os.pread(file.fileno(), end - start, start)
        if b'"' in block:
            raise _Quoted
        return _parse(path, block, dialect, kinds)

    with path.open("rb") as file, ThreadPoolExecutor(threads) as pool:
        flight: deque[tuple[Future[Any], int]] = deque()
        rows = 0
        try:
            for start, end in _line_ranges(file.fileno(), dialect.header_bytes, path.stat().st_size):
                flight.append((pool.submit(parse, start, end), end - start))
                if len(flight) > threads + 1:
                    table, size = _landed(flight, rows)
                    rows += table.num_rows
                    yield table, size
            while flight:
                table, size = _landed(flight, rows)
                rows += table.num_rows
                yield table, size
        finally:
            for future, _ in flight:
                future.cancel()


def _landed(flight: deque[tuple[Future[Any], int]], rows_before: int) -> tuple[Any, int]:
    future, size = flight.popleft()
    try:
        return future.result(), size
    except InputError as error:
        # A block counts its rows from its own start.
        moved = re.sub(r"in row (\d+)", lambda found: f"in row {int(found.group(1)) + rows_before}", str(error))
        raise InputError(moved) from error


def _line_ranges(descriptor: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    while start < size:
        end = start + _BLOCK
        while end < size:
            ahead = os.pread(descriptor, 1 << 16, end)
            place = ahead.find(b"\n")
            if place >= 0:
                end += place + 1
                break
            end += len(ahead)
        yield start, min(end, size)
        start = end


def _stream(path: Path, dialect: _Dialect, kinds: dict[str, str]) -> Iterator[tuple[Any, int]]:
    import pyarrow as pa
    from pyarrow import csv

    rows = 0
    try:
        with pa.OSFile(str(path)) as file:
            file.seek(dialect.header_bytes)
            reader = csv.open_csv(
                file,
                read_options=csv.ReadOptions(column_names=list(dialect.names), use_threads=False, block_size=_BLOCK),
                parse_options=csv.ParseOptions(delimiter=dialect.delimiter, newlines_in_values=True),
                convert_options=_convert_options(dialect, kinds),
            )
            for batch in reader:
                rows += batch.num_rows
                yield pa.Table.from_batches([batch]), min(_BLOCK, path.stat().st_size)
    except pa.ArrowInvalid as error:
        raise _explained(path, error, 0) from error
