"""safetensors files, single or sharded with an index. Reading maps the file: no byte is copied."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from clipmb.common.config import read_json
from clipmb.common.errors import CheckpointError, bad_input
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
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_safetensors(source: Source, variant: str | None = None) -> dict[str, np.ndarray] | None:
    """Maps the safetensors weights of a source; returns None when it has none.

    Args:
        source: Where they are.
        variant: As in ``model.fp16.safetensors``.

    Returns:
        Name in the file to array. The arrays are private mappings: writing to one copies the page and leaves the file.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the index names a path outside the folder.
    """
    name = f"model.{variant}.safetensors" if variant else "model.safetensors"
    index = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
    if (path := source.find(name)) is not None:
        return map_file(path)
    if (path := source.find(index)) is not None:
        return _map_shards(source, path)
    return None


def _map_shards(source: Source, index: Path) -> dict[str, np.ndarray]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} must have a weight_map from tensor names to file names.")
    files = sorted(set(weight_map.values()))
    escaping = [repr(file) for file in files if not _stays_inside(file)]
    if escaping:
        raise CheckpointError(f"{index} names files outside its folder; it is not read:", escaping)
    paths = {file: source.find(file) for file in files}
    if missing := [file for file, path in paths.items() if path is None]:
        raise CheckpointError(f"{source} lacks shards that {index.name} names:", missing)
    shards = {file: map_file(path) for file, path in paths.items() if path is not None}
    if absent := [f"{name} in {file}" for name, file in weight_map.items() if name not in shards[file]]:
        raise CheckpointError(f"{source} lacks tensors that {index.name} names:", absent)
    return {name: shards[file][name] for name, file in weight_map.items()}


def _stays_inside(file: str) -> bool:
    if not file or "\0" in file:
        return False
    paths = (PurePosixPath(file), PureWindowsPath(file))
    return not any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


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
        The names of the files.
    """
    limit = parse_size(max_shard_size)
    shards: list[dict[str, np.ndarray]] = [{}]
    room = limit
    for name, array in arrays.items():
        if array.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = array
        room -= array.nbytes
    dot = f".{variant}" if variant else ""
    single, index = f"model{dot}.safetensors", f"model.safetensors.index{dot}.json"
    if len(shards) == 1:
        files = [single]
    else:
        files = [f"model{dot}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        content = {
            "metadata": {
                "total_size": sum(array.nbytes for array in arrays.values()),
                "total_parameters": sum(array.size for array in arrays.values()),
            },
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        save.write(index, to_json(content))
    for file, shard in zip(files, shards, strict=True):
        contiguous = {name: np.require(array, requirements="C") for name, array in shard.items()}
        save_file(contiguous, save.path(file), metadata={"format": "pt"})
    old = re.compile(rf"model{re.escape(dot)}-\d{{5}}-of-\d{{5}}\.safetensors")
    save.remove(single, index, *(path.name for path in save.folder.iterdir() if old.fullmatch(path.name)))
    return files


def to_json(content: dict) -> str:
    """Returns the text of a JSON file: indented by 2, sorted, with a newline at its end."""
    import json

    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def parse_size(size: int | str) -> int:
    """Reads a size in bytes from a number or from text such as "5GB" (10^9) or "5GiB" (2^30).

    Raises:
        ValueError: It is not a positive size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if match is not None and match[2].upper() in _UNITS and float(match[1]) > 0:
        return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
    raise bad_input("A size must be a positive number of bytes, or text like '5GB'", size, "Pass one of them")


def file_sizes(source: Source, names: list[str]) -> dict[str, int]:
    """Returns the bytes of each of the files that exist."""
    found = {name: source.find(name) for name in names}
    return {name: os.path.getsize(path) for name, path in found.items() if path is not None}
