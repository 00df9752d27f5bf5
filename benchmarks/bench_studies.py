"""Throughput of studies: two one-thread workers against one, on the runs of `make compare`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.harness import Ratio
from poise.studies import LocalEngine, Study
from poise.studies.spec import RunSpec


def run(quick: bool) -> list[Ratio]:
    """Time the same runs on one and on two workers, in turns; the workers have loaded PyTorch and the data before."""
    study = Study("digits", ["cross_entropy", "cross_entropy + 3*early_learning"], 5, label_noise=0.4)
    specs = [replace(spec, measure="valid") for spec in study.plan().wanted()]
    repeats = 1 if quick else 3
    with LocalEngine(1) as one, LocalEngine(2) as two:
        for engine in (one, two):
            _seconds(engine, [replace(spec, epochs=1) for spec in specs[:6]])
        ratios = [(_seconds(one, specs), _seconds(two, specs)) for _ in range(repeats)]
    alone, shared = sorted(ratios, key=lambda pair: pair[0] / pair[1])[repeats // 2]
    rate = len(specs) * (specs[0].epochs or 0)
    detail = f"{len(specs)} runs on digits, {rate / alone:.0f} against {rate / shared:.0f} epochs a second"
    return [Ratio("throughput of two one-thread workers over one", alone / shared, 1.6, "higher", detail)]


def _seconds(engine: LocalEngine, specs: Sequence[RunSpec]) -> float:
    began = time.perf_counter()
    engine.submit(specs)
    records = [event.record for event in engine.events() if event.record is not None]
    failed = [record.error for record in records if record.status == "failed"]
    if failed:
        raise RuntimeError(failed[0])
    return time.perf_counter() - began
