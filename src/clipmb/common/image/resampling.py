"""Resizing of 8-bit images with the bits of Pillow, by a compiled kernel where it was built.

The kernel computes only the part of the image that a crop keeps, and can write it through a table of floats. It
serves where its bits are those of the installed Pillow, which is tried out on small images at first use.

Source: the order of the passes is that of Pillow 11 and 12.0 (always horizontal first), of 12.2 (pull request 9524) and
of 13.0 (pull request 9549).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from PIL import Image

from clipmb.common.errors import bad_input, logger, one_of

_resize: Any = None
with contextlib.suppress(ImportError):  # there was no compiler at installation
    _resize = importlib.import_module("clipmb.common.image._resize")

BACKENDS = ("auto", "pillow", "native")
ORDERS = ("installed", "horizontal")
FILTERS = range(6)  # of Pillow, which the kernel has
MOST = 1 << 24  # pixels of a side that the kernel takes

# Whether the vertical pass comes first, from (width, height) before and after.
Rule = Callable[[tuple[int, int], tuple[int, int]], bool]
_RULES: dict[str, Rule] = {
    "horizontal first": lambda size, target: False,
    "vertical first from 100 times as tall as wide": lambda size, target: (
        size[1] > 100 * size[0] and target[1] < size[1]
    ),
    "vertical first where it makes fewer pixels": lambda size, target: (
        target[1] < size[1] and size[1] - target[1] > 2 * (size[0] - target[0])
    ),
}
_FIXED = _RULES["horizontal first"]
_CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
_STRIP = 1 << 23  # bytes of an image that is read in parts
_REACH = 4.0  # more input pixels than any filter looks at to either side, in units of its scale


def check_backend(backend: Any) -> str:
    """Returns the name of a resize backend.

    Raises:
        ValueError: There is no such backend, or it is "native" and the kernel was not compiled.
    """
    if backend not in BACKENDS:
        raise one_of("resize_backend", backend, BACKENDS)
    if backend == "native" and _resize is None:
        raise bad_input(
            'resize_backend="native" needs the compiled kernel', "an installation without it",
            "Install clipmb where there is a C compiler, or pass 'auto'", shown=True,
        )  # fmt: skip
    return backend


def check_order(order: Any) -> str:
    """Returns the name of a pass order; raises ValueError for anything else."""
    if order not in ORDERS:
        raise one_of("pass_order", order, ORDERS)
    return order


@functools.cache
def installed_rule() -> str | None:
    """Returns the pass order of the installed Pillow by its name in the rules; None where the kernel does not serve."""
    if _resize is None:
        logger.info("Images are resized by Pillow: the faster kernel was not compiled at installation.")
        return None
    probes = list(_probes())
    for name, rule in _RULES.items():
        if all(_agrees(rule, *probe) for probe in probes):
            return name
    logger.warning("Images are resized by Pillow %s: the faster kernel has other bits.", Image.__version__)
    return None


def serves(sizes: tuple[int, ...], resample: int) -> bool:
    """Whether the kernel takes images with these sides, and has one of Pillow's filters."""
    return max(sizes) <= MOST and resample in FILTERS


def rule_of(backend: str, order: str) -> Rule | None:
    """Returns the pass order in which the kernel resizes; None where Pillow does it."""
    if backend == "pillow" or ((installed := installed_rule()) is None and backend != "native"):
        return None
    return _FIXED if order == "horizontal" or installed is None else _RULES[installed]


@functools.cache
def rule_name(order: str) -> str:
    """Returns the name of the rule by which images are resized in an order, by the kernel or by Pillow.

    Args:
        order: One of ``ORDERS``.

    Raises:
        ValueError: The installed Pillow follows none of the rules.
    """
    if order == "horizontal":
        return next(iter(_RULES))
    for name, rule in _RULES.items():
        if name == installed_rule() or all(_follows(rule, *probe[:3]) for probe in _probes() if probe[3] is None):
            return name
    raise bad_input(
        'pass_order="installed" needs a Pillow of which the order is known', Image.__version__,
        'Pass pass_order="horizontal"',
    )  # fmt: skip


