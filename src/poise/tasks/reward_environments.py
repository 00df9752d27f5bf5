"""Small environments with several rewards, in which the expected return of a policy can be computed exactly.

    sea = deep_sea_treasure()                       # treasure against time; its front is known and concave
    gathering = resource_gathering()                # gold, gem, the enemies between, and time
    bandit = SharedBandit(seed=0)                   # 10 contexts, 8 actions, 6 features shared by all, three binary rewards

    agent = bandit.agent()
    stream = OnPolicy(bandit.prompts, bandit.draw, bandit.score, samples=8, batch_size=10)
    poise.fit(agent, "0.5*rloo(reward=score.on(reward='a')).named('a') + ...", {"main": stream}, readout=TokenReadout(), ...)
    bandit.returns(agent)                           # the expected vector, exact and differentiable

An agent is a model of action sequences, `agent(ids) -> logits [rows, time, actions]`, so `TokenReadout` and every policy
gradient of the library read it as they read a language model. Stochastic policies can mix: their EXPECTED returns fill
the convex hull of the deterministic ones, so a concave front shows only in nearly deterministic policies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quantities import derive
from poise.streams import Batch

__all__ = [
    "TREASURE_FRONT",
    "BanditAgent",
    "SharedBandit",
    "Walk",
    "WalkAgent",
    "deep_sea_treasure",
    "measured",
    "resource_gathering",
]

TREASURE_FRONT = (
    (1, -1), (2, -3), (3, -5), (5, -7), (8, -8), (16, -9), (24, -13), (50, -14), (74, -17), (124, -19),
)  # fmt: skip
"""Treasure and time of every Pareto-optimal way through the deep sea; volume 1155 above (0, -25)."""


# ---- walks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """A deterministic environment of finite horizon: states, actions, and a vector of rewards for each pair.

    Args:
        names: of the rewards.
        following: int64 [states, actions], the next state; the last state is the end, and stays.
        rewards: float64 [states, actions, m]; 0 at the end.
        start: first state.
        horizon: most actions of an episode.
    """

    names: tuple[str, ...]
    following: Tensor
    rewards: Tensor
    start: int
    horizon: int
    prompts: int = field(default=1)

    def agent(self, seed: int = 0, scale: float = 0.0) -> WalkAgent:
        """Return a softmax policy with a logit for each state and action; `scale` is the size of random first logits."""
        return WalkAgent(self.following, self.start, scale, seed)

    def draw(self, model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Walk once for each prompt, until the end or the horizon."""
        rows, end = len(next(iter(prompts.values()))), len(self.following) - 1
        log_p = model.table.detach().log_softmax(-1)  # type: ignore[operator]
        state = torch.full((rows,), self.start)
        ids, logps, mask = [], [], []
        for _ in range(self.horizon):
            action = torch.multinomial(log_p[state].exp(), 1, generator=generator)[:, 0]
            going = state != end
            ids.append(torch.where(going, action, 0))
            logps.append(torch.where(going, log_p[state, action], 0.0))
            mask.append(going)
            state = self.following[state, action]
        return {
            "response_ids": torch.stack(ids, 1),
            "response_mask": torch.stack(mask, 1),
            "behaviour_logps": torch.stack(logps, 1),
        }

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Return the return of each walk under every reward, float [rows] by name."""
        ids, mask = batch["response_ids"], batch["response_mask"]
        state = torch.full((len(ids),), self.start)
        total = torch.zeros(len(ids), len(self.names), dtype=torch.float64)
        for t in range(ids.shape[1]):
            total += torch.where(mask[:, t, None], self.rewards[state, ids[:, t]], 0.0)
            state = self.following[state, ids[:, t]]
        return {name: total[:, i].float() for i, name in enumerate(self.names)}

    def returns(self, agent: nn.Module) -> Tensor:
        """Return the expected return under every reward, float64 [m], exact and differentiable."""
        p = agent.table.double().softmax(-1)  # type: ignore[operator]
        earned = (p[..., None] * self.rewards).sum(1)
        where = torch.zeros(len(p), dtype=torch.float64)
        where[self.start] = 1.0
        total = torch.zeros(len(self.names), dtype=torch.float64)
        target = self.following.flatten()
        for _ in range(self.horizon):
            total = total + where @ earned
            where = torch.zeros_like(where).index_add(0, target, (where[:, None] * p).flatten())
        return total


class WalkAgent(nn.Module):
    """A softmax over actions in each state; as a model of sequences it follows the walk that the actions make.

    Args:
        following, start: of the walk.
        scale: standard deviation of the first logits.
        seed: decides them.
    """

    following: Tensor

    def __init__(self, following: Tensor, start: int, scale: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(derive(seed, "walk agent"))
        self.table = nn.Parameter(scale * torch.randn(following.shape, generator=generator))
        self.register_buffer("following", following)
        self.start = start

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [rows, time, actions] of each action, given those before."""
        state = torch.full((len(ids),), self.start, device=ids.device)
        states = [state]
        for t in range(ids.shape[1] - 1):
            states.append(self.following[states[-1], ids[:, t]])
        logits: Tensor = self.table[torch.stack(states, 1)]
        return logits


