"""ELR+: two networks that teach each other's early-learning targets, with averaged weights and mixed inputs.

    1. each network has a weight average, f_avg <- a f_avg + (1 - a) f after every step, a = average * rampup(step)
    2. the target of network 1 is fed by the average of network 2 on the unmixed input, and the other way round:
       t_i <- beta t_i + (1 - beta) softmax(f_avg(x_i))
    3. inputs and labels are mixed within the batch, targets likewise:  q = l t + (1 - l) t[partner]
    4. each network minimises  cross-entropy(f(x~), y~) + weight * rampup(step) * log(1 - <q, p~>)
    5. predictions are the mean of the two networks' logits

Nothing here is a loop of its own: both networks are one module, each has a stream with its own order of the data, the
objective is a sum of four terms, and the average moves in a callback of `poise.fit`. The authors train the networks in
turns, an epoch each; here both step together, so that each is taught by an average that is never an epoch old.

    run = ELRPlus(weight=3.0).fit([network(), network()], {"input": x, "target": noisy}, epochs=100, seed=0)
    run.predict(x_test)
    suspect_labels(run.objective, noisy)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from poise.coefficient import Clock, Coefficient, Number
from poise.data.augmentations import Mixup
from poise.errors import InputError
from poise.objective import Objective
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.supervised import Classification
from poise.streams import Stream
from poise.terms.early_learning import EarlyLearning, RefinedCrossEntropy
from poise.terms.supervised import CrossEntropy
from poise.training import FitState, Run, fit
from poise.weights.schedule import rampup

__all__ = ["CoTrained", "ELRPlus", "WeightAveraging"]

Transform = Callable[[dict[str, Any], torch.Generator], dict[str, Any]]
Rule = Literal["rampup", "count"]
_STREAMS = ("first", "second")


class CoTrained(nn.Module):
    """Networks that are trained side by side, each with a weight average that is not trained.

    f(x) = mean of the networks' outputs

    The averages keep batch statistics of their own and are in training mode whenever the networks are, as in the authors' code.

    Args:
        networks: one or two modules with equal output; two that differ in their initial weights.

    Example:
        >>> CoTrained([nn.Linear(2, 3), nn.Linear(2, 3)])(torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not 1 <= len(networks) <= 2:
            raise InputError(f"ELR+ trains two networks, or one for an ablation; got {len(networks)}.")
        if len(networks) == 2 and networks[0] is networks[1]:
            raise InputError("ELR+ needs two networks with weights of their own, and the same module was given twice.")
        self.networks = nn.ModuleList(networks)
        self.averages = nn.ModuleList(copy.deepcopy(network).requires_grad_(False) for network in networks)

    def forward(self, input: Tensor, network: int | None = None, averaged: bool = False) -> Tensor:
        """Output float [batch, classes]: the mean of the networks, or of one of them, or of its weight average."""
        members = self.averages if averaged else self.networks
        if network is not None:
            out: Tensor = members[network](input)
            return out
        return torch.stack([member(input) for member in members]).mean(dim=0)

    @torch.no_grad()
    def average(self, keep: float) -> None:
        """f_avg <- keep f_avg + (1 - keep) f, for parameters; batch statistics are left alone."""
        for network, averaged in zip(self.networks, self.averages, strict=True):
            for trained, mean in zip(network.parameters(), averaged.parameters(), strict=True):
                mean.lerp_(trained, 1 - keep)


class WeightAveraging:
    """Callback of `poise.fit` that moves the weight averages of a `CoTrained` model after every step.

    keep = average * exp(-5 (1 - (step + 1) / ramp)^2)       ("rampup")
    keep = min(1 - 1 / (step + 1), average)                  ("count", Clothing1M)

    Args:
        average: share of the old average that stays in the end, in [0, 1).
        ramp: steps until then; None is half of the run (40,000 of the 78,200 steps of the authors' CIFAR runs).
        rule: `"rampup"` or `"count"`.
    """

    def __init__(self, average: float = 0.997, ramp: int | None = None, rule: Rule = "rampup") -> None:
        if not 0 <= average < 1:
            raise InputError(f"average is the share of the old weights that stays, in [0, 1); got {average}.")
        if ramp is not None and ramp < 0:
            raise InputError(f"The ramp of the weight average is a number of steps >= 0, or None; got {ramp}.")
        if rule not in ("rampup", "count"):
            raise InputError(f"The rule of the weight average is 'rampup' or 'count'; got {rule!r}.")
        self.share, self.ramp, self.rule = average, ramp, rule

    def keep(self, step: int, steps: int) -> float:
        """Share of the old average that stays after optimiser step `step` (from 1) of `steps`."""
        if self.rule == "count":
            return min(1 - 1 / (step + 1), self.share)
        ramp = self.ramp if self.ramp is not None else max(1, steps // 2)
        return rampup(self.share, steps=ramp).value(Clock(step=step + 1)) if ramp else self.share

    def on_step_end(self, state: FitState) -> None:
        """Move the averages."""
        if not isinstance(state.model, CoTrained):
            raise InputError(
                f"WeightAveraging moves the averages of a CoTrained model, and this is a {type(state.model).__name__}."
            )
        state.model.average(self.keep(state.step, state.steps))


@dataclass(frozen=True)
class ELRPlus:
    """Two networks that teach each other's early-learning targets (ELR+).

    Args:
        beta: share of the old target that stays, in [0, 1).
        weight: weight of the early-learning terms: a number or a schedule (authors: 3 on CIFAR-10, 7 on CIFAR-100).
        ramp_steps: steps over which the weight rises as `rampup`; 0 is no ramp (authors: 40,000 on CIFAR-100, else 0).
        mixup: both parameters of the Beta distribution that mixes inputs, 0 mixes nothing (authors: 1).
        average: share of the old average weights that stays in the end, in [0, 1); 0 teaches with the plain networks.
        average_steps: length of the average's ramp in steps; None is half of the run.
        average_rule: `"rampup"` (CIFAR) or `"count"` (Clothing1M, with average=0.9999).
        refine_labels: re-weight mixed labels by the targets (authors: on CIFAR-100 only).
        dtype: what the memories are stored in.

    Example:
        >>> print(ELRPlus(weight=7.0, beta=0.9).objective(1))
        cross_entropy.on('first') + 7*early_learning(beta=0.9, teacher=True).on('first')

    Source: Liu et al. 2020, arXiv:2007.00151, section 4.3; shengliu66/ELR, folder ELR_plus.
    """

    beta: float = 0.7
    weight: Number | Coefficient = 3.0
    ramp_steps: int = 0
    mixup: float = 1.0
    average: float = 0.997
    average_steps: int | None = None
    average_rule: Rule = "rampup"
    refine_labels: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mixup < 0:
            raise InputError(
                f"ELRPlus: mixup is the parameter of a Beta distribution, or 0 for none; got {self.mixup}."
            )
        if self.ramp_steps < 0:
            raise InputError(f"ELRPlus: ramp_steps is a number of steps >= 0; got {self.ramp_steps}.")
        if self.ramp_steps and isinstance(self.weight, Coefficient):
            raise InputError("ELRPlus: the weight is a schedule already; leave out ramp_steps.")
        WeightAveraging(self.average, self.average_steps, self.average_rule)
        EarlyLearning(beta=self.beta, dtype=self.dtype)

    def objective(self, networks: int = 2) -> Objective:
        """The trade-off of `networks` networks, two terms each; every call makes new memories."""
        weight: Any = rampup(float(self.weight), steps=self.ramp_steps) if self.ramp_steps else self.weight  # type: ignore[arg-type]
        total = Objective()
        for stream in _STREAMS[:networks]:
            early = EarlyLearning(beta=self.beta, teacher=True, dtype=self.dtype).on(stream)
            label = early.labels[0]
            loss = (
                RefinedCrossEntropy().on(stream, early_target=f"{label}.target")
                if self.refine_labels
                else CrossEntropy().on(stream)
            )
            total = total + loss + weight * early
        return total

    def fit(
        self,
        networks: Sequence[nn.Module],
        train: Any,
        valid: Any = None,
        *,
        batch_size: int = 128,
        transform: Transform | None = None,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> Run:
        """Train the networks together; `run.model` is a `CoTrained` and predicts with the mean of their logits.

        Args:
            networks: two modules that map `input` to logits, each with initial weights of its own (one module for an ablation:
                it is then taught by its own average).
            train: `{"input": float [n, ...], "target": int64 [n]}`, or the pair.
            valid: as for `poise.fit`.
            batch_size: examples of a step for each network.
            transform: augmentation of a batch, before mixing.
            callbacks: as for `poise.fit`.
            options: everything else that `poise.fit` takes, such as `epochs`, `lr`, `solver`, `seed`.

        Raises:
            InputError: data, networks or an option do not fit.

        Example:
            >>> nets = [nn.Linear(2, 3), nn.Linear(2, 3)]
            >>> run = ELRPlus().fit(nets, {"input": torch.randn(8, 2), "target": torch.arange(8) % 3}, steps=2)
            >>> run.predict(torch.ones(1, 2)).shape
            torch.Size([1, 3])
        """
        model = CoTrained(networks)
        data = _labelled(train, classes=_outputs(model, train))
        mix = Mixup(self.mixup, int(data["target"].shape[1]), dominant=True) if self.mixup else None
        names = _STREAMS[: len(networks)]
        streams = {name: Stream(dict(data), batch_size, transform=_KeepPlain(transform, mix)) for name in names}
        sides = {name: _Side(place, teacher=len(names) - 1 - place) for place, name in enumerate(names)}
        return fit(
            model,
            self.objective(len(networks)),
            streams,
            valid,
            # Validation and predictions go by the first readout: the whole model.
            readout={"all": Classification(), **sides},
            callbacks=[WeightAveraging(self.average, self.average_steps, self.average_rule), *callbacks],
            **options,
        )


class _Side:
    """Offers one network's logits on the mixed input, and the probabilities of the average that teaches it on the plain one."""

    output = "logits"

    def __init__(self, network: int, teacher: int) -> None:
        self.network, self.teacher = network, teacher

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        batch.offer("logits", lambda: model(batch["input"], network=self.network))
        batch.offer("teacher_probabilities", lambda: self._taught(model, batch["plain_input"]))
        return batch

    @torch.no_grad()
    def _taught(self, model: ModelView, plain: Tensor) -> Tensor:
        return torch.softmax(model(plain, network=self.teacher, averaged=True), dim=-1)


class _KeepPlain:
    """Augment, keep that input for the teacher, and mix."""

    def __init__(self, augment: Transform | None, mix: Mixup | None) -> None:
        self.augment, self.mix = augment, mix

    def __call__(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if self.augment is not None:
            batch = self.augment(batch, generator)
        batch = {**batch, "plain_input": batch["input"]}
        return batch if self.mix is None else self.mix(batch, generator)


def _labelled(train: Any, classes: int) -> dict[str, Tensor]:
    """The training data with labels as distributions, which mixed labels are."""
    data = dict(train) if isinstance(train, Mapping) else dict(zip(("input", "target"), train, strict=True))
    target = data["target"]
    if target.ndim == 1 and not target.is_floating_point():
        if int(target.max()) >= classes:
            raise InputError(f"The networks put out {classes} classes, and the target has class {int(target.max())}.")
        data["target"] = functional.one_hot(target, classes).to(data["input"].dtype)
    return data


def _outputs(model: CoTrained, train: Any) -> int:
    """Number of classes that the networks put out; they must agree."""
    given = train["input"] if isinstance(train, Mapping) and "input" in train else None
    if given is None and isinstance(train, tuple | list) and len(train) == 2:
        given = train[0]
    if not isinstance(given, Tensor):
        raise InputError("ELRPlus trains on tensors: {'input': float [n, ...], 'target': int64 [n]}, or the pair.")
    device = next(model.parameters()).device
    training = model.training
    with torch.no_grad():
        model.eval()
        widths = [int(network(given[:2].to(device)).shape[-1]) for network in model.networks]
        model.train(training)
    if len(set(widths)) > 1:
        raise InputError(f"The two networks put out {widths[0]} and {widths[1]} classes; they must agree.")
    return widths[0]
