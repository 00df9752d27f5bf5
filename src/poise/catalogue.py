"""What a formula may say, listed without importing PyTorch: summaries are read from the sources with `ast`.

`poise terms` prints this list. A term appears by being named in `poise.terms.CATALOGUE`; its line here is the first
line of its docstring, so that there is one text and not two.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Entry", "entries", "summary_of"]

WEIGHTS = {
    "auto": "poise.weights.auto:Auto",
    "constraint": "poise.weights.constraint:constraint",
    "adaptive_kl": "poise.weights.adaptive_kl:adaptive_kl",
    "linear": "poise.weights.schedule:linear",
    "cosine": "poise.weights.schedule:cosine",
    "exponential": "poise.weights.schedule:exponential",
    "rampup": "poise.weights.schedule:rampup",
    "piecewise": "poise.weights.schedule:piecewise",
    "gamma_ladder": "poise.weights.schedule:GammaLadder",
}
"""The ways to set a weight that the formula language knows, and where each is defined."""


@dataclass(frozen=True)
class Entry:
    """One name of the formula language: what it is (`kind`), where (`module:Name`), what it does."""

    name: str
    kind: str  # "term", "shorthand", "weight", "balancer", "bilevel" or "part"
    home: str
    summary: str


def entries() -> list[Entry]:
    """Every name that a formula may use, terms first, each with its one-line summary.

    Example:
        >>> [entry.kind for entry in entries() if entry.name == "cross_entropy"]
        ['term']
    """
    from poise.parts import CATALOGUE as PARTS
    from poise.terms import CATALOGUE as TERMS
    from poise.terms import SHORTHANDS
    from poise.weights.policies import METHODS

    kinds = (
        ("term", dict(sorted(TERMS.items()))),
        ("shorthand", SHORTHANDS),
        ("weight", WEIGHTS),
        ("balancer", {name: f"poise.weights.{home}" for name, home in METHODS["pareto"].items()}),
        ("bilevel", {name: f"poise.weights.{home}" for name, home in METHODS["bilevel"].items()}),
        ("part", PARTS),
    )
    return [Entry(name, kind, home, summary_of(home)) for kind, names in kinds for name, home in names.items()]


def summary_of(home: str) -> str:
    """The first line of the docstring of `"module:Name"`, read without importing the module; empty if there is none.

    Example:
        >>> summary_of("poise.catalogue:Entry").startswith("One name of the formula language")
        True
    """
    module, _, name = home.partition(":")
    body = _tree(module).body
    for position, node in enumerate(body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if name in _assigned(node) and position + 1 < len(body):
            return _text_of(body[position + 1])
    return ""


@cache
def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _assigned(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _text_of(node: ast.stmt) -> str:
    """The first line of a bare string, as it stands below a documented assignment."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value.partition("\n")[0]
    return ""
