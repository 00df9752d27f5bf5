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
    "Constraint": "constraint",
    "ActivationMask": "activation_mask",
    "AdaptiveKL": "adaptive_kl",
    "Auto": "auto",
    "Mixing": "mixing",
    "MixingWeight": "mixing",
    "PerSampleWeight": "per_sample",
    "PreferenceGradientWeight": "preference_gradient",
    "optimal_mixing": "mixing",
    "label_of_strength": "consistency",
    "rank_consistency": "consistency",
    "rank_correlation": "consistency",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
