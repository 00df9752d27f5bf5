"""What several processes must agree on, in the few words that the rest of Poise needs.

Without an initialised process group every function here is the identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_AVAILABLE = dist.is_available()


def size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _AVAILABLE and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def sum_across(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over the processes; same shape everywhere, no gradient."""
    if size() == 1:
        return tensor
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total)
    return total


def sum_gradients(gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients summed over the processes, in one message for each dtype."""
    if size() == 1 or not gradients:
        return gradients
    result = list(gradients)
    # In the order of the gradients, which every process shares; that of a set may differ.
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        places = [i for i, g in enumerate(gradients) if g.dtype == dtype]
        flat = torch.cat([gradients[i].reshape(-1) for i in places])
        dist.all_reduce(flat)
        start = 0
        for i in places:
            count = gradients[i].numel()
            result[i] = flat[start : start + count].view_as(gradients[i])
            start += count
    return result


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of every process's `tensor`, concatenated in the order of the ranks; the numbers of rows may differ."""
    if size() == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    longest = int(max(int(c) for c in counts))
    padded = torch.zeros((longest, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
    padded[: len(tensor)] = tensor
    everyone = [torch.zeros_like(padded) for _ in range(size())]
    dist.all_gather(everyone, padded)
    return torch.cat([rows[: int(c)] for rows, c in zip(everyone, counts, strict=True)])
