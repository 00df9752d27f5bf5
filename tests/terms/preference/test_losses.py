"""Laws that every loss on pairs obeys, and the worked examples of single methods."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import poise
from poise.errors import FormulaError, QuantityError
from poise.terms.preference import DPO, KTO, SoftPreference

from .records import pairs

SEPARATE = [
    "apo_down", "apo_zero", "bco_pair", "discopop", "dpo", "dpo(label_smoothing=0.2)", "dpo(divergence='js')",
    "dpo(divergence='forward_kl')", "dpo(divergence='alpha', alpha=0.3)", "dpo(length_normalized=True)",
    "dpo(reference_free=True)", "dpop", "exo_pair", "flex_dpo", "ipo", "ipo(length_normalized=True)", "nca_pair",
    "odds_ratio", "orpo", "phrase_margin", "preference_margin(token_weight='data')", "preference_margin(token_weight='spans')",
    "robust_dpo", "rpo", "rpo(normalize='sequence_mean')", "rpo(normalize='token_mean')", "rrpo", "rrpo(margin='phrases')",
    "rrpo(margin='segments')", "segment_margin", "simpo", "slic", "soft_dpo", "soft_dpo(label=0.8)",
    "sparse_po(mask_from='data')", "sparse_po(reward='ones', kl='ones')",
    "sppo_hard", "tdpo", "tdpo(version=1)", "token_kl", "token_kl(on='both', reduction='token_mean')",
]  # fmt: skip
"""Formulas whose value is a mean over pairs, or over their tokens."""
COUPLED = ["aot", "aot(unpaired=True)", "aot(label_smoothing=0.1)"]
PREFER = [f for f in SEPARATE if not f.startswith(("token_kl", "apo_down", "soft_dpo", "nca", "discopop"))] + COUPLED
"""Formulas that never push the chosen answer down nor the rejected one up, near the reference."""


def gradients(formula: str, q: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {
        k: q[k].detach().clone().requires_grad_()
        for k in ("chosen_logps", "rejected_logps", "chosen_kl", "rejected_kl")
    }
    value = poise.parse(formula)({**q, **leaves})
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), {
        k: torch.zeros_like(x) if g is None else g * q[f"{k.partition('_')[0]}_mask"]
        for (k, x), g in zip(leaves.items(), found, strict=True)
    }


@pytest.mark.parametrize("formula", SEPARATE + COUPLED)
def test_padding_changes_neither_value_nor_gradient(formula: str) -> None:
    q = pairs()
    padded = {k: v if v.ndim == 1 else F.pad(v, (0, 3) if "chosen" in k else (2, 0)) for k, v in q.items()}
    (value, found), (more, wide) = gradients(formula, q), gradients(formula, padded)
    assert value.item() == pytest.approx(more.item(), rel=1e-12)
    for k, g in found.items():
        inside = wide[k][:, :-3] if "chosen" in k else wide[k][:, 2:]
        assert torch.allclose(g, inside, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("formula", SEPARATE + COUPLED)
def test_the_order_of_the_pairs_does_not_matter(formula: str) -> None:
    q = pairs(batch=6)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    (value, found), (other, moved) = gradients(formula, q), gradients(formula, {k: v[order] for k, v in q.items()})
    assert value.item() == pytest.approx(other.item(), rel=1e-12)
    for k, g in found.items():
        assert torch.allclose(g[order], moved[k], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("formula", SEPARATE)
def test_a_batch_is_the_mean_of_its_parts(formula: str) -> None:
    q = pairs(batch=6)
    objective = poise.parse(formula)
    halves = [{k: v[rows] for k, v in q.items()} for rows in (slice(0, 2), slice(2, 6))]
    whole = objective.evaluate(q).terms
    for label in objective.labels:
        counts = [float(objective.counts({None: h, "main": h})[label]) for h in halves]
        parts = [objective.evaluate(h).terms[label].value.item() for h in halves]
        mean = sum(c * x for c, x in zip(counts, parts, strict=True)) / sum(counts)
        assert whole[label].value.item() == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("formula", SEPARATE + COUPLED)
def test_single_and_double_precision_agree(formula: str) -> None:
    double = pairs()
    single = {k: v.float() if v.is_floating_point() else v for k, v in double.items()}
    (value, found), (low, coarse) = gradients(formula, double), gradients(formula, single)
    assert low.dtype == torch.float32
    assert value.item() == pytest.approx(low.item(), rel=1e-5)
    for k, g in found.items():
        assert coarse[k].dtype == torch.float32
        assert torch.allclose(g.float(), coarse[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("formula", PREFER)
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_answer(formula: str) -> None:
    _, found = gradients(formula, pairs(batch=6))
    assert (found["chosen_logps"] <= 0).all()
    assert (found["rejected_logps"] >= 0).all()
    assert (found["chosen_logps"] < 0).any()


@pytest.mark.parametrize("formula", [f for f in SEPARATE if "discopop" not in f] + COUPLED)
def test_very_long_answers_stay_finite(formula: str) -> None:
    g = torch.Generator().manual_seed(1)
    q = pairs()
    for side in ("chosen", "rejected"):
        for name in (f"{side}_logps", f"reference_{side}_logps"):
            q[name] = -800 * torch.rand(q[name].shape, generator=g, dtype=torch.float64) * q[f"{side}_mask"]
    for dtype in (torch.float64, torch.float32):
        value, found = gradients(formula, {k: v.to(dtype) if v.is_floating_point() else v for k, v in q.items()})
        if "forward_kl" in formula:
            continue  # 1 - pi_ref/pi has no logarithmic form: it overflows where the policy left an answer
        assert value.isfinite()
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("formula", SEPARATE + COUPLED)
def test_every_term_on_pairs_publishes_the_same_by_products(formula: str) -> None:
    objective, q = poise.parse(formula), pairs()
    for label, term in objective.terms.items():
        if label not in ("sft", "token_kl"):
            names = [n for n in (*objective.plan(), "chosen_mask", "rejected_mask") if n in q]
            reads = {
                n: q[n] for n in names if n not in term.readings() and n in type(term).forward.__code__.co_varnames
            }
            extras = term(**reads).extras
            assert {"margin", "chosen_reward", "rejected_reward", "weight", "accuracy"} <= set(extras)
            assert not any(v.requires_grad for v in extras.values())
            assert all(v.shape == (4,) for n, v in extras.items() if n != "phrase_margin" and not n.endswith("_mask"))
            assert torch.allclose(extras["margin"], extras["chosen_reward"] - extras["rejected_reward"])


@pytest.mark.parametrize("formula", SEPARATE + COUPLED + ["kto", "kto(baseline='none')", "cdpo"])
def test_formulas_print_and_copy(formula: str) -> None:
    objective = poise.parse(formula)
    assert poise.parse(str(objective)).equals(objective)
    assert copy.deepcopy(objective).equals(objective)
    assert poise.explain(formula)


@pytest.mark.parametrize(
    "name",
    ["aot", "apo_down", "apo_zero", "bco_pair", "cdpo", "discopop", "dpo", "dpop", "exo_pair", "ipo", "kto", "nca_pair",
     "phrase_margin", "preference_margin", "robust_dpo", "rpo", "rrpo", "segment_margin", "simpo", "slic", "soft_dpo", "sppo_hard", "tdpo"],
)  # fmt: skip
@pytest.mark.parametrize("beta", ["0", "-0.1"])
def test_a_beta_that_is_not_positive_is_refused_by_name(name: str, beta: str) -> None:
    with pytest.raises(FormulaError, match=f"{name}: beta must be positive, and it is {beta}"):
        poise.parse(f"{name}(beta={beta})")


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("flex_dpo(beta_chosen=0)", "flex_dpo: beta_chosen must be positive"),
        ("flex_dpo(beta_rejected=-0.1)", "flex_dpo: beta_rejected must be at least 0"),
        ("soft_dpo(label=1.2)", "soft_dpo: label is a probability"),
        ("tdpo(version=3)", "tdpo: version is 1 or 2, and it is 3"),
        ("tdpo(alpha=-1)", "tdpo: alpha must be at least 0"),
        ("dpop(penalty=-1)", "dpop: penalty must be at least 0"),
        ("simpo(gamma=-1)", "simpo: gamma must be at least 0"),
        ("exo_pair(label_smoothing=0)", "exo_pair: label_smoothing must lie in"),
        ("robust_dpo(label_smoothing=0.5)", "robust_dpo: label_smoothing is the share of wrong labels"),
        ("slic(margin=0)", "slic: margin must be positive"),
        ("orpo(weight=-1)", "orpo: weight must be at least 0"),
        ("kto(baseline='mean')", "kto: baseline is one of"),
        ("dpo(divergence='kl')", "dpo: divergence is one of"),
        ("dpo(alpha=1)", "dpo: alpha=1 is the reverse KL"),
    ],
)
def test_bad_arguments_are_refused_in_words(formula: str, message: str) -> None:
    with pytest.raises(FormulaError, match=message):
        poise.parse(formula)


# ---- single methods -------------------------------------------------------------------------------------------------


def sums(*values: float) -> list[Tensor]:
    """chosen, rejected, and the reference's, one pair."""
    return [torch.tensor([x], dtype=torch.float64) for x in values]


