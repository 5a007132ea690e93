"""Methods and attributes of the former library's models that are small, and what loading does with names and shapes."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from conftest import BACKENDS
from safetensors.numpy import load_file, save_file

import clipmb
from clipmb import CheckpointError
from clipmb.common.features import to_numpy

PREFIX = {"pt": "", "tf": "TF", "flax": "Flax"}
CONFIG = cases.CONFIGS["plain"]


def model_class(backend, head="CLIPModel"):
    return getattr(clipmb, PREFIX[backend] + head)


@pytest.fixture
def folder(tmp_path):
    return cases.write_checkpoint(tmp_path / "model", CONFIG)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_things(backend, folder):
    model = model_class(backend).from_pretrained(folder)
    assert model.name_or_path == model.config.name_or_path == str(folder)
    model.name_or_path = "mine"
    assert model.config.name_or_path == "mine"
    assert model.framework == backend
    assert model.get_output_embeddings() is None
    assert model.can_generate() is model_class(backend).can_generate() is False


@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModel", "CLIPVisionModel", "CLIPForImageClassification"])
@pytest.mark.parametrize("backend", sorted({"pt", "tf"} & set(BACKENDS)))
def test_dummy_inputs_fit_the_model(backend, head, tmp_path):
    model = model_class(backend, head).from_pretrained(cases.write_checkpoint(tmp_path, CONFIG, head))
    inputs = model.dummy_inputs
    if "input_ids" in inputs:
        assert to_numpy(inputs["input_ids"]).dtype == {"pt": "int64", "tf": "int32"}[backend]
    output = model(**inputs)
    assert all(value.shape[0] == 3 for value in output.to_tuple() if hasattr(value, "shape"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_are_mapped_by_the_first_pattern_that_is_found(backend, folder):
    expected = load_file(folder / "model.safetensors")
    changed = {name.replace("encoder.layers", "blocks").replace("text_model", "t"): a for name, a in expected.items()}
    save_file(changed, folder / "model.safetensors")
    model = model_class(backend)
    with pytest.raises(CheckpointError):
        model.from_pretrained(folder)
    # As in transformers, one pattern a name: "t." is not replaced in the names of its blocks by the third.
    mapping = {r"^t\.blocks": "text_model.encoder.layers", "blocks": "encoder.layers", r"^t\.": "text_model."}
    loaded = model.from_pretrained(folder, key_mapping=mapping).to_arrays()
    assert all(np.array_equal(loaded[name], array) for name, array in expected.items())
    loaded = model.from_pretrained(None, config=CONFIG, state_dict=changed, key_mapping=mapping).to_arrays()
    assert all(np.array_equal(loaded[name], array) for name, array in expected.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_mappings(backend, folder):
    model = model_class(backend)
    model.from_pretrained(folder, key_mapping={})
    with pytest.raises(ValueError, match="key_mapping has regular expressions"):
        model.from_pretrained(folder, key_mapping={"(": ""})
    with pytest.raises(CheckpointError, match="two tensors one name"):
        model.from_pretrained(folder, key_mapping={"q_proj": "k_proj"})


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_shape_is_a_runtime_error_too(backend, folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["text_projection.weight"] = arrays["text_projection.weight"][:, 1:].copy()
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match="shape: text_projection") as caught:
        model_class(backend).from_pretrained(folder)
    assert isinstance(caught.value, CheckpointError)
    del arrays["text_projection.weight"]
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing: text_projection") as caught:
        model_class(backend).from_pretrained(folder)
    assert not isinstance(caught.value, RuntimeError)
