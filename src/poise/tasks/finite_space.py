"""A finite response space, where everything that alignment estimates can be computed exactly.

    space = FiniteSpace(prior=[0.5, 0.3, 0.2], reward=[0.0, 1.0, 3.0])
    space.posterior(beta=0.5)                                  # log pi*(x) = log pi0(x) + r(x)/beta - log Z
    solution = space.minimize("dpo(beta=0.5)", space.pairs())  # any objective, over all pairs, to its exact minimum
    solution.logps                                             # of every response

One answer is one token. Its ids are `[prompt, response]`, the mask is True on the response alone, so every term that reads
the token record works here, and its value over all responses or pairs is an expectation and not an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.formula import parse
from poise.objective import Objective, Summand, Term
from poise.problem import Certificate, Problem
from poise.readouts.tokens import TokenReadout

__all__ = ["FinitePolicy", "FiniteSampler", "FiniteSpace", "Solution"]


def _rows(table: Tensor) -> Tensor:
    return table[None] if table.ndim == 1 else table


class FinitePolicy(nn.Module):
    """A softmax policy with one logit for each prompt and response.

    Args:
        logits: float `[prompts, responses]`, where it begins.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits `[batch, 2, responses]` of ids `[batch, 2]`, which are prompt and response."""
        answer = self.logits[ids[:, 0]]
        return torch.stack([torch.zeros_like(answer), answer], 1)

    @property
    def logps(self) -> Tensor:
        """Log-probability of every response, `[prompts, responses]`."""
        return self.logits.log_softmax(-1)


@dataclass(frozen=True)
class Solution:
    """Where the exact minimisation ended: the policy, its log-probabilities, and how near the minimum it is."""

    policy: FinitePolicy
    certificate: Certificate

    @property
    def logps(self) -> Tensor:
        """Log-probability of every response, detached, `[prompts, responses]`."""
        return self.policy.logps.detach()


class FiniteSampler:
    """A distribution over responses, drawn from and scored by response number, for `poise.insight.collapse_report`."""

    def __init__(self, table: Tensor, generator: torch.Generator) -> None:
        self.table, self.generator = table, generator

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Return responses int64 `[n]` and their log-probabilities float `[n]`."""
        drawn = torch.multinomial(self.table.exp(), n, replacement=True, generator=self.generator)
        return drawn, self.table[drawn]

    def logps(self, samples: Tensor) -> Tensor:
        """Return log-probabilities float `[n]` of responses."""
        return self.table[samples]


