"""Progressive self-distillation beside the same method written by hand, and the calibration metrics beside loops.

The peer of the term is what its authors' repository does in PyTorch, written again from the paper: one-hot targets, a
tensor of predictions, soft cross-entropy, write-back. The peer of the metrics are that repository's loops, in our words, and
torchmetrics where it is installed. Steps of small models take one to two milliseconds, so that a few microseconds count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Ratio, paired, seconds
from poise.metrics.calibration import calibration_error, negative_log_likelihood, risk_coverage
from poise.objective import Objective
from poise.terms.self_distillation import ProgressiveSelfDistillation

EPOCHS = 10**6
Data = list[tuple[Tensor, Tensor, Tensor]]


def run(quick: bool) -> list[Ratio]:
    """Step-time ratios on a small and a larger model, memory, and the speed of the metrics on a million rows."""
    repeats = 5 if quick else 31
    return [
        *_steps("MLP 784-256-256-10, batch 128", 784, 256, 10, repeats, small=True),
        *_steps("MLP 784-2048-2048-100, batch 128", 784, 2048, 100, 3 if quick else 15, small=False),
        *_memory(),
        *_metrics(20_000 if quick else 1_000_000),
        *_half_precision(),
    ]


# ---- training steps ------------------------------------------------------------------------------------------------


def _steps(name: str, inputs: int, hidden: int, classes: int, repeats: int, *, small: bool) -> list[Ratio]:
    examples = 2560 if small else 512
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator)
    y = torch.randint(classes, (examples,), generator=generator)
    order = torch.randperm(examples, generator=generator)
    data = [(x[rows], y[rows], rows) for rows in order.split(128)]

    def model() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        return layers, torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    ours = _with_poise(*model(), data, examples, classes)
    hand = _by_hand(*model(), data, examples, classes)
    plain = _plain(*model(), data)
    steps = len(data)
    result = []
    for peer, label, goal in ((hand, "PS-KD by hand", 1.03), (plain, "plain cross-entropy", None if small else 1.03)):
        timing = paired(ours, peer, repeats=repeats)
        detail = f"{name}: {1e3 * timing.first / steps:.2f} ms against {1e3 * timing.second / steps:.2f} ms a step"
        result.append(Ratio(f"step of progressive_self_distillation / {label}", timing.ratio, goal, detail=detail))
    return result


def _with_poise(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, examples: int, classes: int
) -> Callable[[], None]:
    objective: Objective = 1 * ProgressiveSelfDistillation()
    objective.bind(examples=examples, classes=classes, steps=EPOCHS * len(data), steps_per_epoch=len(data)).follow(
        optimizer
    )

    def epoch() -> None:
        for x, y, index in data:
            loss = objective(logits=model(x), target=y, index=index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def _by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, examples: int, classes: int
) -> Callable[[], None]:
    memory = torch.zeros(examples, classes)
    clock = {"epoch": 0}

    def epoch() -> None:
        alpha = 0.8 * (clock["epoch"] + 1) / EPOCHS
        for x, y, index in data:
            soft = F.one_hot(y, classes).float()
            if clock["epoch"] > 0:
                soft = (1 - alpha) * soft + alpha * memory[index]
            logits = model(x)
            loss = F.cross_entropy(logits, soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            memory[index] = logits.detach().softmax(-1)
        clock["epoch"] += 1

    return epoch


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> Callable[[], None]:
    def epoch() -> None:
        for x, y, _ in data:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


# ---- memory --------------------------------------------------------------------------------------------------------


def _memory() -> list[Ratio]:
    examples, classes = 50_000, 100
    result = []
    for dtype, size in (("float32", 4), ("float16", 2)):
        objective: Objective = (1 * ProgressiveSelfDistillation(dtype=dtype)).bind(examples=examples, classes=classes)
        held = sum(b.numel() * b.element_size() for b in objective.buffers())
        result.append(
            Ratio(
                f"state of progressive_self_distillation ({dtype}) / examples * classes * {size} bytes",
                held / (examples * classes * size),
                1.05,
                detail=f"{held / 1e6:.1f} MB for 50,000 examples of 100 classes; beyond the predictions, 8 bytes an example count visits",
            )
        )
    return result


def _half_precision() -> list[Ratio]:
    """How far a float16 memory moves the loss, on predictions as a trained network makes them."""
    generator = torch.Generator().manual_seed(0)
    examples, classes = 10_000, 100
    past = (4 * torch.randn(examples, classes, generator=generator)).softmax(-1)
    logits = 4 * torch.randn(examples, classes, generator=generator)
    target, index = torch.randint(classes, (examples,), generator=generator), torch.arange(examples)
    losses = []
    for dtype in ("float32", "float16"):
        objective: Objective = (1 * ProgressiveSelfDistillation(dtype=dtype)).bind(examples=examples, classes=classes)
        term = next(iter(objective.terms.values()))
        term.memory.write(index, past)  # type: ignore[union-attr, operator]
        losses.append(float(objective(logits=logits, target=target, index=index, epoch=299, epochs=300)))
    detail = f"{losses[1]:.6f} against {losses[0]:.6f}, alpha = 0.8"
    return [Ratio("|loss with a float16 memory - loss with float32|", abs(losses[1] - losses[0]), 0.005, detail=detail)]


# ---- metrics -------------------------------------------------------------------------------------------------------


def _metrics(examples: int) -> list[Ratio]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(examples, 100, generator=generator)
    probs = logits.softmax(-1)
    labels = torch.where(torch.rand(examples, generator=generator) < 0.6, probs.argmax(1), 7)

    def everything() -> tuple[float, float, float]:
        confidence, prediction = probs.max(1)
        risk = risk_coverage(confidence, prediction == labels)
        return calibration_error(probs, labels), risk.aurc, negative_log_likelihood(logits, labels)

    whole = min(seconds(everything) for _ in range(3))
    ranked = min(seconds(lambda: risk_coverage(probs.amax(1), probs.argmax(1) == labels)) for _ in range(3))
    binned = min(seconds(lambda: calibration_error(probs, labels)) for _ in range(3))
    started = time.perf_counter()
    loops = _loops(probs.numpy(), labels.numpy())
    looped = time.perf_counter() - started
    # the loops are exact too: a speed that is bought with a wrong figure would be no speed
    assert abs(loops[0] - calibration_error(probs, labels)) < 1e-5
    size = f"{examples:,} x 100"
    result = [
        Ratio(
            f"seconds for ECE, AURC and NLL of {size}", whole, 1.0, detail=f"ECE {binned:.3f} s, AURC {ranked:.3f} s"
        ),
        Ratio(
            "ECE and AURC in loops as the paper's repository has them / here",
            looped / (ranked + binned),
            50,
            "higher",
            f"{looped:.2f} s against {ranked + binned:.2f} s",
        ),
    ]
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError:
        return result

    def peer() -> Tensor:
        return multiclass_calibration_error(probs, labels, num_classes=100, n_bins=10, norm="l1")

    timing = paired(lambda: calibration_error(probs, labels), peer, repeats=5, warmup=1)
    assert abs(float(peer()) - calibration_error(probs, labels)) < 1e-5
    detail = f"{timing.first:.3f} s against {timing.second:.3f} s"
    return [*result, Ratio(f"calibration_error / torchmetrics, {size}", timing.ratio, None, detail=detail)]


def _loops(probs: np.ndarray, labels: np.ndarray, bins: int = 10) -> tuple[float, float]:
    """ECE and AURC the way the paper's repository computes them: tuples filtered once a bin, rows sorted by confidence."""
    prediction, confidence = probs.argmax(1), probs.max(1)
    error = 0.0
    for b in range(bins):
        inside = [t for t in zip(prediction, labels, confidence, strict=True) if b / bins < t[2] <= (b + 1) / bins]
        if inside:
            accuracy = len([t for t in inside if t[0] == t[1]]) / len(inside)
            error += abs(accuracy - sum([float(t[2]) for t in inside]) / len(inside)) * len(inside)
    order = np.argsort(probs.max(1))[::-1]
    wrong = labels[order] != probs[order].argmax(1)
    return error / len(labels), float(np.mean(np.cumsum(wrong) / np.arange(1, len(labels) + 1)))
