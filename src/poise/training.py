"""The one training loop.

    run = poise.fit(model, "cross_entropy + 0.01*l2", {"input": x, "target": y}, epochs=20)
    run.model, run.history["loss"], run.history["valid/accuracy"]

A step takes one batch from every stream, freezes it as a `Problem`, lets the solver step, and advances the objective.
A run that is stopped and resumed from its checkpoint equals the uninterrupted one bit for bit, on one machine with deterministic kernels.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from poise import checkpoint as checkpoints
from poise import processes
from poise.coefficient import Clock, Coefficient
from poise.errors import CheckpointError, IncompatibleError, InputError, Interrupted, NonFiniteError
from poise.metrics import rises
from poise.objective import DataInfo, Objective, Summand, Term
from poise.parts import apply_part
from poise.policy import Policies
from poise.problem import Policy, Problem, Signals, Step, Validation, named_parameters_of
from poise.quantities import derive
from poise.readouts.language import SIDES, Language, needs_reference, reference_for
from poise.readouts.supervised import Readout, readout_for
from poise.run import FitState, History, Run, Window, choose_device, default_metrics, predict
from poise.solvers.torch_optimizers import as_solver
from poise.streams import Stream
from poise.weights.feasibility import ConstraintCurves, watch

__all__ = ["FitState", "History", "Run", "choose_device", "default_metrics", "fit", "predict"]

Metrics = Callable[[Tensor, Tensor], Mapping[str, float]]


def fit(
    model: nn.Module,
    objective: Objective | Term | str,
    train: Any,
    valid: Any = None,
    *,
    readout: Readout | Mapping[str, Readout] | None = None,
    solver: Any = "sgd",
    policy: Policy | str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    lr_schedule: Coefficient | Callable[[torch.optim.Optimizer], Any] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 128,
    accumulate: int = 1,
    clip: float | None = None,
    transform: Any = None,
    precision: str = "fp32",
    device: str | torch.device = "auto",
    seed: int = 0,
    deterministic: bool = False,
    metrics: Metrics | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    validate_every: float | None = None,
    monitor: str | None = None,
    patience: int | None = None,
    restore_best: bool = False,
    on_nonfinite: str = "stop",
    log_every: float | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool | Callable[[FitState], None] = False,
    trackers: Sequence[str] = (),
    tracker_folder: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_seconds: float | None = 60.0,
    resume: bool = True,
) -> Run:
    """Minimise an objective over a model's parameters.

    Args:
        model: any module; it is trained in place.
        objective: an objective, a term or a formula; its parts (`"... with compand"`) are put into the model.
        train: tensors by quantity name, `(input, target)`, a data set, a `DataLoader`, a `Stream`, or a mapping of these by stream
            name (`{"main": ..., "anchor": ...}`).
        valid: data of the same form, for metrics after every `validate_every` steps.
        readout: how quantities are made from the model; by default classification or regression by the target.
        solver: a solver, a name ("sgd", "adamw", "lbfgs", ...), a `torch.optim` class, or an optimiser with its parameters.
        policy: what sets the weights that are `auto` while the run goes on: a policy, or the name of one ("neumann", "mgda(...)"). A
            balancer in front of a formula without `auto` weighs all its terms. Weights that name their own policy need none here.
        lr, weight_decay: handed to a solver that is given by name or class.
        lr_schedule: a schedule that multiplies every learning rate (`cosine(1, 0)`), or a function that makes a PyTorch scheduler.
        steps, epochs: length of the run; exactly one of them, 10 epochs where neither is given.
        batch_size: examples of one step, over all processes and micro-batches.
        accumulate: micro-batches of one step.
        clip: largest norm of the gradient, for a solver that is given by name or class.
        transform: `transform(batch, generator)` of the main stream, such as an augmentation.
        precision: "fp32" or "bf16" (forward passes in bfloat16, everything else in float32).
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: decides the data's order, augmentations, dropout and what terms draw; not the model's weights, which are there already.
        deterministic: ask PyTorch for deterministic kernels only.
        metrics: `metrics(output, target)` on the whole of `valid`; by default accuracy and negative log-likelihood, or RMSE and MAE.
        evaluate: `evaluate(model)` in place of `valid` and `metrics`, for models that are not measured output by output.
        validate_every: in steps, or below 1 a share of the run; one epoch by default.
        monitor: metric that early stopping and the best model go by; "accuracy" or "rmse" by default. Falling is better for names that
            contain loss, nll, rmse, mae, error, ece and the like (`poise.metrics.FALLING`).
        patience: stop after so many validations without a better `monitor`.
        restore_best: return the model of the best validation.
        on_nonfinite: "stop" raises at once; "skip" leaves the step out and counts it.
        log_every: steps between points of the training curves, or below 1 a share of the run; an epoch or 50 steps by default,
            whichever is less.
        callbacks: objects with any of `on_begin(state)`, `on_step_end(state)`, `on_epoch_end(state)`, `on_end(state)`.
        progress: True draws a bar with the time left; a function is called at every log point.
        trackers: names of Accelerate's trackers ("tensorboard", "mlflow", "wandb"); `tracker_folder` is where they write.
        checkpoint: a folder; then the run saves itself every `checkpoint_steps` steps or `checkpoint_seconds` seconds and at the end.
        resume: go on from the newest checkpoint in the folder.

    Raises:
        InputError: an argument or the data do not fit.
        IncompatibleError: the solver needs what a term does not offer.
        NonFiniteError: a term became infinite or NaN.
        Interrupted: Ctrl-C; what is there was saved.

    >>> x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))
    >>> run = fit(nn.Linear(3, 2), "cross_entropy", (x, y), steps=5)
    >>> run.steps
    5
    """
    return _Loop(**locals()).run()


class _Loop:
    """One call of `fit`."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective | Term | str,
        train: Any,
        valid: Any,
        readout: Any,
        solver: Any,
        steps: int | None,
        epochs: float | None,
        batch_size: int,
        accumulate: int,
        transform: Any,
        precision: str,
        device: str | torch.device,
        seed: int,
        **options: Any,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision is 'fp32' or 'bf16', and it is {precision!r}.")
        if options["on_nonfinite"] not in ("stop", "skip"):
            raise InputError(f"on_nonfinite is 'stop' or 'skip', and it is {options['on_nonfinite']!r}.")
        if accumulate < 1:
            raise InputError(f"accumulate must be at least 1, and it is {accumulate}.")
        self.options = options
        self.device = choose_device(device)
        self.seed, self.precision = seed, precision
        self.objective = _as_objective(objective)
        if not self.objective.labels:
            raise InputError(
                "The objective has no terms (a weight that is the number 0 removes its term), so there is nothing to minimise."
            )
        self.objective.check_weights()
        self.formula = str(self.objective)
        self.policies = Policies(self.objective, options["policy"])
        self.objective = self.policies.objective
        if self.objective.autos:
            next(iter(self.objective.autos.values())).value(Clock())
        # Only now, so that an objective that is refused leaves the model as it was.
        handles = [apply_part(model, part) for part in self.objective.parts]
        options["callbacks"] = [*options["callbacks"], *handles, *self._watchers(options["callbacks"])]
        self.model = model.to(self.device)
        self.objective.seed = seed
        self.streams = self._prepare_streams(train, batch_size, accumulate, transform)
        main = next(iter(self.streams.values()))
        self.valid = _as_batch(valid, self.device)
        self.upper = self._validation_objective()
        self.readout = readout if readout is not None else self._choose_readout(main)
        self.steps = self._length(steps, epochs, main.steps_per_epoch, self._limit())
        self.steps_per_epoch = main.steps_per_epoch
        infos = {
            name: DataInfo(s.examples, self._classes(s), self.device)
            for name, s in self.streams.items()
            if s.examples is not None
        }
        if "main" not in infos and infos:
            infos["main"] = next(iter(infos.values()))
        self.objective.bind(infos, steps=self.steps, steps_per_epoch=self.steps_per_epoch)
        self.objective.to(self.device)
        self.solver = self._prepare_solver(solver)
        self.named = named_parameters_of(self.model, self.objective)
        self.policies.bind()
        self.scheduler = self._prepare_schedule()
        self.state = FitState(
            self.model, self.objective, History(), steps=self.steps, steps_per_epoch=self.steps_per_epoch
        )
        self.window = Window()
        self.rising = rises(self._monitor())
        self.folder = None if options["checkpoint"] is None else Path(options["checkpoint"])
        self.interrupted, self.saving = False, 0.0

    # ---- setting out ------------------------------------------------------------------------------------------------

    def _prepare_streams(self, train: Any, batch_size: int, accumulate: int, transform: Any) -> dict[str, Stream]:
        named = isinstance(train, Mapping) and not any(isinstance(v, Tensor) for v in train.values())
        given: Mapping[str, Any] = train if named else {"main": train}
        if not given:
            raise InputError("train has no stream: give data by name, as in {'main': ..., 'anchor': ...}.")
        streams = {}
        for place, (name, data) in enumerate(given.items()):
            stream = (
                data
                if isinstance(data, Stream)
                else Stream(data, batch_size, transform=transform if place == 0 else None)
            )
            streams[name] = stream.prepare(name, self.seed, self.device, accumulate)
            stream.attach(self.model)
        known = {*streams, None}
        for stream_name in self.objective.streams:
            if stream_name not in known:
                raise InputError(
                    f"The objective reads the stream {stream_name!r}, and train has {', '.join(streams)}. "
                    "Give its data, or take the term out."
                )
        return streams

    def _choose_readout(self, main: Stream) -> Readout:
        first = main.data if isinstance(main.data, Mapping) else next(main.iterate(0))[0]
        if any(f"{side}_ids" in first for side in SIDES):
            return self._language_readout(first)
        target = first.get("target")
        if not isinstance(target, Tensor):
            raise InputError("The training data have no 'target', so no readout is obvious: give readout=...")
        return readout_for(target)

    def _language_readout(self, first: Mapping[str, Any]) -> Readout:
        """Return the readout of answers, with a reference where the objective reads one that the data do not bring along."""
        read = {name for stream in self.objective.streams for name in self.objective.plan(stream)}
        return Language(reference_for(self.model) if needs_reference(read - {*first}) else None)

    def _classes(self, stream: Stream) -> int | None:
        """Return the number of classes: what the model puts out says it, where a target may lack a class."""
        if (
            getattr(self.readout, "output", None) != "logits"
            or not isinstance(stream.data, Mapping)
            or "input" not in stream.data
        ):
            return stream.classes
        was = self.model.training
        try:
            out = predict(self.model, stream.data["input"][:2], self.readout, self.device)
        finally:
            self.model.train(was)
        classes, target = int(out.shape[-1]), stream.classes
        if target is not None and target > classes:
            raise InputError(
                f"The model puts out {classes} classes, and the target has class {target - 1}: it needs at least {target}."
            )
        return classes

    def _watchers(self, given: Sequence[Any]) -> list[Any]:
        """Return what watches the constraints, unless the caller's own does."""
        return [] if any(isinstance(callback, ConstraintCurves) for callback in given) else [*watch(self.objective)]

    def _validation_objective(self) -> Objective | None:
        """Return what policies judge weights by, or None where no policy asks.

        Raises:
            InputError: a policy asks, and the run has no validation data.
        """
        needs = self.policies.needs
        if "metrics" in needs and self.valid is None and self.options["evaluate"] is None:
            raise InputError(
                "The policy of the weights looks at validation metrics, and the run has none: give valid=... or evaluate=..."
            )
        if "validation" not in needs:
            return None
        if self.valid is None:
            raise InputError(
                "The policy of the weights goes by the validation objective, and the run has no validation data: give valid=... "
                "Weights that are fitted to the training data would only fall."
            )
        return self.policies.upper

    def _validation(self) -> Problem:
        """Return the validation objective on a batch of validation rows, drawn anew in every step."""
        assert self.valid is not None
        assert self.upper is not None
        step, rows = self.state.step, len(next(iter(self.valid.values())))
        size = min((getattr(o.policy, "valid_batch", None) or rows for o in self.policies.owners), default=rows)
        batch = self.valid
        if size < rows:
            chosen = torch.randperm(
                rows, generator=torch.Generator().manual_seed(derive(self.seed, step, "validation"))
            )[:size].to(self.device)
            batch = {name: v[chosen] for name, v in batch.items()}
        return Validation(
            self.model, self.upper, [{"main": batch}], self.readout, key=(self.seed, step), device=self.device,
            autocast=self._autocast, record=False,
        )  # fmt: skip

    def _signals(self, *args: Any, **given: Any) -> Signals:
        optimizer = getattr(self.solver, "optimizer", None)
        return Signals(
            *args,
            step=self.state.step,
            steps=self.steps,
            lr=1.0 if optimizer is None else float(optimizer.param_groups[0]["lr"]),
            validation=None if self.upper is None else self._validation,
            metrics=self.policies.metrics,
            **given,
        )

    def _limit(self) -> int | None:
        """Return the steps that the streams can serve, where one of them ends."""
        return min((s.limit for s in self.streams.values() if s.limit is not None), default=None)

    @staticmethod
    def _length(steps: int | None, epochs: float | None, steps_per_epoch: int | None, limit: int | None = None) -> int:
        if steps is not None and epochs is not None:
            raise InputError("Give the length of the run in steps or in epochs, not in both.")
        if limit is not None:
            if steps is None and epochs is None:
                return limit
            asked = steps if steps is not None else math.ceil((epochs or 0) * (steps_per_epoch or 0))
            if asked > limit:
                raise InputError(
                    f"The run asks for {asked} steps, and a stream's budget ends after {limit}. Shorten the run, or raise the budget."
                )
        if steps is None:
            if steps_per_epoch is None:
                raise InputError("The length of an epoch is not known for these data: give steps=...")
            steps = math.ceil((10 if epochs is None else epochs) * steps_per_epoch)
        if steps < 0:
            raise InputError(f"The run must have at least 0 steps, and it has {steps}.")
        return steps

    def _prepare_solver(self, solver: Any) -> Any:
        options = {k: self.options[k] for k in ("lr", "weight_decay", "clip") if self.options[k] is not None}
        made = hasattr(solver, "needs") or isinstance(solver, torch.optim.Optimizer)
        if made and options:
            raise InputError(
                f"The solver is made already, so {', '.join(options)} would be ignored: say it where the solver is made."
            )
        prepared = as_solver(solver, **options)
        for label, term in self.objective.terms.items():
            lacking = prepared.needs - term.capabilities
            if lacking:
                raise IncompatibleError(
                    f"The solver {prepared!r} needs terms with {', '.join(sorted(lacking))}, and {label!r} has not. Use 'sgd' or 'adamw'."
                )
            if getattr(term, "needs_proximal_solver", False) and not getattr(prepared, "meets_sets", False):
                raise IncompatibleError(
                    f"{label!r} is infinite outside its set, where {prepared!r} has no gradient to follow. Use solver='proximal'."
                )
        prepared.bind(self.model, self.objective)
        return prepared

    def _prepare_schedule(self) -> Any:
        schedule, optimizer = self.options["lr_schedule"], getattr(self.solver, "optimizer", None)
        if schedule is None:
            return None
        if optimizer is None:
            raise IncompatibleError(f"The solver {self.solver!r} has no learning rate to schedule.")
        if isinstance(schedule, Coefficient):
            self.base_rates = [group["lr"] for group in optimizer.param_groups]
            return None
        return schedule(optimizer)

    def _schedule_rates(self) -> None:
        schedule = self.options["lr_schedule"]
        if isinstance(schedule, Coefficient):
            factor = schedule.value(self.objective.clock)
            for group, rate in zip(self.solver.optimizer.param_groups, self.base_rates, strict=False):
                group["lr"] = rate * factor

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _monitor(self) -> str:
        if self.options["monitor"]:
            return str(self.options["monitor"])
        if self.options["evaluate"] is not None:
            return ""
        readout = next(iter(self.readout.values())) if isinstance(self.readout, Mapping) else self.readout
        return "accuracy" if readout.output == "logits" else "rmse"

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        try:
            return self._run()
        finally:
            # A solver that took parameters out of training gives them back, whatever happened.
            getattr(self.solver, "release", lambda: None)()

    def _run(self) -> Run:
        with _deterministic(self.options["deterministic"]), self._listening(), _Memory(self.device) as memory:
            self._resume()
            with _bar(self.options["progress"], self.state) as report, self._tracking() as track:
                self.report, self.track, self.memory = report, track, memory
                self._call("on_begin")
                self._train()
                self._call("on_end")
        if self.options["restore_best"] and self.state.best_weights is not None:
            self.model.load_state_dict(self.state.best_weights)
        state = self.state
        readout = next(iter(self.readout.values())) if isinstance(self.readout, Mapping) else self.readout
        return Run(
            self.model, self.objective, state.history, state.step, state.best, state.stop or "all steps are done", state.skipped,
            state.seconds, memory.peak, readout, self.device, self.policies.current,
        )  # fmt: skip

    def _train(self) -> None:
        state, every = self.state, self._every()
        begun, saved = time.monotonic() - state.seconds, time.monotonic()
        draws = {name: stream.iterate(state.step) for name, stream in self.streams.items()}
        if "metrics" in self.policies.needs and state.step == 0:
            # What the model is worth before the first step is where a policy measures from.
            self.policies.metrics = dict(self._measure())
        self.model.train()
        self.objective.train()
        while state.step < self.steps and state.stop is None:
            self._one_step(draws)
            state.seconds = time.monotonic() - begun
            if state.step % every == 0 or state.step == self.steps:
                self._log()
            self._call("on_step_end")
            if self.steps_per_epoch and (state.step % self.steps_per_epoch == 0 or state.step == self.steps):
                state.epoch = state.step // self.steps_per_epoch
                self._validate_if_due()
                self._call("on_epoch_end")
            else:
                self._validate_if_due()
            state.seconds = time.monotonic() - begun
            if self.folder is not None and (self.interrupted or self._save_is_due(saved)):
                self._save()
                saved = time.monotonic()
            if self.interrupted:
                raise Interrupted(self._how_to_go_on())
        if state.step and self.folder is not None:
            self._save()

    def _one_step(self, draws: Mapping[str, Iterator[list[dict[str, Any]]]]) -> None:
        state = self.state
        drawn = {name: next(draw) for name, draw in draws.items()}
        most = max(len(micros) for micros in drawn.values())
        batches = [{name: micros[i] for name, micros in drawn.items() if i < len(micros)} for i in range(most)]
        self._schedule_rates()
        problem = Problem(
            self.model,
            self.objective,
            batches,
            self.readout,
            named=self.named,
            key=(self.seed, state.step),
            device=self.device,
            autocast=self._autocast,
        )
        try:
            signals = self.policies.set(problem, self._signals) if self.policies else []
        except NonFiniteError:
            # The weights of such a step do not exist; it is left out like one whose value is not finite.
            if self.options["on_nonfinite"] != "skip":
                raise
            self._leave_out()
            state.step += 1
            return
        step = self.solver.step(problem, self._accept(problem))
        if step.skipped:
            self._leave_out()
            self.policies.discard(signals)
        else:
            self.objective.advance()
            self.policies.advance(signals)
            if self.scheduler is not None:
                self.scheduler.step()
        state.step += 1
        state.latest = step
        self.window.add(step)

    def _leave_out(self) -> None:
        """Count a step that was not taken, and forget what waits for `advance`."""
        self.objective.discard()
        self.state.skipped += 1

    def _accept(self, problem: Problem) -> Callable[[Step], bool] | None:
        """Look at the value before the step. On an accelerator that would wait for it, so "stop" looks at the log points only."""
        skip = self.options["on_nonfinite"] == "skip"
        self.problem = problem
        if self.device.type != "cpu" and not skip:
            return None

        def accept(step: Step) -> bool:
            if bool(torch.isfinite(step.value)) and (
                step.gradient_norm is None or bool(torch.isfinite(step.gradient_norm))
            ):
                return True
            if not skip:
                raise NonFiniteError(self._what_is_not_finite(problem))
            return False

        return accept

    def _what_is_not_finite(self, problem: Problem) -> str:
        """Name the term, the step and the rows."""
        bad = [label for label, term in problem.step.terms.items() if not bool(torch.isfinite(term.value))]
        rows: list[int] = []
        with torch.no_grad():
            for number in range(len(problem.batches)):
                sources = problem._quantities(number, problem._view(None))
                for part in self.objective._evaluate(sources, None, frozenset(bad)).values():
                    if part.values is not None and part.values.ndim:
                        wrong = (
                            (~torch.isfinite(part.values)).flatten(1).any(1)
                            if part.values.ndim > 1
                            else ~torch.isfinite(part.values)
                        )
                        index = sources[None].get("index", torch.arange(len(wrong), device=wrong.device))
                        rows += index[wrong.nonzero().flatten()].tolist() if len(index) == len(wrong) else []
        terms = ", ".join(bad) or "the gradient"
        where = (
            f", at rows {', '.join(map(str, sorted(set(rows))[:10]))}{' and more' if len(set(rows)) > 10 else ''} of the data"
            if rows
            else ""
        )
        return (
            f"{terms} is not finite in step {self.state.step}{where}. Lower the learning rate, clip the gradient (clip=1.0), look at these "
            "rows, or pass on_nonfinite='skip' to leave such steps out and count them."
        )

    def _every(self) -> int:
        given = self.options["log_every"]
        return self._interval(given) if given else max(1, min(50, self.steps_per_epoch or 50))

    def _interval(self, given: float) -> int:
        """Return a number of steps that was given as such, or as a share of the run."""
        return max(1, round(given * self.steps)) if given < 1 else int(given)

    def _log(self) -> None:
        state = self.state
        self.window.write(state.history, state.step)
        loss = state.history["loss"][-1] if "loss" in state.history else 0.0
        gradient = float(torch.stack(self.window.norms).mean()) if self.window.norms else 0.0
        if self.options["on_nonfinite"] == "stop" and not (math.isfinite(loss) and math.isfinite(gradient)):
            raise NonFiniteError(self._what_is_not_finite(self.problem))
        for name, value in self.policies.report().items():
            state.history.add(name, state.step, value)
        self.window = Window()
        self.memory.look()
        self.track({name: curve[1][-1] for name, curve in state.history.curves().items()}, state.step)
        self.report(state)

    # ---- validation -------------------------------------------------------------------------------------------------

    def _validate_if_due(self) -> None:
        if self.valid is None and self.options["evaluate"] is None:
            return
        given = self.options["validate_every"]
        every = self._interval(given) if given else self.steps_per_epoch or 50
        if self.state.step % every and self.state.step != self.steps:
            return
        state = self.state
        measured = dict(self._measure())
        self.policies.metrics = measured
        for name, value in measured.items():
            state.history.add(f"valid/{name}", state.step, value)
        self._judge()
        self.model.train()
        self.objective.train()

    def _measure(self) -> Mapping[str, float]:
        evaluate = self.options["evaluate"]
        if evaluate is not None:
            self.model.eval()
            with torch.no_grad():  # and in float32, whatever the training computes in
                return evaluate(self.model)  # type: ignore[no-any-return]
        assert self.valid is not None
        readout = next(iter(self.readout.values())) if isinstance(self.readout, Mapping) else self.readout
        output = predict(self.model, self.valid["input"], readout, self.device, autocast=self._autocast)
        return (self.options["metrics"] or default_metrics)(output, self.valid["target"])

    def _judge(self) -> None:
        state, name = self.state, f"valid/{self._monitor()}"
        if name not in state.history:
            if self.options["monitor"] or self.options["patience"] or self.options["restore_best"]:
                offered = ", ".join(k.removeprefix("valid/") for k in state.history if k.startswith("valid/"))
                raise InputError(f"monitor is {self._monitor() or None!r}, and the metrics are: {offered}.")
            return
        value = state.history[name][-1]
        if state.best is None or (value > state.best[1] if self.rising else value < state.best[1]):
            state.best, state.unimproved = (state.step, value), 0
            if self.options["restore_best"]:
                state.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        else:
            state.unimproved += 1
            patience = self.options["patience"]
            if patience is not None and state.unimproved >= patience:
                state.stop = f"no better {self._monitor()} in {patience} validations"

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same when a run resumes."""
        return {
            "objective": self.formula, "seed": self.seed, "steps": self.steps, "precision": self.precision,
            "examples": {n: s.examples for n, s in self.streams.items()}, "batch_size": {n: s.batch_size for n, s in self.streams.items()},
        }  # fmt: skip

    def _save_is_due(self, saved: float) -> bool:
        steps, seconds = self.options["checkpoint_steps"], self.options["checkpoint_seconds"]
        # A large model takes long to save: no more than a twentieth of the time goes there.
        due = seconds is not None and time.monotonic() - saved >= max(seconds, 20 * self.saving)
        return due or (steps is not None and self.state.step % steps == 0)

    def _save(self) -> None:
        assert self.folder is not None
        if processes.rank():
            return
        import numpy as np

        begun = time.monotonic()
        state = self.state
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        checkpoints.save(
            self.folder,
            state.step,
            {
                "identity": self._identity(),
                "model": self.model.state_dict(),
                "objective": self.objective.state_dict(),
                "solver": self.solver.state_dict(),
                "policies": self.policies.state_dict(),
                "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "history": {k: list(v) for k, v in state.history.curves().items()},
                "window": self.window.state_dict(),
                "fields": {
                    k: getattr(state, k) for k in ("step", "epoch", "best", "stop", "skipped", "seconds", "unimproved")
                },
                "best_weights": state.best_weights,
                "random": {
                    "torch": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                    "python": random.getstate(),
                    "numpy": {
                        "key": torch.from_numpy(numpy_state["state"]["key"].astype("int64")),
                        "pos": int(numpy_state["state"]["pos"]),
                        "has_gauss": int(numpy_state["has_gauss"]),
                        "gauss": float(numpy_state["gauss"]),
                    },
                },
                "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in self.options["callbacks"]],
            },
        )
        self.saving = time.monotonic() - begun

    def _resume(self) -> None:
        if self.folder is None or not self.options["resume"]:
            return
        saved = checkpoints.load_newest(self.folder, self.device)
        if saved is None:
            return
        for name, value in self._identity().items():
            if saved["identity"][name] != value:
                raise CheckpointError(
                    f"The checkpoint in {self.folder} is of another run: {name} is {saved['identity'][name]!r}, and now it is {value!r}. "
                    "Use another folder, or resume=False to start afresh."
                )
        self.model.load_state_dict(saved["model"])
        self.objective.load_state_dict(saved["objective"])
        self.solver.load_state_dict(saved["solver"])
        if self.policies:
            self.policies.load_state_dict(saved["policies"])
        for name, stream in self.streams.items():
            stream.load_state_dict(saved.get("streams", {}).get(name, {}))
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        state = self.state
        state.history._curves = {k: (list(v[0]), list(v[1])) for k, v in saved["history"].items()}
        self.window = Window.from_state(saved["window"])
        for name, value in saved["fields"].items():
            setattr(state, name, value)
        state.best_weights = saved["best_weights"]
        _restore_random(saved["random"])
        for callback, own in zip(self.options["callbacks"], saved["callbacks"], strict=False):
            if own is not None:
                callback.load_state_dict(own)

    def _how_to_go_on(self) -> str:
        if self.folder is None:
            return f"Interrupted after step {self.state.step} of {self.steps}. Nothing was saved: pass checkpoint=FOLDER to save."
        return f"Interrupted after step {self.state.step} of {self.steps}, and saved in {self.folder}. Call again to go on from there."

    # ---- the world outside ------------------------------------------------------------------------------------------

    def _call(self, name: str) -> None:
        for callback in self.options["callbacks"]:
            method = getattr(callback, name, None)
            if method is not None:
                method(self.state)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Finish the step at the first Ctrl-C; the second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def listen(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, listen)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _tracking(self) -> Iterator[Callable[[dict[str, float], int], None]]:
        names = list(self.options["trackers"])
        if not names or processes.rank():
            yield lambda values, step: None
            return
        from accelerate import Accelerator

        folder = str(self.options["tracker_folder"] or "poise-trackers")
        accelerator = Accelerator(log_with=names, project_dir=folder, cpu=self.device.type == "cpu")
        config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in self._identity().items()}
        accelerator.init_trackers("poise", config=config)
        try:
            yield lambda values, step: accelerator.log(values, step=step)
        finally:
            accelerator.end_training()


def _restore_random(saved: dict[str, Any]) -> None:
    import numpy as np

    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in saved["cuda"]])
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    n = saved["numpy"]
    np.random.set_state(("MT19937", n["key"].cpu().numpy().astype("uint32"), n["pos"], n["has_gauss"], n["gauss"]))  # noqa: NPY002


def _as_objective(objective: Objective | Term | str) -> Objective:
    if isinstance(objective, str):
        from poise.formula import parse

        return parse(objective)
    return Objective([Summand(objective)]) if isinstance(objective, Term) else objective


def _as_batch(data: Any, device: torch.device) -> dict[str, Tensor] | None:
    """Return validation data as whole tensors."""
    if data is None:
        return None
    if isinstance(data, Mapping):
        return {k: v.to(device) for k, v in data.items() if isinstance(v, Tensor)}
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(d, Tensor) for d in data):
        return {"input": data[0].to(device), "target": data[1].to(device)}
    stream = Stream(data, 1024, shuffle=False).prepare("valid", 0, device)
    draw, length = stream.iterate(0), stream.steps_per_epoch
    if length is None:
        raise InputError(
            "The validation data have no known length: give tensors, a data set, or a DataLoader with a length."
        )
    batches = [next(draw)[0] for _ in range(length)]
    return {name: torch.cat([b[name] for b in batches]) for name in ("input", "target")}


@contextmanager
def _deterministic(asked: bool) -> Iterator[None]:
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Memory:
    """The largest memory seen: of the device on CUDA, else the growth of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak = device, 0

    def __enter__(self) -> _Memory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            import psutil

            self.process = psutil.Process()
            self.before = self.process.memory_info().rss
        return self

    def look(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = max(self.peak, self.process.memory_info().rss - self.before)

    def __exit__(self, *_: Any) -> None:
        self.look()


@contextmanager
def _bar(progress: bool | Callable[[FitState], None], state: FitState) -> Iterator[Callable[[FitState], None]]:
    """Draw a progress bar with the time left, or hand the state to a function, or do nothing."""
    if callable(progress):
        yield progress
        return
    if not progress or processes.rank():
        yield lambda state: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("training", total=state.steps, completed=state.step)

        def report(state: FitState) -> None:
            loss = state.history["loss"][-1] if "loss" in state.history else math.nan
            bar.update(task, completed=state.step, description=f"loss {loss:.4g}")

        yield report
