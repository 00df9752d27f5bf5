"""Text <-> objective.

    formula   = sum { "with" part } [ "where" name "=" weight { "," name "=" weight } ]
    sum       = product { ("+" | "-") product }
    product   = factor { "*" factor }              at most one factor is a term, the others are weights
    factor    = number | schedule | "auto" | "step" | "epoch" | "progress" | bound name | term | "(" sum ")" | "-" factor
    term      = name [ "(" arguments ")" ] { ".on(" [stream] { name "=" quantity } ")" | ".named(" name ")" }
    arguments = literals, by keyword; or formulas, where the term takes one: constraint(kl, upper=0.5)
    part      = a piece of the model that it is minimised with: compand(learn=True)

The text is parsed with Python's own grammar (`ast`) into a tree and the tree is read by the rules above; nothing of it is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from poise.coefficient import Coefficient, Number, Product, Time, add, multiply, text
from poise.errors import FormulaError, InputError, nearest
from poise.objective import Objective, Summand, Term, auxiliary
from poise.weights.adaptive_kl import adaptive_kl
from poise.weights.auto import auto
from poise.weights.constraint import MeasuredWeight, PricedWeight, ProxyWeight, constraint
from poise.weights.schedule import SCHEDULES

MAX_LENGTH, MAX_DEPTH, MAX_NODES = 20_000, 60, 5_000
_TIMES = ("step", "epoch", "progress")
_FUNCTIONS: dict[str, Callable[..., Objective]] = {
    "constraint": constraint,
    "adaptive_kl": adaptive_kl,
    "auxiliary": auxiliary,
}

Part = Number | Coefficient | Objective


def parse(formula: str, **bound: Number | Coefficient | Term | Objective) -> Objective:
    """Read a formula into an objective.

    Args:
        formula: the text, such as `"cross_entropy + 3*early_learning(beta=0.9)"`; at most 20,000 characters.
        bound: names that the formula uses: weights, schedules, or terms of your own. A formula can bind
            weights itself: `"(1-a)*cross_entropy + a*l2 where a = 0.1"`.

    Raises:
        FormulaError: the text does not fit the grammar, or names what does not exist; it shows the place and the nearest known name.

    >>> str(parse("cross_entropy + 0.5 * (l1 + l2)"))
    'cross_entropy + 0.5*l1 + 0.5*l2'
    """
    return _Reader(formula, bound).objective()


class _Reader:
    """Reads one formula."""

    def __init__(self, formula: str, bound: Mapping[str, Any]) -> None:
        if not isinstance(formula, str):
            raise FormulaError(f"A formula is a text, and this is a {type(formula).__name__}.")
        if len(formula) > MAX_LENGTH:
            raise FormulaError(f"A formula has at most {MAX_LENGTH} characters, and this one has {len(formula)}.")
        self.given = formula
        self.formula = " ".join(formula.split())
        self.bound: dict[str, Any] = dict(bound)

    def objective(self) -> Objective:
        body, bindings = self._split_where()
        body, *parts = body.split(" with ")
        for name, weight in bindings:
            self.bound[name] = weight
        tree = self._tree(body)
        self.body = body
        result = self._read(tree, 0)
        if isinstance(result, Objective):
            return Objective(result.summands, [*result.parts, *(part_text(part) for part in parts)])
        if isinstance(result, Number) and result == 0:
            return Objective((), [part_text(part) for part in parts])
        raise FormulaError(
            f"This formula is a weight without a term: {self.given.strip()!r}. Write for instance '{body}*cross_entropy'."
        )

    def weight(self) -> Number | Coefficient:
        result = self._read(self._tree(self.formula), 0)
        if isinstance(result, Objective):
            raise FormulaError(f"This is a term, and a weight was expected: {self.given.strip()!r}.")
        return result

    def _split_where(self) -> tuple[str, list[tuple[str, Number | Coefficient]]]:
        body, where, rest = self.formula.partition(" where ")
        if not where:
            return body, []
        self.body = f"_({rest})"
        tree = self._tree(self.body)
        if not isinstance(tree, ast.Call) or tree.args or any(k.arg is None for k in tree.keywords):
            raise FormulaError(f"After 'where' stand weights by name, as in 'where a = 0.3, b = auto': {rest!r}.")
        bindings: list[tuple[str, Number | Coefficient]] = []
        for keyword in tree.keywords:
            name = str(keyword.arg)
            value = self._read(keyword.value, 0)
            if isinstance(value, Objective):
                raise self._error(keyword.value, f"{name!r} is bound to a term; only weights can be bound here.")
            if value == auto:
                value = auto(name)
            bindings.append((name, value))
        return body, bindings

    def _tree(self, body: str) -> ast.expr:
        self.body = body
        if not body.strip():
            raise FormulaError(
                "The formula is empty. Write for instance 'cross_entropy + 0.01*l2'; `poise terms` lists the terms."
            )
        try:
            tree = ast.parse(body.strip(), mode="eval").body
        except SyntaxError as error:
            place = max(0, (error.offset or 1) - 1)
            raise FormulaError(self._pointing(place, f"The formula does not parse: {error.msg}.")) from None
        except (ValueError, RecursionError, MemoryError):
            raise FormulaError(
                "The formula does not parse: it is nested too deeply or holds forbidden characters."
            ) from None
        self.body = body.strip()
        if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
            raise FormulaError(f"The formula is too large: more than {MAX_NODES} parts.")
        return tree

    # ---- errors -----------------------------------------------------------------------------------------------------

    def _pointing(self, column: int, message: str) -> str:
        # A long formula is shown as a window around the place.
        start = max(0, column - 60)
        window = self.body[start : start + 120]
        lead = "..." if start else ""
        return f"{message}\n    {lead}{window}\n    {' ' * (column - start + len(lead))}^"

    def _error(self, node: ast.AST, message: str) -> FormulaError:
        column = len(self.body.encode()[: getattr(node, "col_offset", 0)].decode(errors="ignore"))
        return FormulaError(self._pointing(column, message))

    # ---- the grammar ------------------------------------------------------------------------------------------------

    def _read(self, node: ast.expr, depth: int) -> Part:
        if depth > MAX_DEPTH:
            raise FormulaError(f"The formula is nested more than {MAX_DEPTH} deep.")
        if isinstance(node, ast.Constant):
            return self._number(node)
        if isinstance(node, ast.Name):
            return self._name(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            inner = self._read(node.operand, depth + 1)
            return inner if isinstance(node.op, ast.UAdd) else self._times(node, -1, inner)
        if isinstance(node, ast.BinOp):
            return self._operator(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        raise self._error(
            node, f"A formula has terms, numbers, '+', '-', '*' and parentheses, and this is {_kind(node)}."
        )

    def _number(self, node: ast.Constant) -> Number:
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._error(node, f"A weight is a number, and this is {value!r}.")
        if not abs(value) < 1e300:
            raise self._error(node, "A weight must be a finite number below 1e300.")
        return value

    def _name(self, node: ast.Name) -> Part:
        name = node.id
        if name in self.bound:
            value = self.bound[name]
            return value if isinstance(value, Number | Coefficient | Objective) else Objective([Summand(value)])
        if name == "auto":
            return auto
        if name in _TIMES:
            return Time(name)
        if name in SCHEDULES:
            raise self._error(node, f"The schedule {name!r} needs arguments, as in '{name}(0, 1, steps=500)'.")
        return self._build(node, name, {})

    def _operator(self, node: ast.BinOp, depth: int) -> Part:
        # Long sums lean to the left: walk them in a loop, so that a thousand terms are no thousand levels.
        if isinstance(node.op, ast.Add | ast.Sub):
            chain: list[tuple[ast.BinOp, int]] = []
            first: ast.expr = node
            while isinstance(first, ast.BinOp) and isinstance(first.op, ast.Add | ast.Sub):
                chain.append((first, -1 if isinstance(first.op, ast.Sub) else 1))
                first = first.left
            total: Part = self._read(first, depth + 1)
            pieces: list[Objective] = []
            for place, sign in reversed(chain):
                right = self._read(place.right, depth + 1)
                right = self._times(place, -1, right) if sign < 0 else right
                if isinstance(total, Objective) != isinstance(right, Objective):
                    raise self._error(
                        place.right, "A number or a schedule cannot be added to a term; multiply with '*'."
                    )
                if isinstance(right, Objective):
                    pieces.append(right)
                else:
                    total = add(total, right)  # type: ignore[arg-type]
            if pieces and isinstance(total, Objective):
                total = Objective([*total.summands, *(s for piece in pieces for s in piece.summands)])
            return total
        if isinstance(node.op, ast.Mult):
            return self._times(node, self._read(node.left, depth + 1), self._read(node.right, depth + 1))
        if isinstance(node.op, ast.Div):
            raise self._error(node.right, "A formula has no division; multiply with the inverse, as in '0.5*l2'.")
        raise self._error(node.right, "A formula knows '+', '-' and '*'.")

    def _times(self, node: ast.AST, left: Part, right: Part) -> Part:
        try:
            if isinstance(left, Objective) and isinstance(right, Objective):
                raise self._error(node, "Two terms cannot be multiplied: an objective is a weighted sum.")
            if isinstance(left, Objective) or isinstance(right, Objective):
                return left * right
            return multiply(left, right)
        except InputError as error:
            raise self._error(node, str(error)) from None

    def _call(self, node: ast.Call, depth: int) -> Part:
        if isinstance(node.func, ast.Attribute):
            return self._method(node, node.func, depth)
        if not isinstance(node.func, ast.Name):
            raise self._error(node, f"Only names can be called, and this is {_kind(node.func)}.")
        name = node.func.id
        positional = [self._argument(a, depth) for a in node.args]
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._error(keyword.value, "Arguments are written out by name: '**' has no place in a formula.")
            if keyword.arg in keywords:
                raise self._error(keyword.value, f"The argument {keyword.arg!r} stands twice.")
            keywords[keyword.arg] = self._argument(keyword.value, depth)
        if name in self.bound:
            raise self._error(node, f"{name!r} is a bound name and takes no arguments.")
        if name in SCHEDULES or name == "auto":
            return self._make(node, name, SCHEDULES.get(name, auto.__call__), positional, keywords)  # type: ignore[no-any-return]
        if name in _FUNCTIONS:
            return self._make(node, name, _FUNCTIONS[name], positional, keywords)  # type: ignore[no-any-return]
        return self._build(node, name, keywords, positional)

    def _method(self, node: ast.Call, function: ast.Attribute, depth: int) -> Objective:
        base = self._read(function.value, depth + 1)
        if not isinstance(base, Objective):
            raise self._error(node, f".{function.attr}(...) belongs to a term, not to a weight.")
        arguments = [self._text(a) for a in node.args]
        keywords = {str(k.arg): self._text(k.value) for k in node.keywords}
        try:
            if function.attr == "on" and len(arguments) <= 1:
                return base.on(*arguments, **keywords)
            if function.attr == "named" and len(arguments) == 1 and not keywords:
                return base.named(arguments[0])
        except InputError as error:
            raise self._error(node, str(error)) from None
        raise self._error(
            node,
            f"A term has .on('stream', quantity='other_name') and .named('name'), and this is .{function.attr}(...).",
        )

    def _text(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise self._error(node, "Names of streams and quantities are texts in quotes.")

    def _argument(self, node: ast.expr, depth: int) -> Any:
        """Read an argument: a literal, or a formula where a name stands in it."""
        if (
            isinstance(node, ast.Constant)
            and node.value is not Ellipsis
            and not isinstance(node.value, complex | bytes)
        ):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        if isinstance(node, ast.Tuple | ast.List):
            items = tuple(self._argument(item, depth + 1) for item in node.elts)
            return items if isinstance(node, ast.Tuple) else list(items)
        if isinstance(node, ast.Name | ast.BinOp | ast.Call | ast.UnaryOp):
            return self._read(node, depth + 1)
        raise self._error(
            node,
            f"An argument is a number, a text, True, False, None, a tuple of these or a formula, and this is {_kind(node)}.",
        )

    # ---- making things ----------------------------------------------------------------------------------------------

    def _build(
        self, node: ast.AST, name: str, keywords: dict[str, Any], positional: list[Any] | None = None
    ) -> Objective:
        """Build a term, or the sum of terms that a shorthand stands for."""
        from poise import terms

        found = terms.find(name) or terms.find_shorthand(name)
        if found is None:
            known = [*terms.names(), *terms.SHORTHANDS, *SCHEDULES, *_FUNCTIONS, *self.bound, "auto", *_TIMES]
            raise self._error(
                node, f"There is no term {name!r}." + (nearest(name, known) or " `poise terms` lists what there is.")
            )
        if positional and not all(isinstance(p, Objective) for p in positional):
            raise self._error(node, f"The arguments of {name!r} are given by name: {_signature(name, found)}.")
        made = self._make(node, name, found, positional or [], keywords)
        return made if isinstance(made, Objective) else Objective([Summand(made)])

    def _make(self, node: ast.AST, name: str, maker: Any, positional: list[Any], keywords: dict[str, Any]) -> Any:
        signature = inspect.signature(maker)
        for keyword in keywords:
            if keyword not in signature.parameters:
                known = list(signature.parameters)
                hint = nearest(keyword, known) or f" It takes: {', '.join(known) or 'none'}."
                raise self._error(node, f"{name!r} has no argument {keyword!r}." + hint)
        try:
            signature.bind(*positional, **keywords)
        except TypeError as error:
            raise self._error(node, f"{name!r}: {error}. It is written {_signature(name, maker)}.") from None
        try:
            return maker(*positional, **keywords)
        except (ValueError, TypeError) as error:
            raise self._error(node, _sentence(name, error)) from None
        except Exception as error:
            # An argument of a kind that nobody foresaw: the term stumbled over it, and where it stands is what helps.
            raise self._error(
                node, f"{name} cannot be made of these arguments ({type(error).__name__}: {error})."
            ) from None


def _sentence(name: str, error: Exception) -> str:
    message = str(error)
    return message if message.startswith(name) else f"{name}: {message}"


def _signature(name: str, maker: Any) -> str:
    parameters = ", ".join(str(p.replace(annotation=p.empty)) for p in inspect.signature(maker).parameters.values())
    return f"{name}({parameters})"


def _kind(node: ast.AST) -> str:
    names = {
        "Attribute": "an attribute", "Subscript": "an index", "Compare": "a comparison", "Lambda": "a lambda", "Dict": "a dictionary",
        "Set": "a set", "JoinedStr": "an f-string", "Starred": "a star", "BoolOp": "'and' or 'or'", "IfExp": "an 'if'",
        "Tuple": "a tuple (is there a comma too many?)", "List": "a list", "NamedExpr": "an assignment", "Await": "an 'await'",
    }  # fmt: skip
    kind = type(node).__name__
    return names.get(kind, "a comprehension" if kind.endswith("Comp") or kind == "GeneratorExp" else f"a {kind}")


# ---- printing -------------------------------------------------------------------------------------------------------


def term_text(term: Term) -> str:
    """Print a term as a formula has it: its name, and the arguments that are not the defaults."""
    from poise import terms

    if terms.find(term.formula) is not type(term):
        return f"<{type(term).__name__}>"
    shown = []
    for parameter in inspect.signature(type(term)).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or not hasattr(term, parameter.name):
            continue
        value = _argument_of(term, parameter.name)
        if isinstance(value, Objective) or not _same(value, parameter.default):
            shown.append(f"{parameter.name}={_literal(value)}")
    return f"{term.formula}({', '.join(shown)})" if shown else term.formula


def _argument_of(term: Term, name: str, default: Any = None) -> Any:
    """Return what an argument was; one whose name is a method's, as `on`, is kept as `on_`."""
    return getattr(term, f"{name}_" if hasattr(term, f"{name}_") else name, default)


