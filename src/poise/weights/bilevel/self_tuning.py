"""Self-tuning networks: hyperparameters that are tuned while the network trains, by a learned answer of its weights to them.

A bilevel problem: the weights w minimise a training loss that depends on hyperparameters r(h), and h minimises the validation loss at these
weights. A gated network `w(h)` learns the answer around the present h, and then the hypergradient is one backward pass through the gates:

    training steps      h_i = h + sigma e_i, e_i ~ N(0, 1), one for each example;  w moves down  L_T(r(h_i), w(h_i));  h stands
    validation steps    h, sigma move down  E L_V(w(h + sigma e)) - tau H,   H = sum_j log(sigma_j sqrt(2 pi e));       w stands

The entropy H keeps the perturbation from vanishing: with too small a sigma the gates learn nothing, with too large a one they cannot fit.

`variant="delta"` is the successor: gates see `h_i - h`, so that at h itself the network is `W_elem` exactly; the elementary weights train
without perturbation, and the answering ones with the network linearised in the gates (`response_step` beside this file).

Sources: arXiv:1903.03088 (self-tuning networks), arXiv:2010.13514 (Delta-STN).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise import processes
from poise.coefficient import leaves_of
from poise.errors import IncompatibleError, InputError, NonFiniteError
from poise.quantities import derive
from poise.response_input import ResponseInput, response_input_of
from poise.weights.bilevel.response_step import ResponseStep
from poise.weights.descent import adam
from poise.weights.hyperparameter import Hyperparameter, HyperparameterWeight, check_names
from poise.weights.hyperparameter_schedule import HyperparameterSchedule
from poise.weights.owned import OwnedWeight

if TYPE_CHECKING:
    from poise.problem import Problem, Signals

__all__ = ["BestRecord", "SelfTuning", "perturbation_entropy"]

BETAS = (0.9, 0.999)
"""Of Adam on h and on the scales."""


def perturbation_entropy(scale: Tensor) -> Tensor:
    """Return the entropy of a normal perturbation, `sum log(sigma sqrt(2 pi e))`, 0-dim, nats. Its gradient is `1/sigma`."""
    return (scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum()


@dataclass(frozen=True)
class BestRecord:
    """The best stretch of a run.

    Attributes:
        step: optimiser steps done then.
        loss: mean validation loss of the validation steps of the stretch.
        values: the hyperparameters then, by name.
    """

    step: int
    loss: float
    values: dict[str, float]


class SelfTuning(nn.Module):
    """Tune hyperparameters of a gated network in one run.

    Args:
        hypers: what is tuned, in the order of the gates. One with the name of an `auto` weight sets that weight; `auto` weights after
            which none is called get one of their own, on a log scale.
        scale: standard deviation of the perturbation of h at first, positive; or by name.
        learn_scale: move the scales in validation steps too.
        entropy: weight tau of the entropy, at least 0.
        lr, scale_lr: of Adam on h and on the scales.
        train_steps, valid_steps: how many of each make a cycle.
        warmup: training steps before the first validation step; below 1 a share of the run.
        variant: "stn" or "delta".
        origin: where the gates of "stn" are shut: "start" at the first h, so that gates that are put into a trained model leave it as it is
            and no large constant goes into V; "zero" at h = 0, as in the authors' code. The network can be the same either way.
        response_lr: learning rate of the answering weights under "delta"; the optimiser's own where nothing is said.
        valid_batch: validation examples of a validation step; None for all of them.
        upper: the validation objective as a formula; by default the terms on data at a fixed weight.
        window: validation steps over which the best record is averaged.
        seed: of the perturbations, beside the run's.

    The model must have gated layers (`poise.parts.make_best_response`). Its layers of noise and its terms read the hyperparameters
    themselves. Examples have perturbations of their own but for hyperparameters with `per_example=False`.

    Buffers, float64: `free_scale` [n] (sigma = softplus of it), `origin` [n] (where the gates are shut), `moments` [2, 2, n] (of h and of
        the scales: first, second); `counts`, int64 [2] (training and validation steps). The variables h are the hyperparameters' own.

    Raises:
        InputError: an argument out of range, two hyperparameters of one name, no validation data, a hyperparameter that nothing uses, one
            value for each example of a term that has one value.
        IncompatibleError: no gated layer (the hypergradient is identically zero), several micro-batches, or under "delta" a tuned weight of
            a term that does not read the model's outputs.

    >>> rate = Hyperparameter("rate", 0.05, 0, 0.9)
    >>> SelfTuning([rate], scale=0.5).scales
    {'rate': 0.5}

    Source: arXiv:1903.03088, algorithm 1; defaults of its code. Delta: arXiv:2010.13514.
    """

    formula: ClassVar[str] = "self_tuning"
    needs: ClassVar[frozenset[str]] = frozenset({"validation"})
    tunes_hyperparameters: ClassVar[bool] = True
    free_scale: Tensor
    moments: Tensor
    origin: Tensor
    counts: Tensor

    def __init__(
        self,
        hypers: Iterable[Hyperparameter] = (),
        scale: float | Mapping[str, float] = 0.5,
        learn_scale: bool = True,
        entropy: float = 1e-3,
        lr: float = 3e-3,
        scale_lr: float = 3e-3,
        train_steps: int = 2,
        valid_steps: int = 1,
        warmup: float = 0.05,
        variant: Literal["stn", "delta"] = "stn",
        origin: Literal["start", "zero"] = "start",
        response_lr: float | None = None,
        valid_batch: int | None = None,
        upper: Any = None,
        window: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_arguments(
            entropy, lr, scale_lr, train_steps, valid_steps, warmup, variant, origin, response_lr, valid_batch, window
        )
        self.scale, self.learn_scale, self.entropy = scale, learn_scale, entropy
        self.lr, self.scale_lr = lr, scale_lr
        self.train_steps, self.valid_steps, self.warmup, self.variant = train_steps, valid_steps, warmup, variant
        self.valid_batch, self.upper, self.window, self.seed = valid_batch, upper, window, seed
        self.hypers = nn.ModuleList()
        self.origin_at = origin
        for name in ("free_scale", "moments", "origin"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self._log: dict[str, list[Any]] = {"steps": [], "raws": [], "values": [], "scales": [], "losses": []}
        self._best: BestRecord | None = None
        self._response = ResponseStep(response_lr)
        self._examined, self._made = False, frozenset[str]()
        self._tuned: tuple[Hyperparameter, ...] = ()
        self._gates: list[tuple[nn.Module, ResponseInput]] = []
        given = tuple(hypers)
        if given:
            self._take(check_names(given, "SelfTuning"))

    # ---- what it owns ------------------------------------------------------------------------------------------------

    def _take(self, hypers: Iterable[Hyperparameter]) -> None:
        """Take hyperparameters into the order of the gates, with their first scales."""
        self.hypers.extend(hypers)
        names = [hyper.name for hyper in self.tuned]
        scales = self.scale if isinstance(self.scale, Mapping) else dict.fromkeys(names, self.scale)
        unknown = [name for name in scales if name not in names]
        if unknown:
            raise InputError(f"SelfTuning: scale names {unknown[0]!r}, and the hyperparameters are {', '.join(names)}.")
        first = torch.tensor([float(scales.get(name, 0.5)) for name in names], dtype=torch.float64)
        if not bool((first > 0).all()) or not bool(torch.isfinite(first).all()):
            raise InputError(f"SelfTuning: the scale of a perturbation must be positive, and it is {self.scale}.")
        self.free_scale = first + torch.log(-torch.expm1(-first))
        self.moments = torch.zeros(2, 2, len(names), dtype=torch.float64)
        self.origin = self.raw if self.origin_at == "start" else torch.zeros_like(self.raw)

    def bind(self, starts: Mapping[str, float], ranges: Mapping[str, tuple[float, float]]) -> None:
        """Make a hyperparameter for every owned weight that none is called after.

        Args:
            starts: first values by name.
            ranges: their ranges, positive.
        """
        known = {hyper.name for hyper in self.tuned}
        missing = [
            Hyperparameter(name, start, *ranges.get(name, (1e-6, 1e6)), scale="log")
            for name, start in starts.items()
            if name not in known
        ]
        self._made = frozenset(hyper.name for hyper in missing)
        if missing or not known:
            self._take(check_names(missing, "SelfTuning"))

    @property
    def tuned(self) -> tuple[Hyperparameter, ...]:
        """The hyperparameters, in the order of the gates."""
        if len(self._tuned) != len(self.hypers):
            self._tuned = tuple(hyper for hyper in self.hypers if isinstance(hyper, Hyperparameter))
        return self._tuned

    @property
    def raw(self) -> Tensor:
        """The unconstrained variables h, float64 [n]."""
        return torch.stack([hyper.raw.cpu() for hyper in self.tuned])

    @property
    def _point(self) -> Tensor:
        """What the gates see at h itself, float64 [n]."""
        return torch.zeros_like(self.origin) if self.variant == "delta" else self.raw - self.origin

    @property
    def values(self) -> dict[str, float]:
        """The hyperparameters now, by name."""
        return {hyper.name: float(hyper) for hyper in self.tuned}

    @property
    def scales(self) -> dict[str, float]:
        """The perturbation's standard deviation of each h now, by name."""
        return {h.name: round(float(s), 12) for h, s in zip(self.tuned, functional.softplus(self.free_scale), strict=True)}  # fmt: skip

    @property
    def best(self) -> BestRecord | None:
        """The best stretch so far, by mean validation loss over `window` validation steps; None before the first."""
        return self._best

    @property
    def schedule(self) -> HyperparameterSchedule:
        """The path of the hyperparameters, to be drawn or replayed.

        Raises:
            InputError: no step was made yet.
        """
        log = self._log
        return HyperparameterSchedule(
            tuple(h.name for h in self.tuned),
            tuple(log["steps"]),
            tuple(map(tuple, log["raws"])),
            tuple(map(tuple, log["values"])),
        )

    @property
    def losses(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Steps and validation losses of the validation steps (the first entry of the log is the start, and has none)."""
        return tuple(self._log["steps"][1:]), tuple(self._log["losses"][1:])

    def report(self) -> dict[str, float]:
        """Return the values, the scales and the last validation loss, for a run's curves."""
        found = {f"hyperparameter/{name}": value for name, value in self.values.items()}
        found |= {f"scale/{name}": value for name, value in self.scales.items()}
        if len(self._log["losses"]) > 1:
            found["validation_loss"] = self._log["losses"][-1]
        return found

    # ---- a step ------------------------------------------------------------------------------------------------------

    def weights(self, signals: Signals) -> dict[str, float | Tensor]:
        """Draw the perturbations of this step, put them where gates, noise and terms read them, and return the tuned weights."""
        problem = signals.problem
        inputs = self._inputs(problem.model)
        if not self._examined:
            self._examine(signals, inputs)
        if not self._log["steps"]:
            self._record(signals.step, math.nan)
        if self.variant == "stn":
            rows = self._rows(problem, self.raw, functional.softplus(self.free_scale), signals.step, "train")
            inputs.place(rows - self.origin.to(rows.device))
            self._place(rows)
        return {hyper.name: hyper.read() for hyper in self.tuned if hyper.name in signals.names}

    def advance(self, signals: Signals) -> None:
        """Take the perturbations away; under "delta" teach the answering weights; and where it is due make validation steps."""
        inputs = self._inputs(signals.problem.model)
        self._clear(inputs)
        self._refuse_unused()
        if self.variant == "delta":
            self._answer(signals, inputs)
        self.counts[0] += 1
        warm = self.warmup if self.warmup >= 1 else round(self.warmup * signals.steps)
        since = int(self.counts[0]) - int(warm)
        if since <= 0 or since % self.train_steps:
            return
        validation = signals.validation
        assert validation is not None
        for number in range(self.valid_steps):
            loss, of_raw, of_scale = self.hypergradient(validation, signals.step, number)
            self._move(of_raw, of_scale)
            inputs.settle(self._point)
            self.counts[1] += 1
        self._record(signals.step + 1, loss)

    def discard(self, signals: Signals) -> None:
        """Take the perturbations of a step away that was not taken."""
        self._clear(self._inputs(signals.problem.model))

    def hypergradient(self, validation: Problem, step: int = 0, number: int = 0) -> tuple[float, Tensor, Tensor]:
        """Return the validation loss, and the gradients of `L_V - tau H` in h and in the scales' free variables, float64 [n].

        The gradient reaches them through the gates alone: in evaluation mode no noise acts. Perturbed where the scales are learned.

        Args:
            validation: the validation objective on a batch.
            step, number: which perturbations are drawn.

        Raises:
            IncompatibleError: the validation loss does not depend on the gates at all.
            NonFiniteError: the loss is infinite or NaN.
        """
        raw = self.raw.requires_grad_()
        free = self.free_scale.detach().clone().requires_grad_()
        inputs = self._inputs(validation.model)
        with torch.enable_grad():
            scale = functional.softplus(free)
            rows = self._rows(validation, raw, scale, step, f"valid {number}") if self.learn_scale else raw
            shut = raw.detach() if self.variant == "delta" else self.origin
            inputs.place(rows - shut.to(rows.device))
            self._place(None)
            try:
                with _evaluating(validation.model, validation.objective):
                    loss = validation.loss_of(validation.outputs())
            finally:
                self._clear(inputs)
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"The validation loss is {float(loss.detach())} in step {step}, so the hyperparameters cannot move. Lower the learning "
                    "rates, or the scale."
                )
            if not loss.requires_grad:
                raise IncompatibleError(
                    "The validation loss does not depend on the gates, so the hypergradient is identically zero: put gates into layers "
                    "that the validation objective reads (make_best_response)."
                )
            # Every process has its share of the loss, and the entropy is one for all.
            total = loss.double().cpu() - self.entropy * perturbation_entropy(scale) / processes.size()
            found = torch.autograd.grad(total, (raw, free), allow_unused=True)
        gradients = [torch.zeros_like(raw) if g is None else processes.sum_across(g) for g in found]
        return float(processes.sum_across(loss.detach())), gradients[0], gradients[1]

    def _inputs(self, model: nn.Module) -> ResponseInput:
        """Return the inputs of a model's gates, looked for once."""
        if not self._gates or self._gates[0][0] is not model:
            self._gates = [(model, response_input_of(model))]
        return self._gates[0][1]

    def _rows(self, problem: Problem, raw: Tensor, scale: Tensor, step: int, what: str) -> Tensor:
        """h_i = h + sigma e_i, [batch, n]; what examples share has one e for the batch."""
        if len(problem.batches) > 1:
            raise IncompatibleError(
                "Self-tuning perturbs the hyperparameters of every example of a step, and a step of several micro-batches has them in "
                "pieces: use accumulate=1."
            )
        data = next(iter(problem.batches[0].values()))
        like = next(v for v in data.values() if isinstance(v, Tensor) and v.ndim)
        seed = (*problem.key, self.seed, step, what)
        shared = torch.randn(len(raw), generator=_generator(*seed), dtype=torch.float64)
        own = torch.randn(
            len(like), len(raw), generator=_generator(*seed, "examples", processes.rank()), dtype=torch.float64
        )
        mask = torch.tensor([hyper.per_example for hyper in self.tuned])
        return (raw + scale * torch.where(mask, own, shared)).to(like.device)

    def _place(self, rows: Tensor | None) -> None:
        """Put the values of a step where noise and terms read them; the gates' share of the graph ends here."""
        for place, hyper in enumerate(self.tuned):
            column = None if rows is None else rows[:, place].detach()
            hyper.place(column if column is None or hyper.per_example else column[0])

    def _clear(self, inputs: ResponseInput) -> None:
        inputs.place(None)
        self._place(None)

    def _answer(self, signals: Signals, inputs: ResponseInput) -> None:
        """Teach the answering weights on the batch of the step, with perturbations."""
        raw = self.raw
        rows = self._rows(signals.problem, raw, functional.softplus(self.free_scale), signals.step, "train")
        self._place(rows)
        try:
            with self._weighing(signals):
                self._response(signals.problem, inputs, rows - raw.to(rows.device), signals.lr)
        finally:
            self._clear(inputs)

    @contextmanager
    def _weighing(self, signals: Signals) -> Iterator[None]:
        """Let the weights that this policy owns have the values that are placed, one for each example."""
        tuned = {hyper.name: hyper for hyper in self.tuned if hyper.name in signals.names}
        owned = [
            leaf
            for entry in signals.problem.objective._entries
            for leaf in leaves_of(entry.weight)
            if isinstance(leaf, OwnedWeight) and leaf.name in tuned
        ]
        before = [leaf.current for leaf in owned]
        for leaf in owned:
            leaf.current = tuned[leaf.name].read()
        try:
            yield
        finally:
            for leaf, current in zip(owned, before, strict=True):
                leaf.current = current

    def _move(self, of_raw: Tensor, of_scale: Tensor) -> None:
        """Adam on h and, where they are learned, on the scales."""
        gradient = torch.stack([of_raw, of_scale])
        step, first, second = adam(gradient, self.moments[:, 0], self.moments[:, 1], int(self.counts[1]) + 1, BETAS)
        self.moments = torch.stack([first, second], 1)
        for hyper, raw in zip(self.tuned, self.raw - self.lr * step[0], strict=True):
            hyper.move(raw)
        if self.learn_scale:
            self.free_scale = self.free_scale - self.scale_lr * step[1]

    def _record(self, step: int, loss: float) -> None:
        log = self._log
        log["steps"].append(step)
        log["raws"].append(self.raw.tolist())
        log["values"].append(list(self.values.values()))
        log["scales"].append(functional.softplus(self.free_scale).tolist())
        log["losses"].append(loss)
        recent = log["losses"][1:][-self.window :]
        if len(recent) == self.window:
            mean = sum(recent) / self.window
            if self._best is None or mean < self._best.loss:
                self._best = BestRecord(step, mean, self.values)

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def _examine(self, signals: Signals, inputs: ResponseInput) -> None:
        """Look once, before the first step, whether the run can be tuned."""
        if not self.tuned:
            self.bind(dict.fromkeys(signals.names, 1.0), {})
        if inputs.n_hyper != len(self.tuned):
            raise InputError(
                f"SelfTuning tunes {len(self.tuned)} hyperparameters ({', '.join(self.values)}), and the gates of the model have "
                f"{inputs.n_hyper} inputs: make_best_response(model, n_hyper={len(self.tuned)})."
            )
        if signals.validation is None:
            raise InputError(
                "SelfTuning has no validation data: hyperparameters that are fitted to the training data would only switch regularisation "
                "off. Give valid=..."
            )
        self._settle_weights(signals)
        inputs.settle(self._point)
        for hyper in self.tuned:
            hyper.used = False
        self._examined = True

    def _settle_weights(self, signals: Signals) -> None:
        """A weight before a term with one value is one number; under "delta" a term must speak through the model's outputs."""
        entries = {e.label: e for e in signals.problem.objective._entries}
        weighed: dict[str, list[str]] = {
            name: list(getattr(signals, "rows", {}).get(name, ())) for name in signals.names
        }
        for label, entry in entries.items():
            for leaf in leaves_of(entry.weight):
                if isinstance(leaf, HyperparameterWeight):
                    weighed.setdefault(leaf.hyperparameter.name, []).append(label)
        for hyper in self.tuned:
            for label in weighed.get(hyper.name, ()):
                self._refuse_silent(signals.problem, hyper.name, label)
                if "per_example" in entries[label].term.capabilities:
                    continue
                if hyper.name in self._made:
                    hyper.per_example = False  # which `bind` could not know
                elif hyper.per_example:
                    raise InputError(
                        f"Hyperparameter {hyper.name!r} has a value for each example, and the term {label!r} that it weighs has one "
                        "value for the batch: per_example=False."
                    )

    def _refuse_silent(self, problem: Problem, name: str, label: str) -> None:
        """Under "delta" the answer is learned from the linearised outputs, and a term that does not read them teaches nothing."""
        entry = next(e for e in problem.objective._entries if e.label == label)
        if self.variant == "delta" and all(reading.name != problem._output for reading in entry.forward_reads):
            raise IncompatibleError(
                f"variant='delta' learns how the weights answer from the model's {problem._output}, which the term {label!r} weighed by "
                f"{name!r} does not read: use variant='stn'."
            )

    def _refuse_unused(self) -> None:
        if int(self.counts[0]):
            return
        unused = [hyper.name for hyper in self.tuned if not hyper.used]
        if unused:
            raise InputError(
                f"Nothing uses the hyperparameter {unused[0]!r}: no layer of the model and no term read it in the first step, so tuning it "
                "means nothing. Hand it to a layer such as TunedDropout, or write it before a term."
            )

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A copy has hyperparameters of its own, and finds the gates of the model that it is used on.
        return {**self.__dict__, "_gates": [], "_tuned": ()}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the log, the best record and the momentum of the answering weights."""
        best = self._best
        return {
            "log": {name: list(rows) for name, rows in self._log.items()},
            "best": None if best is None else [best.step, best.loss, dict(best.values)],
            "response": self._response.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._log = {name: list(rows) for name, rows in state["log"].items()}
        self._best = None if state["best"] is None else BestRecord(*state["best"])
        self._response.load_state_dict(state["response"])

    def _apply(self, fn: Any, recurse: bool = True) -> SelfTuning:
        return (
            self  # a few numbers, which stay on the host in double precision; the hyperparameters move with the model
        )


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode, and every part of them back as it was."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


def _generator(*keys: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*keys))


def _check_arguments(
    entropy: float,
    lr: float,
    scale_lr: float,
    train_steps: int,
    valid_steps: int,
    warmup: float,
    variant: str,
    origin: str,
    response_lr: float | None,
    valid_batch: int | None,
    window: int,
) -> None:
    if variant not in ("stn", "delta"):
        raise InputError(f"SelfTuning: variant is 'stn' or 'delta', and it is {variant!r}.")
    if origin not in ("start", "zero"):
        raise InputError(f"SelfTuning: origin is 'start' or 'zero', and it is {origin!r}.")
    if not (lr > 0 and scale_lr > 0 and (response_lr is None or response_lr > 0)):
        raise InputError(
            f"SelfTuning: learning rates must be positive; lr, scale_lr and response_lr are {lr}, {scale_lr} and {response_lr}."
        )
    if not (0 <= entropy < math.inf and 0 <= warmup < math.inf):
        raise InputError(
            f"SelfTuning: entropy and warmup must be at least 0 and finite; they are {entropy} and {warmup}."
        )
    if train_steps < 1 or valid_steps < 1 or window < 1 or (valid_batch is not None and valid_batch < 1):
        raise InputError(
            "SelfTuning: train_steps, valid_steps, window and valid_batch must be at least 1; they are "
            f"{train_steps}, {valid_steps}, {window} and {valid_batch}."
        )
