"""The trend file: what every benchmark gave in its last runs, and whether a goal that was met still is.

A line of `trend.jsonl` is one benchmark in one run. A ratio's `status` is one of

    met      the goal is reached
    missed   it is not, nor was it before
    near     it was met before and is now missed by no more than the noise
    lost     it was met before and is now missed by more than the noise

`near` and `lost` count as "met before" for the next run: a ratio that was lost stays lost until it is met again, its
goal is changed, or the loss is accepted. A goal that is changed begins anew.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Line = dict[str, Any]
KEPT = 10
"""Lines of one benchmark in one mode that the file keeps."""
RECALLED = 5
"""Earlier figures on the same machine whose spread is taken for the noise."""
GUESSED = 0.05
"""Noise as a share of the goal, where nothing says more."""


def read(path: Path) -> list[Line]:
    """The lines of the file, oldest first; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name} holds a line that is not JSON ({error.msg}); restore it from git, or delete it to begin anew"
        ) from error


def judged(line: Line, before: list[Line], accept: bool = False) -> Line:
    """Return the line with the status of each ratio that has a goal.

    Args:
        line: a benchmark's new figures, with `met` as the benchmark says it.
        before: the lines of the file.
        accept: let what is lost be missed from now on.
    """
    earlier = [one for one in before if _same(one, line)]
    return line | {"ratios": [_judge(ratio, line, earlier, accept) for ratio in line["ratios"]]}


def _same(one: Line, line: Line) -> bool:
    return (one["benchmark"], one["mode"]) == (line["benchmark"], line["mode"])


def _judge(ratio: Line, line: Line, earlier: list[Line], accept: bool) -> Line:
    if "goal" not in ratio:
        return ratio
    history = [(one, old) for one in earlier for old in one["ratios"] if old["name"] == ratio["name"]]
    if ratio["met"]:
        status = "met"
    elif accept or not history or not _was_met(history[-1][1], ratio["goal"]):
        status = "missed"
    elif (missed_by := gap(ratio)) is not None and missed_by <= noise(ratio, line, history):
        status = "near"
    else:
        status = "lost"
    return {key: value for key, value in ratio.items() if key != "met"} | {"status": status}


def _was_met(old: Line, goal: float) -> bool:
    return old.get("status") in ("met", "near", "lost") and old.get("goal") == goal


def gap(ratio: Line) -> float | None:
    """How far the figure is from its goal on the wrong side; None where there is no figure."""
    if ratio["value"] is None:
        return None
    difference: float = ratio["value"] - ratio["goal"]
    return difference if ratio["better"] == "lower" else -difference


def noise(ratio: Line, line: Line, history: list[tuple[Line, Line]]) -> float:
    """By how much the figure may be off.

    noise = max(half the interval of the median over its pairs, half the range of the last figures on this machine);
    where neither is known, a twentieth of the goal.
    """
    known = [ratio["noise"]] if ratio.get("noise") is not None else []
    values = [old["value"] for one, old in history if one["machine"] == line["machine"] and old["value"] is not None]
    if len(values := values[-RECALLED:]) > 1:
        known.append((max(values) - min(values)) / 2)
    return max(known) if known else GUESSED * abs(ratio["goal"])


def lost(line: Line) -> list[str]:
    """The names of the ratios of a judged line that were met and no longer are."""
    return [ratio["name"] for ratio in line["ratios"] if ratio.get("status") == "lost"]


def middle(lines: list[Line]) -> Line:
    """One line from repeated runs of one benchmark: of each ratio the run whose figure is the median.

    With an odd number of runs that is a figure that was measured, and it is met if most runs met it.
    """
    chosen = []
    for ratio in lines[0]["ratios"]:
        again = [r for line in lines for r in line["ratios"] if r["name"] == ratio["name"] and r["value"] is not None]
        if not again:
            chosen.append(ratio)
            continue
        median = statistics.median_low(r["value"] for r in again)
        one = next(r for r in again if r["value"] == median)
        spread = (max(r["value"] for r in again) - min(r["value"] for r in again)) / 2
        chosen.append(one | {"noise": float(f"{max(one.get('noise', 0.0), spread):.3g}")})
    return lines[-1] | {"ratios": chosen, "runs": len(lines), "others": max(line["others"] for line in lines)}


def write(path: Path, lines: list[Line]) -> None:
    """Write the file anew with the last lines of each benchmark; only the newest with figures keep details and versions."""
    groups: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["benchmark"], line["mode"]].append(line)
    slim: list[Line] = []
    for key in sorted(groups):
        held = groups[key][-KEPT:]
        newest = max((place for place, line in enumerate(held) if line["ratios"]), default=0)
        slim += [_slim(line) if place < newest else line for place, line in enumerate(held)]
    # Through a second file, so that a run that is stopped here leaves the old one whole.
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in slim), encoding="utf-8")
    os.replace(beside, path)


def _slim(line: Line) -> Line:
    ratios = [{key: value for key, value in ratio.items() if key != "detail"} for ratio in line["ratios"]]
    return {key: value for key, value in line.items() if key != "versions"} | {"ratios": ratios}
