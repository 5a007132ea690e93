"""CLIP on PyTorch, TensorFlow and Flax. Names are imported on first use; no framework before it is needed."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "clipmb.common.errors": ("CheckpointError", "ClipmbError", "MissingBackendError"),
    "clipmb.common.batch": ("BatchFeature",),
    "clipmb.common.config": ("CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig"),
    "clipmb.common.tokenizer": ("BatchEncoding", "CLIPTokenizer", "CLIPTokenizerFast"),
    "clipmb.common.image_processor": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
    "clipmb.common.processor": ("CLIPProcessor",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'clipmb' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
