from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import StoreError
from poise.studies.curves import pack, unpack

values = st.floats(width=32, allow_nan=False)
steps = st.lists(st.integers(0, 2**40), max_size=30, unique=True).map(sorted)
curve = steps.flatmap(lambda grid: st.tuples(st.just(grid), st.lists(values, min_size=len(grid), max_size=len(grid))))


@given(st.dictionaries(st.text(max_size=12), curve, max_size=5))
def test_curves_of_float32_values_come_back_exactly(curves):
    assert unpack(pack(curves)) == curves


def test_not_a_number_and_infinities_come_back():
    _, back = unpack(pack({"loss": ([0, 1, 2], [float("nan"), float("inf"), -float("inf")])}))["loss"]
    assert np.isnan(back[0])
    assert back[1:] == [float("inf"), -float("inf")]


def test_a_run_of_150_epochs_with_fifteen_curves_stays_under_ten_kilobytes():
    # 10,000 runs then stay under 100 MB.
    generator = np.random.default_rng(0)
    steps = list(range(9, 1351, 9))
    curves = {
        f"curve/{i}": (steps, (np.exp(-np.linspace(0, 3, 150)) + 0.02 * generator.normal(size=150)).tolist())
        for i in range(15)
    }
    assert len(pack(curves)) < 10_000


@pytest.mark.parametrize("cut", [0, 1, 10, -1])
def test_damaged_bytes_are_refused(cut):
    data = pack({"loss": ([0, 1], [1.0, 2.0])})
    with pytest.raises(StoreError, match="damaged"):
        unpack(data[:cut])


def test_a_curve_needs_one_value_a_step():
    with pytest.raises(ValueError, match="2 steps and 1 values"):
        pack({"loss": ([0, 1], [1.0])})
