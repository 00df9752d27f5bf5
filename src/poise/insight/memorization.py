"""Who is being memorised: the learning dynamics of clean and wrongly labelled examples, and a detector of wrong labels.

A network that is trained on partly wrong labels first predicts the truth even for many wrongly labelled examples and then
memorises their labels. `memorization_report` shows it epoch by epoch (arXiv:2007.00151, figure 1), with the coefficient
that pulls each group and, where an `early_learning` term took part, how far its targets still teach. `suspect_labels`
lists the labels that the targets contradict; it needs no true label, only its precision and recall do.

    recorder = MemorizationRecorder(x, noisy, true)
    run = poise.fit(model, objective, {"input": x, "target": noisy}, callbacks=[recorder], ...)
    print(recorder.report())
    suspects = suspect_labels(objective, noisy)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from poise.coefficient import value_of
from poise.errors import InputError
from poise.memory import PerExampleMemory
from poise.objective import Objective
from poise.terms.early_learning import EarlyLearning

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = [
    "EpochDynamics",
    "LabelSuspects",
    "MemorizationRecorder",
    "MemorizationReport",
    "gradient_coefficients",
    "memorization_report",
    "suspect_labels",
]

SATURATED = 0.99
"""Agreement `<p, t>` above which the early-learning term counts as saturated: it no longer separates its classes."""


@dataclass(frozen=True)
class EpochDynamics:
    """One epoch: shares of the clean and of the wrongly labelled examples, and the mean coefficients that pull them.

    Args:
        epoch: passes over the data that were done when this was measured.
        clean_correct: share of clean examples predicted as labelled, in [0, 1]; `clean_other` is the rest.
        wrong_correct: share of wrongly labelled examples predicted as their true class.
        wrong_memorised: share of them predicted as their wrong label.
        wrong_other: share of them predicted as a third class.
        clean_pull: mean gradient coefficient of cross-entropy at the true class of clean examples, `p - 1`, in [-1, 0].
        wrong_pull: the same for wrongly labelled examples, `p - 0`, in [0, 1]: positive pushes the truth away.
        clean_total: `clean_pull` plus the weighted early-learning term; equal to it where there is none.
        wrong_total: `wrong_pull` plus the weighted early-learning term; negative means that the term overrules the wrong labels.
        saturated: share of examples whose agreement `<p, t>` exceeds 0.99, or NaN without targets.
    """

    epoch: int
    clean_correct: float
    clean_other: float
    wrong_correct: float
    wrong_memorised: float
    wrong_other: float
    clean_pull: float
    wrong_pull: float
    clean_total: float
    wrong_total: float
    saturated: float


@dataclass(frozen=True)
class LabelSuspects:
    """Labels that contradict the targets of early learning.

    Args:
        suspect: bool [n], True where the target's class is not the given label.
        proposed: int64 [n], the class that the target proposes.
        margin: float [n], target of the proposed class less target of the given label, in [0, 1]; 0 where they agree.
        share_by_class: float [classes], share of suspects among the examples of each given label (NaN for an absent label).
        precision: share of suspects whose label is wrong; None when the truth was not given, NaN without suspects.
        recall: share of wrong labels that are suspects; None when the truth was not given, NaN without wrong labels.
    """

    suspect: Tensor
    proposed: Tensor
    margin: Tensor
    share_by_class: Tensor
    precision: float | None = None
    recall: float | None = None

    def ranked(self) -> Tensor:
        """Indices of the suspects, int64, the clearest contradiction first."""
        order = self.margin.argsort(descending=True, stable=True)
        return order[self.suspect[order]]


@dataclass(frozen=True)
class MemorizationReport:
    """The learning dynamics of a run under label noise.

    Args:
        epochs: one `EpochDynamics` for each measured epoch, in order.
        agreement: int64 [bins], histogram over [0, 1] of `<p, t>` after the last epoch, or None without targets. A spike at 1 says that the
            term no longer teaches.
        suspects: `suspect_labels` of the last targets, with precision and recall, or None without targets.
    """

    epochs: tuple[EpochDynamics, ...]
    agreement: Tensor | None = None
    suspects: LabelSuspects | None = None

    @property
    def peak(self) -> EpochDynamics:
        """The epoch at which most wrongly labelled examples were predicted as their true class: the end of early learning."""
        return max(self.epochs, key=lambda row: row.wrong_correct)

    @property
    def final(self) -> EpochDynamics:
        """The last measured epoch."""
        return self.epochs[-1]

    def frame(self) -> pd.DataFrame:
        """The epochs as a table, one row each."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.epochs])

    def figure(self) -> go.Figure:
        """Three panels over epochs: clean examples, wrongly labelled examples, gradient coefficients at the true class."""
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots

        figure = make_subplots(
            rows=1, cols=3, subplot_titles=("clean labels", "wrong labels", "gradient coefficient at the truth")
        )
        panels = (
            (1, "clean_correct", "correct"),
            (1, "clean_other", "other"),
            (2, "wrong_correct", "predicted as truth"),
            (2, "wrong_memorised", "memorised"),
            (2, "wrong_other", "other"),
            (3, "clean_pull", "clean, cross-entropy"),
            (3, "wrong_pull", "wrong, cross-entropy"),
            (3, "clean_total", "clean, with the term"),
            (3, "wrong_total", "wrong, with the term"),
        )
        table = self.frame()
        for column, field, label in panels:
            figure.add_trace(go.Scatter(x=table["epoch"], y=table[field], name=label, mode="lines"), row=1, col=column)
        figure.update_xaxes(title_text="epoch")
        return figure

    def __str__(self) -> str:
        def line(name: str, row: EpochDynamics) -> str:
            return (
                f"{name:>6} epoch {row.epoch:4d}: clean {row.clean_correct:6.1%} correct | "
                f"wrong labels {row.wrong_correct:6.1%} seen through, {row.wrong_memorised:6.1%} memorised, "
                f"{row.wrong_other:6.1%} other | pull on wrong labels {row.wrong_total:+.3f}"
            )

        lines = [line("first", self.epochs[0]), line("peak", self.peak), line("last", self.final)]
        if self.suspects is not None:
            count = int(self.suspects.suspect.sum())
            lines.append(
                f"{count} suspect labels: precision {self.suspects.precision:.3f}, recall {self.suspects.recall:.3f}"
            )
        return "\n".join(lines)


