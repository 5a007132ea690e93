"""The configurations, random checkpoints and inputs that the tests of all frameworks share.

Every parameter is random (fresh biases of zero and scales of one would hide a dropped bias or swapped norms), every
width is different from every other, and the stress case turns each knob of the configuration to an unusual value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.checkpoint import write_safetensors
from clipmb.common.config import BaseConfig, CLIPConfig
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "projection_dim": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 13, "pad_token_id": 1, "bos_token_id": 97, "eos_token_id": 98,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 80, "projection_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 6,
    "image_size": 20, "patch_size": 4,
}  # fmt: skip
STRESS = {"layer_norm_eps": 0.1, "hidden_act": "gelu"}

CONFIGS = {
    "plain": CLIPConfig(TEXT, VISION, projection_dim=24, num_labels=7),
    "stress": CLIPConfig({**TEXT, **STRESS}, {**VISION, **STRESS}, projection_dim=24, num_labels=7),
    # The OpenAI checkpoints' configs say 2, which means: pool at the largest id.
    "legacy eos": CLIPConfig({**TEXT, "eos_token_id": 2}, VISION, projection_dim=24, num_labels=7),
}

TEXT_HEADS = ("CLIPTextModel", "CLIPTextModelWithProjection")
VISION_HEADS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
ALL_HEADS = ("CLIPModel", *TEXT_HEADS, *VISION_HEADS, "CLIPForImageClassification")


def config_of(head: str, config: CLIPConfig) -> BaseConfig:
    """The part of a whole config that a head is built from."""
    return config.text_config if head in TEXT_HEADS else config.vision_config if head in VISION_HEADS else config


def random_arrays(config: BaseConfig, head: str, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random values for every parameter, of a size that keeps all activations in range."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for spec in specs(config, head):
        scale = 0.3 if len(spec.shape) > 1 else 0.1
        values = rng.normal(0.0, scale, spec.shape) + (1.0 if spec.kind == "norm scale" else 0.0)
        arrays[spec.name] = np.asarray(2.0 if spec.name == "logit_scale" else values).astype(dtype)
    return arrays


def write_checkpoint(
    folder: Path, config: CLIPConfig, head: str = "CLIPModel", seed: int = 0, **options: object
) -> Path:
    """Saves a random checkpoint of a head as every backend reads it."""
    part = config_of(head, config)
    with Transaction(folder) as save:
        save.write("config.json", type(part).from_dict({**part.to_dict(), "architectures": [head]}).to_json_string())
        write_safetensors(save, random_arrays(part, head, seed), **options)
    return folder


def text_inputs(config: CLIPConfig, batch: int = 4, seq: int = 11, seed: int = 1) -> dict[str, np.ndarray]:
    """Ids and a mask with every kind of row: full, right-padded, left-padded, with a hole, all padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 97, (batch, seq))
    ids[:, 0] = 97
    mask = np.ones((batch, seq), np.int64)
    ends = [seq - 1, seq // 2, seq - 2, seq - 1]
    for row in range(batch):
        ids[row, ends[row % 4]] = 98
    for row, hidden in enumerate((slice(0, 0), slice(seq // 2 + 1, seq), slice(0, 3), slice(4, 6))[:batch]):
        mask[row, hidden] = 0
    if batch > 4:
        mask[4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(
    config: CLIPConfig, batch: int = 4, size: tuple[int, int] | None = None, seed: int = 2
) -> dict[str, np.ndarray]:
    """Normalised pixels, channels first."""
    height, width = size or (config.vision_config.image_size,) * 2
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.normal(size=(batch, config.vision_config.num_channels, height, width)).astype(np.float32)
    }


def inputs_of(head: str, config: CLIPConfig, batch: int = 4) -> dict[str, np.ndarray]:
    """What a head takes."""
    text = {} if head in VISION_HEADS or head == "CLIPForImageClassification" else text_inputs(config, batch)
    return text if head in TEXT_HEADS else {**text, **image_inputs(config, batch)}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Whether the names, dtypes, shapes and bits are the same."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def assert_same(found: Any, expected: Any, name: str = "") -> None:
    """Asserts that arrays, or mappings to arrays, have the same names, dtypes, shapes and bits."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert_same(found[key], array, key)
        return
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    assert found.tobytes() == expected.tobytes(), name  # -0.0 is not 0.0


def assert_same_features(found: Mapping, expected: Mapping) -> None:
    """Asserts that what a processor returns has the same fields, in the same order, with the same bits."""
    assert list(found) == list(expected)
    assert_same(found, expected)


def relative(a: object, b: object) -> float:
    """max|a - b| / max|b|, as float64; NaN or a wrong shape is infinitely far."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float64).tiny)) if b.size else 0.0
