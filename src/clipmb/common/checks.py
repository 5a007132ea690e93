"""The checks of model inputs: the same errors with the same words in every framework.

Source of the limits: transformers 4.57.6, whose PyTorch models make the first three checks; its TensorFlow and Flax
models computed silently with several of these inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from clipmb.common.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, ConfigT
from clipmb.common.errors import bad_input

Array = TypeVar("Array", bound=Any)  # of any framework, with shape and dtype


def check_text(ids: Array | None, mask: Any, positions: Any, config: CLIPTextConfig) -> Array:
    """Checks the shapes of ``input_ids``, ``attention_mask`` and ``position_ids``, arrays or tensors of any framework.

    Args:
        ids: (batch, seq).
        mask: The same shape; None for none.
        positions: (batch or 1, seq); None for none.
        config: The text tower's config.

    Returns:
        The ids.

    Raises:
        ValueError: A shape does not fit, or the text is empty or longer than the model's context.
    """
    if ids is None:
        raise bad_input("The text tower needs input_ids", None, "Pass input_ids of shape (batch, seq)")
    if len(ids.shape) != 2:
        raise bad_input("input_ids must have the shape (batch, seq)", _shape(ids), "Add or remove an axis", shown=True)
    seq = ids.shape[1]
    if seq == 0:
        raise bad_input("A text must have at least one token", _shape(ids), "Pass the tokenizer's ids", shown=True)
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
    return ids


def check_pixels(pixels: Array | None, config: CLIPVisionConfig, interpolate: bool) -> Array:
    """Checks the shape of ``pixel_values``, an array or tensor of any framework, and that they are real.

    Args:
        pixels: (batch, channels, height, width).
        config: The vision tower's config.
        interpolate: Whether the model accepts images of any size.

    Returns:
        The pixels.

    Raises:
        ValueError: It does not fit.
        TypeError: They are complex.
    """
    if pixels is None:
        raise bad_input(
            "The vision tower needs pixel_values", None, "Pass pixel_values of shape (batch, channels, height, width)"
        )
    if _dtype(pixels).startswith("complex"):  # frameworks drop the imaginary parts
        raise bad_input("pixel_values must be real numbers", _dtype(pixels), "Pass float32", TypeError, shown=True)
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
            "Resize the images, or pass interpolate_pos_encoding=True",
            shown=True,
        )
    if any(side is not None and side < config.patch_size for side in (height, width)):
        raise bad_input(
            f"An image must hold at least one patch of {config.patch_size}*{config.patch_size}",
            _shape(pixels),
            "Pass larger images",
            shown=True,
        )
    return pixels


def engine_pixels(pixel_values: Any, config: CLIPVisionConfig, wide: bool) -> np.ndarray:
    """Checks the images that an engine is given, and returns them as every engine takes them.

    Args:
        pixel_values: (batch, channels, height, width), real numbers of any dtype, byte order and layout in memory.
        config: The vision tower's config.
        wide: Whether the model computes in float64.

    Returns:
        The same numbers, contiguous, in float32, or in float64 where the model computes in it.

    Raises:
        TypeError: They are not real numbers.
        ValueError: The shape does not fit, or some have no value.
    """
    pixels = check_pixels(_array(pixel_values, "pixel_values"), config, interpolate=False)
    return _numbers(pixels, "pixel_values", np.float64 if wide else np.float32)


def engine_texts(input_ids: Any, attention_mask: Any, config: CLIPTextConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Checks the texts that an engine is given, and returns them as every engine takes them.

    Args:
        input_ids: (batch, seq), integers of any dtype, byte order and layout in memory.
        attention_mask: (batch, seq), real numbers likewise; or None.
        config: The text tower's config.

    Returns:
        Ids and mask in int64, contiguous; None for no mask.

    Raises:
        TypeError: Ids are not integers, or the mask is not of real numbers.
        ValueError: A shape does not fit, an id is outside the vocabulary, or some have no value.
    """
    ids, mask = _array(input_ids, "input_ids"), _array(attention_mask, "attention_mask")
    check_text(ids, mask, None, config)
    check_ids(ids, config.vocab_size, "input_ids")
    return _numbers(ids, "input_ids", np.int64), mask if mask is None else _numbers(mask, "attention_mask", np.int64)


_FIXES = {
    "input_ids": "Use the tokenizer of this model",
    "position_ids": "Pass smaller positions",
    "labels": "Pass class indices, or -100 for what is to be left out",
}


def check_ids(ids: np.ndarray, size: int, field: str) -> None:
    """Checks that ids can be looked up in a table, where their values are known.

    Args:
        ids: Integers, in any shape.
        size: Rows of the table.
        field: What they are called: input_ids, position_ids or labels.

    Raises:
        TypeError: They are not integers.
        ValueError: Some are outside the table.
    """
    check_integers(ids, field)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or (ids.size and high >= size):
        raise outside(field, low, high, size)


