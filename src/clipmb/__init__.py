"""CLIP on PyTorch, TensorFlow and Flax. Names are imported on first use; no framework before it is needed."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "clipmb.common.errors": ("CheckpointError", "ClipmbError", "MissingBackendError"),
    "clipmb.common.features": ("BatchFeature",),
    "clipmb.common.config": ("CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig"),
    "clipmb.common.text.tokenizer": ("BatchEncoding", "CLIPTokenizer", "CLIPTokenizerFast"),
    "clipmb.common.image.processor": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
    "clipmb.common.processor": ("CLIPProcessor",),
    "clipmb.common.convert": ("convert",),
    "clipmb.pipeline": ("CLIPPipeline",),
    "clipmb.evaluation": ("evaluate",),
    "clipmb.training": ("train",),
    "clipmb.pt": (
        "CLIPForImageClassification", "CLIPModel", "CLIPPreTrainedModel", "CLIPTextModel",
        "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection",
    ),
    "clipmb.tf": (
        "TFCLIPForImageClassification", "TFCLIPModel", "TFCLIPPreTrainedModel", "TFCLIPTextModel",
        "TFCLIPTextModelWithProjection", "TFCLIPVisionModel", "TFCLIPVisionModelWithProjection",
    ),
    "clipmb.flax": (
        "FlaxCLIPForImageClassification", "FlaxCLIPModel", "FlaxCLIPPreTrainedModel", "FlaxCLIPTextModel",
        "FlaxCLIPTextModelWithProjection", "FlaxCLIPTextPreTrainedModel", "FlaxCLIPVisionModel",
        "FlaxCLIPVisionModelWithProjection", "FlaxCLIPVisionPreTrainedModel",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

_SUBMODULES = (
    "backends", "common", "doctor", "evaluation", "flax", "pipeline", "pt", "testing", "tf", "training", "verification",
)  # fmt: skip

# Without the models, so that `from clipmb import *` imports no framework.
__all__ = ["__version__", *sorted(name for name, module in _MODULE_OF.items() if ".common." in module)]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"clipmb.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'clipmb' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULE_OF, *_SUBMODULES]
