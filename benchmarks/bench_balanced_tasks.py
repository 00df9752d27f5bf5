"""What balancing buys: three tasks of very different scale on one trunk, every balancer beside the plain sum and single-task nets.

Data: scikit-learn's digits, 1797 images. Tasks: the digit (cross-entropy), odd or even (cross-entropy), and the sum of all pixels in
raw units (half the squared error: about a thousand times larger). Trunk 64-64-64, a linear head a task, AdamW 1e-3, batch 64, 400 steps,
half of the images for testing. The figure is the geometric mean over tasks of test error / test error of a net trained on that task
alone for as many steps; errors are the share of wrong labels and the share of variance that is not explained.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread
from poise.weights.gradient_table import GradientTable
from poise.weights.pareto import (
    EPO,
    IMTLG,
    IMTLL,
    MGDA,
    Balancer,
    CAGrad,
    DynamicAverage,
    FixedPreference,
    GradNorm,
    LossScale,
    NashMTL,
    Normalised,
    PCGrad,
    RandomWeights,
    Uncertainty,
    UPGrad,
)
from poise.weights.pareto.moving import MovingBalancer

RULES: dict[str, Callable[[], Balancer]] = {
    "plain sum": FixedPreference,
    "random": RandomWeights,
    "normalised": Normalised,
    "normalised(decay=0.99)": lambda: Normalised(decay=0.99),
    "grad_norm": GradNorm,
    "loss_scale": LossScale,
    "uncertainty": Uncertainty,
    "imtl_l": IMTLL,
    "dynamic_average": lambda: DynamicAverage(window=14),
    "mgda": MGDA,
    "mgda(normalize='l2')": lambda: MGDA(normalize="l2"),
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "upgrad": UPGrad,
    "nash_mtl": NashMTL,
    "imtl_g": IMTLG,
    "epo": EPO,
}
TASKS = ("digit", "parity", "ink")
BATCH = 64


def run(quick: bool) -> list[Ratio]:
    """Geometric mean of errors relative to single-task nets, for every balancer; lower is better, 1 is as good as alone."""
    steps, seeds = (40, 1) if quick else (400, 5)
    with one_thread():
        alone = [[_train(seed, steps, None, only=i)[i] for i in range(len(TASKS))] for seed in range(seeds)]
        result = []
        for name, make in RULES.items():
            errors = [_train(seed, steps, make()) for seed in range(seeds)]
            relative = [
                math.exp(statistics.mean(math.log(e / a) for e, a in zip(ours, single, strict=True)))
                for ours, single in zip(errors, alone, strict=True)
            ]
            spread = statistics.stdev(relative) / seeds**0.5 if seeds > 1 else 0.0
            means = [statistics.mean(e[i] for e in errors) for i in range(len(TASKS))]
            detail = ", ".join(f"{task} {mean:.1%}" for task, mean in zip(TASKS, means, strict=True))
            result.append(
                Ratio(
                    f"errors under {name} / single tasks",
                    statistics.mean(relative),
                    None,
                    "lower",
                    f"se {spread:.2f}; {detail}",
                )
            )
        single = [statistics.mean(a[i] for a in alone) for i in range(len(TASKS))]
        detail = ", ".join(f"{task} {mean:.1%}" for task, mean in zip(TASKS, single, strict=True))
        return [*result, Ratio("single-task nets", 1.0, None, "lower", detail)]


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, label = torch.from_numpy(digits.data).float(), torch.from_numpy(digits.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, label = x[order], label[order]
    return x / 16, label, label % 2, x.sum(1)


def _train(seed: int, steps: int, rule: Balancer | None, only: int | None = None) -> list[float]:
    """Return the test errors of the three tasks."""
    x, digit, parity, ink = _data(seed)
    half = len(x) // 2
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model = nn.ModuleList([trunk, nn.Linear(64, 10), nn.Linear(64, 2), nn.Linear(64, 1)])
    # The regression starts from the training mean, or most of the run would go into its offset.
    nn.init.constant_(model[3].bias, float(ink[:half].mean()))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)

    def losses(rows: Tensor | slice) -> list[Tensor]:
        z = trunk(x[rows])
        return [
            functional.cross_entropy(model[1](z), digit[rows]),
            functional.cross_entropy(model[2](z), parity[rows]),
            0.5 * functional.mse_loss(model[3](z).squeeze(1), ink[rows]),
        ]

    for _ in range(steps):
        values = losses(torch.randint(half, (BATCH,), generator=generator))
        optimizer.zero_grad()
        if only is not None:
            values[only].backward()
        else:
            assert rule is not None
            table = GradientTable.of(dict(zip(TASKS, values, strict=True)), parameters)
            for name, g in table.combine(rule.weigh(table.gram, table.values)).items():
                parameters[name].grad = g
            if isinstance(rule, MovingBalancer):
                rule.move(table.gram, table.values)
        optimizer.step()
    with torch.no_grad():
        test = slice(half, None)
        z = trunk(x[test])
        wrong = [float((model[i + 1](z).argmax(1) != t[test]).float().mean()) for i, t in enumerate((digit, parity))]
        unexplained = float((model[3](z).squeeze(1) - ink[test]).square().mean() / ink[test].var(correction=0))
    # One image less than none wrong, so that a ratio exists.
    return [max(w, 0.5 / (len(x) - half)) for w in wrong] + [unexplained]