def outside(field: str, low: int, high: int, size: int) -> Exception:
    """Builds the error for ids outside a table."""
    return bad_input(f"{field} must lie in [0, {size})", f"values from {low} to {high}", _FIXES[field], shown=True)


def check_integers(ids: Any, field: str) -> None:
    """Checks the dtype of ids, an array or tensor of any framework.

    Raises:
        TypeError: It is not one of integers.
    """
    if not _is_integer(ids):
        raise bad_input(f"{field} must be integers", _dtype(ids), "Pass int32 or int64", TypeError, shown=True)


def loss_kind(labels: Any, logits: Any, config: CLIPConfig) -> str:
    """Returns what loss the labels of `CLIPForImageClassification` ask for, and checks their shape and dtype.

    Axes of length 1 do not count. Where a size is not known before the call, the shape is not checked.

    Args:
        labels: Array or tensor of any framework.
        logits: (batch, num_labels), likewise.
        config: Its ``problem_type`` is the answer; without one, a single label means squares, integers mean
            cross-entropy, and numbers one binary question for each label.

    Raises:
        TypeError: Class indices are not integers.
        ValueError: The shape does not fit, or there is no such problem type.
    """
    kind = config.problem_type or (
        "regression"
        if config.num_labels == 1
        else "single_label_classification"
        if _is_integer(labels)
        else "multi_label_classification"
    )
    single = kind == "single_label_classification"
    expected = tuple(logits.shape)[:1] if single else tuple(logits.shape)
    if not _fits(labels.shape, expected):
        shape = f"({', '.join(map(str, expected))}{',' if single else ''})"
        raise bad_input(
            f"labels must have the shape {shape} for {kind}", _shape(labels), "Pass labels of that shape", shown=True
        )
    if single:
        check_integers(labels, "labels")
    return kind


def not_square(texts: int, images: int) -> Exception:
    """Builds the error for a contrastive loss over unequal numbers of texts and images."""
    return bad_input(
        "return_loss=True needs one text for each image",
        f"{texts} texts and {images} images",
        "Pass matching pairs",
        shown=True,
    )


def config_of(model: str, expected: type[ConfigT], received: Any) -> ConfigT:
    """Returns the config that a model is built from: as it is, or rebuilt from transformers' own of the same kind.

    Args:
        model: The model's class, for the message.
        expected: The class of its config.
        received: What the caller passed.

    Raises:
        TypeError: It is something else.
        ValueError: It has an impossible value.
    """
    if isinstance(received, expected):
        return received
    if getattr(received, "model_type", None) == expected.model_type and hasattr(received, "to_dict"):
        attention = getattr(received, "_attn_implementation", None)
        return expected.from_dict(received.to_dict(), attn_implementation=attention)
    raise bad_input(
        f"{model} is built from a {expected.__name__}",
        type(received).__name__,
        f"Pass a {expected.__name__}, or load a checkpoint with {model}.from_pretrained",
        TypeError,
        shown=True,
    )


ATTENTIONS_NEED_EAGER = (
    "output_attentions=True needs attn_implementation='eager', because fused attention never forms the weights; "
    "this call computes attention eagerly. Load with attn_implementation='eager' to do so always."
)


def _array(values: Any, field: str) -> Any:
    if np.ma.is_masked(values):
        rule = f"{field} must have a value everywhere"
        raise bad_input(rule, "an array with masked values", "Pass its filled(...)", shown=True)
    return values if values is None else np.asarray(values)


def _numbers(array: np.ndarray, field: str, dtype: type[np.generic]) -> np.ndarray:
    if not np.can_cast(array.dtype, np.float64, "same_kind"):  # those of ml_dtypes are no np.number
        fix = f"Pass {np.dtype(dtype).name}"
        raise bad_input(f"{field} must be real numbers", _dtype(array), fix, TypeError, shown=True)
    with np.errstate(over="ignore"):  # the pipeline reports infinity
        return np.ascontiguousarray(array, dtype)


def _dtype(array: Any) -> str:
    return getattr(array.dtype, "name", None) or str(array.dtype).removeprefix("torch.")


def _is_integer(array: Any) -> bool:
    return _dtype(array).startswith(("int", "uint"))


def _fits(shape: Any, expected: tuple[int | None, ...]) -> bool:
    """Whether two shapes are the same except for axes of length 1, as far as that is known before the call."""
    if getattr(shape, "rank", 0) is None or None in (*shape, *expected):
        return True
    return [size for size in shape if size != 1] == [size for size in expected if size != 1]


def _shape(array: Any) -> str:
    return f"({', '.join(str(size) for size in array.shape)}{',' if len(array.shape) == 1 else ''})"


def _matches(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(shape) == len(other) and all(a == b or a is None or b is None for a, b in zip(shape, other, strict=True))
