"""The weight table, safetensors files of every dialect, damage, and saves that are killed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, config_of, equal, random_arrays, write_checkpoint
from conftest import TESTS
from processes import output
from safetensors.numpy import load_file, save_file

from clipmb import CheckpointError, CLIPConfig
from clipmb.common.checkpoint import fit, safetensors, write_safetensors
from clipmb.common.checkpoint.sharding import parse_size
from clipmb.common.checkpoint.tensors import is_finite
from clipmb.common.dtypes import BFLOAT16
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, specs
from clipmb.common.saving import Transaction

CONFIG = CONFIGS["plain"]


def read(folder: Path) -> dict[str, np.ndarray]:
    loaded = safetensors.read(Source(str(folder)))
    assert loaded is not None
    return dict(loaded.tensors)


# -- the table --------------------------------------------------------------------------------------------------------


def test_vit_b_32_has_the_published_number_of_parameters():
    table = specs(CLIPConfig(), "CLIPModel")
    assert len(table) == 398
    assert sum(int(np.prod(spec.shape)) for spec in table) == 151_277_313


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_inverted_exactly(kind):
    row = KINDS[kind]
    shape = (2, 3, 5, 7)[: len(row.axes) or 1]
    array = np.arange(np.prod(shape)).reshape(shape)
    assert (row.to_canonical(row.to_framework(array)) == array).all()
    if row.axes:
        assert row.to_framework(array).shape != shape


def test_convolution_and_linear_layouts():
    assert KINDS["linear"].to_framework(np.zeros((2, 3))).shape == (3, 2)
    assert KINDS["convolution"].to_framework(np.zeros((2, 3, 5, 7))).shape == (5, 7, 3, 2)


def test_paths_per_framework():
    table = {spec.name: spec for spec in specs(CONFIG, "CLIPModel")}
    block = "text_model.encoder.layers.0"
    query = table[f"{block}.self_attn.q_proj.weight"]
    assert query.path("flax") == (*block.split("."), "self_attn", "q_proj", "kernel")
    norms = [table[f"{block}.layer_norm1.{leaf}"] for leaf in ("weight", "bias")]
    assert [spec.path("flax")[-1] for spec in norms] == ["scale", "bias"]
    assert [spec.path("tf")[-1] for spec in norms] == ["gamma", "beta"]
    assert [spec.path("pt") for spec in norms] == [tuple(spec.name.split(".")) for spec in norms]


# -- reading and writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_round_trip(tmp_path, dtype, size):
    arrays = random_arrays(CONFIG, "CLIPModel", dtype="float64")
    import ml_dtypes

    arrays = {name: a.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for name, a in arrays.items()}
    with Transaction(tmp_path) as save:
        files = write_safetensors(save, arrays, max_shard_size=size)
    assert (len(files) > 1) == (size == "20KB")
    assert equal(read(tmp_path), arrays)


def test_transposed_views_are_written_in_their_own_order(tmp_path):
    array = np.arange(6.0).reshape(2, 3).T
    with Transaction(tmp_path) as save:
        write_safetensors(save, {"a": array, "b": array[::-1]})
    tensors = load_file(tmp_path / "model.safetensors")
    assert (tensors["a"] == array).all()
    assert (tensors["b"] == array[::-1]).all()


def test_reading_maps_the_file_and_never_changes_it(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    before = (tmp_path / "model.safetensors").read_bytes()
    tensors = read(tmp_path)
    for array in tensors.values():
        assert not array.flags.owndata
        array[...] = 0
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_single_file_replaces_shards_and_the_other_way_round(tmp_path):
    names = lambda: {path.name for path in tmp_path.iterdir()}  # noqa: E731
    (tmp_path / "README.md").write_text("mine")
    write_checkpoint(tmp_path, CONFIG, max_shard_size="20KB")
    sharded = names()
    assert "model.safetensors.index.json" in sharded
    write_checkpoint(tmp_path, CONFIG, seed=1)
    assert names() == {"README.md", "config.json", "model.safetensors"}
    write_checkpoint(tmp_path, CONFIG, max_shard_size="20KB")
    assert names() == sharded


def test_variant(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    with Transaction(tmp_path) as save:
        write_safetensors(save, arrays, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").exists()
    assert safetensors.read(Source(str(tmp_path))) is None
    assert equal(dict(safetensors.read(Source(str(tmp_path)), "fp16").tensors), arrays)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 1572864), ("7", 7), (9, 9), ("200kb", 200_000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("bad", [0, -1, "5 parsecs", "", "-5GB", "0", None, True])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="size"):
        parse_size(bad)


# -- dialects and fitting ---------------------------------------------------------------------------------------------


def chosen(tensors, head, **options):
    part = config_of(head, CONFIG)
    return fit(tensors, specs(part, head), head, **options)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_every_head_fits_its_own(head):
    arrays = random_arrays(config_of(head, CONFIG), head)
    found, info = chosen(arrays, head)
    assert equal(found, arrays)
    assert info.to_dict() == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


@pytest.mark.parametrize("head", [head for head in ALL_HEADS if head != "CLIPForImageClassification"])
def test_every_tower_comes_out_of_the_whole(head):
    whole = random_arrays(CONFIG, "CLIPModel")
    found, info = chosen(whole, head)
    assert found.keys() == {spec.name for spec in specs(config_of(head, CONFIG), head)}
    assert all(found[name] is whole[name] or (found[name] == whole[name]).all() for name in found)
    assert info.unexpected_keys == []


@pytest.mark.parametrize("head", ["CLIPTextModel", "CLIPVisionModel"])
def test_names_without_the_tower(head):
    """The form in which transformers 5 saves the single towers."""
    arrays = random_arrays(config_of(head, CONFIG), head)
    found, _ = chosen({name.split(".", 1)[1]: array for name, array in arrays.items()}, head)
    assert equal(found, arrays)


def test_prefix_and_buffers_of_old_files():
    arrays = random_arrays(CONFIG, "CLIPModel")
    old = {f"clip.{name}": array for name, array in arrays.items()}
    old["clip.text_model.embeddings.position_ids"] = np.arange(13)[None]
    old["clip.vision_model.embeddings.position_ids"] = np.arange(26)[None]
    old["clip.logit_scale"] = arrays["logit_scale"].reshape(1)
    assert equal(chosen(old, "CLIPModel")[0], arrays)


def test_every_problem_is_reported_at_once():
    arrays = random_arrays(CONFIG, "CLIPModel")
    first, second = "text_model.final_layer_norm.bias", "vision_model.encoder.layers.1.mlp.fc1.weight"
    arrays.pop(first)
    arrays[second] = arrays[second].T
    arrays["text_model.encoder.layers.3.mlp.fc1.bias"] = arrays["text_model.encoder.layers.2.mlp.fc1.bias"]
    arrays["colour"] = np.zeros(3, np.float32)
    arrays["logit_scale"] = np.zeros((), np.int64)
    with pytest.raises(CheckpointError) as caught:
        chosen(arrays, "CLIPModel")
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for part in (first, second, "(48, 80)", "(80, 48)", "colour", "layers.3.mlp.fc1.bias", "logit_scale is int64"):
        assert part in text


def test_the_ways_out_are_explicit():
    arrays = random_arrays(CONFIG, "CLIPModel")
    arrays.pop("logit_scale")
    arrays["colour"] = arrays["visual_projection.weight"]
    arrays["visual_projection.weight"] = np.zeros((3, 3), np.float32)
    with pytest.raises(CheckpointError, match="visual_projection"):
        chosen(arrays, "CLIPModel", strict=False)
    with pytest.raises(CheckpointError, match="colour"):
        chosen(arrays, "CLIPModel", ignore_mismatched_sizes=True)
    found, info = chosen(arrays, "CLIPModel", strict=False, ignore_mismatched_sizes=True)
    assert info.to_dict() == {
        "missing_keys": ["logit_scale"],
        "unexpected_keys": ["colour"],
        "mismatched_keys": [("visual_projection.weight", (3, 3), (24, 48))],
        "error_msgs": [],
    }
    assert "logit_scale" not in found


def test_two_tensors_for_one_parameter():
    arrays = random_arrays(CONFIG, "CLIPModel")
    arrays["clip.logit_scale"] = arrays["logit_scale"]
    with pytest.raises(CheckpointError, match="logit_scale"):
        chosen(arrays, "CLIPModel")


# -- damage -----------------------------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[int, bytes, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return size, content[8 : 8 + size], content[8 + size :]


def test_truncation_anywhere_is_a_checkpoint_error(tmp_path):
    path = write_checkpoint(tmp_path, CONFIG) / "model.safetensors"
    content = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(tmp_path)


def test_flipped_bits_in_the_header_never_give_other_weights(tmp_path):
    """A flip is a CheckpointError, or harmless (in the metadata, or between spellings of the same JSON)."""
    path = write_checkpoint(tmp_path, CONFIG) / "model.safetensors"
    content = bytearray(path.read_bytes())
    original = random_arrays(CONFIG, "CLIPModel")
    size = 8 + struct.unpack("<Q", content[:8])[0]
    rng = np.random.default_rng(0)
    refused = 0
    for position in [*range(8), *rng.integers(8, size, 400)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert equal(chosen(read(tmp_path), "CLIPModel")[0], original)
        except CheckpointError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"Q99","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"C64","shape":[2],"data_offsets":[0,16]}}',
        b"\xff\xfe\x00",
    ],
)
def test_hostile_headers(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(tmp_path)


def test_a_header_that_claims_to_be_huge(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError):
        read(tmp_path)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", "\\\\host\\b", "", "a\0b"]
)
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file({"logit_scale": np.zeros((), np.float32)}, tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": file}}))
    with pytest.raises(CheckpointError, match="outside"):
        read(folder)


@pytest.mark.parametrize(
    "content", ["", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}']
)
def test_damaged_indices(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        read(tmp_path)


def test_missing_shards_and_tensors_are_listed(tmp_path):
    write_checkpoint(tmp_path, CONFIG, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*"))
    assert len(shards) > 2
    shards[0].unlink()
    shards[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path)
    assert caught.value.problems == [shards[0].name, shards[1].name]


def test_a_shard_that_lacks_a_tensor(tmp_path):
    write_checkpoint(tmp_path, CONFIG, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["logit_scale"]
    tensors = load_file(tmp_path / file)
    del tensors["logit_scale"]
    save_file(tensors, tmp_path / file)
    with pytest.raises(CheckpointError, match=f"logit_scale in {file}"):
        read(tmp_path)


def test_symbolic_links_are_followed(tmp_path):
    """The hub's cache is made of them."""
    blobs = write_checkpoint(tmp_path / "blobs", CONFIG)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert equal(read(snapshot), random_arrays(CONFIG, "CLIPModel"))


