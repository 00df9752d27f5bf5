"""Which rows train, validate and test.

A random split is drawn anew for every seed; classes keep their shares in every part (stratified), and every class stands in every part.
A group split never divides a group. A time split has no randomness: the oldest rows train, the newest test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.quantities import derive

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Rows:
    """Row numbers int64 of the three parts, each sorted."""

    train: Tensor
    valid: Tensor
    test: Tensor


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each seed and purpose, so that one draw does not move another."""
    return torch.Generator().manual_seed(derive(seed, purpose))


def check_fractions(split: tuple[float, ...], separate_test: bool) -> tuple[float, ...]:
    """Return the shares of train, valid and test (0 for the test part where it is a file of its own), which sum to 1.

    Args:
        split: three positive numbers of sum 1; beside a test file two are enough.
        separate_test: whether the test part is a file of its own.
    Raises:
        InputError: anything else.
    """
    shares = tuple(float(share) for share in split)
    wrong = len(shares) not in ((2, 3) if separate_test else (3,)) or not all(
        0 < share < 1 for share in shares[: 2 if separate_test else 3]
    )
    if wrong or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            "split must be three shares for training, validation and test, all above 0 and together 1, as in 0.6, "
            f"0.2, 0.2; got {', '.join(map(str, split))}."
        )
    if separate_test:
        return (shares[0] / (shares[0] + shares[1]), shares[1] / (shares[0] + shares[1]), 0.0)
    return shares


def stratified_split(target: Tensor, shares: tuple[float, ...], generator: torch.Generator) -> Rows:
    """Split so that every class keeps its share in every part and stands in every part that has a share.

    Each class is dealt out by the largest remainder; what rounding leaves over goes to the part that is most behind so far, so that the
    parts as a whole keep their shares too.

    Args:
        target: int64 `[rows]`; every class has at least as many rows as there are parts with a share.
        shares: of train, valid, test; sum 1.
        generator: where the random numbers come from.
    """
    parts: list[list[Tensor]] = [[], [], []]
    behind = torch.zeros(3, dtype=torch.float64)
    wanted = torch.tensor(shares, dtype=torch.float64)
    for label in torch.unique(target):
        rows = (target == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        counts = _deal(len(rows), wanted, behind)
        behind += wanted * len(rows) - counts
        for part, piece in zip(parts, torch.split(rows, counts.long().tolist()), strict=True):
            part.append(piece)
    return Rows(*(torch.cat(part).sort().values for part in parts))


def _deal(count: int, wanted: Tensor, behind: Tensor) -> Tensor:
    exact = wanted * count
    counts = exact.floor()
    claim = exact - counts + behind
    for _ in range(count - int(counts.sum())):
        first = int(torch.where(wanted > 0, claim, torch.full_like(claim, -torch.inf)).argmax())
        counts[first] += 1
        claim[first] -= 1
    for part in range(3):
        if wanted[part] > 0 and counts[part] == 0:
            counts[int(counts.argmax())] -= 1
            counts[part] = 1
    return counts


def random_split(rows: int, shares: tuple[float, ...], generator: torch.Generator) -> Rows:
    """Split rows at random by the shares; every part with a share gets at least one row."""
    counts = _deal(rows, torch.tensor(shares, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    pieces = torch.split(torch.randperm(rows, generator=generator), counts.long().tolist())
    return Rows(*(piece.sort().values for piece in pieces))


def group_split(groups: Tensor, shares: tuple[float, ...], seed: int) -> Rows:
    """Split whole groups: no group stands in two parts. The shares count groups, not rows.

    Args:
        groups: int64 `[rows]`, the number of each row's group.
        shares: of train, valid, test; sum 1.
        seed: decides which groups go where.
    Raises:
        InputError: fewer groups than parts.
    """
    from sklearn.model_selection import GroupShuffleSplit

    needed = sum(share > 0 for share in shares)
    count = len(torch.unique(groups))
    if count < needed:
        raise InputError(
            f"The group column has {count} groups, and {needed} parts need at least one each. Give a column with more groups."
        )
    # Whole counts: scikit-learn rounds a share of few groups to none.
    sizes = _deal(count, torch.tensor(shares, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)).long().tolist()
    random_state = derive(seed, "group split") % 2**32
    everything = torch.arange(len(groups))

    def divide(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        splitter = GroupShuffleSplit(1, test_size=size, random_state=random_state)
        rest, taken = next(splitter.split(rows.numpy(), groups=groups[rows].numpy()))
        return rows[torch.from_numpy(rest)], rows[torch.from_numpy(taken)]

    empty = everything[:0]
    rest, test = divide(everything, sizes[2]) if sizes[2] else (everything, empty)
    train, valid = divide(rest, sizes[1])
    return Rows(train, valid, test)


def time_split(time: Tensor, shares: tuple[float, ...]) -> Rows:
    """Split by time: all of training lies before all of validation, and that before all of test.

    Rows of one moment stay together: a boundary that falls among them moves to their nearer end.

    Args:
        time: float `[rows]`, finite.
        shares: of train, valid, test; sum 1.
    Raises:
        InputError: too few different moments.
    """
    order = torch.argsort(time, stable=True)
    ordered = time[order]
    changes = (ordered[1:] != ordered[:-1]).nonzero().squeeze(1) + 1
    needed = sum(share > 0 for share in shares)
    if len(changes) < needed - 1:
        raise InputError(
            f"The time column has {len(changes) + 1} different moments, and {needed} parts need at least one each."
        )
    ends = [shares[0] * len(time), (shares[0] + shares[1]) * len(time)][: needed - 1]
    cuts: list[int] = []
    for place, end in enumerate(ends):
        # Leave at least one moment for every part that follows.
        allowed = changes[: len(changes) - (len(ends) - 1 - place)]
        allowed = allowed[allowed > (cuts[-1] if cuts else 0)]
        cuts.append(int(allowed[(allowed.double() - end).abs().argmin()]))
    pieces = [piece.sort().values for piece in order.tensor_split(cuts)]
    return Rows(pieces[0], pieces[1], pieces[2] if len(pieces) > 2 else order[:0])
