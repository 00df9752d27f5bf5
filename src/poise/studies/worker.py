"""A worker process: takes runs from its standard input, one after another, and answers on its standard output.

Each message is one line of JSON. The engine starts a Python process that calls `main` and first sends a greeting

    {"executor": "poise.studies.execute:execute", "threads": 1, "folder": "..." or null}

then any number of `{"run": {...}}`. The worker answers `{"ready": true}` and, for each run, lines
`{"progress": id, "fraction": 0.4}` and one `{"record": {...}}`. It ends when its input closes, also in the middle of
a run: an engine that was killed leaves no worker behind. An interrupt (SIGINT) stops the run but not the worker,
which then answers `{"cancelled": id}`.

A plain process instead of `multiprocessing`: nothing of the caller's main module is imported again, so a study runs
from a notebook, a script without a main guard, or the command line alike.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from poise.studies.spec import RunRecord, RunSpec, failed_record

# A run reports its progress at most this often.
_SECONDS_BETWEEN_REPORTS = 0.2


class Executor(Protocol):
    """What a worker calls: run one specification and return its record."""

    def __call__(
        self, spec: RunSpec, *, folder: Path | None = None, report: Callable[[float], None] | None = None
    ) -> RunRecord: ...


def load_executor(reference: str) -> Executor:
    """Return the function named by `module:function`.

    >>> load_executor("poise.studies.spec:failed_record").__name__
    'failed_record'
    """
    module, _, name = reference.partition(":")
    executor: Executor = getattr(importlib.import_module(module), name)
    return executor


def main() -> None:
    """Serve runs until the input closes."""
    faulthandler.enable()
    # Standard output belongs to the protocol; whatever the user's model prints goes to standard error.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _Worker(channel, sys.stdin).serve()


class _Worker:
    def __init__(self, channel: IO[str], commands: IO[str]) -> None:
        self._channel = channel
        self._commands = commands
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._running = False

    def serve(self) -> None:
        # Until a run begins there is nothing to interrupt.
        signal.signal(signal.SIGINT, self._interrupt)
        greeting = json.loads(self._commands.readline() or "{}")
        if not greeting:
            return
        threading.Thread(target=self._listen, daemon=True).start()
        executor = load_executor(greeting["executor"])
        _set_threads(int(greeting["threads"]))
        folder = Path(greeting["folder"]) if greeting["folder"] else None
        self._send({"ready": True})
        while True:
            command = self._inbox.get()
            spec = RunSpec.from_dict(command["run"])
            self._send(self._run(executor, spec, folder))

    def _run(self, executor: Executor, spec: RunSpec, folder: Path | None) -> dict[str, Any]:
        began = time.monotonic()
        try:
            self._running = True
            record = executor(spec, folder=folder / spec.id if folder else None, report=self._reporter(spec.id))
            self._running = False
        except KeyboardInterrupt:
            return {"cancelled": spec.id}
        except Exception as error:
            # `execute` turns what can go wrong in a run into a record; this is for what it did not foresee.
            record = failed_record(
                spec,
                f"The run stopped with {type(error).__name__}: {error}",
                traceback.format_exc(),
                seconds=time.monotonic() - began,
            )
        finally:
            self._running = False
        return {"record": record.to_dict()}

    def _reporter(self, run: str) -> Callable[[float], None]:
        last = 0.0

        def report(fraction: float) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_REPORTS:
                last = now
                self._send({"progress": run, "fraction": fraction})

        return report

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._running:
            self._running = False
            raise KeyboardInterrupt

    def _listen(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in self._commands:
                self._inbox.put(json.loads(line))
        # The engine is gone or has closed us: nobody waits for the run any more.
        os._exit(0)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.write(json.dumps(message) + "\n")
            self._channel.flush()
        except BrokenPipeError:
            os._exit(0)


def _set_threads(threads: int) -> None:
    # The environment was set before this process began; PyTorch keeps a count of its own.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
