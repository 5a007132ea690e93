"""Writing safetensors one tensor at a time: the header is written first, from names, dtypes and shapes alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.saving import Transaction

_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_INDEX = "model.safetensors.index.json"


def stand_in(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array of this shape and dtype that takes no memory: one zero, seen everywhere."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def write_stream(
    save: Transaction,
    outline: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes floating-point arrays as `write_safetensors` does, asking for each array once, when it is its turn.

    Args:
        save: The transaction of the folder; files of an earlier save are removed with it.
        outline: Name to a `stand_in` of the array.
        arrays: Name to array, made when it is asked for. When it has a method ``release``, that is called with the name
            of each array after it was written.
        max_shard_size: Bytes, or text such as "5GB" or "200MiB".

    Returns:
        The names of the files, the index among them.
    """
    files = write_shards(
        save,
        outline,
        lambda path, names: _write_file(path, {name: outline[name] for name in names}, arrays),
        single="model.safetensors",
        index=_INDEX,
        max_shard_size=max_shard_size,
    )
    return files if len(files) == 1 else [*files, _INDEX]


def _write_file(path: Path, outline: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> None:
    # The widest dtype first, so that every array is aligned, then by name: the order of the safetensors library.
    names = sorted(outline, key=lambda name: (-outline[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + outline[name].nbytes
        header[name] = {
            "dtype": _NAMES[outline[name].dtype],
            "shape": list(outline[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    release = getattr(arrays, "release", None)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            array = np.ascontiguousarray(arrays[name], outline[name].dtype)
            file.write(array.reshape(-1).view(np.uint8).data)
            del array
            if release is not None:
                release(name)
