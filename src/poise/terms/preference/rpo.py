"""Regularised preference optimisation: the likelihood of good answers as an adversary's answer to overoptimisation.

Preference data do not cover all answers, and a fitted reward is spuriously high on rare ones. Playing against the worst
reward that still fits the data,

    max_pi min_r  eta E[r(x, a ~ pi) - r(x, a' ~ base) - beta KL(pi || pi_ref)] + L_D(r),

has the same solution as

    min_pi  dpo(beta) + eta beta E[-log pi(a' ~ base)],

that is DPO with a supervised term: `rpo` writes this sum out. `adversarial_value` computes the game on finite problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.coefficient import Coefficient, Number, multiply
from poise.errors import InputError
from poise.objective import Objective
from poise.terms.preference.dpo import DPO
from poise.terms.preference.margin import (
    REDUCTIONS,
    SIDES,
    Reduction,
    TokenTerm,
    require_at_least_zero,
    require_one_of,
    require_positive,
)

__all__ = ["RPO", "SFT", "AdversarialPolicy", "FinitePreferences", "adversarial_policy", "adversarial_value"]


class SFT(TokenTerm):
    """Raise the likelihood of an answer: supervised fine-tuning, the negative log-likelihood of its tokens.

    -log pi(y_t | y_<t)

    Public implementations differ in the reduction, and the same weight means different things under each:

    - "token_mean": one mean over all answer tokens of the batch, so long answers weigh more (TRL's "sft" loss);
    - "sequence_mean": the mean over each answer first, then over answers (OpenRLHF's `nll_loss_coef`);
    - "sum": the sum over each answer, then the mean over answers (the theory of RPO); it grows with length.

    Args:
        on: "response" is the one answer of a stream, which on pairs is the chosen one; "chosen", "rejected".
        reduction: see above.
        token_weight: weigh each token by `<side>_token_weight` float [batch, time]; the count stays the number of tokens.

    Reads: `<side>_logps` float [batch, time], or sums [batch]; `<side>_mask` bool [batch, time] (needed for the means).
    Returns: float [batch, time] for "token_mean", float [batch] otherwise; nats, >= 0.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[0.0, -1.0, -3.0]])
        >>> SFT(reduction="sum")(logps)
        tensor([4.])
        >>> SFT(reduction="sequence_mean")(logps, torch.tensor([[False, True, True]]))
        tensor([2.])
    """

    formula = "sft"
    equation: ClassVar[str] = "-log pi(y_t | y_<t), over the tokens of the answer"
    source: ClassVar[str] = "arXiv:2405.16436"

    def __init__(
        self,
        on: Literal["response", "chosen", "rejected"] = "response",
        reduction: Reduction = "token_mean",
        token_weight: bool = False,
    ) -> None:
        super().__init__()
        require_one_of("sft", "on", on, SIDES)
        require_one_of("sft", "reduction", reduction, REDUCTIONS)
        self.on_ = on
        self.reduction = reduction
        self.token_weight = token_weight

    def forward(
        self,
        response_logps: Tensor | None = None,
        response_mask: Tensor | None = None,
        response_token_weight: Tensor | None = None,
        chosen_logps: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        chosen_token_weight: Tensor | None = None,
        rejected_logps: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        rejected_token_weight: Tensor | None = None,
    ) -> Tensor:
        return -self.reduced(
            response=(response_logps, response_mask, response_token_weight),
            chosen=(chosen_logps, chosen_mask, chosen_token_weight),
            rejected=(rejected_logps, rejected_mask, rejected_token_weight),
        )


def RPO(
    beta: float = 0.1, eta: Number | Coefficient = 0.005, normalize: Reduction = "sum", base: str = "chosen"
) -> Objective:
    """Guard a preference loss against overoptimisation by the likelihood of the chosen answer: dpo + eta*beta*sft.

    Both terms stay visible: the result prints, and is reported, as their sum. To hold the likelihood by a constraint
    instead of a weight, write `dpo + constraint(sft(on='chosen', reduction='sum'), upper=...)` with its value at the start.

    Args:
        beta: as in `dpo`; it stands in both parts.
        eta: strength of the adversary, at least 0, or a schedule; 0 is `dpo` alone. A mean over tokens or sequences needs
            about one length more than a sum.
        normalize: reduction of the supervised part. The theory, and the authors' first code, have "sum"; "sequence_mean"
            matches their second code (there with a weight c = eta*beta that does not know beta), "token_mean" TRL's.
        base: where the baseline answers come from: "chosen" (practice), or the name of a stream of answers, such as samples
            of the reference or given data.

    Raises:
        InputError: beta is not positive, eta is negative, or there is no such reduction.

    Example:
        >>> str(RPO(beta=0.5, eta=0.2))
        "dpo(beta=0.5) + 0.1*sft(on='chosen', reduction='sum')"
        >>> str(RPO(beta=0.5, eta=0.2, base="samples"))
        "dpo(beta=0.5) + 0.1*sft(reduction='sum').on('samples')"

    Source: Liu et al., arXiv:2405.16436; YSLIU627/Regularized-Preference-Optimization.
    """
    require_positive("rpo", beta=beta)
    if isinstance(eta, Number):
        require_at_least_zero("rpo", eta=eta)
    require_one_of("rpo", "normalize", normalize, REDUCTIONS)
    if base == "chosen":
        return DPO(beta=beta) + multiply(eta, beta) * SFT(on="chosen", reduction=normalize)
    return DPO(beta=beta) + multiply(eta, beta) * SFT(reduction=normalize).on(base)


# ---- the game, where everything is finite ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FinitePreferences:
    """Preferences over K answers to one prompt, as the exact solver and the coverage report take them.

    Args:
        wins: float [K, K]; wins[i, j] says how often answer i was preferred to answer j (counts or shares).
        reference: probabilities of the reference, float [K], positive, summing to 1.
        base: the baseline distribution, float [K]; None is that of the preferred answers.

    Raises:
        InputError: a shape or a number that does not fit.
    """

    wins: Tensor
    reference: Tensor
    base: Tensor | None = None

    def __post_init__(self) -> None:
        k = len(self.reference)
        if self.wins.shape != (k, k) or bool((self.wins < 0).any()) or float(self.wins.sum()) <= 0:
            raise InputError(
                f"wins is float [K, K], >= 0, with at least one comparison, for K = {k}; it is {list(self.wins.shape)}."
            )
        for name, p in (("reference", self.reference), ("base", self.base)):
            if p is not None and (p.shape != (k,) or bool((p < 0).any()) or abs(float(p.sum()) - 1) > 1e-6):
                raise InputError(f"{name} is a distribution over the {k} answers: numbers >= 0 that sum to 1.")
        if bool((self.reference <= 0).any()):
            raise InputError("Every answer needs a positive probability under the reference.")

    @property
    def baseline(self) -> Tensor:
        """The baseline distribution, float64 [K]."""
        base = (self.wins.sum(1) if self.base is None else self.base).double()
        return base / base.sum()

    @property
    def shares(self) -> Tensor:
        """The comparisons as shares of all, float64 [K, K]."""
        return self.wins.double() / self.wins.double().sum()

    def loss(self, rewards: Tensor) -> Tensor:
        """L_D(r) = -E log sigma(r(preferred) - r(other)) of rewards float64 [..., K]."""
        return -(self.shares * F.logsigmoid(rewards[..., :, None] - rewards[..., None, :])).sum((-2, -1))

    def game(self, policy: Tensor, rewards: Tensor, eta: float, beta: float) -> Tensor:
        """eta (E_pi r - E_base r - beta KL(pi || pi_ref)) + L_D(r), for rewards float64 [..., K]."""
        p = policy.double() / policy.double().sum()
        kl = (torch.xlogy(p, p) - torch.xlogy(p, self.reference.double())).sum()
        return eta * (rewards @ (p - self.baseline) - beta * kl) + self.loss(rewards)


@dataclass(frozen=True)
class AdversarialPolicy:
    """The solution of the game.

    Attributes:
        policy: float64 [K].
        rewards: the adversary's rewards, float64 [K], with reference mean 0.
        value: of the game.
        gap: value - adversarial_value(policy), >= 0; 0 certifies that both orders of play agree.
    """

    policy: Tensor
    rewards: Tensor
    value: float
    gap: float


def adversarial_value(
    policy: Tensor, data: FinitePreferences, eta: float, beta: float, rewards: Tensor | None = None
) -> float:
    """Value a policy by the worst rewards that still fit the data.

    min_r  eta (E_pi r - E_base r - beta KL(pi || pi_ref)) + L_D(r)

    With free rewards it is minus infinity where the policy moves more mass away from the baseline than the comparisons can
    answer for: onto answers that nobody compared, or too much of it between answers that were compared rarely.

    Args:
        policy: probabilities, float [K].
        data: the comparisons.
        eta, beta: positive.
        rewards: a finite class of rewards, float [n, K], for the adversary to choose from; None lets it choose freely.

    Example:
        >>> data = FinitePreferences(torch.tensor([[0.0, 4.0], [1.0, 0.0]]), torch.tensor([0.5, 0.5]))
        >>> round(adversarial_value(torch.tensor([0.8, 0.2]), data, eta=1.0, beta=0.1), 6)    # min L_D - beta KL
        0.481128

    Source: Liu et al., arXiv:2405.16436, Algorithm 1.
    """
    require_positive("adversarial_value", eta=eta, beta=beta)
    if rewards is not None:
        return float(data.game(policy, rewards.double(), eta, beta).min())
    moved = policy.double() / policy.double().sum() - data.baseline
    if _falls_forever(eta * moved, data.shares):
        return -torch.inf

    def inner(r: Tensor) -> _Expansion:
        fit = _fit(data.shares, r)
        return _Expansion(fit.value + eta * (r @ moved), fit.gradient + eta * moved, fit.hessian)

    r = _newton(inner, torch.zeros_like(moved))
    return float(data.game(policy, r, eta, beta))


def adversarial_policy(data: FinitePreferences, eta: float, beta: float) -> AdversarialPolicy:
    """Solve the game exactly: the policy with the best worst case, which is also the minimiser of the RPO loss.

    For given rewards the best policy is pi_r = pi_ref exp(r/beta)/Z_r, so that the game is the convex problem

        min_r  eta (beta log Z_r - E_base r) + L_D(r).

    Args:
        data: the comparisons; every answer that always loses needs some baseline mass, or its probability tends to 0.
        eta, beta: positive.

    Example:
        >>> data = FinitePreferences(torch.tensor([[0.0, 4.0], [1.0, 0.0]]), torch.tensor([0.5, 0.5]))
        >>> p = adversarial_policy(data, eta=1.0, beta=0.1).policy
        >>> round(float((p[0] / p[1]).log()), 4)
        4.5101

    Source: Liu et al., arXiv:2405.16436, Theorem 5.6 and its proof.
    """
    require_positive("adversarial_policy", eta=eta, beta=beta)
    log_reference = data.reference.double().log()

    def outer(r: Tensor) -> _Expansion:
        fit, p = _fit(data.shares, r), torch.softmax(log_reference + r / beta, -1)
        log_z = torch.logsumexp(log_reference + r / beta, -1)
        return _Expansion(
            fit.value + eta * (beta * log_z - r @ data.baseline),
            fit.gradient + eta * (p - data.baseline),
            fit.hessian + eta / beta * (p.diag() - torch.outer(p, p)),
        )

    r = _newton(outer, torch.zeros_like(log_reference))
    policy = torch.softmax(log_reference + r / beta, -1)
    value = float(outer(r).value)
    return AdversarialPolicy(
        policy, r - r @ data.reference.double(), value, value - adversarial_value(policy, data, eta, beta)
    )


def _falls_forever(slope: Tensor, shares: Tensor) -> bool:
    """Whether rewards may move forever along a direction d with  <slope, d> + sum_ij share_ij max(0, d_j - d_i) < 0."""
    from scipy.optimize import linprog

    k = len(slope)
    preferred, other = (shares > 0).nonzero(as_tuple=True)
    edges = torch.arange(len(preferred))
    rows = torch.zeros(len(edges), k + len(edges), dtype=torch.float64)  # d_j - d_i - t <= 0
    rows[edges, preferred] -= 1
    rows[edges, other] += 1
    rows[edges, k + edges] = -1
    cost = torch.cat([slope, shares[preferred, other]])
    bounds = [(-1, 1)] * k + [(0, None)] * len(edges)
    found = linprog(cost.numpy(), A_ub=rows.numpy(), b_ub=torch.zeros(len(edges)).numpy(), bounds=bounds)
    return bool(found.fun < -1e-9)


class _Expansion(NamedTuple):
    """A function of K numbers at a point, to second order."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor


def _fit(shares: Tensor, r: Tensor) -> _Expansion:
    """L_D(r), its gradient and its Hessian (a graph Laplacian)."""
    d = r[:, None] - r[None, :]
    pull = shares * torch.sigmoid(-d)
    edges = pull * torch.sigmoid(d)
    return _Expansion(
        -(shares * F.logsigmoid(d)).sum(),
        pull.sum(0) - pull.sum(1),
        (edges.sum(0) + edges.sum(1)).diag() - edges - edges.T,
    )


def _newton(f: Callable[[Tensor], _Expansion], x: Tensor, steps: int = 200) -> Tensor:
    """Minimise a convex function of a few numbers by damped Newton steps; it may be flat along some directions."""
    for _ in range(steps):
        here = f(x)
        step = -(torch.linalg.pinv(here.hessian, hermitian=True) @ here.gradient)
        slope = float(step @ here.gradient)
        scale = 1.0
        while f(x + scale * step).value > here.value + 1e-4 * scale * slope and scale > 1e-6:
            scale /= 2
        if slope > -1e-26 or scale <= 1e-6:  # rounding is all that is left
            break
        x = x + scale * step
    return x
