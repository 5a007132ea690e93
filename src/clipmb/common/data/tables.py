"""Tables of images and captions: CSV, TSV, JSON Lines and Parquet."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipmb.common.data.strings import Strings
from clipmb.common.errors import bad_input, logger, one_of

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Where nothing may be lost, these are images too: what Pillow cannot read of them is reported.
ALL_PICTURES = (*PICTURES, ".jfif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga")
_TRIED = 20  # images that say which folder a table's are in: the first one may be missing
# Known names of columns and fields, in any case; the first match wins.
NAMES = {
    "image": ("image", "file_name", "filename", "filepath", "path", "image_path", "image_name", "img", "jpg"),
    "caption": ("caption", "captions", "text", "title", "sentence", "sentences", "comment", "txt"),
    "label": ("label", "class"),
}
_REMOTE = ("http://", "https://")
_LARGEST_GROUP = 1 << 30  # bytes of images in a row group of a Parquet file
_KEPT = 1 << 28  # bytes of row groups that are kept in memory


@dataclass(frozen=True)
class Columns:
    """The columns of tables, or fields of .json members, to read; None for the first known name.

    Attributes:
        image: Column of the images' paths.
        caption: Column of the captions.
        label: Column of the names of classes.
        separator: Column separator in text tables; None for a tab in .tsv, and in .csv for the one that makes known
            names of columns out of the first line, which is a comma where none does.
        root: The folder that paths of images are relative to; None for the table's own, or a usual one beside it.
        optional: Which of "image", "caption" and "label" a file may lack under the name given; known names serve then.
        partial: Take images without captions and captions without images too, and keep the other columns.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    separator: str | None = None
    root: str | os.PathLike[str] | None = None
    optional: tuple[str, ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        for name in ("image", "caption", "label"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise bad_input(f"{name}_column must be the name of a column", value, "Pass a string, or None")
        separator = self.separator
        if separator is not None and not (
            isinstance(separator, str) and len(separator) == 1 and separator not in '"\r\n'
        ):
            raise bad_input("separator must be one character", separator, "Pass for example ';'")
        if self.root is not None and not (isinstance(self.root, str | os.PathLike) and os.path.isdir(self.root)):
            raise bad_input("image_root must be a folder", self.root, "Pass the folder of the images")
        if unknown := [kind for kind in self.optional if kind not in NAMES]:
            raise one_of("optional", unknown[0], tuple(NAMES))

    def first(self, kind: str, available: Collection[str]) -> str | None:
        """Returns the available name of a kind of content ("image", "caption" or "label"), or None."""
        wanted = getattr(self, kind)
        if wanted in available:
            return wanted
        if wanted is not None and kind not in self.optional:
            return None
        lower: dict[str, str] = {}
        for name in available:
            lower.setdefault(name.strip().lower(), name)
        return next((lower[name] for name in NAMES[kind] if name in lower), None)

    def find(self, path: Path, available: Collection[str]) -> dict[str, str]:
        """Returns the names of the columns of a table; "caption" or "label" may be missing, but not both.

        Where rows may be partial, images or captions are enough.

        Raises:
            ValueError: There is no column of images, or neither captions nor labels, or not the one asked for.
        """
        found = {kind: name for kind in NAMES if (name := self.first(kind, available)) is not None}
        shown = f"{', '.join(map(repr, available)) or 'none'} in {path}"
        for kind in NAMES:
            if getattr(self, kind) is not None and kind not in found and kind not in self.optional:
                raise bad_input(
                    f"{kind}_column must name a column", f"{getattr(self, kind)!r}; there are {shown}",
                    f"Correct {kind}_column= (--{kind}-column)", shown=True,
                )  # fmt: skip
        if self.partial and found.keys() & {"image", "caption"}:
            return found
        if "image" not in found:
            if urls := [name for name in available if name.strip().lower() in ("url", "image_url")]:
                raise bad_input(
                    "Images must be local files; nothing is downloaded", f"only the column {urls[0]!r} in {path}",
                    "Download them first, for example with img2dataset", shown=True,
                )  # fmt: skip
            raise bad_input(
                f"A table needs a column of images, called {', '.join(NAMES['image'])}", f"the columns {shown}",
                "Rename it, or pass image_column= (--image-column), or separator= (--separator); the first line must "
                "hold the names", shown=True,
            )  # fmt: skip
        if "caption" not in found and "label" not in found:
            raise bad_input(
                f"A table needs a column of captions, called {', '.join(NAMES['caption'])}", f"the columns {shown}",
                "Rename it, or pass caption_column= (--caption-column)", shown=True,
            )  # fmt: skip
        return found


# Its place, and its image, caption, label and other fields, or why it is unusable.
Row = tuple[str, dict[str, Any] | str]


class Pictures(Protocol):
    """Images that lie inside a file of rows."""

    def __getitem__(self, row: int) -> bytes | str: ...


class Table:
    """Rows with the captions or the label of each image, from whatever they were read.

    Rows of the same image and label are one pair with several captions. Rows without both are left out.

    Args:
        name: Name of the file in ids and reasons.
        rows: The place of each row in the file, with its image, caption and label, or why it is unusable.
        roots: Folders that the paths of images may be relative to; the first that has one of the first images is taken.
        pictures: The images by row, where they lie in the file itself.
        prefix: Begin all ids with ``name``, because there are several files.
        stamp: Identifies the version of the file, beside its rows.
        partial: Take images without captions and captions without images too, and keep the other fields: of a pair
            those of its first row, and of each caption its own. Without captions, only rows that agree in those are one
            pair.
        distinct: The rows are of different images, which need not be compared.

    Attributes:
        left_out: (id, reason) of the unusable rows.
        kinds: The names of the other fields, each with the kinds of its values, as `kind_of` names them.

    Raises:
        ValueError: There are no rows.
    """

    def __init__(
        self,
        name: str,
        rows: Iterable[Row],
        roots: Sequence[Path] = (),
        *,
        pictures: Pictures | None = None,
        prefix: bool = False,
        stamp: str = "",
        partial: bool = False,
        distinct: bool = False,
    ) -> None:
        self.name, self._prefix, self._embedded, self._stamp = name, prefix, pictures, stamp
        self._partial = partial
        self.left_out: list[tuple[str, str]] = []
        self.kinds: dict[str, set[str]] = {}
        self._pictures, self._captions, self._labels, self._fields = Strings(), Strings(), Strings(), Strings()
        self._rows = array("q")  # of embedded images and of partial pairs: their numbers in the file
        self._own = Strings()  # the other fields of each caption, where they are not those of the pair
        owners = array("q")  # the pair of each caption
        pairs: dict[tuple[str, str, bytes | None], int] = {}
        count = 0
        for count, (where, row) in enumerate(rows, 1):
            try:
                picture, captions, label, fields = self._checked(row)
            except ValueError as error:
                self.left_out.append((name + where, str(error)))
                continue
            pair = len(self)
            if self._embedded is None and picture and not distinct:
                pair = pairs.setdefault((picture, label, None if captions else fields), pair)
            if pair == len(self):
                if self._embedded is not None or partial:
                    self._rows.append(count - 1)
                if partial:
                    self._fields.append(fields)
                self._pictures.append(_packed(picture))
                self._labels.append(_packed(label))
            for caption in captions:
                self._captions.append(_packed(caption))
                owners.append(pair)
                if partial:
                    self._own.append(b"" if fields == self._fields[pair] else fields)
        if not count:
            raise bad_input(f"{name} must have at least one row", "none", "Pass a table that is not empty", shown=True)
        of = np.array(owners, np.int64)
        self._order = np.argsort(of, kind="stable")
        self._starts = np.searchsorted(of[self._order], np.arange(len(self) + 1))
        self._root = self._found(roots)
        if len(self) < count - len(self.left_out):
            logger.info("%s: %d rows are %d images", name, count - len(self.left_out), len(self))

    def _found(self, roots: Sequence[Path]) -> Path:
        paths = (path for i in range(min(len(self), _TRIED)) if (path := _unpacked(self._pictures[i])))
        found = (root for path in paths for root in roots if os.path.exists(_at(root, path)))
        return next(found, *roots[:1] or (Path(),))

    def __len__(self) -> int:
        return len(self._labels)

    def id(self, index: int) -> str:
        """The path of the image as the table has it; without one, the name of the file and the number of the row."""
        picture = _unpacked(self._pictures[index])
        if self._embedded is not None or not picture:
            return f"{self.name}/{self._rows[index]}"
        return f"{self.name}/{picture}" if self._prefix else picture

    def captions(self, index: int) -> list[str]:
        """The different captions, in the order of the rows; where rows may be partial, also by their other fields."""
        return [_unpacked(self._captions[i]) for i in self._of(index)]

    def caption_fields(self, index: int) -> list[dict[str, Any]]:
        """The other fields of the row of each caption, where rows may be partial."""
        own = (self._own[i] or self._fields[index] if self._partial else b"{}" for i in self._of(index))
        return [json.loads(fields) for fields in own]

    def _of(self, index: int) -> list[int]:
        """Returns the numbers of a pair's different captions among all of the table."""
        found: dict[tuple[bytes, bytes], int] = {}
        for i in self._order[self._starts[index] : self._starts[index + 1]].tolist():
            found.setdefault((self._captions[i], self._own[i] if self._partial else b""), i)
        return list(found.values())

    def label(self, index: int) -> str | None:
        """The label, or None."""
        return _unpacked(self._labels[index]) or None

    def fields(self, index: int) -> dict[str, Any]:
        """The other fields, where rows may be partial."""
        return json.loads(self._fields[index]) if self._partial else {}

    def has_image(self, index: int) -> bool:
        """Whether there is an image."""
        return self._embedded is not None or bool(self._pictures[index])

    def file(self, index: int) -> Path | None:
        """The path of an image that is a file of its own."""
        picture = _unpacked(self._pictures[index]) if self._embedded is None else ""
        return _at(self._root, picture) if picture else None

    def image(self, index: int) -> bytes | Path:
        """The bytes or the path of the image."""
        picture = _unpacked(self._pictures[index]) if self._embedded is None else self._embedded[self._rows[index]]
        return picture if isinstance(picture, bytes) else _at(self._root, picture)

    def digest(self) -> bytes:
        """SHA-256 over images, captions and labels."""
        parts = (self._pictures, self._captions, self._labels)
        hashed = sha256(b"".join(part.digest() for part in parts))
        if self._partial:
            hashed.update(self._fields.digest() + self._own.digest())
        for numbers in (np.array(self._rows, "<i8"), self._order.astype("<i8"), self._starts.astype("<i8")):
            hashed.update(numbers.tobytes())
        hashed.update(self._stamp.encode())
        return hashed.digest()

    def _checked(self, row: dict[str, Any] | str) -> tuple[str, list[str], str, bytes]:
        """Returns image, captions, label and packed other fields of one row; "" for a missing image or label."""
        if isinstance(row, str):
            raise ValueError(row)
        picture = row.get("image")
        if self._embedded is None and not (self._partial and not picture):
            if not isinstance(picture, str) or not picture.strip() or "\0" in picture:
                raise bad_input("A row needs the path of an image", picture, "Fill it in, or remove the row")
            if picture.startswith(_REMOTE):
                raise bad_input(
                    "Images must be local files; nothing is downloaded", picture,
                    "Download them first, for example with img2dataset",
                )  # fmt: skip
        captions = texts_of("The caption", row.get("caption"))
        label = label_of("The label", row.get("label"))
        if not captions and (not picture and self._embedded is None if self._partial else label is None):
            needed = "an image or a caption" if self._partial else "a caption"
            raise bad_input(f"A row needs {needed}", row.get("caption"), "Fill it in, or remove the row")
        return picture or "", captions, label or "", self._pack(row.get("fields", {})) if self._partial else b""

    def _pack(self, fields: Mapping[str, Any]) -> bytes:
        for name, value in fields.items():
            self.kinds.setdefault(name, set()).add(kind_of(value))
        return json.dumps(fields, default=str).encode()


def open_table(path: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens a text table, a JSON Lines file or a Parquet file.

    Args:
        path: The file.
        name: Name of the file in ids and reasons.
        columns: Which columns to read.
        prefix: Begin all ids with ``name``, because there are several files.

    Raises:
        ValueError: The file does not hold what its suffix says, or a column is missing.
        ImportError: It is a Parquet file and pyarrow is not installed.
    """
    roots = roots_of(path, columns)
    if path.suffix.lower() == ".parquet":
        pictures, rows = _parquet_rows(path, columns)
        stamp = "" if pictures is None else str(path.stat().st_size)
        return Table(name, rows, roots, pictures=pictures, prefix=prefix, stamp=stamp, partial=columns.partial)
    lines = _json_lines(path) if path.suffix.lower() == ".jsonl" else _cells(path, columns)
    return Table(name, _text_rows(path, lines, columns), roots, prefix=prefix, partial=columns.partial)


def roots_of(path: Path, columns: Columns) -> list[Path]:
    """Returns the folders that the images of a table may be relative to, the likeliest first.

    Beside the table itself: the folders in which Flickr30k, COCO and open_clip's examples keep theirs.
    """
    given = [] if columns.root is None else [Path(columns.root)]
    if given and "image" not in columns.optional:
        return given
    split = path.stem.rpartition("_")[2]  # captions_val2017.json: val2017/
    names = (split, f"images/{split}", "images", "Images", "flickr30k-images", "flickr30k_images")
    beside = [path.parent.parent / name for name in (split, f"images/{split}", "images", "")]
    return [*given, path.parent, *(path.parent / name for name in names), *beside]


def _at(root: Path, picture: str) -> Path:
    """Returns where an image is; a path that Windows wrote is read with its backslashes as slashes."""
    path = root / picture
    return root / picture.replace("\\", "/") if "\\" in picture and not path.exists() else path


def _text_rows(path: Path, lines: Iterator[tuple[int, dict[str, Any] | str]], columns: Columns) -> Iterator[Row]:
    names: dict[str, str] = {}
    keys: list[str] = []
    for line, row in lines:
        if isinstance(row, dict):
            if not names:
                names = columns.find(path, row)
            elif keys != list(row):  # JSON objects need not be alike
                names = {kind: name for kind in NAMES if (name := columns.first(kind, row)) is not None}
            keys = list(row)
            found: dict[str, Any] = {kind: row[name] for kind, name in names.items()}
            if columns.partial:
                found["fields"] = {name: value for name, value in row.items() if name not in names.values()}
            row = found
        yield f":{line}", row


def _parquet_rows(path: Path, columns: Columns) -> tuple[Pictures | None, Iterator[Row]]:
    with _parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
    distinct(path, schema.names)
    names = columns.find(path, schema.names)
    found = tuple(names.values())
    pictures = None
    if "image" in names and holds_bytes(schema.field(names["image"]).type):
        pictures = _Embedded(path, names.pop("image"), metadata)
    classes = class_names(schema.metadata, names.get("label"))
    others = others_of(path, schema, found) if columns.partial else []

    def rows() -> Iterator[Row]:
        with _parquet(path, metadata) as file:
            row = 0
            for batch in file.iter_batches(batch_size=1 << 14, columns=[*names.values(), *others]):
                for found in rows_of(batch, names, classes, others):
                    yield f"/{row}", found
                    row += 1

    return pictures, rows()


def others_of(path: Path, schema: Any, names: Collection[str]) -> list[str]:
    """Returns the names of the columns of an Arrow schema beside these, without those that hold bytes."""
    others = [field for field in schema if field.name not in names]
    if left := [field.name for field in others if holds_bytes(field.type)]:
        logger.warning("%s: columns of bytes are not kept: %s", path, ", ".join(left))
    return [field.name for field in others if field.name not in left]


def rows_of(
    batch: Any, names: Mapping[str, str], classes: Sequence[str], others: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yields the rows of an Arrow record batch by kind of content, numbered labels by the names of their classes.

    Where other columns are asked for, they are the entries of "fields".
    """
    values = {kind: batch.column(name).to_pylist() for kind, name in names.items()}
    fields = {name: _values(batch.column(name)) for name in others}
    for i in range(batch.num_rows):
        found = {kind: value[i] for kind, value in values.items()}
        label = found.get("label")
        if isinstance(label, int) and 0 <= label < len(classes):
            found["label"] = classes[label]
        if fields:
            found["fields"] = {name: value[i] for name, value in fields.items()}
        yield found


def _values(column: Any) -> list[Any]:
    """Returns the values of an Arrow column; moments that Python has no object for as text, lengths of time as numbers.

    Python's have microseconds and the years 1 to 9999.
    """
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return column.cast(_without_times(column.type)).to_pylist()


def _without_times(kind: Any) -> Any:
    import pyarrow
    from pyarrow import types

    if types.is_temporal(kind):
        return pyarrow.int64() if types.is_duration(kind) else pyarrow.string()
    if types.is_struct(kind):
        return pyarrow.struct([(field.name, _without_times(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_without_times(kind.key_type), _without_times(kind.item_type))
    if types.is_dictionary(kind):
        return _without_times(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return pyarrow.list_(_without_times(kind.value_type))
    return kind


class _Embedded:
    """The images inside a Parquet file, by row. Row groups are read at once, and the last ones are kept.

    Args:
        path: The file.
        column: The column of images: binary, or a struct of bytes and path, as Hugging Face's datasets write it.
        metadata: The metadata of the file.
    """

    def __init__(self, path: Path, column: str, metadata: Any) -> None:
        self._path, self._column, self._metadata = path, column, metadata
        sizes = []
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        for group in groups:
            parts = [group.column(i) for i in range(group.num_columns)]
            own = [part for part in parts if part.path_in_schema.split(".")[0] == column]
            sizes.append(sum(part.total_uncompressed_size for part in own))
        if max(sizes, default=0) > _LARGEST_GROUP:
            raise bad_input(
                "A row group may hold at most 1 GiB of images, because it is read at once",
                f"{max(sizes) >> 20} MiB in {path}",
                "Rewrite the file with row groups of about 100 rows",
                shown=True,
            )
        self._starts = np.cumsum([0] + [group.num_rows for group in groups])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> bytes | str:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._lock:
            pictures = self._kept.pop(group, None)
            if pictures is None:
                pictures = self._load(group)
                while self._kept and pictures.nbytes + sum(part.nbytes for part in self._kept.values()) > _KEPT:
                    self._kept.popitem(last=False)  # the least recently used
            self._kept[group] = pictures
        return picture_of(pictures[row - int(self._starts[group])].as_py())

    def _load(self, group: int) -> Any:
        with _parquet(self._path, self._metadata) as file:
            return file.read_row_group(group, columns=[self._column]).column(self._column)


def picture_of(value: Any) -> bytes | str:
    """Returns the bytes or the path of an image in a cell: itself, or a struct of bytes and path.

    Raises:
        ValueError: There is none.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise bad_input("A row needs an image", value, "Fill it in, or remove the row")
    return value


def kind_of(value: Any) -> str:
    """Returns the name of a value's Python type; for integers of more than 53 bits "long", of more than 64 "big"."""
    if type(value) is not int or -(2**53) <= value <= 2**53:
        return type(value).__name__
    return "long" if -(2**63) <= value < 2**63 else "big"


def texts_of(name: str, value: Any) -> list[str]:
    """Returns the captions in a cell or field; blank ones do not count.

    Args:
        name: The name of the cell or field, for the message.
        value: A text, a list of texts, or None.

    Raises:
        ValueError: It is something else.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise bad_input(f"{name} must be a text or a list of texts", value, "Correct it")
    return [stripped for text in values if (stripped := text.strip())]


def label_of(name: str, value: Any) -> str | None:
    """Returns the label in a cell or field as text, or None.

    Args:
        name: The name of the cell or field, for the message.
        value: A text, a number, or None.

    Raises:
        ValueError: It is something else.
    """
    if value is not None and not isinstance(value, str | int | float):
        raise bad_input(f"{name} must be a text or a number", value, "Correct it")
    return None if value is None else str(value).strip() or None


def _packed(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can hold half characters; the tokenizer refuses them


def _unpacked(packed: bytes) -> str:
    return packed.decode("utf-8", "surrogatepass")


def distinct(path: Path, names: list[str]) -> None:
    """Checks that the columns of a table have different names.

    Raises:
        ValueError: Two have the same.
    """
    if len(set(names)) < len(names):
        raise bad_input(f"The columns of {path} must have different names", names, "Rename some")


def _cells(path: Path, columns: Columns) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the rows of a text table, whose first line holds the names. A broken row does not affect the others."""
    with Lines(path) as lines:
        separator = columns.separator or _separator(path, lines.first(), columns)
        plain = (
            separator == "|" and columns.separator is None
        )  # Flickr30k's: padded cells, in which quotes are only text
        names: list[str] = []
        while True:
            start = lines.number + 1
            reader = csv.reader(
                lines, delimiter=separator, strict=True, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
            )
            try:
                for cells in reader:
                    where, start = lines.number, lines.number + 1
                    lines.done()
                    if plain:
                        cells = [cell.strip() for cell in cells]
                    if not cells:
                        continue
                    if not names:
                        names = cells
                        distinct(path, names)
                    elif len(cells) != len(names):
                        rule = f"A row must have as many cells as the first line, {len(names)}"
                        fix = "Quote captions that contain a separator, or pass separator= (--separator)"
                        yield where, str(bad_input(rule, f"{len(cells)}: {cells}", fix, shown=True))
                    elif problem := next(filter(None, map(undecoded, cells)), None):
                        yield where, problem
                    else:
                        yield where, dict(zip(names, cells, strict=True))
                return
            except csv.Error as error:
                problem = bad_input(
                    "A row must be valid",
                    f"line {lines.number}: {error}",
                    'Enclose cells that contain " in double quotes, and double each " inside them',
                    shown=True,
                )
                if not names:
                    raise bad_input(f"{path} must be a valid table", str(problem), "Correct it", shown=True) from error
                yield start, str(problem)
                lines.again(start + 1)  # the row may have swallowed lines that are rows of their own


def _separator(path: Path, first: str, columns: Columns) -> str:
    """Returns the separator that makes known names of columns out of the first line of a table."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    for separator in dict.fromkeys((usual, ",", "\t", "|", ";")):
        names = [name.strip().strip('"') for name in first.split(separator)]
        found = {kind for kind in NAMES if columns.first(kind, names)}
        enough = bool(found & {"image", "caption"}) if columns.partial else "image" in found and len(found) > 1
        if enough and len(names) > 1:
            return separator
    return usual


def heads_table(path: Path, columns: Columns) -> bool:
    """Returns whether the first line of a text file names columns of images and of captions, as Flickr8k's does."""
    with Lines(path) as lines:
        first = lines.first()
    names = [name.strip() for name in first.split(columns.separator or _separator(path, first, columns))]
    return all(columns.first(kind, names) for kind in ("image", "caption"))


def undecoded(text: str) -> str | None:
    """Returns what is wrong with a text whose bytes were not UTF-8; None where nothing is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogateescape")
        return str(bad_input("A row must be UTF-8", raw, "Save the table as UTF-8"))
    return None


class Lines:
    """The lines of a text file, from which some may be read again. Bytes that are not UTF-8 are kept as surrogates.

    Attributes:
        number: That of the last line, from 1.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")  # noqa: SIM115
        self._waiting: deque[str] = deque()
        self._taken: list[str] = []  # since the last finished row
        self.number = 0

    def first(self) -> str:
        """Returns the first line, and leaves it to be read.

        Raises:
            ValueError: It is not UTF-8.
        """
        line = next(self, "")
        if line:
            if problem := undecoded(line):
                raise bad_input(f"{self._path} must be UTF-8", problem, "Save it as UTF-8", shown=True)
            self.again(1)
        return line.rstrip("\r\n")

    def done(self) -> None:
        """Says that the lines up to here need not be read again."""
        self._taken.clear()

    def again(self, number: int) -> None:
        """Goes back to a line that came after the last `done`."""
        kept = self._taken[len(self._taken) - (self.number + 1 - number) :] if number <= self.number else []
        self._waiting.extendleft(reversed(kept))
        self.number -= len(kept)
        self._taken.clear()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        self._taken.append(line)
        return line


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yields the objects of a JSON Lines file, without blank lines."""
    with Lines(path) as lines:
        lines.first()
        for line in lines:
            lines.done()
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
                problem = undecoded(line) or (None if isinstance(row, dict) else type(row).__name__)
            except (ValueError, RecursionError) as error:
                row, problem = {}, str(error)
            if problem:
                row = str(bad_input("A line must be a JSON object", problem, "Correct or remove it", shown=True))
            yield lines.number, row


@contextlib.contextmanager
def _parquet(path: Path, metadata: Any = None) -> Iterator[Any]:
    """Opens a Parquet file; turns pyarrow's errors into ValueError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f'Reading {path} needs pyarrow, which cannot be imported ({error}). Install it: pip install "clipmb[train]"'
        ) from error
    try:
        with parquet.ParquetFile(path, metadata=metadata) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise bad_input(
            f"{path} must be a readable Parquet file",
            f"{type(error).__name__}: {error}",
            "Rewrite the file",
            shown=True,
        ) from error


def holds_bytes(kind: Any) -> bool:
    """Whether a column of this Arrow type holds images rather than paths."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    views = getattr(types, "is_binary_view", lambda _: False)  # of newer versions of pyarrow
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) or views(kind)


def class_names(metadata: Mapping[bytes, bytes] | None, label: str | None) -> list[str]:
    """Returns the names of numbered labels from the Arrow metadata of Hugging Face's datasets; none without it."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []
