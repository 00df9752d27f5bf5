"""Run a function on two real processes that talk through gloo."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returned on each of two processes; an exception comes back as its text."""
    mp.spawn(_work, args=(function, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _work(rank: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    code = 0
    try:
        result = function(*arguments)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    try:
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Gloo's threads may still run when the interpreter tears down, and then abort the process after its work is done.
    os._exit(code)
