"""Names of the former TensorFlow and Flax models to canonical ones and back, by `clipmb.common.parameters` alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from clipmb.common.errors import CheckpointError
from clipmb.common.parameters import KINDS, Spec, find

Maker = Callable[[], np.ndarray]
_TF_TOKENS = "token_embedding/weight:0"  # the one name in which the former TensorFlow models leave Keras' own


class Deferred(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is asked for and not kept: asking twice makes it twice."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self.makers = makers

    def __getitem__(self, name: str) -> np.ndarray:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    def __contains__(self, name: object) -> bool:
        return name in self.makers  # without making the array


def makers_of(tensors: Mapping[str, np.ndarray]) -> Mapping[str, Maker]:
    """Returns what makes each array of a mapping."""
    return tensors.makers if isinstance(tensors, Deferred) else {n: partial(tensors.__getitem__, n) for n in tensors}


def dialect_of(names: Iterable[str]) -> str:
    """Tells whose names these are: "pt", "tf" or "flax". Unknown names are PyTorch's, whose reader reports them."""
    names = list(names)
    of = {framework: {name for name in names if _find(name, framework)} for framework in ("pt", "tf", "flax")}
    shared = of["pt"] & of["flax"]  # such as logit_scale and the biases: they decide nothing
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


def tf_name(spec: Spec) -> str:
    """Returns the name that the former TensorFlow models give a parameter, below that of the model: ``clip/…:0``."""
    name = "/".join(("clip", *spec.path("tf"))).replace("/layers/", "/layers_._") + ":0"
    return name.removesuffix("embeddings:0") + "weight:0" if "/token_embedding/" in name else name


def canonical(tensors: Mapping[str, np.ndarray], framework: str, origin: object) -> Mapping[str, np.ndarray]:
    """Gives tensors with a framework's names and layouts canonical ones; unknown names stay as they are.

    Args:
        tensors: Name in the file to array. Deferred arrays stay so, others become views.
        framework: "pt", "tf" or "flax".
        origin: The file, for messages.

    Raises:
        CheckpointError: Two tensors stand for the same parameter.
    """
    if framework == "pt":
        return tensors
    found: dict[str, str] = {}
    makers: dict[str, Maker] = {}
    twice = []
    for name, maker in makers_of(tensors).items():
        known = _find(name, framework)
        new = known[0] if known else name
        if new in found:
            twice.append(f"{new}: {found[new]} and {name}")
        found[new] = name
        makers[new] = in_canonical(maker, known[1], name, origin) if known else maker
    if twice:
        raise CheckpointError(f"{origin} has two tensors for one parameter:", twice)
    made = Deferred(makers)
    return made if isinstance(tensors, Deferred) else dict(made)


def in_canonical(maker: Maker, kind: str, name: str, origin: object) -> Maker:
    """Returns what makes an array of Keras or linen in the canonical layout.

    Args:
        maker: Makes the array.
        kind: Key of `KINDS`.
        name: Of the array in the file, for the message of the CheckpointError that a wrong number of axes is.
        origin: The file.
    """

    def make() -> np.ndarray:
        array, row = maker(), KINDS[kind]
        if row.axes and array.ndim != len(row.axes):
            raise CheckpointError(f"{origin} has a tensor that is no {kind}:", [f"{name} is {array.shape}"])
        return row.to_canonical(array)

    return make


def in_framework(arrays: Mapping[str, np.ndarray], spec: Spec) -> Maker:
    """Returns what makes one canonical array in the layout of Keras and linen."""
    return lambda: KINDS[spec.kind].to_framework(arrays[spec.name])
