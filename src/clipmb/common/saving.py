"""Files of one folder that are replaced together, even while others read or write it or a process is killed.

A save is prepared in a hidden folder beside the files, and one rename commits it; then its files are moved into place.
Readers change nothing and take no lock: until all files are moved, `current` finds the rest of them where they still
lie, and `read_whole` repeats what was read while a save took place. Writers hold a lock on the folder, and the next
writer finishes or clears away what a killed one left. docs/saving.md states the protocol and why it holds.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no such locks, and there writers are on their own
    fcntl = None

from clipmb.common.errors import CheckpointError, bad_input, logger

_COMMITTED = ".clipmb-save"
_PLAN = "clipmb-save.json"
_STAGING = ".clipmb-staging-"
_BESIDE = ".clipmb-beside-"
_OWN = re.compile(r"[^./\\\0][^/\\\0]*")  # what a save may consist of: no hidden file, nothing in another folder
_GROWING = (".jsonl", ".png", ".log")  # what a training run changes between its saves
_OPTIMISTIC = 3  # attempts at reading before the readers' lock is taken
_UNLOCKED_SECONDS = 3600  # without locks, a younger staging folder may belong to a save that is still running
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


class _Plan(NamedTuple):
    """What a committed save consists of: the names that it writes and those that it removes."""

    written: frozenset[str]
    removed: frozenset[str]


# -- reading ----------------------------------------------------------------------------------------------------------


def current(folder: Path, name: str) -> Path | None:
    """Returns where a file of the last committed save of a folder is; None when there is no such file."""
    plan = _plan_of(folder)
    if plan is not None and name in plan.removed:
        return None
    if plan is not None and name in plan.written and _is_plain_file(folder / _COMMITTED / name):
        return folder / _COMMITTED / name
    path = folder / name
    return path if os.path.isfile(path) else None  # which is false, too, for names longer than a file system takes


def names(folder: Path) -> list[str]:
    """Lists the files of a folder as of its last committed save, those of its subfolders not included."""
    plan = _plan_of(folder) or _Plan(frozenset(), frozenset())
    present = {path.name for path in folder.iterdir() if path.is_file()} - plan.removed
    return sorted(present | {name for name in plan.written if current(folder, name) is not None})


def read_whole(folder: Path | None, read: Callable[[], T]) -> T:
    """Calls ``read`` until no save took place while it ran, so that what it read belongs together.

    Args:
        folder: What it reads from; None for what nobody saves into, which is read once.
        read: May be called several times. What it returns must not read the folder's files later by their names.

    Returns:
        What ``read`` returned.
    """
    if folder is None or not folder.is_dir():
        return read()
    for _ in range(_OPTIMISTIC):
        before = version(folder)
        try:
            result = read()
        except Exception:
            if version(folder) == before:
                raise
        else:
            if version(folder) == before:
                return result
            del result  # before the next is made, which may be as large
    with locked(folder, shared=True):  # another process saves faster than this can be read
        return read()


def version(folder: Path) -> list[tuple[Path, int, int, int]]:
    """Identifies a save of a folder: where each file is, and which file that is."""
    found = []
    with suppress(FileNotFoundError):  # a file that is moved between its listing and here: not the version of before
        for name in names(folder):
            if not name.endswith(_GROWING) and (path := current(folder, name)) is not None:
                about = path.stat()
                found.append((path, about.st_ino, about.st_size, about.st_mtime_ns))
        return found
    return [*found, (folder, time.monotonic_ns(), 0, 0)]


def stamps(path: Path | None) -> dict[str, tuple[int, int, int]]:
    """Identifies the contents of a file, or of every file of a folder's last save: inode, size and time by name."""
    if path is None or not path.exists():
        return {}
    if path.is_dir():
        return {place.name: (inode, size, when) for place, inode, size, when in version(path)}
    about = path.stat()
    return {path.name: (about.st_ino, about.st_size, about.st_mtime_ns)}


