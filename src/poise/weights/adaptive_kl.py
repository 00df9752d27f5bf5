"""A weight that holds a divergence at a target: the controller of Ziegler et al.

    beta <- beta * (1 + gain * clip(KL/target - 1, -0.2, 0.2))        after every optimiser step

Where the policy has moved too far the weight rises, where it has moved too little it falls, by at most `gain * clip` a step. Unlike a
`constraint` it never reaches 0, and it holds the divergence from both sides. Source: Ziegler et al., arXiv:1909.08593,
section 2.2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from poise.coefficient import text
from poise.errors import InputError
from poise.objective import Objective, Summand, Term
from poise.weights.constraint import DualWeight, PricedWeight


class AdaptiveKL(nn.Module):
    """A controlled weight.

    Args:
        target: the divergence to hold, in the units of the term (nats a response for `reference_kl`), positive.
        initial: the weight at first, positive.
        gain: how fast it reacts, positive.
        clip: largest relative error that counts, in (0, 1/gain), so that the weight stays positive.

    Buffers: `multiplier` (the weight) and `error` (the last clipped relative error), float64, 0-dim.
    """

    formula: ClassVar[str] = "adaptive_kl"
    multiplier: Tensor
    error: Tensor

    def __init__(self, target: float = 6.0, initial: float = 0.2, gain: float = 0.1, clip: float = 0.2) -> None:
        super().__init__()
        if target <= 0 or initial <= 0 or gain <= 0:
            raise InputError(
                f"adaptive_kl: target, initial and gain must be positive; they are {target}, {initial} and {gain}."
            )
        if not 0 < clip * gain < 1:
            raise InputError(f"adaptive_kl: clip must lie in (0, 1/gain), or the weight could reach 0; it is {clip}.")
        self.target, self.initial, self.gain, self.clip = target, initial, gain, clip
        self.register_buffer("multiplier", torch.tensor(float(initial), dtype=torch.float64))
        self.register_buffer("error", torch.tensor(0.0, dtype=torch.float64))

    @property
    def weight(self) -> Tensor:
        """What stands before the controlled term in this step."""
        return self.multiplier

    def advance(self, measured: Tensor | float) -> None:
        """Move the weight by the divergence that was measured in this step; one that is not finite moves nothing."""
        value = torch.as_tensor(measured, dtype=torch.float64, device=self.multiplier.device).detach()
        error = (value / self.target - 1).clamp(-self.clip, self.clip)
        self.error = torch.where(torch.isfinite(error), error, 0.0)
        self.multiplier = self.multiplier * (1 + self.gain * self.error)

    def arguments(self) -> str:
        """Print the arguments as a formula has them."""
        defaults = {"initial": 0.2, "gain": 0.1, "clip": 0.2}
        rest = [f"{k}={text(getattr(self, k))}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join([f"target={text(self.target)}", *rest])

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptiveKL:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.multiplier, self.error = self.multiplier.double(), self.error.double()
        return self


def adaptive_kl(
    controlled: Term | Objective, target: float = 6.0, initial: float = 0.2, gain: float = 0.1, clip: float = 0.2
) -> Objective:
    """Weigh a divergence so that it stays at a target: `expected_reward + adaptive_kl(reference_kl, target=6)`.

    Args:
        controlled: a term or a sum of terms, whose value is held.
        target, initial, gain, clip: see `AdaptiveKL`.

    Raises:
        InputError: an argument out of range, or a term that another multiplier moves already.
    """
    objective = controlled if isinstance(controlled, Objective) else Objective([Summand(controlled)])
    if any(isinstance(s.weight, PricedWeight) for s in objective.summands):
        raise InputError("adaptive_kl: the weight of a term is moved by one multiplier, and this one has one already.")
    module = AdaptiveKL(target, initial, gain, clip)
    return Objective(replace(s, weight=DualWeight(module, s.weight)) for s in objective.summands)
