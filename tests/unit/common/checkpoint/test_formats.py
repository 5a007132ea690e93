"""The contract of a format: a new one is one module and one row, none makes a tensor twice, and the docs agree."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import toy_format
from cases import CONFIGS, assert_same, config_of, random_arrays, write_checkpoint
from conftest import BACKENDS, TESTS
from format_cases import EVERYWHERE as CONFIG
from format_cases import read_as
from processes import invoke, output

import clipmb
from clipmb import CheckpointError, convert
from clipmb.common.checkpoint import formats
from clipmb.common.checkpoint.tensors import Deferred, lazy
from clipmb.common.convert import RECORD_NAME
from clipmb.common.saving import Transaction

DOCS = TESTS.parent / "docs" / "checkpoints.md"


@pytest.fixture
def toy(monkeypatch):
    """One row in the table."""
    monkeypatch.setitem(formats.FORMATS, "toy", toy_format)


# -- a new format -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModelWithProjection", "CLIPForImageClassification"])
@pytest.mark.parametrize("other", ["safetensors", "flax-msgpack"])
def test_a_new_format_converts_to_and_from_the_others(tmp_path, head, other):
    source = write_checkpoint(tmp_path / "source", CONFIGS["plain"], head)
    convert(source, tmp_path / "other", other)
    done = convert(tmp_path / "other", tmp_path / "toy", "toy")
    assert (tmp_path / "toy" / "toy.npz").exists()
    assert {entry.target for entry in done.mapping} == {f"toy {entry.canonical}" for entry in done.mapping}
    back = convert(tmp_path / "toy", tmp_path / "back", other)
    assert (back.source_format, back.head) == ("toy", head)
    assert {entry.source for entry in back.mapping} == {f"toy {entry.canonical}" for entry in back.mapping}
    part = config_of(head, CONFIGS["plain"])
    assert_same(read_as(other, tmp_path / "back", part, head), random_arrays(part, head))


@pytest.mark.usefixtures("toy")
def test_overwriting_removes_the_files_of_a_new_format(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["plain"])
    convert(source, tmp_path / "result", "toy")
    (tmp_path / "result" / "my toy.npz").write_text("mine")
    convert(source, tmp_path / "result", overwrite=True)
    assert not (tmp_path / "result" / "toy.npz").exists()
    assert (tmp_path / "result" / "my toy.npz").read_text() == "mine"


def test_a_format_can_hold_the_full_model_only(tmp_path, monkeypatch):
    class Whole:
        whole_only = True
        __getattr__ = staticmethod(lambda name: getattr(toy_format, name))

    monkeypatch.setitem(formats.FORMATS, "toy", Whole())
    source = write_checkpoint(tmp_path / "source", CONFIGS["plain"], "CLIPTextModel")
    with pytest.raises(CheckpointError, match=r"The toy format holds a full CLIPModel.*Received: CLIPTextModel"):
        convert(source, tmp_path / "result", "toy", dry_run=True)


@pytest.mark.usefixtures("toy")
def test_the_commands_know_a_new_format(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIGS["plain"])
    done = invoke("convert", source, tmp_path / "toy", "--to", "toy", "--json")
    assert done.exit_code == 0, done.output
    done = invoke("info", tmp_path / "toy", "--json")
    assert json.loads(done.stdout)["format"] == "toy"


def test_the_help_lists_every_format():
    """In a process of its own, since the text is made when the command is imported."""
    script = (
        "import sys\n"
        "sys.path.append(sys.argv[1])\n"
        "import toy_format\n"
        "from clipmb.common.checkpoint import formats\n"
        "formats.FORMATS['toy'] = toy_format\n"
        "from clipmb.cli import app\n"
        "app(['convert', '--help'])\n"
    )
    assert set(re.findall(r"[\w-]+", output("-c", script, TESTS, COLUMNS="300"))) >= {"toy", *formats.FORMATS}


# -- every format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", formats.FORMATS)
def test_writing_makes_every_tensor_once(tmp_path, name):
    watched = Watched(lazy(random_arrays(CONFIG, "CLIPModel")))
    with Transaction(tmp_path) as save:
        formats.format_of(name).write(save, watched.tensors, CONFIG, "CLIPModel", max_shard_size="200KB")
    assert sorted(watched.made) == sorted(watched.tensors)


class Watched:
    """Counts the tensors that were made and not yet released."""

    def __init__(self, tensors):
        self.held, self.made, self.most = set(), [], 0
        self.tensors = Deferred({key: self._watched(key, tensor) for key, tensor in tensors.items()})

    def _watched(self, key: str, tensor):
        def make() -> np.ndarray:
            self.made.append(key)
            self.held.add(key)
            self.most = max(self.most, len(self.held))
            return tensor.make()

        return replace(tensor, make=make, release=lambda: self.held.discard(key))


@pytest.mark.parametrize("name", [name for name, entry in formats.FORMATS.items() if entry.streams])
def test_streaming_releases_a_tensor_before_the_next_is_made(tmp_path, name):
    watched = Watched(lazy(random_arrays(CONFIG, "CLIPModel")))
    with Transaction(tmp_path) as save:
        formats.format_of(name).write(save, watched.tensors, CONFIG, "CLIPModel")
    assert not watched.held
    assert watched.most == (3 if formats.FORMATS[name].whole_only else 1)  # q, k and v share one tensor of OpenAI's


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_are_saved_one_tensor_at_a_time(tmp_path, monkeypatch, backend):
    kind = getattr(clipmb, {"pt": "CLIPModel", "tf": "TFCLIPModel", "flax": "FlaxCLIPModel"}[backend])
    model = kind.from_pretrained(write_checkpoint(tmp_path / "source", CONFIGS["plain"]))
    seen = []

    def save(model, arrays, *rest, **options):
        seen.append(Watched(arrays.lazy))
        return plain(model, seen[0].tensors, *rest, **options)

    plain = kind.save_arrays
    monkeypatch.setattr(kind, "save_arrays", save)
    model.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    (watched,) = seen
    assert sorted(watched.made) == sorted(watched.tensors)
    assert watched.most == 1
    expected = random_arrays(CONFIGS["plain"], "CLIPModel")
    assert_same(read_as("safetensors", tmp_path / "saved", CONFIGS["plain"], "CLIPModel"), expected)


def test_the_documented_table_is_that_of_the_formats():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text("utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == list(formats.FORMATS)
    titles = {"torch": "PyTorch"}
    for name, _, heads, _, needs, memory in rows:
        entry = formats.FORMATS[name.strip("`")]
        assert (heads == "`CLIPModel`") == entry.whole_only, name
        assert (memory == "one tensor") == entry.streams, name
        words = [titles.get(package, package) for package in entry.packages]
        assert bool(needs) == bool(words), name
        assert all(needs.startswith(word) for word in words), name


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_files_of_a_format_are_its_own(tmp_path, name):
    """Whatever a format writes is replaced by the next conversion into the folder."""
    with Transaction(tmp_path) as save:
        files = formats.format_of(name).write(
            save, random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel", max_shard_size="200KB"
        )
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert all(formats.owns(file) for file in files)
    assert not any(formats.owns(file) for file in ("README.md", "optimizer.pt", "training_args.bin", RECORD_NAME))
