"""What samples of one prompt say about each other: sums, leave-one-out means and normalisers within groups.

`group` int64 `[batch]` says which prompt each sample answers, with any numbers; None makes the whole batch one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_size", "group_sum", "leave_one_out", "log_mean_exp"]


def _places(values: Tensor, group: Tensor | None) -> Tensor:
    """Number the groups from 0, for each row. There are at most as many as rows, so nobody waits for a device to count them."""
    if group is None:
        return torch.zeros(len(values), dtype=torch.int64, device=values.device)
    order = group.argsort()
    new = torch.zeros_like(group)
    new[1:] = group[order].diff() != 0
    return torch.empty_like(group).scatter_(0, order, new.cumsum(0))


def group_sum(values: Tensor, group: Tensor | None = None) -> Tensor:
    """Return the sum over each sample's group, float `[batch]`."""
    place = _places(values, group)
    return torch.zeros_like(values).index_add(0, place, values)[place]


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
    place = _places(values, group)
    top = torch.full_like(values, -torch.inf).scatter_reduce(0, place, values.detach(), "amax")
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = torch.zeros_like(values).index_add(0, place, (values - top[place]).exp())
    return (total.log() + top)[place] - group_size(values, group).log()
