"""`FlaxPreTrainedModel` as programs subclass it around modules of their own."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CONFIGS, write_checkpoint
from flax import linen as nn
from flax.core import freeze
from flax.serialization import to_bytes
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from clipmb import CheckpointError, CLIPVisionConfig, FlaxCLIPTextModel, FlaxCLIPVisionModel, FlaxPreTrainedModel
from clipmb.flax import FlaxCLIPVisionModule

pytestmark = pytest.mark.backend("flax")
CONFIG = CONFIGS["plain"].vision_config
IMAGES = np.random.default_rng(0).normal(size=(2, 3, CONFIG.image_size, CONFIG.image_size)).astype(np.float32)


class CheckerModule(nn.Module):
    """A vision tower with parameters of every kind beside it."""

    config: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.clip = FlaxCLIPVisionModule(self.config, self.dtype)
        self.concepts = self.param("concepts", nn.initializers.normal(), (5, 7))
        self.scale = self.param("scale", nn.initializers.normal(), ())
        self.colours = nn.Embed(4, 7)
        self.mixing = nn.Conv(6, (3, 3))
        self.score = nn.Dense(7)
        self.norm = nn.LayerNorm()

    def __call__(self, pixels):
        score = self.norm(self.score(self.clip(pixels).pooler_output)) @ self.concepts.T * self.scale
        return score + self.colours(jnp.arange(2)).sum() + self.mixing(pixels).sum()


class FlaxChecker(FlaxPreTrainedModel):
    config_class = CLIPVisionConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    module_class = CheckerModule

    def __init__(self, config, input_shape=None, seed=0, dtype=jnp.float32, _do_init=True, **kwargs):
        input_shape = (1, config.image_size, config.image_size, 3) if input_shape is None else input_shape
        module = self.module_class(config=config, dtype=dtype, **kwargs)
        super().__init__(config, module, input_shape=input_shape, seed=seed, dtype=dtype, _do_init=_do_init)

    def init_weights(self, rng, input_shape, params=None):
        drawn = self.module.init(rng, jnp.zeros(input_shape))["params"]
        if params is None:
            return freeze(drawn)
        return unflatten_dict({**flatten_dict(drawn), **flatten_dict(params)})

    def __call__(self, pixel_values, params=None):
        pixels = jnp.transpose(pixel_values, (0, 2, 3, 1))
        return self.module.apply({"params": params or self.params}, pixels)


def equal(tree, other):
    return jax.tree.all(jax.tree.map(np.array_equal, tree, other))


@pytest.fixture(scope="module")
def model():
    return FlaxChecker(CONFIG, seed=3)


def test_a_model_of_its_own_module(model):
    assert isinstance(FlaxCLIPTextModel(CONFIGS["plain"].text_config, _do_init=False), FlaxPreTrainedModel)
    size = CONFIG.image_size
    assert (model.framework, model.input_shape, model.dtype) == ("flax", (1, size, size, 3), jnp.float32)
    assert type(model.params) is dict
    assert model.required_params == set(flatten_dict(model.params))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params_shape_tree)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.params)
    empty = FlaxChecker(CONFIG, seed=3, _do_init=False)
    assert empty.required_params == model.required_params
    with pytest.raises(ValueError, match="has no params"):
        _ = empty.params
    with pytest.raises(ValueError, match="keeps no params"):
        empty.params = model.params
    assert equal(empty.init_weights(jax.random.PRNGKey(3), empty.input_shape), freeze(model.params))
    assert np.array_equal(empty(IMAGES, params=model.params), model(IMAGES))
    assert model.to_bf16(model.params)["score"]["kernel"].dtype == jnp.bfloat16
    assert not model.can_generate()
    assert model.generation_config is None
    assert FlaxChecker._from_config(CONFIG, seed=3, _do_init=False).module == model.module
    bare = FlaxPreTrainedModel(CONFIG, model.module, _do_init=False)
    with pytest.raises(NotImplementedError, match="has no init_weights"):
        bare.init_weights(bare.key, bare.input_shape)
    with pytest.raises(NotImplementedError, match="has no enable_gradient_checkpointing"):
        bare.enable_gradient_checkpointing()


@pytest.mark.parametrize("missing", ["config", "module"])
def test_neither_config_nor_module_may_be_none(model, missing):
    given = {"config": CONFIG, "module": model.module, missing: None}
    with pytest.raises(ValueError, match=f"needs a {missing}"):
        FlaxPreTrainedModel(**given)


def test_assigned_params_must_fit(model):
    other = FlaxChecker(CONFIG)
    other.params = freeze(model.params)
    assert equal(other.params, model.params)
    lacking = {name: leaf for name, leaf in model.params.items() if name != "concepts"}
    with pytest.raises(ValueError, match="missing: concepts"):
        other.params = lacking
    with pytest.raises(ValueError, match=r"concepts is \(5, 8\) and must be \(5, 7\)"):
        other.params = {**lacking, "concepts": np.zeros((5, 8))}


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Checker"]
    width = CONFIG.hidden_size
    for name, shape in {
        "concepts": (5, 7), "scale": (), "colours.weight": (4, 7), "mixing.weight": (6, 3, 3, 3),
        "score.weight": (7, width), "score.bias": (7,), "norm.weight": (7,), "norm.bias": (7,),
    }.items():  # fmt: skip
        assert saved[name].shape == shape  # as PyTorch has them
    assert np.array_equal(saved["score.weight"].T, model.params["score"]["kernel"])
    again = FlaxChecker.from_pretrained(tmp_path)
    assert equal(again.params, model.params)
    assert np.array_equal(again(IMAGES), model(IMAGES))
    outside, params = FlaxChecker.from_pretrained(tmp_path, jnp.bfloat16, _do_init=False, from_pt=True)
    assert equal(params, model.params)
    assert outside.module.dtype == jnp.bfloat16
    doubled = jax.tree.map(lambda leaf: leaf * 2, model.params)
    outside.save_pretrained(tmp_path / "doubled", params=doubled)
    assert equal(FlaxChecker.from_pretrained(tmp_path, subfolder="doubled").params, doubled)


def test_files_of_transformers_4_are_read(model, tmp_path):
    CONFIG.save_pretrained(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(model.to_fp16(model.params)))
    again = FlaxChecker.from_pretrained(tmp_path)
    assert equal(again.params, model.to_fp32(model.to_fp16(model.params)))
    assert FlaxChecker.from_pretrained(tmp_path, jnp.float16).params["scale"].dtype == jnp.float16
    (tmp_path / "flax_model.msgpack").unlink()
    named = {".".join(path): np.array(leaf) for path, leaf in flatten_dict(model.params).items()}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "flax"})
    assert equal(FlaxChecker.from_pretrained(tmp_path).params, model.params)


def test_a_module_may_have_a_kernel_and_a_scale_side_by_side(tmp_path):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (2, 3))
            return x @ kernel * self.param("scale", nn.initializers.normal(), (3,))

    class FlaxScaled(FlaxPreTrainedModel):
        config_class = CLIPVisionConfig

        def init_weights(self, rng, input_shape, params=None):
            return {"inner": self.module.init(rng, jnp.zeros(input_shape))["params"]}

    model = FlaxScaled(CONFIG, Scaled(), (1, 2))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"inner.kernel", "inner.scale"}
    again = FlaxScaled.from_pretrained(tmp_path, jnp.float32, Scaled(), (1, 2))
    assert equal(again.params, model.params)


def test_the_base_model_is_taken_from_its_own_checkpoint_and_out_of_a_larger_one(model, tmp_path):
    tower = FlaxCLIPVisionModel(CONFIG, seed=5)
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(CheckpointError, match=r"(?s)tower does not fit FlaxChecker.*missing: concepts"):
        FlaxChecker.from_pretrained(tmp_path / "tower")
    with_tower, info = FlaxChecker.from_pretrained(tmp_path / "tower", strict=False, seed=3, output_loading_info=True)
    assert equal(with_tower.params["clip"], tower.params)
    assert equal(with_tower.params["score"], model.params["score"])
    assert {name.split(".")[0] for name in info["missing_keys"]} == set(model.params) - {"clip"}

    class FlaxTower(FlaxChecker):
        module_class = FlaxCLIPVisionModule

    model.save_pretrained(tmp_path / "checker")
    assert equal(FlaxTower.from_pretrained(tmp_path / "checker").params, model.params["clip"])


def test_what_does_not_fit_is_listed(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    del saved["scale"]
    saved["concepts"], saved["stray"] = saved["concepts"][:3].copy(), np.zeros(1, np.float32)
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        FlaxChecker.from_pretrained(tmp_path)
    for line in ("missing: scale", "unexpected: stray", "concepts is (3, 7) and must be (5, 7)"):
        assert line in str(error.value)
    loaded, info = FlaxChecker.from_pretrained(
        tmp_path, seed=3, strict=False, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert equal(loaded.params, model.params)
    assert (info["missing_keys"], info["unexpected_keys"]) == (["scale"], ["stray"])
    saved["inner.scale"] = saved["norm.scale"] = saved["norm.weight"]
    save_file(saved, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)two tensors for one parameter:.*norm\.weight"):
        FlaxChecker.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither safetensors nor msgpack weights"):
        FlaxChecker.from_pretrained(tmp_path)


def test_a_config_is_needed(tmp_path, model):
    model.save_pretrained(tmp_path)

    class FlaxNoConfig(FlaxChecker):
        config_class = None

    assert FlaxNoConfig.from_pretrained(tmp_path, config=CONFIG).config is CONFIG
    with pytest.raises(ValueError, match="has no config_class"):
        FlaxNoConfig.from_pretrained(tmp_path)
    assert FlaxChecker.from_pretrained(tmp_path, config=str(tmp_path), layer_norm_eps=0.5).config.layer_norm_eps == 0.5


def test_weights_that_are_not_finite_are_named(model, tmp_path, caplog):
    model.save_pretrained(tmp_path, {**model.params, "scale": jnp.array(jnp.nan)})
    FlaxChecker.from_pretrained(tmp_path)
    assert "NaN or infinity in scale" in caplog.text


def test_shapes_of_inputs_as_transformers_has_them(tmp_path):
    size = CONFIG.image_size
    write_checkpoint(tmp_path, CONFIGS["plain"])
    assert FlaxCLIPVisionModel.from_pretrained(tmp_path).input_shape == (1, size, size, 3)
    assert FlaxCLIPTextModel.from_pretrained(tmp_path).input_shape == (1, 1)
    assert FlaxCLIPTextModel.from_pretrained(tmp_path, input_shape=(1, 77)).input_shape == (1, 77)
