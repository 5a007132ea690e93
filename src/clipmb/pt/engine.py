"""The PyTorch model with numpy inputs and outputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import numpy as np
import torch

from clipmb.common import checks
from clipmb.common.config import CLIPConfig
from clipmb.common.hub import Source
from clipmb.common.outputs import stages
from clipmb.pt.modeling import CLIPModel
from clipmb.pt.tensors import from_numpy, to_numpy


class Engine:
    """A loaded CLIP that takes and returns numpy arrays, as `clipmb.backends.Engine` describes it.

    Args:
        model: A `CLIPModel`.
        compile: Compile both towers with frozen weights (torch.compile, inductor) at their first use.
    """

    backend: ClassVar[str] = "pt"

    def __init__(self, model: CLIPModel, *, compile: bool = False) -> None:
        self.model = model.eval()
        self.config: CLIPConfig = model.config
        self._image: Callable[..., Any] = self._image_features
        self._text: Callable[..., Any] = self._text_features
        if compile:
            self._image = torch.compile(self._image, options={"freezing": True})
            self._text = torch.compile(self._text, options={"freezing": True})

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
            device: As PyTorch names it; the CPU when None.
            compile: As in the constructor; not when None.
            **options: The other options of ``from_pretrained``.

        Raises:
            CheckpointError: The files cannot be found or read, or do not fit.
            ValueError: The dtype or the device does not exist.
        """
        return cls(
            CLIPModel.from_pretrained(name_or_path, dtype=dtype, device=device, **options), compile=bool(compile)
        )

    @staticmethod
    def environment() -> dict[str, Any]:
        """Returns the versions, the default device, and the precision of float32 matrix products on it."""
        cuda = torch.cuda.is_available()
        precision = "TF32" if cuda and torch.backends.cuda.matmul.allow_tf32 else torch.get_float32_matmul_precision()
        return {
            "versions": {"torch": torch.__version__},
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "precision": precision,
        }

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities."""
        return float(self.model.logit_scale.detach().double().exp())

    @torch.inference_mode()
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
        return self._numpy(self._image(self._pixels(pixel_values)))

    @torch.inference_mode()
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
        return self._numpy(self._text(*self._texts(input_ids, attention_mask)))

    @torch.inference_mode()
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
        (ids, mask), pixels = self._texts(input_ids, attention_mask), self._pixels(pixel_values)
        with _exact():
            output = self.model(ids, pixels, mask, output_hidden_states=True, return_dict=True)
            features = self.model.get_text_features(ids, mask), self.model.get_image_features(pixels)
        return {name: self._numpy(value) for name, value in stages(output, *features).items()}

    def weights(self) -> dict[str, np.ndarray]:
        """Returns every parameter by its canonical name, in canonical layout."""
        return dict(self.model.to_arrays())

    def free(self) -> None:
        """Releases the model and its memory; the engine cannot be used afterwards."""
        del self.model, self._image, self._text
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model.pooled(pixel_values))

    def _text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.model.text_projection(self.model.text_model.pooled(input_ids, attention_mask))

    def _pixels(self, pixel_values: np.ndarray) -> torch.Tensor:
        wide = self.model.dtype == torch.float64
        return self._tensor(checks.engine_pixels(pixel_values, self.config.vision_config, wide))

    def _texts(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids, mask = checks.engine_texts(input_ids, attention_mask, self.config.text_config)
        return self._tensor(ids), mask if mask is None else self._tensor(mask)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return from_numpy(array).to(self.model.device)

    @staticmethod
    def _numpy(tensor: torch.Tensor) -> np.ndarray:
        return to_numpy(tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float())


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Computes float32 products and convolutions in float32, not in TF32, within."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
