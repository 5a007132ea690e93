"""The weight table: the name, kind, shape and initial distribution of every parameter, and its form per framework.

The canonical form of a checkpoint is a dict of numpy arrays with the names and layouts of the PyTorch files. The
modules of all three frameworks carry those names as attributes, so that only the last part of a name and the order of
the axes depend on the framework, and both only on the parameter's kind. `KINDS` is the whole mapping.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from clipmb.common.config import BaseConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import bad_input

TowerT = TypeVar("TowerT", CLIPTextConfig, CLIPVisionConfig)


class Kind(NamedTuple):
    """One row of the table.

    Attributes:
        pt: Last part of the name in PyTorch, which is the canonical one; empty when the whole name has no such part.
        tf: The same in Keras.
        flax: The same in linen.
        axes: The transposition from the canonical layout to that of Keras and linen; empty for none.
    """

    pt: str
    tf: str
    flax: str
    axes: tuple[int, ...] = ()

    def to_framework(self, array: np.ndarray) -> np.ndarray:
        """Returns a view in the layout of Keras and linen."""
        return array.transpose(self.axes) if self.axes else array

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """Returns a view in the canonical layout: the inverse of `to_framework`."""
        return array.transpose(tuple(int(axis) for axis in np.argsort(self.axes))) if self.axes else array


_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
TABLE_VERSION = 1  # raised when a name, a kind or an order of axes changes; recorded by conversions

KINDS = {
    "linear": Kind("weight", "kernel", "kernel", (1, 0)),  # (out, in) -> (in, out)
    "convolution": Kind("weight", "kernel", "kernel", (2, 3, 1, 0)),  # (out, in, height, width) -> (h, w, in, out)
    "embedding": Kind("weight", "embeddings", "embedding"),
    "norm scale": Kind("weight", "gamma", "scale"),
    "norm shift": Kind("bias", "beta", "bias"),
    "bias": Kind("bias", "bias", "bias"),
    "raw": Kind("", "", ""),
}

# What each head has beside its towers: (text tower, vision tower, other parameters).
HEADS = {
    "CLIPModel": (True, True, ("logit_scale", "visual_projection.weight", "text_projection.weight")),
    "CLIPTextModel": (True, False, ()),
    "CLIPTextModelWithProjection": (True, False, ("text_projection.weight",)),
    "CLIPVisionModel": (False, True, ()),
    "CLIPVisionModelWithProjection": (False, True, ("visual_projection.weight",)),
    "CLIPForImageClassification": (False, True, ("classifier.weight", "classifier.bias")),
}


class Spec(NamedTuple):
    """One parameter of a head.

    Attributes:
        name: Canonical name.
        kind: Key of `KINDS`.
        shape: Canonical shape.
        mean: Mean of the initial normal distribution.
        std: Standard deviation of it; 0 for a constant.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    @property
    def stem(self) -> str:
        """The name without its last part: the path of the module that owns the parameter."""
        leaf = KINDS[self.kind].pt
        return self.name.removesuffix(f".{leaf}") if leaf else self.name

    def path(self, framework: str) -> tuple[str, ...]:
        """Returns the attribute path of the parameter in a framework ("pt", "tf" or "flax")."""
        leaf = getattr(KINDS[self.kind], framework)
        return (*self.stem.split("."), *([leaf] if leaf else []))


def specs(config: BaseConfig, head: str) -> list[Spec]:
    """Lists every parameter of a head.

    Args:
        config: The head's config: a `CLIPConfig` for CLIPModel and CLIPForImageClassification, else that of the tower.
        head: A key of `HEADS`.

    Returns:
        One `Spec` for each parameter: canonical name, kind, shape and initial distribution.

    Raises:
        TypeError: The config is of another kind than the head needs.

    Source: the initial distributions of transformers 4.57.6's PyTorch models, which take each tower's
    ``initializer_factor`` from the tower's own config.
    """
    has_text, has_vision, others = HEADS[head]
    whole = config if isinstance(config, CLIPConfig) else None
    text = _tower(config, CLIPTextConfig)
    vision = _tower(config, CLIPVisionConfig)
    owner = whole or text or vision
    if owner is None or (has_text and text is None) or (has_vision and vision is None):
        raise bad_input(
            f"{head} needs a config of its own kind", type(config).__name__, "Pass its config class", TypeError
        )
    found: list[Spec] = []
    if whole is not None and "logit_scale" in others:
        found.append(Spec("logit_scale", "raw", (), mean=whole.logit_scale_init_value))
    if has_text and text is not None:
        found += _text_tower(text)
    if has_vision and vision is not None:
        found += _vision_tower(vision)
    for name in others:
        tower = text if name == "text_projection.weight" else vision
        if name == "classifier.bias":
            found.append(Spec(name, "bias", (config.num_labels,)))
        elif name != "logit_scale" and tower is not None:
            width = tower.hidden_size
            rows = config.num_labels if name == "classifier.weight" else owner.projection_dim
            found.append(Spec(name, "linear", (rows, width), std=width**-0.5 * owner.initializer_factor))
    return found


def _tower(config: BaseConfig, kind: type[TowerT]) -> TowerT | None:
    """Returns the config itself, or the part of a full one, that is of a kind."""
    parts = (config.text_config, config.vision_config) if isinstance(config, CLIPConfig) else (config,)
    return next((part for part in parts if isinstance(part, kind)), None)


