"""LiteRT's files, once called TensorFlow Lite, of the SavedModel; they need its built-in operators only."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.lite.python.convert import ConverterError

from clipmb.common.errors import MissingBackendError, bad_input
from clipmb.tf import saved_model
from clipmb.tf.modeling import TFCLIPModel

if importlib.util.find_spec("ai_edge_litert") is None:  # which runs the files
    raise MissingBackendError("litert", "ai_edge_litert")

RUN = Path(__file__).with_name("run_litert.py")


def write(model: TFCLIPModel, tower: str, path: Path, *, dtype: str, **form: Any) -> list[Path]:
    """Writes a tower, as `clipmb.exporting.Writer` describes it.

    Args:
        model: The model, in float32.
        tower: "image", "text" or "both".
        path: The file without its ending.
        dtype: "float32" or "float16": what the weights are stored in.
        **form: The others, as in `clipmb.tf.saved_model.write`.

    Returns:
        ``….tflite``.

    Raises:
        ValueError: LiteRT lacks an operator.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        [saved] = saved_model.write(model, tower, Path(folder) / path.name, **form)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(saved))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if dtype == "float16":
            converter.optimizations, converter.target_spec.supported_types = [tf.lite.Optimize.DEFAULT], [tf.float16]
        try:
            written = converter.convert()
        except ConverterError as error:
            raise bad_input(
                "LiteRT must have every operator of the model built in",
                ", ".join(sorted({*re.findall(r"^TF Select ops: (.+)$", str(error), re.M)})) or str(error)[:300],
                "Export to another target",
                shown=True,
            ) from error
    file = path.with_name(f"{path.name}.tflite")
    file.write_bytes(written)
    return [file]
