"""Which half of a model is trained: masks over whole matrices, drawn so that every block keeps a share of each kind.

    units = matrices_of(model)                      the matrices of a transformer, by category and block
    mask = draw_mask(units, level="category", ratio=0.5, seed=0)
    mask["model.layers.0.self_attn.q_proj.weight"]  True: trained; False: frozen; a bool tensor: trained in part
    print(mask.report())

A *matrix* is a weight with its bias. A fused tensor holds several: the rows (GPT-2: columns) of queries, keys and values are matrices
of their own. Embeddings, the head, norms outside blocks and whatever else is not recognised are always trained.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from poise.errors import InputError, nearest
from poise.quantities import derive

__all__ = ["CATEGORIES", "LEVELS", "MaskReport", "Matrix", "ParameterMask", "Piece", "draw_mask", "matrices_of"]

CATEGORIES = ("attention", "feed_forward", "norm")
LEVELS = ("category", "layer", "model", "element")
Categories = Sequence[str] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class _Rule:
    """Modules whose name ends so are of this category; `parts` names what is fused in one tensor, along `axis`."""

    category: str
    ending: str
    parts: tuple[str, ...] = ()
    axis: int = 0
    by_head: bool = False

    def fits(self, name: str) -> bool:
        return re.search(rf"(?:^|\.)(?:{self.ending})$", name) is not None


_QKV = ("q", "k", "v")
# The order matters: BERT's `attention.output.dense` is attention, its `output.dense` is not.
_RULES = (
    _Rule("attention", r"attn\.c_attn", _QKV, axis=1),  # GPT-2 keeps [inputs, outputs]
    _Rule(
        "attention", r"query_key_value", _QKV, by_head=True
    ),  # GPT-NeoX, BLOOM: q, k, v of head 0, then of head 1, ...
    _Rule("attention", r"in_proj|Wqkv|qkv_proj|qkv", _QKV),  # PyTorch, MPT, Phi-3
    _Rule("attention", r"q_proj|k_proj|v_proj|o_proj|(?:\w*attn|attention)\.(?:out_proj|c_proj|proj|dense|Wo)"),
    _Rule("attention", r"self_attention\.dense|attention\.self\.(?:query|key|value)|attention\.output\.dense"),
    _Rule("attention", r"(?:SelfAttention|EncDecAttention)\.[qkvo]"),
    _Rule("feed_forward", r"gate_up_proj", ("gate", "up")),  # Phi-3
    _Rule("feed_forward", r"gate_proj|up_proj|down_proj|c_fc|mlp\.c_proj|fc1|fc2|linear1|linear2|w[123]"),
    _Rule("feed_forward", r"dense_h_to_4h|dense_4h_to_h|wi|wi_[01]|wo|(?:intermediate|output)\.dense"),
    _Rule("norm", r"\w*(?:[Nn]orm|\bln|_ln)_?\d*|ln_\d+"),
)
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed\w*|\w*embeddings?|wte|wpe|lm_head|embed_out|shared)(?:\.|$)")


@dataclass(frozen=True)
class Piece:
    """What a matrix owns of a parameter: all of it, or `rows` along `axis`."""

    parameter: str
    shape: torch.Size
    axis: int | None = None
    rows: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of parameters."""
        if self.axis is None or self.rows is None:
            return self.shape.numel()
        return self.shape.numel() // self.shape[self.axis] * len(self.rows)


