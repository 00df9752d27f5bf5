"""One pass over the layers of an unfolded solver."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poise.errors import InputError
from poise.solvers.signal_operators import SignalOperator

if TYPE_CHECKING:
    from poise.solvers.unfolded import Unfolded

__all__ = ["Pass", "rows_of"]


class Pass:
    """One pass over the layers: what they share is looked up once."""

    def __init__(self, model: Unfolded, A: SignalOperator, y: Tensor) -> None:
        self.model, self.A, self.y = model, A, y
        self.bound = model.bound(A).to(y.real.dtype)
        self.factors = model.predict(y) if model.predict is not None else None
        if self.factors is not None and self.factors.shape != (len(y), model.layers):
            raise InputError(
                f"unfolded: predict must return [batch, layers] = [{len(y)}, {model.layers}], and it returns {list(self.factors.shape)}."
            )
        m, n = A.shape
        gram = model.gram if model.gram is not None else A.matrix is not None and A.matrix.ndim == 2 and n < 2 * m
        self.gram = A.gram() if gram and model.adjoint is None and not model.encode else None
        if model.gram and self.gram is None:
            raise InputError("unfolded: gram=True needs one dense matrix, and neither adjoint nor learned matrices.")
        self.back = A.adjoint(y) if self.gram is not None else None
        # one backward pass of unbind() in place of one of every index
        self.step = model.step.unbind()
        self.threshold = None if model.threshold is None else model.threshold.unbind()
        start = model.start_lipschitz
        self.unit = 1.0 / (self.bound if start is None else start.to(y.real.dtype))

    def layers(self, x: Tensor | None, which: range, every: bool) -> list[Tensor]:
        """Return the outputs of some layers, or of the last of them alone."""
        made: list[Tensor] = []
        for t in which:
            x = self._learned(x, t) if self.model.encode else self._gradient(x, t)
            made = [*made, x] if every else [x]
        return made

    def _gradient(self, x: Tensor | None, t: int) -> Tensor:
        model, alpha = self.model, self._alpha(t)
        if self.gram is not None:
            assert self.back is not None
            slope = self.back if x is None else torch.addmm(self.back, x, self.gram.mT, alpha=-1)
        else:
            r = self.y if x is None else self.A.residual(x, self.y)
            slope = self.A.adjoint(r) if model.adjoint is None else r @ model.adjoint.conj()
        u = alpha * slope if x is None else torch.addcmul(x, alpha.to(x.dtype), slope)
        return model.proximal(u, self._level(t, alpha))

    def _learned(self, x: Tensor | None, t: int) -> Tensor:
        model = self.model
        i = 0 if len(model.encode) == 1 else model.at(t)
        u = self.y @ model.encode[i].mT
        if x is not None:
            u = u + x @ model.carry[i].mT
        return model.proximal(u, self._level(t, self.unit))

    def _alpha(self, t: int) -> Tensor:
        model = self.model
        if model.beyond == "safe" and t >= model.layers:
            return self.unit
        alpha = self.step[model.at(t)] * self.unit
        return alpha if self.factors is None else alpha * self.factors[:, model.at(t), None]

    def _level(self, t: int, alpha: Tensor) -> Tensor:
        """Return the layer's proximal step with the weight in it: the gradient's step, or a learned share of 1/L."""
        model = self.model
        if self.threshold is None or (model.beyond == "safe" and t >= model.layers):
            return alpha * model.weight
        return self.unit * model.weight * self.threshold[model.at(t)]


def rows_of(A: SignalOperator, y: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return measurements and start as rows, checked."""
    m, n = A.shape
    batch = A.matrix.shape[0] if A.matrix is not None and A.matrix.ndim == 3 else None
    rows = y[None] if y.ndim == 1 else y
    if rows.ndim != 2 or rows.shape[1] != m or (batch is not None and rows.shape[0] != batch):
        raise InputError(
            f"unfolded: y must be [{'batch' if batch is None else batch}, {m}] for an operator with m = {m} and n = {n}, and it is "
            f"{list(y.shape)}."
        )
    if rows.dtype != A.dtype:
        raise InputError(f"unfolded: y is {y.dtype} and the operator is {A.dtype}: bring both to one dtype.")
    if not bool(torch.isfinite(rows).all()):
        raise InputError("unfolded: y has NaN or infinite entries.")
    if x0 is None:
        return rows, None
    start = x0[None] if x0.ndim == 1 else x0
    if start.shape != (len(rows), n) or start.dtype != rows.dtype:
        raise InputError(
            f"unfolded: x0 must be {rows.dtype} [{len(rows)}, {n}], and it is {x0.dtype} {list(x0.shape)}."
        )
    return rows, start
