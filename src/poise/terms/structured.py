"""Penalties that a proximal solver meets exactly: sparse weights, sparse groups, low rank, pieces, and sets.

Under a stochastic gradient method the finite ones shrink weights without making them exactly 0; `solver="proximal"` and `poise.solve`
do. A set is 0 inside and infinite outside, so only these two can minimise it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poise import operators, penalties
from poise.errors import InputError
from poise.penalties import Indicator
from poise.terms.parameters import PenaltyTerm


class ElasticNet(PenaltyTerm):
    """Absolute and squared weights: `ratio sum |w| + (1 - ratio)/2 sum w^2`.

    Args:
        ratio: share of the absolute values, in [0, 1].
        biases: charge vectors (biases, normalisation scales) too.

    Source: Zou and Hastie (2005).
    """

    formula = "elastic_net"
    equation = "ratio sum |w| + (1 - ratio)/2 sum w^2"
    source = "Zou and Hastie (2005)"

    def __init__(self, ratio: float = 0.5, biases: bool = False) -> None:
        super().__init__(biases)
        self.ratio, self.penalty = ratio, penalties.ElasticNet(ratio)


class GroupLasso(PenaltyTerm):
    """Whole groups of inputs leave together: `sum over groups of sqrt(inputs) ||w_group||`.

    A group takes its inputs with all their outputs: `groups=1` on a network's layer prunes its inputs one by one.

    Args:
        groups: neighbouring inputs of a group, or the group of every input, as integers.

    Source: Yuan and Lin (2006).
    """

    formula = "group_lasso"
    equation = "sum_g sqrt(|g|) ||w_g||"
    source = "Yuan and Lin (2006)"

    def __init__(self, groups: int | Sequence[int] = 1) -> None:
        super().__init__()
        self.groups, self.penalty = groups, penalties.GroupLasso(groups)


class NuclearNorm(PenaltyTerm):
    """The sum of the singular values of a weight matrix `[outputs, inputs]`: few directions remain."""

    formula = "nuclear_norm"
    equation = "sum of singular values of w"
    penalty = penalties.NuclearNorm()

    def __init__(self) -> None:
        super().__init__()


class FusedLasso(PenaltyTerm):
    """Differences of neighbouring inputs' weights: `sum |w_{j+1} - w_j|`; the weights become pieces of one height.

    For inputs in an order: times, wavelengths, places. `fused_lasso` is the total variation along the inputs.

    Source: Tibshirani et al. (2005); Rudin, Osher and Fatemi (1992).
    """

    formula = "fused_lasso"
    equation = "sum_j |w_{j+1} - w_j|"
    source = "Tibshirani et al. (2005)"
    penalty = penalties.TotalVariation()

    def __init__(self) -> None:
        super().__init__()


class L0(PenaltyTerm):
    """The number of weights that are not 0. It has no slope anywhere, so only a proximal map moves it.

    Args:
        biases: count vectors (biases, normalisation scales) too.
    """

    formula = "l0"
    equation = "||w||_0"
    penalty = penalties.L0()


class CappedL1(PenaltyTerm):
    """Absolute weights that cost no more from `cap` on: `sum min(|w|, cap)`.

    Args:
        cap: > 0.

    Source: Zhang (2008).
    """

    formula = "capped_l1"
    equation = "sum min(|w|, cap)"
    source = "Zhang (2008)"

    def __init__(self, cap: float = 1.0) -> None:
        super().__init__()
        self.cap, self.penalty = cap, penalties.CappedL1(cap)


class MCP(PenaltyTerm):
    """Minimax concave: `|w| - w^2 / (2 knee)` up to `knee`, flat from there, so large weights are not shrunk.

    The usual MCP of parameters lambda and gamma is `lambda*mcp(knee=gamma*lambda)`, with the product worked out.

    Args:
        knee: > 0.

    Source: Zhang (2010).
    """

    formula = "mcp"
    equation = "sum |w| - w^2/(2 knee) where |w| <= knee, else knee/2"
    source = "Zhang (2010)"

    def __init__(self, knee: float = 3.0) -> None:
        super().__init__()
        self.knee, self.penalty = knee, penalties.MCP(knee)


class SCAD(PenaltyTerm):
    """Smoothly clipped absolute deviation: `|w|` up to `knee`, bending over until `a knee`, flat from there.

    The usual SCAD of parameters lambda and a is `lambda*scad(knee=lambda, a=a)`.

    Args:
        knee: > 0.
        a: > 2.

    Source: Fan and Li (2001).
    """

    formula = "scad"
    equation = "sum |w| where |w| <= knee; slope (a knee - |w|) / ((a - 1) knee) until a knee; then flat"
    source = "Fan and Li (2001)"

    def __init__(self, knee: float = 1.0, a: float = 3.7) -> None:
        super().__init__()
        self.knee, self.a, self.penalty = knee, a, penalties.SCAD(knee, a)


# ---- sets ---------------------------------------------------------------------------------------------------------------


class SetTerm(PenaltyTerm):
    """0 where every charged parameter is in a set, infinite elsewhere: a constraint that a proximal map meets exactly."""

    capabilities = frozenset({"deterministic"})
    needs_proximal_solver = True

    def forward(self, parameters: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return super().forward(parameters)


class BoxSet(SetTerm):
    """Every weight between two bounds.

    Args:
        lower, upper: the bounds, which may be infinite.
        biases: bound vectors (biases, normalisation scales) too.
    """

    formula = "box"
    equation = "0 if lower <= w <= upper else inf"

    def __init__(self, lower: float = -1.0, upper: float = 1.0, biases: bool = False) -> None:
        super().__init__(biases)
        if not lower <= upper:
            raise InputError(f"box: lower must not exceed upper, and they are {lower} and {upper}.")
        self.lower, self.upper, self.penalty = lower, upper, Indicator(operators.Box(lower, upper))


class NonNegative(SetTerm):
    """No weight below 0.

    Args:
        biases: bound vectors (biases, normalisation scales) too.
    """

    formula = "nonnegative"
    equation = "0 if w >= 0 else inf"

    def __init__(self, biases: bool = False) -> None:
        super().__init__(biases)
        self.penalty = Indicator(operators.Box(0.0, math.inf))


class SimplexSet(SetTerm):
    """Every output's weights are shares: not negative, adding up to `total`.

    Args:
        total: > 0.
    """

    formula = "simplex"
    equation = "0 if w >= 0 and sum w = total else inf"

    def __init__(self, total: float = 1.0) -> None:
        super().__init__()
        # the sum of many shares is exact to rounding only
        self.total, self.penalty = total, Indicator(operators.Simplex(total), 1e-5 * total)


class SparseSimplex(SetTerm):
    """Every output's weights are shares, at most `k` of them not 0.

    Args:
        k: from 1.
        total: > 0.
    """

    formula = "sparse_simplex"
    equation = "0 if w >= 0, sum w = total and ||w||_0 <= k else inf"

    def __init__(self, k: int = 1, total: float = 1.0) -> None:
        super().__init__()
        self.k, self.total, self.penalty = k, total, penalties.SparseSimplex(k, total)
