"""Batches that the model writes itself: sample answers from what is being trained, score them, learn from them.

    stream = OnPolicy(prompts, generate, score, samples=8, reuse=4)
    poise.fit(model, "grpo + 0.04*sampled_kl", {"main": stream}, readout=..., steps=400)

`generate(model, prompts, generator)` answers prompts, `score(batch)` says what the answers are worth. A round samples
`batch_size` prompts with `samples` answers each; `reuse` steps are made on it before the next. Two numbers say how
on-policy that is: D = batch_size * samples answers a round, and T = reuse. From the second step of a round on the samples
are stale, and `behaviour_logps`, what their sampler thought of them, stays with them.

Everything is a function of (seed, name, round) and of the model at the beginning of the round. A checkpoint keeps the
round in progress, so a run that is stopped between two rounds, or within one, goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import CheckpointError, IncompatibleError, InputError, NonFiniteError, StateError
from poise.problem import ModelView
from poise.quantities import Quantities, derive, random_numbers
from poise.streams import Batch, Stream

__all__ = ["Choices", "OnPolicy", "Pairs", "SampleTokens", "collect", "pairs_from_rewards"]

Generate = Callable[[nn.Module, Batch, torch.Generator], Mapping[str, Tensor]]
Score = Callable[[Batch], Tensor | Mapping[str, Tensor]]


# ---- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Winners and losers within groups of scored answers.

    Attributes:
        prompt, winner, loser: int64 [pairs]: the group, and the places of the two answers within it.
        tied: groups that gave no pair.
    """

    prompt: Tensor
    winner: Tensor
    loser: Tensor
    tied: int

    def __len__(self) -> int:
        return len(self.prompt)


