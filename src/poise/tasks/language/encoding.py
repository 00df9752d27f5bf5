"""From a prompt and its answers to tokens, with an exact boundary between them.

The rules, all of them here:

- The prompt's tokens are those that the model sees when it has to answer: the prompt tokenised alone. The answer's tokens are the rest of
  the tokenised whole. Where the tokenizer would merge the end of the prompt with the beginning of the answer, the answer is tokenised
  on its own, so that no token holds a part of both.
- A sequence begins with BOS once, where the tokenizer writes one; a text without a prompt always has a token before it, BOS or else EOS,
  because the model gives no probability to a first token.
- An answer ends with EOS once, and EOS belongs to the answer. What a chat template writes after its EOS (a line end) is left out.
- Chat messages are rendered by the tokenizer's own template; the answer is what the template adds to the rendered prompt. Turns of
  others inside an answer are tokens that the model reads and does not have to give.
- Padding is known by length, never by the pad token, so EOS can serve as the pad token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from poise.errors import InputError
from poise.tasks.language.files import Unusable
from poise.tasks.language.records import Message, Text

_BATCH = 512
# Characters that tokenizers hardly ever merge with what follows; the empty one always serves.
_ANCHORS = ("\n", ".", "")


@dataclass(frozen=True, slots=True)
class Rendered:
    """One answer as text behind its prompt.

    Attributes:
        prompt: the text of the prompt.
        answer: the text behind it.
        own: the ranges of characters of `answer` that the model has to give; None means all of it.
        shift: where the content of the answer begins in `answer`, to which the spans of a record refer.
    """

    prompt: str
    answer: str
    own: tuple[tuple[int, int], ...] | None = None
    shift: int = 0


@dataclass(slots=True)
class Encoded:
    """One answer as tokens: `ids` with EOS at the end, and the characters of the answer that each token covers, where asked for."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


