# ruff: noqa: E501
"""The kinds of hostile cases. A kind is a function of a generator and an empty folder that writes what is hostile and returns what reads it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_bytes import NAMES, damaged, damaged_text, mutated

Case = Callable[[], object]
Maker = Callable[[random.Random, Path], Case]
CANARY = "import builtins, os\nbuiltins.hostile_canary = True\nos.system('true')\ndef make(shape, outputs):\n    os.system('true')\n"
_seeds: dict[str, Any] = {}


def warm(kind: str, folder: Path, empty: Callable[[], None]) -> None:
    """Make what the cases of a kind start from, and run a few so that nothing is imported later."""
    if kind in _MAKE:
        _seeds[kind] = _MAKE[kind](folder)
    for number in range(40 if kind not in _SLOW else 3):
        empty()
        case = KINDS[kind](random.Random(f"warm {number}"), folder)
        with contextlib.suppress(Exception):
            case()


# ---- formulas -------------------------------------------------------------------------------------------------------


def formula(rng: random.Random, folder: Path) -> Case:
    """A formula is parsed; what parses is printed, and what is printed parses to the same."""
    import hostile_formulas

    from poise.formula import explain, parse

    text, explained = hostile_formulas.formula(rng), rng.random() < 0.05

    def case() -> None:
        printed = str(parse(text))
        if len(printed) <= 5_000:
            again = str(parse(printed))
            assert again == printed, (text, printed, again)
        if explained:
            explain(text)

    return case


# ---- tables ---------------------------------------------------------------------------------------------------------


def _table_text(rng: random.Random) -> str:
    mark, quote = rng.choice([",", ",", ";", "\t", "|"]), rng.random() < 0.3
    columns, rows = rng.choice([1, 2, 4, 9]), rng.choice([1, 3, 20])
    cells = [
        "1",
        "2",
        "0.5",
        "-3",
        "a",
        "b",
        "",
        "NA",
        "true",
        "2020-01-01",
        "99999999999999999999",
        "1e400",
        "1,5",
        "9999-12-31",
        "0001-01-01",
        "inf",
        *NAMES,
    ]

    def cell(header: bool = False) -> str:
        text = (
            rng.choice([*NAMES, "a", "b", "c", "label", "x1"])
            if header
            else rng.choice(cells[:16] if rng.random() < 0.9 else cells)
        )
        return '"' + text.replace('"', '""') + '"' if quote and rng.random() < 0.7 else text

    head = [cell(True) if rng.random() < 0.2 else f"c{place}" for place in range(columns)]
    fixed = [rng.choice(cells) for _ in range(columns)]
    body = [[fixed[place] if rng.random() < 0.6 else cell() for place in range(columns)] for _ in range(rows)]
    return rng.choice(["\n", "\r\n", "\n", "\r"]).join(mark.join(row) for row in [head, *body]) + rng.choice(["", "\n"])


def _text_bytes(rng: random.Random) -> bytes:
    raw = _table_text(rng).encode("utf-8", "surrogatepass")
    return damaged(rng, raw) if rng.random() < 0.7 else raw


def delimited(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.load import read_table

    path = folder / rng.choice(["a.csv", "a.tsv", "a.csv"])
    path.write_bytes(_text_bytes(rng))
    return lambda: read_table(path)


def task(rng: random.Random, folder: Path) -> Case:
    """The whole way of a table: reading, choosing inputs, splits, preprocessing."""
    from poise.tasks import load_task

    path = folder / "a.csv"
    rows = rng.choice([4, 30, 60])
    kinds = [rng.randrange(9) for _ in range(rng.choice([1, 2, 4]))]
    odd = ["", "NA", "inf", "-inf", "1e300", "1e-320", *NAMES[:20]]

    def cell(kind: int, row: int) -> str:
        if rng.random() < 0.03:
            return (
                rng.choice(odd)
                .replace("\n", " ")
                .replace("\r", " ")
                .replace("\x00", " ")
                .replace(",", " ")
                .replace('"', "'")
            )
        return [
            f"{rng.gauss(0, 1):.3f}",
            str(rng.randrange(3)),
            rng.choice("abc"),
            f"2020-01-{1 + row % 28:02d}",
            "",
            "5",
            rng.choice(["true", "false"]),
            str(10**15 + row),
            str(rng.gauss(0, 1e200)),
        ][kind]

    lines = [",".join([*(f"c{place}" for place in range(len(kinds))), "label"])]
    target = rng.randrange(5)
    for row in range(rows):
        goal = [str(row % 2), rng.choice("ab"), f"{rng.gauss(0, 1):.3f}", str(row), "1"][target]
        lines.append(",".join([*(cell(kind, row) for kind in kinds), goal]))
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(rng, raw) if rng.random() < 0.3 else raw)
    options: dict[str, Any] = {"label": "label"}
    for name, choices in (("target_type", ["classification", "regression"]), ("group", ["c0", "nope"]), ("time", ["c0", "c1"]), ("label_noise", [0.4, -1, 2]),
                          ("noise", ["pair", "asymmetric:a>b", "asymmetric:", "x>y"]), ("class_weight", ["balanced", "x"]), ("limit", [1, 5, 0, 10**12]),
                          ("split", [(0.5, 0.5, 0.0), (1, 0, 0), (float("nan"),) * 3, (0.9, 0.05, 0.05)]), ("test_file", [str(path), "../../etc/passwd"])):  # fmt: skip
        if rng.random() < 0.12:
            options[name] = rng.choice(choices)

    def case() -> None:
        split = load_task(path, **options).split(seed=0)
        assert torch.isfinite(split.train["input"]).all()

    return case


def _parquet_seeds(folder: Path) -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    tables = [
        pa.table({"x": [1.0, 2.0, None] * 20, "n": [1, 2, 3] * 20, "t": ["a", "b", None] * 20}),
        pa.table(
            {
                "d": pa.array([1, 2, None], pa.timestamp("ns")),
                "b": [True, None, False],
                "k": pa.array(["a", "b", "a"]).dictionary_encode(),
            }
        ),
        pa.table({"e": pa.array([1, 2], pa.decimal128(30, 2)), "s": pa.array([[1], [2]]), "h": pa.array([b"a", b"b"])}),
        pa.table({"chosen": ["a", "b"], "rejected": ["c", "d"], "prompt": ["e", "f"]}),
        pa.table(
            {
                "u": pa.array([1, 2**63], pa.uint64()),
                "w": pa.array([1, 2], pa.time64("ns")),
                "z": pa.nulls(2),
                "i": pa.array([1, 2], pa.int8()).dictionary_encode(),
            }
        ),
    ]
    seeds = []
    for entry in tables:
        for compression in ("none", "zstd", "snappy"):
            sink = io.BytesIO()
            parquet.write_table(entry, sink, compression=compression)
            seeds.append(sink.getvalue())
    return seeds


def parquet(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.language.files import read_rows
    from poise.tasks.load import is_language_source, read_table

    path = folder / "a.parquet"
    seed = rng.choice(_seeds["parquet"])
    raw = damaged(rng, seed)
    if rng.random() < 0.5:
        # Inside the footer, where the announced sizes stand.
        size = struct.unpack("<I", seed[-8:-4])[0]
        foot = len(seed) - 8 - size
        changed = bytearray(seed)
        for _ in range(rng.choice([1, 2, 4])):
            changed[foot + rng.randrange(size)] = rng.randrange(256)
        raw = bytes(changed)
    path.write_bytes(raw)
    if rng.random() < 0.4:
        return lambda: (is_language_source(str(path)), list(read_rows(path)))
    return lambda: read_table(path)


# ---- arrays ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch canary",)


def _npy_bytes(rng: random.Random) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        shape = rng.choice(
            [
                "(99999999999, 9)",
                "(-1, 2)",
                "(2,)",
                "()",
                "(2, 2, 2)",
                "(0, 3)",
                "(1" * 30 + ", 1)",
                "(3, " * 60,
                "(True, 2)",
                "2",
                "(2.5, 1)",
                "(10**9, 10**9)",
                "(2**62, 2**62)",
            ]
        )
        dtype = rng.choice(
            [
                "<f8",
                "|O",
                "<U4",
                "|S3",
                "<c16",
                "|V8",
                "<M8[s]",
                "|b1",
                "<f2",
                "[('a', '<f8')]",
                "[('a', '|O')]",
                "__import__('os')",
                "<U999999999",
                "<i1",
                ">i8",
                "(99999,)f8",
                "<f16",
                "<m8[s]",
            ]
        )
        dtype = dtype if dtype.startswith("[") else repr(dtype)
        header = f"{{'descr': {dtype}, 'fortran_order': {rng.choice(['False', 'True', '3', 'x'])}, 'shape': {shape}, }}".encode()
        version = rng.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
        length = struct.pack("<H", len(header)) if version[0] == 1 else struct.pack("<I", len(header))
        return b"\x93NUMPY" + version + length + header + b"\0" * rng.choice([0, 8, 64])
    sink = io.BytesIO()
    array: Any = [
        lambda: np.zeros((3, 2)),
        lambda: np.arange(6).reshape(3, 2),
        lambda: np.array([["a", "b"]]),
        lambda: np.array([[1 + 2j, 3]]),
        lambda: np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "<i4"), ("b", "<f8")]),
        lambda: np.array([[b"\xff", b"a"]]),
        lambda: np.array([Bomb()], dtype=object),
        lambda: np.array([["2020-01-01", "NaT"]], dtype="M8[D]"),
    ][rng.randrange(8)]()
    np.save(sink, array, allow_pickle=True)
    return damaged(rng, sink.getvalue()) if rng.random() < 0.8 else sink.getvalue()


def npy(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.load import read_table

    path = folder / "a.npy"
    path.write_bytes(_npy_bytes(rng))
    return lambda: read_table(path)


def npz(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.arrays import read_npz, read_npz_inputs

    path = folder / "a.npz"
    sink = io.BytesIO()
    packing = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(sink, "w", packing) as archive:
        names = rng.choice(
            [
                ["x.npy", "y.npy"],
                ["x.npy", "y.npy"],
                ["../../x.npy", "y.npy"],
                ["/x.npy", "y"],
                ["x.npy", "x.npy"],
                ["a.npy"],
                ["x.npy", "y.npy", "../escape"],
                ["x.txt", "y.npy"],
            ]
        )
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                good = io.BytesIO()
                np.save(
                    good,
                    rng.choice(
                        [
                            np.zeros((4, 2)),
                            np.arange(4),
                            np.zeros((4, 1)),
                            np.zeros((4, 3, 3), np.uint8),
                            np.array(list("abab")),
                            np.zeros(()),
                        ]
                    ),
                )
                archive.writestr(name, _npy_bytes(rng) if rng.random() < 0.3 else good.getvalue())
    raw = sink.getvalue()
    if rng.random() < 0.4:
        raw = damaged(rng, raw)
    elif rng.random() < 0.4:
        # The directory at the end, where a zip says what it holds.
        at = raw.rfind(b"PK\x01\x02")
        raw = raw[:at] + damaged(rng, raw[at:], 2)
    path.write_bytes(raw)
    if rng.random() < 0.3:
        return lambda: read_npz_inputs(path)
    label = rng.choice([None, None, "y", "nope", "../../x"])
    return lambda: read_npz(path, label)


def bombs(rng: random.Random, folder: Path) -> Case:
    """Small files that unpack to gigabytes, or announce them."""
    from poise.tasks.language.files import read_rows
    from poise.tasks.load import load_task

    kind = rng.randrange(6)
    zeros = b"\0" * (1 << 20)
    if kind < 2:
        path = folder / "a.npz"
        megabytes = rng.choice([400, 1300])
        header = io.BytesIO()
        shape = (megabytes, 1 << 20) if kind == 0 else (megabytes, 16, 1 << 16)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("x.npy", "w") as member:
                member.write(header.getvalue())
                for _ in range(megabytes if rng.random() < 0.5 else 3):
                    member.write(zeros)
            archive.writestr("y.npy", _saved(np.zeros(megabytes)))
        return lambda: load_task(path)
    if kind == 2:
        path = folder / "a.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            filler = rng.choice([zeros, b" " * (1 << 20)])
            file.write(rng.choice([b'{"prompt": "', b"[", b"", b'{"a": 1}\n']))
            for _ in range(1300):
                file.write(filler)
        return lambda: list(read_rows(path))
    if kind == 3:
        import pyarrow as pa
        from pyarrow import parquet as pq

        path = folder / "a.parquet"
        text = pa.array(["a" * (1 << 20)]).dictionary_encode()
        many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(3000, np.int32)), text.dictionary)
        pq.write_table(pa.table({"x": many, "label": pa.array(np.arange(3000) % 2)}), path, compression="zstd")
        return lambda: load_task(path, label="label")
    place = folder / "images"
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
        side = rng.choice([7_000, 30_000, 2**31 - 1])
        (place / name / "1.png").write_bytes(_png(side, side, zlib.compress(zeros)))
    return lambda: load_task(place)


def _saved(array: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


def _png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _image_seeds(folder: Path) -> dict[str, list[bytes]]:
    from PIL import Image

    found: dict[str, list[bytes]] = {}
    for mode in ("L", "RGB", "P", "RGBA", "1", "I;16"):
        for suffix, form in (
            ("png", "PNG"),
            ("jpg", "JPEG"),
            ("bmp", "BMP"),
            ("gif", "GIF"),
            ("webp", "WEBP"),
            ("tif", "TIFF"),
            ("ppm", "PPM"),
        ):
            sink = io.BytesIO()
            try:
                Image.new(mode, (6, 5)).save(sink, form)
            except (OSError, ValueError, KeyError):
                continue
            found.setdefault(suffix, []).append(sink.getvalue())
    # Other formats that the library would open under an innocent name, some with programs behind them.
    found["png"] += [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        b"P6 99999999 99999999 255\n",
        b"P5\n3 3\n65535\n" + b"\0" * 9,
    ]
    return found


def images(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.images import read_image_folder, read_images

    suffix = rng.choice(sorted(_seeds["images"]))
    place = folder / "data"
    for name in ("a", rng.choice(["b", "=b", "<b>"])):
        (place / name).mkdir(parents=True, exist_ok=True)
        seed = rng.choice(_seeds["images"][suffix])
        if rng.random() < 0.2:
            seed = _png(rng.choice([0, 1, 3, 2**31, 70_000]), rng.choice([1, 3, 2**31 - 1]), zlib.compress(b"\0" * 40))
        (place / name / f"1.{suffix}").write_bytes(damaged(rng, seed) if rng.random() < 0.8 else seed)
    if rng.random() < 0.1:
        (place / "a" / rng.choice(["2.png", "link.png"])).symlink_to(
            "/dev/zero" if rng.random() < 0.5 else "/etc/passwd"
        )
    grey = rng.random() < 0.5
    return (lambda: read_images(place, grey=grey)) if rng.random() < 0.3 else (lambda: read_image_folder(place))


# ---- language -------------------------------------------------------------------------------------------------------


def jsonl(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.language.records import read_records

    rows: list[Any] = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "x"}],
            "rejected": [{"role": "assistant", "content": "y"}],
        },
        {"prompt": "a", "response": "b", "label": True},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "a"},
    ]
    base = rng.choice(rows)
    made = [mutated(rng, base) if rng.random() < 0.6 else base for _ in range(rng.choice([1, 3, 8]))]
    raw = "\n".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in made)
    if rng.random() < 0.2:
        raw = json.dumps(made)
    if rng.random() < 0.1:
        raw = rng.choice(
            ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, "[[" * 5000 + "]]" * 5000, '{"prompt": "' + "\\ud800" * 5]
        )
    data = raw.encode("utf-8", "surrogatepass")
    data = damaged(rng, data) if rng.random() < 0.6 else data
    name = rng.choice(["a.jsonl", "a.json", "a.jsonl.gz"])
    if name.endswith("gz"):
        data = gzip.compress(data, 1)
        data = damaged(rng, data) if rng.random() < 0.5 else data
    path = folder / name
    path.write_bytes(data)
    skip = rng.random() < 0.5
    return lambda: read_records(path, skip_bad=skip)


def _dataset_seeds(folder: Path) -> dict[str, bytes]:
    import datasets

    place = folder / "made"
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}).save_to_disk(
        str(place)
    )
    return {path.name: path.read_bytes() for path in place.iterdir()}


def dataset_folder(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.language.records import read_records

    place = folder / "set"
    place.mkdir()
    for name, data in _seeds["dataset_folder"].items():
        if name.endswith(".json") and rng.random() < 0.5:
            changed = mutated(rng, json.loads(data))
            if name == "state.json" and isinstance(changed, dict) and rng.random() < 0.3:
                changed["_data_files"] = rng.choice(
                    [
                        [{"filename": "../../../etc/passwd"}],
                        [{"filename": "/dev/zero"}],
                        [{"filename": 3}],
                        [3],
                        3,
                        [{"filename": "\x00"}],
                        [],
                    ]
                )
            data = json.dumps(changed).encode("utf-8", "surrogatepass")
        (place / name).write_bytes(damaged(rng, data) if rng.random() < 0.4 else data)
    if rng.random() < 0.2:
        (place / "dataset_dict.json").write_text(
            json.dumps({"splits": rng.choice([["train"], ["../../.."], [], "train", 3, {"a": 1}, [3], ["\x00"]])})
        )
    return lambda: read_records(place)


def _model_seeds(folder: Path) -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    place = folder / "lm"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(str(place))
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(place))
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


def language_model(rng: random.Random, folder: Path) -> Case:
    """A folder of a language model: safetensors with damaged headers, configurations that ask for the folder's own code, pickles."""
    from poise.tasks.language.models import load_language_model

    place = folder / "lm"
    place.mkdir()
    target = rng.choice(
        ["model.safetensors", "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    for name, data in _seeds["language_model"].items():
        if name == target:
            if name == "model.safetensors" and rng.random() < 0.6:
                size = struct.unpack("<Q", data[:8])[0]
                header = json.loads(data[8 : 8 + size])
                text = json.dumps(mutated(rng, header, 0.1)).encode("utf-8", "surrogatepass")
                if rng.random() < 0.3:
                    text = damaged(rng, text)
                claimed = rng.choice([len(text)] * 5 + [2**63 - 1, 2**40, 0, len(text) + 1])
                data = struct.pack("<Q", claimed) + text + data[8 + size :]
            elif name.endswith(".json"):
                tree = json.loads(data)
                if rng.random() < 0.4 and isinstance(tree, dict):
                    tree["auto_map"] = {
                        "AutoConfig": "canary_model.Config",
                        "AutoModelForCausalLM": "canary_model.Model",
                        "AutoTokenizer": ["canary_model.Tok", None],
                    }
                    tree["model_type"] = rng.choice(["canary", "llama", "../../x"])
                if rng.random() < 0.3 and name == "config.json":
                    tree[
                        rng.choice(
                            [
                                "vocab_size",
                                "hidden_size",
                                "num_hidden_layers",
                                "intermediate_size",
                                "num_attention_heads",
                            ]
                        )
                    ] = rng.choice([10**5, 10**6, 10**9, -1, 0, "x", 2**63])
                data = json.dumps(mutated(rng, tree, 0.05)).encode("utf-8", "surrogatepass")
            else:
                data = damaged(rng, data)
        (place / name).write_bytes(data)
    (place / "canary_model.py").write_text(CANARY)
    if rng.random() < 0.1:
        (place / "model.safetensors").unlink()
        torch.save({"a": Bomb()}, place / "pytorch_model.bin")
    return lambda: load_language_model(place)


def _gguf_seed(folder: Path) -> bytes:
    import gguf

    path = folder / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"<unk>", b"a", b"b", b"c", b"d", b"e", b"f", b"g"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_file(rng: random.Random, folder: Path) -> Case:
    from poise.tasks.language.models import load_language_model

    path = folder / "a.gguf"
    raw = bytearray(_seeds["gguf"])
    if rng.random() < 0.6:
        # Counts and lengths of the header.
        at = rng.choice([4, 8, 16, 24, *range(24, 600, 4)])
        raw[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**16, 2**24, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]))
    path.write_bytes(bytes(raw) if rng.random() < 0.5 else damaged(rng, bytes(raw)))
    return lambda: load_language_model(path)


