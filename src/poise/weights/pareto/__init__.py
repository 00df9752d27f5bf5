"""Weights found by the gradients of the terms: balancers, and guides along the Pareto front."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME: dict[str, str] = {
    "GradientInfluence": "influence",
    "HypervolumeGuidance": "hypervolume",
    "ParetoArchive": "hypervolume",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