def test_a_certain_label_is_dpo_bit_for_bit() -> None:
    q = pairs(dtype=torch.float32)
    for label in ("soft_dpo(label=1)", "soft_dpo"):
        value, found = gradients(label, {**q, "preference_label": torch.ones(4)})
        dpo, expected = gradients("dpo", q)
        assert value.equal(dpo)
        assert all(found[k].equal(expected[k]) for k in found)


def test_the_soft_label_of_the_worked_example() -> None:
    arguments = sums(-42, -45, -40, -38)
    arguments[0].requires_grad_()
    found = SoftPreference(beta=0.1, label=0.8)(*arguments)
    assert found.values.item() == pytest.approx(0.574077, abs=1e-6)
    found.values.backward()
    assert arguments[0].grad.item() / 0.1 == pytest.approx(-0.177541, abs=1e-6)


@given(z=st.floats(-30, 30), c=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_turning_the_pair_round_turns_the_label(z: float, c: float) -> None:
    forth, back = (
        SoftPreference(beta=1.0, label=label)(*sums(x, 0, 0, 0)).values.item() for x, label in ((z, c), (-z, 1 - c))
    )
    assert forth == pytest.approx(back, rel=1e-9, abs=1e-12)


@given(z=st.floats(-20, 20), strength=st.floats(0.01, 10))
@settings(max_examples=50, deadline=None)
def test_regularising_preferences_towards_uniform_is_a_soft_label(z: float, strength: float) -> None:
    """(1 + l/2) loss(z) + (l/2) loss(-z) = (1 + l) [soft loss at C = (2 + l)/(2 (1 + l))]."""
    x = torch.tensor(z, dtype=torch.float64)
    left = -(1 + strength / 2) * F.logsigmoid(x) - strength / 2 * F.logsigmoid(-x)
    c = (2 + strength) / (2 * (1 + strength))
    right = (1 + strength) * SoftPreference(beta=1.0, label=c)(*sums(z, 0, 0, 0)).values
    assert left.item() == pytest.approx(right.item(), rel=1e-9)


def test_labels_that_are_no_probabilities_are_refused() -> None:
    q = pairs()
    with pytest.raises(QuantityError, match=r"probabilities in \[0, 1\]"):
        poise.parse("soft_dpo")({**q, "preference_label": torch.tensor([0.5, 1.5, 0.0, 1.0], dtype=torch.float64)})
    with pytest.raises(QuantityError, match="preference_label"):
        poise.parse("soft_dpo")({k: v for k, v in q.items() if k != "preference_label"})


def test_equal_betas_are_dpo_bit_for_bit() -> None:
    q = pairs(dtype=torch.float32)
    assert poise.parse("flex_dpo(beta_chosen=0.3, beta_rejected=0.3)")(q).equal(poise.parse("dpo(beta=0.3)")(q))


@pytest.mark.parametrize("rejected", [0.1, 0.05])
def test_probability_gradients_have_the_ratio_of_the_probabilities(rejected: float) -> None:
    """At pi+ = .2, pi- = .05 the gradient of the rejected probability is 4 times that of the chosen one (times b-/b+)."""
    p = torch.tensor([0.2, 0.05], dtype=torch.float64, requires_grad=True)
    term = poise.parse(f"flex_dpo(beta_chosen=0.1, beta_rejected={rejected})")
    reference = torch.tensor([0.1, 0.2], dtype=torch.float64).log()
    value = term(
        chosen_logps=p[:1].log(), rejected_logps=p[1:].log(),
        reference_chosen_logps=reference[:1], reference_rejected_logps=reference[1:],
    )  # fmt: skip
    g = torch.autograd.grad(value, p)[0]
    assert -(g[1] / g[0]).item() == pytest.approx(4 * rejected / 0.1, rel=1e-12)


def test_the_published_weight_is_exact_far_down() -> None:
    found = DPO(beta=0.1)(*sums(-800, -805, -790, -830)).extras
    z = 0.1 * ((-800 + 790) - (-805 + 830))
    assert found["weight"].item() == pytest.approx(1 / (1 + math.exp(z)), rel=1e-6)


def test_tdpo_without_divergences_is_dpo_and_with_them_the_papers_sum() -> None:
    q = pairs()
    assert poise.parse("tdpo(beta=0.3, alpha=0)")(q).item() == pytest.approx(poise.parse("dpo(beta=0.3)")(q).item())
    u = 0.3 * (
        (q["chosen_logps"] - q["reference_chosen_logps"]).sum(-1)
        - (q["rejected_logps"] - q["reference_rejected_logps"]).sum(-1)
    )
    k = q["chosen_kl"].sum(-1), q["rejected_kl"].sum(-1)
    for formula, alpha in (("tdpo(beta=0.3, version=1)", 1.0), ("tdpo(beta=0.3, alpha=0.7)", 0.7)):
        expected = -F.logsigmoid(u - 0.3 * alpha * (k[1] - k[0])).mean()
        assert poise.parse(formula)(q).item() == pytest.approx(expected.item())


def test_tdpo_raises_the_chosen_divergence_in_version_one_and_leaves_it_alone_in_version_two() -> None:
    q = pairs()
    _, first = gradients("tdpo(version=1)", q)
    _, second = gradients("tdpo(version=2)", q)
    assert (first["chosen_kl"][q["chosen_mask"]] < 0).all()
    assert (second["chosen_kl"] == 0).all()
    assert (second["rejected_kl"][q["rejected_mask"]] > 0).all()


def test_robust_dpo_is_unbiased_over_flipped_labels() -> None:
    q, e = pairs(), 0.2
    flipped = {
        k.replace(a, b): v for a, b in (("chosen", "rejected"), ("rejected", "chosen")) for k, v in q.items() if a in k
    }
    robust = poise.parse("robust_dpo(beta=0.3, label_smoothing=0.2)")
    mean = (1 - e) * robust(q) + e * robust(flipped)
    assert mean.item() == pytest.approx(poise.parse("dpo(beta=0.3)")(q).item())


def test_dpop_charges_only_where_the_chosen_answer_fell() -> None:
    assert poise.parse("dpop(beta=0.1, penalty=5)")(
        chosen_logps=sums(-9)[0], rejected_logps=sums(-9)[0], reference_chosen_logps=sums(-10)[0],
        reference_rejected_logps=sums(-9)[0],
    ).item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.1))))  # fmt: skip
    assert poise.parse("dpop(beta=0.1, penalty=5)")(
        chosen_logps=sums(-11)[0], rejected_logps=sums(-9)[0], reference_chosen_logps=sums(-10)[0],
        reference_rejected_logps=sums(-9)[0],
    ).item() == pytest.approx(-math.log(1 / (1 + math.exp(0.6))))  # fmt: skip


