"""OpenVINO's intermediate representation, of the ONNX graph."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from clipmb.common.errors import MissingBackendError
from clipmb.onnx import export
from clipmb.onnx.engine import ONNXModel

_COUNTED = "openvino_telemetry" not in sys.modules
try:
    if _COUNTED:  # it forks this process, whatever threads there are, to tell its makers of each import
        sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType] - which OpenVINO takes for missing
    import openvino as ov
except ImportError as error:
    raise MissingBackendError("openvino", "openvino", cause=str(error)) from error
finally:
    if _COUNTED:
        del sys.modules["openvino_telemetry"]

RUN = Path(__file__).with_name("run_openvino.py")


def write(model: ONNXModel, tower: str, path: Path, *, dtype: str, **form: Any) -> list[Path]:
    """Writes a tower, as `clipmb.exporting.Writer` describes it.

    Args:
        model: Config and weights.
        tower: "image", "text" or "both".
        path: The file without its ending.
        dtype: "float32" or "float16": what the weights are stored in.
        **form: The others, as in `clipmb.onnx.export.write`.

    Returns:
        ``….xml`` and ``….bin``, which has the weights.
    """
    files = [path.with_name(f"{path.name}.{end}") for end in ("xml", "bin")]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph, *_ = export.write(model, tower, Path(folder) / path.name, dtype="float32", **form)
        read = ov.Core().read_model(graph)
        ov.save_model(read, files[0], compress_to_fp16=dtype == "float16")
        del read  # it maps weights in a second file of the graph
    return files
