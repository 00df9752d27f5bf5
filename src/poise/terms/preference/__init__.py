"""Preference objectives: terms on pairs of answers, on single answers, and on their tokens."""

from __future__ import annotations

from typing import Any

from poise.lazy import load

_HOME = {
    "AOT": "transport",
    "APODown": "margin_losses",
    "APOZero": "margin_losses",
    "AdversarialPolicy": "rpo",
    "BCOPair": "margin_losses",
    "BradleyTerryPairs": "bradley_terry",
    "CDPO": "dpo",
    "DPO": "dpo",
    "DPOP": "dpo",
    "DiscoPOP": "margin_losses",
    "EXOPair": "margin_losses",
    "FSFT": "bridge",
    "FinitePreferences": "rpo",
    "FlexDPO": "flex",
    "IPO": "margin_losses",
    "KTO": "kto",
    "MaskL1": "sparse",
    "NCAPair": "margin_losses",
    "ORPO": "simpo",
    "OddsRatio": "simpo",
    "Pair": "margin",
    "PairedTerm": "margin",
    "PhraseMargin": "rrpo",
    "PreferenceMargin": "margin",
    "RPO": "rpo",
    "RRPO": "rrpo",
    "RobustDPO": "dpo",
    "SFT": "rpo",
    "SLiC": "margin_losses",
    "SegmentMargin": "rrpo",
    "SPPOHard": "margin_losses",
    "SimPO": "simpo",
    "SoftPreference": "soft",
    "SparsePO": "sparse",
    "TDPO": "tdpo",
    "TREG": "treg",
    "TokenKL": "margin",
    "TokenRewardRegularizer": "treg",
    "TokenTerm": "margin",
    "adversarial_policy": "rpo",
    "adversarial_value": "rpo",
    "answer_length": "margin",
    "check_spans": "phrases",
    "log_ratio": "margin",
    "phrase_sums": "phrases",
    "sequence_sum": "margin",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)
