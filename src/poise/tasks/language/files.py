"""Rows of a text data set, one by one, each with the place that a person would look at.

A row that cannot be read is given as a `BadRow` instead of being raised, so that the reader above decides whether it is an error or
something to count.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from poise.errors import InputError, nearest

FORMATS = (
    "JSON lines or a JSON list (.jsonl, .json, also .gz), Parquet (.parquet), or a folder that the library `datasets` wrote "
    "with save_to_disk"
)
_LINES = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet", ".pq")
_BATCH_ROWS = 4_096
# A line holds one record, and a list all of them; a compressed file of a few megabytes could hold a line of many gigabytes.
_LONGEST_LINE, _LONGEST_LIST = 64 << 20, 256 << 20


class Unusable(ValueError):
    """Why a row cannot become a record; whoever reads adds the place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `line` is the line of a text file or the row of a table, from 1."""

    line: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str


def read_rows(path: str | os.PathLike[str], part: str | None = None) -> Iterator[Row | BadRow]:
    """Read a file or folder row by row; memory holds one row, or one batch of a table.

    Args:
        path: a file of JSON lines or a JSON list, plain or gzip; Parquet; a folder that `datasets` saved.
        part: which split of a folder of several ("train"); None takes the only one, or "train".
    Raises:
        InputError: no such file, an unknown format, an empty file, or one that is broken as a whole.

        >>> for row in read_rows("pairs.jsonl.gz"):  # doctest: +SKIP
        ...     print(row.line, row.fields["prompt"])
    """
    path = Path(path)
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise InputError(f"{path} does not exist.{near}")
    if path.is_dir():
        return _folder(path, part)
    if part is not None:
        raise InputError(f"{path} is one file and has no part {part!r}; parts are those of a `datasets` folder.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = suffixes[-2] if zipped and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. Expected {FORMATS}.")
    if kind in _LINES:
        return _text(path, zipped)
    if kind in _PARQUET and not zipped:
        return _parquet(path)
    raise InputError(f"{path} is of an unknown format. Poise reads {FORMATS}.")


def place(path: str | os.PathLike[str], line: int) -> str:
    """Say where a row stands: `pairs.jsonl, line 7`; tables have rows."""
    return f"{path}, {'line' if any(s in _LINES for s in Path(path).suffixes) else 'row'} {line}"


def _text(path: Path, zipped: bool) -> Iterator[Row | BadRow]:
    opened: IO[bytes] = gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[assignment]  # noqa: SIM115
    line = 0
    with opened as file:
        try:
            first = _first_byte(path, file)
            if first == b"[":
                whole = file.read(_LONGEST_LIST + 1)
                if len(whole) > _LONGEST_LIST:
                    raise InputError(
                        f"{path} is a JSON list of more than {_LONGEST_LIST >> 20} MB, which is in memory as a whole. Save it "
                        "as JSON lines, one object a line; those are read row by row."
                    )
                yield from _json_list(path, whole)
                return
            for line, raw in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
                if len(raw) >= _LONGEST_LINE and not raw.endswith(b"\n"):
                    yield BadRow(line, f"a line of more than {_LONGEST_LINE >> 20} MB; nothing after it is read")
                    return
                if raw.strip():
                    yield _json_line(line, raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if line == 0:
                raise InputError(f"{path} is not a whole gzip file: {error}. Fetch or compress it again.") from error
            yield BadRow(line + 1, f"the gzip file ends or breaks here ({error}); fetch or compress it again")


def _first_byte(path: Path, file: IO[bytes]) -> bytes:
    head = file.read(4_096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is not UTF-8: it begins with a UTF-16 mark. Save it as UTF-8 and try again.")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    read = len(head)
    while head and not start and read < _LONGEST_LINE:
        head = file.read(1 << 20)
        read += len(head)
        start = head.lstrip()
    if not start:
        raise InputError(f"{path} is empty. Expected one JSON object a line.")
    file.seek(0)
    return start[:1]


def _json_line(line: int, raw: bytes) -> Row | BadRow:
    if line == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(line, f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        return BadRow(line, f"not a whole JSON object ({error}); every line must hold one")
    return _object(line, value)


def _object(line: int, value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(line, f"a JSON object was expected, and this is a {type(value).__name__}")
    return Row(line, value)


def _json_list(path: Path, raw: bytes) -> Iterator[Row | BadRow]:
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 in line {line}. Save it as UTF-8 and try again.") from error
    decoder, spaces = json.JSONDecoder(), " \t\r\n,"
    at, counted, line = text.index("[") + 1, 0, 1
    while True:
        while at < len(text) and text[at] in spaces:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # What follows cannot be told apart any more, so this is the last row.
            yield BadRow(line, f"the JSON list breaks here ({error})")
            return
        yield _object(line, value)


def _parquet(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                raise InputError(f"{path} has no rows.")
            yield from _batches(file.iter_batches(batch_size=_BATCH_ROWS), 0)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: names that are no UTF-8
        raise InputError(
            f"{path} is not a whole Parquet file; it may be truncated or of another format: {str(error).splitlines()[0]}"
        ) from error


def _batches(batches: Any, start: int) -> Iterator[Row | BadRow]:
    for batch in batches:
        for fields in batch.to_pylist():
            start += 1
            # A column that only other rows fill is not a field of this row.
            yield Row(start, {name: value for name, value in fields.items() if value is not None})


def _folder(path: Path, part: str | None) -> Iterator[Row | BadRow]:
    if (path / "dataset_dict.json").is_file():
        names = _parts(path)
        chosen = part or (names[0] if len(names) == 1 else "train")
        if chosen not in names:
            raise InputError(f"{path} has no part {chosen!r}; it has {', '.join(names)}. Name one of them.")
        path = path / chosen
    elif part is not None:
        raise InputError(f"{path} is one data set without parts, so it has no part {part!r}.")
    if not (path / "state.json").is_file():
        raise InputError(
            f"{path} is not a data set that `datasets` wrote with save_to_disk: state.json is missing. Poise reads {FORMATS}."
        )
    return _arrow(path)


def _parts(path: Path) -> list[str]:
    try:
        names: list[str] = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("splits is no list of names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not a whole `datasets` folder: {error}. Save or fetch it again.") from error
    for name in names:
        _member(path, name)
    return names


def _member(folder: Path, name: Any) -> Path:
    """The file or folder of this name directly inside a folder; a name that leads elsewhere is refused."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise InputError(
            f"{folder} names {name!r} as one of its parts; a part lies in the folder itself. Save or fetch it again."
        )
    return folder / name


def _arrow(path: Path) -> Iterator[Row | BadRow]:
    import pyarrow as pa

    rows = 0
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for entry in state["_data_files"]:
            with pa.memory_map(str(_member(path, entry["filename"]))) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    yield from _batches([batch], rows)
                    rows += batch.num_rows
    except InputError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a whole `datasets` folder: {error}. Save or fetch it again.") from error
    if not rows:
        raise InputError(f"{path} has no rows.")
