"""Texts, models and tokens for the alignment of language models."""

from __future__ import annotations

from typing import Any

from poise import lazy

_HOME = {
    "LanguageModel": "models",
    "Record": "records",
    "Records": "records",
    "TokenizedAnswers": "tokens",
    "TokenizedPairs": "tokens",
    "TokenizedPrompts": "tokens",
    "TokenizedRecords": "tokens",
    "add_lora": "models",
    "check_trainable": "models",
    "check_vocabularies": "models",
    "generate_replies": "tiny",
    "load_language_model": "models",
    "load_tiny": "tiny",
    "make_records": "records",
    "pad": "tokens",
    "store_reference": "reference",
    "read_records": "records",
    "save_language_model": "models",
    "tiny_folder": "tiny",
    "tiny_pairs": "replies",
    "tiny_prompts": "replies",
    "tiny_texts": "replies",
    "tokenize": "tokens",
    "true_reward": "replies",
    "write_jsonl": "records",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOME, name)
