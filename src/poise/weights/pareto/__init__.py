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
    "GradientInfluence": "influence",
    "GuidedChoice": "guided",
    "GuidedPareto": "guided",
    "GuidedSummary": "guided",
    "HypervolumeGuidance": "hypervolume",
    "IMTLG": "imtl",
    "IMTLL": "loss_scale",
    "LossScale": "loss_scale",
    "MGDA": "mgda",
    "NashMTL": "nash_mtl",
    "Normalised": "normalised",
    "PCGrad": "pcgrad",
    "ParetoArchive": "hypervolume",
    "RandomWeights": "baselines",
    "UPGrad": "upgrad",
    "Uncertainty": "loss_scale",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
