"""What early-learning regularisation costs: a step beside the same method by hand and beside cross-entropy, and its memory.

The hand-written side is the loss as its authors describe it: softmax, clamp, update the memory in place, logarithm of the
agreement. Both sides run the same model and optimiser from the same weights, in turns, on one thread.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Paired, Ratio, paired
from poise.objective import Objective
from poise.terms import CrossEntropy, EarlyLearning

BETA, WEIGHT, BATCH = 0.7, 3.0, 128
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times, of bytes, and of the term alone against a memory that is masked instead of indexed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_step_by_hand(quick), _step_of_cross_entropy(quick), *_memory(), _masked(quick)]
    finally:
        torch.set_num_threads(threads)


def _step_by_hand(quick: bool) -> Ratio:
    widths = (784, 256, 256, 10)
    objective = CrossEntropy() + WEIGHT * EarlyLearning(beta=BETA)
    timing = _race(widths, objective, _ByHand(5000, 10), block=5 if quick else 20, repeats=5 if quick else 60)
    detail = f"MLP {'-'.join(map(str, widths))}, batch {BATCH}: {_milliseconds(timing)} for the step and its advance"
    return Ratio("step of cross_entropy + 3*early_learning / written by hand", timing.ratio, 1.03, "lower", detail)


def _step_of_cross_entropy(quick: bool) -> Ratio:
    widths = (784, 512, 512, 100) if quick else (784, 2560, 2560, 100)
    objective = CrossEntropy() + WEIGHT * EarlyLearning(beta=BETA)
    plain = CrossEntropy() + 0.0 * EarlyLearning()
    timing = _race(widths, objective, plain, block=1, repeats=5 if quick else 60)
    detail = f"MLP {'-'.join(map(str, widths))}, batch {BATCH}: {_milliseconds(timing)}"
    return Ratio(
        "step with early_learning / step of cross_entropy alone, 100 classes", timing.ratio, 1.03, "lower", detail
    )


def _memory() -> list[Ratio]:
    examples, classes = 50_000, 100
    result = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        term = EarlyLearning(dtype=dtype)
        (1.0 * term).bind(examples=examples, classes=classes)
        values = term.memory.values
        held = values.untyped_storage().nbytes()
        visits = term.memory.visits.untyped_storage().nbytes()
        detail = f"{held / 2**20:.1f} MiB for {examples} x {classes}, besides {visits / 2**20:.1f} MiB of visit counts"
        result.append(
            Ratio(
                f"memory in {dtype} / examples x classes x {size} bytes",
                held / (examples * classes * size),
                1.0,
                "lower",
                detail,
            )
        )
    return result


def _masked(quick: bool) -> Ratio:
    """The term alone, forward and advance, against one that finds its rows with a mask over all examples."""
    examples, classes = (5_000, 100) if quick else (50_000, 100)
    term = EarlyLearning(beta=BETA)
    (1.0 * term).bind(examples=examples, classes=classes)
    naive = torch.zeros(examples, classes)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, classes, generator=generator)
    index = torch.randperm(examples, generator=generator)[:BATCH]

    def ours() -> None:
        with torch.no_grad():
            term(logits, index)
            term.advance(logits, index)

    def masked() -> None:
        with torch.no_grad():
            # A mask gives rows in the order of the memory, so the shuffled batch must be brought into that order.
            p = functional.softmax(logits, dim=1).clamp(1e-4, 1 - 1e-4)[index.argsort()]
            mask = torch.zeros(examples, dtype=torch.bool)
            mask[index] = True
            naive[mask] = BETA * naive[mask] + (1 - BETA) * p / p.sum(dim=1, keepdim=True)
            torch.log(1 - (naive[mask] * p).sum(dim=1)).mean()

    timing = paired(masked, ours, repeats=20 if quick else 200)
    torch.testing.assert_close(term.targets(), naive)
    times = f"{timing.second * 1e6:.0f} against {timing.first * 1e6:.0f} microseconds"
    detail = f"{examples} examples, {classes} classes, batch {BATCH}: {times}"
    return Ratio("memory found by a boolean mask / by index", timing.ratio, 1.5, "higher", detail)


class _ByHand:
    """Cross-entropy and early-learning regularisation as one writes them for one run."""

    def __init__(self, examples: int, classes: int) -> None:
        self.target = torch.zeros(examples, classes)

    def __call__(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        p = functional.softmax(logits, dim=1).clamp(1e-4, 1 - 1e-4)
        fresh = p.detach()
        self.target[index] = BETA * self.target[index] + (1 - BETA) * (fresh / fresh.sum(dim=1, keepdim=True))
        agreement = (1 - (self.target[index] * p).sum(dim=1)).log().mean()
        return functional.cross_entropy(logits, label) + WEIGHT * agreement


def _race(widths: tuple[int, ...], first: Objective, second: Objective | Loss, block: int, repeats: int) -> Paired:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, widths[0], generator=generator)
    label = torch.randint(widths[-1], (5000,), generator=generator)
    batches = list(torch.split(torch.randperm(5000, generator=generator), BATCH))[:-1]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    ours, theirs = (_stepper(copy.deepcopy(model), side, x, label, batches, block) for side in (first, second))
    return paired(ours, theirs, repeats)


def _stepper(
    model: nn.Module, side: Objective | Loss, x: Tensor, label: Tensor, batches: list[Tensor], block: int
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    place = 0
    if isinstance(side, Objective):
        side.bind(examples=len(x), classes=int(label.max()) + 1)
        if side.stateful:
            side.follow(optimizer)

    def steps() -> None:
        nonlocal place
        for _ in range(block):
            rows = batches[place % len(batches)]
            place += 1
            # Gradients of 26 MB that are freed and allocated anew measure the allocator, differently in each process.
            optimizer.zero_grad(set_to_none=False)
            if isinstance(side, Objective):
                loss = side(logits=model(x[rows]), target=label[rows], index=rows)
            else:
                loss = side(model(x[rows]), label[rows], rows)
            loss.backward()
            optimizer.step()

    return steps


def _milliseconds(timing: Paired) -> str:
    return f"{timing.first * 1e3:.2f} against {timing.second * 1e3:.2f} ms a block"
