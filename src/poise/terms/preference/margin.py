"""The core of preference objectives: log-ratios, margins and divergences of token records.

An answer y earns the implicit reward

    r(y) = beta sum_t w_t [log pi(y_t) - log pi_ref(y_t)]                                  w_t = 1 where nothing is said

and most preference losses are a function of the margin r(chosen) - r(rejected). `PairedTerm` is that common part: it
computes the two log-ratios, hands them to the method's `loss`, and publishes margin, rewards and accuracy, so that a
method is its arguments and one line of mathematics:

    class Hinge(PairedTerm):
        '''Charge what a margin of one is missed by.'''

        formula = "my_hinge"

        def __init__(self, beta: float = 0.1) -> None:
            super().__init__()
            self.beta = beta

        def loss(self, pair):
            return torch.relu(1 - self.beta * (pair.chosen - pair.rejected))

`PreferenceMargin` is DPO with a weight for each token inside the logarithm; `TokenKL` is what the answers of the whole
vocabulary cost beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value
from poise.terms.preference.phrases import check_spans, phrase_sums
from poise.terms.sequences import sequence_sum

__all__ = ["Pair", "PairedTerm", "PreferenceMargin", "TokenKL", "answer_length", "log_ratio", "sequence_sum"]

TokenWeight = Literal["none", "data", "spans"]
Answer = tuple[Tensor | None, ...]
Reduction = Literal["sum", "sequence_mean", "token_mean"]
SIDES = ("chosen", "rejected", "response")
REDUCTIONS = ("sum", "sequence_mean", "token_mean")


# ---- sums over an answer --------------------------------------------------------------------------------------------


def log_ratio(
    logps: Tensor, reference: Tensor | None = None, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Sum the log-ratio of policy and reference over each answer: sum_t w_t [log pi(y_t) - log pi_ref(y_t)].

    Args:
        logps: float [batch, time] or [batch], under the policy.
        reference: the same under the reference, whose gradient is cut; None is a reference that gives every answer
            the same probability.
        mask, weight: as for `sequence_sum`.

    Returns: float [batch].
    """
    if reference is None:
        return sequence_sum(logps, mask, weight)
    reference = reference.detach()
    if logps.ndim == reference.ndim:  # token by token, before large sums cancel
        return sequence_sum(logps - reference, mask, weight)
    return sequence_sum(logps, mask, weight) - sequence_sum(reference, mask, weight)


def answer_length(mask: Tensor, like: Tensor) -> Tensor:
    """Count the tokens of each answer, at least 1, so that an empty answer is worth 0 and not NaN: float [batch]."""
    return mask.sum(-1).clamp(min=1).to(like.dtype)


def require_positive(formula: str, **arguments: float) -> None:
    """Raise an `InputError` that names the first argument that is not positive and finite."""
    for name, value in arguments.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{formula}: {name} must be positive, and it is {value}.")


def require_at_least_zero(formula: str, **arguments: float) -> None:
    """Raise an `InputError` that names the first argument that is negative or not finite."""
    for name, value in arguments.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"{formula}: {name} must be at least 0, and it is {value}.")


