"""Plain JPEG files, decoded by simplejpeg where it is installed: faster than by Pillow, with the same bits.

Pillow still reads every header, and decodes what is not plain: other color spaces, and files with any fault, of which
it keeps what it can or says what is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from clipmb.common.errors import logger

simplejpeg: Any = None
with contextlib.suppress(ImportError):
    simplejpeg = importlib.import_module("simplejpeg")

_PLAIN = ("YCbCr", "Gray")
_MOST_BYTES = 4  # of a file for each of its pixels, beside _SMALL; what is larger holds something else
_SMALL = 1 << 20


def decode_jpeg(image: Image.Image) -> np.ndarray | None:
    """Decodes the file of an image that Pillow has opened, and turns it upright by its EXIF orientation.

    Args:
        image: The opened image, which is not loaded yet, and is not afterwards.

    Returns:
        [height, width, 3] uint8, in RGB: the bits of Pillow; None where Pillow has to decode it.
    """
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or file is None or not serves():
        return None
    length = file.seek(0, os.SEEK_END)
    if length > _MOST_BYTES * image.width * image.height + _SMALL:
        return None
    file.seek(0)
    pixels = _decoded(file.read())  # Pillow finds its place by itself
    if pixels is None or pixels.shape != (image.height, image.width, 3):
        return None
    return _upright(pixels, image.getexif().get(ExifTags.Base.Orientation))


@functools.cache
def serves() -> bool:
    """Returns whether simplejpeg is installed and has the bits of the installed Pillow on a few images."""
    if simplejpeg is None:
        return False
    try:
        same = all(
            _agrees(*probe) for probe in (("L", 0, False), ("RGB", 0, False), ("RGB", 1, True), ("RGB", 2, False))
        )
    except OSError:  # Pillow without JPEG
        same = False
    if not same:
        logger.warning("JPEG files are decoded by Pillow %s: simplejpeg has other bits.", Image.__version__)
    return same


def _agrees(mode: str, subsampling: int, progressive: bool) -> bool:
    raw = np.random.Philox(0).random_raw(61 * 47).tobytes()
    file = io.BytesIO()
    Image.frombytes(mode, (61, 47), raw[: 61 * 47 * len(mode)]).save(
        file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive
    )
    with Image.open(file) as image:
        pixels = _decoded(file.getvalue())
        return pixels is not None and np.array_equal(pixels, np.asarray(image.convert("RGB")))


def _decoded(content: bytes) -> np.ndarray | None:
    """Decodes a faultless file; None for any other."""
    try:
        if simplejpeg.decode_jpeg_header(content)[2] not in _PLAIN:
            return None
        return simplejpeg.decode_jpeg(content, "RGB")
    except ValueError:  # also for faults that only make libjpeg warn
        return None


def _upright(pixels: np.ndarray, orientation: object) -> np.ndarray:
    """Undoes an orientation, of which 1 is upright, 2 to 4 are mirrored or upside down, and 5 to 8 lie on a side.

    Source: the tag Orientation of EXIF 2.3 and TIFF 6.0.
    """
    if orientation not in (2, 3, 4, 5, 6, 7, 8):
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
