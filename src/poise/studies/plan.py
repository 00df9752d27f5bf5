"""Which runs a study needs: a plan that is replayed over finished runs and says what comes next.

Each formula on each seed is one track. Without a search, a track asks at once for its final run and for the runs
without one term. With a search it first asks for trials, rung by rung, keeps the best on the validation split, and
only then asks for the final run, the one that measures the test split. A track sees its own seed only, so the search
is nested: nothing of another seed's split reaches it.

The plan holds no state but the records it was fed. A study that was stopped is continued by feeding the finished runs
and asking again.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from poise.studies.config import DEFAULT_TRIALS, StudyConfig
from poise.studies.spec import RunRecord, RunSpec
from poise.studies.summary import TrialRow
from poise.studies.tuning import Trial, rungs, trials

Role = Literal["final", "without a term", "trial"]


class Formula(Protocol):
    """What a plan needs of an objective; `poise.Objective` offers it."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def autos(self) -> Mapping[str, Any]: ...

    @property
    def searched(self) -> Mapping[str, Any]: ...

    def resolve(self, weights: Mapping[str, Any], /) -> Formula: ...

    def without(self, label: str, /) -> Formula: ...


@dataclass
class Track:
    """One formula on one seed: what it has asked for so far.

    Attributes:
        formula, seed: which.
        final: the run that counts, once it is known.
        reduced: the runs without one term, by the term's label.
        weights: the values of the `auto` weights in the final run.
        trials: the search's rows, finished ones only.
        failure: why there is no final run (every trial failed).
    """

    formula: int
    seed: int
    final: RunSpec | None = None
    reduced: dict[str, RunSpec] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    trials: list[TrialRow] = field(default_factory=list)
    failure: str = ""


