"""Kills a process at every one of its file operations; imported in a process that a test starts for it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir")


def at_every_operation(folder: Path, prepare: Callable[[Path], object], work: Callable[[Path], object]) -> None:
    """Prints the first k for which the work has fewer than k file operations.

    Args:
        folder: Gets a folder for every k from 1, left as it was when the work was killed at its k-th operation.
        prepare: Fills such a folder.
        work: Is done in a child.
    """
    k, status = 0, 1
    while status:
        k += 1
        prepare(folder / str(k))
        child = os.fork()
        if child == 0:
            _die_at(k)
            work(folder / str(k))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
    print(k)


def _die_at(left: int) -> None:
    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in OPERATIONS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
