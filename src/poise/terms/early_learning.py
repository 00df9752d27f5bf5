"""Early-learning regularisation: keep a network where it was before it began to memorise wrong labels.

A network trained on partly wrong labels is right about many wrongly labelled examples early on, and forgets it later.
The term remembers, for each example, a running average `t` of the network's own predictions, and rewards agreement:

    cross_entropy + 3*early_learning          log(1 - <p, t>),   gradient  -p_c (t_c - s) / (1 - s),   s = <p, t>

The reward grows without limit as p and t approach the same corner, so its pull outlives that of cross-entropy on clean
examples and cancels it on wrong ones. The value is never positive, and the total may be negative: that is normal, and a
reason to watch the terms apart.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError, QuantityError
from poise.memory import PerExampleMemory
from poise.objective import DataInfo, Term, Value

__all__ = ["EarlyLearning", "RefinedCrossEntropy"]

Form = Literal["log", "kl", "ce"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class _LookAhead:
    """The updated target that `forward` has worked out, kept for `advance` where it is given the very same tensors.

    Tensors are recognised by address, form and version; holding them keeps their addresses from being used again. Nothing
    is kept in copies and pickles: what waits for `advance` belongs to the running step.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, list[Tensor], list[int]] | None = None

    def keep(self, target: Tensor, tensors: list[Tensor]) -> None:
        try:
            if torch.compiler.is_compiling() or not tensors[0].data_ptr():
                return
            # Without the graph behind them, which may be large.
            held = [x.detach() if x.requires_grad else x for x in tensors]
            self._kept = target, held, [x._version for x in held]
        except RuntimeError:  # inside a torch.func transform a tensor has no address, in inference mode no version
            return

    def take(self, tensors: list[Tensor]) -> Tensor | None:
        """Return the target that was worked out from exactly these tensors, or None; it is given once."""
        if self._kept is None:
            return None
        (target, held, versions), self._kept = self._kept, None
        for x, before, version in zip(tensors, held, versions, strict=True):
            if before._version != version or not (x is before or _are_one(x, before)):
                return None
        return target

    def __reduce__(self) -> tuple[type[_LookAhead], tuple[()]]:
        return (_LookAhead, ())


