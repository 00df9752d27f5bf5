"""`PYTHON release/smoke.py`: whether an installed Poise works at all, in the environment of the Python that runs it.

It stands alone (nothing from the repository is imported), so that an installation cannot borrow from the checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def poise(*arguments: str, folder: str) -> str:
    """Run the installed command and return what it prints; its end with an error is ours."""
    command = [str(Path(sys.executable).parent / "poise"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"poise {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def every_module() -> int:
    """Import every module of the package; what only an extra brings must be imported where it is used."""
    import pkgutil

    package = importlib.import_module("poise")
    names = [m.name for m in pkgutil.walk_packages(package.__path__, "poise.") if not m.name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return len(names)


def main() -> None:
    """Import, help, a solution and a short comparison."""
    package = importlib.import_module("poise")
    where = Path(package.__file__ or "").resolve()
    if not where.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"poise was imported from {where}, not from the environment {sys.prefix}; unset PYTHONPATH")
    print(f"poise {package.__version__}: {every_module()} modules imported")
    with tempfile.TemporaryDirectory() as folder:
        if "compare" not in poise("--help", folder=folder):
            sys.exit("poise --help names no compare")
        poise("solve", "diabetes", "least_squares + 0.1*l1", "--path", "0", "--out", "s", "--quiet", folder=folder)
        certificate = json.loads((Path(folder) / "s" / "solution.json").read_text(encoding="utf-8"))["certificate"]
        if certificate["residual"] > certificate["tolerance"]:
            sys.exit(f"the solution misses its certificate: {certificate}")
        formulas = ("cross_entropy", "cross_entropy + 0.1*confidence_penalty")
        short = ("--seeds", "2", "--epochs", "1", "--no-leave-one-out", "--out", "c", "--quiet")
        poise("compare", "wine", *formulas, *short, folder=folder)
        if "<html" not in (Path(folder) / "c" / "report.html").read_text(encoding="utf-8"):
            sys.exit("the report of the comparison is no page")
    print("poise --help, solve and compare: as they should be")


if __name__ == "__main__":
    main()
