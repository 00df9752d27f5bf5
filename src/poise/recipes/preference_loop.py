"""The template of preference fine-tuning: sample, score, learn, again.

    loop = preference_loop(policy, reference, generate, score, "dpo(beta=0.1)", prompts=prompts, readout=readout,
                           samples=8, batch=16, reuse=2, on_policy=1.0, budget=20_000)

One round samples `samples` answers to each of `batch` prompts, asks for D = batch * samples rewards, and makes T = `reuse`
steps on them. `on_policy` says whose answers they are: 1 the policy's own, 0 fixed ones of the reference, or a share in
between. D and T small is on-policy; the same budget with D and T large is not. Losses on pairs get the pairs of each
round, the others the answers themselves.

It is one `poise.fit` on one `OnPolicy` stream, so that checkpoints, schedules and weights are those of any run.

Source: arXiv:2404.14367, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.frozen import FrozenModel
from poise.insight.mode_seeking import PreferenceStatistics, preference_statistics
from poise.objective import Objective, Summand, Term
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.on_policy import Generate, OnPolicy, Pairs, Score, collect, pairs_from_rewards
from poise.readouts.supervised import Readout
from poise.run import FitState, Run, choose_device
from poise.training import fit

__all__ = ["Pairs", "PreferenceLoop", "pairs_from_rewards", "preference_loop"]


@dataclass(frozen=True)
class PreferenceLoop:
    """What a loop did.

    Attributes:
        run: of `poise.fit`; its history has `preference/reward`, `preference/winners`, `preference/losers`,
            `preference/winners_gain`, `preference/losers_gain` and `preference/margin` beside the usual curves.
        queries: rewards that were asked for, those of offline data included.
        gradient_steps: steps that were made.
        tied: groups without a pair, which losses on pairs skipped.
    """

    run: Run
    queries: int
    gradient_steps: int
    tied: int

    def __str__(self) -> str:
        gain = self.run.history.get("preference/reward", [])
        change = f", mean reward {gain[0]:.3f} -> {gain[-1]:.3f}" if gain else ""
        skipped = f", {self.tied} groups tied" if self.tied else ""
        return f"{self.gradient_steps} steps on {self.queries} rewards{change}{skipped}"


def preference_loop(
    policy: nn.Module,
    reference: nn.Module | None,
    generate: Generate,
    score: Score,
    loss: Objective | Term | str,
    *,
    prompts: Mapping[str, Tensor] | int,
    readout: Callable[[FrozenModel], Readout],
    samples: int = 8,
    batch: int = 128,
    reuse: int = 1,
    on_policy: float = 1.0,
    budget: int | None = None,
    offline: Mapping[str, Tensor] | None = None,
    offline_groups: int = 1,
    threshold: float = 0.0,
    shuffle: bool = True,
    watch: int | None = None,
    seed: int = 0,
    **options: Any,
) -> PreferenceLoop:
    """Train a policy on answers that it, or the reference, gives to prompts.

    Args:
        policy: trained in place.
        reference: where it is held, and whose answers offline data are; a frozen copy of the policy where None.
        generate, score: as for `OnPolicy`.
        loss: an objective or a formula: `"dpo(beta=0.1)"`, `"best_of_n(negative='worst')"`, `"grpo + 0.04*sampled_kl"`, ...
        prompts: tensors by name, or a number of prompts.
        readout: `readout(reference)` makes the readout, such as `Choices`.
        samples: answers to a prompt, N.
        batch: prompts of a round; D = batch * samples.
        reuse: steps on a round, T.
        on_policy: share of prompts that the policy answers itself: 1 on-policy, 0 offline, between them mixed.
        budget: rewards that may be asked for in all; it sets the length of the run where `steps` does not.
        offline: answers that are there already; without it the reference gives `offline_groups` groups to each prompt.
        threshold: gap of rewards that a pair must exceed, for losses on pairs.
        shuffle: take prompts in a new order each epoch.
        watch: steps between measurements of winners and losers; a twentieth of the run by default, 0 for never.
        seed, **options: handed to `poise.fit` (`steps`, `solver`, `lr`, `checkpoint`, ...).

    Raises:
        InputError: a loss that compares answers with one answer to a prompt; offline data without the log-probabilities
            of their sampler under a loss that asks for them; neither steps nor budget.

    >>> from poise.readouts import Choices
    >>> from poise.tasks.bandit_arms import BanditArms, TabularAgent, draw_arms
    >>> bandit = BanditArms("near")
    >>> agent = TabularAgent(bandit.reference)
    >>> loop = preference_loop(agent, None, draw_arms, bandit.score, "best_of_n", prompts=1, readout=Choices, budget=800, lr=1.0)
    >>> loop.queries, loop.gradient_steps
    (800, 100)
    """
    device = choose_device(options.get("device", "auto"))
    frozen = FrozenModel(policy if reference is None else reference).to(device)
    prompts = {"input": torch.arange(prompts)} if isinstance(prompts, int) else prompts
    prompts = {name: column.to(device) for name, column in prompts.items()}
    objective = _objective(loss)
    plan = frozenset[str]().union(*(objective.plan(stream) for stream in objective.streams))
    paired = any(name.startswith(("chosen_", "rejected_")) for name in plan)
    if samples < 2 and (paired or any(term.couples for term in objective.terms.values())):
        raise InputError(f"{objective} compares the answers to a prompt, and samples is {samples}: give at least 2.")
    if on_policy < 1 and offline is None:
        offline = collect(frozen.module, prompts, generate, score, samples=samples, groups=offline_groups, seed=seed)
    if on_policy < 1 and offline is not None and "behaviour_logps" in plan and "behaviour_logps" not in offline:
        raise InputError(
            f"{objective} weighs answers by the ratio to their sampler, and the offline data lack 'behaviour_logps'. Store what the "
            "sampler gave them, or use a loss without a ratio."
        )
    if budget is None and options.get("steps") is None and options.get("epochs") is None:
        raise InputError("A loop ends by its budget of rewards or by its steps: give budget=... or steps=...")
    stream = OnPolicy(
        prompts,
        generate,
        score,
        samples=samples,
        reuse=reuse,
        on_policy=on_policy,
        offline=offline,
        budget=budget,
        pairs=threshold if paired else None,
        batch_size=batch,
        shuffle=shuffle,
    )
    made = readout(frozen)
    callbacks = [*options.pop("callbacks", ()), *([] if watch == 0 else [_Watch(stream, made, watch)])]
    run = fit(policy, objective, {"main": stream}, readout=made, seed=seed, callbacks=callbacks, **options)
    return PreferenceLoop(run, stream.queries, stream.gradient_steps, stream.tied)


def _objective(loss: Objective | Term | str) -> Objective:
    if isinstance(loss, str):
        from poise.formula import parse

        return parse(loss)
    return Objective([Summand(loss)]) if isinstance(loss, Term) else loss


class _Watch:
    """Measures winners and losers of the round in progress, now and then."""

    def __init__(self, stream: OnPolicy, readout: Readout, every: int | None) -> None:
        self.stream, self.readout, self.every = stream, readout, every

    def on_step_end(self, state: FitState) -> None:
        every = self.every or max(1, state.steps // 20)
        if state.step % every and state.step != state.steps:
            return
        held = self.stream.held
        if held is not None and "reward" in held:
            state.history.add("preference/reward", state.step, float(held["reward"].mean()))
        found = self._measure(state.model)
        if found is not None:
            for name in ("winners", "losers", "winners_gain", "losers_gain", "margin"):
                state.history.add(f"preference/{name}", state.step, getattr(found, name))

    def _measure(self, model: nn.Module) -> PreferenceStatistics | None:
        held = self.stream.held
        if held is None or "reward" not in held:
            return None
        rewards = held["reward"].view(-1, self.stream.samples)
        if not bool((rewards.amax(1) > rewards.amin(1)).any()):
            return None
        was = model.training
        model.eval()
        try:
            with torch.no_grad():
                names = frozenset({"response_logps", "reference_response_logps"})
                read = self.readout(ModelView(model), Quantities(held, key=(0, 0)), names)
                logps = _by_group(read["response_logps"], self.stream.samples)
                reference = None
                if "reference_response_logps" in read:
                    reference = _by_group(read["reference_response_logps"], self.stream.samples)
        finally:
            model.train(was)
        return preference_statistics(logps, rewards, reference)


def _by_group(logps: Tensor, samples: int) -> Tensor:
    return (logps.sum(-1) if logps.ndim == 2 else logps).view(-1, samples)
