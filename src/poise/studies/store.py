"""The store of a study: one SQLite file, one row a run, curves as compact bytes.

SQLite runs in WAL mode with `synchronous=FULL`: a run that was reported as finished survives a killed process and a
power failure. Writers take the lock at once (`BEGIN IMMEDIATE`) and wait for each other, so concurrent writers lose
nothing. The schema has a version; older stores are brought up to date in one transaction, newer ones are refused.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from poise.errors import StoreError
from poise.studies import curves as compact
from poise.studies.spec import Curves, RunRecord, RunSpec

# Each entry brings a store from version i to version i + 1. Entries are never edited, only appended.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE runs (
            id TEXT PRIMARY KEY, status TEXT NOT NULL, spec TEXT NOT NULL, metrics TEXT NOT NULL,
            error TEXT NOT NULL, seconds REAL NOT NULL, peak_memory_bytes INTEGER NOT NULL, steps INTEGER NOT NULL,
            started TEXT NOT NULL, detail TEXT NOT NULL, context TEXT NOT NULL)""",
        """CREATE TABLE curves (
            run TEXT PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE,
            format INTEGER NOT NULL, data BLOB NOT NULL)""",
    ),
)
SCHEMA_VERSION = len(MIGRATIONS)
# Marks the file as ours ("Pois"), so that another program's database is not taken for an empty store.
APPLICATION_ID = 0x506F6973
_COLUMNS = "id, status, spec, metrics, error, seconds, peak_memory_bytes, steps, started, detail, context"


