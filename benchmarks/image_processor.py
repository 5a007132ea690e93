"""Image preprocessing, clipmb against transformers' ``CLIPImageProcessor``, on the package's photos.

With one thread it is the processor's time that is compared.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
import simplejpeg
import transformers
from _compare import compare, row
from PIL import Image

from clipmb import CLIPImageProcessor

SIZE = (640, 480)
COUNT = 24


def photos() -> list[Image.Image]:
    folder = resources.files("clipmb") / "data" / "photos"
    found = []
    for name in ("chelsea.jpg", "coffee.jpg", "rocket.jpg"):
        with (folder / name).open("rb") as file, Image.open(file) as image:
            found.append(image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS))
    return found


def resize_only(images: list[Image.Image]) -> float:
    taken = []
    for _ in range(7):
        start = time.process_time()
        for image in images:
            image.resize((298, 224), Image.Resampling.BICUBIC)
        taken.append(time.process_time() - start)
    return len(images) / statistics.median(taken)


def main() -> None:
    ours, theirs = CLIPImageProcessor(), transformers.CLIPImageProcessor()
    images = [image.copy() for image in photos() * (COUNT // 3)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def peer() -> object:
        return theirs(images, return_tensors="np")

    what = f"{SIZE[0]}x{SIZE[1]} Pillow images"
    compare(
        f"{what}, 1 thread",
        lambda: ours(images, return_tensors="np", num_workers=1),
        peer,
        count=COUNT,
        unit="pictures",
        goal=3.0,
        clock=time.process_time,
    )
    for size, goal in (((224, 224), 5.0), ((4000, 3000), 3.0)):
        few = [image.resize(size) for image in images[:3]]
        compare(
            f"{size[0]}x{size[1]} Pillow images, 1 thread",
            lambda few=few: ours(few, return_tensors="np", num_workers=1),
            lambda few=few: theirs(few, return_tensors="np"),
            count=3,
            unit="pictures",
            goal=goal,
            clock=time.process_time,
        )
    compare(
        f"{what}, default threads, {cores} cores",
        lambda: ours(images, return_tensors="np"),
        peer,
        count=COUNT,
        unit="pictures",
    )
    row("  Pillow resize alone, 1 thread", alone=f"{resize_only(images):,.1f} pictures/s")
    compare(
        "one image at a time (latency)",
        lambda: [ours(image, return_tensors="np") for image in images[:6]],
        lambda: [theirs(image, return_tensors="np") for image in images[:6]],
        count=6,
        unit="pictures",
    )
    torchvision_too(ours, images)
    floats = [(np.asarray(image).transpose(2, 0, 1) / 255).astype(np.float32) for image in images[:6]]
    compare(
        "float32 arrays, channels first, 1 thread",
        lambda: ours(floats, return_tensors="np", num_workers=1),
        lambda: theirs(floats, return_tensors="np"),
        count=6,
        unit="pictures",
        clock=time.process_time,
    )
    with tempfile.TemporaryDirectory() as folder:
        for size, count in ((SIZE, COUNT), ((4000, 3000), 3)):
            paths = [str(Path(folder) / f"{size[0]}-{number}.jpg") for number in range(count)]
            for path, image in zip(paths, images, strict=False):
                image.resize(size).save(path, quality=90)
            for workers, goal in ((1, 2.8 if size == SIZE else 3.0), (2, 5.0)):
                if workers == 1 or size == SIZE:
                    compare(
                        f"{size[0]}x{size[1]} JPEG files, {workers} thread{'s' * (workers > 1)}",
                        lambda paths=paths, workers=workers: ours(paths, return_tensors="np", num_workers=workers),
                        lambda paths=paths: theirs([str(path) for path in paths], return_tensors="np"),
                        count=count,
                        unit="pictures",
                        goal=goal,
                        clock=time.process_time if workers == 1 else time.perf_counter,
                    )
            floors(paths[0])


def torchvision_too(ours: CLIPImageProcessor, images: list[Image.Image]) -> None:
    """Compares with transformers' fast processor where torchvision is installed; its bits are not Pillow's."""
    if importlib.util.find_spec("torchvision") is None:
        print("  transformers' fast processor: not compared, torchvision is not installed")
        return
    import torch

    torch.set_num_threads(1)
    fast = transformers.CLIPImageProcessorFast()
    compare(
        "  beside transformers' fast processor, 1 thread",
        lambda: ours(images, return_tensors="np", num_workers=1),
        lambda: fast(images, return_tensors="pt"),
        peer="transformers, fast",
        count=len(images),
        unit="pictures",
        clock=time.process_time,
    )
    exact = ours(images[:3], return_tensors="np")["pixel_values"]
    levels = np.abs(exact - fast(images[:3], return_tensors="pt")["pixel_values"].numpy()).max() * 255 * 0.2686
    row("  its largest difference from the exact pixels", alone=f"some {levels:.1f} of 255 levels")


def floors(path: str) -> None:
    """Prints what decoding a file alone takes, and what copying its pixels alone takes."""
    content = Path(path).read_bytes()
    pixels = simplejpeg.decode_jpeg(content)
    for what, run in (
        ("decode alone, simplejpeg", lambda: simplejpeg.decode_jpeg(content)),
        ("copy alone", pixels.copy),
    ):
        taken = []
        for _ in range(15):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        row(f"  {what}, 1 thread", alone=f"{1 / statistics.median(taken):,.1f} pictures/s")


if __name__ == "__main__":
    main()
