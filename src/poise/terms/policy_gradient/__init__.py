"""Learn from answers that were scored: likelihood of the good ones, policy gradients, and clipped ratios.

A batch holds answers y to prompts, a reward R for each, and the number of the prompt that each answers (`group`). With
`log pi(y) = sum_t log pi(y_t | y_<t)`, no division by the length:

    best_of_n          -log pi(best)  [+ c log pi(worst)]             likelihood of the best answer of a group
    reward_weighted    -log pi(y) exp(R / T)                          likelihood, good answers weigh more
    reinforce          -A log pi(y)                                   A = R - baseline: losers are pushed down
    rloo               -min(rho A, clip(rho) A)                       rho = pi / behaviour of the answer, A leave-one-out
    ppo_clip           the same, token by token, on samples that may be stale
    grpo               the same with A = (R - mean) / std of the group

Only `log pi` carries a gradient: rewards, references and the sampler's own log-probabilities are constants. The first
two are mode-covering (they can only raise probabilities), the others push losers down.

The reward may be a sum of its own, written where it is used:

    grpo(reward=score + 0.1*score.on(reward="brevity").named("brevity")) + 0.04*sampled_kl(estimator="k3")

Public implementations of the clipped losses differ in how tokens become one number; `aggregate` names the ways:

    sequence_mean    mean over an answer's tokens, then over answers            (GRPO as published)
    token_mean       one mean over all answer tokens of the batch               (DAPO; "bnpo" elsewhere)
    dr_grpo          sum over an answer's tokens / max_length, then over answers: long answers are not favoured
    sequence_sum     sum over an answer's tokens, then the mean over answers    (the policy gradient itself)
"""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "GRPO": "clipped",
    "RLOO": "clipped",
    "BestOfN": "best_of_n",
    "PPOClip": "clipped",
    "Reinforce": "reinforce",
    "RewardWeighted": "reward_weighted",
    "SampledKL": "sampled_kl",
    "Score": "scored",
    "advantages": "scored",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
