"""What balancing costs: weights from a Gram matrix beside torchjd, and steps with a gradient for each term beside plain steps.

A plain step is forward, sum of the terms, backward, and AdamW. The trunk is an MLP 784-512-512-512-512, batch 256, with a linear
head of ten classes for each of k terms. All sides share the model, the data, one thread and PyTorch's defaults. CPU seconds,
because both cores are seldom idle.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread, paired
from poise.weights.feature_table import FeatureTable, features_of
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto import IMTLG, MGDA, CAGrad, NashMTL, PCGrad, UPGrad

WIDTHS, BATCH, CLASSES = (784, 512, 512, 512, 512), 256, 10
SIZES, TERMS = (2, 3, 5, 10), (2, 4, 8)


def run(quick: bool) -> list[Ratio]:
    """Ratios of weights beside torchjd, and of balanced steps beside plain ones."""
    with one_thread():
        return [*_weights(quick), *_steps(quick)]


def _weights(quick: bool) -> list[Ratio]:
    try:
        from torchjd import aggregation
    except ImportError:
        return []
    result = []
    for ours, name, arguments in (
        (MGDA(), "MGDA", lambda m: {}),
        (PCGrad(), "PCGrad", lambda m: {}),
        (CAGrad(c=0.4), "CAGrad", lambda m: {"c": 0.4}),
        (UPGrad(), "UPGrad", lambda m: {}),
        (NashMTL(), "NashMTL", lambda m: {"n_tasks": m}),
        (IMTLG(), "IMTLG", lambda m: {}),
    ):
        ratios, times = [], []
        try:
            for m in SIZES:
                matrix = torch.randn(m, 50, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
                peer = getattr(aggregation, name)(**arguments(m))
                ratio, first, second = _beside(ours, peer, matrix, quick)
                ratios.append(ratio)
                times.append(f"{first * 1e6:.0f}/{second * 1e6:.0f}")
        except ImportError:
            continue
        sizes = ", ".join(map(str, SIZES))
        detail = f"microseconds ours/torchjd for m = {sizes}: {', '.join(times)}; the largest ratio"
        result.append(Ratio(f"weights of {ours.formula} / torchjd's", max(ratios), 1.0, "lower", detail))
    return result


def _beside(ours: Any, peer: Any, matrix: Tensor, quick: bool) -> tuple[float, float, float]:
    """Time weights alone where the peer gives them from the Gram matrix, else with its own Gram matrix, one of 50 columns."""
    gram, values = matrix @ matrix.T, torch.ones(len(matrix), dtype=torch.float64)
    theirs = getattr(peer, "gramian_weighting", None)
    block = 2 if type(peer).__name__ in ("NashMTL", "CAGrad") else 20

    def first() -> None:
        for _ in range(block):
            ours.weigh(gram, values)

    def second() -> None:
        for _ in range(block):
            peer(matrix) if theirs is None else theirs(gram)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timing = paired(first, second, 3 if quick else 15, warmup=1, clock=time.process_time)
    return timing.ratio, timing.first / block, timing.second / block


class _Net(nn.Module):
    def __init__(self, terms: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Linear(WIDTHS[-1], CLASSES) for _ in range(terms)])

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {str(i): functional.cross_entropy(head(z), y) for i, head in enumerate(self.heads)}


def _steps(quick: bool) -> list[Ratio]:
    sides = (
        ("gradient of each term and Gram matrix", _table, lambda k: 0.35 + 0.65 * k),
        ("step balanced on parameters", _balanced, None),
        ("step balanced on features", _on_features, lambda k: 1.15),
    )
    result = []
    for name, make, goal in sides:
        for terms in TERMS:
            torch.manual_seed(0)
            model = _Net(terms)
            x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(CLASSES, (BATCH,))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            plain, ours = _plain(model, optimizer, x, y), make(model, optimizer, x, y)
            timing = paired(ours, plain, 3 if quick else 25, clock=time.process_time)
            detail = f"{timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
            limit = None if goal is None else goal(terms)
            result.append(Ratio(f"{name} / plain step, {terms} terms", timing.ratio, limit, "lower", detail))
    return result


def _plain(model: _Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(model.losses(x, y).values())).sum().backward()
        optimizer.step()

    return step


def _table(model: _Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], object]:
    parameters = dict(model.named_parameters())
    return lambda: GradientTable.of(model.losses(x, y), parameters).gram


def _balanced(model: _Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    parameters, rule = dict(model.named_parameters()), UPGrad()

    def step() -> None:
        optimizer.zero_grad()
        table = GradientTable.of(model.losses(x, y), parameters)
        _update(parameters, table.combine(rule.weigh(table.gram, table.values)), optimizer)

    return step


def _on_features(model: _Net, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[], None]:
    parameters, rule = dict(model.named_parameters()), UPGrad()

    def step() -> None:
        optimizer.zero_grad()
        with features_of(model, "trunk") as seen:
            losses = model.losses(x, y)
        table = FeatureTable(tuple(losses), parameters)
        table.add(list(losses.values()), seen)
        _update(parameters, table.combine(rule.weigh(table.gram, table.values)), optimizer)

    return step


def _update(parameters: dict[str, nn.Parameter], gradient: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    for name, p in parameters.items():
        p.grad = gradient[name]
    optimizer.step()
