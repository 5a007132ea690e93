"""``flax_model.msgpack``, single or in shards, as the Flax models of transformers 4 wrote and read it.

The file is a msgpack map of maps, by attribute; its leaves are flax.serialization's: extension 1 is an array, itself
msgpack of (shape, name of the dtype, bytes), extension 3 the same for a scalar, extension 2 a complex number, and an
array of more than `CHUNK` bytes is a map that is marked as one and holds its parts. Arrays are views of the mapped
file, and a file is written one array at a time. The msgpack package copies twice instead: it reads 605 MB in 1.2 s and
1.2 GB of memory, this module in 0.2 s and the pages of the file.

Source: flax.serialization of Flax 0.10; https://github.com/msgpack/msgpack/blob/master/spec.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipmb.common.checkpoint.names import canonical, in_framework, names_in
from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.checkpoint.sniffing import read_files
from clipmb.common.checkpoint.tensors import Lazy, Loaded, mapped
from clipmb.common.checkpoint.wrapping import explain_stripping, unwrapped_paths
from clipmb.common.config import BaseConfig
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, specs
from clipmb.common.saving import Transaction

patterns = ("flax_model.msgpack", "flax_model-*.msgpack", "flax_model.msgpack.index.json")
whole_only, streams, packages = False, True, ()
CHUNK = 2**30  # bytes of an array above which Flax divides it
_FILE = "flax_model.msgpack"
_INDEX = "flax_model.msgpack.index.json"
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_DTYPES = {
    name: numpy_dtype(name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    )
}  # fmt: skip
_MAX_DEPTH, _MAX_KEY, _MAX_NODES, _MAX_AXES = 32, 1024, 200_000, 8
# First byte of each kind of value that has a length after it: (struct format of the length, what it counts).
_LENGTHS = {
    0xC4: ("B", "bin"), 0xC5: (">H", "bin"), 0xC6: (">I", "bin"),
    0xC7: ("B", "ext"), 0xC8: (">H", "ext"), 0xC9: (">I", "ext"),
    0xD9: ("B", "str"), 0xDA: (">H", "str"), 0xDB: (">I", "str"),
    0xDC: (">H", "array"), 0xDD: (">I", "array"), 0xDE: (">H", "map"), 0xDF: (">I", "map"),
}  # fmt: skip
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: "B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: "b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Maps the weights of a source; None when it has none in this format, which has no variants.

    Raises:
        CheckpointError: A file is damaged or hostile, or a shard is missing.
    """
    found = find(source, variant)
    if found is None:
        return None
    tensors, wrapper = unwrapped_paths(found[0])
    wrapper = "" if wrapper == "params" else wrapper  # which Flax itself has around weights
    return Loaded("flax-msgpack", canonical(tensors, "flax", source), found[1], None, explain_stripping((), wrapper))


def find(source: Source, variant: str | None = None) -> tuple[Mapping[str, Lazy], list[str]] | None:
    """Maps the files of a source whatever they hold: attributes joined by "/" to the array, and the files' names.

    Raises:
        CheckpointError: A file is damaged or hostile, or a shard is missing.
    """
    return None if variant else read_files(source, "msgpack", _FILE, _INDEX, read_tree)


def names(table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to the attributes in the files, joined by "/"."""
    return names_in("flax", table)


def read_tree(path: Path) -> dict[str, Lazy]:
    """Lists the arrays of a file: attributes joined by "/" to the array, which is a view where it can be.

    Raises:
        CheckpointError: The file is damaged, or holds what no checkpoint needs: values other than arrays, attributes
            twice, more nesting or more values than any model has.
    """
    with open(path, "rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise CheckpointError(f"{path} is empty.") from error
    reader = _Reader(content, path)
    tree = reader.value(0)
    if reader.position != len(content):
        raise reader.damaged("more after its end")
    if not isinstance(tree, dict):
        raise reader.damaged("no map of parameters")
    tensors: dict[str, Lazy] = {}
    _flatten(tree, "", tensors, reader)
    return tensors


def _flatten(tree: dict[str, Any], prefix: str, tensors: dict[str, Lazy], reader: _Reader) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED in value:
            value = reader.joined(value)
        name = f"{prefix}{key}"
        if len(name) > _MAX_KEY:
            raise reader.damaged(f"a parameter whose name has {len(name)} characters")
        if isinstance(value, dict):
            _flatten(value, f"{name}/", tensors, reader)
        elif not isinstance(value, Lazy):
            raise reader.damaged(f"a value that is not an array: {name[:200]}")
        elif name in tensors:
            raise reader.damaged(f"a parameter twice: {name[:200]}")
        else:
            tensors[name] = value


class _Reader:
    """Goes over a mapped file without copying arrays, and stops at the first thing that no checkpoint has."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self.content, self.path, self.position, self.nodes = content, path, 0, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not a readable msgpack file of Flax: it has {what}.")

    def take(self, count: int) -> int:
        """Moves on by so many bytes, and returns where they begin."""
        start = self.position
        if count > len(self.content) - start:
            raise self.damaged(f"{len(self.content) - start} bytes where {count} should be, at byte {start}")
        self.position = start + count
        return start

    def number(self, form: str) -> Any:
        (number,) = struct.unpack_from(form, self.content, self.take(struct.calcsize(form)))
        return number

    def header(self) -> tuple[str, Any]:
        """Reads what kind of value comes next, and its length or, for a scalar, its value."""
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise self.damaged(f"more than {_MAX_NODES} values")
        first = self.number("B")
        if first < 0x80 or first >= 0xE0:
            return "int", first if first < 0x80 else first - 0x100
        if first < 0xC0:
            kind, bits = ("map", 0x0F) if first < 0x90 else ("array", 0x0F) if first < 0xA0 else ("str", 0x1F)
            return kind, first & bits
        if first in _LENGTHS:
            form, kind = _LENGTHS[first]
            return kind, self.number(form)
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first in _NUMBERS:
            return "float" if first < 0xCC else "int", self.number(_NUMBERS[first])
        if first in (0xC2, 0xC3):
            return "bool", first == 0xC3
        raise self.damaged(f"the byte {first:#x} at {self.position - 1}, which stands for no value of a checkpoint")

    def value(self, depth: int) -> Any:
        """Reads a value: a dict, an array, a number, or True, the mark of a chunked array."""
        kind, size = self.header()
        if kind == "map":
            if depth > _MAX_DEPTH:
                raise self.damaged(f"maps nested deeper than {_MAX_DEPTH}")
            tree: dict[str, Any] = {}
            for _ in range(size):
                key = self.text()
                if key in tree:
                    raise self.damaged(f"a key twice: {key[:200]!r}")
                tree[key] = self.value(depth + 1)
            return tree
        if kind == "ext":
            return self.extension(size)
        if kind in ("int", "bool"):
            return size
        raise self.damaged(f"a {kind} where a map or an array should be, at byte {self.position}")

    def text(self) -> str:
        kind, size = self.header()
        if kind not in ("str", "bin") or size > _MAX_KEY:
            raise self.damaged(f"a {kind} of {size} where a name should be, at byte {self.position}")
        start = self.take(size)
        try:
            return self.content[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a name that is not UTF-8, at byte {start}") from error

    def extension(self, size: int) -> Lazy:
        code = self.number("b")
        end = self.position + size
        if size > len(self.content) - self.position:
            raise self.damaged(f"{len(self.content) - self.position} bytes where {size} should be")
        if code == _COMPLEX:
            number = np.asarray(self.complex())
            made = Lazy(number.shape, number.dtype, lambda: number)
        elif code in (_ARRAY, _SCALAR):
            made = self.array()
        else:
            raise self.damaged(f"an extension of the unknown type {code}")
        if self.position != end:
            raise self.damaged(f"an extension of another length than it says, at byte {end}")
        return made

    def complex(self) -> complex:
        if self.header() != ("array", 2):
            raise self.damaged("a malformed complex number")
        (real, x), (imaginary, y) = self.header(), self.header()
        if real != "float" or imaginary != "float":
            raise self.damaged("a malformed complex number")
        return complex(x, y)

    def array(self) -> Lazy:
        if self.header() != ("array", 3):
            raise self.damaged(f"an array that is not shape, dtype and bytes, at byte {self.position}")
        kind, axes = self.header()
        if kind != "array" or axes > _MAX_AXES:
            raise self.damaged(f"an impossible shape, at byte {self.position}")
        shape = tuple(self.axis() for _ in range(axes))
        name = self.text()
        if name not in _DTYPES:
            raise self.damaged(f"an array of dtype {name[:50]!r}; there may be {', '.join(_DTYPES)}")
        kind, size = self.header()
        if kind not in ("bin", "str") or not size or size != math.prod(shape) * _DTYPES[name].itemsize:
            raise self.damaged(f"{size} bytes for an array of shape {shape} and dtype {name}")
        return mapped(self.content, _DTYPES[name], shape, self.take(size))

    def axis(self) -> int:
        kind, size = self.header()
        if kind != "int" or size < 0:
            raise self.damaged(f"an impossible shape, at byte {self.position}")
        return size

    def joined(self, value: dict[str, Any]) -> Lazy:
        """Joins an array that was divided."""
        try:
            shape = tuple(value["shape"][str(i)] for i in range(len(value["shape"])))
            chunks = [value["chunks"][str(i)] for i in range(len(value["chunks"]))]
        except (KeyError, TypeError) as error:
            raise self.damaged("a divided array without its shape or a part") from error
        if not all(isinstance(axis, int) and axis >= 0 for axis in shape) or not chunks:
            raise self.damaged("a divided array of an impossible shape")
        if not all(isinstance(chunk, Lazy) and len(chunk.shape) == 1 for chunk in chunks):
            raise self.damaged("a divided array whose parts are not arrays of one axis")
        if len({chunk.dtype for chunk in chunks}) > 1 or sum(chunk.shape[0] for chunk in chunks) != math.prod(shape):
            raise self.damaged(f"a divided array whose parts do not make the shape {shape}")

        def release() -> None:
            for chunk in chunks:
                chunk.release()

        return Lazy(
            shape,
            chunks[0].dtype,
            lambda: np.concatenate([chunk.make() for chunk in chunks]).reshape(shape),
            release,
        )


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes canonical arrays; returns the names of the files, the index among them."""
    table = sorted(specs(config, head), key=lambda spec: spec.path("flax"))
    tensors = {
        "/".join(spec.path("flax")): tensor
        for spec, tensor in zip(table, in_framework(arrays, table).values(), strict=True)
    }

    def write_file(path: Path, part: dict[str, Lazy]) -> None:
        with open(path, "wb") as file:
            _write_tree(file, [(name.split("/"), tensor) for name, tensor in part.items()])

    return write_shards(save, tensors, write_file, single=_FILE, index=_INDEX, max_shard_size=max_shard_size)


def _write_tree(file: BinaryIO, entries: list[tuple[list[str], Lazy]]) -> None:
    """Writes the map of some arrays, given with their paths below a common parent."""
    children: dict[str, list[tuple[list[str], Lazy]]] = {}
    for (key, *rest), tensor in entries:
        children.setdefault(key, []).append((rest, tensor))
    file.write(_map(len(children)))
    for key, inside in children.items():
        file.write(_text(key))
        path, tensor = inside[0]
        if path:
            _write_tree(file, inside)
        else:
            _write_leaf(file, tensor.make())
            tensor.release()


def _write_leaf(file: BinaryIO, array: np.ndarray) -> None:
    if array.nbytes <= CHUNK:
        _write_array(file, array)
        return
    flat, step = np.ascontiguousarray(array).reshape(-1), max(1, CHUNK // array.itemsize)
    parts = range(0, flat.size, step)
    file.write(_map(3) + _text(_CHUNKED) + b"\xc3" + _text("shape") + _map(array.ndim))
    for axis, size in enumerate(array.shape):
        file.write(_text(str(axis)) + _integer(size))
    file.write(_text("chunks") + _map(len(parts)))
    for i, start in enumerate(parts):
        file.write(_text(str(i)))
        _write_array(file, flat[start : start + step])


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    inside = b"\x93" + bytes([0x90 | array.ndim]) + b"".join(map(_integer, array.shape)) + _text(array.dtype.name)
    inside += struct.pack(">BI", 0xC6, array.nbytes)
    file.write(struct.pack(">BIb", 0xC9, len(inside) + array.nbytes, _ARRAY) + inside)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _map(size: int) -> bytes:
    return bytes([0x80 | size]) if size < 16 else struct.pack(">BH", 0xDE, size)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return (bytes([0xA0 | len(encoded)]) if len(encoded) < 32 else struct.pack("BB", 0xD9, len(encoded))) + encoded


def _integer(number: int) -> bytes:
    return bytes([number]) if number < 128 else struct.pack(">BI", 0xCE, number)
