"""The site builds without a warning, its navigation finds every page, and doctests are shown as code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def hook(name: str) -> ModuleType:
    """Import one of the site's hooks, which are no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_navigation_finds_every_paper_and_every_api_page_by_itself() -> None:
    config = hook("pages").on_config({"docs_dir": str(ROOT / "docs"), "nav": []})
    papers, api = (section for entry in config["nav"] for section in entry.values())
    listed = [path for entry in (*papers[1:], *api) for path in entry.values()]
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("papers/[0-9]*.md")]
    there += [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("api/*.md")]
    assert sorted(listed) == sorted(there)


def test_the_list_of_papers_has_seventy_rows_and_links_the_pages_that_exist() -> None:
    pages = hook("pages")
    text = pages.on_page_markdown(pages.MARKER, page=None, config={"docs_dir": str(ROOT / "docs")}, files=None)
    assert len(text.splitlines()) == 72
    for path in (ROOT / "docs" / "papers").glob("[0-9]*.md"):
        assert f"]({path.name})" in text


def test_every_formula_that_the_advice_names_parses() -> None:
    from poise import parse

    for page in (ROOT / "docs" / "how-to-choose.md", ROOT / "README.md"):
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
        advice = [row.split("|")[2] for row in rows if row.count("|") >= 3]
        formulas = [text for cell in advice for text in re.findall(r"`([^`]+)`", cell) if not text.startswith("--")]
        assert formulas
        for text in formulas:
            parse(text, **({"a": 0.5} if "(1-a)" in text else {}))


def test_a_doctest_is_fenced_wherever_it_stands() -> None:
    pytest.importorskip("griffe", reason="the site needs the docs extra")
    fenced = hook("doctests").fence("A.\n\nArgs:\n    x: y.\n\n    >>> f(1)\n    2\n\nMore.")
    assert "```pycon\n>>> f(1)\n2\n```" in fenced
    assert fenced.endswith("More.\n")


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").is_file()
