"""Token-wise trust regions: the gradient's weights, the limits, the reductions, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import poise
from poise.errors import IncompatibleError, InputError, PoiseError, QuantityError
from poise.objective import Objective
from poise.terms import TokenTrustRegion

SCHEDULE = (0.5, 2.0, 2.0, 2.0, 2.0)


def record(
    lengths: tuple[int, ...] = (3, 8, 5), seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Log-probabilities of answers that begin at different places of the row."""
    generator = torch.Generator().manual_seed(seed)
    time = max(lengths) + 3
    mask = torch.zeros(len(lengths), time, dtype=torch.bool)
    positions = torch.full((len(lengths), time), -1)
    for row, length in enumerate(lengths):
        start = row % 3
        mask[row, start : start + length] = True
        positions[row, start : start + length] = torch.arange(length)
    policy, reference = (
        -torch.rand(len(lengths), time, generator=generator, dtype=torch.float64) * 3 for _ in range(2)
    )
    return {
        "response_logps": (policy * mask).to(dtype),
        "reference_response_logps": (reference * mask).to(dtype),
        "response_mask": mask,
        "response_positions": positions,
    }


def gradient(objective: Any, q: dict[str, Tensor]) -> Tensor:
    logps = q["response_logps"].clone().requires_grad_()
    if not isinstance(objective, Objective):
        objective = 1.0 * objective
    (found,) = torch.autograd.grad(objective({**q, "response_logps": logps}), logps)
    return found


def beta_of(q: dict[str, Tensor]) -> Tensor:
    """The schedule, place by place."""
    table = torch.tensor([*SCHEDULE, 0.1], dtype=torch.float64)
    return table[q["response_positions"].clamp(0, 5)]


def test_the_gradient_is_that_of_cross_entropy_times_two_sigmoids() -> None:
    q = record()
    difference = q["response_logps"] - q["reference_response_logps"]
    w = 2 * torch.sigmoid(-beta_of(q) * difference)
    expected = -w * q["response_mask"] / q["response_mask"].sum()
    for form in ("surrogate", "exact"):
        torch.testing.assert_close(gradient(TokenTrustRegion(form=form), q), expected)


def test_the_exact_value_is_equation_three() -> None:
    q = record()
    z = beta_of(q) * (q["response_logps"] - q["reference_response_logps"])
    per_token = 2 / beta_of(q) * torch.log1p(torch.exp(-z))
    values = TokenTrustRegion(form="exact")(**q).values
    torch.testing.assert_close(values, per_token * q["response_mask"])
    total = (1.0 * TokenTrustRegion(form="exact", reduction="sum"))(q)
    torch.testing.assert_close(total, (per_token * q["response_mask"]).sum(1).mean())


@settings(deadline=None, max_examples=40)
@given(
    difference=st.floats(-40, 40),
    beta=st.floats(1e-3, 50),
    floor=st.sampled_from([0.0, 1e-3, 0.1]),
    single=st.booleans(),
)
def test_both_forms_have_one_gradient_wherever_the_floor_does_not_act(
    difference: float, beta: float, floor: float, single: bool
) -> None:
    dtype = torch.float32 if single else torch.float64
    policy = torch.tensor([[-50.0]], dtype=dtype)
    q = {
        "response_logps": policy,
        "reference_response_logps": policy - difference,
        "response_mask": torch.ones(1, 1, dtype=torch.bool),
    }
    q["reference_response_logps"] = q["reference_response_logps"].clamp(max=0)
    surrogate = TokenTrustRegion(beta=beta, floor=floor)
    w = surrogate(**q).extras["token_weight"]
    assert floor * (1 - 1e-6) <= float(w) <= 2
    a, b = gradient(surrogate, q), gradient(TokenTrustRegion(beta=beta, form="exact"), q)
    if float(w) > floor * (1 + 1e-6):  # single precision rounds the floor too
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)
    else:
        assert float(a) == pytest.approx(-floor)
        # Below the smallest normal number one form rounds to 0 sooner than the other.
        assert abs(float(b)) <= floor * (1 + 1e-6) + torch.finfo(dtype).tiny


def test_the_exact_form_passes_a_check_by_finite_differences() -> None:
    q = record(seed=3)
    logps = q.pop("response_logps").requires_grad_()
    term = TokenTrustRegion(form="exact")
    assert torch.autograd.gradcheck(lambda x: term(x, **q).values, (logps,))


