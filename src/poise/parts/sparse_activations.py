"""How a sparse autoencoder chooses its active features: by the norm of its input (top-AFA), by a number, or by a threshold.

    f = a . mask,   a = relu(z)

Every choice is a module that is called as `activation(z, norms, target) -> (features, k)`; masks are constants, so gradients flow through
what is kept.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from poise.call_text import parse_call
from poise.errors import InputError, StateError
from poise.operators import require_count
from poise.parts.norm_selection import keep_by_norm

__all__ = ["BatchTopK", "FeatureActivation", "JumpReLU", "ReLU", "TopAFA", "TopK", "as_activation"]

CATALOGUE = {
    "batch_top_k": "BatchTopK",
    "jump_relu": "JumpReLU",
    "relu": "ReLU",
    "top_afa": "TopAFA",
    "top_k": "TopK",
}
"""Names that text may use, and the classes of this file."""


class FeatureActivation(nn.Module):
    """What a sparse autoencoder does between encoder and decoder."""

    encoder_bias: ClassVar[bool] = False
    """Whether an autoencoder with it has a bias in its encoder, where nothing is said."""
    masks: ClassVar[bool] = True
    """Whether features that are 0 have no gradient, so that it need not be found."""
    uses_norms: ClassVar[bool] = False
    """Whether it reads the lengths of the decoder's rows, and the target norm."""

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the features, float [batch, features] and never negative, and how many each row was allowed, int64 [batch].

        Args:
            z: float [batch, features], what the encoder gives; below 0 nothing is active.
            norms: float [features], lengths of the decoder's rows; None for 1.
            target: float [batch], norm of the input.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which features are active.")

    def gates(self, z: Tensor, features: Tensor) -> Tensor:
        """Return 1 where a feature is active and 0 elsewhere: what an l0 penalty adds up, with a gradient where there is one."""
        return (features > 0).to(features.dtype)

    def bind(self, features: int) -> None:
        """Say how many features there are, before the first use."""


class ReLU(FeatureActivation):
    """All features above 0: `f = relu(z)`. Sparse by a penalty alone, `feature_l1`.

    >>> ReLU()(torch.tensor([[1.0, -2.0, 3.0]]))
    (tensor([[1., 0., 3.]]), tensor([2]))
    """

    encoder_bias = True

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = z.relu()
        return features, (features > 0).sum(1)


class TopAFA(FeatureActivation):
    """The largest features, so many that their norm is that of the input: k follows from the input, row by row.

    s_i = (a_i |d_i|)^2 falling,   c_k = sqrt(s_1 + ... + s_k),   k = argmin_k |c_k - t|,   f = a on the k largest, 0 elsewhere

    With unit rows that are nearly orthogonal, |f| = |z| up to `epsilon (|f|_1^2 - |f|_2^2)`: what is kept then has the input's energy.

    Args:
        rule: "nearest", or "exceed" for the first k with c_k >= t.
        max_k: most features of a row. At the start |f| is far below |x| and k near all features: a cap keeps early steps sparse.
        scaled: order and add features by the length of their decoder row; the value that is kept is never scaled.
        centred: the target is |x - b|, not |x|, b the decoder's bias. What is trained by `norm_matching` is |x| unless said otherwise.
        guard: what stands in place of c at k = features; infinite. The paper's code has 1e4.

    Raises:
        InputError: an argument is out of range, a row is not finite, or there are fewer than two features.

    >>> TopAFA()(torch.tensor([[3.0, 0.5, 4.0]]), None, torch.tensor([5.0]))
    (tensor([[3., 0., 4.]]), tensor([2]))

    Source: arXiv:2503.24277; SewoongLee/top-afa-sae, training/sae.py.
    """

    uses_norms = True

    def __init__(
        self,
        rule: Literal["nearest", "exceed"] = "nearest",
        max_k: int | None = None,
        scaled: bool = True,
        centred: bool = True,
        guard: float = math.inf,
    ) -> None:
        super().__init__()
        if rule not in ("nearest", "exceed"):
            raise InputError(f"top_afa: rule is 'nearest' or 'exceed', and it is {rule!r}.")
        if not guard > 0:
            raise InputError(f"top_afa: guard is above 0, and it is {guard}.")
        self.max_k = None if max_k is None else require_count("top_afa", max_k)
        self.rule, self.scaled, self.centred, self.guard = rule, scaled, centred, guard

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if target is None or target.shape != z.shape[:1]:
            got = "none was given" if target is None else f"it is {list(target.shape)}"
            raise InputError(f"top_afa: target is the norm of each input, float [{len(z)}], and {got}.")
        features, k = keep_by_norm(
            z, norms if self.scaled else None, target, nearest=self.rule == "nearest", max_k=self.max_k, guard=self.guard
        )  # fmt: skip
        kept: Tensor = _Kept.apply(z, features)  # type: ignore[no-untyped-call]
        return kept, k


