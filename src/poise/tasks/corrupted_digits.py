"""Many related tasks of one data set: corruption x digit, one digit against the rest, after the MNIST-C study.

    tasks = CorruptedDigits(target=("rotate", 3))
    search = ActiveMultiTask(LinearMultiTask(64, 10, len(tasks), bias=True), tasks.draw, 4000, target=tasks.target, ...)

The target is one digit under one corruption; the sources are all digits under all other corruptions. Base images are dealt out
first: one that is in the target's training or test part, in whatever corruption, is never drawn for a source.

Source: arXiv:2306.02556, experiments (160 tasks, 150 sources); corruptions after arXiv:1906.02337.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poise.data.corruptions import CORRUPTIONS, EIGHT, corrupt
from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.embedded import EMBEDDED

__all__ = ["CorruptedDigits", "check_leakage"]


def check_leakage(source: Tensor, target: Tensor) -> None:
    """Refuse base images that are in both.

    Args:
        source, target: numbers of base images, int64.

    Raises:
        InputError: an image is in both; it says how many.
    """
    both = torch.unique(source[torch.isin(source, target)])
    if len(both):
        raise InputError(
            f"{len(both)} base images are in a source and in the target's data (the first: {both[:5].tolist()}). A corrupted copy of "
            "a test image is not new: deal out the base images before they are corrupted."
        )


class CorruptedDigits:
    """The tasks, and what to draw them from.

    Args:
        data: "digits" (1,797 of 8 x 8), "mnist" (5,000 of 28 x 28), or (images float [n, height, width] in [0, 1], labels int64 [n]).
        target: corruption and digit.
        corruptions: names of `poise.data.corruptions.CORRUPTIONS`, the target's among them.
        severity: of all corruptions.
        target_samples: training samples of the target.
        test_share: of the base images, for the target's test.
        standardise: bring every image to mean 0 and deviation 1. The theory asks for inputs of one covariance: without this a
            source of pale images has large heads, and large heads are taken for relevant ones.
        seed: decides who is where, and all draws.

    Attributes:
        names: of the sources, "corruption/digit".
        available: samples that each source has, int64 (T,).
        target: (inputs float [n, pixels], targets -1 or 1 float [n]) to fit the target's head on.
        test: the same, to measure with.

    Raises:
        InputError: no such data, corruption or digit, or too few images.
    """

    def __init__(
        self,
        data: str | tuple[Tensor, Tensor] = "digits",
        target: tuple[str, int] = ("rotate", 3),
        *,
        corruptions: Sequence[str] = EIGHT,
        severity: float = 1.0,
        target_samples: int = 100,
        test_share: float = 0.4,
        standardise: bool = True,
        seed: int = 0,
    ) -> None:
        self.images, self.labels = _load(data)
        self.severity, self.standardise, self.seed = severity, standardise, seed
        unknown = [name for name in corruptions if name not in CORRUPTIONS]
        if unknown or target[0] not in corruptions or not 0 <= target[1] <= 9:
            raise InputError(
                f"CorruptedDigits: corruptions out of {', '.join(CORRUPTIONS)} and a target among them with a digit 0 to 9; got "
                f"{', '.join(corruptions)} and {target}."
            )
        self.source_ids, train_ids, test_ids = self._deal(target_samples, test_share)
        check_leakage(self.source_ids, torch.cat([train_ids, test_ids]))
        self._target_ids = torch.cat([train_ids, test_ids])
        self.tasks = [(c, digit) for c in corruptions if c != target[0] for digit in range(10)]
        self.names = [f"{c}/{digit}" for c, digit in self.tasks]
        self.available = torch.full((len(self.tasks),), len(self.source_ids), dtype=torch.int64)
        self.drawn = torch.zeros(len(self.tasks), dtype=torch.int64)
        self.target = self._samples(target[0], target[1], train_ids, "target")
        self.test = self._samples(target[0], target[1], test_ids, "test")

    def __len__(self) -> int:
        return len(self.tasks)

    def __call__(self, task: int, number: int) -> tuple[Tensor, Tensor]:
        """Draw new samples of a source, without repeating a base image.

        Args:
            task: number of the source.
            number: of samples.

        Returns:
            inputs float [number, pixels] and targets float [number], -1 or 1.

        Raises:
            InputError: the source runs out.
        """
        first = int(self.drawn[task])
        if first + number > int(self.available[task]):
            raise InputError(
                f"{self.names[task]} has {int(self.available[task])} samples, and {first} were drawn: {number} more are not there."
            )
        corruption, digit = self.tasks[task]
        order = torch.randperm(len(self.source_ids), generator=self._generator("order", task))
        ids = self.source_ids[order[first : first + number]]
        check_leakage(ids, self._target_ids)
        self.drawn[task] += number
        return self._samples(corruption, digit, ids, "draw", task, first)

    draw = __call__

    def error(self, trainer: Any, head: Tensor) -> float:
        """Return the ranking error on the target's test images: the share of pairs (positive, negative) in the wrong order.

        One minus the area under the ROC curve. One digit in ten is positive, so that always saying no would be right nine times in
        ten; here it is right in half, and no threshold has to be chosen.
        """
        inputs, truth = self.test
        scores = trainer.predict(inputs, head)
        apart = scores[truth > 0][:, None] - scores[truth < 0]
        return float((apart < 0).double().mean() + 0.5 * (apart == 0).double().mean())

    def state_dict(self) -> dict[str, Any]:
        """Return how much was drawn: with the seed, that says what comes next."""
        return {"drawn": self.drawn.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.drawn = state["drawn"].clone()

    def _deal(self, target_samples: int, test_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Deal out the base images: sources, target's training, target's test. Equal images go the same way."""
        _, group = torch.unique(self.images.flatten(1), dim=0, return_inverse=True)
        groups = int(group.max()) + 1
        order = torch.randperm(groups, generator=self._generator("deal"))[group]
        test = order < round(test_share * groups)
        train = ~test & (order < round(test_share * groups) + target_samples)
        parts = [(~test & ~train), train, test]
        if not 0 < test_share < 1 or not all(bool(part.any()) for part in parts):
            raise InputError(
                f"CorruptedDigits: {len(self.images)} images do not suffice for test_share={test_share}, {target_samples} target samples "
                "and the sources."
            )
        sources, train_ids, test_ids = (part.nonzero()[:, 0] for part in parts)
        return sources, train_ids[:target_samples], test_ids

    def _samples(self, corruption: str, digit: int, ids: Tensor, *purpose: str | int) -> tuple[Tensor, Tensor]:
        generator = self._generator(corruption, digit, *purpose)
        x = corrupt(self.images[ids], corruption, self.severity, generator=generator)
        x = x.flatten(1)
        if self.standardise:
            x = x - x.mean(1, keepdim=True)
            x = x / x.std(1, keepdim=True).clamp_min(0.05)
        return x, torch.where(self.labels[ids] == digit, 1.0, -1.0)

    def _generator(self, *purpose: str | int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, "corrupted digits", *purpose))


def _load(data: str | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(data, str):
        images, labels = data
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise InputError(
                f"CorruptedDigits: images float [n, height, width] and labels int64 [n]; got {list(images.shape)} and {list(labels.shape)}."
            )
        return images.float(), labels
    if data not in ("digits", "mnist"):
        raise InputError(f"CorruptedDigits: data is 'digits', 'mnist' or (images, labels), and it is {data!r}.")
    embedded = EMBEDDED[data]()
    assert embedded.image_shape is not None
    return embedded.inputs.view(-1, *embedded.image_shape[1:]), embedded.target
