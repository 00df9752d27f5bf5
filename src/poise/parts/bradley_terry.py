"""A reward model from preference pairs: the baseline that rewards without preferences are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError, StateError
from poise.parts.text_encoders import Encoder, encode

__all__ = ["BradleyTerry"]


class BradleyTerry:
    """A linear reward on frozen features, fitted to pairs by the Bradley-Terry likelihood.

    P(chosen > rejected) = sigmoid(r_chosen - r_rejected),   r(x, y) = <w, f(x, y)>,
    f = (M(y), M(x) * M(y), <M(x), M(y)>, log(1 + words in y)), each scaled to unit spread over the training answers

    minimised: mean softplus(r_rejected - r_chosen) + l2 |w|^2 / 2, convex, by Newton's steps to its optimum.

    Args:
        encoder: list[str] -> float [n, d].
        l2: penalty, > 0.

    Example:
        >>> encoder = lambda texts: [[1.0 if "good" in text else 0.0] for text in texts]
        >>> model = BradleyTerry(encoder).fit(["q", "q"], ["a good one", "good too"], ["a bad one", "bad too"])
        >>> good, bad = model(["q", "q"], ["good", "bad"])
        >>> bool(good > bad)
        True

    Source: Bradley and Terry 1952; the open reward models of arXiv:2402.03469, section 2, are of this form.
    """

    def __init__(self, encoder: Encoder, l2: float = 1e-2) -> None:
        if not l2 > 0:
            raise InputError(f"BradleyTerry: l2 must be positive, and it is {l2}.")
        self.encoder, self.l2 = encoder, l2
        self.weight: Tensor | None = None
        self.scale: Tensor | None = None

    def fit(self, query: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> BradleyTerry:
        """Fit to pairs, and return the model."""
        if not len(query) == len(chosen) == len(rejected) or not query:
            raise InputError(
                f"BradleyTerry.fit: expected as many queries as chosen and rejected answers, at least one; got {len(query)}, "
                f"{len(chosen)} and {len(rejected)}."
            )
        a, b = self._features(query, chosen), self._features(query, rejected)
        spread = torch.cat([a, b]).std(dim=0, correction=0)
        self.scale = torch.where(spread > 1e-9, 1 / spread.clamp(min=1e-9), torch.zeros_like(spread))
        self.weight = _optimum((a - b) * self.scale, self.l2)
        return self

    def __call__(self, query: Sequence[str], response: Sequence[str]) -> Tensor:
        """Reward of each answer, float64 [n]; only differences between answers to one query mean something."""
        if self.weight is None or self.scale is None:
            raise StateError("BradleyTerry: fit it to pairs first, `model.fit(query, chosen, rejected)`.")
        return (self._features(query, response) * self.scale) @ self.weight

    def accuracy(self, query: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> float:
        """Share of pairs whose chosen answer gets the higher reward."""
        return float((self(query, chosen) > self(query, rejected)).double().mean())

    def _features(self, query: Sequence[str], response: Sequence[str]) -> Tensor:
        x, y = encode(self.encoder, query), encode(self.encoder, response)
        words = torch.tensor([[float(len(text.split()))] for text in response], dtype=torch.float64, device=y.device)
        return torch.cat([y, x * y, (x * y).sum(dim=1, keepdim=True), words.log1p()], dim=1)


def _optimum(difference: Tensor, l2: float, steps: int = 100) -> Tensor:
    """Newton's method with halving for mean softplus(-<w, d>) + l2 |w|^2 / 2."""
    n, width = difference.shape
    w = difference.new_zeros(width)

    def value(at: Tensor) -> Tensor:
        return functional.softplus(-difference @ at).mean() + l2 / 2 * at.square().sum()

    for _ in range(steps):
        p = torch.sigmoid(-difference @ w)
        gradient = l2 * w - difference.T @ p / n
        if float(gradient.abs().max()) < 1e-10:
            break
        curvature = difference.T @ (difference * (p * (1 - p))[:, None]) / n
        step = torch.linalg.solve(curvature + l2 * torch.eye(width, dtype=w.dtype, device=w.device), gradient)
        size, before = 1.0, value(w)
        while value(w - size * step) > before and size > 1e-8:
            size /= 2
        w = w - size * step
    return w
