"""Send tokens to experts: by transport with at most k tokens an expert, so that no expert overflows, or by the largest gates.

    router = TransportRouter(dim=64, experts=8, capacity_factor=1.0)
    routing = router(tokens)                              # tokens [..., n, dim]
    output = (routing.combine[..., None] * expert_outputs).sum(-2)
    routing.load.largest, routing.load.dropped

Balance is in the constraint, so there is no auxiliary loss. The plan only says who goes where; gradients reach the router's
weights through `combine`, the softmax of its logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.operators import largest, require_count
from poise.transport import checked, solve

__all__ = ["Load", "Routing", "TopKRouter", "TransportRouter", "expert_capacity"]


@dataclass(frozen=True)
class Load:
    """How work is shared out, per group of tokens.

    Attributes:
        items: int64 [..., experts], tokens sent to each expert.
        capacity: most tokens that an expert takes.
        dropped: int64 [...], tokens that no expert takes.
        demand: int64 [..., experts], tokens that chose each expert, before what is beyond its capacity was cut.
    """

    items: Tensor
    capacity: int
    dropped: Tensor
    demand: Tensor

    @property
    def overflow(self) -> Tensor:
        """Choices beyond the experts' capacity, which were cut; int64 [...]."""
        return (self.demand - self.capacity).clamp_min(0).sum(-1)

    @property
    def largest(self) -> float:
        """The fullest expert."""
        return float(self.items.max())

    @property
    def least(self) -> float:
        """The emptiest expert."""
        return float(self.items.min())

    @property
    def mean(self) -> float:
        """Tokens an expert, on average."""
        return float(self.items.double().mean())


@dataclass(frozen=True)
class Routing:
    """Who goes where.

    Attributes:
        gates: float [..., n, experts], softmax of the logits.
        dispatch: bool [..., n, experts].
        combine: float [..., n, experts], weights of the experts' outputs; 0 outside `dispatch`.
        plan: float [..., n, experts], detached; None where there is none.
        load: items per expert and dropped tokens.
    """

    gates: Tensor
    dispatch: Tensor
    combine: Tensor
    plan: Tensor | None
    load: Load


