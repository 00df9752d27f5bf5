"""The distribution that a reward asks for, and how far a policy is from it.

Maximising `E_pi[r] - beta KL(pi || pi0)` is variational inference: with

    pi*(x) = pi0(x) exp(r(x)/beta) / Z,        J(pi) = -beta KL(pi || pi*) + beta log Z,

so J/beta is a lower bound of log Z that is tight at pi* alone. Reward, posterior and the reward that a policy implies are three
ways to say one thing; `Tilt` converts between them, with the constant that each conversion leaves open (the gauge) written
out. Source: Korbak, Perez and Buckley, arXiv:2205.11275.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError
from poise.problem import Certificate
from poise.terms.groups import log_mean_exp
from poise.terms.sequences import sequence_sum

__all__ = ["Estimates", "LogZ", "Posterior", "Tilt", "estimate_divergences"]


def _check_beta(where: str, beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise InputError(
            f"{where}: beta must be positive, and it is {beta}. With beta = 0 the target is a single point."
        )


@dataclass(frozen=True)
class Tilt:
    """Convert between reward, posterior and implicit reward at one temperature, the gauge explicit.

        log pi*(x) = log pi0(x) + r(x)/beta - log Z          posterior
        r(x)       = beta log(pi*(x)/pi0(x)) + beta log Z    implicit_reward

    A reward and the same reward plus a constant of each prompt have one posterior, so what comes back from a policy is fixed
    only with a `log_z`: that of the reward gives the reward itself; 0, the default and what DPO compares, gives the member of
    the class whose posterior needs no normaliser. The `beta` is that of DPO and its relatives.

    Args:
        beta: temperature in units of the reward, positive.

    >>> tilt, prior = Tilt(0.5), torch.tensor([0.5, 0.3, 0.2]).log()
    >>> reward = torch.tensor([0.0, 1.0, 3.0])
    >>> posterior = tilt.posterior(prior, reward, tilt.log_z(prior, reward))
    >>> tilt.implicit_reward(posterior, prior, tilt.log_z(prior, reward)).round(decimals=4)
    tensor([0., 1., 3.])
    """

    beta: float

    def __post_init__(self) -> None:
        _check_beta("tilt", self.beta)

    def log_score(self, prior_logps: Tensor, reward: Tensor) -> Tensor:
        """Return `log P(x) = log pi0(x) + r(x)/beta`, the posterior up to its normaliser."""
        return prior_logps + reward / self.beta

    def log_z(self, prior_logps: Tensor, reward: Tensor) -> Tensor:
        """Return log Z where the last dimension lists all responses."""
        return self.log_score(prior_logps, reward).logsumexp(-1, keepdim=prior_logps.ndim > 1)

    def posterior(self, prior_logps: Tensor, reward: Tensor, log_z: Tensor | float) -> Tensor:
        """Return log pi*(x)."""
        return self.log_score(prior_logps, reward) - log_z

    def implicit_reward(self, policy_logps: Tensor, prior_logps: Tensor, log_z: Tensor | float = 0.0) -> Tensor:
        """Return the reward whose posterior the policy is: `beta log(pi/pi0) + beta log Z`."""
        return self.beta * (policy_logps - prior_logps + log_z)

    def normalised(self, prior_logps: Tensor, reward: Tensor) -> Tensor:
        """Return the equivalent reward with log Z = 0: `r - beta log Z`, the last dimension listing all responses."""
        return reward - self.beta * self.log_z(prior_logps, reward)

    def centred(self, prior_logps: Tensor, reward: Tensor) -> Tensor:
        """Return the equivalent reward whose mean under the prior is 0, the last dimension listing all responses."""
        return reward - (prior_logps.exp() * reward).sum(-1, keepdim=True)


@dataclass(frozen=True)
class LogZ:
    """An estimate of log Z: its value, its standard error (delta method), and the effective sample size behind it."""

    value: float
    standard_error: float
    ess: float
    samples: int


class Posterior:
    """A target distribution: a prior, tilted by a reward, by weighted features, and cut by a constraint.

        log P(x) = log pi0(x) + r(x)/beta + lambda . phi(x)        where the constraint holds, else -inf

    Args:
        prior: `prior(samples) -> log-probabilities float [batch]`, or [batch, time]; None where `prior_logps` are always given.
        reward: `reward(samples) -> float [batch]`, or None.
        beta: temperature of the reward, positive.
        features: `features(samples) -> float [batch, features]`, or None.
        lambdas: their weights float `[features]`; zeros until `fit_moments` finds them.
        constraint: `constraint(samples) -> bool [batch]`: outside it the target is 0.

    Raises:
        InputError: beta not positive.

    Source: arXiv:2205.11275; features and their weights: Khalifa et al., arXiv:2012.11635.
    """

    def __init__(
        self,
        prior: Callable[[Any], Tensor] | None = None,
        reward: Callable[[Any], Tensor] | None = None,
        beta: float = 1.0,
        features: Callable[[Any], Tensor] | None = None,
        lambdas: Any = None,
        constraint: Callable[[Any], Tensor] | None = None,
    ) -> None:
        _check_beta("posterior", beta)
        if lambdas is not None and features is None:
            raise InputError("posterior: lambdas weigh features, and there are no features.")
        self.prior, self.reward, self.beta, self.features, self.constraint = prior, reward, beta, features, constraint
        self.lambdas: Tensor | None = None if lambdas is None else torch.as_tensor(lambdas, dtype=torch.float64)

    def __repr__(self) -> str:
        parts = ["log pi0(x)"]
        parts += [f"r(x)/{self.beta:g}"] if self.reward is not None else []
        parts += [f"lambda.phi(x), lambda = {self.lambdas.tolist()}"] if self.lambdas is not None else []
        parts += ["log [constraint]"] if self.constraint is not None else []
        return f"Posterior(log P = {' + '.join(parts)})"

    def prior_logps(self, samples: Any, prior_logps: Tensor | None = None) -> Tensor:
        """Return the prior's log-probabilities, given or computed, summed: float `[batch]`."""
        if prior_logps is None:
            if self.prior is None:
                raise InputError("posterior: it has no prior model, so give prior_logps.")
            with torch.no_grad():
                prior_logps = self.prior(samples)
        return sequence_sum(prior_logps)

    def log_factor(self, samples: Any) -> Tensor | float:
        """Return `log P(x) - log pi0(x)`, float `[batch]`; 0 where there is neither reward nor feature nor constraint.

        Raises:
            InputError: a reward that is not finite. What is forbidden belongs to `constraint`.
        """
        factor: Tensor | float = 0.0
        if self.reward is not None:
            reward = self.reward(samples)
            if not bool(torch.isfinite(reward).all()):
                raise InputError("posterior: every reward must be finite; what is forbidden belongs to `constraint`.")
            factor = reward / self.beta
        if self.features is not None and self.lambdas is not None:
            phi = self.features(samples)
            factor = factor + phi @ self.lambdas.to(phi)
        if self.constraint is not None:
            allowed = self.constraint(samples)
            factor = factor + torch.where(allowed, 0.0, -torch.inf)
        return factor

    def log_score(self, samples: Any, prior_logps: Tensor | None = None) -> Tensor:
        """Return log P(x), float `[batch]`: the target's log-probability up to log Z.

        Raises:
            InputError: no prior and no `prior_logps`, shapes that differ, or a reward that is not finite.
        """
        prior, factor = self.prior_logps(samples, prior_logps), self.log_factor(samples)
        if isinstance(factor, Tensor) and factor.shape != prior.shape:
            raise InputError(
                f"posterior: {len(prior)} samples need {list(prior.shape)} factors, and they are {list(factor.shape)}."
            )
        return prior + factor

    def estimate_log_z(self, proposal: Callable[[int], tuple[Any, Tensor]], n: int) -> LogZ:
        """Estimate log Z = log E_q[P(x)/q(x)] with `n` samples.

        Args:
            proposal: `proposal(n) -> (samples, log-probabilities)`. They must be those of the distribution that was drawn from: sampling
                with top-p or top-k under the full model's log-probabilities biases every weight.

        Raises:
            InputError: every weight is 0, so the constraint was never satisfied.
        """
        samples, logps = proposal(n)
        return estimate_log_z(self.log_score(samples) - sequence_sum(logps))

    def fit_moments(
        self, target_means: Any, samples: Any, *, method: str = "newton", tolerance: float = 1e-8, steps: int = 2000,
        lr: float = 0.5,
    ) -> Certificate:  # fmt: skip
        """Find the lambdas with which the features have these means under the target, and keep them.

            newton   minimise the convex dual log Z(lambda) - lambda . mean, whose gradient is E_lambda[phi] - mean
            sgd      minimise 1/2 ||E_lambda[phi] - mean||^2 by gradient descent, as the authors of GDC do

        Args:
            target_means: float `[features]`.
            samples: drawn from the target without these features (from the prior, where there is no reward); E_lambda weighs
                them with exp(lambda . phi).
            method, tolerance, steps, lr: of the search; `tolerance` bounds the largest difference of a mean.

        Returns: a certificate: the residual is the largest difference of a mean, `status` says the effective sample size.

        Raises:
            InputError: no features, or a mean outside the range that the samples show, which no weights reach.
        """
        if self.features is None:
            raise InputError("posterior: fit_moments needs features.")
        if method not in ("newton", "sgd"):
            raise InputError(f"posterior: method is 'newton' or 'sgd', and it is {method!r}.")
        phi = self.features(samples).double()
        means = torch.as_tensor(target_means, dtype=torch.float64).reshape(-1)
        _check_reachable(phi, means)
        found, used = (_newton if method == "newton" else _descend)(phi, means, tolerance, steps, lr)
        self.lambdas = found
        weight = (phi @ found).softmax(0)
        residual = float((weight @ phi - means).abs().max())
        ess = float(1 / weight.square().sum())
        status = f"{'converged' if residual <= tolerance else 'not converged'}, effective sample size {ess:.0f} of {len(phi)}"
        dual = float((phi @ found).logsumexp(0) - math.log(len(phi)) - found @ means)
        return Certificate(dual, residual, tolerance, "largest difference of a mean", used, status)


