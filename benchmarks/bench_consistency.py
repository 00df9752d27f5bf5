"""What the consistency of two rankings costs, and what stored log-probabilities of the reference save.

Kendall's tau of 10,000 prompts with 5 answers each, all at once, beside `scipy.stats.kendalltau` prompt by prompt and
`torchmetrics` prompt by prompt (a metric that pairs its updates; timed on fewer prompts and scaled up). Then one training step
on pairs of words: `soft_dpo` with the reference's log-probabilities in the data, beside a live reference; and the memory that
the step holds for its backward pass, beside supervised fine-tuning on the same sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import poise
from benchmarks.harness import Ratio, one_thread, paired
from poise.frozen import FrozenModel
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.tasks.words import END, TIME, WordModel, WordReadout
from poise.weights.consistency import rank_correlation

ANSWERS = 5


def run(quick: bool) -> list[Ratio]:
    """The ratios of times, and of memory."""
    with one_thread():
        return [*_correlations(quick), *_steps(quick)]


def _correlations(quick: bool) -> list[Ratio]:
    import scipy
    import torchmetrics
    from scipy.stats import kendalltau
    from torchmetrics.functional import kendall_rank_corrcoef

    prompts, some, repeats = (500, 20, 3) if quick else (10_000, 500, 7)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(prompts, ANSWERS, generator=generator) for _ in range(2))
    rows = list(zip(a.numpy(), b.numpy(), strict=True))
    found = rank_correlation(a, b)
    wanted = torch.tensor([kendalltau(x, y).statistic for x, y in rows[:some]], dtype=found.dtype)
    torch.testing.assert_close(found[:some], wanted)
    scipy_time = paired(lambda: [kendalltau(x, y) for x, y in rows], lambda: rank_correlation(a, b), repeats, warmup=1)
    metric_time = paired(
        lambda: [kendall_rank_corrcoef(x, y) for x, y in zip(a[:some], b[:some], strict=True)],
        lambda: rank_correlation(a, b),
        repeats,
        warmup=1,
    )
    size = f"{prompts} prompts, {ANSWERS} answers"
    return [
        Ratio(
            "Kendall's tau by scipy prompt by prompt / all prompts at once",
            scipy_time.ratio,
            50.0,
            "higher",
            f"{size}: {scipy_time.first:.3f} against {scipy_time.second:.5f} s; scipy {scipy.__version__}",
        ),
        Ratio(
            "Kendall's tau by torchmetrics prompt by prompt / all at once",
            metric_time.ratio * prompts / some,
            20.0,
            "higher",
            f"{size}: {metric_time.first * prompts / some:.2f} (scaled from {some}) against {metric_time.second:.5f} s; "
            f"torchmetrics {torchmetrics.__version__}",
        ),
    ]


def _steps(quick: bool) -> list[Ratio]:
    rows, repeats = (16, 3) if quick else (128, 40)
    policy = WordModel(hidden=64)
    reference = FrozenModel(policy)
    pairs = _pairs(rows)
    stored = dict(pairs)
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            ids = {"response_ids": pairs[f"{side}_ids"], "response_mask": pairs[f"{side}_mask"]}
            view = ModelView(policy)
            stored[f"reference_{side}_logps"] = WordReadout()(view, Quantities(ids), frozenset())["response_logps"]
    both = {f"response_{k}": torch.cat([pairs[f"chosen_{k}"], pairs[f"rejected_{k}"]]) for k in ("ids", "mask")}
    ours = _stepper(copy.deepcopy(policy), "soft_dpo(beta=0.1)", WordReadout(), stored)
    live = _stepper(copy.deepcopy(policy), "soft_dpo(beta=0.1)", WordReadout(reference), pairs)
    sft = _stepper(copy.deepcopy(policy), "sft", WordReadout(), both)
    timing = paired(live, ours, repeats)
    held, plain = _held(ours), _held(sft)
    return [
        Ratio(
            "step with a live reference / with stored log-probabilities",
            timing.ratio,
            1.3,
            "higher",
            f"{rows} pairs of words, GRU 64 x 2: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms",
        ),
        Ratio(
            "memory kept for the backward pass / of plain SFT, same sequences",
            held / plain,
            1.05,
            "lower",
            f"{held / 2**20:.2f} against {plain / 2**20:.2f} MiB of tensors saved for the backward pass",
        ),
    ]


def _pairs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {"preference_label": torch.rand(rows, generator=generator)}
    for side in ("chosen", "rejected"):
        found[f"{side}_ids"] = torch.randint(END, (rows, TIME), generator=generator)
        found[f"{side}_mask"] = torch.arange(TIME).expand(rows, -1) >= 2
    return found


def _stepper(model: WordModel, formula: str, readout: WordReadout, data: dict[str, Tensor]) -> Callable[[], None]:
    objective = poise.parse(formula)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plan = objective.plan()

    def step() -> None:
        optimizer.zero_grad()
        objective(readout(ModelView(model), Quantities(data), plan)).backward()
        optimizer.step()

    return step


def _held(step: Callable[[], None]) -> int:
    """Bytes of the storages that autograd keeps during one step, each once, the parameters left out."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Any:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(seen.values())
