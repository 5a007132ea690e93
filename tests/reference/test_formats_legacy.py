"""The files of transformers 4.57.6's TensorFlow and Flax models, both ways: bitwise equal weights, equal outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch  # before tensorflow
import transformers
from cases import CONFIGS, assert_same, config_of, inputs_of
from format_cases import arrays_of, read_as, write_as

from clipmb.common.parameters import KINDS, specs

CONFIG = CONFIGS["plain"]
TF_HEADS = ("CLIPModel", "CLIPTextModel", "CLIPVisionModel")
FLAX_HEADS = (*TF_HEADS, "CLIPTextModelWithProjection")
SHARDS = {"single": {}, "sharded": {"max_shard_size": "60KB"}}


def former_config(head: str):
    part = config_of(head, CONFIG)
    return getattr(transformers, type(part).__name__).from_dict(part.to_dict())


def write_for_them(name: str, folder: Path, arrays, head: str, size: str) -> list[str]:
    files = write_as(name, folder, arrays, config_of(head, CONFIG), head, size)
    former_config(head).save_pretrained(folder)
    return files


# -- TensorFlow -------------------------------------------------------------------------------------------------------


def tf_weights(model, head: str) -> dict:
    """The reference's variables by our parameters."""
    by_path = {}
    for weight in model.weights:
        path = weight.name.removesuffix(":0").partition("/clip/")[2].replace("layers_._", "layers/").split("/")
        if path[-2:] == ["token_embedding", "weight"]:
            path[-1] = "embeddings"
        by_path[tuple(path)] = weight
    table = specs(config_of(head, CONFIG), head)
    assert by_path.keys() == {spec.path("tf") for spec in table}
    return {spec: by_path[spec.path("tf")] for spec in table}


def tf_model(head: str, arrays=None):
    model = getattr(transformers, f"TF{head}")(former_config(head))
    model.build_in_name_scope()
    if arrays is not None:
        for spec, weight in tf_weights(model, head).items():
            weight.assign(KINDS[spec.kind].to_framework(arrays[spec.name]).reshape(weight.shape))
    return model


def assert_tf_holds(model, head: str, arrays) -> None:
    for spec, weight in tf_weights(model, head).items():
        expected = KINDS[spec.kind].to_framework(arrays[spec.name]).reshape(weight.shape).astype(np.float32)
        assert weight.numpy().tobytes() == expected.tobytes(), spec.name


def leaves(output) -> list[np.ndarray]:
    """Every tensor of an output."""
    inside = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for part in inside for leaf in leaves(part)] if isinstance(inside, tuple) else [np.asarray(inside)]


def assert_equal_outputs(found, expected) -> None:
    found, expected = leaves(found), leaves(expected)
    assert len(found) == len(expected) > 3
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.backend("tf")
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("safe", [False, True], ids=["h5", "safetensors"])
@pytest.mark.parametrize("head", TF_HEADS)
def test_files_of_the_former_tensorflow_models_are_read(tmp_path, head, safe, shards):
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head)
    tf_model(head, arrays).save_pretrained(tmp_path, safe_serialization=safe, **SHARDS[shards])
    sharded = any(path.name.endswith(".index.json") for path in tmp_path.iterdir())
    assert sharded == (shards == "sharded")
    assert_same(read_as("safetensors" if safe else "tf-h5", tmp_path, part, head), arrays)


@pytest.mark.backend("tf")
@pytest.mark.parametrize(
    ("size", "dtype"), [("5GB", "float32"), ("5GB", "float16"), ("5GB", "bfloat16"), ("60KB", "float32")]
)
@pytest.mark.parametrize("head", TF_HEADS)
def test_the_former_tensorflow_models_load_what_is_written(tmp_path, head, size, dtype):
    arrays = arrays_of(config_of(head, CONFIG), head, dtype)
    write_for_them("tf-h5", tmp_path, arrays, head, size)
    model, info = getattr(transformers, f"TF{head}").from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(values) for key, values in info.items() if values} == {}
    assert_tf_holds(model, head, arrays)
    if size == "5GB" and dtype == "float32":
        inputs = inputs_of(head, CONFIG)
        options = {"output_hidden_states": True}
        assert_equal_outputs(model(inputs, **options), tf_model(head, arrays)(inputs, **options))


@pytest.mark.backend("tf")
@pytest.mark.parametrize("head", TF_HEADS)
def test_keras_2_loads_what_is_written_by_the_order_of_the_weights(tmp_path, head):
    """Keras' own load_weights looks at no name: another order would exchange matrices of the same shape."""
    arrays = arrays_of(config_of(head, CONFIG), head)
    write_for_them("tf-h5", tmp_path, arrays, head, "5GB")
    model = tf_model(head)
    model.load_weights(tmp_path / "tf_model.h5")
    assert_tf_holds(model, head, arrays)


