"""The checks of model inputs that need shapes only: the same errors with the same words in every framework.

Source of the limits: transformers 4.57.6, whose PyTorch models make the first three checks; its TensorFlow and Flax
models computed silently with several of these inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from clipmb.common.config import CLIPTextConfig, CLIPVisionConfig
from clipmb.common.errors import bad_input

_warned: set[str] = set()


def check_text(ids: Any, mask: Any, positions: Any, config: CLIPTextConfig) -> None:
    """Checks the shapes of ``input_ids``, ``attention_mask`` and ``position_ids``.

    Raises:
        ValueError: A shape does not fit, or the text is longer than the model's context.
    """
    if ids is None:
        raise bad_input("The text tower needs input_ids", None, "Pass input_ids of shape (batch, seq)")
    if len(ids.shape) != 2:
        raise bad_input("input_ids must have the shape (batch, seq)", _shape(ids), "Add or remove an axis", shown=True)
    seq = ids.shape[1]
    if seq is not None and seq > config.max_position_embeddings:
        raise bad_input(
            f"Sequence length must be at most max_position_embeddings = {config.max_position_embeddings}",
            seq,
            "Truncate the text (truncation=True in the tokenizer)",
        )
    if mask is not None and not _matches(mask.shape, ids.shape):
        raise bad_input(
            f"attention_mask must have the shape of input_ids, {_shape(ids)}",
            _shape(mask),
            "Pass the mask that the tokenizer returned with these ids",
            shown=True,
        )
    if positions is not None and not (
        len(positions.shape) == 2
        and positions.shape[0] in (1, None, ids.shape[0])
        and positions.shape[1] in (seq, None)
    ):
        raise bad_input(
            f"position_ids must have the shape (1, seq) or that of input_ids, {_shape(ids)}",
            _shape(positions),
            "Pass positions of that shape",
            shown=True,
        )


def check_pixels(pixels: Any, config: CLIPVisionConfig, interpolate: bool) -> None:
    """Checks the shape of ``pixel_values``.

    Raises:
        ValueError: It does not fit.
    """
    if pixels is None:
        raise bad_input(
            "The vision tower needs pixel_values", None, "Pass pixel_values of shape (batch, channels, height, width)"
        )
    if len(pixels.shape) != 4 or pixels.shape[1] not in (config.num_channels, None):
        raise bad_input(
            f"pixel_values must have the shape (batch, {config.num_channels}, height, width)",
            _shape(pixels),
            "Put the channels first, in all frameworks",
            shown=True,
        )
    height, width = pixels.shape[2:]
    size = config.image_size
    if not interpolate and not (height in (size, None) and width in (size, None)):
        raise bad_input(
            f"Input image size ({height}*{width}) doesn't match model ({size}*{size})",
            _shape(pixels),
            "Resize the pictures, or pass interpolate_pos_encoding=True",
            shown=True,
        )
    if min(height or size, width or size) < config.patch_size:
        raise bad_input(
            f"A picture must hold at least one patch of {config.patch_size}*{config.patch_size}",
            _shape(pixels),
            "Pass larger pictures",
            shown=True,
        )


def outside(field: str, low: int, high: int, size: int) -> Exception:
    """Builds the error for ids outside an embedding table."""
    return bad_input(
        f"{field} must lie in [0, {size})",
        f"values from {low} to {high}",
        "Use the tokenizer of this model" if field == "input_ids" else "Pass smaller positions",
        shown=True,
    )


def not_square(texts: int, images: int) -> Exception:
    """Builds the error for a contrastive loss over unequal numbers of texts and images."""
    return bad_input(
        "return_loss=True needs one text for each image",
        f"{texts} texts and {images} images",
        "Pass matching pairs",
        shown=True,
    )


def wrong_config(model: str, expected: type, received: Any) -> Exception:
    """Builds the error for a model constructed with something that is not its config."""
    return bad_input(
        f"{model} is built from a {expected.__name__}",
        type(received).__name__,
        f"Pass a {expected.__name__}, or load a checkpoint with {model}.from_pretrained",
        TypeError,
        shown=True,
    )


def warn_once(message: str) -> None:
    """Warns the first time that this message comes up in the process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=3)


ATTENTIONS_NEED_EAGER = (
    "output_attentions=True needs attn_implementation='eager', because fused attention never forms the weights; "
    "this call computes attention eagerly. Load with attn_implementation='eager' to do so always."
)


def _shape(array: Any) -> str:
    return f"({', '.join(str(size) for size in array.shape)}{',' if len(array.shape) == 1 else ''})"


def _matches(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(shape) == len(other) and all(a == b or a is None or b is None for a, b in zip(shape, other, strict=True))