# ---- what Poise wrote itself ----------------------------------------------------------------------------------------


def _saved_seeds(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import save_model

    from poise.tasks import build_model

    model = build_model("mlp", (3,), 2)
    save_model(model, str(folder / "model.safetensors"))
    config = {
        "format": 1, "versions": {"poise": "0", "torch": "2"}, "formula": "cross_entropy", "weights": {}, "model": "mlp",
        "task": {"name": "a", "target_type": "classification", "classes": ["a", "b"], "outputs": 2, "input_shape": [3], "image_shape": None},
        "target": {"mean": 0.0, "std": 1.0},
        "preprocessor": {"kind": "table", "numbers": ["x"], "indicators": [], "categories": {"c": ["u", "v"]}, "medians": [0.0], "means": [0.0], "scales": [1.0], "seen": [True, True]},
        "metrics": {"accuracy": 1.0}, "training": {},
    }  # fmt: skip
    return {"model.safetensors": (folder / "model.safetensors").read_bytes(), "poise.json": json.dumps(config).encode()}


def saved_model(rng: random.Random, folder: Path) -> Case:
    """A folder of a saved model, then predictions of a table with it."""
    from poise.saved import SavedModel

    seeds = _seeds["saved_model"]
    config = json.loads(seeds["poise.json"])
    if rng.random() < 0.8:
        config = mutated(rng, config, 0.1)
    if isinstance(config, dict) and isinstance(config.get("task"), dict) and rng.random() < 0.3:
        config["model"] = rng.choice(
            [
                "canary_model:make",
                "subprocess:call",
                "os:system",
                "posix:abort",
                "builtins:exec",
                "linear",
                "cnn",
                ":",
                "a:b:c",
                "../x:y",
                ".x:y",
            ]
        )
        config["task"]["input_shape"] = rng.choice(
            [[3], ["touch", "canary"], [10**9], [10**5, 10**5], [-1], [], "abc", [0], [1, 5, 5]]
        )
        config["task"]["outputs"] = rng.choice([2, -1, 10**9, "x", 0, 2.5, None])
    text = json.dumps(config).encode("utf-8", "surrogatepass")
    (folder / "poise.json").write_bytes(damaged(rng, text) if rng.random() < 0.2 else text)
    weights = seeds["model.safetensors"]
    (folder / "model.safetensors").write_bytes(damaged(rng, weights) if rng.random() < 0.2 else weights)
    (folder / "canary_model.py").write_text(CANARY)
    data = folder / "new.csv"
    data.write_text("x,c\n1,u\n2,v\n,w\n")

    def case() -> None:
        sink = io.StringIO()
        SavedModel.load(folder).predict(data, device="cpu").write_csv(sink)

    return case


def checkpoint(rng: random.Random, folder: Path) -> Case:
    """A checkpoint, damaged, or made by somebody who knows the digest."""
    import hashlib

    from poise import checkpoint as checkpoints

    sink = io.BytesIO()
    kind = rng.randrange(6)
    state: Any = {"step": 3, "model": {"w": torch.zeros(3, 2)}, "list": [1, (2, 3)], "text": "a"}
    if kind == 0:
        state = {"a": Bomb()}
    torch.save(state, sink)
    body = sink.getvalue()
    if kind == 1:
        import pickle

        body = pickle.dumps({"a": Bomb()})
    elif kind == 2:
        body = damaged(rng, body)
    elif kind == 3:
        # A whole archive with damaged members.
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(out, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("data.pkl") or rng.random() < 0.1:
                    data = damaged(rng, data)
                new.writestr(name, data)
        body = out.getvalue()
    raw = b"poise-checkpoint-1 " + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    (folder / "step-000000000003.ckpt").write_bytes(damaged(rng, raw) if kind == 5 else raw)
    return lambda: checkpoints.load_newest(folder)


def study_file(rng: random.Random, folder: Path) -> Case:
    """A study.toml is read and its formulas are parsed; nothing runs."""
    import tomli_w

    from poise.studies import Study

    tree: Any = {"format": 1, "formulas": ["cross_entropy", "cross_entropy + auto*l2"], "seeds": [0, 1], "leave_one_out": True, "data": {"source": "digits", "split": [0.6, 0.2, 0.2]},
                 "training": {"model": "mlp", "solver": "sgd", "lr": 0.1, "epochs": 1, "solver_options": {"momentum": 0.9}}, "tuning": {"trials": 4}, "engine": {"name": "local", "workers": 1}}  # fmt: skip
    if rng.random() < 0.3:
        tree["data"]["source"] = rng.choice(
            [
                "../../../etc/passwd",
                "/etc/passwd",
                "\x00",
                "//host/x",
                "file:///etc/passwd",
                "http://localhost/x",
                "~",
                "",
                *NAMES,
            ]
        )
    if rng.random() < 0.3:
        tree["training"]["model"] = rng.choice(["canary_model:make", "subprocess:call", "../../x", "os:abort"])
    tree = mutated(rng, tree, 0.1)
    try:
        text = tomli_w.dumps(_plain(tree) if isinstance(tree, dict) else {"a": 1})
    except (TypeError, ValueError):
        text = "formulas = []"
    if rng.random() < 0.4:
        text = damaged_text(
            rng,
            text,
            [
                "\n[data]\n",
                "\n[[data]]\n",
                "a.b.c = 1\n",
                "= ",
                "'''",
                '"""',
                "[" * 2000,
                "1979-05-27",
                "{a = " * 2000,
                "nan",
                "\\u0000",
                "0x" + "f" * 5000,
                "9" * 5000,
            ],
        )
    path = folder / "study.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "canary_model.py").write_text(CANARY)
    return lambda: Study.from_toml(path, folder / "out")


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items() if item is not None}
    if isinstance(tree, list):
        return [_plain(item) for item in tree if item is not None]
    if isinstance(tree, int) and abs(tree) > 10**4000:
        return 0
    return tree


def _store_seed(folder: Path) -> dict[str, Any]:
    """A finished study of four runs, small."""
    import subprocess
    import sys

    script = (
        "from poise.studies import Study\n"
        "Study('wine', ['cross_entropy', 'cross_entropy + 0.1*l2'], seeds=2, epochs=1, out='made', workers=1, leave_one_out=False, model='linear').run()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)
    source = sqlite3.connect(folder / "made" / "study.sqlite")
    source.execute("PRAGMA journal_mode=DELETE")
    source.commit()
    source.close()
    return {"bytes": (folder / "made" / "study.sqlite").read_bytes()}


def store(rng: random.Random, folder: Path) -> Case:
    """A store of another's study: its report is written, and nothing else is."""
    from poise.report import write_report
    from poise.studies import Study

    path = folder / "study.sqlite"
    kind = rng.randrange(4)
    raw = _seeds["store"]["bytes"]
    if kind == 0:
        changed = bytearray(raw)
        for _ in range(rng.choice([1, 5, 50])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        raw = damaged(rng, raw) if rng.random() < 0.5 else bytes(changed)
    path.write_bytes(raw)
    if kind:
        base = sqlite3.connect(path)
        base.execute("PRAGMA foreign_keys=OFF")
        for _ in range(rng.choice([1, 1, 3])):
            try:
                _disturb(rng, base)
            except sqlite3.OperationalError:
                break  # the change before took away what this one changes
        base.commit()
        base.close()
    return lambda: write_report(Study.open(folder), folder / "page")


def _disturb(rng: random.Random, base: sqlite3.Connection) -> None:
    kind = rng.randrange(10)
    if kind < 3:
        key, text = rng.choice(base.execute("SELECT key, value FROM meta").fetchall() or [("study", "{}")])
        try:
            changed = json.dumps(mutated(rng, json.loads(text), 0.08)).encode("utf-8", "replace").decode()
        except ValueError:
            changed = "{"
        base.execute("UPDATE meta SET value=? WHERE key=?", (changed, key))
    elif kind < 7:
        column = rng.choice(["spec", "metrics", "context"])
        run, text = rng.choice(base.execute(f"SELECT id, {column} FROM runs").fetchall())
        try:
            changed = json.dumps(mutated(rng, json.loads(text), 0.1)).encode("utf-8", "replace").decode()
        except (ValueError, TypeError):
            changed = "{"
        base.execute(f"UPDATE runs SET {column}=? WHERE id=?", (changed, run))
    elif kind == 7:
        column = rng.choice(["status", "error", "seconds", "peak_memory_bytes", "steps", "started", "detail"])
        base.execute(
            f"UPDATE OR IGNORE runs SET {column}=? WHERE rowid=1",
            (rng.choice(["x", -1, 1e300, b"\xff", "failed", "<script>", 2**62, ""]),),
        )
    elif kind == 8:
        from poise.studies import curves

        data = rng.choice(
            [
                b"",
                b"x",
                zlib.compress(b"\0" * (1 << 20)),
                curves.pack({"</script>": ([0, 1], [1.0, float("nan")]), "loss": ([0], [1e38])}),
                damaged(rng, curves.pack({"loss": ([0, 1], [1.0, 2.0])})),
            ]
        )
        if rng.random() < 0.3:
            header = json.dumps(mutated(rng, {"grids": [2], "curves": [["loss", 0]]}, 0.3)).encode()
            data = zlib.compress(struct.pack("<I", len(header)) + header + b"\0" * 64)
        base.execute("UPDATE curves SET data=? WHERE rowid=1", (data,))
    else:
        base.execute(rng.choice(["DELETE FROM meta", "DELETE FROM curves", "DROP TABLE curves", "DELETE FROM runs", "PRAGMA user_version=99", "PRAGMA user_version=0", "PRAGMA application_id=1",
                                 "CREATE TRIGGER t AFTER INSERT ON meta BEGIN DELETE FROM runs; END", "ALTER TABLE runs RENAME TO other"]))  # fmt: skip


@cache
def _zeros(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(1)
    return b"".join(squeeze.compress(b"\0" * (1 << 20)) for _ in range(megabytes)) + squeeze.flush()


def curves(rng: random.Random, folder: Path) -> Case:
    from poise.studies import curves as compact

    kind = rng.randrange(4)
    if kind == 0:
        data = damaged(rng, compact.pack({"loss": ([0, 10], [1.5, 0.25])}))
    elif kind == 1:
        inner = damaged(rng, zlib.decompress(compact.pack({"loss": ([0, 10], [1.5, 0.25])})))
        data = zlib.compress(inner)
    elif kind == 2:
        header = json.dumps(mutated(rng, {"grids": [2], "curves": [["loss", 0], ["b", 0]]}, 0.3)).encode(
            "utf-8", "replace"
        )
        data = zlib.compress(struct.pack("<I", rng.choice([len(header), 2**32 - 1, 0])) + header + b"\0" * 64)
    else:
        data = _zeros(rng.choice([1, 1, 1, 300]))
    return lambda: compact.unpack(data)


KINDS: dict[str, Maker] = {
    "formula": formula, "delimited": delimited, "task": task, "parquet": parquet, "npy": npy, "npz": npz, "bombs": bombs, "images": images, "jsonl": jsonl,
    "dataset_folder": dataset_folder, "language_model": language_model, "gguf": gguf_file, "saved_model": saved_model, "checkpoint": checkpoint,
    "study_file": study_file, "store": store, "curves": curves,
}  # fmt: skip
_MAKE: dict[str, Callable[[Path], Any]] = {
    "parquet": _parquet_seeds, "images": _image_seeds, "dataset_folder": _dataset_seeds, "language_model": _model_seeds, "gguf": _gguf_seed,
    "saved_model": _saved_seeds, "store": _store_seed,
}  # fmt: skip
_SLOW = ("bombs", "language_model", "gguf", "store")
