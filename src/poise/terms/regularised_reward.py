"""Reward, and the divergence from the prior that keeps it honest, as two terms with a weight between them.

    expected_reward + 0.1*reference_kl                      E_pi[r] - 0.1 KL(pi || pi0), to be maximised
    expected_reward + linear(1, 0.1)*reference_kl           the same with a temperature that falls
    expected_reward + adaptive_kl(reference_kl, target=6)   the same with a temperature that holds the divergence at 6 nats

With a fixed weight that is `beta * reverse_kl(beta)`; `expected_reward` alone has its optimum in a single point.

Three estimators of KL(pi || pi0) from samples of the policy, with u = log pi - log pi0:

    k1 = u                 unbiased value; as a loss its gradient has expectation 0, so it must not be differentiated
    k2 = u^2 / 2           biased value; as a loss its gradient u grad log pi is that of KL(pi || pi0), without bias
    k3 = exp(-u) - 1 + u   unbiased value, never negative; as a loss its gradient is that of KL(pi0 || pi), the other direction
"""

from __future__ import annotations

import torch
from torch import Tensor

from poise.objective import Term, Value
from poise.terms.divergence import check_choice, check_discrete, check_reward, log_proposal
from poise.terms.groups import leave_one_out
from poise.terms.sequences import sequence_sum

__all__ = ["ExpectedReward", "LengthNormalizedKL", "ReferenceKL", "k1", "k2", "k3"]

_SAMPLES = ("policy", "proposal", "enumeration")


def k1(log_ratio: Tensor) -> Tensor:
    """Return `u`: unbiased for KL(pi || pi0) on samples of pi, but negative as often as not, and useless as a loss."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return `u^2/2`: biased, but its gradient on samples of pi is that of KL(pi || pi0)."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Return `exp(-u) - 1 + u`: unbiased and >= 0, but its gradient on samples of pi is that of KL(pi0 || pi)."""
    return torch.expm1(-log_ratio) + log_ratio


_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


class _OfPolicy(Term):
    """An expectation under the policy, with the gradient of the score function."""

    capabilities = frozenset({"per_example", "deterministic"})
    couples = ("response_logps",)

    def __init__(self, samples: str = "policy", baseline: str = "loo") -> None:
        super().__init__()
        check_choice(self.formula, "samples", samples, _SAMPLES)
        check_choice(self.formula, "baseline", baseline, ("loo", "none"))
        self.samples, self.baseline = samples, baseline
        if baseline == "none" and samples != "enumeration":
            self.couples = ()  # type: ignore[misc, assignment]  # each sample stands alone

    def readings(self) -> tuple[str, ...]:
        """Samples of the policy itself, or all of them, need no proposal."""
        return () if self.samples == "proposal" else ("behaviour_logps",)

    def requirements(self) -> tuple[str, ...]:
        """Samples of a proposal need its log-probabilities."""
        return ("behaviour_logps",) if self.samples == "proposal" else ()

    def _expectation(
        self, cost: Tensor, shown: Tensor, policy: Tensor, behaviour: Tensor | None, group: Tensor | None
    ) -> Value:
        """E_pi[cost]: gradient `(cost - b) grad log pi`; `shown` is the estimate of its value."""
        proposal = log_proposal(self.formula, self.samples, policy, behaviour, group)
        weight = (policy.detach() - proposal).exp()
        # Over all responses the exact gradient needs no baseline, and one that differs from row to row would bias it.
        loo = self.baseline == "loo" and self.samples != "enumeration"
        baseline = leave_one_out(weight * cost, group) if loo else 0.0
        return Value(weight * shown, surrogate=weight * (cost - baseline) * policy)


