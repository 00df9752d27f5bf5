"""Reading a CSV of a million rows and 30 numeric columns into tensors, beside pandas.

Each reading runs in a process of its own, in turns with the peer, so that neither inherits the other's memory; both import what they need
and read a tiny file before the clock starts. The file is in the page cache for both. Memory is the peak of the resident set
minus its size before the reading.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Ratio

_READ = """
import json, sys, time
import pandas, pyarrow.csv, torch
from poise.tasks.delimited import read_delimited

side, path, tiny = sys.argv[1:]
read = read_delimited if side == "poise" else pandas.read_csv
read(tiny)

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
start = time.perf_counter()
table = read(path)
seconds = time.perf_counter() - start
# VmHWM begins anew with the program; ru_maxrss would begin with the memory of the process that started it.
print(json.dumps({"seconds": seconds, "growth": status("VmHWM") - before, "version": pandas.__version__}))
"""


def write_csv(path: Path, rows: int, columns: int = 30, digits: int = 6) -> None:
    """Write `columns` numeric columns: 26 of 30 hold normal numbers of `digits` decimals, the others whole numbers."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    generator = np.random.default_rng(0)
    table = {}
    for place in range(columns):
        fraction = place % 30 < 26
        values = generator.normal(size=rows).round(digits) if fraction else generator.integers(0, 1000, rows)
        table[f"x{place}"] = values
    csv.write_csv(pa.table(table), path)


def run(quick: bool) -> list[Ratio]:
    """Measure time against pandas and peak memory against the size of the file."""
    rows = 200_000 if quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path, tiny = Path(folder) / "table.csv", Path(folder) / "tiny.csv"
        write_csv(path, rows)
        write_csv(tiny, 100)
        size = path.stat().st_size
        path.read_bytes()
        ours, theirs = [], []
        for turn in range(3 if quick else 7):
            for side in ("poise", "pandas") if turn % 2 == 0 else ("pandas", "poise"):
                (ours if side == "poise" else theirs).append(_measure(side, path, tiny))
    seconds = statistics.median(one["seconds"] for one in ours)
    peer = statistics.median(one["seconds"] for one in theirs)
    ratio = statistics.median(one["seconds"] / other["seconds"] for one, other in zip(ours, theirs, strict=True))
    growth = max(one["growth"] for one in ours)
    shape = f"{rows:,} rows x 30 columns, {size / 1e6:.0f} MB"
    return [
        Ratio(
            "reading a CSV into tensors, time over pandas.read_csv",
            ratio,
            1.5,
            detail=f"{shape}: {seconds:.2f} s, pandas {theirs[0]['version']} {peer:.2f} s (medians)",
        ),
        Ratio(
            "reading a CSV into tensors, peak memory over file size",
            growth / size,
            2.0,
            detail=f"{shape}: {growth / 1e6:.0f} MB; pandas {max(one['growth'] for one in theirs) / 1e6:.0f} MB",
        ),
    ]


def _measure(side: str, path: Path, tiny: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _READ, side, str(path), str(tiny)], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result