def _check_reachable(phi: Tensor, means: Tensor) -> None:
    if phi.ndim != 2 or phi.shape[1] != len(means):
        raise InputError(f"posterior: features {list(phi.shape)} need one mean a column, and there are {len(means)}.")
    low, high = phi.amin(0), phi.amax(0)
    for place, mean in enumerate(means.tolist()):
        if not float(low[place]) < mean < float(high[place]):
            raise InputError(
                f"posterior: feature {place} lies in [{float(low[place]):g}, {float(high[place]):g}] on the samples, so no weights give it "
                f"the mean {mean:g}. Draw more samples, or ask for a mean inside the range."
            )


def _newton(phi: Tensor, means: Tensor, tolerance: float, steps: int, lr: float) -> tuple[Tensor, int]:
    """Damped Newton on the dual; it is convex, so halving the step until it falls is enough."""
    found = torch.zeros(len(means), dtype=torch.float64)

    def dual(at: Tensor) -> float:
        return float((phi @ at).logsumexp(0) - at @ means)

    for used in range(min(steps, 100)):
        weight = (phi @ found).softmax(0)
        mean = weight @ phi
        gradient = mean - means
        if float(gradient.abs().max()) <= tolerance:
            return found, used
        centred = phi - mean
        curvature = (weight[:, None] * centred).T @ centred
        # Collinear features leave the curvature singular; a little of its trace makes every step a descent.
        curvature = curvature + 1e-10 * curvature.diagonal().mean() * torch.eye(len(means), dtype=torch.float64)
        step, here, share = torch.linalg.solve(curvature, gradient), dual(found), 1.0
        while share > 1e-8 and dual(found - share * step) > here - 1e-4 * share * float(gradient @ step):
            share /= 2
        found = found - share * step
    return found, min(steps, 100)


