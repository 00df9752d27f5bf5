"""Learned proximal networks: a training step, inversion of a batch, and iterations of plug and play.

A step beside the loop that one writes by hand, with the gradient of the network by autograd and a second backward pass. Inversion beside
SciPy's `fmin_cg`, one example after another, as the authors do it. Plug and play beside deepinv's with the same denoiser and blur.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Ratio, one_thread, paired, seconds
from poise.linear_maps import Blur, gaussian_kernel
from poise.parts import ICNN, LearnedProx
from poise.recipes import fit_learned_prox
from poise.solvers import plug_and_play

CPU = time.process_time


def run(quick: bool) -> list[Ratio]:
    """Ratios of CPU time."""
    with one_thread():
        return [*_steps(quick), *_inversion(quick), *_iterations(quick)]


# ---- a training step ------------------------------------------------------------------------------------------------


class _ByHand(nn.Module):
    """The same network as one writes it: f by autograd, one layer after another."""

    def __init__(self, size: int, hidden: int, layers: int, beta: float, strong: float) -> None:
        super().__init__()
        self.skips = nn.ModuleList([nn.Linear(size, hidden) for _ in range(layers)])
        self.inner = nn.ModuleList([nn.Linear(hidden, hidden, bias=False) for _ in range(layers - 1)])
        self.last, self.straight = nn.Linear(hidden, 1, bias=False), nn.Linear(size, 1)
        self.beta, self.strong = beta, strong
        self.clip()

    def clip(self) -> None:
        with torch.no_grad():
            for layer in (*self.inner, self.last):
                layer.weight.clamp_(min=0.0)

    def forward(self, y: Tensor) -> Tensor:
        y.requires_grad_()
        z = nn.functional.softplus(self.skips[0](y), self.beta)
        for inner, skip in zip(self.inner, self.skips[1:], strict=True):
            z = nn.functional.softplus(inner(z) + skip(y), self.beta)
        value = self.last(z) + self.straight(y) + self.strong * y.square().sum(1, keepdim=True)
        (f,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        return f


def _steps(quick: bool) -> list[Ratio]:
    found = []
    for name, size, hidden, layers, batch in (
        ("64-256-256, 128 digits", 64, 256, 2, 128),
        ("1-50-50-50-50, 1,000 numbers", 1, 50, 4, 1000),
    ):
        torch.manual_seed(0)
        net = ICNN(size, hidden, layers, beta=10.0, strong=0.01)
        ours = _stepper(LearnedProx(net), net.project_, size, batch)
        hand = _ByHand(size, hidden, layers, 10.0, 0.01)
        timing = paired(ours, _stepper(hand, hand.clip, size, batch), 10 if quick else 60, clock=CPU)
        detail = f"{1e3 * timing.first:.2f} against {1e3 * timing.second:.2f} ms"
        found.append(Ratio(f"training step / by hand, {name}", timing.ratio, 1.1, "lower", detail))
    return found


def _stepper(model: nn.Module, project: Callable[[], None], size: int, batch: int) -> Callable[[], object]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    x = torch.rand(batch, size)

    def step() -> None:
        optimizer.zero_grad()
        f = model(x + 0.1 * torch.randn_like(x))
        (1 - torch.exp(-(f - x).square().sum(1))).mean().backward()
        optimizer.step()
        project()

    return step


# ---- inversion ------------------------------------------------------------------------------------------------------


def _inversion(quick: bool) -> list[Ratio]:
    from scipy.optimize import fmin_cg
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    prox = LearnedProx(ICNN(64, 256, 2, beta=10.0, strong=0.01))
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    fit_learned_prox(prox, digits[64:], 0.1, steps=100 if quick else 1000)
    prox, x = prox.double(), digits[:64].double()
    few = x[:4] if quick else x

    def singly() -> float:
        worst = 0.0
        for row in few:

            def value(p: Any, row: Tensor = row) -> float:
                with torch.no_grad():
                    point = torch.from_numpy(p)[None]
                    return float(prox.potential(point)) - float(point[0] @ row)

            def slope(p: Any, row: Tensor = row) -> Any:
                with torch.no_grad():
                    return (prox(torch.from_numpy(p)[None])[0] - row).numpy()

            end = fmin_cg(value, row.numpy(), slope, gtol=1e-6, norm=2, maxiter=5000, disp=False)
            worst = max(worst, float(torch.from_numpy(slope(end)).norm()))
        return worst

    residual = {}
    for method in ("newton", "cg"):
        residual[method] = float(prox.invert(x, method, tol=1e-6).residual.max())
    theirs_residual = singly()
    theirs = seconds(singly, CPU) * len(x) / len(few)
    found = []
    for method, last in residual.items():
        ours = min(seconds(lambda method=method: prox.invert(x, method, tol=1e-6), CPU) for _ in range(3))  # type: ignore[misc]
        detail = f"{ours:.2f} against {theirs:.2f} s, residuals {last:.1g} and {theirs_residual:.1g}"
        goal = 10.0 if method == "newton" else None
        found.append(Ratio(f"fmin_cg one by one / {method} of 64 digits", theirs / ours, goal, "higher", detail))
    return found


# ---- plug and play --------------------------------------------------------------------------------------------------


def _iterations(quick: bool) -> list[Ratio]:
    if find_spec("deepinv") is None:
        return []
    import deepinv
    from deepinv.optim import PGD
    from deepinv.optim.data_fidelity import L2
    from deepinv.optim.prior import PnP

    torch.manual_seed(0)
    size, iterations = 16, 20 if quick else 50
    prox = LearnedProx(ICNN((1, size, size), 512, 2, beta=10.0, strong=0.01))
    kernel = gaussian_kernel(5, 1.0)
    A = Blur(kernel, (1, size, size))
    x = torch.rand(16, 1, size, size)
    v = A(x) + 0.02 * torch.randn_like(x)
    physics = deepinv.physics.Blur(filter=kernel.float()[None, None], padding="circular")
    peer = PGD(
        data_fidelity=L2(), prior=PnP(lambda y, sigma: prox(y)), stepsize=0.9, max_iter=iterations, early_stop=False, crit_conv="residual"
    )  # fmt: skip

    def theirs() -> Tensor:
        with torch.no_grad():
            found: Tensor = peer(v, physics)
        return found

    def ours(trace: bool) -> Tensor:
        return plug_and_play(A, v, prox, step=0.9, iterations=iterations, trace=trace).x

    apart = float((ours(False) - theirs()).abs().max())
    found = []
    for trace, name in ((False, "without the objective"), (True, "with it at every iterate")):
        timing = paired(lambda trace=trace: ours(trace), theirs, 3 if quick else 10, clock=CPU)  # type: ignore[misc]
        detail = (
            f"{1e3 * timing.first / iterations:.2f} against {1e3 * timing.second / iterations:.2f} ms, deepinv {deepinv.__version__}; "
            f"results differ by {apart:.1g}"
        )
        found.append(Ratio(f"iteration of plug and play / deepinv, {name}", timing.ratio, 1.2, "lower", detail))
    return found
