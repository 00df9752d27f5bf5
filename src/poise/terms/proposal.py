"""The proposal of distributional policy gradients: an earlier policy, replaced only by one that is nearer the target.

Samples of a fixed distribution can be used for several steps, and a distribution that has seen the target's support keeps
the weights P/q tame. The rule of Khalifa et al. (arXiv:2012.11635): every `interval` steps estimate the divergence of the target
from the proposal and from the policy with the same samples, and take the policy over where its divergence is less.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import Any

from torch import Tensor, nn

from poise.errors import InputError
from poise.frozen import FrozenModel
from poise.terms.posterior import estimate_divergences, estimate_log_z
from poise.terms.sequences import sequence_sum

__all__ = ["Comparison", "Proposal"]


@dataclass(frozen=True)
class Comparison:
    """One check: the divergence of policy and proposal from the target, and whether the policy was taken over."""

    step: int
    policy: float
    proposal: float
    log_z: float
    ess: float
    refreshed: bool


class Proposal:
    """A frozen earlier policy and the rule that refreshes it.

    Args:
        model: the policy to begin with; a copy is kept.
        interval: steps between checks.
        criterion: "kl", KL(pi* || .), or "tv", total variation.

    Attributes:
        model: the frozen copy, to draw from and to score with.
        snapshot: how often it was refreshed.
        history: every `Comparison`.
    """

    def __init__(self, model: nn.Module, interval: int = 10, criterion: str = "kl") -> None:
        if interval < 1:
            raise InputError(f"proposal: interval must be at least 1 step, and it is {interval}.")
        if criterion not in ("kl", "tv"):
            raise InputError(f"proposal: criterion is 'kl' or 'tv', and it is {criterion!r}.")
        self.model, self.interval, self.criterion = FrozenModel(model), interval, criterion
        self.snapshot, self.history = 0, list[Comparison]()
        self._z: list[float] = []

    def is_due(self, step: int) -> bool:
        """Say whether a check falls on this step, counted from 0: after every `interval` steps."""
        return step > 0 and step % self.interval == 0

    def consider(
        self, step: int, model: nn.Module, policy_logps: Tensor, proposal_logps: Tensor, log_score: Tensor
    ) -> Comparison:
        """Compare policy and proposal on samples of the proposal, and take the policy over where it is nearer.

        Args:
            step: for the record.
            model: the policy now.
            policy_logps, proposal_logps: log pi(x) and log q(x), float `[batch]` or `[batch, time]`.
            log_score: log P(x), float `[batch]`.

        Raises:
            InputError: every weight is 0.
        """
        self._z.append(estimate_log_z(log_score - sequence_sum(proposal_logps)).value)
        top = max(self._z)
        log_z = top + log(sum(exp(z - top) for z in self._z) / len(self._z))
        ours = estimate_divergences(policy_logps, log_score, proposal_logps, log_z)
        theirs = estimate_divergences(proposal_logps, log_score, proposal_logps, log_z)
        name = "forward_kl" if self.criterion == "kl" else "total_variation"
        nearer = getattr(ours, name) < getattr(theirs, name)
        if nearer:
            self.model.refresh(model)
            self.snapshot += 1
        found = Comparison(step, getattr(ours, name), getattr(theirs, name), log_z, ours.ess, nearer)
        self.history.append(found)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"model": self.model.state_dict(), "snapshot": self.snapshot, "log_z": list(self._z)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.model.load_state_dict(state["model"])
        self.snapshot, self._z = state["snapshot"], list(state["log_z"])
