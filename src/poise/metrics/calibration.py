"""Is the confidence of a classifier worth its face value?

Two questions, two families of numbers, both computed from predictions alone:

- *Calibration*: among the examples that the model is 80 % sure of, are 80 % right? `reliability` bins the examples by
  confidence, `calibration_error` averages the gaps between confidence and accuracy.
- *Ranking*: does the model know which of its answers are wrong? `risk_coverage` answers the most confident share of the
  examples only and reports the error rate (risk) at every share (coverage).

`negative_log_likelihood` and `brier_score` are the two proper scores that mix both with accuracy. All values are
fractions (0.02, not 2 %), all functions are deterministic and free of Python loops over examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import InputError

_CACHED = 1 << 18
"""Numbers in a piece that a core keeps in its cache."""


class Reliability(NamedTuple):
    """One row per confidence bin, float64 `[bins]`; an empty bin has examples 0 and confidence and accuracy NaN."""

    edges: Tensor
    examples: Tensor
    confidence: Tensor
    accuracy: Tensor


class RiskCoverage(NamedTuple):
    """Risk at every coverage: `curve` float64 `[examples]`, its mean `aurc`, `eaurc` what a better ranking saves."""

    curve: Tensor
    aurc: float
    eaurc: float


def reliability(probs: Tensor, labels: Tensor, bins: int = 10) -> Reliability:
    """Bin the examples by the confidence of their prediction and compare confidence with accuracy in every bin.

        bin b = {i : (b-1)/bins < max_k p_ik <= b/bins},   confidence_b = mean p,   accuracy_b = mean 1[argmax p = y]

    Bins are equally wide and half-open, `(lo, hi]`. The edges are rounded to the data type of `probs`, so that a
    float32 probability of 0.3 lies on the edge 0.3 and belongs to the lower bin. Of several equal maxima the first
    class is the prediction.

    Args:
        probs: float `[examples, classes]`, rows on the simplex; or float `[examples]`, the probability of class 1.
        labels: int64 `[examples]`, in `0..classes-1`.
        bins: number of bins, at least 1.
    Returns:
        `Reliability(edges, examples, confidence, accuracy)`.
    Raises:
        InputError: where shapes, types or ranges are not as above.

        >>> table = reliability(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]), bins=2)
        >>> table.examples.tolist(), table.accuracy.tolist()
        ([0.0, 2.0], [nan, 0.5])

    Source: Guo et al. 2017 (arXiv:1706.04599, eq. 2); the bins as in arXiv:2006.12000.
    """
    confidence, correct = _confidence_and_correct(probs, labels)
    edges, which = _bin(confidence, bins)
    count = torch.bincount(which, minlength=bins).double()
    sums = torch.bincount(which, weights=confidence.double(), minlength=bins)
    hits = torch.bincount(which, weights=correct.double(), minlength=bins)
    return Reliability(edges=edges.double(), examples=count, confidence=sums / count, accuracy=hits / count)


def calibration_error(probs: Tensor, labels: Tensor, bins: int = 10, norm: float = 1) -> float:
    """The gap between confidence and accuracy, averaged over confidence bins.

        ( sum_b n_b/n * |accuracy_b - confidence_b|^norm )^(1/norm),      max_b |...| for norm = inf

    `norm=1` is the expected calibration error (ECE), `norm=2` its root mean square, `norm=math.inf` the maximum (MCE).
    Empty bins count nothing.

    Args:
        probs: float `[examples, classes]`, rows on the simplex; or float `[examples]`, the probability of class 1.
        labels: int64 `[examples]`, in `0..classes-1`.
        bins: number of equal bins `(lo, hi]`, at least 1.
        norm: at least 1, or `math.inf`.
    Returns:
        A fraction in `[0, 1]` (0.0184, where tables print 1.84 %).
    Raises:
        InputError: where shapes, types or ranges are not as above.

        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])), 4)
        0.35

    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv:1706.04599, eq. 3); the bins as in arXiv:2006.12000.
    """
    if not norm >= 1:
        raise InputError(f"calibration_error: norm must be at least 1 (or math.inf), got {norm!r}.")
    table = reliability(probs, labels, bins)
    filled = table.examples > 0
    gap = (table.accuracy - table.confidence)[filled].abs()
    if math.isinf(norm):
        return float(gap.max())
    share = table.examples[filled] / table.examples.sum()
    return float((share * gap**norm).sum() ** (1 / norm))


def risk_coverage(confidence: Tensor, correct: Tensor, ties: str = "average") -> RiskCoverage:
    """The error rate among the k most confident examples, for every k, and the area under that curve.

        curve_k = (errors among the k most confident) / k,   aurc = mean_k curve_k,
        eaurc = aurc - 1/n * sum_{i=1..m} i/(n-m+i)          with m errors among n: the aurc of a perfect ranking

    Examples of equal confidence have no order of their own, and saturated classifiers produce many of them.
    `ties="average"` gives the expected curve over all orders of the tied examples (errors spread evenly over the tie),
    so a permutation of the examples changes nothing; `ties="stable"` keeps them in the order in which they came.

    Args:
        confidence: float `[examples]`, any scale, larger is surer; mostly the largest class probability.
        correct: bool (or 0/1) `[examples]`.
        ties: `"average"` or `"stable"`.
    Returns:
        `RiskCoverage(curve, aurc, eaurc)`, fractions (tables often print the areas times 1000).
    Raises:
        InputError: on empty input, different lengths, NaN confidence, or values of `correct` other than 0 and 1.

        >>> curve, aurc, eaurc = risk_coverage(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([True, True, False]))
        >>> [round(risk, 3) for risk in curve.tolist()], round(aurc, 3), round(eaurc, 3)
        ([0.0, 0.0, 0.333], 0.111, 0.0)

    Source: Geifman et al. 2018 (arXiv:1805.08206); E-AURC as computed for the tables of arXiv:2006.12000.
    """
    confidence, correct = _check_ranking(confidence, correct, ties)
    n = len(confidence)
    ordered, order = torch.sort(confidence, descending=True, stable=True)
    wrong = (~correct)[order].double()
    errors = wrong.cumsum(0)
    rank = torch.arange(1, n + 1, dtype=torch.float64, device=errors.device)
    if ties == "average":
        errors = _spread_over_ties(ordered, errors, rank)
    curve = errors / rank
    aurc = float(curve.mean())
    return RiskCoverage(curve=curve, aurc=aurc, eaurc=aurc - _optimal_aurc(n, int(wrong.sum())))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log-probability of the true class.

        mean_i ( log sum_k exp z_ik - z_{i, y_i} )

    Args:
        logits: float `[examples, classes]`; log-probabilities are logits too. Probabilities are not: take their log.
        labels: int64 `[examples]`, in `0..classes-1`.
    Returns:
        Nats per example; `inf` where the model excludes a true class.
    Raises:
        InputError: on wrong shapes, types or label range, or where a logit is NaN or +inf.

        >>> round(negative_log_likelihood(torch.zeros(4, 10), torch.tensor([0, 1, 2, 3])), 4)
        2.3026
    """
    _check_labels("negative_log_likelihood", "logits", logits, labels)
    total = 0.0
    for z, y in _chunks(logits.detach(), labels):
        total += float(F.cross_entropy(z, y, reduction="none").double().sum())
    if math.isnan(total):
        raise InputError("negative_log_likelihood: logits contain NaN or +inf; evaluate a model that has not diverged.")
    return total / len(labels)


