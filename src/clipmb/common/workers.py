"""How many threads or processes work at once."""

from __future__ import annotations

import os

_MOST = 8  # threads when nobody asks for more


def processors() -> int:
    """Returns the number of processors that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Returns how many threads work where the caller names no number: one for each processor, at most 8."""
    return min(processors(), _MOST)
