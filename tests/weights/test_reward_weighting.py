"""Both rules of dynamic reward weighting inside GRPO, RLOO and REINFORCE, as policies of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import poise
from poise.errors import InputError, PoiseWarning
from poise.readouts.on_policy import OnPolicy
from poise.readouts.tokens import TokenReadout
from poise.solvers.torch_optimizers import SGD
from poise.tasks.digit_addition import addition_prompts, answer, measure_additions, score_additions
from poise.tasks.reward_environments import SharedBandit, measured
from poise.tasks.words import WordModel
from poise.weights.pareto import GradientInfluence, HypervolumeGuidance

BANDIT = SharedBandit()
LOSSES = ("grpo", "rloo", "reinforce")


def apart(loss: str, names: tuple[str, ...]) -> str:
    return " + ".join(f"{loss}(reward=score.on(reward='{n}')).named('{n}')" for n in names)


def together(loss: str, names: tuple[str, ...], weight: str = "0.3333") -> str:
    return f"{loss}(reward={' + '.join(f'''{weight}*score.on(reward='{n}').named('{n}')''' for n in names)})"


def train(formula: str, policy: Any = None, steps: int = 6, **options: Any) -> Any:
    agent = BANDIT.agent()
    stream = OnPolicy(BANDIT.prompts, BANDIT.draw, BANDIT.score, samples=8, batch_size=10)
    return poise.fit(
        agent, formula, {"main": stream}, readout=TokenReadout(), solver=SGD(lr=0.5), steps=steps, device="cpu", policy=policy, log_every=1,
        **options,
    )  # fmt: skip


def evaluate(agent: torch.nn.Module) -> dict[str, float]:
    return measured(BANDIT, agent, 4, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("loss", LOSSES)
def test_influence_weighs_the_rewards_of_a_policy_gradient(loss: str) -> None:
    policy = GradientInfluence(mu=0.05)
    run = train(apart(loss, BANDIT.names), policy)
    weights = torch.tensor([run.history[f"policy/weight/{n}"] for n in BANDIT.names])
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]), rtol=1e-6, atol=0)
    assert float((weights - 1 / 3).abs().max()) > 1e-3
    assert f"policy/influence/{BANDIT.names[0]}" in run.history
    assert policy.labels == BANDIT.names


@pytest.mark.parametrize("loss", ["rloo", "reinforce"])
def test_under_a_hold_that_lets_nothing_move_it_is_the_run_with_equal_weights(loss: str) -> None:
    held = train(apart(loss, BANDIT.names), GradientInfluence(mu=1e12))
    equal = train(together(loss, BANDIT.names, str(1 / 3)))
    torch.testing.assert_close(held.model.theta, equal.model.theta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_guidance_scales_a_policy_gradient_by_the_validation_before(loss: str) -> None:
    guidance = HypervolumeGuidance(", ".join(BANDIT.names), temperature=1e-3, apply_to="advantage")
    run = train("auto*" + together(loss, BANDIT.names), guidance, evaluate=evaluate, validate_every=1)
    weights = list(run.history[f"policy/weight/{loss}"])
    assert weights[0] == 1.0
    assert all(0.5 <= w <= 2.0 for w in weights)
    # Replay: the first validation is that of the initial model, and the weight of a step is what the one after the step before gives.
    replay, seen = HypervolumeGuidance(", ".join(BANDIT.names), temperature=1e-3), [1.0]
    replay.update(evaluate(BANDIT.agent()))
    vectors = zip(*(run.history[f"valid/{n}"] for n in BANDIT.names), strict=True)
    seen.extend(replay.update(vector) for vector in vectors)
    assert weights == pytest.approx(seen[:-1])


@pytest.mark.parametrize(("loss", "felt"), [("rloo", True), ("reinforce", True), ("grpo", False)])
def test_on_the_reward_itself_rloo_feels_the_rule_and_grpo_does_not(loss: str, felt: bool) -> None:
    plain = train(together(loss, BANDIT.names))
    guidance = HypervolumeGuidance(", ".join(BANDIT.names), temperature=1e-3)
    agent = BANDIT.agent()
    guidance.update(evaluate(agent))
    stream = OnPolicy(BANDIT.prompts, BANDIT.draw, guidance.scoring(BANDIT.score), samples=8, batch_size=10)

    def run() -> Any:
        return poise.fit(
            agent, together(loss, BANDIT.names), {"main": stream}, readout=TokenReadout(), solver=SGD(lr=0.5), steps=6, device="cpu",
            evaluate=guidance.watching(evaluate), validate_every=1, callbacks=[guidance],
        )  # fmt: skip

    if felt:
        run()
    else:
        with pytest.warns(PoiseWarning, match="changes nothing"):
            run()
    assert guidance.multiplier != 1.0
    difference = float((agent.theta - plain.model.theta).detach().abs().max())
    moved = float(plain.model.theta.detach().abs().max())
    # The guard of 1e-4 beside deviations of about 0.2 is all that is left of the factor under GRPO.
    assert difference > 0.05 * moved if felt else difference < 2e-3 * moved


@pytest.mark.parametrize("rule", ["influence", "guidance"])
def test_a_run_that_is_stopped_and_resumed_ends_where_the_other_does_bit_for_bit(rule: str, tmp_path: Path) -> None:
    def made() -> dict[str, Any]:
        if rule == "influence":
            return {"formula": apart("rloo", BANDIT.names), "policy": GradientInfluence(mu=0.05, every=2)}
        guidance = HypervolumeGuidance(", ".join(BANDIT.names), temperature=1e-3, reference=[0.1, 0.3, 0.2])
        return {
            "formula": "auto*" + together("rloo", BANDIT.names),
            "policy": guidance,
            "evaluate": evaluate,
            "validate_every": 1,
        }

    class Stop(Exception):
        pass

    class StopAfter:
        def on_step_end(self, state: Any) -> None:
            if state.step == 6:
                raise Stop

    whole = train(steps=8, **made())
    with pytest.raises(Stop):
        train(steps=8, checkpoint=tmp_path, checkpoint_steps=4, callbacks=[StopAfter()], **made())
    resumed = train(steps=8, checkpoint=tmp_path, **made())
    assert torch.equal(whole.model.theta, resumed.model.theta)


@pytest.mark.parametrize("loss", LOSSES)
def test_both_rules_train_a_small_language_model_on_verifiable_rewards(loss: str) -> None:
    model, names = WordModel(hidden=16, layers=1), ("accuracy", "brevity", "format")
    stream = OnPolicy(addition_prompts(), answer, score_additions, samples=4, batch_size=8)
    options: dict[str, Any] = {
        "readout": TokenReadout(),
        "solver": "adam",
        "lr": 1e-2,
        "clip": 1.0,
        "steps": 2,
        "device": "cpu",
        "log_every": 1,
    }
    influence = GradientInfluence(mu=1e-2, params="layers.*", clip=1.0, floor=0.05)
    run = poise.fit(copy.deepcopy(model), apart(loss, names), {"main": stream}, policy=influence, **options)
    assert sum(run.history[f"policy/weight/{n}"][-1] for n in names) == pytest.approx(1.0)
    guidance = HypervolumeGuidance(
        "accuracy, -length, format", normalise=[(0, 1), (0, 9), (0, 1)], apply_to="advantage"
    )
    calls = iter(range(100))
    run = poise.fit(
        model, "auto*" + together(loss, names), {"main": stream}, policy=guidance, validate_every=1,
        evaluate=lambda m: measure_additions(m, next(calls)), **options,
    )  # fmt: skip
    assert guidance.archive.reference is not None
    assert 0.5 <= run.history[f"policy/weight/{loss}"][-1] <= 2.0


def test_guidance_without_validation_is_refused() -> None:
    with pytest.raises(InputError, match="validation metrics, and the run has none"):
        train("auto*" + together("rloo", BANDIT.names), HypervolumeGuidance())


# ---- weights within a reward ----------------------------------------------------------------------------------------------


def inside(loss: str, names: tuple[str, ...] = BANDIT.names) -> str:
    return f"{loss}(reward={' + '.join(f'''auto('{n}')*score.on(reward='{n}').named('{n}')''' for n in names)})"


@pytest.mark.parametrize("loss", ["rloo", "reinforce"])
def test_within_a_reward_influence_is_that_before_terms_where_advantages_are_linear(loss: str) -> None:
    one, other = GradientInfluence(mu=0.05), GradientInfluence(mu=0.05)
    within, before = train(inside(loss), one), train(apart(loss, BANDIT.names), other)
    torch.testing.assert_close(one.current, other.current, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(within.model.theta, before.model.theta, rtol=1e-4, atol=1e-6)


def test_under_grpo_the_update_is_that_of_the_combined_reward() -> None:
    held = train(inside("grpo"), GradientInfluence(mu=1e12))
    torch.testing.assert_close(held.model.theta, train(together("grpo", BANDIT.names, str(1 / 3))).model.theta)
    apart_ = train(apart("grpo", BANDIT.names), GradientInfluence(mu=1e12))
    assert float((held.model.theta - apart_.model.theta).detach().abs().max()) > 1e-3


def test_what_stands_fixed_beside_is_in_no_influence_and_the_weight_of_the_loss_is_in_all() -> None:
    fixed = inside("rloo", ("a", "b")).removesuffix(")") + " + 0.5*score.on(reward='c').named('c'))"
    plain, halved, beside = (GradientInfluence(mu=0.05) for _ in range(3))
    train(inside("rloo", ("a", "b")), plain, steps=1)
    train("0.5*" + inside("rloo", ("a", "b")), halved, steps=1)
    train(fixed, beside, steps=1)
    torch.testing.assert_close(halved.last, plain.last / 4)
    torch.testing.assert_close(beside.last, plain.last)


def test_within_a_reward_guidance_scales_it_and_keeps_the_preference() -> None:
    guidance = HypervolumeGuidance(", ".join(BANDIT.names), {"a": 0.5, "b": 0.25, "c": 0.25}, temperature=1e-3)
    run = train(inside("rloo"), guidance, evaluate=evaluate, validate_every=1)
    assert run.history["policy/weight/a"][0] == 0.5
    assert run.weights["a"] == pytest.approx(2 * run.weights["b"])
    assert run.weights["a"] != pytest.approx(0.5)


def test_weights_in_two_kinds_of_places_are_refused() -> None:
    formula = inside("rloo", ("a", "b")) + " + auto('k')*confidence_penalty.on(logits='response_logits')"
    with pytest.raises(InputError, match="put all in one place"):
        train(formula, GradientInfluence())


def test_a_formula_alone_says_which_rule_sets_the_weights() -> None:
    influence = """auto(policy="pareto", method="influence(mu=0.05)")*"""
    run = train(" + ".join(influence + term for term in apart("rloo", BANDIT.names).split(" + ")))
    assert sum(run.weights.values()) == pytest.approx(1.0)
    assert run.weights == pytest.approx(train(apart("rloo", BANDIT.names), GradientInfluence(mu=0.05)).weights)
    guided = """auto(policy="pareto", method="hypervolume(directions='a, b, -c', temperature=0.001)")*"""
    run = train(guided + together("rloo", BANDIT.names), evaluate=evaluate, validate_every=1)
    assert 0.5 <= run.weights["rloo"] <= 2.0
    inside_ = inside("rloo").replace("auto('a')", "auto('a', policy='pareto', method='influence(mu=0.05)')")
    inside_ = inside_.replace("auto('b')", "auto('b', policy='pareto', method='influence(mu=0.05)')")
    inside_ = inside_.replace("auto('c')", "auto('c', policy='pareto', method='influence(mu=0.05)')")
    assert sum(train(inside_).weights.values()) == pytest.approx(1.0)
