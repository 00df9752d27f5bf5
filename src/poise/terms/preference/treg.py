"""T-REG: token rewards that the model gave itself say how a preference is to be spread over the tokens.

    L = L_DPO + alpha w [R(chosen) + R(rejected)],    R(y) = -beta sum_t r_t log pi(y_t),    w = sigma(r(rejected) - r(chosen))

The gradient with respect to log pi(y_t) is -beta w (1 + alpha r_t) on the chosen answer and +beta w (1 - alpha r_t) on the
rejected one: DPO's own, with token weights 1 +- alpha r_t. Rewards lie in (-0.5, 0.5), so up to alpha = 2 no token turns round.
`poise.readouts.token_rewards` computes rewards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.coefficient import Coefficient, Number
from poise.errors import InputError, PoiseWarning, QuantityError
from poise.objective import Objective, Term, Value
from poise.terms.preference.dpo import DPO
from poise.terms.preference.margin import (
    answer_length,
    log_ratio,
    require_at_least_zero,
    require_one_of,
    require_positive,
    sequence_sum,
)
from poise.terms.preference.simpo import SimPO

__all__ = ["TREG", "TokenRewardRegularizer"]

PairWeight = Callable[[Tensor, Tensor], Tensor]
"""Implicit rewards of chosen and rejected answers, float [batch] each -> weights float [batch]."""
Side = Literal["both", "chosen", "rejected"]
LIMIT = 0.5
"""What a token reward lies within."""


class TokenRewardRegularizer(Term):
    """Agree with given token rewards: raise the likelihood of tokens that were rewarded, and lower that of the others.

    w * sum over the sides of -beta sum_t r_t log pi(y_t)                       divided by the answer's length where normalised

    It is beta log(pi/pi_ref)(y_t) times r_t, summed, without what is constant. A negative reward pushes its token down and
    without end, so the value may fall without end too; the weight w of the pair stops it where the preference is learnt.

    Args:
        beta: that of the preference loss beside it.
        on: "both" answers of a pair, or one of them.
        normalize: "length" divides each answer's sum by its number of tokens, as SimPO does; None leaves sums.
        weight: where w comes from. "read" reads `pair_weight`, which is to be bound to what another term publishes:
            `.on(pair_weight="dpo.weight")`; that carries no gradient. "static" is 1. A function of the two implicit rewards
            (`poise.weights.PreferenceGradientWeight`) is applied to those of this policy, with a gradient if it leaves one.
        reward: "data" reads the token rewards; a number is the reward of every token (0.5 on the chosen answers alone is
            supervised fine-tuning on sums, times beta/2).

    Reads: `chosen_logps`, `rejected_logps` float [batch, time]; `chosen_token_reward`, `rejected_token_reward` float [batch,
        time], constants in (-0.5, 0.5); masks if offered (needed with "length"); `pair_weight` float [batch];
        `reference_chosen_logps`, `reference_rejected_logps` where a function computes w and nothing is normalised.
    Returns: float [batch]; publishes `weight` and, by side, `chosen_agreement` and `rejected_agreement`: sum_t r_t log pi(y_t).

    Raises:
        InputError: an argument out of range.
        QuantityError: summed log-probabilities; token rewards that are not finite (seen on the CPU alone).

    Warns:
        PoiseWarning: token rewards outside [-0.5, 0.5], once.

    Example:
        >>> term = TokenRewardRegularizer(beta=0.1, on="chosen", weight="static")
        >>> term(torch.tensor([[-1.0, -2.0]]), chosen_token_reward=torch.tensor([[0.4, -0.2]])).values
        tensor([0.])

    Source: Zhou et al., arXiv:2412.02685, section 3.
    """

    formula = "token_reward_regularizer"
    equation: ClassVar[str] = "-w beta sum_t r_t log pi(y_t), summed over chosen and rejected"
    source: ClassVar[str] = "arXiv:2412.02685"
    expects: ClassVar[dict[str, str]] = {
        "pair_weight": "float [batch]",
        "chosen_logps": "float [batch, chosen_time]",
        "rejected_logps": "float [batch, rejected_time]",
    }
    bounded_below = False

    def __init__(
        self,
        beta: float = 0.1,
        on: Side = "both",
        normalize: Literal["length"] | None = None,
        weight: Literal["read", "static"] | PairWeight = "read",
        reward: Literal["data"] | float = "data",
    ) -> None:
        super().__init__()
        require_positive(self.formula, beta=beta)
        require_one_of(self.formula, "on", on, ("both", "chosen", "rejected"))
        if normalize not in (None, "length"):
            raise InputError(f"{self.formula}: normalize is None or 'length', and it is {normalize!r}.")
        if not callable(weight):
            require_one_of(self.formula, "weight", weight, ("read", "static"))
        if reward != "data" and not (isinstance(reward, int | float) and abs(reward) < float("inf")):
            raise InputError(f"{self.formula}: reward is 'data' or a finite number, and it is {reward!r}.")
        self.beta, self.on_, self.normalize, self.weight, self.reward = beta, on, normalize, weight, reward
        self._warned = False

    @property
    def sides(self) -> tuple[str, ...]:
        """The answers that are regularised."""
        return ("chosen", "rejected") if self.on_ == "both" else (self.on_,)

    def _needed(self) -> set[str]:
        weighed = ("chosen", "rejected") if callable(self.weight) else self.sides
        needed = {f"{side}_logps" for side in weighed}
        if self.reward == "data":
            needed |= {f"{side}_token_reward" for side in self.sides}
        if self.normalize:
            needed |= {f"{side}_mask" for side in weighed}
        elif callable(self.weight):
            needed |= {f"reference_{side}_logps" for side in weighed}
        return needed | ({"pair_weight"} if self.weight == "read" else set())

    def readings(self) -> tuple[str, ...]:
        """The side that is left alone, and what this weight and these rewards do not need."""
        masks = {"chosen_mask", "rejected_mask"}
        return tuple(sorted(_EVERY - self._needed() - masks))

    def requirements(self) -> tuple[str, ...]:
        """What this configuration cannot do without."""
        return tuple(sorted(self._needed()))

    def forward(
        self,
        chosen_logps: Tensor | None = None,
        rejected_logps: Tensor | None = None,
        chosen_token_reward: Tensor | None = None,
        rejected_token_reward: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        pair_weight: Tensor | None = None,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> Value:
        record = {
            "chosen": (chosen_logps, chosen_token_reward, chosen_mask, reference_chosen_logps),
            "rejected": (rejected_logps, rejected_token_reward, rejected_mask, reference_rejected_logps),
        }
        agreement = {side: self._agreement(side, *record[side][:3]) for side in self.sides}
        w = self._weight_of(pair_weight, record)
        first, *others = agreement.values()
        total = first + others[0] if others else first
        values = -self.beta * total if w is None else -self.beta * w * total
        extras = {f"{side}_agreement": x for side, x in agreement.items()}
        extras["weight"] = torch.ones_like(values) if w is None else w
        return Value(values, extras=extras)

    def _agreement(self, side: str, logps: Tensor | None, rewards: Tensor | None, mask: Tensor | None) -> Tensor:
        """sum_t r_t log pi(y_t), or the mean."""
        logps = self._offered(logps, f"{side}_logps")
        if self.reward != "data":
            total = float(self.reward) * sequence_sum(logps, mask)
        elif logps.ndim == 1:
            raise QuantityError(
                f"{self.formula} spreads a reward over tokens: it reads '{side}_logps' as float [batch, time], and sums over the "
                f"answers were offered, float [{len(logps)}]."
            )
        else:
            rewards = self._offered(rewards, f"{side}_token_reward").detach().to(logps.dtype)
            self._look_at(side, rewards, mask)
            total = sequence_sum(logps, mask, rewards)
        if self.normalize is None:
            return total
        return total / answer_length(self._offered(mask, f"{side}_mask"), total)

    def _look_at(self, side: str, rewards: Tensor, mask: Tensor | None) -> None:
        if rewards.device.type != "cpu" or torch.compiler.is_compiling():
            return
        seen = rewards if mask is None else rewards.masked_fill(~mask, 0.0)
        largest = float(seen.abs().amax()) if seen.numel() else 0.0
        if not largest < float("inf"):
            raise QuantityError(f"{self.formula}: '{side}_token_reward' is NaN or infinite on a token of the answer.")
        if largest > LIMIT and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.formula}: '{side}_token_reward' goes up to {largest:.3g} in size, beyond 0.5. A token of the wrong sign may "
                "then outweigh the preference; scale the rewards, or lower alpha.",
                PoiseWarning,
                stacklevel=2,
            )

    def _weight_of(self, pair_weight: Tensor | None, record: Mapping[str, tuple[Tensor | None, ...]]) -> Tensor | None:
        if self.weight == "static":
            return None
        if not callable(self.weight):
            return self._offered(pair_weight, "pair_weight").detach()
        rewards = []
        for side, (logps, _, mask, reference) in record.items():
            logps = self._offered(logps, f"{side}_logps")
            if self.normalize:
                mask = self._offered(mask, f"{side}_mask")
                rewards.append(self.beta * sequence_sum(logps, mask) / answer_length(mask, logps))
            else:
                reference = self._offered(reference, f"reference_{side}_logps")
                rewards.append(self.beta * log_ratio(logps, reference, mask))
        return self.weight(*rewards)

    def _offered(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise QuantityError(f"{self.formula} reads {name!r}, and it was not offered.")
        return value


_EVERY = {
    *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("logps", "token_reward", "mask")),
    *(f"reference_{side}_logps" for side in ("chosen", "rejected")),
    "pair_weight",
}


def TREG(
    alpha: Number | Coefficient = 0.25,
    beta: float = 0.1,
    base: Literal["dpo", "simpo"] = "dpo",
    gamma: float = 1.0,
    weight: Literal["read", "static"] = "read",
) -> Objective:
    """Regularise a preference loss by token rewards: T-REG, the visible sum of the loss and the weighted regulariser.

    dpo(beta) + alpha * token_reward_regularizer(beta).on(pair_weight="dpo.weight")

    Args:
        alpha: at least 0; 0 is the preference loss alone. The paper searches 0.1, 0.25 and 0.5.
        beta: of both; for SimPO 2 to 10.
        base: "dpo" (sums, log-ratios) or "simpo" (means, no reference).
        gamma: of SimPO.
        weight: "read" takes the weight of each pair from the loss beside it; "static" is 1 (an ablation that does worse).

    Raises:
        InputError: an argument out of range.

    Example:
        >>> str(TREG())
        "dpo + 0.25*token_reward_regularizer.on(pair_weight='dpo.weight')"

    Source: Zhou et al., arXiv:2412.02685. The form for SimPO follows the same rule (w is the factor of the loss's gradient).
    """
    require_one_of("t_reg", "base", base, ("dpo", "simpo"))
    require_one_of("t_reg", "weight", weight, ("read", "static"))
    require_positive("t_reg", beta=beta)
    if isinstance(alpha, Number):
        require_at_least_zero("t_reg", alpha=alpha)
    loss = DPO(beta=beta) if base == "dpo" else SimPO(beta=beta, gamma=gamma)
    term = TokenRewardRegularizer(beta, normalize=None if base == "dpo" else "length", weight=weight)
    regularizer = term.on(pair_weight=f"{base}.weight") if weight == "read" else Objective() + term
    return loss + alpha * regularizer
