"""One gradient for each term, on the parameters that terms share: what every balancer looks at.

    table = problem.table({"a": ("cross_entropy",), "b": ("kl",)})     # one forward, one backward a row
    table = GradientTable.of({"a": loss_a, "b": loss_b}, parameters)    # from losses of one graph, in anybody's loop
    table.gram                                                        # G_ij = <g_i, g_j>
    table.combine(weights)                                            # sum_i w_i g_i, a term's own parameters with weight 1

Which parameters are shared is found out, not declared: those that two rows or more reach. What one row alone reaches (a head, a
critic) trains at weight 1 whatever the balancer says, since no other term has a say in it. `poise.weights.feature_table` has the same
table on shared activations, at the cost of one backward pass through what lies below them.
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
            times = reached(rows)
            shared = [name for name, count in times.items() if count > 1 or everything]
        self.shared = tuple(shared)
        for label, row in zip(self.labels, self.rows, strict=True):
            if not everything and not any(name in row for name in self.shared):
                raise InputError(
                    f"{label} has no gradient on a parameter that another term reaches as well, so there is nothing to balance. "
                    "Give it a fixed weight, or name the shared parameters with shared=..."
                )

    @classmethod
    def of(
        cls,
        losses: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        shared: Sequence[str] | str | None = None,
    ) -> GradientTable:
        """Make the table from losses of one forward pass: one backward pass each.

        Args:
            losses: 0-dim, by label.
            parameters: what is trained, by name.
            shared: see the class.

        Example:
            >>> w = torch.ones(2, requires_grad=True)
            >>> table = GradientTable.of({"a": w.sum(), "b": (w * w).sum()}, {"w": w})
            >>> table.gram
            tensor([[2., 4.],
                    [4., 8.]], dtype=torch.float64)
        """
        points = list(parameters.values())
        rows: list[Gradient] = []
        for i, loss in enumerate(losses.values()):
            if not loss.requires_grad:
                rows.append({})
                continue
            found = torch.autograd.grad(loss, points, retain_graph=i + 1 < len(losses), allow_unused=True)
            rows.append({n: g for n, g in zip(parameters, found, strict=True) if g is not None})
        return cls(tuple(losses), torch.stack([loss.detach().double() for loss in losses.values()]), rows, shared)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products `<g_i, g_j>` on the shared parameters, f64 [m, m]."""
        # One small matrix for each parameter, all on their way to the host together: a device waits once, not for every parameter.
        places: list[list[int]] = []
        parts: list[Tensor] = []
        for name in self.shared:
            where = [i for i, row in enumerate(self.rows) if name in row]
            if where:
                places.append(where)
                parts.append(products([self.rows[i][name] for i in where]).double().flatten())
        gram = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64)
        if not parts:
            return gram
        device = parts[0].device
        numbers = torch.cat([part.to(device) for part in parts]).cpu()
        for where, part in zip(places, torch.split(numbers, [len(w) ** 2 for w in places]), strict=True):
            index = torch.tensor(where)
            gram[index[:, None], index] += part.view(len(where), len(where))
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
        return weighted_sum(self.rows, weights.tolist(), frozenset(self.shared))


def reached(rows: Sequence[Gradient]) -> dict[str, int]:
    """Return how many rows reach each parameter, by name."""
    times: dict[str, int] = {}
    for row in rows:
        for name in row:
            times[name] = times.get(name, 0) + 1
    return times


_CHUNK = 32768
"""Entries of each row that are multiplied at a time: what a core's cache holds for some ten rows."""


def products(gradients: Sequence[Tensor]) -> Tensor:
    """Return the inner products of tensors of one shape, [k, k], in float32 at least."""
    flat = [g.reshape(-1) for g in gradients]
    if flat[0].dtype in (torch.float16, torch.bfloat16):
        flat = [g.float() for g in flat]
    if flat[0].is_cuda or len(flat[0]) <= 2 * _CHUNK:
        rows = torch.stack(flat)
        return rows @ rows.T
    # A processor reads every gradient once, and the copy that the product wants never leaves the cache.
    total = flat[0].new_zeros(len(flat), len(flat))
    for parts in zip(*(torch.split(g, _CHUNK) for g in flat), strict=True):
        rows = torch.stack(parts)
        total.addmm_(rows, rows.T)
    return total


def weighted_sum(rows: Sequence[Gradient], weights: Sequence[float], weighed: frozenset[str]) -> dict[str, Tensor]:
    """Return the weighted sum of rows on the names that are weighed, and the plain sum on all others."""
    total: dict[str, Tensor] = {}
    for weight, row in zip(weights, rows, strict=True):
        for name, g in row.items():
            factor = weight if name in weighed else 1.0
            if name in total:
                total[name].add_(g, alpha=factor)
            else:
                total[name] = g * factor
    return total
