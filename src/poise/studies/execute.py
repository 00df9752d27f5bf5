"""`execute`: one run from its specification to its record.

Load the task, draw the split of the seed, start the model, train with `poise.fit`, and measure once at the end. Whatever
goes wrong becomes a failed record with one sentence for people and the full traceback for whoever repairs it.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import platform
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from poise._version import __version__
from poise.coefficient import Coefficient
from poise.errors import CheckpointError, InputError, NonFiniteError, PoiseError, PoiseWarning
from poise.formula import parse, parse_weight
from poise.problem import Solver
from poise.solvers.torch_optimizers import as_solver
from poise.studies.spec import DataSpec, RunRecord, RunSpec, failed_record
from poise.training import FitState, Run, fit
from poise.weights.feasibility import judge_constraints, watch

if TYPE_CHECKING:
    from poise.tasks.contract import AnySplit, AnyTask
    from poise.trackers.fitting import FitTracker

CHECKPOINT_SECONDS = 30.0
# Short names for what people ask for most; any schedule of the formula language works as well.
SCHEDULES = {"constant": "", "cosine": "cosine(1, 0)", "linear": "linear(1, 0)"}


def execute(spec: RunSpec, *, folder: Path | None = None, report: Callable[[float], None] | None = None) -> RunRecord:
    """Train and measure one run.

    Args:
        spec: the run.
        folder: where it keeps its checkpoints; a run that was interrupted goes on from there. None for none.
        report: called with the share of the budget that is done, 0..1.

    Returns:
        The record; `failed` with one sentence where memory ran out, a value became infinite or anything else went wrong.

    Raises:
        KeyboardInterrupt: after the run has saved its checkpoint.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        with _threads(spec.threads):
            record = _run(spec, folder, report)
    except Exception as error:
        record = failed_record(spec, explain(error, spec), traceback.format_exc())
    gc.collect()  # models and optimisers hang in circles, and the next run needs their memory
    record.started = started
    record.versions = {"poise": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    record.machine = {"platform": platform.platform(), "processor": _processor(), "device": _device_name(spec.device)}
    return record


def rehearse(spec: RunSpec) -> None:
    """Make one training step and measure a few rows, to find before hours of work what cannot work at all.

    Raises:
        PoiseError: formula, model, data and solver do not fit together.
    """
    with contextlib.suppress(NonFiniteError), _threads(spec.threads):
        task, split = _data(spec.data, spec.seed)
        train(replace(spec, epochs=None, steps=1), task, split.few(max(64, spec.batch_size)))
    gc.collect()


def explain(error: Exception, spec: RunSpec) -> str:
    """Return one sentence for people about what stopped a run."""
    if _is_memory(error):
        return (
            f"Out of memory on {_device_name(spec.device)}. Use a smaller batch_size (it is {spec.batch_size}), a smaller "
            "model, or fewer workers."
        )
    if isinstance(error, PoiseError):
        return " ".join(str(error).split())
    return f"The run stopped with {type(error).__name__}: {error}"


def make_solver(spec: RunSpec) -> Solver:
    """Return the solver of a run.

    Raises:
        InputError: the name or an option is not known.
    """
    solver: Solver = as_solver(spec.solver, lr=spec.lr, **spec.solver_options)
    return solver


def make_schedule(text: str | None) -> Coefficient | None:
    """Return the learning rate's factor over the run: `cosine`, `linear`, `constant`, or a schedule as in a formula.

    Raises:
        InputError: the text is no schedule.

    >>> str(make_schedule("cosine"))
    'cosine(1, 0)'
    """
    written = SCHEDULES.get(text or "constant", text)
    if not written:
        return None
    try:
        weight = parse_weight(written)
    except (PoiseError, ValueError) as error:
        raise InputError(
            f"{text!r} is no learning-rate schedule. Use {', '.join(SCHEDULES)}, or one as in a formula, such as "
            f"'linear(1, 0.1)'. ({error})"
        ) from error
    if not isinstance(weight, Coefficient):
        raise InputError(f"{text!r} is no learning-rate schedule but a number; multiply the learning rate instead.")
    return weight


def _run(spec: RunSpec, folder: Path | None, report: Callable[[float], None] | None) -> RunRecord:
    task, split = _data(spec.data, spec.seed)
    with _peak_memory(spec.device) as peak:
        run = train(spec, task, split, folder=folder, report=report)
        metrics = _measure(run, split, "valid")
        details: dict[str, Any] = {}
        if spec.measure == "test":
            metrics |= _measure(run, split, "test")
            details = split.details(run)
    if run.weights:
        details = {**details, "weights": run.weights}
    curves = {**run.history.curves(), **details.pop("curves", {})}
    return RunRecord(
        spec.id,
        spec,
        "done",
        metrics=metrics,
        curves={name: (list(steps), list(values)) for name, (steps, values) in curves.items()},
        details=details,
        sizes=split.sizes,
        warnings=[
            *split.warnings,
            *(w for found in judge_constraints(run.objective, run.history) if (w := found.warning)),
        ],
        seconds=run.seconds,
        peak_memory_bytes=peak() or run.peak_memory,
        steps=run.steps,
    )


def train(
    spec: RunSpec,
    task: AnyTask,
    split: AnySplit,
    *,
    folder: Path | None = None,
    report: Callable[[float], None] | None = None,
    tracker: FitTracker | None = None,
) -> Run:
    """Train a specification on data that are loaded and split already; arguments as `execute`, and a tracker of the run."""

    def show(state: FitState) -> None:
        if tracker is not None:
            tracker(state)
        if report is not None:
            report(state.step / max(1, state.steps))

    def attempt() -> Run:
        objective = parse(spec.formula)
        return fit(
            objective=objective,
            **task.arguments(split, spec.model, spec.seed, spec.device, **spec.model_options),
            solver=make_solver(spec),
            lr_schedule=make_schedule(spec.schedule),
            epochs=spec.epochs,
            steps=spec.steps,
            batch_size=spec.batch_size,
            accumulate=spec.accumulate,
            precision=spec.precision,
            device=spec.device,
            seed=spec.seed,
            deterministic=spec.deterministic,
            monitor=spec.monitor or task.primary,
            restore_best=spec.select == "best",
            progress=show,
            checkpoint=folder,
            checkpoint_seconds=CHECKPOINT_SECONDS,
            callbacks=watch(objective, warn=False),
        )

    try:
        return attempt()
    except CheckpointError as error:
        if folder is None or not folder.exists():
            raise
        # A checkpoint that cannot be used costs time, not the result: the run starts afresh.
        warnings.warn(f"{error} The run starts afresh.", PoiseWarning, stacklevel=2)
        shutil.rmtree(folder, ignore_errors=True)
        return attempt()


def _measure(run: Run, split: AnySplit, part: str) -> dict[str, float]:
    return {f"{part}/{metric}": float(value) for metric, value in split.measure(run, part).items()}


def _data(data: DataSpec, seed: int) -> tuple[AnyTask, AnySplit]:
    task = _load(data)
    if data.fingerprint and task.fingerprint != data.fingerprint:
        raise InputError(
            f"The data in {data.source} have changed since the study began (fingerprint {task.fingerprint[:12]}, expected "
            f"{data.fingerprint[:12]}). Restore them, or start a new study."
        )
    return task, _split(data, seed)


# A worker runs many specifications on the same data; loading and splitting them once is enough.
@lru_cache(maxsize=1)
def _load(data: DataSpec) -> AnyTask:
    from poise.tasks import load_task

    return load_task(data.source, **data.arguments())


@lru_cache(maxsize=2)
def _split(data: DataSpec, seed: int) -> AnySplit:
    split: AnySplit = _load(data).split(seed)
    return split


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Hold PyTorch to a number of threads, which belongs to a run's identity, whoever calls."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _peak_memory(device: str) -> Iterator[Callable[[], int]]:
    """Give the highest memory of this process in bytes, 0 where the system does not say (then the loop's own figure counts)."""
    status = Path("/proc/self/status")
    if device.split(":")[0] != "cpu" or not status.exists():
        yield lambda: 0
        return
    try:
        # A worker lives through many runs; this sets the high-water mark back to what is used now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield lambda: 0
        return
    yield lambda: _status_bytes(status.read_text(), "VmHWM")


def _status_bytes(text: str, field: str) -> int:
    line = next((line for line in text.splitlines() if line.startswith(f"{field}:")), "0 0 kB")
    return 1024 * int(line.split()[1])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_name(device: str) -> str:
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
