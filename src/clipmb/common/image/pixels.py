"""One image at a time: reading, layout, geometry and values, on [channels, height, width] arrays.

Source: the arithmetic follows ``image_transforms`` of transformers 4.57.6, operation by operation, because the results
are equal to the bit.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clipmb.common.errors import bad_input, log_once, one_of
from clipmb.common.features import to_numpy
from clipmb.common.image.jpeg import decode_jpeg
from clipmb.common.image.resampling import Window, resize_pillow, rule_of, serves, size_of

FIRST, LAST = "channels_first", "channels_last"
_STRAIGHT = {"La": "LA"}  # modes that Pillow cannot convert to RGB directly


# ---- reading ---------------------------------------------------------------------------------------------------------


def flatten(images: Any) -> list[Any]:
    """Flattens lists and batches into single images, in order."""
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten(entry)]
    if is_array(images) and len(images.shape) == 4:
        return list(to_numpy(images))
    return [images]


def is_array(item: Any) -> bool:
    """Whether this is an array or a tensor of any framework."""
    return hasattr(item, "shape") and hasattr(item, "dtype")


def read_image(name: str, source: str | os.PathLike[str] | bytes) -> Image.Image | np.ndarray:
    """Reads an image and turns it upright by its EXIF orientation.

    Args:
        name: What it is called in messages.
        source: The path of a file, the bytes of one, or a base64 string.

    Returns:
        The image in RGB: [height, width, 3] uint8 where it was decoded without Pillow, else a Pillow image.

    Raises:
        ValueError: It is remote, missing, broken, or a decompression bomb.
    """
    file: Any = source
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        raise bad_input(f"{name} must be local; nothing is downloaded", source, "Download the file and pass its path")
    elif isinstance(source, str) and not os.path.isfile(source):
        text = source.partition(",")[2] if source.startswith("data:image/") else source
        try:
            file = io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
        except (binascii.Error, ValueError):
            raise bad_input(
                f"{name} must be an existing file or base64", source, "Correct the path; pass files, not folders"
            ) from None
    elif os.path.exists(source) and not os.path.isfile(source):  # opening a pipe would wait for a writer
        raise bad_input(f"{name} must be a file", str(source), "Pass a file, not a folder, pipe or device", shown=True)
    with _readable(name, source), Image.open(file) as image:
        _check_pixels(image.size)
        if (pixels := decode_jpeg(image)) is not None:
            return pixels
        ImageOps.exif_transpose(image, in_place=True)
        return image.convert("RGB")


def decode(name: str, image: Image.Image, rgb: bool) -> Image.Image:
    """Decodes a Pillow image that was only opened; converts it to RGB when ``rgb`` is set."""
    with _readable(name, image):
        if pending(image):
            _check_pixels(image.size)
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if rgb and image.mode != "RGB":
            straight = image.convert(_STRAIGHT[image.mode]) if image.mode in _STRAIGHT else image
            return straight.convert("RGB")
        image.load()
    return image


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")  # of an object in memory, which says nothing


@contextlib.contextmanager
def _readable(name: str, source: Any) -> Iterator[None]:
    """Turns everything that Pillow raises for a broken image into ValueError."""
    try:
        yield
    except Exception as error:
        bomb = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
        shown = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)[:80]
        raise bad_input(
            f"{name} must {'be of a reasonable size' if bomb else 'be a readable image'}",
            f"{shown} ({type(error).__name__}: {_ADDRESS.sub('', str(error))[:110]})",
            "Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it" if bomb else "Replace the image or leave it out",
            shown=True,
        ) from error


def _check_pixels(size: tuple[int, int], tolerance: int = 1) -> None:
    """Refuses images that would take absurd amounts of memory. Pillow only warns up to twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit * tolerance:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels exceed the limit of {limit * tolerance}")


def pending(image: Any) -> bool:
    """Whether a Pillow image is opened but not yet decoded."""
    return isinstance(image, Image.Image) and bool(getattr(image, "tile", None))


def to_array(name: str, item: Any) -> np.ndarray:
    """Converts an array or tensor of any framework to numpy, and checks that it can be an image."""
    if not (is_array(item) or isinstance(item, Image.Image)):
        raise bad_input(
            f"{name} must be a Pillow image, an array, a path or base64",
            f"a {type(item).__name__}, {item!r}",
            "Pass one of these, or a list of them",
            TypeError,
            shown=True,
        )
    array = np.asarray(item) if isinstance(item, Image.Image) else to_numpy(item)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "biuf":
        raise bad_input(
            f"{name} must have three non-empty axes of numbers: height, width and channels, or channels first",
            f"shape {array.shape}, dtype {array.dtype}",
            "Repeat a grey image along a channel axis, or pass a Pillow image, which is converted",
            shown=True,
        )
    return array


