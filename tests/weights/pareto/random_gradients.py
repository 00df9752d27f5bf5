"""Random gradients for tests of balancers: of any rank, with copies, opposites, zeros and lengths that differ by powers of ten."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

Array = np.ndarray[Any, np.dtype[np.float64]]


def make(seed: int, m: int, rank: int, spread: float, flaw: str) -> Array:
    """Return gradients [m, 12] of at most the given rank, with lengths within ten to the power of plus and minus `spread`."""
    rng = np.random.default_rng(seed)
    j = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, 12))
    if flaw == "agree":
        j += 3 * np.linalg.norm(j) / np.sqrt(m) * np.ones(12) / np.sqrt(12)
    j *= 10.0 ** rng.uniform(-spread, spread, size=(m, 1)) / np.linalg.norm(j, axis=1, keepdims=True)
    if flaw == "copy":
        j[1] = j[0]
    if flaw == "opposite":
        j[1] = -j[0] * 10.0 ** rng.uniform(-spread, spread)
    if flaw == "zero":
        j[rng.integers(m)] = 0.0
    return j


@st.composite
def gradients(draw: Any, most: int = 6, spread: float = 2.0, flaws: str = "none agree copy opposite zero") -> Array:
    """Draw gradients [m, 12]."""
    m = draw(st.integers(2, most))
    return make(
        draw(st.integers(0, 2**32 - 1)),
        m,
        draw(st.integers(1, m)),
        draw(st.sampled_from([0.0, spread])),
        draw(st.sampled_from(flaws.split())),
    )


def gram(j: Array) -> torch.Tensor:
    """Return `J J'` f64 [m, m]."""
    return torch.from_numpy(j @ j.T)
