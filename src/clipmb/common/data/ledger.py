"""Records of broken items: each is listed once, and too many of them stop the epoch."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipmb.common.errors import bad_input, logger

_WINDOW = 1000  # items, of which at most half may be broken


class Watch:
    """Counts broken items in windows of the epoch, and stops it when more than half of a window are broken.

    Windows lie at fixed places of the epoch, so that an epoch resumed in the middle of one never stops where the
    original would not have stopped.

    Args:
        items: Items of this process in an epoch.
        count: Number of processes.
    """

    def __init__(self, items: int, count: int) -> None:
        self._allowed = min(items, _WINDOW) / 2
        self._width = _WINDOW * count
        self._broken: Counter[int] = Counter()

    def check(self, places: np.ndarray, broken: list[tuple[str, str, int, int]]) -> None:
        """Counts the broken items of a batch.

        Args:
            places: Their places in the order of the epoch, (n,) integers.
            broken: (id, error, epoch, batch) of each.

        Raises:
            ValueError: More than half of a window is broken.
        """
        for place, (name, why, _, _) in zip(places.tolist(), broken, strict=True):
            window = place // self._width
            self._broken[window] += 1
            if self._broken[window] > self._allowed:
                raise bad_input(
                    "At most half of the items may be broken",
                    f"{self._broken[window]} of {round(2 * self._allowed)} are; the last one, {name}: {why}",
                    "Fix the files; the ledger or the log lists them",
                    shown=True,
                )


class Ledger:
    """Appends broken items to a JSON Lines file, each once in an epoch, or logs them.

    Args:
        path: The file; None to log instead.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = None if path is None else Path(path)
        self._known = self._load()

    def add(self, entries: Sequence[tuple[str, str, int | None, int | None]]) -> None:
        """Adds (id, error, epoch, batch); epoch and batch are None for items found when the files were opened."""
        new = []
        for entry in entries:
            if (entry[0], entry[2]) not in self._known:
                self._known.add((entry[0], entry[2]))
                new.append(entry)
        if not new:
            return
        if self._path is None:
            for name, error, epoch, _ in new:
                if epoch is not None:  # the others were logged when the files were opened
                    logger.warning("%s is broken and left out: %s", name, error)
            return
        lines = [
            json.dumps({"id": name, "error": error, "epoch": epoch, "batch": batch}) + "\n"
            for name, error, epoch, batch in new
        ]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line was cut when its process was killed
                    lines.insert(0, "\n")
            file.write("".join(lines).encode())

    def _load(self) -> set[tuple[str, int | None]]:
        known: set[tuple[str, int | None]] = set()
        if self._path is not None and self._path.is_file():
            for line in self._path.read_text("utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    known.add((entry["id"], entry["epoch"]))
                except (ValueError, TypeError, KeyError):
                    continue  # a line that was cut
        return known
