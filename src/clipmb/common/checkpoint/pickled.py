"""Weights pickled by PyTorch, inspected without running anything in them and then loaded.

A pickle is a program. Here it is read by an interpreter of its own, which knows the few operations that tensors need
and can call nothing, and every claim of size is held against the bytes of the file, which takes 0.03 s for 605 MB. Only
then, and never for a TorchScript archive or one with other objects beside the weights, does
``torch.load(weights_only=True)`` see the file: PyTorch below 2.6 runs code of crafted files in spite of
``weights_only=True`` (CVE-2025-32434).
"""

from __future__ import annotations

import importlib
import io
import math
import mmap
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from clipmb.common.checkpoint.disk import KeptErrors
from clipmb.common.checkpoint.sniffing import LEGACY, ZIP
from clipmb.common.checkpoint.tensors import Lazy
from clipmb.common.checkpoint.wrapping import unwrapped
from clipmb.common.dtypes import BFLOAT16
from clipmb.common.errors import CheckpointError, MissingBackendError, bounded_repr

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_MAX_OPERATIONS = 1_000_000  # a training checkpoint of a ViT-L/14, with the optimizer's state, has some 100,000
_MAX_PICKLE = 32 << 20  # bytes of the pickles, without the numbers; those of the same file take some 5 MB
_MAX_AXES = 8
_MAX_PATH = 1000  # characters of the attributes that lead to a tensor of TorchScript; CLIP has 60


@dataclass(frozen=True)
class Global:
    """A name that a pickle would import; here it stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: its key, dtype, and number of elements."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Layout:
    """A tensor as a pickle describes it: its storage, and where in it (all in elements)."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def problem(self) -> str | None:
        """Says what is impossible about it, if anything is."""
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(number) is int and number >= 0 for number in numbers):
            return "has sizes that are not natural numbers"
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
            return f"has {len(self.shape)} axes and {len(self.strides)} strides"
        count = math.prod(self.shape)
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if count and self.offset + last >= self.storage.count:
            return f"of shape {self.shape} reaches beyond its storage of {self.storage.count} elements"
        if count > self.storage.count:
            return f"of shape {self.shape} is an expanded view of a storage of {self.storage.count} elements"
        return None


@dataclass
class Inert:
    """An object of a class that is not ours: a name, and the attributes that it was given."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _Interpreter:
    """Reads pickles to dicts, lists, tuples, numbers, strings, `Layout`, `Global` and `Inert`.

    Nothing is imported or called, and no operation allocates more than the file has bytes.
    """

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self.storages: dict[Storage, None] = {}
        self.foreign: dict[str, None] = {}
        self._left = _MAX_OPERATIONS

    def run(self, stream: Any) -> Any:
        """Interprets one pickle, and leaves the stream behind it.

        Raises:
            ValueError: It is not a pickle, or has an operation that no checkpoint needs. So do the errors of indexing
                and of types that damage leads to.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for operation, argument, _ in pickletools.genops(stream):
            value: Any = argument  # of the type that the operation has
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"it has more than {_MAX_OPERATIONS} operations")
            match operation.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(_MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(value)
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[operation.name]())
                case "TUPLE":
                    stack.append(tuple(_pop_to_mark(stack)))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    size = int(operation.name[-1])
                    stack[-size:] = [tuple(stack[-size:])]
                case "APPEND" | "APPENDS":
                    items = [stack.pop()] if operation.name == "APPEND" else _pop_to_mark(stack)
                    if not isinstance(stack[-1], Inert):
                        _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = [stack.pop(-2), stack.pop()] if operation.name == "SETITEM" else _pop_to_mark(stack)
                    for name in items[::2]:
                        _expect(name, str | int | Global)  # hashing deeply nested tuples would overflow the stack
                    if not isinstance(stack[-1], Inert):
                        _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
                case "GLOBAL":
                    stack.append(Global(*value.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(Global(_expect(module, str), _expect(name, str)))
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(self._call(_expect(stack.pop(), Global), _expect(arguments, tuple)))
                case "NEWOBJ":
                    stack.pop()
                    stack.append(self._inert(_expect(stack.pop(), Global)))
                case "BUILD":
                    state = stack.pop()
                    if isinstance(stack[-1], Inert) and isinstance(state, dict):
                        stack[-1].attributes.update(state)  # on a state dict it is `_metadata`, of no use here
                case other:
                    raise ValueError(f"it has the operation {other}")
        raise ValueError("it does not end")

    def _storage(self, name: Any) -> Storage:
        kind, dtype, key, _, count, *view = _expect(name, tuple)
        if kind != "storage" or any(view) or type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError(f"it names a storage in an unknown way: {bounded_repr(name)}")
        if str(_expect(dtype, Global)) not in {f"torch.{known}" for known in _DTYPES}:
            raise ValueError(f"it has tensors of {str(dtype)[:100]} (supported: {', '.join(_DTYPES)})")
        storage = Storage(key, _DTYPES[dtype.name], count)
        self.storages[storage] = None
        return storage

    def _call(self, function: Global, arguments: tuple) -> Any:
        match str(function):
            case "collections.OrderedDict" if not arguments:
                return {}
            case "torch._utils._rebuild_tensor_v2":
                storage, offset, shape, strides, *_ = arguments
                _expect(storage, Storage)
                self.layouts.append(Layout(storage, offset, _expect(shape, tuple), _expect(strides, tuple)))
                return self.layouts[-1]
            case "torch._utils._rebuild_parameter":
                return _expect(arguments[0], Layout)
            case "torch.Size":
                return _expect(arguments[0], tuple)
        return self._inert(function)

    def _inert(self, kind: Global) -> Inert:
        self.foreign[str(kind)] = None
        return Inert(str(kind))


_MARK = object()
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error)


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    position = len(stack) - 1
    while stack[position] is not _MARK:
        position -= 1
        if position < 0:
            raise ValueError("it lacks a mark")
    items = stack[position + 1 :]
    del stack[position:]
    return items


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it has a {type(value).__name__} where a {getattr(kind, '__name__', kind)} belongs")
    return value


@dataclass
class Pickled:
    """A file of pickled weights that passed the checks.

    Attributes:
        path: The file.
        tree: What was pickled, with a `Layout` for each tensor.
        scripted: It is a TorchScript archive.
        zipped: It is a zip archive, as since PyTorch 1.6.
        wrapper: Where in the tree the state dict is, once `layouts` or `arrays` found it; see `unwrapped`.
    """

    path: Path
    tree: Any
    scripted: bool = False
    zipped: bool = True
    wrapper: str = ""
    _starts: dict[str, int] = field(default_factory=dict)

    @property
    def is_mapped(self) -> bool:
        """Whether the arrays come from the file without PyTorch, once `wrapper` is known."""
        return self.scripted or (self.zipped and self.wrapper != "")

    def layouts(self) -> dict[str, Any]:
        """Returns the state dict with a `Layout` for each tensor, without loading it.

        Raises:
            CheckpointError: There is none.
        """
        return self._state_dict(self.tree)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the state dict. The arrays of a zip archive are private mappings of the file.

        PyTorch loads it where it is all that a file holds; what trainers put around it, PyTorch need not understand.

        Raises:
            CheckpointError: There is none, or PyTorch cannot load it.
            MissingBackendError: PyTorch is not installed; TorchScript archives and those of trainers do not need it.
        """
        layouts = self.layouts()
        if self.is_mapped:
            with open(self.path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return {
                name: self._map(content, value) if isinstance(value, Layout) else np.asarray(value)
                for name, value in layouts.items()
            }
        torch = import_torch()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old forms of files; the values are the same
                if self.path.suffix == ".safetensors":  # PyTorch would take its word for it, were it given the path
                    tree = torch.load(io.BytesIO(self.path.read_bytes()), map_location="cpu", weights_only=True)
                else:
                    tree = torch.load(str(self.path), map_location="cpu", weights_only=True, mmap=self.zipped)
        except Exception as error:
            raise CheckpointError(f"{self.path} cannot be loaded by PyTorch: {error}") from error
        return {
            name: _to_numpy(torch, value) if isinstance(value, torch.Tensor) else np.asarray(value)
            for name, value in self._state_dict(tree).items()
        }

    def _map(self, content: mmap.mmap, layout: Layout) -> np.ndarray:
        storage, size = layout.storage, layout.storage.dtype.itemsize
        if math.prod(layout.shape) == 0:
            return np.empty(layout.shape, storage.dtype)
        flat = np.frombuffer(content, storage.dtype, storage.count, self._starts[storage.key])[layout.offset :]
        array = np.lib.stride_tricks.as_strided(flat, layout.shape, [stride * size for stride in layout.strides])
        return array if array.flags.aligned else array.copy()

    def _state_dict(self, tree: Any) -> dict[str, Any]:
        if self.scripted:
            return _attributes(tree, self.path)
        tree, self.wrapper = unwrapped(tree)  # what trainers save: weights, epoch, optimizer …
        if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
            raise CheckpointError(f"{self.path} holds no dict of names and tensors. Save the model's state_dict().")
        strange = [
            f"{name} is a {type(value).__name__}"
            for name, value in tree.items()
            if not (isinstance(value, Layout | int | float) or hasattr(value, "untyped_storage"))
        ]
        if strange:
            raise CheckpointError(f"{self.path} holds more than names and tensors; save the state_dict():", strange)
        return tree


def _attributes(root: Any, path: Path) -> dict[str, Any]:
    """Names the tensors of TorchScript's objects, and the whole numbers of the outermost, by their attribute paths.

    Raises:
        CheckpointError: A path is longer than any model's.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        prefix, node = waiting.pop()
        if not isinstance(node, Inert) or id(node) in seen:  # each object once: files may have cycles
            continue
        seen.add(id(node))
        if len(prefix) > _MAX_PATH:
            raise CheckpointError(f"{path} nests objects deeper than any CLIP: {prefix[:100]}….")
        for name, value in node.attributes.items():
            if isinstance(value, Layout) or (not prefix and type(value) is int):
                found[f"{prefix}{name}"] = value
            waiting.append((f"{prefix}{name}.", value))
    return found


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def write_pickle(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes a state dict with ``torch.save``, which needs all of it at once.

    Raises:
        MissingBackendError: PyTorch is not installed.
        OSError: The file cannot be written.
    """
    torch = import_torch()
    with open(path, "wb", buffering=0) as disk:
        kept = KeptErrors(disk)
        torch.save({name: _to_torch(torch, tensor.make()) for name, tensor in tensors.items()}, kept)
    kept.raise_first()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.require(array, requirements=["C", "W"])  # a copy only where torch cannot share the array
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def import_torch() -> ModuleType:
    """Imports PyTorch, which the package does not otherwise need.

    Raises:
        MissingBackendError: It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise MissingBackendError("pt", "torch", cause=str(error)) from error


def inspect(path: Path) -> Pickled:
    """Checks a file of pickled weights and reads its names, shapes and dtypes, but not its numbers.

    Raises:
        CheckpointError: It is damaged, holds other things than tensors, or claims more than it has.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(LEGACY))
            if head == LEGACY:
                return _inspect_legacy(path, file)
            if head.startswith(ZIP):
                return _inspect_zip(path, file)
    except (zipfile.BadZipFile, *_DAMAGE, NotImplementedError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable checkpoint of PyTorch: {error}.") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    raise CheckpointError(
        f"{path} is not a checkpoint of PyTorch: neither a zip archive nor a pickle with PyTorch's magic number "
        "(tar archives of before 2017 are not read). Save it again with torch.save."
    )


def _inspect_zip(path: Path, file: Any) -> Pickled:
    records = _records(file)
    roots = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("the archive has no data.pkl in its one folder")
    start, size = records[f"{roots[0]}data.pkl"]
    if size > _MAX_PICKLE:
        raise ValueError(f"its data.pkl has {size} bytes")
    if f"{roots[0]}byteorder" in records:
        file.seek(records[f"{roots[0]}byteorder"][0])
        if file.read(3) == b"big":
            raise ValueError("it was written by a big-endian machine; save it again on a little-endian one")
    file.seek(start)
    interpreter = _Interpreter()
    tree = interpreter.run(io.BytesIO(file.read(size)))
    scripted = f"{roots[0]}constants.pkl" in records
    starts = {}
    for storage in interpreter.storages:
        start, size = records.get(f"{roots[0]}data/{storage.key}", (0, -1))
        if storage.count * storage.dtype.itemsize > size:
            raise ValueError(f"it claims {storage.count} elements of {storage.dtype} in the record {storage.key!r:.40}")
        starts[storage.key] = start
    _refuse(path, interpreter, inert=scripted or _is_apart(tree))
    return Pickled(path, tree, scripted, True, _starts=starts)


def _is_apart(tree: Any) -> bool:
    """Whether the state dict is under a name of its own and holds numbers only, whatever stands beside it."""
    weights, wrapper = unwrapped(tree)
    return wrapper != "" and all(isinstance(value, Layout | int | float) for value in weights.values())


def _records(file: Any) -> dict[str, tuple[int, int]]:
    """Returns name to (first byte, bytes) of the files in an archive, none of which may be compressed or overlap."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        comment = archive.comment
    length = file.seek(0, io.SEEK_END)
    spans: list[tuple[int, int]] = []
    records: dict[str, tuple[int, int]] = {}
    for entry in entries:
        file.seek(entry.header_offset)
        header = file.read(30)
        if not header.startswith(ZIP) or entry.flag_bits & 1 or entry.orig_filename in records:
            raise ValueError(f"the archive's entry {entry.filename!r:.60} is damaged, encrypted, or there twice")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size:
            records[entry.orig_filename] = (start, entry.file_size)
        elif "/code/" not in entry.filename:  # TorchScript compresses its source, which is never read
            raise ValueError(f"the archive's entry {entry.filename!r:.60} is compressed, which PyTorch never does")
        spans.append((entry.header_offset, start + entry.compress_size))
    spans.sort()
    ends = [end for _, end in spans]
    if comment or not spans or spans[0][0] or ends[-1] > length:
        raise ValueError("the archive has bytes before or after its entries, or entries beyond its end")
    if any(end > begin for end, (begin, _) in zip(ends, spans[1:], strict=False)):
        raise ValueError("the archive has entries that overlap")
    return records


class _Stream:
    """The pickles at the beginning of a mapped file, which may be sparse and claim a string of any length."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self.tell = content, content.tell

    def read(self, count: int) -> bytes:
        """Reads so many bytes, or as many as there are."""
        if self.tell() + count > _MAX_PICKLE:
            raise ValueError(f"it has more than {_MAX_PICKLE} bytes of pickles")
        return self._content.read(count)

    def readline(self) -> bytes:
        """Reads up to the end of a line."""
        end = self._content.find(b"\n", self.tell(), _MAX_PICKLE)
        if end < 0:
            raise ValueError("it has a line without an end")
        return self._content.read(end + 1 - self.tell())


def _inspect_legacy(path: Path, file: Any) -> Pickled:
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        interpreter, stream = _Interpreter(), _Stream(content)
        interpreter.run(stream)  # the magic number
        interpreter.run(stream)  # the version of the protocol
        if _expect(interpreter.run(stream), dict).get("little_endian") is not True:
            raise ValueError("it was written by a big-endian machine; save it again on a little-endian one")
        tree = interpreter.run(stream)
        keys = _expect(interpreter.run(stream), list)
        sizes = {storage.key: storage.count * storage.dtype.itemsize for storage in interpreter.storages}
        if len(sizes) != len(interpreter.storages) or sorted(sizes) != sorted(keys):
            raise ValueError("its storages are not those that its tensors name")
        # PyTorch believes the number that precedes each storage, and no other, about how much to read.
        position = content.tell()
        for key in keys:
            (count,) = struct.unpack_from("<q", content, position)
            position += 8 + sizes[key]
            if count not in (storage.count for storage in interpreter.storages if storage.key == key):
                raise ValueError(f"its storage {key!r:.40} has {count} elements")
        if position > len(content):
            raise ValueError(f"it is {position - len(content)} bytes too short")
        _refuse(path, interpreter, inert=False)
        return Pickled(path, tree, zipped=False)
    finally:
        content.close()


def _refuse(path: Path, interpreter: _Interpreter, *, inert: bool) -> None:
    if interpreter.foreign and not inert:  # otherwise PyTorch never sees them
        raise CheckpointError(
            f"Refusing to load {path}: unpickling it would run code. Save the model's state_dict() instead. It names:",
            list(interpreter.foreign)[:20],
        )
    problems = {f"a tensor {problem}" for layout in interpreter.layouts if (problem := layout.problem())}
    if problems:
        raise CheckpointError(f"{path} declares tensors that it does not hold:", sorted(problems)[:20])
