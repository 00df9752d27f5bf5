"""Weights found by the validation objective: two levels, and how the hypergradient arises."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "AIDCG": "descent",
    "AcceleratedGradient": "accelerated",
    "AdaptiveSigma": "sigma",
    "BOME": "first_order",
    "BOREP": "bo_rep",
    "BestRecord": "self_tuning",
    "ConstantSigma": "sigma",
    "Counters": "levels",
    "Differences": "hypergradient",
    "F2SA": "first_order",
    "ErrorBound": "error_bound",
    "HOAG": "hoag",
    "HOAGStep": "hoag",
    "Hypergradient": "hypergradient",
    "ITD": "descent",
    "ImplicitHypergradient": "hypergradient",
    "Levels": "levels",
    "LowerSolution": "accelerated",
    "MAID": "maid",
    "MAIDStep": "maid",
    "OnlineBilevel": "online",
    "Outer": "method",
    "PenaltyBilevel": "penalty",
    "PenaltySweep": "penalty_checks",
    "PowerSigma": "sigma",
    "Prediction": "prediction",
    "ReciprocalSigma": "sigma",
    "SOBA": "single_loop",
    "SelfTuning": "self_tuning",
    "StocBiO": "descent",
    "TTSA": "single_loop",
    "UnrolledHypergradient": "hypergradient",
    "VPBGD": "first_order",
    "error_bound_modulus": "penalty_checks",
    "hypergradient_exact": "penalty_checks",
    "penalty_sweep": "penalty_checks",
    "relaxed_smoothness": "bo_rep",
    "smoothness_probe": "bo_rep",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
