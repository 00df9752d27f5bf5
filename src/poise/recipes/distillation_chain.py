"""Distil a network into itself, step by step, with the share of labels estimated from two runs.

    1. teacher   <- train on the labels                                  (alpha = 1)
    2. probe     <- train on the teacher's predictions alone             (alpha = 0)
    3. alpha     <- optimal_mixing(teacher, probe, labels) on validation data
    4. student   <- train on alpha * fit(labels) + (1 - alpha) * distillation(teacher)
    5. the student is the next teacher; go to 2

Every training starts from new weights; the teacher is frozen and sees the same (augmented) batch. A later step needs
one probe and one student, because the first teacher goes on serving as the `alpha = 1` end of the line. The probe and
the student of a step share seed and data order, so that they differ by the share alone. A grid of shares needs ten
trainings or more for what the probe gives in one (arXiv:2102.13088, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from poise.errors import InputError
from poise.frozen import FrozenModel
from poise.objective import Objective, Summand, Term
from poise.quantities import derive
from poise.readouts.supervised import Classification, Readout
from poise.terms.probability import Brier
from poise.terms.self_distillation import Distillation
from poise.terms.supervised import CrossEntropy
from poise.training import Run, fit
from poise.weights.mixing import Mixing, MixingWeight, optimal_mixing

__all__ = ["Chain", "Grid", "Student", "distillation_chain", "distillation_grid"]

Loss = Literal["mse_prob", "mse_logit", "kl", "ce"]
TENTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Student:
    """One trained model of a chain or a grid, and what it is worth on the validation data.

    Args:
        step: 1 for the teacher that saw the labels only, 2 for its students, ...
        alpha: the share of the labels in its objective.
        mixing: the estimate behind `alpha`, raw value included; None where the share was given.
        run: the finished training.
        squared_error: mean of `1/2 sum_k (p_k - y_k)^2`, the loss that the estimate minimises.
        accuracy: share of examples whose most probable class is the target's.
        trainings: how many trainings the step took, the probe included.
    """

    step: int
    alpha: float
    mixing: Mixing | None
    run: Run
    squared_error: float
    accuracy: float
    trainings: int

    @property
    def model(self) -> nn.Module:
        """The trained module."""
        return self.run.model


@dataclass(frozen=True)
class Chain:
    """A finished chain of self-distillation.

    Args:
        students: the teacher first, then the student of every step.
        stopped: why the chain ended, in words.
        trainings: number of trainings, probes included.
        seconds: time in the training loops.
    """

    students: tuple[Student, ...]
    stopped: str
    trainings: int
    seconds: float

    @property
    def best(self) -> Student:
        """The model with the lowest squared error on the validation data, the earliest of equals."""
        return min(self.students, key=lambda student: student.squared_error)

    @property
    def alphas(self) -> tuple[float, ...]:
        """The share of labels in steps 2, 3, ..."""
        return tuple(student.alpha for student in self.students[1:])

    def __str__(self) -> str:
        return _table(self.students) + f"\n{self.trainings} trainings, {self.seconds:.1f} s; {self.stopped}"


@dataclass(frozen=True)
class Grid:
    """Students of one teacher at every share of a grid, and the share that two of these runs would have given.

    Args:
        teacher: the model trained on the labels.
        students: one for each share.
        estimate: `optimal_mixing` of the teacher and the student at share 0.
        trainings: number of trainings of the grid, the teacher included.
        seconds: time in the training loops.
    """

    teacher: Student
    students: tuple[Student, ...]
    estimate: Mixing
    trainings: int
    seconds: float

    @property
    def best(self) -> Student:
        """The student with the lowest squared error on the validation data, the smallest share of equals."""
        return min(self.students, key=lambda student: (student.squared_error, student.alpha))

    def __str__(self) -> str:
        estimate = f"estimate from two runs: {self.estimate.alpha:.3f} (raw {self.estimate.raw:.3f})"
        return (
            _table((self.teacher, *self.students)) + f"\n{self.trainings} trainings, {self.seconds:.1f} s; {estimate}"
        )


def distillation_chain(
    make_model: Callable[[int], nn.Module],
    train: Any,
    valid: Mapping[str, Tensor] | tuple[Tensor, Tensor],
    *,
    steps: int = 3,
    alpha: float | Sequence[float] | Literal["estimate"] = "estimate",
    loss: Loss = "mse_prob",
    temperature: float = 1.0,
    ground_truth: Term | Objective | None = None,
    penalty: Term | Objective | None = None,
    patience: int | None = None,
    readout: Callable[..., Readout] = Classification,
    same_start: bool = True,
    seed: int = 0,
    **options: Any,
) -> Chain:
    """Train a teacher and `steps - 1` generations of students, each with the share of labels that suits it.

    `student = argmin alpha * ground_truth + (1 - alpha) * distillation(teacher) + penalty`.

    Args:
        make_model: `make_model(seed) -> module` that maps `input` to logits, with new weights drawn from the seed.
        train: training data as for `poise.fit`; tensors by name, and without a `transform`, let the teacher answer once
            for the whole set, otherwise it runs on every batch.
        valid: `{"input": ..., "target": ...}` or a pair: shares are estimated and models compared on it.
        steps: number of models including the teacher, >= 1.
        alpha: `"estimate"` (two runs a step), one share in [0, 1] for all steps, or one for each of steps 2, 3, ...
        loss, temperature: of the term `distillation`; the estimate is exact in spirit for `"mse_prob"` only, because
            the others are not squares of the probabilities.
        ground_truth: the term for the labels; by default `brier` beside `"mse_prob"` (the same units) and
            `cross_entropy` beside the others.
        penalty: added to every objective, such as `1e-4 * L2()`.
        patience: stop rule: end after so many steps in a row without a lower squared error on `valid`.
        readout: `readout(teacher=...)` makes the readout; `teacher` may be None.
        same_start: every training begins at the same new weights and sees the data in the same order, so that models
            differ by their objectives alone and the estimate is not blurred by luck; False draws both anew for each
            step.
        seed: decides initial weights and data order.
        **options: handed to `poise.fit` (`epochs`, `lr`, `solver`, `batch_size`, `transform`, ...); `checkpoint`
            gets a folder for each training, so that a stopped chain resumes where it was.

    Returns:
        `Chain`. It ends early where the estimate asks for labels alone (a share of 1): distilling would not help.

    Raises:
        InputError: a share outside [0, 1], a wrong number of shares, or data that do not fit.

    >>> x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))
    >>> chain = distillation_chain(lambda seed: nn.Linear(3, 2), (x, y), (x, y), steps=2, alpha=0.5, epochs=1)
    >>> [student.alpha for student in chain.students]
    [1.0, 0.5]

    Source: arXiv:2102.13088, section 5.
    """
    shares = _shares(alpha, steps)
    if patience is not None and patience < 1:
        raise InputError(f"patience counts steps and must be at least 1; got {patience}.")
    workshop = _Workshop(
        make_model, train, valid, loss, temperature, ground_truth, penalty, readout, same_start, seed, options
    )
    students = [workshop.student(1, 1.0, teacher=None)]
    stopped = f"all {steps} steps are done"
    for step in range(2, steps + 1):
        best = min(students, key=lambda student: student.squared_error)
        if patience is not None and students[-1].step - best.step >= patience:
            stopped = f"no lower squared error for {patience} steps"
            break
        teacher = students[-1].run
        if shares is not None:
            students.append(workshop.student(step, shares[step - 2], teacher))
            continue
        probe = workshop.student(step, 0.0, teacher)
        mixing = workshop.estimate(students[0], probe)
        if mixing.alpha == 1.0:
            reading = f"raw share {mixing.raw:.2f}, {mixing.flag}"
            stopped = f"step {step} wants the labels alone ({reading}): distilling would not help"
            break
        # At share 0 the probe is the student.
        wanted = mixing.alpha > 0
        students.append(workshop.student(step, mixing.alpha, teacher, mixing) if wanted else _kept(probe, mixing))
    return Chain(tuple(students), stopped, workshop.trainings, workshop.seconds)


def distillation_grid(
    make_model: Callable[[int], nn.Module],
    train: Any,
    valid: Mapping[str, Tensor] | tuple[Tensor, Tensor],
    *,
    alphas: Iterable[float] = TENTHS,
    loss: Loss = "mse_prob",
    temperature: float = 1.0,
    ground_truth: Term | Objective | None = None,
    penalty: Term | Objective | None = None,
    readout: Callable[..., Readout] = Classification,
    same_start: bool = True,
    seed: int = 0,
    **options: Any,
) -> Grid:
    """Train one teacher and a student at every share: what the estimate from two runs is to be compared with.

    Seeds, budgets and data order are those of `distillation_chain` with the same arguments: its step 2 is a point of
    this grid's curve.

    Args:
        alphas: shares in [0, 1], 0 among them.
        loss, temperature, ground_truth, penalty, readout, same_start, seed, **options: as in `distillation_chain`.

    Raises:
        InputError: a share outside [0, 1], or 0 is missing.

    Source: arXiv:2102.13088, section 5.
    """
    shares = [_share(float(value)) for value in alphas]
    if 0.0 not in shares:
        raise InputError("The grid needs the share 0: the estimate from two runs is made from it and the teacher.")
    workshop = _Workshop(
        make_model, train, valid, loss, temperature, ground_truth, penalty, readout, same_start, seed, options
    )
    teacher = workshop.student(1, 1.0, teacher=None)
    students = tuple(workshop.student(2, share, teacher.run) for share in shares)
    estimate = workshop.estimate(teacher, students[shares.index(0.0)])
    return Grid(teacher, students, estimate, workshop.trainings, workshop.seconds)


@dataclass
class _Workshop:
    """Trains students on fixed data with fixed settings, and counts what that costs."""

    make_model: Callable[[int], nn.Module]
    train: Any
    valid: Any
    loss: Loss
    temperature: float
    ground_truth: Term | Objective | None
    penalty: Term | Objective | None
    readout: Callable[..., Readout]
    same_start: bool
    seed: int
    options: dict[str, Any]
    trainings: int = 0
    seconds: float = 0.0
    _truth: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.train, tuple | list) and len(self.train) == 2:
            self.train = {"input": self.train[0], "target": self.train[1]}
        if isinstance(self.valid, tuple | list) and len(self.valid) == 2:
            self.valid = {"input": self.valid[0], "target": self.valid[1]}
        if not isinstance(self.valid, Mapping) or not {"input", "target"} <= set(self.valid):
            raise InputError('valid must hold "input" and "target": shares are estimated and models compared on it.')
        self._truth = self.valid["target"].cpu()

    def student(self, step: int, alpha: float, teacher: Run | None, mixing: Mixing | None = None) -> Student:
        """Train one model from fresh weights and measure it."""
        seed = derive(self.seed, "distillation", 1 if self.same_start else step) % 2**31
        data, readout = self._taught(teacher)
        options = dict(self.options)
        if options.get("checkpoint") is not None:
            options["checkpoint"] = Path(options["checkpoint"]) / f"step{step}-alpha{alpha:.6f}"
        run = fit(
            self.make_model(seed), self._objective(alpha), data, self.valid, readout=readout, seed=seed, **options
        )
        self.trainings += 1
        self.seconds += run.seconds
        p = self.probabilities(run)
        truth = self._truth
        y = truth if truth.is_floating_point() else nn.functional.one_hot(truth, p.shape[-1]).to(p)
        return Student(
            step=step,
            alpha=alpha,
            mixing=mixing,
            run=run,
            squared_error=float(0.5 * (p - y).square().sum(-1).mean()),
            accuracy=float((p.argmax(-1) == y.argmax(-1)).float().mean()),
            trainings=1 if mixing is None else 2,
        )

    def estimate(self, first: Student, probe: Student) -> Mixing:
        """Estimate the share of labels from the first teacher and a student that saw its teacher alone."""
        return optimal_mixing(self.probabilities(first.run), self.probabilities(probe.run), self._truth)

    def probabilities(self, run: Run) -> Tensor:
        return run.predict(self.valid["input"]).float().softmax(-1)

    def _objective(self, alpha: float) -> Objective:
        """`alpha * ground_truth + (1 - alpha) * distillation + penalty`; a share of 0 or 1 leaves one of them out."""
        truth = self.ground_truth or (Brier() if self.loss == "mse_prob" else CrossEntropy())
        mixed = MixingWeight(Mixing(alpha, alpha, "inside")).objective(truth, Distillation(self.loss, self.temperature))
        if self.penalty is None:
            return mixed
        return mixed + (Objective([Summand(self.penalty)]) if isinstance(self.penalty, Term) else self.penalty)

    def _taught(self, teacher: Run | None) -> tuple[Any, Readout]:
        """Return the data and the readout of a training: the teacher answers once for fixed inputs, else batch by batch."""
        if teacher is None:
            return self.train, self.readout(teacher=None)
        frozen = FrozenModel(teacher.model)
        fixed = isinstance(self.train, Mapping) and isinstance(self.train.get("input"), Tensor)
        if fixed and self.options.get("transform") is None and self.readout is Classification:
            logits = frozen.outputs(self.train["input"].to(teacher.device)).to(self.train["input"].device)
            return {**self.train, "teacher_logits": logits}, self.readout(teacher=None)
        return self.train, self.readout(teacher=frozen)


def _kept(probe: Student, mixing: Mixing) -> Student:
    return Student(probe.step, probe.alpha, mixing, probe.run, probe.squared_error, probe.accuracy, trainings=1)


def _shares(alpha: float | Sequence[float] | Literal["estimate"], steps: int) -> list[float] | None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps counts the models, the teacher included, and must be at least 1; got {steps!r}.")
    if isinstance(alpha, str):
        if alpha != "estimate":
            raise InputError(
                f"alpha must be a share, one share for each of steps 2, 3, ..., or 'estimate'; got {alpha!r}."
            )
        return None
    if isinstance(alpha, Iterable):
        shares = [_share(float(value)) for value in alpha]
        if len(shares) != steps - 1:
            raise InputError(
                f"{steps} steps need {steps - 1} shares, one for each of steps 2, 3, ...; got {len(shares)}."
            )
        return shares
    return [_share(float(alpha))] * (steps - 1)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"A share of labels lies in [0, 1]; got {value:g}.")
    return value


def _table(students: Iterable[Student]) -> str:
    lines = ["step   alpha     raw  squared error  accuracy"]
    for student in students:
        raw = "" if student.mixing is None else f"{student.mixing.raw:.3f}"
        lines.append(
            f"{student.step:>4}  {student.alpha:>6.3f}  {raw:>6}  {student.squared_error:>13.5f}  {student.accuracy:>8.4f}"
        )
    return "\n".join(lines)
