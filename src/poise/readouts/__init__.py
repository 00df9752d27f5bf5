"""Run a model on a batch and offer named quantities."""

from __future__ import annotations

from poise.readouts.activations import ActivationStream, activations_of
from poise.readouts.autoencoder import Autoencoding
from poise.readouts.denoising import Denoising
from poise.readouts.domain_features import DomainFeatures
from poise.readouts.language import AdapterOff, Language, reference_for
from poise.readouts.on_policy import Choices, OnPolicy, SampleTokens, collect, pairs_from_rewards
from poise.readouts.other_loops import batch_quantities, pairs_in_halves, read_in_forward
from poise.readouts.supervised import Classification, Readout, Regression, readout_for
from poise.readouts.token_rewards import contrastive_token_rewards, implied_token_rewards, with_token_rewards
from poise.readouts.unnormalized import Unnormalized

__all__ = [
    "ActivationStream",
    "AdapterOff",
    "Autoencoding",
    "Choices",
    "Classification",
    "Denoising",
    "DomainFeatures",
    "Language",
    "OnPolicy",
    "Readout",
    "Regression",
    "SampleTokens",
    "Unnormalized",
    "activations_of",
    "batch_quantities",
    "collect",
    "contrastive_token_rewards",
    "implied_token_rewards",
    "pairs_from_rewards",
    "pairs_in_halves",
    "read_in_forward",
    "readout_for",
    "reference_for",
    "with_token_rewards",
]