def _same(value: Any, default: Any) -> bool:
    return type(value) in (int, float, str, bool, type(None), tuple, list) and bool(value == default)


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool | str):
        return repr(value)
    if isinstance(value, Number):
        return text(value)
    if isinstance(value, Coefficient | Objective):
        return str(value)
    if isinstance(value, list | tuple):
        inner = ", ".join(_literal(v) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return f"<{type(value).__name__}>"


def part_text(part: str) -> str:
    """Print a part in one form.

    Raises:
        FormulaError: no part is called so, or an argument is no literal.

    >>> part_text("compand( learn = True )")
    'compand(learn=True)'
    """
    from poise.parts import parse_part

    name, arguments = parse_part(part)
    return f"{name}({', '.join(f'{k}={_literal(v)}' for k, v in arguments.items())})" if arguments else name


def parse_weight(weight: str) -> Number | Coefficient:
    """Read a weight alone, such as a schedule: `"2*linear(0, 1, steps=500)"`.

    Raises:
        FormulaError: the text is no weight.

    >>> str(parse_weight("cosine(1, 0)"))
    'cosine(1, 0)'
    """
    return _Reader(weight, {}).weight()


def objective_text(objective: Objective) -> str:
    """Print an objective as a formula that `parse` reads back."""
    pieces: list[tuple[str, bool]] = []
    summands = list(objective.summands)
    while summands:
        first = summands.pop(0)
        dual = _dual(first.weight)
        if dual is not None:
            # The terms of one constraint share its multiplier and are printed together.
            same = [s for s in summands if (other := _dual(s.weight)) and _together(other, dual)]
            summands = [s for s in summands if s not in same]
            pieces += _constraint_text([first, *same])
        else:
            pieces.append(_weighted(first, first.weight))
    return (_sum(pieces) if pieces else "0") + "".join(f" with {part}" for part in objective.parts)


def _dual(weight: Number | Coefficient) -> tuple[Number | Coefficient, PricedWeight] | None:
    """Split a weight into what stands before a constraint and the constraint's own weight."""
    if isinstance(weight, PricedWeight):
        return 1, weight
    if isinstance(weight, Product) and isinstance(weight.right, PricedWeight):
        return weight.left, weight.right
    return None


def _together(one: tuple[Number | Coefficient, PricedWeight], other: tuple[Number | Coefficient, PricedWeight]) -> bool:
    return one[0] == other[0] and one[1].owner is other[1].owner


def _constraint_text(summands: list[Summand]) -> list[tuple[str, bool]]:
    """Print the terms of one multiplier: those that it charges, and those that are only measured."""
    found = [(s, *split) for s in summands if (split := _dual(s.weight))]
    charged = [_weighted(s, w.inner) for s, _, w in found if not isinstance(w, MeasuredWeight)]
    measured = [_weighted(s, w.inner) for s, _, w in found if isinstance(w, MeasuredWeight)]
    if not charged or (not measured and isinstance(found[0][2], ProxyWeight)):
        # Half of a proxy constraint is left, as when a term is taken out: no multiplier moves, and nothing is constrained.
        return []
    _, outer, weight = found[0]
    arguments = ([f"measured={_sum(measured)}"] if measured else []) + [weight.owner.arguments()]
    scale = "" if outer == 1 else f"{text(outer, 2)}*"
    return [(f"{scale}{weight.owner.formula}({', '.join([_sum(charged), *arguments])})", False)]


def _weighted(summand: Summand, weight: Number | Coefficient) -> tuple[str, bool]:
    """Return the text of a weighted term without its sign, and whether the sign is minus."""
    name = term_text(summand.term)
    if summand.stream or summand.renames:
        arguments = [repr(summand.stream)] if summand.stream else []
        arguments += [f"{k}={v!r}" for k, v in summand.renames]
        name += f".on({', '.join(arguments)})"
    if summand.name:
        name += f".named({summand.name!r})"
    if summand.auxiliary:
        return f"auxiliary({name})", False
    if isinstance(weight, Number):
        size = abs(weight)
        return (name if size == 1 else f"{text(size)}*{name}"), weight < 0
    return f"{text(weight, 2)}*{name}", False


def _sum(pieces: list[tuple[str, bool]]) -> str:
    first, minus = pieces[0]
    return ("-" if minus else "") + first + "".join(f" {'-' if m else '+'} {piece}" for piece, m in pieces[1:])


def explain(formula: str | Objective) -> str:
    """Explain a formula in words: the equation, what every term reads, its arguments and its source.

    >>> print(explain("0.1*l2").splitlines()[0])
    minimise  0.1*l2
    """
    objective = parse(formula) if isinstance(formula, str) else formula
    lines = [f"minimise  {objective}", ""]
    for label, summand in zip(objective.labels, objective.summands, strict=True):
        term = summand.term
        lines.append(
            f"{label}    weight {text(summand.weight) if not isinstance(summand.weight, PricedWeight) else summand.weight}"
        )
        lines.append(f"    {(inspect.getdoc(type(term)) or '').splitlines()[0]}")
        if term.equation:
            lines.append(f"    value    {term.equation}")
        optional = [
            q for q in inspect.signature(term.forward).parameters if q not in term.reads and q not in term.readings()
        ]
        also = f"; if offered: {', '.join(optional)}" if optional else ""
        lines.append(
            f"    reads    {', '.join(dict(summand.renames).get(q, q) for q in term.reads) or 'nothing'}{also}"
        )
        if summand.stream:
            lines.append(f"    stream   {summand.stream}")
        arguments = [
            f"{p.name}={_literal(_argument_of(term, p.name, p.default))}"
            for p in inspect.signature(type(term)).parameters.values()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if arguments:
            lines.append(f"    with     {', '.join(arguments)}")
        if term.source:
            lines.append(f"    source   {term.source}")
        lines.append("")
    return "\n".join(lines).rstrip()
