"""Environments of continuous control, many copies at once, with experts to imitate.

    cart = CartPole(rows=10)
    state = cart.restart(seed=0)                              # [rows, observations]
    state, reward, ended = cart.step(cart.expert(state))      # an ended copy has begun again

`MujocoEnvironment` runs the tasks of gymnasium and MuJoCo (the extra `rl`) behind the same three words.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from poise.errors import InputError, MissingDependencyError, nearest
from poise.quantities import derive

__all__ = ["CartPole", "Environment", "Expert", "LinearExpert", "MujocoEnvironment", "mujoco_expert"]

Expert = Callable[[Tensor], Tensor]
"""`states [rows, observations] -> actions [rows, actions]`, float in [-1, 1]."""


class Environment(Protocol):
    """Copies of an environment that run side by side.

    Attributes:
        rows: how many.
        observations, actions: numbers in a state and in an action.
        horizon: most steps of an episode.
    """

    rows: int
    observations: int
    actions: int
    horizon: int

    def restart(self, seed: int) -> Tensor:
        """Begin every copy anew; return the states `[rows, observations]`."""
        ...

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act; return states, rewards `[rows]` and which episodes ended. An ended copy begins again: its state is a first one."""
        ...

    def another(self, rows: int | None = None) -> Environment:
        """Return independent copies of the same environment."""
        ...


