"""Pieces of a model that are trained with it: how its weights are made, not what they are charged for.

A part changes a model in place and returns a handle. It can be named in text, as the command line and study files do:

    handle = apply_part(model, "compand(learn=True)")
"""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING, Any

from poise.errors import FormulaError, InputError, nearest
from poise.lazy import load

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CATALOGUE", "apply_part", "parse_part"]

CATALOGUE: dict[str, str] = {
    "compand": "poise.parts.companding:compand",
}
"""Parts that text may name, and where each is defined; read without importing PyTorch."""

_HOME: dict[str, str] = {
    "CompandBarrier": "companding",
    "Compander": "companding",
    "Companding": "companding",
    "ConversionReport": "companding_conversion",
    "compand": "companding",
    "compand_pretrained": "companding_conversion",
    "companding_of": "companding",
    "folded_copy": "companding",
}


def parse_part(text: str) -> tuple[str, dict[str, Any]]:
    """Read `"compand(learn=True, a=0.3)"` as a name and keyword arguments; nothing is evaluated.

    Args:
        text: a name of `CATALOGUE`, alone or with keyword arguments that are literals.

    Returns:
        The name and the arguments.

    Raises:
        FormulaError: the text is not of that form or the name is unknown.

    Example:
        >>> parse_part("compand(fn='tanh', learn=True)")
        ('compand', {'fn': 'tanh', 'learn': True})
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise FormulaError(f"a part reads like compand(learn=True), but it is {text!r}: {error.msg}.") from error
    call = tree if isinstance(tree, ast.Call) else None
    target = call.func if call else tree
    if not isinstance(target, ast.Name) or (call and call.args):
        raise FormulaError(f"a part reads like compand(learn=True), a name and keyword arguments, but it is {text!r}.")
    if target.id not in CATALOGUE:
        raise FormulaError(
            f"no part is called {target.id!r}; there is {', '.join(CATALOGUE)}.{nearest(target.id, CATALOGUE)}"
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


def apply_part(model: nn.Module, text: str) -> Any:
    """Change `model` in place as the text says, and return the part's handle.

    Raises:
        FormulaError: the text is not a part.
        InputError: an argument is unknown, or the part refuses the model.

    Example:
        >>> from torch import nn
        >>> apply_part(nn.Linear(4, 3), "compand(learn=True)").stats()["weight"]["clipped_share"]
        0.0
    """
    import inspect

    name, arguments = parse_part(text)
    module, _, attribute = CATALOGUE[name].partition(":")
    part = getattr(importlib.import_module(module), attribute)
    known = list(inspect.signature(part).parameters)[1:]
    for argument in arguments:
        if argument not in known:
            raise InputError(
                f"{name} has no argument {argument!r}; it takes {', '.join(known)}.{nearest(argument, known)}"
            )
    return part(model, **arguments)


def __getattr__(name: str) -> Any:
    return load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
