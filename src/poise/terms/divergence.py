"""Divergences between the policy and the posterior of a reward: one target, several ways to approach it.

With log P(x) = log pi0(x) + r(x)/beta, pi* = P/Z and samples x of a proposal q:

    reverse_kl        KL(pi || pi*)   E_q[(pi/q) log(pi/pi*)]                      what "reward - beta KL" minimises
    forward_kl        KL(pi* || pi)   E_q[(pi*/q) log(pi*/pi)]                     maximum likelihood on the target (DPG, GDC)
    total_variation                   1/2 E_q|pi/q - pi*/q|
    jensen_shannon                    1/2 KL(pi || m) + 1/2 KL(pi* || m), m the mean of both

Each comes with the samples it can use: those of the policy now ("policy"), of another distribution with its log-probabilities
("proposal"), or every response of a finite space once ("enumeration", exact). Only the first is a form of reinforcement
learning: for the others there is no reward, free of theta, whose expectation under the policy they are.
Source: arXiv:2205.11275.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value
from poise.terms.groups import group_size, leave_one_out, log_mean_exp
from poise.terms.sequences import sequence_sum

__all__ = ["ForwardKL", "JensenShannon", "ReverseKL", "TotalVariation"]


def check_choice(where: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise where an argument is none of the texts that it may be."""
    if value not in choices:
        raise InputError(f"{where}: {name} is {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, not {value!r}.")


def check_discrete(where: str, logps: Tensor) -> None:
    """Raise where a log-probability is positive; on an accelerator that would wait for the device, so only on the CPU."""
    # 1e-3: float32 sums of many exact zeros may round above 0.
    if logps.device.type == "cpu" and bool((logps > 1e-3).any()):
        raise QuantityError(
            f"{where} reads log-probabilities, and the largest is {float(logps.detach().max()):.4g}: they are <= 0. "
            "Are these logits, or densities of a continuous policy (gradient='pathwise')?"
        )


def check_reward(where: str, reward: Tensor) -> None:
    """Raise where a reward is not finite, on the CPU."""
    if reward.device.type == "cpu" and not bool(torch.isfinite(reward).all()):
        raise QuantityError(
            f"{where} reads 'reward', and it is not finite at {int((~torch.isfinite(reward)).sum())} rows."
        )


def log_proposal(
    where: str, samples: str, policy: Tensor, behaviour_logps: Tensor | None, group: Tensor | None
) -> Tensor:
    """Return log q(x) of the rows, detached `[batch]`: what they were drawn from."""
    if samples == "policy":
        return policy.detach()
    if samples == "enumeration":
        # Each response once is a sample of the uniform distribution with every frequency exactly met.
        return -group_size(policy.detach(), group).log()
    if behaviour_logps is None:
        raise QuantityError(
            f"{where}(samples='proposal') reads 'behaviour_logps', the log-probabilities of the proposal."
        )
    return sequence_sum(behaviour_logps).detach()


