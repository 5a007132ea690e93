"""Random pictures for the compiled kernel, under the address and undefined-behaviour sanitizers: `make fuzz`.

The kernel is built with both. Every result, with the wide passes and without, is compared with Pillow's in both orders
of the passes, and every source and result lies in memory of exactly its size, so that a read or write beyond it stops
the run. `python tests/fuzz/fuzz_resize.py --seed SEED` repeats a run.

With a compiler and a Python of another processor, which needs numpy and Pillow, an emulator runs that processor's
passes; undefined behaviour stops it there, but the address sanitizer does not work. For NEON:

    python tests/fuzz/fuzz_resize.py --compiler aarch64-linux-gnu-gcc --python "qemu-aarch64 -L ROOT ROOT/bin/python3"
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SOURCE = Path(__file__).parents[2] / "src/clipmb/common/image/_resize.c"
BUILT = Path(__file__).parents[2] / "build/fuzz/_resize.so"
FLAGS = ["-g", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-DPy_LIMITED_API=0x030B0000"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TRAPPED = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]  # needs no library of the sanitizer's
LEAVE = "CLIPMB_FUZZ_SANITIZED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiler", default="cc")
    parser.add_argument("--python", help="Emulator and Python of another processor, with --compiler for it.")
    arguments = parser.parse_args()
    if LEAVE not in os.environ and arguments.python:
        build(arguments.compiler, TRAPPED)
        command = [*shlex.split(arguments.python), *sys.argv]
        sys.exit(subprocess.run(command, env=os.environ | {LEAVE: "1"}, check=False).returncode)
    if LEAVE not in os.environ:
        build(arguments.compiler, SANITIZED)
        library = subprocess.run(
            [arguments.compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Python keeps memory until it ends, and a failing allocation must return.
        options = "detect_leaks=0:allocator_may_return_null=1"
        env = os.environ | {LEAVE: "1", "LD_PRELOAD": library, "ASAN_OPTIONS": options, "PYTHONMALLOC": "malloc"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=env, check=False).returncode)
    kernel = load()
    began = time.monotonic()
    for number in range(arguments.pictures):
        one(kernel, np.random.default_rng([arguments.seed, number]), number)
    watched = "no undefined behaviour" if arguments.python else "nothing out of bounds"
    print(f"{arguments.pictures} pictures in {time.monotonic() - began:.0f} s: the bits of Pillow, {watched}")


def build(compiler: str, sanitizer: list[str]) -> None:
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run([compiler, *FLAGS, *sanitizer, include, SOURCE, "-o", BUILT, "-lm"], check=True)


def load() -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_resize", str(BUILT))
    spec = importlib.util.spec_from_loader("_resize", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def one(kernel: Any, random: np.random.Generator, number: int) -> None:
    """Resizes one picture in all ways."""
    largest = random.choice([4, 20, 80, 400], 4, p=[0.2, 0.4, 0.3, 0.1])
    width, height, wide, tall = (int(random.integers(1, most + 1)) for most in largest)
    if random.random() < 0.05:
        width, height = (int(random.integers(1, 20_000)), 1) if random.random() < 0.5 else (2, int(width * 50))
    if random.random() < 0.05:
        wide, tall = width, height
    channels = int(random.integers(1, 5))
    resample = int(random.integers(6))
    pixels = random.integers(0, 256, (height, width, channels), np.uint8)
    if number % 2:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    box = None
    if number % 3 == 0:
        left, right = np.sort(random.uniform(0, width, 2).astype(np.float32))
        top, bottom = np.sort(random.uniform(0, height, 2).astype(np.float32))
        if right - left > 0.01 and bottom - top > 0.01:
            box = (float(left), float(top), float(right), float(bottom))
    part_width, part_height = int(random.integers(1, wide + 1)), int(random.integers(1, tall + 1))
    window = (
        int(random.integers(wide - part_width + 1)), int(random.integers(tall - part_height + 1)),
        part_width, part_height,
    )  # fmt: skip
    sources = [(exactly(pixels), channels)]
    if channels == 3:
        sources.append((exactly(np.concatenate([pixels, pixels[..., :1]], axis=2)), 4))
    whole = [expected(image, (wide, tall), resample, box, first) for first in (False, True)]
    for vertical_first in (False, True):
        left, top = window[:2]
        right = whole[vertical_first][top : top + part_height, left : left + part_width]
        for source, pixel in sources:
            for fast in (True, False):
                out = exactly(np.zeros((part_height, part_width, channels), np.uint8))
                kernel.resize(
                    source, image.size, pixel, channels, (wide, tall), resample, box or (0, 0, *image.size), window,
                    vertical_first, out, None, False, fast,
                )  # fmt: skip
                if bytes(out) != right.tobytes():
                    raise SystemExit(
                        f"picture {number}: {image.size} {image.mode} to {(wide, tall)}, filter {resample}, box {box}, "
                        f"window {window}, vertical first {vertical_first}, pixel {pixel}, wide {fast}: other bits"
                    )
    table = random.normal(size=(channels, 256)).astype(np.float32)
    values = exactly(np.zeros((channels, part_height, part_width), np.float32))
    kernel.resize(
        sources[-1][0], image.size, sources[-1][1], channels, (wide, tall), resample, box or (0, 0, *image.size),
        window, True, values, table, True, True,
    )  # fmt: skip
    looked_up = np.stack([table[i][right.reshape(*right.shape[:2], channels)[..., i]] for i in range(channels)])
    if bytes(values) != looked_up.tobytes():
        raise SystemExit(f"picture {number}: other values from the table")


def exactly(array: np.ndarray) -> Any:
    """Copies an array into memory of its size; bytes objects end with a further zero, and numpy reuses memory."""
    return (ctypes.c_ubyte * array.nbytes).from_buffer_copy(array.tobytes())


def expected(image: Image.Image, target: tuple[int, int], resample: int, box: Any, vertical_first: bool) -> np.ndarray:
    """Pillow's result in one order: each pass by itself is the same in every version."""
    width, height = image.size
    if resample == Image.Resampling.NEAREST or (image.size == target and box in (None, (0, 0, *target))):
        return np.asarray(image.resize(target, resample, box=box))
    left, top, right, bottom = box or (0, 0, width, height)
    mode = image.mode
    work = image.convert({"LA": "La", "RGBA": "RGBa"}[mode]) if mode in ("LA", "RGBA") else image
    if vertical_first:
        work = work.resize((width, target[1]), resample, box=(0, top, width, bottom))
        work = work.resize(target, resample, box=(left, 0, right, target[1]))
    else:
        work = work.resize((target[0], height), resample, box=(left, 0, right, height))
        work = work.resize(target, resample, box=(0, top, target[0], bottom))
    return np.asarray(work.convert(mode))


if __name__ == "__main__":
    main()
