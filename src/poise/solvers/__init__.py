"""How an objective is minimised. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

from poise.lazy import load
from poise.parameter_groups import parameter_groups

# At once, because function and file share a name and the function is what users mean.
from poise.solvers.plug_and_play import plug_and_play

_HOME: dict[str, str] = {
    "Adam": "torch_optimizers",
    "AdamW": "torch_optimizers",
    "as_solver": "torch_optimizers",
    "ClampWeights": "projection",
    "Compositional": "compositional",
    "cubic_newton": "newton_rivals",
    "entropic_transport": "transport_baselines",
    "follow_requests": "projection",
    "gradient_method": "newton_rivals",
    "ClampWeights": "projection",
    "BlockCoordinate": "coordinate",
    "BoundedElasticNet": "coordinate_penalty",
    "CoordinateResult": "coordinate",
    "GradientNormalizedNewton": "newton",
    "HalfFineTuning": "half_fine_tuning",
    "Incremental": "unfolded",
    "LBFGS": "torch_optimizers",
    "linear_transport": "transport_baselines",
    "LinearModel": "coordinate_losses",
    "Lion": "lion",
    "OracleProblem": "target_split",
    "OuterStep": "target_surrogate",
    "ProximalGradient": "proximal",
    "QuadraticGraph": "quadratic_graph",
    "RMSprop": "torch_optimizers",
    "Rival": "newton_rivals",
    "SGD": "torch_optimizers",
    "SparseTransport": "transport_estimator",
    "TorchOptimizer": "torch_optimizers",
    "SVRG": "svrg",
    "SelfDistillationKRR": "kernel_distillation",
    "Spectrum": "kernel_distillation",
    "ClampWeights": "projection",
    "MaxNorm": "projection",
    "StochasticLineSearch": "stochastic_line_search",
    "TargetSurrogate": "target_surrogate",
    "TransportResult": "transport",
    "as_solver": "torch_optimizers",
    "forest_partition": "message_passing",
    "forest_solve": "message_passing",
    "greedy_forest": "message_passing",
    "lattice_combs": "message_passing",
    "lion_from_adamw": "lion",
    "lion_grid": "lion",
    "MaxNorm": "projection",
    "PlugAndPlay": "plug_and_play",
    "ProjectModules": "projection",
    "ProximalGradient": "proximal",
    "Rival": "newton_rivals",
    "RMSprop": "torch_optimizers",
    "SelfDistillationKRR": "kernel_distillation",
    "SGD": "torch_optimizers",
    "entropic_transport": "transport_baselines",
    "linear_transport": "transport_baselines",
    "red_black": "message_passing",
    "sparse_transport": "transport",
    "SparseTransport": "transport_estimator",
    "Spectrum": "kernel_distillation",
    "super_universal_newton": "newton_rivals",
    "TorchOptimizer": "torch_optimizers",
    "TransportResult": "transport",
    "UnitNorm": "projection",
    "LinearMap": "linear_maps",
    "Lion": "lion",
    "MaxNorm": "projection",
    "ProximalGradient": "proximal",
    "RMSprop": "torch_optimizers",
    "Recovery": "sparse_recovery",
    "Rival": "newton_rivals",
    "SGD": "torch_optimizers",
    "SelfDistillationKRR": "kernel_distillation",
    "SparseTransport": "transport_estimator",
    "Spectrum": "kernel_distillation",
    "TopK": "unfolded_layers",
    "TorchOptimizer": "torch_optimizers",
    "TransportResult": "transport",
    "Unfolded": "unfolded",
    "UnfoldedTraining": "unfolded_training",
    "alista_weights": "sparse_recovery_rivals",
    "approximate_message_passing": "sparse_recovery_rivals",
    "as_solver": "torch_optimizers",
    "chebyshev_steps": "sparse_recovery_rivals",
    "coordinate_lasso": "sparse_recovery_rivals",
    "cubic_newton": "newton_rivals",
    "entropic_transport": "transport_baselines",
    "gradient_method": "newton_rivals",
    "lasso_gap": "sparse_recovery",
    "linear_transport": "transport_baselines",
    "lion_from_adamw": "lion",
    "lion_grid": "lion",
    "recover": "sparse_recovery",
    "sparse_transport": "transport",
    "super_universal_newton": "newton_rivals",
    "train_unfolded": "unfolded",
}

__all__ = ["parameter_groups", "plug_and_play", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
