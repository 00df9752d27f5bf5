"""What companding costs: a step and its memory beside the plain model and beside the same curve as an ordinary PyTorch parametrization.

The peer is what a reader of the paper would write: a module `a*torch.atan(v/b)` under `torch.nn.utils.parametrize`, with PyTorch's own
cache around the forward pass. All sides train from the same weights with the same optimiser and the same decay, in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.harness import Paired, Ratio, paired
from poise.parts import compand
from poise.solvers import parameter_groups

Step = Callable[[], None]


class _Peer(nn.Module):
    """The curve as a plain parametrization, with fixed or learned `a` and `b`."""

    def __init__(self, a: float, learn: bool) -> None:
        super().__init__()
        self.log_a, self.log_b = (nn.Parameter(torch.tensor(a).log(), requires_grad=learn) for _ in range(2))

    def forward(self, v: Tensor) -> Tensor:
        return self.log_a.exp() * torch.atan(v / self.log_b.exp())

    def right_inverse(self, w: Tensor) -> Tensor:
        return self.log_b.exp() * torch.tan(w / self.log_a.exp())


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times and of bytes, training and folded."""
    repeats = 10 if quick else 150
    results = []
    for name, make, shape, batch in _models(quick):
        for learn in (False, True):
            kind = "learned" if learn else "fixed"
            timing = paired(
                _step(_companded(make(), learn), shape, batch), _step(make(), shape, batch), repeats, warmup=5
            )
            results.append(
                Ratio(f"step {kind} / plain, {name}, batch {batch}", timing.ratio, 1.03, "lower", _milliseconds(timing))
            )
            timing = paired(
                _step(_companded(make(), learn), shape, batch),
                _step(_peer(make(), learn), shape, batch, cached=True),
                repeats,
                warmup=5,
            )
            results.append(
                Ratio(f"step {kind} / torch parametrize, {name}", timing.ratio, 1.0, "lower", _milliseconds(timing))
            )
        results += [_memory(name, make, shape, batch), _folded(name, make, shape, batch, repeats)]
    return results


def _models(quick: bool) -> list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]]:
    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    sizes = [("MLP 784-256-256-10", mlp, (784,), 128), ("3-layer CNN", conv, (1, 28, 28), 64)]
    return sizes if quick else [*sizes, ("MLP 784-256-256-10", mlp, (784,), 1024)]


def _companded(model: nn.Module, learn: bool) -> nn.Module:
    compand(model, learn=learn)
    return model


def _peer(model: nn.Module, learn: bool) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            a = max(3 * float(layer.weight.detach().std()), float(layer.weight.detach().abs().max()) / 1.4)
            parametrize.register_parametrization(layer, "weight", _Peer(a, learn))
    return model


def _step(model: nn.Module, shape: tuple[int, ...], batch: int, cached: bool = False) -> Step:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(batch, *shape, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
    groups = parameter_groups(model, weight_decay=5e-4, lr=0.01)
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        if cached:
            with parametrize.cached():
                loss = nn.functional.cross_entropy(model(x), y)
        else:
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    return step


def _memory(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int) -> Ratio:
    """Bytes alive between forward and backward: parameters, their gradients and momentum, and everything kept for the backward pass."""
    plain, companded = make(), _companded(make(), learn=False)
    ours, theirs = _bytes(companded, shape, batch), _bytes(plain, shape, batch)
    detail = f"{ours / 2**20:.2f} / {theirs / 2**20:.2f} MiB; w is one more tensor a layer, and nothing else is kept"
    return Ratio(f"memory of a step / plain, {name}, batch {batch}", ours / theirs, 1.05, "lower", detail)


def _bytes(model: nn.Module, shape: tuple[int, ...], batch: int) -> int:
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model(torch.randn(batch, *shape))
    held = sum(3 * p.untyped_storage().nbytes() for p in model.parameters())
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del output
    return held + sum(size for pointer, size in storages.items() if pointer not in parameters)


def _folded(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int, repeats: int) -> Ratio:
    plain = make().eval()
    folded = compand(copy.deepcopy(plain)).fold().eval()
    x = torch.randn(batch, *shape)
    with torch.inference_mode():
        timing = paired(lambda: folded(x), lambda: plain(x), repeats, warmup=5)
    return Ratio(f"inference folded / plain, {name}, batch {batch}", timing.ratio, 1.02, "lower", _milliseconds(timing))


def _milliseconds(timing: Paired) -> str:
    return f"{1e3 * timing.first:.3f} / {1e3 * timing.second:.3f} ms"
