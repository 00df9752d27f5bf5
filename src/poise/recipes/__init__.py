"""Procedures of several fits. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

# At once, because function and file share a name and the function is what users mean.
from poise.recipes.distillation_chain import distillation_chain
from poise.recipes.preference_loop import preference_loop

_HOME: dict[str, str] = {
    "AverageWeights": "learned_prox",
    "Chain": "distillation_chain",
    "CoTrained": "elr_plus",
    "distillation_grid": "distillation_chain",
    "ELRPlus": "elr_plus",
    "ExternalReward": "self_reward",
    "fit_learned_prox": "learned_prox",
    "Grid": "distillation_chain",
    "imitate": "imitation",
    "Imitation": "imitation",
    "ImplicitReward": "self_reward",
    "JudgeReward": "self_reward",
    "pairs_from_rewards": "preference_loop",
    "PreferenceLoop": "preference_loop",
    "proximal_schedule": "learned_prox",
    "rollout": "imitation",
    "self_rewarding_rounds": "self_reward",
    "SelfRewarding": "self_reward",
    "SelfRewardRound": "self_reward",
    "Student": "distillation_chain",
    "WatchProx": "learned_prox",
    "WeightAveraging": "elr_plus",
}

__all__ = ["distillation_chain", "preference_loop", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
