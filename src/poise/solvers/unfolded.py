"""Unfolded solvers: T steps of a proximal gradient method as T layers, whose step sizes are learned.

    u_t = x_(t-1) + alpha_t A'(y - A x_(t-1))          a gradient step on 1/2 ||y - A x||^2
    x_t = prox(u_t, alpha_t weight)                    soft threshold (ISTA), hard threshold or k largest (IHT), any proximal map
    alpha_t = a_t / L(A),   L = largest eigenvalue of A'A

The numbers a_t are what is learned, so they carry over from one matrix to another; a_t = 1 is the plain solver, and a constant a_t below 2
converges. Learned steps go beyond 2 in single layers: their product contracts, one of them need not.

Source: arXiv:2509.01331; LISTA: Gregor and LeCun (2010); ALISTA: Liu, Chen, Wang and Yin (2019).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.errors import InputError, PoiseWarning, nearest
from poise.penalties import L0, L1
from poise.solvers.signal_operators import SignalOperator, as_signal_operator, largest_eigenvalue
from poise.solvers.unfolded_layers import TopK, charge_by_row, prox_by_row, require_gradient
from poise.solvers.unfolded_pass import Pass, rows_of
from poise.solvers.unfolded_training import Incremental, UnfoldedTraining, train_unfolded

__all__ = ["Incremental", "TopK", "Unfolded", "UnfoldedTraining", "train_unfolded"]

LEARNED = ("step", "threshold", "matrices")
STABLE = 2.0
"""A constant a_t from here on need not converge."""


class Unfolded(nn.Module):
    """T layers of a proximal gradient method on `min 1/2 ||y - A x||^2 + weight h(x)`, with learned steps.

    Args:
        step: "ista" (convex h, the l1 norm by default) or "iht" (l0 by default, or `TopK(k)`).
        layers: T, at least 1.
        penalty: h: any penalty of `poise.penalties` or closed convex set with a proximal map; `Scaled` carries its own weight.
        weight: of h, finite and >= 0; without meaning for `TopK`.
        learn: what is learned: "step" (a_t); "threshold" (s_t: the layer's proximal step is then `s_t weight / L`, whatever its gradient
            step is); "matrices" (LISTA, with "threshold": `x_t = prox(W y + S x_(t-1), s_t weight / L)`, W, S start at A'/L, 1 - A'A/L).
        shared: one number for all layers.
        tied: one pair of matrices for all layers.
        operator: the matrix that LISTA's matrices start from.
        adjoint: a fixed matrix [m, n] in place of A in the gradient step's adjoint, such as `alista_weights(A)`. L is then 1.
        predict: a module `y [batch, m] -> factors [batch, layers]` of a_t, for steps that depend on the measurement.
        temperature: lends a hard threshold a smooth backward pass; None keeps the derivative that holds almost everywhere.
        recompute: layers of one segment whose activations are computed again in the backward pass; True for sqrt(T), 0 for none.
        gram: apply `A'A` as one matrix; None does where it takes fewer operations (n < 2 m), for dense matrices.
        beyond: the step of layers after the T-th: "last", "cycle" (from the first on again), or "safe" (1 / L).

    Raises:
        InputError: an argument out of range, or arguments that exclude each other.

    >>> model = Unfolded("ista", layers=1, weight=0.5)
    >>> model(torch.eye(2), torch.tensor([[2.0, 0.1]]))
    tensor([[1.5000, 0.0000]], grad_fn=<SubBackward0>)
    """

    step: nn.Parameter
    threshold: nn.Parameter | None
    adjoint: Tensor | None
    start_lipschitz: Tensor | None

    def __init__(
        self,
        step: Literal["ista", "iht"] = "ista",
        layers: int = 20,
        penalty: Any = None,
        learn: Sequence[str] = ("step",),
        *,
        weight: float = 0.1,
        shared: bool = False,
        tied: bool = True,
        operator: Tensor | None = None,
        adjoint: Tensor | None = None,
        predict: nn.Module | None = None,
        temperature: float | None = None,
        recompute: bool | int = False,
        gram: bool | None = None,
        beyond: Literal["last", "cycle", "safe"] = "last",
    ) -> None:
        super().__init__()
        learn = (learn,) if isinstance(learn, str) else tuple(learn)
        penalty = penalty if penalty is not None else L0() if step == "iht" else L1()
        _check(step, layers, penalty, learn, weight, temperature, recompute, beyond)
        self.form, self.layers, self.penalty, self.learn, self.weight = step, layers, penalty, learn, float(weight)
        self.shared, self.beyond, self.gram, self.predict = shared, beyond, gram, predict
        self.segment = math.isqrt(layers - 1) + 1 if recompute is True else int(recompute)
        self.proximal = prox_by_row(penalty, temperature)
        count = 1 if shared else layers
        self.step = nn.Parameter(torch.ones(count), requires_grad="step" in learn)
        self.threshold = nn.Parameter(torch.ones(count)) if "threshold" in learn else None
        self.register_buffer("adjoint", _matrix("adjoint", adjoint))
        self.register_buffer("start_lipschitz", None)
        self.encode, self.carry = nn.ParameterList(), nn.ParameterList()
        if "matrices" in learn:
            self._start_matrices(_matrix("operator", operator), 1 if tied else layers)

    def _start_matrices(self, operator: Tensor | None, count: int) -> None:
        if operator is None or self.adjoint is not None:
            raise InputError("unfolded: learned matrices start from a matrix: give operator=A [m, n], and no adjoint.")
        bound = largest_eigenvalue(operator)
        self.register_buffer("start_lipschitz", bound)
        eye = torch.eye(operator.shape[1], dtype=operator.dtype, device=operator.device)
        for _ in range(count):
            self.encode.append(nn.Parameter(operator.mH / bound))
            self.carry.append(nn.Parameter(eye - operator.mH @ operator / bound))

    # ---- what is learned ---------------------------------------------------------------------------------------------

    @property
    def steps(self) -> Tensor:
        """The learned numbers a_t, `[layers]`: steps in units of 1/L."""
        return self.step.detach().expand(self.layers).clone()

    def set_steps(self, steps: Sequence[float] | Tensor) -> None:
        """Start from given numbers a_t, such as those of another training or `L * chebyshev_steps(...)`.

        Raises:
            InputError: there are not as many as layers, or one is not finite and above 0.
        """
        given = torch.as_tensor(steps, dtype=self.step.dtype, device=self.step.device)
        if given.shape != self.step.shape:
            raise InputError(f"unfolded: {len(self.step)} steps are learned, and {list(given.shape)} are given.")
        if not bool((torch.isfinite(given) & (given > 0)).all()):
            raise InputError("unfolded: every step must be finite and above 0.")
        with torch.no_grad():
            self.step.copy_(given)

    def alpha(self, operator: Any) -> Tensor:
        """Return the steps on this operator, `a_t / L`: `[layers]`, or `[batch, layers]` for a batch of operators."""
        bound = self.bound(as_signal_operator(operator))
        return self.steps / bound

    def export(self, operator: Any) -> list[float]:
        """Return the steps on one operator as numbers, for any proximal solver that takes a list: `recover(..., step=list)`.

        Raises:
            InputError: what was learned is more than steps, or the operator is a batch.
        """
        if self.learn != ("step",) or self.predict is not None or self.adjoint is not None:
            raise InputError(
                "unfolded: only learned steps can be exported; this model also learned or was given something else."
            )
        alpha = self.alpha(operator)
        if alpha.ndim > 1:
            raise InputError("unfolded: every operator of a batch has steps of its own: export for one of them.")
        return [float(a) for a in alpha]

    def clamp_(self, least: float = 1e-3) -> None:
        """Raise steps to at least `least / L` and thresholds to at least 0, in place."""
        with torch.no_grad():
            self.step.clamp_(min=least)
            if self.threshold is not None:
                self.threshold.clamp_(min=0.0)

    def at(self, layer: int) -> int:
        """Return whose numbers a layer uses, layers counted from 0."""
        if self.shared:
            return 0
        return layer % self.layers if self.beyond == "cycle" else min(layer, self.layers - 1)

    def bound(self, operator: SignalOperator) -> Tensor:
        """Return what learned numbers are divided by."""
        if self.adjoint is not None:
            return self.step.new_ones(())
        return operator.lipschitz

    # ---- layers --------------------------------------------------------------------------------------------------------

    @overload
    def forward(
        self,
        operator: Any,
        y: Tensor,
        x0: Tensor | None = None,
        *,
        layers: int | None = None,
        trace: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, operator: Any, y: Tensor, x0: Tensor | None = None, *, layers: int | None = None, trace: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, operator: Any, y: Tensor, x0: Tensor | None = None, *, layers: int | None = None, trace: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the layers.

        Args:
            operator: A: `[m, n]`, `[batch, m, n]`, or a `SignalOperator`.
            y: measurements, `[batch, m]` or `[m]`.
            x0: where to start, `[batch, n]` or `[n]`; 0 by default.
            layers: how many; fewer or more than T. More warns where a step that is used again is beyond 2 / L.
            trace: also return every layer's output.

        Returns: x `[batch, n]` (or `[n]`), and with `trace` the pair of it and all layers `[layers, batch, n]` (or `[layers, n]`).

        Raises:
            InputError: shapes that do not fit, or NaN in the measurements.
        """
        A = as_signal_operator(operator)
        depth = self.layers if layers is None else layers
        rows, start = rows_of(A, y, x0)
        self._warn_beyond(depth)
        if depth < 1:
            raise InputError(f"unfolded: layers must be at least 1, and it is {depth}.")
        run = Pass(self, A, rows)
        outputs: list[Tensor] = []
        x = start
        segment = self.segment if self.segment and torch.is_grad_enabled() else depth
        for first in range(0, depth, segment):
            part = range(first, min(first + segment, depth))
            wanted = (x, part, trace)
            made = run.layers(*wanted) if segment == depth else checkpoint(run.layers, *wanted, use_reentrant=False)
            outputs = outputs + made if trace else made
            x = made[-1]
        last = outputs[-1]
        if torch.is_grad_enabled():
            require_gradient(self.penalty, self.step if self.threshold is None else self.threshold, last)
        single = y.ndim == 1
        last = last[0] if single else last
        if not trace:
            return last
        every = torch.stack(outputs)
        return last, every[:, 0] if single else every

    def _warn_beyond(self, depth: int) -> None:
        if depth <= self.layers or self.beyond == "safe" or "matrices" in self.learn:
            return
        used = [float(self.step[self.at(t)]) for t in range(self.layers, depth)]
        if max(used) > STABLE:
            warnings.warn(
                f"unfolded: {depth} layers are asked for and {self.layers} have steps; a step that is used again is {max(used):.3g} / L, "
                "beyond the 2 / L up to which repeated steps converge, so the result may diverge. Train more layers, or unfold with "
                "beyond='safe'.",
                PoiseWarning,
                stacklevel=4,
            )

    # ---- the objective -------------------------------------------------------------------------------------------------

    def objective(self, operator: Any, y: Tensor, x: Tensor) -> Tensor:
        """Return `1/2 ||y - A x||^2 + weight h(x)` of every signal, `[batch]`; of a trace `[layers, batch, n]`, `[layers, batch]`."""
        A = as_signal_operator(operator)
        if x.ndim == 3:
            return torch.stack([self.objective(A, y, each) for each in x])
        residual = A.residual(x, y)
        fit = 0.5 * (
            residual.real.square() + residual.imag.square() if residual.is_complex() else residual.square()
        ).sum(-1)
        weight = 1.0 if isinstance(self.penalty, TopK) else self.weight  # an indicator has no weight
        return fit + weight * charge_by_row(self.penalty, x)

    def prox(self, point: Tensor, alpha: Tensor) -> Tensor:
        """Return the proximal map of `alpha weight h`, row by row; `alpha` is 0-dim or `[batch, 1]`."""
        return self.proximal(point, alpha * self.weight)

    def extra_repr(self) -> str:
        return f"{self.form}, layers={self.layers}, penalty={type(self.penalty).__name__}, weight={self.weight:g}, learn={self.learn}"


