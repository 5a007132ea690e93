"""Writing files so that a kill at any moment leaves the old set of files or the new one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from clipmb.common.errors import CheckpointError, bad_input

_COMMITTED = ".clipmb-save"
_PLAN = "clipmb-save.json"
_STAGING = ".clipmb-staging-"
_LEFTOVER_SECONDS = 3600


class Transaction:
    """A set of files that replaces others in one folder, all or nothing.

    The new files are written into a hidden folder beside the old ones and synced to disk. Renaming that folder to its
    committed name is the one moment at which the save happens; afterwards the files are moved into place. A process
    killed before that rename leaves the old files, one killed after it leaves the new ones: `finish` moves what was
    not yet moved, and every reader and writer of clipmb calls it first.

    >>> with Transaction(folder) as save:
    ...     save.write("config.json", "{}")
    ...     save.remove("model.safetensors.index.json")
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._removed: list[str] = []

    def __enter__(self) -> Transaction:
        if self.folder.exists() and not self.folder.is_dir():
            raise bad_input("A model is saved into a folder", str(self.folder), "Pass a folder, not a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        finish(self.folder)
        self._clear_leftovers()
        self._staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.folder))
        return self

    def _clear_leftovers(self) -> None:
        """Removes what killed saves left behind; young folders may belong to a save that is still running."""
        for path in self.folder.glob(f"{_STAGING}*"):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Returns where to write the file that will be called ``name``."""
        return self._staging / name

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a small file whole."""
        self.path(name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    def remove(self, *names: str) -> None:
        """Removes files of an earlier save, if they exist and this save does not replace them."""
        self._removed.extend(names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            return
        try:
            written = sorted(path.name for path in self._staging.iterdir())
            for name in written:
                self._staging.joinpath(name).chmod(0o666 & ~_umask())
                _sync(self._staging / name)
            self.write(_PLAN, json.dumps({"removed": sorted(set(self._removed) - set(written))}))
            _sync(self._staging / _PLAN)
            _sync(self._staging)
            os.replace(self._staging, self.folder / _COMMITTED)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise
        finish(self.folder)


def finish(folder: Path) -> None:
    """Moves the files of a committed but interrupted save into place; does nothing when there is none.

    Raises:
        CheckpointError: There is such a save and the folder cannot be written to.
    """
    committed = folder / _COMMITTED
    if not committed.is_dir():
        return
    try:
        plan = committed / _PLAN
        if plan.exists():  # the plan goes last, so without it everything was moved
            removed = json.loads(plan.read_text("utf-8"))["removed"]
            for path in committed.iterdir():
                if path.name != _PLAN:
                    os.replace(path, folder / path.name)
            for name in removed:
                (folder / Path(name).name).unlink(missing_ok=True)
            _sync(folder)
            plan.unlink()
        committed.rmdir()
        _sync(folder)
    except OSError as error:
        raise CheckpointError(
            f"An interrupted save in {folder} has to be finished first, which failed: {error}. "
            f"Make the folder writable and load it once, or move the files of {committed} into it by hand."
        ) from error


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # pragma: no cover - Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces one file so that a kill at any moment leaves the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
