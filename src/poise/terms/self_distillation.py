"""Distillation: learn from soft targets, of a teacher or of the model itself.

A one-hot label says nothing about the classes beside it, and a network that fits it becomes over-confident. Soft targets
say more. They may come from

- a frozen teacher on the same batch: `Distillation` (any teacher; an earlier copy of the model makes it self-distillation),
- another example of the same class: `ClassWiseSelfDistillation`,
- the model's own prediction one epoch ago, mixed into the label more and more: `ProgressiveSelfDistillation`.

        cross_entropy + 0.5*distillation(loss="kl", temperature=4)
        cross_entropy + class_wise_self_distillation
        progressive_self_distillation(alpha_max=0.8)

The last one is a term of its own and not an addition to cross-entropy: it *is* the cross-entropy with the softened target.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import (
    CheckpointError,
    IncompatibleError,
    InputError,
    PoiseWarning,
    QuantityError,
    StateError,
    nearest,
)
from poise.frozen import FrozenModel
from poise.memory import PerExampleMemory
from poise.objective import DataInfo, Term

__all__ = ["ClassWiseSelfDistillation", "Distillation", "ProgressiveSelfDistillation"]

Loss = Literal["mse_prob", "mse_logit", "kl", "ce"]
Teacher = Literal["memory", "snapshot"]
Schedule = Literal["linear", "cosine", "constant"]


class Distillation(Term):
    """Charge the distance between the model's prediction and a frozen teacher's.

        T^2 * d(z / T, z_teacher / T),    p = softmax(z / T),  q = softmax(z_teacher / T)

        mse_prob     d = 1/2 sum_k (p_k - q_k)^2
        mse_logit    d = 1/2 sum_k (z_k - z_teacher_k)^2 / T^2      (the temperature cancels)
        kl           d = sum_k q_k (log q_k - log p_k)
        ce           d = - sum_k q_k log p_k                        (kl plus the teacher's entropy: the same gradient)

    The squared losses carry the factor one half and sum over classes: `torch.nn.functional.mse_loss`, which averages
    over classes, is `2 / classes` times as large. The factor T^2 keeps the gradient's size independent of the temperature.
    The teacher is a constant.

    Args:
        loss: `"mse_prob"`, `"mse_logit"`, `"kl"` or `"ce"`.
        temperature: T > 0; above 1 it brings out the small probabilities.

    Reads:
        logits: float `[batch, ..., classes]`.
        teacher_logits: float, same shape; may be logits or log-probabilities.
        mask: bool `[batch, time]`, optional; `sample_weight`: float `[batch]`, optional.

    Returns: `[batch]` or `[batch, time]`, not negative.

    Raises:
        InputError: an unknown loss, or a temperature that is not positive.

    >>> term = Distillation("kl", temperature=2.0)
    >>> float((1 * term)(logits=torch.zeros(1, 2), teacher_logits=torch.zeros(1, 2)))
    0.0

    Source: Hinton et al. 2015 (arXiv:1503.02531, sec. 2); the squared losses and self-distillation, arXiv:2102.13088.
    """

    formula = "distillation"
    equation = "T^2 d(z/T, z_teacher/T),  d = 1/2 |p-q|^2, 1/2 |z-z_teacher|^2, KL(q||p) or -<q, log p>"
    source = "arXiv:1503.02531, sec. 2; squared losses: arXiv:2102.13088"

    def __init__(self, loss: Loss = "mse_prob", temperature: float = 1.0) -> None:
        super().__init__()
        _check_choice("distillation", "loss", loss, get_args(Loss))
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"distillation: temperature must be a positive number, and it is {temperature!r}.")
        self.loss = loss
        self.temperature = temperature

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        z, teacher = _wide(logits), _wide(teacher_logits.detach())
        if self.loss == "mse_logit":
            return 0.5 * (z - teacher).square().sum(-1)
        T = self.temperature
        if T != 1:
            z, teacher = z / T, teacher / T
        if self.loss == "mse_prob":
            distance = 0.5 * (z.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
        elif self.loss == "kl":
            distance = F.kl_div(z.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        else:
            distance = -(teacher.softmax(-1) * z.log_softmax(-1)).sum(-1)
        return distance if T == 1 else T**2 * distance

    def count(
        self,
        target: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        if teacher_logits is not None and (
            target is None or target.ndim != teacher_logits.ndim - 1 or target.is_floating_point()
        ):
            target = torch.zeros(teacher_logits.shape[:-1], dtype=torch.int64, device=teacher_logits.device)
        return _count_positions(_require("target", target), mask, sample_weight)


class ClassWiseSelfDistillation(Term):
    """Ask for the same prediction, softly, on two examples of one class (CS-KD).

        T^2 KL(q || p),    p = softmax(z_i / T),  q = softmax(z_j / T) held constant,  y_j = y_i,  j != i

    Partners are found inside the batch: the next example of the same class, cyclically, so every prediction of a class
    teaches exactly one other. An example that is alone in its class has no partner and no share in the denominator. The
    term is added to cross-entropy; the paper's weight is 1.

    The paper's code draws a partner for each example into a second half-batch that is not trained on; partners inside
    the batch need no second forward. With few examples per class (fewer than about two per batch) draw batches by class.

    Args:
        temperature: T > 0.

    Reads:
        logits: float `[batch, classes]`.
        target: int64 `[batch]`.
        sample_weight: float `[batch]`, optional.

    Returns: `[batch]`, not negative; 0 without a partner.

    Raises:
        InputError: a temperature that is not positive.

    >>> term = 1 * ClassWiseSelfDistillation()
    >>> float(term(logits=torch.zeros(3, 2), target=torch.tensor([0, 0, 1])))
    0.0

    Source: Yun et al. 2020 (arXiv:2003.13964, eq. 2-3).
    """

    formula = "class_wise_self_distillation"
    equation = "T^2 KL(softmax(z_j/T) || softmax(z_i/T)),  j another example of the class of i"
    source = "arXiv:2003.13964, eq. 2-3"
    expects: ClassVar[dict[str, str]] = {"logits": "float [batch, classes]", "target": "int64 [batch]"}
    couples = ("logits", "target")
    # The partner's prediction is held constant: the gradient is not that of the value.
    capabilities = frozenset({"per_example", "deterministic"})

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(
                f"class_wise_self_distillation: temperature must be a positive number, and it is {temperature!r}."
            )
        self.temperature = temperature

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        T = self.temperature
        log_p = (_wide(logits) / T).log_softmax(-1)
        log_q = log_p.detach()[_next_of_class(target)]
        # Without a partner j = i: then p = q, and value and gradient are 0 by themselves.
        return T**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)

    def count(self, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        alone = _next_of_class(target) == torch.arange(len(target), device=target.device)
        share = (~alone).float()
        return share if sample_weight is None else share * sample_weight


class ProgressiveSelfDistillation(Term):
    """Cross-entropy with targets that the model's own previous predictions soften, more and more (PS-KD).

        - sum_k ỹ_k log p_k,    ỹ = (1 - alpha_t) y + alpha_t P_{t-1},    alpha_t = alpha_max * (t / epochs),  t = epoch + 1

    `P_{t-1}` is what the model predicted for this example one epoch ago, a constant:

    - `teacher="memory"` remembers the softmax of the forward with which the example was last trained on (before that
      step's update, in training mode, with that epoch's augmentation): `examples * classes` numbers, no extra forward.
    - `teacher="snapshot"` keeps a copy of the model at the end of every epoch and runs it on the present input (in
      evaluation mode): one more forward, for outputs that are too many to store, and independent of augmentation.

    In the first epoch, and for an example that is seen for the first time later (counted in `unseen`), `P` is the label
    itself, so the term is plain cross-entropy. The gradient is `p - ỹ`. Up to a constant the term equals
    `(1 - alpha) CE(y, p) + alpha KL(P || p)`.

    Alone it replaces cross-entropy. `schedule="constant"` is the fixed-alpha ablation; a constant uniform `P` would be
    label smoothing with epsilon = alpha. Where training predictions saturate (`1 - P_true` below about 1 %) `ỹ` is the label
    again and the term buys nothing; where cross-entropy is calibrated already it over-softens: lower `alpha_max`.

    Args:
        alpha_max: share of the past prediction in the last epoch, in [0, 1]; 0.8 on all main results. 1 drops the label.
        teacher: `"memory"` or `"snapshot"`.
        schedule: how alpha_t grows with `r = t / epochs`: `"linear"` r, `"cosine"` (1 - cos(pi r)) / 2, `"constant"` 1.
        time: longest sequence that the memory keeps, for targets `[batch, time]`; longer ones use their labels past it.
        dtype: of the memory: `"float32"`, or `"float16"` or `"bfloat16"` for half the space (rows are renormalised on read).

    Reads:
        logits: float `[batch, classes]` or `[batch, time, classes]`.
        target: int64 `[batch]` or `[batch, time]`, or float `[batch, classes]`, a distribution (smoothed, mixed).
        index: int64 `[batch]` (memory). `input`, `model`: (snapshot).
        epoch, epochs: int.
        partner, share: int64 and float `[batch]`, optional: where inputs were mixed (mixup, CutMix), the position in the
            batch of the second source and the share of the first; remembered predictions are then mixed alike. A
            snapshot looks at the mixed input itself, and is the better teacher there: memories are of last epoch's mixture.
        mask: bool `[batch, time]`, optional; `sample_weight`: float `[batch]`, optional.

    Returns: `[batch]` or `[batch, time]`, not negative.

    Raises:
        InputError: an argument out of range.
        QuantityError: an epoch at or beyond `epochs`, or a memory of another shape than the logits.
        StateError: a snapshot is due, and none was taken.

    >>> objective = (1 * ProgressiveSelfDistillation()).bind(examples=100, classes=10, steps=200, steps_per_epoch=20)
    >>> loss = objective(logits=torch.zeros(5, 10), target=torch.arange(5), index=torch.arange(5))

    Source: arXiv:2006.12000, eq. 2-4 and sec. 3.
    """

    formula = "progressive_self_distillation"
    equation = "-<(1-a) y + a P, log p>,  P the prediction one epoch ago,  a = alpha_max * (epoch+1)/epochs"
    source = "arXiv:2006.12000, eq. 2-4"
    expects: ClassVar[dict[str, str]] = {
        "target": "int64 [batch, ...] | float [batch, ..., classes]",
        "partner": "int64 [batch]",
        "share": "float [batch]",
    }

    covered: Tensor

    def __init__(
        self,
        alpha_max: float = 0.8,
        teacher: Teacher = "memory",
        schedule: Schedule = "linear",
        time: int | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if not 0 <= alpha_max <= 1:
            raise InputError(f"{self.formula}: alpha_max must lie in [0, 1], and it is {alpha_max!r}.")
        _check_choice(self.formula, "teacher", teacher, get_args(Teacher))
        _check_choice(self.formula, "schedule", schedule, get_args(Schedule))
        _check_choice(self.formula, "dtype", dtype, ("float32", "float16", "bfloat16"))
        if time is not None and time < 1:
            raise InputError(f"{self.formula}: time is the length of a sequence, at least 1, and it is {time!r}.")
        if alpha_max == 1:
            warnings.warn(
                f"{self.formula}: alpha_max=1 removes the label entirely in the last epoch; the paper uses 0.8.",
                PoiseWarning,
                stacklevel=2,
            )
        self.alpha_max = alpha_max
        self.teacher = teacher
        self.schedule = schedule
        self.time = time
        self.dtype = dtype
        self.memory = PerExampleMemory(dtype=getattr(torch, dtype)) if teacher == "memory" else None
        self.__dict__["memory"] = self.memory  # read at every step, and the search of nn.Module is slow
        # Examples that had been seen when the second epoch began; -1 before that.
        self.register_buffer("covered", torch.tensor(-1, dtype=torch.int64))
        self._later_epochs = False
        self._snapshot: FrozenModel | None = None
        self._saved_snapshot: dict[str, Any] | None = None
        if time is None:
            self.__dict__["count"] = None  # values `[batch]` need no count of their own; the objective's is cheaper

    def bind(self, info: DataInfo) -> None:
        if self.memory is not None:
            classes = None if info.classes is None else info.classes * (self.time or 1)
            self.memory.bind(info.examples, classes, info.device)

    def readings(self) -> tuple[str, ...]:
        return ("model", "input", "step", "steps_per_epoch") if self.teacher == "memory" else ("index",)

    def alpha(self, epoch: int, epochs: int) -> float:
        """Return the share of the past prediction in the targets of `epoch` (0-based): `alpha_max` in the last one.

        Raises:
            QuantityError: the epoch does not lie in `[0, epochs)`.
        """
        if not 0 <= epoch < epochs:
            raise QuantityError(
                f"{self.formula}: epoch {epoch} does not lie in the run's {epochs} epochs, 0 to {epochs - 1}."
            )
        r = (epoch + 1) / epochs
        if self.schedule == "linear":
            return self.alpha_max * r
        return self.alpha_max * (1 - math.cos(math.pi * r)) / 2 if self.schedule == "cosine" else self.alpha_max

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        epoch: int,
        epochs: int,
        index: Tensor | None = None,
        input: Any = None,
        model: Any = None,
        partner: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        alpha = self.alpha(epoch, epochs)
        logits = _wide(logits)
        if alpha == 0 or epoch == 0:
            return _cross_entropy(logits, target)
        past = self._past(logits.shape, index, input, model)
        if self.memory is not None and partner is not None and share is not None:
            s = share[:, None].to(past.dtype)
            past = s * past + (1 - s) * past[partner]
        # ỹ is nobody else's, so it takes the sign of the cross-entropy, and the backward pass has an operation less.
        return (_soften(target, past, alpha).neg_() * logits.log_softmax(-1)).sum(-1)

    def count(self, target: Tensor, mask: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        return _count_positions(target, mask, sample_weight)

    def advance(
        self,
        logits: Tensor,
        epoch: int,
        index: Tensor | None = None,
        model: Any = None,
        step: int = 0,
        steps_per_epoch: int = 0,
    ) -> None:
        if self.memory is None:
            if (step + 1) % steps_per_epoch == 0:
                self.end_epoch(model)
            return
        if epoch > 0 and not self._later_epochs:
            self._later_epochs = True
            if int(self.covered) < 0:
                self.covered.copy_((self.memory.visits > 0).sum())
        self.memory.write(_require("index", index), self._rows(logits))

    def end_epoch(self, model: nn.Module) -> None:
        """Keep the model as it is now as the teacher of the next epoch (`teacher="snapshot"`).

        `advance` does so by itself after the last step of every epoch; call it in a loop that does not advance.

        Raises:
            IncompatibleError: `model` is no module that can be copied.
        """
        module = _module_of(model)
        if self._snapshot is None:
            self._snapshot = FrozenModel(module)
        else:
            self._snapshot.refresh(module)

    def soft_targets(
        self,
        target: Tensor,
        epoch: int,
        epochs: int,
        index: Tensor | None = None,
        input: Any = None,
        classes: int | None = None,
    ) -> Tensor:
        """Return the targets ỹ themselves, to be mixed (mixup, CutMix) or read by other terms; a constant.

        Args:
            target: as in `forward`.
            epoch, epochs: as in `forward`.
            index: int64 `[batch]` (memory); `input`: the model's input (snapshot).
            classes: number of classes, needed only where target holds indices and nothing is stored yet (snapshot).

        Returns: float `[batch, classes]` or `[batch, time, classes]`, distributions.

        >>> term = ProgressiveSelfDistillation()
        >>> term.bind(DataInfo(examples=4, classes=2))
        >>> term.soft_targets(torch.tensor([1]), 0, 10, index=torch.tensor([3]))
        tensor([[0., 1.]])
        """
        alpha = self.alpha(epoch, epochs)
        if self.memory is not None:
            classes = self.memory.values.shape[1] // (self.time or 1)
        if alpha > 0 and epoch > 0:
            shape = target.shape if target.is_floating_point() else (*target.shape, classes or 0)
            return _soften(target, self._past(shape, index, input, None), alpha)
        if target.is_floating_point():
            return target.detach()
        if classes is None:
            raise InputError(
                f"{self.formula}.soft_targets: nothing is stored yet that tells the number of classes; give classes=."
            )
        return F.one_hot(target.clamp(min=0), classes).float()

    @property
    def unseen(self) -> int:
        """How many examples came for the first time after the first epoch, and were then trained on their plain label."""
        covered = int(self.covered)
        return 0 if self.memory is None or covered < 0 else int((self.memory.visits > 0).sum()) - covered

    def _past(self, shape: tuple[int, ...], index: Tensor | None, input: Any, model: Any) -> Tensor:
        """The past predictions, a constant of the shape of the logits; 0 where there are none."""
        if self.memory is None:
            return self._ask_snapshot(input, model)
        past = self.memory.read(_require("index", index))
        if self.time is not None:
            past = _fit_time(past.view(len(past), self.time, -1), shape[1])
        if past.shape != shape:
            raise QuantityError(
                f"{self.formula}: the memory holds rows for {list(past.shape)}, and the logits are {list(shape)}. Bind it to the "
                "number of classes of the model, and give time= where targets are sequences."
            )
        if self.memory.dtype.itemsize < 4:
            past = past / past.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny)
        return past

    def _ask_snapshot(self, input: Any, model: Any) -> Tensor:
        if self._snapshot is None and self._saved_snapshot is not None and model is not None:
            # A saved state has the weights of the copy; what it is a copy of is known only now.
            self._snapshot = FrozenModel(_module_of(model))
            self._snapshot.load_state_dict(self._saved_snapshot)
            self._saved_snapshot = None
        if self._snapshot is None:
            raise StateError(
                f'{self.formula}(teacher="snapshot") has no copy of the model from the previous epoch. Let the objective advance '
                "after every step, or call end_epoch(model) after every epoch."
            )
        out: Tensor = self._snapshot(_require("input", input))
        return _wide(out).softmax(-1)

    def _rows(self, logits: Tensor) -> Tensor:
        rows = _wide(logits).softmax(-1)
        return rows if self.time is None else _fit_time(rows, self.time).flatten(1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"snapshot": self._saved_snapshot if self._snapshot is None else self._snapshot.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._snapshot, self._saved_snapshot = None, state["snapshot"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        rows = state_dict.get(prefix + "memory.values")
        if self.memory is not None and rows is not None:
            total = rows.float().view(len(rows), self.time or 1, -1).sum(-1)
            wrong = (total - total.round()).abs().amax(-1) > 1e-2
            if bool(wrong.any()) or not bool(((total > -0.5) & (total < 1.5)).all()):
                raise CheckpointError(
                    f"{self.formula}: a remembered prediction must sum to 1 (or be all zero: not seen yet), and row "
                    f"{int(wrong.nonzero()[0]) if bool(wrong.any()) else int(total.abs().amax(-1).argmax())} does not. "
                    "The saved memory is damaged, or belongs to another term."
                )
        self._later_epochs = False
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> ProgressiveSelfDistillation:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._snapshot is not None:
            self._snapshot.module._apply(fn)  # type: ignore[no-untyped-call]
        return self


def _soften(target: Tensor, past: Tensor, alpha: float) -> Tensor:
    """ỹ = (1 - alpha) y + alpha P. A row of P that was never stored is 0: its sum, the share of y that it replaces, is 0 too."""
    soft = alpha * past
    label = torch.rsub(soft.sum(-1, keepdim=True), 1)
    if target.is_floating_point():
        return label * target.detach() + soft
    if target.ndim > 1:
        target = target.clamp(min=0)  # an index of -100 marks padding: whatever stands there does not count
    return soft.scatter_add_(-1, target.unsqueeze(-1), label)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """- sum_k y_k log p_k, `[batch]` or `[batch, time]`; padding, index -100, gives 0."""
    if logits.ndim == 2:
        return F.cross_entropy(logits, target, reduction="none")
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction="none").view(logits.shape[:2])


def _count_positions(target: Tensor, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """What each value of a batch `[batch]` or of sequences `[batch, time]` counts; padding (mask False, target -100) is 0."""
    if target.is_floating_point():
        share = torch.ones(target.shape[:-1], device=target.device)
    else:
        share = (target >= 0).float()
    if mask is not None:
        share = share * mask
    if sample_weight is not None:
        share = share * sample_weight.view(-1, *[1] * (share.ndim - 1))
    return share


def _next_of_class(target: Tensor) -> Tensor:
    """For each example the position of the next one of its class, cyclically; its own where it is alone."""
    order = torch.argsort(target, stable=True)
    ordered = target[order]
    place = torch.arange(len(target), device=target.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.cummax(torch.where(starts, place, 0), 0).values
    follows = (place + 1).clamp(max=len(target) - 1)
    same = (ordered[follows] == ordered) & (follows > place)
    partner = torch.empty_like(order)
    partner[order] = order[torch.where(same, follows, first)]
    return partner


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: a softmax needs the bits."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _module_of(model: Any) -> nn.Module:
    """The module itself: the quantity `model` may be a view of it, and the view's module a wrapper for several processes."""
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    if not isinstance(module, nn.Module):
        raise IncompatibleError(
            'progressive_self_distillation(teacher="snapshot") copies the model, so `model` must be a torch.nn.Module, and it '
            f'is a {type(model).__name__}. Give the module, or use teacher="memory".'
        )
    return module


def _fit_time(rows: Tensor, time: int) -> Tensor:
    """Cut sequences `[batch, time, classes]` to a length, or fill them up with zeros."""
    have = rows.shape[1]
    return rows[:, :time] if have >= time else F.pad(rows, (0, 0, 0, time - have))


def _require(name: str, value: Any) -> Any:
    if value is None:
        raise QuantityError(
            f"progressive_self_distillation reads {name!r}, and it is not among the quantities that are offered."
        )
    return value


def _check_choice(term: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            f"{term}: {argument} must be one of {', '.join(choices)}, and it is {value!r}." + nearest(value, choices)
        )