class Plan:
    """The runs of a study.

    Args:
        config: the study, every default resolved.
        formulas: the parsed objectives, in the order of `config.formulas`.
        base: a specification with everything but formula, seed, learning rate and budget.
        primary: name of the metric that the search looks at; `direction`: whether more or less of it is better.

    >>> plan.feed(store.records())          # doctest: +SKIP
    >>> plan.wanted()                       # doctest: +SKIP
    [RunSpec(...), ...]
    """

    def __init__(
        self,
        config: StudyConfig,
        formulas: Sequence[Formula],
        base: RunSpec,
        *,
        primary: str,
        direction: Literal["max", "min"],
    ) -> None:
        self.config = config
        self.formulas = tuple(formulas)
        self.records: dict[str, RunRecord] = {}
        self.roles: dict[str, tuple[Role, int, int]] = {}
        self.base = base
        self._score_name = f"valid/{primary}"
        self._direction = direction
        self.trials = trial_count(config, self.formulas)
        self.tracks = [
            Track(index, seed) for seed in config.seeds for index in range(len(self.formulas))
        ]  # seed by seed, so that an early look at a running study already has pairs
        self._asked: dict[str, RunSpec] = {}
        self._new: dict[str, RunSpec] = {}
        self._plain_texts: dict[int, tuple[str, dict[str, str]]] = {}
        self._generators = [self._search(track) if self.trials else self._direct(track) for track in self.tracks]
        pairs = zip(self.tracks, self._generators, strict=True)
        self._waiting = [self._note(track, next(generator)) for track, generator in pairs]
        self._waiters: dict[str, set[int]] = {}
        for number, specs in enumerate(self._waiting):
            self._register(number, specs)

    def feed(self, records: Iterable[RunRecord]) -> None:
        """Take finished or failed runs, without their curves; a run that no track has asked for yet waits for one."""
        moved: set[int] = set()
        for record in records:
            # Thousands of runs' curves would fill the memory; whoever draws them reads them from the store.
            self.records[record.id] = replace(record, curves={}) if record.curves else record
            moved |= self._waiters.pop(record.id, set())
        for number in sorted(moved):
            self._advance(number)

    def wanted(self) -> list[RunSpec]:
        """Return the runs that are needed, have no record, and were not returned before; in the order of the seeds."""
        found = [spec for run, spec in self._new.items() if run not in self.records]
        self._new.clear()
        return found

    @property
    def specs(self) -> Mapping[str, RunSpec]:
        """The runs that were asked for so far, by id; it grows while the plan is fed."""
        return self._asked

    @property
    def planned(self) -> int:
        """How many different runs the study needs; with a search, later rungs are counted before they are known."""
        return len(self._asked) + sum(self._future(track) for track in self.tracks)

    @property
    def done(self) -> int:
        """How many of them have a record."""
        return sum(run in self.records for run in self._asked)

    @property
    def failed(self) -> int:
        """How many of them failed."""
        return sum(run in self.records and self.records[run].status == "failed" for run in self._asked)

    @property
    def remaining_cost(self) -> float:
        """What is left, in budgets of one final run."""
        known = sum(self.cost(spec) for run, spec in self._asked.items() if run not in self.records)
        # A run that is not known yet is a later rung, a final run or one without a term: about one budget.
        return known + sum(self._future(track) for track in self.tracks)

    def cost(self, spec: RunSpec) -> float:
        """Return a run's budget in budgets of one final run."""
        if spec.epochs is not None and self.base.epochs:
            return spec.epochs / self.base.epochs
        return (spec.steps or 1) / (self.base.steps or 1)

    def cost_of(self, run: str) -> float:
        """Return the budget of a run by its id."""
        return self.cost(self._asked[run])

    def _future(self, track: Track) -> int:
        if track.final is not None or track.failure or not self.trials:
            return 0
        labels = self.formulas[track.formula].labels
        reduced = len(labels) if self.config.leave_one_out and len(labels) > 1 else 0
        tuning = self.config.tuning
        plan = rungs(self.trials, halving=tuning.halving, count=tuning.rungs)
        begun = len({row.rung for row in track.trials}) + 1
        return 1 + reduced + sum(count for count, _ in plan[begun:])

    def _note(self, track: Track, specs: list[RunSpec]) -> list[RunSpec]:
        for spec in specs:
            if spec.id not in self._asked:
                self._asked[spec.id] = self._new[spec.id] = spec
            role: Role = "trial" if spec.measure == "valid" else "without a term"
            if track.final is not None and spec.id == track.final.id:
                role = "final"
            # A run that is final for one formula and reduced for another is called final.
            if role == "final" or spec.id not in self.roles:
                self.roles[spec.id] = (role, track.formula, track.seed)
        return specs

    def _register(self, number: int, specs: list[RunSpec]) -> None:
        for spec in specs:
            if spec.id not in self.records:
                self._waiters.setdefault(spec.id, set()).add(number)

    def _advance(self, number: int) -> None:
        while all(spec.id in self.records for spec in self._waiting[number]):
            try:
                specs = self._generators[number].send(None)
            except StopIteration:
                self._waiting[number] = []
                return
            self._waiting[number] = self._note(self.tracks[number], specs)
            self._register(number, specs)

    def _direct(self, track: Track) -> Generator[list[RunSpec], None, None]:
        yield from self._conclude(track, self.base.lr, {})

    def _search(self, track: Track) -> Generator[list[RunSpec], None, None]:
        tuning = self.config.tuning
        ranges = {name: (auto.low, auto.high) for name, auto in self.formulas[track.formula].searched.items()}
        survivors = trials(ranges, count=self.trials, seed=track.seed, lr=self.base.lr, lr_factor=tuning.lr_factor)
        best: Trial | None = None
        plan = rungs(self.trials, halving=tuning.halving, count=tuning.rungs)
        for rung, (count, share) in enumerate(plan):
            survivors = survivors[:count]
            specs = [self._trial(track, trial, share) for trial in survivors]
            yield specs
            scores = [self._score(self.records[spec.id]) for spec in specs]
            for trial, spec, score in zip(survivors, specs, scores, strict=True):
                track.trials.append(_row(track, trial, rung, spec, score))
            ranked = sorted(
                (-score if self._direction == "max" else score, trial.number, trial)
                for trial, score in zip(survivors, scores, strict=True)
                if score is not None
            )
            survivors = [trial for _, _, trial in ranked]
            if not survivors:
                break
            best = survivors[0]
        if best is None:
            first = self.records[specs[0].id].error
            track.failure = f"Each of the {self.trials} trials failed. The first one: {first}"
            return
        last = max(position for position, row in enumerate(track.trials) if row.trial == best.number)
        track.trials[last] = replace(track.trials[last], selected=True)
        yield from self._conclude(track, best.lr, best.weights)

    def _conclude(self, track: Track, lr: float, weights: dict[str, float]) -> Generator[list[RunSpec], None, None]:
        text, reduced = self._texts(track.formula, weights)
        track.weights = dict(weights)
        track.final = self.base.changed(seed=track.seed, lr=lr, formula=text)
        if set(self.formulas[track.formula].autos) - weights.keys():
            # A policy moves some weights within the run: what is left out is left out of the trade-off that it ended with.
            yield [track.final]
            record = self.records[track.final.id]
            if record.status != "done":
                return
            track.weights.update(record.details.get("weights", {}))
            reduced = self._texts(track.formula, track.weights)[1]
        track.reduced = {label: track.final.changed(formula=without) for label, without in reduced.items()}
        yield [track.final, *track.reduced.values()]

    def _texts(self, index: int, weights: dict[str, float]) -> tuple[str, dict[str, str]]:
        """Return a formula with its weights, and without each of its terms, as texts; without a search once for all seeds."""
        if not weights and index in self._plain_texts:
            return self._plain_texts[index]
        formula = self.formulas[index].resolve(weights) if weights else self.formulas[index]
        labels = formula.labels if self.config.leave_one_out and len(formula.labels) > 1 else ()
        texts = str(formula), {label: str(formula.without(label)) for label in labels}
        if not weights:
            self._plain_texts[index] = texts
        return texts

    def _trial(self, track: Track, trial: Trial, share: float) -> RunSpec:
        formula = self.formulas[track.formula]
        resolved = formula.resolve(trial.weights) if trial.weights else formula
        return self.base.changed(
            formula=str(resolved),
            seed=track.seed,
            lr=trial.lr,
            epochs=_part(self.base.epochs, share),
            steps=_part(self.base.steps, share),
            measure="valid",
        )

    def _score(self, record: RunRecord) -> float | None:
        score = record.metrics.get(self._score_name) if record.status == "done" else None
        return score if score is not None and math.isfinite(score) else None


def trial_count(config: StudyConfig, formulas: Iterable[Formula]) -> int:
    """Return the number of trials that every formula gets: the one asked for, else 10 where any weight is `auto`."""
    if config.tuning.trials:
        return config.tuning.trials
    return DEFAULT_TRIALS if any(formula.searched for formula in formulas) else 0


def _part(budget: int | None, share: float) -> int | None:
    return None if budget is None else max(1, round(budget * share))


def _row(track: Track, trial: Trial, rung: int, spec: RunSpec, score: float | None) -> TrialRow:
    return TrialRow(
        formula=track.formula,
        seed=track.seed,
        trial=trial.number,
        rung=rung,
        epochs=spec.epochs,
        steps=spec.steps,
        lr=trial.lr,
        weights=trial.weights,
        score=score,
        selected=False,
        run=spec.id,
    )