@pytest.mark.backend("tf")
def test_a_file_of_the_former_models_has_the_same_lists_of_names(tmp_path):
    import h5py

    for head in TF_HEADS:
        arrays = arrays_of(config_of(head, CONFIG), head)
        tf_model(head, arrays).save_pretrained(tmp_path / "theirs" / head)
        write_for_them("tf-h5", tmp_path / "ours" / head, arrays, head, "5GB")
        with (
            h5py.File(tmp_path / "theirs" / head / "tf_model.h5") as theirs,
            h5py.File(tmp_path / "ours" / head / "tf_model.h5") as ours,
        ):
            without = [name.split("/", 1)[1] for name in theirs["clip"].attrs["weight_names"]]
            assert [name.decode().split("/", 1)[1] for name in ours["clip"].attrs["weight_names"]] == without
            assert set(ours) == set(theirs)
            assert set(ours.attrs) == set(theirs.attrs)


# -- Flax -------------------------------------------------------------------------------------------------------------


def flax_model(head: str):
    return getattr(transformers, f"Flax{head}")(former_config(head))


def nested(arrays, head: str) -> dict:
    from flax.traverse_util import unflatten_dict

    table = specs(config_of(head, CONFIG), head)
    return unflatten_dict({spec.path("flax"): KINDS[spec.kind].to_framework(arrays[spec.name]) for spec in table})


def tree_of(arrays, head: str) -> dict:
    import jax

    return jax.tree.map(jax.numpy.asarray, nested(arrays, head))


def assert_same_tree(found, expected) -> None:
    from flax.traverse_util import flatten_dict

    flat = [{"/".join(path): np.asarray(a) for path, a in flatten_dict(tree).items()} for tree in (found, expected)]
    assert_same(*flat)


@pytest.mark.backend("flax")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("safe", "shards"), [(False, "single"), (False, "sharded"), (True, "single"), (True, "sharded")]
)
@pytest.mark.parametrize("head", FLAX_HEADS)
def test_files_of_the_former_flax_models_are_read(tmp_path, head, safe, shards, dtype):
    """Asked for safetensors in shards, the reference writes msgpack all the same."""
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head, dtype)
    options = {"max_shard_size": "20KB"} if shards == "sharded" else {}
    flax_model(head).save_pretrained(tmp_path, params=tree_of(arrays, head), safe_serialization=safe, **options)
    sharded = any(path.name.endswith(".index.json") for path in tmp_path.iterdir())
    assert sharded == (shards == "sharded")
    assert_same(read_as("safetensors" if safe and not sharded else "flax-msgpack", tmp_path, part, head), arrays)


@pytest.mark.backend("flax")
@pytest.mark.parametrize(
    ("size", "dtype"), [("5GB", "float32"), ("5GB", "float16"), ("5GB", "bfloat16"), ("20KB", "float32")]
)
@pytest.mark.parametrize("head", FLAX_HEADS)
def test_the_former_flax_models_load_what_is_written(tmp_path, head, size, dtype):
    arrays = arrays_of(config_of(head, CONFIG), head, dtype)
    write_for_them("flax-msgpack", tmp_path, arrays, head, size)
    model = getattr(transformers, f"Flax{head}").from_pretrained(tmp_path)
    assert model._missing_keys == set()
    expected = tree_of(arrays, head)
    assert_same_tree(model.params, expected)  # neither a name too few nor one too many
    if size == "5GB" and dtype == "float32":
        inputs, options = inputs_of(head, CONFIG), {"output_hidden_states": True}
        assert_equal_outputs(model(**inputs, **options), flax_model(head)(**inputs, **options, params=expected))


@pytest.mark.backend("flax")
@pytest.mark.parametrize("chunk", [2**30, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flax_restores_what_is_written_and_the_other_way_round(tmp_path, monkeypatch, chunk, dtype):
    """With arrays divided as those of more than a gigabyte are."""
    from flax import serialization

    from clipmb.common.checkpoint import flax_msgpack

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(flax_msgpack, "CHUNK", chunk)
    arrays = arrays_of(CONFIG, "CLIPModel", dtype)
    tree = nested(arrays, "CLIPModel")
    write_as("flax-msgpack", tmp_path, arrays, CONFIG, "CLIPModel")
    content = (tmp_path / "flax_model.msgpack").read_bytes()
    assert (content.count(b"__msgpack_chunked_array__") > 0) == (chunk == 100)
    assert_same_tree(serialization.msgpack_restore(content), tree)
    theirs = serialization.msgpack_serialize(tree)
    (tmp_path / "flax_model.msgpack").write_bytes(theirs)
    assert_same(read_as("flax-msgpack", tmp_path, CONFIG, "CLIPModel"), arrays)
    assert len(theirs) == pytest.approx(len(content), rel=0.05)


# -- from_pretrained --------------------------------------------------------------------------------------------------


@pytest.mark.backend("pt")
@pytest.mark.parametrize("name", ["tf-h5", "flax-msgpack", "keras-weights"])
def test_models_load_every_format(tmp_path, name):
    from clipmb import pt

    arrays = arrays_of(CONFIG, "CLIPModel")
    write_for_them(name, tmp_path, arrays, "CLIPModel", "60KB")
    state = pt.CLIPModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], torch.from_numpy(array)) for name, array in arrays.items())
    part = config_of("CLIPVisionModel", CONFIG)
    vision = pt.CLIPVisionModel.from_pretrained(tmp_path, config=part).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in vision.items())