def _plan_of(folder: Path) -> _Plan | None:
    """Returns the plan of a committed save whose files are not all in place; None where there is no valid one."""
    committed = folder / _COMMITTED
    try:
        if not stat.S_ISDIR(committed.lstat().st_mode) or not _is_plain_file(committed / _PLAN):
            return None
        content = json.loads((committed / _PLAN).read_bytes())
        plan = _Plan(*(frozenset(content[field]) for field in _Plan._fields))
        return plan if all(_OWN.fullmatch(name) for name in plan.written | plan.removed) else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _is_plain_file(path: Path) -> bool:
    """Whether there is a file of this name that is not a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


# -- writing ----------------------------------------------------------------------------------------------------------


class Transaction:
    """A set of files that replaces others in one folder, all or nothing. Waits for other writers of the folder.

    >>> with Transaction(folder) as save:
    ...     save.write("config.json", "{}")
    ...     save.remove("model.safetensors.index.json")

    Args:
        folder: Where the files go; made when it is missing.

    Raises:
        ValueError: ``folder`` is a file, or something other than a file has the name of one that is written.
        CheckpointError: The folder holds a `.clipmb-save` that no save of clipmb made.
        OSError: The files cannot be written; a full disk is reported with the room that is needed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not os.fspath(folder):
            raise bad_input("The destination must be a folder", folder, 'Pass its path, "." for the working directory')
        self.folder = Path(folder)
        self._removed: set[str] = set()

    def __enter__(self) -> Transaction:
        if self.folder.exists() and not self.folder.is_dir():
            raise bad_input("The destination must be a folder", str(self.folder), "Pass a folder, not a file")
        self._made = not self.folder.exists()
        self._lock = locked(self.folder)
        self._lock.__enter__()
        try:
            _repair(self.folder)
            self._staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.folder))
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def path(self, name: str) -> Path:
        """Returns where to write the file that will be called ``name``."""
        return self._staging / name

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a small file."""
        self.path(name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    def remove(self, *names: str) -> None:
        """Removes files of an earlier save, when they exist and this save does not write them."""
        self._removed.update(names)

    def reserve(self, size: int) -> None:
        """Checks that there is room for files of this many bytes in all, before any is written.

        Raises:
            OSError: There is not.
        """
        if (free := shutil.disk_usage(self.folder).free) < size:
            rule = f"The save needs {size:,} bytes, and the disk has {free:,} left"
            raise OSError(errno.ENOSPC, rule, str(self.folder))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
            elif isinstance(error, OSError) and error.errno in NO_ROOM and error.filename != str(self.folder):
                raise self._no_room(error) from error
        except OSError as failure:
            if failure.errno in NO_ROOM and failure.filename != str(self.folder):
                raise self._no_room(failure) from failure
            raise
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            if self._made:
                with suppress(OSError):  # unless something was saved
                    self.folder.rmdir()
            self._lock.__exit__(None, None, None)

    def _commit(self) -> None:
        written = sorted(path.name for path in self._staging.iterdir())
        removed = sorted(self._removed - set(written))
        for name in (*written, *removed):  # what can fail, fails now
            if not _OWN.fullmatch(name):
                raise bad_input("A save may only write plain files of its folder", name, "Choose another name")
            if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                raise bad_input(f"A save writes a file called {name}", f"{self.folder} with a folder of this name",
                                "Move that folder away", shown=True)  # fmt: skip
        now = time.time_ns()  # finer than the file system's own clock, so that two saves never look alike
        for name in written:
            self._staging.joinpath(name).chmod(0o666 & ~umask())
            os.utime(self._staging / name, ns=(now, now))
            _sync(self._staging / name)
        self.path(_PLAN).write_text(json.dumps({"written": written, "removed": removed}))
        _sync(self._staging / _PLAN)
        _sync(self._staging)
        os.rename(self._staging, self.folder / _COMMITTED)
        _sync(self.folder)
        _finish(self.folder, _Plan(frozenset(written), frozenset(removed)))

    def _no_room(self, error: OSError) -> OSError:
        size = sum(path.stat().st_size for path in self._staging.iterdir()) if self._staging.is_dir() else 0
        free = shutil.disk_usage(self.folder).free
        rule = f"There is no room for the save: more than {size:,} bytes are needed beside the files that are there"
        return OSError(error.errno, f"{rule}, and {free:,} are free", str(self.folder))


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


@contextmanager
def prepared_beside(folder: Path) -> Iterator[Path]:
    """Yields a new folder in a hidden one beside another, to be filled and then renamed to that; else it is removed.

    What processes that were killed left for the same folder is removed first; living ones hold the lock of their own
    hidden folder, in which that to be filled can be locked by what is saved into it. Folders above that were made for
    it are removed again where it did not come to be.
    """
    made = [above for above in folder.parents if not above.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{_BESIDE}{folder.name}-"
    own = re.compile(re.escape(prefix) + "[^-]*")
    for path in folder.parent.iterdir():
        if own.fullmatch(path.name) and path.is_dir() and not path.is_symlink() and _is_left(path):
            with suppress(OSError), locked(path, wait=False):
                shutil.rmtree(path, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with locked(staging):
            filled = staging / "new"
            filled.mkdir()
            yield filled
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):  # the first that is not empty, and those above
            for above in made:
                above.rmdir()


def _is_left(staging: Path) -> bool:
    """Whether nobody can be writing here, as far as it shows without the lock."""
    return fcntl is not None or time.time() - staging.stat().st_mtime > _UNLOCKED_SECONDS


def _repair(folder: Path) -> None:
    """Finishes a save whose writer was killed after it was committed, and removes what those killed before it left.

    Raises:
        CheckpointError: The committed save is not one of clipmb's.
    """
    committed = folder / _COMMITTED
    if committed.is_symlink() or committed.exists():
        plan = _plan_of(folder)
        if plan is None and not (committed.is_symlink() or committed.is_file() or any(committed.iterdir())):
            committed.rmdir()  # everything was moved
        elif plan is None:
            raise CheckpointError(f"{committed} was not written by clipmb. Move it away to save here.")
        else:
            _finish(folder, plan)
    for path in folder.glob(f"{_STAGING}*"):
        if not path.is_symlink() and _is_left(path):
            shutil.rmtree(path, ignore_errors=True)


def _finish(folder: Path, plan: _Plan) -> None:
    """Moves the files of a committed save into place."""
    committed = folder / _COMMITTED
    for name in sorted(plan.written):
        if _is_plain_file(committed / name):
            os.replace(committed / name, folder / name)
    for name in sorted(plan.removed):
        (folder / name).unlink(missing_ok=True)
    _sync(folder)
    (committed / _PLAN).unlink()
    shutil.rmtree(committed, ignore_errors=True)
    _sync(folder)


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a folder: alone, or with other readers. It ends with the process, and leaves no file.

    Where the file system has no locks, there is none.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is false.
    """
    if fcntl is None:  # pragma: no cover
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        if not shared:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.info("%s: waiting for another process that saves into it", folder)
                fcntl.flock(handle, how)
            except OSError:  # for example on a network file system without locks
                pass
            if _is_still(folder, handle):  # and was not removed and made again while this waited
                yield
                return
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the handle too
            os.close(handle)


def _is_still(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # pragma: no cover - Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """Returns the permissions that new files are without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
