"""Images with captions on disk: tables and WebDataset shards, any number of them, as one numbered list."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image, ImageOps

from clipmb.common.data import layouts
from clipmb.common.data.shards import Shard
from clipmb.common.data.tables import ALL_PICTURES, SUFFIXES, Columns, heads_table, open_table
from clipmb.common.errors import bad_input, logger
from clipmb.common.image import pixels as px
from clipmb.common.image.resampling import as_image

_OPENED = {
    **dict.fromkeys(SUFFIXES, open_table), ".json": layouts.open_coco, ".token": layouts.open_token,
    ".txt": layouts.open_texts, ".tar": Shard,
}  # fmt: skip
_SPLIT = re.compile(r"(.+?)-\d+-of-\d+(?:-[0-9a-f]+)?")  # the parts of a split of Hugging Face's data sets
_MOST_FILES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")


class _Source(Protocol):
    """One file of pairs; methods as those of `Pairs`."""

    name: str
    left_out: list[tuple[str, str]]

    @property
    def kinds(self) -> dict[str, set[str]]: ...
    def __len__(self) -> int: ...
    def id(self, index: int) -> str: ...
    def captions(self, index: int) -> list[str]: ...
    def caption_fields(self, index: int) -> list[dict[str, Any]]: ...
    def label(self, index: int) -> str | None: ...
    def fields(self, index: int) -> dict[str, Any]: ...
    def has_image(self, index: int) -> bool: ...
    def file(self, index: int) -> Path | None: ...
    def image(self, index: int) -> bytes | Path | Image.Image: ...
    def digest(self) -> bytes: ...


class Pairs:
    """Images with their captions and labels, numbered from 0. Open files with `Pairs.open`.

    Only an index is kept in memory: an image is read and decoded each time `image` is called. Threads may share one
    object.

    Attributes:
        left_out: (id, reason) of every unusable item in the files, for example a table row without an image or a
            member of a shard without a text.
    """

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(source) for source in self._sources])
        self.left_out = [entry for source in self._sources for entry in source.left_out]

    @classmethod
    def open(
        cls,
        path: Any,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        separator: str | None = None,
        image_root: str | os.PathLike[str] | None = None,
        optional: Collection[str] = (),
        partial: bool = False,
    ) -> Pairs:
        """Opens tables, shards and folders of images, and indexes what they hold.

        Rows of one image and label become one pair with several captions. A pair needs an image and at least one
        caption or a label; everything else goes into ``left_out``, and the log says how much.

        Args:
            path: One or several of: a table (.csv, .tsv, .jsonl, .parquet, and .txt where the first line names columns
                of images and captions); COCO's captions (.json) or Flickr30k's (.token); a WebDataset shard (.tar, not
                compressed); a ``datasets.Dataset``; a pattern of files, for example ``shards-{000..009}.tar`` or
                ``*.tar``; or a folder. A folder holds one table called captions
                or metadata, or shards, or one table of any name, or the parts of one Parquet table (also in its folder
                data/), or what ``save_to_disk`` of Hugging Face's datasets wrote, or images with a text beside each,
                or a folder of images for each class.
            image_column: Column with the paths of the images, relative to the table. Default: the first of image,
                file_name, filename, filepath, path, image_path, image_name, img, jpg. In Parquet files the column may
                hold the images themselves.
            caption_column: Column, or field of .json members, with the captions. Default: in shards the .txt member;
                then the first of caption, captions, text, title, sentence, sentences, comment, txt.
            label_column: Column, or field of .json members, with the labels. Default: in shards the .cls member; then
                label or class.
            separator: Column separator in text tables. Default: a tab in .tsv; in .csv the comma, tab, bar or
                semicolon that makes names of columns out of the first line.
            image_root: The folder that paths of images are relative to. Default: the table's own, or where COCO and
                Flickr30k keep their images beside it.
            optional: Which of "image", "caption" and "label" may lack the column named for them; the default names
                serve in such files.
            partial: Take images without captions, and captions without images, too. Then ``path`` may also be an image
                file, a text file (.txt) with one caption on each line, or a folder of images alone; other columns,
                and the other fields of .json members, are kept (`fields`, `caption_fields`), and rows without a caption
                are one pair only where they agree in these too.

        Returns:
            The pairs, in the order of the files.

        Raises:
            FileNotFoundError: There is no such file, or no file matches a pattern.
            ValueError: A file is damaged, a column is missing, a file is given twice, or there is no pair.
            TypeError: ``path`` is neither a path nor a data set.
            ImportError: There is a Parquet file, and pyarrow is not installed.

        Source: shards follow the layout of WebDataset, https://github.com/webdataset/webdataset.
        """
        columns = Columns(image_column, caption_column, label_column, separator, image_root, tuple(optional), partial)
        several_given = isinstance(path, Iterable) and not isinstance(path, str) and not layouts.is_dataset(path)
        given = list(path) if several_given else [path]
        sets = [layouts.Rows(each, columns) for each in given if layouts.is_dataset(each)]
        files = [file for each in given if not layouts.is_dataset(each) for file in _files(cast("str", each), columns)]
        if not files and not sets:
            raise bad_input("There must be at least one file of pairs", path, "Pass a path")
        twice = [str(file) for file, times in Counter(os.path.realpath(file) for file in files).items() if times > 1]
        if twice:
            raise bad_input("A file may be given only once", twice[0], "Remove the repetition", shown=True)
        _refuse_nested(files)
        pictures = [file for file in files if partial and file.suffix.lower() in ALL_PICTURES and not file.is_dir()]
        files = [file for file in files if file not in set(pictures)] if pictures else files
        several = len(files) + len(sets) + bool(pictures) > 1
        opened = [
            _open_folder(file, name, columns, several) if file.is_dir()
            else _opener(file, columns)(file, name, columns, prefix=several)
            for file, name in zip(files, _names(files, pictures), strict=True)
        ]  # fmt: skip
        pairs = cls([*([layouts.open_pictures(pictures)] if pictures else []), *opened, *sets])
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
        """Returns the name of a pair: the image's path as the table has it, or ``shard.tar/key``.

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
        """Returns the name of the image's class, or None.

        Args:
            index: The number of the pair, from 0.

        Raises:
            ValueError: It is neither text nor a number.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.label(place)

    def fields(self, index: int) -> dict[str, Any]:
        """Returns the values of the other columns, or fields of the .json member, of pairs opened as ``partial``.

        Args:
            index: The number of the pair, from 0.

        Raises:
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.fields(place)

    def caption_fields(self, index: int) -> list[dict[str, Any]]:
        """Returns the other columns of each caption: of its own row, where a table has a row for each caption.

        Args:
            index: The number of the pair, from 0.

        Raises:
            ValueError: The captions are not text, or not UTF-8.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.caption_fields(place)

    @cached_property
    def kinds(self) -> dict[str, set[str]]:
        """The names of all other columns or fields, each with the kinds of its values."""
        kinds: dict[str, set[str]] = {}
        for source in self._sources:
            for name, found in source.kinds.items():
                kinds.setdefault(name, set()).update(found)
        return kinds

    def has_image(self, index: int) -> bool:
        """Whether a pair has an image; one opened as ``partial`` may have none.

        Args:
            index: The number of the pair, from 0.

        Raises:
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        return source.has_image(place)

    def path(self, index: int) -> str | None:
        """Returns the absolute path of an image that is a file of its own, or None.

        Args:
            index: The number of the pair, from 0.

        Raises:
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        file = source.file(place)
        return None if file is None else os.path.abspath(file)

    def image(self, index: int) -> Image.Image:
        """Reads and decodes an image.

        Args:
            index: The number of the pair, from 0.

        Returns:
            The image in RGB, turned upright by its EXIF orientation.

        Raises:
            ValueError: It is missing or broken.
            IndexError: There is no pair of this number.
        """
        return as_image(self.decoded(index))

    def decoded(self, index: int) -> Image.Image | np.ndarray:
        """Reads and decodes an image into what takes least time.

        Args:
            index: The number of the pair, from 0.

        Returns:
            What `image` returns, or its pixels, [height, width, 3] uint8.

        Raises:
            ValueError: It is missing or broken.
            IndexError: There is no pair of this number.
        """
        source, place = self._at(index)
        picture = source.image(place)
        if isinstance(picture, Image.Image):
            return ImageOps.exif_transpose(picture).convert("RGB")
        try:
            return px.read_image(source.id(place), picture)
        except ValueError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise bad_input(
                f"{source.id(place)} must be an image that exists",
                str(picture),
                "Pass image_root= (--image-root), the folder that paths of images are relative to, or remove the row",
                shown=True,
            ) from error.__cause__

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


def _files(path: str | os.PathLike[str], columns: Columns) -> list[Path]:
    """Returns the files that a path names, a folder holds or a pattern matches."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise bad_input("Files of pairs must be given as paths", path, "Pass a string or a path", TypeError)
    whole = os.fspath(path)
    if os.path.exists(whole):
        return _in_folder(Path(whole), columns) if os.path.isdir(whole) else [_known(Path(whole), columns)]
    found = []
    for name in _expanded(whole):
        matching = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if "**" in name:  # which also matches what is in the folders
            matching = [file for file in matching if not os.path.isdir(file)]
        if not matching:
            what = "matches no file" if glob.has_magic(name) else "does not exist"
            raise bad_input(
                "Every path or pattern must match at least one file",
                f"{name}{'' if name == whole else f' (of {whole})'}, which {what}",
                "Correct it",
                FileNotFoundError,
                shown=True,
            )
        for file in map(Path, matching):
            found += _in_folder(file, columns) if file.is_dir() else [_known(file, columns)]
    return found


