"""Fits of linear models under coordinate methods: what a move of a block costs is the rows where its columns are not 0.

    f(x) = sum_i s_i f(a_i' x; y_i)       H = M (x) A' diag(s) A

Least squares of at most `GRAM` inputs keep the Gram matrix, so their gradient follows in O(inputs * block); sparse designs touch the
rows that a block reaches; other dense ones keep the predictions and compute the gradient when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.composite import Composite, Design
from poise.datafits import Datafit, LeastSquares
from poise.errors import InputError
from poise.solvers.coordinate_losses import State, power_iteration

__all__ = ["LinearModel"]

GRAM = 4096
"""Most inputs for which least squares keep `A' diag(s) A`."""


class LinearModel:
    """`sum_i s_i f(A x; y)_i`, a fit of a linear model; `x` is the weight, [inputs], or [outputs, inputs] flattened.

    The bound is `H = M (x) A' diag(s) A` with `M` the fit's smoothness, and `(I - 11'/k) / 2` for the softmax, `k` one more than the
    block's classes: Boehning's bound, sharper for blocks of few classes.

    Args:
        a: examples [n, inputs]: a tensor, an array or a SciPy sparse matrix.
        y: targets, as the fit reads them.
        datafit: `LeastSquares()`, `Logistic()` (classes 0 and 1), `Multinomial(classes)`, `Huber(delta)`.
        share: s, non-negative [n]; 1 where it is None, so the fit is a sum over examples.

    Raises:
        InputError: shapes do not fit, entries are not finite, or a share is negative.

    Source: arXiv:1712.08859, section 2.
    """

    def __init__(self, a: Any, y: Any, datafit: Datafit | None = None, share: Tensor | None = None) -> None:
        self.design = a if isinstance(a, Design) else Design(a)
        self.datafit = LeastSquares() if datafit is None else datafit
        self.y = self.datafit.check(torch.as_tensor(y).to(self.design.device))
        if self.y.is_floating_point():
            self.y = self.y.to(self.design.dtype)
        n, self.inputs = self.design.shape
        share = torch.ones(n) if share is None else share
        self.share = share.to(self.design.device, self.design.dtype)
        if len(self.y) != n or self.share.shape != (n,) or bool((self.share < 0).any()):
            raise InputError(
                f"LinearModel: {n} examples need {n} targets and {n} shares that are not negative, but there are {len(self.y)} targets, "
                f"shares of shape {list(self.share.shape)} from {float(self.share.min()) if self.share.numel() else 0.0:g}."
            )
        self.intercept = False
        self.outputs = self.datafit.outputs(self.y)
        self.size = self.inputs * (self.outputs or 1)
        self.softmax = self.datafit.name == "cross_entropy"
        self.quadratic = isinstance(self.datafit, LeastSquares)
        self.keeps_gram = self.quadratic and self.inputs <= GRAM

    @classmethod
    def of(cls, problem: Composite) -> LinearModel:
        """Return the fit of a composite problem, its weight and sample weights included; an intercept is a last input of ones."""
        design = _with_ones(problem.design) if problem.intercept else problem.design
        model = cls(design, problem.y, problem.datafit, problem.share)
        model.intercept = problem.intercept
        return model

    @cached_property
    def lipschitz(self) -> Tensor:
        if self.design.sparse or bool((self.share != self.share[0]).any()):
            norms = self.design.squared_norms(self.share)
        else:
            # without a square of the whole matrix
            norms = self.share[0] * torch.linalg.vector_norm(self.design.matrix, dim=0).square()
        factor = 0.25 if self.softmax else self.datafit.smoothness
        return (factor * norms).repeat(self.outputs or 1)

    @cached_property
    def gram(self) -> Tensor:
        """`A' diag(s) A`, dense."""
        if self.design.sparse:
            import scipy.sparse as sparse

            scaled = sparse.diags_array(self.share.numpy()) @ self.design.matrix
            return torch.from_numpy(np.asarray((self.design.matrix.T @ scaled).todense()))
        a: Tensor = self.design.matrix
        return a.T @ (a * self.share[:, None])

    def split(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and the inputs of a block's coordinates."""
        return block // self.inputs, block % self.inputs

    @cached_property
    def _transposed(self) -> Tensor:
        matrix: Tensor = self.design.matrix.T.contiguous()
        return matrix

    def columns(self, inputs: Tensor) -> Tensor:
        """Return columns of A, dense [n, k]; they are read from a transposed copy, where they are contiguous."""
        if self.design.sparse:
            return torch.from_numpy(self.design.matrix[:, inputs.numpy()].toarray())
        return self._transposed[inputs].T

    def coupling(self, outputs: Tensor, classes: int | None = None) -> Tensor | float:
        """Return M between the outputs of a block's coordinates, [k, k]."""
        if self.outputs is None:
            return self.datafit.smoothness
        same = (outputs[:, None] == outputs[None]).to(self.design.dtype)
        if not self.softmax:
            return self.datafit.smoothness * same
        k = min(self.outputs, len(torch.unique(outputs)) + 1) if classes is None else classes
        return 0.5 * (same - 1.0 / k)

    def bound(self, block: Tensor) -> Tensor:
        outputs, inputs = self.split(block)
        if self.keeps_gram:
            gram = self.gram[inputs[:, None], inputs]
        else:
            columns = self.columns(inputs)
            gram = columns.T @ (columns * self.share[:, None])
        return self.coupling(outputs) * gram

    def bound_times(self, block: Tensor, d: Tensor) -> Tensor:
        outputs, inputs = self.split(block)
        if self.outputs is None:
            return self.datafit.smoothness * self._gram_times(inputs, d)
        # one product of the Gram matrix for every output in the block
        found = d.new_zeros(self.outputs, self.inputs)
        for o in torch.unique(outputs).tolist():
            found[o] = self._gram_times(inputs[outputs == o], d[outputs == o])
        if self.softmax:
            found = 0.5 * (found - found.mean(0))
        return found.flatten() if self.softmax else self.datafit.smoothness * found.flatten()

    def _gram_times(self, inputs: Tensor, d: Tensor) -> Tensor:
        if self.keeps_gram:
            return d @ self.gram[inputs]
        return self.design.correlate(self.share * (self.columns(inputs) @ d))

    @cached_property
    def row_sums(self) -> Tensor:
        sums = torch.empty(self.inputs, dtype=self.design.dtype, device=self.design.device)
        for inputs in torch.split(torch.arange(self.inputs, device=sums.device), 256):
            columns = self.columns(inputs) * self.share[:, None]
            rows = self.gram[inputs] if self.keeps_gram else self.design.correlate(columns)
            sums[inputs] = rows.abs().sum(1)
        if self.softmax:
            assert self.outputs is not None
            return (sums * (1.0 - 1.0 / self.outputs)).repeat(self.outputs)  # sum_o |M_oo'| = (1 - 1/c)
        return (self.datafit.smoothness * sums).repeat(self.outputs or 1)

    @cached_property
    def largest(self) -> float:
        times = lambda v: self.design.correlate(self.share * self.design.predict(v))  # noqa: E731
        return self.datafit.smoothness * power_iteration(times, self.share.new_zeros(self.inputs))

    def at(self, x: Tensor) -> State:
        if x.shape != (self.size,):
            raise InputError(f"LinearModel: x has [{self.size}] entries, but its shape is {list(x.shape)}.")
        return _LinearState(self, x.to(self.design.device, self.design.dtype).clone())


def _with_ones(design: Design) -> Design:
    if design.sparse:
        from scipy import sparse

        return Design(sparse.hstack([design.matrix, np.ones((design.shape[0], 1), design.matrix.dtype)], format="csc"))
    return Design(torch.cat([design.matrix, design.matrix.new_ones(design.shape[0], 1)], 1))


class _LinearState:
    def __init__(self, model: LinearModel, x: Tensor) -> None:
        self.model, self.x, self.touched, self.work = model, x, 0, 0
        self._gradient: Tensor | None = None
        self._fill()

    def _fill(self) -> None:
        m = self.model
        self.z = m.design.predict(self.x if m.outputs is None else self.x.view(m.outputs, -1))
        self.slope = self._slope(self.z, m.y, m.share)
        self._gradient = m.design.correlate(self.slope).flatten()

    def _slope(self, z: Tensor, y: Tensor, share: Tensor) -> Tensor:
        g = self.model.datafit.gradient(z, y)
        return share * g if g.ndim == 1 else share[:, None] * g

    @property
    def gradient(self) -> Tensor:
        if self._gradient is None:
            self._gradient = self.model.design.correlate(self.slope).flatten()
            self._count(self.model.size, self.z.numel() * self.model.inputs)
        return self._gradient

    def _count(self, touched: int, work: int) -> None:
        self.touched += touched
        self.work += work

    def gradient_of(self, block: Tensor) -> Tensor:
        if self._gradient is not None:
            return self._gradient[block]
        outputs, inputs = self.model.split(block)
        columns = self.model.columns(inputs)
        self._count(len(block), len(block) * len(self.z))
        if self.slope.ndim == 1:
            return columns.T @ self.slope
        return (columns * self.slope[:, outputs]).sum(0)

    @property
    def rounding(self) -> float:
        m = self.model
        return 0.0 if m.quadratic else 8 * torch.finfo(m.design.dtype).eps * self.value()

    def value(self) -> float:
        m = self.model
        return float((m.share * m.datafit.value(self.z, m.y)).sum())

    def _shifted(self, block: Tensor, d: Tensor) -> Tensor:
        outputs, inputs = self.model.split(block)
        columns = self.model.columns(inputs)
        if self.z.ndim == 1:
            return torch.addmv(self.z, columns, d)
        return self.z.index_add(1, outputs, columns * d)

    def change(self, block: Tensor, d: Tensor) -> float:
        m = self.model
        if m.quadratic:
            # without the difference of two values, whose rounding would hide it
            slope = float(self.gradient_of(block) @ d)
            if m.keeps_gram:
                return slope + 0.5 * float(d @ (m.bound(block) @ d))
            moved = self._shifted(block, d) - self.z
            return slope + 0.5 * float((m.share * (moved.square() if moved.ndim == 1 else moved.square().sum(1))).sum())
        moved = m.datafit.value(self._shifted(block, d), m.y) - m.datafit.value(self.z, m.y)
        return float((m.share * moved).sum())

    def hessian(self, block: Tensor) -> Tensor:
        m = self.model
        if m.quadratic:
            return m.bound(block)
        outputs, inputs = m.split(block)
        columns = m.columns(inputs)
        if not m.softmax:
            curvature = m.datafit.curvature(self.z, m.y)
            weighted = columns * (
                m.share[:, None] * (curvature[:, None] if curvature.ndim == 1 else curvature[:, outputs])
            )
            inner = columns.T @ weighted
            return inner if m.outputs is None else torch.where(outputs[:, None] == outputs[None], inner, 0.0)
        p = self.z.softmax(1)[:, outputs]
        weighted = columns * p * m.share[:, None]
        same = torch.where(outputs[:, None] == outputs[None], columns.T @ weighted, 0.0)
        return same - (columns * p).T @ weighted

    def move(self, block: Tensor, d: Tensor) -> None:
        m = self.model
        self.x[block] += d
        if m.keeps_gram:
            self.z = self._shifted(block, d)
            self.slope = self._slope(self.z, m.y, m.share)
            self._gradient = self.gradient + m.bound_times(block, d)
            self._count(m.size, (m.size + len(self.z)) * len(block))
        elif m.design.sparse:
            self._move_sparse(block, d)
        else:
            self.z = self._shifted(block, d)
            self.slope = self._slope(self.z, m.y, m.share)
            self.work += len(self.z) * len(block)
            self._gradient = None

    def _move_sparse(self, block: Tensor, d: Tensor) -> None:
        """Touch the rows where the block's columns are not 0, and the inputs that share these rows."""
        m = self.model
        gradient = self.gradient
        columns, by_rows = m.design.matrix, m.design._rows
        outputs, inputs = (part.numpy() for part in m.split(block))
        z, g = _matrix(self.z), gradient.view(-1, m.inputs).numpy()
        loops = _loops()
        rows = loops["shift"](columns.indptr, columns.indices, columns.data, inputs, outputs, d.numpy(), z)
        at = torch.from_numpy(rows)
        fresh = self._slope(self.z[at], m.y[at], m.share[at])
        before, self.slope[at] = self.slope[at], fresh
        step = _matrix(fresh - before)
        touched = int(loops["follow"](by_rows.indptr, by_rows.indices, by_rows.data, rows, step, g))
        self._count(touched, touched + len(rows) * step.shape[1])

    def refresh(self) -> float:
        z, gradient = self.z, self.gradient
        self._fill()
        assert self._gradient is not None
        size = float(self.z.norm()) + float(self.slope.norm()) + float(self.model.y.double().norm())
        drift = float((self.z - z).norm()) / max(size, 1e-300)
        # a gradient that nears 0 is measured by the terms that cancel in it
        terms = float(self.model.lipschitz.max().sqrt()) * (
            float(self.slope.norm()) + float(self.model.y.double().norm())
        )
        return max(drift, float((self._gradient - gradient).norm()) / max(terms, 1e-300))

    def state_dict(self) -> dict[str, Tensor]:
        found = {"x": self.x.clone(), "z": self.z.clone(), "slope": self.slope.clone()}
        return found if self._gradient is None else {**found, "gradient": self._gradient.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.x, self.z, self.slope = (state[name].clone() for name in ("x", "z", "slope"))
        self._gradient = state["gradient"].clone() if "gradient" in state else None


def _matrix(values: Tensor) -> np.ndarray[Any, Any]:
    """Return [n] or [n, outputs] as [n, outputs], the same memory."""
    return (values[:, None] if values.ndim == 1 else values).numpy()


# ---- loops -----------------------------------------------------------------------------------------------------------


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    from numba import njit

    compiled = njit(cache=True, nogil=True)
    loops: dict[str, Callable[..., Any]] = {"shift": _shift, "follow": _follow}
    return {name: compiled(f) for name, f in loops.items()}


def _shift(indptr: Any, indices: Any, data: Any, inputs: Any, outputs: Any, d: Any, z: Any) -> Any:
    """Add the columns' moves to the predictions, and return the rows that they reach."""
    most = 0
    for t in range(len(inputs)):
        most += indptr[inputs[t] + 1] - indptr[inputs[t]]
    rows, seen, count = np.empty(most, np.int64), np.zeros(len(z), np.bool_), 0
    for t in range(len(inputs)):
        for e in range(indptr[inputs[t]], indptr[inputs[t] + 1]):
            i = indices[e]
            z[i, outputs[t]] += data[e] * d[t]
            if not seen[i]:
                seen[i] = True
                rows[count] = i
                count += 1
    return rows[:count]


def _follow(indptr: Any, indices: Any, data: Any, rows: Any, step: Any, gradient: Any) -> int:
    """Add `A[rows]' step` to the gradient [outputs, inputs], and return how many entries that were."""
    touched = 0
    for r in range(len(rows)):
        i = rows[r]
        for o in range(step.shape[1]):
            if step[r, o] != 0.0:
                for e in range(indptr[i], indptr[i + 1]):
                    gradient[o, indices[e]] += data[e] * step[r, o]
                touched += indptr[i + 1] - indptr[i]
    return touched
