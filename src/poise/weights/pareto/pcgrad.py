"""Gradient surgery: every gradient loses the part that points against another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.moving import MovingBalancer


class PCGrad(MovingBalancer):
    """The sum of the gradients after each was projected, one conflict at a time, on the normal planes of those it conflicts with.

    for every i, for j != i in order:   g_i' <- g_i' - min(0, <g_i', g_j>)/|g_j|^2 g_j;     d = sum_i g_i'

    The rule is linear in the gradients once the signs are known, so it is written on weights, from the Gram matrix alone.

    Args:
        order: "index" visits the others in the order of the formula, the same in every step; "random" in a new order each step and row,
            as the paper does. With two terms there is one order.
        generator: where random orders come from; its state is copied, and kept with the balancer's own.
        seed: of the generator, where none is given.

    Scale: without conflict all weights are 1 (sum m: the plain sum of the terms); conflicts raise them, none falls below 1.

    When it fails: with three terms or more the answer depends on the order, and a conflict that a later projection reopens stays; `upgrad`
    has neither fault. Terms are not balanced in scale. In exact opposition the step is 0.

    Source: arXiv:2001.06782, algorithm 1.

    Example:
        >>> PCGrad().weigh(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), torch.zeros(2))
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """

    formula: ClassVar[str] = "pcgrad"
    total: ClassVar[str] = "m"
    random_state: Tensor

    def __init__(self, order: str = "index", generator: torch.Generator | None = None, seed: int = 0) -> None:
        super().__init__()
        if order not in ("index", "random"):
            raise InputError(f"pcgrad: order is 'index' or 'random', and it is {order!r}.")
        self.order = order
        self.keep_random_state(generator, seed)

    def weigh(self, gram: Tensor, values: Tensor) -> Tensor:
        """Return the weights f64 [m], at least 1."""
        m = len(gram)
        orders = [range(m)] * m if self.order == "index" else self._orders(m)
        g: list[list[float]] = gram.tolist()
        total = [0.0] * m
        for i, order in enumerate(orders):
            # Inner products of g_i' with all gradients, moved along with its weights.
            products, weights = list(g[i]), [0.0] * m
            weights[i] = 1.0
            for j in order:
                if j != i and products[j] < 0 < g[j][j]:
                    step = products[j] / g[j][j]
                    weights[j] -= step
                    products = [p - step * q for p, q in zip(products, g[j], strict=True)]
            total = [t + w for t, w in zip(total, weights, strict=True)]
        return torch.tensor(total, dtype=torch.float64)

    def _orders(self, m: int) -> list[list[int]]:
        generator = self.random_numbers()
        return [torch.randperm(m, generator=generator).tolist() for _ in range(m)]

    def move(self, gram: Tensor, values: Tensor) -> None:
        """Go on to the next random orders."""
        if self.order == "random":
            m = len(gram)
            self.take_random_numbers(lambda generator: [torch.randperm(m, generator=generator) for _ in range(m)])
