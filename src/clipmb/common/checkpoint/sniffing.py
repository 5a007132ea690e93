"""What a file of weights is: by its content, and by its suffix where the content is unknown."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from clipmb.common.checkpoint.sharding import read_shards
from clipmb.common.hub import Source

H5 = b"\x89HDF\r\n\x1a\n"
ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number with which files of before PyTorch 1.6 begin
_SUFFIXES = {
    ".safetensors": "safetensors", ".bin": "pickle", ".pt": "pickle", ".pth": "pickle", ".ckpt": "pickle", ".h5": "h5",
    ".msgpack": "msgpack",
}  # fmt: skip
T = TypeVar("T")


def kind_of(path: Path) -> str | None:
    """Returns "safetensors", "pickle" (PyTorch's), "h5", "msgpack", or None for anything else.

    A file with other content is what its suffix says; its reader reports what is wrong with it.
    """
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(H5):
        return "h5"
    if head == LEGACY[:16] or (head.startswith(ZIP) and _holds_pickle(path)):
        return "pickle"
    if _begins_safetensors(head, path.stat().st_size):
        return "safetensors"
    if _begins_map(head):
        return "msgpack"
    return _SUFFIXES.get(path.suffix)


def _holds_pickle(path: Path) -> bool:
    try:
        return any(name.endswith("/data.pkl") for name in zipfile.ZipFile(path).namelist())
    except Exception:  # zipfile raises nearly every type for damaged files
        return False


def _begins_safetensors(head: bytes, size: int) -> bool:
    """Whether there is the length of a header that fits into the file, and the brace that begins its JSON."""
    return len(head) > 8 and struct.unpack("<Q", head[:8])[0] <= size - 8 and head[8:9] == b"{"


def _begins_map(head: bytes) -> bool:
    """Whether there is a msgpack map with members, and a text as the first key."""
    first = head[0] if head else 0
    key = head[{0xDE: 3, 0xDF: 5}.get(first, 1) :][:1]
    is_map = 0x81 <= first <= 0x8F or first in (0xDE, 0xDF)
    return is_map and key != b"" and (0xA0 <= key[0] <= 0xBF or 0xD9 <= key[0] <= 0xDB)


def read_files(
    source: Source, kind: str, single: str, index: str, open_file: Callable[[Path], Mapping[str, T]]
) -> tuple[Mapping[str, T], list[str]] | None:
    """Opens the one file of a source's weights, or all that an index lists.

    Args:
        source: Where they are; one that is a file itself has any name.
        kind: What that file has to be, as `kind_of` returns it.
        single: The name of the one file.
        index: That of the index of several.
        open_file: Reads one: name to whatever stands for its tensor.

    Returns:
        Name to tensor, and the names of the files, the index among them; None when there are no such files.

    Raises:
        CheckpointError: As in `read_shards`.
    """
    if source.file is not None:
        return (open_file(source.file), [source.file.name]) if kind_of(source.file) == kind else None
    if (path := source.find(single)) is not None:
        return open_file(path), [single]
    if (path := source.find(index)) is not None:
        tensors, files = read_shards(source, path, open_file)
        return tensors, [*files, index]
    return None
