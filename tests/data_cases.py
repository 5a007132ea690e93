"""What the tests of pairs and batches share: small files of every kind, and a small processor."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
from PIL import Image

from clipmb import CLIPImageProcessor, CLIPProcessor, CLIPTokenizerFast
from clipmb.common.data.batches import Batches

SIZE = (12, 16)
PROCESSOR = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE), CLIPTokenizerFast())
BOS, EOS = 49406, 49407


def jpeg(seed=0, size=(24, 18), form="JPEG", **options):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form, **options)
    return file.getvalue()


def folder_of(path, count, caption="picture {}", **more):
    """A folder with captions.jsonl and pictures; returns its path."""
    path.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        (path / f"{i:03d}.jpg").write_bytes(jpeg(i))
        lines.append(json.dumps({"image": f"{i:03d}.jpg", "caption": caption.format(i)} | more))
    (path / "captions.jsonl").write_text("\n".join(lines), "utf-8")
    return path


def tar_of(path, members, form=tarfile.PAX_FORMAT):
    """A .tar file of (name, bytes) or TarInfo members; returns its path."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key, caption, seed=0):
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", caption.encode())]


def batches(pairs, **options):
    return Batches(pairs, PROCESSOR, **{"batch_size": 4, "context": 77, "seed": 3, "workers": 0} | options)


def assert_same_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.ids == other.ids
        assert one.skipped == other.skipped
        for name in ("input_ids", "pixel_values", "indices"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def ledger_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
