"""A linear model's objective with its structure in sight: a smooth fit of the predictions plus a penalty on the weights.

minimise over w, b    P(w, b) = weight / sum_i s_i  sum_i s_i f(w x_i + b; y_i)  +  h(w)

dual                  D(theta) = - weight / sum s  sum_i s_i f*(theta_i; y_i)  -  h*(-X' theta~),   theta~ = weight s theta / sum s
                      (and sum_i theta~_i = 0 where there is an intercept)
certificate           P - D >= P - min P >= 0, where h is convex and its conjugate known; else the distance of 0 from the subdifferential
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.datafits import Datafit
from poise.errors import InputError, PoiseWarning
from poise.operators import Box
from poise.penalties import L1, Indicator, Scaled, TotalVariation
from poise.problem import Certificate


def as_numbers(values: Any, name: str) -> Tensor:
    """Return what came as a tensor of real numbers.

    Args:
        values: a tensor, an array, a table of pandas, or nested lists.
        name: what they are, in words.

    Raises:
        InputError: they are text, objects or complex numbers, ragged, or a sparse tensor.
    """
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
            array = array.astype(np.float64) if array.dtype == object else array
        except (TypeError, ValueError) as error:
            raise InputError(f"The {name} are not one table of numbers: {error}.") from error
        if array.dtype.kind not in "fiub":
            raise InputError(f"The {name} are of type {array.dtype}, and numbers are needed. Encode them first.")
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.layout != torch.strided:
        raise InputError(f"The {name} are a sparse tensor. Give a SciPy sparse matrix, or a dense tensor.")
    if values.is_complex():
        raise InputError(f"The {name} are complex, and real numbers are needed.")
    found: Tensor = values.detach()
    return found


class Design:
    """A matrix of examples `[n, inputs]`, dense or sparse, and the two products that solvers ask of it.

    Args:
        x: a tensor or array, or a SciPy sparse matrix.

    Raises:
        InputError: it has no two axes, no rows, or entries that are not finite.
    """

    def __init__(self, x: Any) -> None:
        self.sparse = hasattr(x, "tocsc")
        if self.sparse:
            self.matrix: Any = x.tocsc()
            if self.matrix.dtype.kind not in "fiub":
                raise InputError(f"The inputs are of type {self.matrix.dtype}, and real numbers are needed.")
            if self.matrix.dtype not in (np.float32, np.float64):
                self.matrix = self.matrix.astype(np.float64)
            finite = bool(np.isfinite(self.matrix.data).all())
            self.dtype, self.device = torch.from_numpy(self.matrix.data[:0]).dtype, torch.device("cpu")
        else:
            self.matrix = as_numbers(x, "inputs")
            if not self.matrix.is_floating_point():
                self.matrix = self.matrix.double()
            elif self.matrix.element_size() < 4:  # sums of half precision tell nothing
                self.matrix = self.matrix.float()
            finite = bool(torch.isfinite(self.matrix).all())
            self.dtype, self.device = self.matrix.dtype, self.matrix.device
        if len(self.matrix.shape) != 2 or 0 in self.matrix.shape:
            raise InputError(
                f"Examples are a matrix [rows, inputs] with at least one of each, and its shape is {tuple(self.matrix.shape)}."
            )
        if not finite:
            raise InputError("The inputs hold numbers that are not finite. Remove or impute them.")

    @property
    def shape(self) -> tuple[int, int]:
        """Examples and inputs."""
        return int(self.matrix.shape[0]), int(self.matrix.shape[1])

    @cached_property
    def _rows(self) -> Any:
        return self.matrix.tocsr()

    def predict(self, w: Tensor) -> Tensor:
        """Return `X w`, [n] for a vector, `X W'`, [n, outputs] for a matrix."""
        if self.sparse:
            return torch.from_numpy(np.asarray(self._rows @ w.detach().numpy().T))
        found: Tensor = self.matrix @ (w if w.ndim == 1 else w.T)
        return found

    def correlate(self, r: Tensor) -> Tensor:
        """Return `X' r`, [inputs] or [outputs, inputs]."""
        if self.sparse:
            found = torch.from_numpy(np.asarray(self.matrix.T @ r.detach().numpy()))
        else:
            found = self.matrix.T @ r
        return found if r.ndim == 1 else found.T

    def columns(self, at: Tensor) -> Tensor:
        """Return some columns, dense."""
        if self.sparse:
            return torch.from_numpy(self.matrix[:, at.numpy()].toarray())
        found: Tensor = self.matrix[:, at]
        return found

    def squared_norms(self, s: Tensor | None = None) -> Tensor:
        """Return `sum_i s_i x_ij^2` for every input j."""
        if self.sparse:
            squared = self.matrix.multiply(self.matrix)
            scale = np.ones(self.shape[0]) if s is None else s.numpy()
            return torch.from_numpy(np.asarray(squared.T @ scale)).to(self.dtype)
        squared = self.matrix.square()
        found: Tensor = squared.sum(0) if s is None else squared.T @ s
        return found

    def largest_eigenvalue(self, s: Tensor, iterations: int = 100, constant: float = 0.0) -> float:
        """Return that of `X' diag(s) X`, X with one more column of that constant, by power iteration, from below within 1e-3."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[1], generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        v0 = v.new_ones(()) * float(constant != 0)
        size = 0.0
        for _ in range(iterations):
            norm = torch.sqrt(v.square().sum() + v0.square())
            if not float(norm) > 0:
                return 0.0
            v, v0 = v / norm, v0 / norm
            moved = s * (self.predict(v) + constant * v0)
            v, v0 = self.correlate(moved), constant * moved.sum()
            before, size = size, float(torch.sqrt(v.square().sum() + v0.square()))
            if abs(size - before) <= 1e-4 * size:
                break
        return size


