"""How coordinates are parted into fixed blocks.

order                  neighbours in their order
sort                   by Lipschitz constant: like with like, so L_b is not set by one large coordinate; the best of the fixed ones
avg                    large and small alternate
sort_rows, avg_rows    the same by `sum_j |H_ij|`
red_black, forest      independent sets and forests of the Hessian's graph, by falling Lipschitz constant
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError, nearest
from poise.solvers.coordinate_losses import CoordinateSmooth
from poise.solvers.message_passing import forest_partition, red_black

__all__ = ["PARTITIONS", "Partition", "part"]

PARTITIONS = ("order", "sort", "avg", "sort_rows", "avg_rows", "red_black", "forest")


class Partition:
    """Fixed blocks.

    Args:
        blocks: int64 coordinates of each; together every coordinate once.
        size: coordinates.
        forests: whether every block's graph is known to be a forest.

    Attributes:
        owner: int64 [size], the block of every coordinate.

    Raises:
        InputError: a coordinate is missing or stands twice.
    """

    def __init__(self, blocks: Sequence[Tensor], size: int, forests: bool = False) -> None:
        self.blocks, self.forests = [b.to(torch.int64) for b in blocks], forests
        every = torch.cat(self.blocks)
        count = torch.bincount(every, minlength=size) if len(every) and int(every.min()) >= 0 else every.new_zeros(size)
        if len(count) != size or bool((count != 1).any()):
            raise InputError(
                f"A partition holds every coordinate from 0 to {size - 1} once, and coordinate {int((count != 1).int().argmax())} stands "
                f"{int(count[(count != 1).int().argmax()])} times."
            )
        self.owner = every.new_empty(size)
        for number, block in enumerate(self.blocks):
            self.owner[block] = number

    def __len__(self) -> int:
        return len(self.blocks)


def part(rule: str | Sequence[Tensor], smooth: CoordinateSmooth, block_size: int) -> Partition:
    """Part the coordinates of a function by a rule, or take blocks as they are given.

    Raises:
        InputError: there is no such rule, or blocks do not hold every coordinate once.
        IncompatibleError: the rule needs a graph.
    """
    if not isinstance(rule, str):
        return Partition(rule, smooth.size)
    if rule not in PARTITIONS:
        raise InputError(
            f"BlockCoordinate: there is no partition {rule!r}."
            + (nearest(rule, PARTITIONS) or f" There are: {', '.join(PARTITIONS)}, or a list of blocks.")
        )
    if rule in ("red_black", "forest"):
        graph = graph_of(smooth, f"partition={rule!r}")
        order = smooth.lipschitz.argsort(descending=True, stable=True)
        split = red_black if rule == "red_black" else forest_partition
        return Partition(split(graph, order), smooth.size, forests=True)
    kind, _, by = rule.partition("_")
    if kind == "order":
        order = torch.arange(smooth.size)
    else:
        order = (smooth.row_sums if by else smooth.lipschitz).argsort(stable=True).cpu()
    if kind == "avg":
        ends = torch.stack([order, order.flip(0)], 1).flatten()
        order = ends[: smooth.size]
    # the last block may be smaller
    return Partition(torch.split(order.to(smooth.lipschitz.device), block_size), smooth.size)


def graph_of(smooth: CoordinateSmooth, asked: str) -> Any:
    """Return the sparse Hessian of a quadratic on a graph.

    Raises:
        IncompatibleError: the function has none.
    """
    graph = getattr(smooth, "h", None)
    if graph is None:
        raise IncompatibleError(
            f"BlockCoordinate: {asked} needs the graph of a sparse Hessian, which {type(smooth).__name__} does not "
            "have. Use it with QuadraticGraph."
        )
    return graph
