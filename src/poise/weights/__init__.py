"""How a coefficient is set: a schedule, a constraint, or `auto` with a policy.

The functions `poise.constraint` and `poise.auto` share their names with files here, so they are exported one room above.
"""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "linear": "schedule",
    "cosine": "schedule",
    "exponential": "schedule",
    "rampup": "schedule",
    "piecewise": "schedule",
    "GammaLadder": "schedule",
    "Constraint": "constraint",
    "ConstraintCurves": "feasibility",
    "Feasibility": "feasibility",
    "TightenOnValidation": "feasibility",
    "constraints_of": "feasibility",
    "judge_constraints": "feasibility",
    "ActivationMask": "activation_mask",
    "AdaptiveKL": "adaptive_kl",
    "BayesianSearch": "hyperparameter_search",
    "GridSearch": "hyperparameter_search",
    "Hyperparameter": "hyperparameter",
    "HyperparameterSchedule": "hyperparameter_schedule",
    "PerturbedHyperparameters": "hyperparameter_schedule",
    "RandomSearch": "hyperparameter_search",
    "ReplayedHyperparameters": "hyperparameter_schedule",
    "Auto": "auto",
    "GradientTable": "gradient_table",
    "Descent": "descent",
    "LassoRelevance": "relevance",
    "Mixing": "mixing",
    "MixingWeight": "mixing",
    "PerSampleWeight": "per_sample",
    "PreferenceGradientWeight": "preference_gradient",
    "RelevanceReport": "relevance_report",
    "SourceRelevance": "source_weights",
    "SourceWeights": "source_weights",
    "efficiency": "allocation",
    "optimal_counts": "allocation",
    "optimal_mixing": "mixing",
    "planner_score": "allocation",
    "plug_in_score": "allocation",
    "label_of_strength": "consistency",
    "rank_consistency": "consistency",
    "rank_correlation": "consistency",
    "risk_bound": "allocation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
