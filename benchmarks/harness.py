"""What every benchmark shares: a ratio with a goal, and timings that two rivals take in turns.

Two blocks that are timed one after the other are compared with whatever else the machine did meanwhile. `paired`
alternates them, and takes the median of the ratios of neighbours, so that a slow second hits both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal


class Measured(float):
    """A figure that knows how far it may be off.

    Args:
        value: the figure.
        noise: half the width of the interval that holds the true figure about 19 times in 20.
    """

    noise: float

    def __new__(cls, value: float, noise: float) -> Measured:
        """Make the float and note its noise."""
        made = super().__new__(cls, value)
        made.noise = noise
        return made


def median_of_pairs(ratios: Sequence[float]) -> Measured:
    """Return the median of the ratios with half the width of its interval.

    interval = [r_(n/2 - 0.98 sqrt(n)), r_(n/2 + 0.98 sqrt(n))], the order statistics that hold the median about 19 times in 20

    Args:
        ratios: one figure a pair; below six pairs the interval is their whole range.
    """
    ranked = sorted(ratios)
    n = len(ranked)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    high = min(n - 1, math.ceil(n / 2 + 0.98 * math.sqrt(n)) - 1)
    return Measured(statistics.median(ranked), (ranked[max(high, low)] - ranked[low]) / 2)


@dataclass(frozen=True)
class Ratio:
    """One benchmark figure: ours over theirs (or a count, or seconds), its goal, and which direction is better.

    Args:
        name: what is compared, in words.
        value: the figure.
        goal: the figure to reach; None where it is reported without one.
        better: `"lower"` or `"higher"`.
        detail: absolute figures, peer and its version, sizes.
    """

    name: str
    value: float
    goal: float | None = None
    better: Literal["lower", "higher"] = "lower"
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal

    @property
    def noise(self) -> float | None:
        """Half the width of the figure's interval, where it came from repeated pairs; else None."""
        return self.value.noise if isinstance(self.value, Measured) else None


@dataclass(frozen=True)
class Paired:
    """Timings that two callables took in turns: medians in seconds, and the median ratio of neighbours."""

    ratio: float
    first: float
    second: float
    repeats: int

    def __float__(self) -> float:
        return self.ratio


def paired(
    first: Callable[[], object],
    second: Callable[[], object],
    repeats: int = 30,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Time two callables in turns and compare them pair by pair.

    ratio = median over i of seconds(first, i) / seconds(second, i)

    Args:
        first: the measured side.
        second: the peer.
        repeats: number of pairs; the order within a pair alternates, because going second is not neutral.
        warmup: untimed calls of each before.
        clock: what says the time; `time.process_time` for long calls on a busy machine.

    Returns:
        The median ratio and both medians in seconds.
    """
    for _ in range(warmup):
        first()
        second()
    ones: list[float] = []
    twos: list[float] = []
    for i in range(repeats):
        if i % 2 == 0:
            ones.append(seconds(first, clock))
            twos.append(seconds(second, clock))
        else:
            twos.append(seconds(second, clock))
            ones.append(seconds(first, clock))
    ratios = [a / b for a, b in zip(ones, twos, strict=True)]
    return Paired(median_of_pairs(ratios), statistics.median(ones), statistics.median(twos), repeats)


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold PyTorch and the linear algebra of NumPy and SciPy to one thread, so that both sides of a ratio have the same."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call, wall time where nothing else is said."""
    started = clock()
    call()
    return clock() - started


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes that a call holds on the CPU above what was held before, by the profiler's record of allocations."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as recorded:
        call()
    held = most = 0
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
