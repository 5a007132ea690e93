"""safetensors files, single or sharded with an index. Reading maps the file; writing takes one tensor at a time."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import safetensors

from clipmb.common.checkpoint.names import canonical, dialect_of, names_in
from clipmb.common.checkpoint.openai import is_openai
from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.checkpoint.single_towers import encoders_in
from clipmb.common.checkpoint.sniffing import read_files
from clipmb.common.checkpoint.tensors import Deferred, Lazy, Loaded, lazy, mapped
from clipmb.common.checkpoint.wrapping import explain_stripping
from clipmb.common.config import BaseConfig
from clipmb.common.dtypes import numpy_dtype
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec
from clipmb.common.saving import Transaction

patterns = (
    "model.safetensors", "model.*.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", "model.safetensors.index.*.json",
)  # fmt: skip
whole_only, streams, packages = False, True, ()
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_MAX_TENSORS = 50_000  # a diffusion model with its text encoders has some 3,000
_DTYPES = {code: numpy_dtype(name) for code, name in _CODES.items()}
_CODE_OF = {dtype: code for code, dtype in _DTYPES.items()}


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Maps the safetensors weights of a source; None when it has none, or those of open_clip.

    The files that transformers 4's TensorFlow and Flax models wrote are recognised by their names and given canonical
    ones.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the index names a path outside the folder.
    """
    found = find(source, variant)
    if found is None or is_openai(found[0]):
        return None  # open_clip's, which needs its config
    tensors, files = found
    if (encoder := encoders_in(tensors, Loaded("safetensors", {}, files, packages=("safetensors",)))) is not None:
        return encoder
    dialect = dialect_of(tensors)
    loaded = Loaded("safetensors", canonical(tensors, dialect, source), files, packages=("safetensors",))
    loaded.decisions = explain_stripping(tensors)
    if dialect != "pt":
        loaded.decisions["dialect"] = f"{dialect}, from the tensors' names"
        loaded.names = partial(names_in, dialect)
    return loaded


def find(source: Source, variant: str | None = None) -> tuple[Mapping[str, Lazy], list[str]] | None:
    """Maps the files of a source whatever they hold: name to array, and the names of the files.

    Raises:
        CheckpointError: A file is damaged, a shard is missing, or the index names a path outside the folder.
    """
    dot = f".{variant}" if variant else ""
    index = f"model.safetensors.index{dot}.json"
    return read_files(source, "safetensors", f"model{dot}.safetensors", index, lambda path: map_file(path).lazy)


def names(table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to those in the files, which are the same."""
    return names_in("pt", table)


def map_file(path: Path) -> Deferred:
    """Maps one safetensors file: name to array. The library checks the header: sizes, overlaps, holes, bounds.

    The arrays are private mappings: writing to one copies the page and leaves the file alone.

    Raises:
        CheckpointError: The file is damaged or has a dtype that no CLIP has.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            if len(file.keys()) > _MAX_TENSORS:
                raise CheckpointError(f"{path} has {len(file.keys())} tensors, and no CLIP has {_MAX_TENSORS}.")
            names = file.offset_keys()  # in the order of their bytes, which the library requires to have no holes
            slices = [file.get_slice(name) for name in names]
            layout = [(part.get_dtype(), tuple(part.get_shape())) for part in slices]
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if unknown := [
        f"{name} is {dtype}" for name, (dtype, _) in zip(names, layout, strict=True) if dtype not in _DTYPES
    ]:
        raise CheckpointError(f"{path} has tensors of unsupported dtypes (supported: {', '.join(_DTYPES)}):", unknown)
    if not names:
        return Deferred({})
    with open(path, "rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    arrays, offset = {}, 8 + header
    for name, (code, shape) in zip(names, layout, strict=True):
        arrays[name] = mapped(content, _DTYPES[code], shape, offset)
        offset += arrays[name].nbytes
    return Deferred(arrays)


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes canonical arrays; returns the names of the files, the index among them."""
    return write_safetensors(save, arrays, max_shard_size=max_shard_size)


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
        arrays: Canonical name to array. Those of a `Deferred` are made once each, when it is their turn.
        max_shard_size: Bytes, or text like "5GB" or "200MiB".
        variant: As in ``model.fp16.safetensors``.

    Returns:
        The names of the files, the index among them.
    """
    dot = f".{variant}" if variant else ""
    return write_shards(
        save,
        lazy(arrays),
        write_file,
        single=f"model{dot}.safetensors",
        index=f"model.safetensors.index{dot}.json",
        max_shard_size=max_shard_size,
    )


def write_file(path: Path, arrays: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, one array at a time: the header comes first and needs names, dtypes and shapes only.

    The safetensors library's own ``save_file`` wants all arrays at once.

    Args:
        path: The file.
        arrays: Name to array.
        metadata: Text by name; what transformers looks for when None.
    """
    # The widest dtype first, so that every array is aligned, then by name: the order of the safetensors library.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name in order:
        array = arrays[name]
        end = offset + array.nbytes
        header[name] = {"dtype": _CODE_OF[array.dtype], "shape": array.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name].make()).reshape(-1).view(np.uint8).data)
            arrays[name].release()
