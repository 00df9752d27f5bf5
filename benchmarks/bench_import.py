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
    torch = "import torch"
    pair = paired(lambda: _python("-c", "import poise"), lambda: _python("-c", torch), repeats=repeats, warmup=1)
    # The package loads its rooms when they are used, so the import alone would flatter; this loads what a script needs.
    used = "import poise; poise.parse('cross_entropy + 3*early_learning'); poise.fit; poise.load_task"
    ready = paired(lambda: _python("-c", used), lambda: _python("-c", torch), repeats=repeats, warmup=1)
    return [
        Ratio("poise --help, seconds", help_seconds, 0.6, detail=f"median of {repeats} processes"),
        Ratio("import poise / import torch", pair.ratio, 1.3, detail=f"{pair.first:.2f} s against {pair.second:.2f} s"),
        Ratio("import poise, parse, fit, load_task / import torch", ready.ratio, 1.3, detail=f"{ready.first:.2f} s"),
    ]


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
