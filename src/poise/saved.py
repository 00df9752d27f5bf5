"""A trained model in a folder, and predictions from it; nothing in it is unpickled.

    poise.json           the formula, the training settings, the preprocessing, the metrics
    model.safetensors    the weights
    program.pt2          the model as a program of `torch.export`, for use without Poise: preprocessed input in, output out

`SavedModel.load` builds the model by its name and loads the weights into it. The program is for other users; Poise
itself never reads it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise._version import __version__
from poise.errors import InputError, StoreError
from poise.readouts import Classification, Regression
from poise.spreadsheet import harmless
from poise.training import Run, choose_device, predict

if TYPE_CHECKING:
    from poise.studies.spec import RunSpec
    from poise.tasks import Split, Task
    from poise.tasks.preprocessing import Preprocessor

__all__ = ["CONFIG", "PROGRAM", "WEIGHTS", "Predictions", "SavedModel", "save_model"]

FORMAT = 1
CONFIG, WEIGHTS, PROGRAM = "poise.json", "model.safetensors", "program.pt2"


@dataclass(frozen=True)
class Predictions:
    """What a model says about some rows.

    Attributes:
        values: class names, or numbers in the label's own unit, one a row.
        probabilities: float32 `[rows, classes]`; None for regression.
        classes: the classes' names; None for regression.
    """

    values: list[str] | list[float]
    probabilities: Tensor | None = None
    classes: tuple[str, ...] | None = None

    def write_csv(self, file: IO[str]) -> None:
        """Write a header and one line a row: the prediction, then the probability of every class.

        A class whose name a spreadsheet would run as a formula gets an apostrophe before it.
        """
        writer = csv.writer(file, lineterminator="\n")
        names = [f"probability of {name}" for name in self.classes or ()]
        writer.writerow(["prediction", *names])
        rows = self.probabilities.tolist() if self.probabilities is not None else [[] for _ in self.values]
        for value, row in zip(self.values, rows, strict=True):
            # Seven digits are what float32 holds.
            shown = harmless(value) if isinstance(value, str) else f"{value:.7g}"
            writer.writerow([shown, *(f"{p:.7g}" for p in row)])


@dataclass
class SavedModel:
    """A trained model with everything that a new row needs to become a prediction.

    Attributes:
        config: what `poise.json` holds.
        model: the trained module, in evaluation mode.
        preprocessor: what was learned from the training rows.

    >>> SavedModel.load("my-model").predict("new-rows.csv").values          # doctest: +SKIP
    ['setosa', 'virginica']
    """

    config: dict[str, Any]
    model: nn.Module = field(repr=False)
    preprocessor: Preprocessor = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, allow_code: bool = False) -> SavedModel:
        """Read a folder that `poise fit --save` wrote.

        Args:
            folder: what was saved.
            allow_code: also where the model is made by the user's own factory ("package.module:factory"): loading then imports that
                module and calls it, so say so only of a folder that you trust.

        Raises:
            InputError: the folder holds no model, a damaged one, one of a newer version, or one that needs `allow_code`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_model

        from poise.tasks import build_model

        place = Path(folder)
        config = _read_config(place)
        if ":" in config["model"] and not allow_code:
            raise InputError(
                f"The model in {place} is made by code that is not in the folder: {config['model']!r}. Loading it imports that module and "
                "calls it. If you trust the folder, pass allow_code=True (on the command line --allow-code)."
            )
        preprocessor = _preprocessor(place, config)
        task = config["task"]
        shape = tuple(task["image_shape"]) if task["image_shape"] else None

        def build() -> nn.Module:
            return build_model(config["model"], tuple(task["input_shape"]), task["outputs"], image_shape=shape)

        if ":" not in config["model"]:
            _check_size(place, build)
        model = build()
        try:
            load_model(model, place / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{place / WEIGHTS} is missing or damaged ({error}). Fit and save the model again."
            ) from None
        except RuntimeError as error:
            raise InputError(
                f"The weights in {place} do not fit the model {config['model']!r}; has its code changed? ({error})"
            ) from None
        return cls(config, model.eval(), preprocessor)

    def predict(
        self, data: str | os.PathLike[str] | Tensor, *, device: str = "auto", batch_size: int = 1024
    ) -> Predictions:
        """Predict every row of a file, or of inputs that are preprocessed already.

        Args:
            data: a file of the kind that training read (the label may be absent), or float32 `[rows, *input_shape]`.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
            batch_size: rows at a time.

        Raises:
            InputError: the file cannot be read, or lacks columns that training used.
        """
        from poise.tasks import read_inputs

        inputs = data if isinstance(data, Tensor) else read_inputs(data, self.preprocessor)
        classes = self.config["task"]["classes"]
        where = choose_device(device)
        readout = Regression() if classes is None else Classification()
        if not len(inputs):
            raise InputError(f"{data if isinstance(data, str | os.PathLike) else 'The input'} has no rows to predict.")
        output = predict(self.model.to(where), inputs, readout, where, batch_size).cpu()
        if classes is None:
            target = self.config["target"]
            return Predictions((output * target["std"] + target["mean"]).tolist())
        probabilities = output.softmax(-1)
        named = [classes[place] for place in probabilities.argmax(-1).tolist()]
        return Predictions(named, probabilities, tuple(classes))


def save_model(
    folder: str | os.PathLike[str], run: Run, task: Task, split: Split, spec: RunSpec, metrics: dict[str, float]
) -> list[str]:
    """Write a trained model into a folder; each file appears whole or not at all, and `poise.json` last.

    Args:
        folder: made where it is missing.
        run: what `poise.fit` returned.
        task, split: what it was trained on.
        spec: how it was trained.
        metrics: what it reached on the test split.

    Returns:
        What could not be done, in words: a model that `torch.export` cannot trace has no program.

    Raises:
        StoreError: the folder cannot be written.
    """
    from safetensors.torch import save_model as save_weights

    from poise.parts import plain_copy

    place = Path(folder)
    # What a part did to the weights is worked into them: the files hold the plain model.
    model = plain_copy(run.model).to("cpu").eval()
    notes: list[str] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        _atomic(place / WEIGHTS, lambda path: save_weights(model, str(path)))
        try:
            program = _export(model, task)
        except Exception as error:
            # Tracing runs the user's own code, which may fail in any way; the weights are safe already.
            (place / PROGRAM).unlink(missing_ok=True)
            notes.append(f"{PROGRAM} was not written: torch.export cannot trace this model ({_first_line(error)}).")
        else:
            _atomic(place / PROGRAM, lambda path: torch.export.save(program, path))
        text = json.dumps(_config(run, task, split, spec, metrics), indent=1, allow_nan=False, ensure_ascii=False)
        _atomic(place / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    except OSError as error:
        raise StoreError(
            f"Cannot write the model to {place}: {error.strerror or error}. Choose another folder."
        ) from error
    return notes


def _config(run: Run, task: Task, split: Split, spec: RunSpec, metrics: dict[str, float]) -> dict[str, Any]:
    from poise.tasks import choose_model

    return {
        "format": FORMAT,
        "versions": {"poise": __version__, "torch": str(torch.__version__)},
        "formula": spec.formula,
        "weights": run.weights,  # what policies set within the run
        "model": choose_model(spec.model, task.input_shape),
        "task": {
            "name": task.name,
            "target_type": task.target_type,
            "classes": None if task.classes is None else [str(name) for name in task.classes],
            "outputs": task.outputs,
            "input_shape": list(task.input_shape),
            "image_shape": None if task.image_shape is None else list(task.image_shape),
        },
        "target": {"mean": split.target_mean, "std": split.target_std},
        "preprocessor": split.preprocessor.to_dict(),
        "metrics": metrics,
        "training": {**spec.to_dict(), "seconds": run.seconds, "steps_done": run.steps, "stopped": run.stopped},
    }


def _read_config(place: Path) -> dict[str, Any]:
    path = place / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = config["format"]
    except OSError:
        raise InputError(
            f"{place} holds no saved model: {CONFIG} is not there. `poise fit DATA FORMULA --save {place}` writes one."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged. Fit and save the model again.") from None
    if version != FORMAT:
        versions = config.get("versions")
        made = versions.get("poise") if isinstance(versions, dict) else None
        raise InputError(
            f"{path} has format {version!r}, and this version reads {FORMAT}. It was written by Poise {made or 'of another version'}."
        )
    fault = _fault(config)
    if fault:
        raise InputError(f"{path} is damaged: {fault}. Fit and save the model again.")
    return config


def _fault(config: dict[str, Any]) -> str:
    """Say what of a configuration is not as `save_model` writes it, as far as loading and predicting rest on it; empty for nothing."""
    task, target = config.get("task"), config.get("target")
    if not isinstance(config.get("model"), str):
        return "model is no name"
    if not isinstance(task, dict):
        return "task is missing"
    if not _is_shape(task.get("input_shape")):
        return f"task.input_shape is {task.get('input_shape')!r}"
    image = task.get("image_shape")
    if "image_shape" not in task or (image is not None and not (_is_shape(image) and len(image) == 3)):
        return f"task.image_shape is {image!r}"
    outputs, classes = task.get("outputs"), task.get("classes")
    if not _is_shape([outputs]):
        return f"task.outputs is {outputs!r}"
    if classes is None:
        numbers = [target.get(name) for name in ("mean", "std")] if isinstance(target, dict) else [None]
        if "classes" not in task or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            return "target has no mean and std"
    elif not isinstance(classes, list) or len(classes) != outputs or not all(isinstance(c, str) for c in classes):
        return f"task.classes are no {outputs} names"
    return ""


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(n) is int and 1 <= n < 2**31 for n in value)


def _preprocessor(place: Path, config: dict[str, Any]) -> Preprocessor:
    """Rebuild the preprocessor, and see that it gives what the model reads."""
    from poise.tasks import preprocessor_from_dict

    try:
        found = preprocessor_from_dict(config["preprocessor"])
        shape = tuple(found.shape)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise InputError(
            f"{place / CONFIG} is damaged: its preprocessor cannot be rebuilt ({error}). Fit and save the model again."
        ) from None
    if shape != tuple(config["task"]["input_shape"]):
        raise InputError(
            f"{place / CONFIG} is damaged: its preprocessor gives {list(shape)}, and the model reads {config['task']['input_shape']}. Fit "
            "and save the model again."
        )
    return found


def _check_size(place: Path, build: Callable[[], nn.Module]) -> None:
    """Refuse a model that is larger than its weights in the file, before it takes the memory."""
    try:
        with torch.device("meta"):
            needed = sum(p.numel() * p.element_size() for p in build().parameters())
        size = (place / WEIGHTS).stat().st_size
    except OSError as error:
        raise InputError(f"{place / WEIGHTS} is missing or damaged ({error}). Fit and save the model again.") from None
    except (RuntimeError, ValueError, OverflowError) as error:
        raise InputError(f"{place / CONFIG} is damaged: no model has its shapes ({_first_line(error)}).") from None
    if needed > size:
        raise InputError(
            f"{place / WEIGHTS} is missing or damaged: the model that {CONFIG} names has {needed:,} bytes of weights, and the file has "
            f"{size:,}. Fit and save the model again."
        )


def _export(model: nn.Module, task: Task) -> Any:
    """Trace the model with a free number of rows; zeros, so that no row of the user's data is in the file."""
    rows = torch.export.Dim("rows", min=1)
    example = torch.zeros(2, *task.input_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=({0: rows},))
    # The example would be the only pickled part of the archive.
    program.example_inputs = None
    return program


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # Some writers keep the file to its owner; the user's umask decides here.
        temporary.chmod(mode)
        os.replace(temporary, path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
