"""What every test shares."""

from __future__ import annotations

import os

# Read once, when PyTorch is loaded. One thread a process: the suite runs in several processes, and more threads than
# cores make small operations many times slower.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