class Encoder:
    """A tokenizer and the rules of the module.

    Args:
        tokenizer: a `transformers` tokenizer.

    Raises:
        InputError: the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"The tokenizer of {self.name} has no EOS token, so an answer would have no end. Set one that the model knows: "
                "tokenizer.eos_token = '...'."
            )
        self.eos = int(tokenizer.eos_token_id)
        self.bos = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._blank: dict[int, bool] = {}
        self.first = self.eos if self.bos is None else self.bos
        self.adds_bos = self.bos is not None and list(tokenizer("a")["input_ids"])[:1] == [self.bos]

    def fingerprint(self) -> str:
        """sha256 over all that decides which tokens a text gets."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        rest = [self.tokenizer.chat_template, self.eos, self.bos, self.pad, self.adds_bos]
        return hashlib.sha256((state + json.dumps(rest, sort_keys=True, default=str)).encode()).hexdigest()

    def render(self, prompt: Text, answer: Text) -> Rendered:
        """Write prompt and answer as text, chat messages by the template.

        Raises:
            Unusable: the template refuses these messages, or does not keep the prompt as it was.
            InputError: there is no template.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            return Rendered(prompt, answer)
        assert not isinstance(answer, str)
        before = self.render_prompt(prompt)
        whole = self._template([*prompt, *answer], False)
        text = self._behind(before, whole)
        content = answer[0]["content"]
        shift = text.find(content)
        if shift < 0:  # Templates may strip the content.
            shift = text.find(content.strip()) - (len(content) - len(content.lstrip()))
        return Rendered(before, text, self._own_turns(prompt, answer, before) if len(answer) > 1 else None, shift)

    def render_prompt(self, prompt: Text) -> str:
        """Write a prompt as the text after which the model answers."""
        if isinstance(prompt, str):
            return prompt
        if prompt[-1]["role"] == "assistant":
            raise Unusable("the prompt ends with a turn of the assistant; it must end with what is to be answered")
        return self._template(prompt, True)

    def _own_turns(self, prompt: list[Message], answer: list[Message], before: str) -> tuple[tuple[int, int], ...]:
        turns = []
        for number, message in enumerate(answer):
            if message["role"] == "assistant":
                start = self._behind(before, self._template([*prompt, *answer[:number]], True))
                end = self._behind(before, self._template([*prompt, *answer[: number + 1]], False))
                # A line end after the mark that ends a turn is the template's, not the model's.
                turns.append((len(start), len(end.rstrip())))
        return tuple(turns)

    def _behind(self, before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise Unusable(
                f"the chat template of {self.name} writes the prompt in another way once an answer follows, so the two have no boundary"
            )
        return whole[len(before) :]

    def _template(self, messages: list[Message], generation: bool) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                f"The records hold chat messages, and the tokenizer of {self.name} has no chat template. Give a model whose "
                "tokenizer has one, set tokenizer.chat_template, or give prompt and answers as plain strings."
            )
        from jinja2.exceptions import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            raise Unusable(f"the chat template of {self.name} refuses these messages ({error})") from error
        return str(text)

    def prompts(self, texts: Sequence[str], *, chat: bool) -> dict[str, list[int]]:
        """Tokenise each different prompt once; the result has at least one token each, and BOS once."""
        different = list(dict.fromkeys(texts))
        return {
            text: self._begun(ids, chat)
            for text, (ids, _) in zip(different, self._batches(different, False), strict=True)
        }

    def _begun(self, ids: list[int], chat: bool) -> list[int]:
        start = 0
        while self.bos is not None and start < len(ids) and ids[start] == self.bos:
            start += 1
        # A template decides itself whether a conversation begins with BOS; plain text begins as the tokenizer would begin it.
        begins = start > 0 or (self.adds_bos and not chat) or start == len(ids)
        return [self.first, *ids[start:]] if begins else ids[start:]

    def answers(self, rendered: Sequence[Rendered], *, offsets: bool) -> list[Encoded]:
        """Tokenise answers behind their prompts.

        Args:
            rendered: prompts and answers as text.
            offsets: also give the characters of each token.
        Raises:
            InputError: offsets from a tokenizer that does not know them.
        """
        offsets = offsets or any(one.own is not None for one in rendered)
        if offsets and not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"Spans and conversations of several turns need to know which characters a token covers, and the tokenizer of {self.name} "
                "cannot say. Use a fast tokenizer."
            )
        different = list(dict.fromkeys(one.prompt for one in rendered))
        starts = {text: ids for text, (ids, _) in zip(different, self._batches(different, False), strict=True)}
        wholes = self._batches([one.prompt + one.answer for one in rendered], offsets)
        found: list[Encoded | None] = []
        for one, (ids, places) in zip(rendered, wholes, strict=True):
            start = starts[one.prompt]
            found.append(self._rest(ids, places, len(start), len(one.prompt)) if ids[: len(start)] == start else None)
        self._alone(rendered, found, offsets)
        return [self._ended(one) for one in found if one is not None]

    def _alone(self, rendered: Sequence[Rendered], found: list[Encoded | None], offsets: bool) -> None:
        """Tokenise the answers that would merge with their prompts behind an anchor instead, which is cut off again.

        Behind an anchor, because some tokenizers write a space before a text of its own.
        """
        for anchor in _ANCHORS:
            missing = [at for at, one in enumerate(found) if one is None]
            if not missing:
                return
            start = next(self._batches([anchor], False))[0] if anchor else []
            wholes = self._batches([anchor + rendered[at].answer for at in missing], offsets)
            for at, (ids, places) in zip(missing, wholes, strict=True):
                if ids[: len(start)] == start:
                    found[at] = self._rest(ids, places, len(start), len(anchor))

    @staticmethod
    def _rest(ids: list[int], places: Any, tokens: int, characters: int) -> Encoded:
        moved = places and [(max(a - characters, 0), max(b - characters, 0)) for a, b in places[tokens:]]
        return Encoded(ids[tokens:], moved)

    def _ended(self, one: Encoded) -> Encoded:
        """End an answer with EOS, once."""
        ids, places = one.ids, one.offsets
        end = at = len(ids)
        while at and (ids[at - 1] == self.eos or self._is_blank(ids[at - 1])):
            at -= 1
            end = at if ids[at] == self.eos else end
        at = places[end - 1][1] if places and end else 0
        # Where the text itself ends with EOS, that token keeps its characters.
        closing = places[end] if places and end < len(places) else (at, at)
        return Encoded([*ids[:end], self.eos], None if places is None else [*places[:end], closing])

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token], skip_special_tokens=False).strip()
        return self._blank[token]

    def _batches(self, texts: Sequence[str], offsets: bool) -> Iterator[tuple[list[int], Any]]:
        for start in range(0, len(texts), _BATCH):
            batch = self.tokenizer(
                list(texts[start : start + _BATCH]),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=offsets,
                truncation=False,
                padding=False,
                verbose=False,
            )
            yield from zip(
                batch["input_ids"],
                batch["offset_mapping"] if offsets else [None] * len(batch["input_ids"]),
                strict=True,
            )