class Store:
    """Finished runs in one SQLite file.

    Args:
        path: the file; it and its folder are made where they are missing.
        readonly: open without the right to write, also on a read-only medium; the file must exist.
        timeout: seconds that a writer waits for another one.

    Raises:
        StoreError: the file cannot be opened, is no store of Poise, is damaged, or comes from a newer version.

    >>> with Store("study.sqlite") as store:          # doctest: +SKIP
    ...     store.put(record)
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, timeout: float = 60.0) -> None:
        self.path = Path(path)
        self.readonly = readonly
        with self._translated("open"):
            self._connection = self._open_readonly() if readonly else self._open(timeout)
            try:
                self._migrate()
            except BaseException:
                self._connection.close()
                raise

    def _open(self, timeout: float) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # isolation_level=None: transactions are ours alone, see `_writing`.
        connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open_readonly(self) -> sqlite3.Connection:
        if not self.path.is_file():
            raise StoreError(f"There is no store at {self.path}. Give the folder of a study that was run.")
        location = self.path.resolve().as_uri()
        connection = sqlite3.connect(f"{location}?mode=ro", uri=True, isolation_level=None)
        try:
            connection.execute("PRAGMA user_version").fetchone()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            # WAL needs a shared-memory file beside the store; where that cannot be made (a read-only medium), the
            # complete file is read as it stands, unless a write-ahead log holds more than the file does.
            connection.close()
            log = self.path.with_name(self.path.name + "-wal")
            if log.exists() and log.stat().st_size > 0:
                raise
            connection = sqlite3.connect(f"{location}?mode=ro&immutable=1", uri=True, isolation_level=None)
        return connection

    def _migrate(self) -> None:
        version = self._version()
        if version == SCHEMA_VERSION:
            return
        if self.readonly:
            raise StoreError(
                f"{self.path} has schema version {version} and this version of Poise reads {SCHEMA_VERSION}; it is "
                f"opened "
                "read-only, so it cannot be brought up to date. Copy the folder to a place that can be written."
            )
        with self._writing():
            # Another process may have migrated while this one waited for the lock.
            for statements in MIGRATIONS[self._version() :]:
                for statement in statements:
                    self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")

    def _version(self) -> int:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        application = int(self._connection.execute("PRAGMA application_id").fetchone()[0])
        tables = int(self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
        if application != APPLICATION_ID and (tables or version):
            raise StoreError(f"{self.path} is a database of another program. Choose another output folder.")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} was written by a newer Poise (schema version {version}; this one knows "
                f"{SCHEMA_VERSION}). "
                "Update Poise with: pip install --upgrade poise. The file was not changed."
            )
        return version

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            # A full disk rolls back by itself; a second ROLLBACK would hide the first error.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(_explain(self.path, action, error)) from error

    def put(self, record: RunRecord) -> None:
        """Keep a record; when this returns, it survives a power failure.

        A finished run is never overwritten: its id names its content, so a second record of it says the same. A
        failed one gives way to a newer record.

        Raises:
            StoreError: the disk is full, the folder is read-only, or the store is damaged.
        """
        context = {
            "details": record.details,
            "sizes": record.sizes,
            "warnings": record.warnings,
            "versions": record.versions,
            "machine": record.machine,
            "attempts": record.attempts,
        }
        row = (
            record.id,
            record.status,
            record.spec.to_json(),
            json.dumps(record.metrics),
            record.error,
            record.seconds,
            record.peak_memory_bytes,
            record.steps,
            record.started,
            record.detail,
            json.dumps(context),
        )
        packed = compact.pack(record.curves)
        with self._translated("write"), self._writing():
            known = self._connection.execute("SELECT status FROM runs WHERE id = ?", (record.id,)).fetchone()
            if known is not None and known[0] == "done":
                return
            self._connection.execute(f"INSERT OR REPLACE INTO runs ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
            self._connection.execute(
                "INSERT OR REPLACE INTO curves (run, format, data) VALUES (?, ?, ?)",
                (record.id, compact.FORMAT, packed),
            )

    def get(self, run: str) -> RunRecord | None:
        """Return the record of a run with its curves, or None."""
        return next(self.records(curves=True, only=[run]), None)

    def curves(self, only: Collection[str]) -> Iterator[tuple[str, compact.ArrayCurves]]:
        """Yield the curves of these runs as NumPy arrays, run by run."""
        wanted = list(only)
        with self._translated("read"):
            # SQLite limits the number of parameters of one statement.
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(f"SELECT run, format, data FROM curves WHERE run IN ({marks})", part)
                for run, layout, data in rows:
                    self._check_format(run, layout)
                    yield run, compact.unpack_arrays(data)

    def records(
        self,
        *,
        curves: bool = False,
        only: Collection[str] | None = None,
        known: Mapping[str, RunSpec] | None = None,
    ) -> Iterator[RunRecord]:
        """Yield all records, oldest first.

        Args:
            curves: also read the curves (most of the bytes).
            only: ids to yield; None for all.
            known: specifications by id, which need not be read again; an id names its content.
        """
        extra = ", curves.format, curves.data" if curves else ", NULL, NULL"
        join = " LEFT JOIN curves ON curves.run = runs.id" if curves else ""
        query = f"SELECT {_COLUMNS}{extra} FROM runs{join}"
        with self._translated("read"):
            # A few ids are looked up one by one; many are filtered from one pass over the table.
            if only is not None and len(only) <= 500:
                marks = ",".join("?" * len(only))
                rows = self._connection.execute(f"{query} WHERE id IN ({marks}) ORDER BY runs.rowid", tuple(only))
            else:
                rows = self._connection.execute(f"{query} ORDER BY runs.rowid")
            for row in rows:
                if only is None or row[0] in only:
                    yield self._record(row, None if known is None else known.get(row[0]))

    def _record(self, row: tuple[Any, ...], known: RunSpec | None) -> RunRecord:
        run, status, spec, metrics, error, seconds, peak, steps, started, detail, context, layout, data = row
        if layout is not None:
            self._check_format(run, layout)
        curves: Curves = compact.unpack(data) if data is not None else {}
        try:
            record = RunRecord(
                id=run,
                spec=RunSpec.from_json(spec) if known is None else known,
                status=status,
                error=error,
                detail=detail,
                metrics=json.loads(metrics),
                curves=curves,
                seconds=seconds,
                peak_memory_bytes=peak,
                steps=steps,
                started=started,
                **_context(context),
            )
            _check(record)
            return record
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as problem:
            raise StoreError(f"Run {run} in {self.path} is damaged and cannot be read ({problem}).") from problem

    def _check_format(self, run: str, layout: int) -> None:
        if layout != compact.FORMAT:
            raise StoreError(f"The curves of run {run} have format {layout}, which this version of Poise cannot read.")

    def ids(self, status: str | None = None) -> set[str]:
        """Return the ids of all runs, or of those with a status."""
        with self._translated("read"):
            if status is None:
                return {row[0] for row in self._connection.execute("SELECT id FROM runs")}
            return {row[0] for row in self._connection.execute("SELECT id FROM runs WHERE status = ?", (status,))}

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value under a key."""
        with self._translated("write"), self._writing():
            self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def get_meta(self, key: str, default: Any = None) -> Any:
        """Return the JSON value under a key."""
        with self._translated("read"):
            row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        try:
            return default if row is None else json.loads(row[0])
        except (ValueError, TypeError, RecursionError) as problem:
            raise StoreError(
                f"What {self.path} says of {key!r} is damaged and cannot be read ({problem})."
            ) from problem

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _context(text: str) -> dict[str, Any]:
    """Read what thousands of runs say in the same words: versions, machine, sizes."""
    # A record may change its own lists and dictionaries.
    return {key: copy.copy(value) for key, value in _context_of(text).items()}


