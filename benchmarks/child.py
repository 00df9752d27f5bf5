"""`python -m benchmarks.child FOLDER NAME RESULT [--quick]`: runs one benchmark in this process and writes its ratios.

The runner starts one such process a benchmark, so that what a benchmark leaves behind (memory, threads, settings, a
crash) reaches no other.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks.harness import Ratio


def measure(folder: Path, name: str, quick: bool) -> list[Ratio]:
    """Import `bench_NAME` from the folder, as a module of the package `benchmarks`, and run it."""
    benchmarks.__path__.insert(0, str(folder))
    ratios: list[Ratio] = importlib.import_module(f"benchmarks.bench_{name}").run(quick)
    return ratios


def row(ratio: Ratio) -> dict[str, Any]:
    """One ratio as JSON: a figure that is not finite becomes null."""
    value = float(ratio.value)
    found: dict[str, Any] = {"name": ratio.name, "value": float(f"{value:.5g}") if math.isfinite(value) else None}
    if ratio.noise is not None and math.isfinite(ratio.noise):
        found["noise"] = float(f"{ratio.noise:.3g}")
    if ratio.goal is not None:
        found |= {"goal": ratio.goal, "better": ratio.better, "met": bool(ratio.met)}
    if ratio.detail:
        found["detail"] = ratio.detail
    return found


def main(folder: str, name: str, result: str, *quick: str) -> int:
    """Write `{"ratios": [...]}` or `{"reason": ...}`; exit status 1 if the benchmark raised."""
    try:
        written: dict[str, Any] = {"ratios": [row(ratio) for ratio in measure(Path(folder), name, bool(quick))]}
    except Exception as error:
        traceback.print_exc()
        words = str(error).strip().splitlines()
        written = {"reason": f"{type(error).__name__}: {words[0]}" if words else type(error).__name__}
    Path(result).write_text(json.dumps(written), encoding="utf-8")
    return 0 if "ratios" in written else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
