"""Hyper-cleaning: a weight for every training example, so that what is learned from them is right on a few clean ones.

    lower(w, lambda) = mean_i sigma(lambda_i) cross_entropy(w; x_i, y_i) + decay ||w||^2        40 % of the y_i are wrong
    upper(w) = mean over clean validation examples of cross_entropy(w)

500 of scikit-learn's digits to train, 300 clean ones to judge, 997 to test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poise.data.label_noise import flip_labels
from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.bilevel.task import BilevelTask, cross_entropy, taken
from poise.tasks.embedded import EMBEDDED
from poise.weights.bilevel.levels import Levels, Tensors
from poise.weights.per_sample import PerSampleWeight


@dataclass(frozen=True, kw_only=True)
class HyperCleaning(BilevelTask):
    """A cleaning task, and what training without it gives.

    Attributes:
        wrong: bool [train], the labels that are wrong; for the verdict alone.
    """

    wrong: Tensor

    def reference(self, kind: Literal["uniform", "clean"]) -> dict[str, float]:
        """Return the scores of training on everything with equal weights, or on the rightly labelled examples alone."""
        if kind not in ("uniform", "clean"):
            raise InputError(f"hyper_cleaning: a reference is 'uniform' or 'clean', and it is {kind!r}.")
        # sigma(40) = 1 and sigma(-40) = 0, and the mean runs over all: so the decay is that of the share that is left.
        full = torch.full_like(self.theta[0], 40.0)
        raw = full if kind == "uniform" else torch.where(self.wrong, -full, full)
        return self.scores(self.solve_lower((raw,)), (raw,))


def hyper_cleaning(
    seed: int = 0,
    *,
    train: int = 500,
    validation: int = 300,
    noise: float = 0.4,
    start: float = 0.0,
    decay: float = 1e-3,
    hidden: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> HyperCleaning:
    """Return the cleaning of digits with wrong labels.

    Args:
        seed: of split, noise and initial weights.
        train, validation: examples of each; the rest of the 1,797 tests.
        noise: share of the training labels that are replaced by another class, in [0, 1].
        start: of every lambda.
        decay: of the squared norm of the weights.
        hidden: width of a hidden layer (tanh); None is softmax regression with an intercept.
        dtype: of data and variables.
    """
    digits = EMBEDDED["digits"]()
    inputs, labels = digits.inputs.to(dtype), digits.target
    if train + validation >= len(labels):
        raise InputError(f"hyper_cleaning: {train} + {validation} of {len(labels)} digits leave none to test.")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive(seed, "split")))
    parts = torch.split(order, [train, validation, len(labels) - train - validation])
    data = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=dtype)], 1)
    (x0, x1, x2), (y0, y1, y2) = (tuple(source[p] for p in parts) for source in (data, labels))
    flipped = flip_labels(y0, noise, include_own=False, seed=derive(seed, "noise"), classes=10)
    weight = PerSampleWeight(train, init=start, dtype=dtype)

    def logits(w: Tensors, x: Tensor) -> Tensor:
        if hidden is None:
            return torch.matmul(x, w[0])
        return torch.matmul(torch.tanh(x @ w[0]), w[1][..., :-1, :]) + w[1][..., -1:, :]

    def lower(w: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        weights = weight(rows, theta[0])
        losses = cross_entropy(logits(w, taken(x0, rows)), taken(flipped.target, rows))
        penalty = torch.stack([t.square().sum((-2, -1)) for t in w]).sum(0)
        value: Tensor = (weights * losses).mean(-1) + decay * penalty
        return value

    def upper(w: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return cross_entropy(logits(w, taken(x1, rows)), taken(y1, rows)).mean(-1)

    def scores(w: Tensors, theta: Tensors) -> dict[str, float]:
        with torch.no_grad():
            hits = (logits(w, x2).argmax(-1) == y2).double().mean()
            return {
                "accuracy": float(hits),
                "validation loss": float(upper(w, theta, None)),
                "auroc": _auroc(-theta[0], flipped.wrong),
            }

    return HyperCleaning(
        levels=Levels(lower, upper, names=("example weights",)),
        x=_weights(hidden, seed, dtype),
        theta=(weight.raw.clone(),),
        lower_rows=train,
        upper_rows=validation,
        scores=scores,
        note=f"{train} digits, {float(flipped.wrong.double().mean()):.0%} wrong labels; {validation} clean; {len(y2)} to test",
        wrong=flipped.wrong,
    )


def _weights(hidden: int | None, seed: int, dtype: torch.dtype) -> Tensors:
    if hidden is None:
        return (torch.zeros(65, 10, dtype=dtype),)
    generator = torch.Generator().manual_seed(derive(seed, "weights"))
    first = torch.randn(65, hidden, generator=generator, dtype=torch.float64) / math.sqrt(65)
    second = torch.randn(hidden + 1, 10, generator=generator, dtype=torch.float64) / math.sqrt(hidden)
    return first.to(dtype), second.to(dtype)


def _auroc(score: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive example scores above a negative one, ties counted half; NaN without both."""
    if not bool(positive.any()) or bool(positive.all()):
        return math.nan
    above, below = score[positive][:, None], score[~positive]
    return float(((above > below).double() + 0.5 * (above == below).double()).mean())
