"""Encoders of texts: callables from a list of strings to float [n, d], none of them normalised and none trained further.

    encoder = TfidfEncoder(dimensions=128).fit(corpus)        # scikit-learn, seconds, no weights to fetch
    encoder = MeanPooledEncoder.load("./contriever")          # a folder with a transformers model
    encoder = SentenceEncoder("./all-MiniLM-L6-v2")           # a folder of sentence-transformers
    states = encode(encoder, texts)                           # each text once, batches of like lengths

Any callable of that form will do in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.errors import InputError, MissingDependencyError, QuantityError, StateError

__all__ = ["Encoder", "MeanPooledEncoder", "SentenceEncoder", "TfidfEncoder", "encode", "mean_pool"]

Encoder = Callable[[list[str]], Any]
"""A list of n strings in, float [n, d] out: a tensor or anything that `torch.as_tensor` reads."""


def encode(encoder: Encoder, texts: Sequence[str], batch_size: int = 64, by_length: bool = True) -> Tensor:
    """Encode every different text once, in batches of texts of like length, and give the states in the order of the texts.

    A batch is padded to its longest text, so batches in order of length pad least.

    Args:
        encoder: any callable list[str] -> float [n, d].
        texts: n strings.
        batch_size: texts handed to the encoder at once, >= 1.
        by_length: False leaves the texts in their order.

    Returns: float64 [n, d], without gradient, where the encoder left it.

    Raises:
        QuantityError: the encoder gave another shape than [n, d], or two batches of different d.

    Example:
        >>> encode(lambda batch: [[float(len(text))] for text in batch], ["aa", "a", "aa"]).flatten().tolist()
        [2.0, 1.0, 2.0]
    """
    if batch_size < 1:
        raise InputError(f"encode: batch_size must be at least 1, and it is {batch_size}.")
    if not texts:
        raise InputError("encode: there is no text to encode.")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    different = sorted(place, key=len) if by_length else list(place)
    batches: list[Tensor] = []
    for start in range(0, len(different), batch_size):
        batch = different[start : start + batch_size]
        states = _states_of(encoder, batch)
        if batches and states.shape[1] != batches[0].shape[1]:
            raise QuantityError(
                f"encoder: one batch came back with {batches[0].shape[1]} dimensions and another with {states.shape[1]}; "
                "dot products need one dimension for every text."
            )
        batches.append(states)
    row = {text: i for i, text in enumerate(different)}
    return torch.cat(batches)[[row[text] for text in texts]]


def _states_of(encoder: Encoder, batch: list[str]) -> Tensor:
    with torch.no_grad():
        states = torch.as_tensor(encoder(batch), dtype=torch.float64)
    if states.ndim != 2 or states.shape[0] != len(batch):
        raise QuantityError(
            f"encoder: expected float [{len(batch)}, d] for {len(batch)} texts, and it gave {list(states.shape)}."
        )
    return states.detach()


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Average token states over the tokens that the mask keeps; padding has no part, whatever stands there.

    sum_t m_t h_t / sum_t m_t

    Args:
        states: float [batch, time, width].
        mask: bool or int [batch, time], true on tokens.

    Returns: float [batch, width]; a row without tokens gives 0.

    Example:
        >>> mean_pool(torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    kept = mask.bool()
    total = states.masked_fill(~kept[..., None], 0.0).sum(dim=1)
    return total / kept.sum(dim=1, keepdim=True).clamp(min=1).to(states.dtype)


class TfidfEncoder:
    """TF-IDF of words, projected on the leading singular directions of a corpus: a retriever without a language model.

    Unnormalised: the TF-IDF row has length 1, and its projection is the shorter the less of it the corpus explains.

    Args:
        dimensions: singular directions kept; fewer where the corpus has fewer words or texts.
        sublinear: 1 + log(count) in place of the count.
        stop_words: "english" leaves out articles and the like. With them, one common word is a text that the leading
            directions explain whole, and so close to everything: a shortcut for a policy that is trained on relevance.
        seed: of the randomised decomposition.

    Example:
        >>> encoder = TfidfEncoder(dimensions=2).fit(["a red cat", "a red dog", "two blue birds"])
        >>> encoder(["red cat", "blue"]).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, dimensions: int = 128, sublinear: bool = True, stop_words: str | None = None, seed: int = 0
    ) -> None:
        if dimensions < 1:
            raise InputError(f"TfidfEncoder: dimensions must be at least 1, and it is {dimensions}.")
        self.dimensions, self.sublinear, self.stop_words, self.seed = dimensions, sublinear, stop_words, seed
        self.vectorizer: Any = None
        self.directions: Any = None

    def fit(self, texts: Sequence[str]) -> TfidfEncoder:
        """Learn vocabulary, document frequencies and directions from a corpus, and return the encoder."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(
            sublinear_tf=self.sublinear, stop_words=self.stop_words, token_pattern=r"(?u)\b\w+\b"
        )
        counts = vectorizer.fit_transform(list(texts))
        most = min(counts.shape) - 1
        if most < 1:
            raise InputError(f"TfidfEncoder: {counts.shape[0]} texts with {counts.shape[1]} words are no corpus.")
        self.vectorizer = vectorizer
        self.directions = TruncatedSVD(min(self.dimensions, most), random_state=self.seed).fit(counts)
        return self

    def __call__(self, texts: list[str]) -> Tensor:
        if self.vectorizer is None:
            raise StateError("TfidfEncoder: fit it to a corpus first, `encoder.fit(texts)`.")
        return torch.from_numpy(self.directions.transform(self.vectorizer.transform(texts)))


class MeanPooledEncoder:
    """A transformers model as a retriever: token states averaged over the attention mask, not normalised (Contriever).

    Long texts lose their beginning, since the end of an answer says most about it.

    Args:
        model: gives `last_hidden_state` float [batch, time, width] for `input_ids` and `attention_mask`.
        tokenizer: a tokenizer of transformers with a padding token.
        max_length: tokens kept.

    Source: naver-ai/rethinking-proxy-reward, reward_model.py; facebook/contriever.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 512) -> None:
        if max_length < 1:
            raise InputError(f"MeanPooledEncoder: max_length must be at least 1, and it is {max_length}.")
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length
        tokenizer.truncation_side = "left"

    @classmethod
    def load(cls, folder: str, max_length: int = 512, device: str = "cpu") -> MeanPooledEncoder:
        """Read model and tokenizer from a folder."""
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingDependencyError("transformers", "lm", "MeanPooledEncoder") from error
        return cls(AutoModel.from_pretrained(folder).to(device), AutoTokenizer.from_pretrained(folder), max_length)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding="longest", return_tensors="pt"
        ).to(self.model.device)
        return mean_pool(self.model(**tokens).last_hidden_state, tokens["attention_mask"])


class SentenceEncoder:
    """A sentence-transformers folder as an encoder.

    Args:
        folder: where the model lies.
        normalize: states of length 1, for models that were trained so. Off by default: relevance is a plain dot product.
        device: where it runs; sentence-transformers chooses by default.
    """

    def __init__(self, folder: str, normalize: bool = False, device: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise MissingDependencyError("sentence-transformers", "retrieval", "SentenceEncoder") from error
        self.model, self.normalize = SentenceTransformer(folder, device=device), normalize

    def __call__(self, texts: list[str]) -> Tensor:
        states: Tensor = self.model.encode(
            texts, convert_to_tensor=True, normalize_embeddings=self.normalize, show_progress_bar=False
        )
        return states
