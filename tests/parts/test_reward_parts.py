"""What rewards are made of: encoders, the types of queries, and a reward model of pairs."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn import functional

from poise.errors import InputError, MissingDependencyError, QuantityError, StateError
from poise.parts.bradley_terry import BradleyTerry
from poise.parts.query_types import QueryTypes, RandomTypes
from poise.parts.text_encoders import MeanPooledEncoder, SentenceEncoder, TfidfEncoder, encode, mean_pool

TEXTS = ["a red cat sat", "a red dog ran away", "two blue birds fly", "birds fly high", "cats and dogs"]


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("filler", [0.0, 1e6, float("nan")])
def test_mean_pooling_ignores_padding_whatever_stands_there(padding: int, filler: float) -> None:
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.cat([states, torch.full((2, padding, 4), filler, dtype=torch.float64)], dim=1)
    mask = torch.cat([torch.ones(2, 3), torch.zeros(2, padding)], dim=1)
    torch.testing.assert_close(mean_pool(padded, mask), states.mean(dim=1), rtol=0, atol=1e-15)


def test_a_row_without_tokens_pools_to_zero() -> None:
    assert mean_pool(torch.ones(1, 2, 3), torch.zeros(1, 2)).abs().sum() == 0


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_come_back_in_the_order_of_the_texts(by_length: bool, batch_size: int) -> None:
    seen: list[int] = []

    def lengths(batch: list[str]) -> list[list[float]]:
        seen.extend(len(text) for text in batch)
        return [[float(len(text))] for text in batch]

    got = encode(lengths, TEXTS + TEXTS[:2], batch_size, by_length)
    assert got.flatten().tolist() == [float(len(text)) for text in TEXTS + TEXTS[:2]]
    assert len(seen) == len(TEXTS)  # each text once
    assert not by_length or seen == sorted(seen)


def test_encoding_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="batch_size"):
        encode(lambda batch: [[1.0]], ["a"], 0)
    with pytest.raises(InputError, match="no text"):
        encode(lambda batch: [[1.0]], [])
    with pytest.raises(QuantityError, match=r"expected float \[2, d\]"):
        encode(lambda batch: [[1.0]], ["a", "b"])


def test_the_built_in_encoder_is_linear_in_tfidf_and_not_normalised() -> None:
    encoder = TfidfEncoder(2).fit(TEXTS)
    states = encoder(TEXTS)
    assert states.shape == (5, 2)
    lengths = states.norm(dim=1)
    assert bool((lengths <= 1 + 1e-9).all())
    assert float(lengths.std()) > 0.01
    assert float(encoder(["of unknown tongues"]).abs().sum()) == 0
    with pytest.raises(StateError, match="fit it to a corpus"):
        TfidfEncoder()(TEXTS)
    with pytest.raises(InputError, match="dimensions"):
        TfidfEncoder(0)


def test_a_transformers_model_gives_one_state_for_a_text_with_any_neighbours() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra 'lm')")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra 'lm')")
    every = sorted({word for text in TEXTS for word in text.split()})
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate(every)}}, "[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(every) + 2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    encoder = MeanPooledEncoder(transformers.BertModel(config), tokenizer, max_length=3)
    together, alone = encoder(TEXTS), torch.cat([encoder([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    # the end of a text is kept
    torch.testing.assert_close(encoder(["a red dog ran away"]), encoder(["dog ran away"]), rtol=1e-5, atol=1e-6)
    assert not together.requires_grad


def test_a_sentence_transformers_folder_is_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, folder: str, device: str | None = None) -> None:
            self.folder = folder

        def encode(self, texts: list[str], **options: object) -> torch.Tensor:
            assert options["normalize_embeddings"] is False
            return torch.ones(len(texts), 2)

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Fake))
    assert SentenceEncoder("folder")(["a", "b"]).shape == (2, 2)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match=r"poise\[retrieval\]"):
        SentenceEncoder("folder")


def test_query_types_are_learned_from_labels() -> None:
    queries = [f"{how} {what}" for what in "abcdefgh" for how in ("write about", "how many")]
    labels = ["open", "closed"] * 8
    kind = QueryTypes().fit(queries, labels)
    assert kind(["write about z", "how many z"]) == ["open", "closed"]
    assert kind.agreement(queries, labels) == 1.0
    assert kind.types == ("closed", "open")
    with pytest.raises(StateError, match="fit it"):
        QueryTypes()(["a"])
    with pytest.raises(InputError, match="two types"):
        QueryTypes().fit(["a"], ["open"])
    with pytest.raises(InputError, match="2 queries came with 1 types"):
        QueryTypes().fit(["a", "b"], ["open"])
    with pytest.raises(InputError, match="strength"):
        QueryTypes(0)


def test_random_types_keep_to_their_shares_and_stay_with_the_query() -> None:
    queries = [f"query number {i}" for i in range(4000)]
    kind = RandomTypes({"open": 3, "closed": 1}, seed=5)
    drawn = kind(queries)
    assert drawn == kind(queries)
    # four standard deviations of a binomial share of 4,000
    assert drawn.count("open") / 4000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)
    other = RandomTypes({"open": 3, "closed": 1}, seed=6)(queries)
    # independent of another seed: P(both open) = 0.75^2
    both = sum(a == b == "open" for a, b in zip(drawn, other, strict=True)) / 4000
    assert both == pytest.approx(0.5625, abs=4 * (0.5625 * 0.4375 / 4000) ** 0.5)
    with pytest.raises(InputError, match="positive sum"):
        RandomTypes({})


def test_the_reward_model_stands_at_the_optimum_of_the_bradley_terry_likelihood() -> None:
    encoder = TfidfEncoder(3).fit(TEXTS)
    queries, chosen, rejected = TEXTS[:3], ["red cat", "dog ran", "blue birds"], ["birds", "cats", "a red dog"]
    model = BradleyTerry(encoder, l2=0.1).fit(queries, chosen, rejected)
    assert model.weight is not None
    assert model.scale is not None
    w = model.weight.clone().requires_grad_()
    difference = (model._features(queries, chosen) - model._features(queries, rejected)) * model.scale
    value = functional.softplus(-difference @ w).mean() + 0.05 * w.square().sum()
    (gradient,) = torch.autograd.grad(value, w)
    assert float(gradient.abs().max()) < 1e-8
    assert model.accuracy(queries, chosen, rejected) == 1.0
    margin = model(queries, chosen) - model(queries, rejected)
    torch.testing.assert_close(margin, difference @ model.weight)


def test_exchanging_the_pairs_turns_the_reward_model_round() -> None:
    encoder = TfidfEncoder(3).fit(TEXTS)
    forth = BradleyTerry(encoder).fit(TEXTS[:2], TEXTS[2:4], TEXTS[:2])
    back = BradleyTerry(encoder).fit(TEXTS[:2], TEXTS[:2], TEXTS[2:4])
    torch.testing.assert_close(forth.weight, -back.weight)
    with pytest.raises(StateError, match="fit it to pairs"):
        BradleyTerry(encoder)(["a"], ["b"])
    with pytest.raises(InputError, match="as many queries"):
        BradleyTerry(encoder).fit(["a"], [], [])
    with pytest.raises(InputError, match="l2"):
        BradleyTerry(encoder, l2=0)