def gradient_coefficients(
    probabilities: Tensor, target: Tensor, true_target: Tensor, targets: Tensor | None = None, weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Coefficients with which each example pulls the logit of its *true* class `c`, without and with the early-learning term.

    p_c - [y = c]          and          p_c - [y = c] - weight * p_c (t_c - s) / (1 - s),   s = <p, t>

    Args:
        probabilities: float [n, classes], rows sum to 1.
        target: int64 [n], the given labels `y`.
        true_target: int64 [n], the true classes `c`.
        targets: float [n, classes], the targets `t` of the early-learning term, or None.
        weight: the term's weight, lambda.

    Returns:
        Two float [n]: cross-entropy alone, and the sum. A positive value pushes the true class away.

    Example:
        >>> gradient_coefficients(torch.tensor([[0.7, 0.3]]), torch.tensor([1]), torch.tensor([0]))[0]
        tensor([0.7000])

    Source: arXiv:2007.00151, figure 2; eq. 6 for the term's gradient.
    """
    p = probabilities.gather(1, true_target[:, None]).squeeze(1)
    pull = p - (target == true_target).to(p.dtype)
    if targets is None:
        return pull, pull
    t = targets.gather(1, true_target[:, None]).squeeze(1)
    s = (probabilities * targets).sum(dim=1)
    # 1 - s reaches 0 only where p and t are the same corner; p_c (t_c - s) is 0 there too.
    return pull, pull - weight * p * (t - s) / (1 - s).clamp(min=1e-12)


def memorization_report(
    probabilities: Iterable[Tensor],
    target: Tensor,
    true_target: Tensor,
    *,
    targets: Iterable[Tensor] | None = None,
    weight: float = 0.0,
    epochs: Sequence[int] | None = None,
    bins: int = 20,
) -> MemorizationReport:
    """Report how clean and wrongly labelled examples are learned over the epochs.

    Args:
        probabilities: one float [n, classes] for each epoch, in order (an iterable, so that a long run need not be held in memory).
        target: int64 [n], the given labels.
        true_target: int64 [n], the true classes; evaluation only.
        targets: one float [n, classes] for each epoch, the early-learning targets, or None.
        weight: lambda of the early-learning term, for the gradient coefficients.
        epochs: the number of each epoch; 1, 2, 3, ... where left out.
        bins: number of bins of the histogram of `<p, t>`.

    Raises:
        InputError: no epoch, labels of another length, or fewer targets than probabilities.

    Example:
        >>> report = memorization_report([torch.eye(2)], torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> report.final.wrong_correct
        1.0

    Source: arXiv:2007.00151, figures 1 and 2.
    """
    rows: list[EpochDynamics] = []
    last: tuple[Tensor, Tensor | None] | None = None
    numbers: Iterator[int] = iter(epochs) if epochs is not None else count(1)
    for p, t in zip(probabilities, targets if targets is not None else repeat(None), strict=False):
        rows.append(_epoch_dynamics(next(numbers), p, target, true_target, t, weight))
        last = p, t
    if last is None:
        raise InputError(
            "memorization_report: no epoch was given; probabilities must hold at least one float [n, classes]."
        )
    return _assemble(rows, *last, target, true_target, bins)


def suspect_labels(
    targets: Tensor | PerExampleMemory | nn.Module, target: Tensor, true_target: Tensor | None = None
) -> LabelSuspects:
    """List the labels that the targets of early learning contradict.

    suspect_i = (argmax_c t_ic != y_i); an example that was never visited is never a suspect.

    Args:
        targets: float [n, classes]; or the memory, the `EarlyLearning` term, or an objective that holds one (of several, as
            the two networks of ELR+ have, the mean counts).
        target: int64 [n], the given labels.
        true_target: int64 [n], the true classes, only for precision and recall.

    Raises:
        InputError: lengths differ, or there is no early-learning term.

    Example:
        >>> suspect_labels(torch.tensor([[0.9, 0.1], [0.2, 0.7]]), torch.tensor([0, 0])).suspect
        tensor([False,  True])

    Source: README of shengliu66/ELR ("Identify Wrong Labels") and its issue 20.
    """
    t = _rows_of(targets)
    if t.ndim != 2 or t.shape[0] != target.shape[0]:
        raise InputError(
            f"suspect_labels: targets are float [n, classes] with one row for each of the {target.shape[0]} labels; got {list(t.shape)}."
        )
    target = target.to(t.device)
    given = t.gather(1, target[:, None]).squeeze(1)
    best, proposed = t.max(dim=1)
    # An unvisited row is all zero, and a tie is no contradiction: both have margin 0.
    margin = best - given
    suspect = margin > 0
    proposed = torch.where(suspect, proposed, target)
    labelled = torch.bincount(target, minlength=t.shape[1])
    share = torch.bincount(target[suspect], minlength=t.shape[1]) / labelled
    if true_target is None:
        return LabelSuspects(suspect, proposed, margin, share)
    wrong = target != true_target.to(t.device)
    hits = (suspect & wrong).sum()
    return LabelSuspects(suspect, proposed, margin, share, float(hits / suspect.sum()), float(hits / wrong.sum()))


class MemorizationRecorder:
    """Callback of `poise.fit` that measures the learning dynamics at the end of every epoch.

    Costs one evaluation pass over the examples for each measured epoch; it holds one row of figures an epoch, not the predictions.

    Args:
        input: float [n, ...], the training inputs, in the order of the training stream (so that rows meet the memory's rows).
        target: int64 [n], the given labels.
        true_target: int64 [n], the true classes; never shown to the objective.
        every: measure each so many epochs; the last measured one gives histogram and suspects.
        batch_size: rows a forward pass.

    Example:
        >>> recorder = MemorizationRecorder(x, noisy, true)                              # doctest: +SKIP
        >>> poise.fit(model, objective, train, callbacks=[recorder], epochs=5)           # doctest: +SKIP
    """

    def __init__(
        self, input: Tensor, target: Tensor, true_target: Tensor, *, every: int = 1, batch_size: int = 1024
    ) -> None:
        if not len(input) == len(target) == len(true_target):
            raise InputError(
                "MemorizationRecorder: input, target and true_target have one row each for the same examples; "
                f"got {len(input)}, {len(target)} and {len(true_target)}."
            )
        if every < 1:
            raise InputError(f"MemorizationRecorder: every is a number of epochs >= 1; got {every}.")
        self.input = input
        self.target = target
        self.true_target = true_target
        self.every = every
        self.batch_size = batch_size
        self._rows: list[EpochDynamics] = []
        self._last: tuple[Tensor, Tensor | None] | None = None

    def on_epoch_end(self, state: Any) -> None:
        """Measure, if this epoch is due. `state` has `.model`, `.objective` and `.epoch`."""
        if state.epoch % self.every:
            return
        p = self._predict(state.model)
        terms = _terms_of(state.objective)
        t = _mean_targets(terms).to(p) if terms else None
        weight = sum(_weight_of(state.objective, term) for term in terms) / max(1, len(terms))
        self._rows.append(_epoch_dynamics(state.epoch, p, self.target, self.true_target, t, weight))
        self._last = p, t

    def report(self, bins: int = 20) -> MemorizationReport:
        """What was measured so far."""
        if self._last is None:
            raise InputError(
                "MemorizationRecorder: nothing is recorded yet; pass it to poise.fit(callbacks=[...]) and train an epoch."
            )
        return _assemble(self._rows, *self._last, self.target, self.true_target, bins)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the figures so far, and the last predictions and targets."""
        return {"rows": [asdict(row) for row in self._rows], "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._rows = [EpochDynamics(**row) for row in state["rows"]]
        self._last = None if state["last"] is None else tuple(state["last"])

    def _predict(self, model: nn.Module) -> Tensor:
        training = model.training
        device = next(model.parameters()).device
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(rows.to(device)) for rows in torch.split(self.input, self.batch_size)])
        model.train(training)
        return torch.softmax(logits.float(), dim=1).cpu()


def _rows_of(targets: Tensor | PerExampleMemory | nn.Module) -> Tensor:
    """The targets as float [n, classes], wherever they are kept."""
    if isinstance(targets, Tensor):
        return targets
    if isinstance(targets, PerExampleMemory):
        return targets.values.float()
    terms = _terms_of(targets)
    if not terms:
        raise InputError(
            "suspect_labels: there is no early_learning term in what was given. Give the objective, the term, or its targets."
        )
    return _mean_targets(terms)


def _terms_of(module: nn.Module) -> list[EarlyLearning]:
    return [found for found in module.modules() if isinstance(found, EarlyLearning)]


def _mean_targets(terms: Sequence[EarlyLearning]) -> Tensor:
    return torch.stack([term.targets() for term in terms]).mean(dim=0)


def _weight_of(objective: Objective, term: EarlyLearning) -> float:
    """The weight that stands before the term now; a schedule is read at the objective's clock."""
    return sum(float(value_of(s.weight, objective.clock)) for s in objective.summands if s.term is term)


def _epoch_dynamics(
    epoch: int, probabilities: Tensor, target: Tensor, true_target: Tensor, targets: Tensor | None, weight: float
) -> EpochDynamics:
    if not len(probabilities) == len(target) == len(true_target):
        raise InputError(
            "memorization_report: probabilities, target and true_target have one row each for the same examples; "
            f"got {len(probabilities)}, {len(target)} and {len(true_target)}."
        )
    predicted = probabilities.argmax(dim=1)
    wrong = target != true_target
    clean = ~wrong
    correct = predicted == true_target
    memorised = predicted == target
    pull, total = gradient_coefficients(probabilities, target, true_target, targets, weight)
    saturated = (
        float("nan") if targets is None else _share((probabilities * targets).sum(dim=1) > SATURATED, clean | wrong)
    )
    return EpochDynamics(
        epoch=epoch,
        clean_correct=_share(correct, clean),
        clean_other=_share(~correct, clean),
        wrong_correct=_share(correct, wrong),
        wrong_memorised=_share(memorised, wrong),
        wrong_other=_share(~correct & ~memorised, wrong),
        clean_pull=float(pull[clean].mean()),
        wrong_pull=float(pull[wrong].mean()),
        clean_total=float(total[clean].mean()),
        wrong_total=float(total[wrong].mean()),
        saturated=saturated,
    )


def _share(hit: Tensor, group: Tensor) -> float:
    """Share of a group that is hit; NaN for an empty group."""
    return float(hit[group].double().mean())


def _assemble(
    rows: Sequence[EpochDynamics], p: Tensor, t: Tensor | None, target: Tensor, true_target: Tensor, bins: int
) -> MemorizationReport:
    if t is None:
        return MemorizationReport(tuple(rows))
    agreement = torch.histc((p * t).sum(dim=1).float().clamp(0, 1), bins=bins, min=0, max=1).to(torch.int64)
    return MemorizationReport(tuple(rows), agreement, suspect_labels(t, target, true_target))
