"""Token rewards that a frozen model gives itself: what it would write in a better answer rather than in a worse one.

    r_t = sigma(log pi(y_t | better, y_<t) - log pi(y_t | worse, y_<t)) - 1/2                          in (-1/2, 1/2)

`better` and `worse` are prompts that hold the question and the answer and ask for an answer that is better, or worse; after both the
same tokens are scored. The rewards are computed once, kept on disk, and are constants in training:

    chosen = contrastive_token_rewards(model, tokenizer, prompts, chosen_ids, cache="rewards")
    data = with_token_rewards(pairs, chosen=chosen, rejected=rejected)
    poise.fit(model, "t_reg(alpha=0.25, beta=0.1)", data, ...)

Rewards may come from elsewhere too: `implied_token_rewards` of an earlier DPO model, or any numbers, one for each answer token.

Source: arXiv:2412.02685, section 3. The texts of the prompts follow its description, not its wording.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.checkpoint import write_whole
from poise.errors import InputError, MissingDependencyError, QuantityError
from poise.problem import ModelView
from poise.quantities import Quantities
from poise.readouts.language import Language, Reference

__all__ = [
    "BETTER",
    "WORSE",
    "TokenRewarded",
    "contrastive_token_rewards",
    "implied_token_rewards",
    "template_hash",
    "token_reward_column",
    "with_token_rewards",
]

_SHOWN = "Here is a question and an answer to it.\n\nQuestion:\n{prompt}\n\nAnswer:\n{answer}\n\n"
# Question and answer come first, so that both prompts begin alike up to the instruction.
BETTER = (
    _SHOWN + "Revise the answer into a better one: more helpful, correct, coherent and concise.\n\nRevised answer:\n"
)
WORSE = (
    _SHOWN + "Revise the answer into a worse one: unhelpful, incorrect, incoherent and verbose.\n\nRevised answer:\n"
)

Text = str | Tensor
Progress = Callable[[float, str], None]
# Raise it when the same inputs give other rewards than before.
_FORMAT = 1


# ---- contrastive prompts --------------------------------------------------------------------------------------------


def contrastive_token_rewards(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    better_template: str = BETTER,
    worse_template: str = WORSE,
    *,
    clip: float = 0.5,
    chat: bool | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Score every token of answers by how much likelier it is after a prompt that asks for better than after one that asks for worse.

    Args:
        model: a transformers causal language model, run as it is, without gradient; usually the reference.
        tokenizer: its tokenizer.
        prompts: texts, or ids int64 [time] that are decoded for the templates.
        answers: ids int64 [time], the tokens that training will see, end of sequence included (`chosen_ids[chosen_mask]`); or texts,
            which are tokenised on their own and get an end of sequence.
        better_template, worse_template: texts with `{prompt}` and `{answer}`; either may be left out.
        clip: largest size of a reward, in (0, 0.5]; 0.5 cuts nothing.
        chat: put the filled template into the tokenizer's chat template as the user's message; by default where there is one.
        max_length: most tokens of prompt and answer; a longer prompt loses tokens from its left, the answer none.
        batch_size: sequences at once; each answer makes two.
        cache: a folder; the same model, templates, prompts and answers are then scored once.
        progress: called with the share that is done.

    Returns: float32 [tokens] for each answer, on the CPU.

    Raises:
        InputError: lists of different lengths, an empty answer or prompt, an answer longer than `max_length`, `clip` out of range.
        QuantityError: the tokens behind the two prompts are not those of the answer, or a reward is not finite.

    Example: see `docs/papers/61-t-reg.md`.

    Source: arXiv:2412.02685, section 3.
    """
    if len(prompts) != len(answers):
        raise InputError(
            f"Token rewards need a prompt for each answer: {len(prompts)} prompts, {len(answers)} answers."
        )
    if not 0 < clip <= 0.5:
        raise InputError(f"clip is the largest size of a token reward, in (0, 0.5], and it is {clip}.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, and it is {batch_size}.")
    chat = getattr(tokenizer, "chat_template", None) is not None if chat is None else chat
    ids = [_answer_ids(tokenizer, answer, place) for place, answer in enumerate(answers)]
    sides = [
        [
            _prompt_ids(tokenizer, template, prompt, answer, chat)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for template in (better_template, worse_template)
    ]
    sides = [[_cut(p, len(a), max_length) for p, a in zip(side, ids, strict=True)] for side in sides]
    file = None if cache is None else _cache_file(Path(cache), model, sides, ids, clip)
    if file is not None and file.is_file():
        return _read(file, ids)
    scored = _score(model, tokenizer, [*sides[0], *sides[1]], [*ids, *ids], batch_size, progress)
    rewards = [_reward(*pair, clip) for pair in zip(scored[: len(ids)], scored[len(ids) :], strict=True)]
    if file is not None:
        _write(file, rewards, template_hash(better_template, worse_template))
    return rewards


def template_hash(better_template: str, worse_template: str) -> str:
    """Return what tells two pairs of templates apart; it stands in the metadata of every cached file."""
    return hashlib.sha256(json.dumps([better_template, worse_template]).encode()).hexdigest()


def _reward(better: Tensor, worse: Tensor, clip: float) -> Tensor:
    # tanh(x/2)/2 is sigma(x) - 1/2, and exactly odd: swapping the prompts negates it.
    return (0.5 * torch.tanh((better - worse) / 2)).clamp(-clip, clip)


def _answer_ids(tokenizer: Any, answer: Text, place: int) -> Tensor:
    if isinstance(answer, str):
        found = tokenizer(answer, add_special_tokens=False).input_ids
        answer = torch.tensor([*found, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else found)
    if answer.ndim != 1 or not len(answer):
        raise InputError(
            f"An answer is ids int64 [time] with at least one token, and answer {place} has the form {list(answer.shape)}."
        )
    return answer.detach().cpu().long()


def _prompt_ids(tokenizer: Any, template: str, prompt: Text, answer: Text, chat: bool) -> list[int]:
    texts = {name: _text(tokenizer, text) for name, text in (("prompt", prompt), ("answer", answer))}
    # In one pass, so that braces within the texts stay what they are.
    filled = re.sub(r"\{(prompt|answer)\}", lambda match: texts[match[1]], template)
    if chat:
        message = [{"role": "user", "content": filled}]
        filled = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(filled, add_special_tokens=not chat).input_ids
    if not chat and len(ids) and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # the answer goes on here
    if not ids:
        raise InputError(
            "A prompt of no tokens has nothing to predict an answer's first token from; give the templates some text."
        )
    return ids


def _text(tokenizer: Any, text: Text) -> str:
    if isinstance(text, str):
        return text
    decoded: str = tokenizer.decode(text, skip_special_tokens=True)
    return decoded


def _cut(prompt: list[int], answer: int, max_length: int | None) -> list[int]:
    if max_length is None or len(prompt) + answer <= max_length:
        return prompt
    room = max_length - answer
    if room < 1:
        raise InputError(
            f"An answer has {answer} tokens, and max_length={max_length} leaves no room for a prompt before it. Token rewards need every "
            "token of an answer: raise max_length, or leave the answer out."
        )
    return prompt[-room:]


def _score(
    model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], answers: Sequence[Tensor], batch_size: int,
    progress: Progress | None,
) -> list[Tensor]:  # fmt: skip
    """Return the log-probabilities float32 [tokens] of each answer behind its prompt, through the language readout."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if getattr(tokenizer, "pad_token_id", None) is not None else 0
    lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    found: dict[int, Tensor] = {}
    was = model.training
    model.eval()
    try:
        # Answers of like length together: less padding, the same numbers.
        for rows in torch.split(lengths.argsort(descending=True, stable=True), batch_size):
            picked = rows.tolist()
            batch = _batch([prompts[i] for i in picked], [answers[i] for i in picked], pad, device)
            with torch.no_grad():
                logps = Language()(ModelView(model), Quantities(batch), frozenset({"response_logps"}))["response_logps"]
            found.update(zip(picked, _on_answers(logps, batch, [answers[i] for i in picked]), strict=True))
            if progress is not None:
                progress(len(found) / len(prompts), "token rewards")
    finally:
        model.train(was)
    return [found[i] for i in range(len(prompts))]


def _batch(
    prompts: Sequence[list[int]], answers: Sequence[Tensor], pad: int, device: torch.device
) -> dict[str, Tensor]:
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), longest), pad)
    mask, attention = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        begin, end = len(prompt), len(prompt) + len(answer)
        ids[row, :begin], ids[row, begin:end] = torch.tensor(prompt), answer
        mask[row, begin:end], attention[row, :end] = True, True
    named = {"response_ids": ids, "response_mask": mask, "response_attention": attention}
    return {name: value.to(device) for name, value in named.items()}


def _on_answers(logps: Tensor, batch: Mapping[str, Tensor], answers: Sequence[Tensor]) -> Iterator[Tensor]:
    """Take the answers' tokens out of `[batch, time]`, and make sure that they are the answers' tokens."""
    rows = zip(logps.float().cpu(), batch["response_ids"].cpu(), batch["response_mask"].cpu(), answers, strict=True)
    for row, ids, mask, answer in rows:
        if not torch.equal(ids[mask], answer):
            raise QuantityError(
                "The tokens that were scored are not those of the answer, so their rewards would be another's."
            )
        if not bool(row[mask].isfinite().all()):
            raise QuantityError(
                "The model gives a token of an answer a log-probability that is not finite, so it has no reward."
            )
        yield row[mask].clone()


# ---- the cache ------------------------------------------------------------------------------------------------------


def _cache_file(
    folder: Path, model: nn.Module, sides: Sequence[Sequence[list[int]]], ids: Sequence[Tensor], clip: float
) -> Path:
    """Return where these rewards lie: a name made of the model, every token that is read, and the settings."""
    content = hashlib.sha256(repr((_FORMAT, clip)).encode())
    for name, tensor in model.state_dict().items():
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].cpu().contiguous()
        content.update(f"{name} {tuple(tensor.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
    for side in sides:
        content.update(json.dumps(side).encode())
    content.update(json.dumps([answer.tolist() for answer in ids]).encode())
    return folder / f"token-rewards-{content.hexdigest()[:32]}.safetensors"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("safetensors", "lm", "The cache of token rewards") from error
    return safetensors


def _write(file: Path, rewards: Sequence[Tensor], templates: str) -> None:
    tensors = {
        "rewards": torch.cat(list(rewards)) if rewards else torch.zeros(0),
        "lengths": torch.tensor([len(r) for r in rewards], dtype=torch.int64),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, _safetensors().torch.save(tensors, {"templates": templates, "format": str(_FORMAT)}))


def _read(file: Path, ids: Sequence[Tensor]) -> list[Tensor]:
    stored = _safetensors().torch.load(file.read_bytes())
    lengths = stored["lengths"].tolist()
    if lengths != [len(answer) for answer in ids] or sum(lengths) != len(stored["rewards"]):
        raise InputError(f"{file} does not hold rewards of these answers; delete it, and they are computed again.")
    return list(torch.split(stored["rewards"], lengths))


# ---- other sources --------------------------------------------------------------------------------------------------


def implied_token_rewards(
    model: nn.Module,
    reference: Reference | None,
    data: Any,
    side: str = "chosen",
    *,
    beta: float = 0.1,
    squash: bool = True,
    readout: Callable[[Any], Any] = Language,
    batch_size: int = 16,
) -> list[Tensor]:
    """Return the token rewards that a model trained by preferences implies: beta log pi(y_t)/pi_ref(y_t).

    Args:
        model: trained before, by DPO for instance.
        reference: what it was trained from; None where the data bring `reference_<side>_logps`.
        data: tensors `[batch, time]` by name, or a data set with `collate`, as for `poise.fit`.
        side: "chosen", "rejected" or "response".
        beta: of that training.
        squash: sigma(.) - 1/2, within (-1/2, 1/2) like contrastive rewards; False leaves the log-ratios.
        readout: `readout(reference)` makes the readout.
        batch_size: answers at once.

    Returns: float32 [tokens] for each answer, on the CPU.
    """
    names, found = frozenset({f"{side}_logps", f"reference_{side}_logps"}), []
    was, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(data, batch_size, side):
                moved = {k: v.to(device) for k, v in batch.items()}
                read = readout(reference)(ModelView(model), Quantities(moved), names)
                values = beta * (read[f"{side}_logps"] - read[f"reference_{side}_logps"])
                values = (0.5 * torch.tanh(values / 2) if squash else values).float().cpu()
                mask = batch[f"{side}_mask"].cpu().bool()
                found += [row[own].clone() for row, own in zip(values, mask, strict=True)]
    finally:
        model.train(was)
    return found


def _batches(data: Any, batch_size: int, side: str) -> Iterator[dict[str, Tensor]]:
    size = len(next(iter(data.values()))) if isinstance(data, Mapping) else len(data)
    for start in range(0, size, batch_size):
        rows = range(start, min(start + batch_size, size))
        batch = (
            {k: v[rows.start : rows.stop] for k, v in data.items()}
            if isinstance(data, Mapping)
            else data.collate([data[i] for i in rows])
        )
        yield {k: v for k, v in batch.items() if k.startswith((f"{side}_", f"reference_{side}_"))}


# ---- into the data --------------------------------------------------------------------------------------------------


def token_reward_column(rewards: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Put the rewards of answers where their tokens stand: float `[batch, time]`, 0 outside the mask.

    Args:
        rewards: float [tokens] for each answer, in the order of its tokens.
        mask: bool [batch, time], True on the tokens of the answer.

    Raises:
        InputError: the rewards of an answer are not as many as its tokens, or one is NaN or infinite.

    >>> token_reward_column([torch.tensor([0.1, -0.2])], torch.tensor([[False, True, True]]))
    tensor([[ 0.0000,  0.1000, -0.2000]])
    """
    if len(rewards) != len(mask):
        raise InputError(f"There are rewards of {len(rewards)} answers, and {len(mask)} answers.")
    for row, (own, count) in enumerate(zip(rewards, mask.sum(1).tolist(), strict=True)):
        _check(own, count, row)
    column = torch.zeros(mask.shape)
    if len(rewards):
        column[mask.cpu().bool()] = torch.cat([r.float().cpu() for r in rewards])
    return column.to(mask.device)


def with_token_rewards(data: Any, **rewards: Sequence[Tensor]) -> Any:
    """Return training data with token rewards of some sides: `with_token_rewards(data, chosen=..., rejected=...)`.

    Args:
        data: tensors `[batch, time]` by name with `<side>_mask`, or a data set whose items have `<side>_mask` [time].
        rewards: by side, float [tokens] for each answer.

    Returns: a dict with `<side>_token_reward`, or a `TokenRewarded` data set.

    Raises:
        InputError: rewards that do not fit the answers; see `token_reward_column`.
    """
    if isinstance(data, Mapping):
        columns = {
            f"{side}_token_reward": token_reward_column(own, data[f"{side}_mask"]) for side, own in rewards.items()
        }
        return {**data, **columns}
    return TokenRewarded(data, rewards)


class TokenRewarded(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A data set of answers with a reward for each token beside them.

    Args:
        data: items are dictionaries of tensors `[time]`; `collate` makes batches of them.
        rewards: by side, float [tokens] for each answer.

    Raises:
        InputError: not as many rewards as answers; or, when an item is read, as tokens.
    """

    def __init__(self, data: Any, rewards: Mapping[str, Sequence[Tensor]]) -> None:
        for side, own in rewards.items():
            if len(own) != len(data):
                raise InputError(f"There are rewards of {len(own)} {side} answers, and {len(data)} answers.")
        self.data, self.rewards = data, dict(rewards)
        self.collate = data.collate

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = dict(self.data[index])
        for side, own in self.rewards.items():
            mask = item[f"{side}_mask"]
            _check(own[index], int(mask.sum()), index)
            item[f"{side}_token_reward"] = torch.zeros(len(mask)).masked_scatter(mask, own[index].float())
        return item


def _check(rewards: Tensor, count: int, row: int) -> None:
    if rewards.shape != (count,):
        raise InputError(
            f"Answer {row} has {count} tokens, and its rewards have the form {list(rewards.shape)}: one reward for each token, the end of "
            "sequence included. Were they computed with another tokenizer, or before the answer was cut?"
        )
    if not bool(rewards.isfinite().all()):
        raise InputError(f"A token reward of answer {row} is NaN or infinite.")
