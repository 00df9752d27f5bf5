"""The terms that everybody knows: losses of supervised learning, one value for each example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from poise import datafits
from poise.coefficient import Number, Tuned
from poise.datafits import Datafit
from poise.errors import InputError
from poise.objective import Term, Value

_CLASSES = {"logits": "float [batch, classes]", "target": "int64 [batch] | float [batch, classes]"}
_FORMS = "float [batch] | float [batch, outputs] | float [batch, channels, height, width]"
_NUMBERS = {"prediction": _FORMS, "target": _FORMS}


class CrossEntropy(Term):
    """Cross-entropy of the softmax with class indices or class probabilities: `-log p[target]`.

    Reads `logits` float `[batch, classes]` and `target` int64 `[batch]` or probabilities `[batch, classes]`; values in nats, >= 0.

    >>> CrossEntropy()(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """

    formula = "cross_entropy"
    equation = "-log softmax(logits)[target]"
    expects = _CLASSES

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def datafit(self, target: Tensor, classes: int | None = None) -> Datafit:
        """Return the fit that solvers with structure minimise; two classes are met with one logit, as in logistic regression."""
        number = classes if classes is not None else int(target.max()) + 1
        return datafits.Logistic() if number <= 2 else datafits.Multinomial(number)


class ErrorRate(Term):
    """1 where the most likely class is not the target, else 0.

    It has no gradient, so a weight before it moves nothing: it is there to be measured, as in
    `constraint(cross_entropy, measured=error_rate, upper=0.05)`. Reads what `CrossEntropy` reads.

    >>> ErrorRate()(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([0., 1.])
    """

    formula = "error_rate"
    equation = "[argmax logits != target]"
    expects = _CLASSES

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        classes = target.argmax(-1) if target.is_floating_point() else target
        return (logits.argmax(-1) != classes).to(logits.dtype)


class LabelSmoothing(Term):
    """Cross-entropy with targets smoothed towards uniform: `-sum_c ((1-epsilon) [c=target] + epsilon/C) log p_c`.

    Args:
        epsilon: share of the uniform distribution, in [0, 1]; or a `Hyperparameter` that a policy tunes.

    Source: Szegedy et al., arXiv:1512.00567.
    """

    formula = "label_smoothing"
    equation = "-sum_c ((1-epsilon) y_c + epsilon/C) log p_c"
    source = "arXiv:1512.00567"
    expects = _CLASSES

    def __init__(self, epsilon: float | Tuned = 0.1) -> None:
        super().__init__()
        if isinstance(epsilon, Number) and not 0 <= epsilon <= 1:
            raise InputError(f"label_smoothing: epsilon must lie in [0, 1], and it is {epsilon}.")
        self.epsilon = epsilon

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.epsilon, Number):
            return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.epsilon)
        plain, uniform = F.cross_entropy(logits, target, reduction="none"), -logits.log_softmax(-1).mean(-1)
        return plain + self.epsilon.read(plain) * (uniform - plain)


class Focal(Term):
    """Cross-entropy that cares less about what is already right: `-(1 - p[target])^gamma log p[target]`.

    Args:
        gamma: focusing exponent, >= 0; 0 is cross-entropy.

    Source: Lin et al., arXiv:1708.02002, eq. 4 without alpha.
    """

    formula = "focal"
    equation = "-(1 - p[target])^gamma log p[target]"
    source = "arXiv:1708.02002, eq. 4"
    expects = {"logits": "float [batch, classes]", "target": "int64 [batch]"}

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if gamma < 0:
            raise InputError(f"focal: gamma must be >= 0, and it is {gamma}.")
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, target, reduction="none")
        return (-torch.expm1(-loss)).pow(self.gamma) * loss


class ConfidencePenalty(Term):
    """Negative entropy of the prediction, to be charged with a positive weight: `sum_c p_c log p_c`.

    Reads `logits` float `[batch, classes]`; values in `[-log C, 0]` nats. Source: Pereyra et al., arXiv:1701.06548.
    """

    formula = "confidence_penalty"
    equation = "sum_c p_c log p_c"
    source = "arXiv:1701.06548"
    bounded_below = False

    def forward(self, logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)


class KL(Term):
    """Reverse divergence from a teacher's distribution: `KL(p || q) = sum_c p_c (log p_c - log q_c)`.

    Reads `logits` (p) and `teacher_logits` (q), both float `[batch, classes]`; no gradient flows into the teacher. Values in nats, >= 0.
    """

    formula = "kl"
    equation = "sum_c p_c (log p_c - log q_c)"

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        log_p, log_q = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class Mixup(Term):
    """Cross-entropy at mixed inputs: `l CE(f(x~), y) + (1-l) CE(f(x~), y_perm)`, `x~ = l x + (1-l) x_perm`, `l ~ Beta(a, a)`.

    Reads `input`, `target` int64 `[batch]` and `model`; draws one `l` for the batch and one permutation. Costs one forward pass more.

    Args:
        a: both parameters of the Beta distribution, positive.

    Source: Zhang et al., arXiv:1710.09412.
    """

    formula = "mixup"
    equation = "l CE(f(x~), y) + (1-l) CE(f(x~), y'), x~ = l x + (1-l) x', l ~ Beta(a, a)"
    source = "arXiv:1710.09412"
    stochastic = True
    capabilities = frozenset({"per_example", "potential"})
    expects = {"input": "float [batch, ...]", "target": "int64 [batch]"}

    def __init__(self, a: float = 0.2) -> None:
        super().__init__()
        if a <= 0:
            raise InputError(f"mixup: a must be positive, and it is {a}.")
        self.a = a

    def forward(self, input: Tensor, target: Tensor, model: object) -> Value:
        share = torch.distributions.Beta(self.a, self.a).sample().to(input)
        order = torch.randperm(len(input)).to(input.device)
        logits = model(share * input + (1 - share) * input[order])  # type: ignore[operator]
        loss = share * F.cross_entropy(logits, target, reduction="none")
        loss = loss + (1 - share) * F.cross_entropy(logits, target[order], reduction="none")
        return Value(loss, extras={"logits": logits, "share": share})


class SquaredError(Term):
    """Half the squared error, summed over outputs: `1/2 (prediction - target)^2`.

    The factor one half makes the gradient `prediction - target`. Reads `prediction` and `target`, float `[batch]` or `[batch, outputs]`.
    """

    formula = "squared_error"
    equation = "1/2 ||prediction - target||^2"
    expects = _NUMBERS

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction - target
        return 0.5 * (error * error).flatten(1).sum(-1) if error.ndim > 1 else 0.5 * error * error

    def datafit(self, target: Tensor, classes: int | None = None) -> Datafit:
        """Return the fit that solvers with structure minimise."""
        return datafits.LeastSquares()


class LeastSquares(SquaredError):
    """The same values as `squared_error`, under the name that solvers with structure look for."""

    formula = "least_squares"


class AbsoluteError(Term):
    """Absolute error, summed over outputs: `|prediction - target|`."""

    formula = "absolute_error"
    equation = "||prediction - target||_1"
    expects = _NUMBERS

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target).abs()
        return error.flatten(1).sum(-1) if error.ndim > 1 else error


class Huber(Term):
    """Squared near zero, straight beyond `delta`: `e^2/2` where `|e| <= delta`, else `delta (|e| - delta/2)`.

    Args:
        delta: where it turns straight, in units of the target, positive.

    Source: Huber (1964).
    """

    formula = "huber"
    equation = "e^2/2 where |e| <= delta, else delta (|e| - delta/2)"
    source = "Huber (1964)"
    expects = _NUMBERS

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        if delta <= 0:
            raise InputError(f"huber: delta must be positive, and it is {delta}.")
        self.delta = delta

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = F.huber_loss(prediction, target, reduction="none", delta=self.delta)
        return loss.flatten(1).sum(-1) if loss.ndim > 1 else loss

    def datafit(self, target: Tensor, classes: int | None = None) -> Datafit:
        """Return the fit that solvers with structure minimise."""
        return datafits.Huber(self.delta)
