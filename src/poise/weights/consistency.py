"""How far two scorers rank the same answers alike: a rate in [0, 1] for each prompt, all prompts at once.

A model that labels its own preferences cannot tell its noise from its knowledge. Another model, such as the one of the
round before, disagrees where the order is noise, so the rate of agreement C is how far a pair's label can be trusted:
`soft_dpo` reads it as `preference_label`.

    C = (tau + 1)/2,   tau = (concordant - discordant) / sqrt((pairs - tied in a) (pairs - tied in b))

Source: Wang et al., arXiv:2410.12735, section 4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["label_of_strength", "rank_consistency", "rank_correlation"]

Method = Literal["kendall", "spearman", "top_order"]
Ties = Literal["a", "b"]
METHODS = ("kendall", "spearman", "top_order")
_AT_A_TIME = 1 << 22
"""Comparisons of two answers that exist at once."""


def rank_consistency(
    scores_a: Tensor, scores_b: Tensor, method: Method = "kendall", ties: Ties = "b", mask: Tensor | None = None
) -> Tensor:
    """Return for each prompt how far two scorers agree on the order of its answers, C in [0, 1].

    C = (correlation + 1)/2: 1 for the same order, 1/2 for unrelated ones, 0 for the reverse.

    Args:
        scores_a, scores_b: float [prompts, answers], at least two answers; only their order counts.
        method: "kendall" counts pairs of answers; "spearman" correlates mean ranks; "top_order" is 1 where both find the
            same answers best and the same worst, and 0 elsewhere.
        ties: of Kendall: "b" leaves tied pairs out of the denominator, "a" keeps them.
        mask: bool [prompts, answers], False where an answer is missing; its scores may then be anything.

    Returns: [prompts], without gradient, in the scores' dtype; NaN where C is undefined: fewer than two answers, or all
        of them tied for one of the scorers.

    Raises:
        InputError: shapes that differ, fewer than two answers, an unknown method, or a score that is NaN.

    Example:
        >>> now, before = torch.tensor([[-1.2, 0.3, 0.9, -0.4, 2.1]]), torch.tensor([[-0.8, 0.5, 0.1, -1.5, 1.0]])
        >>> rank_consistency(now, before)
        tensor([0.8000])

    Source: Wang et al., arXiv:2410.12735, eq. 8 to 10.
    """
    if method == "top_order":
        a, b, present = _checked(scores_a, scores_b, mask)
        return _top_order(a, b, present).to(_dtype(scores_a))
    return (rank_correlation(scores_a, scores_b, method, ties, mask) + 1) / 2


def rank_correlation(
    scores_a: Tensor, scores_b: Tensor, method: Method = "kendall", ties: Ties = "b", mask: Tensor | None = None
) -> Tensor:
    """Return the rank correlation of two scorers for each prompt, in [-1, 1]: Kendall's tau or Spearman's rho.

    Args, returns and raises: as `rank_consistency`; "top_order" is no correlation.

    Example:
        >>> rank_correlation(torch.tensor([[1.0, 1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0, 3.0]]))
        tensor([0.8000])
    """
    if method not in ("kendall", "spearman"):
        raise InputError(f"rank_consistency: method is one of {', '.join(map(repr, METHODS))}, and it is {method!r}.")
    if ties not in ("a", "b"):
        raise InputError(f"rank_consistency: ties is 'a' or 'b', and it is {ties!r}.")
    a, b, present = _checked(scores_a, scores_b, mask)
    rows = max(1, _AT_A_TIME // a.shape[1] ** 2)
    parts = zip(torch.split(a, rows), torch.split(b, rows), torch.split(present, rows), strict=True)
    found = [_kendall(x, y, p, ties) if method == "kendall" else _spearman(x, y, p) for x, y, p in parts]
    return torch.cat(found).to(_dtype(scores_a))


def label_of_strength(strength: float) -> float:
    """Return the label C to which a penalty lambda on the KL of uniform and predicted preferences amounts.

    C = (2 + lambda) / (2 (1 + lambda)), from 1 without a penalty down to 1/2: the loss is then (1 + lambda) `soft_dpo`
    with this label, up to a constant. A measured rate may fall below 1/2 and turn the label round; this one does not.

    Raises:
        InputError: a negative strength.

    Source: arXiv:2410.12735, section 4.
    """
    if not 0 <= strength < float("inf"):
        raise InputError(f"label_of_strength: lambda must be at least 0 and finite, and it is {strength}.")
    return (2 + strength) / (2 * (1 + strength))


def _checked(scores_a: Tensor, scores_b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if scores_a.ndim != 2 or scores_a.shape != scores_b.shape:
        raise InputError(
            "rank_consistency compares scores of one form, float [prompts, answers], and they are "
            f"{list(scores_a.shape)} and {list(scores_b.shape)}."
        )
    if scores_a.shape[1] < 2:
        raise InputError(
            f"rank_consistency: an order needs at least two answers to each prompt, and there is {scores_a.shape[1]}."
        )
    if mask is not None and mask.shape != scores_a.shape:
        raise InputError(f"rank_consistency: mask is bool {list(scores_a.shape)}, and it is {list(mask.shape)}.")
    a, b = scores_a.detach(), scores_b.detach()
    present = torch.ones_like(a, dtype=torch.bool) if mask is None else mask.bool()
    if bool(((a.isnan() | b.isnan()) & present).any()):
        raise InputError("rank_consistency: a score is NaN; leave a missing answer out with mask=...")
    return a, b, present


def _dtype(scores: Tensor) -> torch.dtype:
    return scores.dtype if scores.is_floating_point() else torch.get_default_dtype()


def _kendall(a: Tensor, b: Tensor, present: Tensor, ties: Ties) -> Tensor:
    i, j = torch.triu_indices(a.shape[1], a.shape[1], offset=1, device=a.device)
    both = present[:, i] & present[:, j]
    # Signs by comparison: a difference of infinities is no number.
    sign_a, sign_b = (((x[:, i] > x[:, j]).to(torch.int8) - (x[:, i] < x[:, j]).to(torch.int8)) * both for x in (a, b))
    concordance = (sign_a * sign_b).sum(1, dtype=torch.float64)
    untied_a, untied_b = (s.abs().sum(1, dtype=torch.float64) for s in (sign_a, sign_b))
    scale = (untied_a * untied_b).sqrt() if ties == "b" else both.sum(1, dtype=torch.float64)
    undefined = (untied_a == 0) | (untied_b == 0)
    return torch.where(undefined, torch.nan, concordance / scale)


def _spearman(a: Tensor, b: Tensor, present: Tensor) -> Tensor:
    rank_a, rank_b = _centred_ranks(a, present), _centred_ranks(b, present)
    # Integers twice the ranks, so ties give 0 exactly and 0/0 is the NaN that is meant.
    scale = (rank_a.square().sum(1) * rank_b.square().sum(1)).sqrt()
    return (rank_a * rank_b).sum(1) / scale


def _centred_ranks(x: Tensor, present: Tensor) -> Tensor:
    """Twice each answer's mean rank less the mean of all: how many it beats less how many beat it."""
    both = present[:, :, None] & present[:, None, :]
    wins = ((x[:, :, None] > x[:, None, :]) & both).sum(2, dtype=torch.float64)
    losses = ((x[:, :, None] < x[:, None, :]) & both).sum(2, dtype=torch.float64)
    return wins - losses


def _top_order(a: Tensor, b: Tensor, present: Tensor) -> Tensor:
    defined = torch.ones(len(a), dtype=torch.bool, device=a.device)
    agrees = defined.clone()
    ends = []
    for x in (a, b):
        low, high = x.masked_fill(~present, torch.inf), x.masked_fill(~present, -torch.inf)
        best, worst = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
        defined &= (best > worst)[:, 0]
        ends.append(((x == best) & present, (x == worst) & present))
    for one, other in zip(*ends, strict=True):
        agrees &= (one == other).all(1)
    return torch.where(defined, agrees.double(), torch.nan)