@dataclass(frozen=True)
class Matrix:
    """What is frozen or trained together: a weight and its bias."""

    name: str
    category: str
    block: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of parameters, biases included."""
        return sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class Matrices(Sequence[Matrix]):
    """The matrices of a model, and the shapes of all its parameters."""

    found: tuple[Matrix, ...]
    shapes: Mapping[str, torch.Size]

    def __getitem__(self, index: Any) -> Any:
        return self.found[index]

    def __len__(self) -> int:
        return len(self.found)


@dataclass(frozen=True)
class CategoryCount:
    """Trained and all: matrices and parameters of one category. With grouped queries the two shares differ."""

    matrices_trained: int
    matrices: int
    parameters_trained: int
    parameters: int


@dataclass(frozen=True)
class MaskReport:
    """What a mask trains, by category; `always trained` holds embeddings, head and what no category names."""

    categories: dict[str, CategoryCount]

    @property
    def matrix_share(self) -> float:
        """Trained share of the matrices that are drawn from."""
        return self._share("matrices_trained", "matrices")

    @property
    def parameter_share(self) -> float:
        """Trained share of the parameters that are drawn from."""
        return self._share("parameters_trained", "parameters")

    def _share(self, part: str, whole: str) -> float:
        drawn = [count for name, count in self.categories.items() if name != ALWAYS]
        return float(sum(getattr(c, part) for c in drawn) / max(1, sum(getattr(c, whole) for c in drawn)))

    def __str__(self) -> str:
        rows = [f"{'category':16} {'matrices':>12} {'parameters':>24} {'share':>7}"]
        for name, c in self.categories.items():
            matrices = f"{c.matrices_trained}/{c.matrices}"
            parameters = f"{c.parameters_trained:,}/{c.parameters:,}"
            rows.append(f"{name:16} {matrices:>12} {parameters:>24} {c.parameters_trained / max(1, c.parameters):7.1%}")
        return "\n".join(rows)


ALWAYS = "always trained"


@dataclass(frozen=True)
class ParameterMask(Mapping[str, bool | Tensor]):
    """Parameter name -> True (trained), False (frozen) or a bool tensor that broadcasts to the parameter.

    Attributes:
        matrices: what was drawn from.
        trained: names of the matrices that are trained; None at level "element".
        entries: the mask itself.
    """

    matrices: Matrices
    trained: frozenset[str] | None
    entries: Mapping[str, bool | Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> bool | Tensor:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def complement(self) -> ParameterMask:
        """Return the mask that trains the other half; what is always trained stays so."""
        if self.trained is None:
            drawn = {piece.parameter for matrix in self.matrices for piece in matrix.pieces}
            entries = {n: ~e if n in drawn and isinstance(e, Tensor) else e for n, e in self.entries.items()}
            return ParameterMask(self.matrices, None, entries)
        return _of_matrices(self.matrices, frozenset(m.name for m in self.matrices) - self.trained)

    def digest(self) -> str:
        """Return a fingerprint by which a saved state recognises its mask."""
        whole = hashlib.sha256()
        for name, entry in self.entries.items():
            value = entry.flatten().to("cpu", torch.uint8).numpy().tobytes() if isinstance(entry, Tensor) else entry
            whole.update(repr((name, value)).encode())
        return whole.hexdigest()

    def report(self) -> MaskReport:
        """Count what is trained, by category."""
        counts: dict[str, list[int]] = {}
        drawn: dict[str, int] = {}
        for matrix in self.matrices:
            size = sum(self._trained(piece) for piece in matrix.pieces)
            row = counts.setdefault(matrix.category, [0, 0, 0, 0])
            chosen = size > 0 if self.trained is None else matrix.name in self.trained
            for i, n in enumerate((int(chosen), 1, size, matrix.size)):
                row[i] += n
            for piece in matrix.pieces:
                drawn[piece.parameter] = piece.shape.numel()
        rest = sum(shape.numel() for shape in self.matrices.shapes.values()) - sum(drawn.values())
        others = len(self.matrices.shapes) - len(drawn)
        found = {name: CategoryCount(*row) for name, row in counts.items()}
        return MaskReport({**found, ALWAYS: CategoryCount(others, others, rest, rest)})

    def _trained(self, piece: Piece) -> int:
        entry = self.entries[piece.parameter]
        if isinstance(entry, bool):
            return piece.size if entry else 0
        if piece.axis is None or piece.rows is None:
            return int(entry.sum())
        return piece.size if bool(entry.flatten()[piece.rows[0]]) else 0


def matrices_of(
    model: nn.Module | Mapping[str, Tensor], categories: Categories = None, level: str = "category"
) -> Matrices:
    """Find the matrices that a mask may freeze.

    Args:
        model: a module, or its parameters by name. Where it is a module, only parameters that require gradients are drawn from
            (all, where none does).
        categories: names out of "attention", "feed_forward", "norm" to restrict to; or a mapping from a name of your own to patterns
            of module names (`{"hidden": ["body.*"]}`). By default all three, by the names of Llama, Gemma, GPT-2, GPT-NeoX, OPT,
            BERT, T5, Phi-3 and PyTorch's own transformer layers; a model without any of them gives its weights of two dimensions or
            more, each a block of its own, at every level but "category".

    Raises:
        InputError: no tensor matches a category, a tensor is shared between categories, or a fused tensor has an unknown layout.
    """
    named, aliases = _named(model)
    own = isinstance(categories, Mapping)
    chosen = tuple(CATEGORIES if categories is None else categories)
    for name in () if own else chosen:
        if name not in CATEGORIES:
            raise InputError(f"half_fine_tuning: there is no category {name!r}." + nearest(name, CATEGORIES))
    found: dict[str, list[tuple[str, str, Piece]]] = {}
    for name, tensor in named.items():
        if _EMBEDDING.search(name) is not None and not own:
            _refuse_shared(name, aliases.get(name, ()), own, categories)
            continue
        path = _path(name)
        rule = _rule(path, categories)
        if rule is None or rule.category not in chosen:
            continue
        _refuse_shared(name, aliases.get(name, ()), own, categories)
        for part, piece in _pieces(model, named, name, path, tensor, rule):
            found.setdefault(f"{path}[{part}]" if part else path, []).append((rule.category, _block(path), piece))
    matrices = [Matrix(key, rows[0][0], rows[0][1], tuple(r[2] for r in rows)) for key, rows in found.items()]
    # A norm outside the blocks is the final one. A single block has no number, and then all are in it.
    if any(matrix.block for matrix in matrices) and not own:
        matrices = [matrix for matrix in matrices if matrix.block]
    matrices = [m for m in matrices if m.category not in CATEGORIES[:2] or any(len(p.shape) > 1 for p in m.pieces)]
    shapes = {name: tensor.shape for name, tensor in named.items()}
    if categories is None and level != "category" and not any(m.category != "norm" for m in matrices):
        matrices = _any_matrices(model, named)
    for name in chosen if categories is not None else ():
        if not any(matrix.category == name for matrix in matrices):
            raise InputError(
                f"half_fine_tuning: no tensor matched the category {name!r}; parameters are {_few(named)}."
            )
    if not any(m.category != "norm" for m in matrices) and (categories is None or not matrices):
        raise InputError(
            f"half_fine_tuning: no tensor matched attention or feed_forward; parameters are {_few(named)}. Name them with "
            "categories={'hidden': ['body.*']}, or use level='model'."
        )
    return Matrices(tuple(matrices), shapes)


def draw_mask(
    matrices: Matrices, level: str = "category", ratio: float = 0.5, seed: int = 0, measure: str = "matrices"
) -> ParameterMask:
    """Draw which matrices are trained.

    Args:
        matrices: what is drawn from.
        level: "category": in every block, the same share of each category (with ratio 0.5 two of q, k, v, o; of three feed-forward
            matrices two in one half of the blocks and one in the other; one of two norms); "layer": whole blocks; "model": any matrices;
            "element": single numbers.
        ratio: the trained share, in (0, 1). A category's total over the blocks is `ratio * n`, rounded half up.
        seed: the same seed draws the same mask.
        measure: "matrices" counts them; "parameters" then swaps and adds matrices within a category as long as its share of
            parameters comes closer to `ratio` (they differ with grouped queries).

    Raises:
        InputError: an argument is out of range, or nothing would be trained or frozen.
    """
    check(level, ratio, measure)
    generator = torch.Generator().manual_seed(derive(seed, "mask"))
    if level == "element":
        return _elements(matrices, ratio, generator)
    if level == "layer":
        blocks = list(dict.fromkeys(m.block for m in matrices))
        kept = {blocks[i] for i in _choose(len(blocks), _rounded(ratio * len(blocks)), generator)}
        trained = {m.name for m in matrices if m.block in kept}
    elif level == "model":
        trained = {matrices[i].name for i in _choose(len(matrices), _rounded(ratio * len(matrices)), generator)}
    else:
        trained = set()
        for category in dict.fromkeys(m.category for m in matrices):
            trained |= _of_category([m for m in matrices if m.category == category], ratio, generator)
    if measure == "parameters" and level != "layer":
        for category in dict.fromkeys(m.category for m in matrices):
            _balance([m for m in matrices if m.category == category], trained, ratio)
    if not trained or len(trained) == len(matrices):
        raise InputError(
            f"half_fine_tuning: with ratio={ratio:g} at level {level!r} the mask {'trains' if trained else 'freezes'} all of "
            f"the {len(matrices)} matrices; choose a ratio nearer to 0.5 or a finer level."
        )
    return _of_matrices(matrices, frozenset(trained))


def check(level: str, ratio: float, measure: str = "matrices") -> None:
    """Raise InputError where an argument of `draw_mask` is out of range."""
    if level not in LEVELS:
        raise InputError(f"half_fine_tuning: level is one of {', '.join(LEVELS)}, and it is {level!r}.")
    if not 0 < ratio < 1:
        raise InputError(f"half_fine_tuning: ratio must be in (0, 1), and it is {ratio}.")
    if measure not in ("matrices", "parameters"):
        raise InputError(f"half_fine_tuning: measure is 'matrices' or 'parameters', and it is {measure!r}.")


def _of_category(matrices: list[Matrix], ratio: float, generator: torch.Generator) -> set[str]:
    """Give every block `floor(ratio*n)` trained matrices, and random blocks one more, until the total is `ratio*N` rounded."""
    blocks: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        blocks.setdefault(matrix.block, []).append(matrix)
    members = list(blocks.values())
    quota = [math.floor(ratio * len(block) + 1e-9) for block in members]
    open_ = [i for i, block in enumerate(members) if ratio * len(block) - quota[i] > 1e-9]
    for i in _choose(len(open_), _rounded(ratio * len(matrices)) - sum(quota), generator):
        quota[open_[i]] += 1
    return {block[i].name for block, n in zip(members, quota, strict=True) for i in _choose(len(block), n, generator)}


def _balance(matrices: list[Matrix], trained: set[str], ratio: float) -> None:
    """Flip or swap matrices while that brings the trained share of parameters nearer to `ratio`."""
    target = ratio * sum(m.size for m in matrices)
    for _ in range(len(matrices)):
        gap = sum(m.size for m in matrices if m.name in trained) - target
        on = [m for m in matrices if m.name in trained]
        off = [m for m in matrices if m.name not in trained]
        moves: list[tuple[float, list[str]]] = [(abs(gap - m.size), [m.name]) for m in on[: len(on) - 1]]
        moves += [(abs(gap + m.size), [m.name]) for m in off[: len(off) - 1]]
        # Equal sizes give equal swaps: one of each size, within the block, is enough.
        pairs = {(a.block, a.size, b.size): (a, b) for a in on for b in off if a.block == b.block}
        moves += [(abs(gap - a.size + b.size), [a.name, b.name]) for a, b in pairs.values()]
        best = min(moves, key=lambda move: (move[0], -len(move[1])), default=(abs(gap), []))
        if best[0] >= abs(gap):
            return
        trained.symmetric_difference_update(best[1])


def _of_matrices(matrices: Matrices, trained: frozenset[str]) -> ParameterMask:
    entries: dict[str, bool | Tensor] = dict.fromkeys(matrices.shapes, True)
    shares: dict[str, list[tuple[Piece, bool]]] = {}
    for matrix in matrices:
        for piece in matrix.pieces:
            shares.setdefault(piece.parameter, []).append((piece, matrix.name in trained))
    for name, pieces in shares.items():
        chosen = {on for _, on in pieces}
        if len(chosen) == 1:
            entries[name] = chosen.pop()
            continue
        shape, axis = pieces[0][0].shape, pieces[0][0].axis or 0
        rows = torch.zeros(shape[axis], dtype=torch.bool)
        for piece, on in pieces:
            rows[piece.rows] = on
        entries[name] = rows.view([-1 if i == axis else 1 for i in range(len(shape))])
    return ParameterMask(matrices, trained, entries)


def _elements(matrices: Matrices, ratio: float, generator: torch.Generator) -> ParameterMask:
    entries: dict[str, bool | Tensor] = dict.fromkeys(matrices.shapes, True)
    for name in dict.fromkeys(piece.parameter for matrix in matrices for piece in matrix.pieces):
        shape = matrices.shapes[name]
        flat = torch.zeros(shape.numel(), dtype=torch.bool)
        flat[torch.randperm(shape.numel(), generator=generator)[: _rounded(ratio * shape.numel())]] = True
        entries[name] = flat.view(shape)
    return ParameterMask(matrices, None, entries)


def _choose(n: int, k: int, generator: torch.Generator) -> list[int]:
    return sorted(torch.randperm(n, generator=generator)[:k].tolist())


def _rounded(x: float) -> int:
    return math.floor(x + 0.5 + 1e-9)


def _named(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the parameters that may be trained, and the other names of those that are tied."""
    if not isinstance(model, nn.Module):
        return {n: t for n, t in model.items() if t.is_floating_point()}, {}
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        home = first.setdefault(id(parameter), name)
        if home != name:
            aliases.setdefault(home, []).append(name)
    named = dict(model.named_parameters())
    # A frozen copy of a model, such as a reference, is drawn from like the model.
    trained = {n: p for n, p in named.items() if p.requires_grad} or named
    return {n: p.detach() for n, p in trained.items()}, aliases


