"""A name with keyword arguments, as text: `compand(learn=True)`, `half_fine_tuning(level='layer')`. Nothing is evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from poise.errors import FormulaError, nearest

__all__ = ["parse_call"]


def parse_call(text: str, known: Iterable[str], kind: str, example: str) -> tuple[str, dict[str, Any]]:
    """Read `"name(key=literal, ...)"`.

    Args:
        text: a name out of `known`, alone or with keyword arguments that are literals.
        kind: what is named, for messages ("part").
        example: how one reads, for messages.

    Returns:
        The name and the arguments.

    Raises:
        FormulaError: the text is not of that form or the name is unknown.

    Example:
        >>> parse_call("compand(fn='tanh')", ["compand"], "part", "compand(learn=True)")
        ('compand', {'fn': 'tanh'})
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise FormulaError(f"a {kind} reads like {example}, but it is {text!r}: {error.msg}.") from error
    except (ValueError, RecursionError, MemoryError):
        raise FormulaError(
            f"a {kind} reads like {example}; this text is nested too deeply or holds forbidden characters."
        ) from None
    call = tree if isinstance(tree, ast.Call) else None
    target = call.func if call else tree
    if not isinstance(target, ast.Name) or (call and call.args):
        raise FormulaError(f"a {kind} reads like {example}, a name and keyword arguments, but it is {text!r}.")
    names = list(known)
    if target.id not in names:
        raise FormulaError(
            f"no {kind} is called {target.id!r}; there is {', '.join(names)}.{nearest(target.id, names)}"
        )
    arguments: dict[str, Any] = {}
    for keyword in call.keywords if call else []:
        try:
            if keyword.arg is None:
                raise ValueError("** is not allowed")
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise FormulaError(
                f"in {text!r}: {ast.unparse(keyword.value)} must be a number, a text, a list, True, False or None."
            ) from error
    return target.id, arguments
