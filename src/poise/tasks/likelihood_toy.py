"""Ten answers, a small network, one preferred and one refused answer for each prompt: where the likelihood of both goes.

A three-layer network maps each prompt to a softmax over answers. It is first fitted to a given distribution: visible mass on
an answer stands for one that the model itself would give (on-policy), nearly none for one that comes from elsewhere. Then any
objective on pairs trains it, and every probability is known at every step.

    toy = LikelihoodToy("both_on", seeds=20)
    curves = toy.train("dpo(beta=0.1)")
    curves.chosen[-1].mean(), curves.unseen[-1].mean(), curves.flags().degradation[-1]

All seeds train at once: the weights have a leading dimension of seeds, every seed has its own initial weights and its own
answers, and the gradient of one never meets that of another.

Source: arXiv:2406.07327, section 3 (the toy model; sizes are this library's).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError
from poise.formula import parse
from poise.insight.likelihood_dynamics import LikelihoodFlags, likelihood_flags
from poise.objective import Objective, Summand, Term
from poise.quantities import derive

__all__ = ["SCENARIOS", "LikelihoodCurves", "LikelihoodToy", "RewardCurves"]

SCENARIOS: dict[str, tuple[float, float]] = {
    "both_on": (0.3, 0.3),
    "chosen_on": (0.3, 0.02),
    "rejected_on": (0.02, 0.3),
    "both_off": (0.02, 0.02),
}
"""Initial mass of the chosen and of the rejected answer: the paper's four scenarios of on- and off-policy data."""


@dataclass(frozen=True)
class LikelihoodCurves:
    """What one objective did, at every step: float [steps + 1, seeds, prompts].

    Attributes:
        log_chosen, log_rejected, log_unseen: log pi+, log pi-, and the log of the mass of all other answers.
    """

    log_chosen: Tensor
    log_rejected: Tensor
    log_unseen: Tensor

    @property
    def chosen(self) -> Tensor:
        """pi+, mean over prompts: [steps + 1, seeds]."""
        return self.log_chosen.exp().mean(-1)

    @property
    def rejected(self) -> Tensor:
        """pi-, mean over prompts: [steps + 1, seeds]."""
        return self.log_rejected.exp().mean(-1)

    @property
    def unseen(self) -> Tensor:
        """The mass of all other answers, mean over prompts: [steps + 1, seeds]."""
        return self.log_unseen.exp().mean(-1)

    @property
    def log_gradient_ratio(self) -> Tensor:
        """log (|dl/dpi-| / |dl/dpi+|) at equal betas, mean over prompts: [steps + 1, seeds]."""
        return (self.log_chosen - self.log_rejected).mean(-1)

    def flags(self) -> LikelihoodFlags:
        """Return the three D's of the mean masses, bool [steps + 1, seeds] each."""
        # Means of masses and not of logarithms: the unseen mass of a prompt that is solved has a logarithm without limit.
        logs = [x.logsumexp(-1) for x in (self.log_chosen, self.log_rejected, self.log_unseen)]
        return likelihood_flags(*(x - x[0] for x in logs))

    def steps_until_rejected(self, below: float = 1e-3) -> Tensor:
        """Return the first step at which pi- is below a level, [seeds]; the number of steps where it never is."""
        return (self.rejected >= below).long().cumprod(0).sum(0)


@dataclass(frozen=True)
class RewardCurves:
    """What the Bradley-Terry reward model did on the same pairs: float [steps + 1, seeds, prompts].

    Attributes:
        chosen, rejected: the rewards.
        scores: of all answers in the end, [seeds, prompts, answers].
    """

    chosen: Tensor
    rejected: Tensor
    scores: Tensor

    @property
    def gradient(self) -> Tensor:
        """|dl/dr|, the same for both answers and at most 1: sigma(r- - r+)."""
        return torch.sigmoid(self.rejected - self.chosen)


