"""Balancers that look at values alone: no backward pass more than a plain step, and blind to what gradients do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.weights.pareto.moving import Adam, ValueBalancer
from poise.weights.pareto.preferences import spread, stated


class Uncertainty(ValueBalancer):
    """Homoscedastic uncertainty weighting: a variance for each term, moved as maximum likelihood would.

    min over s of  c e^(-s_i) L_i + s_i/2,   w_i = c e^(-s_i),   c = 1/2 (regression) or 1 (classification)

    The log-variances `s` are buffers that this policy moves with Adam, never parameters of the model's optimiser. At rest `w_i L_i = 1/2`:
    every term is weighed by its inverse value.

    Args:
        likelihood: "regression" (a Gaussian: factor one half) or "classification" (a scaled softmax: factor one), for all terms.
        lr: of `s`, in steps of Adam.
        bound: `|s|` never exceeds it.

    Scale: free; at first all weights are `c`, at rest `1/(2 L_i)`, so the step grows as the values fall.

    When it fails: a value at or below 0 drives `s` to minus the bound and the weight up to `c e^bound`; a term that cannot be learnt
    (high value) is given up; the weights chase the values with a lag of about `1/lr` steps.

    Buffers: `s`, Adam's under `optimizer`.

    Source: arXiv:1705.07115, eq. 7 and 10.
    """

    formula: ClassVar[str] = "uncertainty"
    s: Tensor

    def __init__(self, likelihood: str = "classification", lr: float = 0.01, bound: float = 10.0) -> None:
        super().__init__()
        factors = {"regression": 0.5, "classification": 1.0}
        if likelihood not in factors:
            raise InputError(f"uncertainty: likelihood is 'regression' or 'classification', and it is {likelihood!r}.")
        _check_bound(self.formula, bound)
        self.likelihood, self.factor, self.bound = likelihood, factors[likelihood], float(bound)
        self.keep("s")
        self.optimizer = Adam(self.formula, lr)

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return `c e^(-s)`."""
        return self.factor * torch.exp(-_or_zero(self.s, terms))

    def move_values(self, values: Tensor) -> None:
        """Take one step on the log-variances: the gradient is `1/2 - c e^(-s_i) L_i`."""
        s = _or_zero(self.s, len(values))
        self.s = self.optimizer.step(s, 0.5 - self.factor * torch.exp(-s) * values).clamp(-self.bound, self.bound)


class IMTLL(ValueBalancer):
    """Impartial values: scales under which all weighted values tend to 1.

    min over s of  e^(s_i) L_i - s_i,   w_i = e^(s_i)

    At rest `w_i L_i = 1`.

    Args:
        lr: of `s`, in steps of Adam.
        bound: `|s|` never exceeds it.

    Scale: free; at first all weights are 1, at rest `1/L_i`.

    When it fails: as `uncertainty`, which it equals up to the factor 2 at rest: values must be positive.

    Buffers: `s`, Adam's under `optimizer`.

    Source: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, section 3.3.
    """

    formula: ClassVar[str] = "imtl_l"
    s: Tensor

    def __init__(self, lr: float = 0.01, bound: float = 10.0) -> None:
        super().__init__()
        _check_bound(self.formula, bound)
        self.bound = float(bound)
        self.keep("s")
        self.optimizer = Adam(self.formula, lr)

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return `e^s`."""
        return torch.exp(_or_zero(self.s, terms))

    def move_values(self, values: Tensor) -> None:
        """Take one step on the scales: the gradient is `e^(s_i) L_i - 1`."""
        s = _or_zero(self.s, len(values))
        self.s = self.optimizer.step(s, torch.exp(s) * values - 1).clamp(-self.bound, self.bound)


class DynamicAverage(ValueBalancer):
    """Dynamic weight average: terms that fall more slowly than they did weigh more.

    w_i = m softmax(r/T)_i,   r_i = L_i(t-1)/L_i(t-2)

    Args:
        temperature: `T`, positive; large values weigh all alike.
        window: steps whose mean value is one `L(t)`: the paper's epoch. A window of 1 follows the noise of batches.

    Scale: the weights sum to m; for the first two windows all are 1.

    When it fails: it knows rates, not scales, so a term a thousand times larger stays so; a mean value that reaches 0 makes the ratio
    meaningless (it is held in [0, 10]).

    Buffers: `sums` and `steps` of the window that runs, `last` and `before`.

    Source: arXiv:1803.10704, eq. 7.
    """

    formula: ClassVar[str] = "dynamic_average"
    total: ClassVar[str] = "m"
    sums: Tensor
    last: Tensor
    before: Tensor
    steps: Tensor

    def __init__(self, temperature: float = 2.0, window: int = 100) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise InputError(f"dynamic_average: temperature is positive and finite, and it is {temperature}.")
        if window < 1:
            raise InputError(f"dynamic_average: window is a number of steps, at least 1, and it is {window}.")
        self.temperature, self.window = float(temperature), int(window)
        for name in ("sums", "last", "before"):
            self.keep(name)
        self.keep("steps", torch.tensor(0, dtype=torch.int64))

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the weights of the window that runs."""
        if not self.before.numel():
            return torch.ones(terms, dtype=torch.float64)
        rate = torch.where(self.before != 0, self.last / self.before, 1.0).clamp(0, 10)
        return terms * torch.softmax(rate / self.temperature, 0)

    def move_values(self, values: Tensor) -> None:
        """Add the values of this step to its window."""
        self.sums = _or_zero(self.sums, len(values)) + values
        self.steps = self.steps + 1
        if int(self.steps) % self.window == 0:
            self.before, self.last = self.last, self.sums / self.window
            self.sums = torch.zeros_like(values)


