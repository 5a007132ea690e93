"""``model.weights.h5``: what ``save_weights`` of our TensorFlow models writes and ``load_weights`` reads.

Keras 3 stores weights by attributes, not by names: the weights of a layer are ``vars/0``, ``vars/1`` … of the layer's
group, in the order of their creation; the layers of a model and of a list are called by their classes, with ``_1``,
``_2`` … for further ones of a class. So ``text_model.encoder.layers.2.mlp.fc1.weight`` is at
``layers/tfclip_text_transformer/encoder/layers/tfclip_encoder_layer_2/mlp/fc1/vars/0``, and ``text_projection.weight``
at ``layers/linear_1/vars/0`` beside a ``visual_projection``, else at ``layers/linear/vars/0``. Only ``classifier`` goes
by its own name: it comes before "layers" in the alphabet, in whose order Keras walks over attributes. Found by
experiment with Keras 3.15. The states of an optimizer in such a file are ignored.

Every dtype is stored as it is, bfloat16 as Keras does. Shards (``.weights.json``) are neither read nor written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from clipmb.common.checkpoint.h5 import read_h5, write_h5
from clipmb.common.checkpoint.names import in_canonical, in_framework
from clipmb.common.checkpoint.sniffing import kind_of
from clipmb.common.checkpoint.tensors import Deferred, Loaded
from clipmb.common.config import BaseConfig
from clipmb.common.hub import Source
from clipmb.common.parameters import Spec, at_block, known_specs, specs
from clipmb.common.saving import Transaction

patterns = ("model.weights.h5",)
whole_only, streams, packages = False, True, ("h5py",)
_FILE = "model.weights.h5"
_TOWERS = {"text_model": "tfclip_text_transformer", "vision_model": "tfclip_vision_transformer"}
_PROJECTIONS = {"visual_projection": "vision_model", "text_projection": "text_model"}  # in the order of creation
_BLOCK = "tfclip_encoder_layer"
_STATES = re.compile(r"optimizer/|.*/seed_generator/")


def read(source: Source, variant: str | None = None) -> Loaded | None:
    """Maps the weights of a source; None when it has none in this format, which has no variants.

    Raises:
        CheckpointError: The file is damaged or hostile.
        MissingBackendError: h5py is not installed.
    """
    path = None if variant else source.find(_FILE) if source.file is None else source.file
    if path is None or (source.file is not None and kind_of(path) != "h5"):
        return None
    tensors = read_h5(path)
    towers = {
        tower for tower, group in _TOWERS.items() if any(where.startswith(f"layers/{group}/") for where in tensors)
    }
    if source.file is not None and not towers:
        return None
    projections = [name for name, tower in _PROJECTIONS.items() if tower in towers]
    known = {_place(spec, projections): spec for spec in known_specs()}
    found = {}
    for where, tensor in tensors.items():
        if _STATES.match(where):
            continue
        block = re.search(rf"/{_BLOCK}(?:_([1-9][0-9]{{0,8}}))?/", where)
        spec = known.get(where if block is None else where.replace(block[0], f"/{_BLOCK}/", 1))
        if spec is None:
            found[where] = tensor
        else:
            canonical = at_block(spec.name, int(block[1] or 0)) if block else spec.name
            found[canonical] = in_canonical(tensor, spec.kind)
    return Loaded("keras-weights", Deferred(found), [path.name], packages=packages)


def names(table: list[Spec]) -> dict[str, str]:
    """Maps canonical names to the paths inside the file."""
    projections = [name for name in _PROJECTIONS if any(spec.stem == name for spec in table)]
    return {spec.name: _place(spec, projections) for spec in table}


def write(
    save: Transaction,
    arrays: Mapping[str, np.ndarray],
    config: BaseConfig,
    head: str,
    *,
    max_shard_size: int | str = "5GB",
) -> list[str]:
    """Writes canonical arrays as one file, whatever its size; returns its name.

    Raises:
        MissingBackendError: h5py is not installed.
    """
    table = specs(config, head)
    places = names(table)
    write_h5(save.path(_FILE), {places[name]: tensor for name, tensor in in_framework(arrays, table).items()})
    return [_FILE]


def _place(spec: Spec, projections: list[str]) -> str:
    """Returns the path of a parameter inside the file, in a model that has these projections."""
    top, *inside = spec.path("tf")[:-1] or ("",)
    if top in _TOWERS:
        path = ["layers", _TOWERS[top], *inside]
    elif top in projections:
        path = ["layers", _numbered("linear", projections.index(top))]
    else:
        path = [top] if top else []
    path = [_numbered(_BLOCK, int(part)) if part.isdecimal() else part for part in path]
    return "/".join([*path, "vars", "1" if spec.kind in ("bias", "norm shift") else "0"])


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
