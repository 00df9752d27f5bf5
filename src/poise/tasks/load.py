"""From a name or a path to a `Task`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from poise.data.label_noise import KINDS
from poise.errors import InputError, nearest
from poise.tasks.arrays import ArrayPair, read_npy, read_npz, read_npz_inputs
from poise.tasks.columns import choose_inputs
from poise.tasks.delimited import read_delimited
from poise.tasks.embedded import EMBEDDED
from poise.tasks.images import read_image_folder, read_images
from poise.tasks.labels import CLASSIFICATION, REGRESSION, Labels, check_class_sizes, find_label, read_labels
from poise.tasks.memory import check_memory
from poise.tasks.parquet import read_parquet
from poise.tasks.preprocessing import Layout, Preprocessor, TablePreprocessor, as_text, check_columns, lay_out
from poise.tasks.splits import check_fractions, generator_for, stratified_split
from poise.tasks.table import Categories, Column, Table, missing
from poise.tasks.task import Examples, Recipe, Task, check_test_rows

if TYPE_CHECKING:
    from poise.tasks.language.task import LanguageTask

# Raise it when the same file and options give other tensors than before.
_FORMAT = 1
# Measured: what hashing, fitting and applying the preprocessing hold at their peak beside the matrix itself.
_BYTES_A_CELL = 44
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab")
REPLIES = "replies"
"""The embedded pairs, for the small language model that comes with them."""
_TABLE_SUFFIXES = (*_TEXT_SUFFIXES, ".parquet", ".pq", ".npy")
_FORMATS = (
    "CSV (.csv), TSV (.tsv), Parquet (.parquet), NPZ (.npz), NPY (.npy), or a folder of images with one folder a class"
)


@dataclass(frozen=True)
class Options:
    """The arguments of `load_task` beside the source."""

    label: str | None
    target_type: str | None
    split: tuple[float, ...]
    group: str | None
    time: str | None
    test_file: str | None
    label_noise: float
    noise: str
    class_weight: str | None
    limit: int | None


@dataclass
class _Source:
    """What a reader gives, before rows are limited and splits are prepared."""

    name: str
    content: str
    inputs: Table | Tensor
    labels: Labels
    image_shape: tuple[int, int, int] | None = None
    group: Tensor | None = None
    time: Tensor | None = None
    layout: Layout | None = None
    test: Examples | None = None
    input_shape: tuple[int, ...] = ()
    class_map: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load_task(
    source: str | os.PathLike[str],
    *,
    label: str | None = None,
    target_type: str | None = None,
    split: Sequence[float] = (0.6, 0.2, 0.2),
    group: str | None = None,
    time: str | None = None,
    test_file: str | os.PathLike[str] | None = None,
    label_noise: float = 0.0,
    noise: str = "symmetric",
    class_weight: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    skip_bad: bool = False,
) -> Task | LanguageTask:
    """Load an embedded data set or the user's own file as a task.

    Numbers are standardised and missing ones imputed, text becomes one column a category; all of it is fitted on the training rows of each
    split. A regression target is standardised in the splits; `split.metrics` reports in its own unit.

    Args:
        source: "digits", "breast_cancer", "wine", "diabetes", "mnist", or a path: CSV, TSV, Parquet, NPZ, NPY, a folder of images.
        label: the label column (for NPZ, the target's array).
        target_type: "classification" or "regression"; None infers it, and `task.notes` says how.
        split: shares of training, validation and test; each seed draws anew, classes keep their shares.
        group: column whose groups are never divided between the parts.
        time: column that orders the rows: the oldest train, the newest test.
        test_file: a file of the same columns that is the test part; `split` then divides the rest.
        label_noise: share of training and validation labels that noise is applied to, in [0, 1].
        noise: "symmetric", "pair", "asymmetric" (digits and mnist know their usual confusions), or "asymmetric:cat>dog,dog>cat".
        class_weight: "balanced" gives training rows a `sample_weight` with which every class counts alike.
        limit: use at most this many rows, drawn at random once (the same for every seed).
        max_length, max_prompt_length: of answers of language models, in tokens; see `poise.tasks.language.tokenize`.
        skip_bad: leave out records that cannot be used, count and list them, instead of stopping at the first.
    Returns:
        A `Task`; or a `LanguageTask` for "replies", JSON lines, a folder that `datasets` saved, or Parquet with `chosen` and
        `rejected`.
    Raises:
        InputError: whatever is wrong with the source, a column or an argument, in one paragraph.
        MissingDependencyError: mnist without the extra `data`.

        >>> task = load_task("digits", label_noise=0.4)
        >>> task.input_shape, task.primary
        ((64,), 'accuracy')
    """
    text = os.fspath(source)
    if is_language_source(text):
        refused = {
            "label": label,
            "target_type": target_type,
            "group": group,
            "time": time,
            "class_weight": class_weight,
        }
        given = [name for name, value in {**refused, "label_noise": label_noise or None}.items() if value is not None]
        if given:
            raise InputError(f"{', '.join(given)}: these options are for tables and images, and {text} holds texts.")
        from poise.tasks.language.task import load_language_task

        return load_language_task(
            text, split=split, test_file=test_file, limit=limit, max_length=max_length, max_prompt_length=max_prompt_length,
            skip_bad=skip_bad,
        )  # fmt: skip
    if max_length is not None or max_prompt_length is not None or skip_bad:
        raise InputError(
            f"max_length, max_prompt_length and skip_bad are for texts, and {text} is none: give JSON lines, for instance."
        )
    options = Options(
        label,
        target_type,
        tuple(split),
        group,
        time,
        os.fspath(test_file) if test_file is not None else None,
        label_noise,
        noise,
        class_weight,
        limit,
    )
    shares = check_fractions(options.split, options.test_file is not None)
    loaded = _embedded(text, options) if text in EMBEDDED else _read_path(text, options)
    _limit(loaded, options.limit)
    target = loaded.labels.values
    _check_rows(loaded, options)
    class_map = _check_noise(loaded, options)
    if options.class_weight not in (None, "balanced"):
        raise InputError(f"class_weight must be 'balanced' or None, got {options.class_weight!r}.")
    if options.class_weight and loaded.labels.classes is None:
        raise InputError("class_weight='balanced' needs classes; this task is a regression.")
    data = Examples(loaded.inputs, target)
    _warn_of_copies(loaded, data, options)
    recipe = Recipe(
        shares,
        loaded.group,
        loaded.time,
        float(label_noise),
        noise.partition(":")[0],
        class_map,
        class_weight is not None,
    )
    return Task(
        name=loaded.name,
        source=text,
        target_type=REGRESSION if loaded.labels.classes is None else CLASSIFICATION,
        classes=loaded.labels.classes,
        input_shape=loaded.input_shape,
        image_shape=loaded.image_shape,
        examples=len(data),
        fingerprint=_fingerprint(loaded.content, options),
        notes=[*loaded.notes, *loaded.labels.notes, *_how_it_splits(options, loaded)],
        warnings=loaded.warnings,
        data=data,
        recipe=recipe,
        layout=loaded.layout,
        test_data=loaded.test,
    )


def is_embedded(source: str) -> bool:
    """Whether a source is a name that Poise knows, and no place."""
    return source in EMBEDDED or source == REPLIES


def is_language_source(text: str) -> bool:
    """Whether a source holds texts for a language model: decided by its name, its suffix, or the columns of a Parquet file."""
    if text == REPLIES:
        return True
    path = Path(text)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".json")):
        return True
    if path.is_dir():
        return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    if path.suffix.lower() in (".parquet", ".pq") and path.is_file():
        import pyarrow.parquet as parquet

        try:
            columns = set(parquet.read_schema(path).names)
        except Exception:
            return False  # the reader of tables says what is wrong with the file
        return {"chosen", "rejected"} <= columns or {"prompt", "response"} <= columns
    return False


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a table file of any known format by its suffix.

    Args:
        path: .csv, .tsv, .parquet or .npy.
    Raises:
        InputError: no such file, an unknown format, or whatever its reader finds.

        >>> table = read_table("wine.csv")  # doctest: +SKIP
    """
    path = _existing(path)
    suffix = path.suffix.lower()
    if suffix in _TEXT_SUFFIXES:
        return read_delimited(path)
    if suffix in (".parquet", ".pq"):
        return read_parquet(path)
    if suffix == ".npy":
        return read_npy(path)
    raise InputError(f"{path} is of an unknown format. Poise reads {_FORMATS}.")


def read_inputs(path: str | os.PathLike[str], preprocessor: Preprocessor) -> Tensor:
    """Read new examples for a trained model; labels need not be there.

    Args:
        path: a file of the format that training read, or a folder of images.
        preprocessor: of the split that the model was trained on.
    Returns:
        float32 `[rows, ...]`, in the order of the file (images in the order of their names).
    Raises:
        InputError: the file cannot be read, or lacks columns that training used.
    """
    path = _existing(path)
    found: Table | Tensor
    if path.is_dir():
        if isinstance(preprocessor, TablePreprocessor):
            raise InputError(f"{path} is a folder, and training had a table. Give a table of the same columns.")
        found = read_images(path, grey=preprocessor.shape[0] == 1)
    elif path.suffix.lower() == ".npz":
        found = read_npz_inputs(path)
    else:
        found = read_table(path)
    if isinstance(preprocessor, TablePreprocessor):
        if isinstance(found, Tensor):
            raise InputError(
                f"{path} holds arrays of {found.ndim} dimensions where training had a table [rows, columns]."
            )
        return preprocessor.transform(found)
    return preprocessor.transform(_matrix(found) if isinstance(found, Table) else found)


def _matrix(table: Table) -> Tensor:
    columns = []
    for name, column in table.columns.items():
        if isinstance(column, Categories):
            raise InputError(f"Column {name!r} holds text where training had numbers.")
        columns.append(column.float())
    return torch.stack(columns, dim=1)


def _embedded(name: str, options: Options) -> _Source:
    for argument in ("label", "group", "time", "test_file"):
        if getattr(options, argument) is not None:
            raise InputError(f"{argument}= is for files; the embedded task {name!r} has no columns to choose from.")
    data = EMBEDDED[name]()
    kind = CLASSIFICATION if data.classes is not None else REGRESSION
    if options.target_type not in (None, kind):
        raise InputError(
            f"The embedded task {name!r} is a {kind}; target_type={options.target_type!r} does not fit it."
        )
    loaded = _Source(name, _tensor_hash(data.inputs, data.target), data.inputs, Labels(data.target, data.classes, ()))
    loaded.notes.append(data.note)
    loaded.image_shape, loaded.class_map = data.image_shape, data.class_map
    if data.standardise:
        loaded.inputs = Table({column: data.inputs[:, place].contiguous() for place, column in enumerate(data.names)})
        loaded.layout, _ = lay_out(loaded.inputs)
    loaded.input_shape = (data.inputs.shape[1],)
    return loaded


def _read_path(text: str, options: Options) -> _Source:
    path = _existing(text)
    if path.is_dir():
        return _from_folder(path, options)
    if path.suffix.lower() == ".npz":
        found = read_npz(path, options.label)
        if isinstance(found, ArrayPair):
            return _from_arrays(path, found, options)
        label = options.label or found.names[-1]
        return _from_table(path, found, replace(options, label=label))
    return _from_table(path, read_table(path), options)


def _existing(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.exists():
        return path
    known = list(EMBEDDED)
    beside = [str(path.parent / entry) for entry in os.listdir(path.parent)] if path.parent.is_dir() else []
    if path.suffix or os.sep in str(source):
        raise InputError(f"There is no file {str(source)!r}.{nearest(str(path), beside)} Poise reads {_FORMATS}.")
    raise InputError(
        f"There is no task and no file {str(source)!r}.{nearest(str(source), [*known, *beside])} The embedded tasks "
        f"are {', '.join(known)}; otherwise give {_FORMATS}."
    )


def _from_folder(path: Path, options: Options) -> _Source:
    _only_for_tables(options, f"{path} is a folder of images", ("label", "group", "time"))
    if options.target_type == REGRESSION:
        raise InputError(
            f"{path} is a folder of images with one folder a class; target_type='regression' does not fit it."
        )
    folder = read_image_folder(path)
    loaded = _Source(path.name, folder.content, folder.images, Labels(folder.target, folder.classes, ()))
    channels, height, width = folder.images.shape[1:]
    loaded.input_shape = loaded.image_shape = (channels, height, width)
    loaded.notes.append(
        f"{len(folder.target)} images of {width} x {height} pixels in {len(folder.classes)} folders: classification; values in [0, 1]."
    )
    if options.test_file is not None:
        other = read_image_folder(_existing(options.test_file))
        if other.images.shape[1:] != folder.images.shape[1:]:
            raise InputError(
                f"The test images are {list(other.images.shape[1:])} (channels, height, width), the training images "
                f"{list(folder.images.shape[1:])}."
            )
        loaded.test = Examples(
            other.images, _rename_classes(other.target, other.classes, folder.classes, options.test_file)
        )
        loaded.content += other.content
    return loaded


def _from_arrays(path: Path, found: ArrayPair, options: Options) -> _Source:
    _only_for_tables(options, f"{path} holds images", ("group", "time"))
    labels = read_labels(found.target, options.label or "target", options.target_type)
    loaded = _Source(path.stem, file_hash(path), found.inputs, labels, notes=list(found.notes))
    loaded.input_shape = tuple(found.inputs.shape[1:])
    if len(loaded.input_shape) == 3:
        loaded.image_shape = (loaded.input_shape[0], loaded.input_shape[1], loaded.input_shape[2])
    if options.test_file is not None:
        other = read_npz(_existing(options.test_file), options.label)
        if not isinstance(other, ArrayPair) or other.inputs.shape[1:] != found.inputs.shape[1:]:
            raise InputError(f"The test file {options.test_file} has inputs of another shape than {path}.")
        loaded.test = Examples(other.inputs, _test_labels(other.target, labels, options))
        loaded.content += file_hash(Path(options.test_file))
    return loaded


def _from_table(path: Path, table: Table, options: Options) -> _Source:
    label, notes = find_label(table, options.label, str(path))
    if options.group is not None and options.time is not None:
        raise InputError("group and time cannot be combined: a time split may have to divide a group. Choose one.")
    roles = tuple(name for name in (label, options.group, options.time) if name is not None)
    if len(set(roles)) < len(roles):
        raise InputError("label, group and time must be different columns.")
    group = _group_numbers(table.require(options.group, "group"), options.group) if options.group else None
    time = _moments(table, options.time) if options.time else None
    labels = read_labels(table[label], label, options.target_type)
    chosen = choose_inputs(table, roles)
    layout, more = lay_out(chosen.table)
    # The limit is applied afterwards; what is checked is what will be split.
    rows = min(table.rows, options.limit or table.rows)
    needed = rows * (4 * layout.width + _BYTES_A_CELL * (len(layout.numbers) + len(layout.categories)))
    check_memory(needed, f"Splitting the {rows:,} rows of {layout.width:,} inputs each")
    loaded = _Source(path.stem, file_hash(path), chosen.table, labels, group=group, time=time, layout=layout)
    loaded.input_shape = (layout.width,)
    loaded.notes = [*table.notes, *notes, *chosen.notes, *more]
    loaded.warnings = list(chosen.warnings)
    if options.test_file is not None:
        _add_test_table(loaded, table, label, options)
    return loaded


def _add_test_table(loaded: _Source, table: Table, label: str, options: Options) -> None:
    assert options.test_file is not None
    assert loaded.layout is not None
    path = _existing(options.test_file)
    found = read_npz(path, options.label) if path.suffix.lower() == ".npz" else read_table(path)
    if isinstance(found, ArrayPair):
        raise InputError(f"The test file {path} holds images and the training file a table.")
    check_columns(found, loaded.layout)
    column = found.require(label, "label of the test file")
    if options.group is not None:
        crossing = set(as_text(table[options.group]).values) & set(
            as_text(found.require(options.group, "group of the test file")).values
        )
        if crossing:
            raise InputError(
                f"{len(crossing)} groups of {options.group!r} stand in the training file and in the test file, for "
                f"instance {min(crossing)!r}. A group must not cross."
            )
    names = (*loaded.layout.numbers, *loaded.layout.categories)
    assert isinstance(loaded.inputs, Table)
    inputs = Table({name: found[name] for name in loaded.inputs.names if name in names}, found.integers, found.dates)
    loaded.test = Examples(inputs, _test_labels(column, loaded.labels, options))
    loaded.content += file_hash(path)


def _test_labels(column: Column, labels: Labels, options: Options) -> Tensor:
    absent = missing(column)
    if bool(absent.any()):
        raise InputError(
            f"The label of {int(absent.sum())} rows of the test file {options.test_file} is missing. Fill in or remove these rows."
        )
    if labels.classes is None:
        if isinstance(column, Categories):
            raise InputError(
                f"The label of the test file {options.test_file} is text, for instance {column.values[0]!r}, where training has numbers."
            )
        return column.float()
    text = as_text(column)
    return _rename_classes(text.codes.long(), text.values, labels.classes, options.test_file)


def _rename_classes(target: Tensor, theirs: tuple[str, ...], ours: tuple[str, ...], source: str | None) -> Tensor:
    """Class indices by the names of another file -> indices of the training classes."""
    unknown = [name for code, name in enumerate(theirs) if name not in ours and bool((target == code).any())]
    if unknown:
        raise InputError(
            f"The test file {source} has classes that training does not have: {', '.join(map(repr, unknown[:5]))}. "
            f"The training classes are {', '.join(map(repr, ours[:20]))}."
        )
    place = {name: at for at, name in enumerate(ours)}
    return torch.tensor([place.get(name, -1) for name in theirs])[target]


def _group_numbers(column: Column, name: str | None) -> Tensor:
    absent = missing(column)
    if bool(absent.any()):
        raise InputError(f"The group column {name!r} has no value in {int(absent.sum())} rows. Give every row a group.")
    values = column.codes if isinstance(column, Categories) else column
    numbers: Tensor = torch.unique(values, return_inverse=True)[1]
    return numbers


def _moments(table: Table, name: str) -> Tensor:
    column = table.require(name, "time")
    if isinstance(column, Categories):
        raise InputError(
            f"The time column {name!r} holds text that is no date Poise can order, for instance "
            f"{column.values[0]!r}. Write dates as 2026-01-31 or 2026-01-31 12:00:00, or give a number."
        )
    if not bool(torch.isfinite(column).all()):
        raise InputError(
            f"The time column {name!r} has missing or infinite values in {int((~torch.isfinite(column)).sum())} "
            "rows. Give every row a time."
        )
    return column.double()


def _only_for_tables(options: Options, what: str, arguments: tuple[str, ...]) -> None:
    for argument in arguments:
        if getattr(options, argument) is not None:
            raise InputError(f"{argument}= names a column, and {what}.")


def _limit(loaded: _Source, limit: int | None) -> None:
    """Keep a random choice of rows, the same for every seed, with the classes' shares kept."""
    if limit is None:
        return
    if limit < 3:
        raise InputError(f"limit must be at least 3 rows, one for each part of the split; got {limit}.")
    total = len(loaded.labels.values)
    if limit >= total:
        return
    generator = generator_for(0, "limit")
    share = limit / total
    if loaded.labels.classes is not None and limit >= 3 * len(loaded.labels.classes):
        rows = stratified_split(loaded.labels.values, (share, 1 - share, 0.0), generator).train
    else:
        rows = torch.randperm(total, generator=generator)[:limit].sort().values
    loaded.labels = replace(loaded.labels, values=loaded.labels.values[rows])
    loaded.inputs = loaded.inputs.take(rows) if isinstance(loaded.inputs, Table) else loaded.inputs[rows]
    loaded.group = loaded.group[rows] if loaded.group is not None else None
    loaded.time = loaded.time[rows] if loaded.time is not None else None
    loaded.notes.append(f"{len(rows)} of the {total} rows are used (limit).")


def _check_rows(loaded: _Source, options: Options) -> None:
    parts = 2 if options.test_file is not None else 3
    if len(loaded.labels.values) < parts:
        raise InputError(
            f"{loaded.name} has {len(loaded.labels.values)} rows, and the split has {parts} parts. Give more rows."
        )
    # Groups and moments decide where a class can stand; only a stratified split promises every class to every part.
    if options.group is None and options.time is None:
        check_class_sizes(loaded.labels, options.label or "label", parts)


def _check_noise(loaded: _Source, options: Options) -> dict[int, int] | None:
    """Return the class map of asymmetric noise; raise InputError where the noise does not fit the task."""
    kind, _, pairs = options.noise.partition(":")
    if kind not in KINDS:
        raise InputError(f"There is no label noise {kind!r}.{nearest(kind, KINDS)} The kinds are {', '.join(KINDS)}.")
    if not 0 <= options.label_noise <= 1:
        raise InputError(f"label_noise must lie in 0..1, got {options.label_noise!r}.")
    if not options.label_noise:
        return None
    classes = loaded.labels.classes
    if classes is None:
        raise InputError("label_noise flips classes; this task is a regression and has none.")
    if kind != "asymmetric":
        return None
    if pairs:
        return _parse_class_map(pairs, classes)
    if loaded.class_map:
        return loaded.class_map
    raise InputError(
        "Asymmetric noise needs to know which class is taken for which: "
        f"noise='asymmetric:{classes[0]}>{classes[1]}'. noise='pair' takes each class for the next."
    )


def _parse_class_map(text: str, classes: tuple[str, ...]) -> dict[int, int]:
    class_map: dict[int, int] = {}
    for pair in text.split(","):
        source, arrow, taken = (piece.strip() for piece in pair.partition(">"))
        if not arrow:
            raise InputError(f"Expected pairs such as asymmetric:cat>dog,dog>cat; {pair!r} has no '>'.")
        for name in (source, taken):
            if name not in classes:
                raise InputError(
                    f"There is no class {name!r}.{nearest(name, classes)} The classes are {', '.join(classes[:20])}."
                )
        if source == taken:
            raise InputError(f"Label noise takes class {source!r} for itself; name another class after '>'.")
        class_map[classes.index(source)] = classes.index(taken)
    return class_map


def _warn_of_copies(loaded: _Source, data: Examples, options: Options) -> None:
    hashes = data.hashes()
    if loaded.test is not None:
        loaded.warnings += check_test_rows(hashes, loaded.test.hashes())
        return
    copies = len(hashes) - len(np.unique(hashes))
    if copies and options.group is None and options.time is None:
        loaded.warnings.append(
            f"{copies} of the {len(hashes)} rows are exact copies of another row. A random split puts copies into "
            "training and into test, which makes the test easier than it"
            " should be; remove them, or name a group column."
        )


def _how_it_splits(options: Options, loaded: _Source) -> list[str]:
    if options.time is not None:
        return [
            f"Split by {options.time!r}: the oldest rows train, the newest test. Every seed has the same split; "
            "seeds differ in the model's start and the order of batches."
        ]
    if options.group is not None:
        return [f"Split by the groups of {options.group!r}; no group stands in two parts."]
    if options.test_file is not None:
        return [f"The test part is {options.test_file}, the same for every seed."]
    return []


def _fingerprint(content: str, options: Options) -> str:
    """sha256 over content and options: the same data read the same way, wherever the file lies."""
    chosen = asdict(options) | {"test_file": options.test_file is not None}
    text = json.dumps({"format": _FORMAT, "content": content, "options": chosen}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 over a file's bytes, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
