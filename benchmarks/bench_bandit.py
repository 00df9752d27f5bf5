"""What it costs to run the 100-arm bandit: all seeds at once beside one action at a time.

The other side is the template as one writes it first, and as the paper's own code does: for each seed, each state and each
answer, run the network, draw an action, ask for its reward; then the loss state by state. Both sides run 100 epochs of 10
states with 10 answers each (best-of-n, Adam, one step a round) for five seeds, from networks of the same kind that start at
the data, on one thread; evaluation and the start itself are left out of both. Both use PyTorch's fused Adam, whose work is the
same in both.
"""

from __future__ import annotations

import copy
import math
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread, paired
from poise.readouts.on_policy import Choices
from poise.recipes.preference_loop import preference_loop
from poise.tasks.bandit_arms import BanditArms, NetworkAgent, TabularAgent, draw_arms

STATES, SAMPLES, LR = 10, 10, 1e-3


def run(quick: bool) -> list[Ratio]:
    """The ratio of times of the same run, with the rewards that both sides reach."""
    seeds, epochs, repeats = (2, 10, 1) if quick else (5, 100, 3)
    bandit = BanditArms("far")
    agent = NetworkAgent(bandit.contexts(STATES, seeds)).fit_to(bandit.reference)
    reached: dict[str, float] = {}
    round_number = iter(range(10**6))

    def ours() -> None:
        reached["ours"] = _batched(bandit, copy.deepcopy(agent), seeds, epochs, next(round_number))

    def theirs() -> None:
        seed = next(round_number)
        reached["theirs"] = fmean(_one_by_one(bandit, agent.state_dict(), s, epochs, seed) for s in range(seeds))

    with one_thread():
        timing = paired(theirs, ours, repeats, warmup=0 if quick else 1)
    detail = (
        f"{seeds} seeds, {epochs} epochs: {timing.first:.2f} against {timing.second:.2f} s; E R after the last run "
        f"{reached['theirs']:.3f} and {reached['ours']:.3f}"
    )
    return [Ratio("bandit one action at a time / all seeds at once", timing.ratio, 20.0, "higher", detail)]


def _batched(bandit: BanditArms, agent: NetworkAgent, seeds: int, epochs: int, seed: int) -> float:
    cells = seeds * STATES
    solver = torch.optim.Adam(agent.parameters(), lr=LR, fused=True)
    preference_loop(
        agent, TabularAgent(bandit.reference, cells), draw_arms, bandit.score, "best_of_n", prompts=cells, readout=Choices,
        samples=SAMPLES, batch=cells, shuffle=False, watch=0, seed=seed, steps=epochs, solver=solver, device="cpu",
        log_every=epochs,
    )  # fmt: skip
    return fmean(report.reward for report in bandit.report(agent, seeds))


def _one_by_one(bandit: BanditArms, start: dict[str, Tensor], place: int, epochs: int, seed: int) -> float:
    """One seed, a network call for each action."""
    network = _Network(start, place)
    states = list(start["contexts"][place])
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=True)
    torch.manual_seed(seed * 1000 + place)
    for _ in range(epochs):
        winners = []
        with torch.no_grad():
            for state in states:
                actions = [torch.distributions.Categorical(logits=network(state)).sample() for _ in range(SAMPLES)]
                rewards = [math.exp(-(((float(a) - 70.0) / 10.0) ** 2)) for a in actions]
                winners.append(actions[max(range(SAMPLES), key=rewards.__getitem__)])
        loss = torch.zeros(())
        for state, action in zip(states, winners, strict=True):
            loss = loss - torch.distributions.Categorical(logits=network(state)).log_prob(action)
        optimizer.zero_grad()
        (loss / len(states)).backward()
        optimizer.step()
    with torch.no_grad():
        p = torch.stack([network(state).softmax(-1) for state in states]).double()
    return float((p * bandit.rewards).sum(-1).mean())


class _Network(nn.Module):
    """One of the batched networks, alone."""

    def __init__(self, start: dict[str, Tensor], place: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(start[f"weights.{i}"][place].clone() for i in range(4))
        self.biases = nn.ParameterList(start[f"biases.{i}"][place, 0].clone() for i in range(4))
        self.gain, self.shift = (nn.Parameter(start[name][place, 0].clone()) for name in ("gain", "shift"))

    def forward(self, x: Tensor) -> Tensor:
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if layer == 0:
                x = functional.layer_norm(x, x.shape, self.gain, self.shift)
            if layer < 3:
                x = x.relu()
        return x
