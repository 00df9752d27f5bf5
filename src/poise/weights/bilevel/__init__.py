"""Weights found by the validation objective: two levels, and how the hypergradient arises."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "BestRecord": "self_tuning",
    "AdaptiveSigma": "sigma",
    "ConstantSigma": "sigma",
    "Counters": "levels",
    "Differences": "hypergradient",
    "Hypergradient": "hypergradient",
    "ImplicitHypergradient": "hypergradient",
    "Levels": "levels",
    "SelfTuning": "self_tuning",
    "OnlineBilevel": "online",
    "Outer": "method",
    "PenaltyBilevel": "penalty",
    "PenaltySweep": "penalty_checks",
    "PowerSigma": "sigma",
    "ReciprocalSigma": "sigma",
    "UnrolledHypergradient": "hypergradient",
    "error_bound_modulus": "penalty_checks",
    "hypergradient_exact": "penalty_checks",
    "penalty_sweep": "penalty_checks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