def test_kto_measures_against_the_mean_log_ratio_without_a_gradient() -> None:
    h = torch.tensor([0.5, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    found = KTO(beta=0.5, desirable=2.0, undesirable=3.0)(h, torch.zeros(3, dtype=torch.float64), label)
    z = 0.4
    expected = [
        2 / (1 + math.exp(0.5 * (0.5 - z))),
        3 / (1 + math.exp(0.5 * (z + 0.2))),
        2 / (1 + math.exp(0.5 * (0.9 - z))),
    ]
    assert found.values.tolist() == pytest.approx(expected)
    assert found.extras["baseline"].tolist() == pytest.approx([0.2] * 3)
    g = torch.autograd.grad(found.values.sum(), h)[0]
    shares = [found.values[i].item() / c for i, c in enumerate((2, 3, 2))]
    assert g.tolist() == pytest.approx(
        [s * c * 0.5 * x * (1 - x) for s, c, x in zip((-1, 1, -1), (2, 3, 2), shares, strict=True)]
    )


def test_the_baseline_of_kto_is_never_negative_and_names_what_it_misses() -> None:
    h = torch.tensor([-3.0, -2.0])
    assert KTO()(h, torch.zeros(2), torch.tensor([True, False])).extras["baseline"].tolist() == [0, 0]
    with pytest.raises(QuantityError, match="mismatched_logps"):
        KTO(baseline="mismatched")(h, torch.zeros(2), torch.tensor([True, False]))
    assert "mismatched_logps" in poise.parse("kto(baseline='mismatched')").reads
    assert KTO(baseline="none").couples == ()


def test_the_odds_ratio_is_finite_at_certainty() -> None:
    zero, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    value = poise.parse("odds_ratio")(chosen_logps=zero, rejected_logps=zero - 1, chosen_mask=mask, rejected_mask=mask)
    assert value.isfinite()
    assert torch.autograd.grad(value, zero)[0].isfinite().all()
