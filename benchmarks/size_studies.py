"""Made-up studies of many runs, written through the store's own interface with curves as long and as rough as those of `make compare`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from poise.studies import Store, Study
from poise.studies.spec import Curves, RunRecord, RunSpec

TERMS = ("cross_entropy", "early_learning", "confidence_penalty", "l2")
METRICS = ("accuracy", "macro_f1", "nll", "ece")
POINTS = 150
FAILURE = "A value became infinite at step 81. Use a lower learning rate or smaller weights."

# Each makes about 10,000 runs: many seeds of two formulas; a search over weights; many formulas with each term left out.
SHAPES = ("seeds", "search", "formulas")


def study(shape: str, runs: int, out: Path) -> Study:
    """Return a study that plans about so many runs.

    Args:
        shape: one of `SHAPES`.
        runs: how many.
        out: its folder.
    """
    if shape == "seeds":
        formulas = ["cross_entropy", "cross_entropy + 3*early_learning"]
        return Study("digits", formulas, max(2, runs // 3), label_noise=0.4, out=out)
    if shape == "search":
        searched = [f"cross_entropy + auto*{term}" for term in ("early_learning", "confidence_penalty", "l2")]
        # A trial asks for up to three rounds; this comes close to the number wanted.
        trials = max(4, runs // 65)
        return Study("digits", ["cross_entropy", *searched], 10, label_noise=0.4, tune=trials, out=out)
    seeds = 10
    count = max(2, runs // (3 * seeds))
    weights = [
        f"cross_entropy + {1 + number / 100:g}*early_learning + 0.1*confidence_penalty" for number in range(count - 1)
    ]
    return Study("digits", ["cross_entropy", *weights], seeds, label_noise=0.4, out=out)


def write(made: Study) -> int:
    """Write every run that the study plans, a search's later rounds too, and return how many they are."""
    plan = made.plan()
    written = 0
    with Store(made.folder / "study.sqlite") as store:
        # One wait for the disk instead of ten thousand; what is measured is the size and the reading.
        store._connection.execute("PRAGMA synchronous=OFF")
        while wanted := plan.wanted():
            for record in records(wanted):
                store.put(record)
                plan.feed([record])
                written += 1
        store.set_meta("study", made.config.model_dump(mode="json"))
        store.set_meta("task", vars(made.describe()))
    return written


def records(wanted: list[RunSpec]) -> Iterator[RunRecord]:
    """Yield a finished record for each specification; one in 200 trials failed."""
    for spec in wanted:
        generator = np.random.default_rng(int(spec.id, 16) % 2**63)
        if spec.measure == "valid" and generator.random() < 0.005:
            yield RunRecord(spec.id, spec, "failed", error=FAILURE, detail="Traceback ...\n" * 20, seconds=0.3)
            continue
        level = float(generator.normal(0.9, 0.02))
        parts = ("valid", "test") if spec.measure == "test" else ("valid",)
        metrics = {f"{part}/{name}": level + float(generator.normal(0, 0.01)) for part in parts for name in METRICS}
        yield RunRecord(
            spec.id,
            spec,
            "done",
            metrics=metrics,
            curves=_curves(spec, generator),
            sizes={"train": 1078, "valid": 360, "test": 359},
            versions={"poise": "0.1.0", "python": "3.12.3", "torch": "2.13.0"},
            machine={"platform": "Linux-6.8-x86_64", "processor": "a processor of some name", "device": "cpu"},
            started="2026-01-31T12:00:00+00:00",
            seconds=2.0 + float(generator.random()),
            peak_memory_bytes=int(4e8 * (1 + generator.random())),
            steps=9 * POINTS,
        )


def _curves(spec: RunSpec, generator: np.random.Generator) -> Curves:
    steps = [9 * (place + 1) for place in range(POINTS)]
    names = ["loss", *(f"valid/{name}" for name in METRICS)]
    for term in TERMS:
        if term in spec.formula:
            names += [f"term/{term}", f"weight/{term}", f"active/{term}"]
    curves: Curves = {}
    for name in names:
        if name.startswith(("weight/", "active/")):
            values = np.ones(POINTS)
        else:
            fall = np.exp(-np.arange(POINTS) / 40) * generator.uniform(1, 3)
            values = 0.3 + fall + 0.05 * generator.normal(size=POINTS)
        curves[name] = (steps, values.tolist())
    return curves