def resize_pillow(
    image: Image.Image,
    target: tuple[int, int],
    resample: int,
    order: str,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Resizes with Pillow.

    Args:
        image: An image of any mode.
        target: (width, height) of the result.
        resample: Pillow's filter.
        order: "installed", or "horizontal" for the same bits with every version of Pillow.
        box: The part of the image to resize, (left, top, right, bottom) in pixels; all of it when None.
    """
    filter_ = cast(Image.Resampling, resample)
    left, top, right, bottom = box or (0, 0, *image.size)
    if order == "installed" or resample == Image.Resampling.NEAREST or image.mode in ("1", "P"):
        return image.resize(target, filter_, box=box)
    if image.size == target and (left, top, right, bottom) == (0, 0, *target):
        return image.copy()
    opaque = {"LA": "La", "RGBA": "RGBa"}.get(image.mode)
    work = image.convert(opaque) if opaque else image
    work = work.resize((target[0], image.height), filter_, box=(left, 0, right, image.height))
    work = work.resize(target, filter_, box=(0, top, target[0], bottom))
    return work.convert(image.mode) if opaque else work


def resize_image(
    image: Image.Image | np.ndarray,
    target: tuple[int, int],
    resample: int,
    backend: str,
    order: str,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """Resizes an image, or a part of it, by the kernel where it serves.

    Args:
        image: An image of any mode, or the pixels of one in RGB, [height, width, 3] uint8.
        target: (width, height) of the result.
        resample: Pillow's filter.
        backend: One of ``BACKENDS``.
        order: One of ``ORDERS``.
        box: The part of the image to resize, (left, top, right, bottom) in pixels; all of it when None.
    """
    known = isinstance(image, np.ndarray) or image.mode in _CHANNELS
    rule = rule_of(backend, order) if known and serves((*size_of(image), *target), resample) else None
    if rule is None:
        return resize_pillow(as_image(image), target, resample, order, box)
    pixels = Window(image, target, resample, rule, box=box).pixels().transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def as_image(picture: Image.Image | np.ndarray) -> Image.Image:
    """Returns an image, or pixels, [height, width, 3] uint8, as a Pillow image."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)


def size_of(picture: Image.Image | np.ndarray) -> tuple[int, int]:
    """Returns the (width, height) of an image, or of pixels, [height, width, channels]."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


class Window:
    """A part of a resized image, which the kernel computes where it is wanted.

    Args:
        picture: A Pillow image of mode L, LA, RGB or RGBA, or [height, width, channels] uint8 with 1 to 4 channels, of
            which the second or fourth is the opacity.
        target: (width, height) of the whole result.
        resample: Pillow's filter.
        rule: The order of the passes.
        window: (left, top, width, height) of the part of the result; all of it when None.
        box: The part of the image that is resized, (left, top, right, bottom); all of it when None.

    Attributes:
        shape: (channels, height, width) of the part.
    """

    def __init__(
        self,
        picture: Image.Image | np.ndarray,
        target: tuple[int, int],
        resample: int,
        rule: Rule,
        window: tuple[int, int, int, int] | None = None,
        box: tuple[float, float, float, float] | None = None,
    ) -> None:
        self._size = size_of(picture)
        channels = _CHANNELS[picture.mode] if isinstance(picture, Image.Image) else picture.shape[2]
        self._picture, self._target, self._resample = picture, target, int(resample)
        self._window = window or (0, 0, *target)
        self._box = box or (0.0, 0.0, float(self._size[0]), float(self._size[1]))
        self._vertical_first = rule(self._size, target)
        self.shape = (channels, self._window[3], self._window[2])

    def pixels(self) -> np.ndarray:
        """Returns the part, [channels, height, width] uint8, with the channels side by side in memory."""
        channels, height, width = self.shape
        out = np.empty((height, width, channels), np.uint8)
        self._compute(out, None, False)
        return out.transpose(2, 0, 1)

    def write(self, out: np.ndarray, table: np.ndarray, planar: bool) -> None:
        """Writes the part through a table.

        Args:
            out: Contiguous float32; [channels, height, width] if ``planar``, else [height, width, channels].
            table: [channels, 256] float32, contiguous.
            planar: Which of the two layouts ``out`` has.
        """
        self._compute(out, table, planar)

    def _compute(self, out: np.ndarray, table: np.ndarray | None, planar: bool) -> None:
        picture = self._picture
        if isinstance(picture, Image.Image):
            found = _lent(picture)
            if found is None and picture.mode in ("L", "RGB") and self._box == (0, 0, *self._size):
                row, rows = self._size[::-1] if self._vertical_first else self._size
                step = max(1, _STRIP // (4 * row))
                if step < rows and hasattr(picture, "__arrow_c_array__"):
                    self._in_strips(picture, step, out, table, planar)
                    return
            source, pixel = found or (np.asarray(picture), self.shape[0])
        else:
            source, pixel = np.ascontiguousarray(picture), self.shape[0]
        _kernel(
            source, self._size, pixel, self.shape[0], self._target, self._resample, self._box, self._window,
            self._vertical_first, out, table, planar,
        )  # fmt: skip

    def _in_strips(
        self, picture: Image.Image, step: int, out: np.ndarray, table: np.ndarray | None, planar: bool
    ) -> None:
        """Resizes a large image, whose pixels Pillow keeps in several places: the first pass part by part.

        A pass that keeps a size changes nothing, so that each call of the kernel makes one pass.
        """
        (wide, tall), (left, top, width, height) = self._size, self._window
        channels, target = self.shape[0], self._target
        if self._vertical_first:
            middle = np.empty((height, wide, channels), np.uint8)
            for start, end in _parts(left, width, target[0], wide, step):
                part = Window(
                    picture.crop((start, 0, end, tall)), (end - start, target[1]), self._resample, _FIXED,
                    (0, top, end - start, height),
                )  # fmt: skip
                middle[:, start:end] = part.pixels().transpose(1, 2, 0)
            _kernel(
                middle, (wide, height), channels, channels, (target[0], height), self._resample,
                (0, 0, wide, height), (left, 0, width, height), False, out, table, planar,
            )  # fmt: skip
            return
        middle = np.empty((tall, width, channels), np.uint8)
        for start, end in _parts(top, height, target[1], tall, step):
            part = Window(
                picture.crop((0, start, wide, end)), (target[0], end - start), self._resample, _FIXED,
                (left, 0, width, end - start),
            )  # fmt: skip
            part._compute(middle[start:end], None, False)
        _kernel(
            middle, (width, tall), channels, channels, (width, target[1]), self._resample,
            (0, 0, width, tall), (0, top, width, height), False, out, table, planar,
        )  # fmt: skip


def _kernel(
    source: Any,
    size: tuple[int, int],
    pixel: int,
    channels: int,
    target: tuple[int, int],
    resample: int,
    box: tuple[float, float, float, float],
    window: tuple[int, int, int, int],
    vertical_first: bool,
    out: np.ndarray,
    table: np.ndarray | None,
    planar: bool,
) -> None:
    _resize.resize(
        source, size, pixel, channels, target, resample, box, window, vertical_first, out, table, planar, True
    )


def _lent(picture: Image.Image) -> tuple[Any, int] | None:
    """Returns an image's own memory and the bytes of a pixel; None where Pillow does not lend it in one piece."""
    if picture.mode == "LA" or not hasattr(picture, "__arrow_c_array__"):
        return None
    try:
        return picture.__arrow_c_array__(), 1 if picture.mode == "L" else 4
    except ValueError:
        return None


def _parts(first: int, count: int, target: int, size: int, step: int) -> list[tuple[int, int]]:
    """Divides the inputs of the outputs [first, first + count) of an axis into parts of at most ``step``."""
    scale = size / target
    reach = _REACH * max(scale, 1.0)
    start = max(0, int((first + 0.5) * scale - reach))
    end = min(size, int((first + count - 0.5) * scale + reach) + 1)
    return [(at, min(at + step, end)) for at in range(start, end, step)]


def _probes() -> list[tuple[Image.Image, tuple[int, int], int, tuple[float, float, float, float] | None]]:
    """Returns small images, targets, filters and boxes, by which the kernel and the pass orders differ."""
    numbers = np.random.Philox(0)
    found = []
    for mode, channels in (("RGB", 3), ("L", 1), ("RGBA", 4)):
        for size, target in (
            ((61, 47), (29, 22)), ((47, 61), (22, 29)), ((11, 9), (40, 33)), ((40, 90), (18, 30)), ((3, 320), (2, 30)),
        ):  # fmt: skip
            raw = numbers.random_raw(-(-size[0] * size[1] * channels // 8)).tobytes()
            image = Image.frombytes(mode, size, raw[: size[0] * size[1] * channels])
            filters = range(6) if mode == "RGB" else (Image.Resampling.BICUBIC,)
            found += [(image, target, int(resample), None) for resample in filters]
            found.append((image, target, int(Image.Resampling.BICUBIC), (0.25, 1.5, size[0] - 0.75, size[1] - 1.0)))
    return found


def _agrees(
    rule: Rule,
    image: Image.Image,
    target: tuple[int, int],
    resample: int,
    box: tuple[float, float, float, float] | None,
) -> bool:
    ours = Window(image, target, resample, rule, box=box).pixels()
    theirs = np.asarray(image.resize(target, cast(Image.Resampling, resample), box=box))
    return np.array_equal(ours.transpose(1, 2, 0), theirs.reshape(ours.shape[1], ours.shape[2], ours.shape[0]))


def _follows(rule: Rule, image: Image.Image, target: tuple[int, int], resample: int) -> bool:
    """Whether Pillow's two passes are those of two resizes, in the order of a rule."""
    if resample == Image.Resampling.NEAREST or image.mode == "RGBA":
        return True
    filter_ = cast(Image.Resampling, resample)
    middle = (image.width, target[1]) if rule(image.size, target) else (target[0], image.height)
    stepwise = image.resize(middle, filter_).resize(target, filter_)
    return np.array_equal(np.asarray(stepwise), np.asarray(image.resize(target, filter_)))
