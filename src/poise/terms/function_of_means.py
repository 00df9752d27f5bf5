"""Functions of expectations as a term: sum_k w_k f_k(E[g_k]), with a moving average for each expectation.

`unnormalized_nll` is the case of one logarithm, kept in log space. Others: a risk with a variance penalty (E[l^2] - E[l]^2), an
entropic risk log E[exp(l)], a ratio or a geometric mean of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from poise import processes
from poise.errors import IncompatibleError, InputError, QuantityError, nearest
from poise.inner_average import InnerAverage, mean_everywhere
from poise.objective import Term, Value

__all__ = ["FUNCTIONS", "FunctionOfMeans"]

Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "entropy": lambda u: u * u.log(),
    "exp": torch.exp,
    "identity": lambda u: u,
    "log": torch.log,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "square": torch.square,
}
"""The outer functions that a formula can name; in Python any function of a tensor will do."""
_POSITIVE = ("entropy", "log", "reciprocal", "sqrt")


class FunctionOfMeans(Term):
    """Charge a sum of functions of expectations, sum_k w_k f_k(E[g_k]), by a moving average of each.

    value  sum_k w_k f_k(u_k),   u_k <- (1 - gamma) u_k + gamma mean_i g_ik,   gradient  sum_k w_k f_k'(u_k) mean_i grad g_ik

    A mean over a batch in the place of E[g] would give a biased gradient wherever f bends. `u` is updated first and used then; `forward`
    looks ahead, `advance` stores it.

    Args:
        functions: an outer function for each column of `inner`: names ("log", "exp", "sqrt", "square", "reciprocal", "entropy",
            "identity") or callables; one alone serves every column.
        weights: w_k, one for each column; all 1 where nothing is said.
        gamma: share of the new batch in u, in (0, 1]; 1 is the plain plug-in.
        variance_reduction: follow the parameters without lag; reads `previous_inner`, which
            `poise.solvers.Compositional(variance_reduction=True)` offers.

    Reads: `inner` float [batch, inner] (or [batch] for one), the g_k of each example; `sample_weight`, if offered.
    Returns: float [batch], every entry the whole sum; publishes `means` [inner] (u).
    State: `average`, saved with the objective; equal on every process.

    Raises:
        InputError: an argument out of range or an unknown function.
        QuantityError: other columns than functions, or a mean that is not positive under a logarithm, a root or an inverse.
        IncompatibleError: a step of several micro-batches.

    Example:
        >>> variance = FunctionOfMeans(("identity", "square"), weights=(1.0, -1.0))            # E[x^2] - E[x]^2
        >>> x = torch.tensor([1.0, 3.0])
        >>> variance(torch.stack([x**2, x], 1)).values
        tensor([1., 1.])

    Source: Wang, Fang and Liu, arXiv:1411.3803; arXiv:2306.07485, algorithm 1, is its case f = log.
    """

    formula = "function_of_means"
    equation: ClassVar[str] = "sum_k w_k f_k(u_k),  u_k <- (1 - gamma) u_k + gamma mean_i g_ik"
    source: ClassVar[str] = "arXiv:1411.3803"
    expects: ClassVar[dict[str, str]] = {
        "inner": "float [batch, inner] | float [batch]",
        "previous_inner": "float [batch, inner] | float [batch]",
    }
    capabilities = frozenset({"per_example"})
    bounded_below = False

    def __init__(
        self,
        functions: str | Function | Sequence[str | Function] = "log",
        weights: Sequence[float] | None = None,
        gamma: float = 0.5,
        variance_reduction: bool = False,
    ) -> None:
        super().__init__()
        self.functions, self.weights = functions, weights
        each: list[str | Function] = (
            [functions] if isinstance(functions, str) or callable(functions) else list(functions)
        )
        if not each:
            raise InputError("function_of_means: functions is empty; give one for each column of 'inner'.")
        for f in each:
            if isinstance(f, str) and f not in FUNCTIONS:
                raise InputError(
                    f"function_of_means: there is no outer function {f!r}; there are {', '.join(FUNCTIONS)}."
                    + nearest(f, FUNCTIONS)
                )
        if weights is not None and len(each) not in (1, len(weights)):
            raise InputError(f"function_of_means: {len(each)} functions and {len(weights)} weights; give one for each.")
        width = len(each) if weights is None else len(weights)
        self._names = [f if isinstance(f, str) else "" for f in each] * (width // len(each))
        self._outer = [FUNCTIONS[f] if isinstance(f, str) else f for f in each] * (width // len(each))
        self.gamma, self.variance_reduction = gamma, variance_reduction
        self.average = InnerAverage(gamma, "function_of_means", width)
        self._rows = 0

    def readings(self) -> tuple[str, ...]:
        """Without variance reduction, nothing at the last parameters is read."""
        return () if self.variance_reduction else ("previous_inner",)

    def requirements(self) -> tuple[str, ...]:
        """With it, the inner values at the last parameters are needed."""
        return ("previous_inner",) if self.variance_reduction else ()

    def forward(
        self, inner: Tensor, previous_inner: Tensor | None = None, sample_weight: Tensor | None = None
    ) -> Value:
        g = self._columns(inner)
        training = self.training and torch.is_grad_enabled()
        if training:
            self._rows = int(processes.sum_across(torch.tensor(_counting(len(g), sample_weight))))
        before = (
            None
            if previous_inner is None
            else mean_everywhere(self._columns(previous_inner).detach(), sample_weight, alone=not training)
        )
        u = self.average.ahead(mean_everywhere(g.detach(), sample_weight, alone=not training), before)
        self._check(u)
        with torch.enable_grad():
            at = u.detach().requires_grad_()
            w = at.new_ones(len(at)) if self.weights is None else at.new_tensor(self.weights)
            value = (w * torch.stack([f(x) for f, x in zip(self._outer, at.unbind(), strict=True)])).sum()
            (slope,) = torch.autograd.grad(value, at)
        values = value.detach().to(g.dtype).expand(len(g))
        return Value(values, surrogate=g @ slope.to(g.dtype), extras={"means": u})

    def advance(self, inner: Tensor, previous_inner: Tensor | None = None) -> None:
        """Store the averages, over the examples of all processes."""
        if self._rows and len(inner) > self._rows:
            raise IncompatibleError(
                f"function_of_means looks ahead at the means over a whole step, and this step was made of micro-batches ({len(inner)} "
                f"examples, {self._rows} at once). Use accumulate=1."
            )
        before = None if previous_inner is None else mean_everywhere(self._columns(previous_inner), alone=True)
        self.average.store(mean_everywhere(self._columns(inner), alone=True), before)

    def _columns(self, inner: Tensor) -> Tensor:
        g = inner[:, None] if inner.ndim == 1 else inner
        g = g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
        if g.shape[1] != len(self._outer):
            raise QuantityError(
                f"function_of_means has {len(self._outer)} functions, and 'inner' has {g.shape[1]} columns: give one function for each."
            )
        return g

    def _check(self, u: Tensor) -> None:
        if not u.is_cpu:
            return  # the NaN of a logarithm says it, without waiting for the device
        for name, mean in zip(self._names, u.tolist(), strict=True):
            if name in _POSITIVE and not mean > 0:
                raise QuantityError(
                    f"function_of_means: {name} needs a positive mean, and the average is {mean:.4g}. Check the sign of 'inner'; with "
                    "variance reduction lower the learning rate."
                )


def _counting(rows: int, weight: Tensor | None) -> int:
    return rows if weight is None else int((weight > 0).sum())