class TopK(FeatureActivation):
    """The k largest features of each row.

    Args:
        k: from 1; at most the number of features are taken.

    >>> TopK(1)(torch.tensor([[1.0, -2.0, 3.0]]))[0]
    tensor([[0., 0., 3.]])

    Source: arXiv:2406.04093.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = require_count("top_k", k)

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = min(self.k, z.shape[1])
        values, index = z.topk(k, dim=1, sorted=False)
        features = torch.zeros_like(z).scatter(1, index, values.relu())
        return features, torch.full((len(z),), k, dtype=torch.int64, device=z.device)


class BatchTopK(FeatureActivation):
    """The k * batch largest features of a batch together; one by one, in evaluation, all above a threshold that training has found.

    threshold = mean over training batches of the least active value, recent batches weighing more

    Args:
        k: active features of a row on average, above 0.
        rate: share of a new batch in the running mean, in (0, 1].

    State: `threshold`, float64, and `batches`, int64; they move at each forward pass in training.

    Raises:
        InputError: an argument is out of range.
        StateError: evaluation before any batch was trained on; see `calibrate`.

    >>> BatchTopK(1)(torch.tensor([[1.0, 2.0], [0.1, 0.2]]))[0]
    tensor([[1., 2.],
            [0., 0.]])

    Source: arXiv:2412.06410, threshold in eq. 4 there; the running mean, unbiased at the start, stands in for its mean over data.
    """

    threshold: Tensor
    batches: Tensor

    def __init__(self, k: float, rate: float = 0.01) -> None:
        super().__init__()
        if isinstance(k, bool) or not (math.isfinite(k) and k > 0):
            raise InputError(f"batch_top_k: k counts active features of a row on average, above 0, and it is {k!r}.")
        if not 0 < rate <= 1:
            raise InputError(f"batch_top_k: rate is in (0, 1], and it is {rate}.")
        self.k, self.rate = k, rate
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        least = self._least(z) if self.training else self.applied().to(z.dtype)
        mask = (z >= least) & (z > 0)
        if self.training:
            with torch.no_grad():
                found = torch.where(mask, z, torch.inf).amin().double() if z.numel() else self.threshold
                # A batch in which nothing is active says nothing about where activity begins.
                share = torch.where(torch.isfinite(found), self.rate, 0.0)
                self.threshold.add_(share * (torch.where(torch.isfinite(found), found, 0.0) - self.threshold))
                self.batches.add_(torch.isfinite(found))
        return torch.where(mask, z, z.new_zeros(())), mask.sum(1)

    def _least(self, z: Tensor) -> Tensor:
        """Return the k * batch largest value; values equal to it are all kept."""
        positive = z.detach()[z.detach() > 0]
        count = min(round(self.k * len(z)), len(positive))
        return positive.kthvalue(len(positive) - count + 1).values if count else z.new_full((), torch.inf)

    def applied(self) -> Tensor:
        """Return the threshold that evaluation uses, 0-dim: the running mean without the weight of its start at 0."""
        if not int(self.batches):
            raise StateError(
                "batch_top_k: no threshold is known yet, since no batch was trained on. Train, or call calibrate(...)."
            )
        return self.threshold / (1 - (1 - self.rate) ** self.batches.double())

    @torch.no_grad()
    def calibrate(self, batches: Any) -> Tensor:
        """Set the threshold to its mean over encoder outputs `z`, float [batch, features] each; return it.

        >>> round(float(BatchTopK(1).calibrate([torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])])), 9)
        3.0
        """
        found = torch.stack([self._least(z).double() for z in batches])
        self.batches.fill_(1)
        self.threshold.copy_(self.rate * found[torch.isfinite(found)].mean())
        return self.applied()


class JumpReLU(FeatureActivation):
    """Features above a threshold of their own, which is learned: `f = a . 1{a > theta}`, `theta = exp(log_threshold)`.

    Where an activation lies within half the bandwidth of its threshold, the threshold has the pseudo-derivatives
    `df/dtheta = -theta / bandwidth` and `d1{a > theta}/dtheta = -1 / bandwidth`.

    Args:
        features: number of features; an autoencoder says it by itself.
        bandwidth: width of that rectangle, above 0.
        threshold: at the start, above 0.

    The derivative by `log_threshold` has the factor theta of the chain rule, which the paper's code leaves out.

    >>> JumpReLU(2, threshold=1.5)(torch.tensor([[1.0, 2.0]]))[0].detach()
    tensor([[0., 2.]])

    Source: arXiv:2407.14435, eqs. 4, 11 and 12.
    """

    encoder_bias = True
    masks = False

    def __init__(self, features: int | None = None, bandwidth: float = 0.001, threshold: float = 0.001) -> None:
        super().__init__()
        if not (bandwidth > 0 and threshold > 0 and math.isfinite(bandwidth) and math.isfinite(threshold)):
            raise InputError(
                f"jump_relu: bandwidth and threshold are finite and above 0, and they are {bandwidth} and {threshold}."
            )
        self.bandwidth, self.start = bandwidth, threshold
        self.log_threshold = nn.Parameter(torch.full((features or 0,), math.log(threshold)))

    def bind(self, features: int) -> None:
        if not len(self.log_threshold):
            self.log_threshold = nn.Parameter(torch.full((features,), math.log(self.start)))
        elif len(self.log_threshold) != features:
            raise InputError(
                f"jump_relu: it has thresholds for {len(self.log_threshold)} features, and the autoencoder has {features}."
            )

    def forward(self, z: Tensor, norms: Tensor | None = None, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        theta = self.log_threshold.to(z.dtype).exp()
        features: Tensor = _Jump.apply(z, theta, self.bandwidth)  # type: ignore[no-untyped-call]
        return features, (features > 0).sum(1)

    def gates(self, z: Tensor, features: Tensor) -> Tensor:
        gates: Tensor = _Step.apply(z, self.log_threshold.to(z.dtype).exp(), self.bandwidth)  # type: ignore[no-untyped-call]
        return gates


class _Kept(torch.autograd.Function):
    """Features that were chosen from z: the gradient passes where they are above 0, and the choice has none."""

    @staticmethod
    def forward(z: Tensor, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (features,) = ctx.saved_tensors
        # The backward pass of relu: one pass over memory, where a mask of its own would take two.
        return torch.ops.aten.threshold_backward(gradient, features, 0), None

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, _: Any) -> Tensor:
        (features,) = ctx.saved_tensors
        return torch.where(features > 0, moved, 0.0)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return torch.where(z > theta, z, z.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.bandwidth / 2
        return torch.where(z > theta, gradient, 0.0), -(theta / ctx.bandwidth) * (near * gradient).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        z, theta = ctx.saved_tensors
        near = (z - theta).abs() < ctx.bandwidth / 2
        return None, -(near * gradient).sum(0) / ctx.bandwidth, None


def as_activation(activation: FeatureActivation | str) -> FeatureActivation:
    """Return an activation: one as it is, or made from text such as "top_k(k=64)".

    Raises:
        FormulaError: the text names no activation.
        InputError: an argument is unknown or out of range.

    >>> as_activation("top_k(k=64)").k
    64
    """
    if isinstance(activation, FeatureActivation):
        return activation
    if not isinstance(activation, str):
        raise InputError(
            f"An activation is a FeatureActivation or text such as 'top_afa', and this is a {type(activation).__name__}."
        )
    name, arguments = parse_call(activation, CATALOGUE, "activation", "top_k(k=64)")
    kind = getattr(importlib.import_module(__name__), CATALOGUE[name])
    try:
        return cast(FeatureActivation, kind(**arguments))
    except TypeError as error:
        raise InputError(f"{name}: {str(error).rpartition('__init__() ')[2]}.") from None
