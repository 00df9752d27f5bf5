"""What a tracker costs a run: processor time of the run's process with and without, in turns, and the seconds to begin and to end.

The loop is that of steps of about two milliseconds with a log point every ten of them, five times as many as by default, so that what a
tracker costs shows at all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib.metadata import version

import torch
from torch import nn

import poise
from benchmarks.harness import Ratio
from poise.trackers import track


def run(quick: bool) -> list[Ratio]:
    """Ratio of the processor time of `poise.fit` told to TensorBoard, and what the block around it adds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _tensorboard(steps=100 if quick else 400, repeats=3 if quick else 15)
    finally:
        torch.set_num_threads(threads)


def _tensorboard(steps: int, repeats: int) -> list[Ratio]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2048, 784, generator=generator), torch.randint(0, 10, (2048,), generator=generator)
    ratios, around, per_step = [], [], []

    def fit(tracker: str | None) -> tuple[float, float]:
        model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        begun = time.perf_counter()
        with track(tracker) as follower:
            inside, wall = time.process_time(), time.perf_counter()
            poise.fit(
                model, "cross_entropy + 0.01*l2", (x, y), steps=steps, lr=0.01, log_every=10, device="cpu", progress=follower
            )  # fmt: skip
            inside, wall = time.process_time() - inside, time.perf_counter() - wall
        return inside, time.perf_counter() - begun - wall

    with tempfile.TemporaryDirectory() as folder:
        fit(None)
        for _ in range(repeats):
            (plain, _), (told, outside) = fit(None), fit(f"tensorboard:{folder}")
            ratios.append(told / plain)
            around.append(outside)
            per_step.append(1000 * plain / steps)
    detail = f"MLP 784-256-256-10, steps of {statistics.median(per_step):.1f} ms, logged every 10; TensorBoard {version('tensorboard')}"
    return [
        Ratio(
            "fit told to TensorBoard / fit, processor time of the run", statistics.median(ratios), 1.03, "lower", detail
        ),
        Ratio("seconds until the tracker has taken everything", statistics.median(around), None, "lower", detail),
    ]
