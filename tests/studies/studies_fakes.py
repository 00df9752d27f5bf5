"""Executors for worker processes and a task that needs no data: what a study is tested with, training aside."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from poise.studies.engine import RunEvent
from poise.studies.spec import DataSpec, RunRecord, RunSpec, failed_record

# What a term adds to the accuracy, so that a study has something to find.
GAINS = {"cross_entropy": 0.7, "early_learning": 0.1, "l2": 0.0}


def noise(*parts: object) -> float:
    """A number in -0.01..0.01 that depends on nothing but the parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return (int.from_bytes(digest[:4], "big") / 2**32 - 0.5) / 50


def make_spec(formula: str = "cross_entropy", seed: int = 0, **changes: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "data": DataSpec("digits", fingerprint="f" * 64),
        "model": "mlp",
        "lr": 0.02,
        "batch_size": 128,
        "epochs": 90,
    }
    return RunSpec(formula=formula, seed=seed, **{**settings, **changes})


def make_record(spec: RunSpec, accuracy: float | None = None, *, points: int = 20) -> RunRecord:
    gain = sum(value for name, value in GAINS.items() if name in spec.formula)
    accuracy = gain + noise(spec.formula, spec.seed) if accuracy is None else accuracy
    steps = list(range(points))
    metrics = {"valid/accuracy": accuracy - 0.01, "valid/nll": 1 - accuracy}
    if spec.measure == "test":
        metrics |= {"test/accuracy": accuracy, "test/nll": 1 - accuracy}
    return RunRecord(
        spec.id,
        spec,
        "done",
        metrics=metrics,
        curves={
            "loss": (steps, [1 / (1 + step) + noise(spec.seed, step) for step in steps]),
            "valid/accuracy": (steps[::5], [accuracy * step / points for step in steps[::5]]),
        },
        sizes={"train": 600, "valid": 200, "test": 200},
        seconds=2.0,
        peak_memory_bytes=10**8,
        steps=900,
        versions={"python": "3", "torch": "2", "poise": "0"},
        machine={"platform": "test"},
        started="2026-01-01T00:00:00+00:00",
    )


def instant(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    if report is not None:
        report(0.5)
    return make_record(spec)


def logged(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    """Write one line a run, so that a test sees how often each was started."""
    assert folder is not None
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent.parent / "started.log", "a") as file:
        file.write(spec.id + "\n")
    return make_record(spec)


def slow(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    for part in range(100):
        time.sleep(0.05)
        if report is not None:
            report(part / 100)
    return make_record(spec)


def slow_on_seed_one(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    """Leave a note before and after, so that an interrupted run is seen."""
    if spec.seed == 1:
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "begun").touch()
        return slow(spec, folder=folder, report=report)
    return logged(spec, folder=folder)


def slow_on_seed_zero(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    return slow(spec, report=report) if spec.seed == 0 else make_record(spec)


def deaf(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    """Hang in a call that does not listen to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return slow(spec, report=report)


def killed_once(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    """Die in the middle of the first attempt at seed 1, as a process does when the machine runs out of memory."""
    assert folder is not None
    if spec.seed == 1 and not folder.exists():
        folder.mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return make_record(spec)


def killed_always(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    if spec.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_record(spec)


def raising(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    if spec.seed == 1:
        raise RuntimeError("something unforeseen")
    return make_record(spec)


def failing(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    if spec.seed == 1 and "l2" in spec.formula:
        return failed_record(spec, "The term 'l2' became infinite at step 3.", "Traceback ...")
    return make_record(spec)


def chatty(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    print("the user's model prints this")
    os.write(1, b"and this, past Python\n")
    return make_record(spec)


def environment(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    record = make_record(spec)
    record.machine = {"threads": os.environ["OMP_NUM_THREADS"], "main": str(int("torch" in __import__("sys").modules))}
    return record


class SerialEngine:
    """The engine contract in this process: the least that a cluster engine has to offer."""

    slots = 1

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._queue: list[RunSpec] = []
        self._cancelled: list[str] = []

    def submit(self, specs: Any) -> None:
        self._queue.extend(specs)

    def events(self) -> Any:
        while self._queue or self._cancelled:
            if self._cancelled:
                yield RunEvent(self._cancelled.pop(0), "cancelled")
                continue
            spec = self._queue.pop(0)
            yield RunEvent(spec.id, "finished", 1.0, self._executor(spec))

    def cancel(self, ids: Any = None) -> None:
        self._cancelled += [spec.id for spec in self._queue if ids is None or spec.id in ids]
        self._queue = [spec for spec in self._queue if ids is not None and spec.id not in ids]

    def close(self) -> None:
        self._queue.clear()

    def __enter__(self) -> SerialEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def task(**changes: Any) -> Any:
    """A task without data: what a study asks beside them is answered as the real one does."""
    from poise.tasks.task import Task  # loads PyTorch, which the workers of a test do not need

    class FakeTask(SimpleNamespace):
        usual_batch, usual_epochs, usual_solver = Task.usual_batch, Task.usual_epochs, Task.usual_solver
        usual_threads = Task.usual_threads
        metric_names, choose_model, model_code = Task.metric_names, Task.choose_model, Task.model_code

    values = {
        "name": "digits",
        "source": "digits",
        "target_type": "classification",
        "classes": tuple("0123456789"),
        "input_shape": (64,),
        "examples": 1000,
        "fingerprint": "f" * 64,
        "notes": ["Built-in."],
        "warnings": [],
        "primary": "accuracy",
        "direction": "max",
    }
    return FakeTask(**{**values, **changes})


def slow_on_seed_one_once(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    """Leave a checkpoint behind, as a run does that was stopped before."""
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").touch()
    return logged(spec, folder=folder)


def fails_at_large_rates(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    return failed_record(spec, "The loss became infinite.") if spec.lr > 0.02 else make_record(spec)


def fails_with_l2(spec: RunSpec, *, folder: Path | None = None, report: Any = None) -> RunRecord:
    return failed_record(spec, "l2 is broken.") if "l2" in spec.formula else make_record(spec)
