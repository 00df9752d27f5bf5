"""What a reward costs: tokens and n-grams beside nltk, row-wise dot products beside the whole matrix, batches by length.

The nltk side is written as the authors' code counts: patterns substituted, `wordpunct_tokenize`, `ngrams`, trigrams joined to
strings. Both sides score the same responses, in turns, on one thread.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Paired, Ratio, one_thread, paired
from poise.parts.text_encoders import encode, mean_pool
from poise.terms.rewards import STRIPPING, LengthIncentive, Relevance, RepetitionPenalty

RESPONSES, TOKENS = 1000, 300


def run(quick: bool) -> list[Ratio]:
    """Ratios of times; the first is left out where nltk is not installed."""
    with one_thread():
        return [*_features(quick), *_row_wise(quick), _by_length(quick)]


def _features(quick: bool) -> list[Ratio]:
    try:
        import nltk
    except ImportError:
        print("bench_rewards: nltk is not installed, so the features are not compared (pip install nltk).")
        return []
    responses = _responses(100 if quick else RESPONSES)
    reward = LengthIncentive() * RepetitionPenalty()
    theirs = _authors(nltk)
    expected = torch.tensor(theirs(responses))
    torch.testing.assert_close(reward(responses), expected)
    timing = paired(lambda: theirs(responses), lambda: reward(responses), repeats=3 if quick else 9, warmup=1)
    detail = f"{len(responses)} responses of {TOKENS} tokens, nltk {nltk.__version__}: {_milliseconds(timing)}"
    return [Ratio("length and repetition with nltk / ours", timing.ratio, 5.0, "higher", detail)]


def _authors(nltk: Any) -> Callable[[Sequence[str]], list[float]]:
    patterns = "|".join((*STRIPPING.roles, *STRIPPING.stops))

    def score(responses: Sequence[str]) -> list[float]:
        values = []
        for response in responses:
            text = re.sub(f"({patterns})", "[CUT]", response.strip("\n ")).split("[CUT]", 1)[0].strip("\n ")
            tokens = nltk.wordpunct_tokenize(text)
            trigrams = [" ".join(trigram) for trigram in nltk.ngrams(tokens, 3)]
            values.append(len(tokens) / 100 * (len(set(trigrams)) / len(trigrams) if trigrams else 1.0))
        return values

    return score


def _responses(count: int) -> list[str]:
    """Real prose, the help topics of Python as they stand, cut to the wanted number of tokens, each from another place."""
    from pydoc_data.topics import topics

    prose = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    places = [match.start() for match in re.finditer(r"\w+|[^\w\s]+", prose)]
    draw = random.Random(0)
    starts = [draw.randrange(len(places) - TOKENS) for _ in range(count)]
    return [prose[places[start] : places[start + TOKENS]] for start in starts]


def _row_wise(quick: bool) -> list[Ratio]:
    """Relevance against the whole matrix of dot products and its diagonal, and how its time grows with the batch."""
    batch, width = (512, 768) if quick else (2048, 768)
    generator = torch.Generator().manual_seed(0)
    states = {f"{side}{i}": torch.randn(width, generator=generator) for side in "qr" for i in range(batch)}
    x = torch.stack([states[f"q{i}"] for i in range(batch)])
    y = torch.stack([states[f"r{i}"] for i in range(batch)])
    repeats = 3 if quick else 9

    def whole() -> Tensor:
        return (x @ y.T).masked_select(torch.eye(batch, dtype=torch.bool))

    def rows() -> Tensor:
        return (x * y).sum(dim=1)

    torch.testing.assert_close(whole(), rows(), rtol=1e-3, atol=1e-3)
    matrix = paired(whole, rows, repeats=repeats, warmup=1)
    relevance = Relevance(lambda texts: torch.stack([states[text] for text in texts]))
    queries, answers = [f"q{i}" for i in range(batch)], [f"r{i}" for i in range(batch)]
    quarter = batch // 4
    growth = paired(
        lambda: relevance(queries, answers),
        lambda: relevance(queries[:quarter], answers[:quarter]),
        repeats=repeats,
        warmup=1,
    )
    return [
        Ratio(
            "all dot products and their diagonal / row-wise",
            matrix.ratio,
            1.0,
            "higher",
            f"batch {batch}, {width} dimensions: {_milliseconds(matrix)}",
        ),
        Ratio(
            "relevance of four times the batch / of the batch, 4 if linear and 16 if quadratic",
            growth.ratio,
            6.0,
            "lower",
            f"batch {batch} against {quarter}, an encoder that looks up: {_milliseconds(growth)}",
        ),
    ]


class _SmallTransformer(nn.Module):
    """Two layers over padded batches of word numbers, mean-pooled: what an encoder spends goes with the longest text."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [torch.tensor([1 + len(word) % 999 for word in text.split()]) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = ids != 0
        return mean_pool(self.layers(self.embedding(ids), src_key_padding_mask=~mask), mask)


def _by_length(quick: bool) -> Ratio:
    count = 64 if quick else 256
    draw = random.Random(0)
    # Lengths of answers are skewed: most are short, some very long.
    texts = [
        " ".join("x" * draw.randint(1, 9) for _ in range(min(400, 5 + int(draw.expovariate(1 / 60)))))
        for _ in range(count)
    ]
    torch.manual_seed(0)
    encoder = _SmallTransformer().eval()
    torch.testing.assert_close(
        encode(encoder, texts, 16), encode(encoder, texts, 16, by_length=False), rtol=1e-4, atol=1e-4
    )
    timing = paired(
        lambda: encode(encoder, texts, 16, by_length=False),
        lambda: encode(encoder, texts, 16),
        repeats=1 if quick else 3,
        warmup=1,
    )
    detail = f"{count} texts of 5 to 400 words, batches of 16, a transformer of two layers: {_milliseconds(timing)}"
    return Ratio("encoding in the order of the texts / by length", timing.ratio, 1.5, "higher", detail)


def _milliseconds(timing: Paired) -> str:
    return f"{timing.first * 1e3:.1f} against {timing.second * 1e3:.1f} ms"
