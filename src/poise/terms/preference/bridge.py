"""Supervised fine-tuning as learning of an implicit reward, and the objectives in which the reference still has a say.

Matching demonstrations pi_E under a divergence, with a price for leaving the reference,

    min_pi D_f(pi || pi_E) + beta KL(pi || pi_ref) = min_pi max_r E_E[phi(r)] - E_pi[r] + beta KL(pi || pi_ref)

has for a given r the inner solution pi_r = pi_ref exp(r/beta) / Z, so what is left to maximise is

    J(r) = E_E[phi(r)] - beta log E_ref[exp(r/beta)],        r = beta log(pi/pi_ref) + beta log Z,

over the same pairs (pi, r) that DPO searches. With phi(t) = t the log Z cancels: J = beta E_E[log pi - log pi_ref], which is
supervised fine-tuning, and the reference is gone from the gradient. With a concave phi it stays: at the optimum
pi = pi_E phi'(r), demonstrations that are far above the reference already count less, and pi lies between pi_E and pi_ref.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value
from poise.terms.preference.margin import log_ratio, require_one_of, require_positive

__all__ = ["DIVERGENCES", "FSFT", "Phi"]

Divergence = Literal["tv", "chi2", "hellinger", "js", "reverse_kl"]


@dataclass(frozen=True)
class Phi:
    """phi(t) = -f*(-t) of a divergence: concave, phi(0) = 0, phi'(0) = 1.

    Attributes:
        function, slope: phi and phi'.
        low: where its domain ends below; -inf where it is all numbers.
        turn: the point from which phi falls; inf where it never does.
        safe: from here down it is continued by its tangent, so that a reward outside the domain still has a gradient that
            brings it back, and an exponential does not overflow.
    """

    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    low: float = -torch.inf
    turn: float = torch.inf
    safe: float = -torch.inf

    def continued(self, t: Tensor) -> Tensor:
        """phi inside, its tangent below `safe`, its largest value above `turn`: concave and finite everywhere."""
        inside = t.clamp(self.safe, self.turn)
        below = (t - inside).clamp(max=0)
        if self.safe == -torch.inf:
            return self.function(inside)
        edge = torch.full((), self.safe, dtype=t.dtype, device=t.device)
        return self.function(inside) + self.slope(edge) * below

    def outside(self, t: Tensor) -> Tensor:
        """Where t is outside the domain or beyond the turn, bool."""
        return (t <= self.low) | (t > self.turn)


DIVERGENCES: dict[str, Phi] = {
    "tv": Phi(lambda t: t, torch.ones_like),
    "chi2": Phi(lambda t: t - t.square() / 4, lambda t: 1 - t / 2, turn=2.0),
    "hellinger": Phi(lambda t: t / (1 + t), lambda t: (1 + t) ** -2, low=-1.0, safe=-0.9),
    "js": Phi(lambda t: (2 - (-t).exp()).log(), lambda t: 1 / (2 * t.exp() - 1), low=-0.6931471805599453, safe=-0.6),
    "reverse_kl": Phi(lambda t: -torch.expm1(-t), lambda t: (-t).exp(), safe=-10.0),
}
"""phi by name: total variation (linear: supervised fine-tuning), Pearson chi-squared, squared Hellinger, Jensen-Shannon, and
the reverse-KL type up to scaling."""


class FSFT(Term):
    """Fine-tune on demonstrations by a divergence other than total variation, so that the reference keeps its say.

    level="token", with Q(s, .) = beta logits, V(s) = beta logsumexp(logits) and V = 0 after the last token:

        r_t = beta log(pi/pi_ref)(a_t|s_t) + V(s_t) - V(s_{t+1}),        loss = -sum_t phi(r_t) + V(s_0)

    level="sequence", with u = sum_t log(pi/pi_ref)(a_t|s_t) and a constant c, which the gradient does not see:

        loss = -phi(beta u + c) + c

    With "tv" both are beta times supervised fine-tuning summed over the answer (the V's telescope). With the others a shift of
    all logits of a state changes the token loss although it does not change the policy: the shift is the reward's gauge, and
    the gradient flows through V. A token with r_t above 2 gets no push under "chi2"; below the domain of "hellinger" and "js"
    phi goes on as a tangent. Both are counted in `clipped`.

    Args:
        divergence: "tv", "chi2", "hellinger", "js" or "reverse_kl".
        beta: price of leaving the reference, positive; as it falls every phi acts like "tv".
        level: "token" or "sequence". On answers of one token the token form is J itself.
        gauge: of the sequence form: "zero" sets c = 0; "running" moves c towards E[phi'(beta u + c)] = 1, where J is largest,
            once per optimiser step by `rate`.
        rate: step of the running gauge, positive.
        clip: False raises where r leaves the domain instead of counting; it waits for the device.
        eos: the end token's id; then `response_ids` is read, and an answer that does not end with it raises, because V = 0
            after the last token is only right where the answer is over.

    Reads: `response_logps`, `reference_response_logps` float [batch, time] (summed [batch] for the sequence form), `response_mask`
        bool [batch, time]; for the token form `response_logsumexp` float [batch, time] and `response_positions` int64 [batch, time].
        The answer is one run of tokens. The reference is the model *before* fine-tuning.
    Returns: float [batch], units of the reward; publishes `implicit_reward` (beta u), `reward` (sum of r), `value` (V(s_0), or c) and
        `clipped` (tokens or answers outside), all float [batch].

    Raises:
        InputError: an argument out of range; with clip=False a reward outside the domain; with eos an unfinished answer.
        QuantityError: log-probabilities and reference differ in shape, or the token form is given sums.

    Example:
        >>> one = torch.tensor([[-1.0, -0.5]])
        >>> loss = FSFT("tv", level="sequence")(response_logps=one, reference_response_logps=one - 1)
        >>> loss.values                                                                  # -beta sum_t log pi/pi_ref
        tensor([-2.])

    Source: the imitation-learning reading of arXiv:2507.00018, re-derived; phi as in Garg et al., arXiv:2106.12142 (IQ-Learn).
    """

    formula = "f_sft"
    equation: ClassVar[str] = (
        "-sum_t phi(beta log(pi/pi_ref)(a_t|s_t) + V(s_t) - V(s_{t+1})) + V(s_0),  V = beta logsumexp(logits)"
    )
    source: ClassVar[str] = "arXiv:2507.00018; arXiv:2106.12142"
    constant: Tensor

    def __init__(
        self,
        divergence: Divergence = "tv",
        beta: float = 1.0,
        level: Literal["token", "sequence"] = "token",
        gauge: Literal["zero", "running"] = "zero",
        rate: float = 0.1,
        clip: bool = True,
        eos: int | None = None,
    ) -> None:
        super().__init__()
        require_one_of("f_sft", "divergence", divergence, tuple(DIVERGENCES))
        require_positive("f_sft", beta=beta, rate=rate)
        require_one_of("f_sft", "level", level, ("token", "sequence"))
        require_one_of("f_sft", "gauge", gauge, ("zero", "running"))
        if gauge == "running" and level == "token":
            raise InputError(
                "f_sft: the token form has its gauge in the logits; gauge='running' belongs to level='sequence'."
            )
        self.divergence, self.beta, self.level, self.gauge, self.rate = divergence, beta, level, gauge, rate
        self.clip, self.eos = clip, eos
        if gauge == "running":
            self.register_buffer("constant", torch.zeros((), dtype=torch.float64))

    @property
    def phi(self) -> Phi:
        """phi of the divergence."""
        return DIVERGENCES[self.divergence]

    @property
    def advance(self) -> Callable[..., None] | None:  # type: ignore[override]
        """Move the gauge, where it runs."""
        return self._move_gauge if self.gauge == "running" else None

    def readings(self) -> tuple[str, ...]:
        """The values of the states in the sequence form, and the ids where nobody asked for the end."""
        skipped = ("response_logsumexp", "response_positions") if self.level == "sequence" else ()
        return skipped if self.eos is not None else (*skipped, "response_ids")

    def requirements(self) -> tuple[str, ...]:
        """The mask, and what the token form needs."""
        needed = ("response_mask", "response_logsumexp", "response_positions") if self.level == "token" else ()
        return (*needed, "response_mask", "response_ids") if self.eos is not None else needed

    def forward(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        response_mask: Tensor | None = None,
        response_logsumexp: Tensor | None = None,
        response_positions: Tensor | None = None,
        response_ids: Tensor | None = None,
    ) -> Value:
        self._check(response_logps, reference_response_logps, response_mask, response_ids)
        implied = self.beta * log_ratio(response_logps, reference_response_logps, response_mask)
        if self.level == "sequence":
            return self._of_sequences(implied)
        if response_mask is None or response_logsumexp is None or response_positions is None:
            raise QuantityError(
                "f_sft: the token form reads 'response_mask', 'response_logsumexp' and 'response_positions'."
            )
        value = torch.where(response_mask, self.beta * response_logsumexp, 0.0)
        # V(s_{t+1}) stands one place further on; after the answer it is 0.
        following = torch.nn.functional.pad(value, (0, 1))[:, 1:]
        step = self.beta * (response_logps - reference_response_logps.detach())
        reward = torch.where(response_mask, step + value - following, 0.0)
        first = torch.where(response_positions == 0, value, 0.0).sum(-1)
        outside = self.phi.outside(reward) & response_mask
        self._refuse(reward, outside)
        # phi(0) = 0, so that what stands outside the answer adds nothing.
        values = first - self.phi.continued(reward).sum(-1)
        extras = {
            "implicit_reward": implied,
            "reward": reward.sum(-1),
            "value": first,
            "clipped": outside.sum(-1).to(values.dtype),
        }
        return Value(values, extras=extras)

    def _of_sequences(self, implied: Tensor) -> Value:
        constant = self.constant.to(implied.dtype) if self.gauge == "running" else implied.new_zeros(())
        reward = implied + constant
        outside = self.phi.outside(reward)
        self._refuse(reward, outside)
        extras = {
            "implicit_reward": implied,
            "reward": reward,
            "value": constant.expand_as(reward),
            "clipped": outside.to(reward.dtype),
        }
        return Value(constant - self.phi.continued(reward), extras=extras)

    def _move_gauge(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        response_mask: Tensor | None = None,
    ) -> None:
        """c <- c + rate (E[phi'(beta u + c)] - 1): ascent of J in c."""
        implied = self.beta * log_ratio(response_logps, reference_response_logps, response_mask).double()
        reward = (implied + self.constant).clamp(self.phi.safe, self.phi.turn)
        self.constant += self.rate * (self.phi.slope(reward).mean() - 1)

    def _check(self, logps: Tensor, reference: Tensor, mask: Tensor | None, ids: Tensor | None) -> None:
        if logps.shape != reference.shape or (self.level == "token" and logps.ndim != 2):
            wanted = "float [batch, time] each" if self.level == "token" else "of one shape"
            raise QuantityError(
                f"f_sft: response_logps and reference_response_logps must be {wanted}, and they are {list(logps.shape)} and "
                f"{list(reference.shape)}."
            )
        if self.eos is None or mask is None or ids is None:
            return
        last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
        unfinished = (last & (ids != self.eos)).any(-1)
        if bool(unfinished.any()):
            raise InputError(
                f"f_sft: the value after the last token is 0 only where the answer is over, and {int(unfinished.sum())} of {len(ids)} "
                f"answers do not end with the end token {self.eos}. Keep the end token within the mask, or leave cut answers out."
            )

    def _refuse(self, reward: Tensor, outside: Tensor) -> None:
        if not self.clip and bool(outside.any()):
            worst = reward.detach()[outside]
            raise InputError(
                f"f_sft: {int(outside.sum())} rewards are outside the domain of {self.divergence!r}, from {float(worst.min()):.3g} to "
                f"{float(worst.max()):.3g}. Lower beta or the learning rate, or leave clip=True, which counts them."
            )
