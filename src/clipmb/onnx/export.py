"""ONNX files, for onnxruntime and everything that is built on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipmb.common.image.processor import CLIPImageProcessor
from clipmb.onnx.engine import ONNXModel
from clipmb.onnx.graph import Graph, clip
from clipmb.onnx.preprocessing import preprocess

RUN = Path(__file__).with_name("run.py")


def write(
    model: ONNXModel,
    tower: str,
    path: Path,
    *,
    dtype: str,
    normalize: bool,
    processor: CLIPImageProcessor | None,
    **form: Any,
) -> list[Path]:
    """Writes a tower, as `clipmb.exporting.Writer` describes it.

    Args:
        model: Config and weights.
        tower: "image", "text" or "both".
        path: The file without its ending.
        dtype: "float32", "float16" or "int8".
        normalize: Return embeddings of length 1.
        processor: What is done to pictures in the graph; nothing when None.
        **form: ``ids``, ``length``, ``keep`` and ``names``, as in `clipmb.onnx.graph.clip`.

    Returns:
        ``….onnx``, and above 1.9 GB ``….onnx_data`` with the weights.
    """
    quantised = dtype == "int8"
    kind = "float32" if quantised else dtype
    before = processor and partial(preprocess, processor=processor, config=model.config.vision_config)
    graph = clip(
        model.config,
        model.arrays,
        tower,
        dtype=kind,
        quantised=quantised,
        normalized=normalize,
        preprocess=before,
        **form,
    )
    return graph.save(path.with_name(f"{path.name}.onnx"))


def write_preprocessing(model: ONNXModel, processor: CLIPImageProcessor, path: Path) -> Path:
    """Writes what `write` does to pictures as a file of its own, from ``images`` to ``pixel_values``.

    Args:
        model: Whose config says the size.
        processor: What is done.
        path: The file.

    Raises:
        ValueError: The processor does what a graph cannot do, or makes pictures of another size.
    """
    config = model.config.vision_config
    graph = Graph({})
    images = graph.input("images", np.uint8, ["batch", "height", "width", config.num_channels])
    pixels = preprocess(graph, images, processor, config)
    graph.output("pixel_values", pixels, ["batch", config.num_channels, config.image_size, config.image_size])
    return graph.save(path)[0]
