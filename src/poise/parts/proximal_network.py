"""Networks that are proximal operators by construction, and the regulariser that belongs to them.

A continuous map f is the proximal operator of some function R, `f(y) = argmin_u 1/2 ||u - y||^2 + R(u)`, exactly where it is the gradient
of a convex potential (Moreau; Gribonval and Nikolova). So take a network psi that is convex in its input, and its gradient:

    psi(y) = <w, z_K> + <h, y> + b + alpha ||y||^2,    z_1 = g(H_1 y + b_1),   z_k = g(W_k z_(k-1) + H_k y + b_k)
    f(y)   = grad psi(y)                                W_k, w >= 0,  g convex and not decreasing
    R(x)   = <y, x> - 1/2 ||x||^2 - psi(y)              at y = f^(-1)(x)

R may be nonconvex. It is known up to one constant, so compare R(x) - R(reference). With alpha > 0, f is one to one and R is unique.

    prox = LearnedProx(ICNN(64, hidden=256, layers=2, strong=0.01))
    denoised = prox(noisy)
    y, residual = prox.invert(images)              # f(y) = images up to `residual`
    energy = prox.regularizer(images)
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError, PoiseWarning, nearest
from poise.parts.gradient_inversion import METHODS, invert_gradient

__all__ = ["ICNN", "ConvICNN", "ConvexPotential", "Inverse", "LearnedProx", "ProxReport", "load_learned_prox"]

Weights = Literal["clip", "softplus", "exp"]
_CHOICES: tuple[str, ...] = ("clip", "softplus", "exp")


class _Activation(NamedTuple):
    """A function g with its derivative, both of `(x, beta)`."""

    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]


def _softplus(x: Tensor, beta: float) -> Tensor:
    # PyTorch's own threshold of 20 leaves a step of 2e-9 in the slope, which float64 sees.
    return F.softplus(x, beta, threshold=40.0)


def _squareplus(x: Tensor, beta: float) -> Tensor:
    return 0.5 * (x + (x.square() + 4.0 / beta**2).sqrt())


def _squareplus_slope(x: Tensor, beta: float) -> Tensor:
    return 0.5 + 0.5 * x * (x.square() + 4.0 / beta**2).rsqrt()


ACTIVATIONS: dict[str, _Activation] = {
    "softplus": _Activation(_softplus, lambda x, beta: torch.sigmoid(beta * x)),
    "squareplus": _Activation(_squareplus, _squareplus_slope),
}
"""Convex, not decreasing, twice differentiable: log(1 + exp(beta x)) / beta, and (x + sqrt(x^2 + 4 / beta^2)) / 2."""


class ConvexPotential(nn.Module):
    """A function of one example that is convex: the base of `ICNN`, and of potentials of your own.

    A subclass says `shape` and `forward(y, condition=None) -> [batch]`; it may say `gradient` where it knows a faster way than autograd.

    Attributes:
        shape: of one example.
    """

    shape: tuple[int, ...]

    def gradient(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return grad psi(y), the shape of y; differentiable again exactly where gradients are recorded."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if keep and y.requires_grad else y.detach().requires_grad_()
            total = self(point, condition).sum()
            (found,) = torch.autograd.grad(total, point, create_graph=keep)
        return found

    def project_(self) -> None:
        """Put the weights back into the set where the potential is convex; solvers call it after every step."""

    def check(self) -> None:
        """Raise where the weights have left that set."""

    def config(self) -> dict[str, Any]:
        """Return the arguments that make such a network, for saving."""
        raise InputError(f"{type(self).__name__} does not say how it is made, so it cannot be saved with `save`.")

    def _check_shape(self, y: Tensor) -> None:
        if tuple(y.shape[1:]) != self.shape:
            raise InputError(
                f"{type(self).__name__}: one example has the shape {list(self.shape)}, and a batch of {list(y.shape)} came. "
                "Cut or resize it, or apply it in patches (poise.parts.Patchwise)."
            )


class _NonNegativeWeights(ConvexPotential):
    """Weights that must not be negative: stored as they are and clipped, or as what softplus or exp makes positive."""

    def __init__(
        self, shape: int | Sequence[int], beta: float, strong: float, activation: str, weights: str, init: str
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 1:
            raise InputError(f"{name}: the shape of an example has positive sizes, and it is {list(self.shape)}.")
        if activation not in ACTIVATIONS:
            raise InputError(
                f"{name}: the activation must be convex, not decreasing and twice differentiable, else its gradient is no proximal "
                f"operator; there are {', '.join(ACTIVATIONS)}, and {activation!r} came.{nearest(activation, ACTIVATIONS)}"
            )
        if not (beta > 0 and math.isfinite(beta)):
            raise InputError(f"{name}: beta must be positive, and it is {beta}.")
        if not strong >= 0:
            raise InputError(f"{name}: strong (alpha) must not be negative, and it is {strong}.")
        if weights not in _CHOICES:
            raise InputError(f"{name}: weights is one of {', '.join(_CHOICES)}, and it is {weights!r}.")
        if init not in ("uniform", "exponential"):
            raise InputError(f"{name}: init is 'uniform' or 'exponential', and it is {init!r}.")
        self.beta, self.strong, self.activation, self.weights, self.init = beta, strong, activation, weights, init
        self.g, self.slope = ACTIVATIONS[activation]
        self.positive = nn.ParameterList()

    def _add(self, *size: int) -> None:
        """Add one nonnegative weight."""
        raw = torch.empty(*size)
        if self.init == "exponential":
            raw.normal_(-10.0, 0.1).exp_()
        else:
            reach = 1.0 / math.sqrt(math.prod(size[1:]))
            raw.uniform_(-reach, reach).clamp_(min=0.0)
        if self.weights != "clip":
            # A zero has no pre-image; the least normal weight takes its place.
            raw = raw.clamp(min=1e-6)
            raw = raw.log() if self.weights == "exp" else raw + (-torch.expm1(-raw)).log()
        self.positive.append(nn.Parameter(raw))

    def nonnegative(self) -> list[Tensor]:
        """Return W_2, ..., W_K and w as they act."""
        if self.weights == "exp":
            return [v.exp() for v in self.positive]
        return [F.softplus(v) if self.weights == "softplus" else v for v in self.positive]

    @torch.no_grad()
    def project_(self) -> None:
        """Clip negative weights to 0; nothing to do where they are parametrised."""
        if self.weights == "clip":
            for weight in self.positive:
                weight.clamp_(min=0.0)

    @torch.no_grad()
    def check(self) -> None:
        """Raise where a weight is negative or not a number.

        Raises:
            InputError: so many weights are; `project_()` after each step keeps them out.
        """
        wrong = sum(int((~(weight >= 0)).sum()) for weight in self.nonnegative())
        if wrong:
            raise InputError(
                f"{type(self).__name__}: {wrong} weights that must be >= 0 are negative or not numbers, so this is no proximal operator. "
                "Call project_() after every optimiser step (poise.fit and its solvers do), or take weights='softplus'."
            )

    @property
    def zero_share(self) -> float:
        """The share of nonnegative weights that are exactly 0."""
        every = torch.cat([weight.detach().flatten() for weight in self.nonnegative()])
        return float((every == 0).double().mean())

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("beta", "strong", "activation", "weights", "init")}


class ICNN(_NonNegativeWeights):
    """An input-convex network of dense layers: a convex function of one example.

    psi(y) = <w, z_K> + <h, y> + b + alpha ||y||^2,   z_1 = g(H_1 y + b_1),   z_k = g(W_k z_(k-1) + H_k y + b_k)

    With a `condition` c (a noise level), `b_k + C_k(c)` takes the place of b_k: convex in y for every c.

    Args:
        shape: of one example, or its size; images are flattened inside.
        hidden: width of each layer.
        layers: K >= 1.
        beta: sharpness of the activation: 10 for digits, 100 for larger images.
        strong: alpha >= 0. Positive values make the regulariser unique and inversion well posed.
        activation: "softplus" or "squareplus".
        weights: "clip" (nonnegative by projection after each step, with exact zeros), "softplus" or "exp" (by parametrisation).
        init: of the nonnegative weights: "uniform" (PyTorch's, clipped) or "exponential" (exp of normal(-10, 0.1), for images).
        condition: numbers that the potential may depend on beside y, in any way; 0 for none.

    Raises:
        InputError: an argument out of range, or an activation that is not convex.

    Example:
        >>> net = ICNN(3, hidden=8, layers=2)
        >>> net(torch.zeros(5, 3)).shape, net.gradient(torch.zeros(5, 3)).shape
        (torch.Size([5]), torch.Size([5, 3]))

    Source: arXiv:2310.14344, section 3; Amos, Xu and Kolter, arXiv:1609.07152.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        hidden: int = 64,
        layers: int = 2,
        beta: float = 10.0,
        strong: float = 0.0,
        activation: str = "softplus",
        weights: Weights = "clip",
        init: str = "uniform",
        condition: int = 0,
    ) -> None:
        super().__init__(shape, beta, strong, activation, weights, init)
        if min(hidden, layers) < 1 or condition < 0:
            raise InputError(
                f"ICNN: hidden and layers are at least 1 and condition at least 0; they are {hidden}, {layers} and {condition}."
            )
        self.hidden, self.layers, self.condition = hidden, layers, condition
        # All H_k and h in one matrix, under the initialisation that PyTorch gives each.
        self.skip = nn.Linear(math.prod(self.shape), layers * hidden + 1)
        for _ in range(layers - 1):
            self._add(hidden, hidden)
        self._add(1, hidden)
        self.context = (
            nn.Sequential(nn.Linear(condition, hidden), nn.Tanh(), nn.Linear(hidden, layers * hidden + 1))
            if condition
            else None
        )

    def _pieces(self, y: Tensor, condition: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return H_1, ..., H_K, h and the same of b; under a condition, of b for each example."""
        widths = [*[self.hidden] * self.layers, 1]
        bias = self.skip.bias
        if self.context is not None:
            bias = bias + self.context(_condition(y, condition, self.condition))
        return torch.split(self.skip.weight, widths), torch.split(bias, widths, dim=-1)

    def _before(self, y: Tensor, H: tuple[Tensor, ...], b: tuple[Tensor, ...], inner: list[Tensor]) -> list[Tensor]:
        """Return what the activations are applied to, layer by layer."""
        before = [_affine(y, H[0], b[0])]
        for k, weight in enumerate(inner, start=1):
            before.append(_affine(y, H[k], b[k]) + F.linear(self.g(before[-1], self.beta), weight))
        return before

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return psi, float [batch]."""
        self._check_shape(y)
        flat = y.flatten(1)
        *inner, last = self.nonnegative()
        H, b = self._pieces(y, condition)
        before = self._before(flat, H, b, inner)
        value: Tensor = (F.linear(self.g(before[-1], self.beta), last) + _affine(flat, H[-1], b[-1]))[:, 0]
        return value + self.strong * flat.square().sum(1) if self.strong else value

    def gradient(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return grad psi(y) = sum_k H_k' d_k + h + 2 alpha y, written out, so that one backward pass differentiates it.

        d_K = w g'(u_K),   d_(k-1) = (W_k' d_k) g'(u_(k-1)),   u_k what g is applied to
        """
        self._check_shape(y)
        flat = y.flatten(1)
        *inner, last = self.nonnegative()
        H, b = self._pieces(y, condition)
        before = self._before(flat, H, b, inner)
        d = last * self.slope(before[-1], self.beta)
        f = torch.addmm(H[-1][0], d, H[-2])
        for k in range(self.layers - 1, 0, -1):
            d = (d @ inner[k - 1]) * self.slope(before[k - 1], self.beta)
            f = f + d @ H[k - 1]
        return (torch.add(f, flat, alpha=2.0 * self.strong) if self.strong else f).view_as(y)

    def config(self) -> dict[str, Any]:
        own = {"shape": list(self.shape), "hidden": self.hidden, "layers": self.layers, "condition": self.condition}
        return {"kind": "ICNN", **own, **self._options()}


class ConvICNN(_NonNegativeWeights):
    """An input-convex network of 3 x 3 convolutions: a convex function of one image.

    z_1 = g(H_1 * y + b_1),   z_k = g(W_k * z_(k-1) + H_k * resized(y) + b_k)   with strides, then a dense layer as in `ICNN`

    The image is resized bilinearly to each layer's size on its way past the layers, which is linear in it.

    Args:
        shape: channels, height, width.
        channels: of each convolution; 64 for digits, 256 for 128 x 128.
        strides: one number a convolution.
        dense: width of the dense layer.
        beta, strong, activation, weights, init: as `ICNN`; nonnegative weights start near 0.

    Raises:
        InputError: an argument out of range.

    Example:
        >>> ConvICNN((1, 8, 8), channels=4, strides=(1, 2))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])

    Source: arXiv:2310.14344, appendix; Sulam-Group/learned-proximal-networks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        strides: Sequence[int] = (1, 2, 1, 2),
        dense: int = 64,
        beta: float = 10.0,
        strong: float = 0.01,
        activation: str = "softplus",
        weights: Weights = "clip",
        init: str = "exponential",
    ) -> None:
        super().__init__(shape, beta, strong, activation, weights, init)
        if len(self.shape) != 3 or not strides or min(channels, dense, *strides) < 1:
            raise InputError(
                f"ConvICNN: shape is (channels, height, width), and channels, dense and strides are at least 1; got {list(self.shape)}, "
                f"{channels}, {dense} and {tuple(strides)}."
            )
        self.channels, self.strides, self.dense = channels, tuple(strides), dense
        depth, height, width = self.shape
        self.sizes = [(height, width)]
        self.skips = nn.ModuleList()
        for k, stride in enumerate(self.strides):
            self.skips.append(nn.Conv2d(depth, channels, 3, stride, padding=1))
            if k:
                self._add(channels, channels, 3, 3)
            self.sizes.append(tuple(-(-n // stride) for n in self.sizes[-1]))  # type: ignore[arg-type]
        place = math.prod(self.sizes[-1])
        self.skips.append(nn.Linear(depth * place, dense))
        self.skips.append(nn.Linear(math.prod(self.shape), 1))
        self._add(dense, channels * place)
        self._add(1, dense)

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return psi, float [batch]."""
        self._check_shape(y)
        *inner, head, last = self.nonnegative()
        z = self.g(self.skips[0](y), self.beta)
        for k, weight in enumerate(inner, start=1):
            past = self.skips[k](_resized(y, self.sizes[k]))
            z = self.g(F.conv2d(z, weight, stride=self.strides[k], padding=1) + past, self.beta)
        past = self.skips[-2](_resized(y, self.sizes[-1]).flatten(1))
        z = self.g(F.linear(z.flatten(1), head) + past, self.beta)
        value: Tensor = (F.linear(z, last) + self.skips[-1](y.flatten(1)))[:, 0]
        return value + self.strong * y.flatten(1).square().sum(1)

    def config(self) -> dict[str, Any]:
        own = {"shape": list(self.shape), "channels": self.channels, "strides": list(self.strides), "dense": self.dense}
        return {"kind": "ConvICNN", **own, **self._options()}


def _affine(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return y W' + b; b may differ from example to example."""
    return F.linear(y, weight, bias) if bias.dim() == 1 else F.linear(y, weight) + bias


def _resized(y: Tensor, size: tuple[int, int]) -> Tensor:
    return y if tuple(y.shape[2:]) == size else F.interpolate(y, size, mode="bilinear", align_corners=False)


def _condition(y: Tensor, condition: Tensor | None, size: int) -> Tensor:
    if condition is None:
        raise InputError("ICNN: this network depends on a condition, such as the noise level; give condition=[batch].")
    return condition.to(y).reshape(-1, size).expand(len(y), size)


class Inverse(NamedTuple):
    """Where f(y) = x, and how nearly.

    Attributes:
        y: the shape of x.
        residual: `||f(y) - x||` of each example, float64 [batch], in float64 whatever the network computes in.
    """

    y: Tensor
    residual: Tensor


@dataclass(frozen=True)
class ProxReport:
    """What the Jacobian of f says at some points; a proximal operator has a symmetric one without negative eigenvalues.

    Attributes:
        asymmetry: largest `|J - J'|`.
        smallest, largest: eigenvalues over all points; the smallest is at least 2 alpha.
        log_determinant: of each point, float64 [batch].
        zero_share: of the nonnegative weights, or None where the network does not say.
    """

    asymmetry: float
    smallest: float
    largest: float
    log_determinant: Tensor
    zero_share: float | None

    @property
    def is_prox(self) -> bool:
        """Whether the Jacobian is symmetric and has no negative eigenvalue, up to rounding."""
        scale = 1e-8 * max(1.0, abs(self.largest))
        return self.asymmetry <= scale and self.smallest >= -scale


class LearnedProx(nn.Module):
    """The proximal operator `f = grad psi` of a regulariser that is learned through it.

    Args:
        potential: an `ICNN`, a `ConvICNN`, or a `ConvexPotential` of your own.

    Example:
        >>> prox = LearnedProx(ICNN(2, hidden=4, strong=0.25)).double()
        >>> x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
        >>> y, residual = prox.invert(prox(x).detach())
        >>> bool(residual < 1e-6), bool((y - x).abs().max() < 1e-5)
        (True, True)

    Source: arXiv:2310.14344.
    """

    def __init__(self, potential: ConvexPotential) -> None:
        super().__init__()
        if not isinstance(potential, ConvexPotential):
            raise InputError(
                f"LearnedProx takes a convex potential (ICNN, ConvICNN or a ConvexPotential), and a {type(potential).__name__} came."
            )
        self.psi = potential

    def forward(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return f(y), the shape of y. The graph is kept where gradients are recorded, and only there."""
        return self.psi.gradient(y, condition)

    def potential(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return psi(y), float [batch]."""
        value: Tensor = self.psi(y, condition)
        return value

    def project_(self) -> None:
        """Put the weights back where psi is convex; solvers call it after every step."""
        self.psi.project_()

    def check(self) -> None:
        """Raise where the weights have left the set where psi is convex."""
        self.psi.check()

    # ---- the regulariser --------------------------------------------------------------------------------------------

    def invert(
        self,
        x: Tensor,
        method: str = "newton",
        tol: float = 1e-6,
        max_iter: int | None = None,
        start: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Inverse:
        """Find y with f(y) = x, in float64, all examples side by side.

        newton   min_y psi(y) - <x, y>, Newton steps by conjugate gradients on the Jacobian, with a line search
        cg       the same by nonlinear conjugate gradients
        ls       min_y 1/2 ||f(y) - x||^2 by limited-memory BFGS: for alpha = 0, where x may have no inverse

        Args:
            x: float [batch, ...].
            method: "newton", "cg" or "ls".
            tol: `||f(y) - x||` that is asked for.
            max_iter: most iterations; by default 100 for newton, 2000 for the others.
            start: first y; x where nothing is said.
            condition: of the network, where it has one.

        Returns:
            y in x's dtype and the residual. A bad inverse makes a wrong prior, so one that misses `tol` warns.

        Raises:
            InputError: unknown method, x of another shape, not finite, or weights that are negative.
        """
        if method not in METHODS:
            raise InputError(f"invert: method is one of {', '.join(METHODS)}, and it is {method!r}.")
        self.psi.check()
        self.psi._check_shape(x)
        if not bool(x.isfinite().all()):
            raise InputError("invert: x has entries that are not finite.")
        y, residual = self._inverse(x, method, tol, max_iter, start, condition)
        missed = residual > tol
        if bool(missed.any()):
            warnings.warn(
                f"invert: {int(missed.sum())} of {len(x)} examples are not inverted to {tol:g} (largest residual "
                f"{float(residual.max()):.2g}), so their prior is not reliable. They may lie outside of what the network "
                "can put out (strong=0), or need more iterations.",
                PoiseWarning,
                stacklevel=2,
            )
        return Inverse(y.to(x.dtype), residual)

    def regularizer(self, x: Tensor, condition: Tensor | None = None, **how: Any) -> Tensor:
        """Return R(x) = <y, x> - 1/2 ||x||^2 - psi(y) at y = f^(-1)(x), float64 [batch], up to one constant.

        Args:
            x: float [batch, ...].
            condition: of the network, where it has one.
            how: arguments of `invert`.
        """
        return self.conjugate(x, condition, **how) - 0.5 * x.detach().double().flatten(1).square().sum(1)

    def conjugate(self, x: Tensor, condition: Tensor | None = None, **how: Any) -> Tensor:
        """Return psi*(x) = max_y <y, x> - psi(y), float64 [batch]; arguments as `regularizer`."""
        double = self._double()
        y = double.invert(x.detach().double(), condition=condition, **how).y
        with torch.no_grad():
            product = (y * x.double()).flatten(1).sum(1)
            return product - double.potential(y, condition)

    def regularizer_gradient(self, x: Tensor, condition: Tensor | None = None, **how: Any) -> Tensor:
        """Return grad R(x) = f^(-1)(x) - x, the shape of x; arguments as `regularizer`."""
        return self.invert(x.detach(), condition=condition, **how).y - x.detach()

    def regularizer_of_output(self, y: Tensor, x: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Return R(f(y)), float [batch]: no inversion, since y is known.

        Args:
            y: what f was applied to.
            x: f(y), where it is there already.
            condition: of the network, where it has one.
        """
        x = self(y, condition) if x is None else x
        inner = (y * x - 0.5 * x.square()).flatten(1).sum(1)
        return inner - self.potential(y, condition)

    def _double(self) -> LearnedProx:
        """Return this network in float64: itself where it is."""
        dtypes = {p.dtype for p in self.parameters()} or {torch.float64}
        return self if dtypes == {torch.float64} else deepcopy(self).double()

    def _inverse(
        self, x: Tensor, method: str, tol: float, max_iter: int | None, start: Tensor | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        psi = self._double().psi
        known = None if condition is None else condition.to(x.device).double().expand(len(x), *condition.shape[1:])

        def rows(which: Tensor) -> Tensor | None:
            return None if known is None else known[which]

        def potential(y: Tensor, which: Tensor) -> Tensor:
            return psi(y.view(-1, *self.psi.shape), rows(which))  # type: ignore[no-any-return]

        def gradient(y: Tensor, which: Tensor) -> Tensor:
            return psi.gradient(y.view(-1, *self.psi.shape), rows(which)).flatten(1)

        flat = x.detach().double().flatten(1)
        first = flat if start is None else start.detach().double().reshape(flat.shape)
        trainable = [p for p in psi.parameters() if p.requires_grad]
        for p in trainable:
            p.requires_grad_(False)
        try:
            y, residual = invert_gradient(potential, gradient, flat, first, method, tol, max_iter)
        finally:
            for p in trainable:
                p.requires_grad_(True)
        return y.view_as(x), residual

    # ---- checks -----------------------------------------------------------------------------------------------------

    def jacobian(self, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the Jacobian of f, float64 [batch, n, n], n the numbers of one example."""
        double = self._double()
        size = math.prod(self.psi.shape)
        with torch.enable_grad():
            point = y.detach().double().requires_grad_()
            f = double(point, condition).flatten(1)
            rows = [torch.autograd.grad(f[:, i].sum(), point, retain_graph=i + 1 < size)[0] for i in range(size)]
        return torch.stack([row.detach().flatten(1) for row in rows], dim=1)

    def jacobian_report(self, y: Tensor, condition: Tensor | None = None) -> ProxReport:
        """Check symmetry and eigenvalues of the Jacobian at y [batch, ...]; for examples of up to some thousand numbers."""
        J = self.jacobian(y, condition)
        values = torch.linalg.eigvalsh(0.5 * (J + J.mT))
        zero = self.psi.zero_share if isinstance(self.psi, _NonNegativeWeights) else None
        logs = values.clamp_min(0.0).log().sum(1)
        return ProxReport(float((J - J.mT).abs().max()), float(values.min()), float(values.max()), logs, zero)

    def smallest_eigenvalue(self, y: Tensor, iterations: int = 50, condition: Tensor | None = None) -> Tensor:
        """Return the smallest eigenvalue of the Jacobian at each y, float [batch], by power iteration on `L I - J`.

        L is the largest eigenvalue, found in the same way. From above up to the iteration's error; for examples too large for `jacobian`.
        """
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            f = self(point, condition)

            def times(v: Tensor) -> Tensor:
                return torch.autograd.grad(f, point, v, retain_graph=True)[0]

            generator = torch.Generator().manual_seed(0)
            first = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            largest = _power(times, first, iterations)
            shift = _spread(1.01 * largest, y)
            rest = _power(lambda v: shift * v - times(v), first, iterations)
        return shift.flatten() - rest

    # ---- saving -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and architecture into one file, which `load_learned_prox` reads."""
        torch.save({"potential": self.psi.config(), "state": self.psi.state_dict()}, path)


def load_learned_prox(path: str | os.PathLike[str]) -> LearnedProx:
    """Read what `LearnedProx.save` wrote; no code of the file is run.

    Raises:
        InputError: the file holds something else, or weights that make no proximal operator.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        config = dict(saved["potential"])
        kind = {"ICNN": ICNN, "ConvICNN": ConvICNN}[config.pop("kind")]
        potential = kind(**config)
        state = saved["state"]
        potential.to(next(iter(state.values())).dtype).load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} is no saved LearnedProx: {str(error).splitlines()[0]}.") from error
    potential.check()
    return LearnedProx(potential)


def _power(times: Callable[[Tensor], Tensor], first: Tensor, iterations: int) -> Tensor:
    """Return the largest eigenvalue of a symmetric map of each example by power iteration."""
    v = first / _spread(first.flatten(1).norm(dim=1), first)
    value = first.new_zeros(len(first))
    for _ in range(iterations):
        moved = times(v).detach()
        value = (moved * v).flatten(1).sum(1)
        v = moved / _spread(moved.flatten(1).norm(dim=1).clamp_min(torch.finfo(moved.dtype).tiny), moved)
    return value


def _spread(number: Tensor, like: Tensor) -> Tensor:
    """Return one number an example in a form that multiplies examples."""
    return number.view(-1, *[1] * (like.dim() - 1))