@lru_cache(maxsize=256)
def _context_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def _check(record: RunRecord) -> None:
    """Raise TypeError where a record is not of the kinds that its fields have."""
    texts = (record.id, record.error, record.detail, record.started)
    numbers = (
        record.seconds,
        record.peak_memory_bytes,
        record.steps,
        record.attempts,
        record.spec.seed,
        record.spec.lr,
    )
    said: tuple[tuple[str, Any, type | tuple[type, ...]], ...] = (
        ("metrics", record.metrics, (int, float)),
        ("sizes", record.sizes, int),
        ("versions", record.versions, str),
        ("machine", record.machine, str),
    )
    if record.status not in ("done", "failed") or not all(isinstance(text, str) for text in texts):
        raise TypeError("its status or a text is of another kind")
    if not all(isinstance(number, int | float) and abs(number) < 1e15 for number in numbers):
        raise TypeError("a number of it is none")
    for name, table, kind in said:
        if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
            raise TypeError(f"its {name} are of another kind")
    if any(isinstance(value, int) and abs(value) > 2**62 for value in record.metrics.values()):
        raise TypeError("a metric of it is too large")
    if not isinstance(record.warnings, list) or not all(isinstance(text, str) for text in record.warnings):
        raise TypeError("its warnings are no texts")
    if (
        not isinstance(record.details, dict)
        or not isinstance(record.spec.formula, str)
        or not isinstance(record.spec.model, str)
    ):
        raise TypeError("its details or its specification are of another kind")


def _explain(path: Path, action: str, error: Exception) -> str:
    reason = str(error)
    lowered = reason.lower()
    if "full" in lowered or "no space" in lowered or "disk quota" in lowered:
        advice = "The disk is full. Free some space and call the study again; finished runs are kept."
    elif "readonly" in lowered or "read-only" in lowered or "permission" in lowered or "unable to open" in lowered:
        advice = "The folder cannot be written. Choose another output folder or change its permissions."
    elif "locked" in lowered or "busy" in lowered:
        advice = "Another process holds it. Wait until that study has finished, or choose another output folder."
    elif "not a database" in lowered or "malformed" in lowered or "corrupt" in lowered:
        advice = "The file is damaged. Move it away and call the study again, or restore it from a copy."
    elif isinstance(error, OSError):
        advice = "Choose another output folder."
    else:
        advice = "If it persists, choose another output folder."
    return f"Cannot {action} the store {path}: {reason}. {advice}"
