"""The exact optimum of divergence matching on finitely many answers: what `f_sft` estimates.

    maximise over r:  J(r) = E_E[phi(r)] - beta log E_ref[exp(r/beta)],        pi = pi_ref exp(r/beta) / Z

J is concave in r, one number for each answer, and at its maximum pi = pi_E phi'(r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.terms.preference.bridge import DIVERGENCES

__all__ = ["Matching", "match_divergence"]


@dataclass(frozen=True)
class Matching:
    """Where divergence matching ends.

    Attributes:
        policy: probabilities float64 [answers]. reward: r float64 [answers], gauge included.
        value: J there. kl: KL(policy || reference), nats.
        residual: largest entry of |pi - pi_E phi'(r)|, 0 at the optimum.
    """

    policy: Tensor
    reward: Tensor
    value: float
    kl: float
    residual: float


def match_divergence(expert: Tensor, reference: Tensor, beta: float, divergence: str = "tv") -> Matching:
    """Solve divergence matching exactly by Newton's steps in float64.

    Args:
        expert, reference: probabilities [answers]; positive.
        beta: price of leaving the reference, positive.
        divergence: a name of `DIVERGENCES`.

    Raises:
        InputError: no distributions of one size, beta not positive, or no such divergence.

    >>> solved = match_divergence(torch.tensor([0.2, 0.2, 0.6]), torch.tensor([0.5, 0.3, 0.2]), 0.5, "chi2")
    >>> [round(p, 6) for p in solved.policy.tolist()], round(solved.value, 6)
    ([0.253046, 0.231873, 0.515081], 0.158771)
    """
    if divergence not in DIVERGENCES:
        raise InputError(f"match_divergence: divergence is one of {', '.join(DIVERGENCES)}, and it is {divergence!r}.")
    expert, reference = expert.double(), reference.double()
    for p in (expert, reference):
        if p.ndim != 1 or p.shape != expert.shape or not bool((p > 0).all()) or abs(float(p.sum()) - 1) > 1e-5:
            raise InputError("match_divergence: expert and reference are positive probabilities of the same answers.")
    if not beta > 0:
        raise InputError(f"match_divergence: beta must be positive, and it is {beta}.")
    phi = DIVERGENCES[divergence]
    # Sums that miss 1 by a rounding would let the linear phi run off along the gauge.
    expert, reference = expert / expert.sum(), reference / reference.sum()

    def value(r: Tensor) -> Tensor:
        return (expert * phi.continued(r)).sum() - beta * (reference.log() + r / beta).logsumexp(0)

    reward = torch.zeros_like(expert)
    for _ in range(200):
        pi = (reference.log() + reward / beta).softmax(0)
        at = reward.clamp(phi.safe, phi.turn).requires_grad_()
        slope = phi.slope(at)
        bend = torch.autograd.grad(slope.sum(), at)[0] if slope.requires_grad else torch.zeros_like(slope)
        gradient = expert * slope.detach() - pi
        if float(gradient.abs().max()) < 1e-13:
            break
        # The linear phi leaves the gauge free, which makes the curvature singular; a little of it is enough.
        spread = (torch.diag(pi) - torch.outer(pi, pi)) / beta
        curvature = spread - torch.diag(expert * bend) + 1e-9 * torch.eye(len(reward), dtype=torch.float64)
        step, size, now = torch.linalg.solve(curvature, gradient), 1.0, value(reward)
        while value(reward + size * step) < now and size > 1e-10:
            size /= 2
        reward = reward + size * step
    policy = (reference.log() + reward / beta).softmax(0)
    kl = float((policy * (policy.log() - reference.log())).sum())
    residual = float((policy - expert * phi.slope(reward)).abs().max())
    return Matching(policy, reward, float(value(reward)), kl, residual)
