"""Starts the child that runs hostile cases, and says what it found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class Outcome:
    """What the cases of a kind came to."""

    done: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    peak: int = 0


def run_cases(kind: str, first: int, count: int, folder: Path, *, seconds: float = 280.0, most: int = 20) -> Outcome:
    """Run cases in a child; one that ends the child is named and passed over."""
    found = Outcome()
    at, end = first, first + count
    while at < end and len(found.problems) < most:
        lines, code, message = _child(kind, at, end - at, folder, seconds)
        for line in lines:
            if "problem" in line:
                found.problems.append(f"{line['kind']} {line['case']}: {line['problem']}")
            else:
                found.done += line["done"]
                found.peak = max(found.peak, line["peak"])
                for name, number in line["outcomes"].items():
                    found.outcomes[name] = found.outcomes.get(name, 0) + number
        if code == 0:
            break
        progress = folder / "progress"
        reached = int(progress.read_text() or at) if progress.exists() else end
        found.problems.append(f"{kind} {reached}: the process ended with {code}\n{message[-3000:]}")
        at = reached + 1
    return found


def _child(kind: str, first: int, count: int, folder: Path, seconds: float) -> tuple[list[dict[str, Any]], int, str]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT / "src"), str(ROOT / "tests" / "report")]),
        "PYTHONFAULTHANDLER": "1",
        # The limit of the address space would count what allocators reserve and never touch.
        "MALLOC_ARENA_MAX": "2",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "POISE_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, str(HERE / "hostile_child.py"), kind, str(first), str(count), str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=folder, check=False
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return _lines(text), -1, f"no end after {seconds:.0f} s"
    return _lines(done.stdout), done.returncode, done.stderr


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"kind"')]


def kinds_of(problems: list[str]) -> dict[str, list[str]]:
    """Put problems that end alike together: by the last line of each and the last place in Poise that it names."""
    found: dict[str, list[str]] = {}
    for problem in problems:
        lines = problem.strip().splitlines()
        place = [line.strip() for line in lines if "src/poise" in line][-1:]
        key = re.sub(r"\d+", "#", " | ".join([*place, lines[-1][:150]]))
        found.setdefault(key, []).append(problem)
    return found


if __name__ == "__main__":
    # By hand: python hostile_runner.py KIND FIRST COUNT
    with tempfile.TemporaryDirectory() as scratch:
        result = run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(scratch), seconds=3600, most=10_000)
    for key, alike in sorted(kinds_of(result.problems).items(), key=lambda item: -len(item[1])):
        print(f"{len(alike)} x {key}\n    {alike[0][:80]!r}")
        if len(sys.argv) > 4:
            print(alike[0])
    print(sys.argv[1], result.done, result.outcomes, f"{result.peak / 2**20:.0f} MiB")
