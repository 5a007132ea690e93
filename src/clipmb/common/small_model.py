"""The small model that comes with the package: where it is, what it knows, and images it was not trained on.

It knows emoji and images like them. data/emoji/README.md says how it was made and how good it is.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from PIL import Image

TEMPLATES = ("an emoji of {}",)  # the best of its training captions on images kept from training
HELD_OUT_SIZE = 64  # pixels of a side
_COLUMNS = 20


def small_model() -> Path:
    """Returns the folder of the checkpoint, for every ``from_pretrained``."""
    return Path(str(resources.files("clipmb").joinpath("data", "emoji")))


def small_labels() -> list[str]:
    """Returns the names of all Unicode emoji, without skin tones: everything the model was trained to recognise."""
    return json.loads((small_model() / "labels.json").read_text("utf-8"))


def held_out_pictures() -> tuple[list[Image.Image], list[str]]:
    """Returns emoji by an artist whom the model never saw in training, on white, and their labels.

    They are from Twemoji (CC-BY 4.0: LICENSE-pictures.md beside them).
    """
    labels = json.loads((small_model() / "held_out.json").read_text("utf-8"))
    with Image.open(small_model() / "held_out.png") as sheet:
        whole = sheet.convert("RGB")
    size = HELD_OUT_SIZE
    corners = [(i % _COLUMNS * size, i // _COLUMNS * size) for i in range(len(labels))]
    return [whole.crop((left, top, left + size, top + size)) for left, top in corners], labels
