"""`Study`: compare formulas on the same seeds, splits and budget, and keep everything in one folder.

    study.toml       the study with every default written out; runs again exactly
    study.sqlite     one row a run, curves included
    checkpoints/     of runs that were interrupted; empty when the study is complete

Call it again on the same folder and it continues: a run is known by its content, and a finished one is never repeated.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from poise.errors import InputError, PoiseError, StoreError, nearest
from poise.metrics import rises
from poise.studies.config import StudyConfig, build_config, read_config
from poise.studies.engine import Engine, LocalEngine, RunEvent
from poise.studies.findings import summarize
from poise.studies.lock import FolderLock
from poise.studies.plan import Plan
from poise.studies.spec import DataSpec, RunRecord, RunSpec
from poise.studies.store import Store
from poise.studies.summary import FailedRun, Summary, TaskSummary
from poise.studies.tracking import StudyTracker, key_of
from poise.trackers.opening import Given, open_trackers

if TYPE_CHECKING:
    from poise.objective import Objective
    from poise.tasks.contract import AnyTask

STORE, TOML, CHECKPOINTS = "study.sqlite", "study.toml", "checkpoints"
# Progress inside runs is passed on at most this often; the end of a run always is.
_SECONDS_BETWEEN_REPORTS = 0.25


@dataclass(frozen=True)
class FormulaProgress:
    """How far one formula is: final runs done and planned, and the mean of the primary test metric so far."""

    text: str
    done: int
    planned: int
    failed: int
    mean: float | None


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is; a live table draws it whole.

    Attributes:
        event: what just happened: `begun`, `started`, `progress`, `retried`, `finished`, `failed`, `ended`.
        message: the event in words, empty for `progress`.
        done, planned, failed, reused: numbers of runs; `reused` were finished before this call.
        running: share done of each run that goes on now, by id.
        formulas: how far each formula is.
        seconds: time since the call; `seconds_left`: estimate, None until the first run has finished.
    """

    event: str
    message: str
    done: int
    planned: int
    failed: int
    reused: int
    running: dict[str, float]
    formulas: tuple[FormulaProgress, ...]
    seconds: float
    seconds_left: float | None


ProgressCallback = Callable[[StudyProgress], None]


@dataclass(frozen=True)
class StudyResult:
    """What `Study.run` returns.

    Attributes:
        summary: everything that was found.
        folder: the output folder; `store`: the SQLite file in it.
        failed: runs that failed, trials of a search excepted (a diverging trial is a finding, not a fault).
    """

    summary: Summary
    folder: Path
    store: Path
    failed: tuple[FailedRun, ...]

    @property
    def ok(self) -> bool:
        """Whether every formula has its result on every seed."""
        return not self.failed and not any(formula.failed_seeds for formula in self.summary.formulas)


