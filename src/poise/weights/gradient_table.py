"""One gradient for each term, on the parameters that terms share: what every balancer looks at.

    table = problem.table({"a": ("cross_entropy",), "b": ("kl",)})     # one forward, one backward a row
    table.gram                                                        # G_ij = <g_i, g_j>
    table.combine(weights)                                            # sum_i w_i g_i, a term's own parameters with weight 1

Which parameters are shared is found out, not declared: those that two rows or more reach. What one row alone reaches (a head, a
critic) trains at weight 1 whatever the balancer says, since no other term has a say in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from poise.errors import InputError

Gradient = Mapping[str, Tensor]


class GradientTable:
    """Per-row gradients by parameter name.

    Args:
        labels: names of the rows.
        values: their values, f64 [m].
        rows: their gradients; a parameter that a row does not reach is absent.
        shared: names of the parameters that are weighed; by default those that two rows or more reach; "all" for whatever a row reaches.

    Raises:
        InputError: a row reaches no shared parameter, or no two rows share any.
    """

    def __init__(
        self, labels: Sequence[str], values: Tensor, rows: Sequence[Gradient], shared: Sequence[str] | str | None = None
    ) -> None:
        self.labels, self.values, self.rows = tuple(labels), values.detach().double(), tuple(rows)
        everything = shared == "all" or len(rows) == 1
        if shared is None or shared == "all":
            reached: dict[str, int] = {}
            for row in rows:
                for name in row:
                    reached[name] = reached.get(name, 0) + 1
            shared = [name for name, times in reached.items() if times > 1 or everything]
        self.shared = tuple(shared)
        for label, row in zip(self.labels, self.rows, strict=True):
            if not everything and not any(name in row for name in self.shared):
                raise InputError(
                    f"{label} has no gradient on a parameter that another term reaches as well, so there is nothing to balance. "
                    "Give it a fixed weight, or name the shared parameters with shared=..."
                )

    @cached_property
    def gram(self) -> Tensor:
        """Inner products `<g_i, g_j>` on the shared parameters, f64 [m, m]."""
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64)
        for name in self.shared:
            places = [i for i, row in enumerate(self.rows) if name in row]
            found = _inner_products([self.rows[i][name].flatten() for i in places])
            gram[torch.tensor(places)[:, None], torch.tensor(places)] += found.double().cpu()
        return gram

    @property
    def norms(self) -> Tensor:
        """Euclidean norms on the shared parameters, f64 [m]."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosines between rows, f64 [m, m]; 0 where a gradient vanishes."""
        norms = self.norms
        return self.gram / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)

    def against(self, vector: Gradient) -> Tensor:
        """Return `<g_i, vector>` on the shared parameters, f64 [m]; a parameter that is absent is 0."""
        found = torch.zeros(len(self.rows), dtype=torch.float64)
        for name in self.shared:
            if name in vector:
                for i, row in enumerate(self.rows):
                    if name in row:
                        found[i] += torch.dot(row[name].flatten(), vector[name].flatten()).double().cpu()
        return found

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """Return `sum_i weights_i g_i` on the shared parameters, and the plain sum on all others.

        Args:
            weights: [m].
        """
        shared = frozenset(self.shared)
        total: dict[str, Tensor] = {}
        for weight, row in zip(weights.tolist(), self.rows, strict=True):
            for name, g in row.items():
                factor = weight if name in shared else 1.0
                if name in total:
                    total[name].add_(g, alpha=factor)
                else:
                    total[name] = g * factor
        return total


_LARGE, _FEW = 1 << 14, 6


def _inner_products(vectors: Sequence[Tensor]) -> Tensor:
    """Return the inner products of vectors of one length, [m, m]."""
    first = vectors[0]
    if first.device.type != "cpu" or len(first) < _LARGE or len(vectors) > _FEW:
        flat = torch.stack(list(vectors))
        return flat @ flat.T
    # A few long vectors in the processor's memory: putting them together copies them, which costs as much as their products.
    found = first.new_empty(len(vectors), len(vectors))
    for i, a in enumerate(vectors):
        for j in range(i, len(vectors)):
            found[i, j] = found[j, i] = torch.dot(a, vectors[j])
    return found
