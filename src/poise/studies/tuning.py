"""The trials of a search: quasi-random points on log scales, the same learning rates for every formula.

The points are Sobol's sequence, shifted modulo 1 by a vector drawn from the seed (a Cranley-Patterson rotation). The
first coordinate is the learning rate and the others the `auto` weights in their order. Since both the sequence and
the shift are nested in the dimension, trial `i` of seed `s` has the same learning rate for every formula, however
many weights it
has: no formula gets luckier learning rates than another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """One point of the search: a learning rate and a value for every `auto` weight by name."""

    number: int
    lr: float
    weights: dict[str, float]


def trials(
    ranges: Mapping[str, tuple[float, float]],
    *,
    count: int,
    seed: int,
    lr: float,
    lr_factor: float,
) -> list[Trial]:
    """Return the trials of one formula on one seed.

        lr_i     = lr * lr_factor^(2 u_i0 - 1)
        w_ik     = low_k * (high_k / low_k)^u_ik

    Trial 0 keeps the learning rate `lr` itself (its weights are the middle of their range on the log scale), so a
    search never loses to not searching by leaving the default out.

    Args:
        ranges: lowest and highest value of each `auto` weight, above 0; may be empty, then only the learning rate is
            searched.
        count: number of trials, at least 1.
        seed: the study's seed to which the search belongs.
        lr, lr_factor: centre of the learning rate and its largest factor up and down.

    >>> [round(trial.lr, 4) for trial in trials({}, count=3, seed=0, lr=0.1, lr_factor=10)]
    [0.1, 0.0188, 0.0594]

    Source: Sobol, USSR Computational Mathematics and Mathematical Physics 7 (1967); Cranley and Patterson, SIAM
    Journal on Numerical Analysis 13 (1976).
    """
    points = _rotated_sobol(count, 1 + len(ranges), seed)
    found = []
    for number, (first, *rest) in enumerate(points):
        rate = lr * lr_factor ** (2 * first - 1)
        weights = {name: low * (high / low) ** u for (name, (low, high)), u in zip(ranges.items(), rest, strict=True)}
        found.append(Trial(number, _rounded(rate), {name: _rounded(value) for name, value in weights.items()}))
    return found


def _rotated_sobol(count: int, dimensions: int, seed: int) -> list[list[float]]:
    import numpy as np
    from scipy.stats import qmc

    exponent = max(1, math.ceil(math.log2(count + 1)))
    sequence = qmc.Sobol(dimensions, scramble=False).random_base2(exponent)
    # One generator per coordinate keeps the shift of a coordinate independent of how many there are.
    shift = [np.random.default_rng([seed, coordinate]).random() for coordinate in range(dimensions)]
    rotated = (sequence + np.asarray(shift)) % 1.0
    # The sequence's first point, the origin, carries no information after the shift; the centre takes its place.
    rotated[0] = 0.5
    points: list[list[float]] = rotated[:count].tolist()
    return points


def _rounded(value: float) -> float:
    # Four digits: a weight that people can read, and that a formula's text gives back exactly.
    return float(f"{value:.4g}")


def rungs(trials_: int, *, halving: int, count: int) -> list[tuple[int, float]]:
    """Return the plan of successive halving: how many trials run at each rung, and with which share of the budget.

        survivors_r = max(1, ceil(trials / halving^r)),      share_r = halving^-(count - 1 - r)

    >>> rungs(10, halving=3, count=3)
    [(10, 0.1111111111111111), (4, 0.3333333333333333), (2, 1.0)]

    Source: Jamieson and Talwalkar, arXiv:1502.07943, algorithm 1, with trials started anew on each rung.
    """
    return [(max(1, math.ceil(trials_ / halving**rung)), float(halving) ** (rung + 1 - count)) for rung in range(count)]
