"""Run a model on a batch and offer named quantities."""

from __future__ import annotations

from poise.readouts.language import AdapterOff, Language
from poise.readouts.supervised import Classification, Readout, Regression, readout_for

__all__ = ["AdapterOff", "Classification", "Language", "Readout", "Regression", "readout_for"]
