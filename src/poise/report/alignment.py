"""What a report shows of language models beyond metrics: likelihoods, the depth of the change, its price, and samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poise.report import figures, palette, wording
from poise.report.figures import Point
from poise.studies.intervals import t_interval

if TYPE_CHECKING:
    from poise.report.page import Chart, CurveSection, Key, Page
    from poise.studies.summary import Metric

__all__ = ["CURVES", "Alignment", "Answers", "alignment_of"]

CURVES = ("valid/chosen_shift", "valid/rejected_shift", "valid/margin", "depth/kl")
"""Curves that stand here and not among the others."""
_GAINS = ("reward", "margin", "preference_accuracy", "label_accuracy")
_SHOWN = 600
"""Characters of a text in the table of samples."""


@dataclass(frozen=True)
class Answers:
    """What every formula's model answers to one held-out prompt, beside the answer in the data."""

    prompt: str
    given: str
    answers: tuple[tuple[Key, str], ...]


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one formula's training."""

    key: Key
    tokens: str


@dataclass(frozen=True)
class Alignment:
    """The section on alignment.

    Attributes:
        likelihoods: log-probability of chosen and of rejected answers against the start, over the training steps.
        depth: divergence from the start by position of the answer.
        frontier: what was gained against the divergence that it cost.
        gain: the metric on the frontier's upright axis.
        samples, seed: answers side by side, all of one seed.
        speeds: tokens a second.
    """

    likelihoods: tuple[CurveSection, ...]
    depth: CurveSection | None
    frontier: Chart | None
    gain: Metric | None
    samples: tuple[Answers, ...]
    seed: int | None
    speeds: tuple[Speed, ...]


def alignment_of(page: Page) -> Alignment | None:
    """Return the section, or None where no run trained a language model."""
    # Every run may say what its policies chose; only language models say more.
    if not any(run.details.keys() - {"weights"} for formula in page.summary.formulas for run in formula.seeds):
        return None
    titles = {"valid/chosen_shift": "Chosen answers", "valid/rejected_shift": "Rejected answers"}
    likelihoods = [
        page.curve(f"shift-{place}", name, title, height=280) for place, (name, title) in enumerate(titles.items())
    ]
    depth = page.curve(
        "depth", "depth/kl", "Divergence from the start by position", height=300, across="token of the answer"
    )
    gain = next((m for name in _GAINS for m in page.summary.metrics if m.name == name), None)
    seed, samples = _samples(page)
    return Alignment(
        tuple(section for section in likelihoods if section is not None),
        depth,
        _frontier(page, gain),
        gain,
        samples,
        seed,
        _speeds(page),
    )


def _frontier(page: Page, gain: Metric | None) -> Chart | None:
    if gain is None:
        return None
    points = []
    for formula in page.summary.formulas:
        runs = [
            (run.metrics["kl"], run.metrics[gain.name])
            for run in formula.seeds
            if {"kl", gain.name} <= {*run.metrics} and math.isfinite(run.metrics["kl"] + run.metrics[gain.name])
        ]
        if runs:
            kl = t_interval([x for x, _ in runs]).within(0.0, math.inf)
            points.append(Point(formula.index, formula.text, kl, formula.metrics[gain.name], tuple(runs)))
    if not points:
        return None
    said = "; ".join(
        f"{palette.letter(p.formula)} reaches {wording.value(gain, p.quality.mean)} at {p.cost.mean:.3g} nats a token"
        for p in points
    )
    return page.add_chart(
        "frontier",
        figures.cost_quality(points, gain, across="KL from the start, nats a token", unit=" nats"),
        f"Test {gain.title} against the divergence from the start: {said}.",
        [p.formula for p in points],
    )


def _samples(page: Page) -> tuple[int | None, tuple[Answers, ...]]:
    """Return the answers of the first seed that every formula finished, prompt by prompt."""
    for seed in page.summary.seeds:
        runs = [
            (f, run)
            for f in page.summary.formulas
            for run in f.seeds
            if run.seed == seed and run.details.get("samples")
        ]
        if runs and len(runs) == sum(bool(f.seeds) for f in page.summary.formulas):
            listed = [run.details["samples"] for _, run in runs]
            return seed, tuple(
                Answers(
                    _cut(same[0]["prompt"]),
                    _cut(same[0]["given"]),
                    tuple((page.key(f.index), _cut(one["answer"])) for (f, _), one in zip(runs, same, strict=True)),
                )
                for same in zip(*listed, strict=False)
            )
    return None, ()


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + " …"


def _speeds(page: Page) -> tuple[Speed, ...]:
    batch = page.summary.settings.get("batch size", "")
    found = []
    for formula in page.summary.formulas:
        tokens = [_tokens(run.details) for run in formula.seeds if _tokens(run.details)]
        rate = formula.cost.steps_per_second.mean
        if tokens and batch.isdigit() and rate:
            found.append(
                Speed(page.key(formula.index), wording.rounded(rate * int(batch) * math.fsum(tokens) / len(tokens)))
            )
    return tuple(found)


def _tokens(details: dict[str, Any]) -> float:
    return float(details.get("tokens_per_example", 0.0))
