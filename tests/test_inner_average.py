"""Moving averages of inner means: log and plain agree, and variance reduction stays positive."""

from __future__ import annotations

import math

import pytest
import torch

from poise.errors import InputError
from poise.inner_average import InnerAverage, LogInnerAverage, averages_of
from poise.quadrature import midpoints


@pytest.mark.parametrize("before", [None, [1.5, 0.5, 2.0, 0.1]])
def test_the_average_of_logarithms_is_the_logarithm_of_the_average(before: list[float] | None) -> None:
    plain, logs = InnerAverage(0.3, "t"), LogInnerAverage(0.3, "t")
    for step, mean in enumerate((2.0, 1.0, 3.0, 0.7)):
        earlier = None if before is None else torch.tensor([before[step]])
        plain.store(torch.tensor([mean]), earlier)
        logs.store(torch.tensor(mean).log(), None if earlier is None else earlier[0].log())
        assert float(logs.stored.exp()) == pytest.approx(float(plain.stored), rel=1e-6)


def test_variance_reduction_never_falls_below_what_the_plain_average_never_falls_below() -> None:
    average = LogInnerAverage(0.2, "t")
    average.store(torch.tensor(1.0).log())
    average.store(torch.tensor(1.0).log(), torch.tensor(1e9).log())
    assert float(average.log_u) == pytest.approx(math.log(0.2))


def test_a_held_average_gives_what_is_stored() -> None:
    average = LogInnerAverage(0.5, "t")
    assert float(average.ahead(torch.tensor(3.0))) == 3.0
    average.store(torch.tensor(1.0))
    average.held = True
    assert float(average.ahead(torch.tensor(3.0))) == 1.0


def test_extreme_means_neither_overflow_nor_vanish() -> None:
    average = LogInnerAverage(0.5, "t")
    for log_mean in (-5000.0, 5000.0, -5000.0):
        average.store(torch.tensor(log_mean))
    assert float(average.log_u) == pytest.approx(5000 + 2 * math.log(0.5))


def test_a_stage_scales_the_rate_up_to_one() -> None:
    average = InnerAverage(0.5, "t")
    average.factor = 4.0
    assert average.rate == 1.0
    assert averages_of(torch.nn.ModuleList([average])) == [average]


def test_a_share_out_of_range_and_a_wrong_box_are_named() -> None:
    with pytest.raises(InputError, match=r"t: gamma .* in \(0, 1\]; got 0"):
        InnerAverage(0.0, "t")
    with pytest.raises(InputError, match="low below high"):
        midpoints(torch.ones(2), torch.zeros(2), 3)
    with pytest.raises(InputError, match="cells along a side"):
        midpoints(torch.zeros(2), torch.ones(2), 0)
