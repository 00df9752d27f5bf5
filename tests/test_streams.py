"""Streams: the order of the data is a function of seed, name and epoch, and nobody's batch changes when it is shared out."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from poise.data.augmentations import GaussianNoise
from poise.errors import InputError
from poise.streams import Stream


def stream(rows: int = 10, batch: int = 4, accumulate: int = 1, seed: int = 0, name: str = "main", **options) -> Stream:
    data = {"input": torch.arange(float(rows)), "target": torch.arange(rows)}
    return Stream(data, batch, **options).prepare(name, seed, torch.device("cpu"), accumulate)


def drawn(source: Stream, steps: int, start: int = 0) -> list[list[int]]:
    return [[i for micro in micros for i in micro["index"].tolist()] for micros in islice(source.iterate(start), steps)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 20))
def test_resuming_at_a_step_draws_what_the_whole_run_draws(rows: int, batch: int, start: int) -> None:
    whole = drawn(stream(rows, batch), start + 5)
    assert drawn(stream(rows, batch), 5, start) == whole[start:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12))
def test_every_epoch_draws_every_example_once_in_another_order(rows: int, batch: int) -> None:
    source = stream(rows, batch)
    length = source.steps_per_epoch
    epochs = [[i for step in drawn(source, length, e * length) for i in step] for e in range(2)]
    assert all(sorted(e) == list(range(rows)) for e in epochs)
    if rows > 10:
        assert epochs[0] != epochs[1]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(2, 4))
def test_micro_batches_share_out_the_batch_and_empty_ones_count_nothing(rows: int, batch: int, accumulate: int) -> None:
    whole = drawn(stream(rows, batch), 6)
    for expected, micros in zip(whole, islice(stream(rows, batch, accumulate).iterate(0), 6), strict=True):
        assert len(micros) == accumulate
        counted = [
            i for m in micros if "sample_weight" not in m or m["sample_weight"].sum() > 0 for i in m["index"].tolist()
        ]
        assert counted == expected


def test_streams_of_other_names_and_seeds_are_drawn_in_other_orders() -> None:
    orders = [drawn(stream(30, 30, seed=s, name=n), 1) for s, n in ((0, "main"), (1, "main"), (0, "anchor"))]
    assert len({str(o) for o in orders}) == 3


def test_data_sets_and_loaders_give_the_same_kind_of_batches_as_tensors() -> None:
    dataset = TensorDataset(torch.arange(10.0), torch.arange(10))
    from_dataset = Stream(dataset, 4).prepare("main", 0, torch.device("cpu"))
    assert drawn(from_dataset, 7, 2) == drawn(stream(), 7, 2)
    loader = Stream(DataLoader(dataset, 4)).prepare("main", 0, torch.device("cpu"))
    first = next(loader.iterate(0))[0]
    assert first["input"].tolist() == [0, 1, 2, 3]
    assert loader.steps_per_epoch == 3
    assert next(loader.iterate(4))[0]["input"].tolist() == [4, 5, 6, 7]


def test_a_transform_draws_from_its_own_generator_and_resumes() -> None:
    def draw(start: int) -> torch.Tensor:
        return next(stream(transform=GaussianNoise(0.5)).iterate(start))[0]["input"]

    before = torch.get_rng_state()
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"input": torch.ones(2), "target": torch.ones(3)}, "differ"),
        ({"input": torch.ones(0)}, "empty"),
        (7, "data set or a DataLoader"),
    ],
)
def test_unusable_data_are_named(data, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Stream(data)