class _Divergence(Term):
    """What the divergences share: target, proposal, normaliser.

    Args:
        beta: temperature of the reward, positive; not used where `log_score` is offered.
        samples: "policy", "proposal" or "enumeration".
        log_z: "batch", the estimate from the samples of each group; "running", its running mean over steps (one prompt); or a number.
    """

    capabilities = frozenset({"per_example", "deterministic"})
    couples = ("response_logps",)
    running: Tensor
    batches: Tensor

    def __init__(self, beta: float = 1.0, samples: str = "policy", log_z: str | float = "batch") -> None:
        super().__init__()
        if not beta > 0:
            raise InputError(f"{self.formula}: beta must be positive, and it is {beta}.")
        check_choice(self.formula, "samples", samples, ("policy", "proposal", "enumeration"))
        if isinstance(log_z, str):
            check_choice(self.formula, "log_z", log_z, ("batch", "running"))
        self.beta, self.samples, self.log_z = beta, samples, log_z
        self.register_buffer("running", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("batches", torch.tensor(0, dtype=torch.int64))
        if log_z != "running":
            self.advance = None  # type: ignore[method-assign, assignment]  # nothing moves with the steps

    def readings(self) -> tuple[str, ...]:
        """Samples of the policy itself, or all of them, need no proposal."""
        return () if self.samples == "proposal" else ("behaviour_logps",)

    def requirements(self) -> tuple[str, ...]:
        """Samples of a proposal need its log-probabilities."""
        return ("behaviour_logps",) if self.samples == "proposal" else ()

    def forward(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor | None = None,
        reward: Tensor | None = None,
        log_score: Tensor | None = None,
        behaviour_logps: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Value:
        policy = sequence_sum(response_logps)
        target = self._target(policy, reference_response_logps, reward, log_score)
        self._check_policy(policy)
        proposal = log_proposal(self.formula, self.samples, policy, behaviour_logps, group)
        log_z = self._normaliser(target.detach() - proposal, group)
        return self._charge(policy, target - log_z, proposal, group)

    def _charge(self, policy: Tensor, target: Tensor, proposal: Tensor, group: Tensor | None) -> Value:
        """Return the values: log pi, log pi* and log q are `[batch]`, the last two detached."""
        raise NotImplementedError

    def _check_policy(self, policy: Tensor) -> None:
        check_discrete(self.formula, policy)

    def _target(
        self, policy: Tensor, reference: Tensor | None, reward: Tensor | None, log_score: Tensor | None
    ) -> Tensor:
        """Return log P(x), detached."""
        if log_score is None:
            if reference is None or reward is None:
                raise QuantityError(
                    f"{self.formula} reads 'reference_response_logps' and 'reward', or 'log_score' in their place, and neither is offered."
                )
            check_reward(self.formula, reward)
            log_score = sequence_sum(reference) + reward / self.beta
        if log_score.shape != policy.shape:
            raise QuantityError(
                f"{self.formula}: log-probabilities {list(policy.shape)} and target {list(log_score.shape)} differ in shape."
            )
        return log_score.detach()

    def _normaliser(self, log_weight: Tensor, group: Tensor | None) -> Tensor | float:
        """Return log Z, `[batch]` or one number."""
        if not isinstance(self.log_z, str):
            return self.log_z
        own = log_mean_exp(log_weight, group)
        if own.device.type == "cpu" and not bool(torch.isfinite(own).all()):
            raise QuantityError(
                f"{self.formula}: every weight P/q of a group is 0 or not finite: the constraint was never satisfied in the batch. "
                "Draw more samples for each prompt, or from a proposal that satisfies it more often."
            )
        return own if self.log_z == "batch" else self._mean_with(own)

    def _mean_with(self, own: Tensor) -> Tensor:
        """Return log of the running mean of Z, this batch included: log((n Z_running + Z) / (n + 1))."""
        if own.device.type == "cpu" and bool((own != own[0]).any()):
            raise QuantityError(
                f"{self.formula}: log_z='running' keeps one number, and the batch has several prompts (groups), each with its own "
                "normaliser. Use log_z='batch'."
            )
        before = torch.where(self.batches > 0, self.running + self.batches.clamp_min(1).double().log(), -torch.inf)
        return (torch.logaddexp(before, own[0].double()) - (self.batches + 1).double().log()).to(own.dtype)

    def advance(
        self,
        response_logps: Tensor,
        reference_response_logps: Tensor | None = None,
        reward: Tensor | None = None,
        log_score: Tensor | None = None,
        behaviour_logps: Tensor | None = None,
        group: Tensor | None = None,
    ) -> None:
        """Store the running mean that `forward` evaluated with."""
        if self.log_z != "running":
            return
        policy = sequence_sum(response_logps)
        target = self._target(policy, reference_response_logps, reward, log_score)
        proposal = log_proposal(self.formula, self.samples, policy, behaviour_logps, group)
        self.running = self._mean_with(log_mean_exp(target - proposal, group)).double()
        self.batches = self.batches + 1


class ReverseKL(_Divergence):
    """KL(pi || pi*), up to log Z: `E_pi[log pi - log pi0 - r/beta]`, the negative evidence bound.

        gradient   E_pi[(log(pi/P) - b) grad log pi],   b the mean over the other samples of the prompt

    The log-ratio within the bracket is detached; what differentiating it would add has expectation 0. Minimising this value is
    maximising (E[r] - beta KL(pi || pi0))/beta. It reads the token record and sums it: no division by length, which would
    change the target.

    Reads `response_logps` float `[batch, time]` or `[batch]`; `reference_response_logps` and `reward` `[batch]`, or `log_score` `[batch]`
    in their place; `group` if offered; with `samples="proposal"` also `behaviour_logps`.

    Args:
        beta: temperature of the reward, positive.
        samples: "policy" (drawn now), "proposal" (importance weights pi/q, detached), "enumeration" (exact).
        baseline: "loo", the leave-one-out mean of the group, or "none".
        gradient: "score", or "pathwise" where the samples are differentiable functions of the policy's parameters: then
            `response_logps` and `log_score` carry gradients, and densities may exceed 1.
        log_z: 0 leaves log Z out of the value; "batch", "running" or a number subtracts it. The gradient is the same.

    >>> ReverseKL()(torch.tensor([-1.0, -2.0]), log_score=torch.tensor([-1.0, -1.0])).values
    tensor([ 0., -1.])

    Source: arXiv:2205.11275, the equation of KL-regularised reward and variational inference.
    """

    formula = "reverse_kl"
    equation = "E_pi[log pi(x) - log pi0(x) - r(x)/beta] = KL(pi || pi*) - log Z"
    source = "arXiv:2205.11275"
    bounded_below = False

    def __init__(
        self,
        beta: float = 1.0,
        samples: str = "policy",
        baseline: str = "loo",
        gradient: str = "score",
        log_z: str | float = 0.0,
    ) -> None:
        super().__init__(beta, samples, log_z)
        check_choice(self.formula, "baseline", baseline, ("loo", "none"))
        check_choice(self.formula, "gradient", gradient, ("score", "pathwise"))
        if gradient == "pathwise" and samples != "policy":
            raise InputError(
                f"reverse_kl: gradient='pathwise' differentiates the policy's own samples, not samples={samples!r}."
            )
        self.baseline, self.gradient = baseline, gradient
        if not isinstance(log_z, str) and (baseline == "none" or gradient == "pathwise"):
            self.couples = ()  # type: ignore[misc, assignment]  # each sample stands alone

    def _check_policy(self, policy: Tensor) -> None:
        if self.gradient == "score":
            check_discrete(self.formula, policy)

    def _target(
        self, policy: Tensor, reference: Tensor | None, reward: Tensor | None, log_score: Tensor | None
    ) -> Tensor:
        detached = super()._target(policy, reference, reward, log_score)
        if detached.device.type == "cpu" and bool((detached == -torch.inf).any()):
            raise QuantityError(
                "reverse_kl: the target forbids a sample (log_score is -inf), so the divergence is infinite. A hard constraint needs "
                "forward_kl, total_variation or jensen_shannon."
            )
        if self.gradient == "score":
            return detached
        return log_score if log_score is not None else sequence_sum(reference) + reward / self.beta  # type: ignore[arg-type, operator]

    def _charge(self, policy: Tensor, target: Tensor, proposal: Tensor, group: Tensor | None) -> Value:
        if self.gradient == "pathwise":
            return Value(policy - target)
        if self.samples == "enumeration":
            return Value((policy - proposal).exp() * (policy - target))
        ratio = (policy - target).detach()
        weight = (policy.detach() - proposal).exp()
        values = weight * ratio
        baseline = leave_one_out(values, group) if self.baseline == "loo" else 0.0
        return Value(values, surrogate=weight * (ratio - baseline) * policy)


class ForwardKL(_Divergence):
    """KL(pi* || pi): maximum likelihood on the target, with importance weights: `E_q[w (log pi* - log pi)], w = P/(q Z)`.

        gradient   -E_q[w grad log pi], w detached

    It covers all of the target where reverse KL may settle on a part, and a hard constraint (weight 0) is welcome. The
    weights are heavy-tailed: watch `forward_kl.ess`, the effective share of the samples, in (0, 1]. With `log_z="batch"` a
    prompt needs several samples: one alone weighs 1 whatever its reward.

    Reads as `ReverseKL`. Publishes `ess` (0-dim) and `weight` `[batch]`.

    Args:
        beta: temperature of the reward, positive.
        samples: "policy" (on-policy DPG: q is the policy now, detached), "proposal" (reads `behaviour_logps`), or "enumeration".
        log_z: "batch", "running" or a number, see above; it scales the gradient, so "running" is steadier in small batches.
        clip: largest weight; None keeps them all. Clipping is biased towards what the proposal already does.

    Source: arXiv:2205.11275, section on divergences; Parshakova et al., arXiv:1912.08517; Khalifa et al., arXiv:2012.11635.
    """

    formula = "forward_kl"
    equation = "E_q[w (log pi*(x) - log pi(x))], w = P(x)/(q(x) Z)"
    source = "arXiv:2205.11275; arXiv:2012.11635"

    def __init__(
        self, beta: float = 1.0, samples: str = "policy", log_z: str | float = "batch", clip: float | None = None
    ) -> None:
        super().__init__(beta, samples, log_z)
        if clip is not None and clip <= 0:
            raise InputError(f"forward_kl: clip must be positive, and it is {clip}.")
        self.clip = clip

    def _charge(self, policy: Tensor, target: Tensor, proposal: Tensor, group: Tensor | None) -> Value:
        weight = (target - proposal).exp()
        if self.clip is not None:
            weight = weight.clamp_max(self.clip)
        # A forbidden sample weighs 0, and 0 * (-inf) must not become NaN.
        target = torch.where(weight > 0, target, policy.detach())
        share = weight.mean().square() / weight.square().mean()
        return Value(weight * (target - policy), extras={"ess": share, "weight": weight})


class TotalVariation(_Divergence):
    """Total variation: `1/2 E_q |pi/q - pi*/q|`, in [0, 1] up to noise.

    Bounded, so no sample dominates; its gradient vanishes where policy and target do not overlap. Reads and arguments as `ForwardKL`.

    Source: arXiv:2205.11275; as a training objective, Go et al., arXiv:2302.08215.
    """

    formula = "total_variation"
    equation = "1/2 E_q |pi(x)/q(x) - P(x)/(q(x) Z)|"
    source = "arXiv:2205.11275; arXiv:2302.08215"

    def _charge(self, policy: Tensor, target: Tensor, proposal: Tensor, group: Tensor | None) -> Value:
        return Value(0.5 * ((policy - proposal).exp() - (target - proposal).exp()).abs())


class JensenShannon(_Divergence):
    """Jensen-Shannon divergence: `1/2 KL(pi || m) + 1/2 KL(pi* || m)`, `m = (pi + pi*)/2`; in [0, log 2] up to noise.

        gradient   E_q[(pi/q) 1/2 log(pi/m) grad log pi]

    Between the two: bounded, symmetric, and finite under hard constraints. Reads and arguments as `ForwardKL`.

    Source: arXiv:2205.11275; as a training objective, Go et al., arXiv:2302.08215.
    """

    formula = "jensen_shannon"
    equation = "1/2 KL(pi || m) + 1/2 KL(pi* || m), m = (pi + pi*)/2"
    source = "arXiv:2205.11275; arXiv:2302.08215"

    def _charge(self, policy: Tensor, target: Tensor, proposal: Tensor, group: Tensor | None) -> Value:
        mean = torch.logaddexp(policy, target) - torch.log(policy.new_tensor(2.0))
        allowed = target > -torch.inf
        star = torch.where(allowed, (target - proposal).exp() * (torch.where(allowed, target, 0.0) - mean), 0.0)
        return Value(0.5 * ((policy - proposal).exp() * (policy - mean) + star))
