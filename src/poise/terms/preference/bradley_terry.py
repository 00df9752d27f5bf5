"""A reward model from preference pairs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.objective import Term, Value

__all__ = ["BradleyTerryPairs"]


class BradleyTerryPairs(Term):
    """Score the chosen answer above the rejected one: the likelihood of Bradley and Terry, for training a reward model.

    -log sigma(r+ - r-),    dl/dr+ = -sigma(r- - r+),    dl/dr- = sigma(r- - r+)

    The two gradients are equal and at most 1, whatever the scores: nothing of what `dpo` does to likelihoods (the three D's
    of `poise.insight.likelihood_dynamics`) can happen to a score.

    Reads: `chosen_prediction`, `rejected_prediction` float [batch], the model's scores (`poise.readouts.pair_scores.PairScores`
        makes them).
    Returns: float [batch], nats; publishes `margin`, `weight` and `accuracy`.

    Example:
        >>> BradleyTerryPairs()(torch.tensor([1.0]), torch.tensor([1.0])).values
        tensor([0.6931])

    Source: Bradley and Terry 1952; its part in arXiv:2406.07327, section 4: the contrast to DPO.
    """

    formula = "bradley_terry"
    equation: ClassVar[str] = "-log sigma(r(chosen) - r(rejected))"
    source: ClassVar[str] = "Bradley and Terry, Biometrika 1952; arXiv:2406.07327"
    expects: ClassVar[dict[str, str]] = {"chosen_prediction": "float [batch]", "rejected_prediction": "float [batch]"}

    def forward(self, chosen_prediction: Tensor, rejected_prediction: Tensor) -> Value:
        margin = chosen_prediction - rejected_prediction
        seen = margin.detach()
        return Value(
            -F.logsigmoid(margin),
            extras={"margin": seen, "weight": torch.sigmoid(-seen), "accuracy": (seen > 0).to(seen.dtype)},
        )