def require_one_of(formula: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise an `InputError` where a text is none of the allowed ones."""
    if value not in allowed:
        raise InputError(f"{formula}: {name} is one of {', '.join(map(repr, allowed))}, and it is {value!r}.")


# ---- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """What a method on pairs computes with.

    Attributes:
        chosen, rejected: (weighted) log-ratios summed over the answers, float [batch]; without a reference,
            log-probabilities.
        chosen_length, rejected_length: tokens of the answers, float [batch]; None where the method does not read masks.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """The pair with a function of both log-ratios in their place."""
        return Pair(function(self.chosen), function(self.rejected), self.chosen_length, self.rejected_length)

    @property
    def per_token(self) -> Pair:
        """The log-ratios divided by the lengths."""
        if self.chosen_length is None or self.rejected_length is None:
            raise InputError("A method that divides by lengths sets `lengths = True`.")
        return Pair(
            self.chosen / self.chosen_length,
            self.rejected / self.rejected_length,
            self.chosen_length,
            self.rejected_length,
        )


class PairedTerm(Term):
    """What losses on pairs of answers share; a method sets `beta` and writes `loss`.

    Class or instance attributes:
        beta: scale of the rewards; a method without one overrides `rewards`.
        reference_free: read no reference; log-ratios are then log-probabilities.
        lengths: whether `loss` uses the lengths, so that the masks are needed.
        token_weight: "none"; "data" weighs the tokens by `chosen_token_weight` and `rejected_token_weight`; "spans"
            counts the tokens within `chosen_spans` and `rejected_spans` alone.

    Reads: `chosen_logps` and `rejected_logps`, float [batch, time] each or summed [batch]; `reference_chosen_logps` and
        `reference_rejected_logps` likewise, without gradient; if offered, `chosen_mask` and `rejected_mask`.
    Returns: float [batch]; publishes `chosen_reward`, `rejected_reward`, `margin` (their difference), `weight`
        (sigma(-margin), how much of the pair's gradient is left) and `accuracy` (whether the chosen reward is larger),
        all float [batch].
    """

    formula = ""
    beta: float = 1.0
    reference_free: bool = False
    lengths: bool = False
    token_weight: TokenWeight = "none"

    def loss(self, pair: Pair) -> Tensor:
        """Return the values, float [batch]; -log sigma(margin) where a method says nothing else."""
        return -F.logsigmoid(self.margin(pair))

    def rewards(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Return the implicit rewards of the two answers, float [batch] each."""
        return self.beta * pair.chosen, self.beta * pair.rejected

    def margin(self, pair: Pair) -> Tensor:
        """Return r(chosen) - r(rejected), float [batch]."""
        chosen, rejected = self.rewards(pair)
        return chosen - rejected

    def gradient_weight(self, margin: Tensor) -> Tensor:
        """Return what is left of the pair's gradient at this margin, in (0, 1)."""
        return torch.sigmoid(-margin)

    def _unread(self) -> list[str]:
        unread = ["reference_{}_logps"] if self.reference_free else []
        unread += [] if self.token_weight == "data" else ["{}_token_weight"]
        return unread + ([] if self.token_weight == "spans" else ["{}_spans"])

    def readings(self) -> tuple[str, ...]:
        """The reference where the method has none, and the token weights where they are not asked for."""
        return tuple(name.format(side) for name in self._unread() for side in ("chosen", "rejected"))

    def requirements(self) -> tuple[str, ...]:
        """The reference where the method has one, the masks where it divides by lengths, the weights where it weighs."""
        optional = ["reference_{}_logps", "{}_token_weight", "{}_spans"]
        needed = [name for name in optional if name not in self._unread()] + (["{}_mask"] if self.lengths else [])
        return tuple(name.format(side) for name in needed for side in ("chosen", "rejected"))

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        chosen_token_weight: Tensor | None = None,
        rejected_token_weight: Tensor | None = None,
        chosen_spans: Tensor | None = None,
        rejected_spans: Tensor | None = None,
    ) -> Value:
        chosen = (chosen_logps, reference_chosen_logps, chosen_mask, chosen_token_weight, chosen_spans)
        rejected = (rejected_logps, reference_rejected_logps, rejected_mask, rejected_token_weight, rejected_spans)
        pair = self.pair(chosen, rejected)
        value = self.published(pair, self.loss(pair))
        if self.token_weight == "spans":
            value.extras.update(self.of_phrases(chosen, rejected))
        return value

    def pair(self, chosen: Answer, rejected: Answer) -> Pair:
        """Compute the log-ratios of two answers, each (logps, reference, mask[, token weight, spans])."""
        if not self.reference_free and (chosen[1] is None or rejected[1] is None):
            raise QuantityError(
                f"{self.formula} reads 'reference_chosen_logps' and 'reference_rejected_logps', and they were not offered."
            )
        masks = (chosen[2], rejected[2])
        if self.lengths and (masks[0] is None or masks[1] is None):
            raise QuantityError(
                f"{self.formula} divides by lengths: it reads 'chosen_mask' and 'rejected_mask', and they were not offered."
            )
        ratios = (_ratio_of(*chosen), _ratio_of(*rejected))
        if not self.lengths:
            return Pair(*ratios)
        return Pair(*ratios, *(answer_length(m, r) for m, r in zip(masks, ratios, strict=True) if m is not None))

    @torch.no_grad()
    def of_phrases(self, chosen: Answer, rejected: Answer) -> dict[str, Tensor]:
        """Return `phrase_margin` float [batch, phrases], 0 where a pair has fewer, and `without_phrase` float [batch].

        Raises:
            QuantityError: a phrase that stands in one answer alone or outside of it.
        """
        one, two = chosen[4], rejected[4]
        if one is None or two is None:
            raise QuantityError(f"{self.formula} reads 'chosen_spans' and 'rejected_spans', and they were not offered.")
        most = check_spans(self.formula, one, two, chosen[2], rejected[2])
        sums = []
        for (logps, reference, *_), own in ((chosen, one), (rejected, two)):
            assert logps is not None
            ratio = logps if self.reference_free or reference is None else logps - reference
            sums.append(phrase_sums(torch.where(own > 0, ratio, 0.0), own, most))
        margin = self.beta * (sums[0] - sums[1])
        return {"phrase_margin": margin, "without_phrase": (one <= 0).all(-1).to(margin.dtype)}

    def published(self, pair: Pair, values: Tensor) -> Value:
        """Return the values with the by-products that every term on pairs publishes."""
        with torch.no_grad():
            chosen_reward, rejected_reward = self.rewards(pair)
            margin = chosen_reward - rejected_reward
            extras = {
                "margin": margin,
                "chosen_reward": chosen_reward,
                "rejected_reward": rejected_reward,
                "weight": self.gradient_weight(margin),
                "accuracy": (margin > 0).to(margin.dtype),
            }
        return Value(values, extras=extras)


def _ratio_of(
    logps: Tensor | None,
    reference: Tensor | None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """The log-ratio of one answer, over its phrases alone where spans are given."""
    if logps is None:
        raise QuantityError("A pair needs the log-probabilities of both answers.")
    if spans is not None:
        if logps.ndim == 1:
            raise QuantityError(
                "Spans need a log-probability for each token, float [batch, time], and sums over the answers were offered."
            )
        mask = (spans > 0) if mask is None else mask & (spans > 0)
    return log_ratio(logps, reference, mask, weight)


class PreferenceMargin(PairedTerm):
    """Prefer the chosen answer by the margin of its weighted log-ratios: DPO with a weight for each token.

    -log sigma(u),   u = beta [sum_t w_t D_t(chosen) - sum_t w_t D_t(rejected)],   D_t = log pi(y_t) - log pi_ref(y_t)

    The weights stand inside the logarithm. With all of them 1 it is `dpo`; with spans it is DPO on the tokens in which
    the two answers differ, the ranking part of RRPO. Sums, no division by lengths.

    Args:
        beta: scale of the log-ratios, positive.
        token_weight: "none"; "data" reads `chosen_token_weight` and `rejected_token_weight` float [batch, time]; "spans"
            reads `chosen_spans` and `rejected_spans` int64 [batch, time] and counts the tokens in a phrase alone. Then the
            log-probabilities must be per token. A pair without any phrase has u = 0 and no gradient.
        reference_free: leave the reference out of D.

    Reads, returns and publishes: see `PairedTerm`; nats. With spans it also publishes `phrase_margin` float [batch, phrases], the
        summand of u that each phrase gives, and `without_phrase` float [batch], 1 for a pair without any.

    Raises:
        QuantityError: a phrase stands in one answer alone, or on a token outside the answer.

    Example:
        >>> zero = torch.zeros(1, 2)
        >>> term = PreferenceMargin(beta=1.0, token_weight="spans")
        >>> spans = torch.tensor([[0, 1]])
        >>> term(torch.tensor([[-5.0, 0.0]]), zero, zero, zero, chosen_spans=spans, rejected_spans=spans).values
        tensor([0.6931])

    Source: Rafailov et al., arXiv:2305.18290, eq. 7; arXiv:2504.12083 (spans); arXiv:2410.05102 (token weights).
    """

    formula = "preference_margin"
    equation: ClassVar[str] = (
        "-log sigma(beta (sum_t w_t D_t(chosen) - sum_t w_t D_t(rejected))),  D = log pi - log pi_ref"
    )
    source: ClassVar[str] = "arXiv:2305.18290, eq. 7; arXiv:2504.12083; arXiv:2410.05102"

    def __init__(self, beta: float = 0.1, token_weight: TokenWeight = "none", reference_free: bool = False) -> None:
        super().__init__()
        require_positive(self.formula, beta=beta)
        require_one_of(self.formula, "token_weight", token_weight, ("none", "data", "spans"))
        self.beta = beta
        self.token_weight = token_weight
        self.reference_free = reference_free


# ---- one side, token by token ---------------------------------------------------------------------------------------


class TokenTerm(Term):
    """What terms on the tokens of one answer share: which side they read, and how tokens become one value.

    A subclass sets `on_`, `reduction` and `token_weight`, names its quantities in `forward` with the side in front
    (`chosen_x`, `rejected_x`, `response_x`), all optional, and returns `self.reduced(...)`.

    "sum" and "sequence_mean" return a value for each answer, [batch], which the objective averages over answers;
    "token_mean" returns [batch, time] with the mask as count: one mean over all answer tokens of the batch, in which
    long answers weigh more. A token weight multiplies the value and never the count.
    """

    formula = ""
    column: str = "logps"
    """The column of the token record that is measured."""
    on_: str = "response"
    reduction: Reduction = "token_mean"
    token_weight: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        """The answers that are read."""
        return ("chosen", "rejected") if self.on_ == "both" else (self.on_,)

    def readings(self) -> tuple[str, ...]:
        """Everything of the other sides, and what this configuration has no use for."""
        named = inspect.signature(type(self).forward).parameters
        return tuple(name for name in list(named)[1:] if name not in self._read())

    def requirements(self) -> tuple[str, ...]:
        """What is measured, and the mask where a mean is taken."""
        spared = () if self.reduction != "sum" else tuple(f"{side}_mask" for side in self.sides)
        return tuple(name for name in self._read() if name not in spared)

    def _read(self) -> tuple[str, ...]:
        columns = (self.column, "mask", *(["token_weight"] if self.token_weight else []))
        return tuple(f"{side}_{column}" for side in self.sides for column in columns)

    @property
    def count(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        """Count answer tokens where the mean runs over tokens, and answers otherwise."""
        return self._count_tokens if self.reduction == "token_mean" else None

    def _count_tokens(
        self,
        response_mask: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        masks = {"response": response_mask, "chosen": chosen_mask, "rejected": rejected_mask}
        count = torch.cat([self._offered(masks[side], side, "mask") for side in self.sides], dim=-1).float()
        return count if sample_weight is None else count * sample_weight[:, None]

    def reduced(self, **sides: tuple[Tensor | None, Tensor | None, Tensor | None]) -> Tensor:
        """Reduce what is measured, its mask and its weight by side: float [batch], or [batch, time] for "token_mean"."""
        pieces = [self._reduce_side(side, *sides[side]) for side in self.sides]
        if self.reduction == "token_mean":
            return torch.cat(pieces, dim=-1)
        total = pieces[0] if len(pieces) == 1 else pieces[0] + pieces[1]
        return total / 2 if self.reduction == "sequence_mean" and len(pieces) == 2 else total

    def _reduce_side(self, side: str, x: Tensor | None, mask: Tensor | None, weight: Tensor | None) -> Tensor:
        x = self._offered(x, side, self.column)
        weight = self._offered(weight, side, "token_weight") if self.token_weight else None
        if self.reduction == "sum":
            return sequence_sum(x, mask, weight)
        mask = self._offered(mask, side, "mask")
        if self.reduction == "sequence_mean":
            return sequence_sum(x, mask, weight) / answer_length(mask, x)
        if x.ndim == 1:  # a sum is spread evenly over its tokens, so that the mean over tokens is what it would be
            x = (sequence_sum(x, mask, weight) / answer_length(mask, x))[:, None]
        return torch.where(mask, x if weight is None else x * weight, 0.0)

    def _offered(self, value: Tensor | None, side: str, column: str) -> Tensor:
        if value is None:
            raise QuantityError(f"{self.formula} reads '{side}_{column}', and it was not offered.")
        return value


class TokenKL(TokenTerm):
    """Hold the whole vocabulary near the reference at every token of an answer.

    sum_t KL(pi_ref(.|y_<t) || pi(.|y_<t))        "forward", reference first;        "reverse": sum_t KL(pi || pi_ref)

    Exact over the vocabulary at each step of a given answer, unlike the one-sample estimate from log-probabilities.
    No gradient flows into the reference.

    Args:
        on: "chosen", "rejected", "response" or "both" (chosen and rejected together: their sum for "sum", the mean of
            the two for "sequence_mean", all tokens of both for "token_mean").
        direction: "forward" or "reverse".
        reduction: "sum" over each answer, then the mean over answers (RRPO, TDPO); "sequence_mean": the mean over each
            answer first; "token_mean": one mean over all tokens.
        token_weight: weigh each token by `<side>_token_weight` float [batch, time].

    Reads: `<side>_kl` or `<side>_reverse_kl` float [batch, time]; `<side>_mask` bool [batch, time] (needed for the means).
    Returns: float [batch], or [batch, time] for "token_mean"; nats, >= 0 for weights >= 0.

    Example:
        >>> TokenKL(on="chosen")(chosen_kl=torch.tensor([[0.0, 0.25, 0.5]]))
        tensor([0.7500])

    Source: arXiv:2504.12083 (D_TKL); Zeng et al., arXiv:2404.11999 (sequential KL).
    """

    formula = "token_kl"
    equation: ClassVar[str] = "sum_t KL(pi_ref(.|y_<t) || pi(.|y_<t))"
    source: ClassVar[str] = "arXiv:2504.12083; arXiv:2404.11999"

    def __init__(
        self,
        on: Literal["chosen", "rejected", "response", "both"] = "chosen",
        direction: Literal["forward", "reverse"] = "forward",
        reduction: Reduction = "sum",
        token_weight: bool = False,
    ) -> None:
        super().__init__()
        require_one_of(self.formula, "on", on, (*SIDES, "both"))
        require_one_of(self.formula, "direction", direction, ("forward", "reverse"))
        require_one_of(self.formula, "reduction", reduction, REDUCTIONS)
        self.on_ = on
        self.direction = direction
        self.column = "kl" if direction == "forward" else "reverse_kl"
        self.reduction = reduction
        self.token_weight = token_weight

    def forward(
        self,
        response_kl: Tensor | None = None,
        response_reverse_kl: Tensor | None = None,
        response_mask: Tensor | None = None,
        response_token_weight: Tensor | None = None,
        chosen_kl: Tensor | None = None,
        chosen_reverse_kl: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        chosen_token_weight: Tensor | None = None,
        rejected_kl: Tensor | None = None,
        rejected_reverse_kl: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        rejected_token_weight: Tensor | None = None,
    ) -> Tensor:
        first = self.direction == "forward"
        return self.reduced(
            response=(response_kl if first else response_reverse_kl, response_mask, response_token_weight),
            chosen=(chosen_kl if first else chosen_reverse_kl, chosen_mask, chosen_token_weight),
            rejected=(rejected_kl if first else rejected_reverse_kl, rejected_mask, rejected_token_weight),
        )
