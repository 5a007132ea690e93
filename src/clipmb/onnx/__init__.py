"""CLIP as an ONNX graph, run by onnxruntime: the light way, without a framework."""

from clipmb.common.errors import MissingBackendError

try:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
except ImportError as error:
    raise MissingBackendError("onnx", "onnxruntime", cause=str(error)) from error
