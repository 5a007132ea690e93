"""Loading of training batches, clipmb's `Batches` against a PyTorch DataLoader with transformers' processor.

Both read the same 640x480 JPEG files and captions in the same order, decode, resize to 224x224, normalise and tokenize.
clipmb's workers are threads, the DataLoader's are processes, which are kept from run to run.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
import transformers
from _compare import compare
from image_processor import SIZE, photos
from PIL import Image

from clipmb import Batches, CLIPProcessor, CLIPTokenizerFast, Pairs

COUNT, BATCH = 96, 32


def write(folder: Path) -> list[tuple[str, str]]:
    """Writes the images and captions.jsonl; returns pairs of path and caption."""
    pairs = []
    images = photos()
    for number in range(COUNT):
        path = folder / f"{number:04d}.jpg"
        images[number % len(images)].rotate(number).save(path, quality=90)
        pairs.append((str(path), f"a photo of a thing that was turned by {number} degrees, number {number}"))
    lines = [json.dumps({"image": os.path.basename(path), "caption": caption}) for path, caption in pairs]
    (folder / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    return pairs


class Peer(torch.utils.data.Dataset):
    """What the training examples of transformers 4 do."""

    def __init__(self, pairs: list[tuple[str, str]], folder: str) -> None:
        CLIPTokenizerFast().save_pretrained(folder)
        self.pairs = pairs
        self.images = transformers.CLIPImageProcessor()
        self.tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        path, caption = self.pairs[index]
        return Image.open(path).convert("RGB"), caption

    def collate(self, rows: list[tuple[Image.Image, str]]) -> dict[str, torch.Tensor]:
        """Puts a batch together."""
        images, captions = zip(*rows, strict=True)
        ids = self.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, **self.images(list(images), return_tensors="pt")}


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        pairs = write(Path(name))
        ours, processor = Pairs.open(name), CLIPProcessor()
        peer = Peer(pairs, os.path.join(name, "tokenizer"))
        order = Batches(ours, processor, batch_size=BATCH, context=77).order(0).tolist()
        for workers in (0, 1, 2):
            loader = Batches(ours, processor, batch_size=BATCH, context=77, workers=workers)
            theirs = torch.utils.data.DataLoader(
                peer, BATCH, sampler=order, collate_fn=peer.collate, num_workers=workers, persistent_workers=workers > 0
            )
            compare(
                f"{SIZE[0]}x{SIZE[1]} JPEG files, {workers or 'no'} worker{'s' * (workers != 1)}",
                lambda loader=loader: [batch.pixel_values.shape for batch in loader.epoch(0)],
                lambda theirs=theirs: [batch["pixel_values"].shape for batch in theirs],
                count=COUNT,
                unit="pictures",
            )
        loader = Batches(ours, processor, batch_size=BATCH, context=77, workers=2, augment="crop")
        plain = Batches(ours, processor, batch_size=BATCH, context=77, workers=2)
        compare(
            'augment="crop" against none, 2 workers',
            lambda: [batch.pixel_values.shape for batch in loader.epoch(0)],
            lambda: [batch.pixel_values.shape for batch in plain.epoch(0)],
            count=COUNT,
            unit="pictures",
            peer="no augmentation",
        )


if __name__ == "__main__":
    main()
