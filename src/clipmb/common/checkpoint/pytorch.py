"""PyTorch's pickled files with canonical names: ``pytorch_model.bin``, single or sharded with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipmb.common.checkpoint.names import names_in
from clipmb.common.checkpoint.openai import is_openai
from clipmb.common.checkpoint.pickled import Pickled, inspect, write_pickle
from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.checkpoint.single_towers import encoders_in
from clipmb.common.checkpoint.sniffing import read_files
from clipmb.common.checkpoint.tensors import Loaded, lazy
from clipmb.common.checkpoint.wrapping import explain_stripping
from clipmb.common.config import BaseConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec
from clipmb.common.saving import Transaction

patterns = (
    "pytorch_model.bin", "pytorch_model.*.bin", "pytorch_model-*.bin",
    "pytorch_model.bin.index.json", "pytorch_model.bin.index.*.json",
)  # fmt: skip
whole_only, streams, packages = False, False, ("torch",)
_SINGLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Reads ``pytorch_model.bin``, its shards, or a source that is one pickled file of any name.

    Args:
        source: Where they are.
        variant: As in ``pytorch_model.fp16.bin``.

    Returns:
        The weights, mapped where the file is a zip archive; None when there are none, or with OpenAI's names.

    Raises:
        CheckpointError: A file is damaged or hostile, a shard is missing, or the index names a path outside the folder.
        MissingBackendError: PyTorch is not installed.
    """
    found = find(source, variant)
    return None if found is None or is_openai(found.tensors) else encoders_in(lazy(found.tensors), found) or found


def find(source: Source, variant: str | None = None) -> Loaded | None:
    """Reads as `read` does, whatever the names are."""
    single = f"pytorch_model.{variant}.bin" if variant else _SINGLE
    index = f"pytorch_model.bin.index.{variant}.json" if variant else _INDEX
    opened: list[Pickled] = []

    def read_file(path: Path) -> dict[str, np.ndarray]:
        opened.append(inspect(path))
        return opened[-1].arrays()

    found = read_files(source, "pickle", single, index, read_file)
    if found is None:
        return None
    loaded = Loaded("pytorch", *found)
    loaded.packages = () if all(pickled.is_mapped for pickled in opened) else packages
    loaded.decisions = explain_stripping(found[0], opened[0].wrapper if opened else "")
    return loaded


def names(table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to those in the files, which are the same."""
    return names_in("pt", table)


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes ``pytorch_model.bin``, or shards with an index when it would be larger than ``max_shard_size``.

    Args:
        save: The transaction of the folder; files of an earlier save are removed with it.
        arrays: Canonical name to array.
        config: Not needed.
        head: Not needed.
        max_shard_size: Bytes, or text like "5GB" or "200MiB".

    Returns:
        The names of the files, the index among them.

    Raises:
        MissingBackendError: PyTorch is not installed.
    """
    return write_shards(save, lazy(arrays), write_pickle, single=_SINGLE, index=_INDEX, max_shard_size=max_shard_size)
