"""Weights found by the gradients of the terms: balancers, and guides along the Pareto front."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME: dict[str, str] = {
    "Balancer": "balancer",
    "CAGrad": "cagrad",
    "DynamicAverage": "loss_scale",
    "EPO": "epo",
    "FixedPreference": "baselines",
    "GradNorm": "grad_norm",
    "IMTLG": "imtl",
    "IMTLL": "loss_scale",
    "LossScale": "loss_scale",
    "MGDA": "mgda",
    "NashMTL": "nash_mtl",
    "Normalised": "normalised",
    "PCGrad": "pcgrad",
    "RandomWeights": "baselines",
    "UPGrad": "upgrad",
    "Uncertainty": "loss_scale",
    "GuidedChoice": "guided",
    "GuidedPareto": "guided",
    "GuidedSummary": "guided",
    "GradientInfluence": "influence",
    "HypervolumeGuidance": "hypervolume",
    "ParetoArchive": "hypervolume",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