@pytest.mark.parametrize("beta", [0, 0.1, 2, "inf", SCHEDULE, (0, "inf", 1.0)])
@pytest.mark.parametrize("form", ["surrogate", "exact"])
def test_at_the_reference_the_gradient_is_that_of_cross_entropy(beta: Any, form: Any) -> None:
    q = record()
    q["reference_response_logps"] = q["response_logps"].clone()
    term = TokenTrustRegion(beta=beta, form=form)
    torch.testing.assert_close(gradient(term, q), -q["response_mask"].double() / q["response_mask"].sum())
    assert bool((term(**q).extras["token_weight"] == q["response_mask"]).all())


@pytest.mark.parametrize("form", ["surrogate", "exact"])
def test_without_a_brake_it_is_cross_entropy(form: Any) -> None:
    q = record()
    term = TokenTrustRegion(beta=0, form=form)
    cross_entropy = -q["response_logps"][q["response_mask"]].mean()
    torch.testing.assert_close((1.0 * term)(q), cross_entropy)
    torch.testing.assert_close(gradient(term, q), -q["response_mask"].double() / q["response_mask"].sum())


def test_a_vanishing_brake_approaches_cross_entropy_up_to_a_constant() -> None:
    q, beta = record(), 1e-4
    values = TokenTrustRegion(beta=beta, form="exact")(**q).values - 2 / beta * math.log(2)
    difference = q["response_logps"] - q["reference_response_logps"]
    mask = q["response_mask"]
    torch.testing.assert_close(values[mask], -difference[mask], atol=beta * 3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_brake_only_brings_back_what_fell_below_the_reference(dtype: torch.dtype) -> None:
    q = record(dtype=dtype)
    mask = q["response_mask"]
    fallen = (q["reference_response_logps"] - q["response_logps"]).clamp(min=0)
    torch.testing.assert_close(TokenTrustRegion(beta="inf", form="exact")(**q).values, 2 * fallen)
    large = TokenTrustRegion(beta=1e4, form="exact")(**q).values
    torch.testing.assert_close(large[mask], 2 * fallen[mask], atol=2e-4, rtol=0)
    w = TokenTrustRegion(beta=math.inf, floor=0)(**q).extras["token_weight"]
    torch.testing.assert_close(w[mask], 2 * (fallen[mask] > 0).to(dtype))


def test_the_value_at_the_reference_is_log_two_over_beta_and_cross_entropy_is_published() -> None:
    q = record()
    q["reference_response_logps"] = q["response_logps"].clone()
    value = TokenTrustRegion(beta=0.5, form="exact")(**q)
    torch.testing.assert_close(
        value.values[q["response_mask"]], torch.full((16,), 4 * math.log(2), dtype=torch.float64)
    )
    torch.testing.assert_close(value.extras["cross_entropy"], -q["response_logps"])


def test_a_large_brake_on_a_far_token_is_finite_in_single_precision() -> None:
    one = torch.ones(1, 1)
    for difference in (-500.0, 500.0):
        q = {
            "response_logps": -600 * one,
            "reference_response_logps": -600 * one - difference,
            "response_mask": one.bool(),
        }
        for form in ("surrogate", "exact"):
            term = TokenTrustRegion(beta=2, form=form, floor=0)
            assert bool(torch.isfinite((1.0 * term)(q)))
            assert bool(torch.isfinite(gradient(term, q)).all())


def test_places_count_from_the_first_answer_token_wherever_the_answer_stands() -> None:
    q = record(lengths=(6,))
    start = int(q["response_mask"][0].nonzero()[0])
    for before, after in ((0, 0), (4, 1), (0, 7)):
        moved = {}
        for name, value in q.items():
            fill = -1 if name == "response_positions" else 0
            moved[name] = nn.functional.pad(value[:, start : start + 6].int() if value.dtype == torch.bool else
                                            value[:, start : start + 6], (before, after), value=fill).to(value.dtype)  # fmt: skip
        for reduction in ("token_mean", "sequence_mean", "sum"):
            term = 1.0 * TokenTrustRegion(reduction=reduction)
            torch.testing.assert_close(term(moved), term(q))


def test_what_stands_outside_the_answer_does_not_matter() -> None:
    q = record()
    outside = ~q["response_mask"]
    spoiled = dict(q)
    for name in ("response_logps", "reference_response_logps"):
        spoiled[name] = q[name].masked_fill(outside, 1000.0 if name == "response_logps" else -7.0)
    for form in ("surrogate", "exact"):
        term = TokenTrustRegion(form=form)
        torch.testing.assert_close((1.0 * term)(spoiled), (1.0 * term)(q))
        torch.testing.assert_close(gradient(term, spoiled), gradient(term, q))


def test_the_three_reductions_are_means_over_tokens_over_answers_and_over_sums() -> None:
    q = record()
    mask = q["response_mask"]
    values = TokenTrustRegion()(**q).values
    lengths = mask.sum(1)
    expected = {
        "token_mean": values.sum() / mask.sum(),
        "sequence_mean": (values.sum(1) / lengths).mean(),
        "sum": values.sum(1).mean(),
    }
    for reduction, value in expected.items():
        torch.testing.assert_close((1.0 * TokenTrustRegion(reduction=reduction))(q), value, rtol=1e-6, atol=1e-7)
        weighted = {**q, "sample_weight": torch.tensor([1.0, 0.0, 1.0])}
        kept = {name: v[[0, 2]] for name, v in q.items()}
        objective = 1.0 * TokenTrustRegion(reduction=reduction)
        torch.testing.assert_close(objective(weighted), objective(kept), rtol=1e-6, atol=1e-7)


def test_a_tensor_of_places_and_a_brake_for_each_token_say_the_same_as_numbers() -> None:
    q = record()
    plain = (1.0 * TokenTrustRegion())(q)
    torch.testing.assert_close((1.0 * TokenTrustRegion(beta=torch.tensor(SCHEDULE)))(q), plain)
    by_token = 1.0 * TokenTrustRegion(beta="token_weight")
    torch.testing.assert_close(by_token({**q, "response_token_weight": beta_of(q)}), plain)
    renamed = TokenTrustRegion(beta="token_weight", form="exact").on(response_token_weight="brakes")
    exact = 1.0 * TokenTrustRegion(form="exact")
    torch.testing.assert_close(renamed({**q, "brakes": beta_of(q)}), exact(q))


def test_the_limits_may_differ_from_token_to_token() -> None:
    q = record(lengths=(3,))
    beta = torch.zeros_like(q["response_logps"])
    start = int(q["response_mask"][0].nonzero()[0])
    beta[0, start + 1], beta[0, start + 2] = math.inf, 2.0
    for form in ("surrogate", "exact"):
        a = gradient(TokenTrustRegion(beta="token_weight", form=form, floor=0), {**q, "response_token_weight": beta})
        b = gradient(TokenTrustRegion(beta=(0, "inf", 2), form=form, floor=0), q)
        torch.testing.assert_close(a, b)
        assert bool(torch.isfinite(a).all())


def test_no_gradient_flows_into_the_reference_or_the_brakes() -> None:
    q = record()
    leaves = [q[name].requires_grad_() for name in ("response_logps", "reference_response_logps")]
    brakes = torch.ones_like(leaves[0]).requires_grad_()
    for form in ("surrogate", "exact"):
        total = (1.0 * TokenTrustRegion(beta="token_weight", form=form))({**q, "response_token_weight": brakes})
        policy, *others = torch.autograd.grad(total, [*leaves, brakes], allow_unused=True)
        assert policy is not None
        assert others == [None, None]


def test_a_formula_prints_as_it_was_read_and_uses_its_arguments() -> None:
    for text in (
        "token_trust_region",
        "token_trust_region(beta=(0.5, 2, 2), rest=0)",
        "token_trust_region(beta=0.1, form='exact')",
        "token_trust_region(beta=(0.5, 'inf'), reduction='sum')",
        "0.2*token_trust_region(beta='token_weight').on('recovery')",
    ):
        assert str(poise.parse(text)) == text
    assert str(poise.parse("token_trust_region(beta=(0.5, 2, 2, 2, 2), rest=0.1)")) == "token_trust_region"
    assert str(1.0 * TokenTrustRegion(beta=math.inf)) == "token_trust_region(beta='inf')"


def test_the_gradient_of_the_exact_form_is_that_of_its_value_and_the_surrogate_says_that_it_is_not() -> None:
    assert "potential" in TokenTrustRegion(form="exact").capabilities
    assert "potential" not in TokenTrustRegion().capabilities
    assert "potential" in TokenTrustRegion(form="exact").capabilities  # one form does not change the other


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"beta": -1}, "beta must be at least 0"),
        ({"beta": (0.5, -2)}, "beta must be at least 0"),
        ({"beta": math.nan}, "beta must be at least 0"),
        ({"beta": "much"}, "token_weight"),
        ({"beta": ()}, "names no place"),
        ({"beta": torch.ones(2, 3)}, "beta='token_weight' reads it"),
        ({"rest": -0.1}, "rest must be at least 0"),
        ({"form": "direct"}, "'surrogate' or 'exact'"),
        ({"floor": 1.0}, r"floor must lie in \[0, 1\)"),
        ({"reduction": "mean"}, "reduction is one of"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"token_trust_region: .*{said}"):
        TokenTrustRegion(**arguments)


