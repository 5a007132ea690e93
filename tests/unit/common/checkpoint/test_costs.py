"""Small files that would cost a machine: what reading them takes is bounded by their size, and so is what is said."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
from cases import CONFIGS, config_of, random_arrays, write_checkpoint
from processes import excerpt, python
from safetensors.numpy import save_file

from clipmb import CheckpointError
from clipmb.common.checkpoint.sniffing import LEGACY
from clipmb.common.errors import bad_input

CONFIG = CONFIGS["plain"]
MEGABYTE = 1 << 20
SECONDS = 10  # of the processor, for a file of up to 10 MB


def archive(path, content: bytes, *, scripted: bool = False) -> None:
    """A zip archive as ``torch.save`` writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
        if scripted:
            file.writestr("archive/constants.pkl", pickle.dumps((), 2))


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def shared_tuples(depth: int) -> bytes:
    """A tuple of two references to a tuple of two references …: its repr doubles with each."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))


def nested_kind(path):
    archive(path, b"\x80\x02" + b"(" + shared_tuples(40) + b"X\x01\x00\x00\x00aX\x01\x00\x00\x000NK\x01tQ.")


def nested_dtype(path):
    storage = text("storage") + shared_tuples(40) + text("0") + text("cpu") + b"K\x01"
    archive(path, b"\x80\x02(" + storage + b"tQ.")


def empty_dicts(path):
    archive(path, b"\x80\x02" + b"(" + b"}" * 4_000_000 + b"l.")


def long_names(path):
    """Objects of TorchScript inside each other, each with a name of some length."""
    deep, name = 5000, "n" * 200
    link = b"c__torch__\nM\n)\x81"
    content = b"\x80\x02" + (link + b"}" + text(name)) * deep + link + b"sb" * deep + b"."
    archive(path, content, scripted=True)


def sparse_string(path):
    """A legacy file with a string of 4 GB, which takes no room on the disk."""
    head = LEGACY + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    with open(path, "wb") as file:
        file.write(head + b"\x80\x02X" + struct.pack("<I", 2**32 - 8))
        file.truncate(2**32 + 1000)


def sparse_line(path):
    head = LEGACY + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    with open(path, "wb") as file:
        file.write(head + b"\x80\x02c")
        file.truncate(2**32 + 1000)


def empty_tensors(path):
    header = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(150_000)}
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded)


def empty_groups(path):
    import h5py

    with h5py.File(path, "w", libver="latest") as file:
        for i in range(120_000):
            file.create_group(f"g{i}")


def long_parameter_names(path):
    """Maps of msgpack inside each other with long keys, and thousands of arrays in the innermost."""
    key = b"\xda" + struct.pack(">H", 1000) + b"k" * 1000
    leaf = b"\xc7\x09\x01\x93\x91\x01\xa5uint8\xc4\x01\x00"
    leaf = b"\xc7" + bytes([len(leaf) - 3]) + leaf[2:]
    leaves = b"".join(b"\xa6%06d" % i + leaf for i in range(20_000))
    path.write_bytes((b"\x81" + key) * 30 + b"\xde" + struct.pack(">H", 20_000) + leaves)


def many_entries(path):
    """A zip archive of empty files."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as file:
        for i in range(60_000):
            file.writestr(f"archive/data/{i}", b"")
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    path.write_bytes(raw.getvalue())


