"""Pictures with captions on disk: tables and WebDataset shards, any number of them, as one numbered list."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
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
    """One file of pairs; methods as those of `Pairs`."""

    name: str
    left_out: list[tuple[str, str]]

    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def captions(self, index: int) -> list[str]: ...
    def label(self, index: int) -> str | None: ...
    def image(self, index: int) -> bytes | Path: ...
    def digest(self) -> bytes: ...


class Pairs:
    """Pictures with their captions and labels, numbered from 0. Open files with `Pairs.open`.

    Only an index is kept in memory: a picture is read and decoded each time `image` is called. Threads may share one
    object.

    Attributes:
        left_out: (id, reason) of every unusable item in the files, for example a table row without a picture or a
            member of a shard without a text.
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
        optional: Collection[str] = (),
    ) -> Pairs:
        """Opens tables and shards, and indexes what they hold.

        Rows of one picture and label become one pair with several captions. A pair needs a picture and at least one
        caption or a label; everything else goes into ``left_out``, and the log says how much.

        Args:
            path: One or several of: a table (.csv, .tsv, .jsonl, .parquet); a WebDataset shard (.tar, not compressed);
                a folder with shards, or with one table called captions or metadata, or with one table of any name; a
                pattern, for example ``shards-{000..009}.tar`` or ``*.tar``.
            image_column: Column with the paths of the pictures, relative to the table. Default: the first of image,
                file_name, filename, filepath, path, image_path. In Parquet files the column may hold the pictures
                themselves.
            caption_column: Column, or field of .json members, with the captions. Default: in shards the .txt member;
                then the first of caption, captions, text, title, sentence, sentences.
            label_column: Column, or field of .json members, with the labels. Default: in shards the .cls member; then
                label or class.
            separator: Column separator in text tables. Default: a comma in .csv, a tab in .tsv.
            optional: Which of "image", "caption" and "label" may lack the column named for them; the default names
                serve in such files.

        Returns:
            The pairs, in the order of the files.

        Raises:
            FileNotFoundError: There is no such file, or no file matches a pattern.
            ValueError: A file is damaged, a column is missing, a file is given twice, or there is no pair.
            TypeError: ``path`` is not a path.
            ImportError: There is a Parquet file, and pyarrow is not installed.

        Source: shards follow the layout of WebDataset, https://github.com/webdataset/webdataset.
        """
        columns = Columns(image_column, caption_column, label_column, separator, tuple(optional))
        given = list(path) if isinstance(path, Iterable) and not isinstance(path, str) else [path]
        files = [file for each in given for file in _files(each)]
        if not files:
            raise bad_input("There must be at least one file of pairs", path, "Pass a path")
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
                    "There must be at least one pair",
                    f"{count} unusable items; {first}: {why}",
                    "Fix them",
                    shown=True,
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
        """Returns the name of a pair: the picture's path as the table has it, or ``shard.tar/key``.

        It does not depend on where the files are.

        Args:
            index: The number of the pair, from 0.

        Raises:
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.id(place)

    def captions(self, index: int) -> list[str]:
        """Returns the captions of a pair; an empty list where there is only a label.

        Args:
            index: The number of the pair, from 0.

        Raises:
            ValueError: They are not text, or not UTF-8.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.captions(place)

    def label(self, index: int) -> str | None:
        """Returns the name of the picture's class, or None.

        Args:
            index: The number of the pair, from 0.

        Raises:
            ValueError: It is neither text nor a number.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.label(place)

    def image(self, index: int) -> Image.Image:
        """Reads and decodes a picture.

        Args:
            index: The number of the pair, from 0.

        Returns:
            The picture in RGB, turned upright by its EXIF orientation.

        Raises:
            ValueError: It is missing or broken.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return px.open_image(f"The picture of {source.id(place)}", source.image(place))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the pairs, 64 hexadecimal digits, by which a resumed run recognises its data.

        It covers the names of the files, the content of tables, and the keys, sizes and offsets of the members of
        shards, but neither captions in shards nor pixels.
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
    """Returns the files that a path names, a folder holds or a pattern matches."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise bad_input("Files of pairs must be given by their paths", path, "Pass a string or a path", TypeError)
    whole = os.fspath(path)
    if os.path.exists(whole):
        return _in_folder(Path(whole)) if os.path.isdir(whole) else [_known(Path(whole))]
    found = []
    for name in _expanded(whole):
        matching = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not matching:
            what = "matches no file" if glob.has_magic(name) else "does not exist"
            raise bad_input(
                "Every path or pattern must match at least one file",
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
            f"Expected a {', '.join(SUFFIXES)} or uncompressed .tar file",
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
    rule = "A folder of pairs must hold a table (captions.csv, .tsv, .jsonl, .parquet) or .tar shards"
    raise bad_input(rule, f"{listed} in {folder}", fix, FileNotFoundError, shown=True)


def _expanded(pattern: str) -> list[str]:
    """Expands braces as shells do: {000..009} counts and {a,b} lists; other braces stay as they are."""
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
    raise bad_input(f"A pattern may match at most {_MOST_FILES} files", pattern, "Check its numbers")


def _names(files: list[Path]) -> list[str]:
    """Names files by their last parts, with as many folders as make the names different."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    top = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return [Path(os.path.relpath(os.path.abspath(file), top)).as_posix() for file in files]
