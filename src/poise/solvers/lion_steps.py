"""How Lion's step is computed: in one fused pass, in chunks, or tensor lists at a time. All three give the same step.

    c = b1 m + (1 - b1) g,    theta <- keep theta - rate sign(c),    m <- b2 m + (1 - b2) g

The step moves five tensors (it reads theta, g, m and writes theta, m), so on large tensors memory decides its speed. The fused pass
touches each number once; chunks stay in the cache between PyTorch's operations; lists save calls where tensors are small or on a GPU.

The step of a number depends on its own gradient alone, so a number whose gradient is infinite or NaN is left as it is, with its
momentum, and the others make their step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["Rule", "update"]

CHUNK = 1 << 16
"""Numbers a chunk and thread: three float32 chunks fit a core's cache."""
ON_DEVICE = 1 << 24
WORTH_THREADS = 1 << 20
NATIVE = (torch.float32, torch.float64)
Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Rule:
    """The numbers of one step of one group of parameters.

    Args:
        rate: length of the step of every number.
        keep: factor of the decay, `1 - rate * decay`.
        beta1, beta2: share of the momentum in the direction, and in the next momentum.
        cautious: factor for numbers whose direction opposes the gradient; None leaves all alike.
        sign: -1 to maximise.
    """

    rate: float
    keep: float
    beta1: float
    beta2: float
    cautious: float | None = None
    sign: float = 1.0

    def rates(self, aligned: int, total: int) -> tuple[float, float]:
        """Rates of aligned and of opposed numbers, rescaled so that a number moves by `rate` on average."""
        if self.cautious is None or not total:
            return self.rate, self.rate
        mean = max((aligned + self.cautious * (total - aligned)) / total, 1e-5)
        return self.rate / mean, self.rate * self.cautious / mean


def update(threes: Sequence[Three], rule: Rule, *, foreach: bool, fused: bool) -> bool:
    """Make one step on (parameter, gradient, momentum) triples, in place, and return whether all gradients were finite.

    Args:
        threes: triples of equal shape; the momentum may be of another dtype than the parameter.
        rule: the step's numbers.
        foreach: lists of tensors at a time, no longer together than the largest tensor; else one by one.
        fused: one pass over memory for tensors on the CPU.
    """
    listed: list[Three] = []
    finite = True
    for three in threes:
        parameter, _, momentum = three
        native = parameter.dtype in NATIVE and momentum.dtype == parameter.dtype
        flat = _flat(three) if fused or not native else None
        if fused and native and flat is not None and parameter.device.type == "cpu":
            finite = _one_pass(flat, rule) and finite
            # What writes behind PyTorch's back must say so, or autograd would not notice.
            torch.autograd.graph.increment_version([parameter, momentum])
        elif not native:
            finite = _chunked(three if flat is None else flat, rule) and finite
        else:
            listed.append(three)
    if not _all_finite([gradient for _, gradient, _ in listed]):
        for three in listed:
            _chunked(three, rule)
        return False
    for some in _lists(listed) if foreach else ([three] for three in listed):
        _foreach(some, rule)
    return finite


# ---- one pass ------------------------------------------------------------------------------------------------------


def _flat(three: Three) -> Three | None:
    """View a triple as vectors in the order of memory; None where the three lie differently."""
    parameter = three[0]
    strides = parameter.stride()
    order = sorted(range(parameter.ndim), key=lambda d: -strides[d])
    views = [t.permute(order) for t in three]
    if not all(v.is_contiguous() for v in views):
        return None
    one, two, last = (v.view(-1) for v in views)
    return one, two, last


def _one_pass(three: Three, rule: Rule) -> bool:
    if compiled() is None:
        return _chunked(three, rule)
    count, step = compiled()
    parameter, gradient, momentum = (t.detach().numpy() for t in three)
    real = parameter.dtype.type
    weigh = [real(w) for w in (rule.beta1, 1 - rule.beta1)]
    ends = [real(rule.sign), real(0)]
    aligned = 0
    if rule.cautious is not None:
        aligned = sum(_threads(lambda a, b: count(gradient[a:b], momentum[a:b], *weigh, *ends), gradient.size))
    rest = [real(w) for w in (rule.beta2, 1 - rule.beta2, rule.keep, *rule.rates(aligned, gradient.size))]
    return not any(
        _threads(lambda a, b: step(parameter[a:b], gradient[a:b], momentum[a:b], *weigh, *rest, *ends), gradient.size)
    )


def _threads(call: Callable[[int, int], Any], size: int) -> list[Any]:
    """Call on contiguous ranges that make up `size`, in as many threads as PyTorch uses; the compiled loops hold no lock."""
    threads = min(torch.get_num_threads(), size // WORTH_THREADS)
    if threads < 2:
        return [call(0, size)]
    edges = [size * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, edges[:-1], edges[1:]))


@cache
def compiled() -> Any:
    """The compiled loops, or None where numba is not installed (it lags behind new Python versions)."""
    try:
        import numba
    except ImportError:
        return None
    loops = (_count_aligned, _step)
    try:
        return tuple(numba.njit(loop, nogil=True, cache=True) for loop in loops)
    except RuntimeError:  # nowhere to keep what was compiled
        return tuple(numba.njit(loop, nogil=True) for loop in loops)


