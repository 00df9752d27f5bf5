"""How long a person waits before anything happens: `poise --help`, and `import poise` beside `import torch`."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks.harness import Ratio, paired, seconds


def run(quick: bool) -> list[Ratio]:
    """Medians over fresh processes; the interpreter's own start is part of both sides."""
    repeats = 3 if quick else 9
    help_seconds = statistics.median(seconds(lambda: _python("-m", "poise", "--help")) for _ in range(repeats))
    pair = paired(
        lambda: _python("-c", "import poise"), lambda: _python("-c", "import torch"), repeats=repeats, warmup=1
    )
    return [
        Ratio("poise --help, seconds", help_seconds, 0.6, detail=f"median of {repeats} processes"),
        Ratio("import poise / import torch", pair.ratio, 1.3, detail=f"{pair.first:.2f} s against {pair.second:.2f} s"),
    ]


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
