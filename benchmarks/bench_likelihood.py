"""What watching likelihoods costs, and what a batch of seeds saves.

The monitor: `poise.fit` on a small transformer (8 pairs of 2 x 64 tokens) with and without the callback, in turns; once reading
what the loss computed, once with 64 held-out answers every 50 steps. `flex_dpo` against `dpo`: the same step. The toy: 20 seeds at
once against a Python loop over them, and against the same through `torch.func.vmap` over a functional model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import poise
from benchmarks.bench_preference_terms import PAIRS, TIME, VOCABULARY, _formula, _race
from benchmarks.bench_preference_terms import Model as Scorer
from benchmarks.harness import Ratio, one_thread, paired
from poise.insight.likelihood_dynamics import LikelihoodMonitor
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.tasks.likelihood_toy import LikelihoodToy


def run(quick: bool) -> list[Ratio]:
    """Ratios of seconds, each pair of rivals in turns on one thread."""
    repeats = 3 if quick else 7
    with one_thread():
        return [
            _overhead("fit with the monitor / without", False, repeats, 1.02),
            _overhead("fit with the monitor and 64 held-out answers every 50 steps / without", True, repeats, 1.10),
            _flex(5 if quick else 30),
            *_toy(quick),
        ]


class _Record:
    """The readout of the small transformer: log-probabilities of given answers, whole rows at a time."""

    output = "response_logps"

    def __call__(self, model: ModelView, batch: Quantities, reads: frozenset[str]) -> Quantities:
        if "chosen_ids" in batch:
            both = torch.cat([batch["chosen_ids"], batch["rejected_ids"]])
            batch.offer("_both", lambda: model(both).chunk(2))
            batch.offer("chosen_logps", lambda: batch["_both"][0])
            batch.offer("rejected_logps", lambda: batch["_both"][1])
        else:
            batch.offer("response_logps", lambda: model(batch["response_ids"]))
        return batch


def _overhead(name: str, heldout: bool, repeats: int, goal: float) -> Ratio:
    torch.manual_seed(0)
    model = Scorer()
    ids = torch.randint(VOCABULARY, (2 * PAIRS, TIME + 1))
    with torch.no_grad():
        chosen, rejected = model(ids).chunk(2)
    data = {
        "chosen_ids": ids[:PAIRS],
        "rejected_ids": ids[PAIRS:],
        "reference_chosen_logps": chosen,
        "reference_rejected_logps": rejected,
    }
    answers = {"response_ids": torch.randint(VOCABULARY, (64, TIME + 1))}
    steps = 50

    def fitted(watch: bool) -> Callable[[], object]:
        def once() -> object:
            monitor = LikelihoodMonitor(heldout=answers if heldout else None, every=50, readout=_Record())
            # The look at the start is once a run and not once every 50 steps.
            monitor._start = 0.0
            return poise.fit(
                copy.deepcopy(model), "dpo", data, readout=_Record(), solver="adamw", lr=1e-4, steps=steps, batch_size=PAIRS,
                device="cpu", callbacks=[monitor] if watch else [],
            )  # fmt: skip

        return once

    timing = paired(fitted(True), fitted(False), repeats, warmup=1)
    detail = f"{PAIRS} pairs of 2 x {TIME} tokens: {timing.first / steps * 1e3:.2f} against {timing.second / steps * 1e3:.2f} ms a step"
    return Ratio(name, timing.ratio, goal, "lower", detail)


def _flex(repeats: int) -> Ratio:
    timing = _race(_formula("flex_dpo"), _formula("dpo"), repeats)
    detail = f"{timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
    return Ratio("step of flex_dpo / step of dpo", timing.ratio, 1.01, "lower", detail)


SEEDS = 20


def _toy(quick: bool) -> list[Ratio]:
    steps = 50 if quick else 500
    toy = LikelihoodToy("both_on", SEEDS, fit_steps=50)
    one = LikelihoodToy("both_on", 1, fit_steps=50)

    def loop() -> None:
        for _ in range(SEEDS):
            one.train("dpo(beta=0.1)", steps)

    # Processor time: with tensors this small, wall time measures who else wants the core.
    batched, looped, vmapped = (
        _cpu(f) for f in (lambda: toy.train("dpo(beta=0.1)", steps), loop, lambda: _vmapped(toy, steps))
    )
    detail = f"{steps} steps of {SEEDS} seeds: {batched:.2f} s of processor at once, {looped:.2f} s one by one"
    return [
        Ratio("toy, a loop over 20 seeds / 20 seeds at once", looped / batched, 10, "higher", detail),
        Ratio(
            "toy, torch.func.vmap by hand / 20 seeds at once",
            vmapped / batched,
            None,
            "higher",
            f"{vmapped:.2f} against {batched:.2f} s",
        ),
    ]


def _cpu(call: Callable[[], object]) -> float:
    """Processor seconds of the second call."""
    call()
    started = time.process_time()
    call()
    return time.process_time() - started


def _vmapped(toy: LikelihoodToy, steps: int) -> None:
    """The same training, written with vmap over the seeds' gradients and Adam on the stacked weights."""
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    models = [copy.deepcopy(net) for _ in range(SEEDS)]
    weights, _ = torch.func.stack_module_state(models)
    inputs = torch.eye(4)

    def loss(w: dict[str, Tensor], chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
        shift = torch.func.functional_call(net, w, (inputs,)).log_softmax(-1) - reference
        pick = shift.gather(-1, torch.stack([chosen, rejected], -1))
        return -torch.nn.functional.logsigmoid(0.1 * (pick[:, 0] - pick[:, 1])).mean()

    gradient = torch.func.vmap(torch.func.grad(loss))
    stacked = {name: w.detach().requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.Adam(stacked.values(), lr=1e-2, fused=True)
    for _ in range(steps):
        for name, g in gradient(stacked, toy.chosen, toy.rejected, toy.reference).items():
            stacked[name].grad = g.detach()
        optimizer.step()
