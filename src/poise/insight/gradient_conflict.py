"""How the gradients of terms stand to each other, and what a combination of them does to every term.

    cos_ij = <g_i, g_j>/(|g_i| |g_j|)          a conflict where it is negative
    change_i = -lr <d, g_i>,  d = sum_j w_j g_j     what a step along -d does to term i, to first order

Everything follows from the Gram matrix, so the report costs nothing once a table of gradients is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.gradient_table import GradientTable

__all__ = ["ConflictReport", "conflict_report"]


@dataclass(frozen=True)
class ConflictReport:
    """What the gradients of one step say.

    Attributes:
        labels: the terms, in the order of all that follows.
        norms: lengths of the gradients, f64 [m].
        cosines: f64 [m, m]; 0 for a gradient that vanishes.
        conflicts: pairs with a negative cosine, the worst first: label, label, cosine.
        weights: of the combination, f64 [m].
        shares: length of every weighted gradient over their sum, f64 [m]: who makes the step.
        changes: first-order change of every term, f64 [m]; negative is a fall.
        rising: the terms that rise.
        cancelled: `1 - |d|/sum_j |w_j g_j|`, in [0, 1]: how much of the step the terms take from each other.
    """

    labels: tuple[str, ...]
    norms: Tensor
    cosines: Tensor
    conflicts: tuple[tuple[str, str, float], ...]
    weights: Tensor
    shares: Tensor
    changes: Tensor
    rising: tuple[str, ...]
    cancelled: float

    def __str__(self) -> str:
        width = max(len(label) for label in ("term", *self.labels))
        lines = [f"{'term':<{width}}  {'norm':>9}  {'weight':>9}  {'share':>6}  {'change':>10}"]
        for i, label in enumerate(self.labels):
            lines.append(
                f"{label:<{width}}  {float(self.norms[i]):>9.3g}  {float(self.weights[i]):>9.3g}  {float(self.shares[i]):>6.1%}"
                f"  {float(self.changes[i]):>+10.3g}{'  rises' if label in self.rising else ''}"
            )
        pairs = ", ".join(f"{a} and {b} ({cosine:+.2f})" for a, b, cosine in self.conflicts)
        lines.append(f"conflicts: {pairs or 'none'}; {self.cancelled:.0%} of the step cancels")
        return "\n".join(lines)


def conflict_report(
    table: GradientTable, weights: Tensor | Mapping[str, float] | None = None, lr: float = 1.0
) -> ConflictReport:
    """Return cosines, conflicts, and the first-order change of every term under a combination.

    Args:
        table: of gradients on parameters, or on features (the change is then that of a step in the features).
        weights: [m], or by label; by default 1 each, the plain sum.
        lr: length of the step along `-d`.

    Raises:
        InputError: weights for other terms.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> table = GradientTable.of({"a": w[0] + w[1], "b": w[0] - 3 * w[1]}, {"w": w})
        >>> print(conflict_report(table))
        term       norm     weight   share      change
        a          1.41          1   30.9%          +0
        b          3.16          1   69.1%          -8
        conflicts: a and b (-0.45); 38% of the step cancels
    """
    m = len(table.labels)
    w = _weights(table.labels, weights)
    gram, norms, cosines = table.gram, table.norms, table.cosines
    pairs = [(i, j) for i in range(m) for j in range(i) if float(cosines[i, j]) < 0]
    pairs.sort(key=lambda pair: float(cosines[pair]))
    slopes = gram @ w
    parts = w.abs() * norms
    whole = float(parts.sum())
    # What rounding of the Gram matrix leaves of a slope that is 0 does not count as a rise.
    rising = slopes < -1e-12 * norms * max(whole, torch.finfo(torch.float64).tiny)
    length = float((w @ slopes).clamp_min(0).sqrt())
    return ConflictReport(
        table.labels,
        norms,
        cosines,
        tuple((table.labels[j], table.labels[i], float(cosines[i, j])) for i, j in pairs),
        w,
        parts / whole if whole else torch.zeros_like(parts),
        -lr * slopes + 0.0,
        tuple(label for label, rises in zip(table.labels, rising.tolist(), strict=True) if rises),
        1 - length / whole if whole else 0.0,
    )


def _weights(labels: tuple[str, ...], weights: Tensor | Mapping[str, float] | None) -> Tensor:
    if weights is None:
        return torch.ones(len(labels), dtype=torch.float64)
    if isinstance(weights, Mapping):
        missing = [label for label in labels if label not in weights]
        if missing:
            raise InputError(f"conflict_report: no weight for {', '.join(missing)}.")
        return torch.tensor([float(weights[label]) for label in labels], dtype=torch.float64)
    if weights.shape != (len(labels),):
        raise InputError(
            f"conflict_report: weights has one number a term, {len(labels)} in all, and its shape is {list(weights.shape)}."
        )
    return weights.detach().double().cpu()
