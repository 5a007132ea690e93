"""CLIP in Flax."""

from clipmb.common.errors import MissingBackendError

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise MissingBackendError("flax", "flax", cause=str(error)) from error

from clipmb.flax.modeling import (
    FlaxCLIPForImageClassification,
    FlaxCLIPModel,
    FlaxCLIPPreTrainedModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPTextPreTrainedModel,
    FlaxCLIPVisionModel,
    FlaxCLIPVisionModelWithProjection,
    FlaxCLIPVisionPreTrainedModel,
)
from clipmb.flax.modules import (
    FlaxCLIPForImageClassificationModule,
    FlaxCLIPModule,
    FlaxCLIPTextModelWithProjectionModule,
    FlaxCLIPTextModule,
    FlaxCLIPVisionModelWithProjectionModule,
    FlaxCLIPVisionModule,
)
from clipmb.flax.pretrained import FlaxPreTrainedModel

__all__ = [
    "FlaxCLIPForImageClassification",
    "FlaxCLIPForImageClassificationModule",
    "FlaxCLIPModel",
    "FlaxCLIPModule",
    "FlaxCLIPPreTrainedModel",
    "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection",
    "FlaxCLIPTextModelWithProjectionModule",
    "FlaxCLIPTextModule",
    "FlaxCLIPTextPreTrainedModel",
    "FlaxCLIPVisionModel",
    "FlaxCLIPVisionModelWithProjection",
    "FlaxCLIPVisionModelWithProjectionModule",
    "FlaxCLIPVisionModule",
    "FlaxCLIPVisionPreTrainedModel",
    "FlaxPreTrainedModel",
]
