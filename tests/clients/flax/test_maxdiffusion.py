"""What maxdiffusion does with the CLIP classes of transformers, done with ours."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, text_inputs, write_checkpoint

import clipmb
from clipmb import CLIPImageProcessor, CLIPTokenizer, FlaxCLIPTextModel, FlaxCLIPTextModelWithProjection

CONFIG = CONFIGS["plain"]
IDS = text_inputs(CONFIG)["input_ids"]
ENCODERS = {"text_encoder": FlaxCLIPTextModel, "text_encoder_2": FlaxCLIPTextModelWithProjection}


@pytest.fixture
def pipeline(tmp_path) -> Path:
    """The parts of a Stable Diffusion XL folder that are CLIP's."""
    index = {
        "text_encoder": ["clipmb", "CLIPTextModel"], "text_encoder_2": ["clipmb", "CLIPTextModelWithProjection"],
        "tokenizer": ["clipmb", "CLIPTokenizer"], "feature_extractor": ["clipmb", "CLIPImageProcessor"],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ENCODERS:
        write_checkpoint(tmp_path / name, CONFIG, index[name][1], seed=len(name))
    CLIPTokenizer().save_pretrained(tmp_path / "tokenizer")
    CLIPImageProcessor().save_pretrained(tmp_path / "feature_extractor")
    return tmp_path


def classes(folder: Path) -> dict[str, type]:
    """The Flax class of every component where there is one, else the class itself, by name in the library."""
    found = {}
    for component, (library, name) in json.loads((folder / "model_index.json").read_text()).items():
        module = importlib.import_module(library)
        found[component] = getattr(module, f"Flax{name}", None) or getattr(module, name)
    return found


def test_the_classes_of_an_index_are_loaded(pipeline):
    found = classes(pipeline)
    assert {name: found[name] for name in ENCODERS} == ENCODERS
    assert found["tokenizer"] is CLIPTokenizer
    for name in ("tokenizer", "feature_extractor"):
        assert type(found[name].from_pretrained(str(pipeline / name))) is found[name]
    for name in ENCODERS:
        assert issubclass(found[name], clipmb.FlaxCLIPPreTrainedModel)
        whole = found[name].from_pretrained(str(pipeline / name), from_pt=True)
        half, params = found[name].from_pretrained(str(pipeline / name), _do_init=False, dtype=jnp.bfloat16)
        other, again = found[name].from_pretrained(
            str(pipeline), subfolder=name, from_pt=True, dtype=jnp.float32, _do_init=False
        )
        assert jax.tree.all(jax.tree.map(np.array_equal, again, whole.params))
        assert half(IDS, params=params)[0].dtype == jnp.bfloat16
        assert np.array_equal(other(IDS, params=again)[0], whole(IDS)[0])


def test_states_are_made_from_shapes_and_without_computing(pipeline):
    model, params = FlaxCLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder", _do_init=False)
    shapes = model.init_weights(rng=jax.random.key(0), input_shape=(1, 77), eval_only=True)
    drawn = jax.eval_shape(functools.partial(model.init_weights, input_shape=(1, 77)), jax.random.key(0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    for tree in (shapes, drawn):
        assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), tree, params))
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    states = jax.jit(lambda params, ids: model(ids, params=params)[0])(cast, IDS)
    assert states.shape == (*IDS.shape, CONFIG.text_config.hidden_size)


def test_a_model_whose_params_were_taken_away_saves_those_that_are_given(pipeline, tmp_path):
    for name, kind in ENCODERS.items():
        model = kind.from_pretrained(pipeline / name, input_shape=(1, 77))
        params = jax.tree.map(lambda leaf: leaf * 2, model.params)
        del model._params
        assert "params" in inspect.signature(model.save_pretrained).parameters
        model.save_pretrained(tmp_path / "saved" / name, params=params)
        again = kind.from_pretrained(tmp_path / "saved" / name)
        assert jax.tree.all(jax.tree.map(np.array_equal, again.params, params))
        assert np.array_equal(again(IDS)[0], model(IDS, params=params)[0])
