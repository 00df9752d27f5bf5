"""Reports and extrapolation: what happened, and why. Nothing here trains. Public names are imported when they are first used."""

from __future__ import annotations

from typing import Any

# At once, because function and file share a name and the function is what users mean.
from poise.insight.alignment_depth import alignment_depth
from poise.insight.distillation_spectrum import distillation_spectrum
from poise.lazy import load

_HOME: dict[str, str] = {
    "AlignmentDepth": "alignment_depth",
    "Decoding": "alignment_attacks",
    "DistillationReport": "distillation_spectrum",
    "EpochDynamics": "memorization",
    "EpochRefinement": "self_distillation",
    "FineTuningAttack": "alignment_attacks",
    "HardExamples": "self_distillation",
    "KeywordJudge": "alignment_attacks",
    "LabelSuspects": "memorization",
    "MemorizationRecorder": "memorization",
    "MemorizationReport": "memorization",
    "RefinementRecorder": "self_distillation",
    "RefinementReport": "self_distillation",
    "RescalingGroup": "self_distillation",
    "RescalingReport": "self_distillation",
    "Robustness": "weights",
    "StepRow": "distillation_spectrum",
    "WeightStatistics": "weights",
    "attack_success": "alignment_attacks",
    "backdoor": "alignment_attacks",
    "benign_sft": "alignment_attacks",
    "decay_pull": "weights",
    "decoding_sweep": "alignment_attacks",
    "effective_lr_profile": "weights",
    "gradient_coefficients": "memorization",
    "gradient_rescaling": "self_distillation",
    "hard_examples": "self_distillation",
    "harmful_sft": "alignment_attacks",
    "identity_shift": "alignment_attacks",
    "memorization_report": "memorization",
    "past_predictions": "self_distillation",
    "prefilling_probe": "alignment_attacks",
    "prefix_probe": "alignment_attacks",
    "suspect_labels": "memorization",
    "token_gradient_norms": "alignment_depth",
    "weight_drop_robustness": "weights",
    "weight_report": "weights",
}

__all__ = ["alignment_depth", "distillation_spectrum", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
