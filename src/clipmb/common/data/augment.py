"""Random changes to training images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from clipmb.common.image.resampling import resize_image, size_of

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


def random_resized_crop(
    image: Image.Image | np.ndarray,
    generator: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    resize_backend: str = "auto",
    pass_order: str = "installed",
) -> Image.Image:
    """Cuts a random part out of an image and resizes it with Pillow's bicubic filter.

    The filter also reads the pixels next to the part, as it does in Pillow.

    Args:
        image: RGB, or its pixels, [height, width, 3] uint8.
        generator: Source of the random numbers.
        size: (height, width) of the result, in pixels.
        scale: As in `random_part`.
        ratio: As in `random_part`.
        resize_backend: As in `CLIPImageProcessor`.
        pass_order: As in `CLIPImageProcessor`.

    Returns:
        The part, RGB, of the size asked for.

    Source: "Going Deeper with Convolutions" (Szegedy et al., arXiv 1409.4842), section 6.
    """
    box = random_part(size_of(image), generator, scale, ratio)
    return resize_image(image, (size[1], size[0]), Image.Resampling.BICUBIC, resize_backend, pass_order, box)


def random_part(
    picture: tuple[int, int],
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws a part of an image: its share of the area and the logarithm of its ratio are uniform.

    After ten parts that are larger than the image, it is the largest central part with an allowed ratio.

    Args:
        picture: (width, height) of the image, in pixels.
        generator: Source of the random numbers.
        scale: Smallest and largest share of the image's area. The default is open_clip's.
        ratio: Smallest and largest width / height.

    Returns:
        (left, top, right, bottom) of the part, in pixels.
    """
    width, height = picture
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * generator.random())
        low, high = math.log(ratio[0]), math.log(ratio[1])
        wanted = math.exp(low + (high - low) * generator.random())
        wide, tall = round(math.sqrt(area * wanted)), round(math.sqrt(area / wanted))
        if 0 < wide <= width and 0 < tall <= height:
            left = int(generator.random() * (width - wide + 1))
            top = int(generator.random() * (height - tall + 1))
            break
    else:
        wide = min(width, max(round(height * ratio[1]), 1))
        tall = min(height, max(round(width / ratio[0]), 1))
        left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall
