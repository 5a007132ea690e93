"""Data that are neither a table nor shards: captions of COCO and Flickr30k, folders of images, and `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from clipmb.common.data.strings import Strings
from clipmb.common.data.tables import (
    ALL_PICTURES,
    PICTURES,
    Columns,
    Lines,
    Row,
    Table,
    class_names,
    holds_bytes,
    kind_of,
    label_of,
    others_of,
    picture_of,
    roots_of,
    rows_of,
    texts_of,
    undecoded,
)
from clipmb.common.errors import bad_input

_TEXTS = (".txt", ".json", ".cls")
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


def open_coco(path: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens captions in COCO's form: one JSON object with ``images`` and ``annotations``.

    Source: the data format of "Captioning", https://cocodataset.org/#format-data.

    Args:
        path: The file.
        name: Name of the file in ids and reasons.
        columns: Only ``root`` is used.
        prefix: Begin all ids with ``name``.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content["annotations"]
        if not (isinstance(images, list) and isinstance(annotations, list)):
            raise TypeError("images and annotations are not lists")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise bad_input(
            "A .json file of pairs must be COCO's: an object with the lists images and annotations",
            f"{path}: {type(error).__name__}: {error}",
            "Save rows as .jsonl, one object on each line",
            shown=True,
        ) from error

    def rows() -> Iterator[Row]:
        files = {}
        for number, image in enumerate(images):
            try:
                files[image["id"]] = image["file_name"]
            except (TypeError, KeyError):
                yield f"/images/{number}", "An image needs an id and a file_name."
        if columns.partial:
            described = {str(annotation.get("image_id")) for annotation in annotations if isinstance(annotation, dict)}
            for key, file in files.items():
                if str(key) not in described:
                    yield "/images", {"image": file}
        for number, annotation in enumerate(annotations):
            where = f"/annotations/{number}"
            try:
                yield where, {"image": files[annotation["image_id"]], "caption": annotation["caption"]}
            except (TypeError, KeyError) as error:
                yield where, f"An annotation needs the image_id of an image, and a caption; not found: {error}."

    return Table(name, rows(), roots_of(path, columns), prefix=prefix, partial=columns.partial)


def open_token(path: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens captions as Flickr30k and Flickr8k write them: ``1000.jpg#0``, a tab and the caption, on each line.

    Args:
        path: The file.
        name: Name of the file in ids and reasons.
        columns: Only ``root`` is used.
        prefix: Begin all ids with ``name``.

    Raises:
        ValueError: The file is empty or not UTF-8.
    """

    def rows() -> Iterator[Row]:
        with Lines(path) as lines:
            lines.first()
            for line in lines:
                lines.done()
                picture, tab, caption = line.rstrip("\r\n").partition("\t")
                if tab:
                    yield f":{lines.number}", {"image": picture.partition("#")[0], "caption": caption}
                elif line.strip():
                    yield f":{lines.number}", "A line must hold an image, a tab and a caption."

    return Table(name, rows(), roots_of(path, columns), prefix=prefix, partial=columns.partial)


def open_texts(path: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens a file with one text on each line; blank lines do not count.

    Args:
        path: The file.
        name: Name of the file in ids and reasons.
        columns: Without effect.
        prefix: Without effect: all ids begin with ``name``.

    Raises:
        ValueError: The file is empty or not UTF-8.
    """

    def rows() -> Iterator[Row]:
        with Lines(path) as lines:
            lines.first()
            for line in lines:
                lines.done()
                if text := line.strip():
                    problem = undecoded(text)
                    yield f":{lines.number}", problem or {"caption": text}

    return Table(name, rows(), partial=True)


def open_pictures(paths: Sequence[Path]) -> Table:
    """Makes pairs without captions of paths of images.

    Args:
        paths: The paths, which are the ids too.

    Raises:
        ValueError: There are none.
    """
    return Table("images", (("", {"image": str(path)}) for path in paths), partial=True)


def open_folder(folder: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens a folder of images: each with a text beside it, or each in the folder of its class.

    Beside ``a/b.jpg`` lie ``a/b.txt``, ``a/b.json`` or ``a/b.cls``, as img2dataset's "files" output has them; without
    any such file, the first folder below this one is the label of all images in it.

    Args:
        folder: The folder.
        name: Its name in ids and reasons.
        columns: Which fields of the .json files hold captions and labels.
        prefix: Begin all ids with ``name``.

    Raises:
        ValueError: The folders of classes lie in folders of splits.
    """
    found: dict[str, set[str]] = {}
    pictures = Strings()  # paths from here; there may be millions
    splits: set[str] = set()
    suffixes = ALL_PICTURES if columns.partial else PICTURES
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            entry for entry in folders if not entry.startswith(".") and not _leads_back(Path(parent, entry), folder)
        )
        inside = Path(parent).relative_to(folder)
        for file in sorted(files):
            suffix = PurePath(file).suffix
            if suffix.lower() in suffixes and not file.startswith("."):
                pictures.append(os.fsencode((inside / file).as_posix()))
                splits.update(inside.parts[:1] if len(inside.parts) > 1 else ())
            elif suffix in _TEXTS:
                found.setdefault((inside / file).with_suffix("").as_posix(), set()).add(suffix)
    beside = any(_stem(os.fsdecode(picture)) in found for picture in pictures) if found else False
    if not beside and not columns.partial and splits and all(split.lower() in _SPLITS for split in splits):
        raise bad_input(
            "A folder must hold one split",
            f"{', '.join(sorted(splits))} in {folder}",
            f"Pass one of them, for example {folder / min(splits)}",
            shown=True,
        )

    def rows() -> Iterator[Row]:
        for picture in pictures:
            shown = os.fsdecode(picture)
            inside = shown.split("/")[:-1]
            if texts := found.get(_stem(shown)):
                row = _beside(folder / shown, texts, columns, shown)
            elif columns.partial:
                row = {"image": shown}
            elif not beside:
                row = {"image": shown, "label": inside[0]} if inside else "It is not in the folder of a class."
            else:
                row = "There is no text (.txt, .json or .cls) beside it."
            yield f"/{shown}", row

    return Table(name, rows(), [folder], prefix=prefix, partial=columns.partial, distinct=True)


