"""Safety recovery: examples that teach a model to turn back to its refusal however far a bad answer has gone.

A refusal that lives in the first few tokens is lost once these are forced. `recovery_pairs` puts the first k tokens of a
harmful answer behind the prompt and then the refusal, which alone is learned:

    prompt + harmful[:k] + refusal,      k = 0 with probability p_zero, else uniform on 1 .. min(k_max, |harmful|)

Half of the examples (k = 0) are plain refusals. So that the model stays what it is elsewhere, they are mixed with an anchor,
ordinary prompts with answers of the model itself, by weights that stand in the formula:

    poise.fit(model, "0.2*sft.on('recovery') + 0.8*sft.on('anchor')", {"recovery": recovery, "anchor": anchor}, ...)

Each stream is averaged over its own tokens first, so the shares are 0.2 and 0.8 whatever the lengths. `Recovery` draws new k
in every step, as a stream's `transform`. Nothing here calls a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["Recovery", "pad_sides", "recovery_pairs"]

Tokens = Sequence[int] | Tensor
Batch = dict[str, Any]
_SIDES = ("prompt", "harmful", "refusal")


@dataclass(frozen=True)
class Recovery:
    """Make recovery examples of each batch anew: the transform of a stream.

    The batch must hold `<side>_ids` int64 [batch, time] and `<side>_mask` bool [batch, time] (True on tokens, False on padding)
    for the sides `prompt`, `harmful` and `refusal`; `pad_sides` makes them. They are replaced by `response_ids`,
    `response_attention`, `response_mask`, `response_positions` and `recovery_depth` int64 [batch], the k that was drawn; all
    else stays.

    Args:
        p_zero: probability of a plain refusal, k = 0, in [0, 1]; 1/2 in the paper.
        k_max: most harmful tokens, at least 1; 100 in the paper, and more protects more.
        pad: token id that fills rows up.
        side: where the padding goes, "right" or "left".

    Example:
        >>> data = pad_sides(prompt=[[1, 2]], harmful=[[3, 4, 5]], refusal=[[8, 9]])
        >>> batch = Recovery(p_zero=0.0, k_max=1)(data, torch.Generator().manual_seed(0))
        >>> batch["response_ids"], batch["response_mask"].int()
        (tensor([[1, 2, 3, 8, 9]]), tensor([[0, 0, 0, 1, 1]], dtype=torch.int32))

    Source: arXiv:2406.05946, section 3.1; Unispac/shallow-vs-deep-alignment, trainer.py.
    """

    p_zero: float = 0.5
    k_max: int = 100
    pad: int = 0
    side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if not 0 <= self.p_zero <= 1:
            raise InputError(f"Recovery: p_zero is a probability, and it is {self.p_zero}.")
        if self.k_max < 1:
            raise InputError(
                f"Recovery: k_max must be at least 1, and it is {self.k_max}. For plain refusals set p_zero=1."
            )
        if self.side not in ("right", "left"):
            raise InputError(f"Recovery: side is 'right' or 'left', and it is {self.side!r}.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        for name in [f"{side}_{part}" for side in _SIDES for part in ("ids", "mask")]:
            if name not in batch:
                raise InputError(
                    f"Recovery reads {name!r}, and the batch has {', '.join(sorted(batch))}. See pad_sides."
                )
        ids = torch.cat([batch[f"{side}_ids"] for side in _SIDES], dim=1)
        prompt, harmful, refusal = (batch[f"{side}_mask"] for side in _SIDES)
        for side, mask in (("harmful", harmful), ("refusal", refusal)):
            # A harmful answer may be missing where every example is a plain refusal.
            if ids.device.type == "cpu" and not mask.any(1).all() and (side == "refusal" or self.p_zero < 1):
                row = int((~mask.any(1)).nonzero()[0])
                raise InputError(f"Recovery: the {side} answer of row {row} is empty.")
        k = self._depths(harmful.sum(1), generator)
        opening = harmful & (harmful.cumsum(1) <= k[:, None])
        learned = torch.cat([torch.zeros_like(prompt), torch.zeros_like(harmful), refusal], dim=1)
        made = _close_up(ids, torch.cat([prompt, opening, refusal], dim=1), learned, self.pad, self.side)
        taken = {f"{side}_{part}" for side in _SIDES for part in ("ids", "mask")}
        return {**{name: value for name, value in batch.items() if name not in taken}, **made, "recovery_depth": k}

    def _depths(self, lengths: Tensor, generator: torch.Generator) -> Tensor:
        """Draw k: 0 with probability p_zero, else uniform on 1 .. min(k_max, length)."""
        draws = torch.rand(2, len(lengths), generator=generator, device=generator.device).to(lengths.device)
        most = lengths.clamp(max=self.k_max)
        k = (draws[1] * most).long().clamp(max=most - 1) + 1
        return torch.where(draws[0] < self.p_zero, 0, k)


def recovery_pairs(
    prompt: Sequence[Tokens],
    harmful: Sequence[Tokens],
    refusal: Sequence[Tokens],
    p_zero: float = 0.5,
    k_max: int = 100,
    generator: torch.Generator | None = None,
    *,
    pad: int = 0,
    side: Literal["right", "left"] = "right",
) -> dict[str, Tensor]:
    """Draw one recovery example for each triplet of prompt, harmful answer and refusal.

    prompt + harmful[:k] + refusal,   k = 0 with probability p_zero, else uniform on 1 .. min(k_max, |harmful|)

    Args:
        prompt, harmful, refusal: token ids, one sequence an example; the refusal ends with the token that ends an answer.
        p_zero: probability of k = 0, in [0, 1].
        k_max: most harmful tokens that are kept, at least 1.
        generator: where k is drawn; equal generators give equal examples. None draws from seed 0.
        pad, side: token id that fills rows up, and where: "right" or "left".

    Returns: data of a stream, by name: `response_ids` int64 [examples, time] with prompt, opening and refusal;
        `response_attention` bool, False on padding; `response_mask` bool, True on the refusal alone;
        `response_positions` int64, from 0 at the first token of the refusal,
        -1 outside; `recovery_depth` int64 [examples], the k that was drawn. `Recovery` draws k anew in every step.

    Raises:
        InputError: an argument out of range, sides of different length, or an empty answer.

    Example:
        >>> pairs = recovery_pairs([[1, 2]], [[3, 4, 5]], [[8, 9]], p_zero=0.0, k_max=1)
        >>> pairs["response_ids"].tolist(), pairs["recovery_depth"].tolist()
        ([[1, 2, 3, 8, 9]], [1])

    Source: arXiv:2406.05946, section 3.1 (p_zero = 1/2, k_max = 100, 256 triplets, weight 0.2 beside an anchor of 0.8).
    """
    draw = Recovery(p_zero, k_max, pad, side)
    data = pad_sides(prompt=prompt, harmful=harmful, refusal=refusal, pad=pad)
    return draw(data, generator if generator is not None else torch.Generator().manual_seed(0))


def pad_sides(*, pad: int = 0, **sides: Sequence[Tokens]) -> dict[str, Tensor]:
    """Bring ragged token ids into `<side>_ids` int64 [examples, time] and `<side>_mask` bool, padded on the right.

    Args:
        pad: token id of the padding.
        sides: sequences of token ids by the name of the side, all with one entry an example.

    Raises:
        InputError: the sides differ in the number of examples, or there is none.

    >>> pad_sides(prompt=[[1], [2, 3]])["prompt_mask"].tolist()
    [[True, False], [True, True]]
    """
    counts = {name: len(rows) for name, rows in sides.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values())):
        raise InputError(f"Every side needs one sequence of token ids an example, and the numbers are {counts}.")
    padded = {}
    for name, rows in sides.items():
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, pad)
        ids[mask] = torch.cat([torch.as_tensor(row, dtype=torch.int64).flatten() for row in rows])
        padded[f"{name}_ids"], padded[f"{name}_mask"] = ids, mask
    return padded


def _close_up(ids: Tensor, keep: Tensor, learned: Tensor, pad: int, side: str) -> dict[str, Tensor]:
    """Drop what is not kept and move the rest together, without a loop over rows."""
    length = int(keep.sum(1).max())
    # A stable sort by "dropped" brings the kept tokens to one end in their order.
    order = (~keep if side == "right" else keep).to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, :length] if side == "right" else order[:, order.shape[1] - length :]
    kept = keep.gather(1, order)
    mask = learned.gather(1, order) & kept
    return {
        "response_ids": ids.gather(1, order).masked_fill(~kept, pad),
        "response_attention": kept,
        "response_mask": mask,
        "response_positions": torch.where(mask, mask.cumsum(1) - 1, -1),
    }
