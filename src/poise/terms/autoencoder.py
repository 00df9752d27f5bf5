"""What a sparse autoencoder is charged for: reconstruction, the norm of its features, sparsity, and features that have died.

    reconstruction + 0.03125*norm_matching + 0.03125*dead_features     top-AFA: how many features are active follows from the input
    reconstruction + 0.01*feature_l1                                   ReLU
    reconstruction + 0.001*feature_l0                                  JumpReLU, through the pseudo-derivative of its gates

`poise.readouts.Autoencoding` offers what they read. Any autoencoder's tensors do: `NormMatching()(features=f, signal=z)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from poise.errors import InputError
from poise.objective import Term, Value
from poise.operators import require_count

__all__ = ["DeadFeatures", "FeatureL0", "FeatureL1", "NormMatching", "Reconstruction"]

_FEATURES = "float [batch, features]"


class Reconstruction(Term):
    """Mean squared error over the coordinates of each example: `1/d |x' - x|^2`.

    Reads: `reconstruction` and `signal`, float [batch, width].
    Returns: float [batch].

    Example:
        >>> Reconstruction()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([2.])
    """

    formula = "reconstruction"
    equation = "1/d |x' - x|^2"
    expects: ClassVar = {"reconstruction": "float [batch, width]", "signal": "float [batch, width]"}

    def forward(self, reconstruction: Tensor, signal: Tensor) -> Tensor:
        return (reconstruction - signal).square().mean(1)


class NormMatching(Term):
    """Charge features whose norm is not that of the input: approximate feature activation, `(|f| - |x|)^2`.

    With unit decoder rows whose inner products are at most epsilon, `||x|^2 - |f|^2| <= epsilon (|f|_1^2 - |f|_2^2)` where f
    reconstructs x: the norms then nearly agree. The norm is a sum over coordinates and the reconstruction a mean, so weights mean another
    balance in another width. At f = 0 the subgradient is 0.

    Args:
        centred: match |x - b|, b the decoder's bias, as `TopAFA` does in its choice. The paper's code matches |x| here.

    Reads: `features` float [batch, features]; `signal` float [batch, width]; with `centred`, `centre` float [width].
    Returns: float [batch], never negative.

    Example:
        >>> NormMatching()(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 7.0]]))
        tensor([4.])

    Source: arXiv:2503.24277; SewoongLee/top-afa-sae, `afa_loss`.
    """

    formula = "norm_matching"
    equation = "(|f| - |x|)^2"
    source = "arXiv:2503.24277"
    expects: ClassVar = {"features": _FEATURES, "signal": "float [batch, width]", "centre": "float [width]"}

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred

    def readings(self) -> tuple[str, ...]:
        return () if self.centred else ("centre",)

    def requirements(self) -> tuple[str, ...]:
        return ("centre",) if self.centred else ()

    def forward(self, features: Tensor, signal: Tensor, centre: Tensor | None = None) -> Tensor:
        x = signal if centre is None or not self.centred else signal - centre
        of_features: Tensor = _RowNorms.apply(features)  # type: ignore[no-untyped-call]
        of_signal: Tensor = torch.linalg.vector_norm(x, dim=1)
        return (of_features - of_signal).square()


class _RowNorms(torch.autograd.Function):
    """Norms of rows, whose gradient is one pass over memory: f / |f|, and 0 at f = 0."""

    @staticmethod
    def forward(features: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(features, dim=1)
        return norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        by_features: Tensor = features * _inverse(features, gradient)[:, None]
        return by_features

    @staticmethod
    def jvp(ctx: Any, moved: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        return _inverse(features, (features * moved).sum(1))


def _inverse(features: Tensor, x: Tensor) -> Tensor:
    """Return `x / |f|`, 0 where f is 0."""
    norms = torch.linalg.vector_norm(features, dim=1)
    return torch.where(norms > 0, x / torch.where(norms > 0, norms, 1.0), 0.0)


class FeatureL1(Term):
    """The sum of each example's features, none of which is negative: `|f|_1`.

    Reads: `features` float [batch, features].
    Returns: float [batch].

    Example:
        >>> FeatureL1()(torch.tensor([[3.0, 4.0]]))
        tensor([7.])
    """

    formula = "feature_l1"
    equation = "|f|_1"
    expects: ClassVar = {"features": _FEATURES}

    def forward(self, features: Tensor) -> Tensor:
        return features.abs().sum(1)


class FeatureL0(Term):
    """How many features of each example are active: `|f|_0`.

    Its gradient is that of the activation's gates: a pseudo-derivative by the thresholds of `JumpReLU`, none elsewhere.

    Reads: `gates` float [batch, features], 1 where a feature is active.
    Returns: float [batch].

    Example:
        >>> FeatureL0()(torch.tensor([[1.0, 0.0, 1.0]]))
        tensor([2.])

    Source: arXiv:2407.14435, eq. 9.
    """

    formula = "feature_l0"
    equation = "|f|_0"
    source = "arXiv:2407.14435"
    capabilities = frozenset({"per_example", "deterministic"})
    expects: ClassVar = {"gates": _FEATURES}

    def forward(self, gates: Tensor) -> Tensor:
        return gates.sum(1)


class DeadFeatures(Term):
    """Let features that were not active for long explain what the others leave: `1/d |relu(z)_dead W_dead - (x - x')|^2`.

    The largest `top` dead features of each example reconstruct its residual, so that they have a gradient again. The paper weighs the
    term by 1/32. While no feature is dead it does not act.

    Args:
        after: training steps without activity that make a feature dead, from 1.
        top: dead features of an example that take part.
        detach: hold the residual constant, so that live features are not drawn towards the dead ones. The paper's code lets it move;
            later libraries hold it.

    Reads: `z` float [batch, features] before the activation; `reconstruction` and `signal` float [batch, width]; `decoder` float
        [features, width]; `inactive` int64 [features], training steps since each was active.
    Returns: float [batch]; publishes `dead`, 0-dim, how many there are.

    Raises:
        InputError: an argument is out of range.

    Example:
        >>> term = DeadFeatures(after=2)
        >>> z, x, still = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.zeros(1, 1)
        >>> term(z, still, x, torch.ones(2, 1), torch.tensor([0, 2])).values            # feature 1 alone: (2 - 3)^2
        tensor([1.])

    Source: arXiv:2503.24277, training code; arXiv:2406.04093, appendix A.2, for the idea.
    """

    formula = "dead_features"
    equation = "1/d |relu(z)_dead W_dead - (x - x')|^2"
    source = "arXiv:2406.04093, appendix A.2"
    expects: ClassVar = {
        "z": _FEATURES, "reconstruction": "float [batch, width]", "signal": "float [batch, width]",
        "decoder": "float [features, width]", "inactive": "int64 [features]",
    }  # fmt: skip

    def __init__(self, after: int = 5, top: int = 512, detach: bool = True) -> None:
        super().__init__()
        for name, count in (("after", after), ("top", top)):
            try:
                require_count("dead_features", count)
            except InputError:
                raise InputError(f"dead_features: {name} is an integer of at least 1, and it is {count!r}.") from None
        self.after, self.top, self.detach = after, top, detach

    def forward(self, z: Tensor, reconstruction: Tensor, signal: Tensor, decoder: Tensor, inactive: Tensor) -> Value:
        dead = (inactive >= self.after).nonzero().flatten()
        extras = {"dead": torch.tensor(float(len(dead)), device=z.device)}
        if not len(dead):
            return Value(z.new_zeros(len(z)), extras=extras, active=False)
        residual = signal - reconstruction
        values, index = z.index_select(1, dead).relu().topk(min(self.top, len(dead)), dim=1, sorted=False)
        few = torch.zeros(len(z), len(dead), dtype=values.dtype, device=z.device).scatter(1, index, values)
        explained = few @ decoder.index_select(0, dead).to(few.dtype)
        return Value((explained - (residual.detach() if self.detach else residual)).square().mean(1), extras=extras)
