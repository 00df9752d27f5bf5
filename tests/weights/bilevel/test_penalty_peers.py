"""The penalty methods beside boat-torch, where it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.weights.bilevel.first_order import VPBGD
from poise.weights.bilevel.levels import Levels
from poise.weights.bilevel.penalty import PenaltyBilevel

G = torch.Generator().manual_seed(0)
X, V = (torch.randn(n, 4, generator=G, dtype=torch.float64) for n in (12, 9))
Y, W = torch.randint(3, (12,), generator=G), torch.randint(3, (9,), generator=G)
START, WEIGHTS = torch.randn(3, 4, generator=G, dtype=torch.float64), torch.randn(12, generator=G, dtype=torch.float64)


def lower(w: Tensor, theta: Tensor) -> Tensor:
    losses = nn.functional.cross_entropy(X @ w.T, Y, reduction="none")
    return (theta.sigmoid() * losses).mean() + 0.01 * w.square().sum()


def upper(w: Tensor) -> Tensor:
    return nn.functional.cross_entropy(V @ w.T, W)


LEVELS = Levels(lambda x, t, _: lower(x[0], t[0]), lambda x, t, _: upper(x[0]))


class _Holder(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())


def boat(gamma: float, lr: float, inner_lr: float, steps: int) -> tuple[_Holder, _Holder, Any]:
    """One penalised step of boat-torch (PGDO): the lower model has moved, and the upper one has its gradient."""
    pytest.importorskip("boat_torch", reason="boat-torch is not installed")
    from boat_torch.fo_ol.pgdo import PGDO

    above, below = _Holder(WEIGHTS), _Holder(START)
    config = {
        "lower_level_opt": torch.optim.SGD(below.parameters(), lr=lr),
        "device": "cpu",
        "PGDO": {
            "y_hat_lr": inner_lr,
            "gamma_init": gamma,
            "gamma_max": gamma,
            "gamma_argmax_step": 1,
            "update_y_ahead": False,
            "penalty": "difference",
        },
    }
    peer = PGDO(
        lambda _, u, m: lower(m.value, u.value),
        steps,
        above,
        lambda _, u, m: upper(m.value),
        below,
        list(below.parameters()),
        list(above.parameters()),
        config,
    )
    peer.optimize({}, {}, 0)
    return above, below, peer


@pytest.mark.peer
def test_a_step_of_vpbgd_is_that_of_the_peer() -> None:
    gamma, lr, inner_lr, steps = 4.0, 0.3, 0.5, 6
    above, below, peer = boat(gamma, lr, inner_lr, steps)
    scale = 1 / (gamma + 1e-8)  # the peer divides its step by gamma
    ours = VPBGD(LEVELS, [START], [WEIGHTS], gamma=gamma, lr=1.0, x_lr=lr * scale, inner_lr=inner_lr, inner_steps=steps)
    ours.step()
    assert above.value.grad is not None
    torch.testing.assert_close(WEIGHTS - ours.theta[0], above.value.grad / scale, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.x[0], below.value.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.z[0], peer.y_hat.value.detach(), atol=1e-10, rtol=0)


@pytest.mark.peer
def test_the_penalised_hypergradient_is_that_of_the_peer_at_the_same_lower_variables() -> None:
    gamma = 4.0
    above, _, peer = boat(gamma, 0.3, 0.5, 6)
    ours = PenaltyBilevel(
        LEVELS, [START], [WEIGHTS], lr=1.0, inner_lr=1.0, sigma=1 / gamma, z=[peer.y_hat.value.detach()]
    )
    assert above.value.grad is not None
    torch.testing.assert_close(ours.hypergradient()[1][0], above.value.grad * (gamma + 1e-8), atol=1e-10, rtol=0)
