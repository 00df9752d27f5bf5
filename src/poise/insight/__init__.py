"""Reports and extrapolation: what happened, and why. Nothing here trains. Public names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

# At once, because function and file share a name and the function is what users mean.
from poise.insight.alignment_depth import alignment_depth
from poise.insight.distillation_spectrum import distillation_spectrum
from poise.insight.implicit_reward import implicit_reward
from poise.insight.mode_seeking import mode_seeking
from poise.insight.prior_profile import prior_profile
from poise.lazy import load

_HOME: dict[str, str] = {
    "active_set_complexity": "active_set",
    "ActiveSetReport": "active_set",
    "advantages": "implicit_reward",
    "afa_report": "feature_norms",
    "AFAReport": "feature_norms",
    "AlignmentDepth": "alignment_depth",
    "answer_metrics": "reward_audit",
    "AnswerMetrics": "reward_audit",
    "attack_success": "alignment_attacks",
    "attribution": "credit",
    "audit_cases": "reward_audit",
    "audit_reward": "reward_audit",
    "AuditCase": "reward_audit",
    "autoencoder_quality": "autoencoders",
    "AutoencoderQuality": "autoencoders",
    "backdoor": "alignment_attacks",
    "benign_sft": "alignment_attacks",
    "closed_accuracy": "reward_audit",
    "collapse_report": "collapse",
    "CollapseReport": "collapse",
    "ConditionReport": "unfolding",
    "conflict_report": "gradient_conflict",
    "ConflictReport": "gradient_conflict",
    "copy_rate": "reward_audit",
    "CoverageReport": "coverage",
    "decay_pull": "weights",
    "Decoding": "alignment_attacks",
    "decoding_sweep": "alignment_attacks",
    "description_length": "feature_norms",
    "DistillationReport": "distillation_spectrum",
    "distinct_n": "collapse",
    "effective_lr_profile": "weights",
    "EpochDynamics": "memorization",
    "EpochRefinement": "self_distillation",
    "explain_target": "collapse",
    "FineTuningAttack": "alignment_attacks",
    "flow": "mode_seeking",
    "flow_steps": "mode_seeking",
    "FrontCheckpoint": "checkpoint_fronts",
    "frontier": "collapse",
    "FrontierPoint": "collapse",
    "gradient_coefficients": "memorization",
    "gradient_normalized_smoothness": "smoothness",
    "gradient_rescaling": "self_distillation",
    "gram_statistics": "feature_norms",
    "GramStatistics": "feature_norms",
    "hard_examples": "self_distillation",
    "HardExamples": "self_distillation",
    "harmful_sft": "alignment_attacks",
    "identity_shift": "alignment_attacks",
    "KeywordJudge": "alignment_attacks",
    "LabelSuspects": "memorization",
    "layer_report": "unfolding",
    "LayerReport": "unfolding",
    "likelihood_flags": "likelihood_dynamics",
    "LikelihoodFlags": "likelihood_dynamics",
    "LikelihoodMonitor": "likelihood_dynamics",
    "LikelihoodReport": "likelihood_dynamics",
    "LikelihoodRow": "likelihood_dynamics",
    "log_gradients": "likelihood_dynamics",
    "memorization_report": "memorization",
    "MemorizationRecorder": "memorization",
    "MemorizationReport": "memorization",
    "mismatch_report": "unfolding",
    "ModeSeeking": "mode_seeking",
    "Monotonicity": "reward_audit",
    "monotonicity": "reward_audit",
    "noise_report": "normalizer",
    "NoiseRow": "normalizer",
    "NormalizerReport": "normalizer",
    "NormalizerTrace": "normalizer",
    "pareto_paths": "checkpoint_fronts",
    "ParetoPaths": "checkpoint_fronts",
    "past_predictions": "self_distillation",
    "plain_solvers": "unfolding",
    "preference_coverage": "coverage",
    "preference_statistics": "mode_seeking",
    "PreferenceStatistics": "mode_seeking",
    "prefilling_probe": "alignment_attacks",
    "prefix_probe": "alignment_attacks",
    "PriorCurve": "prior_profile",
    "PriorProfile": "prior_profile",
    "q_values": "implicit_reward",
    "RateResult": "implicit_reward",
    "RateStudy": "implicit_reward",
    "recommend": "mode_seeking",
    "Recommendation": "mode_seeking",
    "RefinementRecorder": "self_distillation",
    "RefinementReport": "self_distillation",
    "RescalingGroup": "self_distillation",
    "RescalingReport": "self_distillation",
    "RewardAudit": "reward_audit",
    "Robustness": "weights",
    "RunPath": "checkpoint_fronts",
    "self_bleu": "collapse",
    "sft_learning_rate_study": "implicit_reward",
    "shared_tokens": "likelihood_dynamics",
    "smoothness_profile": "smoothness",
    "SmoothnessEstimate": "smoothness",
    "spliced": "autoencoders",
    "spliced_loss": "autoencoders",
    "SplicedLoss": "autoencoders",
    "step_figure": "unfolding",
    "StepFigure": "unfolding",
    "StepRow": "distillation_spectrum",
    "suspect_labels": "memorization",
    "tilted": "mode_seeking",
    "token_credit": "credit",
    "token_gradient_norms": "alignment_depth",
    "token_rewards": "implicit_reward",
    "TokenCredit": "credit",
    "transfer_report": "unfolding",
    "value": "implicit_reward",
    "value_correlation": "implicit_reward",
    "ValueCorrelation": "implicit_reward",
    "weight_drop_robustness": "weights",
    "weight_report": "weights",
    "WeightStatistics": "weights",
}

__all__ = ["alignment_depth", "distillation_spectrum", "mode_seeking", *sorted(_HOME)]
__all__ = ["alignment_depth", "distillation_spectrum", *sorted(_HOME)]
__all__ = ["distillation_spectrum", "implicit_reward", "mode_seeking", *sorted(_HOME)]
__all__ = ["distillation_spectrum", "mode_seeking", "prior_profile", *sorted(_HOME)]


_ELSEWHERE = {"ParetoArchive": "poise.weights.pareto", "hypervolume": "poise.metrics.pareto"}
"""Names that belong to rooms below, offered here too because a report is where one looks for them."""


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
