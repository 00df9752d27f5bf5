"""How far one cloud of points is from another: transport with at most k partners a point, as a loss."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.objective import Term, Value
from poise.operators import require_count
from poise.transport import transport_value

__all__ = ["TransportLoss", "pairwise_cost"]

Cost = Literal["squared_euclidean", "euclidean", "cosine", "given"]
_COSTS = ("squared_euclidean", "euclidean", "cosine", "given")


def pairwise_cost(x: Tensor, y: Tensor, kind: str = "squared_euclidean") -> Tensor:
    """Return the cost of every pair: half the squared distance, the distance, or 1 - cosine.

    Args:
        x, y: float [..., m, width] and [..., n, width].
        kind: "squared_euclidean" (with the factor one half), "euclidean" or "cosine".

    Returns:
        float [..., m, n].

    >>> pairwise_cost(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]]))
    tensor([[0.5000],
            [0.5000]])
    """
    if kind == "cosine":
        lengths = [v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny) for v in (x, y)]
        apart: Tensor = 1.0 - (x / lengths[0]) @ (y / lengths[1]).mT
        return apart
    if kind == "euclidean":
        return torch.cdist(x, y)
    # Differences of large squares lose digits; the clamp keeps equal points at 0.
    squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2.0 * x @ y.mT
    return 0.5 * squares.clamp_min(0.0)


class TransportLoss(Term):
    """Charge each example for the cheapest plan between two clouds of points, with at most k sources a target.

    L = max over alpha of  alpha'a - sum_j max over t in b_j Delta, ||t||_0 <= k of (alpha - c_j)'t - (gamma/2) ||t||^2

    the semi-dual of `min <T, C> + (gamma/2) ||T||^2` over plans with row sums a and column sums b. By Danskin's theorem its gradient
    in C is the plan, so nothing is unrolled; gradients in the masses are the potentials.

    Args:
        k: most nonzeros of a column of the plan: sources of a target point; None for no limit.
        gamma: strength of the squared norm, > 0, in units of cost / mass; masses sum to 1 where none are given.
        cost: "squared_euclidean" (with the factor one half), "euclidean" or "cosine" of `prediction` and `target`; "given" reads
            `transport_cost` instead.
        tolerance: largest marginal error, as a share of the mass.
        max_iter: most iterations of L-BFGS.

    Reads: `prediction` float [batch, points, width] and `target` float [batch, targets, width], or `transport_cost` float [batch,
        points, targets]; optional `row_mass` float [batch, points] and `column_mass` float [batch, targets], of equal sums.
    Returns: float [batch], in units of cost times mass.
    Publishes: `plan` [batch, points, targets], `marginal_error` [batch] and `nonzeros` [batch], the largest of a column.

    Raises:
        InputError: a wrong argument, or an example without a plan within the limit.

    Example:
        >>> cloud = torch.tensor([[[0.0], [1.0]]])
        >>> TransportLoss(k=1, gamma=0.1)(cloud, cloud + 2.0).values        # 0.5 * 2^2, and gamma/2 * (0.5^2 + 0.5^2)
        tensor([2.0250])

    Source: Liu, Puigcerver and Blondel, arXiv:2209.15466.
    """

    formula = "transport"
    equation: ClassVar[str] = (
        "min <T, C> + (gamma/2) ||T||^2,  T 1 = a, T' 1 = b, at most k nonzeros a column (semi-dual)"
    )
    source: ClassVar[str] = "arXiv:2209.15466"
    expects: ClassVar[dict[str, str]] = {
        "prediction": "float [batch, points, width]",
        "target": "float [batch, targets, width]",
        "transport_cost": "float [batch, points, targets]",
        "row_mass": "float [batch, points]",
        "column_mass": "float [batch, targets]",
    }

    def __init__(
        self,
        k: int | None = None,
        gamma: float = 1.0,
        cost: Cost = "squared_euclidean",
        tolerance: float = 1e-5,
        max_iter: int = 200,
    ) -> None:
        super().__init__()
        if k is not None:
            require_count("transport", k)
        if not gamma > 0:
            raise InputError(f"transport: gamma must be positive, and it is {gamma}.")
        if cost not in _COSTS:
            raise InputError(f"transport: cost is one of {', '.join(_COSTS)}, and it is {cost!r}.")
        if not (tolerance > 0 and max_iter >= 1):
            raise InputError(
                f"transport: tolerance and max_iter must be positive, and they are {tolerance} and {max_iter}."
            )
        self.k, self.gamma, self.cost, self.tolerance, self.max_iter = k, gamma, cost, tolerance, max_iter
        self._warned = False

    def readings(self) -> tuple[str, ...]:
        """Return what this configuration does not read: the points, or the cost."""
        return ("prediction", "target") if self.cost == "given" else ("transport_cost",)

    def requirements(self) -> tuple[str, ...]:
        """Return what this configuration needs: the cost, or the points."""
        return ("transport_cost",) if self.cost == "given" else ("prediction", "target")

    def forward(
        self,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
        transport_cost: Tensor | None = None,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
    ) -> Value:
        if self.cost == "given":
            assert transport_cost is not None
            matrix = transport_cost
        else:
            assert prediction is not None
            assert target is not None
            matrix = pairwise_cost(prediction, target.to(prediction.dtype), self.cost)
        value, plan, error = transport_value(
            matrix,
            row_mass,
            column_mass,
            k=self.k,
            gamma=self.gamma,
            tolerance=self.tolerance,
            max_iter=self.max_iter,
            name="transport",
        )
        self._warn_once(error)
        nonzeros = (plan > 0).sum(-2).amax(-1).to(value.dtype)
        return Value(value, extras={"plan": plan, "marginal_error": error, "nonzeros": nonzeros})

    def _warn_once(self, error: Tensor) -> None:
        missed = error > self.tolerance
        if not self._warned and bool(missed.any()):
            self._warned = True
            warnings.warn(
                f"transport: {int(missed.sum())} of {len(missed)} examples have a marginal error above {self.tolerance:g} (largest "
                f"{float(error.max()):.2g}): the k-th place ties, so the gradient is one of several. Take a larger k or gamma.",
                PoiseWarning,
                stacklevel=3,
            )
