"""A file of weights is told by its content; its suffix counts only where the content is nothing that is known."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
from cases import CONFIGS, random_arrays
from conftest import BACKENDS

from clipmb.common.checkpoint import fit, formats
from clipmb.common.checkpoint.sniffing import kind_of
from clipmb.common.errors import CheckpointError
from clipmb.common.hub import Source
from clipmb.common.parameters import specs
from clipmb.common.saving import Transaction

CONFIG = CONFIGS["plain"]
PICKLED = ("pytorch",)
KINDS = {"safetensors": "safetensors", "pytorch": "pickle", "tf-h5": "h5", "flax-msgpack": "msgpack",
         "keras-weights": "h5"}  # fmt: skip
WRITTEN = [name for name in KINDS if "pt" in BACKENDS or name not in PICKLED]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".h5", ".msgpack", ".weights", ""])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_any_name_is_read(name, suffix, tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    with Transaction(tmp_path / "folder") as save:
        (file,) = formats.format_of(name).write(save, arrays, CONFIG, "CLIPModel")
    path = tmp_path / f"weights{suffix}"
    shutil.copy(tmp_path / "folder" / file, path)
    assert kind_of(path) == KINDS[name]
    loaded = formats.load(Source(str(path)))
    assert (loaded.format, loaded.files) == (name, [path.name])
    found, _ = fit(loaded.tensors, specs(CONFIG, "CLIPModel"), "CLIPModel", origin=path)
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


@pytest.mark.parametrize(
    ("content", "suffix", "words"),
    [
        (b"", ".safetensors", "not a readable safetensors file"),
        (b"\xff" * 64, ".safetensors", "not a readable safetensors file"),
        (b"\xff" * 64, ".h5", "not a readable HDF5 file"),
        (b"\xff" * 64, ".msgpack", "msgpack"),
        (b"\xff" * 64, ".txt", "no weights"),
        (b"\x82", ".txt", "no weights"),
        (b"PK\x03\x04" + bytes(60), ".txt", "no weights"),
    ],
)
def test_a_file_of_unknown_content_is_what_its_suffix_says(content, suffix, words, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        formats.load(Source(str(path)))


def test_archives_of_others_are_not_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("cat.txt", "a cat")
    assert kind_of(tmp_path / "pictures.zip") is None
