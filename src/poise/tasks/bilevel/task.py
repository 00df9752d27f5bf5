"""A problem in two levels with its data: what every task of this room is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quantities import derive
from poise.weights.bilevel.levels import Levels, Tensors, dot
from poise.weights.bilevel.projected import spectral_projected_gradient

Scores = Callable[[Tensors, Tensors], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class BilevelTask:
    """A problem, where its variables begin, and how an answer is judged.

    Attributes:
        levels: the objectives; a batch is a tensor of rows, None the whole of the data.
        x, theta: where the lower and the upper variable begin.
        lower_rows, upper_rows: how many rows each level has.
        scores: what an answer is worth on data that neither level sees.
        note: the data, in words.
    """

    levels: Levels
    x: Tensors
    theta: Tensors
    lower_rows: int
    upper_rows: int
    scores: Scores
    note: str = ""

    def batches(
        self, lower: int | None = None, upper: int | None = None, *, inner: int = 1, seed: int = 0
    ) -> Callable[[int], tuple[Any, Any]]:
        """Return `batches(step) -> (lower rows, upper rows)`, drawn without replacement within a batch.

        Args:
            lower, upper: rows of a batch; None gives the whole of the data.
            inner: lower batches for each step; more than one comes as a list.
            seed: rows of a step are derived from it and the step, so that a resumed run sees what it would have seen.

        Raises:
            InputError: a batch larger than its data.
        """
        for size, rows, name in ((lower, self.lower_rows, "lower"), (upper, self.upper_rows, "upper")):
            if size is not None and not 1 <= size <= rows:
                raise InputError(f"batches: {name} has {rows} rows, and a batch of {size} does not fit.")

        def drawn(step: int) -> tuple[Any, Any]:
            generator = torch.Generator().manual_seed(derive(seed, "bilevel batches", step))
            below = [_rows(self.lower_rows, lower, generator) for _ in range(inner)]
            return (below if inner > 1 else below[0]), _rows(self.upper_rows, upper, generator)

        return drawn

    def solve_lower(
        self, theta: Tensors, start: Tensors | None = None, tol: float = 1e-6, max_steps: int = 2000
    ) -> Tensors:
        """Return the lower solution at theta, on all of the data, to a gradient of norm `tol`."""
        found = spectral_projected_gradient(
            lambda x: self.levels.lower_value_and_gradient(x, theta),
            self.x if start is None else start,
            None,
            tol,
            max_steps,
        )
        return found.point


def _rows(of: int, size: int | None, generator: torch.Generator) -> Tensor | None:
    return None if size is None else torch.randperm(of, generator=generator)[:size]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each example, [..., rows], for logits [..., rows, classes] with any leading dimensions."""
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, target, reduction="none")
    places = target[:, None].expand(*logits.shape[:-1], 1)
    return -logits.log_softmax(-1).gather(-1, places)[..., 0]


def taken(data: Tensor, rows: Tensor | None) -> Tensor:
    """Return these rows, or all."""
    return data if rows is None else data[rows]


def squared_norm(tensors: Tensors) -> Tensor:
    """Return the sum of all squares, 0-dim."""
    return dot(tensors, tensors)
