"""Damaged files for every reader: `make fuzz`. A reader may give weights or a CheckpointError, and nothing else.

Valid files of every format in the registry are truncated, and have bits flipped, pieces moved and lengths falsified.
Batches run in processes of their own, so that a crash or a hang is caught and reported with the number of its file:
`python tests/fuzz/fuzz_readers.py --format FORMAT --first NUMBER --files 1` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipmb import CheckpointError, CLIPConfig, convert
from clipmb.common.checkpoint import formats, write_safetensors
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

BATCH = 2000
SECONDS = 10  # for one file
MEGABYTES = 200  # beyond twice the file
WHOLE_ONLY = ("openai", "open_clip")  # which need heads of 64


class Slow(BaseException):
    """A file took too long; no reader catches this."""


# -- valid files ------------------------------------------------------------------------------------------------------


def samples(format: str, base: Path) -> list[Path]:
    """Writes valid checkpoints of a format: one file, shards where there are any, half precision."""
    width = 64 if format in WHOLE_ONLY else 4
    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = CLIPConfig(
        {**tower, "vocab_size": 7, "max_position_embeddings": 3, "eos_token_id": 2, "projection_dim": 5},
        {**tower, "image_size": 4, "patch_size": 2, "projection_dim": 5},
        projection_dim=5,
        architectures=["CLIPModel"],
    )
    rng = np.random.default_rng(0)
    with Transaction(base / "origin") as save:
        save.write("config.json", config.to_json_string())
        arrays = {s.name: rng.normal(size=s.shape).astype(np.float32) for s in specs(config, "CLIPModel")}
        write_safetensors(save, arrays)
    folders = [base / "whole", base / "shards", base / "half"]
    options = ({}, {"max_shard_size": "2KB" if width == 4 else "100KB"}, {"dtype": "float16"})
    for folder, option in zip(folders, options, strict=True):
        convert(base / "origin", folder, format, **option)
        for name in ("conversion.json", "preprocessor_config.json"):
            (folder / name).unlink(missing_ok=True)
    return folders


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damages a file in one to three ways."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            break
        way = int(rng.integers(7))
        at = _place(len(data), rng)
        length = int(rng.integers(1, 1 + min(len(data) - at, int(2 ** rng.uniform(0, 12)))))
        if way == 0:  # cut the end off
            del data[at:]
        elif way == 1:  # flip bits
            for _ in range(int(rng.integers(1, 9))):
                data[_place(len(data), rng)] ^= 1 << int(rng.integers(8))
        elif way == 2:  # falsify a length, or what may be one
            size = int(rng.choice([1, 2, 4, 8]))
            limits = (
                0,
                1,
                0x7F,
                0xFF,
                2**15,
                2**31 - 1,
                2**31,
                2**32 - 1,
                2**63 - 1,
                2**64 - 1,
                len(data),
                len(data) + 1,
            )
            value = limits[int(rng.integers(len(limits)))] % 2 ** (8 * size)
            data[at : at + size] = value.to_bytes(size, "little" if rng.integers(2) else "big")
        elif way == 3:  # copy a piece over another
            to = _place(len(data), rng)
            data[to : to + length] = data[at : at + length]
        elif way == 4:  # insert a piece
            to = _place(len(data), rng)
            data[to:to] = data[at : at + length]
        elif way == 5:  # leave a piece out
            del data[at : at + length]
        else:  # noise
            data[at : at + length] = rng.bytes(length)
    return bytes(data)


def _place(size: int, rng: np.random.Generator) -> int:
    """Chooses a position: often near the start or the end, where formats keep their structure."""
    near = int(rng.integers(min(size, 1024)))
    return (near, size - 1 - near, int(rng.integers(size)), int(rng.integers(size)))[int(rng.integers(4))]


# -- one file ---------------------------------------------------------------------------------------------------------


def read(source: Source) -> None:
    """Reads every weight of a source."""
    with contextlib.suppress(CheckpointError):
        loaded = formats.load(source)
        for name in loaded.tensors:
            with contextlib.suppress(CheckpointError):
                np.asarray(loaded.tensors[name]).tobytes()


def kibibytes(field: str) -> int:
    """Reads a field of /proc/self/status."""
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) if match else 0


def work(format: str, seed: int, first: int, count: int, progress: Path) -> list[str]:
    """Reads damaged files and returns what went wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (32 << 30, 32 << 30))
    signal.signal(signal.SIGALRM, _give_up)
    problems = []
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    ) as base:
        folders = samples(format, Path(base))
        for folder in folders:  # so that whatever is imported and cached is so before anything is measured
            read(Source(str(folder)))
        for number in range(first, first + count):
            progress.write_text(str(number))
            rng = np.random.default_rng([seed, list(formats.FORMATS).index(format), number])
            folder = folders[int(rng.integers(len(folders)))]
            weights = [p for p in sorted(folder.iterdir()) if p.name != "config.json" and p.is_file()]
            path = weights[int(rng.integers(len(weights)))]
            content = path.read_bytes()
            path.unlink()  # a file that something has mapped must not shrink
            path.write_bytes(damaged(content, rng))
            alone = path.suffix != ".json" and not rng.integers(4)
            before = kibibytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            signal.alarm(SECONDS)
            start = time.monotonic()
            try:
                read(Source(str(path if alone else folder)))
            except Slow:
                problems.append(f"{format} {number}: slower than {SECONDS} s")
            except Exception as error:
                problems.append(f"{format} {number}: {type(error).__name__}: {error}"[:500])
            finally:
                signal.alarm(0)
            grown = kibibytes("VmHWM") - before
            if grown > MEGABYTES * 1024 + 2 * len(content) // 1024:
                problems.append(f"{format} {number}: {grown // 1024} MB in {time.monotonic() - start:.1f} s")
            path.unlink(missing_ok=True)
            path.write_bytes(content)
    return problems


