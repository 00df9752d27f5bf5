"""What the algebra and the loop cost per training step, beside the same loss written by hand.

The model is an MLP 784-256-256-10 at batch 128, on one thread.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import poise
from benchmarks.harness import Ratio, one_thread, paired

BATCH, CLASSES = 128, 10
FORMULA = "cross_entropy + 0.1*confidence_penalty + 0.01*label_smoothing"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES))


def by_hand(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(-1)
    entropy = (log_p.exp() * log_p).sum(-1).mean()
    return F.cross_entropy(logits, target) + 0.1 * entropy + 0.01 * F.cross_entropy(logits, target, label_smoothing=0.1)


def objective_against_hand(repeats: int) -> Ratio:
    model, objective = network(), poise.parse(FORMULA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, 784), torch.randint(0, CLASSES, (BATCH,))

    def step(loss) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()

    timed = paired(
        lambda: step(lambda logits: objective(logits=logits, target=y)),
        lambda: step(lambda logits: by_hand(logits, y)),
        repeats,
        3,
    )
    detail = f"{timed.first / 20 * 1e6:.0f} against {timed.second / 20 * 1e6:.0f} microseconds a step"
    return Ratio("objective of three terms / the same loss by hand, training step", timed.ratio, 1.03, detail=detail)


def loop_against_hand(repeats: int) -> Ratio:
    x, y = torch.randn(1280, 784), torch.randint(0, CLASSES, (1280,))
    steps = 100

    def ours() -> None:
        poise.fit(network(), FORMULA, (x, y), steps=steps, batch_size=BATCH, lr=0.01)

    def hand() -> None:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if step % 10 == 0:
                order = torch.randperm(1280, generator=generator)
            rows = order[step % 10 * BATCH : (step % 10 + 1) * BATCH]
            optimizer.zero_grad()
            loss = by_hand(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()

    timed = paired(ours, hand, repeats, 1)
    detail = (
        f"{timed.first / steps * 1e6:.0f} against {timed.second / steps * 1e6:.0f} microseconds a step, set-up included"
    )
    return Ratio("poise.fit / a bare loop over the same steps", timed.ratio, None, detail=detail)


def run(quick: bool) -> list[Ratio]:
    with one_thread():
        return [objective_against_hand(15 if quick else 41), loop_against_hand(5 if quick else 15)]
