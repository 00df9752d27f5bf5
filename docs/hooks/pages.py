"""Puts every page of docs/papers/ and docs/api/ into the navigation, and writes the list of the 70 papers.

A worker on a new paper adds one file and nothing else: its page appears in the navigation under its own title, and
its row in the list of papers gets a link.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARKER = "<!-- the 70 papers -->"


def on_config(config: Any) -> Any:
    """Append the two sections whose pages are found, not listed."""
    docs = Path(config["docs_dir"])
    config["nav"] = [
        *config["nav"],
        {"Papers": ["papers/index.md", *_pages(docs, "papers/[0-9]*.md")]},
        {"API": _pages(docs, "api/*.md")},
    ]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the marker by the table of papers, with a link where a page exists."""
    if MARKER not in markdown:
        return markdown
    docs = Path(config["docs_dir"])
    records = json.loads((docs.parent / "src" / "poise" / "claims" / "papers.json").read_text(encoding="utf-8"))
    pages = {int(path.name[:2]): path.name for path in (docs / "papers").glob("[0-9][0-9]-*.md")}
    lines = ["| No. | Paper | arXiv | Room |", "| ---: | --- | --- | --- |"]
    for record in records:
        title = f"[{record['title']}]({pages[record['number']]})" if record["number"] in pages else record["title"]
        room = ", ".join(f"`{name}`" for name in record["room"])
        link = f"[{record['arxiv']}](https://arxiv.org/abs/{record['arxiv']})"
        lines.append(f"| {record['number']} | {title} | {link} | {room} |")
    return markdown.replace(MARKER, "\n".join(lines))


def _pages(docs: Path, pattern: str) -> list[dict[str, str]]:
    return [{_title(path): path.relative_to(docs).as_posix()} for path in sorted(docs.glob(pattern))]


def _title(path: Path) -> str:
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].strip() if heading else path.stem
