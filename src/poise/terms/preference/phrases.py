"""Phrases in which two answers differ: the same number 1, 2, ... marks a phrase's tokens in both of them.

`<side>_spans` int64 [batch, time] holds a token's phrase, and 0 (or a negative number) for none. How many phrases there are is
asked of the numbers themselves, never of the set of values in a batch: where every token belongs to a phrase there is no
background to leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import QuantityError

__all__ = ["check_spans", "phrase_sums"]

_MOST = 10_000


def check_spans(
    formula: str, chosen: Tensor, rejected: Tensor, chosen_mask: Tensor | None, rejected_mask: Tensor | None
) -> int:
    """Return the largest number of a phrase in a batch of pairs, 0 where there is none.

    Args:
        formula: whose messages these are.
        chosen, rejected: `<side>_spans` int64 [batch, time].
        chosen_mask, rejected_mask: bool [batch, time]; None leaves it unchecked whether phrases lie within the answers.

    Raises:
        QuantityError: a phrase stands in one answer alone, or on a token outside the answer, or numbers are not counted from 1.
    """
    for side, spans, mask in (("chosen", chosen, chosen_mask), ("rejected", rejected, rejected_mask)):
        if mask is not None and bool(((spans > 0) & ~mask).any()):
            row, time = ((spans > 0) & ~mask).nonzero()[0].tolist()
            raise QuantityError(
                f"{formula}: token {time} of the {side} answer in row {row} belongs to phrase {int(spans[row, time])}, and "
                f"'{side}_mask' says that it is no token of the answer. Phrases lie within the answer."
            )
    most = max((int(spans.max()) for spans in (chosen, rejected) if spans.numel()), default=0)
    if most > _MOST:
        raise QuantityError(f"{formula}: a phrase has the number {most}; number the phrases of each pair from 1.")
    if most <= 0:
        return 0
    here, there = (phrase_sums(torch.ones_like(spans), spans, most) > 0 for spans in (chosen, rejected))
    if bool((here != there).any()):
        row, phrase = (here != there).nonzero()[0].tolist()
        side, other = ("chosen", "rejected") if here[row, phrase] else ("rejected", "chosen")
        raise QuantityError(
            f"{formula}: phrase {phrase + 1} of row {row} stands in the {side} answer and not in the {other} one; a phrase has the "
            "same number in both. Where max_length cut it off, raise max_length or leave the pair out."
        )
    return most


def phrase_sums(x: Tensor, spans: Tensor, phrases: int) -> Tensor:
    """Sum over the tokens of each phrase, [batch, phrases], phrase 1 first.

    Args:
        x: [batch, time].
        spans: int64 [batch, time].
        phrases: the largest number.

    >>> phrase_sums(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[2, 0, 2]]), 2)
    tensor([[0., 5.]])
    """
    return x.new_zeros(len(x), phrases + 1).scatter_add(1, spans.clamp(min=0), x)[:, 1:]
