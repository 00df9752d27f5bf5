"""Problems in which everything about on-policy sampling can be computed: arms, sequences of them, and lengths.

    bandit = BanditArms("far")                       # 100 arms, one step; the reward peaks where the data are rare
    agent = TabularAgent(bandit.reference)           # or NetworkAgent(bandit.contexts(10))
    stream = OnPolicy(1, draw_arms, bandit.score, samples=8)

The data distribution is a Cauchy squeezed by tanh into [-1, 1] and cut into 100 bins, from its distribution function, so
no bin is empty. Its heaviest bin is 0, the tail of the Cauchy. `SequenceBandit` asks for ten such choices in a row, and
`LengthTask` for a length: the shortest, the one near the mode, or the shortest where the data are long.

Source: arXiv:2404.14367, sections 4 and 5, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.problem import ModelView
from poise.quantities import Quantities, derive
from poise.readouts.on_policy import pairs_from_rewards
from poise.streams import Batch
from poise.training import fit

__all__ = [
    "BanditArms",
    "BanditReport",
    "LearnedReward",
    "LengthAgent",
    "LengthTask",
    "NetworkAgent",
    "SequenceAgent",
    "SequenceBandit",
    "TabularAgent",
    "draw_arms",
    "draw_sequences",
    "squashed_cauchy",
]

ARMS = 100
PEAKS: Mapping[str, tuple[float, float]] = {"far": (70, 10), "near": (20, 10), "wide": (70, 20), "widest": (70, 30)}


def squashed_cauchy(arms: int = ARMS, loc: float = -0.7, scale: float = 0.4) -> Tensor:
    """Return the mass of each of `arms` equal bins of [-1, 1] under tanh(X), X a Cauchy variable: float64 [arms].

    P(tanh(X) <= e) = 1/2 + atan((atanh(e) - loc) / scale) / pi

    >>> squashed_cauchy().argmax(), round(float(squashed_cauchy()[60:81].sum()), 4)
    (tensor(0), 0.0457)
    """
    edges = torch.atanh(torch.linspace(-1, 1, arms + 1, dtype=torch.float64))
    return (torch.atan((edges - loc) / scale) / math.pi + 0.5).diff()


@dataclass(frozen=True)
class BanditReport:
    """What is true of an agent, exactly: means over its cells, in units of the reward and nats.

    Attributes:
        reward: E R under the agent.
        forward_kl, reverse_kl: KL(data || agent) and KL(agent || data).
        entropy: of the agent.
    """

    reward: float
    forward_kl: float
    reverse_kl: float
    entropy: float


@dataclass(frozen=True)
class BanditArms:
    """The one-step bandit with 100 arms: R(a) = exp(-((a - centre) / width)^2).

    Args:
        peak: "far" (70, 10), "near" (20, 10), "wide" (70, 20), "widest" (70, 30): centre and width; or a pair of numbers.
        arms: number of arms.

    >>> bandit = BanditArms("far")
    >>> round(float((bandit.reference * bandit.rewards).sum()), 4)
    0.039
    """

    peak: str | tuple[float, float] = "far"
    arms: int = ARMS

    def __post_init__(self) -> None:
        if isinstance(self.peak, str) and self.peak not in PEAKS:
            raise InputError(f"peak is one of {', '.join(PEAKS)} or (centre, width), and it is {self.peak!r}.")

    @cached_property
    def reference(self) -> Tensor:
        """The data distribution, float64 [arms]."""
        return squashed_cauchy(self.arms)

    @cached_property
    def rewards(self) -> Tensor:
        """R of each arm, float64 [arms]."""
        centre, width = PEAKS[self.peak] if isinstance(self.peak, str) else self.peak
        return torch.exp(-(((torch.arange(self.arms, dtype=torch.float64) - centre) / width) ** 2))

    def contexts(self, states: int = 10, seeds: int = 1, seed: int = 0, width: int = 100) -> Tensor:
        """Draw the states, uniform in [0, 1]^width: float [seeds, states, width]."""
        generator = torch.Generator().manual_seed(derive(seed, "contexts"))
        return torch.rand(seeds, states, width, generator=generator)

    def score(self, batch: Batch) -> Tensor:
        """Return the reward of each drawn arm, float [rows]."""
        ids = batch["response_ids"]
        return self.rewards.to(ids.device)[ids[:, 0]].float()

    def report(self, agent: nn.Module, seeds: int = 1) -> list[BanditReport]:
        """Compute what is true of an agent, for each of its seeds (its cells are the seeds' states, in this order)."""
        with torch.no_grad():
            log_p = agent.table().double().log_softmax(-1).cpu()  # type: ignore[operator]
        p, log_q = log_p.exp(), self.reference.log()
        columns = (
            (p * self.rewards).sum(-1),
            (self.reference * (log_q - log_p)).sum(-1),
            torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1),
            -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        )
        means = [c.view(seeds, -1).mean(1).tolist() for c in columns]
        return [BanditReport(*row) for row in zip(*means, strict=True)]


