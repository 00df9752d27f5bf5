"""Claim 24: a network that learns how its weights answer to hyperparameters tunes them within one run (self-tuning networks).

Digits of scikit-learn: 300 to train, 500 to validate, 797 to test; an MLP 64-256-256-10 with three dropout rates (of the input and of both
hidden layers) in (0, 0.9), 1,500 steps of 50, SGD with learning rate 0.05 and momentum 0.9. After every second training step
hyperparameters and scales move by Adam at 0.01 on 100 validation examples; scale 0.5 at first, entropy weight 1e-3, warm-up of a twentieth.
Gates see h itself, as in the authors' code.

Rivals on the same seeds: five fixed points of rates, from the start value to the heavy end, and a random search whose runs together make at
least as many steps as the tuned run (1,500 training and about 710 validation steps: two runs). The validation loss of a run is its lowest
mean cross-entropy over all 500 validation examples, looked at every 50 steps. On the first seed the run is repeated from other starts. The
schedule that was found is replayed on a plain network.

`--full` adds Delta-STN, other starts and Bayesian optimisation on every seed, the final values held fixed, and fixed values shaken by noise
and by a wave as in the paper, at 6,000 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.claims import Claim, Finding, Progress
from poise.parts import TunedDropout, make_best_response
from poise.quantities import derive
from poise.solvers.torch_optimizers import SGD
from poise.training import fit
from poise.weights.bilevel.self_tuning import SelfTuning
from poise.weights.hyperparameter import Hyperparameter
from poise.weights.hyperparameter_schedule import PerturbedHyperparameters, ReplayedHyperparameters
from poise.weights.hyperparameter_search import BayesianSearch, RandomSearch

TRAIN, VALID, BATCH, VALID_BATCH = 300, 500, 50, 100
STEPS, FULL_STEPS, EVERY, SEEDS = 1500, 6000, 50, 3
START, OTHER_STARTS = 0.05, (0.3, 0.6)
GRID = ((0.05, 0.05, 0.05), (0.1, 0.2, 0.2), (0.1, 0.5, 0.5), (0.3, 0.5, 0.5), (0.5, 0.7, 0.7))
TRIALS = 2
NAMES = ("input", "hidden_1", "hidden_2")

Policy = Callable[[Sequence[Hyperparameter]], Any]


@dataclass(frozen=True)
class Scores:
    """One run: lowest validation loss, test loss and accuracy there, and the rates at the end (mean of the last tenth of the path)."""

    valid: float
    test: float
    accuracy: float
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Digits:
    """One seed's split."""

    train: dict[str, Tensor]
    valid: dict[str, Tensor]
    test: dict[str, Tensor]


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Compare one tuned run with fixed rates and random search on three seeds."""
    jobs = _jobs(full)
    scores: dict[tuple[str, int], Scores] = {}
    schedules: dict[int, Any] = {}
    done = 0
    for number in range(SEEDS):
        each = seed + number
        digits = _digits(each)
        for name, job in jobs.items():
            done += 1
            if name.startswith("stn from") and number and not full:
                continue
            if progress is not None:
                progress((done - 1) / (len(jobs) * SEEDS), f"{name}, seed {each}")
            scores[name, number] = job(digits, each, schedules)
    return _judge(scores, full)


Job = Callable[[Digits, int, dict[int, Any]], Scores]


def _jobs(full: bool) -> dict[str, Job]:
    """Everything that is run on a seed, by name; the tuned run first, since the replay needs its schedule."""
    steps = FULL_STEPS if full else STEPS
    jobs: dict[str, Job] = {"stn": lambda d, s, found: _tuned(d, s, steps, START, "stn", found)}
    jobs["replay"] = lambda d, s, found: _plain(
        d, s, steps, (START,) * 3, lambda hypers: ReplayedHyperparameters(found[s], hypers)
    )
    for place, rates in enumerate(GRID):
        jobs[f"fixed {place}"] = lambda d, s, _, rates=rates: _plain(d, s, steps, rates)  # type: ignore[misc]
    jobs["random"] = lambda d, s, _: _searched(d, s, steps, RandomSearch(_hypers((START,) * 3), s))
    for start in OTHER_STARTS:
        jobs[f"stn from {start}"] = lambda d, s, _, start=start: _tuned(d, s, steps, start, "stn", {})  # type: ignore[misc]
    return {**jobs, **_more_jobs(steps)} if full else jobs


def _more_jobs(steps: int) -> dict[str, Job]:
    middle = GRID[2]
    last: Job = lambda d, s, found: _plain(d, s, steps, found[s].values[-1])  # noqa: E731
    return {
        "delta": lambda d, s, _: _tuned(d, s, steps, START, "delta", {}),
        "last value": last,
        "bayes": lambda d, s, _: _searched(d, s, steps, BayesianSearch(_hypers((START,) * 3), seed=s), trials=10),
        "noise": lambda d, s, _: _plain(d, s, steps, middle, lambda h: PerturbedHyperparameters(h, std=0.05, seed=s)),
        "wave": lambda d, s, _: _plain(d, s, steps, middle, lambda h: PerturbedHyperparameters(h, amplitude=0.1)),
    }


# ---- one run --------------------------------------------------------------------------------------------------------


def _digits(seed: int) -> Digits:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(derive(seed, "split")))
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    parts = [slice(0, TRAIN), slice(TRAIN, TRAIN + VALID), slice(TRAIN + VALID, None)]
    return Digits(*({"input": x[p], "target": y[p]} for p in parts))


def _hypers(starts: Sequence[float]) -> list[Hyperparameter]:
    return [Hyperparameter(name, start, 0, 0.9) for name, start in zip(NAMES, starts, strict=True)]


def _mlp(rates: Sequence[Hyperparameter], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return nn.Sequential(
            TunedDropout(rates[0]), nn.Linear(64, 256), nn.ReLU(),
            TunedDropout(rates[1]), nn.Linear(256, 256), nn.ReLU(),
            TunedDropout(rates[2]), nn.Linear(256, 10),
        )  # fmt: skip


def _measure(logits: Tensor, target: Tensor) -> dict[str, float]:
    return {
        "nll": float(functional.cross_entropy(logits, target)),
        "accuracy": float((logits.argmax(-1) == target).double().mean()),
    }


def _train(model: nn.Module, digits: Digits, seed: int, steps: int, policy: Any) -> Scores:
    result = fit(
        model, "cross_entropy", digits.train, digits.valid, policy=policy, solver=SGD(lr=0.05, momentum=0.9), steps=steps,
        batch_size=BATCH, seed=seed, device="cpu", metrics=_measure, monitor="nll", restore_best=True, validate_every=EVERY,
        log_every=steps,
    )  # fmt: skip
    assert result.best is not None
    test = _measure(result.predict(digits.test["input"]), digits.test["target"])
    return Scores(result.best[1], test["nll"], test["accuracy"])


def _plain(digits: Digits, seed: int, steps: int, starts: Sequence[float], policy: Policy | None = None) -> Scores:
    hypers = _hypers(starts)
    return _train(_mlp(hypers, seed), digits, seed, steps, None if policy is None else policy(hypers))


def _tuned(
    digits: Digits, seed: int, steps: int, start: float, variant: Literal["stn", "delta"], found: dict[int, Any]
) -> Scores:
    hypers = _hypers((start,) * 3)
    model = _mlp(hypers, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "gates"))
        make_best_response(model, len(hypers))
    policy = SelfTuning(
        hypers, scale=0.5, entropy=1e-3, lr=0.01, scale_lr=0.01, variant=variant, origin="zero", valid_batch=VALID_BATCH
    )
    scores = _train(model, digits, seed, steps, policy)
    schedule = policy.schedule
    found[seed] = schedule
    tail = max(1, len(schedule.steps) // 10)
    rates = tuple(fmean(schedule.path(name)[1][-tail:]) for name in NAMES)
    return Scores(scores.valid, scores.test, scores.accuracy, rates)


def _searched(digits: Digits, seed: int, steps: int, search: RandomSearch, trials: int = TRIALS) -> Scores:
    found: list[Scores] = []
    for _ in range(trials):
        point = search.ask()
        found.append(_plain(digits, seed, steps, tuple(point[name] for name in NAMES)))
        search.tell(point, found[-1].valid)
    return min(found, key=lambda scores: scores.valid)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def _mean(scores: Mapping[tuple[str, int], Scores], name: str, figure: str = "valid") -> float:
    return fmean(getattr(s, figure) for (job, _), s in scores.items() if job == name)


def _judge(scores: Mapping[tuple[str, int], Scores], full: bool = False) -> Finding:
    seeds = sorted({number for _, number in scores})
    grids = [[scores[f"fixed {i}", n].valid for i in range(len(GRID))] for n in seeds]
    best, middle = fmean(map(min, grids)), fmean(map(median, grids))
    ours, held = _mean(scores, "stn"), _mean(scores, "fixed 0")
    replay, random = _mean(scores, "replay"), _mean(scores, "random")
    moved = min(max(abs(rate - START) for rate in scores["stn", n].rates) for n in seeds)
    spread = _spread(scores, seeds)
    against = _against(ours, middle, best, held, moved)
    beside = _beside(spread, replay / ours)
    figures = {
        "tuned": ours, "best of the grid": best, "median of the grid": middle, "start held fixed": held, "random search": random,
        "replay": replay, "spread of starts": spread, "least movement": moved,
        **{f"tuned/{name}": fmean(scores["stn", n].rates[i] for n in seeds) for i, name in enumerate(NAMES)},
        **{f"{name}/{figure}": _mean(scores, name, figure) for name in dict.fromkeys(job for job, _ in scores)
           for figure in ("valid", "test", "accuracy")},
    }  # fmt: skip
    rates = ", ".join(f"{figures[f'tuned/{name}']:.2f}" for name in NAMES)
    measured = (
        f"validation CE {ours:.4f} tuned in one run, {best:.4f} best and {middle:.4f} median of five fixed points, {held:.4f} start held, "
        f"{random:.4f} random search of {TRIALS} runs, {replay:.4f} schedule replayed; rates {START} -> {rates}, from three starts within "
        f"{spread:.2f}; test CE {_mean(scores, 'stn', 'test'):.4f}, accuracy {_mean(scores, 'stn', 'accuracy'):.1%} "
        "(paper, CIFAR-10 CNN, 15 hyperparameters, validation loss: STN 0.575, Bayesian optimisation 0.636, random 0.921, grid 0.794)"
    )
    if full:
        names = ("delta", "last value", "bayes", "noise", "wave")
        beside.append("validation CE of " + ", ".join(f"{name} {_mean(scores, name):.4f}" for name in names))
    return Finding("fails" if against else "holds", measured, "; ".join([*against, *beside]), figures)


def _against(ours: float, middle: float, best: float, held: float, moved: float) -> list[str]:
    """What contradicts the claim."""
    found = []
    if ours > middle:
        found.append(
            f"the tuned run's validation loss {ours:.4f} lies above the median of the fixed points, {middle:.4f}"
        )
    if ours > 1.2 * best:
        found.append(f"the tuned run is {ours / best - 1:.0%} above the best fixed point; a fifth was allowed")
    if ours > held:
        found.append(f"holding the start value is better, {held:.4f}")
    if moved < 0.1:
        found.append(f"the rates hardly left their start: by {moved:.2f} at most on one seed")
    return found


def _beside(spread: float, replayed: float) -> list[str]:
    """What was expected beside the claim and does not show at this size."""
    found = []
    if spread > 0.1:
        found.append(
            f"expected, and not seen at this length: rates from different starts end within 0.1 (here {spread:.2f} apart)"
        )
    if replayed > 1.05:
        found.append(
            f"expected, and not seen at this length: the replayed schedule within 5 % of the tuned run (here {replayed - 1:.0%} above)"
        )
    return found


def _spread(scores: Mapping[tuple[str, int], Scores], seeds: Sequence[int]) -> float:
    """The largest distance of a rate at the end between starts, over the seeds where other starts were run."""
    widest = 0.0
    for n in seeds:
        rows = [s.rates for (job, number), s in scores.items() if number == n and job.startswith("stn")]
        if len(rows) > 1:
            widest = max(widest, *(max(column) - min(column) for column in zip(*rows, strict=True)))
    return widest


CLAIM = Claim(
    number=24,
    statement=(
        "Self-tuning networks find a hyperparameter schedule in one training run that beats fixed hyperparameters found by grid search, "
        "random search and Bayesian optimisation (CIFAR-10, 15 hyperparameters: validation loss 0.575 against 0.794, 0.921 and 0.636)."
    ),
    expected=(
        "Three dropout rates on digits: the validation loss is at most the median of a five-point grid and within 20 % of its best, the "
        "rates leave 0.05, different starts end within 0.1 of each other, and the replayed schedule is within 5 %."
    ),
    falsified=(
        "The tuned run's mean validation loss lies above the grid's median, 20 % above its best, or above the start value held fixed; or "
        "the rates stay within 0.1 of the start."
    ),
    run=run,
)
