"""Claim 63: one dictionary for features and labels beats factorising first, where the two want different bases.

Five seeds each. Third direction: two directions of thirty carry the variance, a third one the label; 500 samples, r = 2, xi = 0.001, four
starts (the data's decomposition, the unbound classifier, two at random); and five starts with the ridge at which the objective is as
well conditioned as the theorem asks. Two bases: features from the digits 2 and 5, labels from 4 and 7, noise 0.5, 500 samples, r = 2,
xi in {0.01, 0.1, 1}, and five starts at xi = 0.01. Real data: breast cancer, the twenty means and errors as features and the ten worst
values as covariates, r = 2; and the digit 8 against the rest with 5 % of positives, r = 5, by F-score at Youden's threshold.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from poise.claims import Claim, Finding, Progress
from poise.data.factor_simulators import FactorData, third_direction, two_bases
from poise.errors import PoiseWarning
from poise.metrics.binary import binary_report, youden_threshold

TRAIN, TEST, RANK, SMALL = 500, 1000, 2, 0.001
GRID, NU = (0.01, 0.1, 1.0), 0.1
GAIN, SHORT, AGREE = 0.10, 0.03, 1e-5
"""Asked for on the third direction: accuracy above factorise-first, accuracy short of logistic regression; and of all starts: agreement."""


def run(*, full: bool = False, seed: int = 0, progress: Progress | None = None) -> Finding:
    """Fit dictionaries and baselines (`full`: twenty seeds)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seeds = [seed + i for i in range(20 if full else 5)]
    rows: dict[str, list[float]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PoiseWarning)
            for done, each in enumerate(seeds):
                if progress is not None:
                    progress(done / len(seeds), f"seed {each}")
                for study in (_third, _conditioned, _bases, _cancer, _rare):
                    for name, value in study(each).items():
                        rows.setdefault(name, []).append(value)
    finally:
        torch.set_num_threads(threads)
    return _judge(rows)


def _judge(rows: dict[str, list[float]]) -> Finding:
    mean = {name: fmean(values) for name, values in rows.items()}
    reasons = []
    gain = mean["third/sdl"] - mean["third/svd_logistic"]
    if gain < GAIN:
        reasons.append(f"on the third direction the gain over factorising first is {100 * gain:.1f} points")
    if mean["third/sdl"] < mean["third/logistic"] - SHORT:
        reasons.append(
            f"on the third direction the dictionary has {100 * mean['third/sdl']:.1f} %, "
            f"logistic regression {100 * mean['third/logistic']:.1f} %"
        )
    digits = mean["bases/0.01"] - mean["bases/svd_logistic"]
    if digits <= 0:
        reasons.append(f"on two bases the gain over factorising first is {100 * digits:.1f} points")
    spread = max(*rows["bases/spread"], *rows["conditioned/spread"])
    if spread > AGREE:
        reasons.append(f"starts differ by {spread:.1e} of the objective")
    holds = not reasons
    beyond = max(rows["third/spread"])
    if beyond > AGREE:
        reasons.append(
            "outside the theorem's condition L/mu < 3 starts differ: on the third direction by up to "
            f"{100 * beyond:.0f} % of the objective, since the decomposition of the data is a stationary point; "
            "the start from the unbound classifier finds the better one"
        )
    errors = [mean[f"bases/error {xi}"] for xi in GRID]
    if sorted(errors, reverse=True) != errors:
        reasons.append("reconstruction errors do not fall with xi")
    return Finding(
        "holds" if holds else "fails", _words(mean, spread), "; ".join(reasons), mean | {"bases/largest spread": spread}
    )


def _words(mean: dict[str, float], spread: float) -> str:
    def percent(*names: str) -> str:
        return " / ".join(f"{100 * mean[n]:.1f}" for n in names)

    errors = " / ".join(f"{mean[f'bases/error {xi}']:.3f}" for xi in GRID)
    return (
        f"third direction, dictionary / factorise first / logistic: {percent('third/sdl', 'third/svd_logistic', 'third/logistic')} %; "
        f"two bases, xi 0.01 / 0.1 / 1 / factorise first / logistic: "
        f"{percent(*(f'bases/{xi}' for xi in GRID), 'bases/svd_logistic', 'bases/logistic')} % at errors {errors} "
        f"(paper, MNIST: factorise first near chance, a front over xi); starts agree to {spread:.1e} there and where L/mu < 3 "
        f"(certified gap {mean['conditioned/gap']:.1e}); cancer, dictionary / factorise first / logistic: "
        f"{percent('cancer/sdl', 'cancer/svd_logistic', 'cancer/logistic')} %; rare digit, F-score: "
        f"{percent('rare/sdl', 'rare/svd_logistic', 'rare/logistic')} (paper: fake job postings at or above the baselines)"
    )


def _split(data: FactorData) -> tuple[Any, Any, Any, Any]:
    x, y = data.x.numpy(), data.y.numpy()
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


def _rivals(names: Sequence[str], rank: int) -> dict[str, Any]:
    from poise.solvers import dictionary_baselines

    every = dictionary_baselines(rank)
    return {name: every[name] for name in names}


def _third(seed: int) -> dict[str, float]:
    from poise.solvers import SupervisedDictionary

    x, y, x_test, y_test = _split(third_direction(TRAIN + TEST, 30, seed=seed))
    model = SupervisedDictionary(RANK, xi=SMALL, nu=NU, n_starts=4, random_state=seed).fit(x, y)
    found = {"third/sdl": model.score(x_test, y_test), "third/spread": model.optimality_.spread}
    for name, model in _rivals(("svd_logistic", "logistic"), RANK).items():
        found[f"third/{name}"] = float(model.fit(x, y).score(x_test, y_test))
    return found


