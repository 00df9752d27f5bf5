"""Tokenizers small enough to work out by hand which tokens a text has."""

from __future__ import annotations

from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '<e>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def letters(*, eos: str | None = "<e>", bos: str | None = None, pad: str | None = None, template: bool = True) -> Any:
    """One token a letter: the id of "a" is 0, of "b" 1, ...; then space, line end, and `<b> <e> <p> <u> <a> <s>`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<b>", "<e>", "<p>", "<u>", "<a>", "<s>"]
    vocabulary = [chr(ord("a") + place) for place in range(26)] + [" ", "\n", *special]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary.index(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token=pad, additional_special_tokens=special
    )
    made.chat_template = TEMPLATE if template else None
    return made


def merging() -> Any:
    """Byte pairs with the merges "a b" -> "ab" and "space c" -> " c": ids a 0, b 1, c 2, space 3, : 4, ab 5, " c" 6, <e> 7."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "c": 2, " ": 3, ":": 4, "ab": 5, " c": 6, "<e>": 7, "\n": 8, ".": 9}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), (" ", "c")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")


def spaced() -> Any:
    """A tokenizer that writes a space before a text of its own, as SentencePiece models do: ids _ 0, a 1, b 2, _a 3, _b 4, ab 5."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁": 0, "a": 1, "b": 2, "▁a": 3, "▁b": 4, "ab": 5, "<e>": 6, "\n": 7, ".": 8}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("a", "b")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>")
