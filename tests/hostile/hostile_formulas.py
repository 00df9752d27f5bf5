# ruff: noqa: E501
"""Formulas that nobody would write: by the grammar with the wrong things in it, damaged, and random."""

from __future__ import annotations

import inspect
import random
from functools import cache
from typing import Any

from hostile_bytes import NAMES, damaged_text

WORDS = ["+", "-", "*", "(", ")", "auto", "where", " with ", " where a = 0.3", ".on('s')", ".named('x')", ".on(input='y')", "l2", "l1", "cross_entropy",
         "linear(0, 1, steps=5)", "cosine(1, 0)", "constraint(l2, upper=0.5)", "__import__('os').system('touch canary')", "lambda: 0", "[x for x in y]",
         "().__class__", "f'{l2}'", "1e999", "1" * 400, "0x", "1_000", "5j", "...", "**", "//", "@", "if", "await l2", "l2[0]", "l2.weight", "exec('1')",
         "eval('1')", "open('/etc/passwd')", "True", "None", "'a'", "b'a'", "print", "(yield)", "x := 1", "*l2", "**l2", "step", "epoch", "progress",
         " with compand(learn=True)", "\n", "\t", "#", ";", "\\", "µ", "ﬁ", "ℓ2", "𝐥2"]  # fmt: skip


@cache
def makers() -> list[tuple[str, Any]]:
    """Everything that a formula can call, with its signature."""
    from poise import terms
    from poise.formula import _FUNCTIONS
    from poise.weights.schedule import SCHEDULES

    found = [(name, terms.find(name)) for name in terms.names()]
    found += [(name, terms.find_shorthand(name)) for name in terms.SHORTHANDS]
    found += [*SCHEDULES.items(), *_FUNCTIONS.items()]
    return [(name, list(inspect.signature(maker).parameters.values())) for name, maker in found if maker is not None]


def literal(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice(["0", "1", "2", "3", "5", "10", "64"])
    if kind < 5:
        return rng.choice(["0.5", "0.1", "1e-3", "0.0", "-1", "-0.5", "1.0"])
    if kind == 5:
        return rng.choice(
            [
                "1e299",
                "1e-320",
                "-1e200",
                "10**9",
                "1000000000",
                "9007199254740993",
                "9" * 310,
                "-9223372036854775809",
                "1e15",
            ]
        )
    if kind == 6:
        return rng.choice(["True", "False", "None"])
    if kind == 7:
        return repr(rng.choice([*NAMES, "mean", "sum", "l2", "input", "cpu", "max"]))
    if kind == 8 and depth < 4:
        return "(" + ", ".join(literal(rng, depth + 1) for _ in range(rng.randrange(4))) + ",)"
    if kind == 9 and depth < 4:
        return "[" + ", ".join(literal(rng, depth + 1) for _ in range(rng.randrange(4))) + "]"
    if kind == 10:
        return factor(rng, depth + 1)
    return rng.choice(["auto", "step", "progress", "a", "b", "linear(0, 1, steps=5)", "()", "[]", "''"])


def call(rng: random.Random, depth: int) -> str:
    name, parameters = rng.choice(makers())
    if rng.random() < 0.3 and depth:
        return name
    arguments = []
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if parameter.kind is parameter.VAR_POSITIONAL:
            arguments += [summed(rng, depth + 1) for _ in range(rng.randrange(3))]
        elif rng.random() < (0.9 if needed else 0.25):
            given = parameter.default
            usual = isinstance(given, int | float | str | tuple) and rng.random() < 0.3
            text = repr(given) if usual else literal(rng, depth + 1)
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and needed and rng.random() < 0.5
            arguments.append(text if positional else f"{parameter.name}={text}")
    if rng.random() < 0.05:
        arguments.append(rng.choice(["**x", "*x", "x=1", "self=1", "lambda_=2", "args=1", "kwargs=1", "cls=1"]))
    return f"{name}({', '.join(arguments)})"


def factor(rng: random.Random, depth: int) -> str:
    kind = rng.randrange(14)
    if kind < 6:
        text = call(rng, depth)
        if rng.random() < 0.1:
            text += rng.choice(
                [
                    ".on('s')",
                    ".on(input='x')",
                    ".named('n')",
                    ".on('s', target='t').named('x')",
                    ".on(1)",
                    ".off()",
                    f".named({rng.choice(NAMES)!r})",
                ]
            )
        return text
    if kind < 9:
        return rng.choice(
            [
                "0.1",
                "2",
                "-1",
                "auto",
                "a",
                "b",
                "step",
                "epoch",
                "progress",
                "auto(low=0.001, high=10)",
                "1e-300",
                "1e299",
                "0",
                "auto('w')",
            ]
        )
    if kind < 11 and depth < 8:
        return f"({summed(rng, depth + 1)})"
    if kind == 11 and depth < 8:
        return "-" + factor(rng, depth + 1)
    return rng.choice(["l2", "l1", "cross_entropy", "squared_error", "linear(0, 1, steps=500)", "cosine(1, 0)"])


def summed(rng: random.Random, depth: int) -> str:
    products = [
        " * ".join(factor(rng, depth + 1) for _ in range(rng.choice([1, 1, 2, 2, 3])))
        for _ in range(rng.choice([1, 1, 2, 3] if depth < 3 else [1]))
    ]
    return rng.choice([" + ", " - "]).join(products)


def formula(rng: random.Random) -> str:
    """A formula from a generator."""
    kind = rng.randrange(20)
    if kind == 0:
        return "".join(rng.choice(WORDS) for _ in range(rng.randrange(12)))
    if kind == 1:
        return "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x300), rng.randrange(0x110000)]))
            for _ in range(rng.randrange(60))
        )
    if kind == 2:
        piece, times = (
            rng.choice(
                [
                    "(",
                    "-",
                    "l2+",
                    "[",
                    "{",
                    "auto*",
                    "l2.on(",
                    "constraint(",
                    "linear(",
                    "not ",
                    "+ l2",
                    "'",
                    "((l2)",
                    "1*",
                    "~",
                    "2**",
                    "a.b",
                ]
            ),
            rng.choice([5, 60, 200, 3000, 19_000]),
        )
        return (piece * times)[:20_050] + rng.choice(["", "l2", "l2" + ")" * times])[:20_050]
    text = summed(rng, 0)
    if rng.random() < 0.3:
        text += f" where a = {rng.choice(['0.3', 'auto', 'linear(0, 1, steps=5)', 'b', 'l2', factor(rng, 3)])}"
        text += rng.choice(["", ", b = 2", ", b = a", ", b = auto", ", l2 = 3", ", auto = 1", ", __class__ = 1"])
    if rng.random() < 0.1:
        text += rng.choice(
            [
                " with compand",
                " with compand(learn=True)",
                " with x",
                " with compand(a=__import__('os'))",
                " with l2",
                " with ",
                " with compand with compand",
                f" with compand(learn={literal(rng, 2)})",
            ]
        )
    return damaged_text(rng, text, WORDS) if kind < 9 else text