def _leads_back(path: Path, top: Path) -> bool:
    """Whether a folder is a link to one that it is in, so that following it would never end."""
    if not path.is_symlink():
        return False
    target = Path(os.path.realpath(path))
    above = [parent for parent in path.parents if parent == top or top in parent.parents]
    return any(Path(os.path.realpath(parent)).is_relative_to(target) for parent in above)


def _stem(path: str) -> str:
    return path[: -len(PurePath(path).suffix)]


def _beside(path: Path, texts: set[str], columns: Columns, shown: str) -> dict[str, Any] | str:
    """Reads the caption and the label that lie beside an image; or says why they cannot be read."""
    row: dict[str, Any] = {"image": shown}
    try:
        if ".json" in texts:
            fields = json.loads(_file(path.with_suffix(".json")).read_text("utf-8-sig"))
            if not isinstance(fields, dict):
                raise bad_input("The .json file beside an image must hold an object", fields, "Rewrite it")
            for kind in ("caption", "label"):
                if (field := columns.first(kind, fields)) is not None:
                    row[kind] = fields.pop(field)
            row["fields"] = fields
        for kind, suffix in (("caption", ".txt"), ("label", ".cls")):
            if suffix in texts and (getattr(columns, kind) is None or kind not in row):
                row[kind] = _file(path.with_suffix(suffix)).read_text("utf-8-sig").strip()
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return row


def _file(path: Path) -> Path:
    """Returns the path unless it is one of a folder, or of a pipe or device, which might never end."""
    if not path.is_file() and path.exists():
        raise bad_input("Expected a file", str(path), "Replace the folder, pipe or device", shown=True)
    return path


