"""The batches and recipes with which training is compared across devices and frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np
from cases import CONFIGS

from clipmb.common.recipe import Recipe

CONFIG = CONFIGS["plain"]
STEPS = 50
BATCH = 12


def recipe(**changed: Any) -> Recipe:
    """A recipe whose every part works: warm-up, decay, clipping (of most steps of random weights)."""
    values: dict[str, Any] = {
        "steps": STEPS, "batch_size": BATCH, "learning_rate": 2e-3, "warmup_steps": 5, "weight_decay": 0.3,
        "clip_norm": 0.7, "precision": "float64",
    }  # fmt: skip
    return Recipe(**{**values, **changed})


def batch(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pairs: texts of unequal lengths, padded on the right."""
    rng = np.random.default_rng((seed, size))
    text = CONFIG.text_config
    seq = text.max_position_embeddings
    ids = rng.integers(2, text.bos_token_id, (size, seq))
    lengths = rng.integers(3, seq + 1, size)
    ids[:, 0] = text.bos_token_id
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = text.eos_token_id
        row[length:] = text.pad_token_id
    side = CONFIG.vision_config.image_size
    return {"input_ids": ids, "pixel_values": rng.standard_normal((size, 3, side, side)).astype(np.float32)}


def batches(count: int = STEPS, size: int = BATCH) -> list[dict[str, np.ndarray]]:
    """The batches of a run; every fifth is a smaller one, as at the end of an epoch."""
    return [batch(size - 5 if place % 5 == 4 else size, seed=place) for place in range(count)]


def share(whole: dict[str, np.ndarray], rank: int, count: int) -> dict[str, np.ndarray]:
    """The rows of a batch that one process has."""
    return {name: np.array_split(values, count)[rank] for name, values in whole.items()}


def largest_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest of max|a - b| / max|b| over all arrays, each with its own largest; names must be equal.

    The gradient of a key's bias is zero but for rounding, since softmax takes no notice of it: such arrays, far below
    all others, are compared with the largest number of the whole.
    """
    assert found.keys() == expected.keys()
    largest = max(np.abs(values).max() for values in expected.values())
    worst = 0.0
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        assert np.isfinite(found[name]).all(), name
        scale = np.abs(values).max()
        worst = max(worst, np.abs(found[name] - values).max() / (scale if scale > 1e-10 * largest else largest))
    return float(worst)


# Every way to spread a step over devices and chunks must give the same as a plain step on one device.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks": {"chunk_size": 2},
    "local loss": {"local_loss": True, "chunk_size": 4},
    "sigmoid": {"loss": "siglip", "local_loss": True},
    "sigmoid, chunks": {"loss": "siglip", "chunk_size": 5},
    "frozen text": {"freeze": ("text",), "chunk_size": 4},
    "frozen vision": {"freeze": ("vision",)},
    "checkpointing": {"gradient_checkpointing": True, "chunk_size": 3},
}
