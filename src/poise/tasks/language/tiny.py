"""A language model small enough to train from scratch in about a minute: the model of the embedded source `replies`.

It is a Llama of three layers with a byte-level BPE tokenizer and a chat template, pretrained on the texts of `replies`. It is made once,
saved in the user's cache folder, and loaded from there as any other model folder is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from poise.errors import InputError, MissingDependencyError
from poise.quantities import random_numbers
from poise.tasks.language.models import LanguageModel, cached_model, load_language_model
from poise.tasks.language.records import Text
from poise.tasks.language.replies import mean_reward, tiny_pairs, tiny_prompts, tiny_texts, true_reward
from poise.tasks.language.tokens import tokenize

__all__ = [
    "STEPS",
    "generate_replies",
    "load_tiny",
    "mean_reward",
    "tiny_folder",
    "tiny_pairs",
    "tiny_prompts",
    "tiny_texts",
    "true_reward",
]

STEPS = 1_000
"""Optimiser steps of the pretraining: about a minute on two cores."""

BATCH, TEXTS, TOKENIZER_TEXTS, VOCABULARY = 24, 16_000, 4_000, 768
"""Texts of a step, texts to learn from, texts to find the tokens in, and tokens."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_BOS, _EOS, _PAD = "<|begin|>", "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def load_tiny(*, steps: int = STEPS, **options: Any) -> LanguageModel:
    """Load the tiny model, trained first where nobody has done so yet.

    Args:
        steps: optimiser steps of its pretraining; fewer for a test.
        options: of `load_language_model`: `dtype`, `lora`, `gradient_checkpointing`.
    Raises:
        MissingDependencyError: `transformers` is not installed.

        >>> model, tokenizer = load_tiny()  # doctest: +SKIP
    """
    return load_language_model(tiny_folder(steps=steps), **options)


def tiny_folder(*, steps: int = STEPS) -> Path:
    """Return the folder of the tiny model in the user's cache, made first where it is not there.

    Its name carries a hash of the code that makes it, so that another version of the corpus or the recipe makes another model.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, and it is {steps}.")
    return cached_model(f"replies-{_recipe()}-{steps}", lambda: train_tiny(steps))


def train_tiny(steps: int = STEPS) -> LanguageModel:
    """Train the tiny model from scratch."""
    from poise.streams import Stream
    from poise.training import fit
    from poise.weights.schedule import cosine

    texts = tiny_texts(TEXTS, seed=0)
    tokenizer = tiny_tokenizer()
    with random_numbers(0):
        model = _untrained(tokenizer)
    stream = Stream(tokenize(texts, tokenizer), batch_size=BATCH)
    fit(
        model,
        "sft",
        stream,
        solver="adamw",
        lr=3e-3,
        lr_schedule=cosine(1.0, 0.05),
        clip=1.0,
        steps=steps,
        device="cpu",
    )
    return LanguageModel(model.eval(), tokenizer)


def tiny_tokenizer() -> Any:
    """Train the tokenizer: byte pairs, so that any text has tokens, and the words of the corpus one each."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingDependencyError("transformers", "lm", "The embedded source replies") from error
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_BOS, _EOS, _PAD, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = tiny_texts(TOKENIZER_TEXTS, seed=0)
    made.train_from_iterator((_written(text) for r in texts for text in (r.prompt, r.answers["response"])), trainer)
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=made,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        additional_special_tokens=list(_ROLES),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def generate_replies(
    language_model: LanguageModel,
    prompts: Sequence[Text],
    *,
    temperature: float = 1.0,
    most: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[str]:
    """Answer prompts by sampling, or by the likeliest token at each step where `temperature` is 0.

    Args:
        language_model: model and tokenizer.
        prompts: chat messages or strings.
        temperature: of the sampling, 0 or more.
        most: tokens of a reply at most.
        batch_size: prompts at a time.
        seed: of the sampling.
    Returns:
        The replies' texts, in order.

        >>> generate_replies(load_tiny(), [[{"role": "user", "content": "Count from 2 to 6."}]])  # doctest: +SKIP
    """
    from poise.tasks.language.records import make_records

    model: Any = language_model.model
    tokenizer = language_model.tokenizer
    data = tokenize(make_records([{"prompt": prompt} for prompt in prompts]), tokenizer, padding="left")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    replies: list[str] = []
    with torch.no_grad(), random_numbers(seed, device):
        for start in range(0, len(data), batch_size):
            items = data.collate([data[at] for at in range(start, min(start + batch_size, len(data)))])
            ids = items["prompt_ids"].to(device)
            out = model.generate(
                input_ids=ids,
                attention_mask=items["prompt_attention"].to(device),
                max_new_tokens=most,
                pad_token_id=data.pad_id,
                **sampling,
            )
            replies += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    model.train(training)
    return replies


def _untrained(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _written(text: Text) -> str:
    return text if isinstance(text, str) else str(text[-1]["content"])


def _recipe() -> str:
    digest = hashlib.sha256()
    for name in ("replies.py", "tiny.py"):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]
