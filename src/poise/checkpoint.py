"""Checkpoints that are whole or absent, and that say so when they are not.

A checkpoint is one file: a line with format and digest, then what `torch.save` writes. It is written beside its place,
flushed to the disk and renamed, so that a process that dies at any moment leaves the previous one. It is read with
PyTorch's safe loader: tensors and plain containers, never code.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from poise.errors import CheckpointError, PoiseWarning

_MAGIC = b"poise-checkpoint-1 "
_KEEP = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the checkpoint of a step and remove all but the newest two.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; earlier checkpoints stay.
    """
    payload = io.BytesIO()
    torch.save(state, payload)
    body = payload.getvalue()
    target = folder / f"step-{step:012d}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(target, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {target} could not be written: {error.strerror or error}. The run goes no further."
        ) from None
    for old in _all(folder)[:-_KEEP]:
        old.unlink(missing_ok=True)
    return target


def write_whole(target: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a loss of power."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The checkpoint {file} cannot be read: {error.strerror or error}.") from None
    head, newline, body = data.partition(b"\n")
    if not newline or not head.startswith(_MAGIC):
        raise CheckpointError(f"{file} is no checkpoint of Poise, or its beginning is damaged.")
    if hashlib.sha256(body).hexdigest().encode() != head[len(_MAGIC) :]:
        raise CheckpointError(f"The checkpoint {file} is damaged: its contents do not match their digest.")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise CheckpointError(
            f"The checkpoint {file} holds something else than tensors and plain containers, so it is not read."
        ) from None
    return state


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"))