# Numbers come typed, because a literal would turn float32 arithmetic into float64.
def _step(
    p: Any, g: Any, m: Any, b1: Any, w1: Any, b2: Any, w2: Any, keep: Any, rate: Any, other: Any, sign: Any, zero: Any
) -> bool:  # fmt: skip
    bad = False
    for i in range(g.size):
        x = sign * g[i]
        c = b1 * m[i] + w1 * x
        up, down = c > zero, c < zero
        r = rate if (up & (x > zero)) | (down & (x < zero)) else other
        moved = keep * p[i] - (r if up else (-r if down else zero))
        finite = x - x == zero
        p[i] = moved if finite else p[i]
        m[i] = b2 * m[i] + w2 * x if finite else m[i]
        bad |= not finite
    return bad


def _count_aligned(g: Any, m: Any, b1: Any, w1: Any, sign: Any, zero: Any) -> int:
    count = 0
    for i in range(g.size):
        x = sign * g[i]
        c = b1 * m[i] + w1 * x
        count += ((c > zero) & (x > zero)) | ((c < zero) & (x < zero))
    return count


# ---- chunks --------------------------------------------------------------------------------------------------------


def _pieces(three: Three) -> Iterator[Three]:
    if three[0].ndim != 1:
        yield three
        return
    length = CHUNK * torch.get_num_threads() if three[0].device.type == "cpu" else ON_DEVICE
    for start in range(0, len(three[0]), length):
        one, two, last = (t[start : start + length] for t in three)
        yield one, two, last


def _direction(gradient: Tensor, momentum: Tensor, rule: Rule, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the gradient and sign(c), in the dtype of the arithmetic."""
    x = gradient.to(wide) if rule.sign > 0 else -gradient.to(wide)
    return x, momentum.to(wide).mul(rule.beta1).add_(x, alpha=1 - rule.beta1).sign_()


def _chunked(three: Three, rule: Rule) -> bool:
    """Step chunk by chunk, in at least float32: momentum or parameters of half precision are rounded once."""
    wide = torch.promote_types(torch.promote_types(three[0].dtype, three[2].dtype), torch.float32)
    aligned = 0
    if rule.cautious is not None:
        for _, gradient, momentum in _pieces(three):
            x, c = _direction(gradient, momentum, rule, wide)
            aligned += int((c.mul_(x) > 0).sum())
    rate, other = rule.rates(aligned, three[0].numel())
    finite = True
    for piece in _pieces(three):
        finite = _chunk(piece, rule, rate, other, wide) and finite
    return finite


def _chunk(piece: Three, rule: Rule, rate: float, other: float, wide: torch.dtype) -> bool:
    parameter, gradient, momentum = piece
    x, c = _direction(gradient, momentum, rule, wide)
    if rule.cautious is not None:
        c.mul_((x * c > 0).to(wide).mul_(rate - other).add_(other))
    else:
        c.mul_(rate)
    moved = parameter.to(wide).mul(rule.keep).sub_(c)
    mixed = torch.mul(momentum.to(wide), rule.beta2, out=c).add_(x, alpha=1 - rule.beta2)
    # Zero times a number that is not finite is NaN, and so is the sum: cheaper than looking at each.
    clean = bool(torch.mul(x, 0).sum() == 0)
    if not clean:
        finite = torch.isfinite(gradient)
        moved, mixed = torch.where(finite, moved, parameter), torch.where(finite, mixed, momentum)
    parameter.copy_(moved)
    momentum.copy_(mixed)
    return clean


# ---- lists of tensors ----------------------------------------------------------------------------------------------


def _lists(threes: Sequence[Three]) -> Iterator[list[Three]]:
    """Cut into lists that together hold no more numbers than the largest tensor, so that no more is held in passing."""
    largest = max((p.numel() for p, _, _ in threes), default=0)
    some: list[Three] = []
    held = 0
    for three in threes:
        if some and held + three[0].numel() > largest:
            yield some
            some, held = [], 0
        some.append(three)
        held += three[0].numel()
    if some:
        yield some


def _foreach(threes: Sequence[Three], rule: Rule) -> None:
    parameters, gradients, momenta = (list(each) for each in zip(*threes, strict=True))
    c = torch._foreach_mul(momenta, rule.beta1)
    torch._foreach_add_(c, gradients, alpha=rule.sign * (1 - rule.beta1))
    torch._foreach_sign_(c)
    if rule.cautious is not None:
        for direction, gradient in zip(c, gradients, strict=True):
            aligned = rule.sign * direction * gradient > 0
            factor = aligned.to(direction.dtype).mul_(1 - rule.cautious).add_(rule.cautious)
            direction.mul_(factor.div_(factor.mean().clamp(min=1e-5)))
    torch._foreach_mul_(parameters, rule.keep)
    torch._foreach_add_(parameters, c, alpha=-rule.rate)
    torch._foreach_mul_(momenta, rule.beta2)
    torch._foreach_add_(momenta, gradients, alpha=rule.sign * (1 - rule.beta2))


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    """Say whether every number is finite; a GPU is waited for once."""
    full = [g for g in gradients if g.numel()]
    if not full:
        return True
    largest = torch._foreach_norm(full, math.inf)
    return bool(torch.isfinite(torch.stack([n.to(largest[0].device, torch.float64) for n in largest])).all())
