"""Pictures with captions on disk: tables, WebDataset shards, and many of either, as one numbered list."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from clipmb.common.data.shards import Shard
from clipmb.common.data.tables import SUFFIXES, Columns, Table
from clipmb.common.errors import bad_input, logger
from clipmb.common.image import pixels as px

_KNOWN = (*SUFFIXES, ".tar")
_MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")


class _Source(Protocol):
    """One file of pairs."""

    name: str
    left_out: list[tuple[str, str]]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def captions(self, index: int) -> list[str]: ...
    def label(self, index: int) -> str | None: ...
    def image(self, index: int) -> bytes | Path: ...
    def digest(self) -> bytes: ...


class Pairs:
    """Pairs of a picture and its captions, numbered from 0; pictures are read when they are asked for.

    Threads may share it.

    Attributes:
        left_out: (id, reason) of everything in the files that is no pair: table rows without a picture, members of a
            shard without a text.
    """

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(source) for source in self._sources])
        self.left_out = [entry for source in self._sources for entry in source.left_out]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        separator: str | None = None,
    ) -> Pairs:
        """Opens files of pairs.

        Args:
            path: A table (.csv, .tsv, .jsonl, .parquet); a WebDataset shard (.tar); a folder that holds a table beside
                its pictures, called captions or metadata or the only one, or shards; a pattern such as
                ``shards-{000..009}.tar`` or ``*.tar``; or several of those.
            image_column: The column of a table that holds the paths of pictures, relative to the table. By default the
                first of image, file_name, filename, filepath, path, image_path. A Parquet file may hold the pictures.
            caption_column: The column, or field of .json members, of captions. By default the first of caption,
                captions, text, title, sentence, sentences. In shards a .txt member comes before the .json member.
            label_column: The same of labels. By default label or class. In shards a .cls member comes first.
            separator: What separates the cells of text tables: by default a comma in .csv and a tab in .tsv.

        Raises:
            FileNotFoundError: There is no such file, or no file fits the pattern.
            ValueError: A file is damaged, a column is missing, or no pair is left.
            ImportError: There is a Parquet file and pyarrow is not installed.
        """
        columns = Columns(image_column, caption_column, label_column, separator)
        given = list(path) if isinstance(path, Iterable) and not isinstance(path, str) else [path]
        files = [file for each in given for file in _files(each)]
        if not files:
            raise bad_input("Pairs are read from at least one file", path, "Pass a path")
        twice = [str(file) for file, times in Counter(os.path.realpath(file) for file in files).items() if times > 1]
        if twice:
            raise bad_input("A file may be given only once", twice[0], "Remove the repetition", shown=True)
        several = len(files) > 1
        pairs = cls([
            Shard(file, name, columns) if file.suffix.lower() == ".tar" else Table(file, name, columns, prefix=several)
            for file, name in zip(files, _names(files), strict=True)
        ])  # fmt: skip
        if pairs.left_out:
            count, (first, why) = len(pairs.left_out), pairs.left_out[0]
            if not len(pairs):
                raise bad_input(
                    "There must be at least one pair", f"{count} that are none; {first}: {why}", "Mend them", shown=True
                )
            logger.warning("%d items are left out; the first, %s: %s", count, first, why)
        if not len(pairs):
            raise bad_input("There must be at least one pair", f"none in {path}", "Pass other files", shown=True)
        return pairs

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        files = [source.name for source in self._sources]
        return f"Pairs({len(self)} in {', '.join(files[:3])}{', …' if len(files) > 3 else ''})"

    def id(self, index: int) -> str:
        """Names a pair, the same wherever the files are: the path as a table has it, or ``shard.tar/key``."""
        source, place = self._at(index)
        return source.id(place)

    def captions(self, index: int) -> list[str]:
        """Returns the captions of a pair; none where there is only a label.

        Raises:
            ValueError: They are no text.
        """
        source, place = self._at(index)
        return source.captions(place)

    def label(self, index: int) -> str | None:
        """Returns the name of the picture's class, when there is one."""
        source, place = self._at(index)
        return source.label(place)

    def image(self, index: int) -> Image.Image:
        """Reads and decodes a picture: upright by its EXIF orientation, RGB.

        Raises:
            ValueError: It is missing or broken.
        """
        source, place = self._at(index)
        return px.open_image(f"The picture of {source.id(place)}", source.image(place))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits: another one when other pairs, or captions in tables, are there.

        Of shards it covers names, sizes and where which member is, of tables the content, of pictures in files of their
        own the paths.
        """
        hashed = sha256(b"clipmb-pairs-1")
        for source in self._sources:
            hashed.update(sha256(source.name.encode("utf-8", "surrogateescape")).digest() + source.digest())
        return hashed.hexdigest()

    def _at(self, index: int) -> tuple[_Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} pairs, numbered from 0. Received: {index}.")
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[source], int(index - self._starts[source])


def _files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the files that a path, a folder or a pattern stands for."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise bad_input("Pairs are named by paths", path, "Pass a string or a path", TypeError)
    whole = os.fspath(path)
    if os.path.exists(whole):
        return _in_folder(Path(whole)) if os.path.isdir(whole) else [_known(Path(whole))]
    found = []
    for name in _expanded(whole):
        matching = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matching:
            what = "fits no file" if glob.has_magic(name) else "does not exist"
            raise bad_input(
                "Every path and pattern must stand for files",
                f"{name}{'' if name == whole else f' (of {whole})'}, which {what}",
                "Correct it",
                FileNotFoundError,
                shown=True,
            )
        found += [_known(Path(file)) for file in matching]
    return found


def _known(path: Path) -> Path:
    if path.suffix.lower() not in _KNOWN or not path.is_file():
        raise bad_input(
            f"Files of pairs are {', '.join(_KNOWN)}; shards are not compressed",
            str(path),
            "Convert or unpack it",
            shown=True,
        )
    return path


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() in SUFFIXES]
    named = [file for file in tables if file.stem.lower() in ("captions", "metadata")]
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    if not named and shards:
        return shards
    if len(found := named or tables) == 1:
        return found
    fix = "Pass the path of the table or a pattern of files"
    if found:
        raise bad_input(
            "A folder must hold one table", f"{', '.join(file.name for file in found)} in {folder}", fix, shown=True
        )
    listed = ", ".join(file.name for file in files[:10]) or "no files"
    rule = "A folder of pairs holds a table (captions.csv, .tsv, .jsonl, .parquet) or .tar shards"
    raise bad_input(rule, f"{listed} in {folder}", fix, FileNotFoundError, shown=True)


def _expanded(pattern: str) -> list[str]:
    """Expands braces as shells do: {000..009} counts, {a,b} lists; others stay as they are."""
    parts: list[list[str]] = []
    end = 0
    for match in _BRACES.finditer(pattern):
        choices = list(_choices(match[1], pattern))
        parts += [[pattern[end : match.start()]], choices or [match[0]]]
        end = match.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MOST_FILES:
        _too_many(pattern)
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _choices(inside: str, pattern: str) -> Iterator[str]:
    if span := re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside):
        first, last = int(span[1]), int(span[2])
        if abs(last - first) >= _MOST_FILES:
            _too_many(pattern)
        padded = any(len(end) > 1 and end[0] == "0" for end in span.groups())
        width = max(map(len, span.groups())) if padded else 0
        step = 1 if first <= last else -1
        yield from (f"{number:0{width}d}" for number in range(first, last + step, step))
    elif "," in inside:
        yield from inside.split(",")


def _too_many(pattern: str) -> None:
    raise bad_input(f"A pattern may stand for at most {_MOST_FILES} files", pattern, "Check its numbers")


def _names(files: list[Path]) -> list[str]:
    """Names files by their last parts, with as many folders as it takes to tell them apart."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    top = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return [Path(os.path.relpath(os.path.abspath(file), top)).as_posix() for file in files]