def test_missing_and_ill_shaped_quantities_are_refused_by_name() -> None:
    q = record()
    objective = 1.0 * TokenTrustRegion()
    with pytest.raises(QuantityError, match="reads 'reference_response_logps'"):
        objective({k: v for k, v in q.items() if k != "reference_response_logps"})
    with pytest.raises(QuantityError, match="reads 'reference_response_logps'"):
        objective({**q, "reference_response_logps": q["reference_response_logps"][:, :-1]})
    with pytest.raises(QuantityError, match="response_logps"):
        objective({**q, "response_logps": q["response_logps"].sum(1)})
    with pytest.raises(QuantityError, match="reads 'response_positions'"):
        objective({k: v for k, v in q.items() if k != "response_positions"})
    with pytest.raises(QuantityError, match="reads 'response_token_weight'"):
        (1.0 * TokenTrustRegion(beta="token_weight"))(q)


def test_data_that_cannot_be_meant_are_refused() -> None:
    q = record()
    objective = 1.0 * TokenTrustRegion()
    with pytest.raises(QuantityError, match="no token of the batch"):
        objective({**q, "response_mask": torch.zeros_like(q["response_mask"])})
    for name in ("response_logps", "reference_response_logps"):
        with pytest.raises(QuantityError, match=f"{name} holds a positive number"):
            objective({**q, name: q[name].neg()})
    with pytest.raises(QuantityError, match="negative beta"):
        (1.0 * TokenTrustRegion(beta="token_weight"))(
            {**q, "response_token_weight": -torch.ones_like(q["response_logps"])}
        )