class LossScale(ValueBalancer):
    """Every term divided by the running mean of its magnitude.

    w_i = R s_i/M_i,   M_i = decay M_i + (1 - decay) |L_i|,   R = sum_j M_j,   s the shares (1/m each)

    `w_i M_i` is the term's share of the whole value, which stays as large as it was. Where the gradient of a loss is proportional
    to its value this is `normalised` without a backward pass more.

    Args:
        preference: shares, one number a term, at least 0; by default equal.
        decay: of the running mean, in [0, 1).

    Scale: `sum_i w_i M_i = sum_i M_i`; for values of equal size all weights are 1 (sum m).

    When it fails: a loss with an offset (an entropy, a likelihood) has a value that says nothing of its gradient; a term whose value
    tends to 0 is kept alive as `normalised` does. A value that has been 0 throughout gets weight 0.

    Buffers: `average` and `steps`.

    Source: the scale-invariant limit of arXiv:1705.07115 (weights at rest), as a running mean; no learning rate.
    """

    formula: ClassVar[str] = "loss_scale"
    total: ClassVar[str] = "m"
    average: Tensor
    steps: Tensor

    def __init__(self, preference: Sequence[float] | None = None, decay: float = 0.99) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InputError(f"loss_scale: decay lies in [0, 1), and it is {decay}.")
        self.preference, self.decay = stated(self.formula, preference), float(decay)
        self.keep("average")
        self.keep("steps", torch.tensor(0, dtype=torch.int64))

    def current(self, terms: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the weights; the first step looks at its own values, which costs it a forward pass."""
        mean = (
            self.average / (1 - self.decay ** int(self.steps))
            if self.average.numel()
            else values().double().abs().cpu()
        )
        shares = torch.from_numpy(spread(self.formula, self.preference, terms, 1.0)) * (mean > 0)
        if not bool(shares.any()):
            return torch.zeros_like(mean)
        return torch.where(mean > 0, mean.sum() * shares / shares.sum() / mean.where(mean > 0, 1.0), 0.0)

    def move_values(self, values: Tensor) -> None:
        """Take the values of this step into the mean."""
        self.average = self.decay * _or_zero(self.average, len(values)) + (1 - self.decay) * values.abs()
        self.steps = self.steps + 1


def _or_zero(state: Tensor, terms: int) -> Tensor:
    return state if state.numel() else torch.zeros(terms, dtype=torch.float64)


def _check_bound(formula: str, bound: float) -> None:
    if not 0 < bound < 300:
        raise InputError(f"{formula}: bound lies in (0, 300), where its exponential is finite, and it is {bound}.")
