"""Files between clipmb's backends and transformers 4.57.6 and 5: every head, both ways, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from _transformers5 import run
from cases import ALL_HEADS, CONFIGS, config_of, random_arrays, write_checkpoint
from conftest import BACKENDS
from runners import model_class
from safetensors.numpy import load_file

CONFIG = CONFIGS["plain"]

READ = """
import json, sys, transformers
from safetensors.torch import save_file
for head in json.loads(sys.argv[2]):
    model, info = getattr(transformers, head).from_pretrained(f"{sys.argv[1]}/{head}", output_loading_info=True)
    assert not any(info.values()), (head, info)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, f"{sys.argv[1]}/{head}/read.safetensors")
"""
WRITE = """
import json, sys, transformers
for head in json.loads(sys.argv[3]):
    getattr(transformers, head).from_pretrained(f"{sys.argv[1]}/{head}").save_pretrained(f"{sys.argv[2]}/{head}")
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for head in ALL_HEADS:
        write_checkpoint(folder / head, CONFIG, head)
    return folder


def check_weights(tensors, head):
    """The values, under names with or without the tower's prefix (transformers 5 leaves it out of single towers)."""
    expected = random_arrays(config_of(head, CONFIG), head)
    tower = "text_model." if "Text" in head else "vision_model."
    if not any(name.startswith(("text_model.", "vision_model.")) for name in tensors):
        tensors = {tower + name: value for name, value in tensors.items()}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(tensors[name], value), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_each_backend_saves_loads_in_transformers_4_and_5(originals, tmp_path, backend):
    for head in ALL_HEADS:
        model_class(backend, head).from_pretrained(originals / head).save_pretrained(tmp_path / head)
        there, info = getattr(transformers, head).from_pretrained(tmp_path / head, output_loading_info=True)
        assert not any(info.values()), (head, info)
        check_weights({name: value.numpy() for name, value in there.state_dict().items()}, head)
    run(READ, tmp_path, json.dumps(ALL_HEADS))
    for head in ALL_HEADS:
        check_weights(load_file(tmp_path / head / "read.safetensors"), head)


def test_what_transformers_5_saves_loads_in_each_backend(originals, tmp_path):
    run(WRITE, originals, tmp_path, json.dumps(ALL_HEADS))
    for head in ALL_HEADS:
        for backend in BACKENDS:
            model = model_class(backend, head).from_pretrained(tmp_path / head)
            check_weights(model.to_arrays(), head)
            assert model.config.architectures == [head]


def test_a_bare_text_tower_of_transformers_5_lacks_its_projection(originals, tmp_path):
    """transformers 4 loads such a file into random weights; here it is an error."""
    from clipmb import CheckpointError

    run(WRITE, originals, tmp_path, json.dumps(["CLIPTextModel"]))
    for backend in BACKENDS:
        with pytest.raises(CheckpointError, match=r"missing: text_projection\.weight"):
            model_class(backend, "CLIPTextModelWithProjection").from_pretrained(tmp_path / "CLIPTextModel")
