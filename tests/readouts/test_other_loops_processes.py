"""A model that reads in its forward pass has its gradients averaged over processes, as any model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import poise
from poise.frozen import FrozenModel
from poise.readouts import batch_quantities, read_in_forward
from two_processes import on_two

transformers = pytest.importorskip("transformers", reason="needs the extra lm")
FORMULA = "dpo + 0.1*sft(reduction='sequence_mean')"


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=19, **shape))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = {f"{side}_ids": torch.randint(3, 19, (4, 6), generator=generator) for side in ("chosen", "rejected")}
    return {**ids, **{f"{side}_mask": (torch.arange(6) > 2).expand(4, 6) for side in ("chosen", "rejected")}}


def gradients_of_half() -> list[Tensor]:
    rank = torch.distributed.get_rank()
    objective = poise.parse(FORMULA)
    trained = read_in_forward(model(), objective, FrozenModel(model(1)))
    parallel = DistributedDataParallel(trained)
    half = {name: rows[2 * rank : 2 * rank + 2] for name, rows in batch().items()}
    objective(parallel(**half)).backward()
    return [p.grad for p in trained.parameters()]


def test_two_processes_have_the_gradient_of_one(tmp_path: Path) -> None:
    objective, alone = poise.parse(FORMULA), model()
    objective(batch_quantities(alone, batch(), objective, FrozenModel(model(1)))).backward()
    for found in on_two(gradients_of_half, tmp_path):
        for gradient, parameter in zip(found, alone.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)
