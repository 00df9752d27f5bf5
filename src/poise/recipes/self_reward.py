"""Self-rewarding rounds: a model answers, ranks its own answers, and learns from its own pairs, as far as they can be trusted.

    M0 the base, M1 = SFT(M0); round t makes M(t+1) from M(t):
    1. M(t) answers every prompt N times
    2. M(t) scores the answers, r = sum_t log M(t) - log M0, and so does M(t-1) (M0, which has no reference: the mean of log M0)
    3. C = (Kendall's tau of the two + 1)/2 for each prompt
    4. chosen = the best answer by M(t), rejected = the worst
    5. soft_dpo with label C from M(t) on, whose log-probabilities are stored with the pairs

The label is the mean of C over the prompts ("average"), each prompt's own C ("dynamic"), or a number; 1.0 is self-rewarding as it
was (SRLM). `ExternalReward` ranks by an oracle, `JudgeReward` asks the model itself in words.

    report = self_rewarding_rounds(policy, SampleTokens(64, eos, pad), prompts=prompts, base=base, folder="rounds")
    print(report)

Every round is one `poise.fit`. With a folder the models M0, M1, ... are kept there, and a run that was stopped goes on where it was.

Source: Wang et al., arXiv:2410.12735, algorithm 1; Raibows/CREAM (defaults, and where a reference and a mean are used).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from poise import checkpoint as checkpoints
from poise.errors import CheckpointError, InputError
from poise.formula import parse
from poise.frozen import FrozenModel
from poise.objective import Objective, Summand, Term
from poise.problem import ModelView
from poise.quantities import Quantities, derive
from poise.readouts.language import Language
from poise.readouts.on_policy import Generate, Pairs, as_pairs, collect
from poise.readouts.supervised import Readout
from poise.run import Run, choose_device
from poise.streams import Batch
from poise.training import fit
from poise.weights.consistency import Method, rank_consistency

__all__ = [
    "ExternalReward",
    "ImplicitReward",
    "JudgeReward",
    "Ranker",
    "SelfRewardRound",
    "SelfRewarding",
    "answer_logps",
    "self_rewarding_rounds",
]

MakeReadout = Callable[[Any], Readout]
Consistency = Literal["average", "dynamic"] | float
Undefined = Literal["exclude", "half"]


# ---- rankers --------------------------------------------------------------------------------------------------------


class Ranker(Protocol):
    """Scores answers; only the order of the answers to one prompt counts."""

    def __call__(self, model: nn.Module, base: FrozenModel | None, batch: Batch) -> Tensor:
        """Return float [rows], NaN for an answer that has no score.

        Args:
            model: whose judgement is asked for: that of this round, or that of the round before.
            base: M0; None where `model` is M0 itself.
            batch: the prompts' columns and `response_ids`, `response_mask`, ..., a row for each answer.
        """
        ...


class ImplicitReward:
    """Rank answers by what a model learnt: the log-ratio of the model and the base that it came from.

    r = sum_t [log pi(y_t) - log pi_base(y_t)]          with a reference: what DPO calls the reward, without its beta
    r = mean_t log pi(y_t)                              without one, where longer answers would always lose

    Args:
        readout: `readout(None)` makes the readout that scores answers; `Language` by default.
        reference: whether to subtract the base's log-probability where there is a base.
        reduction: over the tokens of an answer; "auto" is the sum with a reference and the mean without.
        batch_size: answers at once.

    Raises:
        InputError: an unknown reduction.
    """

    def __init__(
        self,
        readout: MakeReadout = Language,
        reference: bool = True,
        reduction: Literal["auto", "sum", "mean"] = "auto",
        batch_size: int = 256,
    ) -> None:
        if reduction not in ("auto", "sum", "mean"):
            raise InputError(f"ImplicitReward: reduction is 'auto', 'sum' or 'mean', and it is {reduction!r}.")
        self.readout, self.reference, self.reduction, self.batch_size = readout, reference, reduction, batch_size

    def __call__(self, model: nn.Module, base: FrozenModel | None, batch: Batch) -> Tensor:
        """Return float [rows]."""
        logps, mask = answer_logps(model, self.readout(None), batch, self.batch_size), batch["response_mask"].bool()
        refers = self.reference and base is not None
        if refers:
            assert base is not None
            logps = logps - answer_logps(base.module, self.readout(None), batch, self.batch_size)
        total = torch.where(mask, logps, 0.0).sum(1)
        mean = self.reduction == "mean" or (self.reduction == "auto" and not refers)
        scores = total / mask.sum(1).clamp(min=1) if mean else total
        return torch.where(mask.any(1), scores, torch.nan)  # nothing was answered


class ExternalReward:
    """Rank answers by a reward from outside: the oracle baseline.

    Args:
        score: `score(batch) -> float [rows]`.
    """

    def __init__(self, score: Callable[[Batch], Tensor]) -> None:
        self.score = score

    def __call__(self, model: nn.Module, base: FrozenModel | None, batch: Batch) -> Tensor:
        """Return float [rows]."""
        return self.score(batch)


class JudgeReward:
    """Rank answers by asking the model in words: the baseline of self-rewarding with a judge's prompt.

    Args:
        judge: `judge(model, batch) -> float [rows]`, NaN where the verdict could not be read.
    """

    def __init__(self, judge: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.judge = judge

    def __call__(self, model: nn.Module, base: FrozenModel | None, batch: Batch) -> Tensor:
        """Return float [rows]."""
        return self.judge(model, batch)


def answer_logps(model: nn.Module, readout: Readout, batch: Batch, batch_size: int = 256) -> Tensor:
    """Return the log-probabilities of answers under a model in evaluation mode: float [rows, time], 0 outside the answer.

    Args:
        batch: `response_ids`, `response_mask` and what else the readout reads, a row for each answer.
        batch_size: answers at once.
    """
    named = {k: v for k, v in batch.items() if k.startswith("response_") or k == "input"}
    was, parts = model.training, []
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(batch["response_ids"]), batch_size):
                rows = Quantities({k: v[start : start + batch_size] for k, v in named.items()})
                parts.append(readout(ModelView(model), rows, frozenset({"response_logps"}))["response_logps"])
    finally:
        model.train(was)
    return torch.cat(parts)


# ---- what is reported -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelfRewardRound:
    """One round. What needs an oracle is NaN without one.

    Attributes:
        number: t; the round made M(t+1) from M(t).
        consistency: mean of C over the prompts that have one.
        rates: C of each prompt, float [prompts], NaN where undefined.
        label: mean label of the pairs that were trained on.
        pairs: how many there were.
        left_out: prompts without a pair: one answer, all tied, C undefined, or C below `minimum`.
        noise: share of the pairs whose chosen answer the oracle finds worse, among those that it tells apart.
        ranking_accuracy: share of all pairs of answers that the model orders as the oracle does, among those.
        informative: Spearman's correlation over pairs of C with being right.
        reward: mean reward by the oracle of the answers of M(t).
        metrics: of `evaluate(M(t+1))`.
        loss: the training's last.
    """

    number: int
    consistency: float
    rates: Tensor
    label: float
    pairs: int
    left_out: int
    noise: float = math.nan
    ranking_accuracy: float = math.nan
    informative: float = math.nan
    reward: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss: float = math.nan

    def __str__(self) -> str:
        known = {"noise": self.noise, "ranking": self.ranking_accuracy, "reward": self.reward, **self.metrics}
        more = "".join(f", {name} {value:.3f}" for name, value in known.items() if not math.isnan(value))
        return (
            f"round {self.number}: consistency {self.consistency:.3f}, label {self.label:.3f}, {self.pairs} pairs{more}"
        )


@dataclass(frozen=True)
class SelfRewarding:
    """What the rounds did.

    Attributes:
        model: the last model.
        rounds: a report for each.
        start: metrics of M1, before the first round.
        folder: where M0, M1, ... are kept, or None.
    """

    model: nn.Module
    rounds: tuple[SelfRewardRound, ...]
    start: Mapping[str, float]
    folder: Path | None = None

    def load(self, number: int) -> nn.Module:
        """Put the weights of M(number) into the model and return it.

        Raises:
            CheckpointError: no folder was given, or there is no such model.
        """
        state = None if self.folder is None else _load(self.folder, "model", number)
        if state is None:
            raise CheckpointError(
                f"M{number} is not kept: give folder=..., and a number from 0 to {len(self.rounds) + 1}."
            )
        self.model.load_state_dict(state["weights"])
        return self.model

    def __str__(self) -> str:
        return "\n".join(str(each) for each in self.rounds)


# ---- the rounds -----------------------------------------------------------------------------------------------------


def self_rewarding_rounds(
    policy: nn.Module,
    sampler: Generate,
    ranker: Ranker | None = None,
    *,
    prompts: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | int,
    base: nn.Module | None = None,
    seed_data: Mapping[str, Tensor] | None = None,
    seed_options: Mapping[str, Any] | None = None,
    rounds: int = 3,
    samples: int = 5,
    consistency: Consistency = "average",
    method: Method = "kendall",
    undefined: Undefined = "exclude",
    minimum: float = 0.0,
    objective: Objective | Term | str = "soft_dpo(beta=0.1)",
    streams: Mapping[str, Any] | None = None,
    readout: MakeReadout = Language,
    oracle: Callable[[Batch], Tensor] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    folder: str | Path | None = None,
    identity: str = "",
    seed: int = 0,
    **options: Any,
) -> SelfRewarding:
    """Train a model on its own preferences, softened by how consistently it and its predecessor rank (CREAM).

    Args:
        policy: M1; with `seed_data`, M0, which is tuned first. It is trained in place.
        sampler: `sampler(model, prompts, generator) -> {"response_ids": ..., "response_mask": ...}`, as for `OnPolicy`.
        ranker: `ImplicitReward(readout)` by default.
        prompts: tensors by name; a sequence of them gives every round its own; a number of prompts without data.
        base: M0, where the policy is M1 already.
        seed_data: answers for supervised fine-tuning of M0 into M1: `response_ids`, `response_mask`, ...
        seed_options: of that `poise.fit` ("sft" for 5 epochs unless they say otherwise).
        rounds: how many. samples: answers to each prompt, N, at least 2.
        consistency: "average", "dynamic", or a label in [0, 1] for all pairs; 1.0 is SRLM.
        method: of `rank_consistency`.
        undefined: what becomes of a prompt whose C is undefined while a label is asked of it: "exclude", or "half" for C = 1/2.
        minimum: leave out the pairs of prompts with a C below it.
        objective: what is minimised on the pairs; it may have more terms ("soft_dpo(beta=0.1) + 0.2*sft"), on other `streams` too.
        streams: data of other streams by name.
        readout: `readout(reference)` makes the readout.
        oracle: `oracle(batch) -> float [rows]`, the true reward, for the report alone.
        evaluate: `evaluate(model) -> metrics` after every round.
        folder: keeps models, pairs and the training in progress; called again, the run goes on.
        identity: what the ids mean, such as a hash of the tokenizer; a folder of another one is refused.
        seed: of answers, order and training.
        **options: of each round's `poise.fit` (`solver`, `lr`, `steps`, ...); one epoch where they do not say how long.

    Raises:
        InputError: an argument out of range; no base for a ranker that compares with it; no pair to learn from; an objective that reads
            no label while a consistency below 1 is asked for.
        CheckpointError: the folder belongs to other settings.

    Example: see `docs/papers/12-cream.md`.

    Source: arXiv:2410.12735, algorithm 1.
    """
    _check(rounds, samples, consistency, undefined, minimum)
    if base is None and seed_data is None and ranker is None:
        raise InputError(
            "self_rewarding_rounds: a model ranks by what it learnt since M0, and there is no M0: give base=..., or seed_data=... to "
            "make M1 from the policy."
        )
    # Answers are drawn between the fits, so everything is where they put the model.
    device = choose_device(options.get("device", "auto"))
    policy.to(device)
    origin = FrozenModel(policy if base is None else base).to(device)
    learner = _Learner(
        policy, sampler, ranker or ImplicitReward(readout), _of_each_round(prompts, rounds, device), origin, samples, consistency, method,
        undefined, minimum, _objective(objective, consistency), dict(streams or {}), readout, oracle, evaluate,
        None if folder is None else Path(folder), seed, options,
    )  # fmt: skip
    learner.claim_folder(
        {"identity": identity, "seed": seed, "samples": samples, "consistency": consistency, "method": method}
    )
    return learner.run(rounds, seed_data, dict(seed_options or {}))


@dataclass
class _Learner:
    """The models of a run and what makes the next one."""

    policy: nn.Module
    sampler: Generate
    ranker: Ranker
    prompts: Sequence[Mapping[str, Tensor]]
    base: FrozenModel
    samples: int
    consistency: Consistency
    method: Method
    undefined: Undefined
    minimum: float
    objective: Objective
    streams: dict[str, Any]
    readout: MakeReadout
    oracle: Callable[[Batch], Tensor] | None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None
    folder: Path | None
    seed: int
    options: dict[str, Any]

    def claim_folder(self, settings: dict[str, Any]) -> None:
        """Say whose folder it is, or refuse another run's."""
        found = self._load("model", 0)
        if found is None:
            self._save("model", 0, {"weights": self.base.state_dict(), "settings": settings})
        elif found["settings"] != settings:
            differs = [k for k in settings if found["settings"].get(k) != settings[k]]
            raise CheckpointError(
                f"The folder {self.folder} holds another run: {', '.join(differs)} differ. What is stored there, log-probabilities "
                "of the reference among it, does not fit; give another folder."
            )

    def run(self, rounds: int, seed_data: Mapping[str, Tensor] | None, seed_options: dict[str, Any]) -> SelfRewarding:
        """Make M1 where it is not there, then M2, M3, ..."""
        first = self._load("model", 1)
        if first is None:
            if seed_data is not None:
                self._tune(seed_data, seed_options)
            first = {"weights": self.policy.state_dict(), "start": self._measured()}
            self._save("model", 1, first)
        self.policy.load_state_dict(first["weights"])
        previous, reports = FrozenModel(self.base.module), []
        for number in range(1, rounds + 1):
            current = FrozenModel(self.policy)
            done = self._load("model", number + 1)
            if done is not None:
                self.policy.load_state_dict(done["weights"])
                reports.append(SelfRewardRound(**done["report"]))
            else:
                reports.append(self._round(number, previous))
            previous = current
        return SelfRewarding(self.policy, tuple(reports), first["start"], self.folder)

    def _tune(self, data: Mapping[str, Tensor], options: dict[str, Any]) -> None:
        if "steps" not in options:
            options.setdefault("epochs", 5)
        objective = options.pop("objective", "sft")
        fit(
            self.policy, objective, dict(data), readout=self.readout(None), seed=derive(self.seed, "sft") % 2**31,
            **options, checkpoint=self._place("training", 0),
        )  # fmt: skip

    def _round(self, number: int, previous: FrozenModel) -> SelfRewardRound:
        ranked = self._load("ranked", number)
        if ranked is None:
            pairs, report = self._ranked(number, previous)
            self._save("ranked", number, {"pairs": pairs, "report": report})
        else:
            pairs, report = ranked["pairs"], ranked["report"]
        run = self._train(number, pairs)
        report = {**report, "metrics": self._measured(), "loss": float(run.history["loss"][-1])}
        self._save("model", number + 1, {"weights": self.policy.state_dict(), "report": report})
        return SelfRewardRound(**report)

    def _train(self, number: int, pairs: Batch) -> Run:
        options = dict(self.options)
        if options.get("steps") is None:
            options.setdefault("epochs", 1)
        data: Any = {"main": pairs, **self.streams} if self.streams else pairs
        return fit(
            self.policy, self.objective, data, readout=self.readout(None), seed=derive(self.seed, "training", number) % 2**31,
            checkpoint=self._place("training", number), **options,
        )  # fmt: skip

    def _ranked(self, number: int, previous: FrozenModel) -> tuple[Batch, dict[str, Any]]:
        """Answer, score twice, and make pairs with their labels."""
        asked = self.prompts[number - 1]
        batch = collect(
            self.policy, asked, self.sampler, self.oracle or _no_score, samples=self.samples,
            seed=derive(self.seed, "answers", number),
        )  # fmt: skip
        if "response_mask" not in batch:
            raise InputError("The sampler must return 'response_mask', True on the answer, beside 'response_ids'.")
        now = self._scored(self.policy, self.base, batch)
        # M0 has no reference of its own.
        before = self._scored(previous.module, self.base if number > 1 else None, batch)
        present = ~(now.isnan() | before.isnan())
        rates = rank_consistency(now, before, self.method, mask=present)
        best, worst, found = _extremes(now, present)
        labels = self._labels(rates)
        kept = found & ~labels.isnan() & ~(rates < self.minimum)
        report = self._report(number, rates, labels, kept, batch, now, present, best, worst)
        if not bool(kept.any()):
            raise InputError(
                f"Round {number} has no pair to learn from: all answers of each of its {len(rates)} prompts are tied, alone or left "
                "out. Sample more answers, at a higher temperature, or lower `minimum`."
            )
        # The reference of this round is the model that ranked, so its log-probabilities are computed once.
        batch["reference_response_logps"] = answer_logps(self.policy, self.readout(None), batch)
        prompt = kept.nonzero()[:, 0]
        pairs = as_pairs(batch, Pairs(prompt, best[kept], worst[kept], int((~kept).sum())), self.samples)
        pairs["preference_label"] = labels[kept].to(torch.float32)
        return {k: v for k, v in pairs.items() if k not in ("chosen_score", "rejected_score")}, report

    def _scored(self, model: nn.Module, base: FrozenModel | None, batch: Batch) -> Tensor:
        """Return scores float [prompts, answers]."""
        with torch.no_grad():
            scores = self.ranker(model, base, batch)
        rows = len(batch["response_ids"])
        if scores.shape != (rows,):
            raise InputError(
                f"The ranker must return float [{rows}], a score for each answer, and it gave {list(scores.shape)}."
            )
        return scores.detach().view(-1, self.samples)

    def _labels(self, rates: Tensor) -> Tensor:
        """Return the label of each prompt's pair, NaN where it has none."""
        if isinstance(self.consistency, int | float):
            return torch.full_like(rates, float(self.consistency))
        if self.consistency == "average":
            return torch.full_like(rates, float(rates.nanmean()))
        return torch.where(rates.isnan(), 0.5, rates) if self.undefined == "half" else rates

    def _report(
        self, number: int, rates: Tensor, labels: Tensor, kept: Tensor, batch: Batch, now: Tensor, present: Tensor, best: Tensor,
        worst: Tensor,
    ) -> dict[str, Any]:  # fmt: skip
        report: dict[str, Any] = {
            "number": number,
            "consistency": float(rates.nanmean()),
            "rates": rates.cpu(),
            "label": float(labels[kept].mean()),
            "pairs": int(kept.sum()),
            "left_out": int((~kept).sum()),
        }
        if self.oracle is None:
            return report
        truth = batch["reward"].view_as(now)
        gap = (truth.gather(1, best[:, None]) - truth.gather(1, worst[:, None]))[:, 0]
        told = kept & (gap != 0)
        known = told & ~rates.isnan()
        return {
            **report,
            "noise": float((gap[told] < 0).double().mean()),
            "ranking_accuracy": _share_ordered(now, truth, present),
            "informative": _spearman(rates[known], (gap[known] > 0).double()),
            "reward": float(truth.mean()),
        }

    def _measured(self) -> dict[str, float]:
        return {} if self.evaluate is None else {k: float(v) for k, v in self.evaluate(self.policy).items()}

    # ---- the folder -------------------------------------------------------------------------------------------------

    def _place(self, kind: str, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{kind}-{number}"

    def _save(self, kind: str, number: int, state: dict[str, Any]) -> None:
        place = self._place(kind, number)
        if place is not None:
            checkpoints.save(place, number, state)

    def _load(self, kind: str, number: int) -> dict[str, Any] | None:
        return None if self.folder is None else _load(self.folder, kind, number)


def _load(folder: Path, kind: str, number: int) -> dict[str, Any] | None:
    return checkpoints.load_newest(folder / f"{kind}-{number}")


def _check(rounds: int, samples: int, consistency: Consistency, undefined: str, minimum: float) -> None:
    if rounds < 1:
        raise InputError(f"self_rewarding_rounds: rounds must be at least 1, and it is {rounds}.")
    if samples < 2:
        raise InputError(
            f"self_rewarding_rounds: ranking needs at least 2 answers to a prompt, and samples is {samples}."
        )
    if consistency not in ("average", "dynamic") and not (
        isinstance(consistency, int | float) and 0 <= consistency <= 1
    ):
        raise InputError(
            f"self_rewarding_rounds: consistency is 'average', 'dynamic' or a label in [0, 1], and it is {consistency!r}."
        )
    if undefined not in ("exclude", "half"):
        raise InputError(f"self_rewarding_rounds: undefined is 'exclude' or 'half', and it is {undefined!r}.")
    if not 0 <= minimum <= 1:
        raise InputError(f"self_rewarding_rounds: minimum is a rate in [0, 1], and it is {minimum}.")


def _objective(objective: Objective | Term | str, consistency: Consistency) -> Objective:
    if isinstance(objective, str):
        objective = parse(objective)
    elif isinstance(objective, Term):
        objective = Objective([Summand(objective)])
    reads = {name for stream in objective.streams for name in objective.plan(stream)}
    if consistency != 1 and "preference_label" not in reads:
        raise InputError(
            f"{objective} reads no 'preference_label', so a consistency of {consistency!r} would change nothing: use soft_dpo, or "
            "consistency=1.0."
        )
    return objective


def _of_each_round(prompts: Any, rounds: int, device: torch.device) -> list[dict[str, Tensor]]:
    if isinstance(prompts, int):
        prompts = {"input": torch.arange(prompts)}
    if isinstance(prompts, Mapping):
        prompts = [prompts] * rounds
    if len(prompts) != rounds:
        raise InputError(
            f"self_rewarding_rounds: {rounds} rounds need {rounds} sets of prompts, and there are {len(prompts)}."
        )
    return [{name: column.to(device) for name, column in each.items()} for each in prompts]


def _no_score(batch: Batch) -> Tensor:
    return torch.zeros(len(batch["response_ids"]), device=batch["response_ids"].device)


def _extremes(scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of the best and the worst answer, int64 [prompts], and whether they differ."""
    high, best = scores.masked_fill(~present, -torch.inf).max(1)
    low, worst = scores.masked_fill(~present, torch.inf).min(1)
    return best, worst, high > low


def _share_ordered(scores: Tensor, truth: Tensor, present: Tensor) -> float:
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    ours, theirs = (scores[:, i] - scores[:, j]).sign(), (truth[:, i] - truth[:, j]).sign()
    told = (theirs != 0) & present[:, i] & present[:, j]
    # A tie is half right.
    return float(((ours * theirs)[told].double().mean() + 1) / 2)


def _spearman(x: Tensor, y: Tensor) -> float:
    if len(x) < 2:
        return math.nan
    ranks = []
    for values in (x, y):
        _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - (counts - 1) / 2)[inverse].double())
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
