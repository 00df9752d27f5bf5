"""A library in a process of its own: neither its time, its memory, its threads nor its end touch the run.

`TrackerProcess` lives in the run and hands lines of JSON to a thread that writes them into a pipe. At the other end `main` reads

    {"begin": {...}}    {"log": [{"loss": 0.5}, 10]}    {"end": {...}}

and calls the library. For each run it answers one line, `{"told": true}` or `{"failed": "..."}`, and it ends when its input does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from poise.trackers.contract import Scalar, TrackedRun, Tracker

# The process finds Poise and the library where this one does.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from poise.trackers.process import main; main()"
PATIENCE = 60.0
"""Seconds without an answer, once the run is over, after which a tracker is given up."""
_FAILURES = 3
"""Runs in a row that could not be told, after which a tracker is not tried again."""


class TrackerProcess:
    """One library, seen from the run; the process starts with the first run.

    Args:
        library: `tensorboard`, `mlflow` or `wandb`.
        place: folder, address or project.
    """

    def __init__(self, library: str, place: str) -> None:
        self.name, self.failure = library, ""
        self._place = place
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._answered = 0.0

    def begin(self, run: TrackedRun) -> None:
        if self._process is None:
            self._start()
        self._send({"begin": run.to_dict()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._send({"log": [values, step]})

    def end(self, verdict: Mapping[str, Scalar]) -> None:
        self._send({"end": verdict})

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._lines.put(None)
        self._answered = time.monotonic()
        try:
            code = self._wait(process)
            if code and not self.failure:
                self.failure = f"Its process ended with {code}."
        finally:
            # Also after a second Ctrl-C: nothing is left behind.
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(1.0)

    def _wait(self, process: subprocess.Popen[str]) -> int | None:
        """Wait for the end for as long as answers come; a study that is sent late may take minutes."""
        while time.monotonic() - self._answered < PATIENCE:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(1.0)
        self.failure = self.failure or f"It gave no answer for {PATIENCE:.0f} s."
        return None

    def _start(self) -> None:
        # One thread for what NumPy brings along; a session of its own, so that Ctrl-C reaches the run alone.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([part if part else os.getcwd() for part in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        self._lines = queue.SimpleQueue()
        self._send({"open": [self.name, self._place]})
        self._threads = [
            threading.Thread(target=target, args=(process,), daemon=True) for target in (self._write, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, message: dict[str, Any]) -> None:
        # Made into text here, because the run may change what it handed over; written elsewhere, because a full pipe waits.
        self._lines.put(json.dumps(message))

    def _write(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        # A dead process is noticed when its exit code is read, which says more than a broken pipe.
        with contextlib.suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in process.stdout:
                self._answered = time.monotonic()
                self.failure = self.failure or str(json.loads(line).get("failed", ""))
            process.stdout.close()


def main() -> None:
    """Serve one run after another until the input closes."""
    # Standard output belongs to the protocol; whatever the library prints goes where standard error goes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin, answers)


def serve(messages: Any, answers: Any) -> None:
    """Read messages and call the library; a run whose library fails is left out from there on."""
    tracker: Tracker | None = None
    library, place, failures, telling = "", "", 0, False

    def answer(message: dict[str, Any]) -> None:
        # The run's process may be gone, and then nobody waits for answers.
        with contextlib.suppress(OSError):
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    def call(method: str, *arguments: Any) -> bool:
        nonlocal failures
        try:
            getattr(tracker, method)(*arguments)
        except Exception as error:
            failures += 1
            answer({"failed": f"{type(error).__name__}: {error}"})
            return False
        return True

    for line in messages:
        ((kind, content),) = json.loads(line).items()
        if kind == "open":
            library, place = content
        elif kind == "begin" and failures < _FAILURES:
            if tracker is None:
                tracker = _Opened(library, place)
            telling = call("begin", TrackedRun(**content))
        elif kind == "log" and telling:
            telling = call("log", *content)
        elif kind == "end" and telling:
            telling = False
            if call("end", content):
                failures = 0
                answer({"told": True})
    if telling:
        # The run's process was killed, and nobody said how it ended.
        call("end", {"status": "stopped", "reason": "The process of the run ended."})


class _Opened:
    """The library's tracker, opened when the first run begins, so that what fails there is caught like everything else."""

    def __init__(self, library: str, place: str) -> None:
        self._library, self._place = library, place
        self._tracker: Tracker | None = None

    def __getattr__(self, name: str) -> Any:
        if self._tracker is None:
            module = importlib.import_module(f"poise.trackers.{self._library}")
            self._tracker = module.Adapter(self._place)
        return getattr(self._tracker, name)
