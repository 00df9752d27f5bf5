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
    "BlockCoordinateDescent": "dictionary_blocks",
    "Coder": "dictionary_coder",
    "DataMatrix": "dictionary_data",
    "FactorPenalty": "dictionary_blocks",
    "LowRank": "low_rank",
    "LowRankProjectedGradient": "dictionary",
    "LowRankSolution": "dictionary",
    "SmoothMatrix": "stacked_matrix",
    "SupervisedDictionary": "dictionary_estimator",
    "SupervisedFactors": "dictionary_objective",
    "alista_weights": "sparse_recovery_rivals",
    "approximate_message_passing": "sparse_recovery_rivals",
    "as_solver": "torch_optimizers",
    "BlockCoordinate": "coordinate",
    "BoundedElasticNet": "coordinate_penalty",
    "chebyshev_steps": "sparse_recovery_rivals",
    "Compositional": "compositional",
    "coordinate_lasso": "sparse_recovery_rivals",
    "CoordinateDescent": "working_sets",
    "CoordinateResult": "coordinate",
    "cubic_newton": "newton_rivals",
    "dictionary_baselines": "dictionary_estimator",
    "entropic_transport": "transport_baselines",
    "follow_requests": "projection",
    "forest_partition": "message_passing",
    "forest_solve": "message_passing",
    "gradient_method": "newton_rivals",
    "greedy_forest": "message_passing",
    "Incremental": "unfolded",
    "lasso_gap": "sparse_recovery",
    "lattice_combs": "message_passing",
    "linear_transport": "transport_baselines",
    "LinearModel": "linear_model",
    "lion_from_adamw": "lion",
    "lion_grid": "lion",
    "OracleProblem": "target_split",
    "OuterStep": "target_surrogate",
    "PlugAndPlay": "plug_and_play",
    "ProjectModules": "projection",
    "QuadraticGraph": "quadratic_graph",
    "pareto_over_xi": "dictionary_estimator",
    "recover": "sparse_recovery",
    "Recovery": "sparse_recovery",
    "red_black": "message_passing",
    "SignalOperator": "signal_operators",
    "sparse_transport": "transport",
    "StochasticLineSearch": "stochastic_line_search",
    "super_universal_newton": "newton_rivals",
    "SVRG": "svrg",
    "TargetSurrogate": "target_surrogate",
    "TopK": "unfolded_layers",
    "train_unfolded": "unfolded",
    "Unfolded": "unfolded",
    "UnfoldedTraining": "unfolded_training",
    "UnitNorm": "projection",
}

__all__ = ["parameter_groups", "plug_and_play", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
