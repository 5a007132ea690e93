"""Scores a model on emoji: is the right label of all 1,914 the first, or among the first five?

    python examples/emoji/evaluate.py build/emoji/run/model build/emoji/data --artists twemoji emojione openmoji

The images are on white and go through the model's own image processor. Beside all labels: without flags, against 9
and 99 other random labels, and tags (words that are in no label and belong to five emoji or more): is one that has the
tag among the five most similar images?
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from clipmb import CLIPPipeline, class_embeddings

TEMPLATE = "an emoji of {}"  # the best of the training captions on the images that train.py validates with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("data", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("--artists", nargs="+", required=True)
    parser.add_argument("--backend")
    parser.add_argument("--template", action="append", help="text with {} for the label; may be repeated")
    arguments = parser.parse_args()
    clip = CLIPPipeline.from_pretrained(arguments.model, backend=arguments.backend)
    emoji = json.loads((arguments.data / "labels.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (arguments.data / "images.jsonl").read_text("utf-8").splitlines()]
    labels = [entry["label"] for entry in emoji]
    classes = class_embeddings(clip.encode_text, labels, arguments.template or [TEMPLATE])
    for artist in arguments.artists:
        own = [line for line in lines if line["artist"] == artist]
        images = clip.encode_image([on_white(arguments.data / line["file_name"]) for line in own], batch_size=256)
        print(json.dumps({"artist": artist, **scores(clip, emoji, classes, own, images)}))


def on_white(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def scores(clip: CLIPPipeline, emoji: list, classes: np.ndarray, lines: list, images: np.ndarray) -> dict:
    """Percentages."""
    index = {entry["hexcode"]: i for i, entry in enumerate(emoji)}
    truth = np.array([index[line["hexcode"]] for line in lines])
    similar = images @ classes.T  # (images, labels)
    right = similar[np.arange(len(truth)), truth][:, None]
    rank = (similar > right).sum(axis=1)  # how many labels come before the right one
    flags = np.array([emoji[i]["group"] == "flags" for i in truth])
    found = {"pictures": len(lines), "top1": share(rank < 1), "top5": share(rank < 5)}
    if not flags.all():
        found |= {"top1_without_flags": share(rank[~flags] < 1), "top5_without_flags": share(rank[~flags] < 5)}
    rng = np.random.default_rng(0)
    for count in (10, 100):
        hits = []
        for i in range(len(truth)):
            others = rng.choice(np.delete(np.arange(len(emoji)), truth[i]), count - 1, replace=False)
            hits.append(similar[i, others].max() < right[i, 0])
        found[f"top1_of_{count}"] = share(hits)
    owners = defaultdict(set)
    for place, line in enumerate(lines):
        for tag in line["tags"]:
            owners[tag].add(place)
    words = {word for entry in emoji for word in entry["label"].lower().replace(":", " ").split()}
    tags = [tag for tag, places in owners.items() if len(places) >= 5 and tag.lower() not in words]
    best = np.argsort(-(clip.encode_text(tags, long_text="truncate") @ images.T), axis=1, kind="stable")[:, :5]
    found["tags"] = len(tags)
    found["tag_in_top5"] = share([bool(owners[tag] & set(row.tolist())) for tag, row in zip(tags, best, strict=True)])
    return found


def share(hits: object) -> float:
    return round(100 * float(np.mean(hits)), 2)


if __name__ == "__main__":
    main()
