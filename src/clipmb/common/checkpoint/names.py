"""Names of transformers 4's TensorFlow and Flax models to canonical ones and back, by `clipmb.common.parameters`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from clipmb.common.checkpoint.tensors import Deferred, Lazy, lazy
from clipmb.common.errors import CheckpointError
from clipmb.common.parameters import KINDS, Spec, find

_TF_TOKENS = "token_embedding/weight:0"  # the one name in which transformers 4's TensorFlow models leave Keras' own


def dialect_of(names: Iterable[str]) -> str:
    """Returns whose names these are: "pt", "tf" or "flax". Unknown names are PyTorch's, whose reader reports them."""
    names = list(names)
    of = {framework: {name for name in names if _find(name, framework)} for framework in ("pt", "tf", "flax")}
    shared = of["pt"] & of["flax"]  # logit_scale and the biases, for example: they decide nothing
    return next((framework for framework, known in of.items() if known - shared), "pt")


def _find(name: str, framework: str) -> tuple[str, str] | None:
    if framework == "pt":
        return find(name.removeprefix("clip.").split("."), framework)
    if framework == "flax":
        path = re.split(r"[./]", name)
        return find(path[1:] if path[0] == "params" else path, framework)
    # [instance/]clip/text_model/encoder/layers_._0/…/kernel:0; in h5 files the group's name comes before the instance's
    if not name.endswith(":0"):
        return None
    if name.endswith(f"/{_TF_TOKENS}"):
        name = name.removesuffix("weight:0") + "embeddings:0"
    path = name.removesuffix(":0").replace("/layers_._", "/layers/").split("/")
    if "clip" in path:
        path = path[len(path) - path[::-1].index("clip") :]
    return find(path, framework)


def names_in(framework: str, table: Iterable[Spec]) -> dict[str, str]:
    """Maps canonical names to those of a framework's models.

    Args:
        framework: "pt", "tf" or "flax".
        table: `specs` of a head.
    """
    if framework == "pt":
        return {spec.name: spec.name for spec in table}
    return {spec.name: tf_name(spec) if framework == "tf" else "/".join(spec.path("flax")) for spec in table}


def tf_name(spec: Spec) -> str:
    """Returns a parameter's name in transformers 4's TensorFlow models, below that of the model: ``clip/…:0``."""
    name = "/".join(("clip", *spec.path("tf"))).replace("/layers/", "/layers_._") + ":0"
    return name.removesuffix("embeddings:0") + "weight:0" if "/token_embedding/" in name else name


def canonical(tensors: Mapping[str, Lazy], framework: str, origin: object) -> Deferred:
    """Gives tensors with a framework's names and layouts canonical ones; unknown names stay as they are.

    Args:
        tensors: Name in the file to array.
        framework: "pt", "tf" or "flax".
        origin: The file, for messages.

    Raises:
        CheckpointError: Two tensors stand for the same parameter.
    """
    if framework == "pt":
        return Deferred(tensors)
    found: dict[str, str] = {}
    made: dict[str, Lazy] = {}
    twice = []
    for name, tensor in tensors.items():
        known = _find(name, framework)
        new = known[0] if known else name
        if new in found:
            twice.append(f"{new}: {found[new]} and {name}")
        found[new] = name
        made[new] = in_canonical(tensor, known[1]) if known else tensor
    if twice:
        raise CheckpointError(f"{origin} has two tensors for one parameter:", twice)
    return Deferred(made)


def in_canonical(tensor: Lazy, kind: str) -> Lazy:
    """Returns an array of Keras or linen in the canonical layout of its kind.

    One with another number of axes stays as it is, and does not fit the model by its shape.
    """
    row = KINDS[kind]
    return tensor.viewed(row.to_canonical) if len(row.axes) == len(tensor.shape) else tensor


def in_framework(arrays: Mapping[str, np.ndarray], table: Iterable[Spec]) -> dict[str, Lazy]:
    """Returns canonical arrays in the layouts of Keras and linen, in the order of the table.

    Args:
        arrays: Canonical name to array.
        table: `specs` of a head.
    """
    tensors = lazy(arrays)
    return {spec.name: tensors[spec.name].viewed(KINDS[spec.kind].to_framework) for spec in table}
