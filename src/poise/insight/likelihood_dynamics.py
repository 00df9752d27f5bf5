"""Where likelihood goes while a preference loss trains: the three D's of DPO, and which coupling carries them.

With pi+ and pi- the probabilities of the chosen and the rejected answer and z the margin of the implicit rewards,

    w = sigma(-z),    dl/dpi+ = -beta+ w / pi+,    dl/dpi- = beta- w / pi-,    |dl/dpi-| / |dl/dpi+| = beta- pi+ / (beta+ pi-)

so the pull on a dying answer grows without limit while w, and with it the push on the chosen one, dies. Three things follow:

    D1  drop         the rejected answer loses more than three times what the chosen one gains
    D2  degradation  the chosen answer falls 20 % below its best, or below its start, while the margin grows
    D3  dispersion   answers that nobody preferred rise while the chosen one falls

With free logits and one pair for each prompt the gradients in the logits are -beta w and +beta w and the chosen answer can
only rise: D2 and D3 need a coupling. `LikelihoodReport.coupling` says which one the data show: tokens that both answers
share, chosen answers that compete for one prompt, or, where neither explains it, shared parameters.

    monitor = LikelihoodMonitor(heldout=answers, every=20)
    poise.fit(model, "dpo(beta=0.1)", pairs, callbacks=[monitor])     # reads what the loss computed; no forward pass of its own
    print(monitor.report())

Source: Yan et al., arXiv:2406.07327 (thresholds are this library's). All figures in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise.errors import InputError, QuantityError
from poise.frozen import FrozenModel
from poise.objective import Term, Value, iterate_terms
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.terms.preference.margin import (
    PairedTerm,
    answer_length,
    log_ratio,
    require_at_least_zero,
    require_positive,
    sequence_sum,
)

__all__ = [
    "LikelihoodFlags",
    "LikelihoodMonitor",
    "LikelihoodReport",
    "LikelihoodRow",
    "likelihood_flags",
    "log_gradients",
    "shared_tokens",
]

DROP = 3.0
"""D1: the rejected answer falls more than this many times what the chosen one rises."""

DEGRADATION = -math.log(0.8)
"""D2: nats below the running maximum; 20 % of the probability."""

NOISE = 0.02
"""Nats that count as no movement: 2 % of a probability."""


# ---- functions of log-probabilities ---------------------------------------------------------------------------------


def log_gradients(
    chosen_logps: Tensor, rejected_logps: Tensor, margin: Tensor, beta_chosen: float = 0.1, beta_rejected: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Return log |dl/dpi| of a pair's loss for both answers, where probabilities themselves would underflow.

    log |dl/dpi+| = log beta+ + log w - log pi+,    log |dl/dpi-| = log beta- + log w - log pi-,    log w = log sigma(-margin)

    Args:
        chosen_logps, rejected_logps: log-probabilities of whole answers, float [batch].
        margin: of the implicit rewards, float [batch].
        beta_chosen, beta_rejected: beta+ and beta-.

    >>> chosen, rejected = torch.tensor([-800.0]), torch.tensor([-810.0])
    >>> up, down = log_gradients(chosen, rejected, torch.tensor([0.0]))
    >>> (down - up).item()                                                          # log pi+ - log pi-
    10.0
    """
    log_w = F.logsigmoid(-margin)
    down = math.log(beta_rejected) if beta_rejected else -math.inf
    return math.log(beta_chosen) + log_w - chosen_logps, down + log_w - rejected_logps


class LikelihoodFlags(NamedTuple):
    """Which of the three D's hold, bool of the shape of the series."""

    drop: Tensor
    degradation: Tensor
    dispersion: Tensor


