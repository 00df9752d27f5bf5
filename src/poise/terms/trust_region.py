"""A trust region for every token: fine-tune without moving the first tokens of an answer far from a reference.

A language model that was aligned refuses mostly by its first few tokens, so fine-tuning that moves these undoes the
alignment. The term is cross-entropy with a brake on each token, the stronger the larger its beta:

    token_trust_region      -(2 / beta_t) log sigmoid(beta_t D_t),     D_t = log pi(y_t) - log pi_ref(y_t)

Its gradient is that of cross-entropy times w_t = 2 sigmoid(-beta_t D_t). At the reference w_t = 1; a token that became
likelier than under the reference is pushed less, one that fell below it more, up to twice. beta = 0 is cross-entropy;
beta = inf is 2 max(-D_t, 0), which only brings back what fell below the reference.

The brake acts once a token has moved, never at the reference itself. A linear warm-up over the first ten steps is
therefore part of the method: `lr_schedule=linear(0, 1, steps=10)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value

__all__ = ["TokenTrustRegion"]

Beta = float | str | tuple[float | str, ...]
BY_TOKEN = "token_weight"
_REDUCTIONS = ("token_mean", "sequence_mean", "sum")


class TokenTrustRegion(Term):
    """Cross-entropy whose push on each token fades as the token becomes likelier than under a frozen reference.

    -(2 / beta_t) log sigmoid(beta_t D_t),   D_t = log pi(y_t) - log pi_ref(y_t),   gradient  -w_t d log pi(y_t),
    w_t = 2 sigmoid(-beta_t D_t)

    `t` counts from the first token of the answer, wherever the answer stands in the row. The first token has a weaker
    brake than the four after it: its loss is high at first, and a strong one would hold it at once.

    Args:
        beta: brake of the first tokens, at least 0: one number for each place, from the first; one number for all tokens
            (`rest` is then not used); or "token_weight", which reads beta from the quantity `response_token_weight`. 'inf'
            may stand for a number. The paper's ablations are `beta=0.1` (uniform), `(2, 2, 2, 2, 2)` (no exception for the
            first token), and longer or shorter tuples.
        rest: brake of all later tokens, at least 0.
        form: "surrogate" has the values -w_t log pi(y_t), w_t held constant, as the authors' code; "exact" the values of the
            equation. The gradients are equal where `floor` does not act, the values are not: watch `cross_entropy`.
        floor: smallest w_t of the surrogate, in [0, 1). It keeps a token learning, slowly, that has moved far; the exact form
            has none.
        reduction: "token_mean" over all answer tokens of the step, as the authors' code; "sequence_mean", the mean over
            examples of each answer's mean; "sum", the mean over examples of each answer's sum, which is the equation.

    Reads: `response_logps` and `reference_response_logps` float [batch, time], nats, never positive; `response_mask` bool
        [batch, time]; `response_positions` int64 [batch, time], unless one beta holds for all tokens;
        `response_token_weight` float [batch, time] with `beta="token_weight"`. No gradient flows into the reference.
    Returns: float [batch, time] (with "sum" float [batch]), nats; 0 outside the answer. Publishes `token_weight`, the w_t in
        [0, 2], and `cross_entropy`, -log pi(y_t), both [batch, time].

    Raises:
        InputError: an argument out of range.
        QuantityError: no answer token in the batch, a positive log-probability, or a negative beta (looked for on the CPU,
            where looking does not wait for a device).

    Example:
        >>> policy, reference, mask = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2).bool()
        >>> TokenTrustRegion(beta=2)(policy, reference, mask).extras["token_weight"]      # 2 sigmoid(0), 2 sigmoid(-4)
        tensor([[1.0000, 0.0360]])

    Source: Qi et al. 2024, arXiv:2406.05946, eq. 3 and appendix D.2; Unispac/shallow-vs-deep-alignment, trainer.py.
    """

    formula = "token_trust_region"
    equation: ClassVar[str] = "-(2/beta_t) log sigmoid(beta_t (log pi(y_t) - log pi_ref(y_t)))"
    source: ClassVar[str] = "arXiv:2406.05946, eq. 3; Unispac/shallow-vs-deep-alignment"
    expects: ClassVar[dict[str, str]] = {
        "response_logps": "float [batch, time]",
        "reference_response_logps": "float [batch, time]",
        "response_mask": "bool [batch, time]",
        "response_positions": "int64 [batch, time]",
        "response_token_weight": "float [batch, time]",
    }

    def __init__(
        self,
        beta: float | str | Sequence[float | str] | Tensor = (0.5, 2.0, 2.0, 2.0, 2.0),
        rest: float | str = 0.1,
        form: Literal["surrogate", "exact"] = "surrogate",
        floor: float = 1e-3,
        reduction: Literal["token_mean", "sequence_mean", "sum"] = "token_mean",
    ) -> None:
        super().__init__()
        if form not in ("surrogate", "exact"):
            raise InputError(f"token_trust_region: form is 'surrogate' or 'exact', and it is {form!r}.")
        if not 0 <= floor < 1:
            raise InputError(f"token_trust_region: floor must lie in [0, 1), and it is {floor}.")
        if reduction not in _REDUCTIONS:
            raise InputError(f"token_trust_region: reduction is one of {_REDUCTIONS}, and it is {reduction!r}.")
        self.beta, self.rest = _betas(beta), _beta("rest", rest)
        self.form, self.floor, self.reduction = form, floor, reduction
        places = self.beta if isinstance(self.beta, tuple) else (self.beta,)
        table = [] if self.beta == BY_TOKEN else [float(b) for b in places]
        if isinstance(self.beta, tuple):
            table.append(float(self.rest))
        # Not saved: it is the arguments again. It moves with the term to its device.
        self.register_buffer("_table", torch.tensor(table, dtype=torch.float64), persistent=False)
        self._limits = not table or not all(0 < b < math.inf for b in table)
        if form == "surrogate":
            # The values are not those whose gradient is taken, so no line search may compare them.
            self.capabilities = frozenset({"per_example", "deterministic"})  # type: ignore[misc]

    _table: Tensor

    def readings(self) -> tuple[str, ...]:
        """One beta for all tokens needs no places, and only beta="token_weight" reads it from the data."""
        if self.beta == BY_TOKEN:
            return ("response_positions",)
        return (
            ("response_token_weight",)
            if isinstance(self.beta, tuple)
            else ("response_positions", "response_token_weight")
        )

    def forward(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        response_mask: Tensor,
        response_positions: Tensor | None = None,
        response_token_weight: Tensor | None = None,
    ) -> Value:
        beta = self._beta_of(response_logps, response_positions, response_token_weight)
        reference = reference_response_logps.detach()
        _refuse(response_logps, reference, response_mask, beta)
        with torch.no_grad():
            w = self._weight(response_logps - reference, beta).masked_fill_(~response_mask, 0.0)
        if self.form == "surrogate":
            del beta  # so that no more than three tensors of this size are held at once
            values = (w * response_logps).neg_()
        else:
            values = self._exact(response_logps, reference, beta).masked_fill(~response_mask, 0.0)
        if self.reduction == "sum":
            values = values.sum(-1)
        return Value(values, extras={"token_weight": w, "cross_entropy": response_logps.detach().neg()})

    def count(self, response_mask: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Each answer token once, each answer's tokens one share in all, or each answer once."""
        if self.reduction == "sum":
            share = torch.ones(len(response_mask), device=response_mask.device)
            return share if sample_weight is None else share * sample_weight
        share = response_mask.to(torch.get_default_dtype())
        if self.reduction == "sequence_mean":
            share = share / share.sum(-1, keepdim=True).clamp(min=1)
        return share if sample_weight is None else share * sample_weight[:, None]

    def _beta_of(self, logps: Tensor, positions: Tensor | None, token_weight: Tensor | None) -> Tensor:
        """Return beta_t, 0-dim or [batch, time]."""
        if self.beta == BY_TOKEN:
            if token_weight is None:
                raise QuantityError(
                    "token_trust_region(beta='token_weight') reads 'response_token_weight' as float [batch, time], and it is not "
                    "offered."
                )
            return token_weight.detach().to(logps.dtype)
        table = self._table.to(logps)
        if not isinstance(self.beta, tuple):
            return table[0]
        if positions is None:
            raise QuantityError(
                "token_trust_region reads 'response_positions' as int64 [batch, time], each token's place in the answer from 0, "
                "and it is not offered. One beta for all tokens, such as beta=0.1, needs none."
            )
        return table[positions.clamp(0, len(table) - 1)]

    def _weight(self, difference: Tensor, beta: Tensor) -> Tensor:
        """2 sigmoid(-beta_t D_t), in the place of `difference`."""
        # inf * 0 is no number; at the reference itself w = 1 whatever beta is, and with beta = 0 wherever one is.
        still = (difference == 0) | (beta == 0) if self._limits else None
        w = difference.mul_(beta).neg_()
        if still is not None:
            w = w.masked_fill_(still, 0.0)
        w = w.sigmoid_().mul_(2.0)
        return w.clamp_(min=self.floor) if self.form == "surrogate" else w

    def _exact(self, logps: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
        difference = logps - reference
        if not self._limits:
            return (-2 / beta) * functional.logsigmoid(beta * difference)
        open_ = (beta > 0) & (beta < math.inf)
        safe = torch.where(open_, beta, 1.0)
        values = (-2 / safe) * functional.logsigmoid(safe * difference)
        # `maximum` shares the gradient where both are equal, so that w = 1 at the reference here too.
        fallen = 2 * torch.maximum(-difference, torch.zeros_like(difference))
        return torch.where(open_, values, torch.where(beta == 0, -logps, fallen))


def _refuse(logps: Tensor, reference: Tensor, mask: Tensor, beta: Tensor) -> None:
    """Raise where the data cannot be meant, on the CPU only: elsewhere looking would wait for the device."""
    if logps.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not mask.any():
        raise QuantityError(
            "token_trust_region: no token of the batch belongs to an answer (response_mask is False everywhere), so there is "
            "nothing to learn from. Look at how prompts and answers are cut."
        )
    for name, values in (("response_logps", logps), ("reference_response_logps", reference)):
        # Rounding may carry the log-probability of a certain token a little above 0.
        if (values.detach() > 1e-3).logical_and_(mask).any():
            raise QuantityError(
                f"token_trust_region: {name} holds a positive number within the answer, and log-probabilities never are. "
                "Give log pi of each token in nats, not a probability or a loss."
            )
    if beta.ndim and not (beta >= 0).logical_or_(~mask).all():
        raise QuantityError("token_trust_region: response_token_weight holds a negative beta within the answer.")


def _betas(beta: float | str | Sequence[float | str] | Tensor) -> Beta:
    if isinstance(beta, Tensor):
        if beta.ndim > 1:
            raise InputError(
                f"token_trust_region: a tensor beta has one number for each place, [time], and this one has shape {list(beta.shape)}. "
                "A beta for each token of each example is data: beta='token_weight' reads it as response_token_weight."
            )
        beta = beta.tolist()
    if beta == BY_TOKEN:
        return BY_TOKEN
    if isinstance(beta, list | tuple):
        if not beta:
            raise InputError("token_trust_region: beta names no place; for one beta everywhere give a number.")
        return tuple(_beta("beta", b) for b in beta)
    return _beta("beta", beta)  # type: ignore[arg-type]


def _beta(name: str, value: float | str) -> float | str:
    """Return a beta as a formula prints it: a number, or 'inf'."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number >= 0:
        raise InputError(
            f"token_trust_region: {name} must be at least 0 (or 'inf'"
            f"{', or for all tokens of the data ' + repr(BY_TOKEN) if name == 'beta' else ''}), and it is {value!r}."
        )
    return "inf" if number == math.inf else number