def _give_up(*_: object) -> None:
    raise Slow


# -- all files --------------------------------------------------------------------------------------------------------


def batches(format: str, seed: int, first: int, count: int) -> Iterator[tuple[int, list[str]]]:
    """Runs batches in processes of their own; yields the number of files of each and what went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    progress, end = folder / "progress", first + count
    try:
        while first < end:
            size = min(BATCH, end - first)
            progress.write_text(str(first))
            arguments = ["--format", format, "--seed", seed, "--first", first, "--files", size, "--progress", progress]
            try:
                done = subprocess.run(
                    [sys.executable, __file__, *map(str, arguments)],
                    capture_output=True,
                    text=True,
                    timeout=60 + size,
                    check=False,
                )
                failure = "" if done.returncode == 0 else f"ended with {done.returncode}: {done.stderr[-300:]}"
                problems = json.loads(done.stdout) if not failure else []
            except subprocess.TimeoutExpired:
                failure, problems = "hangs", []
            if failure:  # go on after the file that did it
                at = int(progress.read_text())
                problems.append(f"{format} {at}: {failure}")
                size = at + 1 - first
            yield size, problems
            first += size
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=56_000, help="how many, over all formats")
    parser.add_argument("--format", choices=formats.FORMATS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.progress:
        print(json.dumps(work(given.format, given.seed, given.first, given.files, given.progress)))
        return 0
    chosen = [given.format] if given.format else list(formats.FORMATS)
    each, failed = -(-given.files // len(chosen)), False
    for format in chosen:
        start, count = time.monotonic(), 0
        for size, problems in batches(format, given.seed, given.first, each):
            count += size
            failed = failed or bool(problems)
            print("".join(f"{problem}\n" for problem in problems), end="", flush=True)
        print(f"{format}: {count} files in {time.monotonic() - start:.0f} s", flush=True)
    print("FAILED" if failed else f"{each * len(chosen)} files: weights or a CheckpointError, nothing else")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
