"""A model of numpy alone and a collection with everything that can be wrong, for the tests of embeddings on disk."""

from __future__ import annotations

import json

import numpy as np
from data_cases import jpeg

from clipmb import CLIPConfig, CLIPImageProcessor, CLIPPipeline, CLIPProcessor, CLIPTokenizerFast

CONFIG = CLIPConfig(
    {"max_position_embeddings": 16},
    {"image_size": 16, "patch_size": 8},
    projection_dim=6,
)
BROKEN = {
    "cut.jpg": jpeg(1)[:400],
    "empty.jpg": b"",
    "text.jpg": b"no image",
    "header.png": jpeg(2, form="PNG")[:40],
    "zeros.jpg": bytes(1000),
    "half.webp": jpeg(3, form="WEBP")[:100],
}


class Engine:
    """Features that depend on every pixel and every id, each row by itself."""

    backend = "numpy"
    config = CONFIG
    model = None
    logit_scale = 5.0

    def __init__(self, factor=1.0):
        self.factor = factor
        self.shapes: set[tuple[int, ...]] = set()
        self.calls = 0

    def weights(self):
        return {"factor": np.full((2, 3), self.factor, np.float32)}

    def image_features(self, pixel_values):
        self.shapes.add(pixel_values.shape)
        self.calls += 1
        flat = pixel_values.reshape(len(pixel_values), 6, -1).astype(np.float64)
        return (flat @ np.cos(np.arange(flat.shape[2])) * self.factor).astype(np.float32)

    def text_features(self, input_ids, attention_mask):
        self.shapes.add(input_ids.shape)
        self.calls += 1
        powers = np.cos(np.outer(np.arange(input_ids.shape[1]), np.arange(1, 7)))
        return ((input_ids * attention_mask) @ powers * self.factor).astype(np.float32)


def pipeline(factor=1.0):
    processor = CLIPProcessor(CLIPImageProcessor(size=16, crop_size=16), CLIPTokenizerFast())
    return CLIPPipeline(Engine(factor), processor)


def collection(folder, count=11):
    """A table of images with captions, of which some are broken; returns its path."""
    folder.mkdir(exist_ok=True, parents=True)
    rows = []
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(i, (20 + i, 18)))
        captions = [f"caption {i}", f"another of {i}"][: i % 3]
        rows.append({"image": f"{i:03d}.jpg", "caption": captions, "width": 20 + i, "tags": ["a", i]})
    for name, content in BROKEN.items():
        (folder / name).write_bytes(content)
        rows.insert(len(rows) // 2, {"image": name, "caption": [], "width": None, "tags": None})
    rows.append({"image": "missing.jpg", "caption": "of a missing image", "width": 1, "tags": []})
    rows.append({"image": None, "caption": "alone " + "very " * 30 + "long", "width": 2, "tags": None})
    rows.append({"image": 7, "caption": "wrong", "width": 2, "tags": None})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return folder / "captions.jsonl"
