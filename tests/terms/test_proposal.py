"""The proposal and the rule that refreshes it."""

from __future__ import annotations

import copy

import pytest
import torch

from poise.errors import InputError
from poise.tasks.finite_space import FiniteSpace
from poise.terms.proposal import Proposal

BETA = 0.5
SPACE = FiniteSpace([0.5, 0.3, 0.2], [0.0, 1.0, 3.0])


def test_the_proposal_is_replaced_only_by_a_policy_that_is_nearer_the_target() -> None:
    star, uniform = SPACE.posterior(BETA)[0], torch.full((3,), 1 / 3, dtype=torch.float64).log()
    rows = torch.arange(3)  # each once: with the uniform proposal every estimate is exact
    score = SPACE.prior_logps[0] + SPACE.reward[0] / BETA
    for criterion in ("kl", "tv"):
        proposal = Proposal(SPACE.policy(uniform), interval=5, criterion=criterion)
        worse = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64).log()
        assert not proposal.consider(5, SPACE.policy(worse), worse[rows], uniform[rows], score).refreshed
        assert proposal.snapshot == 0
        found = proposal.consider(10, SPACE.policy(star), star[rows], uniform[rows], score)
        assert found.refreshed
        assert found.log_z == pytest.approx(4.423678, abs=1e-6)
        assert found.policy == pytest.approx(0.0, abs=1e-9)
        torch.testing.assert_close(proposal.model.module.logps[0].detach(), star)  # type: ignore[union-attr, operator]
        again = Proposal(SPACE.policy(), interval=5, criterion=criterion)
        again.load_state_dict(copy.deepcopy(proposal.state_dict()))
        assert (again.snapshot, again._z) == (proposal.snapshot, proposal._z)
    assert [step for step in range(12) if proposal.is_due(step)] == [5, 10]
    with pytest.raises(InputError, match="interval must be"):
        Proposal(SPACE.policy(), interval=0)
    with pytest.raises(InputError, match="criterion is"):
        Proposal(SPACE.policy(), criterion="js")
