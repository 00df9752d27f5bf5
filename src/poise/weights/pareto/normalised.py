"""Every gradient at the same length, or at the share of the step that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.geometry import array
from poise.weights.pareto.moving import MovingBalancer
from poise.weights.pareto.preferences import spread, stated


class Normalised(MovingBalancer):
    """Weights under which every term's gradient has the same norm, whatever the scale of its loss.

    w_i = R s_i/|g_i|,   s the shares (1/m each),   R = sum_i |g_i| (or `norm`, where it is given)

    So `w_i |g_i| = s_i R`: a term contributes what it was told to, and "weight 1 to 1" means the same for losses of 0.01 and 100.
    The norms are those of the whole batch's gradient, over micro-batches and processes, because they come from the summed
    gradients: the weights of four accumulated micro-batches on two processes are those of one big batch. (A norm taken on each
    process, before the sum, is larger by the noise of its part, and differs between processes.)

    Args:
        preference: shares, one number a term, at least 0; by default equal.
        decay: of a moving average over steps of the squared norms, in [0, 1); 0 takes this step's own. An average lets
            a term fade out as its gradient does within the window; without it the noise of a solved term is blown up to full length.
        norm: `R`, the total of the weighted norms; by default that of the unweighted gradients, so the learning rate stays.

    Scale: `sum_i w_i |g_i| = sum_i |g_i|`; for gradients of equal length all weights are 1 (sum m).

    When it fails: a term at its minimum keeps its share of every step and only adds noise (use `decay`, or a `constraint`);
    directions still conflict and may cancel. A gradient that vanishes gets weight 0 and the others its share.

    Buffers: `average` (moving average of the squared norms, f64 [m]) and `steps`.

    Source: the scale balancer of arXiv:2210.13438, section 3.4 (there per output, averaged with decay 0.999); for terms of an objective
    arXiv:1711.02257 with alpha = 0, solved instead of followed.

    Example:
        >>> Normalised().weigh(torch.tensor([[1.0, 0.0], [0.0, 9.0]]), torch.zeros(2))
        tensor([2.0000, 0.6667], dtype=torch.float64)
    """

    formula: ClassVar[str] = "normalised"
    total: ClassVar[str] = "m"
    average: Tensor
    steps: Tensor

    def __init__(
        self, preference: Sequence[float] | None = None, decay: float = 0.0, norm: float | None = None
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"normalised: decay lies in [0, 1), and it is {decay}.")
        if norm is not None and not 0 < norm < float("inf"):
            raise InputError(f"normalised: norm is positive and finite, and it is {norm}.")
        self.preference, self.decay, self.norm = stated(self.formula, preference), float(decay), norm
        self.keep("average")
        self.keep("steps", torch.tensor(0, dtype=torch.int64))

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m], at least 0."""
        # The average of this step is looked ahead to, so the first step has one already.
        squared = np.maximum(array(self._average(gram)) / (1 - self.decay ** (int(self.steps) + 1)), 0.0)
        norms = np.sqrt(squared)
        shares = spread(self.formula, self.preference, len(norms), 1.0) * (norms > 0)
        if not shares.any():
            return torch.zeros(len(norms), dtype=torch.float64)
        total = float(norms.sum()) if self.norm is None else self.norm
        weights = np.divide(total * shares / shares.sum(), norms, out=np.zeros_like(norms), where=norms > 0)
        return torch.from_numpy(weights)

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Take the norms of this step into the average."""
        self.average = self._average(gram)
        self.steps = self.steps + 1

    def _average(self, gram: Tensor) -> Tensor:
        squared = gram.diagonal().double().cpu()
        before = self.average if self.average.numel() else torch.zeros_like(squared)
        return self.decay * before + (1 - self.decay) * squared