def _rule(path: str, categories: Categories) -> _Rule | None:
    layout = next((rule for rule in _RULES if rule.fits(path)), None)
    if not isinstance(categories, Mapping):
        return layout
    for category, patterns in categories.items():
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            fused = layout or _Rule(category, "")
            return _Rule(category, "", fused.parts, fused.axis, fused.by_head)
    return None


def _refuse_shared(name: str, others: Sequence[str], own: bool, categories: Categories) -> None:
    def kind(each: str) -> str:
        if _EMBEDDING.search(each) is not None and not own:
            return "embedding"
        rule = _rule(_path(each), categories)
        return rule.category if rule is not None else ALWAYS

    for other in others:
        if kind(other) != kind(name):
            raise InputError(
                f"half_fine_tuning: {name} and {other} are one tensor, and they are of two categories ({kind(name)}, "
                f"{kind(other)}), so it is not known whether it may be frozen. Name categories that leave one of them out."
            )


def _pieces(
    model: Any, named: Mapping[str, Tensor], name: str, path: str, tensor: Tensor, rule: _Rule
) -> list[tuple[str, Piece]]:
    if not rule.parts:
        return [("", Piece(name, tensor.shape))]
    axis = rule.axis if tensor.ndim > 1 else 0
    length = tensor.shape[axis]
    sizes = _sizes(named, path, length, len(rule.parts))
    if not rule.by_head:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        blocks = [torch.arange(start, start + n) for start, n in zip(starts, sizes, strict=True)]
    else:
        head = _head_size(model, path)
        if length % (3 * head):
            raise InputError(f"half_fine_tuning: {name} has {length} rows, which is no multiple of 3 heads of {head}.")
        by_head = torch.arange(length).view(-1, 3, head)
        blocks = [by_head[:, i].flatten() for i in range(3)]
    return [(part, Piece(name, tensor.shape, axis, rows)) for part, rows in zip(rule.parts, blocks, strict=True)]


