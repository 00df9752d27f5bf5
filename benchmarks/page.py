"""The table of `docs/benchmarks.md`: written between two markers from the trend file, the prose around it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.runner import BUSY

Line = dict[str, Any]
BEGIN = "<!-- measured: begin -->"
END = "<!-- measured: end -->"
WORDS = {"met": "met", "missed": "missed", "near": "missed within the noise", "lost": "**no longer met**"}


def table(lines: list[Line]) -> str:
    """Markdown for the newest full run of each benchmark, or its newest quick one where there is no full one.

    Args:
        lines: the trend file, oldest first.
    """
    newest: dict[str, Line] = {}
    for line in lines:
        held = newest.get(line["benchmark"])
        # Figures that are there stay in the table when a later run fails; the failure stands beside them.
        better = line["mode"] == "full" or (held is not None and held["mode"] == "quick")
        if held is None or not held["ratios"] or (line["ratios"] and better):
            newest[line["benchmark"]] = line
    if not newest:
        return "Nothing has been measured yet: `make bench` or `make bench-full` fills this table."
    last = {line["benchmark"]: line for line in lines}
    shown = [newest[name] for name in sorted(newest)]
    rows = [row for line in shown for row in _rows(line, last[line["benchmark"]])]
    parts = ["\n".join(["| Benchmark | What | Measured | Goal | | Date | Beside it |", "| --- " * 7 + "|", *rows])]
    if any(_marks(line) for line in shown):
        parts.append(
            f"q: quick, with fewer repeats and smaller sizes; b: other processes kept more than {BUSY:g} cores busy meanwhile. "
            "Neither is a figure to quote."
        )
    parts += [f"Machine: {words}." for words in sorted({line["machine"] for line in shown})]
    parts += [f"Versions: {words}." for words in sorted({_versions(line) for line in shown if line.get("versions")})]
    return "\n\n".join(parts)


def _rows(line: Line, last: Line) -> list[str]:
    """Rows of one benchmark: its figures, and why its last run gave none."""
    rows = []
    for ratio in line["ratios"]:
        status = WORDS.get(ratio.get("status", ""), "")
        measured, detail = _measured(ratio), ratio.get("detail", "")
        rows.append(_row(line["benchmark"], ratio["name"], measured, _goal(ratio), status, _date(line), detail))
    if last.get("reason"):
        rows.append(_row(last["benchmark"], "could not be measured", "", "", "", _date(last), last["reason"]))
    return rows


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in cells) + " |"


def _date(line: Line) -> str:
    return f"{line['date']}{_marks(line)}"


def _marks(line: Line) -> str:
    marks = [*(["q"] if line["mode"] == "quick" else []), *(["b"] if line["others"] > BUSY else [])]
    return f" ({', '.join(marks)})" if marks else ""


def _measured(ratio: Line) -> str:
    if ratio["value"] is None:
        return "not finite"
    return f"{ratio['value']:.3g}" + (f" ± {ratio['noise']:.2g}" if ratio.get("noise") else "")


def _goal(ratio: Line) -> str:
    if "goal" not in ratio:
        return ""
    return f"{'≤' if ratio['better'] == 'lower' else '≥'} {ratio['goal']:g}"


def _versions(line: Line) -> str:
    return ", ".join(f"{name} {number}" for name, number in line["versions"].items())


def write(path: Path, lines: list[Line]) -> None:
    """Put the table between the markers of the page.

    Raises:
        ValueError: if the page does not hold each marker once, in this order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path.name} must hold the lines {BEGIN} and {END} once each, in this order: "
            "put them where the table belongs and run again with --table"
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{table(lines)}\n{END}{after}", encoding="utf-8")
