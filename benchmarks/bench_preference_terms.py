"""What preference terms cost beside each other: a step of a small language model with rpo and flex_dpo against dpo.

Two transformer blocks, 64 wide positions, 8 pairs of 2 x 64 tokens, AdamW; the reference's log-probabilities are stored. Both
sides of a ratio begin with the same weights and take their steps in turns, on one thread. The hand-written side is DPO as one
writes it for one run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise.formula import parse
from poise.objective import Objective

VOCABULARY, WIDTH, PAIRS, TIME = 2000, 128, 8, 64
Loss = Callable[["Model", dict[str, Tensor]], Tensor]


def run(quick: bool) -> list[Ratio]:
    """Ratios of step times on the same model and batch."""
    repeats = 5 if quick else 30
    with one_thread():
        return [
            _ratio("step of rpo / step of dpo", _formula("rpo"), _formula("dpo"), repeats, 1.02),
            _ratio("step of rpo / step of dpo and sft in forwards of their own", _formula("rpo"), _apart, repeats, 0.5),
            _ratio("step of flex_dpo / step of dpo", _formula("flex_dpo"), _formula("dpo"), repeats, 1.01),
            _ratio("step of dpo / written by hand", _formula("dpo"), _by_hand, repeats, 1.02),
        ]


class Model(nn.Module):
    """A causal transformer that gives the log-probability of each token of two answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1] - 1)
        logits = self.head(self.blocks(self.embed(ids[:, :-1]), mask=mask, is_causal=True))
        picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return picked - logits.logsumexp(-1)


def _record(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen, rejected = model(batch["ids"]).chunk(2)
    return {**batch, "chosen_logps": chosen, "rejected_logps": rejected}


def _formula(text: str) -> Loss:
    objective: Objective = parse(text)
    return lambda model, batch: objective(_record(model, batch))


def _apart(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """DPO on both answers, and supervised fine-tuning in a forward pass of its own."""
    return _by_hand(model, batch) - 0.005 * 0.1 * model(batch["ids"][:PAIRS]).sum(-1).mean()


def _by_hand(model: Model, batch: dict[str, Tensor]) -> Tensor:
    chosen, rejected = model(batch["ids"]).sum(-1).chunk(2)
    reference = batch["reference_chosen_logps"].sum(-1) - batch["reference_rejected_logps"].sum(-1)
    return -functional.logsigmoid(0.1 * (chosen - rejected - reference)).mean()


def _ratio(name: str, first: Loss, second: Loss, repeats: int, goal: float) -> Ratio:
    timing = _race(first, second, repeats)
    detail = f"{PAIRS} pairs of 2 x {TIME} tokens: {timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
    return Ratio(name, timing.ratio, goal, "lower", detail)


def _race(first: Loss, second: Loss, repeats: int) -> Paired:
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(VOCABULARY, (2 * PAIRS, TIME + 1))
    with torch.no_grad():
        chosen, rejected = model(ids).chunk(2)
    batch = {"ids": ids, "reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
    batch["chosen_mask"] = batch["rejected_mask"] = torch.ones(PAIRS, TIME, dtype=torch.bool)
    ours, theirs = (_stepper(copy.deepcopy(model), loss, batch) for loss in (first, second))
    return paired(ours, theirs, repeats)


def _stepper(model: Model, loss: Loss, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss(model, batch).backward()
        optimizer.step()

    return step
