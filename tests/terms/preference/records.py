"""Token records to test preference terms with."""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Token records of pairs: chosen answers of 6 places, rejected ones of 5, some of them padding."""
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for side, time in (("chosen", 6), ("rejected", 5)):
        length = torch.randint(1, time + 1, (batch,), generator=g)
        mask = torch.arange(time) < length[:, None]
        found[f"{side}_mask"] = mask
        found[f"{side}_spans"] = torch.randint(0, 3, (batch, time), generator=g) * mask
        for name in (f"{side}_logps", f"reference_{side}_logps"):
            found[name] = -torch.rand(batch, time, generator=g, dtype=dtype).mul(3) * mask
        found[f"{side}_kl"] = torch.rand(batch, time, generator=g, dtype=dtype) * mask
        found[f"{side}_token_weight"] = torch.rand(batch, time, generator=g, dtype=dtype) * mask
    # A phrase stands in both answers or in neither.
    for number in (1, 2):
        both = torch.stack([(found[f"{side}_spans"] == number).any(-1) for side in ("chosen", "rejected")]).all(0)
        for side in ("chosen", "rejected"):
            spans = found[f"{side}_spans"]
            spans[(spans == number) & ~both[:, None]] = 0
    found["preference_label"] = torch.rand(batch, generator=g, dtype=dtype)
    return found
