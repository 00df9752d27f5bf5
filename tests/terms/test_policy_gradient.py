"""Laws of the terms that learn from scored answers."""

from __future__ import annotations

import copy
import math
import pickle
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.errors import InputError, QuantityError
from poise.formula import parse
from poise.objective import Term
from poise.problem import Problem
from poise.quantities import Quantities
from poise.terms.groups import Groups
from poise.terms.policy_gradient import (
    GRPO,
    RLOO,
    BestOfN,
    PPOClip,
    Reinforce,
    RewardWeighted,
    SampledKL,
    Score,
    advantages,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64, a handful of operations


class Accuracy(Term):
    """A reward that a task offers."""

    formula = "test_accuracy"

    def forward(self, accuracy):
        return accuracy


class Brevity(Term):
    """Charge every token."""

    formula = "test_brevity"

    def forward(self, response_mask):
        return -response_mask.sum(-1).double()


def batch(
    prompts: int = 4, samples: int = 5, time: int = 6, seed: int = 0, stale: float = 0.3
) -> dict[str, torch.Tensor]:
    """Random answers of different lengths; groups are shuffled and numbered anyhow."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * samples
    length = torch.randint(1, time + 1, (rows, 1), generator=generator)
    mask = torch.arange(time) < length
    logps = torch.where(mask, -3 * torch.rand(rows, time, generator=generator, dtype=torch.float64), 0.0)
    moved = torch.where(mask, stale * torch.randn(rows, time, generator=generator, dtype=torch.float64), 0.0)
    reference = torch.where(mask, 0.2 * torch.randn(rows, time, generator=generator, dtype=torch.float64), 0.0)
    group = torch.arange(prompts).repeat_interleave(samples)[torch.randperm(rows, generator=generator)]
    return {
        "response_logps": logps.requires_grad_(),
        "behaviour_logps": (logps + moved).detach(),
        "reference_response_logps": (logps + reference).detach(),
        "response_mask": mask,
        "reward": torch.randn(rows, generator=generator, dtype=torch.float64),
        "group": 10 * group - 3,
    }


def gradient(term: Term, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.autograd.grad((1.0 * term)(data), data["response_logps"])[0]


def sequence(data: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(data["response_mask"], data["response_logps"], 0.0).sum(-1)


# ---- groups and advantages ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.integers(0, 100))
def test_group_statistics_are_those_of_a_loop_over_groups(numbers: list[int], seed: int) -> None:
    group = torch.tensor(numbers)
    x = torch.randn(len(numbers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups = Groups(group)
    for i, number in enumerate(numbers):
        own = x[group == number]
        torch.testing.assert_close(groups.mean(x)[i], own.mean(), **EXACT)
        torch.testing.assert_close(groups.std(x, 0)[i], own.std(correction=0), **EXACT)
        assert groups.extreme(x, "amax")[i] == own.max()
    best = groups.best(x)
    assert int(best.sum()) == len(set(numbers))
    assert all(x[i] == x[group == numbers[i]].max() for i in best.nonzero().flatten())


def test_the_first_of_several_equal_answers_is_the_best() -> None:
    best = Groups(torch.tensor([1, 0, 1, 0])).best(torch.tensor([2.0, 5.0, 2.0, 5.0]))
    assert best.tolist() == [True, True, False, False]


@pytest.mark.parametrize("baseline", ["leave_one_out", "group", "whitened", "whitened_group"])
@pytest.mark.parametrize("reward", [0.1, 1e6 + 0.1, -7.3])
def test_equal_rewards_have_no_advantage_however_they_round(baseline: str, reward: float) -> None:
    group = torch.zeros(10, dtype=torch.int64)
    assert advantages(torch.full((10,), reward), group, baseline).tolist() == [0.0] * 10


def test_the_leave_one_out_baseline_is_the_mean_of_the_others() -> None:
    data = batch()
    found = advantages(data["reward"], data["group"], "leave_one_out")
    for i in range(len(found)):
        others = (data["group"] == data["group"][i]) & (torch.arange(len(found)) != i)
        torch.testing.assert_close(found[i], data["reward"][i] - data["reward"][others].mean(), **EXACT)


# ---- likelihood -----------------------------------------------------------------------------------------------------


def test_best_of_one_is_supervised_learning() -> None:
    data = batch(samples=1)
    torch.testing.assert_close((1.0 * BestOfN())(data), -sequence(data).mean(), **EXACT)


@pytest.mark.parametrize("negative", [None, "worst", "mean", "sum"])
@pytest.mark.parametrize("constrained", [False, True])
def test_best_of_n_is_its_loop_over_groups(negative: str | None, constrained: bool) -> None:
    data = batch()
    logp = sequence(data) - (data["reference_response_logps"].sum(-1) if constrained else 0.0)
    losses = []
    for number in data["group"].unique():
        own = (data["group"] == number).nonzero().flatten()
        order = own[data["reward"][own].argsort()]
        losers = logp[order[:-1]]
        pushed = {None: 0.0, "worst": losers[0], "mean": losers.mean(), "sum": losers.sum()}[negative]
        losses.append(-logp[order[-1]] + 0.3 * pushed)
    term = BestOfN(negative=negative, coefficient=0.3, constrained=constrained)
    torch.testing.assert_close((1.0 * term)(data), torch.stack(losses).mean(), **EXACT)


def test_the_constraint_of_best_of_n_moves_the_value_and_not_the_gradient() -> None:
    data = batch()
    free, held = (BestOfN(negative="worst", constrained=c) for c in (False, True))
    torch.testing.assert_close(gradient(free, data), gradient(held, data), **EXACT)


def test_reward_weighting_becomes_supervised_learning_as_the_temperature_grows() -> None:
    data = batch()
    torch.testing.assert_close((1.0 * RewardWeighted(1e12))(data), -sequence(data).mean(), rtol=1e-9, atol=0.0)


@settings(max_examples=20, deadline=None)
@given(st.floats(-3, 3), st.floats(0.2, 5))
def test_a_constant_in_the_reward_only_rescales_reward_weighting(constant: float, temperature: float) -> None:
    data = batch()
    shifted = {**data, "reward": data["reward"] - constant}
    factor = math.exp(-constant / temperature)
    term = RewardWeighted(temperature)
    torch.testing.assert_close(gradient(term, shifted), factor * gradient(term, data), rtol=1e-9, atol=1e-12)
    for normalise in ("group", "batch"):
        term = RewardWeighted(temperature, normalise=normalise)
        torch.testing.assert_close(gradient(term, shifted), gradient(term, data), rtol=1e-9, atol=1e-12)


def test_normalised_weights_have_the_mean_one_and_do_not_overflow() -> None:
    data = batch()
    data["reward"] = 1e4 * data["reward"]
    weight = RewardWeighted(1.0, normalise="group")(data["response_logps"], data["reward"], data["group"]).extras[
        "weight"
    ]
    torch.testing.assert_close(Groups(data["group"]).mean(weight), torch.ones_like(weight), **EXACT)


# ---- policy gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["leave_one_out", "group", "whitened", "whitened_group", None])
def test_reinforce_has_the_value_of_the_reward_and_the_gradient_of_the_score_function(baseline: str | None) -> None:
    data = batch()
    term = Reinforce(baseline=baseline)
    a = advantages(data["reward"], None if baseline in ("whitened", None) else data["group"], baseline)
    torch.testing.assert_close((1.0 * term)(data).detach(), -data["reward"].mean(), **EXACT)
    expected = torch.autograd.grad(-(a * sequence(data)).mean(), data["response_logps"])[0]
    torch.testing.assert_close(gradient(term, data), expected, **EXACT)


def test_without_negative_gradient_nothing_is_pushed_down() -> None:
    data = batch()
    assert float(gradient(Reinforce(), data).max()) > 0
    assert float(gradient(Reinforce(negative=False), data).max()) <= 0


def test_the_leave_one_out_gradient_is_unbiased_by_enumeration() -> None:
    """Over all pairs of answers that the policy can give, the mean gradient is that of -E R."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    exact = torch.autograd.grad(-(log_p.exp() * rewards).sum(), logits, retain_graph=True)[0]
    for term in (Reinforce(), RLOO(clip=None), Reinforce(baseline=None)):
        total = torch.zeros(3, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                arms = torch.tensor([i, j])
                loss = (1.0 * term)(
                    response_logps=log_p[arms], reward=rewards[arms], group=torch.zeros(2, dtype=torch.int64)
                )
                chance = (log_p[i] + log_p[j]).exp().detach()
                total += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(total, exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ppo_on_fresh_samples_has_the_gradient_of_reinforce(level: str) -> None:
    data = batch(stale=0.0)
    ppo = PPOClip(level=level, aggregate="sequence_sum", baseline="whitened")
    if level == "sequence":  # the ratio of the answer stands at each token, so the mean over tokens is the answer's
        ppo = PPOClip(level=level, aggregate="sequence_mean", baseline="whitened")
    torch.testing.assert_close(gradient(ppo, data), gradient(Reinforce(baseline="whitened"), data), **EXACT)


def test_rloo_on_fresh_samples_has_the_gradient_of_reinforce_with_the_leave_one_out_baseline() -> None:
    data = batch(stale=0.0)
    torch.testing.assert_close(gradient(RLOO(), data), gradient(Reinforce(), data), **EXACT)


def test_there_is_no_gradient_where_the_clip_acts() -> None:
    new, old = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-2.0, 0.0])
    loss = (1.0 * PPOClip(baseline=None))(response_logps=new, behaviour_logps=old, reward=torch.tensor([1.0, -1.0]))
    assert torch.autograd.grad(loss, new)[0].tolist() == [0.0, 0.0]
    with_the_clip_the_other_way = torch.tensor([-1.0, 1.0])
    loss = (1.0 * PPOClip(baseline=None))(response_logps=new, behaviour_logps=old, reward=with_the_clip_the_other_way)
    assert all(g != 0 for g in torch.autograd.grad(loss, new)[0].tolist())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_each_estimator_of_the_divergence_pulls_as_its_docstring_says(estimator: str) -> None:
    """By enumeration: k1 pulls nowhere, k2 along KL(pi || ref), k3 along KL(ref || pi); k1 and k3 are unbiased in value."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    log_q = torch.tensor([0.1, 0.4, -0.3], dtype=torch.float64).log_softmax(-1)
    values = SampledKL(estimator)(log_p, log_q)
    found = torch.autograd.grad((log_p.exp().detach() * values).sum(), logits, retain_graph=True)[0]
    reverse = (log_p.exp() * (log_p - log_q)).sum()
    forward = (log_q.exp() * (log_q - log_p)).sum()
    expected = {"k1": 0 * reverse, "k2": reverse, "k3": forward}[estimator]
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits)[0], **EXACT)
    if estimator != "k2":
        torch.testing.assert_close((log_p.exp() * values).sum(), reverse, **EXACT)


# ---- how tokens become one number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean", "dr_grpo", "sequence_sum"])
@pytest.mark.parametrize("term", [GRPO, PPOClip])
def test_the_aggregations_are_what_they_are_called(aggregate: str, term: type[GRPO | PPOClip]) -> None:
    data = batch()
    length = {"max_length": 9} if aggregate == "dr_grpo" else {}
    made = term(aggregate=aggregate, **length)
    mask = data["response_mask"]
    a = made._advantage(data["reward"], data["group"])[:, None]
    ratio = (data["response_logps"] - data["behaviour_logps"]).exp()
    tokens = torch.where(mask, -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a), 0.0)
    expected = {
        "sequence_mean": (tokens.sum(1) / mask.sum(1)).mean(),
        "token_mean": tokens.sum() / mask.sum(),
        "dr_grpo": tokens.sum() / (9 * len(mask)),
        "sequence_sum": tokens.sum(1).mean(),
    }[aggregate]
    torch.testing.assert_close((1.0 * made)(data), expected, **EXACT)


@pytest.mark.parametrize("formula", ["grpo", "grpo(aggregate='token_mean')", "rloo", "best_of_n", "reinforce"])
def test_whole_groups_in_micro_batches_give_the_number_of_one_big_batch(formula: str) -> None:
    data = {k: v.detach() for k, v in batch().items()}
    order = data["group"].argsort(stable=True)
    data = {k: v[order] for k, v in data.items()}

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, logps):
            return self.scale * logps

    class Readout:
        output = "response_logps"

        def __call__(self, model, batch: Quantities, reads):
            batch.put("response_logps", model(batch["raw"]))
            return batch

    raw = {("raw" if k == "response_logps" else k): v for k, v in data.items()}
    parts = [{"main": {k: v[s] for k, v in raw.items()}} for s in (slice(0, 5), slice(5, 20))]
    whole = Problem(Table(), parse(formula), [{"main": raw}], Readout()).gradient()
    torch.testing.assert_close(Problem(Table(), parse(formula), parts, Readout()).gradient(), whole, **EXACT)
    torn = [{"main": {k: v[s] for k, v in raw.items()}} for s in (slice(0, 7), slice(7, 20))]
    with pytest.raises(TypeError, match="compares examples of a batch"):
        Problem(Table(), parse(formula), torn, Readout())


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_several_rewards_combine_inside_the_term_with_visible_weights() -> None:
    data = batch()
    accuracy = torch.rand(20, dtype=torch.float64)
    objective = parse("grpo(reward=test_accuracy + auto*test_brevity)")
    assert list(objective.autos) == ["test_brevity"]
    assert "accuracy" in objective.reads
    assert {"group", "behaviour_logps"} <= objective.plan(None)
    resolved = objective.resolve({"test_brevity": 0.1})
    assert str(resolved) == "grpo(reward=test_accuracy + 0.1*test_brevity)"
    assert str(objective) == "grpo(reward=test_accuracy + auto*test_brevity)"  # the first one is as it was
    summed = {**data, "reward": accuracy - 0.1 * data["response_mask"].sum(1).double()}
    del data["reward"]
    torch.testing.assert_close(resolved({**data, "accuracy": accuracy}), (1.0 * GRPO())(summed), **EXACT)


def test_a_column_can_be_a_reward_by_its_name() -> None:
    data = batch()
    data["brevity"] = torch.rand(20, dtype=torch.float64)
    objective = parse("rloo(reward=score + 0.5*score.on(reward='brevity').named('brevity'))")
    assert parse(str(objective)).equals(objective)
    expected = (1.0 * RLOO())({**data, "reward": data["reward"] + 0.5 * data["brevity"]})
    torch.testing.assert_close(objective(data), expected, **EXACT)


def test_the_hold_on_the_reference_can_stand_in_the_reward_and_carries_no_gradient_there() -> None:
    data = batch()
    objective = parse("rloo(reward=score - 0.05*sampled_kl(estimator='k1', aggregate='sequence_sum'))")
    k1 = (data["response_logps"] - data["reference_response_logps"]).sum(1).detach()
    expected = (1.0 * RLOO())({**data, "reward": data["reward"] - 0.05 * k1})
    torch.testing.assert_close(
        torch.autograd.grad(objective(data), data["response_logps"])[0],
        torch.autograd.grad(expected, data["response_logps"])[0],
        **EXACT,
    )


def test_a_best_answer_may_be_chosen_by_a_composed_reward() -> None:
    data = batch()
    objective = parse("best_of_n(reward=-1*score)")
    expected = (1.0 * BestOfN())({**data, "reward": -data["reward"]})
    torch.testing.assert_close(objective(data), expected, **EXACT)


def test_running_statistics_move_once_a_step_and_survive_saving() -> None:
    term = Reinforce(baseline="running", momentum=0.5)
    objective = 1.0 * term
    logps = torch.zeros(2, requires_grad=True)
    for rewards in ([1.0, 3.0], [2.0, 6.0]):
        objective(response_logps=logps, reward=torch.tensor(rewards)).backward()
        objective(response_logps=logps, reward=torch.tensor(rewards))
        objective.advance()
    # bias-corrected with momentum 1/2: (1/4 * 2 + 1/2 * 4) / (3/4)
    advantage = term(logps, torch.tensor([10 / 3, 10 / 3])).extras["advantage"]
    torch.testing.assert_close(advantage, torch.zeros(2), rtol=0, atol=1e-5)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert float(twin.terms["reinforce"].visits) == 2
    fresh = 1.0 * Reinforce(baseline="running", momentum=0.5)
    fresh.load_state_dict(objective.state_dict())
    assert float(fresh.terms["reinforce"].mean) == float(term.mean)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewardWeighted(temperature=0.0), "reward_weighted: temperature must be positive, and it is 0.0"),
        (lambda: BestOfN(negative="all"), "best_of_n: negative is one of"),
        (lambda: BestOfN(coefficient=-1.0), "best_of_n: coefficient must be at least 0"),
        (lambda: Reinforce(baseline="median"), "reinforce: baseline is one of"),
        (lambda: PPOClip(clip=0.0), "ppo_clip: clip must be positive"),
        (lambda: GRPO(aggregate="dr_grpo"), "grpo: aggregate='dr_grpo' divides by max_length"),
        (lambda: GRPO(aggregate="mean"), "grpo: aggregate is one of"),
        (lambda: GRPO(scale_rewards="std"), "grpo: scale_rewards is one of"),
        (lambda: RLOO(reward=3), "rloo: reward is a sum of reward terms"),
        (lambda: RLOO(reward=Score().on("anchor")), "rloo: a reward reads the stream of its term"),
        (lambda: RLOO(reward=1.0 * Reinforce(baseline="running")), "rloo: reinforce has a memory"),
        (lambda: SampledKL("k4"), "sampled_kl: estimator is one of"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_the_terms_name(make, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make()


def test_a_ratio_without_the_samplers_log_probabilities_is_refused() -> None:
    data = batch()
    del data["behaviour_logps"]
    for term in (PPOClip(), GRPO(), RLOO()):
        with pytest.raises(QuantityError, match="behaviour_logps"):
            (1.0 * term)(data)
    (1.0 * GRPO(clip=None))(data)  # fresh samples need none


def test_a_ratio_per_token_needs_the_mask() -> None:
    data = batch()
    del data["response_mask"]
    with pytest.raises(QuantityError, match="response_mask"):
        (1.0 * GRPO())(data)


@pytest.mark.parametrize(
    "formula",
    ["best_of_n(negative='worst')", "reward_weighted", "reinforce", "ppo_clip", "grpo", "rloo", "sampled_kl"],
)
def test_float32_and_float64_agree_and_an_answer_of_one_token_may_be_its_sum(formula: str) -> None:
    data = batch(time=1)
    objective = parse(formula)
    single = {k: v.float() if v.is_floating_point() else v for k, v in data.items()}
    torch.testing.assert_close(objective(single).double(), objective(data), rtol=1e-4, atol=1e-5)
    summed = {k: v.squeeze(1) if k.endswith("logps") else v for k, v in data.items()}
    torch.testing.assert_close(objective(summed), objective(data), **EXACT)


TRL = 1e-7  # its standard deviation has the correction n / (n - 1) in float32


# ---- peers ----------------------------------------------------------------------------------------------------------


def trainer_double(data: dict[str, torch.Tensor], **settings: object) -> SimpleNamespace:
    """What TRL's `_compute_loss` needs of a trainer that never generates: it is handed the log-probabilities."""
    zeros = torch.zeros_like(data["response_logps"])
    defaults: dict[str, object] = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (data["response_logps"], zeros, None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": 9,
        "_entropy_bonus_enabled": False,
        "_metrics": {"train": defaultdict(list)},
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x.reshape(-1), reduce=lambda x, **_: x),
    }
    return SimpleNamespace(**{**defaults, **settings})


