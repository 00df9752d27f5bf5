"""Objectives of unsupervised domain adaptation: labels on a source domain, none on the target where the model will be used.

    source_classification + domain_adversarial(dim=64) + target_classification(classes=10, dim=64)

Every term reads one batch of both domains and `domain`, the number of each example's domain, -1 for the unlabelled target. What is
charged on some rows only is counted on these rows only, so micro-batches add up to the big batch.

Discriminators are parameters of the terms: they descend on the value while the features ascend, through a gradient that changes
its sign on the way back and grows over the first steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.objective import Term, Value
from poise.quantities import derive

__all__ = [
    "BayesRefiner",
    "ConditionalDomainAdversarial",
    "DomainAdversarial",
    "MarginDisparity",
    "MutualInformation",
    "SourceClassification",
    "TargetClassification",
    "refined_log_probabilities",
    "reverse_gradient",
]

Refining = Literal["bayes", "code", "none"]
_ROWS = {
    "logits": "float [batch, classes]",
    "frozen_head_logits": "float [batch, classes]",
    "features": "float [batch, width]",
    "target": "int64 [batch]",
    "domain": "int64 [batch]",
}


# ---- gradient reversal ----------------------------------------------------------------------------------------------


class _Reversal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, strength: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradient, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return `x`, and on the way back `-strength` times the gradient.

    >>> x = torch.ones(2, requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward(); x.grad
    tensor([-0.5000, -0.5000])
    """
    reversed_: Tensor = _Reversal.apply(x, strength)  # type: ignore[no-untyped-call]
    return reversed_


class _Aligning(Term):
    """A term with a player of its own, whom the features oppose."""

    # No "potential": behind the reversal the gradient is not that of the value.
    capabilities = frozenset({"per_example", "deterministic"})
    expects: ClassVar[dict[str, str]] = _ROWS

    def __init__(self, warmup: float, strength: float) -> None:
        super().__init__()
        if warmup < 0 or not 0 < strength < math.inf:
            raise InputError(
                f"{self.formula}: warmup is a number of steps, >= 0, and strength positive; got {warmup} and {strength}."
            )
        self.warmup, self.strength = warmup, strength

    def reversal(self, step: int) -> float:
        """Return how strongly the features oppose at a step: `strength (2 / (1 + exp(-step/warmup)) - 1)`."""
        return self.strength * (math.tanh(step / self.warmup / 2) if self.warmup else 1.0)


class DomainAdversarial(_Aligning):
    """Train features from which no discriminator can tell the domains apart (DANN).

    -[domain >= 0] log D(f) - [domain < 0] log(1 - D(f)),     features receive -lambda times its gradient,
    lambda = 2 / (1 + exp(-step/warmup)) - 1

    The discriminator D descends on the value, the features ascend. Over as many source as target rows the mean is the mean of
    both domains' cross-entropies; at log 2 = 0.69 the discriminator knows nothing.

    Args:
        dim: width of the features.
        hidden: widths of the discriminator's layers; the authors add batch normalisation, which is left out here since a forward
            pass moves nothing.
        warmup: steps over which the reversal grows; 0 for full strength at once. The authors: 1,000 of 30,000.
        strength: largest reversal.
        seed: of the discriminator's first weights.
        discriminator: a module from features [batch, dim] to a logit [batch, 1] in place of the built one.

    Reads: `features` float [batch, dim]; `domain` int64 [batch], negative for the target domain; `step`.
    Returns: float [batch], nats, >= 0; publishes `domain_logit` [batch], high for the source.

    Raises:
        InputError: an argument out of range.
        QuantityError: features of another width.

    Example:
        >>> term = DomainAdversarial(dim=3, hidden=(8,))
        >>> term(torch.zeros(2, 3), torch.tensor([0, -1]), step=0).values.shape
        torch.Size([2])

    Source: Ganin et al., arXiv:1505.07818; the warm-up of arXiv:2112.04137, as in BIT-DA/ParetoDA.
    """

    formula = "domain_adversarial"
    equation: ClassVar[str] = "-[source] log D(f) - [target] log(1 - D(f)), features ascend"
    source: ClassVar[str] = "arXiv:1505.07818"

    def __init__(
        self,
        dim: int = 256,
        hidden: Sequence[int] = (1024, 1024),
        warmup: float = 1000,
        strength: float = 1.0,
        seed: int = 0,
        discriminator: nn.Module | None = None,
    ) -> None:
        super().__init__(warmup, strength)
        self.dim, self.hidden, self.seed = dim, tuple(hidden), seed
        self.discriminator = discriminator
        self.built = _network(self.formula, (dim, *hidden, 1), seed) if discriminator is None else None

    def forward(self, features: Tensor, domain: Tensor, step: int) -> Value:
        _require_width(self, features)
        discriminator = self.discriminator if self.built is None else self.built
        assert discriminator is not None
        logit = discriminator(reverse_gradient(features, self.reversal(step))).squeeze(-1)
        return Value(_domain_loss(logit, domain), extras={"domain_logit": logit})


