"""Linear maps of signals, known by what they do: `y = A x`, its adjoint, and the largest eigenvalue of `A'A`.

    dense [m, n]           one matrix for all signals of a batch
    batch [batch, m, n]    a matrix for each signal
    matrix-free            two functions, for what is never stored: a convolution, a Fourier transform with a mask, a patch extraction

Signals are rows: `x` is `[batch, n]`, `y` is `[batch, m]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from poise.errors import InputError
from poise.linear_maps import LinearMap

__all__ = ["SignalOperator", "as_signal_operator", "largest_eigenvalue"]

DENSE = 1024
"""Up to this many rows or columns the largest eigenvalue comes from singular values, above it from power iteration."""
# What is known of a matrix stays known while the matrix lives and is not written to.
_known: Any = WeakTensorKeyDictionary()


class SignalOperator:
    """A linear map that is never stored as a matrix.

    Args:
        apply: `x [batch, n] -> A x [batch, m]`, differentiable where gradients are to pass.
        adjoint: `r [batch, m] -> A' r [batch, n]`, the conjugate transpose.
        shape: (m, n).
        lipschitz: the largest eigenvalue of `A'A`; by power iteration where it is not given.
        dtype, device: of the signals; what power iteration starts from.

    >>> half = SignalOperator(lambda x: x[:, :2], lambda r: torch.nn.functional.pad(r, (0, 2)), (2, 4))
    >>> half.apply(torch.tensor([[1.0, 2.0, 3.0, 4.0]])), round(float(half.lipschitz), 4)
    (tensor([[1., 2.]]), 1.0)
    """

    matrix: Tensor | None = None

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        lipschitz: float | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self._apply, self._adjoint, self.shape = apply, adjoint, (int(shape[0]), int(shape[1]))
        self.dtype, self.device = dtype, torch.device(device or "cpu")
        self._lipschitz = None if lipschitz is None else torch.as_tensor(lipschitz)
        if self._lipschitz is not None and not bool((self._lipschitz > 0).all()):
            raise InputError(
                f"SignalOperator: lipschitz is the largest eigenvalue of A'A, so above 0, and it is {lipschitz}."
            )

    @property
    def lipschitz(self) -> Tensor:
        """The largest eigenvalue of `A'A`: 0-dim, or `[batch, 1]` where every signal has a matrix."""
        if self._lipschitz is None:
            self._lipschitz = _power_iteration(self)
        return self._lipschitz

    def apply(self, x: Tensor) -> Tensor:
        """Return `A x`."""
        return self._apply(x)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return `A' r`."""
        return self._adjoint(r)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y - A x`."""
        return y - self.apply(x)

    def gram(self) -> Tensor | None:
        """Return `A'A` where it can be stored, else None."""
        return None


