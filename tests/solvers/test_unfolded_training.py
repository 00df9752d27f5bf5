"""Training of unfolded solvers: generations, losses, seeds, and stopping and going on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.data.sparse_signals import BernoulliGaussian, ImagePatches, Measurements
from poise.errors import CheckpointError, InputError
from poise.solvers import Incremental, TopK, Unfolded, UnfoldedTraining, train_unfolded

SHORT = Incremental(batches=6, batch_size=40)
SAMPLER = BernoulliGaussian(15, 30, p=0.1)


def held_out(model: Unfolded, sampler: Any = SAMPLER) -> tuple[float, float]:
    """Return objective and mean squared error of the last layer."""
    batch = sampler(400, torch.Generator().manual_seed(999))
    with torch.no_grad():
        x = model(batch.operator, batch.y)
        return float(model.objective(batch.operator, batch.y, x).mean()), float((x - batch.x).square().mean())


@pytest.mark.parametrize("form", ["ista", "iht"])
@pytest.mark.parametrize("loss", ["objective", "supervised", 0.5])
def test_training_lowers_what_it_is_asked_to(form: Any, loss: Any) -> None:
    plain, model = Unfolded(form, 6, weight=0.05), Unfolded(form, 6, weight=0.05)
    train_unfolded(model, SAMPLER, loss, Incremental(batches=15, batch_size=50))
    ours, theirs = held_out(model), held_out(plain)
    if loss != "supervised":
        assert ours[0] < theirs[0]
    if loss != "objective":
        assert ours[1] < theirs[1]


def test_a_generation_trains_its_layers_and_no_later_one() -> None:
    model = Unfolded("ista", 4, weight=0.05)
    training = UnfoldedTraining(model, SAMPLER, "objective", SHORT)
    for _ in range(2 * SHORT.batches):
        training.advance()
    assert bool((model.steps[:2] != 1).all())
    assert bool((model.steps[2:] == 1).all())
    assert [g.layers for g in training.history] == [1, 2]
    assert len(training.history[0].steps) == 1


def test_equal_seeds_draw_equal_batches_whatever_the_loss() -> None:
    seen: dict[str, list[torch.Tensor]] = {"objective": [], "supervised": []}
    for loss, kept in seen.items():

        def sampler(size: int, generator: torch.Generator, kept: list[torch.Tensor] = kept) -> Measurements:
            batch = SAMPLER(size, generator)
            kept.append(batch.y)
            return batch

        train_unfolded(Unfolded("ista", 2), sampler, loss, Incremental(batches=2, batch_size=5))
    assert len(seen["objective"]) == 4
    for one, other in zip(seen["objective"], seen["supervised"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cut", [1, 6, 9])
@pytest.mark.parametrize("reset", [False, True])
def test_a_training_that_stops_goes_on_bit_for_bit(cut: int, reset: bool) -> None:
    schedule = Incremental(batches=6, batch_size=10, reset=reset)

    def start() -> UnfoldedTraining:
        return UnfoldedTraining(Unfolded("ista", 3, learn=("step", "threshold")), SAMPLER, 0.3, schedule, seed=4)

    whole, first, second = start().run(), start(), start()
    for _ in range(cut):
        first.advance()
    second.load_state_dict(first.state_dict())
    second.run()
    assert torch.equal(whole.model.steps, second.model.steps)
    assert whole.history == second.history


def test_a_state_of_another_seed_or_schedule_is_refused() -> None:
    one = UnfoldedTraining(Unfolded("ista", 2), SAMPLER, "objective", SHORT, seed=1)
    other = UnfoldedTraining(Unfolded("ista", 2), SAMPLER, "objective", SHORT, seed=2)
    with pytest.raises(CheckpointError, match="of seed 1"):
        other.load_state_dict(one.state_dict())


def test_a_share_of_one_and_of_zero_are_the_pure_losses() -> None:
    found = []
    for loss in ("supervised", 1.0, "objective", 0.0, {"objective": 3.0}):
        model = Unfolded("ista", 3)
        train_unfolded(model, SAMPLER, loss, SHORT)
        found.append(model.steps)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    torch.testing.assert_close(found[2], found[4], atol=1e-4, rtol=1e-4)  # a factor changes nothing for Adam


def test_few_labelled_signals_and_many_others_train_together() -> None:
    sampler = BernoulliGaussian(15, 30, p=0.1, labelled=0.1)
    model = Unfolded("ista", 4, weight=0.05)
    train_unfolded(model, sampler, 0.5, SHORT)
    assert held_out(model) < held_out(Unfolded("ista", 4, weight=0.05))
    blind = Unfolded("ista", 2)
    training = train_unfolded(
        blind, BernoulliGaussian(15, 30, labelled=0.0), "supervised", Incremental(batches=2, batch_size=5)
    )
    assert bool((blind.steps == 1).all())  # nobody told it anything
    assert training.history[-1].loss == 0


def test_discounted_layers_make_every_layer_an_estimate() -> None:
    last, any_time = Unfolded("ista", 8, weight=0.05), Unfolded("ista", 8, weight=0.05)
    schedule = Incremental(batches=15, batch_size=50)
    train_unfolded(last, SAMPLER, "objective", schedule)
    train_unfolded(any_time, SAMPLER, "objective", schedule, discount=0.9)
    batch = SAMPLER(400, torch.Generator().manual_seed(5))
    with torch.no_grad():
        values = [
            m.objective(batch.operator, batch.y, m(batch.operator, batch.y, trace=True)[1]).mean(1)
            for m in (last, any_time)
        ]
    assert float(values[1].mean()) < float(values[0].mean())
    assert float(values[0][-1]) < float(values[1][-1]) * 1.02


def test_a_matrix_for_every_batch_or_signal_teaches_steps_that_carry_over() -> None:
    for matrix in ("batch", "signal"):
        model = Unfolded("ista", 5, weight=0.05)
        train_unfolded(model, SAMPLER.changed(matrix=matrix), "objective", SHORT)
        other = SAMPLER.changed(matrix_seed=77)
        assert held_out(model, other)[0] < held_out(Unfolded("ista", 5, weight=0.05), other)[0]


def test_k_sparse_lista_complex_and_all_at_once_train() -> None:
    sparse = Unfolded("iht", 5, TopK(3))
    train_unfolded(sparse, SAMPLER, "supervised", SHORT)
    assert held_out(sparse)[1] < held_out(Unfolded("iht", 5, TopK(3)))[1]
    batch = SAMPLER(1, torch.Generator())
    lista = Unfolded("ista", 4, weight=0.05, learn=("threshold", "matrices"), operator=batch.operator)
    train_unfolded(lista, SAMPLER, "supervised", Incremental(batches=20, batch_size=50, first=4))
    assert held_out(lista)[1] < held_out(Unfolded("ista", 4, weight=0.05))[1]
    wave = BernoulliGaussian(15, 30, p=0.1, dtype=torch.complex64)
    model = Unfolded("ista", 4, weight=0.05)
    train_unfolded(model, wave, 0.5, SHORT)
    drawn = wave(50, torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, plain = (m(drawn.operator, drawn.y) for m in (model, Unfolded("ista", 4, weight=0.05)))
    assert float((one - drawn.x).abs().square().mean()) < float((plain - drawn.x).abs().square().mean())


def test_steps_stay_above_zero() -> None:
    model = Unfolded("ista", 2)
    train_unfolded(model, SAMPLER, "objective", Incremental(batches=5, batch_size=20, lr=5.0, least=0.01))
    assert float(model.steps.min()) >= 0.01 - 1e-6


def test_signals_that_nobody_knows_train_by_the_objective_alone() -> None:
    patches = ImagePatches([torch.rand(20, 20, generator=torch.Generator().manual_seed(0))], side=4, atoms=6)
    model = Unfolded("ista", 3, weight=0.01)
    train_unfolded(model, patches, "objective", Incremental(batches=3, batch_size=20))
    with pytest.raises(InputError, match="loss='objective', which needs measurements alone"):
        train_unfolded(model, patches, "supervised", Incremental(batches=3, batch_size=20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "superivsed"}, "Did you mean 'supervised'"),
        ({"loss": 1.2}, r"it lies in \[0, 1\]"),
        ({"loss": {"objective": -1.0}}, "weight of objective"),
        ({"loss": {"objective": 0.0}}, "nothing to train by"),
        ({"discount": 0.0}, "discount is None or in"),
        ({"schedule": Incremental(first=9)}, "first generation has 9 layers"),
    ],
)
def test_losses_and_schedules_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        UnfoldedTraining(Unfolded("ista", 2), SAMPLER, **arguments)


@pytest.mark.parametrize("arguments", [{"batches": 0}, {"batch_size": 1.5}, {"lr": 0.0}, {"least": -1.0}])
def test_a_schedule_checks_itself(arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"Incremental: {next(iter(arguments))}"):
        Incremental(**arguments)