class LikelihoodToy:
    """The toy model in one scenario, for many seeds at once.

    Args:
        scenario: a name of `SCENARIOS`, or the initial masses (chosen, rejected).
        seeds: how many; each has its own weights and answers.
        prompts, answers, hidden: sizes.
        fit_steps: of Adam, to the initial distribution.
        tabular: free logits in place of the network: no coupling between answers but the softmax.
        seed: from which everything derives.

    Raises:
        InputError: no such scenario, or masses that leave nothing for the other answers.

    >>> toy = LikelihoodToy("both_on", seeds=2, tabular=True)
    >>> curves = toy.train("dpo(beta=0.1)", steps=50)
    >>> bool((curves.chosen.diff(dim=0) >= 0).all())                      # free logits: the chosen answer only rises
    True
    """

    def __init__(
        self,
        scenario: str | tuple[float, float] = "both_on",
        seeds: int = 5,
        *,
        prompts: int = 4,
        answers: int = 10,
        hidden: int = 64,
        fit_steps: int = 800,
        tabular: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(scenario, str):
            if scenario not in SCENARIOS:
                raise InputError(f"likelihood_toy: scenario is one of {', '.join(SCENARIOS)}, and it is {scenario!r}.")
            scenario = SCENARIOS[scenario]
        if min(scenario) <= 0 or sum(scenario) >= 1 or answers < 3:
            raise InputError(
                f"likelihood_toy: positive masses that add up to less than 1, and 3 answers; got {scenario}, {answers}."
            )
        self.seeds, self.prompts, self.answers, self.hidden, self.tabular = seeds, prompts, answers, hidden, tabular
        # Every seed draws from a generator of its own, so that it is the same run however many there are.
        drawn = [self._draw(torch.Generator().manual_seed(derive(seed, "toy", number))) for number in range(seeds)]
        self.chosen, self.rejected = torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])
        initial = torch.full((seeds, prompts, answers), (1 - sum(scenario)) / (answers - 2))
        initial.scatter_(-1, self.chosen[..., None], scenario[0]).scatter_(-1, self.rejected[..., None], scenario[1])
        self.inputs = torch.eye(prompts).expand(seeds, prompts, prompts)
        self._raw = [torch.stack(column) for column in zip(*(d[2] for d in drawn), strict=True)]
        self.weights = [initial.log()] if tabular else self._raw
        if not tabular:
            self.weights = self._descend(lambda: -(initial * self._log_p()).sum(-1), fit_steps, 1e-2)
        self.reference = self._log_p().detach()

    def _draw(self, g: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
        order = torch.rand(self.prompts, self.answers, generator=g).argsort(-1)
        sizes = [(self.prompts, self.hidden), (self.hidden, self.hidden), (self.hidden, self.answers)]
        weights = [
            (2 * torch.rand(shape, generator=g) - 1) / math.sqrt(i) for i, o in sizes for shape in ((i, o), (1, o))
        ]
        return order[:, 0], order[:, 1], weights

    def _out(self) -> Tensor:
        if self.tabular:
            return self.weights[0]
        x = self.inputs
        w = self.weights
        x = torch.relu(torch.baddbmm(w[1], x, w[0]))
        x = torch.relu(torch.baddbmm(w[3], x, w[2]))
        return torch.baddbmm(w[5], x, w[4])

    def _log_p(self) -> Tensor:
        return self._out().log_softmax(-1)

    def _descend(
        self, loss: Callable[[], Tensor], steps: int, lr: float, look: Callable[[], None] = lambda: None
    ) -> list[Tensor]:
        """Adam on values [seeds, prompts]: the mean over prompts, the sum over seeds, so that each seed is a run of its own."""
        self.weights = [w.detach().clone().requires_grad_() for w in self.weights]
        # Fused: on weights this small an ordinary step of Adam costs more than the gradient.
        optimizer = torch.optim.Adam(self.weights, lr=lr, fused=True)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().mean(-1).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            look()
        return [w.detach() for w in self.weights]

    def _pick(self, table: Tensor, which: Tensor) -> Tensor:
        return table.gather(-1, which[..., None])[..., 0]

    # ---- what can be trained --------------------------------------------------------------------------------------------

    def train(self, objective: Objective | Term | str, steps: int = 500, lr: float = 1e-2) -> LikelihoodCurves:
        """Train on the pairs with any objective that reads log-probabilities of pairs; the toy itself stays as it was."""
        made = parse(objective) if isinstance(objective, str) else objective
        made = Objective([Summand(made)]) if isinstance(made, Term) else made
        fixed = {
            "reference_chosen_logps": self._pick(self.reference, self.chosen).flatten(),
            "reference_rejected_logps": self._pick(self.reference, self.rejected).flatten(),
        }

        def loss(log_p: Tensor) -> Tensor:
            chosen, rejected = self._pick(log_p, self.chosen).flatten(), self._pick(log_p, self.rejected).flatten()
            one: Tensor = made(fixed, chosen_logps=chosen, rejected_logps=rejected, response_logps=chosen)
            # The objective is the mean over seeds and prompts; `_descend` sums over seeds.
            return one.expand(self.seeds, 1)

        return self._recorded(loss, steps, lr)

    def train_policy_gradient(
        self, scores: Tensor, beta: float = 0.1, steps: int = 500, lr: float = 1e-2
    ) -> LikelihoodCurves:
        """Maximise E_pi[score] - beta KL(pi || reference) with its exact gradient: what on-policy training with a reward model does.

        Args:
            scores: of all answers, [seeds, prompts, answers], such as `train_reward().scores`.
        """

        def loss(log_p: Tensor) -> Tensor:
            return -(log_p.exp() * (scores - beta * (log_p - self.reference))).sum(-1)

        return self._recorded(loss, steps, lr)

    def train_reward(self, steps: int = 500, lr: float = 1e-2) -> RewardCurves:
        """Train the same network as a reward model, -log sigma(r+ - r-), from its untrained weights."""
        kept, self.weights = (
            self.weights,
            [w.clone() for w in (self._raw if not self.tabular else [torch.zeros_like(self.weights[0])])],
        )
        chosen, rejected = [], []

        def loss() -> Tensor:
            out = self._out()
            up, down = self._pick(out, self.chosen), self._pick(out, self.rejected)
            chosen.append(up.detach())
            rejected.append(down.detach())
            return -F.logsigmoid(up - down)

        self._descend(loss, steps, lr)
        with torch.no_grad():
            loss()
            scores = self._out()
        self.weights = kept
        return RewardCurves(torch.stack(chosen), torch.stack(rejected), scores)

    def _recorded(self, loss: Callable[[Tensor], Tensor], steps: int, lr: float) -> LikelihoodCurves:
        kept, seen = self.weights, [self.reference]
        current: list[Tensor] = []

        def value() -> Tensor:
            current[:] = [self._log_p()]
            seen.append(current[0].detach())
            return loss(current[0])

        self._descend(value, steps, lr)
        last = self._log_p().detach()
        self.weights = kept
        # The first entry of the loop is the reference again.
        table = torch.stack([*seen[1:], last])
        others = self._others
        return LikelihoodCurves(
            self._pick(table, self.chosen.expand(len(table), -1, -1)),
            self._pick(table, self.rejected.expand(len(table), -1, -1)),
            table.masked_fill(~others, -torch.inf).logsumexp(-1),
        )

    @cached_property
    def _others(self) -> Tensor:
        """Which answers are in no pair, bool [seeds, prompts, answers]."""
        others = torch.ones(self.seeds, self.prompts, self.answers, dtype=torch.bool)
        return others.scatter(-1, self.chosen[..., None], False).scatter(-1, self.rejected[..., None], False)
