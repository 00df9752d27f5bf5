"""A task: data, its splits, models and metrics, ready to train."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from poise.data.label_noise import flip_labels
from poise.errors import InputError, NonFiniteError
from poise.quantities import derive
from poise.tasks.models import build_model, choose_model, load_factory
from poise.tasks.preprocessing import ArrayPreprocessor, Layout, Preprocessor, TablePreprocessor, fit_preprocessor
from poise.tasks.splits import Rows, generator_for, group_split, random_split, stratified_split, time_split
from poise.tasks.table import Table

if TYPE_CHECKING:
    from poise.readouts import Readout
    from poise.run import Run

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Examples:
    """Inputs and labels before preprocessing.

    Attributes:
        inputs: a `Table`, or a tensor `[rows, ...]` (uint8 for bytes of images).
        target: int64 `[rows]` class indices, or float32 `[rows]` in the label's unit.
    """

    inputs: Table | Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def hashes(self) -> Hashes:
        """One 64-bit hash a row over inputs and label, equal for equal rows."""
        if isinstance(self.inputs, Table):
            return Table({**self.inputs.columns, "\0label": self.target.double()}).row_hashes()
        rows = self.inputs.reshape(len(self), -1).contiguous().numpy()
        digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
        return np.frombuffer(digests, dtype=np.uint64) ^ self.target.double().numpy().view(np.uint64)


@dataclass(frozen=True)
class Recipe:
    """How a task draws its splits.

    Attributes:
        shares: of train, valid, test.
        group: int64 `[rows]` or None. time: float64 `[rows]` or None.
        label_noise, noise, class_map: the noise on training and validation labels.
        balanced: whether training rows are weighted so that the classes count alike.
    """

    shares: tuple[float, ...]
    group: Tensor | None = None
    time: Tensor | None = None
    label_noise: float = 0.0
    noise: str = "symmetric"
    class_map: Mapping[int, int] | None = None
    balanced: bool = False


@dataclass(frozen=True)
class Split:
    """One draw of training, validation and test rows, preprocessed.

    Attributes:
        train, valid, test: `{"input": float32 [rows, ...], "target": int64 or float32 [rows]}`; `train` may also hold
            `"sample_weight"` float32 `[rows]` of mean 1. A regression target is standardised: `(y - target_mean) / target_std`.
        true_target: the labels before noise, of "train" and "valid", for evaluation only; empty without label noise.
        rows: which rows of the source stand in each part.
        preprocessor: what was learned from the training rows.
        target_mean, target_std: of the training target in its own unit; 0 and 1 for classification.
        classes: the classes' names, None for regression.
        warnings: what looks wrong in this draw, in words.
    """

    train: dict[str, Tensor]
    valid: dict[str, Tensor]
    test: dict[str, Tensor]
    true_target: dict[str, Tensor]
    rows: Rows
    preprocessor: Preprocessor
    target_mean: float = 0.0
    target_std: float = 1.0
    classes: tuple[str, ...] | None = None
    warnings: list[str] = field(default_factory=list)

    def in_units(self, values: Tensor) -> Tensor:
        """Put standardised outputs or targets of a regression back into the label's own unit: `values * target_std + target_mean`."""
        return values if self.classes is not None else values * self.target_std + self.target_mean

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """Metrics of a model trained on this split, in the label's own unit.

        Args:
            output: logits float `[rows, classes]`, or standardised predictions float `[rows]` or `[rows, 1]`.
            target: as in this split's parts.
        Returns:
            accuracy, macro_f1, nll, ece; or rmse, mae (in the label's unit) and r2.
        Raises:
            NonFiniteError: the model's outputs are not finite, so nothing can be measured.
        """
        if not bool(torch.isfinite(output).all()):
            raise NonFiniteError(
                "The model's outputs became NaN or infinite, so it cannot be measured. Use a lower learning rate or smaller weights."
            )
        return measure(self.in_units(output), self.in_units(target), self.classes)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each part."""
        return {name: len(part["input"]) for name, part in self._parts().items()}

    def few(self, rows: int) -> Split:
        """Return the same split with only the first rows of each part, to try something out."""
        train, valid, test = ({k: v[:rows] for k, v in part.items()} for part in (self.train, self.valid, self.test))
        return replace(self, train=train, valid=valid, test=test)

    def measure(self, run: Run, part: str) -> dict[str, float]:
        """Return the metrics of a trained model on "train", "valid" or "test"."""
        data = self._parts()[part]
        return self.metrics(run.predict(data["input"]), data["target"])

    def details(self, run: Run) -> dict[str, Any]:
        """Return what a report shows beyond metrics and curves: nothing here."""
        return {}

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"train": self.train, "valid": self.valid, "test": self.test}


@dataclass(frozen=True)
class Task:
    """Data with everything that training needs.

    Attributes:
        name: short name. source: what it was loaded from.
        target_type: "classification" or "regression".
        classes: the classes' names, None for regression.
        input_shape: of one preprocessed example; the same for every seed.
        image_shape: channels, height, width where an example is an image, also a flat one.
        examples: number of rows, without those of a test file.
        fingerprint: sha256 over content and options.
        notes: what was inferred, in words. warnings: what looks wrong, in words.
    """

    name: str
    source: str
    target_type: str
    classes: tuple[str, ...] | None
    input_shape: tuple[int, ...]
    image_shape: tuple[int, int, int] | None
    examples: int
    fingerprint: str
    notes: list[str]
    warnings: list[str]
    data: Examples = field(repr=False)
    recipe: Recipe = field(repr=False)
    layout: Layout | None = field(default=None, repr=False)
    test_data: Examples | None = field(default=None, repr=False)

    @property
    def primary(self) -> str:
        """The metric that comparisons are about: "accuracy" or "rmse"."""
        return "accuracy" if self.classes is not None else "rmse"

    @property
    def direction(self) -> str:
        """Whether more ("max") or less ("min") of the primary metric is better."""
        return "max" if self.classes is not None else "min"

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Every metric that `split.metrics` gives, the primary one first."""
        return ("accuracy", "macro_f1", "nll", "ece") if self.classes is not None else ("rmse", "mae", "r2")

    @property
    def outputs(self) -> int:
        """Numbers that a model returns for one example: the classes, or 1."""
        return len(self.classes) if self.classes is not None else 1

    def split(self, seed: int) -> Split:
        """Draw the rows of one seed, fit the preprocessing on its training rows, and apply it to all.

        The draw depends on the data and the seed alone; a time split is the same for every seed.

        Args:
            seed: any integer of at least 0.
        Returns:
            A `Split`.

            >>> load_task("digits").split(seed=0).train["input"].shape  # doctest: +SKIP
            torch.Size([1078, 64])
        """
        rows = self._draw(seed)
        parts = {"train": _take(self.data, rows.train), "valid": _take(self.data, rows.valid)}
        parts["test"] = self.test_data if self.test_data is not None else _take(self.data, rows.test)
        preprocessor: Preprocessor
        if self.layout is not None:
            assert isinstance(parts["train"].inputs, Table)
            preprocessor = fit_preprocessor(self.layout, parts["train"].inputs)
        else:
            preprocessor = ArrayPreprocessor(self.input_shape)
        mean, std = self._scale(parts["train"].target)
        ready = {
            name: {
                "input": _apply(preprocessor, part),
                "target": part.target if self.classes is not None else (part.target - mean) / std,
            }
            for name, part in parts.items()
        }
        true_target = self._add_noise(ready, seed) if self.recipe.label_noise else {}
        if self.recipe.balanced:
            ready["train"]["sample_weight"] = balanced_weights(ready["train"]["target"], self.outputs)
        warnings = self._split_warnings(parts, preprocessor)
        return Split(
            ready["train"],
            ready["valid"],
            ready["test"],
            true_target,
            rows,
            preprocessor,
            mean,
            std,
            self.classes,
            warnings,
        )

    def metrics(self, output: Tensor, target: Tensor, split: Split | None = None) -> dict[str, float]:
        """Metrics by name: accuracy, macro_f1, nll, ece; or rmse, mae, r2.

        Args:
            output: logits float `[rows, classes]`, or predictions float `[rows]` or `[rows, 1]`.
            target: int64 or float `[rows]`.
            split: for regression, where output and target come from; they are standardised and are put back into the label's unit first.
                None takes them as they are. `split.metrics(output, target)` is the same in short.
        """
        return split.metrics(output, target) if split is not None else measure(output, target, self.classes)

    def model(self, name: str = "auto", seed: int = 0) -> nn.Module:
        """Build a model for this task; see `poise.tasks.models.build_model`.

        Args:
            name: "auto" (cnn for image folders and image arrays, mlp otherwise), "linear", "mlp", "cnn" or "package.module:factory".
            seed: decides the start.
        Raises:
            InputError: unknown model, or a model whose output does not fit the labels.
        """
        return build_model(name, self.input_shape, self.outputs, image_shape=self.image_shape, seed=seed)

    def usual_batch(self, model: str) -> int:
        """Return the examples of a step where nobody says."""
        return 128

    def usual_threads(self, model: str) -> int:
        """Return the threads of a run where nobody says: one, so that every core has a run of its own."""
        return 1

    @property
    def usual_epochs(self) -> tuple[int, int]:
        """Fewest and most epochs where nobody says."""
        return 10, 150

    def usual_solver(self, model: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any], float]:
        """Return solver, its options and its learning rate where nobody says.

        Classification: SGD with momentum 0.9 and rate 0.02, the setting in which early learning and memorisation are
        studied (arXiv:2007.00151, appendix); a constant rate keeps runs of different lengths comparable. Regression:
        Adam with rate 0.003, because targets come in every scale.
        """
        return ("sgd", {"momentum": 0.9}, 0.02) if self.classes is not None else ("adam", {}, 0.003)

    def model_code(self, name: str) -> str:
        """Return the sha256 of the source file of a model of the user's own; nothing for built-in ones."""
        if ":" not in name:
            return ""
        load_factory(name)
        file = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""

    def choose_model(self, name: str) -> str:
        """Return the name of the model that "auto" stands for; other names stay."""
        return choose_model(name, self.input_shape)

    def arguments(self, split: Split, model: str, seed: int, device: str = "auto", **options: Any) -> dict[str, Any]:
        """Return what `poise.fit` is given beside the objective and the training settings.

        Args:
            split: of this task.
            model: see `model`.
            seed: decides the start.
            device: where it will run.
            options: of models that have some; there are none here.

        Raises:
            InputError: an option, or a model that does not fit.
        """
        if options:
            raise InputError(f"{', '.join(options)}: these options are for language models, and {self.name} has none.")
        return {
            "model": self.model(model, seed),
            "train": split.train,
            "valid": split.valid,
            "readout": self.readout(),
            "metrics": split.metrics,
        }

    def readout(self) -> Readout:
        """Return the readout that offers `logits`, or `prediction`, of a model on this task."""
        from poise.readouts import Classification, Regression

        return Classification() if self.classes is not None else Regression()

    def _draw(self, seed: int) -> Rows:
        recipe = self.recipe
        if recipe.time is not None:
            return time_split(recipe.time, recipe.shares)
        if recipe.group is not None:
            return group_split(recipe.group, recipe.shares, derive(seed, "split"))
        generator = generator_for(seed, "split")
        if self.classes is not None:
            return stratified_split(self.data.target, recipe.shares, generator)
        return random_split(len(self.data), recipe.shares, generator)

    def _scale(self, train: Tensor) -> tuple[float, float]:
        if self.classes is not None:
            return 0.0, 1.0
        values = train.double()
        std = float(values.std(correction=0))
        return float(values.mean()), std if std > 0 else 1.0

    def _add_noise(self, ready: dict[str, dict[str, Tensor]], seed: int) -> dict[str, Tensor]:
        """Validation sees what a user would see, so its labels are as noisy as training's; the test labels stay true."""
        truth = {name: ready[name]["target"] for name in ("train", "valid")}
        for name, target in truth.items():
            generator = generator_for(seed, f"label noise {name}")
            recipe = self.recipe
            noisy = flip_labels(
                target,
                recipe.label_noise,
                recipe.noise,
                classes=self.outputs,
                class_map=recipe.class_map,
                generator=generator,
            )
            ready[name]["target"] = noisy.target
        return truth

    def _split_warnings(self, parts: dict[str, Examples], preprocessor: Preprocessor) -> list[str]:
        warnings = [_duplicates(parts["train"].hashes(), parts["test"].hashes())]
        for name in ("valid", "test"):
            counts = preprocessor.unseen(parts[name].inputs)  # type: ignore[arg-type]
            warnings += [
                f"{count} {name} rows have a category of {column!r} that training never saw; it counts as none."
                for column, count in counts.items()
            ]
        if self.classes is not None:
            present = torch.bincount(parts["train"].target, minlength=len(self.classes)) > 0
            warnings += [
                f"No training row is of class {self.classes[label]!r}."
                for label in (~present).nonzero().squeeze(1).tolist()
            ]
        return [warning for warning in warnings if warning]


