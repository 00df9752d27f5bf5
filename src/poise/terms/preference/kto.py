"""Unpaired preferences: answers that are wanted or not, measured against what the policy does to any answer."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import QuantityError
from poise.objective import Term, Value
from poise.terms.preference.margin import log_ratio, require_one_of, require_positive

__all__ = ["KTO"]


class KTO(Term):
    """Make wanted answers likelier than a baseline, and unwanted ones less likely (Kahneman-Tversky optimisation).

    wanted: D (1 - sigma(beta (h - z))),   unwanted: U (1 - sigma(beta (z - h))),   h = log pi(y)/pi_ref(y), summed

    z is an estimate of the policy's KL from the reference, at least 0, without gradient:

    - "mismatched", the method: the batch mean of h over answers to *other* prompts, which must be offered as
      `mismatched_logps` and `reference_mismatched_logps` (TRL moves the answers of a batch on by one prompt);
    - "batch": the batch mean of h over the answers themselves, which costs no forward pass more. It overstates z where
      wanted answers prevail, since they are the ones whose h the training raises;
    - "none": z = 0, the unpaired form of `apo_zero`.

    Args:
        beta: sensitivity, positive.
        desirable, undesirable: D and U, positive. Keep D n_wanted / (U n_unwanted) within [1, 3/2] (the paper's eq. 8).
        baseline: see above.

    Reads: `response_logps` float [batch, time] or [batch], `reference_response_logps` likewise; `label` bool or float
        [batch], wanted where it is > 0; if offered `response_mask`; with "mismatched" also the two quantities above, float
        [batch, time] or [batch].
    Returns: float [batch], in [0, D] and [0, U]; publishes `reward` beta h, `baseline` beta z, `margin` (reward minus
        baseline, the other way round for unwanted answers), `accuracy` (margin > 0), `weight` sigma(-margin), all [batch].

    The baseline couples the examples of a batch.

    Example:
        >>> one = torch.ones(2)
        >>> term = KTO(beta=1.0, baseline="none")
        >>> term(one, torch.zeros(2), torch.tensor([True, False])).values      # 1 - sigma(1), sigma(1)
        tensor([0.2689, 0.7311])

    Source: Ethayarajh et al., arXiv:2402.01306, eq. 7 and 8; TRL 1.16, kto_trainer.
    """

    formula = "kto"
    equation: ClassVar[str] = (
        "D (1 - sigma(beta (h - z))) or U (1 - sigma(beta (z - h))),  h = log pi/pi_ref, z = KL estimate"
    )
    source: ClassVar[str] = "arXiv:2402.01306, eq. 7"
    expects: ClassVar[dict[str, str]] = {
        "mismatched_logps": "float [batch, mismatched_time] | float [batch]",
        "reference_mismatched_logps": "float [batch, mismatched_time] | float [batch]",
    }

    def __init__(
        self,
        beta: float = 0.1,
        desirable: float = 1.0,
        undesirable: float = 1.0,
        baseline: Literal["mismatched", "batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        require_positive("kto", beta=beta, desirable=desirable, undesirable=undesirable)
        require_one_of("kto", "baseline", baseline, ("mismatched", "batch", "none"))
        self.beta = beta
        self.desirable = desirable
        self.undesirable = undesirable
        self.baseline = baseline
        if baseline == "none":
            self.couples = ()  # type: ignore[misc]
        else:
            # The value moves with the baseline, which carries no gradient: it is not the potential of the gradient.
            self.couples = ("response_logps", "reference_response_logps")  # type: ignore[misc]
            self.capabilities = frozenset({"deterministic"})  # type: ignore[misc]

    def readings(self) -> tuple[str, ...]:
        """The mismatched answers, unless they give the baseline."""
        return () if self.baseline == "mismatched" else ("mismatched_logps", "reference_mismatched_logps")

    def requirements(self) -> tuple[str, ...]:
        """The mismatched answers, where they give the baseline."""
        return ("mismatched_logps", "reference_mismatched_logps") if self.baseline == "mismatched" else ()

    def forward(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        label: Tensor,
        response_mask: Tensor | None = None,
        mismatched_logps: Tensor | None = None,
        reference_mismatched_logps: Tensor | None = None,
    ) -> Value:
        h = log_ratio(response_logps, reference_response_logps, response_mask)
        z = self._baseline(h, mismatched_logps, reference_mismatched_logps)
        wanted = label > 0
        margin = torch.where(wanted, h - z, z - h) * self.beta
        values = torch.where(wanted, self.desirable, self.undesirable).to(h.dtype) * torch.sigmoid(-margin)
        with torch.no_grad():
            extras = {
                "reward": self.beta * h,
                "baseline": (self.beta * z).expand_as(h),
                "margin": margin,
                "accuracy": (margin > 0).to(h.dtype),
                "weight": torch.sigmoid(-margin),
            }
        return Value(values, extras=extras)

    def _baseline(self, h: Tensor, logps: Tensor | None, reference: Tensor | None) -> Tensor:
        if self.baseline == "none":
            return h.new_zeros(())
        with torch.no_grad():
            if self.baseline == "mismatched":
                if logps is None or reference is None:
                    raise QuantityError(
                        "kto reads 'mismatched_logps' and 'reference_mismatched_logps' for its baseline, and they were not "
                        "offered; baseline='batch' does without."
                    )
                h = log_ratio(logps, reference)
            return h.mean().clamp(min=0)
