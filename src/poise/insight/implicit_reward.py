"""The reward that a policy implies, with its values, whether it was fine-tuned on demonstrations or on preferences.

With the model before fine-tuning as reference, both kinds of training move in one family of pairs (policy, reward):

    r(s, a) = beta log(pi/pi_ref)(a|s) [+ V(s) - V(s')],
    Q(s, a) = beta logit,    V(s) = beta logsumexp(logits),    A = Q - V = beta log pi

    rewards = implicit_reward(policy_logps, reference_logps, beta=0.1, mask=mask, level="sequence")
    value_correlation(value(logits, beta=0.1), returns, mask)         # does V order states by what they will earn?
    study = sft_learning_rate_study(model, (1e-2, 1e-3, 1e-4), demonstrations, pairs, ...)

Nothing in supervised fine-tuning holds the policy near the reference, so the learning rate decides how far it goes; the study
measures what that does to a preference stage that follows. Source: arXiv:2507.00018.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.errors import InputError, QuantityError
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.terms.posterior import Tilt
from poise.terms.preference.margin import sequence_sum

__all__ = [
    "RateResult",
    "RateStudy",
    "ValueCorrelation",
    "advantages",
    "implicit_reward",
    "q_values",
    "sft_learning_rate_study",
    "token_rewards",
    "value",
    "value_correlation",
]


# ---- readings of logits ---------------------------------------------------------------------------------------------


def implicit_reward(
    policy_logps: Tensor,
    reference_logps: Tensor,
    beta: float = 1.0,
    mask: Tensor | None = None,
    level: Literal["token", "sequence"] = "token",
    log_z: Tensor | float = 0.0,
) -> Tensor:
    """Return the reward that a policy implies: beta log(pi/pi_ref), plus beta log Z where the gauge is known.

    Args:
        policy_logps, reference_logps: float [batch, time], or sums [batch].
        beta: price of leaving the reference, positive.
        mask: bool [batch, time], True on answer tokens.
        level: "token" keeps the shape; "sequence" sums over the answer: float [batch].
        log_z: of a sequence's prompt; differences between answers to one prompt do not depend on it.

    Raises:
        InputError: beta not positive, no such level, or a gauge for single tokens.
        QuantityError: the shapes differ.

    >>> implicit_reward(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.5]]), beta=0.5, level="sequence")
    tensor([0.7500])
    """
    if level not in ("token", "sequence"):
        raise InputError(f"implicit_reward: level is 'token' or 'sequence', and it is {level!r}.")
    if policy_logps.shape != reference_logps.shape:
        raise QuantityError(
            f"implicit_reward: policy and reference must be of the same answers; they are {list(policy_logps.shape)} and "
            f"{list(reference_logps.shape)}."
        )
    tilt = Tilt(beta)
    if level == "sequence":
        return tilt.implicit_reward(sequence_sum(policy_logps, mask), sequence_sum(reference_logps, mask), log_z)
    if not isinstance(log_z, float) or log_z != 0.0:
        raise InputError("implicit_reward: log Z belongs to a whole answer; say level='sequence'.")
    reward = tilt.implicit_reward(policy_logps, reference_logps)
    return reward if mask is None else torch.where(mask, reward, 0.0)


def q_values(logits: Tensor, beta: float = 1.0) -> Tensor:
    """Return Q(s, a) = beta logit, [..., actions].

    >>> q_values(torch.tensor([1.0, 3.0]), beta=0.5)
    tensor([0.5000, 1.5000])
    """
    return Tilt(beta).beta * logits


def value(logits: Tensor, beta: float = 1.0) -> Tensor:
    """Return V(s) = beta log sum_a exp(Q(s, a)/beta), [...]: the soft maximum of the Q-values.

    >>> value(torch.zeros(4), beta=0.5)
    tensor(0.6931)
    """
    return Tilt(beta).beta * logits.logsumexp(-1)


def advantages(logits: Tensor, beta: float = 1.0) -> Tensor:
    """Return A(s, a) = Q(s, a) - V(s) = beta log pi(a|s), [..., actions]."""
    return Tilt(beta).beta * logits.log_softmax(-1)


def token_rewards(logits: Tensor, reference_logits: Tensor, ids: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """Return r_t = beta log(pi/pi_ref)(a_t|s_t) + V(s_t) - V(s_{t+1}) of answers, V = 0 after the last token: [batch, time].

    Args:
        logits, reference_logits: float [batch, time, vocabulary]; entry t is the distribution of token t.
        ids, mask: int64 and bool [batch, time]; the answer is one run of tokens.

    Raises:
        QuantityError: the reference has another vocabulary.
    """
    if logits.shape != reference_logits.shape:
        raise QuantityError(
            f"token_rewards: policy and reference need one vocabulary and one batch; their logits are {list(logits.shape)} and "
            f"{list(reference_logits.shape)}."
        )
    at = torch.where(mask, ids, 0)[..., None]
    ratio = (logits.log_softmax(-1) - reference_logits.log_softmax(-1)).gather(-1, at)[..., 0]
    values = torch.where(mask, value(logits, beta), 0.0)
    following = nn.functional.pad(values, (0, 1))[:, 1:]
    return torch.where(mask, beta * ratio + values - following, 0.0)


@dataclass(frozen=True)
class ValueCorrelation:
    """How well V orders states by what they will earn: Spearman's rank correlation.

    Attributes:
        overall: over all states of all answers.
        by_position: of the states with the same number of tokens behind them, [positions]; NaN where fewer than three answers
            get that far or all values are equal.
    """

    overall: float
    by_position: tuple[float, ...]


def value_correlation(values: Tensor, returns: Tensor, mask: Tensor) -> ValueCorrelation:
    """Correlate V(s_t) with the final return of the answer.

    Args:
        values: float [batch, time]. returns: float [batch]. mask: bool [batch, time], True on answer tokens.

    >>> mask = torch.ones(4, 1, dtype=torch.bool)
    >>> value_correlation(torch.tensor([[0.1], [0.2], [0.3], [0.9]]), torch.tensor([1.0, 2.0, 3.0, 4.0]), mask).overall
    1.0
    """
    if values.shape != mask.shape or returns.shape != values.shape[:1]:
        raise QuantityError(
            f"value_correlation: values and mask are [batch, time] and returns [batch]; they are {list(values.shape)}, {list(mask.shape)} "
            f"and {list(returns.shape)}."
        )
    spread = returns[:, None].expand_as(values)
    place = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    last = int(place.max()) + 1
    rows = [_spearman(values[place == t], spread[place == t]) for t in range(last)]
    return ValueCorrelation(_spearman(values[mask], spread[mask]), tuple(rows))


def _spearman(x: Tensor, y: Tensor) -> float:
    if len(x) < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(x.cpu().numpy(), y.cpu().numpy()).statistic)


# ---- the learning rate of fine-tuning, judged after the preference stage -----------------------------------------------


@dataclass(frozen=True)
class RateResult:
    """One learning rate.

    Attributes:
        rate: of supervised fine-tuning.
        loss: of fine-tuning at its end.
        kl: sum over an answer's tokens of KL(pi || pi_ref) at the demonstrations, mean over answers, nats: the way travelled.
        after_sft, after_preference: metrics of both stages; `reward_accuracy` is that of the implicit reward on the pairs.
    """

    rate: float
    loss: float
    kl: float
    after_sft: dict[str, float]
    after_preference: dict[str, float]


@dataclass(frozen=True)
class RateStudy:
    """The study's rows, in the order of the rates."""

    rows: tuple[RateResult, ...]

    def best(self, metric: str, stage: Literal["sft", "preference"] = "preference") -> RateResult:
        """Return the row with the largest metric after a stage."""
        place = f"after_{stage}"
        if stage not in ("sft", "preference") or metric not in getattr(self.rows[0], place):
            raise InputError(f"RateStudy: no metric {metric!r} after {stage!r}.")
        return max(self.rows, key=lambda row: float(getattr(row, place)[metric]))

    def __str__(self) -> str:
        names = list(self.rows[0].after_sft)
        head = f"{'rate':>8} {'loss':>8} {'KL':>8}" + "".join(f" {n + ' sft':>22} {n + ' pref':>22}" for n in names)
        return "\n".join([head, *(_row(row, names) for row in self.rows)])


