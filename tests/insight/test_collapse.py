"""The collapse report, the frontier, the meters of diversity, and what a formula aims at."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import InputError
from poise.insight.collapse import collapse_report, distinct_n, explain_target, frontier, self_bleu
from poise.tasks.finite_space import FiniteSpace
from poise.terms.posterior import Posterior

BETA = 0.5
SPACE = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0])
TARGET = Posterior(prior=lambda x: SPACE.prior_logps[0][x], reward=lambda x: SPACE.reward[0][x], beta=BETA)


def sampler(logps: torch.Tensor, seed: int = 0) -> object:
    return SPACE.sampler(logps, torch.Generator().manual_seed(seed))


def test_the_report_measures_what_enumeration_gives() -> None:
    policy = torch.tensor([[0.1, 0.2, 0.7]]).double().log()
    found = collapse_report(sampler(policy), TARGET, 40_000, prior=sampler(SPACE.prior_logps, 1))
    star = SPACE.posterior(BETA)
    expected = {
        "reward": SPACE.expectation(policy, SPACE.reward),
        "prior_reward": SPACE.expectation(SPACE.prior_logps, SPACE.reward),
        "kl_prior": SPACE.kl(policy, SPACE.prior_logps),
        "forward_kl": SPACE.kl(star, policy),
        "reverse_kl": SPACE.kl(policy, star),
        "total_variation": 0.5 * (star.exp() - policy.exp()).abs().sum(),
        "entropy": SPACE.entropy(policy),
        "prior_entropy": SPACE.entropy(SPACE.prior_logps),
        "log_z": SPACE.log_z(BETA),
        "elbo": SPACE.regularised_reward(policy, BETA) / BETA,
        "elbo_gap": SPACE.kl(policy, star),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(float(value), abs=0.03), name
    assert "KL(pi*||pi)" in str(found)


def test_at_the_target_the_gap_is_zero_for_every_sample() -> None:
    found = collapse_report(sampler(SPACE.posterior(BETA)), TARGET, 500)
    assert found.elbo_gap == pytest.approx(0.0, abs=1e-9)
    assert found.ess == pytest.approx(500)
    assert found.forward_kl == pytest.approx(0.0, abs=1e-9)


def test_a_collapsed_policy_is_called_so() -> None:
    space = FiniteSpace(torch.full((50,), 0.02), torch.arange(50).float() / 50)
    target = Posterior(prior=lambda x: space.prior_logps[0][x], reward=lambda x: space.reward[0][x])
    point = torch.full((50,), -40.0).double()
    point[7] = 0.0
    draws = [space.sampler(p, torch.Generator().manual_seed(0)) for p in (point, space.prior_logps)]
    found = collapse_report(draws[0], target, 100, prior=draws[1], text=lambda x: [chr(97 + i) for i in x.tolist()])
    assert found.collapsed
    assert found.self_bleu == pytest.approx(1.0)
    assert "collapsed" in str(found)
    assert not collapse_report(draws[1], target, 100, prior=draws[1]).collapsed


def test_the_frontier_is_that_of_the_exact_posteriors() -> None:
    points = frontier(TARGET, sampler(SPACE.prior_logps), [0.5, 2.0], n=200_000)
    for point in points:
        star = SPACE.posterior(point.beta)
        assert point.reward == pytest.approx(float(SPACE.expectation(star, SPACE.reward)), abs=0.01)
        assert point.kl == pytest.approx(float(SPACE.kl(star, SPACE.prior_logps)), abs=0.01)
        assert point.log_z == pytest.approx(float(SPACE.log_z(point.beta)), abs=0.01)
    assert points[0].reward > points[1].reward
    with pytest.raises(InputError, match="every beta must be positive"):
        frontier(TARGET, sampler(SPACE.prior_logps), [0.0])
    with pytest.raises(InputError, match="needs a reward"):
        frontier(Posterior(), sampler(SPACE.prior_logps), [1.0])
    with pytest.raises(InputError, match="needs a reward"):
        collapse_report(sampler(SPACE.prior_logps), Posterior())


def test_the_meters_of_diversity_have_their_extremes() -> None:
    assert self_bleu(["abc", "abc", "abc"]) == pytest.approx(1.0)
    assert self_bleu(["abc", "def"]) == 0.0
    assert math.isnan(self_bleu(["abc"]))
    assert distinct_n(["aaa"], 1) == pytest.approx(1 / 3)
    assert distinct_n(["ab"], 3) == 0.0
    # By hand: "ab" against "abc" has all its 1- and 2-grams, and is shorter by one: exp(1 - 3/2).
    # "abc" against "ab" has 2 of 3, 1 of 2 and 0 of 1.
    assert self_bleu(["ab", "abc"]) == pytest.approx(math.exp(-0.5) / 2)
    # Clipping: "aaa" may count the two a's of "aab" only.
    assert self_bleu(["aaa", "aab"], order=1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("formula", "regularised", "beta", "target"),
    [
        ("expected_reward + 0.1*reference_kl", True, 0.1, "exp(r(x)/0.1)"),
        ("2*expected_reward + 0.1*reference_kl", True, 0.05, "exp(r(x)/0.05)"),
        ("reverse_kl(beta=0.3)", True, 0.3, "exp(r(x)/0.3)"),
        ("expected_reward + reverse_kl(beta=0.5)", True, 1 / 3, "exp(r(x)/0.333333)"),
        ("expected_reward", True, 0.0, "point mass"),
        ("expected_reward + adaptive_kl(reference_kl, initial=0.4)", True, 0.4, "exp(r(x)/0.4)"),
        (
            "rloo(reward=score - 0.05*sampled_kl(estimator='k1', aggregate='sequence_sum'))",
            True,
            0.05,
            "exp(r(x)/0.05)",
        ),
        ("grpo + 0.04*reference_kl", False, None, "no closed form: grpo"),
        ("reference_kl", False, None, "the prior"),
        ("forward_kl(beta=0.2)", False, 0.2, "exp(r(x)/0.2)"),
        ("forward_kl(beta=0.2) + jensen_shannon(beta=0.4)", False, None, "different beta"),
        ("expected_reward + length_normalized_kl", False, None, "no closed form"),
        ("expected_reward + cross_entropy", False, None, "no closed form: cross_entropy"),
    ],
)
def test_what_a_formula_aims_at_is_said(formula: str, regularised: bool, beta: float | None, target: str) -> None:
    found = explain_target(formula)
    assert found.regularised_reward is regularised
    assert found.beta == (None if beta is None else pytest.approx(beta))
    assert target in str(found)


def test_what_is_wrong_with_an_objective_is_warned_of() -> None:
    def warned(formula: str, **quantities: torch.Tensor) -> str:
        return " ".join(explain_target(formula, quantities).warnings)

    assert "collapses" in warned("expected_reward")
    assert "collapses" in warned("expected_reward + 0*reference_kl")
    assert "length" in warned("expected_reward + length_normalized_kl")
    assert "beta of its own" in warned("grpo")
    assert "without bias" in warned("rloo(reward=score - 0.05*sampled_kl(estimator='k3'))")
    assert "each token" in warned("expected_reward + token_kl(on='response')")
    assert "expectation 0" in warned("expected_reward + reference_kl(gradient='own')")
    assert "other direction" in warned("expected_reward + reference_kl(estimator='k3', gradient='own')")
    assert "not reinforcement learning" in warned("forward_kl")
    assert "depends on theta" in warned("reverse_kl", reward=torch.ones(2, requires_grad=True))
    assert not warned("reverse_kl", reward=torch.ones(2))
    assert not warned("expected_reward + reference_kl(estimator='k2', gradient='own')")