def _opener(path: Path, columns: Columns) -> Callable[..., _Source]:
    return open_table if _is_named_text(path, columns) else _OPENED[path.suffix.lower()]


def _is_named_text(path: Path, columns: Columns) -> bool:
    """Returns whether a .txt file is a table, as Flickr8k's captions.txt is, and not one text per line."""
    return path.suffix.lower() == ".txt" and path.is_file() and heads_table(path, columns)


def _known(path: Path, columns: Columns) -> Path:
    known = [*layouts.PICTURES, *_OPENED] if columns.partial else [suffix for suffix in _OPENED if suffix != ".txt"]
    suffix = path.suffix.lower()
    accepted = suffix in known or _is_named_text(path, columns)
    if not (columns.partial and suffix in ALL_PICTURES) and (not accepted or not path.is_file()):
        *others, last = known
        rule = f"Expected a {', '.join(others)} or uncompressed {last} file"
        raise bad_input(rule, str(path), "Convert or unpack it", shown=True)
    return path


def _refuse_nested(files: list[Path]) -> None:
    """Refuses folders and images of which a folder that is also given has the images already."""
    folders = {os.path.realpath(file) for file in files if file.is_dir()}
    for file in files if folders else ():
        real = Path(os.path.realpath(file))
        if file.is_dir() or file.suffix.lower() in ALL_PICTURES:
            for parent in real.parents:
                if str(parent) in folders:
                    raise bad_input(
                        "A file may be given only once", f"{file}, which is inside {parent}", "Pass one of them",
                        shown=True,
                    )  # fmt: skip


