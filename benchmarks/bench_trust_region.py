"""What the token trust region costs: a step beside plain supervised fine-tuning, and the memory of the term itself.

All sides run one small causal language model through the language readout, from the same weights, in turns, on one thread.
The reference's log-probabilities come with the batch (computed once before training), or a frozen copy runs in every step;
a forward pass beside forward and backward bounds that ratio by 1 + 1/3. Memory is what the forward of the term
allocates at its peak, by PyTorch's own profiler, in tensors of [batch, time].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise import parse
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language
from poise.terms import TokenTrustRegion

VOCABULARY, WIDTH = 8000, 128


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times, and peak memory of both forms in tensors of [batch, time]."""
    with one_thread():
        return [*_steps(quick), *(_memory(form) for form in ("surrogate", "exact"))]


def _steps(quick: bool) -> list[Ratio]:
    rows, time = (4, 64) if quick else (8, 128)
    model = _model()
    batch = _batch(rows, time)
    reference = Language(FrozenModel(model))
    cached = {**batch, "reference_response_logps": _reference_logps(reference, model, batch)}
    found = []
    for name, readout, data, goal in (
        ("cached", Language(), cached, 1.05),
        ("live", reference, batch, 1.35),
    ):
        ours = _stepper(copy.deepcopy(model), "token_trust_region", readout, data)
        plain = _stepper(copy.deepcopy(model), "sft", Language(), batch)
        timing = paired(ours, plain, repeats=5 if quick else 20)
        detail = f"{rows} x {time} tokens, half of them the answer's, vocabulary {VOCABULARY}: {_milliseconds(timing)}"
        found.append(Ratio(f"step, {name} reference / step of sft", timing.ratio, goal, "lower", detail))
    return found


def _memory(form: Any) -> Ratio:
    rows, time = 64, 1024
    term = TokenTrustRegion(form=form)
    logps, reference = (-torch.rand(rows, time) for _ in range(2))
    mask = torch.ones(rows, time, dtype=torch.bool)
    positions = torch.arange(time).expand(rows, time).contiguous()
    logps.requires_grad_()
    # What the term returns is counted too: values, weights and cross-entropy.
    # To two digits: a handful of scalars is no tensor.
    peak = round(_peak(lambda: term(logps, reference, mask, positions)) / (rows * time * logps.element_size()), 2)
    goal = 3.0 if form == "surrogate" else None
    return Ratio(
        f"memory of the {form} form / tensors of [batch, time]", peak, goal, "lower", f"float32, {rows} x {time}"
    )


def _peak(call: Callable[[], Any]) -> int:
    """Return the most bytes that were allocated at once during a call, beyond those before it."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def _model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _batch(rows: int, time: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(time) >= time // 2).expand(rows, time)
    return {
        "response_ids": torch.randint(VOCABULARY, (rows, time), generator=generator),
        "response_mask": mask.contiguous(),
    }


def _reference_logps(readout: Language, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    read = readout(ModelView(model), Quantities(batch), frozenset({"reference_response_logps"}))
    return read["reference_response_logps"]  # type: ignore[no-any-return]


def _stepper(model: nn.Module, formula: str, readout: Language, batch: dict[str, Tensor]) -> Callable[[], None]:
    objective = parse(formula)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    plan = objective.plan()

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        objective(readout(ModelView(model), Quantities(batch), plan)).backward()
        optimizer.step()

    return step


def _milliseconds(timing: Paired) -> str:
    return f"{timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