def test_saving_into_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match="folder"), Transaction(path):
        pass
    assert path.read_text() == "mine"


def test_an_error_while_saving_leaves_everything(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail() -> None:
        with Transaction(tmp_path) as save:
            save.write("config.json", "{}")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cases import CONFIGS, write_checkpoint
from kills import at_every_operation

# A sharded checkpoint is overwritten by another one.
at_every_operation(
    Path(sys.argv[1]),
    lambda target: write_checkpoint(target, CONFIGS["plain"], max_shard_size="100KB"),
    lambda target: write_checkpoint(target, CONFIGS["stress"], seed=1),
)
"""


def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    moments = int(output("-c", KILLED, tmp_path, TESTS))
    assert moments > 15
    versions = [(CONFIGS["plain"], 0), (CONFIGS["stress"], 1)]
    seen = []
    for k in range(1, moments + 1):
        config = CLIPConfig.from_pretrained(tmp_path / str(k))
        arrays, _ = fit(read(tmp_path / str(k)), specs(config, "CLIPModel"), "CLIPModel")
        matching = [
            i
            for i, (whole, seed) in enumerate(versions)
            if config.text_config.layer_norm_eps == whole.text_config.layer_norm_eps
            and equal(arrays, random_arrays(whole, "CLIPModel", seed))
        ]
        assert len(matching) == 1, f"killed at operation {k}: neither the old nor the new checkpoint"
        seen += matching
        with Transaction(tmp_path / str(k)) as save:  # the next writer repairs
            save.write("vocab.json", "{}")
        assert not [path.name for path in (tmp_path / str(k)).iterdir() if path.name.startswith(".")]
    assert seen == sorted(seen)
    assert {0, 1} == set(seen)
    assert seen.count(1) > 5  # some kills came after the commit and before every file was in place


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_every_value_of_16_bits_is_known_to_be_finite_or_not(dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(values.astype(np.float32))
    assert [is_finite(values[k : k + 1]) for k in range(len(values))] == finite.tolist()
    assert is_finite(values[finite])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_in_any_place_makes_an_array_not_finite(dtype, value):
    ordinary = np.linspace(-3e4, 3e4, 200_000).astype(dtype).reshape(400, 500)
    for place in (0, 65_535, 65_536, 199_999):
        array = ordinary.copy()
        array.flat[place] = value
        for view in (array, array.T, array[::-1]):
            assert not is_finite(view)
    assert is_finite(ordinary)
    assert is_finite(np.zeros((0, 3), dtype))
    assert not is_finite(np.asarray(value, dtype))


@pytest.mark.parametrize("value", [65_519, -65_519, 65_520, -65_520, 1e30])
def test_what_float16_cannot_hold_is_not_finite_in_it(value):
    for dtype in (np.float32, np.float64):
        assert is_finite(np.full(3, value, dtype))
        with np.errstate(over="ignore"):
            assert is_finite(np.full(3, value, dtype), "float16") == np.isfinite(np.float16(value))
