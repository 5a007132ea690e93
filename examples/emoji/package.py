"""Puts a trained model where the package has it, with the labels and some images of an artist it never saw.

    python examples/emoji/package.py build/emoji/run/model build/emoji/data src/clipmb/data/emoji

The model card (README.md) and the LICENSE files that are there stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from evaluate import on_white
from PIL import Image

ARTIST, PICTURES, COLUMNS, SIZE = "twemoji", 360, 20, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder that train.py wrote")
    parser.add_argument("data", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(arguments.model.iterdir()):
        shutil.copy(path, arguments.out / path.name)
    labels = [entry["label"] for entry in json.loads((arguments.data / "labels.json").read_text("utf-8"))]
    write_list(arguments.out / "labels.json", labels)
    lines = [json.loads(line) for line in (arguments.data / "images.jsonl").read_text("utf-8").splitlines()]
    lines = [line for line in lines if line["artist"] == ARTIST]
    chosen = np.sort(np.random.default_rng(0).choice(len(lines), PICTURES, replace=False))
    sheet = Image.new("RGB", (COLUMNS * SIZE, -(-PICTURES // COLUMNS) * SIZE), "white")
    for place, i in enumerate(chosen):
        corner = (place % COLUMNS * SIZE, place // COLUMNS * SIZE)
        sheet.paste(on_white(arguments.data / lines[i]["file_name"]), corner)
    sheet.save(arguments.out / "held_out.png", optimize=True)
    write_list(arguments.out / "held_out.json", [lines[i]["label"] for i in chosen])


def write_list(path: Path, labels: list[str]) -> None:
    path.write_text(json.dumps(labels, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
