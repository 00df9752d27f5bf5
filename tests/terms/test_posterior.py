"""The target of a reward: its exact values, its identities, its estimates, and the moments that features are given."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from poise.errors import InputError
from poise.tasks.finite_space import FiniteSpace
from poise.terms.posterior import Posterior, Tilt, estimate_divergences, estimate_log_z

PRIOR, REWARD, BETA = (
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(),
    torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64),
    0.5,
)
ALL = torch.arange(3)
TARGET = Posterior(prior=lambda x: PRIOR[x], reward=lambda x: REWARD[x], beta=BETA)
SPACE = FiniteSpace(PRIOR.exp(), REWARD)
numbers = st.lists(st.floats(-3, 3), min_size=4, max_size=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_worked_example_has_its_exact_values() -> None:
    score = TARGET.log_score(ALL)
    log_z = score.logsumexp(0)
    assert float(log_z) == pytest.approx(4.423678, abs=1e-6)
    star = score - log_z
    assert star.exp().tolist() == pytest.approx([0.005995, 0.026579, 0.967426], abs=1e-6)
    assert float((star.exp() * REWARD).sum()) == pytest.approx(2.928857, abs=1e-6)
    # J(pi0) = beta log Z - beta KL(pi0 || pi*), and at pi* nothing is missing.
    assert float((PRIOR.exp() * (PRIOR - star)).sum()) == pytest.approx(2.623678, abs=1e-6)
    assert float(SPACE.regularised_reward(PRIOR[None], BETA)) == pytest.approx(BETA * (4.423678 - 2.623678), abs=1e-6)
    assert float(SPACE.regularised_reward(star[None], BETA)) == pytest.approx(2.211839, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(numbers, numbers, numbers, st.floats(0.1, 5))
def test_regularised_reward_is_the_evidence_less_the_divergence_from_the_posterior(
    prior: list[float], reward: list[float], policy: list[float], beta: float
) -> None:
    space = FiniteSpace(torch.tensor(prior).double().softmax(0), reward)
    logps, star = torch.tensor([policy], dtype=torch.float64).log_softmax(-1), space.posterior(beta)
    j, bound = space.regularised_reward(logps, beta), beta * space.log_z(beta)
    torch.testing.assert_close(j, -beta * space.kl(logps, star) + bound)
    assert float(j) <= float(bound) + 1e-9
    torch.testing.assert_close(space.regularised_reward(star, beta), bound)


@settings(deadline=None, max_examples=50)
@given(numbers, numbers, st.floats(0.1, 5), st.floats(-10, 10))
def test_a_constant_added_to_the_reward_changes_log_z_alone(
    prior: list[float], reward: list[float], beta: float, shift: float
) -> None:
    tilt, logps, r = Tilt(beta), torch.tensor(prior).double().log_softmax(0), torch.tensor(reward).double()
    before, after = tilt.log_z(logps, r), tilt.log_z(logps, r + shift)
    torch.testing.assert_close(after, before + shift / beta)
    torch.testing.assert_close(tilt.posterior(logps, r + shift, after), tilt.posterior(logps, r, before))
    torch.testing.assert_close(tilt.normalised(logps, r + shift), tilt.normalised(logps, r))
    torch.testing.assert_close(tilt.centred(logps, r + shift), tilt.centred(logps, r))


@settings(deadline=None, max_examples=50)
@given(numbers, numbers, st.floats(0.1, 5))
def test_a_reward_comes_back_from_its_posterior_in_each_gauge(
    prior: list[float], reward: list[float], beta: float
) -> None:
    tilt, logps, r = (
        Tilt(beta),
        torch.tensor([prior], dtype=torch.float64).log_softmax(-1),
        torch.tensor([reward], dtype=torch.float64),
    )
    log_z = tilt.log_z(logps, r)
    star = tilt.posterior(logps, r, log_z)
    torch.testing.assert_close(star.logsumexp(-1), torch.zeros(1).double())
    torch.testing.assert_close(tilt.implicit_reward(star, logps, log_z), r)
    torch.testing.assert_close(tilt.implicit_reward(star, logps), tilt.normalised(logps, r))
    torch.testing.assert_close(tilt.log_z(logps, tilt.normalised(logps, r)), torch.zeros(1, 1).double())
    assert float((logps.exp() * tilt.centred(logps, r)).sum()) == pytest.approx(0, abs=1e-9)


def test_log_z_is_estimated_from_any_proposal_that_covers_the_target() -> None:
    for q in ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]):
        log_q = torch.tensor(q, dtype=torch.float64).log()

        def draw(n: int, log_q: Tensor = log_q) -> tuple[Tensor, Tensor]:
            x = torch.multinomial(log_q.exp(), n, replacement=True, generator=generator())
            return x, log_q[x]

        found = TARGET.estimate_log_z(draw, 20_000)
        assert abs(found.value - 4.423678) < 4 * found.standard_error
    # Of the second, which is near the target, 1 / sum(pi*^2 / q) = 85 % of the samples count.
    assert found.ess / found.samples == pytest.approx(0.85, abs=0.01)


def test_the_estimates_of_the_divergences_are_exact_over_all_responses() -> None:
    policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    found = estimate_divergences(policy, TARGET.log_score(ALL), uniform)
    star = SPACE.posterior(BETA)
    assert found.log_z == pytest.approx(4.423678, abs=1e-6)
    assert found.forward_kl == pytest.approx(float(SPACE.kl(star, policy[None])))
    assert found.reverse_kl == pytest.approx(float(SPACE.kl(policy[None], star)))
    assert found.total_variation == pytest.approx(float(0.5 * (star.exp() - policy.exp()).abs().sum()))
    forbidden = torch.tensor([-math.inf, -1.0, -1.0], dtype=torch.float64)
    assert estimate_divergences(policy, forbidden, uniform).reverse_kl == math.inf
    assert math.isfinite(estimate_divergences(policy, forbidden, uniform).forward_kl)


@pytest.mark.parametrize("method", ["newton", "sgd"])
def test_the_moments_of_the_features_become_what_was_asked(method: str) -> None:
    x = torch.multinomial(PRIOR.exp(), 5000, replacement=True, generator=generator())
    posterior = Posterior(
        prior=lambda x: PRIOR[x], features=lambda x: torch.nn.functional.one_hot(x, 3)[:, 1:].double()
    )
    found = posterior.fit_moments([0.3, 0.4], x, method=method, tolerance=1e-6, lr=5.0)
    assert found.converged, found.status
    star = posterior.log_score(ALL).softmax(0)
    # Reweighting is exact on the samples; the frequencies of the samples are off by their noise.
    assert star.tolist() == pytest.approx([0.3, 0.3, 0.4], abs=0.02)
    assert "effective sample size" in found.status


def test_newton_fits_the_moments_of_the_target_with_a_reward_already_in_it() -> None:
    """The maximum-entropy solution is unique: lambda = log of the ratio that is asked for over the one that is there."""
    x = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    posterior = Posterior(features=lambda x: (x == 2)[:, None].double())
    posterior.fit_moments([0.5], x)
    assert posterior.lambdas is not None
    assert float(posterior.lambdas) == pytest.approx(math.log(0.8 / 0.2), abs=1e-6)


def test_a_constraint_gives_the_target_no_mass_outside() -> None:
    posterior = Posterior(prior=lambda x: PRIOR[x], reward=lambda x: REWARD[x], beta=BETA, constraint=lambda x: x < 2)
    star = posterior.log_score(ALL).softmax(0)
    assert float(star[2]) == 0.0
    assert float(star.sum()) == pytest.approx(1.0)
    assert "constraint" in repr(posterior)


def test_token_log_probabilities_are_summed_and_not_averaged() -> None:
    tokens = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.5, -0.5]])
    posterior = Posterior(reward=lambda x: x.float(), beta=2.0)
    assert posterior.log_score(torch.tensor([2, 4]), tokens).tolist() == [-2.0, 0.5]


def test_bad_targets_are_refused_in_words() -> None:
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="beta must be positive"):
            Posterior(beta=beta)
        with pytest.raises(InputError, match="beta must be positive"):
            Tilt(beta)
    with pytest.raises(InputError, match="must be finite"):
        Posterior(prior=lambda x: PRIOR[x], reward=lambda x: REWARD[x] / 0).log_score(ALL)
    with pytest.raises(InputError, match="give prior_logps"):
        Posterior().log_score(ALL)
    with pytest.raises(InputError, match="3 samples need"):
        Posterior(reward=lambda x: REWARD[:2]).log_score(ALL, PRIOR)
    with pytest.raises(InputError, match="weigh features"):
        Posterior(lambdas=[1.0])
    with pytest.raises(InputError, match="all 3 weights"):
        estimate_log_z(torch.full((3,), -math.inf))
    with pytest.raises(InputError, match="no weights give it"):
        Posterior(features=lambda x: x[:, None].double()).fit_moments([5.0], ALL)
    with pytest.raises(InputError, match="one mean a column"):
        Posterior(features=lambda x: x[:, None].double()).fit_moments([1.0, 1.0], ALL)