def likelihood_flags(
    chosen: Tensor, rejected: Tensor, unseen: Tensor | None = None, *, noise: float = NOISE
) -> LikelihoodFlags:
    """Flag the three D's along series of shifts; the series may have further dimensions, such as seeds.

    D1 = -rejected > 3 max(chosen, 0)
    D2 = (chosen < max so far - log(1/0.8)  or  chosen < 0)  while the margin is above that at the maximum
    D3 = unseen > 0  while  chosen < max so far

    Args:
        chosen, rejected: log pi - log pi_ref (or less its start), float [time, ...], nats.
        unseen: the same of answers that are in no pair; without it D3 is False.
        noise: movements up to this many nats do not count.

    >>> chosen = torch.tensor([0.0, 0.6, 0.2])
    >>> likelihood_flags(chosen, torch.tensor([0.0, -1.0, -4.0]), torch.tensor([0.0, -0.5, 0.3])).degradation
    tensor([False, False,  True])
    """
    best, where = chosen.cummax(0)
    margin = chosen - rejected
    grows = margin > margin.gather(0, where) + noise
    drop = -rejected > DROP * chosen.clamp(min=0) + noise
    degradation = ((chosen < best - max(DEGRADATION, noise)) | (chosen < -noise)) & grows
    if unseen is None:
        return LikelihoodFlags(drop, degradation, torch.zeros_like(drop))
    return LikelihoodFlags(drop, degradation, (unseen > noise) & (chosen < best - noise))


def shared_tokens(ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor, *, prefix: bool = False) -> Tensor:
    """Return which answer tokens also occur in the other answer: bool [batch, time].

    Args:
        ids, other_ids: int64 [batch, time]; the two may be padded to different lengths.
        mask, other_mask: bool, True on answer tokens.
        prefix: count only the tokens of the beginning that both answers have in common. There the two gradients cancel
            exactly; further on a shared token is pushed up in one context and down in another.

    >>> one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 3, 4]])
    >>> all_ = torch.ones(1, 3, dtype=torch.bool)
    >>> shared_tokens(one, all_, other, all_).tolist(), shared_tokens(one, all_, other, all_, prefix=True).tolist()
    ([[True, False, True]], [[True, False, False]])
    """
    if not prefix:
        equal = (ids[:, :, None] == other_ids[:, None, :]) & other_mask[:, None, :]
        return mask & equal.any(-1)
    time = max(ids.shape[1], other_ids.shape[1])
    one, two = _padded(torch.where(mask, ids, -1), time, -1), _padded(torch.where(other_mask, other_ids, -2), time, -2)
    # What stands before both answers is the prompt, which does not end the common beginning.
    before = ~_padded(mask, time, 0) & ~_padded(other_mask, time, 0)
    same = ((one == two) | before).long().cumprod(1).bool()
    return mask & same[:, : ids.shape[1]]


def _padded(x: Tensor, time: int, value: int) -> Tensor:
    return F.pad(x, (0, time - x.shape[1]), value=value)


