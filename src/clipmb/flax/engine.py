"""The Flax model with numpy inputs and outputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.outputs import stages
from clipmb.common.pretrained import normal_dtype
from clipmb.flax.modeling import FlaxCLIPModel

LENGTHS = (8, 16, 24, 32, 48, 77)
BATCH = 256
# Numbers in the hidden states of a part on a CPU. Larger ones leave its caches: a part five times as large takes half
# as long again for each row.
_CACHED = 1_250_000


class Engine:
    """A loaded CLIP that takes and returns numpy arrays, as `clipmb.backends.Engine` describes it.

    JAX compiles for every shape and keeps what it compiled, eager operations included. Texts are therefore padded to
    one of `LENGTHS` or the context, and batches to the next power of two up to `BATCH`, in parts of which larger ones
    are computed (smaller parts on a CPU, whose caches hold what is computed from one layer to the next); the padding is
    dropped again, and changes results by rounding errors at most.

    Args:
        model: A `FlaxCLIPModel`.
        compile: Compile both towers (jax.jit).
    """

    backend: ClassVar[str] = "flax"
    few_shapes: ClassVar[bool] = True

    def __init__(self, model: FlaxCLIPModel, *, compile: bool = True) -> None:
        self.model = model
        self.config: CLIPConfig = model.config
        self._image: Callable[..., Any] = self._image_features
        self._text: Callable[..., Any] = self._text_features
        self._on_cpu = all(device.platform == "cpu" for device in jax.tree.leaves(model.params)[0].devices())
        if compile:
            self._image = jax.jit(self._image)
            self._text = jax.jit(self._text)

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
            device: "cpu", "gpu", "tpu", such a name with a number ("gpu:1"), or a ``jax.Device``; JAX's default when
                None.
            compile: As in the constructor; None is True.
            **options: The other options of ``from_pretrained``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            ValueError: The dtype or the device does not exist.
        """
        if isinstance(device, str):
            platform, _, index = device.partition(":")
            device = jax.devices(platform)[int(index or 0)]
        with jax.default_device(device), jax.enable_x64(normal_dtype(dtype, cls.__name__) == "float64"):
            model = FlaxCLIPModel.from_pretrained(name_or_path, dtype=dtype, **options)
            if device is not None:
                model.params = jax.device_put(model.params, device)  # committed: what is computed from them stays there
        return cls(model, compile=compile is not False)

    @staticmethod
    def environment() -> dict[str, Any]:
        """Returns the versions, the default device, and the precision of float32 matrix products on it."""
        device = jax.devices()[0]
        # JAX's default is float32 on the CPU, TF32 on recent GPUs and bfloat16 passes on TPUs.
        default = "highest" if device.platform == "cpu" else f"default of {device.platform}"
        return {
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
            "device": device.device_kind,
            "precision": jax.config.values["jax_default_matmul_precision"] or default,
        }

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities."""
        with np.errstate(over="ignore"):  # the pipeline reports infinity
            return float(np.exp(np.asarray(self.model.params["logit_scale"], np.float64)))

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
        vision = self.config.vision_config
        numbers = (vision.num_patches + 1) * vision.hidden_size
        return self._in_parts(self._image, numbers, pixel_values=self._pixels(pixel_values))

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
        input_ids, attention_mask = self._texts(input_ids, attention_mask)
        limit = self.config.text_config.max_position_embeddings
        length = input_ids.shape[1]
        missing = min(next((size for size in LENGTHS if size >= length), limit), limit) - length
        # Attention is causal: what follows a token has no influence on it. The padding is no end token.
        other = int(self.config.text_config.eos_token_id == 0)
        input_ids = np.pad(input_ids, ((0, 0), (0, missing)), constant_values=other)
        if attention_mask is not None:
            attention_mask = np.pad(attention_mask, ((0, 0), (0, missing)))
        numbers = input_ids.shape[1] * self.config.text_config.hidden_size
        return self._in_parts(self._text, numbers, input_ids=input_ids, attention_mask=attention_mask)

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
        with self._wide(), _exact():
            ids, mask = jax.tree.map(jnp.asarray, self._texts(input_ids, attention_mask))
            pixels = jnp.asarray(self._pixels(pixel_values))
            output: Any = self.model(ids, pixels, mask, output_hidden_states=True, return_dict=True)
            features = self.model.get_text_features(ids, mask), self.model.get_image_features(pixels)
            return {name: self._numpy(value) for name, value in stages(output, *features).items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by its canonical name, in canonical layout."""
        return dict(self.model.to_arrays())

    def free(self) -> None:
        """Releases the model and its memory; the engine cannot be used afterwards."""
        del self.model, self._image, self._text

    def _pixels(self, pixel_values: np.ndarray) -> np.ndarray:
        return checks.engine_pixels(pixel_values, self.config.vision_config, self.model.dtype == jnp.float64)

    def _texts(self, input_ids: np.ndarray, attention_mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        return checks.engine_texts(input_ids, attention_mask, self.config.text_config)

    def _in_parts(self, tower: Callable[..., Any], numbers: int, **inputs: np.ndarray | None) -> np.ndarray:
        """Computes rows, with that many numbers in the hidden state of each, in batches of few different sizes."""
        rows = next(len(array) for array in inputs.values() if array is not None)
        most = BATCH
        if self._on_cpu:
            most = min(most, 1 << max(_CACHED // numbers, 1).bit_length() - 1)
        parts = []
        for start in range(0, max(rows, 1), most):
            size = min(most, rows - start)
            missing = (1 << max(size - 1, 0).bit_length()) - size
            part = {
                name: array if array is None else _padded(array[start : start + size], missing)
                for name, array in inputs.items()
            }
            with self._wide():
                parts.append(self._numpy(tower(**part, params=self.model.params))[:size])
        return np.concatenate(parts)

    def _image_features(self, pixel_values: jax.Array, params: Any) -> jax.Array:
        pixels = jnp.asarray(pixel_values).transpose(0, 2, 3, 1)
        return self.model.module.apply({"params": params}, pixels, method="pooled_images")

    def _text_features(self, input_ids: jax.Array, attention_mask: jax.Array | None, params: Any) -> jax.Array:
        ids, mask = jnp.asarray(input_ids), attention_mask if attention_mask is None else jnp.asarray(attention_mask)
        return self.model.module.apply({"params": params}, ids, mask, method="pooled_text")

    def _wide(self) -> contextlib.AbstractContextManager:
        """Lets a model of float64 compute in float64, whatever ``jax_enable_x64`` says outside."""
        return jax.enable_x64(True) if self.model.dtype == jnp.float64 else contextlib.nullcontext()

    @staticmethod
    def _numpy(array: Any) -> np.ndarray:
        return np.asarray(array if array.dtype in (jnp.float32, jnp.float64) else array.astype(jnp.float32))


def _exact() -> contextlib.AbstractContextManager:
    """Computes float32 products in float32, not in TF32 or bfloat16, within."""
    return jax.default_matmul_precision("highest")


def _padded(array: np.ndarray, missing: int) -> np.ndarray:
    """Adds rows of zeros."""
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) if missing else array