READ = """
import resource, sys, time
import numpy, ml_dtypes, safetensors
from clipmb.common.checkpoint import formats
from clipmb.common.checkpoint.fitting import canonical_names
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
if sys.argv[1].endswith("h5"):
    import h5py
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    loaded = formats.load(Source(sys.argv[1]))
    canonical_names(loaded.tensors, "CLIPModel")
    formats.config_of(loaded, Source(sys.argv[1]))
except CheckpointError as error:
    print(len(str(error)), str(error)[:300].replace("\\n", " "))
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize(
    ("make", "suffix", "words"),
    [
        (nested_kind, "bin", "names a storage"),
        (nested_dtype, "bin", "a tuple where a Global belongs"),
        (empty_dicts, "bin", "operations"),
        (long_names, "pt", "deeper than any CLIP"),
        (sparse_string, "bin", "bytes of pickles"),
        (sparse_line, "bin", "line without an end"),
        (empty_tensors, "safetensors", "150000 tensors"),
        (empty_groups, "h5", "more than 20000 objects"),
        (long_parameter_names, "msgpack", "characters"),
        (many_entries, "bin", "cannot be loaded by PyTorch"),
    ],
)
def test_what_a_small_file_costs(tmp_path, make, suffix, words):
    path = tmp_path / f"pytorch_model.{suffix}"
    make(path)
    done = python("-c", READ, path)
    assert done.returncode == 0, excerpt(done.stderr)
    said, costs = done.stdout.splitlines()
    assert words in said
    assert int(said.split()[0]) < 5000
    seconds, memory = map(float, costs.split())
    size = min(path.stat().st_size, os.stat(path).st_blocks * 512)
    assert memory < 2 * size + 200 * MEGABYTE
    if size <= 10 * MEGABYTE:
        assert seconds < SECONDS


# -- counts that a config claims --------------------------------------------------------------------------------------

CLAIM = """
import resource, sys
import clipmb
from clipmb.common.pretrained import PretrainedMixin
from clipmb.common.errors import ClipmbError
class Model(PretrainedMixin):
    config_class, head = clipmb.CLIPConfig, sys.argv[2]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for work in (lambda: Model.from_pretrained(sys.argv[1], strict=sys.argv[3] == "True"),
             lambda: clipmb.convert(sys.argv[1], sys.argv[1] + ".converted")):
    try:
        work()
    except (ClipmbError, ValueError) as error:
        print(len(str(error)), str(error)[:200].replace("\\n", " "))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("head", "changes", "words"),
    [
        ("CLIPModel", {"text_config": {"num_hidden_layers": 100_000}}, "num_hidden_layers must be"),
        ("CLIPForImageClassification", {"vision_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers must be"),
        ("CLIPForImageClassification", {"num_labels": 10**7}, "num_labels must be"),
    ],
)
def test_counts_are_held_against_the_file_before_they_are_believed(tmp_path, head, changes, words, strict):
    write_checkpoint(tmp_path, CONFIG, head)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.pop("id2label"), fields.pop("label2id")
    for name, value in changes.items():
        fields[name] = {**fields[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    done = python("-c", CLAIM, tmp_path, head, strict)
    assert done.returncode == 0, excerpt(done.stderr)
    *said, memory = done.stdout.splitlines()
    assert len(said) == 2
    assert all(words in line and int(line.split()[0]) < 5000 for line in said), said
    assert int(memory) < 2 * sum(path.stat().st_size for path in tmp_path.iterdir()) + 200 * MEGABYTE


# -- messages ---------------------------------------------------------------------------------------------------------


def test_values_are_cut_while_their_text_is_built():
    nested: object = ()
    for _ in range(100):
        nested = (nested, nested)
    for value in (nested, "x" * 10**7, {"a": nested}, [nested] * 1000, 10**5000, type("Sub", (dict,), {})(a=nested)):
        assert len(str(bad_input("A rule", value, "A fix"))) < 300
    assert str(bad_input("A rule", {"a": [1, "b"]}, "A fix")) == "A rule. Received: {'a': [1, 'b']}. A fix."


def test_a_checkpoint_error_shows_twenty_problems_and_keeps_all():
    error = CheckpointError("A rule:", [f"{i} {'x' * 1000}" for i in range(1000)])
    assert len(error.problems) == 1000
    assert len(str(error)) < 7000
    assert str(error).endswith("\n  - and 980 more")


# -- what is no file --------------------------------------------------------------------------------------------------

NO_FILE = """
import sys, pathlib
from clipmb import CLIPConfig, CLIPImageProcessor
from clipmb.common.checkpoint import formats
from clipmb.common.hub import Source
path, folder = sys.argv[1], sys.argv[2]
for work in (
    lambda: formats.load(Source(path)),
    lambda: CLIPConfig.from_pretrained(path),
    lambda: CLIPConfig.from_pretrained(folder),
    lambda: formats.load(Source(folder)),
    lambda: CLIPImageProcessor()(path),
    lambda: CLIPImageProcessor()(pathlib.Path(path)),
):
    try:
        work()
        print("nothing said")
    except (OSError, ValueError) as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, kind):
    """Opening a pipe waits for a writer, for ever."""
    for name in ("picture.png", "config.json", "model.safetensors", "pytorch_model.bin"):
        path = tmp_path / name
        {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    done = python("-c", NO_FILE, tmp_path / "picture.png", tmp_path)
    assert done.returncode == 0, excerpt(done.stderr)
    assert done.stdout.split() == ["CheckpointError"] * 4 + ["ValueError"] * 2


@pytest.mark.backend("pt")
def test_a_large_healthy_model_is_not_refused(tmp_path):
    """The limits are far from what a checkpoint has: a head with 12 blocks fits its own config."""
    from clipmb import CLIPTextModel

    head = "CLIPTextModel"
    config = type(config_of(head, CONFIG)).from_dict(config_of(head, CONFIG).to_dict(), num_hidden_layers=40)
    save_file(random_arrays(config, head), tmp_path / "model.safetensors")
    config.to_json_file(tmp_path / "config.json")
    assert CLIPTextModel.from_pretrained(tmp_path).config.num_hidden_layers == 40