def _descend(phi: Tensor, means: Tensor, tolerance: float, steps: int, lr: float) -> tuple[Tensor, int]:
    found = torch.zeros(len(means), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([found], lr=lr)
    for used in range(steps):
        difference = (phi @ found).softmax(0) @ phi - means
        if float(difference.detach().abs().max()) <= tolerance:
            return found.detach(), used
        optimizer.zero_grad()
        (0.5 * difference.square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found.detach(), steps


def estimate_log_z(log_weight: Tensor) -> LogZ:
    """Estimate log Z from `log P(x) - log q(x)` of samples of q: `log mean exp`, with its standard error and sample size.

    Raises:
        InputError: every weight is 0.
    """
    value = log_mean_exp(log_weight.double())
    if not bool(torch.isfinite(value).all()):
        raise InputError(
            f"posterior: all {len(log_weight)} weights P/q are 0 or not finite, so the samples say nothing about the target. "
            "Draw more of them, or from a proposal that satisfies the constraint more often."
        )
    relative = (log_weight.double() - value).exp()
    n = len(relative)
    error = float(relative.std() / math.sqrt(n)) if n > 1 else math.inf
    return LogZ(float(value[0]), error, float(relative.sum().square() / relative.square().sum()), n)


@dataclass(frozen=True)
class Estimates:
    """How far a policy is from the target, from samples of a proposal.

    Attributes:
        log_z: the log-normaliser that was used.
        forward_kl: KL(pi* || pi), nats: `-log Z + mean_q[(P/(q Z)) (log P - log pi)]`.
        reverse_kl: KL(pi || pi*), nats: `log Z + mean_q[(pi/q) (log pi - log P)]`; infinite where the policy has mass that the target
            forbids.
        total_variation: `1/2 mean_q |pi/q - P/(Z q)|`, in [0, 1] up to noise.
        ess: effective sample size of the weights P/q.
    """

    log_z: float
    forward_kl: float
    reverse_kl: float
    total_variation: float
    ess: float


def estimate_divergences(
    policy_logps: Tensor, log_score: Tensor, proposal_logps: Tensor | None = None, log_z: float | None = None
) -> Estimates:
    """Estimate the divergences between a policy and a target from samples of a proposal.

    Args:
        policy_logps: log pi(x), float `[batch]` or `[batch, time]`.
        log_score: log P(x), float `[batch]`; -inf where the target forbids x.
        proposal_logps: log q(x) of the distribution that the samples were drawn from; the policy's own by default.
        log_z: a better estimate than this batch's own, such as a running one.

    Raises:
        InputError: every weight is 0.
    """
    policy, target = sequence_sum(policy_logps).detach().double(), log_score.detach().double()
    proposal = policy if proposal_logps is None else sequence_sum(proposal_logps).detach().double()
    own = estimate_log_z(target - proposal)
    log_z = own.value if log_z is None else log_z
    star, own_share = (target - proposal - log_z).exp(), (policy - proposal).exp()
    forward = torch.where(star > 0, star * (target - log_z - policy), 0.0).mean()
    reverse = torch.where(own_share > 0, own_share * (policy - target + log_z), 0.0).mean()
    return Estimates(log_z, float(forward), float(reverse), float(0.5 * (own_share - star).abs().mean()), own.ess)
