"""T-REG: the sum, its gradient as token weights of DPO, the weight of a pair, and what is refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

import poise
from poise.errors import FormulaError, InputError, PoiseWarning, QuantityError
from poise.terms.preference import DPO, TREG, TokenRewardRegularizer, sequence_sum
from poise.weights import PreferenceGradientWeight

from .records import pairs

BETA, ALPHA = 0.3, 0.5
LEAVES = ("chosen_logps", "rejected_logps")


def records(seed: int = 0, batch: int = 4) -> dict[str, Tensor]:
    q = pairs(batch, seed)
    g = torch.Generator().manual_seed(seed + 100)
    for side in ("chosen", "rejected"):
        mask = q[f"{side}_mask"]
        q[f"{side}_token_reward"] = (torch.rand(mask.shape, generator=g, dtype=torch.float64) - 0.5) * mask
    return q


def gradients(objective, q: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = {k: q[k].clone().requires_grad_() for k in LEAVES}
    value = objective({**q, **leaves})
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), [torch.zeros_like(q[k]) if g is None else g for k, g in zip(LEAVES, found, strict=True)]


def implied(q: dict[str, Tensor], side: str) -> Tensor:
    return BETA * sequence_sum(q[f"{side}_logps"] - q[f"reference_{side}_logps"], q[f"{side}_mask"])


# ---- the identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0])
def test_the_gradient_is_that_of_dpo_with_token_weights(alpha: float) -> None:
    """d/d log pi(y_t) = -beta w (1 + alpha r_t) on the chosen answer, +beta w (1 - alpha r_t) on the rejected one."""
    q = records()
    w = torch.sigmoid(implied(q, "rejected") - implied(q, "chosen"))[:, None]
    _, (chosen, rejected) = gradients(TREG(alpha, BETA), q)
    batch = len(w)
    up = -BETA * w * (1 + alpha * q["chosen_token_reward"]) * q["chosen_mask"] / batch
    down = BETA * w * (1 - alpha * q["rejected_token_reward"]) * q["rejected_mask"] / batch
    assert torch.allclose(chosen, up, rtol=0, atol=1e-10)
    assert torch.allclose(rejected, down, rtol=0, atol=1e-10)
    # Up to alpha = 2 no token turns round.
    assert (chosen <= 0).all()
    assert (rejected >= 0).all()


def test_alpha_zero_is_dpo_bit_for_bit() -> None:
    q = records()
    (a, ga), (b, gb) = gradients(TREG(0, BETA), q), gradients(1 * DPO(BETA), q)
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(ga, gb, strict=True))


def test_a_constant_reward_scales_the_gradient_of_dpo() -> None:
    q, c = records(), 0.2
    for side in ("chosen", "rejected"):
        q[f"{side}_token_reward"] = torch.full_like(q[f"{side}_token_reward"], c)
    _, (chosen, rejected) = gradients(TREG(ALPHA, BETA), q)
    _, (dpo_chosen, dpo_rejected) = gradients(1 * DPO(BETA), q)
    torch.testing.assert_close(chosen, (1 + ALPHA * c) * dpo_chosen)
    torch.testing.assert_close(rejected, (1 - ALPHA * c) * dpo_rejected)
    given = DPO(BETA) + ALPHA * TokenRewardRegularizer(BETA, reward=c).on(pair_weight="dpo.weight")
    torch.testing.assert_close(gradients(given, q)[1], [chosen, rejected])


def test_simpo_reg_is_simpo_with_token_weights_over_the_length() -> None:
    q, beta, gamma = records(), 2.0, 0.7
    length = {s: q[f"{s}_mask"].sum(1, keepdim=True).double() for s in ("chosen", "rejected")}
    r = {s: beta * sequence_sum(q[f"{s}_logps"], q[f"{s}_mask"])[:, None] / length[s] for s in length}
    w = torch.sigmoid(r["rejected"] - r["chosen"] + gamma)
    _, (chosen, rejected) = gradients(TREG(ALPHA, beta, base="simpo", gamma=gamma), q)
    up = -beta * w / length["chosen"] * (1 + ALPHA * q["chosen_token_reward"]) * q["chosen_mask"] / len(w)
    down = beta * w / length["rejected"] * (1 - ALPHA * q["rejected_token_reward"]) * q["rejected_mask"] / len(w)
    assert torch.allclose(chosen, up, rtol=0, atol=1e-10)
    assert torch.allclose(rejected, down, rtol=0, atol=1e-10)


# ---- the weight -----------------------------------------------------------------------------------------------------


def test_the_value_is_the_weighted_sum_and_the_weight_is_read_from_the_loss_in_any_order() -> None:
    q = records()
    regularizer = TokenRewardRegularizer(BETA).on(pair_weight="dpo.weight")
    first, last = DPO(BETA) + ALPHA * regularizer, ALPHA * regularizer + DPO(BETA)
    w = torch.sigmoid(implied(q, "rejected") - implied(q, "chosen"))
    agreement = sum(
        sequence_sum(q[f"{s}_logps"], q[f"{s}_mask"], q[f"{s}_token_reward"]) for s in ("chosen", "rejected")
    )
    report = first.evaluate(q)
    torch.testing.assert_close(report.terms["token_reward_regularizer"].values, -BETA * w * agreement)
    torch.testing.assert_close(first(q), last(q))
    assert "dpo.weight" not in first.reads


def test_the_weight_carries_no_gradient_unless_that_is_asked_for() -> None:
    q = records()
    read = gradients(TREG(ALPHA, BETA), q)
    by_function, attached = (
        gradients(DPO(BETA) + ALPHA * TokenRewardRegularizer(BETA, weight=PreferenceGradientWeight(variant=variant)), q)
        for variant in ("detached", "attached")
    )
    torch.testing.assert_close(by_function, read)
    torch.testing.assert_close(attached[0], read[0])
    assert not torch.allclose(attached[1][0], read[1][0])
    # Perturbing the path by which the weight came changes nothing.
    w = torch.sigmoid(implied(q, "rejected") - implied(q, "chosen"))
    term = TokenRewardRegularizer(BETA) + 0
    leaf = w.clone().requires_grad_()
    leaves = {k: q[k].clone().requires_grad_() for k in LEAVES}
    grads = torch.autograd.grad(term({**q, **leaves, "pair_weight": leaf}), [*leaves.values(), leaf], allow_unused=True)
    assert grads[-1] is None


def test_the_function_for_simpo_equals_what_simpo_publishes() -> None:
    q, beta, gamma = records(), 2.0, 0.7
    published = TREG(ALPHA, beta, base="simpo", gamma=gamma)
    weight = PreferenceGradientWeight("simpo", gamma=gamma)
    own = poise.parse("simpo(beta=2.0, gamma=0.7)") + ALPHA * TokenRewardRegularizer(
        beta, normalize="length", weight=weight
    )
    torch.testing.assert_close(gradients(own, q), gradients(published, q))


def test_a_static_weight_is_one() -> None:
    q = records()
    static, one = TokenRewardRegularizer(BETA, weight="static"), TokenRewardRegularizer(BETA)
    torch.testing.assert_close((1 * static)(q), (1 * one)({**q, "pair_weight": torch.ones(4, dtype=torch.float64)}))
    zero = torch.zeros(2)
    assert PreferenceGradientWeight(variant="static")(zero, zero).tolist() == [1.0, 1.0]


# ---- what it becomes ------------------------------------------------------------------------------------------------


def test_half_a_reward_on_the_chosen_answer_alone_is_supervised_fine_tuning() -> None:
    q = records()
    term = TokenRewardRegularizer(BETA, on="chosen", weight="static", reward=0.5)
    sft = poise.parse("sft(on='chosen', reduction='sum')")
    torch.testing.assert_close(gradients(1 * term, q), gradients(0.5 * BETA * sft, q))


def test_padding_masks_and_the_gradient_into_rewards_are_left_out() -> None:
    q = records()
    noisy = dict(q)
    for side in ("chosen", "rejected"):
        mask = q[f"{side}_mask"]
        noisy[f"{side}_token_reward"] = torch.where(
            mask, q[f"{side}_token_reward"], torch.full_like(q[f"{side}_logps"], 7.0)
        )
    torch.testing.assert_close(gradients(TREG(ALPHA, BETA), noisy), gradients(TREG(ALPHA, BETA), q))
    rewards = q["chosen_token_reward"].clone().requires_grad_()
    logps = q["chosen_logps"].clone().requires_grad_()
    value = TREG(ALPHA, BETA)({**q, "chosen_logps": logps, "chosen_token_reward": rewards})
    assert torch.autograd.grad(value, [logps, rewards], allow_unused=True)[1] is None


def test_the_value_falls_below_zero_where_a_token_is_pushed_down() -> None:
    term = TokenRewardRegularizer(1.0, on="rejected", weight="static")
    low = term(rejected_logps=torch.tensor([[-50.0]]), rejected_token_reward=torch.tensor([[-0.5]]))
    assert low.values.item() == -25.0
    assert not term.bounded_below


@pytest.mark.parametrize(
    "formula",
    ["t_reg", "t_reg(alpha=0.1)", "t_reg(base='simpo', beta=2.0)", "t_reg(weight='static')",
     "dpo + 0.1*token_reward_regularizer(on='chosen', reward=0.5, weight='static')"],
)  # fmt: skip
def test_formulas_print_and_copy(formula: str) -> None:
    objective = poise.parse(formula)
    assert poise.parse(str(objective)).equals(objective)
    assert copy.deepcopy(objective).equals(objective)
    assert poise.explain(formula)
    again = poise.parse(formula)
    again.load_state_dict(objective.state_dict())


def test_alpha_may_be_a_schedule() -> None:
    assert str(poise.parse("t_reg(alpha=linear(0, 0.5, steps=10))")).startswith("dpo + linear(0, 0.5, steps=10)*token")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_both_precisions_work(kind: torch.dtype) -> None:
    q = {k: v.to(kind) if v.is_floating_point() else v for k, v in records().items()}
    assert TREG(ALPHA, BETA)(q).dtype == kind


def test_only_what_is_needed_is_read() -> None:
    assert set(TokenRewardRegularizer(on="chosen", weight="static").reads) == {"chosen_logps", "chosen_token_reward"}
    assert set(TokenRewardRegularizer(weight=PreferenceGradientWeight()).reads) == {
        f"{s}{side}_logps" for s, side in itertools.product(("", "reference_"), ("chosen", "rejected"))
    } | {"chosen_token_reward", "rejected_token_reward"}
    assert "reference_chosen_logps" not in TREG(base="simpo").reads


@pytest.mark.peer
@pytest.mark.parametrize(("base", "loss"), [("dpo", "sigmoid"), ("simpo", "simpo")])
def test_without_the_regulariser_it_is_what_trl_tests_dpo_and_simpo_against(base: str, loss: str) -> None:
    """`test_oracle_trl.py` holds dpo and simpo to TRL; alpha = 0 leaves exactly these."""
    beta = 0.1 if base == "dpo" else 2.0
    assert TREG(0, beta, base=base).equals(poise.parse(f"{base}(beta={beta})"))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("t_reg(alpha=-0.1)", "t_reg: alpha must be at least 0"),
        ("t_reg(beta=0)", "t_reg: beta must be positive"),
        ("t_reg(base='ipo')", "t_reg: base is one of"),
        ("t_reg(weight='own')", "t_reg: weight is one of"),
        ("token_reward_regularizer(beta=-1)", "token_reward_regularizer: beta must be positive"),
        ("token_reward_regularizer(on='response')", "on is one of"),
        ("token_reward_regularizer(normalize='tokens')", "normalize is None or 'length'"),
        ("token_reward_regularizer(reward='random')", "reward is 'data' or a finite number"),
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(formula)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "ipo"}, "base is 'dpo' or 'simpo'"),
        ({"variant": "moving"}, "variant is"),
        ({"gamma": 1.0}, "0 for dpo"),
        ({"base": "simpo", "gamma": -1.0}, "at least 0"),
    ],
)
def test_a_weight_that_does_not_exist_is_refused(arguments, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PreferenceGradientWeight(**arguments)


def test_rewards_that_do_not_fit_are_refused_by_name() -> None:
    q, objective = records(), TREG()
    short = {**q, "chosen_token_reward": q["chosen_token_reward"][:, :-1]}
    with pytest.raises(QuantityError, match="chosen_token_reward"):
        objective(short)
    bad = q["chosen_token_reward"].clone()
    bad[:, 0] = torch.nan
    with pytest.raises(QuantityError, match="'chosen_token_reward' is NaN or infinite"):
        objective({**q, "chosen_token_reward": bad})
    with pytest.raises(QuantityError, match="pair_weight"):
        (1 * TokenRewardRegularizer())(q)
    sums = {k: v.sum(1) if k.endswith("logps") else v for k, v in q.items()}
    with pytest.raises(QuantityError, match="chosen_logps"):
        objective(sums)


def test_rewards_beyond_one_half_warn_once() -> None:
    q, objective = records(), TREG()
    q["chosen_token_reward"] = q["chosen_token_reward"] * 10
    with pytest.warns(PoiseWarning, match="beyond 0.5"):
        objective(q)
    objective(q)
