"""A step of Lion beside lion-pytorch's and PyTorch's fused AdamW, and what it holds in passing.

100 million numbers in float32, one thread, CPU time. Lion moves five tensors a step, AdamW seven, so 5/7 = 0.71 is what
memory alone would give. The many small tensors are those of the paper's specification: 100 of 65,536.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from benchmarks.harness import Ratio, one_thread, paired, peak_bytes
from poise.solvers import Lion


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times and of memory."""
    numbers = 10_000_000 if quick else 100_000_000
    with one_thread():
        return [*_large(numbers, 5 if quick else 7), *_small(quick), *_memory()]


def _held(tensors: int, size: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(torch.randn(size, generator=generator)) for _ in range(tensors)]
    for p in held:
        p.grad = torch.randn(size, generator=generator)
    return held


def _peer(held: list[nn.Parameter]) -> Callable[[], object] | None:
    if find_spec("lion_pytorch") is None:
        return None
    from lion_pytorch import Lion as Peer

    step: Callable[[], object] = Peer(held, lr=1e-4, weight_decay=0.1).step
    return step


def _large(numbers: int, repeats: int) -> list[Ratio]:
    # All rivals share parameters and gradients, so that their states alone are held several times.
    held = _held(4, numbers // 4)
    ours = Lion(held, lr=1e-4, weight_decay=0.1).step
    rivals = {
        "lion-pytorch": (_peer(held), 0.5),
        "AdamW(fused)": (torch.optim.AdamW(held, lr=1e-4, weight_decay=0.1, fused=True).step, 0.85),
    }
    return _compare(ours, rivals, f"{numbers / 1e6:.0f} million numbers", repeats)


def _small(quick: bool) -> list[Ratio]:
    held = _held(100, 65_536)
    ours = Lion(held, lr=1e-4, weight_decay=0.1).step
    rivals = {
        "lion-pytorch": (_peer(held), 0.7),
        "AdamW(foreach)": (torch.optim.AdamW(held, lr=1e-4, weight_decay=0.1, foreach=True).step, 0.9),
    }
    return _compare(ours, rivals, "100 tensors of 65,536", 5 if quick else 15)


def _compare(
    ours: Callable[[], object], rivals: dict[str, tuple[Callable[[], object] | None, float]], size: str, repeats: int
) -> list[Ratio]:
    ratios = []
    for name, (theirs, goal) in rivals.items():
        if theirs is not None:
            timing = paired(ours, theirs, repeats=repeats, warmup=1, clock=time.process_time)
            detail = f"{1e3 * timing.first:.1f} against {1e3 * timing.second:.1f} ms"
            ratios.append(Ratio(f"step, Lion / {name}, {size}", timing.ratio, goal, "lower", detail))
    return ratios


def _memory() -> list[Ratio]:
    held = _held(4, 1_000_000)
    one = held[0].numel() * 4
    ratios = []
    for name, lion in (("fused", Lion(held, fused=True)), ("foreach", Lion(held, foreach=True))):
        peak = peak_bytes(lion.step)
        ratios.append(Ratio(f"held in passing / one tensor, {name}", peak / one, 1.001, "lower", f"{peak} bytes"))
    adamw = torch.optim.AdamW(held)
    adamw.step()
    state = [sum(s.nbytes for p in held for s in o.state[p].values() if s.ndim) for o in (lion, adamw)]
    ratios.append(Ratio("state, Lion / AdamW", state[0] / state[1], 0.5, "lower", f"{state[0] / 1e6:.0f} MB"))
    return ratios