@dataclass(frozen=True)
class Solution:
    """Where a solver ended, and what it knows about it.

    Attributes:
        coef: weights, [inputs] or [outputs, inputs].
        intercept: 0-dim or [outputs].
        certificate: value, residual with its measure, status, support.
        solver: its name.
        reason: why it was chosen, in words.
        seconds: what it took.
    """

    coef: Tensor
    intercept: Tensor
    certificate: Certificate
    solver: str = ""
    reason: str = ""
    seconds: float = 0.0
    extras: dict[str, Any] = field(default_factory=dict)

    def predict(self, x: Any) -> Tensor:
        """Return the model's output for examples, [n] or [n, outputs]."""
        design = Design(x)
        if design.shape[1] != self.coef.shape[-1]:
            raise InputError(
                f"The solution reads {self.coef.shape[-1]} inputs, and these examples have {design.shape[1]}."
            )
        return design.predict(self.coef.to(design.dtype)) + self.intercept.to(design.dtype)


class Composite:
    """A convex fit of a linear model, with a penalty.

    Args:
        x: examples [n, inputs]: a tensor, an array or a SciPy sparse matrix.
        y: targets, as the fit reads them.
        datafit: `LeastSquares()`, `Logistic()`, `Multinomial(classes)`, `Huber(delta)`.
        penalty: h; a `Penalty` or a `Scaled` one.
        weight: of the fit.
        intercept: whether there is an unpenalised b.
        sample_weight: s, [n], not negative; all 1 where it is None.

    Raises:
        InputError: rows do not match, something is not finite, weights are negative or all 0.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        datafit: Datafit,
        penalty: Any,
        weight: float = 1.0,
        intercept: bool = False,
        sample_weight: Any = None,
    ) -> None:
        self.design = x if isinstance(x, Design) else Design(x)
        self.datafit, self.weight, self.intercept = datafit, float(weight), intercept
        self.penalty = penalty if isinstance(penalty, Scaled) else Scaled(penalty)
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise InputError(
                f"The weight of {datafit.name} must be positive, and it is {weight}: the sum has no bound, or nothing to fit."
            )
        self.y = datafit.check(as_numbers(y, "targets").to(self.design.device))
        if self.y.ndim not in (1, 2) or 0 in self.y.shape:
            raise InputError(f"Targets are [rows] or [rows, outputs], and their shape is {tuple(self.y.shape)}.")
        if self.y.is_floating_point():
            self.y = self.y.to(self.design.dtype)
        n = self.design.shape[0]
        if len(self.y) != n:
            raise InputError(f"There are {n} examples and {len(self.y)} targets.")
        s = torch.ones(n) if sample_weight is None else as_numbers(sample_weight, "sample weights")
        s = s.to(self.design.device, self.design.dtype)
        if s.shape != (n,):
            raise InputError(f"sample_weight is {n} numbers, one for every example; its shape is {tuple(s.shape)}.")
        if not bool(torch.isfinite(s).all()) or bool((s < 0).any()) or not float(s.sum()) > 0:
            raise InputError(
                "sample_weight must be finite, not negative and not all 0, and "
                f"{int((~torch.isfinite(s)).sum())} are not finite, {int((s < 0).sum())} negative, {int((s == 0).sum())} are 0."
            )
        if bool((s == 0).any()):
            datafit.check(self.y[s > 0])  # what counts may be of one class
        self.share = self.weight * s / s.sum()
        self.outputs = datafit.outputs(self.y)

    def at(self, penalty: Scaled) -> Composite:
        """Return the same fit under another penalty; what is known of the data is shared."""
        other = copy.copy(self)
        other.penalty = penalty
        other.__dict__.pop("certifies_gap", None)
        return other

    # ---- the parts ---------------------------------------------------------------------------------------------------

    @property
    def inputs(self) -> int:
        return self.design.shape[1]

    def zeros(self) -> tuple[Tensor, Tensor]:
        """Return weights and intercept of 0."""
        shape = (self.inputs,) if self.outputs is None else (self.outputs, self.inputs)
        w = torch.zeros(shape, dtype=self.design.dtype, device=self.design.device)
        return w, w.new_zeros(shape[:-1])

    def predict(self, w: Tensor, b: Tensor) -> Tensor:
        """Return `X w + b`."""
        return self.design.predict(w) + b

    def fit_value(self, z: Tensor) -> Tensor:
        """Return the weighted mean of the fit, 0-dim."""
        return (self.share * self.datafit.value(z, self.y)).sum()

    def slope(self, z: Tensor) -> Tensor:
        """Return the derivative of the fit by the predictions, weights of the examples included."""
        g = self.datafit.gradient(z, self.y)
        return self.share * g if g.ndim == 1 else self.share[:, None] * g

    def value(self, w: Tensor, b: Tensor | None = None) -> float:
        """Return the objective."""
        z = self.design.predict(w) if b is None else self.predict(w, b)
        return float(self.fit_value(z) + self.penalty.value(w))

    @cached_property
    def lipschitz(self) -> float:
        """Smoothness of the fit in the weights and `b / unit`."""
        constant = self.unit if self.intercept else 0.0
        return self.datafit.smoothness * self.design.largest_eigenvalue(self.share, constant=constant)

    @cached_property
    def unit(self) -> float:
        """What an intercept counts for beside weights, the size of the inputs; in `b / unit` the fit is as steep as in the weights.

        It makes steps and certificates the same whatever unit the inputs have.
        """
        size = math.sqrt(self.design.largest_eigenvalue(self.share) / self.weight)
        return size if size > 0 and math.isfinite(size) else 1.0

    @property
    def step_bound(self) -> float:
        """An upper bound of `lipschitz`, whose power iteration comes from below; steps of its inverse are safe."""
        return max(1.05 * self.lipschitz, torch.finfo(self.design.dtype).tiny)

    @cached_property
    def scale(self) -> float:
        """The objective at weights of 0 with the best intercept, where tolerances are measured.

        Where that is 0 up to rounding, as targets are constant, it is the one with an intercept of 0; where that is 0 too, it is 1.
        """
        w, b = self.zeros()
        alone = self.design.predict(w)
        raw, value = (float(self.fit_value(alone + c)) for c in (b, self.settle(alone, b)))
        value = value if value > (64 * torch.finfo(self.design.dtype).eps) ** 2 * raw else raw
        return value if value > 0 and math.isfinite(value) else 1.0

    # ---- certificates ------------------------------------------------------------------------------------------------

    def settle(self, z: Tensor, b: Tensor, iterations: int = 50) -> Tensor:
        """Return the best intercept beside predictions `z` without one, by damped Newton steps."""
        if not self.intercept:
            return b
        b = b.clone()
        value = self.fit_value(z + b)
        for _ in range(iterations):
            g = self.slope(z + b).sum(0)
            if float(g.abs().max()) <= 1e-15 * self.weight:
                break
            h = self._intercept_curvature(z + b)
            move = -(torch.linalg.lstsq(h, g[:, None], driver=_driver(h)).solution[:, 0] if g.ndim else g / h)
            falls, length = (g * move).sum(), 1.0
            while bool(self.fit_value(z + b + length * move) > value + 1e-4 * length * falls) and length > 1e-8:
                length /= 2
            if length <= 1e-8:
                break
            b = b + length * move
            value = self.fit_value(z + b)
        # a softmax does not see what all its intercepts share
        return b - b.mean() if self.datafit.name == "cross_entropy" else b

    def _intercept_curvature(self, z: Tensor) -> Tensor:
        if self.datafit.name == "cross_entropy":
            p = z.softmax(1)
            return torch.diag((self.share[:, None] * p).sum(0)) - (self.share[:, None] * p).T @ p
        c = self.datafit.curvature(z, self.y)
        if c.ndim == 1:
            return (self.share * c).sum().clamp_min(1e-12 * self.weight)
        return torch.diag((self.share[:, None] * c).sum(0).clamp_min(1e-12 * self.weight))

    def gap(self, w: Tensor, b: Tensor, z: Tensor | None = None) -> float:
        """Return P - D at the dual point that the predictions give, scaled into the dual's domain; infinite where none is found.

        Raises:
            NotImplementedError: the conjugate of the penalty is not known.
        """
        z = self.predict(w, b) if z is None else z
        primal = self.fit_value(z) + self.penalty.value(w)
        theta = self.slope(z)
        u = -self.design.correlate(theta)
        if isinstance(self.penalty.penalty, Indicator) and not math.isfinite(float(self.penalty.conjugate(u))):
            z_inside = self._inside(z, u)
            if z_inside is None:
                return math.inf
            z, theta = z_inside, self.slope(z_inside)
            u = -self.design.correlate(theta)
        if self.intercept and float(theta.sum(0).abs().max()) > self._rounding(theta, z):
            return math.inf
        share = self.penalty.feasible_share(u)
        if share == 0.0 and float(theta.abs().max()) > 0:
            return math.inf
        dual = -(self.share * self.datafit.conjugate(share * self.datafit.gradient(z, self.y), self.y)).sum()
        if share < 1.0:
            # on the border of the domain the conjugate of a norm is 0
            return float(primal - dual)
        return float(primal - dual + self.penalty.conjugate(u))

    def _inside(self, z: Tensor, u: Tensor, rounds: int = 10, most: int = 1000) -> Tensor | None:
        """Return predictions near z whose slopes pull no weight past all bounds, so that the dual of a box without end is finite.

        Newton's move along the columns that are pulled so, and the intercept, to where they are pulled back by a rounding; None for
        boxes with two open sides, several outputs, more than `most` columns, or where `rounds` do not end it.
        """
        region = self.penalty.penalty.region if isinstance(self.penalty.penalty, Indicator) else None
        if not isinstance(region, Box) or z.ndim > 1:
            return None
        lower, upper = (edge.expand_as(u) for edge in region._bounds(u))
        chosen, start, first = torch.zeros_like(u, dtype=torch.bool), z, u
        ones = torch.ones_like(z)[:, None] if self.intercept else torch.ones_like(z)[:, None][:, :0]
        pull = self.slope(z)
        margin = 64 * torch.finfo(u.dtype).eps * self.design.squared_norms().sqrt() * torch.linalg.vector_norm(pull)
        for _ in range(rounds):
            open_up, open_down = (u > 0) & (upper == math.inf), (u < 0) & (lower == -math.inf)
            if not bool((open_up | open_down).any()):
                return z
            chosen |= open_up | open_down
            at = chosen.nonzero()[:, 0]
            if len(at) > most or bool(((upper == math.inf) & (lower == -math.inf))[at].any()):
                return None
            columns = torch.cat([self.design.columns(at), ones], 1)
            curvature = self.share * self.datafit.curvature(start, self.y)
            back = torch.where(upper[at] == math.inf, margin[at], -margin[at])
            wanted = torch.cat([first[at] + back, -pull.sum()[None] if self.intercept else back[:0]])
            move = torch.linalg.lstsq(columns.T @ (curvature[:, None] * columns), wanted[:, None]).solution[:, 0]
            z = start + columns @ move
            u = -self.design.correlate(self.slope(z))
            # a curved fit lands beside the aim; the next round starts there
            start, first, pull = z, u, self.slope(z)
        return None

    def _rounding(self, theta: Tensor, z: Tensor) -> float:
        """Return by how much a sum over the slopes may differ from 0 where it is 0."""
        near = (1e-9 if theta.dtype == torch.float64 else 1e-5) * theta.abs().sum()
        share = self.share if z.ndim == 1 else self.share[:, None]
        return float(near + 8 * torch.finfo(z.dtype).eps * (share * z.abs()).sum())

    def distance(self, w: Tensor, b: Tensor, z: Tensor | None = None) -> float:
        """Return the largest distance of 0 from the subdifferential over entries, blocks and intercepts (in `b / unit`).

        Where the subdifferential is not known in closed form: `L |w - prox(w - g/L, 1/L)|`, which is 0 where a proximal step of
        that length stays, and `L` is `step_bound`.
        """
        z = self.predict(w, b) if z is None else z
        theta = self.slope(z)
        g = self.design.correlate(theta)
        if self.penalty.has_distance:
            far = float(self.penalty.distance(w, g).max())
        else:
            length = self.step_bound
            far = length * float((w - self.penalty.prox(w - g / length, 1 / length)).abs().max())
        return max(far, self.unit * float(theta.sum(0).abs().max())) if self.intercept else far

    @cached_property
    def certifies_gap(self) -> bool:
        """Whether a duality gap can be computed."""
        if not self.penalty.is_convex:
            return False
        if self.penalty.penalty is None and self.penalty.ridge == 0:
            return False
        try:
            w, b = self.zeros()
            z = self.design.predict(w)
            self.gap(w, self.settle(z, b))
        except NotImplementedError:
            return False
        return self.penalty.ridge > 0 or not _has_free_directions(self.penalty, w)

    @property
    def measure(self) -> str:
        """What a certificate's residual is, in words."""
        if self.certifies_gap:
            return "duality gap"
        return "distance to the subdifferential" if self.penalty.has_distance else "proximal fixed-point residual"

    def residual(self, w: Tensor, b: Tensor, z: Tensor | None = None) -> float:
        """Return the residual of that measure."""
        return self.gap(w, b, z) if self.certifies_gap else self.distance(w, b, z)

    def tolerance(self, tol: float) -> float:
        """Return what the residual must not exceed: `tol` times the objective at 0 for a gap, times the slope there for a distance.

        A `tol` below 32 units of rounding counts as that many, and a slope that is rounding alone as it would be without intercept.
        """
        precision = torch.finfo(self.design.dtype)
        tol = max(tol, 32 * precision.eps)
        if self.certifies_gap:
            return tol * self.scale
        w, b = self.zeros()
        z = self.design.predict(w)
        raw, slope = (float(self.design.correlate(self.slope(z + c)).abs().max()) for c in (b, self.settle(z, b)))
        return tol * max(slope if slope > 64 * precision.eps * raw else raw, precision.tiny)

    def largest_weight(self) -> float:
        """Return the least weight of a norm at which all weights are 0; infinite for what is no norm."""
        inner = self.penalty.penalty
        if inner is None or not inner.norm:
            return math.inf
        w, b = self.zeros()
        z = self.design.predict(w)
        return float(inner.polar(-self.design.correlate(self.slope(z + self.settle(z, b)))))

    def certify(
        self, w: Tensor, b: Tensor, tol: float, iterations: int, history: Sequence[float] = (), why: str = ""
    ) -> Certificate:
        """Return the certificate of a point, judged afresh; `why` says what stopped the solver where the tolerance is missed."""
        z = self.predict(w, b)
        value = float(self.fit_value(z) + self.penalty.value(w))
        residual, tolerance = self.residual(w, b, z), self.tolerance(tol)
        met = residual <= tolerance
        # a solver's own test may be met where this one is not
        status = "converged" if met else "the tolerance was not reached" if why in ("", "converged") else why
        if not met:
            warnings.warn(
                f"{self.measure} {residual:.3g} misses the tolerance {tolerance:.3g}: {status}.",
                PoiseWarning,
                stacklevel=3,
            )
        return Certificate(
            value=value,
            residual=max(residual, 0.0),
            tolerance=tolerance,
            measure=self.measure,
            iterations=iterations,
            status=status,
            support=self.penalty.active(w).nonzero().squeeze(-1),
            history=tuple(history),
        )


def _has_free_directions(penalty: Scaled, zero: Tensor) -> bool:
    """Say whether the penalty leaves directions uncharged, so that no dual point near the optimum is found by scaling."""
    inner = penalty.penalty
    if isinstance(inner, Indicator):
        return any(not math.isfinite(float(inner.conjugate(torch.full_like(zero, sign)))) for sign in (1.0, -1.0))
    if isinstance(inner, TotalVariation):
        return True
    return isinstance(inner, L1) and inner.scales is not None and bool((inner.scales == 0).any())


def _driver(x: Tensor) -> str | None:
    """Class probabilities add up to 1, so the curvature of softmax intercepts is singular: the least move is asked for."""
    return "gelsd" if x.device.type == "cpu" else None
