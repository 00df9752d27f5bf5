"""Studies: throughput of two one-thread workers against one, and the size and summary of a study of 10,000 runs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Ratio
from poise.studies import LocalEngine, Store, Study
from poise.studies.plan import Plan
from poise.studies.spec import RunRecord, RunSpec

FORMULAS = ["cross_entropy", "cross_entropy + 3*early_learning"]


def run(quick: bool) -> list[Ratio]:
    """Measure throughput in turns, and a study of many runs once."""
    return [_throughput(1 if quick else 3), *_size(1_000 if quick else 10_000)]


def _throughput(repeats: int) -> Ratio:
    """Time the runs of `make compare`; the workers have loaded PyTorch and the data before."""
    study = Study("digits", FORMULAS, 5, label_noise=0.4)
    specs = [replace(spec, measure="valid") for spec in study.plan().wanted()]
    with LocalEngine(1) as one, LocalEngine(2) as two:
        for engine in (one, two):
            _seconds(engine, [replace(spec, epochs=1) for spec in specs[:6]])
        pairs = [(_seconds(one, specs), _seconds(two, specs)) for _ in range(repeats)]
    alone, shared = sorted(pairs, key=lambda pair: pair[0] / pair[1])[repeats // 2]
    detail = f"{len(specs)} runs of {specs[0].epochs} epochs on digits: {alone:.1f} s against {shared:.1f} s"
    return Ratio("throughput of two one-thread workers over one", alone / shared, 1.6, "higher", detail)


def _seconds(engine: LocalEngine, specs: Sequence[RunSpec]) -> float:
    began = time.perf_counter()
    engine.submit(specs)
    records = [event.record for event in engine.events() if event.record is not None]
    failed = [record.error for record in records if record.status == "failed"]
    if failed:
        raise RuntimeError(failed[0])
    return time.perf_counter() - began


def _size(runs: int) -> list[Ratio]:
    """Store made-up records with curves as long as those of `make compare`, and open the study again."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study("digits", FORMULAS, math.ceil(runs / 3), label_noise=0.4, out=folder)
        plan = study.plan()
        with Store(Path(folder) / "study.sqlite") as store:
            # One wait for the disk instead of ten thousand; what is measured is reading.
            store._connection.execute("PRAGMA synchronous=OFF")
            for record in _records(plan):
                store.put(record)
            store.set_meta("study", study.config.model_dump(mode="json"))
            store.set_meta("task", vars(study.describe()))
        megabytes = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        began = time.perf_counter()
        summary = Study.open(folder)
        seconds = time.perf_counter() - began
    detail = f"{summary.runs_done} runs, {len(summary.formulas[1].curves)} curves of 150 points each"
    scale = 10_000 / runs
    return [
        Ratio("store of 10,000 runs, MB", megabytes * scale, 200, "lower", detail),
        Ratio("summary of 10,000 runs from the store, seconds", seconds * scale, 2.0, "lower", detail),
    ]


def _records(plan: Plan) -> Iterator[RunRecord]:
    steps = list(range(9, 1351, 9))
    for spec in plan.wanted():
        start = int(spec.id, 16) / 2**64
        curves = {
            f"curve/{number}": (
                steps,
                [start + math.exp(-step / 300) + 0.01 * math.sin(step * start) for step in steps],
            )
            for number in range(12)
        }
        metrics = {
            f"{part}/{name}": start for part in ("valid", "test") for name in ("accuracy", "macro_f1", "nll", "ece")
        }
        yield RunRecord(spec.id, spec, "done", metrics=metrics, curves=curves, seconds=2.0, steps=1350)