class TabularAgent(nn.Module):
    """A softmax over arms for each cell, started at the data; `rates` gives the cells learning rates of their own.

    z = log(start) + sqrt(rate) w,    so that SGD on w with rate 1 is SGD on z with the cell's rate

    Args:
        start: probabilities float [arms], or of each cell [cells, arms].
        cells: independent copies (states, seeds, settings), trained at once.
        rates: float [cells] or None for 1.
    """

    tabular = True

    def __init__(self, start: Tensor, cells: int = 1, rates: Tensor | None = None) -> None:
        super().__init__()
        cells = len(start) if start.ndim == 2 else cells
        self.w = nn.Parameter(torch.zeros(cells, start.shape[-1]))
        self.register_buffer("start", start.log().float())
        self.register_buffer("scale", torch.ones(cells, 1) if rates is None else rates.float().sqrt()[:, None])

    start: Tensor
    scale: Tensor

    def table(self) -> Tensor:
        """Return the logits of every cell, [cells, arms]."""
        return self.start + self.scale * self.w

    def forward(self, input: Tensor | None) -> Tensor:
        """Return the logits [rows, arms] of the cells `input` int64 [rows], or of all cells for None."""
        return self.table() if input is None else self.table()[input]


class NetworkAgent(nn.Module):
    """The paper's network on each state, for several seeds at once: a batch of networks that share nothing.

    Linear 100-50, LayerNorm, ReLU, Linear 50-256, ReLU, Linear 256-256, ReLU, Linear 256-arms

    The states are few and fixed, so the network runs on each of them once and answers are looked up in its table.

    Args:
        contexts: float [seeds, states, width].
        arms: number of arms.
        feature, hidden: widths.
        seed: of the weights; orthogonal, biases 0.
    """

    tabular = True

    def __init__(self, contexts: Tensor, arms: int = ARMS, feature: int = 50, hidden: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("contexts", contexts)
        sizes = [(contexts.shape[-1], feature), (feature, hidden), (hidden, hidden), (hidden, arms)]
        seeds = len(contexts)
        generator = torch.Generator().manual_seed(derive(seed, "weights"))
        self.weights = nn.ParameterList(_orthogonal(seeds, i, o, generator) for i, o in sizes)
        self.biases = nn.ParameterList(torch.zeros(seeds, 1, o) for _, o in sizes)
        self.gain = nn.Parameter(torch.ones(seeds, 1, feature))
        self.shift = nn.Parameter(torch.zeros(seeds, 1, feature))

    contexts: Tensor

    def table(self) -> Tensor:
        """Return the logits of every state of every seed, [seeds * states, arms]."""
        x = self.contexts
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if layer == 0:
                x = nn.functional.layer_norm(x, x.shape[-1:]) * self.gain + self.shift
            if layer < len(self.weights) - 1:
                x = x.relu()
        return x.flatten(0, 1)

    def forward(self, input: Tensor | None) -> Tensor:
        """Return the logits [rows, arms] of the cells `input` int64 [rows], or of all cells for None."""
        return self.table() if input is None else self.table()[input]

    def fit_to(self, probabilities: Tensor, steps: int = 100, lr: float = 0.01) -> NetworkAgent:
        """Start at the data: minimise KL(agent || data) with Adam, as the paper does."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        log_q = probabilities.log().to(self.contexts)
        for _ in range(steps):
            log_p = self.table().log_softmax(-1)
            # A sum over seeds: each network has the gradient that it would have alone.
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).view(len(self.contexts), -1).mean(1).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self


def _orthogonal(seeds: int, inputs: int, outputs: int, generator: torch.Generator) -> nn.Parameter:
    stack = torch.empty(seeds, inputs, outputs)
    for matrix in stack:
        nn.init.orthogonal_(matrix, generator=generator)
    return nn.Parameter(stack)


def draw_arms(model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one arm for each prompt (`input`), by inversion: one uniform number an answer."""
    cells = prompts["input"]
    table = model.table() if hasattr(model, "table") else None  # type: ignore[operator]
    log_p = (model(cells) if table is None else table).double().log_softmax(-1)
    cumulative = log_p.exp().cumsum(-1)
    if table is not None:
        cumulative = cumulative[cells]
    chance = torch.rand(len(cells), 1, generator=generator, dtype=torch.float64, device=cells.device)
    ids = torch.searchsorted(cumulative, chance * cumulative[:, -1:], right=True).clamp(max=cumulative.shape[1] - 1)
    taken = (log_p[cells] if table is not None else log_p).gather(1, ids)
    return {
        "response_ids": ids,
        "response_mask": torch.ones_like(ids, dtype=torch.bool),
        "behaviour_logps": taken.float(),
    }


# ---- sequences ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceBandit:
    """Ten choices in a row: the reward is the mean of the one-step rewards.

    Args:
        peak, arms: as in `BanditArms`.
        length: choices of an answer.
    """

    peak: str | tuple[float, float] = "far"
    arms: int = ARMS
    length: int = 10

    @cached_property
    def one_step(self) -> BanditArms:
        """The bandit of each step."""
        return BanditArms(self.peak, self.arms)

    def score(self, batch: Batch) -> Tensor:
        """Return the reward of each answer, float [rows]."""
        ids = batch["response_ids"]
        return self.one_step.rewards.to(ids.device)[ids].mean(1).float()


class SequenceAgent(nn.Module):
    """A small transformer (three layers, three heads, width 48) over choices; logits of each given those before.

    Args:
        arms, length: choices, and how many of them.
        width, heads, layers: of the transformer.
        seed: of the weights.
    """

    def __init__(
        self, arms: int = ARMS, length: int = 10, width: int = 48, heads: int = 3, layers: int = 3, seed: int = 0
    ) -> None:
        super().__init__()
        self.arms, self.length = arms, length
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            self.embedding = nn.Embedding(arms + 1, width)  # the last one begins an answer
            self.position = nn.Parameter(0.02 * torch.randn(length, width))
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Linear(width, arms)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [rows, time, arms]: entry t is of choice t given those before."""
        begin = torch.full_like(ids[:, :1], self.arms)
        return self._run(torch.cat([begin, ids[:, :-1]], dim=1))

    def _run(self, before: Tensor) -> Tensor:
        time = before.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=before.device)
        x = self.embedding(before) + self.position[:time]
        out: Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
        return out

    def fit_to(
        self, probabilities: Tensor, steps: int = 100, lr: float = 0.01, rows: int = 32, seed: int = 0
    ) -> SequenceAgent:
        """Start at the data: every choice is distributed as `probabilities`, whatever came before."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(derive(seed, "fit"))
        log_q = probabilities.log().float()
        for _ in range(steps):
            ids = torch.multinomial(probabilities.expand(rows, -1), self.length, replacement=True, generator=generator)
            log_p = self(ids).log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self


def draw_sequences(model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw an answer of `model.length` choices for each prompt."""
    first = next(iter(prompts.values()))
    rows, device = len(first), first.device
    ids = torch.full((rows, 1), model.arms, device=device)  # type: ignore[call-overload]
    logps = []
    for _ in range(int(model.length)):  # type: ignore[arg-type]
        log_p = model._run(ids)[:, -1].log_softmax(-1)  # type: ignore[operator]
        drawn = torch.multinomial(log_p.exp(), 1, generator=generator)
        logps.append(log_p.gather(1, drawn))
        ids = torch.cat([ids, drawn], dim=1)
    answer = ids[:, 1:]
    return {
        "response_ids": answer,
        "response_mask": torch.ones_like(answer, dtype=torch.bool),
        "behaviour_logps": torch.cat(logps, dim=1),
    }


# ---- lengths --------------------------------------------------------------------------------------------------------


class LengthAgent(nn.Module):
    """Writes words until it ends: two choices at each place, go on (0) or end (1), so that lengths have exact probabilities.

    Args:
        probabilities: of the lengths 1 .. longest, float [longest]: where the agent starts.
    """

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        p = probabilities.double() / probabilities.double().sum()
        still = p.flip(0).cumsum(0).flip(0)  # P(length >= k)
        hazard = (p / still).clamp(1e-6, 1 - 1e-6)
        self.ending = nn.Parameter(torch.logit(hazard[:-1]).float())
        self.longest = len(p)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [rows, time, 2] of going on or ending; at the longest length it must end."""
        ending = torch.cat([self.ending, self.ending.new_full((1,), 30.0)])[: ids.shape[1]]
        return torch.stack([torch.zeros_like(ending), ending], dim=-1).expand(len(ids), -1, -1)

    def lengths(self) -> Tensor:
        """Return the probability of each length 1 .. longest, float [longest]."""
        ends = torch.cat([self.ending.sigmoid(), self.ending.new_ones(1)])
        goes_on = torch.cat([ends.new_ones(1), (1 - ends[:-1]).cumprod(0)])
        return ends * goes_on


@dataclass(frozen=True)
class LengthTask:
    """Answers whose reward is their length alone.

    "min"      R = -length: the mode of the data is far from the best answer
    "mode"     R = -|length - target|: the best answers are those that the data have most of
    "skew"     R = -length, and the data are truncated at random, so that short answers are in the data after all

    Reward in units of the mode. The paper's target is 203 tokens of a language model (from memory); here lengths are
    gamma-distributed with their mode at `target`, cut off at four times that.

    Args:
        kind: "min", "mode" or "skew".
        target: the mode of the data.
    """

    kind: Literal["min", "mode", "skew"] = "min"
    target: int = 20

    def __post_init__(self) -> None:
        if self.kind not in ("min", "mode", "skew"):
            raise InputError(f"kind is 'min', 'mode' or 'skew', and it is {self.kind!r}.")
        if self.target < 2:
            raise InputError(f"target must be at least 2 words, and it is {self.target}.")

    @cached_property
    def reference(self) -> Tensor:
        """Probability of each length 1 .. 4 * target in the data, float64 [lengths]."""
        k = torch.arange(1, 4 * self.target + 1, dtype=torch.float64)
        shape = 9.0
        log_p = (shape - 1) * k.log() - (shape - 1) * k / self.target
        p = log_p.softmax(0)
        if self.kind == "skew":
            # Cut at an exponential length: P(min(L, C) = k) = P(L >= k) P(C >= k) - P(L >= k + 1) P(C >= k + 1).
            still = p.flip(0).cumsum(0).flip(0) * torch.exp(-(k - 1) / (self.target / 2))
            p = still - torch.cat([still[1:], still.new_zeros(1)])
        return p

    @cached_property
    def rewards(self) -> Tensor:
        """R of each length, float64 [lengths]."""
        k = torch.arange(1, 4 * self.target + 1, dtype=torch.float64)
        return -((k - self.target).abs() if self.kind == "mode" else k) / self.target

    def score(self, batch: Batch) -> Tensor:
        """Return the reward of each answer, float [rows]."""
        length = batch["response_mask"].sum(1)
        return self.rewards.to(length.device)[length - 1].float()

    def draw(self, model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw an answer for each prompt: `response_ids` are 0 for a word and 1 for the end."""
        first = next(iter(prompts.values()))
        p = model.lengths().expand(len(first), -1)  # type: ignore[operator]
        length = torch.multinomial(p, 1, generator=generator) + 1
        place = torch.arange(1, int(length.max()) + 1, device=first.device)
        mask = place <= length
        ids = (place == length).long()
        log_p = model(ids).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        return {"response_ids": ids, "response_mask": mask, "behaviour_logps": torch.where(mask, log_p, 0.0)}


# ---- a reward that is learned ---------------------------------------------------------------------------------------


class LearnedReward(nn.Module):
    """A reward model of lengths, fitted to preferences alone (Bradley-Terry), and used as `score`.

    P(a preferred to b) = sigma(r(a) - r(b)),    r a small network of the length

    What it knows ends with the lengths of its pairs: beyond them it extrapolates, and a policy will go there. Scoring with
    `both(task)` gives the learned reward, and the true one beside it.

    Args:
        longest: the length that is mapped to 1.
        hidden: width.
        seed: of the weights.
    """

    def __init__(self, longest: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        self.longest = longest
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "weights"))
            self.network = nn.Sequential(
                nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
            )

    def forward(self, mask: Tensor) -> Tensor:
        """Return r of answers with this mask [rows, time]: float [rows]."""
        scores: Tensor = self.network(mask.sum(1, keepdim=True).float() / self.longest)
        return scores.squeeze(-1)

    def score(self, batch: Batch) -> Tensor:
        """Return r of a batch of answers, float [rows]."""
        scores: Tensor = self(batch["response_mask"])
        return scores

    def both(self, task: LengthTask) -> Callable[[Batch], dict[str, Tensor]]:
        """Return a `score` that gives `reward`, the learned one, and `true_reward`."""
        return lambda batch: {"reward": self.score(batch), "true_reward": task.score(batch)}

    def learn(
        self, answers: Batch, samples: int, *, steps: int = 200, lr: float = 1e-2, seed: int = 0
    ) -> LearnedReward:
        """Fit it to every pair of unequal rewards within the groups of `answers`, as `collect` returns them."""
        pairs = pairs_from_rewards(answers["reward"].view(-1, samples))
        if not len(pairs):
            raise InputError("All answers have equal rewards, so there are no preferences to learn from.")
        mask = answers["response_mask"]
        data = {
            "chosen_mask": mask[pairs.prompt * samples + pairs.winner],
            "rejected_mask": mask[pairs.prompt * samples + pairs.loser],
        }
        # Without a reference and with beta = 1, DPO of scores is the Bradley-Terry model.
        fit(
            self,
            "dpo(beta=1.0, reference_free=True)",
            {"main": data},
            readout=_Scores(),
            solver="adamw",
            lr=lr,
            steps=steps,
            seed=seed,
        )
        return self


class _Scores:
    """Offers the scores of both answers in the place of their log-probabilities."""

    output = "chosen_logps"

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        batch.offer("chosen_logps", lambda: model(batch["chosen_mask"]))
        batch.offer("rejected_logps", lambda: model(batch["rejected_mask"]))
        return batch