def _conditioned(seed: int) -> dict[str, float]:
    """Five starts where `L / mu = 2.9`: the ridge that makes it so depends on the data alone."""
    from poise.solvers import LowRankProjectedGradient, SupervisedFactors

    data = third_direction(TRAIN, 30, seed=seed)
    x, ones = data.x.mT - data.x.mean(0)[:, None], torch.ones(1, TRAIN, dtype=torch.float64)
    ridge = SupervisedFactors(x, data.y, xi=SMALL, nu=0.0, covariates=ones).bound / 1.9
    objective = SupervisedFactors(x, data.y, xi=SMALL, nu=ridge, covariates=ones)
    starts = [("svd", 0), ("classifier", 0), *(("random", s) for s in range(3))]
    found = [LowRankProjectedGradient(RANK, start=k, seed=s).minimize_function(objective) for k, s in starts]
    values = [f.certificate.value for f in found]
    best = min(found, key=lambda f: f.certificate.value)
    return {
        "conditioned/spread": (max(values) - min(values)) / min(values),
        "conditioned/gap": objective.global_bound(best.point).gap,
    }


def _bases(seed: int) -> dict[str, float]:
    from sklearn.datasets import load_digits

    from poise.solvers import SupervisedDictionary

    digits = load_digits()
    images, labels = torch.from_numpy(digits.data / 16), torch.from_numpy(digits.target)
    x, y, x_test, y_test = _split(two_bases(images, labels, samples=TRAIN + TEST, seed=seed))
    found: dict[str, float] = {}
    for xi in GRID:
        starts = 5 if xi == GRID[0] else 1
        model = SupervisedDictionary(RANK, xi=xi, nu=NU, n_starts=starts, random_state=seed).fit(x, y)
        found |= {f"bases/{xi}": model.score(x_test, y_test), f"bases/error {xi}": model.relative_error(x_test)}
        if starts > 1:
            found["bases/spread"] = model.optimality_.spread
    for name, rival in _rivals(("svd_logistic", "logistic"), RANK).items():
        found[f"bases/{name}"] = float(rival.fit(x, y).score(x_test, y_test))
    return found


def _cancer(seed: int) -> dict[str, float]:
    import numpy as np
    from sklearn.datasets import load_breast_cancer
    from sklearn.decomposition import TruncatedSVD
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    from poise.solvers import SupervisedDictionary

    x, y = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.4, random_state=seed, stratify=y)
    scaler = StandardScaler().fit(x)
    (x, z), (x_test, z_test) = (np.split(scaler.transform(a), [20], axis=1) for a in (x, x_test))
    model = SupervisedDictionary(RANK, xi=0.01, nu=NU).fit(x, y, covariates=z)
    codes = TruncatedSVD(RANK, random_state=0).fit(x)
    found = {"cancer/sdl": model.score(x_test, y_test, covariates=z_test)}
    for name, (inputs, tests) in {
        "svd_logistic": (codes.transform(x), codes.transform(x_test)),
        "logistic": (x, x_test),
    }.items():
        rival = LogisticRegression(max_iter=2000).fit(np.concatenate([inputs, z], 1), y)
        found[f"cancer/{name}"] = float(rival.score(np.concatenate([tests, z_test], 1), y_test))
    return found


def _rare(seed: int) -> dict[str, float]:
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from poise.solvers import SupervisedDictionary

    digits = load_digits()
    y = (digits.target == 8).astype(int)
    others, eights = np.flatnonzero(y == 0), np.flatnonzero(y == 1)
    kept = np.random.default_rng(seed).permutation(eights)[: len(others) // 19]
    rows = np.concatenate([others, kept])
    x, x_test, y, y_test = train_test_split(
        digits.data[rows] / 16, y[rows], test_size=0.5, random_state=seed, stratify=y[rows]
    )
    models = {"sdl": SupervisedDictionary(5, xi=0.01, nu=NU), **_rivals(("svd_logistic", "logistic"), 5)}
    found = {}
    for name, model in models.items():
        model.fit(x, y)
        scores, test_scores = (torch.from_numpy(model.predict_proba(a)[:, 1]) for a in (x, x_test))
        threshold = youden_threshold(scores, torch.from_numpy(y))
        found[f"rare/{name}"] = binary_report(test_scores, torch.from_numpy(y_test), threshold).f_score
    return found


CLAIM = Claim(
    number=63,
    statement=(
        "One dictionary that reconstructs features and predicts labels beats factorising first, which is near chance where features and "
        "labels come from different images (MNIST 2, 5 against 4, 7), trades accuracy against reconstruction along a front over xi, "
        "and its lifted solver reaches the global minimum from every start where the objective is well conditioned (L/mu < 3)."
    ),
    expected=(
        "Where the label lies on a third direction the dictionary gains 10 points or more over factorising first and stays within 3 "
        "points of logistic regression on all features; on digits it gains some points; five starts agree to 1e-5 of the objective, "
        "there and on the third direction with a ridge for which L/mu = 2.9."
    ),
    falsified=(
        "No gain over factorising first where bases differ (less than 10 points on the third direction, none on digits), more than 3 "
        "points below logistic regression on the third direction, or starts that differ by more than 1e-5 on digits or where L/mu < 3."
    ),
    run=run,
)
