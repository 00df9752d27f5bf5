"""Every ```python block of the README and of the documentation runs; the blocks of one file share a namespace.

A block that shows something that is not meant to run as it stands is fenced as ```py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """The pages that hold at least one block to run."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if page.is_file() and BLOCK.search(page.read_text(encoding="utf-8"))]


# Examples are shorter than training is, and a constraint says so.
@pytest.mark.filterwarnings("ignore:The constraint .* does not hold at the end of the run:poise.errors.PoiseWarning")
@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Line numbers of the page, so that a failing example is found at once.
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)


def test_the_readme_example_has_at_most_twelve_lines() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = BLOCK.search(text)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) <= 12