def _in_folder(folder: Path, columns: Columns) -> list[Path]:
    """Returns the files of pairs in a folder, or the folder itself where images or a saved data set lie in it."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tables = [file for file in files if file.suffix.lower() in SUFFIXES]
    texts = [file for file in files if _is_called(file) and file.suffix.lower() == ".txt" and file.stat().st_size]
    named = [file for file in tables if _is_called(file)] or [file for file in texts if _is_named_text(file, columns)]
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    others = [file for file in files if file.suffix.lower() == ".token" or file.stem.startswith("captions_")]
    if not named and shards:
        if columns.partial and (picture := _picture_in(folder)):
            raise bad_input(
                "A folder to embed must hold .tar shards or images", f"{shards[0].name} and {picture} in {folder}",
                f"Pass {folder / '*.tar'} and the images, or one of them", shown=True,
            )  # fmt: skip
        return shards
    if any(file.name == "state.json" for file in files) and not named:
        return [folder]
    if not named and tables and all((folder / file.stem).is_dir() for file in tables):
        return [folder]  # img2dataset's "files" output: its tables describe the folders of the same names
    if not named and _is_one_split(tables):
        return tables
    fix = "Pass the path of the table or a pattern of files"
    if len(found := named or tables or others) == 1:
        return found
    if found:
        shown = f"{', '.join(file.name for file in found[:10])}{', …' if len(found) > 10 else ''} in {folder}"
        raise bad_input("A folder must hold one table", shown, fix, shown=True)
    if (folder / "data").is_dir() and (parts := sorted((folder / "data").glob("*.parquet"))):
        if len(parts) > 1 and not _is_one_split(parts):
            splits = sorted({match[1] for part in parts if (match := _SPLIT.fullmatch(part.stem))})
            raise bad_input(
                "A folder must hold one split",
                f"{', '.join(splits) or len(parts)} in {folder / 'data'}",
                f"Pass a pattern, for example {folder / 'data' / f'{splits[0] if splits else str()}-*.parquet'}",
                shown=True,
            )
        return parts
    pictures = ALL_PICTURES if columns.partial else layouts.PICTURES
    if any(entry.is_dir() for entry in folder.iterdir()) or any(f.suffix.lower() in pictures for f in files):
        return [folder]
    listed = ", ".join(file.name for file in files[:10]) or "no files"
    rule = "A folder of pairs must hold a table (captions.csv, .tsv, .jsonl, .parquet), .tar shards or images"
    raise bad_input(rule, f"{listed} in {folder}", fix, FileNotFoundError, shown=True)


def _is_called(file: Path) -> bool:
    """Returns whether a file has the name of a folder's table."""
    return file.stem.lower() in ("captions", "metadata")