def measure(output: Tensor, target: Tensor, classes: tuple[str, ...] | None) -> dict[str, float]:
    """Classification metrics where there are classes, regression metrics otherwise."""
    if classes is not None:
        from poise.metrics.classification import classification_metrics

        return classification_metrics(output, target)
    from poise.metrics.regression import regression_metrics

    return regression_metrics(output, target)


def balanced_weights(target: Tensor, classes: int) -> Tensor:
    """Weights with which every class that occurs counts alike: `n / (C n_c)` for a row of class c, of mean 1.

    Args:
        target: int64 `[rows]`.
        classes: number of classes.

        >>> balanced_weights(torch.tensor([0, 0, 0, 1]), 2)
        tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    counts = torch.bincount(target, minlength=classes)
    occurring = int((counts > 0).sum())
    return (len(target) / (occurring * counts[target].double())).float()


def check_test_rows(train: Hashes, test: Hashes) -> list[str]:
    """Return a warning with the number of test rows that also stand in training.

    Raises:
        InputError: at least half of the test rows do; then the test measures memory.
    """
    share = float(np.isin(test, train).mean())
    if share >= 0.5:
        raise InputError(
            f"{round(share * len(test))} of the {len(test)} rows of the test file also stand in the training "
            "file. A test on rows that were trained on measures memory,"
            " not skill. Give a test file of other rows, or none: then 20 % of the file is kept apart."
        )
    warning = _duplicates(train, test)
    return [warning] if warning else []


def _duplicates(train: Hashes, test: Hashes) -> str:
    count = int(np.isin(test, train).sum())
    return (
        f"{count} of the {len(test)} test rows also stand in training, exactly the same; they make the test easier than it should be."
        if count
        else ""
    )


def _take(examples: Examples, rows: Tensor) -> Examples:
    inputs = examples.inputs.take(rows) if isinstance(examples.inputs, Table) else examples.inputs[rows]
    return Examples(inputs, examples.target[rows])


def _apply(preprocessor: Preprocessor, examples: Examples) -> Tensor:
    if isinstance(preprocessor, TablePreprocessor):
        assert isinstance(examples.inputs, Table)
        return preprocessor.transform(examples.inputs)
    assert isinstance(examples.inputs, Tensor)
    return preprocessor.transform(examples.inputs)
