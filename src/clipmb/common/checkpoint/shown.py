"""The names that a format gives the parameters of a head, for people to read: `clipmb convert --dry-run`."""

from __future__ import annotations

import numpy as np

from clipmb.common.checkpoint import keras_weights, openai
from clipmb.common.checkpoint.names import tf_name
from clipmb.common.parameters import Spec


def names_in(format: str, table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to those in the files of a format.

    Args:
        format: Key of `formats.FORMATS`, or "tf" or "flax" for safetensors of those dialects.
        table: `specs` of the head.
    """
    if format in ("tf-h5", "tf"):
        return {spec.name: tf_name(spec) for spec in table}
    if format in ("flax-msgpack", "flax"):
        return {spec.name: "/".join(spec.path("flax")) for spec in table}
    if format == "keras-weights":
        projections = [name for name in keras_weights._PROJECTIONS if any(spec.stem == name for spec in table)]
        return {spec.name: keras_weights._place(spec, projections) for spec in table}
    if format in ("openai", "open_clip"):
        return _openai_names(table)
    return {spec.name: spec.name for spec in table}


def _openai_names(table: list[Spec]) -> dict[str, str]:
    """Follows numbers through the mapping, since several parameters may end up in one tensor there."""
    numbered = {spec.name: np.full((1,) * len(spec.shape), number) for number, spec in enumerate(table)}
    stored = openai.from_canonical(numbered)
    return {table[number].name: name for name, array in stored.items() for number in array.reshape(-1)}
