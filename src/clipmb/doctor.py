"""Checks that the installation computes CLIP correctly on this machine."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from clipmb import backends as known
from clipmb.common.image import jpeg
from clipmb.common.image.processor import CLIPImageProcessor
from clipmb.common.image.resampling import rule_of
from clipmb.common.text.tokenizer import CLIPTokenizerFast
from clipmb.verification import bound_of, relative_difference


def examine(backends: Sequence[str] | None = None) -> dict[str, Any]:
    """Checks the installation against what transformers 4.57.6 computed, which ships with the package.

    Args:
        backends: Backends that must work; None examines every installed one and lists the others as not installed.

    Returns:
        ``ok``; ``tokens`` and ``pixels``: whether the shared parts give the recorded bits; ``resizing``: "kernel", or
        "Pillow" where the compiled kernel is missing or has other bits; ``jpeg``: "simplejpeg" or "Pillow", by the same
        rule; ``backends``: for each
        ``installed``, ``versions``, ``precision`` of float32 matrix products, ``device``, and ``correct``, ``stages``,
        ``difference`` and ``first`` (the first wrong stage), or ``error``.
    """
    folder = Path(str(importlib.resources.files("clipmb").joinpath("data/golden")))
    vectors = load_file(folder / "vectors.safetensors")
    recorded = json.loads((folder / "tokens.json").read_text("utf-8"))
    size = vectors["pixel_values"].shape[-1]
    picture = vectors["picture"]
    pixels = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})(
        [picture, picture[::-1, ::-1], 255 - picture], return_tensors="np"
    )["pixel_values"]
    tokens = CLIPTokenizerFast()(list(recorded), truncation=False)["input_ids"]
    found: dict[str, Any] = {
        "tokens": tokens == list(recorded.values()),
        "pixels": np.array_equal(pixels, vectors["pixel_values"]),
        "resizing": "Pillow" if rule_of("auto", "installed") is None else "kernel",
        "jpeg": "simplejpeg" if jpeg.serves() else "Pillow",
        "backends": {},
    }
    for name in known.BACKENDS if backends is None else backends:
        present = name in known.installed()
        if present or backends is not None:
            found["backends"][name] = {"installed": present, **_examined(name, folder, vectors)}
        else:
            found["backends"][name] = {"installed": False}
    entries = found["backends"].values()
    found["ok"] = bool(found["tokens"] and found["pixels"]) and all(
        e.get("correct", not e["installed"]) for e in entries
    )
    return found


def _examined(backend: str, folder: Path, vectors: dict[str, np.ndarray]) -> dict[str, Any]:
    try:
        engine_class = known.engine(backend)
        about = engine_class.environment()
    except ImportError as error:
        return {"error": str(error), "correct": False}
    try:
        engine = engine_class.load(folder)
        stages = engine.stages(vectors["input_ids"], vectors["attention_mask"], vectors["pixel_values"])
    except Exception as error:
        return {**about, "error": f"{type(error).__name__}: {error}", "correct": False}
    worst, first = 0.0, None
    for stage, values in stages.items():  # in the order of computation
        difference = relative_difference(values, vectors[f"stage.{stage}"])
        worst = max(worst, difference)
        if first is None and not difference <= bound_of(stage, "float32"):
            first = stage
    complete = len(stages) == sum(name.startswith("stage.") for name in vectors)
    return {**about, "correct": first is None and complete, "stages": len(stages), "difference": worst, "first": first}
