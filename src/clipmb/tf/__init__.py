"""CLIP in TensorFlow, on Keras 3."""

from clipmb.common.errors import MissingBackendError

try:
    import tensorflow  # noqa: F401
except ImportError as error:
    raise MissingBackendError("tf", "tensorflow", cause=str(error)) from error
try:
    import keras
except ImportError as error:
    # Keras fails so when its configured backend is missing, too: the cause says which.
    raise MissingBackendError("tf", "keras", cause=str(error)) from error

if not keras.__version__.startswith("3.") or keras.config.backend() != "tensorflow":
    raise ImportError(
        "clipmb.tf needs Keras 3 on the TensorFlow backend. "
        f"Received: Keras {keras.__version__} on {keras.config.backend()!r}. "
        'Set KERAS_BACKEND=tensorflow in the environment (or "backend" in ~/.keras/keras.json) before Keras is '
        "imported; for the other backends use clipmb.pt or clipmb.flax."
    )

from clipmb.tf.modeling import (
    TFCLIPForImageClassification,
    TFCLIPModel,
    TFCLIPPreTrainedModel,
    TFCLIPTextModel,
    TFCLIPTextModelWithProjection,
    TFCLIPVisionModel,
    TFCLIPVisionModelWithProjection,
)

__all__ = [
    "TFCLIPForImageClassification",
    "TFCLIPModel",
    "TFCLIPPreTrainedModel",
    "TFCLIPTextModel",
    "TFCLIPTextModelWithProjection",
    "TFCLIPVisionModel",
    "TFCLIPVisionModelWithProjection",
]
