"""What an objective charges for. The catalogue maps formula names to classes, which are imported when they are used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from poise.errors import InputError

if TYPE_CHECKING:
    from poise.objective import Objective, Term

CATALOGUE: dict[str, str] = {
    "absolute_error": "poise.terms.supervised:AbsoluteError",
    "activation_l2": "poise.terms.tuned_penalties:ActivationL2",
    "anchored": "poise.terms.parameters:AnchoredPenalty",
    "aot": "poise.terms.preference.transport:AOT",
    "apo_down": "poise.terms.preference.margin_losses:APODown",
    "apo_zero": "poise.terms.preference.margin_losses:APOZero",
    "bco_pair": "poise.terms.preference.margin_losses:BCOPair",
    "best_of_n": "poise.terms.policy_gradient.best_of_n:BestOfN",
    "bootstrap": "poise.terms.robust:Bootstrap",
    "box": "poise.terms.structured:BoxSet",
    "bradley_terry": "poise.terms.preference.bradley_terry:BradleyTerryPairs",
    "brier": "poise.terms.probability:Brier",
    "capped_l1": "poise.terms.structured:CappedL1",
    "class_wise_self_distillation": "poise.terms.self_distillation:ClassWiseSelfDistillation",
    "compand_barrier": "poise.parts.companding:CompandBarrier",
    "conditional_domain_adversarial": "poise.terms.domain:ConditionalDomainAdversarial",
    "confidence_penalty": "poise.terms.supervised:ConfidencePenalty",
    "cross_entropy": "poise.terms.supervised:CrossEntropy",
    "dead_features": "poise.terms.autoencoder:DeadFeatures",
    "discopop": "poise.terms.preference.margin_losses:DiscoPOP",
    "distillation": "poise.terms.self_distillation:Distillation",
    "domain_adversarial": "poise.terms.domain:DomainAdversarial",
    "dpo": "poise.terms.preference.dpo:DPO",
    "dpop": "poise.terms.preference.dpo:DPOP",
    "early_learning": "poise.terms.early_learning:EarlyLearning",
    "energy_l2": "poise.terms.unnormalized:EnergyL2",
    "elastic_net": "poise.terms.structured:ElasticNet",
    "error_rate": "poise.terms.supervised:ErrorRate",
    "exo_pair": "poise.terms.preference.margin_losses:EXOPair",
    "expected_reward": "poise.terms.regularised_reward:ExpectedReward",
    "f_sft": "poise.terms.preference.bridge:FSFT",
    "feature_l0": "poise.terms.autoencoder:FeatureL0",
    "feature_l1": "poise.terms.autoencoder:FeatureL1",
    "flex_dpo": "poise.terms.preference.flex:FlexDPO",
    "focal": "poise.terms.supervised:Focal",
    "forward_correction": "poise.terms.robust:ForwardCorrection",
    "forward_kl": "poise.terms.divergence:ForwardKL",
    "function_of_means": "poise.terms.function_of_means:FunctionOfMeans",
    "fused_lasso": "poise.terms.structured:FusedLasso",
    "generalized_cross_entropy": "poise.terms.robust:GeneralizedCrossEntropy",
    "group_lasso": "poise.terms.structured:GroupLasso",
    "grpo": "poise.terms.policy_gradient.clipped:GRPO",
    "huber": "poise.terms.supervised:Huber",
    "ipo": "poise.terms.preference.margin_losses:IPO",
    "jensen_shannon": "poise.terms.divergence:JensenShannon",
    "kl": "poise.terms.supervised:KL",
    "kto": "poise.terms.preference.kto:KTO",
    "l0": "poise.terms.structured:L0",
    "l1": "poise.terms.parameters:L1",
    "l2": "poise.terms.parameters:L2",
    "label_smoothing": "poise.terms.supervised:LabelSmoothing",
    "least_squares": "poise.terms.supervised:LeastSquares",
    "length_normalized_kl": "poise.terms.regularised_reward:LengthNormalizedKL",
    "margin_disparity": "poise.terms.domain:MarginDisparity",
    "mask_l1": "poise.terms.preference.sparse:MaskL1",
    "mcp": "poise.terms.structured:MCP",
    "mixup": "poise.terms.supervised:Mixup",
    "mutual_information": "poise.terms.domain:MutualInformation",
    "nca_pair": "poise.terms.preference.margin_losses:NCAPair",
    "nce": "poise.terms.unnormalized:NCE",
    "norm_matching": "poise.terms.autoencoder:NormMatching",
    "nonnegative": "poise.terms.structured:NonNegative",
    "nuclear_norm": "poise.terms.structured:NuclearNorm",
    "odds_ratio": "poise.terms.preference.simpo:OddsRatio",
    "phrase_margin": "poise.terms.preference.rrpo:PhraseMargin",
    "ppo_clip": "poise.terms.policy_gradient.clipped:PPOClip",
    "preference_margin": "poise.terms.preference.margin:PreferenceMargin",
    "progressive_self_distillation": "poise.terms.self_distillation:ProgressiveSelfDistillation",
    "reconstruction": "poise.terms.autoencoder:Reconstruction",
    "proximal_matching": "poise.terms.proximal_matching:ProximalMatching",
    "reference_kl": "poise.terms.regularised_reward:ReferenceKL",
    "refined_cross_entropy": "poise.terms.early_learning:RefinedCrossEntropy",
    "reinforce": "poise.terms.policy_gradient.reinforce:Reinforce",
    "response_l2": "poise.terms.tuned_penalties:ResponseL2",
    "reverse_kl": "poise.terms.divergence:ReverseKL",
    "reward_weighted": "poise.terms.policy_gradient.reward_weighted:RewardWeighted",
    "rloo": "poise.terms.policy_gradient.clipped:RLOO",
    "robust_dpo": "poise.terms.preference.dpo:RobustDPO",
    "sampled_kl": "poise.terms.policy_gradient.sampled_kl:SampledKL",
    "scad": "poise.terms.structured:SCAD",
    "score": "poise.terms.policy_gradient.scored:Score",
    "segment_margin": "poise.terms.preference.rrpo:SegmentMargin",
    "sft": "poise.terms.preference.rpo:SFT",
    "short_run_langevin": "poise.terms.short_run_langevin:ShortRunLangevin",
    "simplex": "poise.terms.structured:SimplexSet",
    "simpo": "poise.terms.preference.simpo:SimPO",
    "slic": "poise.terms.preference.margin_losses:SLiC",
    "soft_dpo": "poise.terms.preference.soft:SoftPreference",
    "source_classification": "poise.terms.domain:SourceClassification",
    "sparse_po": "poise.terms.preference.sparse:SparsePO",
    "sparse_simplex": "poise.terms.structured:SparseSimplex",
    "sppo_hard": "poise.terms.preference.margin_losses:SPPOHard",
    "squared_error": "poise.terms.supervised:SquaredError",
    "symmetric_cross_entropy": "poise.terms.robust:SymmetricCrossEntropy",
    "target_classification": "poise.terms.domain:TargetClassification",
    "tdpo": "poise.terms.preference.tdpo:TDPO",
    "temporal_activation_l2": "poise.terms.tuned_penalties:TemporalActivationL2",
    "token_kl": "poise.terms.preference.margin:TokenKL",
    "token_reward_regularizer": "poise.terms.preference.treg:TokenRewardRegularizer",
    "token_trust_region": "poise.terms.trust_region:TokenTrustRegion",
    "total_variation": "poise.terms.divergence:TotalVariation",
    "transport": "poise.terms.transport:TransportLoss",
    "unnormalized_nll": "poise.terms.unnormalized:UnnormalizedNLL",
}
"""Formula name -> "module:Class". One line a term; keep it sorted."""

SHORTHANDS: dict[str, str] = {
    "cdpo": "poise.terms.preference.dpo:CDPO",
    "orpo": "poise.terms.preference.simpo:ORPO",
    "rpo": "poise.terms.preference.rpo:RPO",
    "rrpo": "poise.terms.preference.rrpo:RRPO",
    "t_reg": "poise.terms.preference.treg:TREG",
}
"""Formula name -> "module:Function" of what stands for a sum of terms: it returns the objective, which prints as that sum."""


def load(place: str) -> Any:
    """Import `"module:Class"`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def find(name: str) -> type[Term] | None:
    """Return the class of a formula name, built in or defined by the user, or None."""
    from poise.objective import _DEFINED

    if name in CATALOGUE:
        return load(CATALOGUE[name])  # type: ignore[no-any-return]
    return _DEFINED.get(name)