def infer(name: str, shape: tuple[int, ...], ambiguous: str) -> str:
    """Infers an array's layout from an axis of 1 or 3 channels; ``ambiguous`` is the answer when two fit."""
    first, last = shape[0] in (1, 3), shape[2] in (1, 3)
    if first and last:
        log_once(f"An array of shape {shape} is read as {ambiguous}. If this is wrong, pass input_data_format=.")
        return ambiguous
    if not first and not last:
        raise bad_input(
            f"{name} must have 1 or 3 channels, on its first or last axis",
            f"shape {shape}",
            'Drop an alpha channel, or pass input_data_format="channels_first" or "channels_last"',
            shown=True,
        )
    return FIRST if first else LAST


def layout_of_first(item: Any) -> str:
    """The layout of ambiguous arrays in a call: that of its first image, or channels first."""
    if not is_array(item):
        return LAST
    return LAST if len(item.shape) == 3 and item.shape[0] not in (1, 3) else FIRST


def is_scaled(array: np.ndarray) -> bool:
    """Whether the values look as if they had been divided by 255 already."""
    return array.dtype != np.uint8 and bool(array.min() >= 0 and array.max() <= 1)


# ---- geometry: [channels, height, width] in and out ------------------------------------------------------------------


@dataclass(frozen=True)
class Resizing:
    """How images are resized and cropped.

    Attributes:
        resample: Pillow's filter.
        backend: One of `resampling.BACKENDS`.
        order: One of `resampling.ORDERS`.
        crop: (height, width) to which the result is cut or padded around its centre; None for all of it.
    """

    resample: int
    backend: str = "auto"
    order: str = "installed"
    crop: tuple[int, int] | None = None

    def __call__(self, name: str, picture: Image.Image | np.ndarray, target: tuple[int, int]) -> np.ndarray | Window:
        """Resizes to (height, width), and crops.

        Args:
            name: What the image is called in messages.
            picture: A Pillow image, or [height, width, channels] uint8 with 1 to 4 channels.
            target: (height, width) of the result before it is cropped.

        Returns:
            [channels, height, width], or a window of this shape that is yet to be computed.

        Raises:
            ValueError: The result has too many pixels.
        """
        height, width = target
        size = size_of(picture)
        with _readable(name, picture):
            _check_pixels((width, height), tolerance=2)  # a sliver of one pixel by thousands grows by its square
            kernel = rule_of(self.backend, self.order) if serves((*size, width, height), self.resample) else None
            if kernel is not None:
                window = self._window(height, width)
                part = Window(picture, (width, height), self.resample, kernel, window)
                return part if window or self.crop is None else crop(part.pixels(), *self.crop)
            if size != (width, height) or isinstance(picture, Image.Image):
                image = picture if isinstance(picture, Image.Image) else _image(picture.transpose(2, 0, 1))
                picture = np.asarray(resize_pillow(image, (width, height), self.resample, self.order))
        pixels = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
        return pixels if self.crop is None else crop(pixels, *self.crop)

    def _window(self, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Returns (left, top, width, height) of what the crop keeps; None when it keeps or pads everything."""
        if self.crop is None or self.crop[0] > height or self.crop[1] > width:
            return None
        return (width - self.crop[1]) // 2, (height - self.crop[0]) // 2, self.crop[1], self.crop[0]


def resize(
    name: str, pixels: np.ndarray, target: tuple[int, int], resizing: Resizing
) -> tuple[np.ndarray | Window, bool]:
    """Resizes and crops 8-bit values, or values that can be converted to 8 bits.

    Args:
        name: What the image is called in messages.
        pixels: [channels, height, width], at most 4 channels.
        target: (height, width) of the result before it is cropped.
        resizing: How.

    Returns:
        The resized values, [channels, height, width] uint8, perhaps yet to be computed; and whether they represent
        floats in [0, 1].

    Raises:
        ValueError: There are too many channels or pixels, or the values have no 8-bit form.
    """
    if len(pixels) > 4:
        raise bad_input(
            f"{name} must have at most 4 channels to be resized",
            f"{len(pixels)} channels",
            "Pass do_resize=False, or another input_data_format",
            shown=True,
        )
    pixels, quantised = _to_8_bit(name, pixels)
    rows = pixels.transpose(1, 2, 0)
    return resizing(name, rows if rows.flags.c_contiguous else _image(pixels), target), quantised


def _image(pixels: np.ndarray) -> Image.Image:
    """Makes a Pillow image of [channels, height, width] uint8 with 1 to 4 channels."""
    rows = pixels.transpose(1, 2, 0)
    if len(pixels) > 1 and rows.flags.c_contiguous:
        return Image.fromarray(rows)
    planes = [Image.fromarray(plane) for plane in pixels]  # Pillow interleaves planes faster than numpy does
    return planes[0] if len(planes) == 1 else Image.merge(("LA", "RGB", "RGBA")[len(planes) - 2], planes)


def _to_8_bit(name: str, pixels: np.ndarray) -> tuple[np.ndarray, bool]:
    """Casts integral values in [0, 255] to uint8; multiplies values in [0, 1] by 255 first, and truncates."""
    if pixels.dtype == np.uint8:
        return pixels, False
    low, high = pixels.min(), pixels.max()
    if low >= 0 and high <= 255:  # also False for not-a-number
        cut = pixels.astype(np.uint8)
        if pixels.dtype.kind in "biu" or _is_integral(pixels, cut):
            return cut, False
        if high <= 1:
            # Up to 32 bits, the float32 product is the rounded float64 product that `rescale` would give.
            small = pixels.dtype.itemsize <= 4
            scaled = pixels.astype(np.float32, copy=False) * np.float32(255) if small else rescale(pixels, 255)
            return scaled.astype(np.uint8), True
    raise bad_input(
        f"{name} must hold integers in [0, 255] or floats in [0, 1] to be resized, which is done in 8 bits",
        f"{pixels.dtype} values in [{low}, {high}]",
        "Round or rescale them, or resize them yourself and pass do_resize=False",
        shown=True,
    )


def _is_integral(pixels: np.ndarray, cut: np.ndarray) -> bool:
    """Whether all values are as near to ``cut``, their integral parts, as numpy.allclose allows; cheap tests first."""
    if np.array_equal(pixels, cut):
        return True
    middle = np.s_[:, pixels.shape[1] // 2]
    return all(np.allclose(pixels[part], cut[part].astype(int)) for part in (middle, np.s_[:]))


def crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cuts or zero-pads around the centre. With an odd remainder, the larger part is cut after, and padded before."""
    tops, lefts = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2  # negative: how much to pad
    cut = pixels[:, max(tops, 0) : max(tops, 0) + height, max(lefts, 0) : max(lefts, 0) + width]
    if cut.shape[1:] == (height, width):
        return cut
    padded = np.zeros((len(pixels), height, width), pixels.dtype)
    top, left = max(-tops, 0), max(-lefts, 0)
    padded[:, top : top + cut.shape[1], left : left + cut.shape[2]] = cut
    return padded


# ---- values: every operation and its precision is the reference's ----------------------------------------------------


def rescale(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies in float64; returns float32."""
    return (pixels.astype(np.float64) * factor).astype(np.float32)


def normalize(pixels: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """Computes (pixels - mean) / std for [channels, …] in the pixels' floating type, or float32."""
    if not np.issubdtype(pixels.dtype, np.floating):
        pixels = pixels.astype(np.float32)
    means, stds = (np.array(values, pixels.dtype).reshape(-1, 1, 1) for values in (mean, std))
    return (pixels - means) / stds


def check_channels(name: str, channels: int, mean: Any, std: Any) -> None:
    """Raises ValueError unless there is one mean and one deviation for each channel."""
    for field, values in (("image_mean", mean), ("image_std", std)):
        if isinstance(values, tuple) and len(values) != channels:
            raise bad_input(
                f"{name} must have as many channels as {field} has numbers, {len(values)}",
                f"{channels} channels",
                f"Convert the image (a grey array: np.repeat along the channel axis), or pass another {field}",
                shown=True,
            )


def arithmetic(pixels: np.ndarray, factor: float | None, mean: Any, std: Any) -> np.ndarray:
    """Rescales unless ``factor`` is None, and normalises unless ``mean`` is None. Always returns a new array."""
    if factor is not None:
        pixels = rescale(pixels, factor)
    return pixels.copy() if mean is None else normalize(pixels, mean, std)


@functools.lru_cache(maxsize=64)
def lookup_table(channels: int, quantised: bool, factor: float | None, mean: Any, std: Any) -> np.ndarray:
    """Returns the rescaled and normalised value of each 8-bit value in each channel.

    Args:
        channels: Number of channels.
        quantised: Divide by 255 first: the values represent floats in [0, 1].
        factor: As in `arithmetic`.
        mean: As in `arithmetic`.
        std: As in `arithmetic`.

    Returns:
        [channels, 256], float32, or uint8 when there is nothing to compute; read-only.
    """
    values = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 1, 256))
    table = arithmetic(rescale(values, 1 / 255) if quantised else values, factor, mean, std)
    table = np.ascontiguousarray(table.reshape(channels, 256))
    table.flags.writeable = False
    return table


def check_layout(field: str, layout: Any) -> str | None:
    """Returns the name of a layout, or None; raises ValueError for anything else."""
    layout = getattr(layout, "value", layout)  # transformers has an enum of them
    if layout not in (FIRST, LAST, None):
        raise one_of(field, layout, (FIRST, LAST, None))
    return layout


def in_layout(
    image: Any, data_format: str | None, input_data_format: str | None, work: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Runs ``work`` on one array as [channels, height, width]; returns its result in ``data_format``."""
    array = to_array("The image", image)
    layout = check_layout("input_data_format", input_data_format) or infer("The image", array.shape, FIRST)
    done = work(array if layout == FIRST else array.transpose(2, 0, 1))
    return done if (check_layout("data_format", data_format) or layout) == FIRST else done.transpose(1, 2, 0)
