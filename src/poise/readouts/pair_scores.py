"""The readout of reward models: `model(ids, mask) -> one score for each answer`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from poise.errors import QuantityError
from poise.problem import ModelView
from poise.quantities import Quantities

__all__ = ["PairScores"]


class PairScores:
    """Offer the scores of both answers of a pair, from one pass over the two where they have one length.

    Reads `chosen_ids`, `chosen_mask`, `rejected_ids`, `rejected_mask` [batch, time] and offers `chosen_prediction` and
    `rejected_prediction` float [batch].
    """

    output = "chosen_prediction"

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        needed = [f"{side}_{column}" for side in ("chosen", "rejected") for column in ("ids", "mask")]
        missing = [name for name in needed if name not in batch]
        if missing:
            raise QuantityError(f"PairScores reads {', '.join(needed)}, and the batch lacks {', '.join(missing)}.")
        if batch["chosen_ids"].shape == batch["rejected_ids"].shape:
            batch.offer("_scores", partial(_both, model, batch))
            batch.offer("chosen_prediction", lambda: batch["_scores"][0])
            batch.offer("rejected_prediction", lambda: batch["_scores"][1])
        else:
            for side in ("chosen", "rejected"):
                batch.offer(f"{side}_prediction", partial(_one, model, batch, side))
        batch.put("model", model)
        return batch


def _both(model: ModelView, batch: Quantities) -> Any:
    ids, mask = (torch.cat([batch[f"chosen_{column}"], batch[f"rejected_{column}"]]) for column in ("ids", "mask"))
    return model(ids, mask).chunk(2)


def _one(model: ModelView, batch: Quantities, side: str) -> Any:
    return model(batch[f"{side}_ids"], batch[f"{side}_mask"])
