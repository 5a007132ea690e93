"""``clipmb demo``: the small model on images it never saw, with every installed backend, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from clipmb.cli import common

# Chosen before the model was evaluated on them.
SHOWN = (
    "rocket", "panda", "pizza", "violin", "banana", "police car", "honeybee", "volcano",
    "unicorn", "robot", "love letter", "flag: Japan", "Statue of Liberty", "light bulb", "chipmunk", "telescope",
)  # fmt: skip
OTHERS = ("bear", "fox", "cheese wedge", "guitar", "lemon", "taxi", "butterfly", "microscope")
SEARCHES = ("animal", "fruit", "vehicle", "music", "sport", "time")
FOUND = 6  # images per search

_WIDTH, _MARGIN, _CELL, _PICTURE = 1200, 30, 142, 96
_INK, _GREY, _RIGHT, _WRONG = "#1d1d1f", "#6e6e73", "#1a7f37", "#c4320a"


def run(
    backend: common.Backends = None,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="PNG file to draw the results in.")
    ] = "clipmb-demo.png",
) -> None:
    """Classify and search the bundled images with every backend."""
    from clipmb import backends
    from clipmb.common.small_model import TEMPLATES, held_out_pictures, small_model
    from clipmb.pipeline import CLIPPipeline

    names = [name for name in backends.BACKENDS if name in (backend or backends.installed())]
    for name in names or [None]:  # no backend at all is an error too
        common.load_framework(name)
    pictures, truth = held_out_pictures()
    shown = [pictures[truth.index(label)] for label in SHOWN]
    labels = [*SHOWN, *OTHERS]
    typer.echo(
        "Model: 2.2 million parameters, trained on emoji by nine artists; recognises emoji-style images only.\n"
        "Images: emoji by an artist who was not in the training data (Twemoji, CC-BY 4.0).\n"
    )
    probabilities: dict[str, np.ndarray] = {}
    similarities: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}
    for name in names:
        with common.quiet():
            pipeline = CLIPPipeline.from_pretrained(small_model(), backend=name)
            start = time.perf_counter()
            probabilities[name] = pipeline.classify(shown, labels, TEMPLATES)
            similarities[name] = pipeline.encode_text(list(SEARCHES)) @ pipeline.encode_image(pictures).T
            seconds[name] = time.perf_counter() - start
            pipeline.engine.free()
    first = next(iter(probabilities))
    rows = [
        [label, *(_answer(labels, values[i]) for values in probabilities.values())] for i, label in enumerate(SHOWN)
    ]
    common.table(f"Best of {len(labels)} labels", ["image", *probabilities], rows)
    found = (-similarities[first]).argsort(axis=1, kind="stable")[:, :FOUND]
    rows = [[query, ", ".join(truth[i] for i in best)] for query, best in zip(SEARCHES, found, strict=True)]
    common.table(f"Search in {len(pictures)} images ({first})", ["text", "images found, best first"], rows)
    right = sum(labels[values.argmax()] == label for values, label in zip(probabilities[first], SHOWN, strict=True))
    result = [f"{right} of {len(SHOWN)} correct"]
    if len(probabilities) > 1:
        apart = max(_apart(probabilities), _apart(similarities))
        result.append(f"largest difference between {', '.join(probabilities)}: {apart:.1e}")
    result.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    typer.echo("; ".join(result))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw(shown, labels, probabilities[first], pictures, truth, similarities[first], found, result).save(path, "PNG")
    typer.echo(f"Results drawn in {path}")


def _answer(labels: list[str], values: np.ndarray) -> str:
    best = int(values.argmax())
    return f"{labels[best]} {values[best]:.4f}"


def _apart(results: dict[str, np.ndarray]) -> float:
    """Returns the largest difference between any backend's values and the first's."""
    first, *others = results.values()
    return max(float(np.abs(values - first).max()) for values in others)


def _draw(
    shown: list[Image.Image],
    labels: list[str],
    probabilities: np.ndarray,
    pictures: list[Image.Image],
    truth: list[str],
    similarities: np.ndarray,
    found: np.ndarray,
    result: list[str],
) -> Image.Image:
    """Draws the classified images with their labels, and below them each search with the images it found."""
    across = (_WIDTH - 2 * _MARGIN) // _CELL
    rows = -(-len(shown) // across)
    row_height, search_height = _PICTURE + 62, 118
    top = 120
    below = top + rows * row_height + 20
    sheet = Image.new("RGB", (_WIDTH, below + 50 + len(found) * search_height + 50), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_MARGIN, 24), "clipmb demo", 30)
    _write(draw, (_MARGIN, 66), f"Best of {len(labels)} labels. The artist was not in the training data.", 18, _GREY)
    for i, picture in enumerate(shown):
        x, y = _MARGIN + i % across * _CELL, top + i // across * row_height
        sheet.paste(_enlarged(picture, _PICTURE), (x + (_CELL - _PICTURE) // 2, y))
        best = int(probabilities[i].argmax())
        correct = labels[best] == SHOWN[i]
        middle = x + _CELL // 2
        _write(draw, (middle, y + _PICTURE + 6), labels[best], 15, _RIGHT if correct else _WRONG, _CELL - 8)
        caption = f"{100 * probabilities[i, best]:.1f} %" + ("" if correct else f", is: {SHOWN[i]}")
        _write(draw, (middle, y + _PICTURE + 26), caption, 13, _GREY, _CELL - 8)
    draw.line([(_MARGIN, below - 10), (_WIDTH - _MARGIN, below - 10)], "#d2d2d7")
    caption = f"Search in {len(pictures)} images by text; below each image, its name and cosine similarity."
    _write(draw, (_MARGIN, below + 6), caption, 18, _GREY)
    for row, best in enumerate(found):
        y = below + 50 + row * search_height
        _write(draw, (_MARGIN, y + 22), f"“{SEARCHES[row]}”", 22)
        for place, i in enumerate(best):
            x = _MARGIN + 190 + place * 158
            sheet.paste(_enlarged(pictures[i], 72), (x + (158 - 72) // 2, y))
            caption = f"{truth[i]}  {similarities[row, i]:.2f}"
            _write(draw, (x + 79, y + 78), caption, 13, _GREY, 152)
    bottom = "; ".join(result) + "; images: Twemoji, CC-BY 4.0"
    _write(draw, (_MARGIN, sheet.height - 38), bottom, 14, _GREY)
    return sheet


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, fill: str = _INK, width: int | None = None
) -> None:
    """Writes a line in Pillow's own font; given a width, centres it and shrinks it until it fits."""
    font = ImageFont.load_default(size)
    while width is not None and size > 8 and draw.textlength(text, font=font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text(at, text, fill, font, anchor="la" if width is None else "ma")
