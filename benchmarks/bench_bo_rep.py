"""What an outer step of BO-REP costs: beside the structure of its authors' code, beside StocBiO with Q = 5, and in memory.

The authors' structure, written anew: a graph of the lower gradient for the product with q, another for the mixed product, gradients that
are flattened and put together, and the upper gradient by a backward pass into the parameters. Both sides refresh x by the same number of
lower steps at the same times, on the same batches. Times are those of a whole number of periods.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Ratio, one_thread, paired, peak_bytes
from poise.tasks.bilevel import BilevelTask, hyper_cleaning, letters
from poise.weights.bilevel import BOREP, StocBiO
from poise.weights.bilevel.method import BilevelMethod

PERIOD, INNER, NU, BATCH = 2, 3, 0.01, 64
MIB = 2**20


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times and of memory."""
    with one_thread():
        cleaning = hyper_cleaning(0, hidden=32 if quick else 256)
        tasks = [("cleaning, one hidden layer", cleaning, 0.1), ("syllables, GRU above", letters(0), 0.5)]
        ratios = []
        for name, task, lr in tasks:
            repeats = 4 if quick else 40
            ratios += [_official(name, task, lr, repeats), _stocbio(name, task, lr, repeats)]
        return [*ratios, _memory(cleaning)]


def _ours(task: BilevelTask, lr: float) -> BOREP:
    return BOREP(
        task.levels,
        task.x,
        task.theta,
        lr=1e-4,
        inner_lr=1e-2 * lr,
        period=PERIOD,
        inner_steps=INNER,
        system_lr=NU,
        check_stability=False,
    )


def _official(name: str, task: BilevelTask, lr: float, repeats: int) -> Ratio:
    draw = task.batches(lower=BATCH, upper=BATCH, inner=INNER)
    batches = [draw(k) for k in range(20)]
    timing = paired(
        _stepping(_ours(task, lr), batches),
        _stepping(_Official(task, 1e-2 * lr), batches),
        repeats,
        clock=time.process_time,
    )
    return Ratio(
        f"outer step, BO-REP / the authors' structure, {name}",
        timing.ratio,
        0.8,
        "lower",
        f"{1e3 * timing.first / PERIOD:.2f} against {1e3 * timing.second / PERIOD:.2f} ms, batches of {BATCH}",
    )


def _stocbio(name: str, task: BilevelTask, lr: float, repeats: int) -> Ratio:
    draw = task.batches(lower=BATCH, upper=BATCH, inner=INNER)
    batches = [draw(k) for k in range(20)]
    rival = StocBiO(
        task.levels, task.x, task.theta, lr=1e-6, inner_lr=1e-2 * lr, inner_steps=INNER, system_lr=NU, system_steps=5
    )
    # A lower level that is not convex stops the series; its cost is that of convex ones.
    rival.hypergradient.damping = 10.0  # type: ignore[union-attr]
    timing = paired(_stepping(_ours(task, lr), batches), _stepping(rival, batches), repeats, clock=time.process_time)
    return Ratio(
        f"outer step, BO-REP / StocBiO with Q = 5, {name}",
        timing.ratio,
        0.5,
        "lower",
        f"{1e3 * timing.first / PERIOD:.2f} against {1e3 * timing.second / PERIOD:.2f} ms, lower steps at every {PERIOD}nd or every step",
    )


def _memory(task: BilevelTask) -> Ratio:
    """The peak of an outer step and what is kept between, against a plain gradient step of x and x."""
    method = _ours(task, 0.1)
    kept = sum(t.nbytes for t in task.x)
    state = sum(t.nbytes for name in method.moving for t in getattr(method, name))
    batch, above = task.batches(lower=BATCH, upper=BATCH)(0)

    def plain() -> object:
        gradient = task.levels.lower_gradient(task.x, task.theta, batch)
        return [t - 0.1 * g for t, g in zip(task.x, gradient, strict=True)]

    peaks = [peak_bytes(lambda: method.run(PERIOD, lambda _: (batch, above))), peak_bytes(plain)]
    return Ratio(
        "memory of an outer step with its state / plain training of x, one hidden layer",
        (peaks[0] + state) / (peaks[1] + kept),
        3.5,
        "lower",
        f"{(peaks[0] + state) / MIB:.2f} against {(peaks[1] + kept) / MIB:.2f} MiB, batches of {BATCH}",
    )


def _stepping(method: BilevelMethod | _Official, batches: list[tuple[Any, Any]]) -> Callable[[], object]:
    return lambda: [method.step(*batches[(method.steps + i) % len(batches)]) for i in range(PERIOD)]


class _Official:
    """An outer step as the authors' code orders it."""

    def __init__(self, task: BilevelTask, inner_lr: float) -> None:
        self.levels = task.levels
        self.x = [t.clone().requires_grad_() for t in task.x]
        self.theta = [t.clone().requires_grad_() for t in task.theta]
        self.z = torch.zeros(sum(t.numel() for t in self.x), 1)
        self.momentum = [torch.zeros_like(t) for t in self.theta]
        self.inner, self.outer = torch.optim.SGD(self.x, lr=inner_lr), torch.optim.SGD(self.theta, lr=1e-4)
        self.steps = 0

    def step(self, lower_batch: Any, upper_batch: Any) -> None:
        product = self._product(lower_batch[-1])
        if self.steps and self.steps % PERIOD == 0:
            for batch in lower_batch:
                self.inner.zero_grad()
                self._lower(batch).backward()
                self.inner.step()
        self.inner.zero_grad()
        self.outer.zero_grad()
        self.levels.upper(tuple(self.x), tuple(self.theta), upper_batch).backward()
        self.z -= NU * (product - _flat([t.grad for t in self.x]))
        direct = [torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in self.theta]
        gradient = torch.autograd.grad(self._lower(lower_batch[-1]), self.x, create_graph=True)
        mixed = torch.autograd.grad(-torch.matmul(_flat(gradient)[:, 0], self.z[:, 0]), self.theta)
        self.momentum = [0.9 * m + 0.1 * (d + g) for m, d, g in zip(self.momentum, direct, mixed, strict=True)]
        norm = torch.stack([m.square().sum() for m in self.momentum]).sum().sqrt().item()
        for t, m in zip(self.theta, self.momentum, strict=True):
            t.grad = m / (norm + 1e-10)
        self.outer.step()
        self.steps += 1

    def _product(self, batch: Any) -> Tensor:
        gradient = torch.autograd.grad(self._lower(batch), self.x, create_graph=True)
        return _flat(torch.autograd.grad(_flat(gradient), self.x, grad_outputs=self.z)).detach()

    def _lower(self, batch: Any) -> Tensor:
        return self.levels.lower(tuple(self.x), tuple(self.theta), batch)


def _flat(tensors: Any) -> Tensor:
    return torch.hstack([t.reshape(-1) for t in tensors])[:, None]