def find_shorthand(name: str) -> Callable[..., Objective] | None:
    """Return the function of a shorthand's name, or None."""
    return load(SHORTHANDS[name]) if name in SHORTHANDS else None


def names() -> list[str]:
    """Return every formula name that is known now."""
    from poise.objective import _DEFINED

    return sorted({*CATALOGUE, *_DEFINED})


def class_names() -> dict[str, str]:
    """Return the built-in classes and shorthands by their name in Python."""
    return {place.partition(":")[2]: place for place in (*CATALOGUE.values(), *SHORTHANDS.values())}


def register(term: type[Term], name: str | None = None) -> type[Term]:
    """Make a term of your own known to formulas under `name`, or under its `formula`.

    A term class that says `formula = "..."` registers itself when it is defined; this is for the others.

    Raises:
        InputError: the name belongs to a built-in term.
    """
    from poise.objective import _DEFINED

    name = name or term.formula
    if name in CATALOGUE or name in SHORTHANDS:
        raise InputError(f"{name!r} is a built-in term; choose another name.")
    _DEFINED[name] = term
    return term


def __getattr__(name: str) -> Any:
    place = class_names().get(name)
    if place is None:
        raise AttributeError(f"module 'poise.terms' has no attribute {name!r}")
    return load(place)


def __dir__() -> list[str]:
    return sorted({*globals(), *class_names()})
