"""`python -m release.lowest [EXTRA ...]`: constraints that hold every requirement to the lowest version that it allows.

PyTorch stays at the build that `constraints.txt` pins: its lowest version has no build for the processor alone on every
package index, and the others would bring gigabytes. What is not required directly is left to pip.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*>=\s*([0-9][^,;\s]*)")


def constraints(extras: Sequence[str] = (), root: Path = ROOT) -> list[str]:
    """Return lines `name==version`, the lowest allowed of each requirement of the package and of the extras.

    Raises:
        ValueError: for an extra that there is not, a requirement without a lowest version, or a PyTorch that is not pinned.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project.get("optional-dependencies", {})
    if unknown := sorted(set(extras) - set(known)):
        raise ValueError(f"no extra named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    lines = [pinned("torch", root)]
    for requirement in [*project["dependencies"], *(one for extra in extras for one in known[extra])]:
        found = _REQUIREMENT.match(requirement)
        if found is None:
            raise ValueError(f"{requirement!r} names no lowest version; write it as NAME>=VERSION")
        if found[1] != "torch":
            lines.append(f"{found[1]}=={found[2]}")
    return lines


def pinned(name: str, root: Path = ROOT) -> str:
    """Return the line of `constraints.txt` that pins a package."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.split("==")[0].strip() == name:
            return line.strip()
    raise ValueError(f"constraints.txt pins no {name}; add {name}==VERSION to it")


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1:])))
