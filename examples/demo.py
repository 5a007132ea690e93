"""Classifies the photographs that ship with the package, with every installed backend, and compares the answers.

The weights are seeded random numbers in the size of ViT-B/32, so the probabilities mean nothing; what the demo shows is
the whole way from a picture file to probabilities, and that the backends agree on them. With the network, give a
trained checkpoint: ``python examples/demo.py --model openai/clip-vit-base-patch32``.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import time
from pathlib import Path

import numpy as np

from clipmb import CLIPPipeline, backends
from clipmb.cli.common import load_framework, table

LABELS = ["a cat", "a cup of coffee", "an astronaut", "a rocket"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; seeded random weights when not given")
    arguments = parser.parse_args()
    model = arguments.model
    if model is None:
        sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
        from _checkpoint import vit_b_32

        model = str(vit_b_32(Path("build/vit-b-32")))
        print("The weights are seeded random numbers (ViT-B/32 in size): the probabilities mean nothing.")
        print("A trained model: python examples/demo.py --model openai/clip-vit-base-patch32 (needs the network).\n")
    photos = sorted(str(path) for path in importlib.resources.files("clipmb").joinpath("data/photos").iterdir())
    photos = [path for path in photos if path.endswith((".jpg", ".png"))]
    found = {}
    for backend in backends.installed():
        load_framework(backend)
        pipeline = CLIPPipeline.from_pretrained(model, backend=backend)
        start = time.perf_counter()
        found[backend] = pipeline.classify(photos, LABELS)
        print(f"{backend}: {len(photos)} photos, {len(LABELS)} labels in {time.perf_counter() - start:.2f} s")
        pipeline.engine.free()
    rows = [
        [Path(photo).name, label, *(f"{values[i, j]:.6f}" for values in found.values())]
        for i, photo in enumerate(photos)
        for j, label in enumerate(LABELS)
    ]
    table("Probabilities", ["photo", "label", *found], rows, right=tuple(range(2, 2 + len(found))))
    if len(found) > 1:
        first, *others = found.values()
        print(f"Largest difference among backends: {max(np.abs(other - first).max() for other in others):.1e}")


if __name__ == "__main__":
    main()
