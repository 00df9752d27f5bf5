"""What half fine-tuning saves and costs: optimiser state, the time of a step, and the time of drawing a new half.

The peer is full fine-tuning with the same AdamW. The model is a transformer of four blocks with Llama's seven matrices a block; a batch
of few tokens, so that the optimiser's share of the step is that of fine-tuning, and a larger one, where matrix products are nearly all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Paired, Ratio, one_thread, paired, seconds
from poise.solvers import HalfFineTuning

HEADS, LETTERS = 4, 96


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(3 * width, width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        rows, time, width = x.shape
        y = self.input_layernorm(x)
        q, k, v = (p(y).view(rows, time, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(rows, time, width))
        y = self.post_attention_layernorm(x)
        out: Tensor = x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class _Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(LETTERS, width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(4))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, LETTERS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed_tokens(x)
        for block in self.layers:
            x = block(x)
        out: Tensor = self.lm_head(self.norm(x))
        return out


def run(quick: bool) -> list[Ratio]:
    """Ratios to full fine-tuning."""
    torch.manual_seed(0)
    with one_thread():
        return [_memory(quick), *(_step(quick, *sizes) for sizes in ((256, 2, 64), (256, 8, 64))), _switch(quick)]


def _memory(quick: bool) -> Ratio:
    model = _Model(64 if quick else 256)
    held = []
    for half in (False, True):
        own = copy.deepcopy(model)
        optimizer = _optimizer(own, "category" if half else None)
        _stepper(own, optimizer, 2, 16)()
        embedding = {id(own.embed_tokens.weight), id(own.lm_head.weight)}
        states = [s for p, s in optimizer.state.items() if id(p) not in embedding]
        held.append(sum(t.numel() * t.element_size() for s in states for t in s.values() if t.ndim))
    detail = f"AdamW, embedding and head excluded: {held[1] / 2**20:.2f} against {held[0] / 2**20:.2f} MiB"
    return Ratio("optimiser state, half / full fine-tuning", held[1] / held[0], 0.55, "lower", detail)


def _step(quick: bool, width: int, rows: int, time: int) -> Ratio:
    width = 64 if quick else width
    model = _Model(width)
    timings: list[Paired] = []
    # Which matrices are drawn decides how much is saved: several masks, and their median.
    for seed in range(1 if quick else 3):
        sides = []
        for level in ("category", None):
            own = copy.deepcopy(model)
            sides.append(_stepper(own, _optimizer(own, level, seed), rows, time))
        timings.append(paired(*sides, repeats=5 if quick else 12, warmup=1))
    timing = sorted(timings, key=lambda t: t.ratio)[len(timings) // 2]
    detail = f"4 blocks, width {width}, {rows} x {time} tokens, AdamW: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
    return Ratio(f"step, half / full fine-tuning, {rows * time} tokens", timing.ratio, 0.85, "lower", detail)


def _switch(quick: bool) -> Ratio:
    model = _Model(64 if quick else 256)
    half = HalfFineTuning("adamw", lr=1e-3)
    half.bind(model)
    step = _stepper(model, half.optimizer, 2, 64)
    step()
    timing = paired(half.new_phase, step, repeats=5 if quick else 12)
    worst = max(seconds(half.new_phase) for _ in range(5))
    detail = f"{timing.first * 1e3:.2f} ms (at most {worst * 1e3:.2f}) against a step of {timing.second * 1e3:.1f} ms"
    return Ratio("drawing a new half / a step", timing.ratio, 1.0, "lower", detail)


def _optimizer(model: nn.Module, level: str | None, seed: int = 0) -> torch.optim.Optimizer:
    if level is None:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    half = HalfFineTuning("adamw", level, lr=1e-3, weight_decay=0.01, seed=seed)
    half.bind(model)
    return half.optimizer


def _stepper(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int, time: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(LETTERS, (rows, time + 1), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
