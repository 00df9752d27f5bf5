"""Runs hostile cases in a process of its own, with limits: `python hostile_child.py KIND FIRST COUNT FOLDER`.

Prints one JSON line for every case that broke a rule, and a last line with what was done. The rules: only Poise's own errors, no more than
2 s of CPU time a case, no more than 1 GiB beyond what the warm process holds, no process started, nothing unpickled, no network, nothing
written outside the case's folder, and no code from the case's files.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS, BYTES = 2.0, 1 << 30
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pickle.find_class",
              "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen")  # fmt: skip
_WRITES = {"os.remove": (0,), "os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
           "shutil.rmtree": (0,), "os.truncate": (0,), "os.chmod": (0,), "tempfile.mkstemp": (0,), "tempfile.mkdtemp": (0,)}  # fmt: skip


class OutOfTime(BaseException):
    """A case took longer than it may; no reader may swallow this."""


class Watch:
    """Notes what a case does that no reader of data has to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, flags = arguments
            writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                mode is None and flags & (os.O_WRONLY | os.O_RDWR)
            )
            if writing:
                self._inside(event, path)
        elif event in _WRITES:
            for place in _WRITES[event]:
                self._inside(event, arguments[place])
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if "hostile-case" in name:
                self.seen.append(f"exec {name}")

    def _inside(self, event: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else self.folder
        if not real.startswith(self.folder) and real != "/dev/null":
            self.seen.append(f"{event} outside: {real}")


def run(kind: str, first: int, count: int, folder: Path) -> None:
    """Run the cases `first` to `first + count - 1` of a kind; a case is decided by its number alone."""
    import hostile_cases

    from poise.errors import PoiseError, PoiseWarning

    warnings.simplefilter("ignore")
    warnings.simplefilter("ignore", PoiseWarning)
    maker = hostile_cases.KINDS[kind]
    place = folder / "hostile-case"
    # Lazy imports belong to the process, not to a case.
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    hostile_cases.warm(kind, place, lambda: _empty(place))
    watch = Watch(folder)
    base = _memory("VmSize:")
    resource.setrlimit(resource.RLIMIT_AS, (base + BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, _stop)
    progress = os.open(folder / "progress", os.O_RDWR | os.O_CREAT)
    outcomes: Counter[str] = Counter()
    slowest = (0.0, first)
    for number in range(first, first + count):
        os.pwrite(progress, f"{number:>20}".encode(), 0)
        _empty(place)
        problem = ""
        case = maker(random.Random(f"{kind} {number}"), place)
        began = time.process_time()
        # The signal ends Python code; the dump ends what never returns to Python.
        faulthandler.dump_traceback_later(60, exit=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        watch.on = True
        try:
            case()
            outcomes["read"] += 1
        except PoiseError as error:
            outcomes[type(error).__name__] += 1
            if not str(error).strip():
                problem = f"an empty {type(error).__name__}"
        except OutOfTime:
            problem = "longer than two seconds\n" + traceback.format_exc(limit=-8)
        except BaseException:
            problem = traceback.format_exc(limit=-8)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            watch.on = False
            faulthandler.cancel_dump_traceback_later()
        took = time.process_time() - began
        slowest = max(slowest, (took, number))
        if watch.seen:
            problem += "\nforbidden: " + "; ".join(watch.seen)
            watch.seen.clear()
        if problem:
            print(json.dumps({"kind": kind, "case": number, "problem": problem}), flush=True)
    peak = _memory("VmHWM:")
    print(json.dumps({"kind": kind, "done": count, "outcomes": outcomes, "slowest": slowest, "peak": peak}), flush=True)
    _empty(place)


def _empty(folder: Path) -> None:
    # The folder itself stays: it is where the process stands.
    for entry in folder.iterdir():
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _stop(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