def _are_one(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    try:
        return (
            x.data_ptr() == y.data_ptr()
            and x.shape == y.shape
            and x.stride() == y.stride()
            and x._version == y._version
        )
    except RuntimeError:
        return False


class EarlyLearning(Term):
    """Reward agreement with a running average of the model's own predictions, against memorising wrong labels.

    log(1 - <p, t>),   p = clamp(softmax(z), eps, 1 - eps),   t <- beta t + (1 - beta) p / |p|_1,   t starts at 0

    `t` is updated first and used then: `forward` looks ahead at the updated target, `advance` stores it, once for each
    optimiser step. No gradient flows through `t`, nor where the clamp acts, so that the value stays in [log(eps), 0].
    Since `t` starts at zero, the term is weak in the first epochs: |t|_1 = 1 - beta^k after k visits. The weight (lambda:
    3 on CIFAR-10, 7 on CIFAR-100) stands outside and is the sensitive choice; beta is not.

    Args:
        beta: share of the old target that stays, in [0, 1).
        eps: clamp of the probabilities, in (0, 0.5).
        form: `"log"` is the method. `"ce"` (-sum t log p) and `"kl"` (sum t log(t / p), t constant) are its ablations:
            their gradient, |t|_1 p - t, fades as p reaches t, and so they follow wrong targets.
        teacher: take the new target from the quantity `teacher_probabilities` (a weight average, the other network) as it
            is, instead of from the model's own prediction.
        bias_correction: use t / (1 - beta^k), which sums to 1 from the first visit; off in the paper.
        dtype: what the memory is stored in: "float32", "float16", "bfloat16" or "float64".
        top: remember only so many largest entries of each target (0 remembers all), for data of many classes.

    Reads: `logits` float [batch, classes]; `index` int64 [batch], each at most once a step; with `teacher`,
        `teacher_probabilities` float [batch, classes]. Where the input was mixed (`poise.data.augmentations.Mixup`),
        `partner` int64 [batch], the row of the batch that was mixed in, and `share` float [batch], the share l of the row
        itself: the target is then l t + (1 - l) t[partner].
    Returns: float [batch], nats, never positive for `"log"`; publishes `target` [batch, classes] and `agreement` <p, t>
        [batch].
    State: `memory` (examples x classes numbers of `dtype`, and an int64 visit count for each example), saved with the
        objective.

    Raises:
        InputError: an argument out of range.
        QuantityError: an index out of range or twice in one step, or another number of classes than the memory has.
        StateError: `objective.bind(examples=..., classes=...)` was not called.

    Example:
        >>> term = EarlyLearning(beta=0.5)
        >>> term.bind(DataInfo(examples=2, classes=2))
        >>> term(torch.zeros(1, 2), torch.tensor([0])).values          # t = 0.5 * (0.5, 0.5), so log(1 - 0.25)
        tensor([-0.2877])

    Source: Liu et al. 2020, arXiv:2007.00151, eq. 5-6 and section 4.2; shengliu66/ELR, ELR/model/loss.py.
    """

    formula = "early_learning"
    equation: ClassVar[str] = "log(1 - <p, t>),  t <- beta t + (1 - beta) p"
    source: ClassVar[str] = "arXiv:2007.00151, eq. 5-6; shengliu66/ELR"
    expects: ClassVar[dict[str, str]] = {
        "logits": "float [batch, classes]",
        "teacher_probabilities": "float [batch, classes]",
        "partner": "int64 [batch]",
        "share": "float [batch]",
    }
    # No "potential": the look-ahead target moves with the prediction and carries no gradient, so the gradient is not that of the value.
    capabilities = frozenset({"per_example", "deterministic"})

    def __init__(
        self,
        beta: float = 0.7,
        eps: float = 1e-4,
        form: Form = "log",
        teacher: bool = False,
        bias_correction: bool = False,
        dtype: str = "float32",
        top: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= beta < 1:
            raise InputError(f"early_learning: beta is the share of the old target that stays, in [0, 1); got {beta}.")
        if not 0 < eps < 0.5:
            raise InputError(f"early_learning: eps clamps the probabilities and lies in (0, 0.5); got {eps}.")
        if form not in ("log", "kl", "ce"):
            raise InputError(f"early_learning: form is 'log', 'kl' or 'ce'; got {form!r}.")
        if dtype not in _DTYPES:
            raise InputError(f"early_learning: dtype is one of {', '.join(map(repr, _DTYPES))}; got {dtype!r}.")
        if top < 0:
            raise InputError(f"early_learning: top is a number of classes, 0 for all; got {top}.")
        self.beta = beta
        self.eps = eps
        self.form = form
        self.teacher = teacher
        self.bias_correction = bias_correction
        self.dtype = dtype
        self.top = top
        self.memory = PerExampleMemory(width=top or None, dtype=_DTYPES[dtype])
        self.__dict__["memory"] = self.memory  # read at every step, and the search of nn.Module is slow
        # float32 holds every class number below 2^24 exactly.
        self.remembered_classes = PerExampleMemory(width=top) if top else None
        self.classes: int | None = None
        # <p, t> <= 1 - eps holds for exact targets; the rounding of a coarse memory may carry it beyond.
        self._rounds = eps < 16 * torch.finfo(_DTYPES[dtype]).eps
        self._ahead = _LookAhead()

    def readings(self) -> tuple[str, ...]:
        """Without a teacher, none is read, even where one is offered."""
        return () if self.teacher else ("teacher_probabilities",)

    def bind(self, info: DataInfo) -> None:
        """Make room for one target for each training example."""
        if self.top and info.classes is not None and self.top > info.classes:
            raise InputError(f"early_learning: top={self.top} classes cannot be remembered of {info.classes}.")
        self.classes = info.classes
        self.memory.bind(info.examples, info.classes, info.device)
        if self.remembered_classes is not None:
            self.remembered_classes.bind(info.examples, info.classes, info.device)

    def forward(
        self,
        logits: Tensor,
        index: Tensor,
        teacher_probabilities: Tensor | None = None,
        partner: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Value:
        p = self._probabilities(logits)
        t = self._updated(p, index, teacher_probabilities)
        self._ahead.keep(t, self._decisive(logits, index, teacher_probabilities))
        if self.bias_correction:
            t = t / (1 - self.beta ** (self.memory.visits_of(index) + 1).to(t.dtype))[:, None]
        if partner is not None and share is not None:
            share = share.detach()
            t = share[:, None] * t + (1 - share)[:, None] * t[partner]
        s = (p * t).sum(dim=-1)
        if self.form == "log":
            # log1p would gain nothing: 1 - s is exact from s = 1/2 on, and below it its rounding is that of the value.
            values = torch.rsub(s.clamp(max=1 - self.eps) if self._rounds else s, 1).log()
        else:
            values = -(t * p.log()).sum(dim=-1)
            if self.form == "kl":
                values = values + torch.xlogy(t, t).sum(dim=-1)
        return Value(values, extras={"target": t, "agreement": s})

    def advance(
        self,
        logits: Tensor,
        index: Tensor,
        teacher_probabilities: Tensor | None = None,
    ) -> None:
        """Store the updated targets."""
        t = self._ahead.take(self._decisive(logits, index, teacher_probabilities))
        if t is None:
            t = self._updated(self._probabilities(logits), index, teacher_probabilities)
        if self.remembered_classes is None:
            self.memory.write(index, t)
        else:
            rows, kept = t.topk(self.top, dim=1)
            self.memory.write(index, rows)
            self.remembered_classes.write(index, kept.float())

    def targets(self, index: Tensor | None = None) -> Tensor:
        """The targets as stored: float [n, classes] of the examples in `index` int64 [n], or of all."""
        if index is None:
            index = torch.arange(self.memory.examples, device=self.memory.values.device)
        remembered = self.remembered_classes
        # A sparse memory that was loaded and never bound knows its classes only by what it remembers.
        return self._stored(index, classes=0 if remembered is None else int(remembered.values.max()) + 1)

    def _decisive(self, logits: Tensor, index: Tensor, teacher_probabilities: Tensor | None) -> list[Tensor]:
        """Everything that decides the updated target."""
        source = logits if teacher_probabilities is None else teacher_probabilities
        return [source, index, self.memory.rows]

    def _probabilities(self, logits: Tensor) -> Tensor:
        # In half precision 1 - eps is 1, and the logarithm below would be infinite.
        dtype = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype
        # A clamp whose derivative is one operation instead of five.
        return functional.hardtanh(torch.softmax(logits, dim=-1, dtype=dtype), self.eps, 1 - self.eps)

    def _updated(self, p: Tensor, index: Tensor, teacher_probabilities: Tensor | None) -> Tensor:
        """beta t + (1 - beta) p / |p|_1, or with the teacher's probabilities in the place of p / |p|_1; a constant."""
        if teacher_probabilities is None:
            p = p.detach()
            new = p / p.sum(dim=-1, keepdim=True)
        else:
            new = teacher_probabilities.detach().to(p.dtype)
        old = self._stored(index, classes=new.shape[1])
        if old.dtype != new.dtype:
            old = old.to(new.dtype)
        if old.shape[1] != new.shape[1]:
            raise QuantityError(
                f"early_learning: the memory was bound to {old.shape[1]} classes, but the model gives {new.shape[1]} probabilities."
            )
        return torch.lerp(new, old, self.beta)

    def _stored(self, index: Tensor, classes: int) -> Tensor:
        rows = self.memory.read(index)
        if self.remembered_classes is None:
            return rows
        kept = self.remembered_classes.read(index).long()
        return rows.new_zeros(len(index), self.classes or classes).scatter_(1, kept, rows)


class RefinedCrossEntropy(Term):
    """Cross-entropy with labels that are re-weighted by the targets of early learning.

    -sum_c y'_c log p_c,   y' = y * t / <y, t>

    A mixed label keeps its two classes, and their shares shift to the one that the target believes. A one-hot label stays
    what it is.

    Reads: `logits` float [batch, classes]; `target` float [batch, classes], the (mixed) labels; `early_target` float [batch,
        classes], published by an `early_learning` term: `.on(early_target="early_learning.target")`.
    Returns: float [batch], nats, >= 0.

    Example:
        >>> half, sure = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
        >>> RefinedCrossEntropy()(torch.tensor([[0.9, 0.1]]).log(), half, sure)      # -0.9 log 0.9 - 0.1 log 0.1
        tensor([0.3251])

    Source: shengliu66/ELR, ELR_plus/model/loss.py, used on CIFAR-100.
    """

    formula = "refined_cross_entropy"
    equation: ClassVar[str] = "-sum_c y'_c log p_c,  y' = y * t / <y, t>"
    source: ClassVar[str] = "arXiv:2007.00151, ELR+; shengliu66/ELR"
    expects: ClassVar[dict[str, str]] = {
        "logits": "float [batch, classes]",
        "target": "float [batch, classes]",
        "early_target": "float [batch, classes]",
    }

    def forward(self, logits: Tensor, target: Tensor, early_target: Tensor) -> Tensor:
        weighted = target * early_target.detach().to(target.dtype)
        agreement = weighted.sum(dim=-1, keepdim=True)
        # Where the target gives no class of the label any weight (an example never visited), the label stays.
        refined = torch.where(agreement > 0, weighted / agreement.clamp(min=torch.finfo(target.dtype).tiny), target)
        return functional.cross_entropy(logits, refined, reduction="none")
