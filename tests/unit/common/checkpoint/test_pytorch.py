"""Pickled files: round trips, and damaged and hostile ones, which are refused before they cost memory or run."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, config_of, equal, random_arrays
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmb import CheckpointError
from clipmb.common.checkpoint import pickled, pytorch
from clipmb.common.hub import Source
from clipmb.common.saving import Transaction

if "pt" in BACKENDS:
    import torch

pytestmark = pytest.mark.backend("pt")
CONFIG = CONFIGS["plain"]


def read(path: Path, variant: str | None = None) -> dict[str, np.ndarray]:
    loaded = pytorch.read(Source(str(path)), variant)
    assert loaded is not None
    return dict(loaded.tensors)


def write(folder: Path, arrays: dict[str, np.ndarray], head: str = "CLIPModel", size: object = "5GB") -> list[str]:
    with Transaction(folder) as save:
        return pytorch.write(save, arrays, config_of(head, CONFIG), head, max_shard_size=size)


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_round_trip(tmp_path, head, size):
    arrays = random_arrays(config_of(head, CONFIG), head)
    files = write(tmp_path, arrays, head, size)
    assert (len(files) > 1) == (size == "20KB")
    loaded = pytorch.read(Source(str(tmp_path)))
    assert equal(dict(loaded.tensors), arrays)
    assert loaded.format == "pytorch"
    assert loaded.files == files


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, dtype):
    arrays = {name: a.astype(dtype) for name, a in random_arrays(CONFIG, "CLIPModel", dtype="float64").items()}
    write(tmp_path, arrays)
    assert equal(read(tmp_path), arrays)


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
dtypes = st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(shapes, dtypes), max_size=6),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["zip", "legacy", "views"]),
)
def test_any_tensors_round_trip(tmp_path_factory, layouts, seed, form):
    rng = np.random.default_rng(seed)
    arrays = {f"vision_model.{i}": rng.normal(size=s).astype(d) for i, (s, d) in enumerate(layouts)}
    folder = tmp_path_factory.mktemp("any")
    if form == "zip":
        write(folder, arrays)
    else:
        tensors = {name: pickled._to_torch(torch, array) for name, array in arrays.items()}
        if form == "views":  # of one storage that is larger: transposed, and beginning in its middle
            tensors = {
                name: torch.stack([t, t]).T.contiguous().T[1] if t.ndim == 1 else t for name, t in tensors.items()
            }
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy")
    assert equal(read(folder), arrays)


def test_reading_maps_the_file_and_never_changes_it(tmp_path):
    write(tmp_path, random_arrays(CONFIG, "CLIPModel"))
    before = (tmp_path / "pytorch_model.bin").read_bytes()
    for array in read(tmp_path).values():
        assert not array.flags.owndata
        array[...] = 0
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before


def test_variants(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel", dtype="float16")
    write(tmp_path, arrays)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.fp16.bin")
    assert pytorch.read(Source(str(tmp_path))) is None
    assert equal(read(tmp_path, "fp16"), arrays)


def test_one_file_of_any_name(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    write(tmp_path, arrays)
    path = (tmp_path / "pytorch_model.bin").rename(tmp_path / "weights")
    assert equal(read(path), arrays)
    (tmp_path / "notes.txt").write_text("PK")
    assert pytorch.read(Source(str(tmp_path / "notes.txt"))) is None


def test_shards_and_a_single_file_replace_each_other(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path, arrays, size="20KB")
    write(tmp_path, arrays)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "pytorch_model.bin"}


def test_state_dicts_of_modules_and_trainers(tmp_path):
    module = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    expected = {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}
    state = {"epoch": 3, "name": "run", "state_dict": module.state_dict(), "optimizer": optimizer.state_dict()}
    for content in (module.state_dict(), dict(module.named_parameters()), state):
        for protocol in (2, 4):
            torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
            if protocol == 2:  # PyTorch's own restricted reader knows no other
                assert equal(read(tmp_path), expected)
            else:
                pickled.inspect(tmp_path / "pytorch_model.bin")


def test_without_pytorch(tmp_path, monkeypatch):
    from clipmb import MissingBackendError

    write(tmp_path, random_arrays(CONFIG, "CLIPModel"))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingBackendError, match="pip install"):
        read(tmp_path)


# -- damage -----------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str | None = None) -> None:
    """The file is a CheckpointError, and little memory was taken to find that out."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read(path)
        text = str(caught.value).replace(str(path), "")  # the folder has the name of the test
        assert match is None or re.search(match, text), text
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncation_anywhere(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    tensors = {name: torch.from_numpy(array) for name, array in random_arrays(CONFIG, "CLIPModel").items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in [0, 1, 4, 14, 15, 16, 100, 1000, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        refused(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bits_never_escape_as_another_error(tmp_path, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3, 4), "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    wrong = 0
    for position in rng.integers(0, len(content), 600):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            read(path)
        except CheckpointError:
            wrong += 1
    assert wrong > 60


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "state_dict"])
def test_code_in_pickles_is_not_run(tmp_path, form):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    content: object = {"a": torch.ones(2), "b": Bomb(mark)}
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        content = {"state_dict": content} if form == "state_dict" else content
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    refused(path, "mkdir|not a checkpoint")
    assert not mark.exists()


def test_whole_modules_are_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"state_dict\(\)(.|\n)*torch\.nn\.modules\.linear\.Linear")


def rezip(path: Path, change, **options: object) -> None:
    """Writes the archive again, with the entries that `change` makes of each."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            for new_name, new_content in change(name, content):
                archive.writestr(new_name, new_content)


def saved(tmp_path: Path, tensors: object = None) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0).reshape(3, 4)} if tensors is None else tensors, path)
    return path


def test_compressed_archives(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1_000_000)})
    rezip(path, lambda name, content: [(name, content)], compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    refused(path, "compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda n, c: [(n, c), (n, c)], "twice"),
        (lambda n, c: [] if n.endswith("data/0") else [(n, c)], "claims 12 elements"),
        (lambda n, c: [(n, c[:-4] if n.endswith("data/0") else c)], "claims 12 elements"),
        (lambda n, c: [] if n.endswith("data.pkl") else [(n, c)], r"data\.pkl"),
        (lambda n, c: [(n, c), (f"other/{n.split('/', 1)[1]}", c)], r"data\.pkl"),
        (lambda n, c: [(n, b"big" if n.endswith("byteorder") else c)], "big-endian"),
        (lambda n, c: [(n, c[:-1] if n.endswith("data.pkl") else c)], "readable"),
        (lambda n, c: [(n, c.replace(b"FloatStorage", b"SloatStorage"))], "SloatStorage"),
        (lambda n, c: [(n, c.replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86"))], "beyond its storage"),
    ],
)
def test_archives_that_claim_what_they_lack(tmp_path, change, match):
    path = saved(tmp_path)
    rezip(path, change)
    refused(path, match)


def test_bytes_around_an_archive(tmp_path):
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:22] + content)
    refused(path, "before or after")


def test_overlapping_entries(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(10), "b": torch.ones(10)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first, second = (info for info in archive.infolist() if "/data/" in info.filename)
    entry = content.rindex(second.filename.encode())
    struct.pack_into("<I", content, entry - 4, first.header_offset)
    path.write_bytes(content)
    refused(path, "overlap")


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.ones(1).expand(10**12),
        lambda: torch.as_strided(torch.ones(8), (8, 8, 8), (0, 0, 1)),
        lambda: torch.as_strided(torch.ones(8), (5, 4), (1, 1)),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_expanded_tensors(tmp_path, view, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": view()}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "expanded")


@pytest.mark.parametrize("kind", ["sparse", "meta", "float8", "complex"])
def test_tensors_of_other_kinds(tmp_path, kind):
    make = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.empty(10**9, 10**9, device="meta"),
        "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
    }
    refused(saved(tmp_path, {"a": make[kind]()}), "supported|run code")


@pytest.mark.parametrize(
    "content_of",
    [lambda one: [one], lambda one: one, lambda one: {3: one}, lambda one: {"a": None}, lambda one: {"a": {"b": "c"}}],
)
def test_other_things_than_state_dicts(tmp_path, content_of):
    refused(saved(tmp_path, content_of(torch.ones(2))), "state_dict")


def raw(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


NESTED = b"\x80\x02}" + b")" + b"\x85" * 500_000


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02}u.",
        b"\x80\x02]}q\x00h\x00h\x01.",
        b"\x80\x02}r\xff\xff\xff\xff",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b".",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
        b"(S'id'\nios\nsystem\n.",
        b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00ido.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
        NESTED + b"K\x01s.",
        NESTED + b"Q.",
        NESTED + b".",
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02" + b"K\x01" * 5_000_001 + b".",
    ],
    ids=range(18),
)
def test_hostile_pickles(tmp_path, program):
    raw(tmp_path / "pytorch_model.bin", program)
    with pytest.raises(CheckpointError):
        read(tmp_path)


def test_claims_of_storages(tmp_path):
    """A storage of 2**40 elements, in both forms."""
    path = saved(tmp_path)
    rezip(path, lambda n, c: [(n, c.replace(b"K\x0ctq", b"\x8a\x06\0\0\0\0\0\x01tq"))])
    refused(path, "claims 1099511627776 elements")
    torch.save({"a": torch.arange(12.0)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert b"K\x0cN" in content
    content = content.replace(b"K\x0cN", b"\x8a\x06\0\0\0\0\0\x01N")
    path.write_bytes(content)
    refused(path, "has 12 elements")
    path.write_bytes(content.replace(struct.pack("<q", 12), struct.pack("<q", 2**40)))
    refused(path, "bytes too short")


def test_legacy_files_whose_numbers_disagree(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    position = content.rindex(struct.pack("<q", 12))
    path.write_bytes(content[:position] + struct.pack("<q", 2**40) + content[position + 8 :])
    refused(path, "has 1099511627776 elements")


def test_tar_archives_are_refused(tmp_path):
    """PyTorch below 2.6 runs code in them in spite of weights_only (CVE-2025-32434)."""
    import tarfile

    with tarfile.open(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    refused(tmp_path, "tar")


@pytest.mark.parametrize("file", ["../x.bin", "/etc/passwd", "C:\\b"])
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    (tmp_path / "pytorch_model.bin.index.json").write_text(f'{{"weight_map": {{"a": {json.dumps(file)}}}}}')
    refused(tmp_path, "outside")
