"""Checkpoints that are whole or absent, and that say so when they are not.

A checkpoint is one file: a line with format and digest, then what `torch.save` writes. It is written beside its place,
flushed to the disk and renamed, so that a process that dies at any moment leaves the previous one. It is read with
PyTorch's safe loader: tensors and plain containers, never code.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from poise.errors import CheckpointError, PoiseWarning

_MAGIC = b"poise-checkpoint-1 "
_KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step and remove all but the newest two.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; earlier checkpoints stay.
    """
    target = folder / f"step-{step:012d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(target) as file:
            # Straight to the disk, as a state may be as large as the memory; the digest is known at the end.
            file.write(_head("0" * 64))
            body: Any = _Hashing(file)
            torch.save(state, body)
            file.seek(0)
            file.write(_head(body.digest.hexdigest()))
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {target} could not be written: {error.strerror or error}. The run goes no further."
        ) from None
    for old in _all(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return target


def write_whole(target: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a loss of power."""
    with _whole(target) as file:
        file.write(data)


class _Hashing:
    """A file to write to that keeps the digest of what it was given."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class _Behind(io.RawIOBase):
    """The part of a file that lies behind its head, as a file of its own."""

    def __init__(self, file: IO[bytes], head: int) -> None:
        self.file, self.head = file, head
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset + (self.head if whence == os.SEEK_SET else 0), whence) - self.head

    def tell(self) -> int:
        return self.file.tell() - self.head

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)  # type: ignore[attr-defined, no-any-return]


def _head(digest: str) -> bytes:
    return _MAGIC + digest.encode() + b"\n"


@contextmanager
def _whole(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its place only once it is written whole and lies on the disk."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_newest(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return the newest checkpoint that is whole, or None where there is none.

    A damaged one is passed over with a warning that names it.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    files = _all(folder)
    for file in reversed(files):
        try:
            return load(file, device)
        except CheckpointError as error:
            older = " Falling back to the one before." if file is not files[0] else ""
            if not older:
                raise CheckpointError(
                    f"{error} No other checkpoint is left in {folder}; remove the folder to start afresh."
                ) from None
            warnings.warn(f"{error}{older}", PoiseWarning, stacklevel=2)
    return None


def load(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read one checkpoint.

    Raises:
        CheckpointError: it is truncated, changed, or no checkpoint.
    """
    try:
        with file.open("rb") as opened:
            return _read(file, opened, device)
    except OSError as error:
        raise CheckpointError(f"The checkpoint {file} cannot be read: {error.strerror or error}.") from None


def _read(file: Path, opened: IO[bytes], device: torch.device | str) -> dict[str, Any]:
    head = opened.read(len(_head("0" * 64)))
    if not head.startswith(_MAGIC) or not head.endswith(b"\n"):
        raise CheckpointError(f"{file} is no checkpoint of Poise, or its beginning is damaged.")
    digest = hashlib.sha256()
    while part := opened.read(1 << 22):
        digest.update(part)
    if digest.hexdigest().encode() != head[len(_MAGIC) : -1]:
        raise CheckpointError(f"The checkpoint {file} is damaged: its contents do not match their digest.")
    try:
        body: Any = _Behind(opened, len(head))
        state: dict[str, Any] = torch.load(body, map_location=device, weights_only=True)
    except Exception:  # the safe loader refuses foreign objects, and trips over damaged ones in many ways
        raise CheckpointError(
            f"The checkpoint {file} holds something else than tensors and plain containers, so it is not read."
        ) from None
    return state


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"))
