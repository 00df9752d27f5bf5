"""Supervised dictionary learning in its lifted form: reconstruction and classification that share a factor.

    sum_s w_s l(y_s, a_s) + xi |X - W H|^2,        l(y, a) = log(1 + sum_c exp(a_c)) - a_y,   class 0 has a = 0

    filter    a_s = beta' W' x_s + Gamma' z_s      theta = [A, B] = W [beta, H]       p x (kappa + n)
    feature   a_s = beta' h_s + Gamma' z_s         theta = [A; B] = [beta'; W] H      (kappa + p) x n

In `A = W beta` (or `beta' H`), `B = W H` and Gamma the sum is convex; that theta has rank r is all that is left of the factors.

    F(A, B, Gamma) = sum_s w_s l(y_s, a_s) + xi |X - B|^2 + nu/2 (|A|^2 + |Gamma|^2)

A and B live on very different curvatures, `nu + |X|^2 / 4` against `2 xi`. The rank does not change when the A part is multiplied by c,
so the step is taken on `[c A, B]` with `c^2 = L / (2 xi)`: B moves to the data at once and A by its own step `1 / L`.

Source: arXiv:2206.06774, sections 2 and 3. The scaling is chosen here.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.solvers.dictionary_data import DataMatrix
from poise.solvers.low_rank import LowRank, SingularTriplets, truncated_svd
from poise.solvers.ridge_logistic import bound_of, curvature_of, multinomial_loss, probabilities, ridge_logistic
from poise.solvers.stacked_matrix import Point

__all__ = ["Factors", "GlobalBound", "SupervisedFactors"]

VARIANTS = ("filter", "feature")


@dataclass(frozen=True)
class Factors:
    """The factors of a solution, `|W|_F = 1`.

    Attributes:
        dictionary: W [p, r].
        codes: H [r, n].
        coefficients: beta [r, kappa].
        covariate_coefficients: Gamma [q, kappa].
    """

    dictionary: Tensor
    codes: Tensor
    coefficients: Tensor
    covariate_coefficients: Tensor


@dataclass(frozen=True)
class GlobalBound:
    """What strong convexity says of every matrix of this rank.

    Attributes:
        value: the objective at the solution.
        lower: no matrix of rank r has less (up to the accuracy of the singular values).
        certified: the two are equal to a millionth.
    """

    value: float
    lower: float

    @property
    def gap(self) -> float:
        """How far the solution can be from the best, relative to its value."""
        return (self.value - self.lower) / max(abs(self.value), 1e-300)

    @property
    def certified(self) -> bool:
        """Whether the solution is the global minimiser to a millionth of its value."""
        return self.gap <= 1e-6


class SupervisedFactors:
    """The lifted objective of supervised dictionary learning, for `LowRankProjectedGradient`.

    Args:
        x: `DataMatrix`, tensor [p, n] or SciPy sparse matrix [p, n]; NaN is a missing entry.
        y: int64 [n], classes 0..kappa; 0 is the reference.
        xi: weight of the reconstruction, at least 0.
        nu: weight of the squares, at least 0.
        variant: "filter" or "feature".
        covariates: float [q, n] that enter the classifier alone (a row of ones is an intercept), or None.
        weights: [n], multiply the classification loss of each sample; ones where it is None.
        scale: "auto" steps on `[c A, B]`, None on `[A, B]` as the paper does.

    Raises:
        InputError: shapes that do not fit, one class only, a weight below 0, or a number out of range.
    """

    def __init__(
        self,
        x: Any,
        y: Tensor,
        *,
        xi: float = 1.0,
        nu: float = 0.1,
        variant: str = "filter",
        covariates: Tensor | None = None,
        weights: Tensor | None = None,
        scale: str | None = "auto",
    ) -> None:
        self.data = x if isinstance(x, DataMatrix) else DataMatrix(x)
        self.dtype, self.device = self.data.dtype, self.data.device
        p, n = self.data.shape
        _check(y, n, xi, nu, variant, scale, weights)
        self.xi, self.nu, self.variant, self.scale = float(xi), float(nu), variant, scale
        self.classes = int(y.max()) + 1
        self.kappa = self.classes - 1
        self.y = torch.nn.functional.one_hot(y.to(self.device), self.classes)[:, 1:].mT.to(self.dtype)
        if covariates is None:
            covariates = torch.zeros(0, n)
        if covariates.ndim != 2 or covariates.shape[1] != n or not bool(torch.isfinite(covariates).all()):
            raise InputError(
                f"SupervisedFactors: covariates are finite numbers [q, {n}], one column for each sample, "
                f"and they are {list(covariates.shape)}."
            )
        self.z = covariates.to(self.device, self.dtype)
        weights = torch.ones(n) if weights is None else weights
        self.weights = weights.to(self.device, self.dtype)
        self.filters = variant == "filter"
        self.shape = (p, self.kappa + n) if self.filters else (self.kappa + p, n)
        self._bound: float | None = None

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def blocks(self, theta: LowRank) -> tuple[Tensor, LowRank]:
        """Return A ([p, kappa] or [kappa, n]) written out, and B as factors."""
        k = self.kappa
        if self.filters:
            return theta.left @ theta.right[:, :k], LowRank(theta.left, theta.right[:, k:])
        return theta.left[:k] @ theta.right, LowRank(theta.left[k:], theta.right)

    def logits(self, a: Tensor, gamma: Tensor) -> Tensor:
        """Return a_s, [kappa, n]."""
        return self._columns(self._classified(a).mT if self.filters else a) + gamma.mT @ self.z

    def _columns(self, x: Tensor) -> Tensor:
        """Undo the root of the sample weights, which columns of the data carry."""
        return x if self.data.root is None else x / self.data.root

    def _classified(self, a: Tensor) -> Tensor:
        """`X' A`, with 0 (after centring the mean) at missing entries."""
        if self.data.missing is None:
            return self.data.transposed_times(a)
        before = self.data.swap(None)
        found = self.data.transposed_times(a)
        self.data.swap(before)
        return found

    def _classified_back(self, r: Tensor) -> Tensor:
        if self.data.missing is None:
            return self.data.times(r)
        before = self.data.swap(None)
        found = self.data.times(r)
        self.data.swap(before)
        return found

    # ---- value and gradient ------------------------------------------------------------------------------------------

    def value(self, point: Point) -> float:
        """Return F."""
        loss, squares = self.parts(point)
        a, _ = self.blocks(point.theta)
        penalty = a.double().square().sum() + self._free(point).double().square().sum()
        return float(loss + self.xi * squares + self.nu / 2 * penalty)

    def parts(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return the classification loss and `|X - B|^2` over the entries that are there, 0-dim float64."""
        a, b = self.blocks(point.theta)
        self.data.fill(b)
        loss = multinomial_loss(self.logits(a, self._free(point)), self.y, self.weights)
        return loss, self.reconstruction(b)

    def reconstruction(self, b: LowRank) -> Tensor:
        """`|X - left right|^2 = |X|^2 - 2 <left' X, right> + |left right|^2`, from products alone."""
        if self.filters:
            cross = (self.data.transposed_times(b.left).mT.double() * b.right).sum()
        else:
            cross = (self.data.times(b.right.mT).double() * b.left).sum()
        square = LowRank(b.left.double(), b.right.double()).squared_norm()
        return (self.data.squared_norm() - 2 * cross + square).clamp_min(0.0)

    def gradients(self, a: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients in A and Gamma: `X R' + nu A` or `R + nu A`, and `Z R' + nu Gamma`, with `R = w (P - Y)`."""
        r = self.weights * (probabilities(self.logits(a, gamma)) - self.y)
        scaled = self._columns(r)
        in_a = self._classified_back(scaled.mT) if self.filters else scaled
        return in_a + self.nu * a, self.z @ r.mT + self.nu * gamma

    def _free(self, point: Point) -> Tensor:
        assert point.free is not None
        return point.free

    # ---- what the solver asks for ------------------------------------------------------------------------------------

    @property
    def bound(self) -> float:
        """An upper bound of the curvature in A (of everything where `scale` is None), by power iteration."""
        if self._bound is None:
            top = curvature_of(self.data, self.z, self.weights, self.filters)
            self._z_ratio = top.ratio
            scaled = self.scale == "auto"
            # One step for everything must suit Gamma too; where A is scaled Gamma has a step of its own.
            main = top.main if scaled else top.main * max(1.0, top.ratio)
            own = bound_of(self.kappa) * top.joint * main + self.nu
            self._bound = own if scaled else max(own, 2 * self.xi)
        return self._bound

    def factor(self, curvature: float) -> float:
        """c, with `c^2 = L / (2 xi)`; for xi = 0 as large as rounding allows, the limit of small xi."""
        if self.scale is None:
            return 1.0
        smallest = curvature * torch.finfo(self.dtype).eps
        return math.sqrt(curvature / max(2 * self.xi, smallest))

    def scaled(self, theta: LowRank, curvature: float, back: bool = False) -> LowRank:
        """Return `[c A, B]` for `[A, B]`, or back."""
        c = self.factor(curvature) ** (-1 if back else 1)
        if self.filters:
            return LowRank(theta.left, torch.cat([c * theta.right[:, : self.kappa], theta.right[:, self.kappa :]], 1))
        return LowRank(torch.cat([c * theta.left[: self.kappa], theta.left[self.kappa :]]), theta.right)

    def stepped(self, point: Point, curvature: float) -> tuple[_Stepped, Tensor]:
        """Return `[c (A - grad_A / L), (1 - t) B + t X]` with `t = 2 xi / L` (1 where A is scaled), and Gamma after its step."""
        a, b = self.blocks(point.theta)
        gamma = self._free(point)
        self.data.fill(b)
        in_a, in_gamma = self.gradients(a, gamma)
        share, pace = 2 * self.xi / curvature, curvature
        if self.scale == "auto":
            _ = self.bound
            share, pace = 1.0, max(curvature - self.nu, 0.1 * curvature) * self._z_ratio + self.nu
        moved = self.factor(curvature) * (a - in_a / curvature)
        return _Stepped(self, moved, b, share), gamma - in_gamma / pace

    def start(self, rank: int, kind: str, generator: torch.Generator) -> Point:
        """Return where to begin.

        svd          the leading space of X, with a classifier fitted on it: the solution for xi -> infinity
        classifier   the space of the best unbound classifier, filled up with that of what it leaves of X: for xi -> 0
        auto         whichever of the two has the lower value
        random       a random matrix of the size of X
        """
        if kind == "auto":
            ends = [self.start(rank, k, generator) for k in ("svd", "classifier")]
            return min(ends, key=self.value)
        if kind == "classifier":
            return self._classifier_first(rank, generator)
        if kind == "svd":
            r = min(rank, *self.data.shape)
            found = truncated_svd(self.data, r, generator=generator, dtype=self.dtype, device=self.device)
            if r < rank:
                found = self._widened(found, rank, generator)
            return self.fitted(found.left if self.filters else found.right)
        p, n = self.data.shape
        size = math.sqrt(float(self.data.squared_norm()) / (p * n * rank))
        left, right = (self._random(s, generator) for s in ((self.shape[0], rank), (rank, self.shape[1])))
        theta = LowRank(left, size * right)
        return Point(theta, 0.1 * self._random((len(self.z), self.kappa), generator))

    def _classifier_first(self, rank: int, generator: torch.Generator) -> Point:
        a, _ = self._unbound()
        u, s, _ = torch.linalg.svd(a if self.filters else a.mT, full_matrices=False)
        # Directions that the classifier uses: at most kappa, and none that rounding made.
        q = u[:, : min(rank, int((s > 1e-6 * s[0]).sum()))] if float(s[0]) > 0 else u[:, :0]
        left = rank - q.shape[1]
        if left:
            rest = _Without(self.data, q, self.filters)
            count = min(left, *self.data.shape)
            found = truncated_svd(rest, count, generator=generator, dtype=self.dtype, device=self.device)
            more = found.left if self.filters else found.right.mT
            if count < left:
                more = torch.cat([more, self._random((len(q), left - count), generator)], 1)
            q = torch.linalg.qr(torch.cat([q, more], 1))[0]
        return self.fitted(q if self.filters else q.mT)

    def _unbound(self, iterations: int = 200) -> tuple[Tensor, Tensor]:
        """Minimise the classification and the squares over A and Gamma of any rank, roughly."""
        p, n = self.data.shape
        a = torch.zeros((p, self.kappa) if self.filters else (self.kappa, n), dtype=self.dtype, device=self.device)
        gamma = torch.zeros(len(self.z), self.kappa, dtype=self.dtype, device=self.device)
        a.requires_grad_()
        gamma.requires_grad_()

        def closure() -> Tensor:
            at, free = a.detach(), gamma.detach()
            a.grad, gamma.grad = self.gradients(at, free)
            loss = multinomial_loss(self.logits(at, free), self.y, self.weights)
            return loss + self.nu / 2 * (at.double().square().sum() + free.double().square().sum())

        limits: dict[str, Any] = {
            "max_iter": iterations,
            "tolerance_grad": 1e-4 * len(self.weights) ** 0.5,
            "tolerance_change": 0.0,
        }
        optimizer = torch.optim.LBFGS([a, gamma], history_size=15, line_search_fn="strong_wolfe", **limits)
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return a.detach(), gamma.detach()

    def _widened(self, found: SingularTriplets, rank: int, generator: torch.Generator) -> SingularTriplets:
        """A basis of more columns than X has rank: only covers `r` up to `n + kappa` (or `p + kappa`)."""
        basis = found.left if self.filters else found.right.mT
        more = self._random((basis.shape[0], rank - basis.shape[1]), generator)
        basis = torch.linalg.qr(torch.cat([basis, more], 1))[0]
        return SingularTriplets(basis, found.values, basis.mT, 0.0)

    def _random(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def fitted(self, basis: Tensor, start: Tensor | None = None) -> Point:
        """Minimise over everything whose column (filter, [p, r]) or row (feature, [r, n]) space is that of an orthonormal basis.

        filter    B = U U' X,  A = U alpha     with alpha, Gamma the ridge logistic regression on U' X
        feature   B = X V V',  A = alpha' V'   on V'
        """
        if self.filters:
            projected = self.data.transposed_times(basis).mT
            clean = projected if self.data.missing is None else self._classified(basis).mT
            alpha, gamma = self._regress(self._columns(clean), start)
            return Point(LowRank(basis, torch.cat([alpha, projected], 1)), gamma)
        alpha, gamma = self._regress(self._columns(basis), start)
        return Point(LowRank(torch.cat([alpha.mT, self.data.times(basis.mT)]), basis), gamma)

    def _regress(self, features: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([features, self.z])
        found = ridge_logistic(inputs, self.y, self.weights, self.nu, start)
        return found[: len(features)], found[len(features) :]

    def corrected(self, spectrum: SingularTriplets, point: Point, curvature: float) -> Point:
        """Return the best point in the column or row space that a step found."""
        a, b = self.blocks(point.theta)
        self.data.fill(b)
        gamma = self._free(point)
        if self.filters:
            return self.fitted(spectrum.left, torch.cat([spectrum.left.mT @ a, gamma]))
        return self.fitted(spectrum.right, torch.cat([spectrum.right @ a.mT, gamma]))

    # ---- quasi-Newton steps on the subspace --------------------------------------------------------------------------

    @property
    def polishes(self) -> bool:
        """Whether everything but the shared space can be eliminated: no entry is missing, and the reconstruction counts."""
        return self.data.missing is None and self.xi > 0

    def polished(self, point: Point, tolerance: float, iterations: int) -> Point:
        """Return a better point of the same rank: quasi-Newton steps on the shared space, everything else eliminated."""
        return _polish(self, point, tolerance, iterations)

    def reduced(self, basis: Tensor, start: Tensor | None) -> tuple[float, Tensor, Point]:
        """Return the value over an orthonormal basis [m, r], its gradient in the basis (tangent), and the point."""
        point = self.fitted(basis if self.filters else basis.mT, start)
        a, _ = self.blocks(point.theta)
        r = self._columns(self.weights * (probabilities(self.logits(a, self._free(point))) - self.y))
        alpha = self.alpha(point)
        if self.filters:
            projected = point.theta.right[:, self.kappa :]
            # One product with X for both terms: X (R' alpha' - 2 xi X' U).
            gradient = self.data.times(r.mT @ alpha.mT - 2 * self.xi * projected.mT)
        else:
            w = point.theta.left[self.kappa :]
            gradient = r.mT @ alpha.mT - 2 * self.xi * self.data.transposed_times(w)
        gradient = gradient - basis @ (basis.mT @ gradient)
        return self.value(point), gradient, point

    def alpha(self, point: Point) -> Tensor:
        """Return the coefficients [r, kappa] on the basis that the point carries."""
        return point.theta.right[:, : self.kappa] if self.filters else point.theta.left[: self.kappa].mT

    # ---- what is known of the solution -------------------------------------------------------------------------------

    def factors(self, theta: LowRank, free: Tensor) -> Factors:
        """Split `theta = U S V'`: W from `U sqrt(S)` and H from `sqrt(S) V'`, scaled so that `|W|_F = 1`."""
        u, s, vt = _decomposed(theta)
        left, right = u * s.sqrt(), s.sqrt()[:, None] * vt
        if self.filters:
            size = left.norm()
            beta, h = size * right[:, : self.kappa], size * right[:, self.kappa :]
            w = left / size
        else:
            size = left[self.kappa :].norm()
            w, beta, h = left[self.kappa :] / size, left[: self.kappa].mT / size, size * right
        return Factors(w, self._columns(h), beta, free)

    def relative_error(self, point: Point) -> float:
        """Return `|X - B| / |X|` over the entries that are there."""
        _, b = self.blocks(point.theta)
        self.data.fill(b)
        squares = self.reconstruction(b)
        total = self.data.squared_norm()
        if self.data.missing is not None:
            kept = self.data.swap(None)
            total = self.data.squared_norm()
            self.data.swap(kept)
        return math.sqrt(float(squares) / max(float(total), 1e-300))

    def global_bound(self, point: Point) -> GlobalBound:
        """Return a lower bound of F over all matrices of this rank.

        F is strongly convex with nu in A and Gamma and 2 xi in B. In the metric where both are `mu`, for every theta' of rank r

            F(theta') >= F(theta) - |grad|^2 / (2 mu) + mu/2 * sum over i > r of s_i(theta - grad / mu)^2

        and where that is F(theta), theta is the global minimiser.
        """
        value = self.value(point)
        if not (self.nu > 0 and self.xi > 0):
            return GlobalBound(value, -math.inf)
        a, b = self.blocks(point.theta)
        gamma = self._free(point)
        self.data.fill(b)
        in_a, in_gamma = self.gradients(a, gamma)
        mu, c = 2 * self.xi, math.sqrt(self.nu / (2 * self.xi))
        if self.data.missing is not None:
            return GlobalBound(value, -math.inf)
        rank = point.theta.left.shape[1]
        moved = _Stepped(self, c * (a - in_a / self.nu), b, 1.0)
        spectrum = truncated_svd(
            moved, rank, start=torch.linalg.qr(point.theta.left)[0], dtype=self.dtype, device=self.device, tolerance=1e-14
        )  # fmt: skip
        tail = float(moved.squared_norm() - spectrum.values.double().square().sum())
        squares = float(self.reconstruction(b)) * mu**2 + float((in_a / c).double().square().sum())
        lower = value - squares / (2 * mu) + mu / 2 * max(tail, 0.0) - float(in_gamma.square().sum()) / (2 * self.nu)
        return GlobalBound(value, min(lower, value))


def _decomposed(theta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values and vectors of a product of thin factors."""
    ql, rl = torch.linalg.qr(theta.left)
    qr, rr = torch.linalg.qr(theta.right.mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT)
    return ql @ u, s, (qr @ vt.mT).mT


@dataclass(frozen=True)
class _Stepped:
    """`[moved, (1 - t) B + t X]`, side by side (filter) or one below the other (feature), by its products."""

    objective: SupervisedFactors
    moved: Tensor
    b: LowRank
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.objective.shape

    def times(self, x: Tensor) -> Tensor:
        k = self.objective.kappa
        if self.objective.filters:
            return self.moved @ x[:k] + self._rest(x[k:])
        return torch.cat([self.moved @ x, self._rest(x)])

    def transposed_times(self, y: Tensor) -> Tensor:
        k = self.objective.kappa
        if self.objective.filters:
            return torch.cat([self.moved.mT @ y, self._rest_transposed(y)])
        return self.moved.mT @ y[:k] + self._rest_transposed(y[k:])

    def _rest(self, x: Tensor) -> Tensor:
        new = self.objective.data.times(x)
        return new if self.share == 1.0 else self.share * new + (1 - self.share) * self.b.times(x)

    def _rest_transposed(self, y: Tensor) -> Tensor:
        new = self.objective.data.transposed_times(y)
        return new if self.share == 1.0 else self.share * new + (1 - self.share) * self.b.transposed_times(y)

    def squared_norm(self) -> Tensor:
        """`|moved|^2 + |(1 - t) B + t X|^2`."""
        t, data = self.share, self.objective.data
        rest = t**2 * data.squared_norm()
        if t != 1.0:
            cross = (data.transposed_times(self.b.left).mT * self.b.right).sum()
            rest = rest + 2 * t * (1 - t) * cross + (1 - t) ** 2 * self.b.squared_norm()
        return self.moved.double().square().sum() + rest


@dataclass(frozen=True)
class _Without:
    """The data without what lies in a space of columns (filter) or rows (feature)."""

    data: DataMatrix
    basis: Tensor
    filters: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    def times(self, x: Tensor) -> Tensor:
        if self.filters:
            return self._off(self.data.times(x))
        return self.data.times(self._off(x))

    def transposed_times(self, y: Tensor) -> Tensor:
        if self.filters:
            return self.data.transposed_times(self._off(y))
        return self._off(self.data.transposed_times(y))

    def _off(self, x: Tensor) -> Tensor:
        return x - self.basis @ (self.basis.mT @ x)


class _Reached(Exception):
    """Ends L-BFGS where the gradient is small enough, or where values no longer tell points apart."""


STALLED, WHOLE = 8, 60
"""Evaluations without a lower value after which a line search has nothing left to compare; whole steps that may follow it."""


class _Polish:
    """The reduced objective over `w = Q R`; its value does not change with R, which makes the curvatures alike.

    A column of the basis that moves changes B by its singular value, so with `R = diag(s)` all columns have curvature `2 xi`.
    """

    def __init__(self, objective: SupervisedFactors, point: Point, tolerance: float) -> None:
        self.objective, self.best, self.value = objective, point, objective.value(point)
        u, s, vt = _decomposed(point.theta)
        self.start = (u if objective.filters else vt.mT) * s.clamp_min(1e-6 * float(s[0]))
        total = float(objective.data.squared_norm())
        self.small = 0.1 * tolerance * 2 * objective.xi * math.sqrt(total)
        self.noise = 16 * torch.finfo(torch.float64).eps * (abs(self.value) + objective.xi * total)
        self.norm, self.since, self.patience = math.inf, 0, STALLED
        self.known: tuple[Tensor, Tensor] | None = None

    def closure(self, w: Tensor) -> Tensor:
        """Set the gradient of `w`, return the value, and remember the best point: the lower, or among equals the flatter one."""
        q, r = torch.linalg.qr(w.detach())
        start = None
        if self.known is not None:
            basis, found = self.known
            start = torch.cat([q.mT @ (basis @ found[: q.shape[1]]), found[q.shape[1] :]])
        value, gradient, at = self.objective.reduced(q, start)
        self.known = (q, torch.cat([self.objective.alpha(at), self.objective._free(at)]))
        w.grad = torch.linalg.solve_triangular(r, gradient.mT, upper=True).mT.contiguous()
        norm = float(w.grad.norm())
        self.since = 0 if value < self.value - self.noise else self.since + 1
        if value < self.value - self.noise or (value <= self.value + self.noise and norm < self.norm):
            self.best, self.value, self.norm, self.start = at, min(value, self.value), norm, w.detach().clone()
        if self.norm <= self.small or self.since > self.patience:
            raise _Reached
        return torch.tensor(value, dtype=torch.float64)

    def run(self, iterations: int, patience: int, **options: Any) -> None:
        """Make quasi-Newton steps from the best point."""
        w = self.start.detach().clone().contiguous().requires_grad_()
        self.known, self.since, self.patience = None, 0, patience
        limits: dict[str, Any] = {
            "max_iter": iterations,
            "max_eval": 2 * iterations,
            "tolerance_grad": 0.0,
            "tolerance_change": 0.0,
        }
        optimizer = torch.optim.LBFGS([w], history_size=15, **limits, **options)
        with contextlib.suppress(_Reached):
            optimizer.step(lambda: self.closure(w))  # type: ignore[no-untyped-call]


def _polish(objective: SupervisedFactors, point: Point, tolerance: float, iterations: int) -> Point:
    """Minimise over the shared space: by line searches while values fall, then by whole steps that gradients alone judge."""
    polish = _Polish(objective, point, tolerance)
    polish.run(iterations, STALLED, line_search_fn="strong_wolfe")
    if polish.norm > polish.small:
        polish.run(WHOLE, WHOLE)
    return polish.best


def _check(y: Tensor, n: int, xi: float, nu: float, variant: str, scale: str | None, weights: Tensor | None) -> None:
    if variant not in VARIANTS:
        raise InputError(f"SupervisedFactors: variant is 'filter' or 'feature', and it is {variant!r}.")
    if scale not in ("auto", None):
        raise InputError(f"SupervisedFactors: scale is 'auto' or None, and it is {scale!r}.")
    for name, number in (("xi", xi), ("nu", nu)):
        if not (math.isfinite(number) and number >= 0):
            raise InputError(f"SupervisedFactors: {name} must be finite and not below 0, and it is {number}.")
    if y.shape != (n,) or y.dtype != torch.int64 or not n or int(y.min()) < 0:
        raise InputError(
            f"SupervisedFactors: y holds one class for each sample, int64 [{n}] from 0, and it is {y.dtype} {list(y.shape)}."
        )
    if len(torch.unique(y)) < 2:
        raise InputError(
            f"SupervisedFactors: all samples have class {int(y[0])}; a classifier needs two classes at least."
        )
    if weights is not None and (
        weights.shape != (n,)
        or not bool((torch.isfinite(weights) & (weights >= 0)).all())
        or not float(weights.sum()) > 0
    ):
        raise InputError(
            f"SupervisedFactors: weights are finite, not below 0, not all 0, [{n}], and they are {list(weights.shape)}."
        )
    if xi == 0:
        warnings.warn(
            "SupervisedFactors: xi is 0, so nothing holds the dictionary to the data: this is logistic regression of low rank.",
            PoiseWarning,
            stacklevel=4,
        )
