"""The divergence from the reference, estimated from sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.objective import Term
from poise.terms.policy_gradient.scored import one_of
from poise.terms.policy_gradient.tokens import (
    AGGREGATES,
    Aggregate,
    aggregate_tokens,
    check_length,
    counted,
    tokens_of,
)


class SampledKL(Term):
    """The divergence KL(policy || reference), estimated from the sampled tokens alone.

    u = log pi - log pi_ref of a token;    k1 = u,    k2 = u^2 / 2,    k3 = exp(-u) - 1 + u

    On fresh samples k1 and k3 have the mean KL(pi || pi_ref), k2 nearly. As a loss they pull differently, because the
    samples are taken for fixed: k1 has no gradient in the mean (E grad log pi = 0: use it within a reward, where it is
    unbiased), k2 has that of KL(pi || pi_ref), and k3, which public trainers use, that of KL(pi_ref || pi). Exact
    divergences over the vocabulary are `token_kl`.

    Args:
        estimator: "k1", "k2" or "k3".
        aggregate: how tokens become one number, as in `grpo`; `max_length` goes with "dr_grpo".

    Reads: `response_logps` and `reference_response_logps` float [batch, time] or [batch]; `response_mask` bool [batch, time]
        (needed per token).
    Returns: float [batch], or [batch, time] for "token_mean"; nats, >= 0 but for k1.

    >>> SampledKL("k2")(torch.tensor([-1.0]), torch.tensor([-3.0]))
    tensor([2.])

    Source: Schulman, "Approximating KL divergence" (2020); arXiv:2402.03300, eq. 4 (k3).
    """

    formula = "sampled_kl"
    equation: ClassVar[str] = "k3 = exp(-u) - 1 + u,  u = log pi - log pi_ref"
    source: ClassVar[str] = "Schulman 2020; arXiv:2402.03300, eq. 4"

    def __init__(
        self,
        estimator: Literal["k1", "k2", "k3"] = "k3",
        aggregate: Aggregate = "sequence_mean",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        one_of("sampled_kl", "estimator", estimator, ("k1", "k2", "k3"))
        one_of("sampled_kl", "aggregate", aggregate, AGGREGATES)
        check_length("sampled_kl", aggregate, max_length)
        self.estimator, self.aggregate, self.max_length = estimator, aggregate, max_length

    def forward(
        self, response_logps: Tensor, reference_response_logps: Tensor, response_mask: Tensor | None = None
    ) -> Tensor:
        logps, mask = tokens_of("sampled_kl", response_logps, response_mask, self.aggregate)
        reference = reference_response_logps.detach()
        reference = reference[:, None] if reference.ndim == 1 else reference
        u = torch.where(mask, logps - reference, 0.0)
        k = {"k1": lambda: u, "k2": lambda: u.square() / 2, "k3": lambda: torch.expm1(-u) + u}[self.estimator]()
        return aggregate_tokens(k, mask, self.aggregate, self.max_length)

    @property
    def count(self) -> Callable[..., Tensor] | None:  # type: ignore[override]
        """Count answer tokens where the mean runs over tokens, and answers otherwise."""
        return self._count_tokens if self.aggregate == "token_mean" else None

    def _count_tokens(self, response_mask: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return counted(response_mask, sample_weight)
