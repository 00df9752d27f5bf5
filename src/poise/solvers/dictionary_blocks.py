"""Supervised dictionary learning by blocks: for factors that must not be negative, or that carry penalties of their own.

    filter     W  ->  H  ->  beta, Gamma              feature    W  ->  beta, Gamma  ->  H

Each block is convex while the others stand still, and is solved by accelerated proximal gradient steps from where it is. Where it would
move further than the radius

    r_k = c (k + 1)^(-decay) / log(k + 2)

it is pulled back towards its start on a straight line, which keeps its constraints and cannot raise the value. Diminishing radii give
stationary points in O(1/eps (log 1/eps)^2) cycles; without a radius it is plain block coordinate descent.

Source: arXiv:2206.06774, algorithm BCD. Chosen here: exact constants for the steps, and factors that keep their scale while they are
penalised. Rescaling W alone after each update changes the objective.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.operators import require_count
from poise.penalties import soft_threshold
from poise.problem import Certificate
from poise.solvers.dictionary_objective import Factors, SupervisedFactors
from poise.solvers.low_rank import LowRank
from poise.solvers.ridge_logistic import bound_of, curvature_of, probabilities, ridge_logistic
from poise.solvers.stacked_matrix import Point

__all__ = ["BlockCoordinateDescent", "BlockSolution", "FactorPenalty", "proximal_descent"]


@dataclass(frozen=True)
class FactorPenalty:
    """`l1 sum |x| + l2/2 sum x^2`, and no entry below 0 where `nonnegative`.

    >>> FactorPenalty(l1=1.0, nonnegative=True).prox(torch.tensor([3.0, -3.0]), 0.5)
    tensor([2.5000, 0.0000])
    """

    l1: float = 0.0
    l2: float = 0.0
    nonnegative: bool = False

    def __post_init__(self) -> None:
        for name, number in (("l1", self.l1), ("l2", self.l2)):
            if not (math.isfinite(number) and number >= 0):
                raise InputError(f"FactorPenalty: {name} must be finite and not below 0, and it is {number}.")

    @property
    def acts(self) -> bool:
        """Whether it is not 0 everywhere."""
        return self.l1 > 0 or self.l2 > 0 or self.nonnegative

    def value(self, x: Tensor) -> Tensor:
        """Return what it charges for entries that are allowed, 0-dim float64."""
        return self.l1 * x.double().abs().sum() + self.l2 / 2 * x.double().square().sum()

    def prox(self, x: Tensor, step: float) -> Tensor:
        """Return `argmin_u |u - x|^2 / 2 + step h(u)`."""
        moved = (x - step * self.l1).clamp_min(0.0) if self.nonnegative else soft_threshold(x, step * self.l1)
        return moved / (1.0 + step * self.l2)


FREE = FactorPenalty()
"""No penalty."""


@dataclass(frozen=True)
class BlockSolution:
    """Factors, and what is known of them.

    Attributes:
        factors: W, H, beta, Gamma; `|W|_F = 1` where no penalty holds their scale.
        certificate: its residual is the largest relative move of a block under one proximal gradient step; its history has one
            value for each cycle.
        blocks: the value after every single block.
    """

    factors: Factors
    certificate: Certificate
    blocks: tuple[float, ...]


@dataclass
class _State:
    w: Tensor
    h: Tensor  # times the roots of the sample weights, as the data are
    beta: Tensor
    gamma: Tensor


class BlockCoordinateDescent:
    """Minimise supervised dictionary learning over its factors, block by block.

    Args:
        rank: r.
        dictionary, codes, coefficients: penalties of W, H and beta.
        decay: of the radius, 0.5 or 1 in the paper; None for no radius.
        radius: c; `max_iter |X|` where it is None.
        inner: proximal steps of one block.
        tol: relative fall of the value over a cycle at which it ends, and of the certificate's residual.
        max_iter: cycles at most.
        seed: of the random start.

    Raises:
        InputError: an argument is out of range.
    """

    name = "block_coordinate_descent"

    def __init__(
        self,
        rank: int,
        *,
        dictionary: FactorPenalty = FREE,
        codes: FactorPenalty = FREE,
        coefficients: FactorPenalty = FREE,
        decay: float | None = None,
        radius: float | None = None,
        inner: int = 20,
        tol: float = 1e-6,
        max_iter: int = 200,
        seed: int = 0,
    ) -> None:
        self.rank = require_count(self.name, rank)
        self.penalties = (dictionary, codes, coefficients)
        for label, number in (("decay", decay), ("radius", radius), ("tol", tol)):
            if number is not None and not (math.isfinite(number) and number > 0):
                raise InputError(f"{self.name}: {label} must be finite and above 0, and it is {number}.")
        self.decay, self.radius, self.tol, self.seed = decay, radius, tol, seed
        self.inner, self.max_iter = require_count(self.name, inner), require_count(self.name, max_iter)

    def minimize(self, objective: SupervisedFactors, start: Factors | None = None) -> BlockSolution:
        """Minimise from given factors, or from random ones.

        Returns:
            Factors and certificate; what misses its tolerance says so in `status` and as a PoiseWarning.

        Raises:
            InputError: the data are negative and no factor may be, or the rank is too large.
        """
        p, n = objective.data.shape
        if self.rank > min(p, n):
            raise InputError(
                f"{self.name}: the data are {p} x {n}, so a dictionary has {min(p, n)} columns at most, and rank is {self.rank}."
            )
        refuse_negative(objective, *self.penalties[:2])
        run = _Cycles(self, objective, self._begin(objective) if start is None else self._taken(objective, start))
        status = run.cycle()
        residual = run.residual()
        if residual > self.tol:
            warnings.warn(
                f"{self.name}: {status} with relative move {residual:.3g}; {self.tol:.3g} was asked for.",
                PoiseWarning,
                stacklevel=2,
            )
        else:
            status = "converged"
        certificate = Certificate(
            run.history[-1], residual, self.tol, "largest relative move of a block", len(run.history) - 1, status,
            feasible=run.feasible(), history=tuple(run.history),
        )  # fmt: skip
        return BlockSolution(run.factors(), certificate, tuple(run.blocks))

    def _begin(self, objective: SupervisedFactors) -> _State:
        """W uniform in [0, 1] (of both signs where it may have them), H what reconstructs best with it; beta uniform in [-1, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        p, n = objective.data.shape

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64).to(objective.device, objective.dtype)

        dictionary, codes, _ = self.penalties
        w = uniform(p, self.rank)
        if not (dictionary.nonnegative and codes.nonnegative):
            # Data of both signs need one factor of both signs.
            w = w if dictionary.nonnegative else 2 * w - 1
        w = w * math.sqrt(math.sqrt(float(objective.data.squared_norm())) / max(float(w.square().sum()), 1e-300))
        gram, cross = w.mT @ w, objective.data.transposed_times(w).mT
        h = proximal_descent(
            w.new_zeros(self.rank, n), lambda h: 2 * (gram @ h - cross), 2 * _top(gram), FactorPenalty(nonnegative=codes.nonnegative), 100
        )  # fmt: skip
        beta = 2 * uniform(self.rank, objective.kappa) - 1
        return _State(w, h, beta, beta.new_zeros(len(objective.z), objective.kappa))

    def _taken(self, objective: SupervisedFactors, start: Factors) -> _State:
        w, h = start.dictionary.clone(), start.codes.clone()
        if objective.data.root is not None:
            h = h * objective.data.root
        dictionary, codes, _ = self.penalties
        w = w.clamp_min(0.0) if dictionary.nonnegative else w
        h = h.clamp_min(0.0) if codes.nonnegative else h
        return _State(w, h, start.coefficients.clone(), start.covariate_coefficients.clone())


