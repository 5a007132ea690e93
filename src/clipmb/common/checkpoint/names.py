"""Names of transformers 4's TensorFlow and Flax models to canonical ones and back, by `clipmb.common.parameters`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from clipmb.common.checkpoint.tensors import Deferred, Lazy, lazy
from clipmb.common.checkpoint.wrapping import stripped
from clipmb.common.errors import CheckpointError
from clipmb.common.parameters import KINDS, Spec, find

_TF_TOKENS = "token_embedding/weight:0"  # the one name in which transformers 4's TensorFlow models leave Keras' own


@dataclass(frozen=True)
class Dialect:
    """How the files of one framework's models call their tensors.

    Attributes:
        name: "pt", "tf" or "flax": a column of `KINDS`.
        path_of: Reads the attribute path off a name in a file; None for a name that is none of the framework's.
        name_of: Returns the name of a parameter.
        transposed: The tensors have the layouts of Keras and linen, not the canonical ones.
    """

    name: str
    path_of: Callable[[str], list[str] | None]
    name_of: Callable[[Spec], str]
    transposed: bool = True

    def find(self, name: str) -> tuple[str, str] | None:
        """Finds the parameter with a name in a file: canonical name and kind, or None."""
        path = self.path_of(name)
        return None if path is None else find(path, self.name)


def _pt_path(name: str) -> list[str]:
    return stripped(name).removeprefix("clip.").split(".")


def _flax_path(name: str) -> list[str]:
    path = re.split(r"[./]", name)
    return path[1:] if path[0] == "params" else path


def _tf_path(name: str) -> list[str] | None:
    # [instance/]clip/text_model/encoder/layers_._0/…/kernel:0; in h5 files the group's name comes before the instance's
    if not name.endswith(":0"):
        return None
    if name.endswith(f"/{_TF_TOKENS}"):
        name = name.removesuffix("weight:0") + "embeddings:0"
    path = name.removesuffix(":0").replace("/layers_._", "/layers/").split("/")
    return path[len(path) - path[::-1].index("clip") :] if "clip" in path else path


def tf_name(spec: Spec) -> str:
    """Returns a parameter's name in transformers 4's TensorFlow models, below that of the model: ``clip/…:0``."""
    name = "/".join(("clip", *spec.path("tf"))).replace("/layers/", "/layers_._") + ":0"
    return name.removesuffix("embeddings:0") + "weight:0" if "/token_embedding/" in name else name


DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("pt", _pt_path, lambda spec: spec.name, transposed=False),
        Dialect("tf", _tf_path, tf_name),
        Dialect("flax", _flax_path, lambda spec: "/".join(spec.path("flax"))),
    )
}


def dialect_of(names: Iterable[str]) -> str:
    """Returns whose names these are: a key of `DIALECTS`. Unknown names are PyTorch's, whose reader reports them."""
    names = list(names)
    of = {key: {name for name in names if dialect.find(name)} for key, dialect in DIALECTS.items()}
    shared = of["pt"] & of["flax"]  # logit_scale and the biases, for example: they decide nothing
    return next((key for key, known in of.items() if known - shared), "pt")


def names_in(dialect: str, table: Iterable[Spec]) -> dict[str, str]:
    """Maps canonical names to those of a framework's models.

    Args:
        dialect: Key of `DIALECTS`.
        table: `specs` of a head.
    """
    return {spec.name: DIALECTS[dialect].name_of(spec) for spec in table}


def canonical(tensors: Mapping[str, Lazy], dialect: str, origin: object) -> Deferred:
    """Gives tensors with a framework's names and layouts canonical ones; unknown names stay as they are.

    Args:
        tensors: Name in the file to array.
        dialect: Key of `DIALECTS`.
        origin: The file, for messages.

    Raises:
        CheckpointError: Two tensors stand for the same parameter.
    """
    if not DIALECTS[dialect].transposed:
        return Deferred(tensors)
    found: dict[str, str] = {}
    made: dict[str, Lazy] = {}
    twice = []
    for name, tensor in tensors.items():
        known = DIALECTS[dialect].find(name)
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
