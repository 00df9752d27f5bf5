"""What a study is, as a validated document: `study.toml`.

The file holds everything that decides the study, with every default written out, so that it runs again exactly the same
after a default has changed. Unknown keys are refused by name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from poise.errors import InputError, nearest

# `auto` asks for a search; without --tune it gets this many trials.
DEFAULT_TRIALS = 10


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which data, and how they are read: the arguments of `poise.tasks.load_task`.

    `fingerprint` is written by the study; where it is present and the data no longer match, the study refuses to run.
    """

    source: str = Field(min_length=1)
    label: str | None = None
    target_type: Literal["classification", "regression"] | None = None
    split: tuple[float, float, float] = (0.6, 0.2, 0.2)
    group: str | None = None
    time: str | None = None
    test_file: str | None = None
    label_noise: float = Field(default=0.0, ge=0.0, lt=1.0)
    noise: str = "symmetric"
    class_weight: str | None = None
    limit: int | None = Field(default=None, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    max_prompt_length: int | None = Field(default=None, ge=1)
    skip_bad: bool = False
    fingerprint: str = ""


class TrainingConfig(_Section):
    """How every run is trained. None means: chosen for the data when the study begins, and then written down.

    `model_code` is written by the study where the model is the user's own: the hash of the factory's source file.
    """

    model: str = "auto"
    model_code: str = ""
    solver: str | None = None
    solver_options: dict[str, bool | int | float | str | list[float]] | None = None
    lr: float | None = Field(default=None, gt=0)
    schedule: str | None = None
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lora: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    reference: Literal["live", "stored"] = "live"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    select: Literal["last", "best"] = "last"
    deterministic: bool = False

    @model_validator(mode="after")
    def _one_budget(self) -> TrainingConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    def model_options(self) -> dict[str, Any]:
        """Return the options that only some models have, where they are not the defaults."""
        options = {
            "lora": self.lora,
            "gradient_checkpointing": self.gradient_checkpointing,
            "reference": self.reference,
        }
        return {name: value for name, value in options.items() if value and value != "live"}


class TuningConfig(_Section):
    """The search over `auto` weights and the learning rate, the same number of trials for every formula.

    The range of a weight stands in the formula: `auto(low=0.001, high=100)`.

    Args:
        trials: trials per formula and seed; 0 for no search. None means 10 where a formula has an `auto` weight, else
            0.
        lr_factor: the learning rate is searched from `lr/lr_factor` to `lr*lr_factor`, log scale.
        halving: after each rung one in `halving` trials goes on, with a budget `halving` times as large.
        rungs: number of rungs; the last has the full budget.
    """

    trials: int | None = Field(default=None, ge=0)
    lr_factor: float = Field(default=10.0, ge=1.0)
    halving: int = Field(default=3, ge=2)
    rungs: int = Field(default=3, ge=1)

    @field_validator("trials")
    @classmethod
    def _enough(cls, value: int | None) -> int | None:
        if value == 1:
            raise ValueError("one trial is no search; give 0 or at least 2")
        return value


class EngineConfig(_Section):
    """Who runs the runs. The thread count belongs to a run's identity; the number of workers does not.

    None: one thread, or every core where a second run would not fit into the memory; written down when the study begins.
    """

    name: Literal["local"] = "local"
    workers: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)


class StudyConfig(_Section):
    """A study, completely.

    Args:
        format: version of this document's meaning.
        formulas: the objectives to compare; the first is the baseline.
        seeds: different integers; each fixes a split, the label noise, the model's start and the order of the batches.
        leave_one_out: also run every formula without each of its terms.
        metric: the metric that the search and the recommendation rest on; None for accuracy or RMSE.
        data, training, tuning, engine: see the sections.

    Raises:
        InputError: from `read_config` and `build_config`: an unknown key, a wrong value, by name.
    """

    format: Literal[1] = 1
    formulas: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    leave_one_out: bool = True
    metric: str | None = None
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    tuning: TuningConfig = TuningConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("the seeds must differ; the same seed twice is the same run, not a repetition")
        if min(value) < 0:
            raise ValueError("seeds are integers from 0")
        return value

    def to_toml(self) -> str:
        """Return the document as TOML; `read_config` gives an equal configuration back."""
        import tomli_w

        return _HEADER + tomli_w.dumps(_without_none(self.model_dump(mode="json")))


_HEADER = "# A Poise study. Run it again, or continue it, with: poise compare --study study.toml\n"


def build_config(content: Mapping[str, Any], *, origin: str = "the study") -> StudyConfig:
    """Validate nested dictionaries.

    Args:
        content: the document.
        origin: what an error message calls it (a path).

    Raises:
        InputError: all faults in one message, each with its key.

    >>> build_config({"formulas": ["l2"], "seeds": [0], "data": {"source": "digits", "lable": "y"}})
    Traceback (most recent call last):
    ...
    poise.errors.InputError: The study: unknown key data.lable. Did you mean 'label'?
    """
    try:
        return StudyConfig.model_validate(content)
    except ValidationError as error:
        faults = " ".join(_fault(item) for item in error.errors())
        raise InputError(f"{origin[0].upper()}{origin[1:]}: {faults}") from None


def read_config(path: Path) -> StudyConfig:
    """Read and validate a `study.toml`.

    Raises:
        InputError: the file is missing, is not UTF-8 or TOML, or has an unknown key or a wrong value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and for deep nesting
        raise InputError(f"{path} is not a TOML file: {error}.") from error
    return build_config(content, origin=str(path))


def _fault(item: Any) -> str:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = list(_keys(StudyConfig, location[:-1]))
        hint = nearest(location[-1], known) or f" Known keys: {', '.join(known)}."
        return f"unknown key {key}.{hint}"
    if item["type"] == "missing":
        return f"the key {key} is missing."
    message = str(item["msg"]).removeprefix("Value error, ")
    came = "" if isinstance(item["input"], dict) else f" (it is {item['input']!r})"
    return f"{key}: {message}{came}."


def _keys(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel))
    yield from model.model_fields


def _without_none(content: Any) -> Any:
    # TOML has no null: a missing key and None mean the same here.
    if isinstance(content, dict):
        return {key: _without_none(value) for key, value in content.items() if value is not None}
    return content