def refuse_negative(objective: SupervisedFactors, dictionary: FactorPenalty, codes: FactorPenalty) -> None:
    """Refuse data below 0 where both factors must not be.

    Raises:
        InputError: with the least entry.
    """
    if not (dictionary.nonnegative and codes.nonnegative):
        return
    data = objective.data
    least = float(data.raw.min())
    if data.mean is not None or least < 0:
        why = "are centred" if data.mean is not None else f"go down to {least:.4g}"
        raise InputError(
            f"block_coordinate_descent: both factors must not be negative, so the data must not be either, and they {why}. "
            "Shift them, do not centre them, or let one factor have both signs."
        )


class _Cycles:
    """The iterates of one run."""

    def __init__(self, solver: BlockCoordinateDescent, objective: SupervisedFactors, state: _State) -> None:
        self.solver, self.objective, self.state = solver, objective, state
        self.kappa_bound = bound_of(objective.kappa)
        self.top = curvature_of(objective.data, objective.z, objective.weights, objective.filters).main
        self.size = math.sqrt(float(objective.data.squared_norm()))
        self.history = [self.value()]
        self.blocks = [self.history[0]]

    def cycle(self) -> str:
        """Cycle through the blocks until the value stands still."""
        order = (self._move_w, self._move_h, self._move_beta)
        if not self.objective.filters:
            order = (self._move_w, self._move_beta, self._move_h)
        for k in range(self.solver.max_iter):
            for move in order:
                move(self._radius(k))
                self.blocks.append(self.value())
            self.history.append(self.blocks[-1])
            fall = self.history[-2] - self.history[-1]
            if k >= 2 and fall <= 1e-2 * self.solver.tol * abs(self.history[-1]):
                return f"the value stands still after {k + 1} cycles"
        return f"stopped after {self.solver.max_iter} cycles"

    def _radius(self, k: int) -> float:
        if self.solver.decay is None:
            return math.inf
        c = self.solver.max_iter * self.size if self.solver.radius is None else self.solver.radius
        return float(c * (k + 1) ** -self.solver.decay / math.log(k + 2))

    def value(self) -> float:
        """F at the factors, and their penalties."""
        own = self.objective.value(self.point())
        parts = (self.state.w, self.state.h, self.state.beta)
        return own + sum(float(h.value(x)) for h, x in zip(self.solver.penalties, parts, strict=True))

    def point(self) -> Point:
        """The lifted point of the factors."""
        s = self.state
        if self.objective.filters:
            return Point(LowRank(s.w, torch.cat([s.beta, s.h], 1)), s.gamma)
        return Point(LowRank(torch.cat([s.beta.mT, s.w]), s.h), s.gamma)

    def factors(self) -> Factors:
        """The factors; where nothing holds their scale, with `|W|_F = 1`."""
        s, size = self.state, float(self.state.w.norm())
        if any(p.l1 or p.l2 for p in self.solver.penalties) or size == 0:
            size = 1.0
        beta = s.beta * size if self.objective.filters else s.beta / size
        return Factors(s.w / size, self.objective._columns(s.h * size), beta, s.gamma)

    def feasible(self) -> bool | None:
        """Whether no entry is negative that must not be; None where none must not."""
        held = [
            x
            for p, x in zip(self.solver.penalties, (self.state.w, self.state.h, self.state.beta), strict=True)
            if p.nonnegative
        ]
        return all(bool((x >= 0).all()) for x in held) if held else None

    # ---- blocks ------------------------------------------------------------------------------------------------------

    def _residuals(self, logits: Tensor) -> Tensor:
        o = self.objective
        return o._columns(o.weights * (probabilities(logits) - o.y))

    def w_block(self) -> tuple[Callable[[Tensor], Tensor], float]:
        """Gradient and curvature in W: `2 xi (W H H' - X H')`, and for the filter `X R' beta' + nu W beta beta'`."""
        o, s = self.objective, self.state
        o.data.fill(LowRank(s.w, s.h))
        gram, cross, outer = s.h @ s.h.mT, o.data.times(s.h.mT), s.beta @ s.beta.mT
        curvature = 2 * o.xi * _top(gram)

        def gradient(w: Tensor) -> Tensor:
            found = 2 * o.xi * (w @ gram - cross)
            if o.filters:
                r = self._residuals(o.logits(w @ s.beta, s.gamma))
                found = found + o._classified_back(r.mT) @ s.beta.mT + o.nu * (w @ outer)
            return found

        if o.filters:
            curvature += (self.kappa_bound * self.top + o.nu) * _top(outer)
        return gradient, curvature

    def h_block(self) -> tuple[Callable[[Tensor], Tensor], float]:
        """Gradient and curvature in H: `2 xi (W'W H - W'X)`, and for the feature variant `beta R + nu beta beta' H`."""
        o, s = self.objective, self.state
        o.data.fill(LowRank(s.w, s.h))
        gram, cross, outer = s.w.mT @ s.w, o.data.transposed_times(s.w).mT, s.beta @ s.beta.mT
        curvature = 2 * o.xi * _top(gram)

        def gradient(h: Tensor) -> Tensor:
            found = 2 * o.xi * (gram @ h - cross)
            if not o.filters:
                found = found + s.beta @ self._residuals(o.logits(s.beta.mT @ h, s.gamma)) + o.nu * (outer @ h)
            return found

        if not o.filters:
            curvature += (self.kappa_bound * self.top + o.nu) * _top(outer)
        return gradient, curvature

    def beta_block(self) -> tuple[Callable[[Tensor], Tensor], float, Tensor]:
        """Gradient and curvature in `[beta; Gamma]`, and the ridge `W'W` (or `H H'`) that `nu/2 |A|^2` means for beta."""
        o, s = self.objective, self.state
        features = self._features()
        ridge = s.w.mT @ s.w if o.filters else s.h @ s.h.mT
        inputs = torch.cat([features, o.z])
        r = len(features)

        def gradient(both: Tensor) -> Tensor:
            rest = o.weights * (probabilities(both.mT @ inputs) - o.y)
            return inputs @ rest.mT + o.nu * torch.cat([ridge @ both[:r], both[r:]])

        curvature = self.kappa_bound * _top((inputs * o.weights) @ inputs.mT) + o.nu * max(1.0, _top(ridge))
        return gradient, curvature, ridge

    def _features(self) -> Tensor:
        o, s = self.objective, self.state
        return o._columns(o._classified(s.w).mT) if o.filters else o._columns(s.h)

    def _move_w(self, radius: float) -> None:
        gradient, curvature = self.w_block()
        self.state.w = self._moved(self.state.w, gradient, curvature, self.solver.penalties[0], radius, "w")

    def _move_h(self, radius: float) -> None:
        gradient, curvature = self.h_block()
        self.state.h = self._moved(self.state.h, gradient, curvature, self.solver.penalties[1], radius, "h")

    def _moved(
        self,
        start: Tensor,
        gradient: Callable[[Tensor], Tensor],
        curvature: float,
        penalty: FactorPenalty,
        radius: float,
        block: str,
    ) -> Tensor:
        if curvature == 0:
            return start
        before = self.blocks[-1]
        for momentum in (True, False):
            found = proximal_descent(start, gradient, curvature, penalty, self.solver.inner, momentum)
            found = _pulled(start, found, radius)
            setattr(self.state, block, found)
            # Extrapolated steps may end higher; plain ones cannot.
            if self.value() <= before:
                return found
        return start

    def _move_beta(self, radius: float) -> None:
        o, s, penalty = self.objective, self.state, self.solver.penalties[2]
        start, before = torch.cat([s.beta, s.gamma]), self.blocks[-1]
        if penalty.acts:
            gradient, curvature, _ = self.beta_block()
            # Only beta is penalised: the covariates' part of the step is a plain gradient step.
            found = _partly_proximal(start, gradient, curvature, penalty, len(s.beta), 10 * self.solver.inner)
        else:
            found = self._regressed()
        found = _pulled(start, found, radius)
        s.beta, s.gamma = found[: len(s.beta)], found[len(s.beta) :]
        if self.value() > before:
            s.beta, s.gamma = start[: len(found) - len(o.z)], start[len(found) - len(o.z) :]

    def _regressed(self) -> Tensor:
        """Newton's method in coordinates where the ridge `nu/2 |W beta|^2` is `nu/2 |b|^2`."""
        o, s = self.objective, self.state
        features = self._features()
        ridge = s.w.mT @ s.w if o.filters else s.h @ s.h.mT
        values, vectors = torch.linalg.eigh(ridge)
        kept = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
        root = vectors[:, kept] / values[kept].sqrt()
        found = ridge_logistic(
            torch.cat([root.mT @ features, o.z]), o.y, o.weights, o.nu,
            torch.cat([(vectors[:, kept] * values[kept].sqrt()).mT @ s.beta, s.gamma]),
        )  # fmt: skip
        count = int(kept.sum())
        return torch.cat([root @ found[:count], found[count:]])

    def residual(self) -> float:
        """The largest move of a block under one proximal gradient step, over the block."""
        s, (first, second, third) = self.state, self.solver.penalties
        moves = []
        for x, (gradient, curvature), penalty in ((s.w, self.w_block(), first), (s.h, self.h_block(), second)):
            if curvature > 0:
                moves.append(
                    float(
                        (penalty.prox(x - gradient(x) / curvature, 1 / curvature) - x).norm()
                        / x.norm().clamp_min(1e-300)
                    )
                )
        gradient, curvature, _ = self.beta_block()
        both = torch.cat([s.beta, s.gamma])
        moved = _partly_proximal(both, gradient, curvature, third, len(s.beta), 1)
        moves.append(float((moved - both).norm() / both.norm().clamp_min(1.0)))
        return max(moves)


