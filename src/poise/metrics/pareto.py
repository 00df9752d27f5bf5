"""Fronts and hypervolumes as metrics; they are computed in `poise.pareto_fronts`, where policies of weights find them too."""

from __future__ import annotations

from poise.pareto_fronts import front, hypervolume, hypervolume_contributions, hypervolume_improvement, nondominated

__all__ = ["front", "hypervolume", "hypervolume_contributions", "hypervolume_improvement", "nondominated"]
