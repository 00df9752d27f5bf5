"""Reading text tables: pandas as the oracle, and every way in which a file can be broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.errors import InputError
from poise.tasks import delimited
from poise.tasks.delimited import read_delimited
from poise.tasks.table import Categories, Table


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def texts(table: Table, name: str) -> list[str | None]:
    column = table[name]
    assert isinstance(column, Categories)
    return [None if code < 0 else column.values[code] for code in column.codes.tolist()]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 400),
    block=st.sampled_from([64, 500, 1 << 21]),
    threads=st.integers(1, 3),
)
def test_the_tensors_equal_what_pandas_reads_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, rows: int, block: int, threads: int
) -> None:
    import pandas

    monkeypatch.setattr(delimited, "_BLOCK", block)
    generator = np.random.default_rng(seed)
    frame = pandas.DataFrame(
        {
            "number": generator.normal(size=rows),
            "whole": generator.integers(-5, 5, rows),
            "text": generator.choice(["a", "b", "ü"], rows),
            "holes": np.where(generator.random(rows) < 0.3, np.nan, generator.normal(size=rows)),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = read_delimited(tmp_path / "t.csv", threads=threads)
    assert table.rows == rows
    # Arrow rounds to the nearest float32, and so does NumPy from the same digits read as float64: within one unit in the last place.
    for name in ("number", "whole", "holes"):
        np.testing.assert_allclose(table[name], frame[name].to_numpy().astype(np.float32), rtol=1.2e-7)
    assert texts(table, "text") == frame["text"].tolist()
    assert "whole" in table.integers
    assert "number" not in table.integers


def test_quoted_line_ends_and_delimiters_stay_inside_their_value(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", 'a,b\n1,"two\nlines, one value"\n2,plain\n'))
    assert table["a"].tolist() == [1.0, 2.0]
    assert texts(table, "b") == ["two\nlines, one value", "plain"]


def test_a_quotation_mark_late_in_a_large_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_HEAD", 200)
    monkeypatch.setattr(delimited, "_BLOCK", 100)
    lines = [f"{row},plain" for row in range(100)]
    text = "a,b\n" + "\n".join(lines) + '\n100,"two\nlines"\n'
    table = read_delimited(write(tmp_path / "t.csv", text))
    assert table.rows == 101
    assert texts(table, "b")[-1] == "two\nlines"


@pytest.mark.parametrize(
    ("late", "expected"), [("0.5", "number"), ("word", "text"), ("12345678901234567890123", "number"), ("", "number")]
)
def test_a_late_value_widens_its_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str, expected: str
) -> None:
    monkeypatch.setattr(delimited, "_HEAD", 200)
    text = "a,b\n" + "".join(f"{row},1\n" for row in range(200)) + f"{late},1\n"
    table = read_delimited(write(tmp_path / "t.csv", text))
    assert table.rows == 201
    if expected == "text":
        assert texts(table, "a")[-1] == late
        assert any("'a'" in note and late in note for note in table.notes)
    else:
        assert isinstance(table["a"], torch.Tensor)
        assert table["a"][:3].tolist() == [0.0, 1.0, 2.0]


def test_a_column_that_begins_empty_is_still_read_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_HEAD", 100)
    text = "a,b\n" + "1,\n" * 100 + "1,2.5\n"
    column = read_delimited(write(tmp_path / "t.csv", text))["b"]
    assert isinstance(column, torch.Tensor)
    assert column[-1] == 2.5
    assert bool(column[:100].isnan().all())


def test_whole_numbers_beyond_float32_stay_exact(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", "a,b\n16777217,1\n16777219,2\n"))
    assert table["a"].dtype == torch.float64
    assert table["a"].tolist() == [16777217.0, 16777219.0]
    assert table["b"].dtype == torch.float32


def test_numbers_that_lie_close_together_keep_their_differences(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", "a\n1000000.25\n1000000.5\n1000000.75\n"))
    assert (table["a"] - table["a"][0]).tolist() == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_other_delimiters_are_found(tmp_path: Path, mark: str) -> None:
    table = read_delimited(write(tmp_path / "t.csv", f"a{mark}b\n1{mark}2.5\n3{mark}4\n"))
    assert table["b"].tolist() == [2.5, 4.0]


def test_a_decimal_comma_is_read_and_stated(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", "a;b\n1,5;2\n2,5;3\n"))
    assert table["a"].tolist() == [1.5, 2.5]
    assert any("decimal comma" in note for note in table.notes)


def test_dates_are_seconds_and_missing_words_are_missing(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", "day,x,c\n1970-01-02,NA,?\n1970-01-03,1.5,red\n"))
    assert table["day"].tolist() == [86400.0, 172800.0]
    assert table.dates == {"day"}
    assert bool(torch.isnan(table["x"][0]))
    assert texts(table, "c") == [None, "red"]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    table = read_delimited(write(tmp_path / "t.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n3,4\r\n"))
    assert table.names == ["a", "b"]
    assert table["b"].tolist() == [2.0, 4.0]


def test_booleans_are_categories(tmp_path: Path) -> None:
    assert texts(read_delimited(write(tmp_path / "t.csv", "a,b\ntrue,1\nfalse,2\n")), "a") == ["true", "false"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"a,b\n", "no rows"),
        (b"a,b,a\n1,2,3\n", "more than one column named 'a'"),
        (b"1,2\n3,4\n", "has no header"),
        ("a,b\ncaf\u00e9,1\n".encode("latin-1"), "not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "not UTF-8"),
        (b"a,b\n\x00\x01,2\n", "zero bytes"),
        (b"a,b,c\n1,2,3\n4,5,6\n7,8", "truncated or broken in row 3.*expected 3 values.*found 2"),
        (b"a,b\n1,2,3\n", "expected 2 values.*found 3"),
        (b"x" * 1_100_000, "no line end"),
        (b",".join(b"c%d" % place for place in range(20_001)) + b"\n", "at most 20000"),
    ],
)
def test_a_broken_file_is_refused_in_one_paragraph(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_delimited(write(tmp_path / "t.csv", content))
    assert "\n" not in str(caught.value)


def test_a_short_line_far_into_a_large_file_is_named_by_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_HEAD", 100)
    monkeypatch.setattr(delimited, "_BLOCK", 100)
    lines = ["1,2"] * 500
    lines[399] = "1"
    with pytest.raises(InputError, match="in row 400 after the header"):
        read_delimited(write(tmp_path / "t.csv", "a,b\n" + "\n".join(lines) + "\n"))


def test_equal_rows_have_equal_hashes_across_files(tmp_path: Path) -> None:
    one = read_delimited(write(tmp_path / "1.csv", "a,b,c\n1.5,red,\n2.5,blue,3\n-0.0,red,1\n"))
    two = read_delimited(write(tmp_path / "2.csv", "a,b,c\n0.0,red,1\n1.5,red,\n2.5,green,3\n"))
    first, second = one.row_hashes(), two.row_hashes()
    assert first[0] == second[1]
    assert first[2] == second[0]
    assert first[1] not in second
    assert len(set(first.tolist())) == 3


def test_a_file_beyond_the_free_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import psutil

    path = write(tmp_path / "t.csv", "a,b\n" + "1,2\n" * 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(InputError, match="GiB of memory"):
        read_delimited(path)


def test_quoted_names_alone_do_not_cost_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "_stream", lambda *_: pytest.fail("read by the serial reader"))
    assert read_delimited(write(tmp_path / "t.csv", '"a","b"\n1,2\n')).names == ["a", "b"]
