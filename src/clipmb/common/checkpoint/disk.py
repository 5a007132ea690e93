"""A file for libraries that mishandle a full disk: HDF5 crashes on closing, PyTorch loses the cause."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class KeptErrors:
    """Writes to a file, and keeps its first error for later; after it, nothing more is written.

    Attributes:
        error: The first error, or None.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.seek, self.tell, self.read, self.readinto = file.seek, file.tell, file.read, file.readinto
        self.flush = file.flush
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of the data; returns its length, even after an error."""
        rest = memoryview(data).cast("B")
        while rest and self.error is None:
            rest = rest[self._tried(lambda rest=rest: self._file.write(rest)) :]
        return len(data)

    def truncate(self, size: int) -> int:
        """Cuts or extends the file; returns the size, even after an error."""
        self._tried(lambda: self._file.truncate(size))
        return size

    def raise_first(self) -> None:
        """Raises the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def _tried(self, action: Callable[[], int | None]) -> int:
        try:
            return action() or 0
        except OSError as error:
            self.error = self.error or error
            return 0
