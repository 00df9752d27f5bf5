"""Curves as compact bytes: float32 values and integer steps, split into byte planes and compressed.

Layout before compression: the length of a JSON header (uint32, little-endian), the header, then the arrays it lists.
The header holds `grids`, the lengths of the distinct step lists, and `curves`, pairs (name, grid). Steps are stored
as differences and values as float32; both are transposed into byte planes, because neighbouring values share their
leading bytes.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from poise.errors import StoreError
from poise.studies.spec import Curves

FORMAT = 1
# Of the curves of one run, unpacked: far beyond any real run, and what a damaged or hostile store may take at most.
_MOST_BYTES = 256 << 20
ArrayCurves = dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]


def pack(curves: Curves) -> bytes:
    """Compress curves.

    Args:
        curves: name -> (steps, values), steps as integers below 2**62, values as floats (rounded to float32).

    Returns:
        The bytes; `unpack` gives the curves back.

    >>> unpack(pack({"loss": ([0, 10], [1.5, 0.25])}))
    {'loss': ([0, 10], [1.5, 0.25])}
    """
    grids: dict[tuple[int, ...], int] = {}
    listing = [(name, grids.setdefault(tuple(steps), len(grids))) for name, (steps, _) in curves.items()]
    header = json.dumps({"grids": [len(grid) for grid in grids], "curves": listing}).encode()
    parts = [struct.pack("<I", len(header)), header]
    parts += [_planes(np.diff(np.asarray(grid, dtype="<i8"), prepend=0)) for grid in grids]
    for name, (steps, values) in curves.items():
        if len(steps) != len(values):
            raise ValueError(f"curve {name!r} has {len(steps)} steps and {len(values)} values")
        # A divergent loss may exceed float32; it is stored as infinite, without a warning on the way.
        with np.errstate(over="ignore"):
            parts.append(_planes(np.asarray(values, dtype="<f4")))
    return zlib.compress(b"".join(parts), 6)


def unpack(data: bytes) -> Curves:
    """Give back what `pack` compressed, as lists.

    Raises:
        StoreError: the bytes are damaged.
    """
    return {name: (steps.tolist(), values.tolist()) for name, (steps, values) in unpack_arrays(data).items()}


def unpack_arrays(data: bytes) -> ArrayCurves:
    """Give back what `pack` compressed, as arrays: steps int64, values float32; curves may share their steps.

    Raises:
        StoreError: the bytes are damaged.
    """
    try:
        unpacking = zlib.decompressobj()
        raw = memoryview(unpacking.decompress(data, _MOST_BYTES))
        if not unpacking.eof:
            raise ValueError(f"they end too early, or hold more than {_MOST_BYTES:,} bytes")
        (length,) = struct.unpack_from("<I", raw)
        header = json.loads(bytes(raw[4 : 4 + length]))
        position = 4 + length
        grids = []
        for count in header["grids"]:
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"a curve of {count!r} steps")
            grids.append(_grid(bytes(_piece(raw, position, 8 * count))))
            position += 8 * count
        curves: ArrayCurves = {}
        # Neighbours on one grid are decoded in one piece: a run has a dozen of them, a study a hundred thousand.
        for grid, group in itertools.groupby(header["curves"], key=lambda entry: int(entry[1])):
            names = [name for name, _ in group]
            steps = grids[grid]
            rows = _from_planes(raw, position, len(steps), "<f4", len(names))
            curves |= {name: (steps, row) for name, row in zip(names, rows, strict=True)}
            position += 4 * len(steps) * len(names)
    except (
        zlib.error,
        struct.error,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise StoreError(f"The curves of a run are damaged and cannot be read ({error}).") from error
    return curves


def _planes(array: npt.NDArray[Any]) -> bytes:
    return array.view(np.uint8).reshape(array.size, array.itemsize).T.tobytes()


def _from_planes(raw: memoryview, position: int, count: int, dtype: str, arrays: int = 1) -> npt.NDArray[Any]:
    """Return `arrays` arrays of `count` numbers that lie one after the other, as rows `[arrays, count]`."""
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(raw, dtype=np.uint8, count=arrays * count * size, offset=position)
    rows = np.ascontiguousarray(planes.reshape(arrays, size, count).transpose(0, 2, 1))
    return rows.reshape(-1).view(dtype).reshape(arrays, count)


def _piece(raw: memoryview, position: int, size: int) -> memoryview:
    if position + size > len(raw):
        raise ValueError("a list of steps is cut off")
    return raw[position : position + size]


@lru_cache(maxsize=64)
def _grid(planes: bytes) -> npt.NDArray[np.int64]:
    """Return the steps; runs of one study share theirs, so that who compares them sees one object."""
    steps = np.cumsum(_from_planes(memoryview(planes), 0, len(planes) // 8, "<i8")[0])
    steps.flags.writeable = False
    return steps