class _Dense(SignalOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape = matrix, (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device
        self._lipschitz = None

    @property
    def lipschitz(self) -> Tensor:
        found: Tensor = _remembered(self.matrix, "lipschitz", largest_eigenvalue)
        return found

    def apply(self, x: Tensor) -> Tensor:
        assert self.matrix is not None
        return x @ self.matrix.mT

    def adjoint(self, r: Tensor) -> Tensor:
        assert self.matrix is not None
        return r @ self.matrix.conj()

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.matrix is not None
        return torch.addmm(y, x, self.matrix.mT, alpha=-1)

    def gram(self) -> Tensor | None:
        found: Tensor = _remembered(self.matrix, "gram", lambda matrix: matrix.mH @ matrix)
        return found


class _Batch(SignalOperator):
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape = matrix, (matrix.shape[1], matrix.shape[2])
        self.dtype, self.device = matrix.dtype, matrix.device
        self._lipschitz = None

    @property
    def lipschitz(self) -> Tensor:
        found: Tensor = _remembered(self.matrix, "lipschitz", largest_eigenvalue)
        return found[:, None]

    def apply(self, x: Tensor) -> Tensor:
        assert self.matrix is not None
        return (self.matrix @ x[..., None])[..., 0]

    def adjoint(self, r: Tensor) -> Tensor:
        assert self.matrix is not None
        return (self.matrix.mH @ r[..., None])[..., 0]


class _Rows(SignalOperator):
    """A map of images or other tensors, on signals that are their entries in a row."""

    def __init__(self, inner: LinearMap) -> None:
        self.inner = inner
        self.shape = math.prod(inner.measured), math.prod(inner.shape)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._lipschitz = torch.as_tensor(inner.norm_squared)

    def apply(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, *self.inner.shape)).flatten(1)

    def adjoint(self, r: Tensor) -> Tensor:
        return self.inner.adjoint(r.reshape(-1, *self.inner.measured)).flatten(1)


def as_signal_operator(operator: Any) -> SignalOperator:
    """Return what can be done with `operator`: a matrix `[m, n]`, a batch of matrices `[batch, m, n]`, a `SignalOperator`, or a map of
    `poise.linear_maps`.

    Raises:
        InputError: it is none of them, or a matrix with NaN or infinite entries.
    """
    if isinstance(operator, SignalOperator):
        return operator
    if isinstance(operator, LinearMap):
        return _Rows(operator)
    if not isinstance(operator, Tensor) or operator.ndim not in (2, 3) or operator.layout != torch.strided:
        what = f"a tensor {list(operator.shape)}" if isinstance(operator, Tensor) else f"{type(operator).__name__}"
        raise InputError(
            f"An operator is a dense matrix [m, n], a batch of matrices [batch, m, n] or a SignalOperator(apply, adjoint, shape), and it "
            f"is {what}. Sparse matrices and functions go through SignalOperator."
        )
    if not (operator.is_floating_point() or operator.is_complex()):
        raise InputError(
            f"An operator holds real or complex numbers, and its dtype is {operator.dtype}: call .float()."
        )
    if not _remembered(operator, "finite", lambda matrix: bool(torch.isfinite(matrix).all())):
        raise InputError("An operator has NaN or infinite entries.")
    return _Dense(operator) if operator.ndim == 2 else _Batch(operator)


def _remembered(matrix: Tensor | None, name: str, compute: Callable[[Tensor], Any]) -> Any:
    """Compute a fact of a matrix once; again where it was written to. Nothing is kept of a matrix that is trained."""
    assert matrix is not None
    if matrix.requires_grad or matrix.is_inference():  # changes, or does not tell whether it did
        return compute(matrix)
    version, facts = _known.get(matrix, (None, None))
    if version != matrix._version:
        facts = {}
        _known[matrix] = (matrix._version, facts)
    if name not in facts:
        facts[name] = compute(matrix)
    return facts[name]


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """Return the largest eigenvalue of `A'A` of a matrix or of every matrix of a batch.

    >>> largest_eigenvalue(torch.diag(torch.tensor([1.0, 3.0])))
    tensor(9.)
    """
    with torch.no_grad():
        if min(matrix.shape[-2:]) <= DENSE:
            found: Tensor = torch.linalg.svdvals(matrix)[..., 0].square()
            return found
        if matrix.ndim == 3:
            return torch.stack([largest_eigenvalue(each) for each in matrix])
        return _power_iteration(_Dense(matrix))


def _power_iteration(operator: SignalOperator, iterations: int = 500, tolerance: float = 1e-6) -> Tensor:
    """Return the largest eigenvalue of `A'A` from below, raised by the last change so that a step of 1/L stays safe."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, operator.shape[1], generator=generator, dtype=torch.float64)
    x = start.to(operator.device, operator.dtype)
    before = value = torch.zeros((), dtype=x.real.dtype, device=x.device)
    with torch.no_grad():
        for _ in range(iterations):
            x = x / torch.linalg.vector_norm(x)
            x = operator.adjoint(operator.apply(x))
            before, value = value, torch.linalg.vector_norm(x)
            if float(value - before) <= tolerance * float(value):
                break
    if not float(value) > 0:
        raise InputError("An operator maps every signal to 0, so there is nothing to recover.")
    return value + 2 * (value - before).abs()
