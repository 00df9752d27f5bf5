"""What a release has to pass: what the two files hold, an installation from nothing, each extra alone, the lowest versions."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
contents, install, lowest = (importlib.import_module(f"release.{name}") for name in ("contents", "install", "lowest"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and sdist, built from a copy, so that the checkout stays as it is."""
    import shutil

    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("copy") / "poise"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*", "build", "dist", "site")
    for name in ("src", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy / name)
    out = copy.parent / "dist"
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(copy)], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should_and_nothing_else(built: Path, wheel: Path) -> None:
    assert contents.of_wheel(wheel) == []
    assert contents.of_sdist(next(built.glob("*.tar.gz"))) == []


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    python = install.environment(tmp_path / "alone")
    install.install(python, str(wheel), ROOT / "constraints.txt")
    install.smoke(python)


@pytest.mark.slow
def test_the_wheel_works_with_the_lowest_versions(wheel: Path, tmp_path: Path) -> None:
    limits = tmp_path / "constraints-lowest.txt"
    limits.write_text("\n".join(lowest.constraints()), encoding="utf-8")
    python = install.environment(tmp_path / "lowest")
    install.install(python, str(wheel), limits)
    install.smoke(python)


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted(install.MODULES))
def test_each_extra_alone_is_installed_and_imported(wheel: Path, tmp_path: Path, extra: str) -> None:
    install.try_extra(install.environment(tmp_path / extra), wheel, extra, ROOT / "constraints.txt")


def test_every_extra_of_a_user_is_tried() -> None:
    assert sorted(install.users_extras()) == sorted(install.MODULES)


def test_every_requirement_names_its_lowest_version() -> None:
    lines = lowest.constraints(install.users_extras())
    assert lines[0] == lowest.pinned("torch")
    assert len(lines) == len({line.split("==")[0] for line in lines})
    for line in lines:
        name, _, version = line.partition("==")
        assert name
        assert version[0].isdigit()


def test_a_requirement_without_a_lowest_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["numpy<3"]\n', encoding="utf-8")
    with pytest.raises(ValueError, match="names no lowest version; write it as NAME>=VERSION"):
        lowest.constraints(root=tmp_path)
    with pytest.raises(ValueError, match="no extra named nothing; there are data"):
        lowest.constraints(["nothing"])


def test_what_does_not_belong_into_the_files_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("tests/test_a.py", "")
        archive.writestr("poise/weights.pt", "")
        archive.writestr("poise/large.json", " " * 300_000)
    wrong = "\n".join(contents.of_wheel(tmp_path / "a.whl"))
    for words in (
        "tests/test_a.py does not belong",
        "poise/weights.pt is of a kind",
        "poise/py.typed is missing",
        "poise/objective.py is missing",
        "poise/large.json has 300,000 bytes",
        "the licence is missing",
    ):
        assert words in wrong
    (tmp_path / "test_a.py").write_text("")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "test_a.py", "poise-1/tests/test_a.py")
    wrong = "\n".join(contents.of_sdist(tmp_path / "a.tar.gz"))
    assert "tests/test_a.py does not belong" in wrong
    assert "pyproject.toml is missing" in wrong
