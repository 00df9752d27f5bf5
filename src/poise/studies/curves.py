"""Curves as compact bytes: float32 values and integer steps, split into byte planes and compressed.

Layout before compression: the length of a JSON header (uint32, little-endian), the header, then the arrays it lists.
The header holds `grids`, the lengths of the distinct step lists, and `curves`, pairs (name, grid). Steps are stored
as differences and values as float32; both are transposed into byte planes, because neighbouring values share their
leading bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
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
            grids.append(np.cumsum(_from_planes(raw, position, count, "<i8")))
            position += 8 * count
        curves: ArrayCurves = {}
        for name, grid in header["curves"]:
            curves[name] = (grids[grid], _from_planes(raw, position, len(grids[grid]), "<f4"))
            position += 4 * len(grids[grid])
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


def _from_planes(raw: memoryview, position: int, count: int, dtype: str) -> npt.NDArray[Any]:
    size = np.dtype(dtype).itemsize
    planes = np.frombuffer(raw, dtype=np.uint8, count=count * size, offset=position).reshape(size, count)
    return np.ascontiguousarray(planes.T).reshape(-1).view(dtype)