class ConditionalDomainAdversarial(_Aligning):
    """Train features whose product with the prediction tells no domain (CDAN): alignment within classes.

    As `domain_adversarial`, with D reading `f p'` (the outer product, p without gradient) in the place of f, or from
    `random` entries on a random multilinear map `(R_f f) * (R_p p) / sqrt(random)`.

    Args:
        dim, hidden, warmup, strength, seed: as in `domain_adversarial`.
        classes: number of classes.
        random: width of the random map; 0 for the exact outer product of dim x classes entries.
        entropy: weigh each example by `1 + exp(-H(p))`, scaled to mean 1 over the batch (CDAN+E).

    Reads: `features` float [batch, dim]; `logits` float [batch, classes]; `domain` int64 [batch]; `step`.
    Returns: float [batch], nats, >= 0; publishes `domain_logit` [batch].
    State: `feature_map`, `class_map` where `random` is given.

    Source: Long et al., arXiv:1705.10667.
    """

    formula = "conditional_domain_adversarial"
    equation: ClassVar[str] = "-[source] log D(f p') - [target] log(1 - D(f p')), features ascend"
    source: ClassVar[str] = "arXiv:1705.10667"
    feature_map: Tensor | None
    class_map: Tensor | None

    def __init__(
        self,
        dim: int = 256,
        classes: int = 10,
        hidden: Sequence[int] = (1024, 1024),
        warmup: float = 1000,
        strength: float = 1.0,
        random: int = 0,
        entropy: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(warmup, strength)
        self.dim, self.classes, self.hidden, self.seed = dim, classes, tuple(hidden), seed
        self.random, self.entropy = random, entropy
        if entropy:
            self.couples = ("logits",)  # type: ignore[misc]  # the weights are scaled over the batch
        width = random or dim * classes
        self.discriminator = _network(self.formula, (width, *hidden, 1), seed)
        generator = torch.Generator().manual_seed(derive(seed, self.formula, "map"))
        for name, rows in (("feature_map", dim), ("class_map", classes)):
            self.register_buffer(name, torch.randn(rows, random, generator=generator) if random else None)

    def forward(self, features: Tensor, logits: Tensor, domain: Tensor, step: int) -> Value:
        _require_width(self, features)
        log_p = logits.detach().log_softmax(-1)
        p, f = log_p.exp(), reverse_gradient(features, self.reversal(step))
        if self.feature_map is not None and self.class_map is not None:
            joint = (f @ self.feature_map.to(f)) * (p @ self.class_map.to(p)) / math.sqrt(self.random)
        else:
            joint = (f[:, :, None] * p[:, None, :]).flatten(1)
        logit = self.discriminator(joint).squeeze(-1)
        values = _domain_loss(logit, domain)
        if self.entropy:
            sure = 1 + (p * log_p).sum(-1).exp()  # 1 + exp(-H)
            values = values * sure / sure.mean()
        return Value(values, extras={"domain_logit": logit})


class MarginDisparity(_Aligning):
    """Train features on which no second head can agree with the model on the source and disagree on the target (MDD).

    2 [source] margin CE(h'(f), y^) - 2 [target] log(1 - softmax(h'(f))_y^),     y^ = argmax of the model's logits

    The second head h' descends on the value, the features ascend. The factor 2 makes the mean over as many source as target rows
    the sum of both domains' means, as published.

    Args:
        dim, hidden, warmup, seed: as in `domain_adversarial`, of the second head.
        classes: number of classes.
        margin: weight of the source, gamma, >= 1.
        strength: largest reversal, 0.1 for the authors.

    Reads: `features` float [batch, dim]; `logits` float [batch, classes], without gradient; `domain` int64 [batch]; `step`.
    Returns: float [batch], nats, >= 0.

    Source: Zhang et al., arXiv:1904.05801.
    """

    formula = "margin_disparity"
    equation: ClassVar[str] = "2 [source] margin CE(h'(f), y^) - 2 [target] log(1 - p'_y^), features ascend"
    source: ClassVar[str] = "arXiv:1904.05801"

    def __init__(
        self,
        dim: int = 256,
        classes: int = 10,
        hidden: Sequence[int] = (1024,),
        margin: float = 4.0,
        warmup: float = 1000,
        strength: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(warmup, strength)
        if margin < 1:
            raise InputError(f"margin_disparity: margin weighs the source, >= 1; got {margin}.")
        self.dim, self.classes, self.hidden, self.margin, self.seed = dim, classes, tuple(hidden), margin, seed
        self.head = _network(self.formula, (dim, *hidden, classes), seed)

    def forward(self, features: Tensor, logits: Tensor, domain: Tensor, step: int) -> Tensor:
        _require_width(self, features)
        own = logits.detach().argmax(-1, keepdim=True)
        other = self.head(reverse_gradient(features, self.reversal(step)))
        whole = other.logsumexp(-1)
        agree = whole - other.gather(1, own).squeeze(1)
        # log(1 - p_y) = logsumexp of the others - logsumexp of all, which stays finite where p_y rounds to 1.
        rest = other.scatter(1, own, -math.inf).logsumexp(-1)
        return 2 * torch.where(domain >= 0, self.margin * agree, whole - rest)


# ---- classification on both sides -----------------------------------------------------------------------------------


class SourceClassification(Term):
    """Cross-entropy on the labelled domains alone: `-[domain >= 0] log p[target]`, a mean over these rows.

    Reads: `logits` float [batch, classes]; `target` int64 [batch], ignored where `domain` is negative; `domain` int64 [batch].
    Returns: float [batch], nats, >= 0, 0 on the target domain, which is not counted.
    """

    formula = "source_classification"
    equation: ClassVar[str] = "-[source] log softmax(logits)[target]"
    expects: ClassVar[dict[str, str]] = _ROWS

    def forward(self, logits: Tensor, target: Tensor, domain: Tensor) -> Tensor:
        known = torch.where(domain >= 0, target, -100)
        return F.cross_entropy(logits, known, reduction="none", ignore_index=-100)

    def count(self, domain: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return _counted(domain >= 0, sample_weight)


class MutualInformation(Term):
    """Charge predictions that are unsure one by one, or all alike: minus their mutual information with the example.

    sum_k p_k (log q_k - log p_k),   q = mean of p over the batch;   its mean is  mean_i H(p_i) - H(q) = -MI

    The value is 0 where all predictions are equal and -log K where they are certain and spread evenly over K classes.

    Args:
        shifted: add log K, so that the value is never negative; the form for a guide (`poise.weights.pareto.GuidedPareto`).

    Reads: `logits` float [batch, classes] (log-probabilities are logits too), or `frozen_head_logits` where they are offered.
    Returns: float [batch], nats: -KL(p || q), in [-log K, 0] on average.

    Example:
        >>> certain = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
        >>> MutualInformation()(certain)
        tensor([-0.6931, -0.6931])

    Source: arXiv:2112.04137, target classification mimicking without refinement.
    """

    formula = "mutual_information"
    equation: ClassVar[str] = "mean_i H(p_i) - H(mean_i p_i)"
    source: ClassVar[str] = "arXiv:2112.04137"
    expects: ClassVar[dict[str, str]] = _ROWS
    couples: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, shifted: bool = False) -> None:
        super().__init__()
        self.shifted = shifted

    def forward(self, logits: Tensor, frozen_head_logits: Tensor | None = None) -> Tensor:
        logits = logits if frozen_head_logits is None else frozen_head_logits
        values = _minus_information(logits.log_softmax(-1))
        return values + math.log(logits.shape[-1]) if self.shifted else values


def refined_log_probabilities(logits: Tensor, evidence: Tensor, form: Refining = "bayes") -> Tensor:
    """Return the log-probabilities of the classes given that the example is of the target domain, [batch, classes].

    log p(k | x, target) = log p(k | x) + log delta_k - log sum,     delta_k = p(target | x, k) = sigmoid(evidence_k)

    Args:
        logits: of the classes, [batch, classes].
        evidence: logits of the class-wise discriminators, high for the target, [batch, classes]; no gradient flows into it.
        form: "bayes"; "code" multiplies the logits by delta as the authors' code does, which is not Bayes' rule and depends on a
            constant added to the logits; "none" leaves the prediction.
    """
    if form == "none":
        return logits.log_softmax(-1)
    if form == "code":
        return (logits * evidence.detach().sigmoid()).log_softmax(-1)
    return (logits.log_softmax(-1) + F.logsigmoid(evidence.detach())).log_softmax(-1)


class BayesRefiner(nn.Module):
    """One domain discriminator for each class, all run at once.

    Args:
        classes: number of classes, K.
        dim: width of the features.
        hidden: widths of each discriminator's layers.
        seed: of the first weights.

    >>> refiner = BayesRefiner(classes=4, dim=3, hidden=(8,))
    >>> refiner(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(self, classes: int, dim: int, hidden: Sequence[int] = (1024, 1024), seed: int = 0) -> None:
        super().__init__()
        if classes < 2 or dim < 1 or any(width < 1 for width in hidden):
            raise InputError(
                f"BayesRefiner: it needs two classes or more and widths >= 1; got {classes}, {dim}, {tuple(hidden)}."
            )
        self.classes, self.dim = classes, dim
        generator = torch.Generator().manual_seed(derive(seed, "class-wise discriminators"))
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for before, after in itertools.pairwise((dim, *hidden, 1)):
            for held, shape in ((self.weight, (classes, before, after)), (self.bias, (classes, 1, after))):
                held.append(nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(before)))

    def forward(self, features: Tensor) -> Tensor:
        """Return the evidence for the target domain, a logit for each class, [batch, classes]."""
        x = features.expand(self.classes, *features.shape)
        for number, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x = torch.baddbmm(bias, x.relu() if number else x, weight)
        return x.squeeze(-1).T

    def loss(self, evidence: Tensor, log_p: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Return the discriminators' own loss, 0-dim: D_y tells a source example of class y, all D_k a target example with weight p_k.

        (mean over source of -log(1 - delta_y) + mean over target of -sum_k p_k log delta_k) / 2

        Args:
            evidence: `self(features)`, [batch, classes].
            log_p: refined log-probabilities, [batch, classes], read on the target rows; no gradient flows into it.
            target: labels, int64 [batch], read on the source rows.
            source: which rows are of the source, bool [batch]; where all are, or none is, the loss is 0.
        """
        labels = torch.where(source, target, 0).clamp(min=0)[:, None]
        of_source = F.softplus(evidence.gather(1, labels)).squeeze(1) * source
        of_target = (log_p.detach().exp() * F.softplus(-evidence)).sum(-1) * ~source
        many = source.sum()
        means = of_source.sum() / many.clamp(min=1) + of_target.sum() / (len(source) - many).clamp(min=1)
        return torch.where((many > 0) & (many < len(source)), means / 2, 0.0)


class TargetClassification(Term):
    """Mimic a classification loss on the unlabelled target: minus the mutual information of refined target predictions (TCM).

    mean_i H(p~_i) - H(mean_i p~_i),     log p~ = log softmax(log softmax(logits) + log delta),   over the target rows

    `delta_k` is what the discriminator of class k takes for the chance that the example is of the target domain: Bayes' rule
    with the domain as evidence. The discriminators are the term's own, learn from features without gradient, and are
    constants in the value. They learn with the term's weight; a policy that balances gradients leaves them at 1.

    Args:
        classes: number of classes, K.
        dim: width of the features.
        hidden, seed: of `BayesRefiner`.
        refine: "bayes", "code" (see `refined_log_probabilities`), or "none", which needs neither features nor labels.
        shifted: add log K, so that the value is never negative; the form for a guide.

    Reads: `logits` float [batch, classes], or `frozen_head_logits` where they are offered (`poise.readouts.DomainFeatures`): the
        head then learns from labels alone, as the authors have it; `domain` int64 [batch], negative for the target; unless
        refine="none" also `features` float [batch, dim] and `target` int64 [batch], whose source rows teach the discriminators.
    Returns: float [batch], nats, 0 on source rows, which are not counted; publishes `refined` [batch, classes]. A batch without
        source rows, such as a guide's, teaches the discriminators nothing.

    Raises:
        InputError: an argument out of range.
        QuantityError: another number of classes or another width.

    Source: Lv et al., arXiv:2112.04137; BIT-DA/ParetoDA, tools/TCM_loss.py and dalib/modules/cls_domaindiscri.py. The code's
        loop over source rows lets the last one decide a class's weight; here every row counts.
    """

    formula = "target_classification"
    equation: ClassVar[str] = "mean_i H(p~_i) - H(mean_i p~_i),  p~_k ~ delta_k p_k"
    source: ClassVar[str] = "arXiv:2112.04137"
    expects: ClassVar[dict[str, str]] = _ROWS
    couples: ClassVar[tuple[str, ...]] = ("logits",)
    # No "potential": delta moves with the features and carries no gradient.
    capabilities = frozenset({"per_example", "deterministic"})

    def __init__(
        self,
        classes: int = 10,
        dim: int = 256,
        hidden: Sequence[int] = (1024, 1024),
        refine: Refining = "bayes",
        shifted: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if refine not in get_args(Refining):
            raise InputError(f"target_classification: refine is 'bayes', 'code' or 'none'; got {refine!r}.")
        if classes < 2:
            raise InputError(f"target_classification: it needs two classes or more; got {classes}.")
        self.classes, self.dim, self.hidden, self.seed = classes, dim, tuple(hidden), seed
        self.refine, self.shifted = refine, shifted
        self.refiner = None if refine == "none" else BayesRefiner(classes, dim, hidden, seed)

    def readings(self) -> tuple[str, ...]:
        """Without refinement the features and the labels are not read."""
        return ("features", "target") if self.refine == "none" else ()

    def requirements(self) -> tuple[str, ...]:
        """With it the features are needed."""
        return () if self.refine == "none" else ("features",)

    def count(self, domain: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return _counted(domain < 0, sample_weight)

    def forward(
        self,
        logits: Tensor,
        domain: Tensor,
        features: Tensor | None = None,
        target: Tensor | None = None,
        frozen_head_logits: Tensor | None = None,
    ) -> Value:
        logits = logits if frozen_head_logits is None else frozen_head_logits
        if logits.shape[1] != self.classes:
            raise QuantityError(
                f"target_classification: it was made for classes={self.classes}, and the logits have {logits.shape[1]}."
            )
        here = domain < 0
        evidence = self._evidence(features)
        log_p = refined_log_probabilities(logits, logits if evidence is None else evidence, self.refine)
        values = _minus_information(log_p, here)
        if self.shifted:
            values = values + math.log(self.classes) * here
        extras = {"refined": log_p.exp()}
        if self.refiner is None or evidence is None or target is None:
            return Value(values, extras=extras)
        own = self.refiner.loss(evidence, log_p, target, ~here)
        return Value(values, values + (own - own.detach()), extras=extras)

    def _evidence(self, features: Tensor | None) -> Tensor | None:
        if self.refiner is None or features is None:
            return None
        _require_width(self, features)
        found: Tensor = self.refiner(features.detach())
        return found


# ---- small pieces ---------------------------------------------------------------------------------------------------


def _minus_information(log_p: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return -KL(p_i || q), [batch], with q the mean of p over the batch, or over `rows` (bool [batch]) with 0 on the others."""
    if rows is None:
        log_q = log_p.logsumexp(0) - math.log(len(log_p))
    else:
        # Far below every logarithm of a probability, and finite, so that a batch without rows gives 0 and not NaN.
        log_q = log_p.masked_fill(~rows[:, None], -1e30).logsumexp(0) - rows.sum().clamp(min=1).to(log_p).log()
    p = log_p.exp()
    # Where p is 0 the summand is 0, and its logarithm must not be touched, for the gradient's sake too.
    ratio = torch.where(p > 0, log_q - log_p, 0.0)
    values = (p * ratio).sum(-1)
    return values if rows is None else torch.where(rows, values, 0.0)


def _domain_loss(logit: Tensor, domain: Tensor) -> Tensor:
    """Return the cross-entropy of a discriminator with "source", [batch]."""
    return F.softplus(torch.where(domain >= 0, -logit, logit))


def _counted(rows: Tensor, sample_weight: Tensor | None) -> Tensor:
    return rows.to(torch.get_default_dtype()) if sample_weight is None else rows * sample_weight


def _require_width(term: Any, features: Tensor) -> None:
    if features.shape[-1] != term.dim:
        raise QuantityError(
            f"{term.formula}: it was made for features of width dim={term.dim}, and they have {features.shape[-1]}."
        )


def _network(name: str, widths: tuple[int, ...], seed: int) -> nn.Sequential:
    if any(width < 1 for width in widths):
        raise InputError(f"{name}: every width must be at least 1; got {widths}.")
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, name))
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
