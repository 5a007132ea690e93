"""CLIP in PyTorch."""

from clipmb.common.errors import MissingBackendError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise MissingBackendError("pt", "torch", cause=str(error)) from error

from clipmb.pt.modeling import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPPreTrainedModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

__all__ = [
    "CLIPForImageClassification",
    "CLIPModel",
    "CLIPPreTrainedModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
]
