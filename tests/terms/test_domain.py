"""Terms of domain adaptation: gradient reversal, alignment, mutual information, and target predictions refined by Bayes' rule."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poise import auxiliary, parse
from poise.errors import IncompatibleError, InputError, QuantityError
from poise.objective import Value
from poise.problem import Problem
from poise.quantities import Streams
from poise.readouts import DomainFeatures
from poise.terms import (
    ConditionalDomainAdversarial,
    CrossEntropy,
    DomainAdversarial,
    MarginDisparity,
    MutualInformation,
    SourceClassification,
    TargetClassification,
)
from poise.terms.domain import BayesRefiner, refined_log_probabilities, reverse_gradient

K, WIDTH = 4, 3


def batch(source: int = 6, target: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = source + target
    return {
        "logits": torch.randn(n, K, generator=generator).to(dtype).requires_grad_(),
        "features": torch.randn(n, WIDTH, generator=generator).to(dtype).requires_grad_(),
        "target": torch.cat([torch.randint(K, (source,), generator=generator), torch.full((target,), -1)]),
        "domain": torch.cat([torch.zeros(source, dtype=torch.int64), torch.full((target,), -1)]),
    }


def values(out: Tensor | Value) -> Tensor:
    return out.values if isinstance(out, Value) else out


# ---- reversal -------------------------------------------------------------------------------------------------------


def test_reversal_is_the_identity_and_turns_the_gradient_around() -> None:
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64)
    out = reverse_gradient(x, 0.3)
    assert torch.equal(out, x)
    (g,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(g, -0.3 * weight)
    pushed = torch.func.grad(lambda y: (reverse_gradient(y, 0.3) * weight).sum())(x)
    assert torch.equal(pushed, g)


def test_the_reversal_warms_up_as_published() -> None:
    term = DomainAdversarial(WIDTH, (4,), warmup=1000)
    for step in (0, 1, 500, 1000, 30_000):
        assert term.reversal(step) == pytest.approx(2 / (1 + math.exp(-step / 1000)) - 1, abs=1e-15)
    assert DomainAdversarial(WIDTH, (4,), warmup=0).reversal(0) == 1
    assert MarginDisparity(WIDTH, K).reversal(10**6) == pytest.approx(0.1)


# ---- alignment ------------------------------------------------------------------------------------------------------


def test_the_adversarial_loss_is_the_mean_of_both_domains_and_its_players_oppose() -> None:
    b, term = batch(), DomainAdversarial(WIDTH, (5,), warmup=10).double()
    out = term(b["features"], b["domain"], 7)
    assert term.built is not None
    d = term.built(b["features"]).squeeze(-1).sigmoid()
    by_hand = (
        F.binary_cross_entropy(d[:6], torch.ones(6).double()) + F.binary_cross_entropy(d[6:], torch.zeros(6).double())
    ) / 2
    torch.testing.assert_close(out.values.mean(), by_hand)
    ours = torch.autograd.grad(out.values.mean(), [b["features"], *term.parameters()])
    plain = torch.autograd.grad(by_hand, [b["features"], *term.parameters()])
    torch.testing.assert_close(ours[0], -term.reversal(7) * plain[0])
    for a, e in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, e)


def test_a_discriminator_that_knows_nothing_costs_log_two() -> None:
    b, term = batch(), DomainAdversarial(WIDTH, (5,), discriminator=nn.Linear(WIDTH, 1).double())
    nn.init.zeros_(term.discriminator.weight)  # type: ignore[union-attr, arg-type]
    nn.init.zeros_(term.discriminator.bias)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(values(term(b["features"], b["domain"], 0)), torch.full((12,), math.log(2)).double())


def test_conditional_alignment_reads_the_outer_product_and_weighs_what_is_sure() -> None:
    b = batch()
    term = ConditionalDomainAdversarial(WIDTH, K, (5,), warmup=0).double()
    p = b["logits"].detach().softmax(-1)
    joint = torch.einsum("nd,nk->ndk", b["features"], p).flatten(1)
    logit = term.discriminator(joint).squeeze(-1)
    sign = torch.where(b["domain"] >= 0, 1.0, -1.0)
    expected = -F.logsigmoid(sign * logit)
    out = term(b["features"], b["logits"], b["domain"], 0)
    torch.testing.assert_close(out.values, expected)
    assert torch.autograd.grad(out.values.sum(), b["logits"], allow_unused=True, retain_graph=True)[0] is None

    sure = ConditionalDomainAdversarial(WIDTH, K, (5,), warmup=0, entropy=True).double()
    h = -(p * p.log()).sum(-1)
    w = (1 + (-h).exp()) / (1 + (-h).exp()).mean()
    torch.testing.assert_close(values(sure(b["features"], b["logits"], b["domain"], 0)), w * expected)
    assert sure.couples == ("logits",)
    assert term.couples == ()


def test_the_random_map_keeps_inner_products_on_average() -> None:
    term = ConditionalDomainAdversarial(WIDTH, K, (), warmup=0, random=20_000).double()
    b = batch()
    f, p = b["features"].detach(), b["logits"].detach().softmax(-1)
    assert term.feature_map is not None
    assert term.class_map is not None
    joint = (f @ term.feature_map) * (p @ term.class_map) / math.sqrt(20_000)
    exact = (f @ f.T) * (p @ p.T)
    # The error of a mean of 20,000 products is about their spread / 141.
    torch.testing.assert_close(joint @ joint.T, exact, rtol=0, atol=0.1 * float(exact.abs().max()))
    assert values(term(b["features"], b["logits"], b["domain"], 0)).shape == (12,)


def test_margin_disparity_is_the_sum_of_both_sides_and_stays_finite() -> None:
    b, term = batch(), MarginDisparity(WIDTH, K, (5,), margin=4, warmup=0, strength=1).double()
    other, own = term.head(b["features"]), b["logits"].argmax(-1)
    agree = F.cross_entropy(other[:6], own[:6])
    disagree = F.nll_loss((1 - other[6:].softmax(-1)).log(), own[6:])
    out = values(term(b["features"], b["logits"], b["domain"], 0))
    torch.testing.assert_close(out.mean(), 4 * agree + disagree)
    (g,) = torch.autograd.grad(out.mean(), b["features"], retain_graph=True)
    (plain,) = torch.autograd.grad(4 * agree + disagree, b["features"])
    torch.testing.assert_close(g, -plain)
    sure = nn.Linear(WIDTH, K).double()
    nn.init.zeros_(sure.weight)
    sure.bias.data = torch.tensor([1000.0, 0, 0, 0]).double()
    term.head = nn.Sequential(sure)
    logits = torch.zeros(12, K).double()
    logits[:, 0] = 1
    assert torch.isfinite(values(term(b["features"], logits, b["domain"], 0))).all()


# ---- mutual information ---------------------------------------------------------------------------------------------


def minus_information(p: Tensor) -> float:
    def entropy(q: Tensor) -> Tensor:
        return -torch.xlogy(q, q).sum(-1)

    return float(entropy(p).mean() - entropy(p.mean(0)))


def test_mutual_information_of_equal_and_of_certain_even_predictions() -> None:
    assert float(MutualInformation()(torch.zeros(8, K)).mean()) == 0
    even = torch.eye(K).repeat(2, 1).log()
    assert float(MutualInformation()(even).mean()) == pytest.approx(-math.log(K))
    assert float(MutualInformation(shifted=True)(even).mean()) == pytest.approx(0, abs=1e-6)
    one_class = torch.eye(K)[[0, 0, 0]].log()
    assert float(MutualInformation()(one_class).mean()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_of_the_values_is_minus_the_mutual_information(dtype: torch.dtype) -> None:
    logits = torch.randn(9, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    mean = MutualInformation()(logits).mean()
    assert mean.dtype == dtype
    assert float(mean) == pytest.approx(minus_information(logits.double().softmax(-1)), abs=1e-6)


def test_the_gradient_of_mutual_information_is_that_of_its_definition() -> None:
    logits = torch.randn(5, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    term = MutualInformation()
    assert torch.autograd.gradcheck(lambda z: term(z).mean(), (logits,))
    p = logits.softmax(-1)
    q = p.mean(0)
    definition = -(p * p.log()).sum(-1).mean() + (q * q.log()).sum()
    ours, expected = (torch.autograd.grad(x, logits)[0] for x in (term(logits).mean(), definition))
    torch.testing.assert_close(ours, expected)
    certain = torch.eye(K, dtype=torch.float64).log().requires_grad_()
    (g,) = torch.autograd.grad(term(certain).mean(), certain)
    assert not torch.isnan(g).any()


# ---- refinement -----------------------------------------------------------------------------------------------------


def test_equal_discriminators_leave_the_prediction() -> None:
    b = batch()
    for constant in (-3.0, 0.0, 5.0):
        refined = refined_log_probabilities(b["logits"], torch.full((12, K), constant).double())
        torch.testing.assert_close(refined, b["logits"].log_softmax(-1))


def test_refinement_is_bayes_rule_in_log_space() -> None:
    b, evidence = batch(), torch.randn(12, K, generator=torch.Generator().manual_seed(3)).double()
    weighted = evidence.sigmoid() * b["logits"].softmax(-1)
    torch.testing.assert_close(
        refined_log_probabilities(b["logits"], evidence).exp(), weighted / weighted.sum(-1, keepdim=True)
    )
    # Where delta is too small for a number, its logarithm is not.
    far = torch.tensor([[-2000.0, -2001.0, -2500.0, -3000.0]])
    torch.testing.assert_close(refined_log_probabilities(torch.zeros(1, K), far), (far.log_softmax(-1)))


def test_the_form_of_the_released_code_is_not_bayes_rule() -> None:
    b, evidence = batch(), torch.randn(12, K, generator=torch.Generator().manual_seed(3)).double()
    code = refined_log_probabilities(b["logits"], evidence, "code")
    torch.testing.assert_close(code, (b["logits"] * evidence.sigmoid()).log_softmax(-1))
    moved = refined_log_probabilities(b["logits"] + 5, evidence, "code")
    assert not torch.allclose(code, moved)  # a constant added to the logits changes it
    torch.testing.assert_close(
        refined_log_probabilities(b["logits"], evidence), refined_log_probabilities(b["logits"] + 5, evidence)
    )


def test_permuted_classes_give_permuted_refinements_and_the_same_value() -> None:
    b, term = batch(), TargetClassification(K, WIDTH, (5,)).double()
    order = torch.tensor([2, 0, 3, 1])
    place = order.argsort()
    twin = copy.deepcopy(term)
    assert twin.refiner is not None
    for held in (*twin.refiner.weight, *twin.refiner.bias):
        held.data = held.data[order]
    first = term(b["logits"], b["domain"], b["features"], b["target"])
    labels = torch.where(b["target"] >= 0, place[b["target"].clamp(min=0)], -1)
    second = twin(b["logits"][:, order], b["domain"], b["features"], labels)
    torch.testing.assert_close(second.extras["refined"], first.extras["refined"][:, order])
    torch.testing.assert_close(second.values, first.values)
    ours = torch.autograd.grad(first.surrogate.sum(), list(term.parameters()))
    permuted = torch.autograd.grad(second.surrogate.sum(), list(twin.parameters()))
    for a, c in zip(ours, permuted, strict=True):
        torch.testing.assert_close(c, a[order])


def test_discriminators_of_all_classes_run_at_once_as_they_would_one_by_one() -> None:
    refiner = BayesRefiner(K, WIDTH, (5, 6)).double()
    x = batch()["features"]
    out = refiner(x)
    for k in range(K):
        h = x
        for number, (w, c) in enumerate(zip(refiner.weight, refiner.bias, strict=True)):
            h = (h.relu() if number else h) @ w[k] + c[k]
        torch.testing.assert_close(out[:, k], h.squeeze(-1))


def test_the_discriminators_own_loss_is_a_weighted_cross_entropy_class_by_class() -> None:
    b, refiner = batch(), BayesRefiner(K, WIDTH, (5,)).double()
    evidence = refiner(b["features"].detach())
    log_p = refined_log_probabilities(b["logits"], evidence)
    delta, p = evidence.sigmoid(), log_p.detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(K):
        for i in range(6):
            if b["target"][i] == k:
                total = total - (1 - delta[i, k]).log() / 6
        for i in range(6, 12):
            total = total - p[i, k] * delta[i, k].log() / 6
    own = refiner.loss(evidence, log_p, b["target"], b["domain"] >= 0)
    torch.testing.assert_close(own, total / 2)
    assert float(refiner.loss(evidence, log_p, b["target"], torch.ones(12, dtype=torch.bool)).detach()) == 0
    assert float(refiner.loss(evidence, log_p, b["target"], torch.zeros(12, dtype=torch.bool)).detach()) == 0


def test_the_value_is_that_of_the_target_rows_and_teaches_each_side_its_own() -> None:
    b, term = batch(), TargetClassification(K, WIDTH, (5,)).double()
    objective = 1 * term
    total = objective(**b)
    here = b["domain"] < 0
    refined = term(b["logits"], b["domain"], b["features"], b["target"]).extras["refined"][here]
    assert float(total.detach()) == pytest.approx(minus_information(refined.detach()), abs=1e-12)
    g = torch.autograd.grad(total, [b["logits"], *term.parameters()], retain_graph=True)
    assert float(g[0][~here].abs().max()) == 0
    assert float(g[0][here].abs().max()) > 0
    assert all(float(x.abs().max()) > 0 for x in g[1:])
    assert torch.autograd.grad(total, b["features"], allow_unused=True)[0] is None  # delta is a constant
    # A guide's batch has target rows alone, and moves no discriminator.
    alone = {name: v[here] for name, v in b.items()}
    found = torch.autograd.grad(objective(**alone), list(term.parameters()))
    assert all(float(x.abs().max()) == 0 for x in found)
    assert float(objective(**{name: v[~here] for name, v in b.items()}).detach()) == 0


def test_without_refinement_it_is_mutual_information_on_the_target_rows() -> None:
    b, term = batch(), TargetClassification(K, refine="none", shifted=True)
    assert term.reads == ("logits", "domain")
    assert list(term.parameters()) == []
    plain = MutualInformation(shifted=True)(b["logits"][b["domain"] < 0]).mean()
    torch.testing.assert_close((1 * term)(logits=b["logits"], domain=b["domain"]), plain)


def test_a_weight_of_a_term_on_some_rows_counts_these_rows_only() -> None:
    b = batch(source=4, target=8)
    ours = (1 * SourceClassification())(logits=b["logits"], target=b["target"], domain=b["domain"])
    torch.testing.assert_close(ours, F.cross_entropy(b["logits"][:4], b["target"][:4]))
    weighted = dict(b, sample_weight=torch.tensor([1.0, 0, 1, 1] + [1.0] * 8))
    kept = (1 * SourceClassification())(weighted)
    torch.testing.assert_close(kept, F.cross_entropy(b["logits"][[0, 2, 3]], b["target"][[0, 2, 3]]))


# ---- in an objective ------------------------------------------------------------------------------------------------


FORMULA = "source_classification + domain_adversarial(dim=3, hidden=(5,)) + target_classification(classes=4, dim=3, hidden=(5,))"


def test_the_formula_reads_back_and_the_state_goes_with_it() -> None:
    objective = parse(FORMULA)
    assert str(parse(str(objective))) == str(objective) == FORMULA
    twin = parse(FORMULA.replace("hidden=(5,)", "hidden=(5,), seed=3"))
    twin.load_state_dict(objective.state_dict())
    b = batch(dtype=torch.float32)
    for other in (twin, copy.deepcopy(objective)):
        assert torch.equal(other(**b), objective(**b))
    assert len(list(objective.parameters())) == 8
    assert [g["player"] for g in objective.parameter_groups()] == ["min"]


def test_micro_batches_of_source_and_alignment_add_up_to_the_big_batch() -> None:
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, K))
    objective = SourceClassification() + DomainAdversarial(WIDTH, (5,), warmup=0)
    rows = {"input": torch.randn(12, 5), "target": batch()["target"], "domain": batch()["domain"]}
    parts = [{k: v[i] for k, v in rows.items()} for i in (slice(0, 4), slice(4, 12))]
    whole = Problem(model, objective, [{"main": rows}], DomainFeatures())
    split = Problem(model, objective, [{"main": p} for p in parts], DomainFeatures())
    torch.testing.assert_close(split.value(), whole.value())
    a, c = whole.gradient(), split.gradient()
    assert a.keys() == c.keys()
    for name in a:
        torch.testing.assert_close(a[name], c[name])
    coupled = Problem(model, objective, [{"main": rows}], DomainFeatures()).objective + TargetClassification(
        K, WIDTH, (5,)
    )
    with pytest.raises(IncompatibleError, match="target_classification compares examples of a batch"):
        Problem(model, coupled, [{"main": p} for p in parts], DomainFeatures())


def test_two_streams_give_what_one_joined_batch_gives() -> None:
    """With statistics of a batch left aside: two streams are two forward passes."""
    b, align = batch(), DomainAdversarial(WIDTH, (5,), warmup=0).double()
    joined = SourceClassification() + align + TargetClassification(K, refine="none")
    apart = (
        CrossEntropy().on("source") + 0.5 * align.on("source") + 0.5 * align.on("target")
        + MutualInformation().on("target")
    )  # fmt: skip
    streams = Streams({
        name: {k: v[rows] for k, v in b.items()} for name, rows in (("source", slice(0, 6)), ("target", slice(6, 12)))
    })  # fmt: skip
    one, two = joined(b), apart(streams)
    torch.testing.assert_close(one, two)
    inputs = [b["logits"], b["features"], *align.parameters()]
    for x, y in zip(torch.autograd.grad(one, inputs), torch.autograd.grad(two, inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_the_discriminators_can_train_beside_the_trade_off() -> None:
    b, term = batch(), TargetClassification(K, WIDTH, (5,)).double()
    objective = CrossEntropy().on(target="source_target", logits="source_logits") + auxiliary(term)
    quantities = dict(b, source_logits=b["logits"][:6], source_target=b["target"][:6])
    total = objective(**quantities)
    torch.testing.assert_close(total, F.cross_entropy(b["logits"][:6], b["target"][:6]))
    g = torch.autograd.grad(total, [b["logits"], *term.parameters()])
    assert float(g[0][6:].abs().max()) == 0
    assert all(float(x.abs().max()) > 0 for x in g[1:])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DomainAdversarial(WIDTH, warmup=-1), "domain_adversarial: warmup is a number of steps"),
        (lambda: DomainAdversarial(0), "domain_adversarial: every width"),
        (lambda: ConditionalDomainAdversarial(strength=0), "conditional_domain_adversarial: warmup"),
        (lambda: MarginDisparity(margin=0.5), "margin_disparity: margin weighs the source"),
        (lambda: TargetClassification(1), "target_classification: it needs two classes"),
        (lambda: TargetClassification(refine="best"), "target_classification: refine is"),  # type: ignore[arg-type]
        (lambda: BayesRefiner(1, 3), "BayesRefiner: it needs two classes"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_features_and_classes_that_do_not_fit_are_refused_by_name() -> None:
    b = batch(dtype=torch.float32)
    for formula, said in (
        ("domain_adversarial(dim=7)", "domain_adversarial: it was made for features of width dim=7, and they have 3"),
        ("conditional_domain_adversarial(dim=7, classes=4)", "conditional_domain_adversarial: it was made for"),
        ("margin_disparity(dim=7, classes=4)", "margin_disparity: it was made for"),
        ("target_classification(classes=4, dim=7)", "target_classification: it was made for features"),
        ("target_classification(classes=5, dim=3)", "made for classes=5, and the logits have 4"),
    ):
        with pytest.raises(QuantityError, match=said):
            parse(formula)(**b)
    with pytest.raises(QuantityError, match="reads 'features'"):
        parse(FORMULA)(logits=b["logits"], target=b["target"], domain=b["domain"])
