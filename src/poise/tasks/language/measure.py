"""What a trained language model is measured by, on held-out answers and against the model that it started as.

    preference_accuracy   share of pairs with a positive margin (a tie counts half)
    margin                mean over pairs of  log pi/pi_0 (chosen) - log pi/pi_0 (rejected),  nats
    chosen_shift          mean of log pi/pi_0 (chosen), nats; rejected_shift likewise
    nll                   -log pi(chosen) per token, nats
    kl                    mean over answer tokens of KL(pi || pi_0) over the vocabulary, nats
    length_bias           |correlation| of the margin with the difference in length

pi_0 is the model before training, whatever the formula reads, so that every formula is measured by the same ruler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from poise.problem import ModelView
from poise.quantities import Quantities, random_numbers
from poise.readouts.language import Language, Reference
from poise.tasks.language.tokens import TokenizedRecords

BATCH = 8
_LONGEST_PROFILE = 64
"""Positions of an answer that a profile has."""


@dataclass(frozen=True)
class Pages:
    """What is computed of a data set under one model.

    Attributes:
        sums: by side, the log-probability of each answer, float64 `[examples]`.
        lengths: by side, tokens of each answer, int64 `[examples]`.
        profiles: by side and name, sums over examples at each position of the answer, and how many answers reach it.
    """

    sums: dict[str, Tensor]
    lengths: dict[str, Tensor]
    profiles: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def score(
    model: nn.Module,
    data: TokenizedRecords,
    device: torch.device,
    reference: Reference | None = None,
    batch: int = BATCH,
) -> Pages:
    """Score every answer of a data set, and with a reference also the divergence from it at each position of the first side.

    Args:
        model: a causal language model, left in evaluation mode.
        data: of `tokenize`.
        reference: what the divergence is taken from; None leaves it out.
        batch: answers at once.
    """
    readout, first = Language(reference), data.sides[0]
    reads = {f"{side}_logps" for side in data.sides} | ({f"{first}_reverse_kl"} if reference is not None else set())
    sums: dict[str, list[Tensor]] = {side: [] for side in data.sides}
    lengths: dict[str, list[Tensor]] = {side: [] for side in data.sides}
    profile: list[Tensor] = []
    model.eval()
    order: list[Tensor] = []
    with torch.no_grad():
        for rows, moved in data.batches_by_length(batch, device):
            order.append(rows)
            found = readout(ModelView(model), Quantities(moved, device=device), frozenset(reads))
            for side in data.sides:
                sums[side].append(found[f"{side}_logps"].double().sum(-1).cpu())
                lengths[side].append(moved[f"{side}_mask"].sum(-1).cpu())
            if reference is not None:
                profile.append(_by_position(found[f"{first}_reverse_kl"], moved[f"{first}_mask"]))
    back = torch.cat(order).argsort()
    both = torch.stack(profile).sum(0) if profile else None
    return Pages(
        {side: torch.cat(parts)[back] for side, parts in sums.items()},
        {side: torch.cat(parts)[back] for side, parts in lengths.items()},
        {} if both is None else {"kl": (both[0], both[1])},
    )


def _by_position(values: Tensor, mask: Tensor) -> Tensor:
    """Return sums and counts by position of the answer, float64 `[2, positions]`."""
    place = (mask.long().cumsum(-1) - 1)[mask].clamp(max=_LONGEST_PROFILE - 1)
    total = torch.zeros(2, _LONGEST_PROFILE, dtype=torch.float64, device=values.device)
    total[0].index_add_(0, place, values[mask].double())
    total[1].index_add_(0, place, torch.ones_like(place, dtype=torch.float64))
    return total.cpu()


def metrics(now: Pages, start: Pages, labels: Tensor | None = None) -> dict[str, float]:
    """Compare a trained model's scores with those of the model that it started as; see the module's table.

    Args:
        now, start: of the same data.
        labels: bool `[examples]`, whether an unpaired answer is wanted.
    """
    shift = {side: now.sums[side] - start.sums[side] for side in now.sums}
    first = next(iter(now.sums))
    found = {"nll": -float(now.sums[first].sum() / now.lengths[first].sum().clamp(min=1))}
    if "chosen" in shift:
        margin = shift["chosen"] - shift["rejected"]
        longer = (now.lengths["chosen"] - now.lengths["rejected"]).double()
        found = {
            "preference_accuracy": _share_positive(margin),
            "margin": float(margin.mean()),
            "chosen_shift": float(shift["chosen"].mean()),
            "rejected_shift": float(shift["rejected"].mean()),
            **found,
            "length_bias": abs(_correlation(margin, longer)),
        }
    elif labels is not None:
        found = {"label_accuracy": _share_positive(torch.where(labels, shift[first], -shift[first])), **found}
    if "kl" in now.profiles:
        total, count = now.profiles["kl"]
        found["kl"] = float(total.sum() / count.sum().clamp(min=1))
    return found


def _share_positive(margin: Tensor) -> float:
    return float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation, 0 where one of the two does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def profile(pages: Pages, name: str) -> tuple[list[int], list[float]]:
    """Return the mean by position of the answer, from 1, as far as answers reach."""
    total, count = pages.profiles[name]
    reached = int((count > 0).sum())
    return list(range(1, reached + 1)), (total[:reached] / count[:reached]).tolist()


def sample(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Tensor], *, seed: int, device: torch.device, longest: int = 48
) -> list[str]:
    """Let a model answer prompts, at temperature 1 and without filters, so that it speaks for its own distribution.

    Args:
        prompts: int64 `[time]` each.
        seed: of the draws.
        longest: most tokens of an answer.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.full((width - len(p),), pad), p]) for p in prompts]).to(device)
    attention = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).to(device)
    model.eval()
    with torch.no_grad(), random_numbers(seed, device):
        out = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=attention.long(), max_new_tokens=longest, do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, pad_token_id=pad, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in out]
