"""What a language model says of each token, from hidden states and the output matrix, never as `[tokens, vocabulary]` logits.

    z = scale * softcap * tanh(h W' / softcap)            one tile of the vocabulary at a time
    logps = z[target] - logsumexp(z)
    entropy = logsumexp(z) - sum_v p_v z_v
    kl = KL(reference || policy),  reverse_kl = KL(policy || reference)

The forward pass folds the tiles into running sums (the online softmax); the backward pass computes each tile again, turns it
into the gradient of its logits in place, and multiplies it out. Beside the head's own gradient nothing grows with the vocabulary.

Source: the online normaliser of Milakov and Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poise.errors import InputError, QuantityError

__all__ = ["OUTPUTS", "Head", "token_scores"]

OUTPUTS = ("logps", "logsumexp", "entropy", "kl", "reverse_kl")
"""What can be asked for, in the order in which it is returned."""

_TILE = 1 << 22
"""Logits that exist at once; 16 MiB in float32."""
_CACHED = 1 << 19
"""The same on a CPU, where a tile is folded while it is in the cache of a core."""
_HALF = (torch.float16, torch.bfloat16)
_ROWS = 4096
"""Rows of a tile at most."""


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: `z = scale * cap(sum_i features_i matrix_i' + bias)`.

    Args:
        features: float `[tokens, width_i]`, one for each matrix; a low-rank adapter of the head is a second pair
            (`s h A'`, `B`), so that its product with the output matrix is never formed.
        matrices: float `[vocabulary, width_i]`.
        bias: float `[vocabulary]` or None.
        softcap: `cap(z) = softcap * tanh(z / softcap)`, or None for none.
        scale: what multiplies the logits before the cap.
        dtype: what the products run in; the features' own where it is None. Float32 stands in for what the CPU is slower in.
    """

    features: tuple[Tensor, ...]
    matrices: tuple[Tensor, ...]
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    dtype: torch.dtype | None = None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that can be predicted."""
        return len(self.matrices[0])

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in one row, the bias last."""
        return (*self.features, *self.matrices, self.bias)

    def like(self, tensors: Sequence[Tensor | None]) -> Head:
        """Return the same head with other tensors, in the order of `tensors()`."""
        n = len(self.features)
        features, matrices, bias = tuple(tensors[:n]), tuple(tensors[n : 2 * n]), tensors[2 * n]
        return Head(features, matrices, bias, self.softcap, self.scale, self.dtype)  # type: ignore[arg-type]

    def frozen(self) -> Head:
        """Return the same head, detached."""
        return self.like([None if t is None else t.detach() for t in self.tensors()])

    @property
    def products(self) -> torch.dtype:
        """What the products run in."""
        first = self.features[0]
        dtype = first.dtype if self.dtype is None else self.dtype
        return torch.float32 if dtype in _HALF and first.device.type == "cpu" and not _cpu_has_half() else dtype

    def at(self, rows: slice) -> Head:
        """Return the head of some rows, its features in the type of the products."""
        features = tuple(f[rows].to(self.products) for f in self.features)
        return Head(features, self.matrices, self.bias, self.softcap, self.scale, self.products)

    def tile(self, columns: slice) -> Tensor:
        """Return the logits of some tokens, in float32 at least."""
        z, dtype = None, self.products
        for features, matrix in zip(self.features, self.matrices, strict=True):
            product = features.to(dtype) @ matrix[columns].to(dtype).t()
            z = _wide(product) if z is None else z.add_(product)
        assert z is not None
        if self.bias is not None:
            z += self.bias[columns]
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


@cache
def _cpu_has_half() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32: with matrix units, and not with vectors alone."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask is not None and ask())