# ---- what is seen ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LikelihoodRow:
    """One look at the likelihoods; means over pairs, nats.

    Attributes:
        step: optimiser step.
        chosen, rejected: log pi - log pi_ref of whole answers.
        unseen: log pi of the held-out answers less its start, or None.
        chosen_per_token, rejected_per_token: the first two divided by the answers' lengths; None without masks or tokens.
        log_gradient_ratio: log (|dl/dpi-| / |dl/dpi+|) = log pi+ - log pi- + log(beta- / beta+).
        weight: w, what is left of the pairs' gradients, in (0, 1).
        accuracy: share of pairs with the chosen answer ahead.
        chosen_shared, chosen_own: what `chosen` is made of: tokens that the rejected answer has too, and the others; None
            where the ids are not known.
    """

    step: int
    chosen: float
    rejected: float
    unseen: float | None
    log_gradient_ratio: float
    weight: float
    accuracy: float
    chosen_per_token: float | None = None
    rejected_per_token: float | None = None
    chosen_shared: float | None = None
    chosen_own: float | None = None

    @property
    def margin(self) -> float:
        """chosen - rejected, nats, without beta."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class LikelihoodReport:
    """The likelihoods over a run, the flags, and what they mean.

    Attributes:
        rows: the looks, oldest first.
        competing: share of the prompts with several pairs whose chosen answers differ; None where it is not known.
    """

    rows: tuple[LikelihoodRow, ...]
    competing: float | None = None

    def flags(self) -> LikelihoodFlags:
        """Return D1, D2 and D3 for every row, bool [rows] each."""
        table = [[r.chosen, r.rejected, 0.0 if r.unseen is None else r.unseen] for r in self.rows]
        chosen, rejected, unseen = torch.tensor(table, dtype=torch.float64).reshape(-1, 3).unbind(1)
        return likelihood_flags(chosen, rejected, unseen)

    def first(self, flag: str) -> int | None:
        """Return the step at which "drop", "degradation" or "dispersion" was first seen, or None."""
        if flag not in LikelihoodFlags._fields:
            raise InputError(f"A flag is one of {', '.join(LikelihoodFlags._fields)}, and it is {flag!r}.")
        seen = getattr(self.flags(), flag).nonzero().flatten() if self.rows else torch.zeros(0)
        return self.rows[int(seen[0])].step if len(seen) else None

    @property
    def accuracy_fluctuation(self) -> float:
        """Standard deviation of the differences of neighbouring accuracies; NaN with fewer than three rows."""
        steps = [b.accuracy - a.accuracy for a, b in pairwise(self.rows)]
        return stdev(steps) if len(steps) > 1 else math.nan

    @property
    def coupling(self) -> str:
        """Which coupling the fall of the chosen answers shows: "none", "shared tokens", "competing answers" or "shared parameters"."""
        if self.first("degradation") is None and self.first("dispersion") is None:
            return "none"
        best = max(self.rows, key=lambda row: row.chosen)
        last = self.rows[-1]
        shared = (best.chosen_shared or 0.0) - (last.chosen_shared or 0.0)
        if shared > 0.5 * (best.chosen - last.chosen) > 0:
            return "shared tokens"
        return "competing answers" if self.competing else "shared parameters"

    @property
    def verdict(self) -> str:
        """What was seen, and what to do about it, in one or two sentences."""
        if not self.rows:
            return "Nothing was observed."
        seen = [
            f"{name} from step {step}"
            for name, step in ((n, self.first(n)) for n in LikelihoodFlags._fields)
            if step is not None
        ]
        if not seen:
            return "None of the three D's: chosen answers keep their likelihood."
        return f"{'; '.join(seen).capitalize()}. {_ADVICE[self.coupling]}"

    def __str__(self) -> str:
        head = "   step   chosen rejected   unseen  log ratio  weight  accuracy  D1 D2 D3"
        lines = [head, *map(_line, self.rows, zip(*(f.tolist() for f in self.flags()), strict=True))]
        return "\n".join([*lines, self.verdict])


_ADVICE = {
    "none": "The chosen answers did not fall, so no coupling is seen.",
    "shared tokens": (
        "The chosen answers fall mostly on tokens that the rejected ones have too: weigh the tokens in which they differ "
        "(preference_margin(token_weight='spans')), or add sft."
    ),
    "competing answers": (
        "Several chosen answers compete for one prompt, which lowers their mean even with free logits: add sft, or keep one "
        "pair for each prompt."
    ),
    "shared parameters": (
        "Neither shared tokens nor competing answers explain the fall, so it comes through shared parameters: lower "
        "beta_rejected of flex_dpo, add sft, or draw the pairs from the model itself."
    ),
}


def _line(row: LikelihoodRow, flags: tuple[bool, bool, bool]) -> str:
    unseen = "       -" if row.unseen is None else f"{row.unseen:8.3f}"
    marks = "  ".join("x" if flag else "." for flag in flags)
    return (
        f"{row.step:7d} {row.chosen:8.3f} {row.rejected:8.3f} {unseen} {row.log_gradient_ratio:10.2f} {row.weight:7.3f} "
        f"{row.accuracy:9.3f}  {marks}"
    )


class LikelihoodMonitor:
    """Watch chosen, rejected and unseen likelihoods: a callback of `poise.fit`, or a function of log-probabilities.

    As a callback it reads what the objective's first term on pairs computed anyway, and averages over the steps between two
    looks. With `pairs` it looks at fixed pairs instead, for a forward pass each time: no noise of batches, and the split of
    the chosen answers' fall into shared and own tokens. In a loop of your own, call `observe`.

    Args:
        reference: log-probabilities under the reference of what `observe` is given, `{"chosen": float [n], "rejected":
            float [n]}`; or the frozen model itself, for `pairs`; None where every observation brings its own (as it does in
            `fit`).
        heldout: answers that are in no pair, `{"response_ids": ..., "response_mask": ...}`; or a function
            `heldout(model) -> float [n]` of their log-probabilities. Without it D3 is not seen.
        every: optimiser steps between two looks. Take it so large that the batches in between hold some hundred pairs: a
            batch's mean is noisy, and the flags compare with the best mean so far.
        pairs: fixed pairs, the columns of training data; a column `group` tells which prompt a pair answers.
        readout: makes log-probabilities of `heldout` and `pairs`; the readout of transformers models by default.
        beta_chosen, beta_rejected: of the loss, for `observe` and `pairs` (`beta_rejected` as the other one by default); in
            `fit` they are those of the term.

    Raises:
        InputError: beta_chosen or `every` not positive, beta_rejected negative.
        QuantityError: log-probabilities above 0, shapes that differ, or no reference.

    Example:
        >>> monitor = LikelihoodMonitor({"chosen": torch.tensor([-9.0]), "rejected": torch.tensor([-9.0])}, beta_chosen=0.1)
        >>> row = monitor.observe(torch.tensor([-10.0]), torch.tensor([-30.0]))
        >>> row.chosen, row.rejected, round(row.weight, 3)
        (-1.0, -21.0, 0.119)
        >>> monitor.report().first("drop")
        0

    Source: arXiv:2406.07327.
    """

    def __init__(
        self,
        reference: Mapping[str, Tensor] | nn.Module | FrozenModel | None = None,
        heldout: Mapping[str, Tensor] | Callable[[nn.Module], Tensor] | None = None,
        every: int = 10,
        *,
        pairs: Mapping[str, Tensor] | None = None,
        readout: Any = None,
        beta_chosen: float = 0.1,
        beta_rejected: float | None = None,
    ) -> None:
        require_positive("likelihood_monitor", beta_chosen=beta_chosen, every=every)
        beta_rejected = beta_chosen if beta_rejected is None else beta_rejected
        require_at_least_zero("likelihood_monitor", beta_rejected=beta_rejected)
        if isinstance(reference, nn.Module):
            reference = FrozenModel(reference)
        self.reference, self.heldout, self.every, self.pairs = reference, heldout, every, pairs
        self.beta_chosen, self.beta_rejected = beta_chosen, beta_rejected
        self._readout = readout
        self._rows: list[LikelihoodRow] = []
        self._start: float | None = None
        self._competing = None if pairs is None else _competing(pairs)
        self._seen: list[Tensor] = []
        self._handle: Any = None

    # ---- a function of log-probabilities --------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        heldout_logps: Tensor | None = None,
        chosen_mask: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        chosen_ids: Tensor | None = None,
        rejected_ids: Tensor | None = None,
        step: int | None = None,
    ) -> LikelihoodRow:
        """Look once, and remember what was seen.

        Args:
            chosen_logps, rejected_logps: float [batch, time], or summed [batch].
            reference_chosen_logps, reference_rejected_logps: the same under the reference; from the constructor's
                `reference` by default.
            heldout_logps: log-probabilities of held-out answers, float [n]; or the log of the exact unseen mass.
            chosen_mask, rejected_mask, chosen_ids, rejected_ids: [batch, time], for figures per token and for the split
                into shared and own tokens.
            step: of the look; one more than the last by default.
        """
        references = (
            self._reference_of("chosen", reference_chosen_logps),
            self._reference_of("rejected", reference_rejected_logps),
        )
        _check_logps(
            chosen_logps=chosen_logps, rejected_logps=rejected_logps, reference_chosen_logps=references[0],
            reference_rejected_logps=references[1], heldout_logps=heldout_logps,
        )  # fmt: skip
        _check_alike(chosen_logps, references[0], "chosen")
        _check_alike(rejected_logps, references[1], "rejected")
        figures = _figures(
            (chosen_logps, references[0], chosen_mask), (rejected_logps, references[1], rejected_mask),
            self.beta_chosen, self.beta_rejected,
        )  # fmt: skip
        split = None
        if chosen_ids is not None and rejected_ids is not None and chosen_logps.ndim == references[0].ndim == 2:
            if chosen_mask is None or rejected_mask is None:
                raise QuantityError("likelihood_monitor: the split into shared and own tokens needs both masks.")
            shared = shared_tokens(chosen_ids, chosen_mask, rejected_ids, rejected_mask)
            split = sequence_sum(chosen_logps - references[0], shared).mean()
        unseen = None if heldout_logps is None else sequence_sum(heldout_logps).mean()
        at = (self._rows[-1].step + 1 if self._rows else 0) if step is None else step
        return self._add(at, figures.mean(1), split, unseen)

    def _reference_of(self, side: str, given: Tensor | None) -> Tensor:
        if given is not None:
            return given
        if isinstance(self.reference, Mapping) and side in self.reference:
            return self.reference[side]
        raise QuantityError(
            f"likelihood_monitor: a shift needs the reference. Give reference_{side}_logps, or "
            f"LikelihoodMonitor(reference={{{side!r}: log-probabilities, ...}})."
        )

    def _add(self, step: int, figures: Tensor, split: Tensor | None, unseen: Tensor | None) -> LikelihoodRow:
        # One transfer from the device for all figures of a look.
        extra = [math.nan if x is None else x.detach().double() for x in (split, unseen)]
        numbers = torch.stack(
            [*figures.double(), *(torch.as_tensor(x, dtype=torch.float64, device=figures.device) for x in extra)]
        ).tolist()
        chosen, rejected, chosen_token, rejected_token, ratio, weight, accuracy, shared, now = numbers
        if unseen is not None and self._start is None:
            self._start = now
        row = LikelihoodRow(
            step, chosen, rejected,
            None if unseen is None or self._start is None else now - self._start,
            ratio, weight, accuracy, _or_none(chosen_token), _or_none(rejected_token),
            None if split is None else shared, None if split is None else chosen - shared,
        )  # fmt: skip
        self._rows.append(row)
        return row

    # ---- a callback of fit ----------------------------------------------------------------------------------------------

    def on_begin(self, state: Any) -> None:
        """Find the term on pairs, and look at the start."""
        term = self._find(state.objective)
        if term is not None and self.pairs is None:
            self._handle = term.register_forward_hook(self._listen, with_kwargs=True)
        if isinstance(term, PairedTerm):
            self.beta_chosen = float(getattr(term, "beta_chosen", term.beta))
            self.beta_rejected = float(getattr(term, "beta_rejected", term.beta))
        if self._rows or self._start is not None:  # resumed
            return
        if self.pairs is not None:
            self._look(state)
        elif self.heldout is not None:
            self._start = float(sequence_sum(self._heldout_logps(state.model)).double().mean())

    def on_step_end(self, state: Any) -> None:
        """Look, where it is time."""
        if state.step % self.every and state.step != state.steps:
            return
        if self.pairs is not None or self._seen:
            row = self._look(state)
            for name in ("chosen", "rejected", "unseen", "log_gradient_ratio", "weight", "accuracy"):
                value = getattr(row, name)
                if value is not None:
                    state.history.add(f"likelihood/{name}", row.step, value)

    def on_end(self, state: Any) -> None:
        """Let go of the term."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _find(self, objective: Any) -> Term | None:
        for _, term in iterate_terms(objective):
            if {"chosen_logps", "rejected_logps"} <= set(term.reads):
                return term
        if self.pairs is None:
            raise InputError(
                f"likelihood_monitor: no term of {objective} reads chosen_logps and rejected_logps, so there is nothing to watch. "
                "Give pairs=... to look at fixed pairs."
            )
        return None

    def _listen(self, term: nn.Module, inputs: Any, arguments: Mapping[str, Any], out: Any) -> None:
        """Keep five numbers for each pair of what the term was given; called by the term itself."""
        if not term.training or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            sides = []
            for side in ("chosen", "rejected"):
                logps = arguments[f"{side}_logps"].detach()
                reference = arguments.get(f"reference_{side}_logps")
                sides.append(
                    (logps, torch.zeros_like(logps) if reference is None else reference, arguments.get(f"{side}_mask"))
                )
            figures = _figures(sides[0], sides[1], self.beta_chosen, self.beta_rejected)
            if isinstance(out, Value) and {"weight", "accuracy"} <= out.extras.keys():
                figures[5], figures[6] = out.extras["weight"], out.extras["accuracy"]
            self._seen.append(figures)

    def _look(self, state: Any) -> LikelihoodRow:
        unseen = None if self.heldout is None else sequence_sum(self._heldout_logps(state.model)).mean()
        if self.pairs is None:
            seen, self._seen = torch.cat(self._seen, 1), []
            return self._add(state.step, seen.mean(1), None, unseen)
        names = [f"{side}_logps" for side in ("chosen", "rejected")]
        record = self._read(state.model, self.pairs, [*names, *(f"reference_{name}" for name in names)])
        masks = {
            name: self.pairs[name]
            for name in ("chosen_mask", "rejected_mask", "chosen_ids", "rejected_ids")
            if name in self.pairs
        }
        return self.observe(*record, **masks, heldout_logps=unseen if unseen is None else unseen[None], step=state.step)

    def _heldout_logps(self, model: nn.Module) -> Tensor:
        if callable(self.heldout):
            with torch.no_grad(), _evaluating(model):
                logps = self.heldout(model)
        else:
            assert self.heldout is not None
            logps = self._read(model, self.heldout, ["response_logps"])[0]
        _check_logps(heldout_logps=logps)
        return logps

    def _read(self, model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str]) -> list[Tensor]:
        with torch.no_grad(), _evaluating(model):
            quantities = self._readout_for()(ModelView(model), Quantities(dict(batch)), frozenset(names))
            return [quantities[name] for name in names]

    def _readout_for(self) -> Any:
        if self._readout is None:
            from poise.readouts.language import Language

            self._readout = Language(self.reference if isinstance(self.reference, FrozenModel) else None)
        return self._readout

    # ---- what comes of it -----------------------------------------------------------------------------------------------

    def report(self) -> LikelihoodReport:
        """Return what was seen so far."""
        return LikelihoodReport(tuple(self._rows), self._competing)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the looks so far, the start of the held-out answers, and the batches since the last look."""
        return {"rows": [asdict(row) for row in self._rows], "start": self._start, "seen": list(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._rows = [LikelihoodRow(**row) for row in state["rows"]]
        self._start, self._seen = state["start"], list(state["seen"])


# ---- pieces ---------------------------------------------------------------------------------------------------------

_Side = tuple[Tensor, Tensor, Tensor | None]


def _figures(chosen: _Side, rejected: _Side, beta_chosen: float, beta_rejected: float) -> Tensor:
    """Seven figures of each pair, float [7, batch]: shifts, the same per token, log gradient ratio, weight, accuracy."""
    up, down = log_ratio(*chosen), log_ratio(*rejected)
    z = beta_chosen * up - beta_rejected * down
    tokens = [
        r / answer_length(mask, r) if mask is not None else torch.full_like(r, math.nan)
        for r, mask in ((up, chosen[2]), (down, rejected[2]))
    ]
    gap = sequence_sum(chosen[0], chosen[2]) - sequence_sum(rejected[0], rejected[2])
    ratio = gap + (math.log(beta_rejected / beta_chosen) if beta_rejected else -math.inf)
    return torch.stack([up, down, *tokens, ratio, torch.sigmoid(-z), (z > 0).to(z.dtype)])


def _or_none(x: float) -> float | None:
    return None if math.isnan(x) else x


def _competing(pairs: Mapping[str, Tensor]) -> float | None:
    """Share of the prompts with several pairs whose chosen answers differ; None without `group` and ids."""
    if "group" not in pairs or "chosen_ids" not in pairs:
        return None
    ids = pairs["chosen_ids"]
    if "chosen_mask" in pairs:
        ids = torch.where(pairs["chosen_mask"], ids, -1)
    answers = torch.unique(torch.cat([pairs["group"][:, None], ids.reshape(len(ids), -1)], 1), dim=0)[:, 0]
    counts = torch.unique(answers, return_counts=True)[1]
    return float((counts > 1).double().mean())


def _check_logps(**given: Tensor | None) -> None:
    for name, x in given.items():
        # A little above 0 is the rounding of a certain token in half precision.
        if x is not None and bool((x > 1e-3).any()):
            raise QuantityError(
                f"likelihood_monitor: {name} are log-probabilities, at most 0, and the largest is {float(x.max()):g}."
            )


def _check_alike(logps: Tensor, reference: Tensor, side: str) -> None:
    if logps.shape[0] != reference.shape[0] or (logps.ndim == reference.ndim and logps.shape != reference.shape):
        raise QuantityError(
            f"likelihood_monitor: {side}_logps are {list(logps.shape)} and their reference is {list(reference.shape)}; they must be of "
            "the same answers."
        )


class _evaluating:
    """Put a module into evaluation mode and back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.was = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was)
