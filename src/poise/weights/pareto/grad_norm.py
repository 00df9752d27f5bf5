"""GradNorm: weights that are trained until all terms train at the same rate."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.moving import Adam, MovingBalancer


class GradNorm(MovingBalancer):
    """Weights that descend on how far the gradients' norms are from what the terms' rates of training ask for.

    L_grad = sum_i | w_i |g_i| - Gbar r_i^alpha |,   Gbar = mean_j w_j |g_j|,   r_i = (L_i/L_i(0)) / mean_j (L_j/L_j(0))

    The target `Gbar r_i^alpha` is held constant, so the gradient in `w_i` is `sign(w_i |g_i| - target_i) |g_i|`. After every
    update of the model the weights take one step of Adam, are held at or above `smallest`, and are scaled back to sum m.

    Args:
        alpha: restoring force, at least 0: 0 gives all gradients the same norm, more pulls harder at terms that lag behind.
        lr: of the weights; the paper's 0.025.
        betas: Adam's.
        smallest: floor of a weight before scaling, positive: the paper's rule may cross 0, and a negative weight would climb.

    Scale: the weights sum to m; they begin at 1.

    When it fails: the values must be positive, because rates are ratios to the first value (a first value of 0, or one that is
    negative, is an error); losses whose minimum is not 0 have rates near 1 for ever. It is slow by design: about `1/lr` steps for
    a weight to change by 1, so a jump in scale takes long to be balanced.

    Buffers: `weight`, `initial` (the first values), Adam's under `optimizer`.

    Source: arXiv:1711.02257, eq. 1 and 2, algorithm 1 (the paper takes the last shared layer; here what the table of gradients has).

    Example:
        >>> rule = GradNorm(alpha=0.0)
        >>> rule.move(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.ones(2))
        >>> rule.weigh(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.ones(2))
        tensor([1.0250, 0.9750], dtype=torch.float64)
    """

    formula: ClassVar[str] = "grad_norm"
    total: ClassVar[str] = "m"
    weight: Tensor
    initial: Tensor

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        betas: tuple[float, float] = (0.9, 0.999),
        smallest: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 0 <= alpha < float("inf"):
            raise InputError(f"grad_norm: alpha is at least 0 and finite, and it is {alpha}.")
        if not 0 < smallest < 1:
            raise InputError(f"grad_norm: smallest lies in (0, 1), and it is {smallest}.")
        self.alpha, self.smallest = float(alpha), float(smallest)
        self.keep("weight")
        self.keep("initial")
        self.optimizer = Adam(self.formula, lr, betas)

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m], positive, with sum m."""
        return self.weight.clone() if self.weight.numel() else torch.ones(len(gram), dtype=torch.float64)

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Take one step on `L_grad`.

        Raises:
            InputError: a first value that is not positive.
        """
        norms = gram.diagonal().double().cpu().clamp_min(0).sqrt()
        values = values.double().cpu()
        weight = self.weigh(gram, values)
        if not self.initial.numel():
            if not bool((values > 0).all()):
                raise InputError(
                    f"grad_norm: rates of training are ratios to the first values, which must be positive; they are {values.tolist()}. "
                    "Shift the term, or use normalised, which looks at gradients alone."
                )
            self.initial = values.clone()
        rate = (values / self.initial).clamp_min(0)
        # All terms at 0: none lags behind.
        rate = rate / rate.mean() if float(rate.mean()) > 0 else torch.ones_like(rate)
        target = (weight * norms).mean() * rate**self.alpha
        weight = self.optimizer.step(weight, (weight * norms - target).sign() * norms)
        weight = weight.clamp_min(self.smallest)
        self.weight = weight * (len(weight) / weight.sum())