class Study:
    """Compare formulas on the same data.

    Args:
        data: name of a built-in task, or path of a CSV, TSV, Parquet, NPZ, NPY file or of a folder of images.
        formulas: texts or objectives; the first is the baseline.
        seeds: how many seeds (0, 1, ...), or the seeds themselves.
        out: the output folder.
        label, target_type, split, group, time, test_file, label_noise, noise, class_weight, limit: how the data are
            read; see `poise.tasks.load_task`.
        max_length, max_prompt_length, skip_bad: how answers of language models are read; see `load_task`.
        model: `auto`, `linear`, `mlp`, `cnn`, `package.module:factory`, or the folder of a language model.
        accumulate: micro-batches of a step. `lora`: rank of an adapter that is trained instead of all weights.
        gradient_checkpointing: compute activations twice instead of keeping them.
        reference: "live", or "stored" to compute a language model's reference values once and keep them in the user's cache.
        solver, solver_options, lr, schedule, epochs, steps, batch_size: training; what is left out is chosen for the
            data, the same for every formula, and written into `study.toml`.
        precision: `fp32` or `bf16`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        select: measure the model after the `last` step, or the one that was `best` on the validation split.
        deterministic: refuse kernels whose results vary between repetitions.
        tune: trials per formula and seed for `auto` weights and the learning rate; None means 10 where a weight is
            `auto`, and no search otherwise.
        leave_one_out: also measure every formula without each of its terms.
        metric: what the search and the recommendation rest on: `accuracy`, `macro_f1`, `nll`, `ece`, or `rmse`, `mae`,
            `r2`; None for accuracy or RMSE.
        workers: worker processes; None for as many as the cores allow. `threads`: of each; None for one, or for every core where the memory
            does not hold a second run.

    Raises:
        InputError: a setting is wrong, two formulas are the same, or data and settings do not fit.
        FormulaError: a formula does not parse.

    >>> study = Study("digits", ["cross_entropy", "cross_entropy + 3*early_learning"], label_noise=0.4)
    >>> print(study.run().summary.recommendation.text)          # doctest: +SKIP
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        formulas: str | Objective | Sequence[str | Objective],
        seeds: int | Sequence[int] = 5,
        *,
        out: str | os.PathLike[str] = "poise-report",
        label: str | None = None,
        target_type: str | None = None,
        split: tuple[float, float, float] = (0.6, 0.2, 0.2),
        group: str | None = None,
        time: str | None = None,
        test_file: str | os.PathLike[str] | None = None,
        label_noise: float = 0.0,
        noise: str = "symmetric",
        class_weight: str | None = None,
        limit: int | None = None,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        skip_bad: bool = False,
        model: str = "auto",
        solver: str | None = None,
        solver_options: dict[str, Any] | None = None,
        lr: float | None = None,
        schedule: str | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        accumulate: int = 1,
        lora: int | None = None,
        gradient_checkpointing: bool = False,
        reference: str = "live",
        precision: str = "fp32",
        device: str = "cpu",
        select: str = "last",
        deterministic: bool = False,
        tune: int | None = None,
        leave_one_out: bool = True,
        metric: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
    ) -> None:
        listed = [formulas] if isinstance(formulas, str) or not isinstance(formulas, Sequence) else list(formulas)
        content = {
            "formulas": tuple(str(formula) for formula in listed),
            "seeds": tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
            "leave_one_out": leave_one_out,
            "metric": metric,
            "data": {
                "source": os.fspath(data),
                "label": label,
                "target_type": target_type,
                "split": tuple(split),
                "group": group,
                "time": time,
                "test_file": None if test_file is None else os.fspath(test_file),
                "label_noise": label_noise,
                "noise": noise,
                "class_weight": class_weight,
                "limit": limit,
                "max_length": max_length,
                "max_prompt_length": max_prompt_length,
                "skip_bad": skip_bad,
            },
            "training": {
                "model": model,
                "solver": solver,
                "solver_options": solver_options,
                "lr": lr,
                "schedule": schedule,
                "epochs": epochs,
                "steps": steps,
                "batch_size": batch_size,
                "accumulate": accumulate,
                "lora": lora,
                "gradient_checkpointing": gradient_checkpointing,
                "reference": reference,
                "precision": precision,
                "device": device,
                "select": select,
                "deterministic": deterministic,
            },
            "tuning": {"trials": tune},
            "engine": {"workers": workers, "threads": threads},
        }
        self._prepare(build_config(content), Path(out))

    def _prepare(self, config: StudyConfig, folder: Path) -> None:
        self._given = config
        self.folder = folder
        self._objectives = [_parse(text) for text in config.formulas]
        texts = [str(objective) for objective in self._objectives]
        for position, text in enumerate(texts):
            if text in texts[:position]:
                raise InputError(f"The formula {text!r} is given twice; two equal formulas have nothing to compare.")

    @classmethod
    def from_config(cls, config: StudyConfig, out: str | os.PathLike[str] = "poise-report") -> Study:
        """Build a study from a validated configuration."""
        study = cls.__new__(cls)
        study._prepare(config, Path(out))
        return study

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Study:
        """Build a study from a `study.toml`.

        Args:
            path: the file. Data files that it names relative to itself are found beside it.
            out: the output folder; None for the folder of the file, so that the study continues there.

        Raises:
            InputError: the file is missing or not valid; unknown keys are named.
        """
        file = Path(path)
        config = read_config(file)
        data = config.data.model_copy(
            update={name: _beside(file, getattr(config.data, name)) for name in ("source", "test_file")}
        )
        return cls.from_config(config.model_copy(update={"data": data}), file.parent if out is None else out)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Summary:
        """Summarise a study from its store alone, without the data and without writing anything.

        Args:
            folder: the output folder of a study, finished or not.

        Raises:
            StoreError: there is no store, or it holds no study.
        """
        with Store(Path(folder) / STORE, readonly=True) as store:
            content, task = store.get_meta("study"), store.get_meta("task")
            if content is None or task is None:
                raise StoreError(f"The store in {folder} holds no study. Run the study again.")
            config = build_config(content, origin=f"the study in {folder}")
            study = cls.from_config(config, folder)
            described = _task_from_meta(task)
            try:
                plan = study._plan(config, described)
                plan.feed(store.records(known=plan.specs))
                return summarize(plan, described, store.curves)
            except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
                if isinstance(error, PoiseError):
                    raise
                # The store was changed by another hand: every part is of its kind, and they do not belong together.
                raise StoreError(
                    f"The store in {folder} is damaged: its runs do not fit its study ({type(error).__name__}: {error})."
                ) from error

    @cached_property
    def task(self) -> AnyTask:
        """The loaded task.

        Raises:
            InputError: the data cannot be read, or are no longer those that `study.toml` was written for.
        """
        from poise.tasks import load_task

        spec = _data_spec(self._given)
        task = load_task(spec.source, **spec.arguments())
        expected = self._given.data.fingerprint
        if expected and expected != task.fingerprint:
            raise InputError(
                f"The data of this study have changed since study.toml was written ({spec.source}; fingerprint "
                f"{task.fingerprint[:12]}, expected {expected[:12]}). Restore the data, or delete the line "
                f"'fingerprint' "
                "to study the new ones."
            )
        return task

    @cached_property
    def config(self) -> StudyConfig:
        """The configuration with every default chosen for the data; this is what `study.toml` holds.

        Raises:
            InputError: the data cannot be read.
        """
        from poise.studies.defaults import resolve_training

        training = resolve_training(self._given.training, self.task, self._given.data)
        data = self._given.data.model_copy(
            update={
                "source": _absolute(self._given.data.source),
                "test_file": _absolute(self._given.data.test_file),
                "fingerprint": self.task.fingerprint,
            }
        )
        engine = self._given.engine
        engine = engine.model_copy(update={"threads": engine.threads or self.task.usual_threads(training.model)})
        # Formulas in canonical form: a later version reads the file as this one understood it.
        formulas = tuple(str(objective) for objective in self._objectives)
        return self._given.model_copy(
            update={"training": training, "data": data, "formulas": formulas, "engine": engine}
        )

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the study as TOML, and write it where a path is given.

        Raises:
            StoreError: the file cannot be written.
        """
        text = self.config.to_toml()
        if path is not None:
            _write(Path(path), text)
        return text

    def describe(self) -> TaskSummary:
        """Return the data in words and numbers.

        Raises:
            InputError: the metric asked for does not belong to this kind of target.
        """
        return _describe(self.task, self._given.metric)

    def plan(self) -> Plan:
        """Return a fresh plan of all runs."""
        return self._plan(self.config, self.describe())

    def _plan(self, config: StudyConfig, task: TaskSummary) -> Plan:
        base = _base_spec(config, task.fingerprint)
        return Plan(config, self._objectives, base, primary=task.primary, direction=task.direction)

    def summary(self) -> Summary:
        """Summarise what the folder holds now."""
        return Study.open(self.folder)

    def run(
        self,
        progress: ProgressCallback | None = None,
        engine: Engine | None = None,
        tracker: Given = None,
        say: Callable[[str], None] | None = None,
    ) -> StudyResult:
        """Run what is missing and summarise.

        Args:
            progress: called with a `StudyProgress` at the start and end of every run and a few times a second between.
            engine: who runs the runs; None for worker processes on this machine. It is closed at the end.
            tracker: who is told about runs and verdict, see `poise.trackers.open_trackers`; runs that were stored before are told too.
            say: takes the one sentence about a tracker that failed; by default it is a `PoiseWarning`.

        Returns:
            The result. A failed run does not stop the others; it is listed in `failed`.

        Raises:
            StoreError: another process runs a study on this folder, or the folder cannot be written.
            KeyboardInterrupt: after every finished run was stored; call again to continue.
        """
        tracking = open_trackers(tracker, say)
        _make_folder(self.folder)
        with FolderLock(self.folder), Store(self.folder / STORE) as store, contextlib.ExitStack() as ending:
            with contextlib.ExitStack() as stack:
                engine = stack.enter_context(engine if engine is not None else self._engine(store))
                described = self.describe()
                plan = self._plan(self.config, described)
                _write(self.folder / TOML, self.config.to_toml())
                store.set_meta("study", self.config.model_dump(mode="json"))
                store.set_meta("task", dict(vars(described)))
                # Runs that failed before are tried again: their reason may have been the machine's.
                plan.feed(record for record in store.records(known=plan.specs) if record.status == "done")
                if plan.done == 0:
                    _rehearse(plan, self._objectives)
                told = StudyTracker(tracking, self.config, described.name, key_of(tracker))
                ending.callback(told.keep, store)
                _Session(
                    plan, store, engine, self.folder / CHECKPOINTS, task=described, progress=progress, told=told
                ).run()
            summary = summarize(plan, described, store.curves)
            told.end(summary)
        with contextlib.suppress(OSError):
            (self.folder / CHECKPOINTS).rmdir()
        failed = tuple(run for run in summary.failed if run.role != "trial")
        return StudyResult(summary, self.folder, self.folder / STORE, failed)

    def _engine(self, store: Store) -> LocalEngine:
        from poise.tasks.load import is_language_source

        settings = self._given.engine
        workers = settings.workers
        if workers is None and self._given.training.device.split(":")[0] in ("cuda", "mps", "auto"):
            # Runs that share a GPU wait for each other; one process keeps the measured times honest.
            workers = 1 if self.config.training.device != "cpu" else None
        # A language model's size decides, and only then are the data read before the workers start.
        threads = settings.threads or (self.config.engine.threads if is_language_source(self._given.data.source) else 1)
        engine = LocalEngine(workers, threads or 1, folder=self.folder / CHECKPOINTS)
        if not store.ids():
            # A new study needs every worker: they load PyTorch while this process loads the data.
            engine.start(min(engine.slots, len(self._objectives) * len(self._given.seeds)))
        return engine


