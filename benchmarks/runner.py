"""Runs benchmarks, each in a process of its own with a time limit, and says what the machine did beside them."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
BUSY = 0.25
"""Cores that other processes keep busy, from which on a row is marked."""
TAIL = 30
"""Lines of a failed benchmark's own output that the terminal shows."""


@dataclass(frozen=True)
class Outcome:
    """What one benchmark gave.

    Args:
        name: the NAME of its `bench_NAME.py`.
        ratios: its figures, as `benchmarks.child.row` writes them.
        seconds: wall time.
        others: cores that other processes kept busy meanwhile, on average.
        reason: why there are no figures; empty where there are.
    """

    name: str
    ratios: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    others: float = 0.0
    reason: str = ""

    @property
    def busy(self) -> bool:
        """Whether other processes had more of the machine than a timing should share."""
        return self.others > BUSY


def names(folder: Path = HERE) -> list[str]:
    """The benchmarks that exist, by the NAME of their `bench_NAME.py`."""
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def run(name: str, quick: bool, limit: float, folder: Path = HERE) -> Outcome:
    """Run one benchmark; what goes wrong in it becomes the outcome's reason, whatever it is.

    Args:
        name: the NAME of its `bench_NAME.py`.
        quick: fewer repeats and smaller sizes.
        limit: seconds after which it is ended, with every process that it started.
        folder: where its file lies.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "benchmarks.child", str(folder), name, str(result), *(["--quick"] * quick)]
        began, busy, own = time.perf_counter(), _busy_seconds(), _own_seconds()
        with (Path(scratch) / "output").open("w+", encoding="utf-8", errors="replace") as output:
            # A session of its own, so that the limit ends its workers too.
            process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=output, stderr=output)
            try:
                status = process.wait(limit)
                reason = "" if status == 0 else f"ended with exit status {status}"
            except subprocess.TimeoutExpired:
                reason = f"took more than {limit:g} s"
            finally:
                _end(process)
            if reason:
                # What a benchmark says by the way matters only when it fails.
                output.seek(0)
                print(*output.readlines()[-TAIL:], sep="", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - began
        others = max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / seconds
        written: dict[str, Any] = {}
        if result.exists():
            with contextlib.suppress(json.JSONDecodeError):
                written = json.loads(result.read_text(encoding="utf-8"))
    ratios = _distinct(written.get("ratios", []))
    if not reason and not ratios:
        reason = "gave no figure"
    return Outcome(name, ratios, round(seconds, 1), round(others, 2), without_paths(written.get("reason", reason)))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process with its whole session: workers that outlive their parent would slow what is measured next."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _distinct(ratios: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number the names that stand twice, because a figure is found again by its name."""
    seen: dict[str, int] = {}
    for ratio in ratios:
        seen[ratio["name"]] = seen.get(ratio["name"], 0) + 1
        if seen[ratio["name"]] > 1:
            ratio["name"] += f" ({seen[ratio['name']]})"
    return ratios


def _busy_seconds() -> float:
    """Seconds of work that all cores did since the machine started."""
    import psutil

    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own_seconds() -> float:
    """Seconds of work of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def without_paths(text: str) -> str:
    """Leave the folders out of a sentence: they say where somebody's files lie, not what went wrong."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+", "", text)


def machine() -> str:
    """Say what the machine is, without its name: cores, processor, memory, system."""
    import psutil

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1].strip() if found else model
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores, {model}, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python, of Poise and of what `pyproject.toml` names for use and for comparison, where installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = ["poise", *project["dependencies"], *extras["data"], *extras["lm"], *extras["peers"]]
    found = {"python": platform.python_version()}
    for requirement in wanted:
        name = re.split(r"[\[<>=~! ;]", requirement, maxsplit=1)[0]
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