def pairs_from_rewards(rewards: Tensor, threshold: float = 0.0) -> Pairs:
    """Return every pair of answers to one prompt whose rewards differ by more than `threshold`, the better one first.

    Args:
        rewards: float [prompts, answers].
        threshold: smallest gap that makes a pair is above it, >= 0. Equal rewards never make one.

    Raises:
        InputError: fewer than two answers to a prompt, or a negative threshold.

    >>> pairs = pairs_from_rewards(torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]]))
    >>> pairs.winner.tolist(), pairs.loser.tolist(), pairs.tied
    ([1, 2], [0, 0], 1)
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"Pairs need at least two answers to each prompt, rewards float [prompts, answers], and these are {list(rewards.shape)}."
        )
    if not threshold >= 0:
        raise InputError(f"threshold is the gap that a pair must exceed, at least 0, and it is {threshold}.")
    gap = rewards[:, :, None] - rewards[:, None, :]
    prompt, winner, loser = (gap > threshold).nonzero(as_tuple=True)
    tied = len(rewards) - len(torch.unique(prompt))
    return Pairs(prompt, winner, loser, tied)


# ---- the stream -----------------------------------------------------------------------------------------------------


class OnPolicy(Stream):
    """A stream whose batches are answers of the model that is being trained, with their rewards.

    A batch has the prompts' columns, each repeated `samples` times, what `generate` returns (`response_ids`,
    `response_mask`, `behaviour_logps`, ...), `reward` float [rows] and `group` int64 [rows], the number of the prompt
    within the round; the answers of a prompt stand together, and micro-batches and processes never divide them. With
    `pairs`, a batch has the pairs of the round in their place: every `response_*` column twice, as `chosen_*` and
    `rejected_*`.

    Args:
        prompts: tensors by name, a row for each prompt; or a number of prompts that have no data (`input` then counts them).
        generate: `generate(model, prompts, generator) -> {"response_ids": int64 [rows, time], "response_mask": ..., ...}`;
            called without gradients in evaluation mode. It draws from the generator alone. `behaviour_logps` float [rows,
            time] are wanted by every loss with a ratio, and by reuse.
        score: `score(batch) -> float [rows]`, the rewards; or columns by name, `reward` among them unless the objective
            makes the reward itself.
        samples: answers to each prompt, N.
        reuse: optimiser steps on the answers of a round, T.
        on_policy: share of a round's prompts that the model answers now, in [0, 1]; the others' answers come from `offline`.
        offline: answers that are there already, as `collect` returns them: `samples` rows a group, `index` saying which
            prompt they answer, and rewards.
        budget: rewards that may be asked for in all, those of `offline` included; `limit` says how many steps that serves.
        pairs: smallest difference of rewards that makes a pair; None leaves the answers as they are.
        batch_size: prompts of a round.
        shuffle: take prompts in a new order each epoch.

    Attributes:
        queries: rewards asked for so far, and `gradient_steps`: steps served.
        tied: groups of the rounds so far that gave no pair.
        held: the round in progress, before pairs are made.

    Raises:
        InputError: an argument out of range, a prompt without offline answers, or what `generate` and `score` return does
            not fit.
        NonFiniteError: a reward is NaN or infinite.
    """

    def __init__(
        self,
        prompts: Mapping[str, Tensor] | int,
        generate: Generate,
        score: Score,
        *,
        samples: int = 8,
        reuse: int = 1,
        on_policy: float = 1.0,
        offline: Mapping[str, Tensor] | None = None,
        budget: int | None = None,
        pairs: float | None = None,
        batch_size: int = 128,
        shuffle: bool = True,
    ) -> None:
        data = {"input": torch.arange(prompts)} if isinstance(prompts, int) else dict(prompts)
        super().__init__(data, batch_size, shuffle=shuffle)
        self.prompts = Stream(data, batch_size, shuffle=shuffle)
        _check_numbers(samples, reuse, on_policy, pairs)
        self.generate, self.score = generate, score
        self.samples, self.reuse, self.on_policy, self.pairs, self.budget = samples, reuse, on_policy, pairs, budget
        self.offline = None if offline is None else dict(offline)
        self._places = self._find_offline()
        self.model: nn.Module | None = None
        self.held: Batch | None = None
        self._round = -1
        self._batch: Batch = {}
        self.queries = 0 if self.offline is None or on_policy == 1 else len(self.offline["reward"])
        self.gradient_steps = self.tied = 0
        if budget is not None and self.limit == 0:
            raise InputError(
                f"The budget of {budget} rewards does not pay for one round: it asks for {self._cost(0)} after {self.queries} offline."
            )

    # ---- what it knows before it begins -----------------------------------------------------------------------------

    def _find_offline(self) -> Tensor | None:
        """Return where each prompt's offline groups begin, int64 [prompts, most groups], -1 beyond a prompt's last."""
        if self.on_policy == 1:
            return None
        if self.offline is None:
            raise InputError(
                f"on_policy={self.on_policy:g} takes a share of the answers from offline data: give offline=collect(...)."
            )
        missing = {"index", "reward"} - set(self.offline)
        if missing:
            raise InputError(f"The offline data lack {', '.join(sorted(missing))}: make them with collect(...).")
        index = self.offline["index"]
        if len(index) % self.samples or not bool((index.view(-1, self.samples) == index[:: self.samples, None]).all()):
            raise InputError(
                f"The offline data need {self.samples} consecutive rows (samples) for each group of answers."
            )
        first = index[:: self.samples]
        count = torch.bincount(first, minlength=self.examples or 0)
        if int(count.min()) == 0:
            raise InputError(
                f"The offline data have no answers to prompt {int(count.argmin())}; every prompt needs some."
            )
        order = first.argsort(stable=True)
        rank = torch.arange(len(first)) - (count.cumsum(0) - count)[first[order]]
        places = torch.full((len(count), int(count.max())), -1)
        places[first[order], rank] = order * self.samples
        return places

    def _fresh(self, prompts: int) -> int:
        """Return how many of a round's prompts the model answers now."""
        return round(self.on_policy * prompts)

    def _cost(self, number: int) -> int:
        """Return the rewards that a round asks for."""
        return self._fresh(len(self.prompts._rows(number))) * self.samples

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps in which every prompt is answered once."""
        return (super().steps_per_epoch or 1) * self.reuse

    @property
    def limit(self) -> int | None:
        """Optimiser steps that the budget pays for."""
        if self.budget is None:
            return None
        left = self.budget - (0 if self.offline is None or self.on_policy == 1 else len(self.offline["reward"]))
        if left < 0:
            return 0
        epoch = [self._cost(i) for i in range(self.prompts.steps_per_epoch or 1)]
        if not sum(epoch):
            return None
        rounds, left = left // sum(epoch) * len(epoch), left % sum(epoch)
        for cost in epoch:
            if cost > left:
                break
            rounds, left = rounds + 1, left - cost
        return rounds * self.reuse

    def prepare(self, name: str, seed: int, device: torch.device, accumulate: int = 1) -> Stream:
        """As `Stream.prepare`."""
        super().prepare(name, seed, device, accumulate)
        self.prompts.prepare(name, seed, device)
        if self.offline is not None:
            self.offline = {k: v.to(device) for k, v in self.offline.items()}
        return self

    def attach(self, model: nn.Module) -> None:
        """Take the model whose answers are wanted."""
        self.model = model

    # ---- what it gives ----------------------------------------------------------------------------------------------

    def iterate(self, step: int) -> Iterator[list[Batch]]:
        """Give the micro-batches of every optimiser step from `step` on; a round is sampled when its first step is asked for."""
        while True:
            number = step // self.reuse
            if number != self._round:
                self.held = self._sample(number)
                self._batch, self._round = self._arranged(self.held), number
            self.gradient_steps = step + 1
            yield self._shared_out()
            step += 1

    def _sample(self, number: int) -> Batch:
        if self.model is None:
            raise StateError("The stream does not know whose answers it samples: call stream.attach(model) first.")
        if self.limit is not None and number * self.reuse >= self.limit:
            raise InputError(f"The budget of {self.budget} rewards is used up after {self.limit} steps.")
        rows = self.prompts._rows(number)
        fresh, old = rows[: self._fresh(len(rows))], rows[self._fresh(len(rows)) :]
        batches = []
        if len(fresh):
            generator = self._generator("samples", number)
            batches.append(answer(self.model, self.data, fresh, self.generate, self.score, self.samples, generator))
            self.queries += len(fresh) * self.samples
        if len(old):
            batches.append(self._old(old, number))
        batch = batches[0] if len(batches) == 1 else _joined(*batches)
        batch["group"] = torch.arange(len(rows), device=self.device).repeat_interleave(self.samples)
        return batch

    def _old(self, rows: Tensor, number: int) -> Batch:
        """Take one of the offline groups of each prompt."""
        assert self.offline is not None
        assert self._places is not None
        places = self._places[rows]
        generator = torch.Generator().manual_seed(derive(self.seed, "offline", self.name, number))
        chance = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        pick = (chance * (places >= 0).sum(1)).long()
        first = places.gather(1, pick[:, None])
        taken = (first + torch.arange(self.samples)).flatten().to(self.device)
        prompts = {k: v[rows.to(self.device)].repeat_interleave(self.samples, 0) for k, v in self.data.items()}
        return {**prompts, **{k: v[taken] for k, v in self.offline.items() if k != "group"}}

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(derive(self.seed, purpose, self.name, number))

    def _arranged(self, batch: Batch) -> Batch:
        """Return the round as terms read it: answers, or pairs of them."""
        if self.pairs is None:
            return batch
        if "reward" not in batch:
            raise InputError("Pairs are made from the column 'reward', and score did not return it.")
        pairs = pairs_from_rewards(batch["reward"].view(-1, self.samples), self.pairs)
        self.tied += pairs.tied
        return as_pairs(batch, pairs, self.samples)

    def _shared_out(self) -> list[Batch]:
        """Divide the round into micro-batches and processes, group by group."""
        batch = self._batch
        if self.accumulate == 1 and processes.size() == 1:
            return [dict(batch)]
        group = batch["group"]
        parts = torch.tensor_split(torch.unique(group), self.accumulate)
        result = []
        for number, part in enumerate(parts):
            own = torch.isin(group, part[processes.rank() :: processes.size()])
            micro = {k: v[own] if _is_row(v, len(group)) else v for k, v in batch.items()}
            if not bool(own.any()):
                # Nothing left for this one: it takes a row along that counts nothing and is a group of its own.
                micro = {k: v[:1] if _is_row(v, len(group)) else v for k, v in batch.items()}
                micro["sample_weight"] = torch.zeros(1, device=self.device)
                micro["group"] = group[-1:] + 1 + number * processes.size() + processes.rank()
            result.append(micro)
        return result

    # ---- what a checkpoint keeps ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the round in progress and the counters."""
        return {
            "settings": self._settings(),
            "round": self._round,
            "held": self.held,
            "queries": self.queries,
            "gradient_steps": self.gradient_steps,
            "tied": self.tied,
        }

    def _settings(self) -> dict[str, Any]:
        """Return what decides which samples a step sees."""
        return {"samples": self.samples, "reuse": self.reuse, "on_policy": self.on_policy, "pairs": self.pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            CheckpointError: they are of a stream with other settings.
        """
        if not state:
            return
        if state["settings"] != self._settings():
            raise CheckpointError(
                f"The checkpoint is of a stream with {state['settings']}, and this one has {self._settings()}. Use another folder, or "
                "resume=False to start afresh."
            )
        self.held, self._round = state["held"], state["round"]
        self.tied = 0
        self._batch = {} if self.held is None else self._arranged(self.held)
        self.queries, self.gradient_steps, self.tied = state["queries"], state["gradient_steps"], state["tied"]


def _check_numbers(samples: int, reuse: int, on_policy: float, pairs: float | None) -> None:
    for name, value in (("samples", samples), ("reuse", reuse)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, and it is {value}.")
    if not 0 <= on_policy <= 1:
        raise InputError(f"on_policy is a share, in [0, 1], and it is {on_policy}.")
    if pairs is not None and samples < 2:
        raise InputError(f"Pairs need at least two answers to each prompt, and samples is {samples}.")
    if pairs is not None and not pairs >= 0:
        raise InputError(f"pairs is the gap of rewards that a pair must exceed, at least 0, and it is {pairs}.")


def collect(
    model: nn.Module,
    prompts: Mapping[str, Tensor] | int,
    generate: Generate,
    score: Score,
    *,
    samples: int = 8,
    groups: int = 1,
    seed: int = 0,
) -> Batch:
    """Answer every prompt and score the answers once: offline data, such as those of the reference.

    Args:
        model: whose answers they are.
        prompts, generate, score, samples: as for `OnPolicy`.
        groups: groups of answers to each prompt.
        seed: decides the answers.

    Returns: the prompts' columns, what `generate` and `score` return, and `index`, which prompt a row answers; `samples`
        consecutive rows are a group.
    """
    data = {"input": torch.arange(prompts)} if isinstance(prompts, int) else dict(prompts)
    first = next(iter(data.values()))
    rows = torch.arange(len(first), device=first.device).repeat_interleave(groups)
    generator = torch.Generator(first.device).manual_seed(derive(seed, "collect"))
    return answer(model, data, rows, generate, score, samples, generator)


def answer(
    model: nn.Module,
    data: Mapping[str, Tensor],
    rows: Tensor,
    generate: Generate,
    score: Score,
    samples: int,
    generator: torch.Generator,
) -> Batch:
    """Answer the prompts of some rows and score the answers.

    Raises:
        InputError: what `generate` and `score` return does not fit.
        NonFiniteError: a reward is NaN or infinite.
    """
    repeated = rows.repeat_interleave(samples)
    prompts: Batch = {name: column[repeated.to(column.device)] for name, column in data.items()}
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            batch: Batch = {**prompts, **generate(model, prompts, generator)}
            _check_answers(batch, len(repeated))
            scored = score(batch)
    finally:
        model.train(was)
    columns = {"reward": scored} if isinstance(scored, Tensor) else dict(scored)
    for name, column in columns.items():
        _check_reward(name, column, len(repeated))
    batch.update({k: v if v.dtype == torch.float64 else v.float() for k, v in columns.items()})
    batch["index"] = repeated.to(next(iter(columns.values())).device)
    return batch


def _check_answers(batch: Batch, rows: int) -> None:
    if "response_ids" not in batch:
        raise InputError(f"generate must return 'response_ids', and it returned {', '.join(batch) or 'nothing'}.")
    for name, value in batch.items():
        if isinstance(value, Tensor) and (not value.ndim or len(value) != rows):
            raise InputError(f"generate was given {rows} prompts, and its {name!r} has the form {list(value.shape)}.")


def _check_reward(name: str, reward: Tensor, rows: int) -> None:
    if not isinstance(reward, Tensor) or reward.shape != (rows,):
        form = list(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
        raise InputError(f"score must give {name!r} as float [{rows}], one number for each answer, and it gave {form}.")
    if reward.is_floating_point() and not bool(torch.isfinite(reward).all()):
        wrong = (~torch.isfinite(reward)).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"score gave a {name} that is not finite for {len(wrong)} of {rows} answers, the first in row {wrong[0]}. An answer "
            "that cannot be scored needs a number of its own."
        )


def _is_row(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and bool(value.ndim) and len(value) == rows


def _joined(first: Batch, second: Batch) -> Batch:
    """Put fresh and offline answers together: the columns that both have, the shorter ones padded with 0."""
    result = {}
    for name in first:
        if name in second:
            a, b = first[name], second[name]
            if a.ndim > 1:
                longest = max(a.shape[1], b.shape[1])
                a, b = _padded(a, longest), _padded(b, longest)
            result[name] = torch.cat([a, b.to(a.dtype)])
    return result


def _padded(x: Tensor, length: int) -> Tensor:
    if x.shape[1] == length:
        return x
    return torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], dim=1)


def as_pairs(batch: Batch, pairs: Pairs, samples: int) -> Batch:
    """Write a round's answers as pairs; where no group has one, as one pair of an answer with itself that counts nothing."""
    winner, loser = pairs.prompt * samples + pairs.winner, pairs.prompt * samples + pairs.loser
    none = not len(winner)
    if none:
        winner = loser = torch.zeros(1, dtype=torch.int64, device=batch["reward"].device)
    result: Batch = {}
    for name, column in batch.items():
        for kind in ("reference_response_", "response_"):
            if name.startswith(kind):
                place, rest = kind.removesuffix("response_"), name.removeprefix(kind)
                result[f"{place}chosen_{rest}"], result[f"{place}rejected_{rest}"] = column[winner], column[loser]
                break
        else:
            if name == "reward":
                result["chosen_score"], result["rejected_score"] = column[winner], column[loser]
            elif name != "behaviour_logps":
                result[name] = column[winner]
    if none:
        result["sample_weight"] = torch.zeros(1, device=winner.device)
    return result


# ---- models that choose ---------------------------------------------------------------------------------------------


class Choices:
    """Offer the token record of a model that gives logits of every choice: a bandit's agent, a small sequence model.

    A bandit's agent maps `input` [batch, ...] to logits [batch, arms], and an answer is one choice, `<side>_ids` int64
    [batch, 1]. A sequence model maps `<side>_ids` [batch, time] to logits [batch, time, choices] of each of them given
    those before. Language models with prompts have a readout of their own.

    A model with an attribute `tabular = True` has few inputs, the cells: `input` int64 [batch] says which, and `model(None)`
    gives the logits of all of them.

    Offers `logits` (bandit), and for each side of the batch (`response`, or `chosen` and `rejected`) `<side>_logps`,
    `<side>_entropy`, and with a reference `reference_<side>_logps`, `<side>_kl` and `<side>_reverse_kl`.

    Args:
        reference: a frozen model of the same kind.
        sequences: the model reads the answers themselves.
    """

    def __init__(self, reference: Callable[..., Tensor] | None = None, *, sequences: bool = False) -> None:
        self.reference, self.sequences = reference, sequences
        self.output = "response_logps" if sequences else "logits"

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        if not self.sequences:
            # Few cells and many rows: the model answers once for each cell, and rows are looked up.
            tabular = bool(getattr(model.module, "tabular", False))
            batch.offer("logits", lambda: model(batch["input"]))
            if tabular:
                batch.offer("table", lambda: model(None).log_softmax(-1))
            if self.reference is not None:
                reference = self.reference
                batch.offer("reference_logits", lambda: reference(batch["input"]).detach())
                if tabular:
                    batch.offer("reference_table", lambda: reference(None).detach().log_softmax(-1))
        for side in ("response", "chosen", "rejected"):
            if f"{side}_ids" in batch:
                self._offer_side(side, model, batch)
        if "chosen_ids" in batch and "response_ids" not in batch:
            for name in ("ids", "mask", "logps", "entropy", "kl", "reverse_kl"):
                if f"chosen_{name}" in batch:
                    batch.offer(f"response_{name}", lambda name=name: batch[f"chosen_{name}"])  # type: ignore[misc]
            if "reference_chosen_logps" in batch:
                batch.offer("reference_response_logps", lambda: batch["reference_chosen_logps"])
        batch.put("model", model)
        if "parameters" in reads:
            batch.put("parameters", model.parameters)
        return batch

    def _offer_side(self, side: str, model: ModelView, batch: Quantities) -> None:
        batch.offer(f"{side}_log_p", lambda: self._log_p(side, model, batch, "logits"))
        batch.offer(f"{side}_logps", lambda: self._logps(side, batch, "table", f"{side}_log_p"))
        batch.offer(f"{side}_entropy", lambda: _inside(batch, side, _entropy(batch[f"{side}_log_p"])))
        if self.reference is None:
            return
        reference = self.reference
        batch.offer(f"{side}_reference_log_p", lambda: self._log_p(side, reference, batch, "reference_logits").detach())
        if f"reference_{side}_logps" not in batch:
            names = ("reference_table", f"{side}_reference_log_p")
            batch.offer(f"reference_{side}_logps", lambda: self._logps(side, batch, *names))
        p, q = f"{side}_log_p", f"{side}_reference_log_p"
        batch.offer(f"{side}_kl", lambda: _inside(batch, side, _divergence(batch[q], batch[p])))
        batch.offer(f"{side}_reverse_kl", lambda: _inside(batch, side, _divergence(batch[p], batch[q])))

    def _logps(self, side: str, batch: Quantities, table: str, log_p: str) -> Tensor:
        """Return the log-probability of each choice that was made: from the table of all cells where there is one."""
        if table not in batch:
            return _taken(batch, side, batch[log_p])
        rows = batch[table]
        return rows.flatten()[batch["input"][:, None] * rows.shape[1] + batch[f"{side}_ids"]]  # type: ignore[no-any-return]

    def _log_p(self, side: str, model: Callable[..., Tensor], batch: Quantities, logits: str) -> Tensor:
        """Return the log-probabilities of all choices, [batch, time, choices]."""
        if self.sequences:
            return model(batch[f"{side}_ids"]).log_softmax(-1)
        found = batch[logits]
        if found.ndim != 2:
            raise IncompatibleError(
                f"An agent must return logits float [batch, arms], and it returned {list(found.shape)}; "
                "Choices(sequences=True) is for models of sequences."
            )
        return found.log_softmax(-1)[:, None]  # type: ignore[no-any-return]


def _inside(batch: Quantities, side: str, x: Tensor) -> Tensor:
    return torch.where(batch[f"{side}_mask"], x, 0.0) if f"{side}_mask" in batch else x


def _taken(batch: Quantities, side: str, log_p: Tensor) -> Tensor:
    """Return the log-probability of each choice that was made, 0 outside the answer."""
    return _inside(batch, side, log_p.gather(-1, batch[f"{side}_ids"][..., None]).squeeze(-1))


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities; a choice that p never makes adds nothing."""
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)


# ---- language models ------------------------------------------------------------------------------------------------


class SampleTokens:
    """Answer prompts with a transformers model: pure sampling at temperature 1, nothing cut off.

    The answers must come from the distribution that is trained, so top-k, top-p and other temperatures are not offered.
    Prompts may be padded on either side; what is returned is padded on the right.

    Args:
        max_new_tokens: longest answer, the end of sequence included.
        eos: token that ends an answer.
        pad: token behind the end.

    Reads of the prompts: `prompt_ids` and `prompt_mask` [rows, time].
    Returns: `response_ids` int64 [rows, time], prompt and answer, `response_mask`, True on the answer and its end,
        `response_attention`, True on prompt and answer, and `behaviour_logps` float [rows, time].

    Example:
        >>> sample = SampleTokens(max_new_tokens=16, eos=2, pad=0)
    """

    def __init__(self, max_new_tokens: int, eos: int, pad: int) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, and it is {max_new_tokens}.")
        self.max_new_tokens, self.eos, self.pad = max_new_tokens, eos, pad

    def __call__(self, model: nn.Module, prompts: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        ids, mask = _left_padded(prompts["prompt_ids"], prompts["prompt_mask"].bool(), self.pad)
        with random_numbers(generator.initial_seed(), ids.device):
            whole: Tensor = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask.long(), max_new_tokens=self.max_new_tokens, do_sample=True, top_k=0,
                top_p=1.0, temperature=1.0, pad_token_id=self.pad, eos_token_id=self.eos,
            )  # fmt: skip
        answer_ids = whole[:, ids.shape[1] :]
        ended = (answer_ids == self.eos).cumsum(1)
        inside = (ended == 0) | ((ended == 1) & (answer_ids == self.eos))
        kept = torch.cat([mask, inside], dim=1)
        is_answer = torch.cat([torch.zeros_like(mask), inside], dim=1)
        # Move what counts to the front, in its order: padding on the right alone.
        order = (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
        kept, is_answer = kept.gather(1, order), is_answer.gather(1, order)
        response = torch.where(kept, whole.gather(1, order), self.pad)
        return {
            "response_ids": response,
            "response_mask": is_answer,
            "response_attention": kept,
            "behaviour_logps": self._logps(model, response, kept, is_answer),
        }

    def _logps(self, model: nn.Module, ids: Tensor, kept: Tensor, is_answer: Tensor) -> Tensor:
        """Score the answers in one pass, as the loss will: what generation computed step by step rounds otherwise."""
        logits = model(input_ids=ids, attention_mask=kept.long()).logits[:, :-1].float()
        taken = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        logps = torch.cat([taken.new_zeros(len(ids), 1), taken], dim=1)
        return torch.where(is_answer, logps, 0.0)


def _left_padded(ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    order = mask.long().argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    return torch.where(mask, ids.gather(1, order), pad), mask
