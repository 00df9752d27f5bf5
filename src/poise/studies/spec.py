"""`RunSpec`: everything that decides a run's result, and its name; `RunRecord`: what came out.

A run is known by its content. Its id is the first 16 hexadecimal digits of

    sha256(canonical JSON of every field that decides the result),

so two studies, two formulas or two calls that need the same run share it, and a finished run is never repeated. The
path of the data is not part of the id (its fingerprint is), nor is the number of the GPU (its kind is). The thread
count is part of it, because sums in another order round differently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, cast

# Raise it when a change of Poise makes the same specification give another result.
PROTOCOL = 1

Curves = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how they are read; the arguments of `poise.tasks.load_task` and the content's fingerprint.

    Args:
        source: name of a built-in task or path of the user's file or folder.
        fingerprint: sha256 over content and options, as `Task.fingerprint` gives it.
        label, target_type, split, group, time, test_file: see `load_task`.
        label_noise, noise, class_weight, limit: see `load_task`.
        max_length, max_prompt_length, skip_bad: see `load_task`.
    """

    source: str
    fingerprint: str = ""
    label: str | None = None
    target_type: str | None = None
    split: tuple[float, float, float] = (0.6, 0.2, 0.2)
    group: str | None = None
    time: str | None = None
    test_file: str | None = None
    label_noise: float = 0.0
    noise: str = "symmetric"
    class_weight: str | None = None
    limit: int | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    skip_bad: bool = False

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_task`, without the source."""
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name not in ("source", "fingerprint")
        }


@dataclass(frozen=True)
class RunSpec:
    """One training run, completely.

    Args:
        data: the data.
        formula: canonical text of the objective, every `auto` weight resolved to a number.
        seed: decides the split, the label noise, the model's start and the order of the batches.
        model: `linear`, `mlp`, `cnn` or `package.module:factory`.
        model_code: sha256 of the factory's source file, empty for built-in models.
        solver, solver_options: the optimiser by name and its arguments other than the learning rate.
        lr: learning rate, > 0.
        schedule: learning-rate schedule by name, or None for a constant rate.
        epochs, steps: the budget; exactly one of the two is given.
        batch_size: examples per step; `accumulate`: micro-batches of a step.
        model_options: of language models: `lora`, `gradient_checkpointing`, ...
        precision: `fp32` or `bf16`.
        device: kind of device, with or without a number (`cpu`, `cuda:1`); only the kind decides the id.
        threads: threads of one process.
        select: which model is measured, the `last` or the one that was `best` on the validation split.
        measure: the split that is measured at the end. Trials of a search measure `valid` only, so that the test
            split is touched once, by the final run.
        deterministic: refuse kernels whose results vary between repetitions.
        monitor: the metric that `select="best"` goes by; empty for the task's own.
        protocol: version of the meaning of all this.
    """

    data: DataSpec
    formula: str
    seed: int
    model: str
    lr: float
    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    solver: str = "sgd"
    solver_options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    model_code: str = ""
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    select: Literal["last", "best"] = "last"
    measure: Literal["test", "valid"] = "test"
    deterministic: bool = False
    monitor: str = ""
    accumulate: int = 1
    model_options: dict[str, Any] = field(default_factory=dict)
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"A run needs epochs or steps, not both: epochs={self.epochs}, steps={self.steps}.")
        # 1 and 1.0 are the same learning rate and must be the same run.
        object.__setattr__(self, "lr", float(self.lr))

    @cached_property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of what decides the result."""
        return hashlib.sha256(canonical_json(self.identity()).encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result.

        Fields at their default are left out, so that a field which a later version adds does not rename old runs.
        """
        data = _changed(self.data)
        data.pop("source")
        data.pop("test_file", None)
        return {**_changed(self), "data": data, "device": self.device.split(":")[0], "protocol": self.protocol}

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and literals."""
        return {
            item.name: dataclasses.asdict(self.data) if item.name == "data" else getattr(self, item.name)
            for item in dataclasses.fields(self)
        }

    def changed(self, **fields: Any) -> RunSpec:
        """Return the specification with other values in some fields: `dataclasses.replace`, in a third of its time."""
        made = object.__new__(RunSpec)
        made.__dict__.update(vars(self), **fields)
        made.__dict__.pop("id", None)  # of the old content
        made.__post_init__()
        return made

    def to_json(self) -> str:
        """Return the canonical JSON, location of the data included."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunSpec:
        """Build a specification from `to_dict`'s result, also after a trip through JSON."""
        data = dict(content["data"])
        data["split"] = tuple(data["split"])
        return cls(**{**content, "data": DataSpec(**data)})

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Build a specification from its JSON."""
        return cls.from_dict(json.loads(text))


@dataclass
class RunRecord:
    """The outcome of one run.

    Attributes:
        id, spec: which run.
        status: `done` or `failed`.
        error: one sentence for people, empty when done; `detail`: the full traceback.
        metrics: `test/accuracy`, `valid/accuracy`, ... at the end of the run.
        curves: recorded quantities by name, each with its own list of steps.
        details: what the report shows beyond metrics and curves, as JSON.
        sizes: number of examples per split; `warnings`: what looks wrong in this seed's split.
        seconds: wall time of training; `peak_memory_bytes`: highest memory; `steps`: optimiser steps taken.
        versions, machine: what it ran on.
        started: UTC time, ISO 8601.
        attempts: how often it was started (2 after a killed worker).
    """

    id: str
    spec: RunSpec
    status: Literal["done", "failed"]
    error: str = ""
    detail: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    steps: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    started: str = ""
    attempts: int = 1

    @property
    def steps_per_second(self) -> float:
        """Optimiser steps per second of training, 0 where nothing was trained."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists and literals."""
        return {
            item.name: self.spec.to_dict() if item.name == "spec" else getattr(self, item.name)
            for item in dataclasses.fields(self)
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunRecord:
        """Build a record from `to_dict`'s result, also after a trip through JSON."""
        curves = {name: (list(steps), list(values)) for name, (steps, values) in content["curves"].items()}
        return cls(**{**content, "spec": RunSpec.from_dict(content["spec"]), "curves": curves})


def _changed(spec: DataSpec | RunSpec) -> dict[str, Any]:
    """Return the fields without a default, and those whose value is another."""
    values, kind = vars(spec), cast("Hashable", type(spec))
    return {name: values[name] for name, default in _defaults(kind) if values[name] != default}


@cache
def _defaults(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Return the fields with their defaults; asked for twice a run, in studies of thousands of runs."""
    return tuple(
        (item.name, item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default)
        for item in dataclasses.fields(kind)
    )


def failed_record(spec: RunSpec, error: str, detail: str = "", *, seconds: float = 0.0, attempts: int = 1) -> RunRecord:
    """Return the record of a run that failed for the reason given in one sentence."""
    return RunRecord(spec.id, spec, "failed", error=error, detail=detail, seconds=seconds, attempts=attempts)


def canonical_json(content: Any) -> str:
    """Write JSON in the one way that hashing needs: sorted keys, no spaces, shortest exact floats.

    >>> canonical_json({"b": 0.1, "a": [1, None]})
    '{"a":[1,null],"b":0.1}'
    """
    return _CANONICAL.encode(content)


# Made once: `json.dumps` would make one a call.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
