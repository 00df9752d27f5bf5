"""`python -m release.contents WHEEL SDIST`: what must be in the two files is, and what must not be is not."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

LARGEST_FILE = 200_000
LARGEST_WHOLE = 5_000_000
NEEDED = (
    "poise/py.typed",
    "poise/claims/papers.json",
    "poise/tasks/control_experts.json",
    "poise/report/templates/report.html.j2",
    "poise/report/templates/solution.html.j2",
    "poise/report/templates/report.css",
    "poise/report/templates/report.js",
)
KINDS = {".py", ".typed", ".json", ".j2", ".css", ".js"}
"""What the package may hold. Anything else was left in the folder by somebody's work."""
SOURCE = Path(__file__).parents[1] / "src"


def of_wheel(path: Path) -> list[str]:
    """Return what is wrong with a wheel; nothing where all is well."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    inside = {name: size for name, size in sizes.items() if ".dist-info/" not in name}
    wrong = [f"{name} does not belong into the wheel" for name in inside if not name.startswith("poise/")]
    wrong += [
        f"{name} is of a kind that the package does not hold" for name in inside if Path(name).suffix not in KINDS
    ]
    if not any(".dist-info/" in name and name.endswith("/LICENSE") for name in sizes):
        wrong.append("the licence is missing")
    return wrong + _missing(set(inside)) + _large(path, sizes)


def of_sdist(path: Path) -> list[str]:
    """Return what is wrong with an sdist; nothing where all is well."""
    with tarfile.open(path) as archive:
        sizes = {m.name.partition("/")[2]: m.size for m in archive.getmembers() if m.isfile()}
    wrong = [
        f"{name} does not belong into the sdist"
        for name in sizes
        if name.split("/")[0] in ("tests", "benchmarks", "docs")
    ]
    wrong += [
        f"{name} is missing" for name in ("LICENSE", "README.md", "pyproject.toml", "PKG-INFO") if name not in sizes
    ]
    inside = {name.removeprefix("src/") for name in sizes if name.startswith("src/poise/")}
    return wrong + _missing(inside) + _large(path, sizes)


def _missing(inside: set[str]) -> list[str]:
    modules = {path.relative_to(SOURCE).as_posix() for path in SOURCE.glob("poise/**/*.py")}
    return [f"{name} is missing" for name in sorted({*NEEDED, *modules} - inside)]


def _large(path: Path, sizes: dict[str, int]) -> list[str]:
    wrong = [
        f"{name} has {size:,} bytes, more than {LARGEST_FILE:,}" for name, size in sizes.items() if size > LARGEST_FILE
    ]
    whole = path.stat().st_size
    return wrong + ([f"{path.name} has {whole:,} bytes, more than {LARGEST_WHOLE:,}"] if whole > LARGEST_WHOLE else [])


def main(paths: list[str]) -> int:
    """Print what is wrong; exit status 1 if anything is."""
    wrong = []
    for path in map(Path, paths):
        found = of_wheel(path) if path.suffix == ".whl" else of_sdist(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {'; '.join(found) or 'contents as they should be'}")
        wrong += found
    return 1 if wrong or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
