"""What samples of one prompt say about each other: sums, leave-one-out means and normalisers within groups.

`group` int64 `[batch]` says which prompt each sample answers, with any numbers; None makes the whole batch one group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Groups", "group_size", "group_sum", "leave_one_out", "log_mean_exp"]


class Groups:
    """Statistics within groups of rows, without a loop over groups and without waiting for an accelerator.

    Args:
        group: int64 [batch], any numbers; rows of one number are one group, wherever they stand.

    >>> Groups(torch.tensor([7, 2, 7])).mean(torch.tensor([1.0, 5.0, 3.0]))
    tensor([2., 5., 2.])
    """

    def __init__(self, group: Tensor) -> None:
        order = group.argsort(stable=True)
        new = torch.zeros_like(group)
        new[1:] = group[order].diff() != 0
        self.number = torch.empty_like(group).scatter_(0, order, new.cumsum(0))
        """int64 [batch]: groups numbered from 0 in the order of their numbers."""

    def sum(self, x: Tensor) -> Tensor:
        """Return each row's sum over its group, [batch]."""
        return x.new_zeros(len(x)).index_add(0, self.number, x)[self.number]

    def size(self, like: Tensor) -> Tensor:
        """Return how many rows each row's group has, [batch], in the dtype of `like`."""
        return self.sum(torch.ones_like(like))

    def mean(self, x: Tensor) -> Tensor:
        """Return each row's mean over its group, [batch]."""
        return self.sum(x) / self.size(x)

    def std(self, x: Tensor, correction: int = 1) -> Tensor:
        """Return each row's standard deviation over its group, [batch]; 0 in a group of `correction` rows or fewer."""
        freedom = self.size(x) - correction
        return (self.sum((x - self.mean(x)).square()) / freedom.clamp(min=1)).sqrt()

    def extreme(self, x: Tensor, reduce: Literal["amax", "amin"]) -> Tensor:
        """Return each row's largest or smallest value over its group, [batch]."""
        return torch.empty_like(x).scatter_reduce(0, self.number, x, reduce, include_self=False)[self.number]

    def best(self, x: Tensor) -> Tensor:
        """Mark one row of each group, the first of the largest, bool [batch]."""
        rows = torch.arange(len(x), device=x.device)
        candidates = torch.where(x == self.extreme(x, "amax"), rows, len(x))
        return rows == self.extreme(candidates, "amin")


def _groups(values: Tensor, group: Tensor | None) -> Groups:
    return Groups(torch.zeros(len(values), dtype=torch.int64, device=values.device) if group is None else group)


def group_sum(values: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the sum over each sample's group, float `[batch]`."""
    return _groups(values, group).sum(values)


def group_size(values: Tensor, group: Tensor | None = None) -> Tensor:
    """Return how many samples each sample's group has, float `[batch]`."""
    return group_sum(torch.ones_like(values), group)


def leave_one_out(values: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the mean of the others of the group: `(sum - x_i) / (n - 1)`, and 0 for a group of one.

    A baseline must not depend on the sample that it is subtracted from, or it biases the gradient.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    tensor([4.0000, 3.5000, 1.5000])
    """
    size = group_size(values, group)
    return torch.where(size > 1, (group_sum(values, group) - values) / (size - 1).clamp_min(1), 0.0)


def log_mean_exp(values: Tensor, group: Tensor | None = None) -> Tensor:
    """Return `log mean exp(values)` over each sample's group, float `[batch]`; -inf where all of a group are."""
    place = _groups(values, group).number
    top = torch.full_like(values, -torch.inf).scatter_reduce(0, place, values.detach(), "amax")
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.zeros_like(values).index_add(0, place, (values - top[place]).exp())
    return (total.log() + top)[place] - group_size(values, group).log()
