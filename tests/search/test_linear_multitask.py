"""A shared linear representation: exact where there is no noise, the same however samples come, solvers that agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from poise.errors import InputError
from poise.search import LinearMultiTask
from poise.weights import risk_bound


def truth(d: int = 12, rank: int = 3, tasks: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q
    return basis, torch.randn(rank, tasks, generator=generator, dtype=torch.float64), generator


def samples(
    basis: Tensor, head: Tensor, n: int, generator: torch.Generator, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, len(basis), generator=generator, dtype=torch.float64)
    return x, x @ basis @ head + noise * torch.randn(n, generator=generator, dtype=torch.float64)


def trained(noise: float = 0.0, n: int = 40, **options: object) -> tuple[LinearMultiTask, Tensor, Tensor]:
    basis, weights, generator = truth()
    trainer = LinearMultiTask(12, 3, 8, **options)
    for task in range(8):
        trainer.add(task, *samples(basis, weights[:, task], n, generator, noise))
    trainer.fit()
    return trainer, basis, weights


def test_without_noise_every_model_is_found_exactly() -> None:
    trainer, basis, weights = trained()
    torch.testing.assert_close(trainer.basis @ trainer.heads(), basis @ weights, atol=1e-6, rtol=1e-6)
    assert trainer.noise() < 1e-6


def test_fewer_samples_than_features_suffice_where_tasks_share() -> None:
    trainer, basis, weights = trained(n=9, sweeps=500, tolerance=1e-12)
    torch.testing.assert_close(trainer.basis @ trainer.heads(), basis @ weights, atol=1e-3, rtol=1e-3)


def test_normalisation_is_what_it_says() -> None:
    trainer, *_ = trained(0.5)
    pooled = trainer.gram.sum(0) / trainer.counts.sum()
    torch.testing.assert_close(
        trainer.basis.T @ pooled @ trainer.basis, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=1e-6
    )
    other, *_ = trained(0.5, normalise="orthonormal")
    torch.testing.assert_close(other.basis.T @ other.basis, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(trainer.basis @ trainer.heads(), other.basis @ other.heads())


def test_conjugate_gradient_agrees_with_the_direct_solution() -> None:
    one, *_ = trained(0.5, solver="direct")
    two, *_ = trained(0.5, solver="cg")
    assert two.products > 0
    torch.testing.assert_close(one.basis @ one.heads(), two.basis @ two.heads(), atol=1e-6, rtol=1e-6)


def test_the_loss_falls_in_every_sweep_and_is_that_of_the_samples() -> None:
    basis, weights, generator = truth()
    trainer = LinearMultiTask(12, 3, 8)
    drawn = [samples(basis, weights[:, t], 30, generator, 1.0) for t in range(8)]
    for task, (x, y) in enumerate(drawn):
        trainer.add(task, x, y)
    trainer.fit()
    assert all(b <= a + 1e-9 for a, b in zip(trainer.losses, trainer.losses[1:], strict=False))
    squares = torch.cat([(trainer.predict(x, trainer.heads()[:, t]) - y) ** 2 for t, (x, y) in enumerate(drawn)])
    assert 0.5 * float(squares.mean()) == pytest.approx(trainer.losses[-1], rel=1e-6)
    assert trainer.noise() == pytest.approx(1.0, rel=0.15)


def test_samples_in_parts_are_samples_at_once() -> None:
    basis, weights, generator = truth()
    x, y = samples(basis, weights[:, 0], 50, generator, 1.0)
    whole, parts = LinearMultiTask(12, 3, 1), LinearMultiTask(12, 3, 1)
    whole.add(0, x, y)
    parts.add(0, x[:20], y[:20])
    parts.add(0, x[20:], y[20:])
    torch.testing.assert_close(whole.gram, parts.gram)
    torch.testing.assert_close(whole.moment, parts.moment)
    assert torch.equal(whole.counts, parts.counts)


def test_a_constant_is_learned_where_it_is_asked_for() -> None:
    basis, weights, generator = truth()
    trainer = LinearMultiTask(12, 4, 8, bias=True)
    for task in range(8):
        x, y = samples(basis, weights[:, task], 60, generator)
        trainer.add(task, x.float(), y.float() + 3)
    trainer.fit()
    assert trainer.noise() < 1e-4


def test_the_predicted_excess_risk_is_the_measured_one() -> None:
    d, rank, tasks, n, target_samples = 15, 3, 6, 400, 200
    measured, predicted = [], []
    for seed in range(60):
        basis, weights, generator = truth(d, rank, tasks, seed)
        goal = torch.randn(rank, generator=generator, dtype=torch.float64)
        trainer = LinearMultiTask(d, rank, tasks)
        for task in range(tasks):
            trainer.add(task, *samples(basis, weights[:, task], n, generator, 1.0))
        trainer.fit()
        head = trainer.target_head(*samples(basis, goal, target_samples, generator, 1.0))
        measured.append(float((trainer.basis @ head - basis @ goal).square().sum()))
        counts = torch.full((tasks,), n)
        predicted.append(
            risk_bound(weights, goal, counts, noise=1.0, features=d, target_samples=target_samples).expected
        )
    # sixty seeds leave a standard error of about a tenth
    assert sum(measured) == pytest.approx(sum(predicted), rel=0.25)


def test_bad_samples_and_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="1 <= rank <= 4"):
        LinearMultiTask(4, 5, 2)
    with pytest.raises(InputError, match="normalise is"):
        LinearMultiTask(4, 2, 2, normalise="none")
    trainer = LinearMultiTask(4, 2, 2)
    with pytest.raises(InputError, match="not trained yet"):
        trainer.heads()
    with pytest.raises(InputError, match="nothing to fit"):
        trainer.fit()
    with pytest.raises(InputError, match=r"inputs float \[n, 4\]"):
        trainer.add(0, torch.zeros(3, 5), torch.zeros(3))
    with pytest.raises(InputError, match="not all finite"):
        trainer.add(1, torch.full((3, 4), float("nan")), torch.zeros(3))
