"""What every balancer must beat: weights that were fixed, and weights that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.moving import ValueBalancer
from poise.weights.pareto.preferences import spread, stated


class FixedPreference(ValueBalancer):
    """The same weights in every step: the preference itself.

    w = preference

    Args:
        preference: one number a term, at least 0; by default 1 each, the plain sum.

    Scale: that of the preference; by default sum m.

    When it fails: whenever scales of the terms differ or change: what a weight of 1 buys is not known before.
    """

    formula: ClassVar[str] = "fixed"
    total: ClassVar[str] = "m"

    def __init__(self, preference: Sequence[float] | None = None) -> None:
        super().__init__()
        self.preference = stated(self.formula, preference)

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the preference."""
        return torch.from_numpy(spread(self.formula, self.preference, terms, 1.0))


class RandomWeights(ValueBalancer):
    """Random loss weighting: new weights in every step, which rivals many balancers.

    w = softmax(z),  z normal       or       w Dirichlet(1): uniform on the simplex

    Args:
        distribution: "normal" (the paper's choice) or "dirichlet".
        generator: where they come from; its state is copied, and kept with the balancer's own.
        seed: of the generator, where none is given. Processes must share it.

    Scale: the weights sum to 1.

    When it fails: it is a baseline: on average it is the mean of the terms, with more noise; scales are not balanced.

    Buffers: `random_state`.

    Source: arXiv:2111.10603, algorithm 2.
    """

    formula: ClassVar[str] = "random"
    total: ClassVar[str] = "1"
    random_state: Tensor

    def __init__(self, distribution: str = "normal", generator: torch.Generator | None = None, seed: int = 0) -> None:
        super().__init__()
        if distribution not in ("normal", "dirichlet"):
            raise InputError(f"random: distribution is 'normal' or 'dirichlet', and it is {distribution!r}.")
        self.distribution = distribution
        self.keep_random_state(generator, seed)

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return this step's weights."""
        return self._draw(terms, self.random_numbers())

    def move_values(self, values: Tensor) -> None:
        """Go on to the next weights."""
        self.take_random_numbers(lambda generator: self._draw(len(values), generator))

    def _draw(self, m: int, generator: torch.Generator) -> Tensor:
        if self.distribution == "normal":
            return torch.softmax(torch.randn(m, generator=generator, dtype=torch.float64), 0)
        # Exponential numbers divided by their sum.
        drawn = -torch.log1p(-torch.rand(m, generator=generator, dtype=torch.float64))
        return drawn / drawn.sum()