def open_saved(folder: Path, name: str, columns: Columns, *, prefix: bool = False) -> Table:
    """Opens a folder that ``save_to_disk`` of Hugging Face's datasets wrote, without that library.

    Args:
        folder: The folder, with ``state.json`` and ``.arrow`` files.
        name: Its name in ids and reasons.
        columns: Which columns to read.
        prefix: Begin all ids with ``name``.

    Raises:
        ValueError: The files are damaged, or a column is missing.
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            f"Reading {folder} needs pyarrow, which cannot be imported ({error}). "
            'Install it: pip install "clipmb[train]"'
        ) from error
    try:
        state = json.loads(_file(folder / "state.json").read_bytes())
        files = [os.path.basename(entry["filename"]) for entry in state["_data_files"]]
        batches, metadata = [], None
        for file in files:
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(_file(folder / file))))
            metadata = reader.schema.metadata
            batches += list(reader)
        schema = batches[0].schema
        if state.get("_indices_data_files"):
            raise ValueError("a selection of rows; flatten_indices() before save_to_disk() writes them plainly")
    except (OSError, ValueError, TypeError, KeyError, IndexError, pyarrow.ArrowException) as error:
        raise bad_input(
            f"{folder} must be a data set that save_to_disk wrote",
            f"{type(error).__name__}: {error}",
            "Save it again",
            shown=True,
        ) from error
    names = columns.find(folder, schema.names)
    others = others_of(folder, schema, tuple(names.values())) if columns.partial else []
    embedded = "image" in names and holds_bytes(schema.field(names["image"]).type)
    pictures = _Batches(batches, names.pop("image")) if embedded else None
    classes = class_names(metadata, names.get("label"))
    every = (row for batch in batches for row in rows_of(batch, names, classes, others))
    rows = ((f"/{number}", row) for number, row in enumerate(every))
    stamp = sha256(json.dumps([state.get("_fingerprint"), [batch.nbytes for batch in batches]]).encode()).hexdigest()
    roots = [Path(columns.root)] if columns.root is not None else [folder, folder.parent]
    return Table(name, rows, roots, pictures=pictures, prefix=prefix, stamp=stamp, partial=columns.partial)


class _Batches:
    """Images in a column of memory-mapped Arrow record batches."""

    def __init__(self, batches: Sequence[Any], column: str) -> None:
        self._columns = [batch.column(column) for batch in batches]
        self._starts = np.cumsum([0, *map(len, self._columns)])

    def __getitem__(self, row: int) -> bytes | str:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return picture_of(self._columns[batch][row - int(self._starts[batch])].as_py())


class Rows:
    """A ``datasets.Dataset`` in memory: images, captions and labels of its columns. One row is one pair.

    Args:
        dataset: The object; a DatasetDict is refused, because it is several.
        columns: Which columns to read.

    Attributes:
        name: "dataset" and the split's name.
        left_out: (id, reason) of the rows without captions and label.

    Raises:
        ValueError: A column is missing.
        TypeError: It is a DatasetDict or a stream without a length.
    """

    def __init__(self, dataset: Any, columns: Columns) -> None:
        if isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
            raise bad_input(
                "A data set must be one split with a length",
                f"{type(dataset).__name__} of {', '.join(map(str, dataset)) if isinstance(dataset, Mapping) else '?'}",
                "Pass one split, for example dataset['train']; save a stream as shards first",
                TypeError,
                shown=True,
            )
        self.name = f"dataset-{dataset.split}" if getattr(dataset, "split", None) else "dataset"
        self._names = columns.find(Path(self.name), dataset.column_names)
        image = self._names.get("image")
        feature: Any = dataset.features[image] if image else None
        if type(feature).__name__ == "Image":  # leave decoding to us, which turns images upright
            dataset = dataset.cast_column(image, type(feature)(decode=False))
        self._pictures = dataset.select_columns([image]) if image else None
        plain = [name for name, kind in dataset.features.items() if hasattr(kind, "dtype") and kind.dtype != "binary"]
        self._others = [name for name in plain if name not in self._names.values()] if columns.partial else []
        columns_of_text = [*(name for kind, name in self._names.items() if kind != "image"), *self._others]
        self._texts = dataset.select_columns(columns_of_text) if columns_of_text else [{}] * len(dataset)
        names = getattr(dataset.features.get(self._names.get("label", "")), "names", None)
        self._classes: Sequence[str] = names or ()
        self._root = Path(columns.root or "")
        self.left_out: list[tuple[str, str]] = []
        self.kinds: dict[str, set[str]] = {}
        kept = []
        for row, texts in enumerate(self._texts):
            try:
                if not self._captions(texts) and self._label(texts) is None and not (columns.partial and image):
                    raise bad_input("A row needs a caption", None, "Fill it in, or remove the row")
                kept.append(row)
            except ValueError as error:
                self.left_out.append((f"{self.name}/{row}", str(error)))
                continue
            for name in self._others:
                self.kinds.setdefault(name, set()).add(kind_of(texts[name]))
        self._rows = np.array(kept, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, index: int) -> str:
        """The name of the data set, a slash and the number of the row."""
        return f"{self.name}/{self._rows[index]}"

    def captions(self, index: int) -> list[str]:
        """The captions of the row."""
        return self._captions(self._texts[int(self._rows[index])])

    def label(self, index: int) -> str | None:
        """The name of the row's class, or None."""
        return self._label(self._texts[int(self._rows[index])])

    def fields(self, index: int) -> dict[str, Any]:
        """The other columns, where rows may be partial."""
        texts = self._texts[int(self._rows[index])] if self._others else {}
        return json.loads(json.dumps({name: texts[name] for name in self._others}, default=str))

    def caption_fields(self, index: int) -> list[dict[str, Any]]:
        """The other fields of each caption."""
        return [self.fields(index)] * len(self.captions(index))

    def has_image(self, index: int) -> bool:
        """Whether there is a column of images."""
        return "image" in self._names

    def file(self, index: int) -> Path | None:
        """The path of an image that is a file of its own."""
        picture = self.image(index) if self.has_image(index) else None
        return picture if isinstance(picture, Path) else None

    def image(self, index: int) -> bytes | Path | Image.Image:
        """The bytes, the path or the object of the image."""
        value: Any = (
            self._pictures[int(self._rows[index])][self._names["image"]] if self._pictures is not None else None
        )
        if hasattr(value, "convert"):
            return value
        picture = picture_of(value)
        return picture if isinstance(picture, bytes) else self._root / picture

    def digest(self) -> bytes:
        """SHA-256 over the kept rows, their captions and labels."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        hashed = sha256(self._rows.astype("<i8").tobytes())
        for row in self._rows.tolist():
            texts = self._texts[row]
            hashed.update(json.dumps([self._captions(texts), self._label(texts)]).encode() + b"\n")
        return hashed.digest()

    def _captions(self, texts: Mapping[str, Any]) -> list[str]:
        return texts_of("The caption", texts.get(self._names.get("caption", "")))

    def _label(self, texts: Mapping[str, Any]) -> str | None:
        label = texts.get(self._names.get("label", ""))
        if isinstance(label, int) and 0 <= label < len(self._classes):
            return self._classes[label]
        return label_of("The label", label)


def is_dataset(value: Any) -> bool:
    """Whether this is an object of Hugging Face's datasets, which is not imported for it."""
    return type(value).__module__.partition(".")[0] == "datasets"
