"""NumPy files: an NPY matrix becomes a table, an NPZ gives inputs and targets.

Nothing is unpickled: `allow_pickle` is False throughout, so that opening a file never runs code. The size that a header announces is
checked against the file (NPY) or what its archive says (NPZ) and the free memory before anything is allocated.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError, nearest
from poise.tasks.memory import check_memory
from poise.tasks.table import Categories, Column, Table, spread_fits_float32, whole_numbers_fit_float32

INPUT_KEYS = ("input", "inputs", "x", "X", "x_train", "X_train", "data", "images", "features")
_LONGEST_HEADER = 10_000
# An archive may unpack to this much whatever its own size, and to a hundred times its size in any case; real data do not shrink more.
_UNPACKED, _SHRUNK = 256 << 20, 100
TARGET_KEYS = ("target", "targets", "y", "y_train", "label", "labels")


@dataclass(frozen=True)
class ArrayPair:
    """Inputs of any shape beside one target a row.

    Attributes:
        inputs: float32 `[rows, ...]`.
        target: the target's column.
        notes: what was decided, in words.
    """

    inputs: Tensor
    target: Column
    notes: list[str]


def read_npy(path: str | os.PathLike[str]) -> Table:
    """Read an NPY file with a matrix [rows, columns] into a `Table` with columns named "0", "1", ...

    Args:
        path: an NPY file; a structured array gives its field names.
    Raises:
        InputError: pickled objects, other shapes, a truncated file, an absurd size.

        >>> table = read_npy("data.npy")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. Expected an NPY array.")
    _check_npy_header(path)
    array = _load(path)
    if array.dtype.names:
        return Table(*_columns({name: array[name] for name in array.dtype.names}))
    if array.ndim != 2:
        raise InputError(
            f"{path} holds an array of shape {list(array.shape)}; expected a matrix [rows, columns]. For images use "
            "NPZ with 'input' and 'target'."
        )
    if not array.size:
        raise InputError(f"{path} holds an array of shape {list(array.shape)}: it has no rows or no columns.")
    return Table(*_columns({str(place): array[:, place] for place in range(array.shape[1])}))


def read_npz(path: str | os.PathLike[str], label: str | None = None) -> Table | ArrayPair:
    """Read an NPZ file with inputs [rows, ...] and a target [rows].

    Args:
        path: an NPZ file; the inputs are the array named `input, x, data, ...`, or the only one beside the target.
        label: the name of the target's array; None looks for one of `target, y, label, labels`.
    Returns:
        A `Table` with columns x0, x1, ... and the target as the last column for inputs `[rows, columns]`, an
        `ArrayPair` for inputs of three or more dimensions.
    Raises:
        InputError: missing or unequal arrays, pickled objects, a truncated file, an absurd size.

        >>> pair = read_npz("digits.npz", label="y")  # doctest: +SKIP
    """
    path = Path(path)
    arrays = _load_archive(path)
    target_key = _target_key(path, list(arrays), label)
    input_key = _input_key(path, [name for name in arrays if name != target_key])
    inputs, target = arrays[input_key], arrays[target_key]
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim != 1:
        raise InputError(
            f"The target {target_key!r} of {path} has shape {list(target.shape)}; expected one value a row: [rows]."
        )
    if inputs.ndim < 2 or not inputs.size:
        raise InputError(
            f"The inputs {input_key!r} of {path} have shape {list(inputs.shape)}; expected [rows, columns] or "
            "[rows, height, width(, channels)]."
        )
    if len(inputs) != len(target):
        raise InputError(
            f"{path} holds {len(inputs)} inputs ({input_key!r}) and {len(target)} targets ({target_key!r}); they must be as many."
        )
    notes = [f"Inputs are the array {input_key!r}, targets the array {target_key!r}."]
    if inputs.ndim == 2:
        columns, integers = _columns(
            {f"x{place}": inputs[:, place] for place in range(inputs.shape[1])} | {target_key: target}
        )
        return Table(columns, integers, notes=notes)
    return ArrayPair(_image_tensor(path, input_key, inputs, notes), _column(target_key, target), notes)


def read_npz_inputs(path: str | os.PathLike[str]) -> Table | Tensor:
    """Read the inputs of an NPZ file alone: a `Table` with columns x0, x1, ... for a matrix, float32 `[rows, ...]` otherwise.

    Args:
        path: an NPZ file; a target may be absent.
    Raises:
        InputError: as `read_npz`.
    """
    path = Path(path)
    arrays = _load_archive(path)
    key = _input_key(path, [name for name in arrays if name not in TARGET_KEYS])
    inputs = arrays[key]
    if inputs.ndim == 2:
        return Table(*_columns({f"x{place}": inputs[:, place] for place in range(inputs.shape[1])}))
    return _image_tensor(path, key, inputs, [])


def _check_npy_header(path: Path) -> None:
    with path.open("rb") as file:
        shape, dtype = _header(file, path)
        count = int(np.prod(shape, dtype=object)) if shape else 1
        announced = count * dtype.itemsize
        if announced > path.stat().st_size - file.tell():
            raise InputError(
                f"{path} is truncated: its header announces {list(shape)} values of {dtype} and the file ends before that."
            )


def _header(file: Any, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        head = file.read(8)
        version = np.lib.format.read_magic(io.BytesIO(head))
        size = file.read(2 if version == (1, 0) else 4)
        (length,) = struct.unpack("<H" if version == (1, 0) else "<I", size)
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header announces {length} bytes of its own")
        whole = io.BytesIO(size + file.read(length))
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(whole)
    except Exception as error:  # NumPy's parser and the codecs of archives raise whatever they like for damaged bytes
        raise InputError(f"{path} is not a whole NPY file: {_first_line(error)}.") from error
    if any(size < 0 for size in shape):
        raise InputError(f"{path} is not a whole NPY file: its header announces the shape {list(shape)}.")
    if dtype.hasobject:
        raise InputError(
            f"{path} holds pickled Python objects, which Poise never loads: opening them could run code. Save "
            "numbers or text (dtype float, int or str)."
        )
    return shape, dtype


def _load(path: Path) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    except Exception as error:  # as for its header
        raise InputError(f"{path} is not a whole NPY file: {_first_line(error)}.") from error
    return array


def _load_archive(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. Expected an NPZ archive.")
    try:
        with zipfile.ZipFile(path) as archive:
            needed = 0
            short: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = []
            for entry in archive.infolist():
                _reject_bomb(path, entry)
                with archive.open(entry) as member:
                    shape, dtype = _header(member, path)
                size = int(np.prod(shape, dtype=object)) * dtype.itemsize
                short += [(entry.filename, shape, dtype)] if size > entry.file_size else []
                needed += size
        # The arrays and their float32 copy are in memory together for a moment.
        check_memory(2 * needed, f"Loading {path}")
        for name, shape, dtype in short:
            raise InputError(
                f"{path} is not a whole NPZ archive: {name!r} announces {list(shape)} values of {dtype} and ends before that."
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except Exception as error:  # whatever an archive's codecs and NumPy raise for damaged bytes
        raise InputError(f"{path} is not a whole NPZ archive; it may be truncated: {_first_line(error)}.") from error


def _reject_bomb(path: Path, entry: zipfile.ZipInfo) -> None:
    if entry.file_size > max(_UNPACKED, _SHRUNK * entry.compress_size):
        raise InputError(
            f"{path} holds {entry.filename!r}, {entry.compress_size:,} bytes that unpack to {entry.file_size:,}: that is how an archive "
            "made to fill the memory looks. Save the arrays again with np.savez, uncompressed, if they are really so."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _target_key(path: Path, names: list[str], label: str | None) -> str:
    if label is not None:
        if label not in names:
            raise InputError(
                f"{path} has no array {label!r} to use as label.{nearest(label, names)} Its arrays are: {', '.join(names)}."
            )
        return label
    for key in TARGET_KEYS:
        if key in names:
            return key
    raise InputError(
        f"{path} has the arrays {', '.join(names) or '(none)'}; none is named {', '.join(TARGET_KEYS)}. Say which "
        "one is the target with label=NAME."
    )


def _input_key(path: Path, names: list[str]) -> str:
    for key in INPUT_KEYS:
        if key in names:
            return key
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"{path} has the arrays {', '.join(names) or '(none)'} beside the target; name the one with the inputs 'input' or 'x'."
    )


def _columns(arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[dict[str, Column], frozenset[str]]:
    columns = {name: _column(name, array) for name, array in arrays.items()}
    return columns, frozenset(name for name, array in arrays.items() if array.dtype.kind in "iu")


def _column(name: str, array: np.ndarray[Any, Any]) -> Column:
    if array.ndim != 1:
        raise InputError(f"Column {name!r} has shape {list(array.shape)}; expected one value a row.")
    if array.dtype.kind in "USb":
        try:
            text = array.astype(str) if array.dtype.kind != "S" else np.char.decode(array, "utf-8", "strict")
            values, codes = np.unique(text, return_inverse=True)
            names = tuple(str(value) for value in values)
        except (UnicodeError, SystemError, ValueError) as error:  # NumPy hands on any bytes as code points
            raise InputError(f"Column {name!r} holds bytes that are no text in UTF-8.") from error
        return Categories(torch.from_numpy(codes.astype(np.int32)), names)
    if array.dtype.kind not in "iuf":
        raise InputError(f"Column {name!r} has the type {array.dtype}; expected numbers or text.")
    fits = (
        whole_numbers_fit_float32(array)
        if array.dtype.kind in "iu"
        else array.dtype.itemsize <= 4 or spread_fits_float32(array)
    )
    return torch.from_numpy(array.astype(np.float32 if fits else np.float64))


def _image_tensor(path: Path, key: str, inputs: np.ndarray[Any, Any], notes: list[str]) -> Tensor:
    """[rows, height, width] -> [rows, 1, height, width]; channels last -> channels first; bytes -> [0, 1]."""
    if inputs.dtype.kind not in "iufb":
        raise InputError(f"The inputs {key!r} of {path} have the type {inputs.dtype}; expected numbers.")
    values = torch.from_numpy(np.ascontiguousarray(inputs)).float()
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"The inputs {key!r} of {path} hold NaN or infinite values; images must be whole. Remove those rows."
        )
    if inputs.dtype == np.uint8:
        values /= 255
        notes.append("Bytes are scaled to [0, 1].")
    if values.ndim == 3:
        return values.unsqueeze(1)
    if values.ndim == 4 and values.shape[-1] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        notes.append("Images are read as [rows, height, width, channels].")
        return values.permute(0, 3, 1, 2).contiguous()
    return values
