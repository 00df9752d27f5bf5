"""Who runs the runs: the `Engine` contract, and `LocalEngine`, worker processes on this machine.

An engine takes specifications and yields what happens to them. It knows nothing of studies, formulas or statistics;
it never touches the store, so the one process that consumes its events decides what is kept. A cluster engine
implements the same five methods.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, runtime_checkable

from poise.errors import InputError, PoiseError
from poise.studies.spec import RunRecord, RunSpec, failed_record

EXECUTOR = "poise.studies.execute:execute"
# The worker finds Poise, and the user's own modules, exactly where this process finds them.
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from poise.studies.worker import main; main()"
# How many threads each numerical library starts is read once, when it is loaded.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to one run.

    Attributes:
        id: the run.
        kind: `started`, `progress`, `retried` (its worker was killed; it starts again), `cancelled`, or `finished`,
            which carries the record (status `done` or `failed`) and is the last event of a run.
        fraction: share of the budget that is done, 0..1.
        record: the outcome, for `finished`.
        message: words for people, for `retried`.
    """

    id: str
    kind: Literal["started", "progress", "retried", "cancelled", "finished"]
    fraction: float = 0.0
    record: RunRecord | None = None
    message: str = ""


@runtime_checkable
class Engine(Protocol):
    """Runs specifications somewhere and yields what happens to them.

    An engine is a context manager; leaving it stops everything that still runs.
    """

    @property
    def slots(self) -> int:
        """How many runs go on at the same time."""
        ...

    def submit(self, specs: Sequence[RunSpec]) -> None:
        """Queue runs; each id at most once at a time. May be called while `events` is being consumed."""
        ...

    def events(self) -> Iterator[RunEvent]:
        """Yield events until nothing is queued or running. Every submitted run ends with `finished` or `cancelled`."""
        ...

    def cancel(self, ids: Collection[str] | None = None) -> None:
        """Stop these runs, or all; what a run had checkpointed stays and is used when it is submitted again."""
        ...

    def close(self) -> None:
        """Stop everything and release processes and connections. Calling it twice is harmless."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def available_cores() -> int:
    """Return how many cores this process may use: affinity and container limits respected, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return max(1, cores)


