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
    "alista_weights": "sparse_recovery_rivals",
    "approximate_message_passing": "sparse_recovery_rivals",
    "as_solver": "torch_optimizers",
    "BlockCoordinate": "coordinate",
    "BlockCoordinateDescent": "dictionary_blocks",
    "BoundedElasticNet": "coordinate_penalty",
    "chebyshev_steps": "sparse_recovery_rivals",
    "ClampWeights": "projection",
    "Coder": "dictionary_coder",
    "Compositional": "compositional",
    "coordinate_lasso": "sparse_recovery_rivals",
    "CoordinateDescent": "working_sets",
    "CoordinateResult": "coordinate",
    "cubic_newton": "newton_rivals",
    "DataMatrix": "dictionary_data",
    "dictionary_baselines": "dictionary_estimator",
    "entropic_transport": "transport_baselines",
    "FactorPenalty": "dictionary_blocks",
    "follow_requests": "projection",
    "forest_partition": "message_passing",
    "forest_solve": "message_passing",
    "gradient_method": "newton_rivals",
    "GradientNormalizedNewton": "newton",
    "greedy_forest": "message_passing",
    "HalfFineTuning": "half_fine_tuning",
    "Incremental": "unfolded",
    "lasso_gap": "sparse_recovery",
    "lattice_combs": "message_passing",
    "LBFGS": "torch_optimizers",
    "linear_transport": "transport_baselines",
    "LinearModel": "linear_model",
    "Lion": "lion",
    "lion_from_adamw": "lion",
    "lion_grid": "lion",
    "LowRank": "low_rank",
    "LowRankProjectedGradient": "dictionary",
    "LowRankSolution": "dictionary",
    "MaxNorm": "projection",
    "OracleProblem": "target_split",
    "OuterStep": "target_surrogate",
    "pareto_over_xi": "dictionary_estimator",
    "PlugAndPlay": "plug_and_play",
    "ProjectModules": "projection",
    "ProximalGradient": "proximal",
    "QuadraticGraph": "quadratic_graph",
    "recover": "sparse_recovery",
    "Recovery": "sparse_recovery",
    "red_black": "message_passing",
    "Rival": "newton_rivals",
    "RMSprop": "torch_optimizers",
    "SelfDistillationKRR": "kernel_distillation",
    "SGD": "torch_optimizers",
    "SignalOperator": "signal_operators",
    "SmoothMatrix": "stacked_matrix",
    "sparse_transport": "transport",
    "SparseTransport": "transport_estimator",
    "Spectrum": "kernel_distillation",
    "StochasticLineSearch": "stochastic_line_search",
    "super_universal_newton": "newton_rivals",
    "SupervisedDictionary": "dictionary_estimator",
    "SupervisedFactors": "dictionary_objective",
    "SVRG": "svrg",
    "TargetSurrogate": "target_surrogate",
    "TopK": "unfolded_layers",
    "TorchOptimizer": "torch_optimizers",
    "train_unfolded": "unfolded",
    "TransportResult": "transport",
    "Unfolded": "unfolded",
    "UnfoldedTraining": "unfolded_training",
    "UnitNorm": "projection",
}

__all__ = ["parameter_groups", "plug_and_play", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
