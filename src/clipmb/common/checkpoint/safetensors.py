"""safetensors files, single or sharded with an index. Reading maps the file: no byte is copied."""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from clipmb.common.checkpoint.formats import Loaded
from clipmb.common.checkpoint.names import canonical, dialect_of
from clipmb.common.checkpoint.openai import is_openai
from clipmb.common.checkpoint.sharding import parse_size as parse_size
from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.checkpoint.sniffing import read_files
from clipmb.common.config import BaseConfig
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.saving import Transaction

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Maps the safetensors weights of a source; None when it has none, or those of open_clip.

    The files that the former TensorFlow and Flax models wrote are recognised by their names and given canonical ones.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the index names a path outside the folder.
    """
    dot = f".{variant}" if variant else ""
    index = f"model.safetensors.index{dot}.json"
    if (found := read_files(source, "safetensors", f"model{dot}.safetensors", index, map_file)) is None:
        return None
    tensors, files = found
    if is_openai(tensors):
        return None  # open_clip's, which needs its config
    dialect = dialect_of(tensors)
    decisions = {} if dialect == "pt" else {"dialect": f"{dialect}, from the tensors' names"}
    return Loaded("safetensors", canonical(tensors, dialect, source), files, decisions=decisions)


def read_safetensors(source: Source, variant: str | None = None) -> dict[str, np.ndarray] | None:
    """Maps the safetensors weights of a source; returns None when it has none.

    Args:
        source: Where they are.
        variant: As in ``model.fp16.safetensors``.

    Returns:
        Canonical name to array. The arrays are private mappings: writing to one copies the page and leaves the file.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the index names a path outside the folder.
    """
    loaded = read(source, variant)
    return None if loaded is None else dict(loaded.tensors)


def map_file(path: Path) -> dict[str, np.ndarray]:
    """Maps one safetensors file. The library checks the header: sizes, overlaps, holes, bounds.

    Raises:
        CheckpointError: The file is damaged or has a dtype that no CLIP has.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            names = file.offset_keys()  # in the order of their bytes, which the library requires to have no holes
            slices = [file.get_slice(name) for name in names]
            layout = [(part.get_dtype(), tuple(part.get_shape())) for part in slices]
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if unknown := [
        f"{name} is {dtype}" for name, (dtype, _) in zip(names, layout, strict=True) if dtype not in _DTYPES
    ]:
        raise CheckpointError(f"{path} has tensors of unsupported dtypes (supported: {', '.join(_DTYPES)}):", unknown)
    if not names:
        return {}
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    arrays, offset = {}, 8 + header
    for name, (dtype, shape) in zip(names, layout, strict=True):
        count = math.prod(shape)
        array = np.frombuffer(content, _DTYPES[dtype], count, offset) if count else np.empty(0, _DTYPES[dtype])
        offset += array.nbytes
        array = array.reshape(shape)
        arrays[name] = array if array.flags.aligned else array.copy()
    return arrays


class OwnArrays(dict[str, np.ndarray]):
    """Arrays of mapped files to which nobody else has a reference, so that their memory can be given back early."""

    def release(self, name: str) -> None:
        """Takes the pages of an array out of memory; they are read from the file again when they are needed.

        Without this, a framework that copies would hold the weights twice at the end of loading.
        """
        base = array = self[name]
        while isinstance(base, np.ndarray | memoryview):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        if not isinstance(base, mmap.mmap) or not hasattr(base, "madvise") or not array.flags.c_contiguous:
            return
        start = array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
        if (length := (start + array.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE) > 0:
            base.madvise(mmap.MADV_DONTNEED, first, length)


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes canonical arrays; returns the names of the files, the index among them."""
    files = write_safetensors(save, arrays, max_shard_size=max_shard_size)
    return files if len(files) == 1 else [*files, "model.safetensors.index.json"]


def write_safetensors(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> list[str]:
    """Writes canonical arrays as one file, or as shards with an index when they are larger than ``max_shard_size``.

    Args:
        save: The transaction of the folder; files of an earlier save are removed with it.
        arrays: Canonical name to array.
        max_shard_size: Bytes, or text such as "5GB" or "200MiB".
        variant: As in ``model.fp16.safetensors``.

    Returns:
        The names of the files, without the index.
    """
    dot = f".{variant}" if variant else ""

    def write_file(path: Path, names: list[str]) -> None:
        contiguous = {name: np.require(arrays[name], requirements="C") for name in names}
        save_file(contiguous, path, metadata={"format": "pt"})

    return write_shards(
        save,
        arrays,
        write_file,
        single=f"model{dot}.safetensors",
        index=f"model.safetensors.index{dot}.json",
        max_shard_size=max_shard_size,
    )


def file_sizes(source: Source, names: list[str]) -> dict[str, int]:
    """Returns the bytes of each of the files that exist."""
    found = {name: source.find(name) for name in names}
    return {name: os.path.getsize(path) for name, path in found.items() if path is not None}