def _sizes(named: Mapping[str, Tensor], path: str, length: int, parts: int) -> list[int]:
    """Return how many rows of a fused tensor belong to each part; grouped queries are told by what the output projection reads."""
    output = named.get(f"{path.rpartition('.')[0]}.o_proj.weight") if parts == 3 else None
    queries = length // parts if output is None else output.shape[1]
    rest = (length - queries) // (parts - 1)
    if queries + rest * (parts - 1) != length or rest < 1:
        raise InputError(f"half_fine_tuning: the {length} rows of {path} do not divide into {parts} matrices.")
    return [queries, *[rest] * (parts - 1)]


def _head_size(model: Any, path: str) -> int:
    parent = path.rpartition(".")[0]
    if isinstance(model, nn.Module):
        module = model.get_submodule(parent)
        for attribute in ("head_size", "head_dim"):
            if isinstance(size := getattr(module, attribute, None), int):
                return size
    raise InputError(
        f"half_fine_tuning: {path} holds queries, keys and values head by head, and the size of a head is not known: its module "
        "needs an attribute head_size. Give the module, not its tensors."
    )


def _any_matrices(model: Any, named: Mapping[str, Tensor]) -> list[Matrix]:
    """Return every weight of two dimensions or more outside embeddings, with its bias."""
    found: dict[str, list[Piece]] = {}
    for name, tensor in named.items():
        path = _path(name)
        if isinstance(model, nn.Module) and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            continue
        found.setdefault(path, []).append(Piece(name, tensor.shape))
    kept = {path: pieces for path, pieces in found.items() if any(len(p.shape) > 1 for p in pieces)}
    return [Matrix(path or "weight", "matrix", path, tuple(pieces)) for path, pieces in kept.items()]


def _path(name: str) -> str:
    """Return the name of the module, or of the matrix in it, that a parameter belongs to."""
    name = re.sub(r"\.parametrizations\.(\w+)\.original\d*$", r".\1", name)
    head, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return head
    return re.sub(r"_(?:weight|bias)$", "", name)


def _block(path: str) -> str:
    """Return the name up to its first number: `model.layers.0`."""
    match = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
    return match[0] if match else ""


def _few(names: Mapping[str, Any]) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + (", ..." if len(names) > 4 else "")
