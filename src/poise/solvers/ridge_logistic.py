"""Multinomial logistic regression with a ridge, class 0 as reference: loss, probabilities, curvature, and Newton's method.

    l(y, a) = log(1 + sum_c exp(a_c)) - a_y,     P_c = exp(a_c) / (1 + sum exp(a))

Logits are [kappa, n], one row for each class but the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from poise.solvers.dictionary_data import DataMatrix

__all__ = ["TopCurvature", "bound_of", "curvature_of", "multinomial_loss", "probabilities", "ridge_logistic"]

_DENSE = 1200
"""Unknowns up to which Newton's matrix is formed."""


NEAR = 1e-10
"""Expected fall of the value, relative to it, below which Newton's steps are judged by the gradient."""


def bound_of(kappa: int) -> float:
    """Return the largest second derivative of the loss in the logits: 1/4 for two classes, 1/2 for more."""
    return 0.25 if kappa == 1 else 0.5


def multinomial_loss(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_s w_s l(y_s, a_s)`, 0-dim float64.

    >>> float(multinomial_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.ones(2)).round(decimals=4))
    1.3863
    """
    a = logits.double()
    whole = torch.nn.functional.softplus(a[0]) if len(a) == 1 else torch.cat([torch.zeros_like(a[:1]), a]).logsumexp(0)
    return (weights.double() * (whole - (y * a).sum(0))).sum()


def probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of all classes but the first, [kappa, n]."""
    if len(logits) == 1:
        return torch.sigmoid(logits)
    return torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)[1:]


def ridge_logistic(
    inputs: Tensor, y: Tensor, weights: Tensor, nu: float, start: Tensor | None = None, iterations: int = 60
) -> Tensor:
    """Minimise `sum_s w_s l(y_s, beta' x_s) + nu/2 |beta|^2` over beta [d, kappa], by Newton steps that are halved where needed.

    Args:
        inputs: [d, n].
        y: one-hot without the first class, [kappa, n].
        weights: [n].
        nu: of the ridge.
        start: beta to begin with; 0 where it is None or worse than 0.
        iterations: steps at most.

    With more than 1,200 unknowns the curvature is its bound, factored once (Böhning 1992).
    """
    d, kappa = len(inputs), len(y)
    if not d:
        return inputs.new_zeros(0, kappa)
    zero = inputs.new_zeros(d, kappa)
    beta, value = zero, _value(zero, inputs, y, weights, nu)
    if start is not None:
        at_start = _value(start, inputs, y, weights, nu)
        if at_start <= value:
            beta, value = start, at_start
    newton = _Newton(inputs, weights, nu, kappa)
    best, flattest = beta, float("inf")
    for _ in range(iterations):
        p = probabilities(beta.mT @ inputs)
        gradient = inputs @ (weights * (p - y)).mT + nu * beta
        norm = float(gradient.norm())
        if norm < flattest:
            best = beta
        step = newton.solve(p, gradient)
        slope = float((step * gradient).sum())
        if slope <= NEAR * abs(value):
            # Values no longer tell points apart: whole steps, as long as they make the gradient smaller.
            if norm > 0.5 * flattest or not slope > 0:
                return best
            flattest, beta = norm, beta - step
            continue
        length = 1.0
        while length > 1e-6:
            trial = beta - length * step
            found = _value(trial, inputs, y, weights, nu)
            if found <= value - 1e-4 * length * slope:
                break
            length /= 2
        else:
            return best
        beta = best = trial
        value, flattest = found, float("inf")
    return best


def _value(beta: Tensor, inputs: Tensor, y: Tensor, weights: Tensor, nu: float) -> float:
    return float(multinomial_loss(beta.mT @ inputs, y, weights) + nu / 2 * beta.double().square().sum())


class _Newton:
    """Steps `H^-1 g` of the ridge logistic regression."""

    def __init__(self, inputs: Tensor, weights: Tensor, nu: float, kappa: int) -> None:
        self.inputs, self.weights, self.kappa = inputs, weights, kappa
        d = len(inputs)
        self.exact = d * kappa <= _DENSE
        # Without a ridge the matrix may be singular; a trace of one keeps the step finite.
        floor = torch.finfo(inputs.dtype).eps * float((weights * inputs.square()).sum())
        self.ridge = max(nu, floor)
        self.eye = torch.eye(d, dtype=inputs.dtype, device=inputs.device)
        if not self.exact:
            gram = bound_of(kappa) * (inputs * weights) @ inputs.mT
            self.factor = torch.linalg.cholesky(gram + self.ridge * self.eye)

    def solve(self, p: Tensor, gradient: Tensor) -> Tensor:
        if not self.exact:
            return torch.cholesky_solve(gradient, self.factor)
        d, kappa, x = len(self.inputs), self.kappa, self.inputs
        matrix = x.new_empty(kappa, d, kappa, d)
        for a in range(kappa):
            for b in range(a, kappa):
                curve = self.weights * p[a] * ((1.0 if a == b else 0.0) - p[b])
                block = (x * curve) @ x.mT
                matrix[a, :, b] = block
                matrix[b, :, a] = block.mT
            matrix[a, :, a] += self.ridge * self.eye
        size = kappa * d
        whole = matrix.view(size, size)
        factor, failed = torch.linalg.cholesky_ex(whole)
        right = gradient.mT.reshape(size, 1)
        if int(failed):
            whole = whole + torch.finfo(x.dtype).eps * whole.diagonal().sum() * torch.eye(
                size, dtype=x.dtype, device=x.device
            )
            factor = torch.linalg.cholesky_ex(whole)[0]
        return torch.cholesky_solve(right, factor).view(kappa, d).mT


@dataclass(frozen=True)
class TopCurvature:
    """Largest eigenvalues of the classifier's inputs.

    Attributes:
        main: of `X W X'` (filter) or of the weights (feature).
        ratio: that of `Z W Z'` over it.
        joint: of both together after each has been brought to 1; between 1 and 2.
    """

    main: float
    ratio: float
    joint: float


def curvature_of(data: DataMatrix, z: Tensor, weights: Tensor, filters: bool) -> TopCurvature:
    """Return what bounds the curvature in A and in Gamma, by power iteration."""
    root = weights.sqrt()
    if data.root is not None:
        inner = root / data.root
    else:
        inner = root
    if filters:
        main = _top(data.shape[0], lambda v: data.times(inner.square()[:, None] * data.transposed_times(v)), data)
    else:
        main = float(inner.square().max())
    if not len(z):
        return TopCurvature(main, 1.0, 1.0)
    other = float(torch.linalg.eigvalsh((z * weights) @ z.mT)[-1])
    main, other = max(main, 1e-300), max(other, 1e-300)

    def joint(v: Tensor) -> Tensor:
        first, second = v[: data.shape[0]] / main**0.5, v[data.shape[0] :] / other**0.5
        seen = inner[:, None] * data.transposed_times(first) + root[:, None] * (z.mT @ second)
        return torch.cat([data.times(inner[:, None] * seen) / main**0.5, z @ (root[:, None] * seen) / other**0.5])

    both = _top(data.shape[0] + len(z), joint, data) if filters else 2.0
    return TopCurvature(main, other / main, min(max(both, 1.0), 2.0))


def _top(size: int, product: object, data: DataMatrix, iterations: int = 50) -> float:
    v = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        data.device, data.dtype
    )
    found = 0.0
    for _ in range(iterations):
        v = v / v.norm().clamp_min(1e-300)
        v = product(v)  # type: ignore[operator]
        before, found = found, float(v.norm())
        if abs(found - before) <= 1e-3 * found:
            break
    # Power iteration comes from below.
    return 1.02 * found
