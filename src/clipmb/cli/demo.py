"""``clipmb demo``: the small model on pictures it never saw, by every installed backend, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from clipmb.cli import common

# Chosen before the model was scored on them.
SHOWN = (
    "rocket", "panda", "pizza", "violin", "banana", "police car", "honeybee", "volcano",
    "unicorn", "robot", "love letter", "flag: Japan", "Statue of Liberty", "light bulb", "chipmunk", "telescope",
)  # fmt: skip
OTHERS = ("bear", "fox", "cheese wedge", "guitar", "lemon", "taxi", "butterfly", "microscope")
SEARCHES = ("animal", "fruit", "vehicle", "music", "sport", "time")
FOUND = 6  # pictures for each search

_WIDTH, _MARGIN, _CELL, _PICTURE = 1200, 30, 142, 96
_INK, _GREY, _RIGHT, _WRONG = "#1d1d1f", "#6e6e73", "#1a7f37", "#c4320a"


def run(
    backend: Annotated[
        list[str] | None, typer.Option("--backend", "-b", help="pt, tf or flax; may be repeated; all installed if not.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The picture of the result, a PNG file.")] = "clipmb-demo.png",
) -> None:
    """Classify and search pictures that come with clipmb, with every installed backend, and compare the answers."""
    from clipmb import backends
    from clipmb.common.small_model import TEMPLATES, held_out_pictures, small_model
    from clipmb.pipeline import CLIPPipeline

    names = sorted(backend or backends.installed(), key=lambda name: [*backends.BACKENDS, name].index(name))
    for name in names or [None]:  # no backend at all is an error too
        common.load_framework(name)
    pictures, truth = held_out_pictures()
    shown = [pictures[truth.index(label)] for label in SHOWN]
    labels = [*SHOWN, *OTHERS]
    typer.echo(
        "The model: 2.2 million parameters, trained on emoji by nine artists; it comes with clipmb and knows\n"
        "emoji-like pictures only. The pictures: by an artist that it never saw in training (Twemoji, CC-BY 4.0).\n"
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
    common.table(f"Which of {len(labels)} labels fits?", ["picture", *probabilities], rows)
    found = (-similarities[first]).argsort(axis=1, kind="stable")[:, :FOUND]
    rows = [[query, ", ".join(truth[i] for i in best)] for query, best in zip(SEARCHES, found, strict=True)]
    common.table(f"Search among {len(pictures)} pictures ({first})", ["text", "pictures found, best first"], rows)
    right = sum(labels[values.argmax()] == label for values, label in zip(probabilities[first], SHOWN, strict=True))
    result = [f"{right} of {len(SHOWN)} right"]
    if len(probabilities) > 1:
        apart = max(_apart(probabilities), _apart(similarities))
        result.append(f"largest difference among {', '.join(probabilities)}: {apart:.1e}")
    result.append("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    typer.echo("; ".join(result))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw(shown, labels, probabilities[first], pictures, found, [similarities[first], truth], result).save(path, "PNG")
    typer.echo(f"The result as a picture: {path}")


def _answer(labels: list[str], values: np.ndarray) -> str:
    best = int(values.argmax())
    return f"{labels[best]} {values[best]:.4f}"


def _apart(results: dict[str, np.ndarray]) -> float:
    """The largest difference of any backend's values to the first's."""
    first, *others = results.values()
    return max(float(np.abs(values - first).max()) for values in others)


def _draw(
    shown: list[Image.Image],
    labels: list[str],
    probabilities: np.ndarray,
    pictures: list[Image.Image],
    found: np.ndarray,
    search: list[Any],
    result: list[str],
) -> Image.Image:
    """Draws pictures with their answers, and below every search with the pictures it found."""
    similarities, truth = search
    across = (_WIDTH - 2 * _MARGIN) // _CELL
    rows = -(-len(shown) // across)
    row_height, search_height = _PICTURE + 62, 118
    top = 120
    below = top + rows * row_height + 20
    sheet = Image.new("RGB", (_WIDTH, below + 50 + len(found) * search_height + 50), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, (_MARGIN, 24), "clipmb demo", 30)
    _write(
        draw, (_MARGIN, 66), f"Which of {len(labels)} labels fits? The artist was never seen in training.", 18, _GREY
    )
    for i, picture in enumerate(shown):
        x, y = _MARGIN + i % across * _CELL, top + i // across * row_height
        sheet.paste(_enlarged(picture, _PICTURE), (x + (_CELL - _PICTURE) // 2, y))
        best = int(probabilities[i].argmax())
        correct = labels[best] == SHOWN[i]
        middle = x + _CELL // 2
        _write(draw, (middle, y + _PICTURE + 6), labels[best], 15, _RIGHT if correct else _WRONG, _CELL - 8)
        told = f"{100 * probabilities[i, best]:.1f} %" + ("" if correct else f", is: {SHOWN[i]}")
        _write(draw, (middle, y + _PICTURE + 26), told, 13, _GREY, _CELL - 8)
    draw.line([(_MARGIN, below - 10), (_WIDTH - _MARGIN, below - 10)], "#d2d2d7")
    told = f"Searching {len(pictures)} pictures by text; below each, what it is and its cosine similarity."
    _write(draw, (_MARGIN, below + 6), told, 18, _GREY)
    for row, best in enumerate(found):
        y = below + 50 + row * search_height
        _write(draw, (_MARGIN, y + 22), f"“{SEARCHES[row]}”", 22)
        for place, i in enumerate(best):
            x = _MARGIN + 190 + place * 158
            sheet.paste(_enlarged(pictures[i], 72), (x + (158 - 72) // 2, y))
            told = f"{truth[i]}  {similarities[row, i]:.2f}"
            _write(draw, (x + 79, y + 78), told, 13, _GREY, 152)
    bottom = "; ".join(result) + "; pictures: Twemoji, CC-BY 4.0"
    _write(draw, (_MARGIN, sheet.height - 38), bottom, 14, _GREY)
    return sheet


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, fill: str = _INK, width: int | None = None
) -> None:
    """Writes a line in Pillow's own font; with a width, centred and made smaller until it fits."""
    font = ImageFont.load_default(size)
    while width is not None and size > 8 and draw.textlength(text, font=font) > width:
        size -= 1
        font = ImageFont.load_default(size)
    draw.text(at, text, fill, font, anchor="la" if width is None else "ma")
