"""The finite response space: exact values, and exact minima of objectives over all responses and pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from poise.errors import InputError
from poise.objective import Term
from poise.tasks.finite_space import FiniteSpace

SPACE = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0])
TWO = FiniteSpace([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.0, 1.0, 3.0], [2.0, 0.0, -1.0]])


class Preference(Term):
    """-log sigmoid(beta * (margin of the log-ratios)), to have a minimum in closed form."""

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> Tensor:
        margin = (chosen_logps - reference_chosen_logps).sum(1) - (rejected_logps - reference_rejected_logps).sum(1)
        return -logsigmoid(0.5 * margin)


class Likelihood(Term):
    """-log pi."""

    def forward(self, response_logps: Tensor) -> Tensor:
        return -response_logps.sum(1)


def test_the_worked_example_has_its_exact_values() -> None:
    star = SPACE.posterior(0.5)
    torch.testing.assert_close(star.exp()[0], torch.tensor([0.005995, 0.026579, 0.967426]).double(), atol=1e-6, rtol=0)
    assert float(SPACE.log_z(0.5)) == pytest.approx(4.423678, abs=1e-6)
    assert float(SPACE.regularised_reward(SPACE.prior_logps, 0.5)) == pytest.approx(0.9)
    assert float(SPACE.kl(star, SPACE.prior_logps)) == pytest.approx(1.434038, abs=1e-6)
    assert float(SPACE.entropy(torch.tensor([[0.0, -math.inf]]))) == 0.0


def test_maximum_likelihood_over_all_responses_finds_the_target() -> None:
    for space in (SPACE, TWO):
        star = space.posterior(0.5)
        solution = space.minimize(Likelihood(), space.responses_of(star.exp()))
        assert solution.certificate.converged
        torch.testing.assert_close(solution.logps, star, atol=1e-7, rtol=0)


def test_a_preference_loss_over_all_pairs_of_bradley_terry_finds_the_posterior_of_its_reward() -> None:
    for space in (SPACE, TWO):
        solution = space.minimize(Preference(), space.pairs(), tolerance=1e-10)
        assert solution.certificate.converged, solution.certificate.status
        torch.testing.assert_close(solution.logps, space.posterior(0.5), atol=1e-6, rtol=0)


def test_gradient_flow_reaches_what_lbfgs_finds() -> None:
    flow = SPACE.minimize(Preference(), SPACE.pairs(), method="flow", rate=20.0, iterations=5000, tolerance=1e-6)
    torch.testing.assert_close(flow.logps, SPACE.posterior(0.5), atol=1e-3, rtol=0)


def test_data_may_follow_the_policy() -> None:
    def own(logps: Tensor) -> dict[str, Tensor]:
        return SPACE.responses_of(logps.exp())

    before = SPACE.policy()
    solution = SPACE.minimize(Likelihood(), own, before, method="flow", iterations=3)
    # E_pi[grad log pi] = 0: on its own samples likelihood moves nothing.
    torch.testing.assert_close(solution.logps, SPACE.prior_logps)
    with pytest.raises(InputError, match="follow the policy"):
        SPACE.minimize(Likelihood(), own)


def test_pairs_are_weighted_by_how_often_they_are_drawn() -> None:
    pairs = TWO.pairs(drawn=TWO.prior_logps)
    assert len(pairs["group"]) == 2 * 3 * 2
    a, b = pairs["chosen_ids"][:, 1], pairs["rejected_ids"][:, 1]
    prompt = pairs["chosen_ids"][:, 0]
    expected = TWO.prior[prompt, a] * TWO.prior[prompt, b] * (TWO.reward[prompt, a] - TWO.reward[prompt, b]).sigmoid()
    torch.testing.assert_close(pairs["sample_weight"], expected / expected.mean())


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(InputError, match="add up to"):
        FiniteSpace([0.5, 0.6])
    with pytest.raises(InputError, match="need one shape"):
        FiniteSpace([0.5, 0.5], [1.0])
    with pytest.raises(InputError, match="must be finite"):
        FiniteSpace([0.5, 0.5], [1.0, math.inf])
    with pytest.raises(InputError, match="'lbfgs' or 'flow'"):
        SPACE.minimize(Likelihood(), SPACE.responses_of(), method="newton")
