"""Preferring by the phrases in which two answers differ, held to the reference token by token (RRPO), and its relatives.

    rrpo = preference_margin(token_weight='spans') + alpha token_kl(on='chosen')

DPO on whole answers punishes every token of a long answer for a few wrong words, and drifts. The margin of RRPO counts the
tokens of differing phrases alone, and a divergence over the whole vocabulary holds all the others.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.coefficient import Coefficient, Number
from poise.errors import QuantityError
from poise.objective import Objective, Value
from poise.terms.preference.margin import (
    Answer,
    Pair,
    PairedTerm,
    PreferenceMargin,
    TokenKL,
    require_at_least_zero,
    require_one_of,
    require_positive,
)
from poise.terms.preference.phrases import check_spans, phrase_sums

__all__ = ["RRPO", "PhraseMargin", "SegmentMargin"]


def RRPO(
    beta: float = 0.1,
    alpha: Number | Coefficient = 0.01,
    margin: Literal["spans", "answer", "phrases", "segments"] = "spans",
    kl: Literal["forward", "reverse"] = "forward",
    gamma: float = 5.0,
) -> Objective:
    """Rank two answers by their differing phrases, and hold the chosen one to the reference: a margin + alpha*token_kl.

    -log sigma(u) + alpha sum_t KL(pi_ref(.|y+_<t) || pi(.|y+_<t))

    u = beta [sum over phrases of D_t(chosen) - the same of rejected],   D = log pi - log pi_ref

    Both are sums over tokens, so alpha weighs more on long answers. It is a weight like any other and may be scheduled, searched
    or driven by a budget of KL. A pair without phrases has u = 0 and keeps its divergence.

    Args:
        beta: scale of the log-ratios, positive. The authors use 0.1 to 0.9.
        alpha: weight of the divergence, at least 0, or a coefficient. The authors use 0.01 to 0.1; 0 leaves DPO on the phrases.
        margin: what is ranked. "spans": the phrases. "answer": all tokens, RRPO without spans, and DPO where alpha is 0.
            "phrases": each phrase in a sigmoid of its own (DPA, then with the reference). "segments": all tokens, those of phrases
            gamma times as heavy, divided by the weight of the answer (DDPO).
        kl: "forward", reference first, or "reverse".
        gamma: for margin="segments", positive.

    Returns: the sum; `preference_margin` publishes `margin`, `phrase_margin` and `without_phrase`, the value of `token_kl` is the
        divergence.

    Raises:
        InputError: an argument outside of what is said above.

    Example:
        >>> str(RRPO())
        "preference_margin(token_weight='spans') + 0.01*token_kl"

    Source: Sarkar et al., arXiv:2504.12083; pritamqu/RRPO.
    """
    require_positive("rrpo", beta=beta, gamma=gamma)
    if isinstance(alpha, Number):
        require_at_least_zero("rrpo", alpha=alpha)
    require_one_of("rrpo", "margin", margin, ("spans", "answer", "phrases", "segments"))
    require_one_of("rrpo", "kl", kl, ("forward", "reverse"))
    ranked: PairedTerm
    if margin == "phrases":
        ranked = PhraseMargin(beta=beta, reference_free=False)
    elif margin == "segments":
        ranked = SegmentMargin(beta=beta, gamma=gamma)
    else:
        ranked = PreferenceMargin(beta=beta, token_weight="spans" if margin == "spans" else "none")
    return 1 * ranked + alpha * TokenKL(on="chosen", direction=kl)


class PhraseMargin(PairedTerm):
    """Prefer each phrase of the chosen answer to its counterpart in the rejected one: one sigmoid a phrase.

    mean over phrases i of  -log sigma(beta [sum_{t in i} D_t(chosen) - sum_{t in i} D_t(rejected)])

    Without a reference and with beta = 1 this is -log pi(y_i+) / (pi(y_i+) + pi(y_i-)), the phrase-level part of DPA, to which
    DPA adds `token_kl` on other data. A pair without phrases is worth log 2 and has no gradient.

    Args:
        beta: scale, positive.
        reference_free: D is log pi; otherwise log pi - log pi_ref.

    Reads: `chosen_logps`, `rejected_logps`, `chosen_spans`, `rejected_spans` [batch, time]; the references where there are some.
    Returns: float [batch], nats; publishes as `preference_margin` does.

    Example:
        >>> spans = torch.tensor([[0, 1]])
        >>> logps = torch.tensor([[-5.0, -1.0]]), torch.tensor([[-1.0, -1.0]])
        >>> PhraseMargin()(*logps, chosen_spans=spans, rejected_spans=spans).values
        tensor([0.6931])

    Source: Sarkar et al., arXiv:2405.18654 (DPA; the mean over phrases is from memory).
    """

    formula = "phrase_margin"
    equation: ClassVar[str] = "mean_i -log sigma(beta (sum_{t in i} D_t(chosen) - sum_{t in i} D_t(rejected)))"
    source: ClassVar[str] = "arXiv:2405.18654"

    def __init__(self, beta: float = 1.0, reference_free: bool = True) -> None:
        super().__init__()
        require_positive(self.formula, beta=beta)
        self.beta = beta
        self.reference_free = reference_free
        self.token_weight = "spans"

    def forward(  # type: ignore[override]
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        chosen_spans: Tensor,
        rejected_spans: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
    ) -> Value:
        chosen = (chosen_logps, reference_chosen_logps, chosen_mask, None, chosen_spans)
        rejected = (rejected_logps, reference_rejected_logps, rejected_mask, None, rejected_spans)
        pair = self.pair(chosen, rejected)
        most = check_spans(self.formula, chosen_spans, rejected_spans, chosen_mask, rejected_mask)
        u = self.beta * (_of_phrases(chosen, most) - _of_phrases(rejected, most))
        there = phrase_sums(torch.ones_like(chosen_spans), chosen_spans, most) > 0
        losses = torch.where(there, -F.logsigmoid(u), 0.0).sum(-1) / there.sum(-1).clamp(min=1)
        value = self.published(pair, torch.where(there.any(-1), losses, -F.logsigmoid(u.new_zeros(()))))
        value.extras.update(self.of_phrases(chosen, rejected))
        return value


class SegmentMargin(PairedTerm):
    """DPO in which the tokens of differing phrases weigh gamma times as much, divided by the weight of the answer (DDPO).

    -log sigma(beta [s(chosen) - s(rejected)]),   s(y) = sum_t w_t D_t / sum_t w_t,   w = gamma in a phrase, 1 elsewhere

    Args:
        beta: scale, positive.
        gamma: weight of a phrase's token, positive; 1 is DPO on means over tokens.

    Reads: what `dpo` reads, both masks, `chosen_spans` and `rejected_spans` [batch, time].
    Returns and publishes: as `preference_margin`.

    Source: Yu et al., arXiv:2312.00849 (RLHF-V, dense DPO).
    """

    formula = "segment_margin"
    equation: ClassVar[str] = (
        "-log sigma(beta (s(chosen) - s(rejected))),  s = sum_t w_t D_t / sum_t w_t,  w = gamma or 1"
    )
    source: ClassVar[str] = "arXiv:2312.00849"

    def __init__(self, beta: float = 0.5, gamma: float = 5.0) -> None:
        super().__init__()
        require_positive(self.formula, beta=beta, gamma=gamma)
        self.beta = beta
        self.gamma = gamma
        self.token_weight = "spans"

    def requirements(self) -> tuple[str, ...]:
        """What spans need, and the masks: the weight of an answer is that of its tokens."""
        return (*super().requirements(), "chosen_mask", "rejected_mask")

    def pair(self, chosen: Answer, rejected: Answer) -> Pair:
        """Compute the weighted means of the log-ratios."""
        return super().pair(self._weighted("chosen", chosen), self._weighted("rejected", rejected))

    def _weighted(self, side: str, answer: Answer) -> Answer:
        logps, reference, mask, _, spans = answer
        if mask is None or spans is None or logps is None:
            raise QuantityError(f"{self.formula} reads '{side}_mask' and '{side}_spans', and they were not offered.")
        w = torch.where(spans > 0, self.gamma, 1.0).to(logps.dtype) * mask
        return (logps, reference, mask, w / w.sum(-1, keepdim=True).clamp(min=1e-12))


def _of_phrases(answer: Answer, phrases: int) -> Tensor:
    """The log-ratio of each phrase, [batch, phrases]."""
    logps, reference, mask, _, spans = answer
    assert logps is not None
    assert spans is not None
    ratio = logps if reference is None else logps - reference.detach()
    return phrase_sums(ratio if mask is None else torch.where(mask, ratio, 0.0), spans, phrases)