def initial_weights(table: Iterable[Spec], seed: int = 0) -> dict[str, np.ndarray]:
    """Draws every parameter from its initial distribution: the same float32 numbers for every framework.

    Args:
        table: The parameters.
        seed: Random seed; the values of a parameter depend only on it and the parameter's name.
    """
    arrays = {}
    for spec in table:
        if spec.std:
            rng = np.random.default_rng((seed, zlib.crc32(spec.name.encode())))
            arrays[spec.name] = rng.normal(spec.mean, spec.std, spec.shape).astype(np.float32)
        else:
            arrays[spec.name] = np.full(spec.shape, spec.mean, np.float32)
    return arrays


def _text_tower(config: CLIPTextConfig) -> Iterator[Spec]:
    width, std = config.hidden_size, 0.02 * config.initializer_factor
    stem = "text_model.embeddings"
    yield Spec(f"{stem}.token_embedding.weight", "embedding", (config.vocab_size, width), std=std)
    yield Spec(f"{stem}.position_embedding.weight", "embedding", (config.max_position_embeddings, width), std=std)
    yield from _blocks("text_model.encoder.layers", config)
    yield from _norm("text_model.final_layer_norm", width)


def _vision_tower(config: CLIPVisionConfig) -> Iterator[Spec]:
    width, size = config.hidden_size, config.patch_size
    std = config.initializer_range * config.initializer_factor
    stem = "vision_model.embeddings"
    yield Spec(f"{stem}.class_embedding", "raw", (width,), std=width**-0.5 * config.initializer_factor)
    patch = (width, config.num_channels, size, size)
    yield Spec(f"{stem}.patch_embedding.weight", "convolution", patch, std=std)
    yield Spec(f"{stem}.position_embedding.weight", "embedding", (config.num_patches + 1, width), std=std)
    yield from _norm("vision_model.pre_layrnorm", width)  # the misspelling is part of every checkpoint
    yield from _blocks("vision_model.encoder.layers", config)
    yield from _norm("vision_model.post_layernorm", width)


def _blocks(stem: str, config: CLIPTextConfig | CLIPVisionConfig) -> Iterator[Spec]:
    width, inner, factor = config.hidden_size, config.intermediate_size, config.initializer_factor
    out_std = width**-0.5 * factor
    in_std = out_std * (2 * max(config.num_hidden_layers, 1)) ** -0.5
    for i in range(config.num_hidden_layers):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            std = out_std if name == "out_proj" else in_std
            yield from _linear(f"{stem}.{i}.self_attn.{name}", width, width, std)
        yield from _norm(f"{stem}.{i}.layer_norm1", width)
        yield from _linear(f"{stem}.{i}.mlp.fc1", inner, width, (2 * width) ** -0.5 * factor)
        yield from _linear(f"{stem}.{i}.mlp.fc2", width, inner, in_std)
        yield from _norm(f"{stem}.{i}.layer_norm2", width)


def _linear(stem: str, rows: int, columns: int, std: float) -> Iterator[Spec]:
    yield Spec(f"{stem}.weight", "linear", (rows, columns), std=std)
    yield Spec(f"{stem}.bias", "bias", (rows,))


def _norm(stem: str, width: int) -> Iterator[Spec]:
    yield Spec(f"{stem}.weight", "norm scale", (width,), mean=1.0)
    yield Spec(f"{stem}.bias", "norm shift", (width,))


def is_known(name: str) -> bool:
    """Whether some head of some size has a parameter of this canonical name."""
    return find(name.split("."), "pt") is not None


def _known_specs() -> Iterable[Spec]:
    config = CLIPConfig({"num_hidden_layers": 1}, {"num_hidden_layers": 1})
    return (spec for head in ("CLIPModel", "CLIPForImageClassification") for spec in specs(config, head))


_KNOWN = {spec.name: spec for spec in _known_specs()}
_PATHS = {framework: {spec.path(framework): spec for spec in _KNOWN.values()} for framework in ("pt", "tf", "flax")}


def known_specs() -> list[Spec]:
    """Lists the parameters of all heads of one block per tower; only names and kinds mean something."""
    return list(_KNOWN.values())


def find(path: Sequence[str], framework: str) -> tuple[str, str] | None:
    """Finds the parameter at an attribute path of a framework: the inverse of `Spec.path`.

    Args:
        path: The attributes, for example ``("text_model", "encoder", "layers", "11", "mlp", "fc1", "kernel")``.
        framework: "pt", "tf" or "flax".

    Returns:
        Canonical name and key of `KINDS`; None when no head of any size has such a parameter.
    """
    blocks = [i for i, part in enumerate(path) if part[:1].isdigit() and _NUMBER.fullmatch(part)]
    spec = _PATHS[framework].get(tuple("0" if i in blocks else part for i, part in enumerate(path)))
    if spec is None:
        return None
    return (at_block(spec.name, int(path[blocks[0]])) if blocks else spec.name), spec.kind


def at_block(name: str, block: int) -> str:
    """Returns the name that a parameter of block 0 has in another block."""
    return name.replace(".layers.0.", f".layers.{block}.")
