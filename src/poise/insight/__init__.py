"""Reports and extrapolation: what happened, and why. Nothing here trains. Public names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

# At once, because function and file share a name and the function is what users mean.
from poise.insight.alignment_depth import alignment_depth
from poise.insight.distillation_spectrum import distillation_spectrum
from poise.insight.implicit_reward import implicit_reward
from poise.insight.mode_seeking import mode_seeking
from poise.lazy import load

_HOME: dict[str, str] = {
    "AlignmentDepth": "alignment_depth",
    "ActiveSetReport": "active_set",
    "AnswerMetrics": "reward_audit",
    "AuditCase": "reward_audit",
    "CollapseReport": "collapse",
    "ConflictReport": "gradient_conflict",
    "CoverageReport": "coverage",
    "Decoding": "alignment_attacks",
    "DistillationReport": "distillation_spectrum",
    "EpochDynamics": "memorization",
    "EpochRefinement": "self_distillation",
    "FineTuningAttack": "alignment_attacks",
    "FrontCheckpoint": "checkpoint_fronts",
    "FrontierPoint": "collapse",
    "HardExamples": "self_distillation",
    "KeywordJudge": "alignment_attacks",
    "LabelSuspects": "memorization",
    "LikelihoodFlags": "likelihood_dynamics",
    "LikelihoodMonitor": "likelihood_dynamics",
    "LikelihoodReport": "likelihood_dynamics",
    "LikelihoodRow": "likelihood_dynamics",
    "MemorizationRecorder": "memorization",
    "MemorizationReport": "memorization",
    "ModeSeeking": "mode_seeking",
    "Monotonicity": "reward_audit",
    "ParetoPaths": "checkpoint_fronts",
    "PreferenceStatistics": "mode_seeking",
    "RateResult": "implicit_reward",
    "RateStudy": "implicit_reward",
    "Recommendation": "mode_seeking",
    "RefinementRecorder": "self_distillation",
    "RefinementReport": "self_distillation",
    "RescalingGroup": "self_distillation",
    "RescalingReport": "self_distillation",
    "RewardAudit": "reward_audit",
    "Robustness": "weights",
    "RunPath": "checkpoint_fronts",
    "SmoothnessEstimate": "smoothness",
    "StepRow": "distillation_spectrum",
    "TokenCredit": "credit",
    "ValueCorrelation": "implicit_reward",
    "WeightStatistics": "weights",
    "active_set_complexity": "active_set",
    "advantages": "implicit_reward",
    "answer_metrics": "reward_audit",
    "attack_success": "alignment_attacks",
    "attribution": "credit",
    "audit_cases": "reward_audit",
    "audit_reward": "reward_audit",
    "backdoor": "alignment_attacks",
    "benign_sft": "alignment_attacks",
    "closed_accuracy": "reward_audit",
    "collapse_report": "collapse",
    "conflict_report": "gradient_conflict",
    "copy_rate": "reward_audit",
    "decay_pull": "weights",
    "decoding_sweep": "alignment_attacks",
    "distinct_n": "collapse",
    "effective_lr_profile": "weights",
    "explain_target": "collapse",
    "flow": "mode_seeking",
    "flow_steps": "mode_seeking",
    "frontier": "collapse",
    "gradient_coefficients": "memorization",
    "gradient_rescaling": "self_distillation",
    "hard_examples": "self_distillation",
    "gradient_normalized_smoothness": "smoothness",
    "harmful_sft": "alignment_attacks",
    "identity_shift": "alignment_attacks",
    "likelihood_flags": "likelihood_dynamics",
    "log_gradients": "likelihood_dynamics",
    "memorization_report": "memorization",
    "monotonicity": "reward_audit",
    "pareto_paths": "checkpoint_fronts",
    "past_predictions": "self_distillation",
    "preference_coverage": "coverage",
    "preference_statistics": "mode_seeking",
    "prefilling_probe": "alignment_attacks",
    "prefix_probe": "alignment_attacks",
    "q_values": "implicit_reward",
    "recommend": "mode_seeking",
    "self_bleu": "collapse",
    "sft_learning_rate_study": "implicit_reward",
    "shared_tokens": "likelihood_dynamics",
    "suspect_labels": "memorization",
    "smoothness_profile": "smoothness",
    "tilted": "mode_seeking",
    "token_credit": "credit",
    "token_gradient_norms": "alignment_depth",
    "token_rewards": "implicit_reward",
    "value": "implicit_reward",
    "value_correlation": "implicit_reward",
    "weight_drop_robustness": "weights",
    "weight_report": "weights",
}

__all__ = ["alignment_depth", "distillation_spectrum", "mode_seeking", *sorted(_HOME)]
__all__ = ["alignment_depth", "distillation_spectrum", *sorted(_HOME)]
__all__ = ["distillation_spectrum", "implicit_reward", "mode_seeking", *sorted(_HOME)]
__all__ = ["distillation_spectrum", "mode_seeking", *sorted(_HOME)]


_ELSEWHERE = {"ParetoArchive": "poise.weights.pareto", "hypervolume": "poise.metrics.pareto"}
"""Names that belong to rooms below, offered here too because a report is where one looks for them."""


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
