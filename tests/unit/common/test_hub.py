"""Sources: folders, and single files."""

from __future__ import annotations

import pytest

from clipmb import CheckpointError
from clipmb.common.hub import Source


def test_a_file_is_a_source_that_holds_only_itself(tmp_path):
    (tmp_path / "ViT-B-32.pt").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    source = Source(str(tmp_path / "ViT-B-32.pt"))
    assert source.file == tmp_path / "ViT-B-32.pt"
    assert source.folder == tmp_path
    assert source.find("ViT-B-32.pt") == source.file
    assert source.find("config.json") is None
    with pytest.raises(CheckpointError, match="single file"):
        source.require("config.json")


def test_a_folder_has_no_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    source = Source(str(tmp_path))
    assert source.file is None
    assert source.find("config.json") == tmp_path / "config.json"


def test_a_file_has_no_subfolder(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        Source(str(tmp_path / "a.pt"), subfolder="b").find("a.pt")


@pytest.mark.parametrize("name", ["x" * 5000, "owner/" + "x" * 300, "/" + "x" * 300])
def test_a_name_that_is_too_long_for_a_file_is_no_source(name):
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        Source(name).find("config.json")
    assert len(str(caught.value)) < 700
    assert Source(name).file is Source(name).folder is None