def _row(row: RateResult, names: Sequence[str]) -> str:
    cells = "".join(f" {row.after_sft[n]:22.4f} {row.after_preference[n]:22.4f}" for n in names)
    return f"{row.rate:8.1e} {row.loss:8.4f} {row.kl:8.3f}{cells}"


def sft_learning_rate_study(
    model: nn.Module,
    rates: Sequence[float],
    sft_data: Mapping[str, Tensor],
    preference_data: Mapping[str, Tensor],
    *,
    sft: Any = "sft",
    preference: Any = "dpo(beta=0.1)",
    readout: Callable[[FrozenModel], Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    sft_steps: int = 100,
    preference_steps: int = 100,
    preference_rate: float = 1e-3,
    batch_size: int = 128,
    solver: str = "adam",
    seed: int = 0,
    **options: Any,
) -> RateStudy:
    """Fine-tune at several learning rates, then optimise preferences from each, and measure after both stages.

    The reference of fine-tuning is the model as it comes; that of the preference stage is the fine-tuned one. The model itself is
    not changed. This is the one function of this room that trains: it calls `poise.fit` twice for each rate.

    Args:
        model: the model before fine-tuning.
        rates: learning rates of fine-tuning.
        sft_data: demonstrations, `response_*` columns. preference_data: pairs, `chosen_*` and `rejected_*`.
        sft, preference: the two objectives; `"sft + constraint(token_kl(on='response'), upper=1.0)"` holds the KL itself.
        readout: makes the readout from a frozen reference; that of transformers models by default.
        evaluate: further metrics of a model, such as its true utility.
        sft_steps, preference_steps, preference_rate, batch_size, solver, seed, options: of `poise.fit`.

    Raises:
        InputError: no rates, or one that is not positive.
    """
    from poise.training import fit

    if not rates or min(rates) <= 0:
        raise InputError(f"sft_learning_rate_study: rates are positive learning rates, and they are {list(rates)}.")
    before = FrozenModel(model)
    shared = {"batch_size": batch_size, "solver": solver, "seed": seed, **options}
    rows = []
    for rate in rates:
        policy = copy.deepcopy(model)
        at = _readout(readout, before)
        run = fit(policy, sft, dict(sft_data), readout=at, lr=rate, steps=sft_steps, **shared)
        kl = _kl(policy, at, sft_data)
        after_sft = _metrics(policy, at, preference_data, evaluate)
        again = _readout(readout, FrozenModel(policy))
        fit(
            policy,
            preference,
            dict(preference_data),
            readout=again,
            lr=preference_rate,
            steps=preference_steps,
            **shared,
        )
        rows.append(
            RateResult(rate, run.history["loss"][-1], kl, after_sft, _metrics(policy, again, preference_data, evaluate))
        )
    return RateStudy(tuple(rows))


def _readout(make: Callable[[FrozenModel], Any] | None, reference: FrozenModel) -> Any:
    if make is not None:
        return make(reference)
    from poise.readouts.language import Language

    return Language(reference)


@torch.no_grad()
def _read(model: nn.Module, readout: Any, data: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    was = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        batch = Quantities({name: x.to(device) for name, x in data.items()})
        quantities = readout(ModelView(model), batch, frozenset(names))
        return [quantities[name] for name in names]
    finally:
        model.train(was)


def _kl(model: nn.Module, readout: Any, data: Mapping[str, Tensor]) -> float:
    kl, mask = _read(model, readout, data, ["response_reverse_kl", "response_mask"])
    return float(sequence_sum(kl, mask).mean())


def _metrics(
    model: nn.Module,
    readout: Any,
    pairs: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
) -> dict[str, float]:
    names = [f"{place}{side}_logps" for side in ("chosen", "rejected") for place in ("", "reference_")]
    chosen, of_chosen, rejected, of_rejected = _read(model, readout, pairs, names)
    gap = implicit_reward(sequence_sum(chosen), sequence_sum(of_chosen)) - implicit_reward(
        sequence_sum(rejected), sequence_sum(of_rejected)
    )
    found = {"reward_accuracy": float((gap > 0).double().mean())}
    if evaluate is not None:
        was = model.training
        model.eval()
        found |= {name: float(x) for name, x in evaluate(model).items()}
        model.train(was)
    return found
