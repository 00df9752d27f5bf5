"""Wrong labels on purpose: symmetric, asymmetric and pair noise, with the true labels kept.

An exact share of the labels is drawn, not a random one, so that a study's noise rate does not vary between seeds:

    symmetric     round(rate * n) of all n labels become a uniform draw over the C classes. With the own class in the draw
                  (the paper's choice) the share of labels that really change is about rate * (1 - 1/C); without it, exactly rate.
    asymmetric    of every class c in the class map, round(rate * n_c) labels become map[c]; other classes stay clean.
    pair          the asymmetric noise with the map c -> c + 1 (the last class becomes the first).

Source: arXiv:2007.00151, section 4 and appendix; class maps of arXiv:1609.03683, section 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError, nearest

KINDS = ("symmetric", "asymmetric", "pair")

# CIFAR-10 in its usual order: truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog.
CIFAR10_CLASS_MAP: dict[int, int] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
# MNIST and digits: 2 -> 7, 3 -> 8, 5 <-> 6, 7 -> 1.
DIGIT_CLASS_MAP: dict[int, int] = {2: 7, 3: 8, 5: 6, 6: 5, 7: 1}


@dataclass(frozen=True)
class FlippedLabels:
    """Labels after noise, beside the truth.

    Attributes:
        target: int64 `[examples]`, what a training run sees.
        true_target: int64 `[examples]`, for evaluation only.
        drawn: bool `[examples]`, the labels that noise was applied to; with `include_own` some of them kept their class.
        classes: number of classes.
    """

    target: Tensor
    true_target: Tensor
    drawn: Tensor
    classes: int

    @property
    def wrong(self) -> Tensor:
        """Where the label differs from the truth: bool `[examples]`."""
        return self.target != self.true_target

    @property
    def rate(self) -> float:
        """The share of labels that are wrong, in `[0, 1]`."""
        return float(self.wrong.double().mean()) if len(self.target) else 0.0

    def transition(self) -> Tensor:
        """The measured transition matrix P(label | truth): float64 `[classes, classes]`; rows of absent classes are 0."""
        counts = torch.bincount(self.true_target * self.classes + self.target, minlength=self.classes**2)
        counts = counts.view(self.classes, self.classes).double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def flip_labels(
    target: Tensor,
    rate: float,
    kind: str = "symmetric",
    *,
    classes: int | None = None,
    class_map: Mapping[int, int] | None = None,
    include_own: bool = True,
    generator: torch.Generator | None = None,
    seed: int = 0,
) -> FlippedLabels:
    """Make a share of the labels wrong and keep the truth beside them.

        symmetric:    y_i ~ Uniform{0..C-1}    for round(rate * n) of the labels  (without y_i where include_own is False)
        asymmetric:   y_i = map[y_i]           for round(rate * n_c) of the labels of each class c in the map
        pair:         y_i = (y_i + 1) mod C    for round(rate * n_c) of the labels of each class c

    Args:
        target: int64 `[examples]`, in `0..classes-1`; left as it is.
        rate: share of the labels that noise is applied to, in `[0, 1]`.
        kind: "symmetric", "asymmetric" or "pair".
        classes: number of classes, at least 2; None takes the largest label plus one.
        class_map: for asymmetric noise, the class that each class is taken for.
        include_own: whether symmetric noise may draw the label's own class.
        generator: where the random numbers come from; None takes a new one seeded with `seed`.
        seed: used where no generator is given.
    Returns:
        `FlippedLabels` with `target`, `true_target`, `drawn`, `wrong`, `rate` and `transition()`.
    Raises:
        InputError: a label, rate, kind or class map that does not fit.

        >>> noisy = flip_labels(torch.arange(50) % 5, rate=0.4, kind="pair")
        >>> noisy.rate
        0.4

    Source: arXiv:2007.00151, section 4.
    """
    classes = _checked_classes(target, rate, kind, classes)
    generator = generator if generator is not None else torch.Generator().manual_seed(seed)
    truth = target.detach().cpu()
    if kind == "symmetric":
        drawn = _share(torch.arange(len(truth)), rate, generator)
        flipped = _symmetric(truth, drawn, classes, include_own, generator)
    else:
        taken_for = _checked_map(kind, class_map, classes)
        drawn = torch.cat(
            [_share((truth == source).nonzero().squeeze(1), rate, generator) for source in sorted(taken_for)]
        )
        flipped = truth.clone()
        lookup = torch.tensor([taken_for.get(label, label) for label in range(classes)])
        flipped[drawn] = lookup[truth[drawn]]
    mask = torch.zeros(len(truth), dtype=torch.bool)
    mask[drawn] = True
    device = target.device
    return FlippedLabels(flipped.to(device), truth.clone().to(device), mask.to(device), classes)


def ring(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    """The class map that takes each class for the next one of its group, the last for the first.

    Args:
        groups: classes that belong together, for instance the twenty super-classes of CIFAR-100.
    Returns:
        A class map for `flip_labels(kind="asymmetric")`; groups of one class are left out.
    Raises:
        InputError: a class that stands in two groups.

        >>> ring([[0, 3], [1, 2, 4]])
        {0: 3, 3: 0, 1: 2, 2: 4, 4: 1}

    Source: arXiv:2007.00151, section 4 (CIFAR-100).
    """
    members = [label for group in groups for label in group]
    if len(set(members)) < len(members):
        raise InputError("ring: every class may stand in one group only.")
    return {
        label: group[(place + 1) % len(group)]
        for group in groups
        if len(group) > 1
        for place, label in enumerate(group)
    }


def _share(rows: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """round(rate * n) of the rows, drawn without replacement."""
    return rows[torch.randperm(len(rows), generator=generator)[: round(rate * len(rows))]]


def _symmetric(truth: Tensor, drawn: Tensor, classes: int, include_own: bool, generator: torch.Generator) -> Tensor:
    flipped = truth.clone()
    if include_own:
        flipped[drawn] = torch.randint(classes, (len(drawn),), generator=generator)
    else:
        # A uniform step of 1..C-1 round the ring of classes reaches every other class equally often.
        flipped[drawn] = (truth[drawn] + torch.randint(1, classes, (len(drawn),), generator=generator)) % classes
    return flipped


def _checked_classes(target: Tensor, rate: float, kind: str, classes: int | None) -> int:
    if target.ndim != 1 or target.dtype != torch.int64:
        raise InputError(
            f"flip_labels needs a target int64 [examples], got {str(target.dtype).removeprefix('torch.')} {list(target.shape)}."
        )
    if not 0 <= rate <= 1:
        raise InputError(f"The rate of label noise must lie in 0..1, got {rate!r}.")
    if kind not in KINDS:
        raise InputError(f"There is no label noise {kind!r}.{nearest(kind, KINDS)} The kinds are {', '.join(KINDS)}.")
    low, high = (int(target.min()), int(target.max())) if len(target) else (0, 1)
    classes = high + 1 if classes is None else classes
    if classes < 2:
        raise InputError(f"Label noise needs at least 2 classes, got {classes}.")
    if low < 0 or high >= classes:
        raise InputError(f"flip_labels needs labels in 0..{classes - 1}, got {low}..{high}.")
    return classes


def _checked_map(kind: str, class_map: Mapping[int, int] | None, classes: int) -> dict[int, int]:
    if kind == "pair":
        return {label: (label + 1) % classes for label in range(classes)}
    if not class_map:
        raise InputError(
            "Asymmetric label noise needs a class map: which class is taken for which, for instance class_map={3: "
            "8, 5: 6}. 'pair' needs none."
        )
    for source, taken in class_map.items():
        if not (0 <= source < classes and 0 <= taken < classes) or source == taken:
            raise InputError(
                f"The class map takes class {source} for {taken}; both must lie in 0..{classes - 1} and differ."
            )
    return dict(class_map)
