"""How an objective is minimised. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

from poise.lazy import load
from poise.parameter_groups import parameter_groups

_HOME: dict[str, str] = {
    "Adam": "torch_optimizers",
    "AdamW": "torch_optimizers",
    "BlockCoordinateDescent": "dictionary_blocks",
    "Coder": "dictionary_coder",
    "DataMatrix": "dictionary_data",
    "FactorPenalty": "dictionary_blocks",
    "GradientNormalizedNewton": "newton",
    "HalfFineTuning": "half_fine_tuning",
    "LBFGS": "torch_optimizers",
    "Lion": "lion",
    "LowRank": "low_rank",
    "LowRankProjectedGradient": "dictionary",
    "LowRankSolution": "dictionary",
    "ProximalGradient": "proximal",
    "RMSprop": "torch_optimizers",
    "Rival": "newton_rivals",
    "SGD": "torch_optimizers",
    "SmoothMatrix": "stacked_matrix",
    "SupervisedDictionary": "dictionary_estimator",
    "SupervisedFactors": "dictionary_objective",
    "TorchOptimizer": "torch_optimizers",
    "SelfDistillationKRR": "kernel_distillation",
    "Spectrum": "kernel_distillation",
    "ClampWeights": "projection",
    "MaxNorm": "projection",
    "TransportResult": "transport",
    "as_solver": "torch_optimizers",
    "dictionary_baselines": "dictionary_estimator",
    "lion_from_adamw": "lion",
    "lion_grid": "lion",
    "entropic_transport": "transport_baselines",
    "linear_transport": "transport_baselines",
    "pareto_over_xi": "dictionary_estimator",
    "sparse_transport": "transport",
    "cubic_newton": "newton_rivals",
    "gradient_method": "newton_rivals",
    "super_universal_newton": "newton_rivals",
}

__all__ = ["parameter_groups", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
