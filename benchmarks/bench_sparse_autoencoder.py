"""A training step of a top-AFA autoencoder beside a plain top-k one, and its choice of features beside topk and a full sort.

The plain step has the shape of sae-lens' TopK: inputs less the decoder's bias, an encoder with bias, topk, relu, scatter, a dense decoder,
the squared error, backward, Adam; written by hand in PyTorch, without counters of dead features and without unit rows, which ours has. The
goal of the step (1.1) is the project's, those of the choice (1.5 times topk(64) with scatter) and of its memory the specification's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Ratio, one_thread, paired, peak_bytes
from poise.formula import parse
from poise.objective import Objective
from poise.parts import SparseAutoencoder, TopAFA
from poise.problem import Problem
from poise.readouts import Autoencoding
from poise.solvers import TorchOptimizer


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times, of choices and of memory."""
    batch, width, features = (256, 256, 4096) if quick else (1024, 768, 12288)
    with one_thread():
        return [*_steps(batch, width, features, 3 if quick else 5), *_choices(batch, features, 5 if quick else 9)]


class PlainTopK(nn.Module):
    """The peer."""

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        self.k = k
        start = functional.normalize(torch.randn(features, width, generator=torch.Generator().manual_seed(0)), dim=1)
        self.decoder, self.encoder = nn.Parameter(start), nn.Parameter(start.T.clone().contiguous())
        self.decoder_bias, self.encoder_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x - self.decoder_bias) @ self.encoder + self.encoder_bias
        values, index = hidden.topk(self.k, dim=-1)
        acts = torch.zeros_like(hidden).scatter_(-1, index, values.relu())
        return acts @ self.decoder + self.decoder_bias


def _plain_step(x: Tensor, features: int, k: int) -> Callable[[], object]:
    model = PlainTopK(x.shape[1], features, k)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _our_step(
    x: Tensor, features: int, activation: str, formula: str
) -> tuple[SparseAutoencoder, Callable[[], object]]:
    sae = SparseAutoencoder(x.shape[1], features, activation)
    objective: Objective = parse(formula)
    solver = TorchOptimizer("adam", lr=3e-4)
    solver.bind(sae, objective)

    def step() -> None:
        solver.step(Problem(sae, objective, [{"main": {"input": x}}], Autoencoding()))
        objective.advance()

    return sae, step


def _steps(batch: int, width: int, features: int, repeats: int) -> list[Ratio]:
    # Inputs that a dictionary describes: 64 active atoms of unit length, as a trained autoencoder sees them.
    g = torch.Generator().manual_seed(1)
    atoms = functional.normalize(torch.randn(features, width, generator=g), dim=1)
    code = torch.zeros(batch, features)
    code.scatter_(1, torch.randint(features, (batch, 64), generator=g), torch.rand(batch, 64, generator=g))
    x = code @ atoms
    rivals = {
        "top-AFA, as at the start": ("top_afa", "reconstruction + 0.03125*norm_matching"),
        "top-AFA of at most 64": ("top_afa(max_k=64)", "reconstruction + 0.03125*norm_matching"),
        "TopK of 64": ("top_k(k=64)", "reconstruction"),
    }
    plain = _plain_step(x, features, 64)
    ratios = []
    for name, (activation, formula) in rivals.items():
        sae, ours = _our_step(x, features, activation, formula)
        timing = paired(ours, plain, repeats=repeats, warmup=1, clock=time.process_time)
        k = float((sae.eval()(x).features > 0).sum(1).double().mean())
        detail = (
            f"{timing.first:.3f} against {timing.second:.3f} s; {batch} x {width}, {features} features, {k:.0f} active"
        )
        ratios.append(Ratio(f"training step, {name} / plain top-k of 64", timing.ratio, 1.1, "lower", detail))
    return ratios


def _choices(batch: int, features: int, repeats: int) -> list[Ratio]:
    g = torch.Generator().manual_seed(2)
    z = torch.randn(batch, features, generator=g)
    norms = torch.ones(features)

    def top_k() -> Tensor:
        values, index = z.topk(64, dim=1)
        return torch.zeros_like(z).scatter(1, index, values.relu())

    def by_sort(target: Tensor) -> Tensor:
        s = (z.relu() * norms).square()
        order = torch.argsort(s, dim=1, descending=True)
        c = s.gather(1, order).cumsum(1)
        c[:, -1] = 1e8
        k = (c.sqrt() - target[:, None]).abs().argmin(1) + 1
        kept = torch.zeros_like(z, dtype=torch.bool).scatter(1, order, torch.arange(features) < k[:, None])
        return z.relu() * kept

    ratios = []
    activation = TopAFA()
    for share in (0.2, 0.5, 2.0):
        target = share * torch.linalg.vector_norm(z, dim=1)

        def ours(target: Tensor = target) -> Tensor:
            return activation(z, norms, target)[0]

        k = float((ours() > 0).sum(1).double().mean())
        for name, rival, goal, many in (
            ("topk(64) and scatter", top_k, 1.5, repeats),
            ("a full sort", lambda target=target: by_sort(target), 0.5, 3),
        ):
            timing = paired(ours, rival, repeats=many, warmup=1, clock=time.process_time)
            detail = (
                f"{1e3 * timing.first:.0f} against {1e3 * timing.second:.0f} ms; {batch} x {features}, {k:.0f} active"
            )
            ratios.append(Ratio(f"choice, top-AFA of {k:.0f} / {name}", timing.ratio, goal, "lower", detail))
    held = peak_bytes(ours)
    ratios.append(Ratio("held in passing / activations", held / z.nbytes, 2.0, "lower", f"{held / 1e6:.0f} MB"))
    return ratios
