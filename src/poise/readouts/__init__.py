"""Run a model on a batch and offer named quantities."""

from __future__ import annotations

from poise.readouts.language import AdapterOff, Language, reference_for
from poise.readouts.other_loops import batch_quantities, pairs_in_halves, read_in_forward
from poise.readouts.supervised import Classification, Readout, Regression, readout_for

__all__ = [
    "AdapterOff",
    "Classification",
    "Language",
    "Readout",
    "Regression",
    "batch_quantities",
    "pairs_in_halves",
    "read_in_forward",
    "readout_for",
    "reference_for",
]