def _matrix(name: str, matrix: Tensor | None) -> Tensor | None:
    if matrix is not None and (not isinstance(matrix, Tensor) or matrix.ndim != 2):
        raise InputError(f"unfolded: {name} must be one matrix [m, n].")
    return matrix if matrix is None else matrix.detach().clone()


def _check(
    step: str,
    layers: Any,
    penalty: Any,
    learn: tuple[str, ...],
    weight: float,
    temperature: float | None,
    recompute: int,
    beyond: str,
) -> None:
    if step not in ("ista", "iht"):
        raise InputError(f"unfolded: step is 'ista' or 'iht', and it is {step!r}.{nearest(str(step), ['ista', 'iht'])}")
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise InputError(f"unfolded: layers must be an integer of at least 1, and it is {layers!r}.")
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"unfolded: weight must be finite and at least 0, and it is {weight}.")
    if not (hasattr(penalty, "prox") and hasattr(penalty, "value")):
        raise InputError(
            f"unfolded: a penalty has value(x) and prox(point, step), and {type(penalty).__name__} has not."
        )
    hard = isinstance(penalty, L0 | TopK)
    if (step == "iht") != hard:
        fits = (
            "L0() or TopK(k)"
            if step == "iht"
            else "a penalty that is no count of entries; for L0 and TopK say step='iht'"
        )
        raise InputError(f"unfolded: step={step!r} goes with {fits}, and the penalty is {type(penalty).__name__}.")
    for each in learn:
        if each not in LEARNED:
            raise InputError(
                f"unfolded: learn names some of {', '.join(LEARNED)}, and {each!r} is none.{nearest(each, LEARNED)}"
            )
    if "matrices" in learn and "step" in learn:
        raise InputError(
            "unfolded: learned matrices contain the step; learn 'threshold' and 'matrices', without 'step'."
        )
    if "threshold" in learn and isinstance(penalty, TopK | L0):
        which = (
            "TopK has no threshold" if isinstance(penalty, TopK) else "a hard threshold has no derivative in its level"
        )
        if isinstance(penalty, TopK) or temperature is None:
            raise InputError(f"unfolded: {which}, so it cannot be learned. Learn 'step', or give L0 a temperature.")
    if temperature is not None and not (isinstance(penalty, L0) and temperature > 0):
        raise InputError(
            f"unfolded: temperature is above 0 and smooths the backward pass of L0 alone, and it is {temperature}."
        )
    if recompute < 0:
        raise InputError(f"unfolded: recompute counts layers of a segment, so it is at least 0, and it is {recompute}.")
    if beyond not in ("last", "cycle", "safe"):
        raise InputError(f"unfolded: beyond is 'last', 'cycle' or 'safe', and it is {beyond!r}.")