def _picture_in(folder: Path) -> str | None:
    """Returns the path of some image in a folder, from there, or None."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [entry for entry in folders if not entry.startswith(".")]
        for file in files:
            if file.lower().endswith(ALL_PICTURES) and not file.startswith("."):
                return os.path.relpath(os.path.join(parent, file), folder)
    return None


def _is_one_split(tables: list[Path]) -> bool:
    """Whether several Parquet files are the parts of one table, as Hugging Face and img2dataset number them."""
    if not tables or any(file.suffix.lower() != ".parquet" for file in tables):
        return False
    splits = {match[1] if (match := _SPLIT.fullmatch(file.stem)) else None for file in tables}
    return len(splits) == 1 and (None not in splits or all(file.stem.isdecimal() for file in tables))


def _open_folder(folder: Path, name: str, columns: Columns, several: bool) -> _Source:
    opened = layouts.open_saved if (folder / "state.json").is_file() else layouts.open_folder
    return opened(folder, name, columns, prefix=several)


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


def _names(files: list[Path], pictures: list[Path]) -> list[str]:
    """Names files by their last parts, with as many folders as make the names different.

    No name is that of a folder of the pictures, whose ids are their paths.
    """
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        top = os.path.commonpath([os.path.abspath(file.parent) for file in files])
        names = [Path(os.path.relpath(os.path.abspath(file), top)).as_posix() for file in files]
    above = {parent.as_posix() for picture in pictures for parent in picture.parents}
    return [file.as_posix() if name in above else name for file, name in zip(files, names, strict=True)]