class ExpectedReward(_OfPolicy):
    """The negative expected reward: `-E_pi[r]`, by the score function with a leave-one-out baseline.

        gradient   -E_pi[(r - b) grad log pi]

    Alone it collapses: its optimum is a point mass on the largest reward, whatever the prior.

    Reads `response_logps` float `[batch, time]` or `[batch]`, `reward` float `[batch]`, `group` if offered; with `samples="proposal"` also
    `behaviour_logps`.

    Args:
        samples: "policy" (drawn now), "proposal" (importance weights), "enumeration" (every response once, exact).
        baseline: "loo", the mean over the other samples of the prompt, or "none".

    >>> ExpectedReward()(torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 4.0])).values
    tensor([-2., -4.])

    Source: arXiv:2205.11275; Williams (1992); leave-one-out: Kool, van Hoof and Welling (2019).
    """

    formula = "expected_reward"
    equation = "-E_pi[r(x)]"
    source = "arXiv:2205.11275; Williams (1992)"
    bounded_below = False

    def forward(
        self, response_logps: Tensor, reward: Tensor, behaviour_logps: Tensor | None = None, group: Tensor | None = None
    ) -> Value:
        policy = sequence_sum(response_logps)
        check_discrete(self.formula, policy)
        check_reward(self.formula, reward)
        return self._expectation(-reward.detach(), -reward.detach(), policy, behaviour_logps, group)


class ReferenceKL(_OfPolicy):
    """KL(pi || pi0) of whole responses: `E_pi[u], u = sum_t log pi(x_t) - log pi0(x_t)`.

    Tokens are summed and not averaged, and the gradient counts what a token does to those after it, so that
    `expected_reward + beta*reference_kl` has the posterior `pi0 exp(r/beta)/Z`. Penalties of each token alone have not.

    Reads `response_logps` and `reference_response_logps`, float `[batch, time]` or `[batch]`; `group` if offered; with
    `samples="proposal"` also `behaviour_logps`. Values in nats.

    Args:
        estimator: "k1", "k2" or "k3", how the value is estimated from u.
        gradient: "unbiased", the score function `(u - b) grad log pi`, whatever the estimator; or "own", which differentiates the
            estimator: noise for k1, KL(pi || pi0) for k2, KL(pi0 || pi) for k3.
        samples, baseline: see `ExpectedReward`.

    >>> ReferenceKL("k2")(torch.tensor([-1.0]), torch.tensor([-3.0])).values
    tensor([2.])

    Source: arXiv:2205.11275; the estimators' names are Schulman's (2020).
    """

    formula = "reference_kl"
    equation = "E_pi[sum_t log pi(x_t) - log pi0(x_t)] = KL(pi || pi0)"
    source = "arXiv:2205.11275; Schulman (2020)"

    def __init__(
        self, estimator: str = "k1", gradient: str = "unbiased", samples: str = "policy", baseline: str = "loo"
    ) -> None:
        super().__init__(samples, baseline)
        check_choice(self.formula, "estimator", estimator, tuple(_ESTIMATORS))
        check_choice(self.formula, "gradient", gradient, ("unbiased", "own"))
        self.estimator, self.gradient = estimator, gradient

    def forward(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        behaviour_logps: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Value:
        policy, prior = sequence_sum(response_logps), sequence_sum(reference_response_logps).detach()
        check_discrete(self.formula, policy)
        return self._of_ratio(policy - prior, policy, behaviour_logps, group)

    def _of_ratio(self, ratio: Tensor, policy: Tensor, behaviour: Tensor | None, group: Tensor | None) -> Value:
        estimate = _ESTIMATORS[self.estimator](ratio)
        if self.gradient == "unbiased":
            return self._expectation(ratio.detach(), estimate.detach(), policy, behaviour, group)
        proposal = log_proposal(self.formula, self.samples, policy, behaviour, group)
        return Value((policy.detach() - proposal).exp() * estimate)


class LengthNormalizedKL(ReferenceKL):
    """KL a token: `E_pi[u / length]`. It is no divergence of the two distributions, and its optimum is not `pi0 exp(r/beta)`.

    With it a long response pays less for the same log-ratio, so the target favours length. Use `reference_kl` unless you mean that.

    Reads `response_mask` bool `[batch, time]` beside what `ReferenceKL` reads. Values in nats a token. Arguments as `ReferenceKL`.
    """

    formula = "length_normalized_kl"
    equation = "E_pi[(log pi(x) - log pi0(x)) / length(x)]"

    def forward(  # type: ignore[override]
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor,
        response_mask: Tensor,
        behaviour_logps: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Value:
        policy, prior = sequence_sum(response_logps), sequence_sum(reference_response_logps).detach()
        check_discrete(self.formula, policy)
        return self._of_ratio((policy - prior) / response_mask.sum(1).clamp_min(1), policy, behaviour_logps, group)
