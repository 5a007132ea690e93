"""The batches and recipes with which training is compared across devices and frameworks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cases import CONFIGS, write_checkpoint
from PIL import Image

from clipmb import CLIPConfig
from clipmb.common.training.recipe import Recipe

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


def unit(rows: int, seed: int) -> np.ndarray:
    """Random features of length 1."""
    values = np.random.default_rng(seed).normal(size=(rows, 6))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def expected_losses(text: np.ndarray, image: np.ndarray, scale: float, bias: float) -> tuple[float, float]:
    """The softmax loss and the sigmoid loss, term by term."""
    logits = np.exp(scale) * text @ image.T
    n = len(text)
    clip = sum(
        np.log(np.exp(logits[i]).sum()) + np.log(np.exp(logits[:, i]).sum()) - 2 * logits[i, i] for i in range(n)
    ) / (2 * n)
    siglip = (
        sum(np.log1p(np.exp(-(1 if i == j else -1) * (logits[i, j] + bias))) for i in range(n) for j in range(n)) / n
    )
    return clip, siglip


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


def assert_steps_of_adamw(trainer: Any) -> None:
    """Asserts that a new trainer of ``recipe(steps=8, warmup_steps=3)`` steps by the formulas, in plain numpy.

    Source: the paper of AdamW and torch's documentation of it and of ``clip_grad_norm_``.
    """
    assert not any(value.any() for value in trainer.moments().values())
    weights = {name: value.copy() for name, value in trainer.weights().items()}
    first = {spec.name: np.zeros_like(weights[spec.name]) for spec in trainer.table}
    second = {name: np.zeros_like(value) for name, value in first.items()}
    clipped = 0
    for t, pairs in enumerate(batches(8), start=1):
        _, gradients = trainer.gradients(pairs)
        metrics = trainer.step(pairs)
        norm = np.sqrt(sum(np.square(value).sum() for value in gradients.values()))
        factor = min(1.0, 0.7 / (norm + 1e-6))
        clipped += factor < 1
        rate = 2e-3 * t / 3 if t <= 3 else 2e-3 * (1 + np.cos(np.pi * (t - 4) / 5)) / 2
        assert abs(metrics["grad_norm"] - norm) <= 1e-13 * norm
        assert abs(metrics["learning_rate"] - rate) <= 1e-15 * rate
        for spec in trainer.table:
            name, g = spec.name, gradients[spec.name] * factor
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g * g
            if len(spec.shape) > 1:
                weights[name] = weights[name] * (1 - rate * 0.3)
            corrected = first[name] / (1 - 0.9**t)
            weights[name] = weights[name] - rate * corrected / (np.sqrt(second[name] / (1 - 0.98**t)) + 1e-6)
        assert largest_difference(trainer.weights(), weights) < 1e-13  # float32 anywhere would be 1e-8
    assert clipped
    moments = {f"first_moment.{name}": value for name, value in first.items()}
    moments |= {f"second_moment.{name}": value for name, value in second.items()}
    assert largest_difference(trainer.moments(), moments) < 1e-12


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


def small_model(folder: Path) -> Path:
    """Saves a random CLIP with a small vocabulary, tokenizer and image processor."""
    from clipmb import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast
    from clipmb.common.text.vocabulary import official

    vocabulary = official(200)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(vocabulary.vocab_json(), "utf-8")
    (folder / "merges.txt").write_text(vocabulary.merges_txt(), "utf-8")
    tokenizer = CLIPTokenizerFast(folder / "vocab.json", folder / "merges.txt", model_max_length=16)
    size = CONFIG.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    special = {"vocab_size": len(vocabulary.ids), "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id}
    special |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**CONFIG.text_config.to_dict(), **special}
    config = CLIPConfig(text, CONFIG.vision_config.to_dict(), projection_dim=CONFIG.projection_dim)
    write_checkpoint(folder, config)
    return folder


def small_pairs(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes pictures of one colour each, with captions and labels."""
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230), "white": (250, 250, 250)}
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for place in range(count):
        name = list(colours)[place % len(colours)]
        noise = rng.integers(-20, 20, (24, 30, 3))
        Image.fromarray((np.array(colours[name]) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{place}.png")
        captions = [f"a {name} picture", f"{name} number {place}"]
        lines.append(json.dumps({"file_name": f"{place}.png", "captions": captions, "label": name}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