def test_two_small_batches_give_the_gradient_of_one_big_batch() -> None:
    """Under gradient accumulation the token mean runs over all micro-batches, however uneven their lengths."""
    q = record(lengths=(1, 8, 2, 7), dtype=torch.float32)
    runs = []
    for accumulate in (1, 2):
        model = _Shift()
        poise.fit(
            model, "token_trust_region", {"input": torch.arange(4), **{k: v for k, v in q.items() if k != "response_logps"},
            "before": q["response_logps"]}, readout=_Reads(), solver="sgd", lr=0.5, steps=1, batch_size=4,
            accumulate=accumulate, device="cpu",
        )  # fmt: skip
        runs.append(model.shift.detach())
    torch.testing.assert_close(runs[0], runs[1])


class _Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((11,), -0.3))

    def forward(self, before: Tensor, mask: Tensor) -> Tensor:
        return (before + self.shift) * mask


class _Reads:
    output = "response_logps"

    def __call__(self, model: Any, batch: Any, reads: frozenset[str]) -> Any:
        batch.offer("response_logps", lambda: model(batch["before"], batch["response_mask"]))
        return batch


def test_the_term_has_no_state_and_can_be_copied_and_moved() -> None:
    q = record()
    term = TokenTrustRegion(form="exact")
    assert not (1.0 * term).state_dict().get("terms.token_trust_region._table", False)
    clone = copy.deepcopy(term).to(torch.float32)
    torch.testing.assert_close((1.0 * clone)(q), (1.0 * term)(q))


def test_a_line_search_refuses_the_surrogate_by_name() -> None:
    q = record(dtype=torch.float32)
    data = {"input": torch.arange(3), **{k: v for k, v in q.items() if k != "response_logps"}}
    with pytest.raises((IncompatibleError, PoiseError), match="token_trust_region"):
        poise.fit(_Shift(), "token_trust_region", {**data, "before": q["response_logps"]}, readout=_Reads(), solver="lbfgs",
                  steps=1, device="cpu")  # fmt: skip
