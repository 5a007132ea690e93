"""Labels the images of a table without training.

    python examples/label_csv.py TABLE.csv OUT.csv cat,dog,cup [MODEL [TEMPLATE]]

The column "image" has paths relative to the table. OUT.csv has "label" and "probability" beside all other columns.
"""

import csv
import sys
from pathlib import Path

import clipmb


def main(table: str, out: str, labels: str, model: str = str(clipmb.small_model()), template: str = "{}") -> None:
    with open(table, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    clip, names = clipmb.CLIPPipeline.from_pretrained(model), labels.split(",")
    images = [str(Path(table).parent / row["image"]) for row in rows]
    for row, chances in zip(rows, clip.classify(images, names, template), strict=True):
        row |= {"label": names[chances.argmax()], "probability": f"{chances.max():.4f}"}
    with open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
