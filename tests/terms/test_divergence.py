"""Divergences to the posterior of a reward: their exact gradients, their estimators' expectations, their minima."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

import poise
from poise.errors import IncompatibleError, InputError, QuantityError
from poise.objective import Objective, Summand, Term
from poise.readouts.on_policy import OnPolicy
from poise.tasks.finite_space import FiniteSpace
from poise.tasks.words import WordModel, WordReadout, answer, sample, word_length
from poise.terms.divergence import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from poise.terms.regularised_reward import ExpectedReward, LengthNormalizedKL, ReferenceKL, k1, k2, k3

BETA = 0.5
SPACE = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0])
TWO = FiniteSpace([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.0, 1.0, 3.0], [2.0, 0.0, -1.0]])
LOGITS = torch.tensor([[0.3, -0.2, 0.5], [-1.0, 0.2, 0.1]], dtype=torch.float64)
DIVERGENCES: list[type] = [ReverseKL, ForwardKL, TotalVariation, JensenShannon]


def exact(term: Term, logits: Tensor, space: FiniteSpace = TWO) -> Tensor:
    """The divergence's definition, over all responses: `[prompts]`."""
    p, q = logits.log_softmax(-1), space.posterior(BETA)
    if isinstance(term, ReverseKL):
        return FiniteSpace.kl(p, q)
    if isinstance(term, ForwardKL):
        return FiniteSpace.kl(q, p)
    if isinstance(term, TotalVariation):
        return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
    m = (0.5 * (p.exp() + q.exp())).log()
    return 0.5 * FiniteSpace.kl(p, m) + 0.5 * FiniteSpace.kl(q, m)


def gradient(term: Term, batch: dict[str, Tensor], space: FiniteSpace, logits: Tensor) -> Tensor:
    return space.problem(term, batch, space.policy(logits)).gradient()["logits"]


