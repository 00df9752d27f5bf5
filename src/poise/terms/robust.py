"""Classification losses that tolerate wrong labels by their shape alone: no memory, no second network.

All four start from `p = softmax(logits)` and the given, possibly wrong, label `y`, and differ in how much a confident disagreement costs:

    bootstrap                  -log p_y where the label is partly replaced by the model's own opinion
    generalized_cross_entropy  (1 - p_y^q) / q       between cross-entropy (q -> 0) and the mean absolute error (q = 1)
    symmetric_cross_entropy    alpha * cross-entropy + beta * (cross-entropy with p and y exchanged)
    forward_correction         -log of the probability of the *wrong* label, p pushed through the known noise process

They are the baselines of early-learning regularisation (`poise.terms.early_learning`), and useful on their own where a per-example memory
is out of the question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from poise.errors import InputError, QuantityError
from poise.objective import Term

__all__ = ["Bootstrap", "ForwardCorrection", "GeneralizedCrossEntropy", "SymmetricCrossEntropy", "estimate_transition"]

_CLASSES = {"logits": "float [batch, classes]", "target": "int64 [batch]"}


def _label_log_probability(logits: Tensor, target: Tensor) -> Tensor:
    """`log p_y` of each row."""
    return -functional.cross_entropy(logits, target, reduction="none")


class Bootstrap(Term):
    """Cross-entropy to a mixture of the given label and the model's own prediction.

    soft:  - sum_k [beta y_k + (1 - beta) p_k] log p_k         = beta CE + (1 - beta) entropy(p)
    hard:  - sum_k [beta y_k + (1 - beta) z_k] log p_k,  z = onehot(argmax p)

    The gradient flows through both places of `p`; the soft form is therefore cross-entropy with minimum-entropy regularisation, as its
    authors note.

    Args:
        beta: trust in the given label, in [0, 1]; the paper uses 0.95 for the soft form and 0.8 for the hard one.
        hard: use the most probable class instead of the probabilities.

    Reads: `logits` float [batch, classes]; `target` int64 [batch]. Returns float [batch], nats, >= 0.

    Example:
        >>> Bootstrap(beta=1.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])

    Source: Reed et al. 2014, arXiv:1412.6596, eq. 6-7.
    """

    expects = _CLASSES
    source: ClassVar[str] = "arXiv:1412.6596, eq. 6-7"
    equation: ClassVar[str] = "-sum_k (beta y_k + (1 - beta) p_k) log p_k"

    def __init__(self, beta: float = 0.95, hard: bool = False) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise InputError(f"bootstrap: beta is the trust in the given label, in [0, 1]; got {beta}.")
        self.beta = beta
        self.hard = hard

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = functional.log_softmax(logits, dim=-1)
        label = -_label_log_probability(logits, target)
        own = -log_p.amax(dim=-1) if self.hard else -(log_p.exp() * log_p).sum(dim=-1)
        return self.beta * label + (1 - self.beta) * own


class GeneralizedCrossEntropy(Term):
    """Box-Cox loss between cross-entropy and mean absolute error, optionally truncated.

    (1 - p_y^q) / q,          and constant (1 - k^q) / q where p_y <= k = truncate

    Its gradient is that of cross-entropy times `p_y^q`: an example that the model disbelieves pulls less.

    Args:
        q: 0 is cross-entropy, 1 is half the absolute error between `p` and `y`; in [0, 1]. The paper uses 0.7.
        truncate: the probability `k` below which an example has no gradient at all; in [0, 1), 0 is off. The paper uses 0.5.

    Reads: `logits` float [batch, classes]; `target` int64 [batch]. Returns float [batch], >= 0 (nats where q = 0).

    Example:
        >>> GeneralizedCrossEntropy(q=1.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.5000])

    Source: Zhang and Sabuncu 2018, arXiv:1805.07836, eq. 6 and 9. The paper's pruning (weights refreshed every tenth epoch) minimises the
    same truncated loss by alternation; here the truncation acts at once.
    """

    expects = _CLASSES
    source: ClassVar[str] = "arXiv:1805.07836, eq. 6 and 9"
    equation: ClassVar[str] = "(1 - p_y^q) / q"

    def __init__(self, q: float = 0.7, truncate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= q <= 1:
            raise InputError(
                f"generalized_cross_entropy: q lies in [0, 1] (0: cross-entropy, 1: absolute error); got {q}."
            )
        if not 0 <= truncate < 1:
            raise InputError(f"generalized_cross_entropy: truncate is a probability in [0, 1); got {truncate}.")
        self.q = q
        self.truncate = truncate

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = _label_log_probability(logits, target)
        if self.truncate > 0:
            log_p = log_p.clamp(min=math.log(self.truncate))
        if self.q == 0:
            return -log_p
        # expm1 keeps the digits that 1 - p^q loses where p is close to 1.
        return -torch.expm1(self.q * log_p) / self.q


class SymmetricCrossEntropy(Term):
    """Cross-entropy plus reverse cross-entropy, in which label and prediction exchange places.

    alpha * (-log p_y) + beta * (-A) (1 - p_y),          A = log_zero stands for log 0

    Args:
        alpha: weight of cross-entropy, >= 0 (0.1 on CIFAR-10, 6 on CIFAR-100).
        beta: weight of reverse cross-entropy, >= 0 (1 on CIFAR-10, 0.1 on CIFAR-100).
        log_zero: the value `A` < 0 that replaces log 0 of the one-hot label. The authors name -4; their code clips the label at 1e-4, which
            is -9.21.

    Reads: `logits` float [batch, classes]; `target` int64 [batch]. Returns float [batch], >= 0.

    Example:
        >>> SymmetricCrossEntropy(alpha=0.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor([2.])

    Source: Wang et al. 2019, arXiv:1908.06112, eq. 5-7; settings: YisenWang/symmetric_cross_entropy_for_noisy_labels and its issue 5.
    """

    expects = _CLASSES
    source: ClassVar[str] = "arXiv:1908.06112, eq. 5-7"
    equation: ClassVar[str] = "alpha (-log p_y) + beta (-A) (1 - p_y)"

    def __init__(self, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0) -> None:
        super().__init__()
        if alpha < 0 or beta < 0:
            raise InputError(
                f"symmetric_cross_entropy: alpha and beta are weights >= 0; got alpha={alpha}, beta={beta}."
            )
        if log_zero >= 0:
            raise InputError(f"symmetric_cross_entropy: log_zero stands for log 0 and is negative; got {log_zero}.")
        self.alpha = alpha
        self.beta = beta
        self.log_zero = log_zero

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = _label_log_probability(logits, target)
        one_minus_p = -torch.expm1(log_p)
        return self.alpha * -log_p + self.beta * -self.log_zero * one_minus_p


class ForwardCorrection(Term):
    """Cross-entropy of the *noisy* label under the known noise process, so that `p` itself learns the clean label.

    -log sum_k p_k T[k, y],          T[k, j] = P(given label j | true label k)

    Args:
        transition: the matrix `T` as nested tuples, rows sum to 1 (a tensor is accepted too). Left out, `noise` and `kind` make it.
        noise: share of wrong labels, in [0, 1), for a matrix made from `kind`.
        kind: `"symmetric"`: a wrong label is uniform over the other classes; `"pair"`: class c becomes c + 1 (the last one the first).

    Reads: `logits` float [batch, classes]; `target` int64 [batch]. Returns float [batch], nats, >= 0.

    Raises:
        InputError: rows that do not sum to 1, negative entries, or a label that no class can produce.
        QuantityError: `T` has another number of classes than `logits`.

    Example:
        >>> ForwardCorrection(transition=((0.5, 0.5), (0.0, 1.0)))(torch.zeros(1, 2), torch.tensor([0]))
        tensor([1.3863])

    Source: Patrini et al. 2017, arXiv:1609.03683, theorem 2. `estimate_transition` gives `T` when it is unknown.
    """

    expects = _CLASSES
    source: ClassVar[str] = "arXiv:1609.03683, theorem 2"
    equation: ClassVar[str] = "-log sum_k p_k T[k, y]"

    def __init__(
        self,
        transition: Sequence[Sequence[float]] | Tensor | None = None,
        noise: float = 0.0,
        kind: Literal["symmetric", "pair"] = "symmetric",
    ) -> None:
        super().__init__()
        if not 0 <= noise < 1:
            raise InputError(f"forward_correction: noise is the share of wrong labels, in [0, 1); got {noise}.")
        if kind not in ("symmetric", "pair"):
            raise InputError(
                f"forward_correction: kind is 'symmetric' or 'pair'; got {kind!r}. For other noise give transition=..."
            )
        self.transition = transition
        self.noise = noise
        self.kind = kind
        self._matrix = None if transition is None else _checked(torch.as_tensor(transition, dtype=torch.float64))
        self._log_matrix: Tensor | None = None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        into_label = self._log_transition(logits).t()[target]  # log T[k, y] for every true class k: [batch, classes]
        return -torch.logsumexp(functional.log_softmax(logits, dim=-1) + into_label, dim=-1)

    def _log_transition(self, logits: Tensor) -> Tensor:
        """`log T` beside the logits, in their dtype; made once, because the arguments alone decide it."""
        known = self._log_matrix
        if known is None or known.dtype != logits.dtype or known.device != logits.device:
            matrix = self._matrix
            if matrix is None:
                matrix = _simple_transition(logits.shape[-1], self.noise, self.kind)
            self._log_matrix = known = matrix.log().to(logits)
        if known.shape[0] != logits.shape[-1]:
            raise QuantityError(
                f"forward_correction: the transition matrix is for {known.shape[0]} classes, but logits have {logits.shape[-1]}."
            )
        return known


def _simple_transition(classes: int, noise: float, kind: str) -> Tensor:
    identity = torch.eye(classes, dtype=torch.float64)
    wrong = identity.roll(1, dims=1) if kind == "pair" else (1 - identity) / (classes - 1)
    return (1 - noise) * identity + noise * wrong


def _checked(matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(
            f"forward_correction: transition is a square matrix [classes, classes]; got shape {list(matrix.shape)}."
        )
    sums = matrix.sum(dim=1)
    if bool((matrix < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
        raise InputError(
            "forward_correction: transition[k, j] is the probability of label j for true class k; entries are >= 0 and each row sums to 1; "
            f"the row sums are {[round(value, 4) for value in sums.tolist()]}."
        )
    impossible = (matrix.sum(dim=0) == 0).nonzero().flatten().tolist()
    if impossible:
        raise InputError(
            f"forward_correction: no true class can produce label {impossible[0]}, whose loss would be infinite."
        )
    return matrix


def estimate_transition(probabilities: Tensor, quantile: float = 0.97) -> Tensor:
    """Estimate the noise process from a model fitted to the noisy labels, by its most confident example of each class.

    T[k, j] = p_j(x_k),          x_k: the example whose p_k stands at the given quantile

    Args:
        probabilities: float [n, classes], the predictions of a model trained on the noisy labels; rows sum to 1.
        quantile: 1 takes the most confident example (the estimator as stated); the authors' experiments take 0.97, against outliers, except
            on CIFAR-100, where a class has too few examples for that.

    Returns:
        float [classes, classes]; rows sum to 1.

    Raises:
        InputError: another shape, or a quantile outside (0, 1].

    Example:
        >>> estimate_transition(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), quantile=1.0)
        tensor([[0.9000, 0.1000],
                [0.2000, 0.8000]])

    Source: Patrini et al. 2017, arXiv:1609.03683, eq. 12-13.
    """
    if probabilities.ndim != 2 or probabilities.shape[0] == 0:
        raise InputError(
            f"estimate_transition: probabilities are float [n, classes]; got shape {list(probabilities.shape)}."
        )
    if not 0 < quantile <= 1:
        raise InputError(f"estimate_transition: quantile lies in (0, 1]; got {quantile}.")
    rank = math.ceil(quantile * probabilities.shape[0]) - 1
    anchors = probabilities.argsort(dim=0)[rank]
    rows = probabilities[anchors]
    return rows / rows.sum(dim=1, keepdim=True)
