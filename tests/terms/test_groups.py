"""Statistics within groups of samples."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.terms.groups import group_sum, leave_one_out, log_mean_exp


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 3)), min_size=1, max_size=12))
def test_groups_are_what_loops_over_them_would_give(rows: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    group = torch.tensor([7 * place for _, place in rows])
    for i in range(len(rows)):
        own = values[group == group[i]]
        torch.testing.assert_close(group_sum(values, group)[i], own.sum())
        torch.testing.assert_close(log_mean_exp(values, group)[i], own.logsumexp(0) - math.log(len(own)))
        others = (own.sum() - values[i]) / (len(own) - 1) if len(own) > 1 else torch.tensor(0.0).double()
        torch.testing.assert_close(leave_one_out(values, group)[i], others)
    assert float(log_mean_exp(torch.full((2,), -math.inf))[0]) == -math.inf
