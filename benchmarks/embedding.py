"""Embedding a folder of JPEG files, and a list of captions, end to end: every engine beside plain loops of the peers.

The peers' loops are as their documentation has them: a batch is read, preprocessed and computed after the other. Those
beside transformers take part where they are installed; fastembed and sentence-transformers get the same weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch  # before tensorflow
import transformers
from _checkpoint import vit_b_32
from _compare import medians, row
from PIL import Image
from tokenizer import captions

from clipmb import CLIPPipeline, backends, embed, export

MODES: dict[str, list[dict[str, Any]]] = {
    "pt": [{}, {"dtype": "bfloat16"}],
    "tf": [{}],
    "flax": [{}],
    "onnx": [{}, {"dtype": "int8"}],
}
PEER = "transformers, PyTorch"
GOALS = {"float32": 1.45, "bfloat16": 2.5, "int8": 3.5}
BATCH = 32
TEXTS = 2048


def write(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """Writes JPEG files, none of which equals another."""
    photos = resources.files("clipmb") / "data" / "photos"
    paths = []
    for number in range(count):
        name = ("chelsea.jpg", "coffee.jpg", "rocket.jpg")[number % 3]
        with (photos / name).open("rb") as file, Image.open(file) as image:
            turned = image.convert("RGB").rotate(number, resample=Image.Resampling.BILINEAR).resize(size)
        paths.append(str(folder / f"{number:05d}.jpg"))
        turned.save(paths[-1], quality=90)
    return paths


class Loops:
    """The loops that programs have without us."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = transformers.CLIPModel.from_pretrained(folder).eval()
        self.processor = transformers.CLIPProcessor.from_pretrained(folder, use_fast=False)

    def images(self, paths: list[str]) -> None:
        """transformers: 32 images at a time."""
        for at in range(0, len(paths), BATCH):
            images = [Image.open(path).convert("RGB") for path in paths[at : at + BATCH]]
            with torch.inference_mode():
                self.model.get_image_features(**self.processor(images=images, return_tensors="pt")).numpy()

    def texts(self, texts: list[str]) -> None:
        """transformers: 32 texts at a time, padded to the context, as the model was trained."""
        for at in range(0, len(texts), BATCH):
            inputs = self.processor(
                text=texts[at : at + BATCH], padding="max_length", truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                self.model.get_text_features(**inputs).numpy()

    def others(self) -> dict[str, Callable[[list[str]], Any]]:
        """The image loops of what else is installed."""
        found: dict[str, Callable[[list[str]], Any]] = {}
        if importlib.util.find_spec("sentence_transformers"):
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.models import CLIPModel

            model = SentenceTransformer(modules=[CLIPModel(str(self.folder))], device="cpu")
            found["sentence-transformers"] = lambda paths: model.encode(
                [Image.open(path) for path in paths], batch_size=BATCH
            )
        if importlib.util.find_spec("fastembed"):
            from fastembed import ImageEmbedding

            target = self.folder.with_name(f"{self.folder.name}-fastembed")
            if not target.exists():
                export(self.folder, target, tower="image", layout="fastembed")
            engine = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(target / "image"))
            found["fastembed"] = lambda paths: list(engine.embed(paths, batch_size=BATCH))
        return found


def job(pipeline: CLIPPipeline, source: Any, **options: Any) -> None:
    """One job into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        embed(source, Path(folder, "out"), model=pipeline, batch_size=BATCH, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/vit-b-32"))
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", nargs="*", default=backends.installed(), choices=list(MODES))
    given = parser.parse_args()
    folder = vit_b_32(given.folder)
    loops = Loops(folder)
    pipelines = {
        f"clipmb, {name}, {mode.get('dtype', 'float32')}": CLIPPipeline.from_pretrained(folder, backend=name, **mode)
        for name in given.backends
        for mode in MODES[name]
    }
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name, "pictures")
        pictures.mkdir()
        paths = write(pictures, given.count, (640, 480))
        runs: dict[str, Callable[[], Any]] = {PEER: partial(loops.images, paths)}
        runs |= {name: partial(run, paths) for name, run in loops.others().items()}
        runs |= {name: partial(job, pipeline, str(pictures)) for name, pipeline in pipelines.items()}
        report("640x480 JPEG files", given.count, runs, given.rounds, GOALS)
        texts = captions(TEXTS, 0)
        file = Path(name, "captions.txt")
        file.write_text("\n".join(texts), "utf-8")
        some = partial(loops.texts, texts[: TEXTS // 8])
        runs = {PEER: some} | {name: partial(job, pipeline, str(file)) for name, pipeline in pipelines.items()}
        report("captions of about 10 words", TEXTS, runs, given.rounds, {"float32": 5}, {PEER: TEXTS // 8})
        shutil.rmtree(pictures)


def report(
    table: str,
    count: int,
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    goals: dict[str, float],
    counts: dict[str, int] | None = None,
) -> None:
    """Times all in alternation; the goals are those of the fastest engine of a dtype."""
    taken = {name: seconds / (counts or {}).get(name, count) for name, seconds in medians(runs, rounds).items()}
    best = {
        dtype: min(((taken[name], name) for name in taken if name.endswith(dtype)), default=(0, ""))[1]
        for dtype in goals
    }
    for name, seconds in taken.items():
        ratio = taken[PEER] / seconds
        dtype = name.rsplit(" ", 1)[-1]
        goal = f"{goals[dtype]} ({'met' if ratio >= goals[dtype] else 'not met'})" if best.get(dtype) == name else ""
        row(name, table, **{"items/s": f"{1 / seconds:,.1f}"}, ratio=f"{ratio:.2f}", goal=goal)


if __name__ == "__main__":
    main()
