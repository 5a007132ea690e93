"""HDF5 files, read as untrusted input: nothing outside the file, nothing larger than it, no objects.

h5py is imported when the first file is opened. Its own reading would follow links and load plugins, so every object is
looked at first. Arrays that lie in the file as they are, which is how Keras and transformers write them, are then
mapped instead of read: 605 MB take 0.2 s instead of 1.4 s.
"""

from __future__ import annotations

import importlib
import math
import mmap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.checkpoint.disk import KeptErrors
from clipmb.common.checkpoint.tensors import Lazy, mapped
from clipmb.common.dtypes import BFLOAT16
from clipmb.common.errors import CheckpointError, MissingBackendError

_DTYPES = (
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
)  # fmt: skip
_OPAQUE = np.dtype("V2")  # how HDF5, which has no bfloat16, holds one
_FILTERS = (1, 2, 3)  # deflate, shuffle, Fletcher's checksum; others would load plugins
_MAX_OBJECTS, _MAX_DEPTH, _MAX_PATH = 20_000, 32, 1000  # with an optimizer's state, a CLIP has some 5,000 objects
_MAX_RATIO, _ALLOWANCE = 16, 1 << 20  # of what compressed arrays may be larger than the file


def read_h5(path: Path) -> dict[str, Lazy]:
    """Lists the arrays of a file: path inside the file to array.

    Raises:
        CheckpointError: The file is damaged, or holds what no checkpoint needs: links, data outside itself, objects,
            unknown compression, arrays that are larger than the file allows.
        MissingBackendError: h5py is not installed.
    """
    h5py = _h5py()
    size = path.stat().st_size
    try:
        with h5py.File(path, "r", locking=False) as file:
            walk = _Walk(h5py, path, size)
            walk.group(file, "", 0)
    except CheckpointError:
        raise
    except Exception as error:  # h5py raises nearly every type for damaged files
        raise CheckpointError(f"{path} is not a readable HDF5 file: {type(error).__name__}: {error}") from error
    walk.find_overlaps()
    if walk.unpacked > _MAX_RATIO * size + _ALLOWANCE:
        walk.problems.append(f"compressed arrays of {walk.unpacked} bytes in a file of {size}")
    if walk.problems:
        raise CheckpointError(
            f"Refusing to read {path}: it contains objects that a checkpoint should not have:", walk.problems
        )
    return walk.tensors


def _h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise MissingBackendError("convert", "h5py", cause=str(error)) from error


class _Walk:
    """One pass over a file that looks at every object before any of its content is read."""

    def __init__(self, h5py: Any, path: Path, size: int) -> None:
        self.h5py, self.path, self.size = h5py, path, size
        self.seen: set[int] = set()
        self.tensors: dict[str, Lazy] = {}
        self.problems: list[str] = []
        self.regions: list[tuple[int, int, str]] = []  # of arrays that are in the file as they are
        self.unpacked = 0  # bytes of the others
        with open(path, "rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def group(self, group: Any, prefix: str, depth: int) -> None:
        """Collects the arrays of a group and of those inside it."""
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{self.path} nests groups deeper than {_MAX_DEPTH}.")
        for name in group:
            where = f"{prefix}{name}"
            if len(where) > _MAX_PATH:
                raise CheckpointError(f"{self.path} has a name of {len(where)} characters.")
            if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
                self.problems.append(f"{where} is a link to elsewhere")
                continue
            item = group[name]
            address = self.h5py.h5o.get_info(item.id).addr
            if address in self.seen:
                self.problems.append(f"{where} is a second name of another object")
                continue
            self.seen.add(address)
            if len(self.seen) > _MAX_OBJECTS:
                raise CheckpointError(f"{self.path} has more than {_MAX_OBJECTS} objects.")
            if isinstance(item, self.h5py.Group):
                self.group(item, f"{where}/", depth + 1)
            elif (problem := self.dataset(item, where)) is not None:
                self.problems.append(f"{where} {problem}")

    def dataset(self, item: Any, where: str) -> str | None:
        """Adds an array, or says what is wrong with it."""
        if not isinstance(item, self.h5py.Dataset):
            return "is neither a group nor an array"
        stored, shape = item.dtype, item.shape
        if shape is None:
            return "has no shape"
        if stored != _OPAQUE and stored.name not in _DTYPES:
            return f"has values of type {stored}"
        plist, h5d = item.id.get_create_plist(), self.h5py.h5d
        layout, bytes_ = plist.get_layout(), math.prod(shape) * stored.itemsize
        if layout == h5d.VIRTUAL or plist.get_external_count():
            return "lies in another file"
        offset = item.id.get_offset()
        as_is = stored == _OPAQUE or item.id.get_type() == self.h5py.h5t.py_create(stored)
        if layout == h5d.CONTIGUOUS and bytes_:
            if offset is None or offset + bytes_ > self.size:
                return f"claims {bytes_} bytes, which the file does not have"
            self.regions.append((offset, offset + bytes_, where))
            if as_is:
                self.tensors[where] = mapped(self.content, BFLOAT16 if stored == _OPAQUE else stored, shape, offset)
                return None
        if layout == h5d.CHUNKED:
            filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
            if unknown := [number for number in filters if number not in _FILTERS]:
                return f"is compressed by the unknown filters {unknown}"
            bytes_ = max(bytes_, math.prod(plist.get_chunk()) * stored.itemsize)
        self.unpacked += bytes_
        dtype = BFLOAT16 if stored == _OPAQUE else stored.newbyteorder("=")
        self.tensors[where] = Lazy(shape, dtype, partial(_read, self.path, where, dtype))
        return None

    def find_overlaps(self) -> None:
        """Reports arrays that share bytes, as they do when the place of one is damaged: HDF5 has no checksum of it."""
        self.regions.sort()
        for (_, end, before), (start, _, where) in zip(self.regions, self.regions[1:], strict=False):
            if start < end:
                self.problems.append(f"{where} lies inside {before}")


def _read(path: Path, where: str, dtype: np.dtype) -> np.ndarray:
    try:
        with _h5py().File(path, "r", locking=False) as file:
            array = np.asarray(file[where][()])
    except Exception as error:
        raise CheckpointError(f"{path} is damaged at {where}: {type(error).__name__}: {error}") from error
    return array.view(dtype) if array.dtype == _OPAQUE else array.astype(dtype, copy=False)


def write_h5(path: Path, arrays: Mapping[str, Lazy], attributes: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Writes arrays, one at a time and not compressed, and the attributes of groups.

    Args:
        path: The file.
        arrays: Path inside the file to array. bfloat16 is stored as two opaque bytes with the attribute ``dtype``, as
            Keras does, since HDF5 has no such type.
        attributes: Group to name to value; "" is the file. Groups that do not exist are made.

    Raises:
        MissingBackendError: h5py is not installed.
        OSError: The file cannot be written.
    """
    h5py = _h5py()
    with open(path, "w+b", buffering=0) as disk:
        kept = KeptErrors(disk)
        with h5py.File(kept, "w") as file:
            for where in arrays:
                if kept.error is not None:
                    break
                array = np.require(arrays[where].make(), requirements="C")
                bfloat16 = array.dtype == BFLOAT16
                dataset = file.create_dataset(where, data=array.view(_OPAQUE) if bfloat16 else array)
                if bfloat16:
                    dataset.attrs["dtype"] = "bfloat16"
                arrays[where].release()
            for where, values in (attributes or {}).items():
                group = file.require_group(where) if where else file
                for name, value in values.items():
                    group.attrs[name] = value
    kept.raise_first()
