"""Size: studies of 10,000 runs in three shapes, an objective of 50 terms, and a table of millions of rows.

A study is written once; its summary and its page are made in a process of its own, so that memory is theirs alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import poise
from benchmarks import size_studies
from benchmarks.harness import Ratio, one_thread, paired

TERMS, CLASSES, BATCH = 50, 10, 128

_READ = """
import json, sys, time
import poise.objective
from poise.report import write_report
from poise.studies import Study

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

before = status("VmRSS")
began = time.process_time()
summary = Study.open(sys.argv[1])
summarised = time.process_time() - began
began = time.process_time()
page = write_report(summary, sys.argv[1])
written = time.process_time() - began
print(json.dumps({"runs": summary.runs_done, "summary": summarised, "report": written,
                  "memory": status("VmHWM") - before, "page": page.stat().st_size}))
"""


_LOAD = """
import json, sys
from poise.tasks import load_task

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

load_task("wine").split(0)
before = status("VmRSS")
load_task(sys.argv[1], label="y").split(0)
print(json.dumps(status("VmHWM") - before))
"""


def run(quick: bool) -> list[Ratio]:
    """Measure the three shapes of study, the step of 50 terms, and what a row of a table needs."""
    found = [ratio for shape in size_studies.SHAPES for ratio in _study(shape, 1_000 if quick else 10_000)]
    return [*found, *terms(quick), _table(200_000 if quick else 1_000_000)]


def _study(shape: str, runs: int) -> list[Ratio]:
    with tempfile.TemporaryDirectory() as place:
        made = size_studies.study(shape, runs, Path(place))
        written = size_studies.write(made)
        megabytes = sum(file.stat().st_size for file in Path(place).iterdir()) / 1e6
        tries = [_measured(_READ, place) for _ in range(3)]
    summary, report = (statistics.median(one[name] for one in tries) for name in ("summary", "report"))
    detail = f"{written:,} runs; report {report:.1f} s, {max(one['memory'] for one in tries) / 1e6:.0f} MB of memory"
    scale = 10_000 / written
    return [
        Ratio(f"store of 10,000 runs ({shape}), MB", megabytes * scale, 200, detail=detail),
        Ratio(f"summary of 10,000 runs ({shape}), seconds of CPU", summary * scale, 2.0, detail=detail),
        Ratio(f"page of {written:,} runs ({shape}), MB", tries[0]["page"] / 1e6, 10, detail=detail),
    ]


def terms(quick: bool) -> list[Ratio]:
    """Compare the training step of an objective of 50 terms with the same sum by hand."""
    gammas = [1 + number / 100 for number in range(TERMS - 1)]
    objective = poise.parse("cross_entropy + " + " + ".join(f"0.01*focal(gamma={gamma:g})" for gamma in gammas))
    if len(objective.labels) != TERMS:
        raise RuntimeError(f"{len(objective.labels)} terms instead of {TERMS}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(BATCH, 784), torch.randint(0, CLASSES, (BATCH,))

    def by_hand(logits: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(logits, y)
        for gamma in gammas:
            log_p = logits.log_softmax(-1).gather(1, y[:, None]).squeeze(1)
            total = total - 0.01 * ((1 - log_p.exp()) ** gamma * log_p).mean()
        return total

    def step(ours: bool) -> None:
        for _ in range(5):
            optimizer.zero_grad()
            logits = model(x)
            loss = objective(logits=logits, target=y) if ours else by_hand(logits)
            loss.backward()
            optimizer.step()

    with one_thread():
        timed = paired(lambda: step(True), lambda: step(False), 5 if quick else 30)
    detail = f"{timed.first / 5 * 1e3:.2f} against {timed.second / 5 * 1e3:.2f} ms a step"
    return [Ratio("objective of 50 terms / the same sum by hand, training step", timed.ratio, 1.2, detail=detail)]


def _table(rows: int) -> Ratio:
    """Measure the memory of loading and splitting a Parquet file, in bytes a number."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.parquet"
        numbers = np.random.default_rng(0).normal(size=(10, rows)).astype("f4")
        table = {f"x{column}": values for column, values in enumerate(numbers)}
        parquet.write_table(pa.table({**table, "y": (numbers[0] > 0).astype("i8")}), path)
        peak = _measured(_LOAD, str(path))
    detail = f"{rows:,} rows of 10 numbers: {peak / 1e6:.0f} MB"
    return Ratio("memory of loading and splitting a table, bytes a number", peak / rows / 10, detail=detail)


def _measured(script: str, argument: str):
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
