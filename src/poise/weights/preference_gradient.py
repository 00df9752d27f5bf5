"""The weight of a pair that a preference loss puts into its own gradient: what is left to learn of it.

    w = sigma(gamma - (r(chosen) - r(rejected)))        dpo: gamma = 0; simpo: its target margin

A regulariser with this weight stops where the preference loss is satisfied, and cannot outgrow it. Within a formula no second
computation is needed: terms on pairs publish the same number as `<term>.weight`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from poise.errors import InputError

__all__ = ["PreferenceGradientWeight"]

Variant = Literal["detached", "attached", "static"]


class PreferenceGradientWeight:
    """Weigh a pair by the factor of the preference loss's own gradient: rewards of two answers -> w, float [batch].

    w = sigma(gamma - (chosen_reward - rejected_reward))

    Args:
        base: "dpo" or "simpo": whose rewards they are.
        gamma: target margin of SimPO, at least 0; DPO has none.
        variant: "detached" follows training as a number without gradient; "attached" lets the gradient through; "static" is 1.

    Raises:
        InputError: an unknown base or variant, a negative gamma, or one for DPO.

    Example:
        >>> PreferenceGradientWeight()(torch.tensor([0.0]), torch.tensor([0.0]))
        tensor([0.5000])

    Source: arXiv:2412.02685, section 3; for SimPO by the same rule.
    """

    def __init__(
        self, base: Literal["dpo", "simpo"] = "dpo", gamma: float = 0.0, variant: Variant = "detached"
    ) -> None:
        if base not in ("dpo", "simpo"):
            raise InputError(f"PreferenceGradientWeight: base is 'dpo' or 'simpo', and it is {base!r}.")
        if variant not in ("detached", "attached", "static"):
            raise InputError(
                f"PreferenceGradientWeight: variant is 'detached', 'attached' or 'static', and it is {variant!r}."
            )
        if not 0 <= gamma < float("inf") or (base == "dpo" and gamma):
            raise InputError(
                f"PreferenceGradientWeight: gamma is the target margin of simpo, at least 0 (0 for dpo), and it is {gamma}."
            )
        self.base, self.gamma, self.variant = base, gamma, variant

    def __call__(self, chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
        """Return w float [batch], from implicit rewards float [batch] each."""
        if self.variant == "static":
            return torch.ones_like(chosen_reward)
        margin = chosen_reward - rejected_reward
        return torch.sigmoid(self.gamma - (margin if self.variant == "attached" else margin.detach()))

    def __repr__(self) -> str:
        return f"PreferenceGradientWeight({self.base!r}, gamma={self.gamma}, variant={self.variant!r})"
