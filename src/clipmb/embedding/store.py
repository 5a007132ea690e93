"""How embeddings lie on disk: Parquet shards, a manifest, and what is known of shards that are under way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.json_files import json_text, json_values, read_json
from clipmb.common.saving import NO_ROOM, locked, stamps, write_atomically

MANIFEST = "manifest.json"
ERRORS = "errors.parquet"
KINDS = ("images", "texts")
STORED = ("float32", "float16")
ENGINES = ("local", "ray")  # who makes the shards
GROUP = 1 << 14  # rows of a row group, in which the embeddings are one page
_FORMAT = 1
LAYOUT_BEGUN = ".clipmb-layout."  # and more: a folder that is not whole
_UNDER_WAY = ".clipmb-embed"
_BEGUN = re.compile(r"\.((images|texts)-\d{5,}\.parquet|errors\.parquet|manifest\.json)\.\d+")  # of write_atomically


@dataclass
class Manifest:
    """What a folder of embeddings holds.

    Attributes:
        passport: What made them, as `clipmb.embedding.passport.passport_of` describes it.
        dimension: Numbers in an embedding.
        store: "float32" or "float16".
        options: What the job's division into shards and batches depends on.
        sources: The finished jobs, each with ``name``, ``fingerprint``, ``items``, ``images``, ``texts``, ``errors``
            (counts) and ``shards``, the range of their numbers.
        pending: The job that is under way or was killed, in the same form without counts; or None.
    """

    passport: dict[str, Any]
    dimension: int
    store: str
    options: dict[str, Any]
    sources: list[dict[str, Any]] = field(default_factory=list)
    pending: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Reads the manifest of a folder; None where there is none.

        Raises:
            CheckpointError: It is damaged, or a newer version of clipmb wrote it.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        content = read_json(path)
        if content.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path} must have format {_FORMAT}. Install a newer clipmb, or embed again.")
        try:
            manifest = cls(**content)
            for job in [*manifest.sources, *([] if manifest.pending is None else [manifest.pending])]:
                counts = [job[name] for name in ("items", *(() if job is manifest.pending else (*KINDS, "errors")))]
                first, end = job["shards"]
                if not all(type(number) is int for number in (*counts, first, end)):
                    raise TypeError("counts and shards must be whole numbers")
                str.join("", (job["name"], job["fingerprint"]))
            if not (isinstance(manifest.passport, dict) and isinstance(manifest.options, dict)):
                raise TypeError("passport and options must be objects")
            if type(manifest.dimension) is not int or manifest.store not in STORED:
                raise TypeError("dimension must be a whole number, and store one of " + ", ".join(STORED))
            return manifest
        except (TypeError, ValueError, LookupError) as error:
            raise CheckpointError(f"{path} does not have the content of its kind: {error}") from error

    def write(self, folder: Path) -> None:
        """Writes the manifest; readers find the old one or the new one."""
        write_atomically(folder / MANIFEST, json_text({"format": _FORMAT, **vars(self)}).encode())

    @property
    def next_shard(self) -> int:
        """The number of the first shard of a further job."""
        return max((source["shards"][1] for source in self.sources), default=0)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the folder for one job, and removes what killed ones had begun to write.

    Raises:
        ValueError: Another process embeds into it.
        OSError: The disk is full.
    """
    made = not folder.exists()
    try:
        with locked(folder, wait=False):
            for path in folder.iterdir():
                if _BEGUN.fullmatch(path.name):
                    path.unlink()
                elif path.name.startswith(LAYOUT_BEGUN):
                    shutil.rmtree(path, ignore_errors=True)
            yield
    except ValueError:
        if made:  # for what was then refused
            with suppress(OSError):
                folder.rmdir()
        raise
    except BlockingIOError:
        raise bad_input(
            "Only one process at a time may embed into a folder", str(folder),
            "Wait for the other, or use another folder", shown=True,
        ) from None  # fmt: skip
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        fix = "Free some, and go on with resume=True (--resume)"
        full = bad_input("There must be room on the disk", f"{folder}, which is full", fix, shown=True)
        raise OSError(error.errno, str(full)) from error


