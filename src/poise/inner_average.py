"""Moving averages of means that stand inside a function: the memory of compositional objectives.

    f(E[g]):   u_t = (1 - gamma) u_{t-1} + gamma g_t,   gradient f'(u_t) grad g_t

A mean over one batch in the place of E[g] gives a biased gradient wherever f is not linear; an average over steps makes the bias fade
while no batch has to be large. The first batch is the first average: an average that starts at 0 or 1 would be divided by
before it means anything. With the mean of the same draws at the parameters of the step before, the average follows the parameters
without lag (variance reduction, STORM):

    u_t = (1 - gamma) (u_{t-1} - g_t(theta_{t-1})) + g_t(theta_t)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poise import processes
from poise.errors import InputError

__all__ = ["InnerAverage", "LogInnerAverage", "log_mean_everywhere", "mean_everywhere"]


class _Averaged(nn.Module):
    """What both averages share: the rate, the count of steps, and a buffer that stays float64."""

    steps: Tensor
    held: bool

    def __init__(self, gamma: float, name: str, initial: Tensor) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise InputError(f"{name}: gamma is the share of the new batch in the average, in (0, 1]; got {gamma}.")
        self.gamma = gamma
        self.factor = 1.0
        """What a solver's stage multiplies `gamma` by; it derives from the number of the step and is not saved."""
        self.held = False
        """Whether `ahead` gives the average as it is stored, as an evaluation at the parameters of the step before needs it."""
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer(self._buffer, initial.double())

    _buffer = ""

    @property
    def rate(self) -> float:
        """The share of the new batch in this step."""
        return min(1.0, self.gamma * self.factor)

    @property
    def stored(self) -> Tensor:
        """The average after the last step."""
        found = self._buffers[self._buffer]
        assert found is not None
        return found

    def ahead(self, new: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the average as it will be after this step; nothing is stored.

        Args:
            new: the mean of this batch; of a `LogInnerAverage` its logarithm.
            before: the same at the parameters of the step before, on the same draws, for variance reduction.
        """
        new = new.detach().double()
        if self.held:
            return torch.where(self.steps == 0, new, self.stored)
        if self.rate == 1 and before is None:
            return new
        return torch.where(self.steps == 0, new, self._moved(new, None if before is None else before.detach().double()))

    def store(self, new: Tensor, before: Tensor | None = None) -> None:
        """Move the average by one step."""
        setattr(self, self._buffer, self.ahead(new, before))
        self.steps = self.steps + 1

    def _moved(self, new: Tensor, before: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Averaged:
        # A change of device moves the average; a change of dtype leaves it in float64.
        exact = self.stored
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        setattr(self, self._buffer, exact.to(self.stored.device))
        return self


class LogInnerAverage(_Averaged):
    """The average of a positive mean, kept as its logarithm, so that means of any size neither overflow nor vanish.

    log u_t = log((1 - gamma) u_{t-1} + gamma g_t)

    Variance reduction may step below 0; the average is then held at gamma g_t, which the plain one never falls below either. So
    g_t / u_t <= 1/gamma in any case.

    Args:
        gamma: share of the new batch, in (0, 1].
        name: whose it is, for messages.

    Buffers: `log_u` float64 0-dim and `steps` int64 0-dim.

    >>> average = LogInnerAverage(0.5, "term")
    >>> for mean in (1.0, 3.0):
    ...     average.store(torch.tensor(mean).log())
    >>> average.log_u.exp()                                              # 1, then (1 + 3) / 2
    tensor(2.0000, dtype=torch.float64)
    """

    log_u: Tensor
    _buffer = "log_u"

    def __init__(self, gamma: float, name: str) -> None:
        super().__init__(gamma, name, torch.zeros(()))

    def _moved(self, new: Tensor, before: Tensor | None) -> Tensor:
        rate = self.rate
        if before is None:
            return torch.logaddexp(math.log1p(-rate) + self.log_u, math.log(rate) + new)
        top = torch.maximum(torch.maximum(self.log_u, new), before)
        u, g, old = ((x - top).exp() for x in (self.log_u, new, before))
        return torch.maximum((1 - rate) * (u - old) + g, rate * g).log() + top


class InnerAverage(_Averaged):
    """The average of means of any sign.

    u_t = (1 - gamma) u_{t-1} + gamma g_t

    Args:
        gamma: share of the new batch, in (0, 1].
        name: whose it is, for messages.
        width: how many means.

    Buffers: `u` float64 [width] and `steps` int64 0-dim.
    """

    u: Tensor
    _buffer = "u"

    def __init__(self, gamma: float, name: str, width: int = 1) -> None:
        super().__init__(gamma, name, torch.zeros(width))

    def _moved(self, new: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            return (1 - self.rate) * self.u + self.rate * new
        return (1 - self.rate) * (self.u - before) + new


def log_mean_everywhere(log_values: Tensor, alone: bool = False) -> tuple[Tensor, int]:
    """Return log mean exp over the rows of every process, 0-dim, and the number of rows, which may differ by process.

    Args:
        log_values: float [rows].
        alone: of this process only.

    >>> log_mean_everywhere(torch.tensor([1.0, 3.0]).log())[0].exp()
    tensor(2.)
    """
    total, rows = torch.logsumexp(log_values, 0), len(log_values)
    if alone or processes.size() == 1:
        return total - math.log(rows), rows
    table = processes.gather_rows(torch.stack([total.double(), total.new_tensor(rows).double()])[None])
    return torch.logsumexp(table[:, 0], 0) - table[:, 1].sum().log(), int(table[:, 1].sum())


def mean_everywhere(values: Tensor, weight: Tensor | None = None, alone: bool = False) -> Tensor:
    """Return the mean over the rows of every process, [width].

    Args:
        values: float [rows, width].
        weight: float [rows], each row's share; 0 for padding.
        alone: of this process only.
    """
    weighted = values.double() if weight is None else values.double() * weight[:, None]
    rows = weighted.new_tensor(float(len(values))) if weight is None else weight.double().sum()
    both = torch.cat([weighted.sum(0), rows[None]])
    both = both if alone else processes.sum_across(both)
    return both[:-1] / both[-1]


def averages_of(module: nn.Module) -> list[Any]:
    """Return every moving average of a module, such as an objective."""
    return [found for found in module.modules() if isinstance(found, _Averaged)]