def proximal_descent(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    curvature: float,
    penalty: FactorPenalty,
    iterations: int,
    momentum: bool = True,
    tolerance: float = 0.0,
) -> Tensor:
    """Return the end of proximal gradient steps of length `1 / curvature`, extrapolated with restarts.

    Args:
        start: any shape.
        gradient: of the smooth part.
        curvature: its Lipschitz constant.
        penalty: the other part.
        iterations: at most.
        momentum: extrapolate, and begin anew where a step turns back.
        tolerance: relative move of one step at which it ends.
    """
    x = y = start
    pace = 1.0
    for _ in range(iterations):
        new = penalty.prox(y - gradient(y) / curvature, 1.0 / curvature)
        moved = new - x
        if float(moved.norm()) <= tolerance * float(new.norm()):
            return new
        if momentum and float(((y - new) * moved).sum()) > 0:
            pace = 1.0
        after = (1.0 + math.sqrt(1.0 + 4.0 * pace**2)) / 2.0
        y = new + ((pace - 1.0) / after) * moved if momentum else new
        x, pace = new, after
    return x


def _partly_proximal(
    start: Tensor,
    gradient: Callable[[Tensor], Tensor],
    curvature: float,
    penalty: FactorPenalty,
    rows: int,
    iterations: int,
) -> Tensor:
    x = start
    for _ in range(iterations):
        y = x - gradient(x) / curvature
        x = torch.cat([penalty.prox(y[:rows], 1.0 / curvature), y[rows:]])
    return x


def _pulled(start: Tensor, end: Tensor, radius: float) -> Tensor:
    length = float((end - start).norm())
    return end if length <= radius else start + (radius / length) * (end - start)


def _top(gram: Tensor) -> float:
    return max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0) if gram.numel() else 0.0
