"""The file formats by name: how each is recognised, read to canonical arrays, and written from them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from clipmb.common.config import BaseConfig
from clipmb.common.errors import CheckpointError, one_of
from clipmb.common.hub import Source

# In the order in which a source is searched: name of the format to its module in this package. A module has
#   read(source, variant) -> Loaded | None    None when the source has no files of the format; content decides
#   write(save, arrays, config, head, *, max_shard_size) -> list[str]   into a Transaction; returns the file names
FORMATS = {
    "safetensors": "safetensors",
    "pytorch": "pytorch",
    "tf-h5": "tf_h5",
    "flax-msgpack": "flax_msgpack",
    "openai": "openai",
    "open_clip": "open_clip",
    "keras-weights": "keras_weights",
}


@dataclass
class Loaded:
    """The weights of a source.

    Attributes:
        format: Key of `FORMATS`.
        tensors: Name to array: canonical names in any of the dialects that `fit` takes. Values may be made when they
            are asked for, so that a file is never in memory whole; asking twice may read twice.
        files: Names of the files that hold them, relative to the source.
        config: The config, where the format carries one of its own or it was inferred from shapes; else None, and
            ``config.json`` is the config.
        decisions: What was inferred, and why, for the record of a conversion.
    """

    format: str
    tensors: Mapping[str, np.ndarray]
    files: list[str]
    config: BaseConfig | None = None
    decisions: dict[str, str] = field(default_factory=dict)


def module_of(name: str) -> ModuleType:
    """Imports the module of a format.

    Raises:
        ValueError: There is no such format.
    """
    if name not in FORMATS:
        raise one_of("format", name, tuple(FORMATS))
    return importlib.import_module(f"clipmb.common.checkpoint.{FORMATS[name]}")


def load(source: Source, variant: str | None = None) -> Loaded:
    """Reads the weights of a source, whichever format they are in.

    Raises:
        CheckpointError: There are none, or they cannot be read.
    """
    for name in FORMATS:
        if (loaded := module_of(name).read(source, variant)) is not None:
            return loaded
    wanted = f" of variant {variant!r}" if variant else ""
    raise CheckpointError(
        f"{source} has no weights{wanted} in any of the formats {', '.join(FORMATS)}.{source.listing()}"
    )
