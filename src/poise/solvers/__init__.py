"""How an objective is minimised. Public names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from poise.parameter_groups import parameter_groups

_HOME: dict[str, str] = {
    "Adam": "torch_optimizers",
    "AdamW": "torch_optimizers",
    "LBFGS": "torch_optimizers",
    "RMSprop": "torch_optimizers",
    "SGD": "torch_optimizers",
    "TorchOptimizer": "torch_optimizers",
    "SelfDistillationKRR": "kernel_distillation",
    "Spectrum": "kernel_distillation",
    "ClampWeights": "projection",
    "MaxNorm": "projection",
}

__all__ = ["parameter_groups", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'poise.solvers' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"poise.solvers.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