class _Session:
    """One call of `Study.run`: drives the engine until the plan wants nothing more."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        engine: Engine,
        checkpoints: Path,
        *,
        task: TaskSummary,
        progress: ProgressCallback | None,
        told: StudyTracker,
    ) -> None:
        self._told = told
        self._plan = plan
        self._store = store
        self._engine = engine
        self._checkpoints = checkpoints
        self._score = f"test/{task.primary}"
        self._callback = progress
        self._began = time.monotonic()
        self._reported = -math.inf
        self._running: dict[str, float] = {}
        self._reused = plan.done
        self._spent = 0.0  # budgets finished in this session
        self._seconds = 0.0  # their wall time

    def run(self) -> None:
        self._report("begun", f"{self._plan.planned} runs, {self._reused} of them finished before.")
        try:
            self._submit()
            self._told.catch_up(self._store, self._plan)
            for event in self._engine.events():
                self._take(event)
        except KeyboardInterrupt:
            self._interrupt()
            raise
        self._report("ended", "The study is complete." if self._plan.done >= self._plan.planned else "")

    def _submit(self) -> None:
        self._engine.submit(self._plan.wanted())

    def _take(self, event: RunEvent) -> None:
        if event.kind == "finished" and event.record is not None:
            self._running.pop(event.id, None)
            self._keep(event.record)
            self._submit()
            failed = event.record.status == "failed"
            self._report("failed" if failed else "finished", self._words(event.record))
        elif event.kind == "cancelled":
            self._running.pop(event.id, None)
        elif event.kind == "progress":
            self._running[event.id] = event.fraction
            self._report("progress")
        else:
            self._running[event.id] = 0.0
            self._report(event.kind, event.message or f"Run {event.id} has started.")

    def _keep(self, record: RunRecord) -> None:
        self._store.put(record)
        # Only now is the checkpoint useless: the record is on the disk.
        shutil.rmtree(self._checkpoints / record.id, ignore_errors=True)
        self._plan.feed([record])
        self._told.tell(record, self._plan)
        if record.status == "done":
            self._spent += self._plan.cost(record.spec)
            self._seconds += record.seconds

    def _interrupt(self) -> None:
        """Let running runs write their checkpoints, and store what finishes meanwhile."""
        self._engine.cancel()
        for event in self._engine.events():
            if event.kind == "finished" and event.record is not None and event.record.status == "done":
                self._store.put(event.record)

    def _words(self, record: RunRecord) -> str:
        role, _, seed = self._plan.roles[record.id]
        what = f"{record.spec.formula}, seed {seed}" + ("" if role == "final" else f" ({role})")
        return f"{what}: {record.error}" if record.status == "failed" else f"{what}: {record.seconds:.1f} s"

    def _report(self, event: str, message: str = "") -> None:
        now = time.monotonic()
        if self._callback is None or (event == "progress" and now - self._reported < _SECONDS_BETWEEN_REPORTS):
            return
        self._reported = now
        plan = self._plan
        self._callback(
            StudyProgress(
                event=event,
                message=message,
                done=plan.done,
                planned=plan.planned,
                failed=plan.failed,
                reused=self._reused,
                running=dict(self._running),
                formulas=tuple(self._formula(index) for index in range(len(plan.formulas))),
                seconds=now - self._began,
                seconds_left=self._seconds_left(now),
            )
        )

    def _formula(self, index: int) -> FormulaProgress:
        plan = self._plan
        tracks = [track for track in plan.tracks if track.formula == index]
        records = [plan.records.get(track.final.id) for track in tracks if track.final is not None]
        values = [r.metrics[self._score] for r in records if r is not None and self._score in r.metrics]
        failed = sum(r is not None and r.status == "failed" for r in records) + sum(bool(t.failure) for t in tracks)
        mean = math.fsum(values) / len(values) if values else None
        return FormulaProgress(str(plan.formulas[index]), len(values), len(tracks), failed, mean)

    def _seconds_left(self, now: float) -> float | None:
        if self._spent == 0.0:
            return None
        # Wall time already contains the sharing of the cores and the start of the workers, so it beats sums of run
        # times.
        part = sum(
            fraction * self._plan.cost_of(run)
            for run, fraction in self._running.items()
            if run not in self._plan.records
        )
        rate = (now - self._began) / (self._spent + part)
        return max(0.0, (self._plan.remaining_cost - part) * rate)


def _parse(text: str) -> Objective:
    from poise.formula import parse

    objective = parse(text)
    objective.check_weights()
    return objective


def _rehearse(plan: Plan, objectives: Sequence[Objective]) -> None:
    """Try one step of every formula here, so that what cannot work stops the study and not every single run."""
    from poise.studies.execute import rehearse

    for objective in objectives:
        middle = {name: math.sqrt(auto.low * auto.high) for name, auto in objective.searched.items()}
        rehearse(replace(plan.base, formula=str(objective.resolve(middle)), seed=plan.config.seeds[0]))


def _data_spec(config: StudyConfig) -> DataSpec:
    return DataSpec(**config.data.model_dump())


def _base_spec(config: StudyConfig, fingerprint: str) -> RunSpec:
    """Return the specification that all runs of a study share; formula and seed are filled in by the plan."""
    training = config.training
    assert training.lr is not None
    assert training.batch_size is not None
    assert training.solver is not None
    return RunSpec(
        data=replace(_data_spec(config), fingerprint=fingerprint),
        formula="",
        seed=0,
        model=training.model,
        model_code=training.model_code,
        solver=training.solver,
        solver_options=dict(training.solver_options or {}),
        lr=training.lr,
        schedule=training.schedule,
        epochs=training.epochs,
        steps=training.steps,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        model_options=training.model_options(),
        precision=training.precision,
        device=training.device,
        threads=config.engine.threads or 1,
        select=training.select,
        deterministic=training.deterministic,
        # Which metric is watched changes a run only where the best model is kept.
        monitor=config.metric or "" if training.select == "best" else "",
    )


def _describe(task: AnyTask, metric: str | None) -> TaskSummary:
    known = task.metric_names
    if metric is not None and metric not in known:
        raise InputError(
            f"There is no metric {metric!r} for {task.target_type}.{nearest(metric, known)} The metrics are {', '.join(known)}."
        )
    primary = metric or task.primary
    direction: Literal["max", "min"] = "max" if rises(primary) else "min"
    return TaskSummary(
        name=task.name,
        source=task.source,
        target_type=task.target_type,
        examples=task.examples,
        sizes={},
        input_shape=tuple(task.input_shape),
        classes=tuple(str(name) for name in task.classes or ()),
        fingerprint=task.fingerprint,
        primary=primary,
        direction=direction,
        notes=tuple(task.notes),
        warnings=tuple(task.warnings),
    )


def _task_from_meta(content: dict[str, Any]) -> TaskSummary:
    # JSON knows lists only.
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    texts, lists, numbers = (
        ("name", "source", "target_type", "fingerprint", "primary"),
        ("classes", "notes", "warnings"),
        ("examples",),
    )
    try:
        described = TaskSummary(**fields)
        whole = all(isinstance(getattr(described, name), str) for name in texts)
        whole &= all(isinstance(t, str) for name in lists for t in getattr(described, name))
        whole &= all(isinstance(getattr(described, name), int) for name in numbers)
        whole &= all(isinstance(n, int) for n in (*described.sizes.values(), *described.input_shape))
        whole &= all(
            isinstance(getattr(described, name), tuple) for name in (*lists, "input_shape")
        ) and described.direction in ("max", "min")
        # The page writes them out; Python refuses to print what has more digits than this.
        whole &= all(abs(n) < 2**63 for n in (described.examples, *described.sizes.values(), *described.input_shape))
    except (TypeError, AttributeError):
        whole = False
    if not whole:
        raise StoreError("The store is damaged: what it says of the data is not whole. Run the study again.")
    return described


def _absolute(location: str | None) -> str | None:
    """Return the absolute path of a file or folder; an embedded task's name stays as it is."""
    from poise.tasks.load import is_embedded

    return location if location is None or is_embedded(location) else str(Path(location).resolve())


def _beside(file: Path, location: str | None) -> str | None:
    """Return a path that the file names relative to itself, where it exists there and not from here."""
    from poise.tasks.load import is_embedded

    if location is None or is_embedded(location):
        return location
    try:
        if Path(location).exists():
            return location
        beside = file.parent / Path(location).name
        relative = file.parent / location
        return str(relative) if relative.exists() else str(beside) if beside.exists() else location
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} names {location[:80]!r} as its data, which no file can be called: {error}."
        ) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot make the output folder {folder}: {error.strerror or error}. Choose another output folder."
        ) from error


def _write(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"Cannot write {path}: {error.strerror or error}. Choose another output folder.") from error