def token_scores(
    head: Head, target: Tensor, outputs: Sequence[str] = ("logps",), reference: Head | None = None
) -> dict[str, Tensor]:
    """Score tokens under a language model's head, differentiably in the head's features, matrices and bias.

    Args:
        head: the policy.
        target: int64 `[tokens]`, the tokens that came.
        outputs: which of `OUTPUTS` to compute; each costs one more sum a tile.
        reference: the head that `kl` and `reverse_kl` compare with; it gets no gradient.

    Returns:
        float32 `[tokens]` (float64 for float64 heads) by name, in nats.

    Raises:
        InputError: an output that does not exist, or a divergence without a reference.
        QuantityError: the vocabularies differ.

    >>> h, w = torch.zeros(1, 2), torch.zeros(4, 2)
    >>> token_scores(Head((h,), (w,)), torch.tensor([3]))["logps"]
    tensor([-1.3863])
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise InputError(f"token_scores knows {', '.join(OUTPUTS)}, and was asked for {', '.join(unknown)}.")
    compares = "kl" in outputs or "reverse_kl" in outputs
    if compares and reference is None:
        raise InputError("A divergence from the reference needs a reference, and there is none.")
    if compares and reference is not None and reference.vocabulary != head.vocabulary:
        raise QuantityError(
            f"The policy has {head.vocabulary} tokens and the reference {reference.vocabulary}: a divergence over the vocabulary "
            "needs the same one."
        )
    compared = reference.frozen() if compares and reference is not None else None
    wanted = tuple(name for name in OUTPUTS if name in outputs)
    with torch.autocast(target.device.type, enabled=False):
        found = _TokenScores.apply(head, compared, target, wanted, *head.tensors())  # type: ignore[no-untyped-call]
    return dict(zip(wanted, found, strict=True))


class _TokenScores(torch.autograd.Function):
    """The online softmax, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        reference: Head | None,
        target: Tensor,
        wanted: tuple[str, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        head = head.like(tensors)
        parts = [
            _fold(head.at(rows), None if reference is None else reference.at(rows), target[rows], wanted)
            for rows in _row_tiles(target)
        ]
        sums = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else _nothing(head)
        # The tensors are saved where autograd can see them, and the head that they belong to beside them.
        ctx.head, ctx.reference, ctx.target = head.like([None] * len(tensors)), reference, target
        ctx.wanted, ctx.sums = wanted, sums
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple(sums[name].clone() for name in wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        head = ctx.head.like(ctx.saved_tensors)
        given = {name: g for name, g in zip(ctx.wanted, upstream, strict=True) if g is not None}
        needs = ctx.needs_input_grad[4:]
        n = len(head.features)
        tiles = [
            (rows, head.at(rows), None if ctx.reference is None else ctx.reference.at(rows))
            for rows in _row_tiles(ctx.target)
        ]
        features = [_wide_zeros(f) if need else None for f, need in zip(head.features, needs[:n], strict=True)]
        new = torch.empty_like if tiles else torch.zeros_like
        matrices = [new(m) if need else None for m, need in zip(head.matrices, needs[n : 2 * n], strict=True)]
        bias = _wide_zeros(head.bias) if needs[2 * n] and head.bias is not None else None
        for columns in _columns(head.vocabulary, ctx.target):
            # Summed over all rows before it is rounded to the type of the matrix, and written once.
            sums: list[Tensor | None] = [None] * n
            for rows, part, other in tiles:
                dz = _gradient_tile(ctx, part, other, given, rows, columns)
                for i in range(n):
                    gradient = features[i]
                    if gradient is not None:
                        gradient[rows].addmm_(dz, _wide(head.matrices[i][columns]))
                    if matrices[i] is not None:
                        product = dz.to(part.products).t() @ part.features[i]
                        before = sums[i]
                        sums[i] = product if before is None else _wide(before).add_(product)
                if bias is not None:
                    bias[columns] += dz.sum(0)
            for matrix, product in zip(matrices, sums, strict=True):
                if matrix is not None and product is not None:
                    matrix[columns] = product
        found = [
            *(None if g is None else g.to(t.dtype) for g, t in zip(features, head.features, strict=True)),
            *matrices,
            None if bias is None or head.bias is None else bias.to(head.bias.dtype),
        ]
        return (None, None, None, None, *found)


def _fold(head: Head, reference: Head | None, labels: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Run over the vocabulary once and return what the wanted scores and the backward pass need, `[rows]` each."""
    policy, other = _Running(), _Running()
    chosen: Tensor | None = None
    for columns in _columns(head.vocabulary, labels):
        z = head.tile(columns)
        inside = (labels >= columns.start) & (labels < columns.stop)
        found = z.gather(1, (labels - columns.start).clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        chosen = torch.where(inside, found, z.new_zeros(()) if chosen is None else chosen)
        e = policy.take(z)
        if "entropy" in wanted:
            policy.weigh(e, z)
        if reference is not None:
            difference = reference.tile(columns)
            e_reference = other.take(difference)
            difference.sub_(z)
            if "kl" in wanted:
                other.weigh(e_reference, difference)
            if "reverse_kl" in wanted:
                policy.weigh(e, difference, "difference")
    assert chosen is not None
    sums = {"logsumexp": policy.logsumexp(), "target_logit": chosen}
    sums["logps"] = chosen - sums["logsumexp"]
    if "entropy" in wanted:
        sums["entropy"] = sums["logsumexp"] - policy.mean()
    if reference is not None:
        sums["reference_logsumexp"] = other.logsumexp()
        gap = sums["logsumexp"] - sums["reference_logsumexp"]
        if "kl" in wanted:
            sums["kl"] = other.mean() + gap
        if "reverse_kl" in wanted:
            sums["reverse_kl"] = -policy.mean("difference") - gap
    return sums


class _Running:
    """Sums over tiles of `e^z` and of `e^z x`, relative to the largest `z` so far."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None
        self.total: Tensor | None = None
        self.weighted: dict[str, Tensor] = {}

    def take(self, z: Tensor) -> Tensor:
        """Add a tile `[rows, width]`; return its `e^(z - largest)`."""
        largest = z.amax(1)
        if self.largest is not None:
            largest = torch.maximum(largest, self.largest)
            shrink = (self.largest - largest).exp_()
            self.total = self.total * shrink  # type: ignore[operator]
            self.weighted = {name: value * shrink for name, value in self.weighted.items()}
        self.largest = largest
        e = (z - largest[:, None]).exp_()
        self.total = e.sum(1) if self.total is None else self.total + e.sum(1)
        return e

    def weigh(self, e: Tensor, x: Tensor, name: str = "value") -> None:
        """Add `sum e x` of the tile that was taken last."""
        added = torch.linalg.vecdot(e, x)
        self.weighted[name] = self.weighted[name] + added if name in self.weighted else added

    def logsumexp(self) -> Tensor:
        assert self.largest is not None
        assert self.total is not None
        return self.largest + self.total.log()

    def mean(self, name: str = "value") -> Tensor:
        """Return `sum p x`."""
        return self.weighted[name] / self.total  # type: ignore[operator]


def _gradient_tile(
    ctx: Any, head: Head, reference: Head | None, given: dict[str, Tensor], rows: slice, columns: slice
) -> Tensor:
    """Return the gradient with respect to the products `sum_i features_i matrix_i'` on one tile.

    d logps = onehot - p,  d logsumexp = p,  d entropy = -p (log p + entropy),  d kl = p - p_reference,
    d reverse_kl = p (log p - log p_reference - reverse_kl)
    """
    sums = {name: value[rows, None] for name, value in ctx.sums.items()}
    g = {name: _wide(value[rows, None]) for name, value in given.items()}
    z = head.tile(columns)
    curve = None if head.softcap is None else 1 - (z / head.softcap).square_()
    log_p = z.sub_(sums["logsumexp"])
    p = log_p.exp()
    plain = g.get("logsumexp", 0.0) - g.get("logps", 0.0) + g.get("kl", 0.0)
    if "entropy" in g or "reverse_kl" in g:
        factor = torch.zeros_like(p)
        if "reverse_kl" in g:
            assert reference is not None
            apart = log_p - reference.tile(columns)
            factor += g["reverse_kl"] * (apart + (sums["reference_logsumexp"] - sums["reverse_kl"]))
        if "entropy" in g:
            factor -= g["entropy"] * (log_p + sums["entropy"])
        dz = p.mul_(factor.add_(plain))
    else:
        dz = p.mul_(plain)
    if "kl" in g:
        assert reference is not None
        dz -= reference.tile(columns).sub_(sums["reference_logsumexp"]).exp_().mul_(g["kl"])
    if "logps" in g:
        labels = ctx.target[rows]
        inside = (labels >= columns.start) & (labels < columns.stop)
        place = (labels - columns.start).clamp(0, dz.shape[1] - 1)[:, None]
        dz.scatter_add_(1, place, torch.where(inside[:, None], g["logps"], 0.0))
    if curve is not None:
        dz *= curve
    return dz if head.scale == 1.0 else dz.mul_(head.scale)


def _row_tiles(target: Tensor) -> Iterator[slice]:
    """Give the rows in tiles."""
    for start in range(0, len(target), _ROWS):
        yield slice(start, min(len(target), start + _ROWS))


def _columns(vocabulary: int, target: Tensor) -> Iterator[slice]:
    """Give the vocabulary in tiles that fit with a tile of rows."""
    most = min(_TILE, _CACHED) if target.device.type == "cpu" else _TILE
    width = max(1, most // max(1, min(len(target), _ROWS)))
    for start in range(0, vocabulary, width):
        yield slice(start, min(vocabulary, start + width))


def _nothing(head: Head) -> dict[str, Tensor]:
    """Return the scores of no token."""
    empty = _wide(head.features[0].new_zeros(0))
    return dict.fromkeys((*OUTPUTS, "reference_logsumexp", "target_logit"), empty)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where that is wider."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _wide_zeros(tensor: Tensor) -> Tensor:
    return (
        torch.zeros_like(_wide(tensor.detach()))
        if tensor.dtype in (torch.float32, torch.float64)
        else torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
    )
