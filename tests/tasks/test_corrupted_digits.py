"""Many related tasks of digits: nothing leaks, draws never repeat and resume."""

from __future__ import annotations

import pytest
import torch

from poise.errors import InputError
from poise.search import ActiveMultiTask, LinearMultiTask
from poise.tasks.corrupted_digits import CorruptedDigits, check_leakage
from poise.weights import LassoRelevance


def small() -> tuple[torch.Tensor, torch.Tensor]:
    """Sixty images of which ten stand there twice."""
    images = torch.rand(60, 8, 8, generator=torch.Generator().manual_seed(0))
    images[50:] = images[:10]
    return images, torch.arange(60) % 10


def test_no_base_image_is_in_a_source_and_in_the_target_not_even_as_a_copy() -> None:
    tasks = CorruptedDigits(small(), ("blur", 3), target_samples=8)
    source, target = tasks.images[tasks.source_ids].flatten(1), tasks.images[tasks._target_ids].flatten(1)
    assert float(torch.cdist(source, target).min()) > 0.1
    with pytest.raises(InputError, match="2 base images are in a source and in the target"):
        check_leakage(torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]))


def test_the_sources_are_all_digits_under_all_other_corruptions() -> None:
    tasks = CorruptedDigits("digits", ("rotate", 3))
    assert len(tasks) == 70
    assert "blur/0" in tasks.names
    assert not any(n.startswith("rotate") for n in tasks.names)
    x, y = tasks.target
    assert x.shape == (100, 64)
    assert set(y.tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(x.mean(1), torch.zeros(100), atol=1e-5, rtol=0)
    assert len(tasks.test[0]) == round(0.4 * 1797)


def test_draws_follow_each_other_without_repeating_and_resume() -> None:
    tasks = CorruptedDigits(small(), ("blur", 3), target_samples=8, corruptions=("identity", "blur"), standardise=False)
    first = tasks.draw(0, 5)[0]
    state = tasks.state_dict()
    second = tasks.draw(0, 5)[0]
    assert float(torch.cdist(first, second).min()) > 0 or len(torch.unique(torch.cat([first, second]), dim=0)) < 10
    again = CorruptedDigits(small(), ("blur", 3), target_samples=8, corruptions=("identity", "blur"), standardise=False)
    again.load_state_dict(state)
    assert torch.equal(again.draw(0, 5)[0], second)
    with pytest.raises(InputError, match=r"identity/0 has \d+ samples, and 10 were drawn"):
        tasks.draw(0, 1000)


def test_a_search_over_digits_beats_chance_and_resumes() -> None:
    def search() -> ActiveMultiTask:
        tasks = CorruptedDigits("digits", ("rotate", 3), corruptions=("rotate", "shift", "blur"), seed=1)
        trainer = LinearMultiTask(64, 6, len(tasks), bias=True, ridge=0.03, sweeps=5)
        return ActiveMultiTask(
            trainer, tasks, 3000, target=tasks.target, relevance=LassoRelevance(floor=20), names=tasks.names,
            available=tasks.available, measure=tasks.error,
        )  # fmt: skip

    whole = search()
    whole.step()
    state = whole.state_dict()
    result = whole.run()
    assert result.rounds[-1].error < 0.35
    other = search()
    other.load_state_dict(state)
    assert other.run().rounds[-1] == result.rounds[-1]
    assert "/" in result.report.rows[0].task


def test_the_ranking_error_of_no_knowledge_is_a_half() -> None:
    class Constant:
        def predict(self, inputs: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(inputs))

    assert CorruptedDigits(small(), ("blur", 3), target_samples=8).error(Constant(), torch.zeros(1)) == 0.5


def test_what_does_not_fit_is_refused() -> None:
    for arguments in ({"target": ("rotat", 3)}, {"target": ("rotate", 10)}, {"corruptions": ("rotate", "snow")}):
        with pytest.raises(InputError, match="corruptions out of"):
            CorruptedDigits(small(), **arguments)
    with pytest.raises(InputError, match="data is"):
        CorruptedDigits("letters")
    with pytest.raises(InputError, match="do not suffice"):
        CorruptedDigits(small(), target_samples=1000)
    with pytest.raises(InputError, match="images float"):
        CorruptedDigits((torch.zeros(3, 64), torch.zeros(3)))
