"""tf_model.h5: layout, round trips, damage and hostile files."""

from __future__ import annotations

import importlib
import json
import os
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, assert_same, config_of
from format_cases import arrays_of, heads_and_configs, read_as, write_as, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipmb import CheckpointError, CLIPConfig
from clipmb.common.checkpoint import fit, formats
from clipmb.common.checkpoint.h5 import read_h5
from clipmb.common.errors import MissingBackendError
from clipmb.common.hub import Source
from clipmb.common.parameters import specs

CONFIG = CONFIGS["plain"]
FORMAT = "tf-h5"


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_round_trip(tmp_path, head, dtype, size):
    part, arrays = written(FORMAT, tmp_path, head, dtype, size)
    assert_same(read_as(FORMAT, tmp_path, part, head), arrays)
    assert (
        (tmp_path / "tf_model.h5.index.json").exists() == (size == "20KB") == (not (tmp_path / "tf_model.h5").exists())
    )


def test_bfloat16_is_widened_without_a_change_of_value(tmp_path):
    part, arrays = written(FORMAT, tmp_path, dtype="bfloat16")
    assert_same(read_as(FORMAT, tmp_path, part, "CLIPModel"), {n: a.astype(np.float32) for n, a in arrays.items()})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=heads_and_configs(ALL_HEADS), size=st.integers(1, 20_000), dtype=st.sampled_from(["float32", "float16"]))
def test_round_trip_of_random_configurations(tmp_path_factory, case, size, dtype):
    head, part = case
    folder = tmp_path_factory.mktemp("h5")
    arrays = arrays_of(part, head, dtype)
    files = write_as(FORMAT, folder, arrays, part, head, size)
    assert sorted(files) == sorted(os.listdir(folder))
    assert_same(read_as(FORMAT, folder, part, head), arrays)


def test_layout_of_a_single_file(tmp_path):
    written(FORMAT, tmp_path)
    with h5py.File(tmp_path / "tf_model.h5") as file:
        assert set(file) == {"clip", "top_level_model_weights"}
        assert list(file.attrs["layer_names"]) == [b"clip"]
        names = [name.decode() for name in file["clip"].attrs["weight_names"]]
        assert len(file["top_level_model_weights"].attrs["weight_names"]) == 0
        assert names[:3] == [
            "tfclip_model/clip/logit_scale:0",
            "tfclip_model/clip/text_model/embeddings/token_embedding/weight:0",
            "tfclip_model/clip/text_model/embeddings/position_embedding/embeddings:0",
        ]
        # The order of the former models' weights, by which Keras 2's load_weights goes.
        block = "tfclip_model/clip/text_model/encoder/layers_._0"
        assert [name for name in names if name.startswith(f"{block}/self_attn") and "kernel" in name] == [
            f"{block}/self_attn/{part}_proj/kernel:0" for part in ("q", "k", "v", "out")
        ]
        assert names[-2:] == [f"tfclip_model/clip/{part}_projection/kernel:0" for part in ("visual", "text")]
        assert file["clip"]["tfclip_model/clip/logit_scale:0"].shape == (1,)
        assert file["clip"]["tfclip_model/clip/vision_model/embeddings/patch_embedding/kernel:0"].shape == (4, 4, 3, 48)


def test_layout_of_shards(tmp_path):
    written(FORMAT, tmp_path, size="20KB")
    index = json.loads((tmp_path / "tf_model.h5.index.json").read_text())["weight_map"]
    assert all(name.startswith("tfclip_model/clip/") for name in index)
    for shard in sorted(set(index.values())):
        with h5py.File(tmp_path / shard) as file:
            names = {name.decode() for name in file.attrs["layer_names"]}
            assert names == {name.removeprefix("tfclip_model/") for name, where in index.items() if where == shard}
            assert all(name in file for name in names)


def test_instances_of_any_name_are_read(tmp_path):
    part, arrays = written(FORMAT, tmp_path)
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "r+") as file:
        file["clip"].move("tfclip_model", "tfclip_model_17")
    assert_same(read_as(FORMAT, tmp_path, part, "CLIPModel"), arrays)


def test_long_lists_of_names_are_divided_as_keras_divides_them(tmp_path):
    text = {"hidden_size": 4, "intermediate_size": 2, "num_attention_heads": 1, "num_hidden_layers": 60}
    part = CLIPConfig({**text, "vocab_size": 3}, {"num_hidden_layers": 0, "hidden_size": 2, "num_attention_heads": 1})
    arrays = arrays_of(part, "CLIPModel")
    write_as(FORMAT, tmp_path, arrays, part, "CLIPModel")
    with h5py.File(tmp_path / "tf_model.h5") as file:
        attributes = file["clip"].attrs
        assert sorted(attributes) == ["weight_names0", "weight_names1"]
        assert sum(len(attributes[name]) for name in attributes) == len(arrays)
    assert_same(read_as(FORMAT, tmp_path, part, "CLIPModel"), arrays)