def brier_score(probs: Tensor, labels: Tensor) -> float:
    """The mean squared distance between the predicted distribution and the one-hot label.

        mean_i sum_k (p_ik - 1[y_i = k])^2      in [0, 2]; no factor one half

    Args:
        probs: float `[examples, classes]`, rows on the simplex; or float `[examples]`, the probability of class 1.
        labels: int64 `[examples]`, in `0..classes-1`.
    Returns:
        A number in `[0, 2]`.
    Raises:
        InputError: where shapes, types or ranges are not as above.

        >>> round(brier_score(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])), 4)
        0.37
    """
    probs = _two_columns(probs)
    _check_labels("brier_score", "probs", probs, labels)
    total = 0.0
    for p, y in _chunks(probs.detach(), labels):
        _check_rows("brier_score", p)
        # sum_k (p_k - 1[y=k])^2 = sum_k p_k^2 - 2 p_y + 1, without a one-hot matrix
        total += float((torch.linalg.vecdot(p, p) - 2 * p.gather(1, y[:, None]).squeeze(1) + 1).double().sum())
    return total / len(labels)


def _confidence_and_correct(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    probs = _two_columns(probs)
    _check_labels("calibration_error", "probs", probs, labels)
    confidences, hits = [], []
    for p, y in _chunks(probs.detach(), labels):
        _check_rows("calibration_error", p)
        prediction = _argmax(p)
        confidences.append(p.gather(1, prediction[:, None]).squeeze(1))
        hits.append(prediction == y)
    return torch.cat(confidences).to(probs.dtype), torch.cat(hits)


def _chunks(scores: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows in pieces that stay in the cache while they are read several times; half precision comes as float32."""
    rows = max(1, (_CACHED if scores.device.type == "cpu" else _CACHED << 8) // scores.shape[1])
    for piece, y in zip(torch.split(scores, rows), torch.split(labels, rows), strict=True):
        yield (piece.float() if piece.dtype.itemsize < 4 else piece), y


def _argmax(rows: Tensor) -> Tensor:
    """The first of the largest entries of each row; on the CPU by NumPy, whose argmax is vectorised and PyTorch's is not."""
    return torch.from_numpy(np.argmax(rows.numpy(), axis=1)) if rows.device.type == "cpu" else rows.argmax(dim=1)


def _bin(confidence: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Edges in the type of the data and the 0-based bin of every example, `(lo, hi]`."""
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise InputError(f"calibration_error: bins must be a whole number of at least 1, got {bins!r}.")
    # bucketize wants float32 or float64; every half-precision value is one of float32's
    wide = torch.promote_types(confidence.dtype, torch.float32)
    edges = (torch.arange(bins + 1, dtype=torch.float64, device=confidence.device) / bins).to(confidence.dtype).to(wide)
    which = torch.bucketize(confidence.to(wide), edges[1:-1])
    return edges, which


def _spread_over_ties(ordered: Tensor, errors: Tensor, rank: Tensor) -> Tensor:
    """Expected cumulative errors when tied examples come in random order: linear between the ends of each tie."""
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    if bool(last.all()):
        return errors
    ends = last.nonzero().squeeze(1)
    size = torch.diff(ends, prepend=ends.new_full((1,), -1))
    at_end = errors[ends]
    in_tie = torch.diff(at_end, prepend=at_end.new_zeros(1))
    group = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), size)
    left = (ends[group] + 1) - rank  # places from here to the end of the tie
    return at_end[group] - left * (in_tie / size)[group]


def _optimal_aurc(n: int, errors: int) -> float:
    """The area when every error comes after every correct answer: 1/n * sum_{i=1..m} i/(n-m+i)."""
    i = torch.arange(1, errors + 1, dtype=torch.float64)
    return float((i / (n - errors + i)).sum() / n)


def _check_ranking(confidence: Tensor, correct: Tensor, ties: str) -> tuple[Tensor, Tensor]:
    if ties not in ("average", "stable"):
        raise InputError(f'risk_coverage: ties must be "average" or "stable", got {ties!r}.')
    if confidence.dim() != 1 or not confidence.is_floating_point() or confidence.shape != correct.shape:
        raise InputError(
            "risk_coverage: expected confidence float [examples] and correct bool [examples] of one length, got "
            f"{_describe(confidence)} and {_describe(correct)}."
        )
    if len(confidence) == 0:
        raise InputError("risk_coverage: there are no examples; give at least one.")
    if bool(torch.isnan(confidence).any()):
        raise InputError("risk_coverage: confidence contains NaN, which has no place in a ranking.")
    if correct.dtype != torch.bool:
        if not bool(((correct == 0) | (correct == 1)).all()):
            raise InputError("risk_coverage: correct must be bool, or hold only 0 and 1.")
        correct = correct.bool()
    return confidence.detach(), correct.detach()


def _two_columns(probs: Tensor) -> Tensor:
    """The binary form `[examples]`, the probability of class 1, as `[examples, 2]`."""
    return torch.stack([1 - probs, probs], dim=1) if probs.dim() == 1 and probs.is_floating_point() else probs


def _check_rows(what: str, probs: Tensor) -> None:
    low, high = (float(end) for end in torch.aminmax(probs))
    # half-precision softmax rows miss 1 by about classes * 2^-11; anything past a hundredth is not a distribution
    off = float((probs.sum(dim=1) - 1).abs().max())
    if not (low >= 0 and high <= 1 and off <= 1e-2):
        raise InputError(
            f"{what}: every row of probs must be a distribution (values in [0, 1], sum 1); values lie in "
            f"[{low:.4g}, {high:.4g}] and a row misses the sum 1 by {off:.3g}. For logits z, give z.softmax(-1)."
        )


def _check_labels(what: str, name: str, scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or not scores.is_floating_point() or labels.dim() != 1 or len(labels) != len(scores):
        raise InputError(
            f"{what}: expected {name} float [examples, classes] and labels int64 [examples] of one length, got "
            f"{_describe(scores)} and {_describe(labels)}."
        )
    if labels.dtype != torch.int64:
        raise InputError(f"{what}: labels must be int64 class indices, got {_describe(labels)}.")
    if scores.numel() == 0:
        raise InputError(f"{what}: there are no examples; give at least one.")
    low, high = torch.aminmax(labels)
    if int(low) < 0 or int(high) >= scores.shape[1]:
        raise InputError(
            f"{what}: labels must lie in 0..{scores.shape[1] - 1} for {scores.shape[1]} classes, "
            f"got {int(low)}..{int(high)}."
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
