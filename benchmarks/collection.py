"""A large collection through ``clipmb embed``: exact counts, rows that kills do not change, and memory that stays.

Small JPEG files are generated, one in a hundred broken in one of ten ways. The collection is embedded at once, and
again by jobs that are killed at random moments and resumed; both must give the same rows. Peak memory is compared with
that of a job over a part of the files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

FEW = 1_000  # files of the part
EVERY = 100  # th file is broken
PER_FOLDER = 1_000


def encoded(number: int, form: str = "JPEG") -> bytes:
    """Returns a picture of its own for every number."""
    draw = np.random.default_rng(number)
    colours = draw.integers(0, 256, (6, 8, 3), np.uint8)
    size = (int(draw.integers(48, 97)), int(draw.integers(48, 97)))
    buffer = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(buffer, form, quality=85)
    return buffer.getvalue()


def bomb() -> bytes:
    """Returns a PNG of some bytes that says it has ten thousand million pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + check + bytes(100)


def broken(number: int) -> bytes | None:
    """Returns the content of a broken file, in one of ten ways; None is a link to nothing."""
    whole, png = encoded(number), encoded(number, "PNG")
    ways = [
        b"", b"no image", bytes(1000), whole[:20], whole[: len(whole) // 2], png[: len(png) // 2],
        png[:60] + bytes(len(png) - 60), encoded(number, "WEBP")[:80], bomb(), None,
    ]  # fmt: skip
    return ways[number // EVERY % len(ways)]


def generate(folder: Path, count: int) -> None:
    """Writes the files that are not there."""

    def write(number: int) -> None:
        path = folder / f"{number // PER_FOLDER:03d}" / f"{number:06d}.jpg"
        if path.exists() or path.is_symlink():
            return
        content = encoded(number) if (number + 1) % EVERY else broken(number)
        if content is None:
            path.symlink_to("nowhere.jpg")
        else:
            path.write_bytes(content)

    for start in range(0, count, PER_FOLDER):
        (folder / f"{start // PER_FOLDER:03d}").mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, range(start, min(start + PER_FOLDER, count))))


def started(source: Path, out: Path, options: list[str]) -> subprocess.Popen:
    """Starts a job, or goes on with it; what it says is in files beside its folder."""
    command = [sys.executable, "-m", "clipmb", "embed", str(source), "--out", str(out), "--resume", "--json"]
    with open(out.with_suffix(".json"), "w") as said, open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen([*command, *options], stdout=said, stderr=log)


def finished(job: subprocess.Popen, out: Path) -> tuple[dict, float]:
    """Waits for a job; returns what it says, and the most memory that it had, in MiB."""
    _, status, usage = os.wait4(job.pid, 0)
    job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode:
        raise SystemExit(f"A job failed with exit code {job.returncode}; see {out.with_suffix('.log')}.")
    return json.loads(out.with_suffix(".json").read_text()), usage.ru_maxrss / 1024


def check_counts(done: dict, count: int) -> None:
    """Compares what a job counted with what was generated."""
    bad = count // EVERY
    expected = {"items": count, "images": count - bad, "texts": 0, "errors": bad}
    if (found := {name: done[name] for name in expected}) != expected:
        raise SystemExit(f"The counts are {found}, not {expected}.")


def check_rows(one: Path, two: Path) -> int:
    """Compares all Parquet files of two folders; returns how many there are."""
    names = sorted(path.name for path in one.glob("*.parquet"))
    if names != sorted(path.name for path in two.glob("*.parquet")):
        raise SystemExit("The folders have other files.")
    for name in names:
        if not parquet.read_table(one / name).equals(parquet.read_table(two / name)):
            raise SystemExit(f"{name} differs.")
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("build/collection"))
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, count = arguments.folder, arguments.count
    options = ["--backend", arguments.backend, "--shard-size", str(max(100, min(10_000, count // 50)))]
    generate(folder / "few", min(FEW, count))
    generate(folder / "many", count)

    peaks = {}
    begun = time.perf_counter()
    for name, number in (("few", min(FEW, count)), ("many", count)):
        begun = time.perf_counter()
        out = folder / f"{name}-whole"
        done, peaks[name] = finished(started(folder / name, out, options), out)
        taken = time.perf_counter() - begun
        check_counts(done, number)
        print(f"{number:,} files: counts exact; {number / taken:,.0f} files/s; peak {peaks[name]:,.0f} MiB; "
              f"bottleneck {done['bottleneck']}", flush=True)  # fmt: skip
    print(f"peak memory: {peaks['many'] / peaks['few']:.3f} times that of the part (goal 1.1)", flush=True)

    taken = time.perf_counter() - begun
    draw = random.Random(arguments.seed)
    killed = folder / "many-killed"
    for _ in range(arguments.kills):
        job = started(folder / "many", killed, options)
        time.sleep(draw.uniform(0, 1.5 * taken / arguments.kills))
        job.kill()
        job.wait()
        shards = len(list(killed.glob("images-*.parquet"))) if killed.is_dir() else 0
        print(f"killed with {shards} shards in the folder", flush=True)
    done, _ = finished(started(folder / "many", killed, options), killed)
    check_counts(done, count)
    print(f"{arguments.kills} kills: {check_rows(folder / 'many-whole', killed)} files equal", flush=True)


if __name__ == "__main__":
    main()