_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Up, down, left, right."""


def deep_sea_treasure(horizon: int = 25) -> Walk:
    """A submarine on 11 x 10 fields, from the upper left: deeper treasures are worth more and take longer.

    Rewards: `treasure` (once, where the episode ends) and `time` (-1 for each action). Nothing in between the two ends of the
    front is best under any fixed weights.

    Source: Vamplew et al. 2011, Machine Learning 84.
    """
    depth = (1, 2, 3, 4, 4, 4, 7, 7, 9, 10)
    worth = {(row, column): float(TREASURE_FRONT[column][0]) for column, row in enumerate(depth)}

    def step(row: int, column: int, move: tuple[int, int]) -> tuple[int, int]:
        r, c = row + move[0], column + move[1]
        open_sea = 0 <= r < 11 and 0 <= c < 10 and r <= depth[c]
        return (r, c) if open_sea else (row, column)

    following = torch.full((111, 4), 110)
    rewards = torch.zeros(111, 4, 2, dtype=torch.float64)
    for row in range(11):
        for column in range(10):
            if row >= depth[column]:
                continue  # a treasure, or the ground
            for action, move in enumerate(_MOVES):
                r, c = step(row, column, move)
                found = worth.get((r, c))
                following[row * 10 + column, action] = r * 10 + c if found is None else 110
                rewards[row * 10 + column, action] = torch.tensor([found or 0.0, -1.0])
    return Walk(("treasure", "time"), following, rewards, 0, horizon)


def resource_gathering(horizon: int = 20, attack: float = 0.1) -> Walk:
    """A gatherer on 5 x 5 fields brings gold and a gem home, past two enemies.

    Rewards: `gold` and `gem` (1 each, on coming home with them, which ends the episode), `safety` (-attack for each step onto an
    enemy's field: attacks are taken at their mean and end nothing, so that the walk stays deterministic) and `time` (-1/horizon
    for each action; the safe ways are the long ones).

    Source: Barrett and Narayanan 2008, with attacks in expectation.
    """
    home, gold, gem, enemies = (4, 2), (0, 2), (1, 4), {(0, 3), (1, 2)}
    end = 100
    following = torch.full((101, 4), end)
    rewards = torch.zeros(101, 4, 4, dtype=torch.float64)
    rewards[:100, :, 3] = -1 / horizon
    for carried in range(4):
        for place in range(25):
            for action, move in enumerate(_MOVES):
                at = (min(max(place // 5 + move[0], 0), 4), min(max(place % 5 + move[1], 0), 4))
                now = carried | (at == gold) | 2 * (at == gem)
                state = carried * 25 + place
                if at in enemies:
                    rewards[state, action, 2] = -attack
                if at == home and now:
                    rewards[state, action, :2] = torch.tensor([float(now & 1), float(now >> 1)])
                else:
                    following[state, action] = now * 25 + at[0] * 5 + at[1]
    return Walk(("gold", "gem", "safety", "time"), following, rewards, 4 * 5 + 2, horizon)


# ---- the bandit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedBandit:
    """One choice in each of several contexts, whose parameters are shared: what serves one reward costs another.

    logit of action a in context c = <theta, features of (c, a)>

    Args:
        contexts, actions, features: sizes.
        density: share of the pairs (context, action) that each binary reward pays for.
        seed: decides features and rewards.
    """

    contexts: int = 10
    actions: int = 8
    features: int = 6
    density: tuple[float, ...] = (0.15, 0.4, 0.3)
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(0 < d < 1 for d in self.density):
            raise InputError(f"density has a share in (0, 1) for each reward, and it is {self.density}.")

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards: a, b, c, ..."""
        return tuple("abcdefgh"[: len(self.density)])

    @property
    def prompts(self) -> int:
        """One for each context."""
        return self.contexts

    @cached_property
    def rewards(self) -> Tensor:
        """What each action pays, float64 [contexts, actions, m], of zeros and ones."""
        generator = torch.Generator().manual_seed(derive(self.seed, "rewards"))
        chance = torch.rand(self.contexts, self.actions, len(self.density), generator=generator)
        return (chance < torch.tensor(self.density)).double()

    def agent(self) -> BanditAgent:
        """Return the policy that draws every action equally often."""
        generator = torch.Generator().manual_seed(derive(self.seed, "features"))
        return BanditAgent(torch.randn(self.contexts, self.actions, self.features, generator=generator))

    def draw(self, model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw one action for each prompt `input` int64 [rows], a context: the record is the context, then the action."""
        context = prompts["input"]
        log_p = model.logits().detach().log_softmax(-1)[context]  # type: ignore[operator]
        action = torch.multinomial(log_p.exp(), 1, generator=generator)
        zero = torch.zeros_like(log_p[:, :1])
        return {
            "response_ids": torch.cat([context[:, None], action], 1),
            "response_mask": torch.tensor([False, True]).expand(len(context), 2),
            "behaviour_logps": torch.cat([zero, log_p.gather(1, action)], 1),
        }

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Return what each draw pays, float [rows] by name."""
        paid = self.rewards[batch["response_ids"][:, 0], batch["response_ids"][:, 1]].float()
        return {name: paid[:, i] for i, name in enumerate(self.names)}

    def returns(self, agent: nn.Module) -> Tensor:
        """Return the expected payments, float64 [m], exact and differentiable."""
        p = agent.logits().double().softmax(-1)  # type: ignore[operator]
        expected: Tensor = (p[..., None] * self.rewards).sum(1).mean(0)
        return expected


class BanditAgent(nn.Module):
    """A softmax over actions, linear in features of context and action.

    Args:
        features: float [contexts, actions, features].
    """

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)
        self.theta = nn.Parameter(torch.zeros(features.shape[-1]))

    def logits(self) -> Tensor:
        """Return the logits of every context, [contexts, actions]."""
        logits: Tensor = self.features @ self.theta
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [rows, 2, symbols]: of the context, which is given and has none, and of the action in it."""
        chosen = self.logits()[ids[:, 0]]
        return torch.stack([torch.zeros_like(chosen), chosen], 1)


def measured(
    environment: Walk | SharedBandit, agent: nn.Module, episodes: int, generator: torch.Generator
) -> dict[str, float]:
    """Return mean returns of sampled episodes by name, as a validation without exact knowledge would.

    Args:
        episodes: for each prompt.
    """
    draw: Callable[..., dict[str, Tensor]] = environment.draw
    rows = torch.arange(environment.prompts).repeat_interleave(episodes)
    with torch.no_grad():
        scored = environment.score(draw(agent, {"input": rows}, generator))
    return {name: float(column.mean()) for name, column in scored.items()}