class LocalEngine:
    """Worker processes on this machine; each loads PyTorch once and then runs one specification after another.

    Args:
        workers: number of processes; None for as many as the cores allow (`cores // threads`), and one where the runs
            use a GPU.
        threads: threads of each process. It belongs to the identity of a run, so it must equal `RunSpec.threads`.
        folder: where interrupted runs keep their checkpoints; None for no checkpoints.
        executor: `module:function` that a worker calls; see `worker.Executor`.
        retries: how often a run is started again after its worker was killed.
        grace: seconds that an interrupted run gets to write its checkpoint.

    Raises:
        InputError: `workers` or `threads` is below 1.

    >>> with LocalEngine(workers=2) as engine:          # doctest: +SKIP
    ...     engine.submit(specs)
    ...     records = [event.record for event in engine.events() if event.record]
    """

    def __init__(
        self,
        workers: int | None = None,
        threads: int = 1,
        *,
        folder: str | os.PathLike[str] | None = None,
        executor: str = EXECUTOR,
        retries: int = 1,
        grace: float = 10.0,
    ) -> None:
        if threads < 1 or (workers is not None and workers < 1):
            raise InputError(f"workers and threads must be at least 1, not workers={workers}, threads={threads}.")
        self.threads = threads
        self.folder = Path(folder) if folder is not None else None
        self._slots = workers if workers is not None else max(1, available_cores() // threads)
        self._executor = executor
        self._retries = retries
        self._grace = grace
        self._queue: deque[RunSpec] = deque()
        self._workers: list[_Process] = []
        self._inbox: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]] = queue.SimpleQueue()
        self._attempts: dict[str, int] = {}
        self._cancelled: deque[str] = deque()
        self._failed_starts = 0

    @property
    def slots(self) -> int:
        """How many runs go on at the same time."""
        return self._slots

    def start(self, workers: int | None = None) -> None:
        """Start processes ahead of the first run, so that they load PyTorch while the caller prepares the data."""
        while len(self._workers) < min(self._slots, workers or self._slots):
            self._workers.append(
                _Process(self._executor, self.threads, str(self.folder) if self.folder else None, self._inbox)
            )

    def submit(self, specs: Sequence[RunSpec]) -> None:
        """Queue runs in the order given.

        Raises:
            InputError: a run asks for another number of threads than this engine's workers have.
        """
        for spec in specs:
            if spec.threads != self.threads:
                raise InputError(
                    f"Run {spec.id} asks for {spec.threads} threads, and the workers of this engine have "
                    f"{self.threads}."
                )
        self._queue.extend(specs)

    def events(self) -> Iterator[RunEvent]:
        """Yield events until nothing is queued or running.

        Raises:
            PoiseError: workers cannot be started (the message carries the end of what they printed).
        """
        while True:
            while self._cancelled:
                yield RunEvent(self._cancelled.popleft(), "cancelled")
            yield from self._hand_out()
            if not self._queue and not any(worker.spec for worker in self._workers):
                if self._cancelled:
                    continue
                return
            try:
                # The timeout keeps Ctrl-C responsive where waiting cannot be interrupted (Windows).
                worker, message = self._inbox.get(timeout=1.0)
            except queue.Empty:
                continue
            finally:
                self._end_overdue()
            if worker in self._workers:
                yield from self._ended(worker) if message is None else self._answered(worker, message)

    def cancel(self, ids: Collection[str] | None = None) -> None:
        """Drop queued runs and interrupt running ones; `events` then yields `cancelled` for each."""
        dropped = [spec.id for spec in self._queue if ids is None or spec.id in ids]
        self._queue = deque(spec for spec in self._queue if not (ids is None or spec.id in ids))
        self._cancelled.extend(dropped)
        for worker in self._workers:
            if worker.spec is not None and (ids is None or worker.spec.id in ids):
                worker.deadline = time.monotonic() + self._grace
                worker.interrupt()

    def close(self) -> None:
        """Interrupt what runs, give it `grace` seconds for its checkpoint, and end all processes."""
        self._queue.clear()
        workers, self._workers = self._workers, []
        # Who was interrupted before has had its chance.
        running = [worker for worker in workers if worker.spec is not None and worker.deadline is None]
        try:
            for worker in running:
                worker.interrupt()
            self._await_cancelled(running)
        finally:
            # A second Ctrl-C during the grace period lands here and ends the processes at once.
            for worker in workers:
                worker.release()

    def _await_cancelled(self, workers: list[_Process]) -> None:
        deadline = time.monotonic() + self._grace
        waiting = list(workers)
        while waiting and time.monotonic() < deadline:
            try:
                worker, message = self._inbox.get(timeout=0.1)
            except queue.Empty:
                continue
            if worker in waiting and (message is None or "record" in message or "cancelled" in message):
                waiting.remove(worker)

    def _end_overdue(self) -> None:
        """End workers that did not react to an interrupt; their listeners then report the end."""
        for worker in self._workers:
            if worker.deadline is not None and time.monotonic() > worker.deadline:
                worker.end()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hand_out(self) -> Iterator[RunEvent]:
        busy = sum(worker.spec is not None for worker in self._workers)
        self.start(min(self._slots, busy + len(self._queue)))
        for worker in self._workers:
            if worker.spec is None and worker.ready and self._queue:
                spec = self._queue.popleft()
                worker.run(spec)
                yield RunEvent(spec.id, "started")

    def _answered(self, worker: _Process, message: dict[str, Any]) -> Iterator[RunEvent]:
        if "ready" in message:
            worker.ready = True
            self._failed_starts = 0
        elif "progress" in message:
            yield RunEvent(message["progress"], "progress", fraction=message["fraction"])
        elif "cancelled" in message:
            spec, worker.spec, worker.deadline = worker.spec, None, None
            if spec is not None:
                yield RunEvent(spec.id, "cancelled")
        elif "record" in message:
            worker.spec, worker.deadline = None, None
            record = RunRecord.from_dict(message["record"])
            record.attempts = self._attempts.pop(record.id, 0) + 1
            yield RunEvent(record.id, "finished", fraction=1.0, record=record)

    def _ended(self, worker: _Process) -> Iterator[RunEvent]:
        self._workers.remove(worker)
        how, printed = worker.obituary()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts > 2:
                raise PoiseError(f"Worker processes cannot be started: each {how}. The last one printed:\n{printed}")
        spec = worker.spec
        if spec is None:
            return
        if worker.deadline is not None:
            yield RunEvent(spec.id, "cancelled")
            return
        attempts = self._attempts.get(spec.id, 0) + 1
        self._attempts[spec.id] = attempts
        if attempts <= self._retries:
            # A killed process is often the machine's doing (memory, a restart), so the run gets another chance.
            self._queue.appendleft(spec)
            yield RunEvent(spec.id, "retried", message=f"The worker process {how}; the run starts again.")
            return
        del self._attempts[spec.id]
        times = "twice" if attempts == 2 else f"{attempts} times" if attempts > 2 else "once"
        error = f"The worker process of this run {how} ({times})."
        yield RunEvent(spec.id, "finished", record=failed_record(spec, error, printed, attempts=attempts))


class _Process:
    """One worker process, seen from the engine."""

    def __init__(
        self,
        executor: str,
        threads: int,
        folder: str | None,
        inbox: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]],
    ) -> None:
        self.spec: RunSpec | None = None
        self.ready = False
        # When an interrupted run has to have ended; None while nothing was interrupted.
        self.deadline: float | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), "PYTHONUNBUFFERED": "1"}
        # A session of its own: Ctrl-C in the terminal reaches the engine only, which then stops its workers in order.
        apart: dict[str, Any] = (
            {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            text=True,
            encoding="utf-8",
            bufsize=1,
            **apart,
        )
        self._send({"executor": executor, "threads": threads, "folder": folder})
        threading.Thread(target=self._listen, args=(inbox,), daemon=True).start()

    def run(self, spec: RunSpec) -> None:
        self.spec = spec
        self._send({"run": spec.to_dict()})

    def interrupt(self) -> None:
        if sys.platform == "win32":
            self._process.terminate()
        else:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """End the process at once, and the processes that it started."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                # The worker leads a session of its own, see above.
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def release(self) -> None:
        """End the process and close its streams."""
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def obituary(self) -> tuple[str, str]:
        """Return how the process ended, in words, and the end of what it printed."""
        code = self._process.wait()
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4000))
        printed = self._errors.read().decode(errors="replace")
        self.release()
        if code >= 0:
            return f"ended with exit code {code}", printed
        name = signal.Signals(-code).name if -code in {int(number) for number in signal.Signals} else str(-code)
        memory = ", which usually means that memory ran out" if name == "SIGKILL" else ""
        return f"was killed by {name}{memory}", printed

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # A dead worker is noticed by its listener, which knows more than a broken pipe.
        with contextlib.suppress(BrokenPipeError, OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _listen(self, inbox: queue.SimpleQueue[tuple[_Process, dict[str, Any] | None]]) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                inbox.put((self, json.loads(line)))
        except ValueError:
            # Half a line from a process killed while it wrote, or a pipe closed under us: the process has ended.
            pass
        inbox.put((self, None))
