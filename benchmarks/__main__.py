"""`python -m benchmarks [--quick] [NAMES]`: runs every `bench_NAME.py`, writes trend and table, fails where a goal is lost."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from benchmarks import page, runner, trend

REPEATS = 2
"""How often a benchmark runs again before one of its goals is called lost: the middle of three runs decides."""


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks.

    Returns:
        1 if one of them could not run, or if a ratio that was met is no longer met; else 0.
    """
    chosen = _parser().parse_args(arguments)
    known = runner.names(chosen.folder)
    if unknown := sorted(set(chosen.names) - set(known)):
        _parser().error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        lines = trend.read(chosen.trend)
        if chosen.table:
            page.write(chosen.page, lines)
            return 0
        if not chosen.dry:
            page.write(chosen.page, lines)  # a page without its markers is said before the hours are spent
    except (OSError, ValueError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(runner.machine())
    if chosen.quick:
        print("quick: fewer repeats and smaller sizes; do not quote these figures")
    lost: list[str] = []
    broken: list[str] = []
    for name in chosen.names or known:
        line = _measure(name, chosen, lines)
        lost += [f"{name}: {ratio}" for ratio in trend.lost(line)]
        broken += [f"{name}: {line['reason']}"] if line.get("reason") else []
        if not chosen.dry:
            # After each one, so that a run that is stopped keeps what it has.
            lines.append(line)
            trend.write(chosen.trend, lines)
            page.write(chosen.page, lines)
    return _close(lost, broken)


def _parser() -> argparse.ArgumentParser:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Runs Poise beside its peers, each benchmark in its own process; writes the trend file and the table.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"which to run (default: all of {', '.join(runner.names())})")
    add(
        "--quick",
        action="store_true",
        help="fewer repeats and smaller sizes: a check that it runs, not a figure to quote",
    )
    add("--limit", type=float, metavar="SECONDS", help="time limit of each benchmark (default: 300 quick, 1800 full)")
    add("--accept", action="store_true", help="let goals that are lost in this run be missed from now on")
    add("--dry", action="store_true", help="print only: leave trend file and page as they are")
    add("--table", action="store_true", help="only write the table anew from the trend file")
    add("--trend", type=Path, default=here / "trend.jsonl", help="the trend file (default: benchmarks/trend.jsonl)")
    add(
        "--page",
        type=Path,
        default=here.parent / "docs" / "benchmarks.md",
        help="the page (default: docs/benchmarks.md)",
    )
    add("--folder", type=Path, default=here, help="where the files bench_NAME.py lie (default: benchmarks)")
    return parser


def _measure(name: str, chosen: argparse.Namespace, lines: list[trend.Line]) -> trend.Line:
    """Run one benchmark, and again where a goal seems lost."""
    print(f"\n{name}", flush=True)
    runs = [_once(name, chosen)]
    line = trend.judged(runs[0], lines, chosen.accept)
    while trend.lost(line) and len(runs) <= REPEATS:
        print(f"  no longer met: {'; '.join(trend.lost(line))}; once more", flush=True)
        again = _once(name, chosen)
        if again.get("reason"):
            break
        runs.append(again)
        if len(runs) == REPEATS + 1:
            line = trend.judged(trend.middle(runs), lines, chosen.accept)
    for ratio in line["ratios"]:
        print(_printed(ratio), flush=True)
    if line.get("reason"):
        print(f"  {line['reason']}", flush=True)
    beside = f", other processes kept {line['others']:.1f} cores busy" if line["others"] > runner.BUSY else ""
    print(f"  ({line['seconds']:.1f} s{beside})", flush=True)
    return line


def _once(name: str, chosen: argparse.Namespace) -> trend.Line:
    limit = chosen.limit or (300.0 if chosen.quick else 1800.0)
    outcome = runner.run(name, chosen.quick, limit, chosen.folder)
    line: dict[str, Any] = {
        "benchmark": name,
        "mode": "quick" if chosen.quick else "full",
        "date": datetime.date.today().isoformat(),
        "machine": runner.machine(),
        "others": outcome.others,
        "seconds": outcome.seconds,
        "versions": runner.versions(),
        "ratios": outcome.ratios,
    }
    return line | ({"reason": outcome.reason} if outcome.reason else {})


def _printed(ratio: trend.Line) -> str:
    """One row for the terminal: figure, goal, whether it is met."""
    value = (
        "not finite"
        if ratio["value"] is None
        else f"{ratio['value']:.3f}" + (f" ± {ratio['noise']:.2g}" if ratio.get("noise") else "")
    )
    goal = "" if "goal" not in ratio else f"{'<=' if ratio['better'] == 'lower' else '>='} {ratio['goal']:g}"
    status = {"met": "met", "missed": "NOT MET", "near": "NOT MET, within the noise", "lost": "NO LONGER MET"}
    return (
        f"  {ratio['name']:<62} {value:>16}  {goal:>9}  {status.get(ratio.get('status', ''), ''):<7}"
        f"  {ratio.get('detail', '')}"
    )


def _close(lost: list[str], broken: list[str]) -> int:
    if broken:
        print("\nCould not be measured:", *(f"  {words}" for words in broken), sep="\n")
    if lost:
        print("\nMet before and no longer met:", *(f"  {words}" for words in lost), sep="\n")
        print("Mend what became slower. If the loss is known and borne, run those again with --accept.")
    return 1 if lost or broken else 0


if __name__ == "__main__":
    sys.exit(main())
