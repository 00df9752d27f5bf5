"""Hyper-representation: features above, and below a head for each of many few-shot tasks.

    lower(heads, features) = mean over tasks and supports of cross_entropy(head_t(features(x))) + decay ||head_t||^2
    upper(heads, features) = mean over tasks and queries of cross_entropy(head_t(features(x)))

A task is three classes of digits with two supports each. Test tasks have examples of their own, or classes of their own
(`new_classes`); there features stand still and heads alone are fitted. A batch is a tensor of tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.bilevel.task import BilevelTask, taken
from poise.tasks.embedded import EMBEDDED
from poise.weights.bilevel.levels import Levels, Tensors
from poise.weights.bilevel.projected import spectral_projected_gradient

WAYS, TRAIN_CLASSES = 3, 7
TRAIN_SHARE = 0.6


@dataclass(frozen=True)
class Episodes:
    """Few-shot tasks: supports and queries [tasks, rows, 64] with classes [tasks, rows]."""

    support: Tensor
    support_class: Tensor
    query: Tensor
    query_class: Tensor


@dataclass(frozen=True, kw_only=True)
class HyperRepresentation(BilevelTask):
    """A representation task; `scores` fits heads to the supports of test tasks and reports the accuracy on their queries.

    Attributes:
        pixels: the accuracy of heads on the pixels themselves.
    """

    pixels: float


def hyper_representation(
    seed: int = 0,
    *,
    tasks: int = 100,
    test_tasks: int = 40,
    shots: int = 2,
    queries: int = 10,
    width: int = 32,
    new_classes: bool = False,
    decay: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> HyperRepresentation:
    """Return few-shot tasks on digits.

    Args:
        seed: of tasks and initial features.
        tasks, test_tasks: how many.
        shots, queries: examples of each class in a task.
        width: features.
        new_classes: whether test tasks are of classes 7 to 9 and the others of 0 to 6, instead of other examples of all ten.
        decay: of the squared norm of the heads.
        dtype: of data and variables.
    """
    if min(tasks, test_tasks, shots, queries, width) < 1:
        raise InputError("hyper_representation: tasks, test_tasks, shots, queries and width are at least 1.")
    generator = torch.Generator().manual_seed(derive(seed, "episodes"))
    digits = EMBEDDED["digits"]()
    order = torch.randperm(len(digits.target), generator=generator)
    seen = torch.zeros(len(order), dtype=torch.bool)
    seen[order[: int(TRAIN_SHARE * len(order))]] = True
    old, new = (range(TRAIN_CLASSES), range(TRAIN_CLASSES, 10)) if new_classes else (range(10), range(10))
    sizes = shots, queries
    train = _episodes(tuple(old), tasks, sizes, seen, generator, dtype)
    test = _episodes(tuple(new), test_tasks, sizes, ~seen, generator, dtype)

    def features(theta: Tensors, x: Tensor) -> Tensor:
        found = torch.tanh(x @ theta[0] + theta[1])
        return torch.cat([found, torch.ones_like(found[..., :1])], -1)

    def loss(heads: Tensor, z: Tensor, y: Tensor) -> Tensor:
        log_p = (z @ heads).log_softmax(-1)
        return -log_p.gather(-1, y[..., None]).mean()

    def lower(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        heads = taken(x[0], rows)
        fit = loss(heads, features(theta, taken(train.support, rows)), taken(train.support_class, rows))
        return fit + decay * heads.square().sum() / len(heads)

    def upper(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return loss(taken(x[0], rows), features(theta, taken(train.query, rows)), taken(train.query_class, rows))

    def scores(x: Tensors, theta: Tensors) -> dict[str, float]:
        with torch.no_grad():
            support, query = features(theta, test.support), features(theta, test.query)
        return {
            "accuracy": _adapted(support, query, test, decay),
            "validation loss": float(upper(x, theta, None).detach()),
        }

    def ones(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    kind = "classes" if new_classes else "examples"
    start = torch.randn(64, width, generator=generator, dtype=torch.float64) / math.sqrt(64)
    return HyperRepresentation(
        levels=Levels(lower, upper, names=("feature weights", "feature biases")),
        x=(torch.zeros(tasks, width + 1, WAYS, dtype=dtype),),
        theta=(start.to(dtype), torch.zeros(width, dtype=dtype)),
        lower_rows=tasks,
        upper_rows=tasks,
        scores=scores,
        note=f"{tasks} tasks of {WAYS} classes with {shots} shots; {test_tasks} test tasks of other {kind}",
        pixels=_adapted(ones(test.support), ones(test.query), test, decay),
    )


def _adapted(support: Tensor, query: Tensor, test: Episodes, decay: float) -> float:
    """Return the accuracy on queries of heads that were fitted to supports."""

    def value_and_gradient(x: Tensors) -> tuple[Tensor, Tensors]:
        heads = x[0].detach().requires_grad_()
        log_p = (support @ heads).log_softmax(-1)
        value = -log_p.gather(-1, test.support_class[..., None]).mean() + decay * heads.square().sum() / len(heads)
        return value.detach(), torch.autograd.grad(value, (heads,))

    start = (torch.zeros(len(support), support.shape[-1], WAYS, dtype=support.dtype),)
    heads = spectral_projected_gradient(value_and_gradient, start, None, 1e-4, 200).point[0].detach()
    return float(((query @ heads).argmax(-1) == test.query_class).double().mean())


def _episodes(
    classes: tuple[int, ...],
    tasks: int,
    sizes: tuple[int, int],
    allowed: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Episodes:
    digits, (shots, queries) = EMBEDDED["digits"](), sizes
    rows = {c: ((digits.target == c) & allowed).nonzero()[:, 0] for c in classes}
    sets = list(combinations(classes, WAYS))
    drawn = []
    for _ in range(tasks):
        chosen = sets[int(torch.randint(len(sets), (), generator=generator))]
        drawn.append(
            torch.stack([rows[c][torch.randperm(len(rows[c]), generator=generator)[: shots + queries]] for c in chosen])
        )
    index = torch.stack(drawn)  # [tasks, ways, shots + queries]
    label = torch.arange(WAYS)[None, :, None].expand_as(index)
    inputs = digits.inputs.to(dtype)

    def part(where: slice) -> tuple[Tensor, Tensor]:
        return inputs[index[..., where].flatten(1)], label[..., where].flatten(1)

    support, support_class = part(slice(shots))
    query, query_class = part(slice(shots, None))
    return Episodes(support, support_class, query, query_class)
