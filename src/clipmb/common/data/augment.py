"""Random changes to training pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]


def random_resized_crop(
    image: Image.Image,
    generator: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Cuts a random part out of a picture and resizes it, bicubic.

    Area and the logarithm of the ratio are uniform; after ten parts that do not fit into the picture it is the largest
    one around the centre whose ratio is allowed. Resizing looks at the pixels beside the part too, as Pillow does.

    Args:
        image: RGB.
        generator: Where the random numbers come from.
        size: (height, width) of the result.
        scale: The least and the largest share of the picture's area; open_clip's default.
        ratio: The least and the largest width / height.

    Source: "Going Deeper with Convolutions" (Szegedy et al., arXiv 1409.4842), section 6.
    """
    width, height = image.size
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
    box = (left, top, left + wide, top + tall)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
