"""A small network that says how much each token of an answer counts, from the hidden states of a frozen reference.

    mask = TokenMask(layers=12, width=768)
    m = mask(states)                        # states [layers, batch, time, width] -> m [batch, time] >= 0, mostly 0

It is trained with the model that the loss belongs to; `sparse_po` of `poise.terms` holds one or two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.operators import rescaled
from poise.quantities import derive

__all__ = ["MaskReport", "TokenMask", "mask_report"]

Kind = Literal["all", "last", "mlp", "random", "binary"]
KINDS = ("all", "last", "mlp", "random", "binary")
HIDDEN = 200


class TokenMask(nn.Module):
    """Weigh tokens by what every layer of a frozen model computed before them.

    g_l = drop(relu(w_l . LN(h_l) + b_l)),     m = drop(relu(sum_l v_l g_l))

    The normalisation is one for all layers. There is no upper bound on m. Weights begin as those of a linear layer do, but v
    positive and b at 1/2: with negative v the network may begin dead, 0 at every token, and then nothing ever moves it.

    Args:
        layers, width: of the states.
        activation: "relu"; "rescale": to [0, 1] over the answer's tokens; None: none within layers, so that they may cancel; m is
            cut at 0 all the same.
        kind: "all"; "last": the last layer alone, without a mixer; "mlp": width -> 200 -> 1 for each layer, linear between; "binary":
            1 where m > 0, no gradient; "random": uniform on [0, 1], a control.
        dropout: share, in [0, 1).
        seed: of the first weights.

    Raises:
        InputError: sizes below 1, a share outside [0, 1), an unknown kind or activation.

    Example:
        >>> TokenMask(2, 4)(torch.randn(2, 3, 5, 4)).shape
        torch.Size([3, 5])

    Source: arXiv:2410.05102; the folder SparsePO of huawei-noah/HEBO.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        activation: Literal["relu", "rescale"] | None = "relu",
        kind: Kind = "all",
        dropout: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise InputError(
                f"token_mask: layers and width are those of the reference, at least 1, and they are {layers} and {width}."
            )
        if kind not in KINDS:
            raise InputError(f"token_mask: kind is one of {', '.join(map(repr, KINDS))}, and it is {kind!r}.")
        if activation not in ("relu", "rescale", None):
            raise InputError(f"token_mask: activation is 'relu', 'rescale' or None, and it is {activation!r}.")
        if not 0 <= dropout < 1:
            raise InputError(f"token_mask: dropout is a share in [0, 1), and it is {dropout}.")
        self.layers, self.width, self.activation, self.kind, self.dropout = layers, width, activation, kind, dropout
        if kind != "random":
            self.norm = nn.LayerNorm(width)
            self._draw(seed)

    def _draw(self, seed: int) -> None:
        count = 1 if self.kind == "last" else self.layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "token mask"))

            def uniform(*shape: int, fan: int) -> nn.Parameter:
                return nn.Parameter((2 * torch.rand(*shape) - 1) / fan**0.5)

            if self.kind == "mlp":
                self.first = uniform(count, HIDDEN, self.width, fan=self.width)
                self.first_bias = nn.Parameter(torch.zeros(count, HIDDEN))
                self.weight = uniform(count, HIDDEN, fan=HIDDEN)
            else:
                self.weight = uniform(count, self.width, fan=self.width)
            self.bias = nn.Parameter(torch.full((count,), 0.5))
            if count > 1:
                self.mixer = nn.Parameter(uniform(count, fan=count).detach().abs())

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return m float [batch, time].

        Args:
            states: float [layers, batch, time, width].
            mask: bool [batch, time], the answer's tokens; outside m is 0.

        Raises:
            QuantityError: states of another depth or width.
        """
        if states.ndim != 4 or (states.shape[0], states.shape[3]) != (self.layers, self.width):
            raise QuantityError(
                f"token_mask: states are [layers = {self.layers}, batch, time, width = {self.width}], and they are "
                f"{list(states.shape)}. Give the reference's sizes: layers={states.shape[0]}, width={states.shape[-1]}."
            )
        if self.kind == "random":
            m = torch.rand(states.shape[1:3], device=states.device, dtype=states.dtype)
        else:
            m = self._activated(self._scores(states.detach()), mask)
            m = F.dropout(m, self.dropout, self.training)
            m = (m > 0).to(m.dtype) if self.kind == "binary" else m
        return m if mask is None else torch.where(mask, m, 0.0)

    def _scores(self, states: Tensor) -> Tensor:
        """Mix the layers: sum_l v_l g_l, [batch, time]."""
        total: Tensor | None = None
        # Layer by layer, so that one of them at a time is normalised.
        for place, layer in enumerate(states[-1:] if self.kind == "last" else states):
            x = self.norm(layer.to(self.weight.dtype))
            if self.kind == "mlp":
                # Both maps are linear, so they are one: w (A x + a) = (w A) x + w a.
                w, b = self.weight[place] @ self.first[place], self.weight[place] @ self.first_bias[place]
                g = x @ w + b + self.bias[place]
            else:
                g = x @ self.weight[place] + self.bias[place]
            if len(self.weight) == 1:
                return g  # type: ignore[no-any-return]
            g = F.relu(g) if self.activation == "relu" else g
            g = self.mixer[place] * F.dropout(g, self.dropout, self.training)
            total = g if total is None else total + g
        assert total is not None
        return total

    def _activated(self, m: Tensor, mask: Tensor | None) -> Tensor:
        if self.activation == "rescale":
            return rescaled(m, torch.ones_like(m, dtype=torch.bool) if mask is None else mask)
        return F.relu(m)

    @torch.no_grad()
    def revive(self, states: Tensor, mask: Tensor | None = None, tries: int = 20) -> bool:
        """Draw the first weights anew while they give 0 at every token of these states; return whether that was needed.

        Raises:
            QuantityError: no draw of `tries` lives.
        """
        if self.kind == "random":
            return False
        training = self.training
        self.eval()
        try:
            for number in range(tries):
                if bool((self(states, mask) > 0).any()):
                    return number > 0
                fresh = TokenMask(self.layers, self.width, self.activation, self.kind, self.dropout, seed=number + 1)
                self.load_state_dict(fresh.state_dict())
        finally:
            self.train(training)
        raise QuantityError(f"token_mask: {tries} draws of the weights all give 0 at every token of these states.")


@dataclass(frozen=True)
class MaskReport:
    """What a mask does to the tokens of answers.

    Attributes:
        sparsity: share of the tokens at 0.
        mean: over all tokens; where it grows without end, the effective beta does.
        l1: sum over the tokens, mean over answers.
        counts: histogram of the values. edges: its bins' limits, one more.
        dead: whether every token is at 0, so that nothing is learned.
    """

    sparsity: float
    mean: float
    l1: float
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    dead: bool

    def __str__(self) -> str:
        dead = "; DEAD: no token counts, so nothing is learned" if self.dead else ""
        return f"{self.sparsity:.0%} of the tokens at 0, mean {self.mean:.3f}, L1 {self.l1:.2f} an answer{dead}"


def mask_report(values: Tensor, mask: Tensor, bins: int = 10) -> MaskReport:
    """Describe a mask's values on answers.

    Args:
        values: float [batch, time].
        mask: bool [batch, time].
        bins: of the histogram.

    Raises:
        QuantityError: no answer token at all.

    >>> print(mask_report(torch.tensor([[0.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool)))
    50% of the tokens at 0, mean 1.000, L1 2.00 an answer
    """
    inside = values.detach()[mask].float().cpu()
    if not len(inside):
        raise QuantityError("mask_report: there is no answer token.")
    counts, edges = torch.histogram(inside, bins, range=(0.0, max(float(inside.max()), 1e-12)))
    return MaskReport(
        sparsity=float((inside == 0).float().mean()),
        mean=float(inside.mean()),
        l1=float(inside.abs().sum() / len(mask)),
        counts=tuple(int(c) for c in counts),
        edges=tuple(edges.tolist()),
        dead=not bool(inside.any()),
    )