def expert_capacity(tokens: int, experts: int, factor: float, multiple: int = 4) -> int:
    """Return `ceil(tokens * factor / experts)`, rounded up to a multiple that hardware likes, and at most `tokens`.

    >>> expert_capacity(100, 8, 1.0)
    16
    """
    exact = math.ceil(tokens * factor / experts - 1e-9)
    return min(tokens, -(-exact // multiple) * multiple)


class _Router(nn.Module):
    def __init__(self, dim: int, experts: int, capacity_factor: float, multiple: int) -> None:
        super().__init__()
        name = type(self).__name__
        if dim < 1 or experts < 2:
            raise InputError(
                f"{name}: dim must be at least 1 and experts at least 2, and they are {dim} and {experts}."
            )
        if not (math.isfinite(capacity_factor) and capacity_factor > 0):
            raise InputError(f"{name}: capacity_factor must be positive, and it is {capacity_factor}.")
        require_count(name, multiple)
        self.dim, self.experts, self.capacity_factor, self.multiple = dim, experts, capacity_factor, multiple
        self.logits = nn.Linear(dim, experts, bias=False)

    def _gates(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        name = type(self).__name__
        if tokens.dim() < 2 or tokens.shape[-1] != self.dim or 0 in tokens.shape:
            raise InputError(f"{name}: tokens are float [..., n, {self.dim}], and they are {list(tokens.shape)}.")
        if mask is None:
            mask = torch.ones(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
        if mask.shape != tokens.shape[:-1] or mask.dtype != torch.bool:
            raise InputError(
                f"{name}: mask is bool {list(tokens.shape[:-1])}, and it is {mask.dtype} {list(mask.shape)}."
            )
        # Gates are compared with each other, so they are taken in float32 whatever the tokens are in.
        logits = self.logits(tokens)
        return logits.float().softmax(-1).to(torch.promote_types(logits.dtype, torch.float32)), mask


class TransportRouter(_Router):
    """Route by sparse transport between tokens (mass 1 each) and experts (mass n / experts each).

    cost = -softmax(W x);  the semi-dual is ascended by a fixed number of Adam steps, and the plan's nonzeros are the routes.

    With by="expert" an expert's column has at most k = capacity nonzeros, so no expert ever overflows. With by="token" a token's
    row has at most k = `per_token` nonzeros; experts then take at most the capacity, the largest gates first.

    Args:
        dim: width of a token.
        experts: from 2.
        per_token: experts a token, for by="token".
        capacity_factor: c; the capacity is `ceil(n c / experts)`, rounded up to a multiple of `multiple`.
        by: which side is limited.
        gamma: strength of the squared norm.
        steps, lr: of Adam.
        combine: "gates" (the softmax, where gradients flow) or "plan" (the plan's shares times nothing else; no gradient).
        multiple: see `expert_capacity`.

    Raises:
        InputError: an argument or a shape does not fit.

    Example:
        >>> routing = TransportRouter(16, experts=4, multiple=1)(torch.randn(3, 32, 16))
        >>> bool((routing.load.items <= 8).all())
        True

    Source: arXiv:2209.15466, section 6; google-research/vmoe for the settings (20 steps, 1e-2, gamma 1, softmax weights).
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        per_token: int = 1,
        capacity_factor: float = 1.0,
        by: Literal["expert", "token"] = "expert",
        gamma: float = 1.0,
        steps: int = 20,
        lr: float = 1e-2,
        combine: Literal["gates", "plan"] = "gates",
        multiple: int = 4,
    ) -> None:
        super().__init__(dim, experts, capacity_factor, multiple)
        require_count("TransportRouter", per_token)
        if by not in ("expert", "token") or combine not in ("gates", "plan"):
            raise InputError(
                f"TransportRouter: by is 'expert' or 'token' and combine 'gates' or 'plan'; they are {by!r} and {combine!r}."
            )
        if per_token > experts:
            raise InputError(f"TransportRouter: {per_token} experts a token are more than {experts} experts.")
        if not gamma > 0 or steps < 1 or not lr > 0:
            raise InputError(
                f"TransportRouter: gamma, steps and lr must be positive, and they are {gamma}, {steps} and {lr}."
            )
        self.per_token, self.by, self.gamma = per_token, by, gamma
        self.steps, self.lr, self.combine = steps, lr, combine

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens [..., n, dim]; `mask` bool [..., n] is False for padding, which goes nowhere."""
        gates, mask = self._gates(tokens, mask)
        capacity = expert_capacity(tokens.shape[-2], self.experts, self.capacity_factor, self.multiple)
        plan = self._plan(gates.detach(), mask, capacity if self.by == "expert" else self.per_token)
        chosen = (plan > 0) & mask[..., None]
        dispatch = _within(chosen, gates.detach(), capacity)
        weights = gates if self.combine == "gates" else plan / plan.sum(-1, keepdim=True).clamp_min(1e-12)
        return _routing(gates, dispatch, weights, plan, mask, capacity, chosen)

    def _plan(self, gates: Tensor, mask: Tensor, k: int) -> Tensor:
        a = mask.to(gates.dtype)
        # A group that is padding alone has nothing to route.
        empty = a.sum(-1, keepdim=True) == 0
        a = torch.where(empty, 1.0, a)
        b = (a.sum(-1, keepdim=True) / self.experts).expand(*a.shape[:-1], self.experts)
        axis: Literal["column", "row"] = "column" if self.by == "expert" else "row"
        # Fewer places than tokens are allowed here: what finds none is dropped, and the load says so.
        problem = checked("TransportRouter", -gates, a, b, k, self.gamma, axis, None, feasible=False)
        ascent = solve(problem, method="adam", max_iter=self.steps, lr=self.lr)
        plan = problem.plan(ascent.x)
        return (plan.mT if axis == "column" else plan).reshape(gates.shape)


class TopKRouter(_Router):
    """Route every token to its `per_token` largest gates; what an expert cannot take, the smallest gates first, is dropped.

    Args:
        dim, experts, per_token, capacity_factor, multiple: see `TransportRouter`.

    Example:
        >>> routing = TopKRouter(16, experts=4, multiple=1)(torch.randn(32, 16))
        >>> bool((routing.load.items <= routing.load.capacity).all())
        True

    Source: Riquelme et al., arXiv:2106.05974 (batch priority).
    """

    def __init__(
        self, dim: int, experts: int, per_token: int = 1, capacity_factor: float = 1.0, multiple: int = 4
    ) -> None:
        super().__init__(dim, experts, capacity_factor, multiple)
        if require_count("TopKRouter", per_token) > experts:
            raise InputError(f"TopKRouter: {per_token} experts a token are more than {experts} experts.")
        self.per_token = per_token

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Routing:
        """Route tokens [..., n, dim]; `mask` bool [..., n] is False for padding."""
        gates, mask = self._gates(tokens, mask)
        capacity = expert_capacity(tokens.shape[-2], self.experts, self.capacity_factor, self.multiple)
        chosen = largest(gates.detach(), self.per_token) & mask[..., None]
        dispatch = _within(chosen, gates.detach(), capacity)
        return _routing(gates, dispatch, gates, None, mask, capacity, chosen)


def _within(chosen: Tensor, gates: Tensor, capacity: int) -> Tensor:
    """Cut each expert's choices to its capacity, the largest gates first."""
    return chosen & largest(torch.where(chosen, gates, -1.0), capacity, dim=-2)


def _routing(
    gates: Tensor,
    dispatch: Tensor,
    weights: Tensor,
    plan: Tensor | None,
    mask: Tensor,
    capacity: int,
    chosen: Tensor,
) -> Routing:
    dropped = (mask & ~dispatch.any(-1)).sum(-1)
    load = Load(dispatch.sum(-2), capacity, dropped, chosen.sum(-2))
    return Routing(gates, dispatch, torch.where(dispatch, weights, 0.0), plan, load)