class FiniteSpace:
    """Prompts with K responses each, a prior over the responses and a reward for each.

    Args:
        prior: probabilities float `[responses]` or `[prompts, responses]`, positive or 0; rows add up to 1.
        reward: float of the same shape; zeros by default.
        dtype: of everything computed; float64 where checks are exact.

    Raises:
        InputError: rows that do not add up to 1, shapes that differ, or a reward that is not finite.

    >>> FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0]).log_z(beta=0.5)
    tensor([4.4237], dtype=torch.float64)
    """

    def __init__(self, prior: Any, reward: Any = None, dtype: torch.dtype = torch.float64) -> None:
        self.prior: Tensor = _rows(torch.as_tensor(prior, dtype=dtype))
        given = torch.zeros_like(self.prior) if reward is None else torch.as_tensor(reward, dtype=dtype)
        self.reward: Tensor = _rows(given)
        if self.prior.shape != self.reward.shape or self.prior.ndim != 2:
            raise InputError(
                "finite_space: prior and reward need one shape [responses] or [prompts, responses], and they have "
                f"{list(self.prior.shape)} and {list(self.reward.shape)}."
            )
        # 1e-5: probabilities that were written down in float32 still add up to 1.
        if bool((self.prior < 0).any()) or bool(((self.prior.sum(1) - 1).abs() > 1e-5).any()):
            raise InputError(
                f"finite_space: each row of prior is a distribution, and the rows add up to {self.prior.sum(1).tolist()}."
            )
        if not bool(torch.isfinite(self.reward).all()):
            raise InputError("finite_space: every reward must be finite; forbid a response with prior 0.")
        self.prompts, self.responses = self.prior.shape

    # ---- exact values ---------------------------------------------------------------------------------------------------

    @property
    def prior_logps(self) -> Tensor:
        """Log-probabilities of the prior, `[prompts, responses]`."""
        return self.prior.log()

    def log_z(self, beta: float) -> Tensor:
        """Return log sum_x pi0(x) exp(r(x)/beta), `[prompts]`."""
        return (self.prior_logps + self.reward / beta).logsumexp(-1)

    def posterior(self, beta: float) -> Tensor:
        """Return log pi*(x) = log pi0(x) + r(x)/beta - log Z, `[prompts, responses]`."""
        return (self.prior_logps + self.reward / beta).log_softmax(-1)

    @staticmethod
    def expectation(logps: Tensor, values: Tensor) -> Tensor:
        """Return E[values] under each row's distribution, `[prompts]`; a response of probability 0 adds 0."""
        p = logps.exp()
        return torch.where(p > 0, p * values, 0.0).sum(-1)

    @classmethod
    def kl(cls, logps: Tensor, other: Tensor) -> Tensor:
        """Return KL(p || q) of two tables of log-probabilities, `[prompts]`, nats."""
        return cls.expectation(logps, logps - other)

    @classmethod
    def entropy(cls, logps: Tensor) -> Tensor:
        """Return the entropy, `[prompts]`, nats."""
        return cls.expectation(logps, -logps)

    def regularised_reward(self, logps: Tensor, beta: float) -> Tensor:
        """Return J = E_pi[r] - beta KL(pi || pi0), `[prompts]`."""
        return self.expectation(logps, self.reward) - beta * self.kl(logps, self.prior_logps)

    def sampler(self, logps: Tensor, generator: torch.Generator) -> FiniteSampler:
        """Return the distribution with these log-probabilities `[responses]`, to be drawn from and scored; one prompt."""
        return FiniteSampler(_rows(logps)[0], generator)

    # ---- everything as data ---------------------------------------------------------------------------------------------

    def responses_of(self, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Return all prompts and responses as one batch.

        Args:
            weight: each response's share `[prompts, responses]`; equal shares by default.

        Returns: `response_ids`, `response_mask` `[prompts * responses, 2]`, `reward`, `group` (the prompt), and `sample_weight`
            where `weight` is given.
        """
        prompt, response = (x.flatten() for x in self._grid(self.responses))
        batch = {
            **self._answers("response", prompt, response),
            "reward": self.reward[prompt, response],
            "group": prompt,
        }
        return batch if weight is None else {**batch, "sample_weight": weight[prompt, response]}

    def pairs(self, preference: Tensor | None = None, drawn: Tensor | None = None) -> dict[str, Tensor]:
        """Return all ordered pairs of different responses as one batch.

        Args:
            preference: `[prompts, responses, responses]`, entry (a, b) the probability that a is preferred to b; by default the
                Bradley-Terry model sigmoid(r_a - r_b).
            drawn: log-probabilities `[prompts, responses]` from which both answers are drawn; equal ones by default.

        Returns: `chosen_ids`, `chosen_mask`, `rejected_ids`, `rejected_mask`, `group`, and `sample_weight`, the probability of
            the pair in this order times the number of pairs.
        """
        if preference is None:
            preference = torch.sigmoid(self.reward[:, :, None] - self.reward[:, None, :])
        prompt, first = (x[..., None].expand(-1, -1, self.responses).flatten() for x in self._grid(self.responses))
        second = torch.arange(self.responses).repeat(self.prompts * self.responses)
        rows = first != second
        prompt, first, second = prompt[rows], first[rows], second[rows]
        weight = preference[prompt, first, second]
        if drawn is not None:
            weight = weight * (drawn[prompt, first] + drawn[prompt, second]).exp()
        return {
            **self._answers("chosen", prompt, first),
            **self._answers("rejected", prompt, second),
            "group": prompt,
            "sample_weight": weight / weight.mean(),
        }

    def _grid(self, size: int) -> tuple[Tensor, Tensor]:
        prompt, response = torch.meshgrid(torch.arange(self.prompts), torch.arange(size), indexing="ij")
        return prompt, response

    @staticmethod
    def _answers(side: str, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
        ids = torch.stack([prompt, response], 1)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, 1] = True
        return {f"{side}_ids": ids, f"{side}_mask": mask}

    # ---- minimising -----------------------------------------------------------------------------------------------------

    def policy(self, logits: Tensor | None = None) -> FinitePolicy:
        """Return a policy that begins at the prior, or at these logits."""
        return FinitePolicy(self.prior_logps if logits is None else _rows(logits).to(self.prior))

    def readout(self, reference: Tensor | None = None) -> TokenReadout:
        """Return the readout of these policies; its reference is the prior, or has these log-probabilities."""
        return TokenReadout(self.policy(reference))

    def problem(
        self, objective: Objective | Term | str, batch: Mapping[str, Tensor], policy: FinitePolicy | None = None
    ) -> Problem:
        """Return the objective on one batch as a `Problem`, to ask it for exact values and gradients."""
        if isinstance(objective, str):
            objective = parse(objective)
        if isinstance(objective, Term):
            objective = Objective([Summand(objective)])
        return Problem(policy or self.policy(), objective, [{"main": batch}], self.readout(), record=False)

    def minimize(
        self,
        objective: Objective | Term | str,
        batch: Mapping[str, Tensor] | Callable[[Tensor], Mapping[str, Tensor]],
        policy: FinitePolicy | None = None,
        *,
        method: str = "lbfgs",
        rate: float = 1.0,
        iterations: int = 1000,
        tolerance: float = 1e-9,
    ) -> Solution:
        """Minimise an objective over the logits, with its exact gradient.

        Args:
            objective: an objective, a term or a formula.
            batch: `responses_of()`, `pairs()` or any other batch; or a function that makes it from the policy's log-probabilities, for data
                that follow the policy (`method="flow"` only, since the value then is not what descends).
            policy: where to begin; at the prior by default. It is moved in place.
            method: "lbfgs", or "flow": gradient descent with steps of `rate`, which follows the gradient flow where they are small.
            rate: step of "flow".
            iterations: at most.
            tolerance: largest entry of the gradient at which it stops.

        Returns: the policy, and a certificate whose residual is the largest entry of the gradient.
        """
        if method not in ("lbfgs", "flow"):
            raise InputError(f"finite_space: method is 'lbfgs' or 'flow', and it is {method!r}.")
        if callable(batch) and method != "flow":
            raise InputError("finite_space: data that follow the policy need method='flow'.")
        policy = policy or self.policy()

        def evaluate() -> tuple[float, Tensor]:
            rows = batch(policy.logps.detach()) if callable(batch) else batch
            problem = self.problem(objective, rows, policy)
            gradient = problem.gradient().get("logits", torch.zeros_like(policy.logits))
            return float(problem.step.value), gradient

        descend = self._lbfgs if method == "lbfgs" else self._flow
        used = descend(policy, evaluate, rate, iterations, tolerance)
        value, gradient = evaluate()
        residual = float(gradient.abs().max())
        status = "converged" if residual <= tolerance else f"gradient {residual:.1e} after {used} iterations"
        return Solution(policy, Certificate(value, residual, tolerance, "largest gradient entry", used, status))

    @staticmethod
    def _flow(
        policy: FinitePolicy, evaluate: Callable[[], tuple[float, Tensor]], rate: float, most: int, tolerance: float
    ) -> int:
        for used in range(most):
            _, gradient = evaluate()
            if float(gradient.abs().max()) <= tolerance:
                return used
            with torch.no_grad():
                policy.logits.sub_(rate * gradient)
        return most

    @staticmethod
    def _lbfgs(
        policy: FinitePolicy, evaluate: Callable[[], tuple[float, Tensor]], rate: float, most: int, tolerance: float
    ) -> int:
        optimizer = torch.optim.LBFGS(
            [policy.logits], max_iter=most, max_eval=20 * most, tolerance_grad=tolerance, tolerance_change=0.0,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> float:
            value, gradient = evaluate()
            policy.logits.grad = gradient
            return value if math.isfinite(value) else math.inf

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return int(optimizer.state[policy.logits]["n_iter"])
