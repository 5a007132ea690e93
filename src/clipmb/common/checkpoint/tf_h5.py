"""``tf_model.h5``, single or in shards, as the TensorFlow models of transformers 4 wrote and read it.

A single file is what Keras 2's ``save_weights`` makes of a model with one layer called "clip": the group of the layer,
in it a path that begins with the name of the model's instance, attributes that list both in the order of the model's
weights. Shards are flat, without the instance. Heads that had no TensorFlow class are written by the same rule.

float64, float32 and float16 are stored as they are, bfloat16 as float32: HDF5 has no bfloat16, transformers' TensorFlow
models are float32 anyway, and widening is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipmb.common.checkpoint.h5 import read_h5, write_h5
from clipmb.common.checkpoint.names import canonical, dialect_of, in_framework, names_in, tf_name
from clipmb.common.checkpoint.sharding import write_shards
from clipmb.common.checkpoint.sniffing import read_files
from clipmb.common.checkpoint.tensors import Lazy, Loaded
from clipmb.common.checkpoint.wrapping import explain_stripping, unwrapped_paths
from clipmb.common.config import BaseConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, specs
from clipmb.common.saving import Transaction

patterns = ("tf_model.h5", "tf_model-*.h5", "tf_model.h5.index.json")
whole_only, streams, packages = False, True, ("h5py",)
_FILE = "tf_model.h5"
_INDEX = "tf_model.h5.index.json"
_KERAS = b"2.15.0"  # the last Keras 2
_ATTRIBUTE_BYTES = 64512  # Keras' limit, a little below that of HDF5
# Where the order of transformers 4's weights, by which Keras 2's own load_weights goes, is not that of `specs`.
_RANKS = (
    "class_embedding", "token_embedding", "position_embedding", "patch_embedding",
    "q_proj", "k_proj", "v_proj", "out_proj",
)  # fmt: skip


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Maps the weights of a source; None when it has none in this format, which has no variants.

    Raises:
        CheckpointError: A file is damaged or hostile, or a shard is missing.
        MissingBackendError: h5py is not installed.
    """
    found = None if variant else read_files(source, "h5", _FILE, _INDEX, read_h5)
    if found is None or (source.file is not None and dialect_of(found[0]) != "tf"):
        return None
    tensors, wrapper = unwrapped_paths(found[0])
    decisions = explain_stripping((), wrapper)
    return Loaded("tf-h5", canonical(tensors, "tf", source), found[1], decisions=decisions, packages=packages)


def names(table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to those in the files, below the name of the model's instance."""
    return names_in("tf", table)


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes canonical arrays; returns the names of the files, the index among them.

    Raises:
        MissingBackendError: h5py is not installed.
    """
    instance = re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", f"TF{head}").lower()  # tfclip_model, tfclip_text_model, …
    table = _in_order(specs(config, head))
    inside = in_framework(arrays, table)
    tensors = {tf_name(spec): _stored(inside[spec.name]) for spec in table}

    def write_file(path: Path, part: dict[str, Lazy]) -> None:
        if len(part) < len(tensors):
            write_h5(path, part, {"": _list("layer_names", sorted(part))})
            return
        weights = [f"{instance}/{name}" for name in part]
        whole = {f"clip/{instance}/{name}": tensor for name, tensor in part.items()}
        attributes = {
            "": {"backend": b"tensorflow", "keras_version": _KERAS, **_list("layer_names", ["clip"])},
            "clip": _list("weight_names", weights),
            "top_level_model_weights": {"weight_names": np.zeros(0)},
        }
        write_h5(path, whole, attributes)

    return write_shards(
        save,
        tensors,
        write_file,
        single=_FILE,
        index=_INDEX,
        max_shard_size=max_shard_size,
        prefix=f"{instance}/",
    )


def _stored(tensor: Lazy) -> Lazy:
    if tensor.dtype.name not in ("float64", "float32", "float16"):
        tensor = tensor.astype(np.dtype(np.float32))
    return tensor if tensor.shape else tensor.viewed(lambda array: array.reshape(1))  # logit_scale


def _in_order(table: list[Spec]) -> list[Spec]:
    first: dict[str, int] = {}

    def key(item: tuple[int, Spec]) -> tuple[int, int]:
        position, spec = item
        parent, _, module = spec.stem.rpartition(".")
        together = module in _RANKS
        place = first.setdefault(parent, position) if together else position
        return place, _RANKS.index(module) if together else 0

    return [spec for _, spec in sorted(enumerate(table), key=key)]


def _list(name: str, values: list[str]) -> dict[str, np.ndarray]:
    """Returns a list as Keras stores one: as an attribute, or as several when it is too long for one."""
    encoded = np.array([value.encode() for value in values])
    parts = -(-encoded.nbytes // _ATTRIBUTE_BYTES)
    while any(part.nbytes > _ATTRIBUTE_BYTES for part in np.array_split(encoded, parts)):
        parts += 1
    if parts == 1:
        return {name: encoded}
    return {f"{name}{i}": part for i, part in enumerate(np.array_split(encoded, parts))}
