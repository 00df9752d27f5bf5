"""What RRPO costs: memory and time beside the loss as it is commonly written, which keeps log-softmaxes of both responses.

A Llama of two layers, 128 wide, 16,000 tokens in the vocabulary, 4 pairs of 2 x 64 tokens. Both sides run policy and reference
on both answers. The dense side keeps log-softmax and softmax of policy and reference, [2 pairs, time, vocabulary] each; ours reads
the token record tile by tile and takes the divergence of the chosen answers alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Ratio, one_thread, paired, peak_bytes
from poise.formula import parse
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language

PAIRS, PROMPT, TIME = 4, 16, 64
BETA, ALPHA = 0.1, 0.01


def run(quick: bool) -> list[Ratio]:
    """Ratios of peak memory and of step times."""
    vocabulary, repeats = (2_000, 3) if quick else (16_000, 15)
    with one_thread():
        model, reference = _models(vocabulary)
        batch = _batch(vocabulary)
        ours, dense = _ours(model, reference, batch, "rrpo"), _dense(model, reference, batch)
        a, b = ours(), dense()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        peaks = [peak_bytes(lambda side=side: side().backward()) for side in (ours, dense)]
        where = f"{PAIRS} pairs of 2 x {PROMPT + TIME} tokens, {vocabulary} in the vocabulary"
        found = [
            Ratio(
                "peak memory of rrpo / of dense log-softmaxes",
                peaks[0] / peaks[1],
                0.5,
                "lower",
                f"{where}: {peaks[0] / 2**20:.0f} against {peaks[1] / 2**20:.0f} MiB above the models",
            )
        ]
        for name, goal, other in (
            ("step of rrpo / step of the dense loss", 1.0, dense),
            ("step of rrpo / step of dpo", 1.1, _ours(model, reference, batch, "dpo")),
        ):
            timing = paired(_stepping(model, ours), _stepping(model, other), repeats, warmup=1)
            detail = f"{where}: {timing.first * 1e3:.0f} against {timing.second * 1e3:.0f} ms"
            found.append(Ratio(name, timing.ratio, goal, "lower", detail))
        found.append(_deep(2_000, 2 if quick else 8, repeats))
    return found


def _deep(vocabulary: int, layers: int, repeats: int) -> Ratio:
    """A model whose body, not its output matrix, makes the step, as in all but the smallest language models."""
    (model, reference), batch = _models(vocabulary, layers, 192), _batch(vocabulary)
    sides = [_stepping(model, _ours(model, reference, batch, formula)) for formula in ("rrpo", "dpo")]
    timing = paired(sides[0], sides[1], repeats, warmup=1)
    detail = f"{layers} layers, 192 wide, {vocabulary} in the vocabulary: {timing.first * 1e3:.0f} against {timing.second * 1e3:.0f} ms"
    return Ratio("step of rrpo / step of dpo, deeper model", timing.ratio, 1.1, "lower", detail)


def _models(vocabulary: int, layers: int = 2, width: int = 128) -> tuple[nn.Module, FrozenModel]:
    """A model that has moved a little, and where it began."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    reference = FrozenModel(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model, reference


def _batch(vocabulary: int) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        batch[f"{side}_ids"] = torch.randint(vocabulary, (PAIRS, PROMPT + TIME))
        mask = torch.zeros(PAIRS, PROMPT + TIME, dtype=torch.bool)
        mask[:, PROMPT:] = True
        spans = torch.zeros(PAIRS, PROMPT + TIME, dtype=torch.int64)
        spans[:, PROMPT + 5 : PROMPT + 8], spans[:, PROMPT + 30 : PROMPT + 34] = 1, 2
        batch[f"{side}_mask"], batch[f"{side}_spans"] = mask, spans
    return batch


def _ours(model: nn.Module, reference: FrozenModel, batch: dict[str, Tensor], formula: str) -> Callable[[], Tensor]:
    objective, readout = parse(formula), Language(reference)
    plan = objective.plan()
    return lambda: objective(readout(ModelView(model), Quantities(batch), plan))


def _dense(model: nn.Module, reference: FrozenModel, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The loss on full logits of both answers in one batch, with everything that it is written from kept."""

    def loss() -> Tensor:
        ids = torch.cat([batch["chosen_ids"], batch["rejected_ids"]])
        mask = torch.cat([batch["chosen_mask"], batch["rejected_mask"]])[:, 1:]
        spans = torch.cat([batch["chosen_spans"], batch["rejected_spans"]])[:, 1:]
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        logits = reference(input_ids=ids).logits[:, :-1]
        p_reference, log_reference = logits.softmax(-1), logits.log_softmax(-1)
        kl = (p_reference * (log_reference - log_p)).sum(-1)
        ratio = (log_p - log_reference).gather(-1, ids[:, 1:, None])[..., 0]
        chosen, rejected = (ratio * (spans > 0)).sum(-1).chunk(2)
        return (-F.logsigmoid(BETA * (chosen - rejected)) + ALPHA * (kl * mask).sum(-1).chunk(2)[0]).mean()

    return loss


def _stepping(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and a step that leaves the weights where they are, so that both sides stay on the same ones."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step
