"""Preferences that a person states, one number a term, checked in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from poise.errors import InputError
from poise.weights.pareto.geometry import Array


def stated(formula: str, preference: Sequence[float] | None, positive: bool = False) -> tuple[float, ...] | None:
    """Check a preference when it is given.

    Raises:
        InputError: it is empty, negative or not finite, or 0 where that has no meaning.
    """
    if preference is None:
        return None
    found = tuple(float(p) for p in preference)
    if (
        not found
        or not all(math.isfinite(p) and p >= 0 for p in found)
        or not any(found)
        or (positive and not all(found))
    ):
        least = "positive" if positive else "at least 0 and not all 0"
        raise InputError(f"{formula}: preference has one finite number a term, {least}, and it is {list(found)}.")
    return found


def spread(formula: str, preference: tuple[float, ...] | None, terms: int, default: float) -> Array:
    """Return one number a term: those of the preference, or `default` for all.

    Raises:
        InputError: the preference has another number of terms.
    """
    if preference is None:
        return np.full(terms, default)
    if len(preference) != terms:
        raise InputError(
            f"{formula}: preference has {len(preference)} numbers and {terms} terms are weighed. "
            "Give one number a term, in the order of the formula."
        )
    return np.array(preference)
