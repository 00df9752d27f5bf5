"""What progressive self-distillation did: how soft the targets were, whose gradients it shrank, who stays hard.

The term shrinks every example's gradient, easy ones' most. For the true class g, with the past prediction P and the present p,

    sum_k |p_k - ỹ_k| / sum_k |p_k - y_k| = 1 - alpha * gamma,    gamma = (1 - P_g) / (1 - p_g)

wherever no class changes its sign (`p_k >= alpha P_k` for the others, `p_g <= ỹ_g`). An example whose error does not fall
(gamma near 1) keeps `1 - alpha` of its gradient, one that is forgotten (gamma < 1) keeps more, one that has just been
learned (gamma > 1) keeps less: hard examples weigh relatively more. Past `gamma = 1 / alpha` the gradient turns round.

    recorder = RefinementRecorder(y)
    run = poise.fit(model, "progressive_self_distillation", {"input": x, "target": y}, callbacks=[recorder], ...)
    print(recorder.report())
    print(gradient_rescaling(run.predict(x), past_predictions(run.objective), y, alpha=0.8))
    print(hard_examples(run.objective, y, count=20))

Source: arXiv:2006.12000, sec. 3.2.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, PoiseWarning
from poise.objective import Objective, Term, iterate_terms
from poise.quantities import describe
from poise.terms.self_distillation import ProgressiveSelfDistillation

__all__ = [
    "EpochRefinement",
    "HardExamples",
    "RefinementRecorder",
    "RefinementReport",
    "RescalingGroup",
    "RescalingReport",
    "gradient_rescaling",
    "hard_examples",
    "past_predictions",
]

SATURATED = 0.01
"""Mean of `1 - P_true` below which the softened target is the label again, so that the term buys nothing."""

UNDERCONFIDENT = 0.05
"""Accuracy minus mean confidence of the stored predictions above which the targets are softer than the model is wrong."""


@dataclass(frozen=True)
class EpochRefinement:
    """One epoch: the share of the past prediction in its targets, and the predictions that it stored.

    Args:
        epoch: from 0.
        alpha: share of the past prediction in the targets of this epoch.
        remaining_error: mean of `1 - P_true` over the stored predictions, in [0, 1]: what is left to soften.
        accuracy: share of the stored predictions that favour the label.
        confidence: mean largest probability of the stored predictions.
    """

    epoch: int
    alpha: float
    remaining_error: float
    accuracy: float
    confidence: float

    @property
    def softening(self) -> float:
        """`alpha * remaining_error`: the mean share of a target that such predictions take from the label."""
        return self.alpha * self.remaining_error

    @property
    def underconfidence(self) -> float:
        """`accuracy - confidence`: positive where the model is right more often than it believes."""
        return self.accuracy - self.confidence


@dataclass(frozen=True)
class RefinementReport:
    """The refinement of the targets, epoch by epoch."""

    epochs: tuple[EpochRefinement, ...]

    @property
    def saturated_from(self) -> int | None:
        """The first epoch from which on `1 - P_true` stayed below 1 % on average, or None: the term then buys nothing."""
        first = None
        for row in self.epochs:
            if row.remaining_error >= SATURATED:
                first = None
            elif first is None:
                first = row.epoch
        return first

    @property
    def over_softened(self) -> bool:
        """Whether training ended under-confident by more than 5 points: `alpha_max` should be lower."""
        return bool(self.epochs) and self.epochs[-1].underconfidence > UNDERCONFIDENT

    def __str__(self) -> str:
        lines = [
            "epoch  alpha  mean(1 - P_true)  softening  accuracy  confidence   (of the predictions stored in the epoch)"
        ]
        lines += [
            f"{r.epoch:5d}  {r.alpha:5.3f}  {r.remaining_error:16.4f}  {r.softening:9.4f}  {r.accuracy:8.4f}  {r.confidence:10.4f}"
            for r in self.epochs
        ]
        if self.saturated_from is not None:
            lines.append(_saturation(self.saturated_from, self.epochs[-1].remaining_error))
        if self.over_softened:
            lines.append(_over_softening(self.epochs[-1]))
        return "\n".join(lines)


class RefinementRecorder:
    """A callback of `poise.fit` that measures mean(1 - P_true) after every epoch and warns of too little and too much.

    It warns once (`PoiseWarning`) when the mean falls below 1 %, where nothing is left to soften, and at the end when the
    stored predictions are right more often than they are confident, by more than 5 points, where targets are too soft.

    Args:
        target: the training labels, int64 `[examples]` or `[examples, time]`.
        warn: False keeps silent; the report says the same.

    >>> RefinementRecorder(torch.tensor([0, 1])).report().epochs
    ()
    """

    def __init__(self, target: Tensor, warn: bool = True) -> None:
        self.target, self.warn = target, warn
        self._warned = False
        self._rows: list[EpochRefinement] = []

    def on_epoch_end(self, state: Any) -> None:
        """Measure; `state` is what `poise.fit` gives to callbacks."""
        term = _term_of(state.objective)
        epochs = state.objective.clock.epochs
        epoch = max(0, -(-state.step // state.steps_per_epoch) - 1)
        probability, rows, label, _ = _stored(term, self.target)
        confidence, predicted = rows.max(-1)
        row = EpochRefinement(
            epoch,
            term.alpha(epoch, epochs),
            remaining_error=float((1 - probability).mean()),
            accuracy=float((predicted == label).float().mean()),
            confidence=float(confidence.mean()),
        )
        self._rows.append(row)
        if self.warn and not self._warned and row.remaining_error < SATURATED:
            self._warned = True
            warnings.warn(_saturation(epoch, row.remaining_error), PoiseWarning, stacklevel=2)

    def on_end(self, state: Any) -> None:
        """Warn of targets that were too soft."""
        if self.warn and self.report().over_softened:
            warnings.warn(_over_softening(self._rows[-1]), PoiseWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the epochs so far, and whether the warning was given."""
        return {"epochs": [asdict(row) for row in self._rows], "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the epochs before the resume back."""
        self._rows, self._warned = [EpochRefinement(**row) for row in state["epochs"]], state["warned"]

    def report(self) -> RefinementReport:
        """Return what was measured so far."""
        return RefinementReport(tuple(self._rows))


@dataclass(frozen=True)
class RescalingGroup:
    """Examples of like difficulty, and what softening did to their gradients.

    Args:
        low, high: range of the difficulty `1 - p_true` in the group.
        examples: how many there are.
        plain: mean L1 norm of the gradient of cross-entropy at the logits, `2 (1 - p_true)`.
        softened: mean L1 norm with the softened target.
        ratio: `softened / plain`, the measured rescaling.
        predicted: `1 - alpha gamma` of the group, `gamma = mean(1 - P_true) / mean(1 - p_true)`.
        exact: share of the examples for which the formula is exact (no class but the true one changes its sign).
    """

    low: float
    high: float
    examples: int
    plain: float
    softened: float
    ratio: float
    predicted: float
    exact: float


@dataclass(frozen=True)
class RescalingReport:
    """The rescaling of gradients by groups of rising difficulty."""

    alpha: float
    groups: tuple[RescalingGroup, ...]

    @property
    def emphasis(self) -> float:
        """How many times more of its gradient the hardest group keeps than the easiest: above 1, hard examples weigh more."""
        easiest = self.groups[0].ratio
        return self.groups[-1].ratio / easiest if easiest > 0 else float("inf")

    def __str__(self) -> str:
        lines = [
            f"alpha = {self.alpha:g}",
            "1 - p_true         examples  |CE gradient|  |softened|  ratio  1 - alpha*gamma  exact",
        ]
        lines += [
            f"{g.low:7.4f} - {g.high:7.4f}  {g.examples:8d}  {g.plain:13.5f}  {g.softened:10.5f}  {g.ratio:5.2f}"
            f"  {g.predicted:15.2f}  {g.exact:5.0%}"
            for g in self.groups
        ]
        return "\n".join(lines)


def gradient_rescaling(logits: Tensor, past: Tensor, target: Tensor, alpha: float, groups: int = 10) -> RescalingReport:
    """Measure how the softened target rescales gradients, by deciles of difficulty, beside the formula `1 - alpha gamma`.

    Args:
        logits: present logits, float `[examples, classes]`.
        past: past predictions P, float `[examples, classes]`; a row of zeros was not seen and is softened by nothing.
        target: int64 `[examples]`.
        alpha: share of the past prediction, in [0, 1].
        groups: number of groups of equal size, by rising `1 - p_true`.

    Returns: a `RescalingReport`, easiest group first.

    Raises:
        InputError: shapes or ranges do not fit, or there are fewer examples than groups.

    >>> z, past = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.full((2, 2), 0.5)
    >>> [round(g.ratio, 2) for g in gradient_rescaling(z, past, torch.tensor([0, 0]), alpha=0.5, groups=2).groups]
    [1.1, 0.5]

    Source: arXiv:2006.12000, sec. 3.2.
    """
    if (
        logits.ndim != 2
        or past.shape != logits.shape
        or target.shape != logits.shape[:1]
        or target.dtype != torch.int64
    ):
        raise InputError(
            "gradient_rescaling: expected logits and past float [examples, classes] and target int64 [examples], got "
            f"{describe(logits)}, {describe(past)} and {describe(target)}."
        )
    if not 0 <= alpha <= 1:
        raise InputError(f"gradient_rescaling: alpha must lie in [0, 1], and it is {alpha}.")
    if not 1 <= groups <= len(target):
        raise InputError(
            f"gradient_rescaling: {groups} groups of {len(target)} examples; give at most one group an example."
        )
    p, P = logits.double().softmax(-1), past.double()
    label = torch.nn.functional.one_hot(target, p.shape[1]).double()
    seen = P.sum(-1, keepdim=True)
    soft = (1 - alpha * seen) * label + alpha * P
    plain, softened = (p - label).abs().sum(-1), (p - soft).abs().sum(-1)
    error, past_error = _at(1 - p, target), (seen.squeeze(-1) - _at(P, target))
    # No other class may change its sign, nor the true one: its softened target must still lie above p.
    exact = ((p >= alpha * P) | label.bool()).all(-1) & (_at(soft, target) >= _at(p, target))
    rows = []
    for members in torch.argsort(error, stable=True).tensor_split(groups):
        before, after = plain[members].mean(), softened[members].mean()
        gamma = past_error[members].mean() / error[members].mean()
        rows.append(
            RescalingGroup(
                low=float(error[members[0]]),
                high=float(error[members[-1]]),
                examples=len(members),
                plain=float(before),
                softened=float(after),
                ratio=float(after / before) if before > 0 else float("nan"),
                predicted=float(1 - alpha * gamma),
                exact=float(exact[members].double().mean()),
            )
        )
    return RescalingReport(alpha, tuple(rows))


@dataclass(frozen=True)
class HardExamples:
    """The examples whose label the model believed least when it last saw them, hardest first.

    Args:
        index: int64 `[count]`, position in the training set.
        position: int64 `[count]`, position in the sequence; 0 where targets are no sequences.
        label, predicted: int64 `[count]`.
        label_probability, predicted_probability: float `[count]`, what the last prediction gave to each.
        contradicted: how many of all stored predictions favour another class than the label.
        examples: how many predictions are stored.
    """

    index: Tensor
    position: Tensor
    label: Tensor
    predicted: Tensor
    label_probability: Tensor
    predicted_probability: Tensor
    contradicted: int
    examples: int

    def __str__(self) -> str:
        lines = [f"{self.contradicted} of {self.examples} last predictions favour another class than the label", ""]
        lines.append("   index  position  label  P(label)  predicted  P(predicted)")
        columns = (
            self.index,
            self.position,
            self.label,
            self.label_probability,
            self.predicted,
            self.predicted_probability,
        )
        template = "{:8d}  {:8d}  {:5d}  {:8.4f}  {:9d}  {:12.4f}"
        lines += [template.format(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
        return "\n".join(lines)


def hard_examples(objective: Objective | Term, target: Tensor, count: int = 20) -> HardExamples:
    """List the examples with the largest `1 - P_true`: those that keep most of their gradient, and the likeliest wrong labels.

    Args:
        objective: a trained objective with a `progressive_self_distillation` term that remembers, or that term.
        target: the training labels, int64 `[examples]` or `[examples, time]` (padding -100).
        count: how many to list.

    Raises:
        InputError: there is no such term, nothing is stored yet, or the labels do not fit.

    >>> from poise.objective import DataInfo
    >>> term = ProgressiveSelfDistillation()
    >>> term.bind(DataInfo(examples=2, classes=2))
    >>> term.advance(logits=torch.tensor([[3.0, 0.0], [3.0, 0.0]]), epoch=0, index=torch.tensor([0, 1]))
    >>> hard_examples(term, torch.tensor([0, 1]), count=1).index
    tensor([1])
    """
    probability, rows, label, (index, position) = _stored(_term_of(objective), target)
    if count < 1:
        raise InputError(f"hard_examples: count must be at least 1, and it is {count}.")
    confidence, predicted = rows.max(-1)
    hardest = torch.argsort(probability, stable=True)[:count]
    return HardExamples(
        index=index[hardest].cpu(),
        position=position[hardest].cpu(),
        label=label[hardest].cpu(),
        predicted=predicted[hardest].cpu(),
        label_probability=probability[hardest].cpu(),
        predicted_probability=confidence[hardest].cpu(),
        contradicted=int((predicted != label).sum()),
        examples=len(rows),
    )


def past_predictions(objective: Objective | Term) -> Tensor:
    """The remembered predictions P of all training examples, float32 `[examples, classes]` (or `[examples, time, classes]`).

    A row of an example that was not seen yet is 0.

    Raises:
        InputError: there is no `progressive_self_distillation` term that remembers.
    """
    term = _term_of(objective)
    assert term.memory is not None
    rows = term.memory.values.float()
    shape = (len(rows), -1) if term.time is None else (len(rows), term.time, -1)
    rows = rows.view(shape)
    return rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float16).tiny)


def _term_of(objective: Objective | Term) -> ProgressiveSelfDistillation:
    terms = [objective] if isinstance(objective, Term) else [term for _, term in iterate_terms(objective)]
    for term in terms:
        if isinstance(term, ProgressiveSelfDistillation) and term.memory is not None:
            return term
    raise InputError(
        f"The objective {objective} has no progressive_self_distillation term that remembers predictions "
        '(teacher="memory"), so there is nothing to report.'
    )


def _stored(term: ProgressiveSelfDistillation, target: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Of all stored predictions: the probability of the label, the row, the label, and the index and position it belongs to."""
    past = past_predictions(term)
    if target.shape[0] != past.shape[0] or target.ndim != past.ndim - 1 or target.dtype != torch.int64:
        raise InputError(
            f"The labels must be int64 {list(past.shape[:-1])}, those of the training set that the term remembers, and they "
            f"are {describe(target)}."
        )
    if target.ndim == 2:
        past = past[:, : target.shape[1]]
        target = target[:, : past.shape[1]]
    target = target.to(past.device)
    places = ((past.sum(-1) > 0) & (target >= 0)).nonzero(as_tuple=True)
    if len(places[0]) == 0:
        raise InputError("Nothing is remembered yet: train for at least one step first.")
    rows, label = past[places], target[places]
    index = places[0]
    return _at(rows, label), rows, label, (index, places[1] if len(places) > 1 else torch.zeros_like(index))


def _at(rows: Tensor, target: Tensor) -> Tensor:
    return rows.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _saturation(epoch: int, error: float) -> str:
    return (
        f"From epoch {epoch} on the remembered predictions are nearly the labels: mean(1 - P_true) = {error:.2%}, below "
        f"{SATURATED:.0%}. progressive_self_distillation then is cross-entropy and buys nothing. Augment the data, or take "
        "cross_entropy or label_smoothing."
    )


def _over_softening(row: EpochRefinement) -> str:
    return (
        f"The targets are too soft: at the end {row.accuracy:.1%} of the remembered predictions favour the label with a mean "
        f"confidence of {row.confidence:.1%} only. Lower alpha_max; where cross-entropy is calibrated already, take it alone."
    )
