"""One study at a time on one output folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

from poise.errors import StoreError


class FolderLock:
    """Hold an output folder for this process, and name the holder where another one has it.

    The operating system's file lock is used, so a killed process leaves nothing locked. The file itself stays, because
    removing a lock file while another process opens it would let two processes in.

    Args:
        folder: the output folder; it must exist.

    Raises:
        StoreError: on entering, where another process holds the folder or the lock file cannot be written.

    >>> with FolderLock("poise-report"):          # doctest: +SKIP
    ...     run_everything()
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "study.lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        try:
            # Opened for appending: the holder's name must survive until the lock is ours.
            file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise StoreError(
                f"Cannot write in {self.path.parent}: {error.strerror or error}. Choose another output folder."
            ) from error
        if not _try_lock(file):
            holder = _holder(file)
            file.close()
            raise StoreError(
                f"Another process{holder} is running a study in {self.path.parent}. Wait until it has finished, "
                f"stop it, or "
                "choose another output folder."
            )
        try:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            file.flush()
        except OSError:
            # A full disk must not stop a study that could still be read and reported; only the holder's name is lost.
            pass
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        content = json.loads(file.read())
        return f" (process {int(content['pid'])} on {content['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[str]) -> bool:
        try:
            # The locked byte lies beyond the text, so that others can still read the holder's name.
            file.seek(1 << 20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: IO[str]) -> bool:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
