"""A checkpoint format that clipmb does not have, as somebody would add one: one numpy archive."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from clipmb.common.checkpoint.tensors import Loaded
from clipmb.common.config import BaseConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec
from clipmb.common.saving import Transaction

patterns = ("toy.npz",)
whole_only, streams, packages = False, False, ()


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Reads ``toy.npz``."""
    path = None if variant else source.find("toy.npz")
    if path is None:
        return None
    with np.load(path) as file:
        tensors = {name.removeprefix("toy "): file[name] for name in file.files}
    return Loaded("toy", tensors, [path.name])


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes ``toy.npz``."""
    np.savez(save.path("toy.npz"), allow_pickle=False, **{f"toy {name}": array for name, array in arrays.items()})
    return ["toy.npz"]


def names(table: list[Spec]) -> dict[str, str]:
    """Puts a word before every name."""
    return {spec.name: f"toy {spec.name}" for spec in table}
