"""ONNX files, for onnxruntime and everything that is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipmb.onnx.engine import ONNXModel
from clipmb.onnx.graph import clip

RUN = Path(__file__).with_name("run.py")


def write(model: ONNXModel, tower: str, path: Path, *, dtype: str, normalize: bool, **form: Any) -> list[Path]:
    """Writes a tower, as `clipmb.exporting.Writer` describes it.

    Args:
        model: Config and weights.
        tower: "image", "text" or "both".
        path: The file without its ending.
        dtype: "float32", "float16" or "int8".
        normalize: Return embeddings of length 1.
        **form: ``ids``, ``length`` and ``keep``, as in `clipmb.onnx.graph.clip`.

    Returns:
        ``….onnx``, and above 1.9 GB ``….onnx_data`` with the weights.
    """
    quantised = dtype == "int8"
    kind = "float32" if quantised else dtype
    graph = clip(model.config, model.arrays, tower, dtype=kind, quantised=quantised, normalized=normalize, **form)
    return graph.save(path.with_name(f"{path.name}.onnx"))