class CartPole:
    """A pole on a cart that a force between -10 and 10 newton keeps upright; an episode ends where it falls or the cart leaves its track.

    State: position (m), velocity (m/s), angle (rad) and angular velocity (rad/s). Reward 1 a step. The equations are those of Barto, Sutton
    and Anderson (1983) without friction, in semi-implicit Euler steps of 0.02 s.

    Args:
        rows: copies side by side.
        horizon: steps of an episode at most.
        spread: largest first position, velocity, angle and angular velocity.

    >>> CartPole(rows=3).restart(seed=0).shape
    torch.Size([3, 4])
    """

    gravity, cart, pole, half_length, force, seconds = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    track, fallen = 2.4, 0.8
    observations, actions = 4, 1

    def __init__(
        self, rows: int = 1, horizon: int = 200, spread: tuple[float, float, float, float] = (1.0, 0.5, 0.35, 0.5)
    ) -> None:
        if rows < 1 or horizon < 1:
            raise InputError(f"CartPole: rows and horizon must be at least 1, and they are {rows} and {horizon}.")
        self.rows, self.horizon, self.spread = rows, horizon, spread
        self._gain: Tensor | None = None
        self.restart(0)

    def another(self, rows: int | None = None) -> CartPole:
        """Return independent copies."""
        return CartPole(self.rows if rows is None else rows, self.horizon, self.spread)

    def restart(self, seed: int) -> Tensor:
        """Begin every copy anew."""
        self._generator = torch.Generator().manual_seed(derive(seed, "cart-pole"))
        self.state = self._first(self.rows)
        self._age = torch.zeros(self.rows, dtype=torch.int64)
        return self.state.float()

    def _first(self, rows: int) -> Tensor:
        u = 2 * torch.rand(rows, 4, generator=self._generator, dtype=torch.float64) - 1
        return u * torch.tensor(self.spread, dtype=torch.float64)

    def moved(self, state: Tensor, action: Tensor) -> Tensor:
        """Return the states after one step, float64 [rows, 4]; actions are cut to [-1, 1]."""
        x, v, angle, turn = state.unbind(-1)
        push = self.force * action.double().reshape(-1).clamp(-1, 1)
        mass, moment = self.cart + self.pole, self.pole * self.half_length
        sine, cosine = angle.sin(), angle.cos()
        pull = (push + moment * turn.square() * sine) / mass
        bend = (self.gravity * sine - cosine * pull) / (self.half_length * (4 / 3 - self.pole * cosine.square() / mass))
        v = v + self.seconds * (pull - moment * bend * cosine / mass)
        turn = turn + self.seconds * bend
        return torch.stack([x + self.seconds * v, v, angle + self.seconds * turn, turn], -1)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act in every copy."""
        self.state = self.moved(self.state, action.detach())
        self._age += 1
        ended = (
            (self.state[:, 0].abs() > self.track) | (self.state[:, 2].abs() > self.fallen) | (self._age >= self.horizon)
        )
        if bool(ended.any()):
            self.state[ended] = self._first(int(ended.sum()))
            self._age[ended] = 0
        return self.state.float(), torch.ones(self.rows), ended

    def expert(self, state: Tensor) -> Tensor:
        """Return the action of the linear-quadratic regulator, cut to [-1, 1]."""
        if self._gain is None:
            self._gain = self._regulator()
        action: Tensor = -(state.double() @ self._gain.T)
        return action.clamp(-1, 1).to(state.dtype)

    def _regulator(self) -> Tensor:
        """Return the gain `K` of the linearised dynamics by iterating the Riccati equation."""
        zero, none = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        found: Any = torch.func.jacrev(lambda s, u: self.moved(s, u)[0], argnums=(0, 1))(zero, none)
        a, b = found[0][:, 0], found[1][:, 0]
        cost = torch.diag(torch.tensor([1.0, 0.1, 10.0, 0.1], dtype=torch.float64))
        p, gain = cost, zero
        for _ in range(400):
            gain = torch.linalg.solve(torch.eye(1, dtype=p.dtype) + b.T @ p @ b, b.T @ p @ a)
            p = cost + a.T @ p @ (a - b @ gain)
        return gain


class LinearExpert:
    """`clip(W (s - mean))`: what random search finds for locomotion."""

    def __init__(self, weight: Tensor, mean: Tensor, trained: float = float("nan")) -> None:
        self.weight, self.mean, self.trained = weight, mean, trained

    def __call__(self, state: Tensor) -> Tensor:
        return ((state.double() - self.mean) @ self.weight.T).clamp(-1, 1).to(state.dtype)


class MujocoEnvironment:
    """Copies of a task of gymnasium, such as "Hopper-v5".

    Args:
        name: of the task.
        rows: copies side by side.
        horizon: steps of an episode at most.

    Raises:
        MissingDependencyError: gymnasium or mujoco is not installed (the extra `rl`).
        InputError: there is no such task, or its actions are not continuous.
    """

    def __init__(self, name: str = "Hopper-v5", rows: int = 1, horizon: int = 1000) -> None:
        try:
            importlib.import_module("mujoco")
            gymnasium: Any = importlib.import_module("gymnasium")
        except ImportError as error:
            raise MissingDependencyError("gymnasium with mujoco", "rl", f"The task {name}") from error
        if rows < 1 or horizon < 1:
            raise InputError(f"{name}: rows and horizon must be at least 1, and they are {rows} and {horizon}.")
        try:
            self._copies = [gymnasium.make(name).unwrapped for _ in range(rows)]
        except gymnasium.error.Error as error:
            raise InputError(f"gymnasium has no task {name!r}." + nearest(name, list(gymnasium.registry))) from error
        space = self._copies[0].action_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise InputError(f"{name} has actions that are no numbers ({space}), and imitation here is of numbers.")
        self.name, self.rows, self.horizon = name, rows, horizon
        self.observations = int(self._copies[0].observation_space.shape[0])
        self.actions = int(space.shape[0])
        self._low, self._high = torch.as_tensor(space.low).double(), torch.as_tensor(space.high).double()
        self._age = [0] * rows
        self._seeds = torch.Generator().manual_seed(0)

    def another(self, rows: int | None = None) -> MujocoEnvironment:
        """Return independent copies."""
        return MujocoEnvironment(self.name, self.rows if rows is None else rows, self.horizon)

    def restart(self, seed: int) -> Tensor:
        """Begin every copy anew."""
        self._seeds = torch.Generator().manual_seed(derive(seed, self.name))
        self._age = [0] * self.rows
        return torch.stack([self._begin(copy) for copy in self._copies])

    def _begin(self, copy: Any) -> Tensor:
        seed = int(torch.randint(2**31 - 1, (), generator=self._seeds))
        return torch.as_tensor(copy.reset(seed=seed)[0]).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act in every copy; actions in [-1, 1] are spread over the task's range."""
        scaled = self._low + (action.detach().double().cpu().clamp(-1, 1) + 1) / 2 * (self._high - self._low)
        states, rewards, ends = [], [], []
        for i, copy in enumerate(self._copies):
            state, reward, fell, _, _ = copy.step(scaled[i].numpy())
            self._age[i] += 1
            over = bool(fell) or self._age[i] >= self.horizon
            if over:
                self._age[i] = 0
            states.append(self._begin(copy) if over else torch.as_tensor(state).float())
            rewards.append(float(reward))
            ends.append(over)
        return torch.stack(states), torch.tensor(rewards), torch.tensor(ends)


def mujoco_expert(name: str) -> LinearExpert:
    """Return an expert for a MuJoCo task: a linear policy that augmented random search found.

    Args:
        name: "Hopper-v5", ...; what there is stands in `control_experts.json`, with steps and returns of its training.

    Raises:
        InputError: there is none for this task.
    """
    known = json.loads((Path(__file__).parent / "control_experts.json").read_text(encoding="utf-8"))
    if name not in known:
        raise InputError(
            f"There is no expert for {name!r}." + (nearest(name, known) or f" There are: {', '.join(known)}.")
        )
    entry = known[name]
    weight, mean = (torch.tensor(entry[key], dtype=torch.float64) for key in ("weight", "mean"))
    return LinearExpert(weight, mean, float(entry["return"]))
