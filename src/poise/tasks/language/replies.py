"""Instructions and replies made by a grammar, and a program that says how good a reply is.

Seven kinds of instructions (list, count, calculate, describe, find the odd one, sort, name the opposite) are answered with
everything that human preferences are about: replies are right, half right or wrong, polite or rude, to the point or padded, and some
refuse. The true reward of a reply is known, so what a method does to it can be measured and not only estimated:

    reward = content + 0.2 polite - 0.15 fillers - 0.5 rude - 0.3 repeated - 0.2 foreign

`content` in [0, 1] is the share of what was asked that the reply gives, less what it gets wrong; `polite` is 1 where it opens politely; the
others count sentences: padding, rudeness, repetitions, and what belongs to no reply.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from poise.errors import InputError
from poise.tasks.language.records import Record, Records, Text

SOURCE = "replies"
"""The name of this embedded source."""

POLITE = ("Of course.", "Gladly.", "Happy to help.")
FILLERS = (
    "There is a lot one could say about this.",
    "People often ask about such things.",
    "This is a question of great interest.",
    "Many words have been written on it.",
)
RUDE = ("That is a silly question.", "You should know this.")
REFUSALS = ("I do not know.", "I would rather not say.")

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
_THINGS = {
    "fruits": ["apple", "pear", "plum", "peach", "grape", "lemon", "melon", "cherry", "fig", "lime"],
    "animals": ["fox", "bear", "mouse", "horse", "frog", "owl", "whale", "camel", "wolf", "crab"],
    "colours": ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "yellow", "orange"],
    "tools": ["hammer", "saw", "drill", "axe", "spade", "rake", "file", "wrench", "chisel", "pliers"],
    "instruments": ["piano", "violin", "drum", "flute", "harp", "guitar", "trumpet", "cello", "organ", "banjo"],
}
_ONE = {
    "fruits": "a fruit",
    "animals": "an animal",
    "colours": "a colour",
    "tools": "a tool",
    "instruments": "an instrument",
}
_FACTS = {
    "fox": ("small", "red", "the forest", "mice"),
    "bear": ("large", "brown", "the mountains", "berries"),
    "mouse": ("tiny", "grey", "the field", "seeds"),
    "horse": ("large", "black", "the stable", "hay"),
    "frog": ("tiny", "green", "the pond", "flies"),
    "owl": ("small", "white", "the barn", "mice"),
    "whale": ("huge", "blue", "the sea", "fish"),
    "camel": ("large", "yellow", "the desert", "hay"),
    "wolf": ("large", "grey", "the forest", "meat"),
    "crab": ("small", "pink", "the sea", "worms"),
}
_OPPOSITES = [
    ("hot", "cold"),
    ("big", "little"),
    ("fast", "slow"),
    ("wet", "dry"),
    ("old", "young"),
    ("hard", "soft"),
    ("full", "empty"),
    ("loud", "quiet"),
    ("dark", "light"),
    ("rich", "poor"),
]
_OPPOSITE = {**dict(_OPPOSITES), **{b: a for a, b in _OPPOSITES}}
_ALL = [thing for things in _THINGS.values() for thing in things]
_WORDS = r"((?:[a-z]+, )+[a-z]+)"


@dataclass(frozen=True)
class _Instruction:
    """One kind of instruction.

    Attributes:
        pattern: what its prompts look like; the groups are what an answer depends on.
        ask: write a prompt.
        answer: write the core of a reply, with so many mistakes.
        content: score the core of a reply, in [0, 1].
    """

    pattern: re.Pattern[str]
    ask: Callable[[Random], str]
    answer: Callable[[tuple[str, ...], int, Random], str]
    content: Callable[[tuple[str, ...], str], float]


def _ask_list(random: Random) -> str:
    return f"{random.choice(('List', 'Name'))} {random.choice(list(_NUMBERS))} {random.choice(list(_THINGS))}."


def _answer_list(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    number, kind = slots
    words = random.sample(_THINGS[kind], _NUMBERS[number])
    for at in random.sample(range(len(words)), min(mistakes, len(words))):
        words[at] = random.choice([*(w for w in _ALL if w not in _THINGS[kind]), words[at - 1]])
    return f"{number.capitalize()} {kind} are {', '.join(words[:-1])} and {words[-1]}."


def _score_list(slots: tuple[str, ...], core: str) -> float:
    number, kind = _NUMBERS[slots[0]], slots[1]
    given = re.findall(r"[a-z]+", core.partition(" are ")[2].replace(" and ", ", "))
    good = len({word for word in given if word in _THINGS[kind]})
    return _clip((min(good, number) - (len(given) - good) - max(good - number, 0)) / number)


def _ask_count(random: Random) -> str:
    start, length = random.randint(1, 12), random.randint(3, 7)
    up = random.random() < 0.6
    return f"Count from {start} to {start + length}." if up else f"Count down from {start + length} to {start}."


def _answer_count(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    numbers = _range(slots)
    for _ in range(mistakes):
        at = random.randrange(len(numbers))
        numbers = (
            [*numbers[:at], *numbers[at + 1 :]]
            if random.random() < 0.5
            else [*numbers[:at], numbers[at], *numbers[at:]]
        )
    return f"The numbers are {', '.join(map(str, numbers))}."


def _score_count(slots: tuple[str, ...], core: str) -> float:
    expected, given = _range(slots), [int(word) for word in re.findall(r"\d{1,6}", core)]
    right = sum(a == b for a, b in zip(expected, given, strict=False))
    return right / max(len(expected), len(given))


def _range(slots: tuple[str, ...]) -> list[int]:
    down, start, end = slots[0], int(slots[1]), int(slots[2])
    return list(range(start, end - 1, -1)) if down else list(range(start, end + 1))


def _ask_sum(random: Random) -> str:
    a, b = random.randint(1, 9), random.randint(1, 9)
    return f"What is {a} plus {b}?" if random.random() < 0.6 else f"What is {a + b} minus {b}?"


def _answer_sum(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    a, sign, b = slots
    first = second = _sum(slots)
    if mistakes:
        first += random.choice((-2, -1, 1, 2)) if first > 2 else random.choice((1, 2))
        second = first if mistakes > 1 else second
    return f"{a} {sign} {b} is {first}. So the answer is {second}."


def _score_sum(slots: tuple[str, ...], core: str) -> float:
    given = [int(word) for word in re.findall(r"\bis (\d{1,6})", core)]
    right = sum(number == _sum(slots) for number in given[:2]) - max(len(given) - 2, 0)
    return _clip(right / 2)


def _sum(slots: tuple[str, ...]) -> int:
    a, b = int(slots[0]), int(slots[2])
    return a + b if slots[1] == "plus" else a - b


def _ask_facts(random: Random) -> str:
    return random.choice(("Describe the {}.", "Tell me about the {}.")).format(random.choice(list(_FACTS)))


def _answer_facts(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    facts = list(_FACTS[slots[0]])
    for at in random.sample(range(4), min(mistakes, 4)):
        facts[at] = random.choice([other[at] for other in _FACTS.values() if other[at] != facts[at]])
    size, colour, home, food = facts
    return f"The {slots[0]} is a {size} {colour} animal. It lives in {home} and eats {food}."


def _score_facts(slots: tuple[str, ...], core: str) -> float:
    found = re.search(r"\bis a (\w+) (\w+) animal", core), re.search(r"\blives in (the \w+) and eats (\w+)", core)
    given = [word for match in found for word in (match.groups() if match else ("", ""))]
    about = f"The {slots[0]} " in core
    return sum(a == b for a, b in zip(given, _FACTS[slots[0]], strict=True)) / 4 if about else 0.0


def _ask_odd(random: Random) -> str:
    kind, other = random.sample(list(_THINGS), 2)
    words = [*random.sample(_THINGS[kind], random.randint(2, 3)), random.choice(_THINGS[other])]
    random.shuffle(words)
    return f"Which one is not {_ONE[kind]}: {', '.join(words)}?"


def _answer_odd(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    kind, odd, other = _odd(slots)
    if mistakes:
        other = random.choice([k for k in _THINGS if k != other])
    if mistakes > 1:
        odd = random.choice([word for word in slots[1].split(", ") if word != odd])
    return f"{odd.capitalize()} is not {_ONE[kind]}. It is {_ONE[other]}."


def _score_odd(slots: tuple[str, ...], core: str) -> float:
    kind, odd, other = _odd(slots)
    return 0.5 * (f"{odd.capitalize()} is not {_ONE[kind]}." in core) + 0.5 * (f"It is {_ONE[other]}." in core)


def _odd(slots: tuple[str, ...]) -> tuple[str, str, str]:
    kind = next(k for k, one in _ONE.items() if one == slots[0])
    words = slots[1].split(", ")
    odd = next((word for word in words if word not in _THINGS[kind]), words[0])
    return kind, odd, next((k for k, things in _THINGS.items() if odd in things), kind)


def _ask_sort(random: Random) -> str:
    return f"Sort these words: {', '.join(random.sample(_ALL, random.randint(3, 4)))}."


def _answer_sort(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    words = sorted(slots[0].split(", "))
    for _ in range(mistakes):
        a, b = random.sample(range(len(words)), 2)
        words[a], words[b] = words[b], words[a]
    return f"In order they are {', '.join(words)}."


def _score_sort(slots: tuple[str, ...], core: str) -> float:
    expected = sorted(slots[0].split(", "))
    given: list[str] = re.findall(r"[a-z]+", core.partition(" are ")[2])
    return sum(a == b for a, b in zip(expected, given, strict=False)) / max(len(expected), len(given))


def _ask_opposite(random: Random) -> str:
    return f"What is the opposite of {random.choice(list(_OPPOSITE))}?"


def _answer_opposite(slots: tuple[str, ...], mistakes: int, random: Random) -> str:
    right = _OPPOSITE[slots[0]]
    wrong = random.choice([word for word in _OPPOSITE if word not in (right, slots[0])])
    first, second = (wrong if mistakes else right), (wrong if mistakes > 1 else right)
    return f"The opposite of {slots[0]} is {first}. What is {second} is not {slots[0]}."


def _score_opposite(slots: tuple[str, ...], core: str) -> float:
    word, right = slots[0], _OPPOSITE[slots[0]]
    return 0.5 * (f"opposite of {word} is {right}." in core) + 0.5 * (f"What is {right} is not {word}." in core)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


_KINDS = {
    "list": _Instruction(
        re.compile(rf"(?:List|Name) ({'|'.join(_NUMBERS)}) ({'|'.join(_THINGS)})\."),
        _ask_list,
        _answer_list,
        _score_list,
    ),
    "count": _Instruction(re.compile(r"Count (down )?from (\d+) to (\d+)\."), _ask_count, _answer_count, _score_count),
    "sum": _Instruction(re.compile(r"What is (\d+) (plus|minus) (\d+)\?"), _ask_sum, _answer_sum, _score_sum),
    "facts": _Instruction(
        re.compile(rf"(?:Describe|Tell me about) the ({'|'.join(_FACTS)})\."), _ask_facts, _answer_facts, _score_facts
    ),
    "odd": _Instruction(
        re.compile(rf"Which one is not ({'|'.join(_ONE.values())}): {_WORDS}\?"), _ask_odd, _answer_odd, _score_odd
    ),
    "sort": _Instruction(re.compile(rf"Sort these words: {_WORDS}\."), _ask_sort, _answer_sort, _score_sort),
    "opposite": _Instruction(
        re.compile(rf"What is the opposite of ({'|'.join(_OPPOSITE)})\?"),
        _ask_opposite,
        _answer_opposite,
        _score_opposite,
    ),
}
KINDS = tuple(_KINDS)
"""The names of the kinds of instructions, as records carry them in `extra["kind"]`."""


def true_reward(prompt: Text, reply: Text) -> float:
    """Return the true reward of a reply, by program, in about [-1, 1.2]; any text whatever has one.

    Args:
        prompt: an instruction of this grammar, as a string or as chat messages (the last one counts).
        reply: the answer, as a string or as chat messages.
    Raises:
        InputError: the prompt is no instruction of this grammar.

        >>> true_reward("What is 2 plus 3?", "Gladly. 2 plus 3 is 5. So the answer is 5.")
        1.2
    """
    kind, slots = _read(_plain(prompt))
    core: list[str] = []
    reward = 0.0
    sentences = re.findall(r"[^.?!]+[.?!]*", _plain(reply))
    seen: set[str] = set()
    for place, sentence in enumerate(s.strip() for s in sentences if s.strip()):
        if sentence in seen:
            reward -= 0.3
        elif sentence in POLITE and place == 0:
            reward += 0.2
        elif sentence in FILLERS or sentence in POLITE:
            reward -= 0.15
        elif sentence in RUDE:
            reward -= 0.5
        elif sentence not in REFUSALS:
            core.append(sentence)
        seen.add(sentence)
    expected = _KINDS[kind].answer(slots, 0, Random(0)).count(". ") + 1
    reward -= 0.2 * max(len(core) - expected, 0)
    return round(_KINDS[kind].content(slots, " ".join(core[:expected])) + reward, 6)


def mean_reward(prompts: Sequence[Text], replies: Sequence[Text]) -> float:
    """Return the mean true reward of replies to prompts."""
    return sum(true_reward(a, b) for a, b in zip(prompts, replies, strict=True)) / len(prompts)


def make_instruction(random: Random, kind: str | None = None) -> str:
    """Write an instruction, of a kind of `KINDS` or of any."""
    return _KINDS[kind or random.choice(KINDS)].ask(random)


def make_reply(prompt: str, random: Random) -> str:
    """Write a reply as the makers of this corpus would: of every quality."""
    kind, slots = _read(prompt)
    parts = [random.choice(POLITE)] if random.random() < 0.4 else []
    parts += [random.choice(RUDE)] if random.random() < 0.1 else []
    if random.random() < 0.08:
        return " ".join([*parts, random.choice(REFUSALS)])
    mistakes = random.choices((0, 1, 2), (0.45, 0.35, 0.2))[0]
    parts.append(_KINDS[kind].answer(slots, mistakes, random))
    parts += random.sample(FILLERS, random.choices((0, 1, 2), (0.55, 0.3, 0.15))[0])
    return " ".join(parts)


def tiny_texts(n: int, seed: int = 0) -> Records:
    """Make instructions with one reply each, of every quality, to pretrain on: records of the kind `answers`, as chat messages.

    Args:
        n: how many. seed: equal seeds give equal records.
    """
    random = Random(f"replies, texts, {seed}")
    records = []
    for line in range(1, _counted(n) + 1):
        prompt = make_instruction(random)
        records.append(
            Record(line, _user(prompt), {"response": _assistant(make_reply(prompt, random))}, extra=_extra(prompt))
        )
    return Records(SOURCE, "answers", tuple(records), f"{n} instructions with a reply each, made by a grammar.")


def tiny_prompts(n: int, seed: int = 0) -> Records:
    """Make instructions alone, to be answered and scored by `true_reward`; none depends on those of another seed."""
    random = Random(f"replies, prompts, {seed}")
    prompts = [make_instruction(random) for _ in range(_counted(n))]
    records = (Record(line, _user(prompt), {}, extra=_extra(prompt)) for line, prompt in enumerate(prompts, start=1))
    return Records(SOURCE, "prompts", tuple(records), f"{n} instructions, made by a grammar.")


def tiny_pairs(n: int, seed: int = 0, noise: float = 0.0) -> Records:
    """Make preference pairs: two replies to an instruction, and the one of higher true reward is chosen.

    Args:
        n: how many.
        seed: equal seeds give equal records.
        noise: share of pairs whose label is flipped, in [0, 0.5].
    Returns:
        Records of the kind `pairs`, as chat messages; `extra` has the true rewards as `chosen_score` and `rejected_score`, and `kind`.
    Raises:
        InputError: noise is out of range.

        >>> pair = tiny_pairs(1)[0]
        >>> pair.extra["chosen_score"] > pair.extra["rejected_score"]
        True
    """
    if not 0 <= noise <= 0.5:
        raise InputError(f"noise is the share of flipped labels, in [0, 0.5], and it is {noise}.")
    random = Random(f"replies, pairs, {seed}")
    # Flips are drawn apart, so that the same pairs come with any noise.
    flips = Random(f"replies, flips, {seed}")
    records = []
    for line in range(1, _counted(n) + 1):
        prompt = make_instruction(random)
        better, worse = _two(prompt, random)
        if flips.random() < noise:
            better, worse = worse, better
        scores = {"chosen_score": true_reward(prompt, better), "rejected_score": true_reward(prompt, worse)}
        answers: dict[str, Text] = {"chosen": _assistant(better), "rejected": _assistant(worse)}
        records.append(Record(line, _user(prompt), answers, extra=_extra(prompt) | scores))
    flipped = f", {noise:.0%} of the labels flipped" if noise else ""
    return Records(
        SOURCE, "pairs", tuple(records), f"{n} pairs of replies, made by a grammar and ordered by true reward{flipped}."
    )


def _two(prompt: str, random: Random) -> tuple[str, str]:
    while True:
        replies = [make_reply(prompt, random) for _ in range(2)]
        first, second = (true_reward(prompt, reply) for reply in replies)
        if abs(first - second) > 0.04:
            return (replies[0], replies[1]) if first > second else (replies[1], replies[0])


def _read(prompt: str) -> tuple[str, tuple[str, ...]]:
    for name, kind in _KINDS.items():
        match = kind.pattern.fullmatch(prompt.strip())
        if match:
            return name, match.groups(default="")
    raise InputError(f"{prompt[:80]!r} is no instruction of the embedded source {SOURCE!r}, so it has no true reward.")


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else str(text[-1]["content"])


def _extra(prompt: str) -> dict[str, str]:
    return {"kind": _read(prompt)[0]}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _counted(n: int) -> int:
    if n < 1:
        raise InputError(f"n must be at least 1, and it is {n}.")
    return n
