"""Sorts image files into a folder for each label: first a plan, in which nothing is left to chance, then the moves."""

from __future__ import annotations

import errno
import os
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipmb.common.errors import bad_input


@dataclass(frozen=True)
class Move:
    """One file to be moved.

    Attributes:
        source: Where it is.
        target: Where it will be: a name that no other file has.
    """

    source: Path
    target: Path


def plan(images: Sequence[str | os.PathLike[str]], labels: Sequence[str], folder: str | os.PathLike[str]) -> list[Move]:
    """Decides where each image goes: into the folder of its label, under its own name.

    Where that name is taken, by a file that is there or by another image, ``-2``, ``-3``, … is added to it. An image
    that is in the folder of its label already stays.

    Args:
        images: Paths of files.
        labels: The label of each.
        folder: The folder for the folders of the labels; it need not exist.

    Returns:
        The moves, in the order of the images; nothing has been changed.

    Raises:
        ValueError: An image is no plain file or comes twice, a label cannot be the name of a folder, two labels would
            share one where upper and lower case are the same, or the folder is a file.
    """
    folder = Path(folder)
    by_label = homes(folder, labels)
    seen: set[Path] = set()
    taken: set[str] = set()
    moves = []
    for image, label in zip(images, labels, strict=True):
        source = Path(image)
        if source.is_symlink() or not source.is_file():
            raise bad_input("Only plain files can be moved", str(source), "Leave out links and folders", shown=True)
        if source.resolve() in seen:
            raise bad_input("Every image can be moved once", f"{source} twice", "Name it once", shown=True)
        seen.add(source.resolve())
        home = by_label[label]
        if home.is_dir() and os.path.samefile(home, source.absolute().parent):
            continue
        target, number = home / source.name, 1
        while _occupied(target, source) or _folded(target) in taken:
            number += 1
            target = home / f"{source.stem}-{number}{source.suffix}"
        taken.add(_folded(target))
        moves.append(Move(source, target))
    return moves


def move(moves: Sequence[Move]) -> None:
    """Moves the files. No file is replaced, and at every moment each is complete in one place or in both.

    Raises:
        OSError: A file cannot be moved; those before it have been, and a further run goes on.
    """
    for done, step in enumerate(moves):
        try:
            step.target.parent.mkdir(parents=True, exist_ok=True)
            _move(step.source, step.target)
        except OSError as error:
            rule = f"The file could not be moved to {step.target} ({error.strerror}); {done} of {len(moves)} were"
            raise OSError(error.errno, rule, str(step.source)) from error


def _move(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # unlike a rename, it never replaces a file
    except FileExistsError:
        if _occupied(target, source):
            raise
    except OSError:  # on another file system, or one without links
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copy2(source, beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "File exists", str(target)) from None
            os.rename(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    source.unlink()


def _occupied(target: Path, source: Path) -> bool:
    """Whether another file has this name; a move that was interrupted may have left both names to one file."""
    return os.path.lexists(target) and not (target.exists() and os.path.samefile(target, source))


def homes(folder: str | os.PathLike[str], labels: Iterable[str]) -> dict[str, Path]:
    """Returns the folder of every label.

    Raises:
        ValueError: As in `plan`.
    """
    found = {label: Path(folder) / label for label in labels}
    for path in (Path(folder), *found.values()):
        if path.exists() and not path.is_dir():
            raise bad_input("Images are sorted into folders", f"{path}, a file", "Pass another folder", shown=True)
    by_case: dict[str, str] = {}
    for label in found:
        plain = label == label.strip() and not label.startswith(".") and not set(label) & set('/\\:*?"<>|\0')
        if not plain or not label.isprintable() or len(os.fsencode(label)) > 200:
            raise bad_input("A label must be usable as the name of a folder", label, "Rename it")
        other = by_case.setdefault(_folded(label), label)
        if other != label:
            raise bad_input(
                "Labels must differ by more than upper and lower case", [other, label], "Rename one of them"
            )
    return found


def _folded(name: str | Path) -> str:
    return unicodedata.normalize("NFC", str(name)).casefold()