def trl_inputs(data: dict[str, torch.Tensor], advantage: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.zeros(data["response_mask"].shape, dtype=torch.int64)
    return {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": data["response_mask"].long(),
        "advantages": advantage,
        "old_per_token_logps": data["behaviour_logps"],
        "ref_per_token_logps": data["reference_response_logps"],
        "old_logps": data["behaviour_logps"].sum(1),
        "num_items_in_batch": data["response_mask"].sum(),
    }


@pytest.mark.peer
@pytest.mark.parametrize(
    ("loss_type", "aggregate"),
    [
        ("grpo", "sequence_mean"),
        ("bnpo", "token_mean"),
        ("dr_grpo", "dr_grpo"),
        ("luspo", "sequence_sum"),
        ("dapo", "token_mean"),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_trls(loss_type: str, aggregate: str, level: str, scale: str) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (extra 'peers')")
    from trl.trainer.utils import nanstd

    data = batch()
    order = data["group"].argsort(stable=True)
    rewards = data["reward"][order].view(-1, 5)
    deviation = nanstd(rewards, dim=1).repeat_interleave(5) if scale == "group" else nanstd(rewards)
    advantage = (rewards - rewards.mean(1, keepdim=True)).flatten()
    advantage = advantage if scale == "none" else advantage / (deviation + 1e-4)
    shuffled = torch.empty_like(advantage)
    shuffled[order] = advantage
    fake = trainer_double(data, loss_type=loss_type, importance_sampling_level=level, beta=0.04, epsilon_high=0.28)
    theirs = trl.GRPOTrainer._compute_loss(fake, None, trl_inputs(data, shuffled))
    shape = {"aggregate": aggregate, "max_length": 9 if aggregate == "dr_grpo" else None}
    if loss_type == "luspo" and level == "sequence":
        pytest.skip("the sum over tokens of a ratio of the answer is not what either side is for")
    ours = GRPO(
        clip=0.2,
        clip_high=0.28,
        level="sequence_mean" if level == "sequence" else "token",
        scale_rewards=scale,
        **shape,
    ) + 0.04 * SampledKL("k3", **shape)
    torch.testing.assert_close(ours(data), theirs, rtol=TRL, atol=1e-12)
    (mine,) = torch.autograd.grad(ours(data), data["response_logps"])
    (other,) = torch.autograd.grad(theirs, data["response_logps"])
    torch.testing.assert_close(mine, other, rtol=TRL, atol=1e-12)


@pytest.mark.peer
@pytest.mark.parametrize("whiten", [False, True])
def test_rloo_is_trls(whiten: bool) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed (extra 'peers')")
    from trl.trainer.utils import nanstd

    data = batch(stale=0.1)
    order = data["group"].argsort(stable=True)
    k1 = (data["behaviour_logps"] - data["reference_response_logps"]).sum(1)
    rewards = (data["reward"] - 0.05 * k1)[order].view(-1, 5)
    advantage = (rewards - (rewards.sum(1, keepdim=True) - rewards) / 4).flatten()
    if whiten:
        advantage = (advantage - advantage.mean()) / (nanstd(advantage) + 1e-4)
    shuffled = torch.empty_like(advantage)
    shuffled[order] = advantage
    theirs = trl.RLOOTrainer._compute_loss(trainer_double(data), None, trl_inputs(data, shuffled))
    held = SampledKL("k1", aggregate="sequence_sum").on(response_logps="behaviour_logps")
    ours = 1.0 * RLOO(whiten=whiten, reward=Score() - 0.05 * held)
    torch.testing.assert_close(ours(data), theirs, rtol=TRL, atol=1e-12)
    (mine,) = torch.autograd.grad(ours(data), data["response_logps"])
    (other,) = torch.autograd.grad(theirs, data["response_logps"])
    torch.testing.assert_close(mine, other, rtol=TRL, atol=1e-12)
