"""What f_sft costs beside supervised fine-tuning, and what a batch of seeds saves in the study of learning rates.

A step of a small language model (16 answers of 64 tokens, 2,000 words, AdamW, stored reference): `f_sft` in both forms against `sft`
on the same record, whose log-normaliser the log-probabilities need anyway. The study on digits for 5 rates and 16 seeds: seconds of
processor, both stages included.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.bench_preference_terms import PAIRS, TIME, VOCABULARY
from benchmarks.bench_preference_terms import Model as Scorer
from benchmarks.harness import Ratio, one_thread, paired
from poise.formula import parse


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times on the same model and batch, in turns on one thread, and the seconds of the study."""
    repeats = 5 if quick else 40
    with one_thread():
        ratios = [
            _ratio(f"step of {name} / step of sft", formula, repeats)
            for name, formula in (
                ("f_sft, chi-squared, tokens", "f_sft(divergence='chi2', beta=0.1)"),
                ("f_sft, Hellinger, tokens", "f_sft(divergence='hellinger', beta=0.1)"),
                ("f_sft, chi-squared, sequences", "f_sft(divergence='chi2', beta=0.1, level='sequence')"),
            )
        ]
        return ratios if quick else [*ratios, _study()]


class _Model(Scorer):
    """The small transformer, which gives the log-normaliser beside the log-probabilities."""

    def record(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1] - 1)
        logits = self.head(self.blocks(self.embed(ids[:, :-1]), mask=mask, is_causal=True))
        normaliser = logits.logsumexp(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - normaliser, normaliser


def _ratio(name: str, formula: str, repeats: int) -> Ratio:
    torch.manual_seed(0)
    model = _Model()
    ids = torch.randint(VOCABULARY, (2 * PAIRS, TIME + 1))
    mask = torch.ones(2 * PAIRS, TIME, dtype=torch.bool)
    with torch.no_grad():
        reference = model.record(ids)[0]
    fixed = {
        "reference_response_logps": reference,
        "response_mask": mask,
        "response_positions": mask.long().cumsum(1) - 1,
    }
    ours, theirs = (_stepper(copy.deepcopy(model), f, ids, fixed) for f in (formula, "sft(reduction='sum')"))
    timing = paired(ours, theirs, repeats)
    detail = f"{2 * PAIRS} answers of {TIME} tokens: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
    return Ratio(name, timing.ratio, 1.05, "lower", detail)


def _stepper(model: _Model, formula: str, ids: Tensor, fixed: dict[str, Tensor]) -> Callable[[], None]:
    objective, optimizer = parse(formula), torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        logps, normaliser = model.record(ids)
        objective(fixed, response_logps=logps, response_logsumexp=normaliser).backward()
        optimizer.step()

    return step


def _study() -> Ratio:
    from poise.claims.p42 import RATES, SEEDS, SFT, _Bed, _stage

    bed = _Bed(0)
    started = time.process_time()
    for rate in RATES:
        _stage(bed, bed.first, SFT, rate)
    spent = time.process_time() - started
    return Ratio(
        "digits study, 5 rates and 16 seeds, seconds of processor",
        spent,
        60,
        "lower",
        f"{len(RATES)} rates, {SEEDS} seeds, both stages",
    )