def autograd(term: Term) -> tuple[Tensor, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    value = exact(term, logits).mean()
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_over_all_responses_value_and_gradient_are_exact(kind: type) -> None:
    log_z = {"log_z": "batch"} if kind is ReverseKL else {}
    term = kind(beta=BETA, samples="enumeration", **log_z)
    value, expected = autograd(term)
    problem = TWO.problem(term, TWO.responses_of(), TWO.policy(LOGITS))
    torch.testing.assert_close(problem.gradient()["logits"], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(problem.value(), value)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_expectation_of_the_estimator_on_own_samples_is_the_exact_gradient(kind: type) -> None:
    """Every response counts with its probability: that is the expectation over samples of the policy."""
    logits = LOGITS[:1]
    arguments = {"baseline": "none"} if kind is ReverseKL else {}
    term = kind(beta=BETA, log_z=float(SPACE.log_z(BETA)), **arguments)
    batch = SPACE.responses_of(3 * logits.softmax(-1))
    at = logits.clone().requires_grad_()
    expected = torch.autograd.grad(exact(term, at, SPACE).sum(), at)[0]
    torch.testing.assert_close(gradient(term, batch, SPACE, logits), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("q", [[0.8, 0.1, 0.1], [0.05, 0.05, 0.9]])
def test_the_expectation_under_any_full_support_proposal_is_the_exact_gradient(kind: type, q: list[float]) -> None:
    logits, proposal = LOGITS[:1], torch.tensor([q], dtype=torch.float64)
    arguments = {"baseline": "none"} if kind is ReverseKL else {}
    term = kind(beta=BETA, samples="proposal", log_z=float(SPACE.log_z(BETA)), **arguments)
    batch = {**SPACE.responses_of(3 * proposal), "behaviour_logps": proposal.log()[0]}
    at = logits.clone().requires_grad_()
    expected = torch.autograd.grad(exact(term, at, SPACE).sum(), at)[0]
    torch.testing.assert_close(gradient(term, batch, SPACE, logits), expected, atol=1e-10, rtol=0)


def test_the_gradient_of_forward_kl_in_the_logits_is_softmax_less_target() -> None:
    found = gradient(ForwardKL(BETA, samples="enumeration"), SPACE.responses_of(), SPACE, LOGITS[:1])
    torch.testing.assert_close(found, LOGITS[:1].softmax(-1) - SPACE.posterior(BETA).exp(), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "term", [ReverseKL(BETA), ExpectedReward(), ReferenceKL(), ReferenceKL("k3")], ids=lambda term: str(term)
)
def test_the_leave_one_out_baseline_does_not_bias_the_gradient(term: Term) -> None:
    """The expectation over all 27 batches of three samples is the gradient over all responses."""
    p, total = LOGITS[:1].softmax(-1)[0], torch.zeros(1, 3).double()
    for drawn in itertools.product(range(3), repeat=3):
        rows = torch.tensor(drawn)
        batch = {k: v[rows] for k, v in SPACE.responses_of().items()}
        total += p[rows].prod() * gradient(term, batch, SPACE, LOGITS[:1])
    whole = type(term)(**({"beta": BETA} if isinstance(term, ReverseKL) else {}), samples="enumeration")
    torch.testing.assert_close(total, gradient(whole, SPACE.responses_of(), SPACE, LOGITS[:1]), atol=1e-10, rtol=0)


def test_reward_and_reference_kl_with_a_weight_have_the_gradient_of_reverse_kl() -> None:
    rows = torch.tensor([0, 2, 2, 1])
    batch = {k: v[rows] for k, v in SPACE.responses_of().items()}
    apart = gradient(ExpectedReward() + BETA * ReferenceKL(), batch, SPACE, LOGITS[:1])  # type: ignore[arg-type]
    torch.testing.assert_close(apart, BETA * gradient(ReverseKL(BETA), batch, SPACE, LOGITS[:1]))


def test_gradient_flow_of_plain_reward_collapses_and_of_regularised_reward_stops_at_the_posterior() -> None:
    policy = SPACE.policy()
    reward = SPACE.minimize(
        ExpectedReward(samples="enumeration"), SPACE.responses_of(), policy, method="flow", iterations=400, rate=20.0
    )
    assert float(reward.logps.exp()[0, 2]) > 0.9998
    assert float(SPACE.entropy(reward.logps)) < 0.003
    for kind in DIVERGENCES:
        term = kind(beta=BETA, samples="enumeration")
        if kind is TotalVariation:
            continue  # not smooth at its minimum: it is checked by its value below
        found = SPACE.minimize(term, SPACE.responses_of(), tolerance=1e-10)
        torch.testing.assert_close(found.logps, SPACE.posterior(BETA), atol=1e-6, rtol=0)
    found = SPACE.minimize(
        TotalVariation(BETA, samples="enumeration"), SPACE.responses_of(), method="flow", rate=0.5, iterations=300
    )
    assert found.certificate.value < 0.02


def test_the_posterior_is_the_limit_of_the_prior_and_of_the_best_response() -> None:
    torch.testing.assert_close(SPACE.posterior(1e6).exp(), SPACE.prior, atol=1e-5, rtol=0)
    assert float(SPACE.posterior(0.01).exp()[0, 2]) == pytest.approx(1.0)


def test_values_agree_with_closed_forms_of_torch() -> None:
    term = ReverseKL(BETA, samples="enumeration", log_z="batch")
    value = SPACE.problem(term, SPACE.responses_of(), SPACE.policy(LOGITS[:1])).value()
    p, q = Categorical(logits=LOGITS[:1]), Categorical(logits=SPACE.posterior(BETA))
    torch.testing.assert_close(value, kl_divergence(p, q)[0])


def test_the_pathwise_gradient_of_a_gaussian_is_that_of_its_closed_form() -> None:
    """Target N(1, 2^2); x = mean + scale * noise. Antithetic noise with unit variance makes the estimate exact."""
    mean, log_scale = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    noise = torch.tensor([-1.0, 1.0])
    policy, target = Normal(mean, log_scale.exp()), Normal(1.0, 2.0)
    x = mean + log_scale.exp() * noise
    term = ReverseKL(gradient="pathwise")
    value = term(policy.log_prob(x), log_score=target.log_prob(x)).values.mean()
    found = torch.autograd.grad(value, (mean, log_scale), retain_graph=True)
    expected = torch.autograd.grad(kl_divergence(policy, target), (mean, log_scale))
    torch.testing.assert_close(found, expected)


def test_the_three_estimators_have_the_values_and_gradients_that_are_said_of_them() -> None:
    at = LOGITS[:1].clone().requires_grad_()
    log_p, prior = at.log_softmax(-1), SPACE.prior_logps
    p, u = log_p.exp().detach(), (log_p - prior)
    kl, other = FiniteSpace.kl(log_p, prior).sum(), FiniteSpace.kl(prior, log_p).sum()

    def slope(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, at, retain_graph=True)[0]

    torch.testing.assert_close((p * k1(u)).sum(), kl)
    torch.testing.assert_close((p * k3(u)).sum(), kl)
    assert abs(float(((p * k2(u)).sum() - kl).detach())) > 1e-3
    torch.testing.assert_close(slope((p * k1(u)).sum()), torch.zeros(1, 3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(slope((p * k2(u)).sum()), slope(kl))
    torch.testing.assert_close(slope((p * k3(u)).sum()), slope(other))
    assert bool((k3(u) >= 0).all())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("choice", ["unbiased", "own"])
def test_reference_kl_has_the_gradient_that_it_names(estimator: str, choice: str) -> None:
    term = ReferenceKL(estimator, choice, baseline="none")
    batch = SPACE.responses_of(3 * LOGITS[:1].softmax(-1))
    at = LOGITS[:1].clone().requires_grad_()
    log_p, prior = at.log_softmax(-1), SPACE.prior_logps
    kl, other = FiniteSpace.kl(log_p, prior).sum(), FiniteSpace.kl(prior, log_p).sum()
    expected = torch.autograd.grad(kl, at, retain_graph=True)[0]
    if choice == "own" and estimator != "k2":
        expected = torch.zeros_like(at) if estimator == "k1" else torch.autograd.grad(other, at)[0]
    torch.testing.assert_close(gradient(term, batch, SPACE, LOGITS[:1]), expected.detach(), atol=1e-10, rtol=0)


def test_tokens_are_summed_and_a_division_by_length_has_a_name_of_its_own() -> None:
    policy, prior = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[-2.0, -3.0], [-3.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert ReferenceKL()(policy, prior).values.tolist() == [2.0, 2.0]
    assert LengthNormalizedKL()(policy, prior, mask).values.tolist() == [1.0, 2.0]


def test_samples_are_compared_within_their_prompt() -> None:
    rows = torch.tensor([0, 2, 1, 3, 5, 5])  # three of each prompt
    both = {k: v[rows] for k, v in TWO.responses_of().items()}
    together = gradient(ReverseKL(BETA), both, TWO, LOGITS)
    apart = sum(
        gradient(ReverseKL(BETA), {k: v[place] for k, v in both.items()}, TWO, LOGITS)
        for place in (slice(0, 3), slice(3, 6))
    )
    torch.testing.assert_close(together, apart / 2)


def test_the_running_normaliser_is_the_mean_over_steps_and_moves_in_advance_alone() -> None:
    term = ForwardKL(log_z="running")
    objective = Objective([Summand(term)])
    batches = [
        {"response_logps": torch.tensor([-1.0, -2.0]), "log_score": torch.tensor(score)}
        for score in ([0.0, 0.0], [1.0, -1.0])
    ]
    z = [float((b["log_score"] - b["response_logps"]).exp().mean()) for b in batches]
    for done, batch in enumerate(batches):
        weight = (batch["log_score"] - batch["response_logps"]).exp() / (sum(z[: done + 1]) / (done + 1))
        for _ in range(2):  # evaluating twice changes nothing
            torch.testing.assert_close(term(**batch).extras["weight"], weight)
        leaf = {**batch, "response_logps": batch["response_logps"].clone().requires_grad_()}
        objective(**leaf)
        objective.advance()
    assert float(term.running) == pytest.approx(math.log(sum(z) / 2))
    twin = copy.deepcopy(objective)
    fresh = Objective([Summand(ForwardKL(log_z="running"))])
    fresh.load_state_dict(objective.state_dict())
    for other in (twin, fresh):
        torch.testing.assert_close(other(**batches[0]), objective(**batches[0]))


def test_a_fixed_normaliser_needs_nobody_to_advance_it() -> None:
    assert not Objective([Summand(ForwardKL())]).stateful
    assert Objective([Summand(ForwardKL(log_z="running"))]).stateful


def test_forbidden_samples_weigh_nothing_in_forward_kl_and_stop_reverse_kl() -> None:
    logps = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    score = torch.tensor([-math.inf, -1.0, -1.0])
    for term in (ForwardKL(), JensenShannon(), TotalVariation()):
        value = term(logps, log_score=score).values.sum()
        assert math.isfinite(float(value.detach()))
        assert bool(torch.isfinite(torch.autograd.grad(value, logps)[0]).all())
    assert float(ForwardKL()(logps, log_score=score).values[0].detach()) == 0.0
    with pytest.raises(QuantityError, match="hard constraint needs forward_kl"):
        ReverseKL()(logps, log_score=score)
    with pytest.raises(QuantityError, match="never satisfied"):
        ForwardKL()(logps, log_score=torch.full((3,), -math.inf))


def test_clipped_weights_and_their_effective_share_are_published() -> None:
    logps, score = torch.tensor([-5.0, -1.0, -1.0]), torch.tensor([0.0, -1.0, -1.0])
    free, clipped = ForwardKL(), ForwardKL(clip=1.5)
    assert float(free(logps, log_score=score).extras["weight"].max()) > 2
    assert float(clipped(logps, log_score=score).extras["weight"].max()) == 1.5
    assert float(free(logps, log_score=score).extras["ess"]) == pytest.approx(0.35, abs=0.02)
    assert float(ForwardKL()(logps, log_score=logps).extras["ess"]) == pytest.approx(1.0)


def test_bad_quantities_are_refused_in_words() -> None:
    ok = torch.tensor([-1.0, -1.0])
    for kind in DIVERGENCES:
        with pytest.raises(InputError, match="beta must be positive"):
            kind(beta=0.0)
        with pytest.raises(QuantityError, match="they are <= 0"):
            kind()(torch.tensor([0.5, -1.0]), log_score=ok)
        with pytest.raises(QuantityError, match="differ in shape"):
            kind()(ok, log_score=torch.zeros(3))
        with pytest.raises(QuantityError, match="not finite at 1 rows"):
            kind()(ok, ok, torch.tensor([math.nan, 0.0]))
        with pytest.raises(QuantityError, match="neither is offered"):
            kind()(ok)
        with pytest.raises(QuantityError, match="reads 'behaviour_logps'"):
            kind(samples="proposal")(ok, log_score=ok)
        with pytest.raises(InputError, match="samples is 'policy', 'proposal' or 'enumeration'"):
            kind(samples="mine")
    with pytest.raises(InputError, match="log_z is 'batch' or 'running'"):
        ForwardKL(log_z="mean")
    with pytest.raises(InputError, match="clip must be positive"):
        ForwardKL(clip=0)
    with pytest.raises(InputError, match="estimator is 'k1', 'k2' or 'k3'"):
        ReferenceKL("k4")
    with pytest.raises(InputError, match="policy's own samples"):
        ReverseKL(samples="proposal", gradient="pathwise")
    with pytest.raises(QuantityError, match="several prompts"):
        ForwardKL(log_z="running")(ok, log_score=torch.tensor([0.0, 1.0]), group=torch.tensor([0, 1]))


def test_no_gradient_reaches_reference_or_reward_unless_it_is_pathwise() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    reference, reward = logps.detach().clone().requires_grad_(), torch.ones(2, requires_grad=True)
    for term in (ReverseKL(), ForwardKL(), TotalVariation(), JensenShannon()):
        total = Objective([Summand(term)])(response_logps=logps, reference_response_logps=reference, reward=reward)
        found = torch.autograd.grad(total, (reference, reward), allow_unused=True)
        assert found == (None, None)


def test_terms_that_compare_samples_refuse_accumulation_and_those_that_do_not_allow_it() -> None:
    batch = SPACE.responses_of()
    halves = [{"main": {k: v[i : i + 2] for k, v in batch.items()}} for i in (0, 1)]
    with pytest.raises(IncompatibleError, match="compares examples"):
        poise.Problem(SPACE.policy(), Objective([Summand(ReverseKL())]), halves, SPACE.readout())
    single = Objective([Summand(ReverseKL(baseline="none"))])
    poise.Problem(SPACE.policy(), single, halves, SPACE.readout(), record=False).gradient()


def test_words_of_the_prior_that_were_kept_teach_a_policy_its_target() -> None:
    """Forward KL on samples of the prior, through `fit` and the readout of the word model."""
    prior = WordModel(width=8, hidden=16, seed=1)
    drawn = sample(prior, 512, torch.Generator().manual_seed(0))
    reward = word_length(drawn.ids)
    data = {
        "response_ids": drawn.ids,
        "response_mask": drawn.mask,
        "behaviour_logps": drawn.logps,
        "reward": -reward,
    }
    policy = copy.deepcopy(prior)
    poise.fit(
        policy,
        "forward_kl(beta=2.0, samples='proposal')",
        data,
        readout=WordReadout(prior),
        solver="adam",
        lr=1e-2,
        steps=40,
    )
    after = word_length(sample(policy, 512, torch.Generator().manual_seed(1)).ids).mean()
    target = (reward * (-reward / 2).softmax(0)).sum()
    assert float(after) < float(reward.mean()) - 0.5 * float(reward.mean() - target)


@pytest.mark.parametrize(
    "formula", ["reverse_kl(beta=0.5)", "expected_reward + 0.5*reference_kl", "forward_kl(beta=2)"]
)
def test_a_policy_that_writes_its_own_words_approaches_the_target(formula: str) -> None:
    prior = WordModel(width=8, hidden=16, seed=1)
    policy = copy.deepcopy(prior)
    stream = OnPolicy(1, answer, lambda batch: -word_length(batch["response_ids"]), samples=64)
    run = poise.fit(
        policy, formula, {"main": stream}, readout=WordReadout(prior), solver="adam", lr=2e-2, steps=15, log_every=1
    )
    before, after = (
        word_length(sample(m, 256, torch.Generator().manual_seed(1)).ids).mean() for m in (prior, run.model)
    )
    assert float(after) < float(before) - 1


def test_formulas_name_the_terms_and_come_back() -> None:
    for text in (
        "reverse_kl(beta=0.1)",
        "forward_kl(beta=0.2, samples='proposal', log_z='running', clip=5)",
        "total_variation + jensen_shannon",
        "expected_reward + 0.1*reference_kl(estimator='k3')",
        "expected_reward + length_normalized_kl",
    ):
        assert str(poise.parse(text)) == text
