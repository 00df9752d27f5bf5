"""Many concave functions at once: each row ends where it would end alone."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.ascent import adam, lbfgs


def quadratics() -> tuple[Tensor, Tensor]:
    """Concave quadratics of very different conditioning, and their maximisers."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1e-1, 1.0, 1e1, 1e2], dtype=torch.float64)
    curvature = scale[:, None, None] * (base @ base.mT) + torch.eye(6, dtype=torch.float64)
    return curvature, torch.randn(4, 6, generator=generator, dtype=torch.float64)


def test_rows_converge_to_their_own_maximisers_in_their_own_time() -> None:
    curvature, best = quadratics()
    seen: list[int] = []

    def oracle(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(which))
        away = x - best[which]
        pull = (curvature[which] @ away[..., None])[..., 0]
        return -0.5 * (away * pull).sum(-1), -pull

    end = lbfgs(oracle, torch.zeros(4, 6, dtype=torch.float64), torch.full((4,), 1e-9, dtype=torch.float64), 200)
    torch.testing.assert_close(end.x, best, atol=1e-8, rtol=0)
    assert (end.residual <= 1e-9).all()
    assert not end.stalled.any()
    assert seen[0] == 4
    assert seen[-1] == 1
    assert len(set(end.iterations.tolist())) > 1
    alone = lbfgs(
        lambda x, which: oracle(x, which + 2),
        torch.zeros(1, 6, dtype=torch.float64),
        torch.full((1,), 1e-9, dtype=torch.float64),
        200,
    )
    assert int(alone.iterations[0]) == int(end.iterations[2])


def test_a_kink_ends_the_ascent_and_is_said() -> None:
    def tent(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return -x.abs().sum(-1), torch.where(x >= 0, -1.0, 1.0).to(x)

    end = lbfgs(tent, torch.full((1, 1), 0.3, dtype=torch.float64), torch.full((1,), 1e-9, dtype=torch.float64), 200)
    assert bool(end.stalled.all())
    assert float(end.x.abs().max()) < 1e-6


def test_adam_makes_the_steps_that_it_is_told() -> None:
    end = adam(lambda x, which: (-0.5 * x.square().sum(-1), -x), torch.ones(2, 3), 50, 0.1)
    assert end.iterations.tolist() == [50, 50]
    assert len(end.history) == 50
    reference = torch.ones(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([reference], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (0.5 * reference.square().sum()).backward()
        optimizer.step()
    torch.testing.assert_close(end.x, reference.detach(), atol=1e-5, rtol=1e-5)
