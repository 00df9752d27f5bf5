"""A table that cannot fit is refused before it is split, with the way out."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from poise.errors import InputError
from poise.tasks import load_task


def test_a_table_too_large_for_the_memory_names_limit_and_streaming(tmp_path, monkeypatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("x,z,y\n" + "".join(f"{i}.5,{i % 7}.25,{i % 2}\n" for i in range(3000)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200_000))
    with pytest.raises(InputError, match=r"Splitting the 3,000 rows .*limit=.*DataLoader"):
        load_task(path, label="y")
    assert load_task(path, label="y", limit=300).examples == 300