def pyarrow() -> Any:
    """Returns pyarrow with its module for Parquet.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"Embeddings on disk need pyarrow, which cannot be imported ({error}). "
            'Install it: pip install "clipmb[embed]"'
        ) from error
    return pyarrow


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """Returns where a shard is."""
    return folder / f"{kind}-{number:05d}.parquet"


def column_types(kinds: Mapping[str, set[str]]) -> dict[str, str]:
    """Returns the Arrow type of each further column: of its Python types what holds them all, else JSON as a string."""
    types = {}
    for name, found in kinds.items():
        some = found - {"NoneType"}
        if some and some <= {"int", "long"}:
            types[name] = "int64"
        elif some and some <= {"int", "float"}:
            types[name] = "float64"
        elif some == {"bool"}:
            types[name] = "bool"
        else:
            types[name] = "json" if some & {"list", "dict", "int", "long", "float", "bool", "big"} else "string"
    return types


def column_names(names: Iterable[str], fixed: Collection[str]) -> dict[str, str]:
    """Returns what each further column is called beside the fixed ones: its own name, or that with "_" behind it."""
    own = {name: writable(name) for name in names}
    taken = {*fixed, *own.values()}
    called: dict[str, str] = {}
    for name, text in own.items():
        free = text not in fixed and text not in called.values()
        while not free:
            text += "_"
            free = text not in taken
        taken.add(text)
        called[name] = text
    return called


@overload
def writable(text: str) -> str: ...
@overload
def writable(text: str | None) -> str | None: ...
def writable(text: str | None) -> str | None:
    """Returns a text as UTF-8 can hold it: bytes of a file name that are no text, and half characters, as escapes."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def write_shard(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    embeds: np.ndarray,
    types: Mapping[str, str],
    passport: Mapping[str, Any],
) -> None:
    """Writes one shard; it appears under its name only when it is complete.

    Args:
        path: Where.
        rows: ``id``, ``path`` (absolute, or None), ``caption`` (of texts), ``label`` and "fields" of each embedding.
        embeds: (rows, proj), in the dtype to store.
        types: Further columns and their types, of `column_types`.
        passport: Kept in the metadata of the file.
    """
    pa = pyarrow()
    fixed = ("id", "path", "caption", "label") if path.name.startswith("texts") else ("id", "path", "label")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in fixed}
    called = column_names(types, (*fixed, "embedding"))
    for name, kind in types.items():
        values = [row["fields"].get(name) for row in rows]
        if kind == "json":
            values = [None if value is None else _json(value) for value in values]
        elif kind == "string":
            values = [None if value is None else writable(str(value)) for value in values]
        columns[called[name]] = pa.array(
            values, pa.string() if kind == "json" else getattr(pa, {"bool": "bool_"}.get(kind, kind))()
        )
    flat = pa.array(np.ascontiguousarray(embeds).reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, embeds.shape[1])
    table = pa.table(columns).replace_schema_metadata({"clipmb": json.dumps(dict(passport))})
    buffer = pa.BufferOutputStream()
    # Embeddings do not compress; plain and in one page, `Rows` maps them.
    compression = {**dict.fromkeys(columns, "snappy"), "embedding.list.element": "none"}
    pa.parquet.write_table(
        table, buffer, use_dictionary=False, compression=compression, data_page_size=1 << 30, row_group_size=GROUP
    )
    write_atomically(path, buffer.getvalue())


def _json(value: Any) -> str:
    return writable(json.dumps(json_values(value), ensure_ascii=False))


class _Group(NamedTuple):
    """A row group of a shard."""

    path: Path
    number: int
    rows: int
    place: int | None  # of the embeddings in the file, where they can be mapped


class Rows:
    """The embeddings of shards as one sequence of rows, of which a block at a time is in memory.

    Blocks are copied from mapped files; shards of other programs, whose embeddings are compressed or in several pages,
    are decoded a row group at a time.

    Args:
        paths: The shards, in their order.
        dimension: Numbers in an embedding.
        stored: "float32" or "float16".

    Attributes:
        dimension: As above.
        types: The Arrow types of all columns of the shards but the embedding, by name: what holds the values of every
            shard, text where there is nothing else.
        lengths: (rows,) float32, for who needs the lengths of embeddings more than once; NaN where not computed yet.

    Raises:
        CheckpointError: A shard cannot be read, or holds other embeddings.
    """

    def __init__(self, paths: Sequence[Path], dimension: int, stored: str) -> None:
        self.dimension, self._stored = dimension, np.dtype(stored)
        self._groups: list[_Group] = []
        self.types: dict[str, Any] = {}
        self._stamps: dict[Path, Any] = {}
        pa = pyarrow()
        kind = pa.list_(pa.from_numpy_dtype(self._stored), dimension)
        for path in paths:
            with readable(path), pa.parquet.ParquetFile(path) as file, open(path, "rb") as content:
                self._stamps[path] = stamps(path)
                schema = file.schema_arrow
                if "embedding" not in schema.names or schema.field("embedding").type != kind:
                    raise CheckpointError(f"{path} must have a column embedding of {dimension} {stored}. Embed again.")
                for field in schema:
                    if field.name != "embedding":
                        self.types[field.name] = _common(self.types.get(field.name), field.type)
                for number in range(file.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    place = _mapped(content, file.metadata.row_group(number), rows * dimension, self._stored.itemsize)
                    self._groups.append(_Group(path, number, rows, place))
        self._ends = np.cumsum([group.rows for group in self._groups], dtype=np.int64)
        self.lengths = np.full(len(self), np.nan, np.float32)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def blocks(
        self, size: int, chosen: np.ndarray | None = None, space: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the numbers (n,) of up to ``size`` rows, and these rows, (n, proj) float32.

        Args:
            size: Rows of a block, at most.
            chosen: (m,) numbers of rows, ascending; all when None.
            space: (size, proj) float32, into which every block is put in its turn; new arrays when None, which
                is slower and lets blocks be kept.
        """
        places = range(len(self._groups)) if chosen is None else np.unique(self._places(chosen)).tolist()
        for path, some in groupby(places, key=lambda place: self._groups[place].path):
            content = None  # mapped for this while: there may be more shards than files that a process may have open
            for place in some:
                group, end = self._groups[place], int(self._ends[place])
                start = end - group.rows
                if chosen is None:
                    numbers = np.arange(start, end)
                else:
                    numbers = chosen[slice(*np.searchsorted(chosen, (start, end)))]
                if content is None:
                    with self._unchanged(path):
                        content = np.memmap(path, mode="r")
                values = self._values(group, content)
                for first in range(0, len(numbers), size):
                    own = numbers[first : first + size]
                    block = np.empty((len(own), self.dimension), np.float32) if space is None else space[: len(own)]
                    block[:] = values[slice(first, first + size) if chosen is None else own - start]
                    yield own, block

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """Returns which row group each row is in."""
        return np.searchsorted(self._ends, rows, side="right")

    @contextmanager
    def _unchanged(self, path: Path) -> Iterator[None]:
        """Refuses a shard that was replaced, of which places and lengths are known no longer."""
        with readable(path):
            if stamps(path) != self._stamps[path]:
                raise CheckpointError(f"{path} was changed since it was opened. Open its folder again.")
            yield

    def _values(self, group: _Group, content: np.ndarray) -> np.ndarray:
        if group.place is not None:
            end = group.place + group.rows * self.dimension * self._stored.itemsize
            return np.asarray(content)[group.place : end].view(self._stored).reshape(group.rows, -1)
        with self._unchanged(group.path), pyarrow().parquet.ParquetFile(group.path, memory_map=True) as file:
            column = file.read_row_group(group.number, columns=["embedding"]).column("embedding").combine_chunks()
        return column.flatten().to_numpy().reshape(group.rows, -1)

    def tables(self, names: Sequence[str]) -> Iterator[Any]:
        """Yields some of the other columns, in the types of all shards, as tables of up to `GROUP` rows of all rows.

        Args:
            names: Which columns; a shard that lacks one has null there.
        """
        pa = pyarrow()
        for path in dict.fromkeys(group.path for group in self._groups):
            with self._unchanged(path), pa.parquet.ParquetFile(path) as file:
                own = [name for name in names if name in file.schema_arrow.names]
                for batch in file.iter_batches(GROUP, columns=own):
                    yield pa.table(
                        {
                            name: _as(batch.column(name), self.types[name])
                            if name in own
                            else pa.nulls(batch.num_rows, self.types[name])
                            for name in names
                        }
                    )

    def take(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Returns the other columns of some rows (n,), in their order; None where a shard has no such column."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        places = self._places(rows)
        for place in np.unique(places):
            group = self._groups[place]
            mine = np.flatnonzero(places == place)
            with self._unchanged(group.path), pyarrow().parquet.ParquetFile(group.path) as file:
                names = [name for name in file.schema_arrow.names if name != "embedding"]
                table = file.read_row_group(group.number, columns=names)
            finest = [  # in Python
                pyarrow().field(column.name, pyarrow().timestamp("us", column.type.tz))
                if pyarrow().types.is_timestamp(column.type)
                else column
                for column in table.schema
            ]
            table = table.cast(pyarrow().schema(finest), safe=False)
            for i, row in zip(mine, table.take(rows[mine] - (self._ends[place] - group.rows)).to_pylist(), strict=True):
                found[i] = {name: row.get(name) for name in self.types}
        return found


def _common(one: Any, two: Any) -> Any:
    """Returns the Arrow type for the values of both: text where no other holds them all."""
    pa = pyarrow()
    two = two.value_type if pa.types.is_dictionary(two) else two
    try:
        schemas = [pa.schema([("", kind)]) for kind in (one, two) if kind is not None]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _as(column: Any, kind: Any) -> Any:
    """Returns a column in another type; what Arrow cannot write as text, as JSON."""
    pa = pyarrow()
    try:
        return column.cast(kind, safe=False)
    except pa.ArrowNotImplementedError:
        values = [None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                  for value in column.to_pylist()]  # fmt: skip
        return pa.array(values, kind)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Says which shard cannot be read."""
    try:
        yield
    except CheckpointError:
        raise
    except (pyarrow().ArrowException, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Embed its source again.") from error


def _mapped(content: Any, group: Any, count: int, size: int) -> int | None:
    """Returns where in a file the embeddings of a row group lie one after the other, or None where they do not.

    They do when one page has all of them, plain and not compressed: they are its last bytes, after the levels.

    Args:
        content: The opened file.
        group: The metadata of the row group.
        count: How many numbers there are.
        size: Bytes of a number.

    Source: parquet.thrift and Encodings.md of apache/parquet-format; a page's header is a struct in Thrift's compact
    protocol.
    """
    columns = [group.column(i) for i in range(group.num_columns)]
    column = next(column for column in columns if column.path_in_schema.partition(".")[0] == "embedding")
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page or column.num_values != count:
        return None
    if column.statistics is None or column.statistics.null_count:
        return None
    content.seek(column.data_page_offset)
    fields, head = {}, iter(content.read(64))
    field, inside = 0, 0
    for byte in head:  # 1: type; 2, 3: sizes; 4: checksum; 5: of a data page, 1: how many values, 2: their encoding
        field, kind = field + (byte >> 4), byte & 15
        if kind == 12 and field == 5 and not inside:
            field, inside = 0, 10
        elif kind == 5:
            value = shift = 0
            for part in head:
                value, shift = value | (part & 127) << shift, shift + 7
                if part < 128:
                    break
            fields[inside + field] = (value >> 1) ^ -(value & 1)
        else:
            break
    plain = fields.get(1) == 0 and fields.get(11) == count and fields.get(12) == 0
    return column.data_page_offset + column.total_compressed_size - count * size if plain else None


def write_errors(folder: Path, source: int, errors: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the errors of one job among those of the folder.

    Args:
        folder: The folder.
        source: The number of the job.
        errors: ``id``, ``path``, ``kind`` and ``reason`` of each input without embedding.
    """
    pa = pyarrow()
    path = folder / ERRORS
    kept = []
    if path.is_file():
        kept = [row for row in pa.parquet.read_table(path).to_pylist() if row["source"] < source]
    rows = [*kept, *({**error, "source": source} for error in errors)]
    text = [(name, pa.string()) for name in ("id", "path", "kind", "reason")]
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows, pa.schema([*text, ("source", pa.int64())])), buffer)
    write_atomically(path, buffer.getvalue().to_pybytes())


def finished(folder: Path, number: int) -> dict[str, Any] | None:
    """Returns what is known of a shard whose files are complete, or None."""
    path = folder / _UNDER_WAY / f"{number:05d}.json"
    if not path.is_file():
        return None
    try:
        about = read_json(path)
    except CheckpointError:
        return None
    return about if is_whole(folder, number, about) else None


def is_whole(folder: Path, number: int, about: Mapping[str, Any]) -> bool:
    """Whether the files of a shard hold as many rows as is known of it."""
    if not isinstance(about.get("errors"), list):
        return False
    pa = pyarrow()
    for kind in KINDS:
        path = shard_path(folder, kind, number)
        try:
            rows = pa.parquet.read_metadata(path).num_rows if path.exists() else 0
        except (pa.ArrowException, OSError):
            return False
        if rows != about.get(kind):
            return False
    return True


def finish(folder: Path, number: int, about: Mapping[str, Any]) -> None:
    """Says that the files of a shard are complete."""
    (folder / _UNDER_WAY).mkdir(exist_ok=True)
    write_atomically(folder / _UNDER_WAY / f"{number:05d}.json", json_text(about).encode())


def clear(folder: Path, dropped: Iterable[int] = ()) -> None:
    """Forgets the shards under way, when they are in the manifest, and removes the files of dropped ones."""
    shutil.rmtree(folder / _UNDER_WAY, ignore_errors=True)
    for number in dropped:
        for kind in KINDS:
            shard_path(folder, kind, number).unlink(missing_ok=True)
