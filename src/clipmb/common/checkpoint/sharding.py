"""Checkpoints in several files with an index: the same for every format that has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from clipmb.common.checkpoint.tensors import Lazy
from clipmb.common.errors import CheckpointError, bad_input
from clipmb.common.hub import Source
from clipmb.common.json_files import json_text, read_json
from clipmb.common.saving import Transaction

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_MAX_SHARDS = 2000
T = TypeVar("T")


def read_shards(source: Source, index: Path, open_shard: Callable[[Path], Mapping[str, T]]) -> tuple[dict, list[str]]:
    """Opens every shard that an index lists, and takes from each what the index says it holds.

    Args:
        source: Where the shards are.
        index: The index, with a ``weight_map`` from names to files. transformers 4's TensorFlow models write the
            name of the model before those in the shards, in the index only.
        open_shard: Reads one shard: name to whatever stands for its tensor.

    Returns:
        Name in the shard to tensor, and the names of the files.

    Raises:
        CheckpointError: The index is damaged or lists a path outside the folder; a shard or a tensor is missing.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index} must have a weight_map from tensor names to file names.")
    files = sorted(set(weight_map.values()))
    if len(files) > _MAX_SHARDS:
        raise CheckpointError(f"{index} lists {len(files)} files; no checkpoint has more than {_MAX_SHARDS}.")
    escaping = [repr(file) for file in files if not stays_inside(file)]
    if escaping:
        raise CheckpointError(f"{index} lists files outside of its folder:", escaping)
    paths = {file: source.find(file) for file in files}
    if missing := [file for file, path in paths.items() if path is None]:
        raise CheckpointError(f"{source} is missing shards listed in {index.name}:", missing)
    shards = {file: open_shard(path) for file, path in paths.items() if path is not None}
    found: dict[str, T] = {}
    absent = []
    for name, file in weight_map.items():
        short = name if name in shards[file] else name.partition("/")[2]
        if short not in shards[file]:
            absent.append(f"{name} in {file}")
        elif short in found:
            raise CheckpointError(f"{index} lists a tensor twice:", [name])
        else:
            found[short] = shards[file][short]
    if absent:
        raise CheckpointError(f"{source} is missing tensors listed in {index.name}:", absent)
    return found, files


def stays_inside(file: str) -> bool:
    """Whether a file name of an index stays inside the index's folder, on any system."""
    if not file or "\0" in file:
        return False
    paths = (PurePosixPath(file), PureWindowsPath(file))
    return not any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths)


def write_shards(
    save: Transaction,
    tensors: Mapping[str, Lazy],
    write: Callable[[Path, dict[str, Lazy]], None],
    *,
    single: str,
    index: str,
    max_shard_size: int | str,
    prefix: str = "",
) -> list[str]:
    """Writes arrays as one file, or as shards with an index when they are larger than ``max_shard_size``.

    Args:
        save: The transaction of the folder; files of an earlier save in this format are removed with it.
        tensors: Name in the file to array; none is made to find out how large it is.
        write: Writes some of them into a file.
        single: The name of the only file; shards are named after it.
        index: The name of the index.
        max_shard_size: Bytes, or text like "5GB" or "200MiB".
        prefix: What the index writes before every name.

    Returns:
        The names of the files, the index among them.
    """
    limit = parse_size(max_shard_size)
    shards: list[list[str]] = [[]]
    room, total, count = limit, 0, 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
        total, count = total + tensor.nbytes, count + tensor.size
    stem, dot, suffix = single.rpartition(".")
    if len(shards) == 1:
        files = [single]
    else:
        files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{dot}{suffix}" for i in range(len(shards))]
        content = {
            "metadata": {"total_size": total, "total_parameters": count},
            "weight_map": {
                f"{prefix}{name}": file for file, shard in zip(files, shards, strict=True) for name in shard
            },
        }
        save.write(index, json_text(content))
    for file, shard in zip(files, shards, strict=True):
        write(save.path(file), {name: tensors[name] for name in shard})
    old = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.{suffix}")
    save.remove(single, index, *(path.name for path in save.folder.iterdir() if old.fullmatch(path.name)))
    return files if len(files) == 1 else [*files, index]


def parse_size(size: int | str) -> int:
    """Reads a size in bytes from a number or from text like "5GB" (10^9) or "5GiB" (2^30).

    Raises:
        ValueError: It is not a positive size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if match is not None and match[2].upper() in _UNITS and float(match[1]) > 0:
        return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))
    raise bad_input("A size must be a positive number of bytes, or text like '5GB'", size, "Pass one of them")