def test_a_single_file_is_recognised_by_its_content(tmp_path):
    part, arrays = written(FORMAT, tmp_path)
    other = (tmp_path / "tf_model.h5").rename(tmp_path / "weights-of-mine.hdf5")
    assert_same(read_as(FORMAT, other, part, "CLIPModel"), arrays)


def test_arrays_are_mapped_and_the_file_never_changes(tmp_path):
    written(FORMAT, tmp_path)
    before = (tmp_path / "tf_model.h5").read_bytes()
    tensors = formats.load(Source(str(tmp_path))).tensors
    for name in tensors:
        array = tensors[name]
        assert not array.flags.owndata
        array[...] = 0
    assert (tmp_path / "tf_model.h5").read_bytes() == before


def test_compressed_and_big_endian_arrays_are_read(tmp_path):
    part, arrays = written(FORMAT, tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        group = file["clip/tfclip_model/clip/text_model/embeddings"]
        for name, options in {
            "token_embedding/weight:0": {"compression": "gzip", "shuffle": True},
            "position_embedding/embeddings:0": {"dtype": ">f4"},
        }.items():
            values = group[name][()]
            del group[name]
            group.create_dataset(name, data=values, **options)
    assert_same(read_as(FORMAT, tmp_path, part, "CLIPModel"), arrays)


def test_unknown_and_missing_names_are_reported_together(tmp_path):
    part, _ = written(FORMAT, tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        file["clip/tfclip_model/clip"].move("logit_scale:0", "colour:0")
    with pytest.raises(CheckpointError) as caught:
        read_as(FORMAT, tmp_path, part, "CLIPModel")
    assert len(caught.value.problems) == 2
    assert "missing: logit_scale" in str(caught.value)
    assert "colour:0" in str(caught.value)


def test_two_arrays_for_one_parameter(tmp_path):
    part, _ = written(FORMAT, tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        file["other/clip/logit_scale:0"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError, match="two tensors"):
        read_as(FORMAT, tmp_path, part, "CLIPModel")


def test_no_variant_is_claimed(tmp_path):
    written(FORMAT, tmp_path)
    with pytest.raises(CheckpointError, match="variant 'fp16'"):
        formats.load(Source(str(tmp_path)), "fp16")


def test_without_h5py_the_fix_is_named(tmp_path, monkeypatch):
    written(FORMAT, tmp_path)
    real = importlib.import_module

    def without(name: str, *args):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingBackendError, match=r"pip install \"clipmb\[convert\]\""):
        formats.load(Source(str(tmp_path)))


# -- damage and hostile files -----------------------------------------------------------------------------------------


def test_truncation_anywhere_is_a_checkpoint_error(tmp_path):
    part, _ = written(FORMAT, tmp_path)
    path = tmp_path / "tf_model.h5"
    content = path.read_bytes()
    for size in [0, 1, 7, 8, 96, 2048, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"tf_model\.h5"):
            read_as(FORMAT, tmp_path, part, "CLIPModel")


def test_flipped_bits_are_a_checkpoint_error_or_leave_every_shape(tmp_path):
    part, arrays = written(FORMAT, tmp_path, "CLIPTextModel")
    path = tmp_path / "tf_model.h5"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        flipped = bytearray(content)
        flipped[int(rng.integers(20_000))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = read_as(FORMAT, tmp_path, part, "CLIPTextModel")
            assert all(found[name].shape == arrays[name].shape for name in arrays)
        except CheckpointError:
            refused += 1
    assert refused > 20


def external_link(file: h5py.File, folder: Path) -> None:
    file["clip/x:0"] = h5py.ExternalLink(str(folder / "other.h5"), "/secret")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["clip/x:0"] = h5py.SoftLink("/clip")


def dangling_link(file: h5py.File, folder: Path) -> None:
    file["clip/x:0"] = h5py.SoftLink("/nowhere")


def loop(file: h5py.File, folder: Path) -> None:
    file["clip/again"] = file["clip"]


def second_name(file: h5py.File, folder: Path) -> None:
    file["clip/x:0"] = np.zeros(3)
    file["clip/y:0"] = file["clip/x:0"]


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (4,))
    file.create_virtual_dataset("clip/x:0", layout)


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret.bin").write_bytes(b"\1" * 16)
    file.create_dataset("clip/x:0", (4,), "f4", external=[(str(folder / "secret.bin"), 0, 16)])


def objects(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", data=["a", "b"], dtype=h5py.string_dtype())


def structure(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", data=np.zeros(3, [("a", "f4"), ("b", "i4")]))


def named_type(file: h5py.File, folder: Path) -> None:
    file["clip/x"] = np.dtype("f4")


def no_shape(file: h5py.File, folder: Path) -> None:
    file["clip/x:0"] = h5py.Empty("f4")


def unwritten_terabytes(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", (2**40,), "f4")


def sparse_terabytes(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", (2**40,), "f4", chunks=(2**20,))


def bomb(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", data=np.zeros(2**24, "f4"), compression="gzip")


def many_small_bombs(file: h5py.File, folder: Path) -> None:
    for i in range(40):
        file.create_dataset(f"clip/x{i}:0", data=np.zeros(2**18, "f4"), compression="gzip")


def huge_chunk(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", (4,), "f4", chunks=(2**24,), maxshape=(None,))


def unknown_filter(file: h5py.File, folder: Path) -> None:
    file.create_dataset("clip/x:0", data=np.zeros(99, "f4"), compression="lzf")


def nesting(file: h5py.File, folder: Path) -> None:
    file["/".join("g" * 500)] = np.zeros(1)


HOSTILE = {
    external_link: "link", soft_link: "link", dangling_link: "link", loop: "second name", second_name: "second name",
    virtual: "another file", external_storage: "another file", objects: "type object", structure: "values of type",
    named_type: "neither", no_shape: "no shape", unwritten_terabytes: "claims", sparse_terabytes: "compressed arrays",
    bomb: "compressed arrays", many_small_bombs: "compressed arrays",
    huge_chunk: "compressed arrays", unknown_filter: "filters", nesting: "deeper",
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_hostile_files_are_refused_before_memory_is_taken(tmp_path, attack):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.ones(4, "f4")
    folder = tmp_path / "inside"
    folder.mkdir()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file["clip/logit_scale:0"] = np.zeros(1, "f4")
        attack(file, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=HOSTILE[attack]):
            formats.load(Source(str(folder)))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_every_problem_of_a_file_is_listed(tmp_path):
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        for attack in (external_link, objects):
            attack(file, tmp_path) if attack is external_link else file.create_dataset("y", data=["a"])
    with pytest.raises(CheckpointError) as caught:
        read_h5(tmp_path / "tf_model.h5")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("place", "message"), [("of another", "lies inside"), ("behind the end", "claims 64 bytes|invalid dataset size")]
)
def test_arrays_at_a_wrong_place_are_refused(tmp_path, place, message):
    """The place of an array is 8 bytes without a checksum; damage to it must not give the weights of another array."""
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        first = file.create_dataset("clip/a:0", data=np.arange(16, dtype="f4")).id
        second = file.create_dataset("clip/b:0", data=np.ones(16, "f4")).id
        file.flush()
        old, new = first.get_offset(), second.get_offset()
    content = path.read_bytes()
    new = new if place == "of another" else len(content) - 32
    assert content.count(old.to_bytes(8, "little")) == 1
    path.write_bytes(content.replace(old.to_bytes(8, "little"), new.to_bytes(8, "little")))
    with pytest.raises(CheckpointError, match=message):
        read_h5(path)


@pytest.mark.parametrize("file", ["../tf_model.h5", "/etc/passwd"])
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    (tmp_path / "tf_model.h5.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="outside"):
        formats.load(Source(str(tmp_path)))


def test_missing_shards_are_listed(tmp_path):
    written(FORMAT, tmp_path, size="20KB")
    shards = sorted(tmp_path.glob("tf_model-*"))
    shards[1].unlink()
    with pytest.raises(CheckpointError) as caught:
        formats.load(Source(str(tmp_path)))
    assert caught.value.problems == [shards[1].name]


def test_a_wrong_number_of_axes_is_a_checkpoint_error(tmp_path):
    part, _ = written(FORMAT, tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "r+") as file:
        where = "clip/tfclip_model/clip/text_projection/kernel:0"
        del file[where]
        file[where] = np.zeros(3, "f4")
    with pytest.raises(CheckpointError, match=r"shape: text_projection\.weight is \(3,\) and must be \("):
        read_as(FORMAT, tmp_path, part, "CLIPModel")


def test_a_tower_comes_out_of_the_whole(tmp_path):
    _, arrays = written(FORMAT, tmp_path)
    part = config_of("CLIPVisionModel", CONFIG)
    found, _ = fit(formats.load(Source(str(tmp_path))).tensors, specs(part, "CLIPVisionModel"), "CLIPVisionModel")
    assert_same(found, {name: arrays[name] for name in found})
