"""The TensorFlow model with numpy inputs and outputs."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import keras
import numpy as np
import tensorflow as tf

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.outputs import stages
from clipmb.tf.modeling import TFCLIPModel


class Engine:
    """A loaded CLIP that takes and returns numpy arrays, as `clipmb.backends.Engine` describes it.

    Args:
        model: A `TFCLIPModel`.
        compile: Trace both towers at their first use (tf.function), once for all batches and lengths.
    """

    backend: ClassVar[str] = "tf"

    def __init__(self, model: TFCLIPModel, *, compile: bool = True) -> None:
        self.model = model
        self.config: CLIPConfig = model.config
        self._device: str | None = None
        self._image: Callable[..., Any] = self._image_features
        self._text: Callable[..., Any] = self._text_features
        if compile:
            config = self.config.vision_config
            ids = tf.TensorSpec((None, None), tf.int64)
            shape = (None, config.num_channels, config.image_size, config.image_size)
            pixels = tf.TensorSpec(shape, model.compute_dtype)
            self._image = tf.function(self._image, input_signature=[pixels], autograph=False)
            self._text = tf.function(self._text, input_signature=[ids, ids], autograph=False)

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str] | Source | None,
        *,
        dtype: Any = None,
        device: Any = None,
        compile: bool | None = None,
        **options: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            name_or_path: Folder, Hub id or opened source; None to take ``config`` and ``state_dict`` from the options.
            dtype: "float32" (the default), "float16", "bfloat16" or "float64".
            device: As TensorFlow names it ("gpu", "/GPU:1"), or "cuda"; TensorFlow's own choice when None.
            compile: As in the constructor; None is True.
            **options: The other options of ``from_pretrained``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            ValueError: The dtype or the device does not exist.
        """
        with _placed(device):
            # By name, since a type checker takes it for one of the options otherwise.
            model = TFCLIPModel.from_pretrained(name_or_path, dtype=dtype, output_loading_info=False, **options)
            engine = cls(model, compile=compile is not False)
        engine._device = device
        return engine

    @staticmethod
    def environment() -> dict[str, Any]:
        """Returns the versions, the default device, and the precision of float32 matrix products on it."""
        gpus = tf.config.list_physical_devices("GPU")
        tf32 = bool(gpus) and tf.config.experimental.tensor_float_32_execution_enabled()
        return {
            "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
            "device": tf.config.experimental.get_device_details(gpus[0]).get("device_name", "gpu") if gpus else "cpu",
            "precision": "TF32" if tf32 else "highest",
        }

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities."""
        with np.errstate(over="ignore"):  # the pipeline reports infinity
            return float(np.exp(self.model.logit_scale.numpy().astype(np.float64)))

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        """Encodes images.

        Args:
            pixel_values: (batch, channels, height, width), preprocessed.

        Returns:
            (batch, proj), not normalised; float32, or float64 for such a model.

        Raises:
            TypeError: The values are not real numbers.
            ValueError: The shape does not fit the model.
        """
        with _placed(self._device):
            return self._numpy(self._image(self._pixels(pixel_values)))

    def text_features(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Encodes texts.

        Args:
            input_ids: (batch, seq) integers.
            attention_mask: (batch, seq), 1 for tokens and 0 for padding; all are tokens when None.

        Returns:
            (batch, proj), not normalised; float32, or float64 for such a model.

        Raises:
            TypeError: The ids are not integers, or the mask is not of real numbers.
            ValueError: An id is outside the vocabulary, or a shape does not fit the model.
        """
        with _placed(self._device):
            return self._numpy(self._text(*self._texts(input_ids, attention_mask)))

    def stages(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, pixel_values: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the intermediate results, with float32 products in float32.

        Args:
            input_ids: (texts, seq) integers.
            attention_mask: (texts, seq) or None.
            pixel_values: (images, channels, height, width).

        Returns:
            Stage to array, named and ordered as by `clipmb.common.outputs.stages`.
        """
        with _placed(self._device), _exact():
            (ids, mask), pixels = self._texts(input_ids, attention_mask), self._pixels(pixel_values)
            output = self.model(ids, pixels, mask, output_hidden_states=True, return_dict=True)
            features = self.model.get_text_features(ids, mask), self.model.get_image_features(pixels)
            return {name: self._numpy(value) for name, value in stages(output, *features).items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by its canonical name, in canonical layout."""
        return dict(self.model.to_arrays())

    def free(self) -> None:
        """Releases the model and its memory; the engine cannot be used afterwards."""
        del self.model, self._image, self._text
        gc.collect()  # Keras layers and traced functions refer to each other

    def _image_features(self, pixel_values: tf.Tensor) -> tf.Tensor:
        return self.model.visual_projection(self.model.vision_model.pooled(pixel_values))

    def _text_features(self, input_ids: tf.Tensor, attention_mask: tf.Tensor) -> tf.Tensor:
        return self.model.text_projection(self.model.text_model.pooled(input_ids, attention_mask))

    def _pixels(self, pixel_values: np.ndarray) -> tf.Tensor:
        dtype = self.model.compute_dtype
        return tf.cast(checks.engine_pixels(pixel_values, self.config.vision_config, dtype == "float64"), dtype)

    def _texts(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[tf.Tensor, tf.Tensor]:
        ids, mask = checks.engine_texts(input_ids, attention_mask, self.config.text_config)
        return tf.constant(ids), tf.ones_like(ids) if mask is None else tf.constant(mask)

    @staticmethod
    def _numpy(tensor: tf.Tensor) -> np.ndarray:
        return (tensor if tensor.dtype in (tf.float32, tf.float64) else tf.cast(tensor, tf.float32)).numpy()


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Computes float32 products in float32, not in TF32, within."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)


def _placed(device: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device is None else tf.device(str(device).replace("cuda", "gpu"))
