"""`python -m benchmarks [--quick] [NAMES]`: runs every `bench_NAME.py` and prints the ratios in one table."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
import traceback
from pathlib import Path

from benchmarks.harness import Ratio


def names() -> list[str]:
    """The benchmarks that exist, by the NAME of their `bench_NAME.py`."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def line(ratio: Ratio) -> str:
    """One row of the table: figure, goal, whether it is met."""
    sign = "<=" if ratio.better == "lower" else ">="
    goal = "" if ratio.goal is None else f"{sign} {ratio.goal:g}"
    met = {True: "met", False: "NOT MET", None: ""}[ratio.met]
    return f"  {ratio.name:<62} {ratio.value:>9.3f}  {goal:>9}  {met:<7}  {ratio.detail}"


def main() -> int:
    """Run the chosen benchmarks; exit status 1 if one of them could not run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Runs Poise beside its peers and prints the ratios."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run (default: all of {', '.join(names())})")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer repeats and smaller sizes: a check that it runs, not a figure to quote",
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names())):
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(names())}")
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if arguments.quick:
        print("quick: fewer repeats and smaller sizes; do not quote these figures")
    broken = 0
    for name in arguments.names or names():
        started = time.perf_counter()
        print(f"\n{name}", flush=True)
        try:
            ratios = importlib.import_module(f"benchmarks.bench_{name}").run(arguments.quick)
        except Exception:
            # One benchmark whose peer is absent must not hide the figures of the others.
            traceback.print_exc(file=sys.stdout)
            broken += 1
            continue
        for ratio in ratios:
            print(line(ratio), flush=True)
        print(f"  ({time.perf_counter() - started:.1f} s)", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
