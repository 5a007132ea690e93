"""safetensors files with the names and layouts of the former TensorFlow and Flax models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, assert_same, config_of, random_arrays
from format_cases import arrays_of, heads_and_configs, read_as, write_as
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from clipmb import CheckpointError
from clipmb.common.checkpoint import fit, formats
from clipmb.common.checkpoint.names import dialect_of
from clipmb.common.hub import Source
from clipmb.common.parameters import KINDS, find, known_specs, specs

CONFIG = CONFIGS["plain"]


def in_dialect(arrays, config, head: str, dialect: str) -> dict[str, np.ndarray]:
    """As the former models named and arranged them."""
    found = {}
    for spec in specs(config, head):
        path = spec.path(dialect)
        if dialect == "tf":
            name = "/".join(["clip", *path]).replace("/layers/", "/layers_._") + ":0"
            name = name.replace("token_embedding/embeddings", "token_embedding/weight")
        else:
            name = ".".join(path)
        found[name] = np.ascontiguousarray(KINDS[spec.kind].to_framework(arrays[spec.name])).reshape(
            (1,)
            if spec.name == "logit_scale" and dialect == "tf"
            else KINDS[spec.kind].to_framework(arrays[spec.name]).shape
        )
    return found


def write_dialect(folder: Path, tensors, dialect: str, shards: int = 1, prefix: str = "") -> None:
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": dialect})
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": dialect})
        weight_map |= {prefix + name: file for name in names[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize(
    ("dialect", "shards", "prefix"), [("tf", 1, ""), ("tf", 3, "tfclip_model/"), ("flax", 1, ""), ("flax", 3, "")]
)
def test_every_head_in_every_dialect(tmp_path, dialect, shards, prefix, head, dtype):
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head, dtype)
    write_dialect(tmp_path, in_dialect(arrays, part, head, dialect), dialect, shards, prefix)
    assert_same(read_as("safetensors", tmp_path, part, head), arrays)
    loaded = formats.load(Source(str(tmp_path)))
    assert loaded.decisions == {"dialect": f"{dialect}, from the tensors' names"}
    assert len(loaded.files) == (1 if shards == 1 else shards + 1)


@settings(max_examples=20, deadline=None)
@given(case=heads_and_configs(ALL_HEADS), dialect=st.sampled_from(["tf", "flax"]), shards=st.integers(1, 4))
def test_random_configurations(tmp_path_factory, case, dialect, shards):
    head, part = case
    folder = tmp_path_factory.mktemp("dialect")
    arrays = random_arrays(part, head)
    shards = min(shards, len(arrays))
    write_dialect(folder, in_dialect(arrays, part, head, dialect), dialect, shards)
    assert_same(read_as("safetensors", folder, part, head), arrays)


def test_the_names_decide_and_not_the_metadata(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    write_dialect(tmp_path, in_dialect(arrays, CONFIG, "CLIPModel", "flax"), "pt")
    assert_same(read_as("safetensors", tmp_path, CONFIG, "CLIPModel"), arrays)


def test_a_file_of_any_name(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    write_as("safetensors", tmp_path, arrays, CONFIG, "CLIPModel")
    other = (tmp_path / "model.safetensors").rename(tmp_path / "mine.safetensors")
    assert_same(read_as("safetensors", other, CONFIG, "CLIPModel"), arrays)


def test_views_and_not_copies(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    for dialect in ("tf", "flax"):
        write_dialect(tmp_path / dialect, in_dialect(arrays, CONFIG, "CLIPModel", dialect), dialect)
        loaded = formats.load(Source(str(tmp_path / dialect)))
        assert loaded.decisions["dialect"].startswith(dialect)
        assert not any(array.flags.owndata for array in loaded.tensors.values())


@pytest.mark.parametrize("framework", ["pt", "tf", "flax"])
def test_paths_are_inverted_exactly(framework):
    for spec in known_specs():
        for block in (0, 7, 47):
            path = tuple(str(block) if part == "0" else part for part in spec.path(framework))
            assert find(path, framework) == (spec.name.replace("layers.0.", f"layers.{block}."), spec.kind)


@pytest.mark.parametrize(
    "path",
    ["", "layers", "text_model.encoder.layers.x.mlp.fc1.kernel", "text_model.encoder.layers.00.mlp.fc1.kernel",
     "text_model.encoder.layers.1.2.mlp.fc1.kernel", "text_model.encoder.layers.-1.mlp.fc1.kernel",
     "text_model.encoder.layers.0.mlp.fc1.weight", "text_model.encoder.layers.٣.mlp.fc1.kernel",
     "text_model.encoder.layers.0.mlp.fc1", "logit_scale.kernel", "0", "text_model.0"],
)  # fmt: skip
def test_other_paths_are_nobodys(path):
    assert find(path.split("."), "flax") is None


def test_names_that_dialects_share_decide_nothing():
    assert dialect_of(["logit_scale", "vision_model.embeddings.class_embedding"]) == "pt"
    assert dialect_of(["logit_scale", "text_model.final_layer_norm.bias", "text_projection.kernel"]) == "flax"
    assert dialect_of(["logit_scale", "text_projection.weight"]) == "pt"
    assert dialect_of(["embeddings.token_embedding.weight"]) == "pt"
    assert dialect_of(["clip/logit_scale:0"]) == "tf"
    assert dialect_of([]) == "pt"


def test_a_mixture_of_dialects_is_refused(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    tensors = dict(arrays)
    tensors["text_projection.kernel"] = np.ascontiguousarray(tensors.pop("text_projection.weight").T)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_as("safetensors", tmp_path, CONFIG, "CLIPModel")
    assert caught.value.problems == ["missing: text_projection.weight", "unexpected: text_projection.kernel"]


def test_unknown_names_of_a_dialect_are_reported_as_they_are(tmp_path):
    tensors = in_dialect(random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel", "tf")
    tensors["clip/colour:0"] = np.zeros(3, np.float32)
    write_dialect(tmp_path, tensors, "tf")
    with pytest.raises(CheckpointError) as caught:
        read_as("safetensors", tmp_path, CONFIG, "CLIPModel")
    assert caught.value.problems == ["unexpected: clip/colour:0"]


def test_two_tensors_for_one_parameter(tmp_path):
    tensors = in_dialect(random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel", "tf")
    tensors["tfclip_model/clip/logit_scale:0"] = np.zeros(1, np.float32)
    write_dialect(tmp_path, tensors, "tf")
    with pytest.raises(CheckpointError, match="two tensors"):
        read_as("safetensors", tmp_path, CONFIG, "CLIPModel")


def test_an_index_that_names_one_tensor_twice(tmp_path):
    tensors = in_dialect(random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel", "tf")
    write_dialect(tmp_path, tensors, "tf", 2, "tfclip_model/")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["clip/logit_scale:0"] = weight_map["tfclip_model/clip/logit_scale:0"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="twice"):
        formats.load(Source(str(tmp_path)))


def test_a_wrong_number_of_axes_is_a_checkpoint_error(tmp_path):
    tensors = in_dialect(random_arrays(CONFIG, "CLIPModel"), CONFIG, "CLIPModel", "flax")
    tensors["vision_model.embeddings.patch_embedding.kernel"] = np.zeros((4, 48), np.float32)
    write_dialect(tmp_path, tensors, "flax")
    with pytest.raises(CheckpointError, match=r"shape: \S+\.patch_embedding\.weight is \(4, 48\) and must be \("):
        read_as("safetensors", tmp_path, CONFIG, "CLIPModel")


def test_a_tower_comes_out_of_the_whole(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    write_dialect(tmp_path, in_dialect(arrays, CONFIG, "CLIPModel", "tf"), "tf")
    part = config_of("CLIPTextModel", CONFIG)
    found, _ = fit(formats.load(Source(str(tmp_path))).tensors, specs(part, "CLIPTextModel"), "CLIPTextModel")
    assert_same(found, {name: arrays[name] for name in found})


def test_what_is_written_is_canonical(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    assert write_as("safetensors", tmp_path, arrays, CONFIG, "CLIPModel") == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), arrays)
