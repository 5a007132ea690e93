"""The Flax models' own interface; their numbers are compared with PyTorch and the reference in tests/reference."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    ALL_HEADS,
    CONFIGS,
    config_of,
    equal,
    image_inputs,
    inputs_of,
    random_arrays,
    relative,
    text_inputs,
    write_checkpoint,
)
from conftest import TESTS
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.experimental import checkify
from processes import output

from clipmb import CheckpointError, CLIPConfig, flax
from clipmb.common.outputs import CLIPOutput
from clipmb.common.parameters import KINDS, specs
from clipmb.flax import layers, modules
from clipmb.flax.engine import Engine

CONFIG = CONFIGS["plain"]


def load(folder, head="CLIPModel", config=CONFIG, **options):
    return getattr(flax, "Flax" + head).from_pretrained(write_checkpoint(folder / head, config, head), **options)


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same_tree(a, b):
    return equal(leaves(a), leaves(b))


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return load(tmp_path_factory.mktemp("text"), "CLIPTextModel")


def run(code, **environment):
    """Runs code in a fresh process."""
    return output("-c", code, TESTS, **environment)


# -- parameters and files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_the_tree_is_the_former_one(tmp_path, head):
    model = load(tmp_path, head)
    config = config_of(head, CONFIG)
    arrays = random_arrays(config, head)
    for spec in specs(config, head):
        leaf = model.params
        for key in spec.path("flax"):
            leaf = leaf[key]
        assert np.array_equal(leaf, KINDS[spec.kind].to_framework(arrays[spec.name])), spec.name
    inputs = list(inputs_of(head, CONFIG).values())
    pixels = [value.transpose(0, 2, 3, 1) for value in inputs if value.ndim == 4]
    ids = [value for value in inputs[:1] if value.ndim == 2]
    own = jax.eval_shape(model.module.init, jax.random.key(0), *ids, *pixels)["params"]
    assert own == model.params_shape_tree
    assert model.required_params == {spec.path("flax") for spec in specs(config, head)}
    assert model.num_parameters() == sum(leaf.size for leaf in jax.tree.leaves(own))


def test_the_names_of_the_former_tree(text):
    tree = text.params["text_model"]
    assert tree.keys() == {"embeddings", "encoder", "final_layer_norm"}
    assert tree["encoder"]["layers"].keys() == {"0", "1", "2"}
    block = tree["encoder"]["layers"]["0"]
    assert block.keys() == {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
    assert block["mlp"]["fc1"]["kernel"].shape == (32, 56)
    assert block["layer_norm1"].keys() == {"scale", "bias"}
    assert tree["embeddings"]["token_embedding"]["embedding"].shape == (99, 32)


@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_save_and_load_bit_for_bit_in_the_dtype_of_the_file(tmp_path, head, dtype):
    model = load(tmp_path, head)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    model.save_pretrained(tmp_path / "again", params=params)
    again = type(model).from_pretrained(tmp_path / "again", param_dtype="auto")
    assert same_tree(again.params, params)
    assert again.config.architectures == [head]
    assert again.config.to_dict()["dtype"] == dtype
    assert again.dtype == jnp.float32  # what is computed in, whatever the parameters are
    assert jax.eval_shape(lambda: again(**inputs_of(head, CONFIG)))[0].dtype == jnp.float32
    assert type(model).from_pretrained(tmp_path / "again", dtype="auto").dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_of_16_bit_files_train_in_float32(tmp_path, dtype):
    model = load(tmp_path, "CLIPModel")
    model.save_pretrained(tmp_path / "half", jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))
    half = type(model).from_pretrained(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), model.params)
    assert same_tree(half.params, params)
    for options in ({"dtype": dtype}, {"dtype": "auto"}, {"param_dtype": dtype}):
        kept = type(model).from_pretrained(tmp_path / "half", **options).params
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}
    _, outside = type(model).from_pretrained(tmp_path / "half", _do_init=False)
    assert same_tree(outside, params)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    inputs = inputs_of("CLIPModel", CONFIG)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: half(**inputs, params=p, return_loss=True).loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(8):
        params, state, loss = step(params, state)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModel"])
def test_the_vocabulary_grows_and_shrinks(tmp_path, head):
    model = load(tmp_path, head)
    old, inputs = model.params["text_model"]["embeddings"]["token_embedding"]["embedding"], inputs_of(head, CONFIG)
    expected, path = model(**inputs).to_tuple()[0], ("text_model", "embeddings", "token_embedding", "embedding")
    table = model.resize_token_embeddings(len(old) + 3, pad_to_multiple_of=8)
    size = -(-(len(old) + 3) // 8) * 8
    assert table.shape == (size, old.shape[1])
    assert getattr(model.config, "text_config", model.config).vocab_size == size
    assert np.array_equal(table[: len(old)], old)
    assert np.array_equal(model(**inputs).to_tuple()[0], expected)
    np.testing.assert_allclose(table[len(old) :], np.tile(old.mean(0), (size - len(old), 1)), atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    assert same_tree(type(model).from_pretrained(tmp_path / "again").params, model.params)
    drawn = model.resize_token_embeddings(size + 400, mean_resizing=False)[size:]
    assert drawn.std() == pytest.approx(0.02, rel=0.1)
    assert model.resize_token_embeddings(50).shape[0] == 50
    assert path in model.required_params
    with pytest.raises(ValueError, match=r"50"):
        model(**inputs)
    with pytest.raises(ValueError, match="new_num_tokens"):
        model.resize_token_embeddings(0)
    with pytest.raises(ValueError, match="text tower have token embeddings"):
        load(tmp_path, "CLIPVisionModel").resize_token_embeddings(9)


def test_no_pictures_at_all(tmp_path):
    model = load(tmp_path, "CLIPVisionModelWithProjection")
    pixels = inputs_of("CLIPVisionModelWithProjection", CONFIG)["pixel_values"][:0]
    assert model(pixels).image_embeds.shape == (0, CONFIG.projection_dim)


def test_maxdiffusion_draws_shapes_and_saves_params_that_are_outside(tmp_path):
    model = load(tmp_path, "CLIPTextModel")
    shapes = model.init_weights(jax.random.key(0), eval_only=True)
    assert {leaf.shape for leaf in jax.tree.leaves(shapes)} == {leaf.shape for leaf in jax.tree.leaves(model.params)}
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    params = model.params
    del model._params
    model.save_pretrained(tmp_path / "saved", params=params)
    assert same_tree(type(model).from_pretrained(tmp_path / "saved").params, params)


def test_a_config_turns_gradient_checkpointing_on():
    config = type(CONFIG).from_dict({**CONFIG.to_dict(), "gradient_checkpointing": True})
    model = flax.FlaxCLIPModel(config)
    inputs = inputs_of("CLIPModel", CONFIG)

    def recomputed() -> int:
        def loss(params):
            return model(**inputs, params=params, train=True, return_loss=True).loss

        return str(jax.make_jaxpr(loss)(model.params)).count("remat")

    layers = CONFIG.text_config.num_hidden_layers, CONFIG.vision_config.num_hidden_layers
    assert model.is_gradient_checkpointing is True
    assert recomputed() == sum(layers)
    model.enable_gradient_checkpointing(every_n_layers=2)
    assert recomputed() == sum((count + 1) // 2 for count in layers)
    model.disable_gradient_checkpointing()
    assert model.is_gradient_checkpointing is False
    assert recomputed() == 0
    with pytest.raises(ValueError, match="every_n_layers"):
        model.enable_gradient_checkpointing(every_n_layers=0)


def test_float64_files_stay_float64(tmp_path, x64):
    model = load(tmp_path, dtype="float64")
    model.params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 1e-12, model.params)
    model.save_pretrained(tmp_path / "again")
    assert same_tree(flax.FlaxCLIPModel.from_pretrained(tmp_path / "again").params, model.params)


def test_a_state_dict_is_copied(tmp_path):
    arrays = random_arrays(CONFIG, "CLIPModel")
    model = flax.FlaxCLIPModel.from_pretrained(None, config=CONFIG, state_dict=arrays)
    before = jax.tree.map(np.array, model.params)
    for array in arrays.values():
        array += 1
    assert same_tree(model.params, before)


@pytest.mark.backend("pt")
def test_torch_tensors_in_a_state_dict():
    import torch

    arrays = random_arrays(CONFIG.text_config, "CLIPTextModel")
    tensors = {name: torch.nn.Parameter(torch.from_numpy(array).bfloat16()) for name, array in arrays.items()}
    load = functools.partial(
        flax.FlaxCLIPTextModel.from_pretrained, None, config=CONFIG.text_config, state_dict=tensors
    )
    assert load().params["text_model"]["final_layer_norm"]["scale"].dtype == jnp.float32
    scale = load(param_dtype="auto").params["text_model"]["final_layer_norm"]["scale"]
    assert scale.dtype == jnp.bfloat16
    assert np.array_equal(scale, arrays["text_model.final_layer_norm.weight"].astype(jnp.bfloat16))


def test_loading_holds_the_file_once(tmp_path):
    """Peak memory of loading a 200 MB checkpoint is at most 1.3 times the file above that before it."""
    config = CLIPConfig({"num_hidden_layers": 4, "vocab_size": 9999}, {"num_hidden_layers": 5})
    folder = write_checkpoint(tmp_path, config)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 2e8
    small = write_checkpoint(tmp_path / "small", CONFIG)
    out = run(
        "import clipmb.flax as flax\n"
        f"flax.FlaxCLIPModel.from_pretrained({str(small)!r})\n"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024\n"
        f"before = peak(); model = flax.FlaxCLIPModel.from_pretrained({str(folder)!r})\n"
        "print(peak() - before)"
    )
    assert 0.9 * size < int(out) < 1.3 * size


def test_params_are_checked_all_at_once(text):
    tree = jax.tree.map(lambda leaf: leaf, text.params)
    del tree["text_model"]["final_layer_norm"]["scale"]
    tree["text_model"]["colour"] = jnp.zeros(3)
    tree["text_model"]["encoder"]["layers"]["1"]["mlp"]["fc1"]["kernel"] = jnp.zeros((56, 32))
    before = text.params
    with pytest.raises(ValueError) as error:
        text.params = tree
    assert "missing: text_model.final_layer_norm.scale" in str(error.value)
    assert "unexpected: text_model.colour" in str(error.value)
    assert "layers.1.mlp.fc1.kernel is (56, 32) and must be (32, 56)" in str(error.value)
    assert text.params is before
    with pytest.raises(ValueError, match="missing"):
        text.save_pretrained("never", params={})
    assert not Path("never").exists()


def test_frozen_params_and_params_given_to_a_call(text):
    ids = text_inputs(CONFIG)["input_ids"]
    zeros = jax.tree.map(jnp.zeros_like, text.params)
    assert not np.asarray(text(ids, params=zeros)[0]).any()
    assert np.asarray(text(ids)[0]).any()
    assert same_tree(text(ids, params=freeze(text.params)), text(ids))
    kept = text.params
    text.params = freeze(text.params)
    assert type(text.params) is dict
    assert same_tree(text.params, kept)


def test_without_init_there_are_no_params(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG, "CLIPTextModel")
    model, params = flax.FlaxCLIPTextModel.from_pretrained(folder, _do_init=False)
    assert same_tree(params, flax.FlaxCLIPTextModel.from_pretrained(folder).params)
    with pytest.raises(ValueError, match="_do_init=False has no params"):
        _ = model.params
    with pytest.raises(ValueError, match="_do_init=False keeps no params"):
        model.params = params
    with pytest.raises(ValueError, match="_do_init=False has no params"):
        model(text_inputs(CONFIG)["input_ids"])
    assert model(**text_inputs(CONFIG), params=params)[0].shape == (4, 11, 32)
    fresh = flax.FlaxCLIPTextModel(CONFIG.text_config, _do_init=False)
    assert fresh.init_weights(jax.random.key(1), (1, 1)).keys() == {"text_model"}


def test_initial_distributions():
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "vocab_size": 4000, "num_hidden_layers": 1, "initializer_factor": 3.0},
        {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
        projection_dim=64,
        logit_scale_init_value=1.25,
    )
    model = flax.FlaxCLIPModel(config, seed=7)
    module = jax.jit(model.module.init)(jax.random.key(0), jnp.zeros((1, 2), int), jnp.zeros((1, 64, 64, 3)))["params"]
    for params in (model.params, module):
        for spec in specs(config, "CLIPModel"):
            leaf = params
            for key in spec.path("flax"):
                leaf = leaf[key]
            values = np.asarray(leaf, np.float64)
            if not spec.std:
                assert (values == np.float32(spec.mean)).all(), spec.name
            elif values.size > 1000:
                assert abs(values.mean() - spec.mean) < 0.2 * spec.std, spec.name
                assert abs(values.std() / spec.std - 1) < 0.08, spec.name
        tails = np.asarray(params["text_model"]["embeddings"]["token_embedding"]["embedding"]) / 0.06
        assert np.abs(tails).max() > 4  # a truncated normal would end at 2
    assert same_tree(model.params, flax.FlaxCLIPModel(config, seed=7).params)
    assert not same_tree(model.params, flax.FlaxCLIPModel(config, seed=8).params)


def test_init_weights_fills_what_is_missing(text):
    tree = jax.tree.map(lambda leaf: leaf, text.params)
    del tree["text_model"]["embeddings"]["token_embedding"]
    filled = text.init_weights(jax.random.key(3), params=freeze(tree))
    drawn = filled["text_model"]["embeddings"].pop("token_embedding")["embedding"]
    assert same_tree(filled, {"text_model": {**tree["text_model"]}})
    whole = jax.jit(text.init_weights)(jax.random.key(3))
    assert relative(whole["text_model"]["embeddings"]["token_embedding"]["embedding"], drawn) < 1e-6


def test_missing_weights_are_an_error_or_drawn_anew_on_request(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight"):
        flax.FlaxCLIPForImageClassification.from_pretrained(folder)
    model, info = flax.FlaxCLIPForImageClassification.from_pretrained(folder, strict=False, output_loading_info=True)
    assert info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert 0.5 * 48**-0.5 < np.std(model.params["classifier"]["kernel"]) < 2 * 48**-0.5
    assert not np.asarray(model.params["classifier"]["bias"]).any()


def test_options(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    options = {"from_pt": True, "from_tf": True, "seed": 3, "input_shape": ((1, 1), (1, 20, 20, 3))}
    model = flax.FlaxCLIPModel.from_pretrained(folder, attn_implementation="eager", **options)
    assert model.config.text_config.attn_implementation == "eager"
    assert model.input_shape == options["input_shape"]
    assert np.array_equal(model.key, jax.random.PRNGKey(3))
    for bad, error, words in (
        ({"dtype": "int8"}, ValueError, "dtype"),
        ({"dtype": "float64"}, ValueError, "jax_enable_x64"),
        ({"colour": "red"}, TypeError, "colour"),
    ):
        with pytest.raises(error, match=words):
            flax.FlaxCLIPModel.from_pretrained(folder, **bad)
    with pytest.raises(TypeError, match="CLIPTextConfig"):
        flax.FlaxCLIPTextModel(CONFIG)
    with pytest.raises(ValueError, match="num_labels must be at least 1"):
        flax.FlaxCLIPForImageClassification(CLIPConfig(num_labels=0))


def test_casts(text):
    for name, dtype in (("to_bf16", jnp.bfloat16), ("to_fp16", jnp.float16), ("to_fp32", jnp.float32)):
        cast = getattr(text, name)(
            {"a": jnp.ones(2, jnp.float32), "b": {"c": jnp.ones(2, jnp.bfloat16)}, "d": jnp.ones(2, int)}
        )
        assert cast["a"].dtype == cast["b"]["c"].dtype == dtype
        assert cast["d"].dtype == jnp.int32
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, text.params)
    cast = text.to_bf16(text.params, mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert all((leaf.dtype == jnp.bfloat16) == (leaf.ndim == 2) for leaf in jax.tree.leaves(cast))


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL_HEADS)
def test_tuples_hold_what_dicts_hold(tmp_path, head):
    model = load(tmp_path, head, attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    output = model(**inputs_of(head, CONFIG), **options)
    flat = model(**inputs_of(head, CONFIG), **options, return_dict=False)
    assert isinstance(flat, tuple)
    assert np.array_equal(output[0], flat[0])
    expected, found = jax.tree.leaves(output.to_tuple()), jax.tree.leaves(flat)
    assert len(expected) == len(found) > 4
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    model.config.return_dict = False
    assert isinstance(model(**inputs_of(head, CONFIG)), tuple)


def test_outputs_are_pytrees_with_keys(model):
    output = jax.jit(lambda params, inputs: model(**inputs, params=params))(
        model.params, inputs_of("CLIPModel", CONFIG)
    )
    assert type(output) is CLIPOutput
    assert output[0] is output.logits_per_image is output["logits_per_image"]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(output)]
    assert paths[0] == "['logits_per_image']"
    assert "['text_model_output']['pooler_output']" in paths
    doubled = jax.tree.map(lambda leaf: 2 * leaf, output)
    assert type(doubled) is CLIPOutput
    assert np.array_equal(doubled.image_embeds, 2 * output.image_embeds)


def test_numpy_jax_and_lists_are_inputs(model):
    inputs = inputs_of("CLIPModel", CONFIG)
    expected = model(**inputs)
    assert same_tree(model(**{name: jnp.asarray(value) for name, value in inputs.items()}), expected)
    assert same_tree(model(**{name: value.tolist() for name, value in inputs.items()}), expected)
    assert same_tree(model(**{**inputs, "attention_mask": inputs["attention_mask"].astype(bool)}), expected)


def test_features_accept_what_a_call_accepts(model):
    inputs, images = text_inputs(CONFIG), image_inputs(CONFIG)
    options = {"params": model.params, "train": False, "output_hidden_states": True, "return_dict": True}
    positions = np.arange(11)[None]
    features = model.get_text_features(**inputs, position_ids=positions, dropout_rng=jax.random.key(0), **options)
    output = model(**inputs, **images)
    assert relative(features / np.linalg.norm(features, axis=-1, keepdims=True), output.text_embeds) < 2e-6
    features = model.get_image_features(**images, interpolate_pos_encoding=True, **options)
    assert relative(features / np.linalg.norm(features, axis=-1, keepdims=True), output.image_embeds) < 2e-6
    assert model.get_image_features(**image_inputs(CONFIG, size=(13, 30)), interpolate_pos_encoding=True).shape == (
        4,
        24,
    )


def test_transformations(model):
    inputs = inputs_of("CLIPModel", CONFIG)
    expected = model(**inputs, return_loss=True, output_hidden_states=True)
    call = jax.jit(model.__call__, static_argnames=("train", "return_loss", "output_hidden_states", "return_dict"))
    found = call(**inputs, params=model.params, return_loss=True, output_hidden_states=True)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-5, path

    def loss(params):
        return model(**inputs, params=params, return_loss=True).loss

    plain, again = (jax.jit(jax.grad(function))(model.params) for function in (loss, jax.checkpoint(loss)))
    assert relative(again["logit_scale"], plain["logit_scale"]) < 1e-5
    kernels = (tree["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"] for tree in (again, plain))
    assert relative(*kernels) < 1e-5

    def one(ids, mask):
        return model.get_text_features(ids[None], mask[None], params=model.params)[0]

    rows = jax.vmap(one)(jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["attention_mask"]))
    assert relative(rows, model.get_text_features(inputs["input_ids"], inputs["attention_mask"])) < 2e-6


def test_export(text):
    ids = text_inputs(CONFIG)["input_ids"].astype(np.int32)
    from jax import export

    exported = export.export(jax.jit(lambda params, ids: text(ids, params=params)[0]))(text.params, ids)
    again = export.deserialize(exported.serialize())
    assert relative(again.call(text.params, ids), text(ids)[0]) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(model, text, x64):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), text.params)
    text = flax.FlaxCLIPTextModel(text.config, dtype="float64", _do_init=False)
    inputs = text_inputs(CONFIG)

    def gradients():
        return jax.jit(jax.grad(lambda params: (text(**inputs, params=params)[0] ** 3).mean()))(params)

    plain = gradients()
    text.enable_gradient_checkpointing()
    assert text.is_gradient_checkpointing
    checkpointed = gradients()
    text.disable_gradient_checkpointing()
    assert not text.is_gradient_checkpointing
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(checkpointed), jax.tree.leaves(plain), strict=True):
        if "['k_proj']['bias']" in jax.tree_util.keystr(path):  # 0 but for rounding
            assert np.abs(a).max() < 1e-12
        else:
            assert relative(a, b) < 1e-12, path


def test_gradient_checkpointing_recomputes_every_block(model):
    inputs = inputs_of("CLIPModel", CONFIG)

    def recomputed(model):
        loss = lambda params: model(**inputs, params=params, return_loss=True).loss  # noqa: E731
        return str(jax.make_jaxpr(loss)(model.params)).count("remat")

    assert recomputed(model) == 0
    made = flax.FlaxCLIPModel(CONFIG, gradient_checkpointing=True)
    assert recomputed(made) == 5
    made.disable_gradient_checkpointing()
    assert recomputed(made) == 0


def test_attentions_under_fused_attention_fall_back_with_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("clipmb.common.errors._said", set())
    model = load(tmp_path)
    inputs = inputs_of("CLIPModel", CONFIG)
    with pytest.warns(UserWarning, match="eager"):
        first = model(**inputs, output_attentions=True)
    model(**inputs, output_attentions=True)  # a second warning would be an error
    model.set_attn_implementation("eager")
    second = model(**inputs, output_attentions=True)
    for a, b in zip(first.text_model_output.attentions, second.text_model_output.attentions, strict=True):
        assert a.shape == (4, 4, 11, 11)
        assert np.array_equal(a, b)


def test_fused_attention_is_used(tmp_path, monkeypatch):
    calls = []
    fused = layers.fused_attention
    monkeypatch.setattr(modules, "fused_attention", lambda *a, **k: calls.append(k) or fused(*a, **k))
    model = load(tmp_path)
    model(**inputs_of("CLIPModel", CONFIG))
    assert len(calls) == 5
    model.set_attn_implementation({"text_config": "eager"})
    model(**inputs_of("CLIPModel", CONFIG))
    assert len(calls) == 7


def test_the_derivative_of_layer_norm_is_that_of_its_formula():
    """Forwards, backwards, and a second time, in float64, where the formula is differentiated by JAX itself."""

    def formula(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * scale + bias

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        inputs, tangents = ([jnp.asarray(rng.standard_normal(s)) for s in ((2, 3, 16), 16, 16)] for _ in range(2))

        def derivatives(norm):
            def energy(*inputs):
                return jnp.square(norm(*inputs)).sum(axis=(1, 2)) @ jnp.array([1.0, -2.0])

            gradient = jax.grad(energy, (0, 1, 2))
            return (
                jax.jvp(norm, inputs, tangents), gradient(*inputs), jax.jvp(gradient, inputs, tangents),
                jax.grad(lambda *inputs: sum((g * t).sum() for g, t in zip(gradient(*inputs), tangents, strict=True)),
                         (0, 1, 2))(*inputs),
            )  # fmt: skip

        ours = derivatives(lambda *inputs: layers.layer_norm(*inputs, 1e-5))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(derivatives(formula)), strict=True):
            assert a.dtype == jnp.float64
            assert relative(a, b) < 1e-12


def test_forward_mode_is_the_transpose_of_reverse_mode(tmp_path):
    model = load(tmp_path, dtype="float32")
    inputs = inputs_of("CLIPModel", CONFIG)

    def output(params):
        return model(**inputs, params=params).logits_per_text.sum()

    direction = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), model.params
    )
    _, along = jax.jvp(output, (model.params,), (direction,))
    gradient = jax.grad(output)(model.params)
    expected = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    assert abs(along - expected) <= 1e-5 * sum(
        jnp.abs(g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 2**-7), ("float16", 2**-10)])
def test_fused_attention_on_a_cpu_is_that_of_jax(biased, dtype, bound):
    """Value and gradients; in 16 bits to the dtype's epsilon, since the last rounding may fall either way."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 7, 3, 8)), dtype) for _ in range(3))
    bias = jnp.asarray(rng.standard_normal((2, 1, 7, 7)), dtype) if biased else None
    ours, theirs = (
        jax.value_and_grad(lambda *inputs, call=call: jnp.square(call(*inputs, bias, scale=0.3)).sum(), (0, 1, 2))
        for call in (layers.fused_attention, jax.nn.dot_product_attention)
    )
    for a, b in zip(jax.tree.leaves(ours(query, key, value)), jax.tree.leaves(theirs(query, key, value)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= bound * np.abs(b).max()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_fused_attention_elsewhere_is_that_of_jax(platform):
    query = jnp.zeros((2, 7, 3, 8))

    def products(call, platform):
        traced = jax.jit(lambda query: call(query, query, query, None, scale=0.3)).trace(query)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return [line.split("dot_general")[1] for line in text.splitlines() if "dot_general" in line]

    dimensions = [[part.split(",")[2:] for part in products(jax.nn.dot_product_attention, platform)]]
    dimensions += [
        [part.split(",")[2:] for part in products(layers.fused_attention, name)] for name in (platform, "cpu")
    ]
    assert dimensions[0] == dimensions[1] != dimensions[2]


def test_dropout_draws_one_mask_per_row_and_head(tmp_path):
    config = CLIPConfig(
        {**CONFIG.text_config.to_dict(), "attention_dropout": 0.4}, CONFIG.vision_config.to_dict(), projection_dim=24
    )
    model = load(tmp_path, "CLIPTextModel", config, attn_implementation="eager")
    ids = np.tile(text_inputs(CONFIG)["input_ids"][:1], (4, 1))
    plain = model(ids, output_attentions=True).attentions
    options = {"train": True, "output_attentions": True}
    dropped = model(ids, **options, dropout_rng=jax.random.key(0)).attentions
    weights, kept = np.asarray(dropped[0]), np.asarray(dropped[0]) > 0
    np.testing.assert_allclose(weights[kept], np.asarray(plain[0])[kept] / 0.6, rtol=1e-5)  # returned after dropout
    masks = {kept[row, head].tobytes() for row in range(4) for head in range(4)}
    assert len(masks) == 16
    lower = np.tril(np.ones((11, 11), bool))
    assert 0.5 < kept[..., lower].mean() < 0.7
    assert same_tree(
        model(ids, **options, dropout_rng=jax.random.key(0)), model(ids, **options, dropout_rng=jax.random.key(0))
    )
    assert not same_tree(model(ids, **options, dropout_rng=jax.random.key(1)).attentions[0], dropped[0])
    with pytest.raises(ValueError, match="needs dropout_rng"):
        model(ids, train=True)
    fused = load(tmp_path, "CLIPTextModel", config)  # dropout is not lost where fused attention has none
    same = {"train": True, "dropout_rng": jax.random.key(0)}
    assert same_tree(fused(ids, **same)[0], model(ids, **same)[0])
    assert not same_tree(fused(ids, **same)[0], fused(ids)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16"])
def test_dtype_is_what_is_computed_in(tmp_path, dtype):
    model = load(tmp_path, dtype=dtype, attn_implementation="eager")

    def call(params):
        options = {"return_loss": True, "output_hidden_states": True, "output_attentions": True}
        return model(**inputs_of("CLIPModel", CONFIG), params=params, **options)

    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(call, model.params))} == {jnp.dtype(dtype)}
    # Parameters are cast where they are used, which is the same as casting them before.
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    assert same_tree(jax.jit(call)(cast), jax.jit(call)(model.params))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_inputs_of_the_other_byte_order(model):
    inputs = inputs_of("CLIPModel", CONFIG)
    swapped = {name: array.astype(array.dtype.newbyteorder()) for name, array in inputs.items()}
    assert not any(array.dtype.isnative for array in swapped.values())
    found, expected = model(**swapped), model(**inputs)
    np.testing.assert_array_equal(found.logits_per_image, expected.logits_per_image)


@pytest.mark.parametrize("bad", [99, -1, 2**32 + 5])
def test_ids_outside_the_vocabulary(text, bad):
    ids = text_inputs(CONFIG)["input_ids"]
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 99\)\. Received: values from"):
        text(ids)
    if bad < 2**31:
        output = jax.jit(lambda params, ids: text(ids, params=params))(text.params, ids)
        for field in (output.last_hidden_state.max(axis=1), output.pooler_output):
            assert np.isnan(field).any(axis=1).tolist() == [False, True, False, False]


def test_ids_are_checked_under_jit_on_request(text):
    good = text_inputs(CONFIG)["input_ids"]
    call = jax.jit(
        checkify.checkify(
            lambda params, ids, positions: text(ids, None, positions, params=params)[0], checkify.index_checks
        )
    )
    positions = np.arange(11)[None]
    error, output = call(text.params, good, positions)
    assert error.get() is None
    assert relative(output, text(good)[0]) < 1e-5
    for ids, steps in ((good + 60, positions), (good - 60, positions), (good, positions + 3), (good, positions - 1)):
        error, _ = call(text.params, ids, steps)
        with pytest.raises(checkify.JaxRuntimeError, match="out-of-bounds"):
            error.throw()


def test_positions_outside_the_context(text):
    ids = text_inputs(CONFIG)["input_ids"]
    with pytest.raises(ValueError, match=r"position_ids must lie in \[0, 13\)\. Received: values from 3 to 13"):
        text(ids, position_ids=np.arange(3, 14)[None])
    assert np.isfinite(text(ids, position_ids=np.arange(2, 13)[None])[0]).all()


def test_bad_shapes(model, text):
    ids, pixels = text_inputs(CONFIG)["input_ids"], image_inputs(CONFIG)["pixel_values"]
    for call, words in (
        (lambda: text(None), "needs input_ids"),
        (lambda: text(ids[0]), r"shape \(batch, seq\)"),
        (lambda: text(np.ones((1, 14), int)), "at most max_position_embeddings = 13"),
        (lambda: text(ids, np.ones((4, 7))), "attention_mask must have the shape"),
        (lambda: text(ids, position_ids=np.ones((3, 11), int)), "position_ids must have the shape"),
        (lambda: model(ids), "needs pixel_values"),
        (lambda: model(ids, pixels.transpose(0, 2, 3, 1)), "Put the channels first"),
        (lambda: model(ids, pixels[..., 4:]), r"Input image size \(20\*16\) doesn't match model \(20\*20\)"),
        (lambda: model(ids, pixels[..., :3], interpolate_pos_encoding=True), "at least one patch"),
        (lambda: model(ids[:3], pixels, return_loss=True), "3 texts and 4 images"),
        (lambda: model.module.apply({"params": model.params}, ids, pixels), "linen modules take pixel_values"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="input_ids must be integers"):
        text(ids.astype(np.float32))


def test_bad_labels(tmp_path):
    model = load(tmp_path, "CLIPForImageClassification")
    pixels = image_inputs(CONFIG)["pixel_values"]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
        model(pixels, np.array([0, 1, 2, 7]))
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(pixels, np.array([0]))
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(pixels, np.zeros((4, 1), np.float32))
    ignored = model(pixels, np.array([3, -100, -100, -100])).loss
    assert relative(ignored, model(pixels[:1], np.array([3])).loss) < 1e-5


# -- neighbours -------------------------------------------------------------------------------------------------------


def test_nnx(text):
    ids = jnp.asarray(text_inputs(CONFIG)["input_ids"])
    module = nnx.bridge.ToNNX(flax.FlaxCLIPTextModule(CONFIG.text_config), rngs=nnx.Rngs(0)).lazy_init(ids)
    nnx.update(module, nnx.State(jax.tree.map(nnx.Param, text.params)))
    assert relative(module(ids)[0], text(ids)[0]) < 1e-6


def test_engine(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    inputs = inputs_of("CLIPModel", CONFIG)
    engines = [
        Engine.load(folder, device=device, compile=compile) for device, compile in ((None, False), ("cpu:0", True))
    ]
    found = []
    for engine in engines:
        found.append(engine.stages(**inputs))
        found[-1]["image"] = engine.image_features(inputs["pixel_values"])
        found[-1]["text"] = engine.text_features(inputs["input_ids"])
        with pytest.raises(ValueError, match="input_ids must lie in"):
            engine.text_features(inputs["input_ids"] + 60)
        assert engine.logit_scale == pytest.approx(np.exp(2.0))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert isinstance(value, np.ndarray)
        assert relative(found[1][name], value) < 1e-5, name
    half = Engine.load(folder, dtype="bfloat16")
    assert half.image_features(inputs["pixel_values"]).dtype == np.float32
    engine.free()
    assert not hasattr(engine, "model")


def test_sharded_parameters(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    out = run(
        f"""
import sys; sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cases import CONFIGS, inputs_of, relative
from clipmb.flax import FlaxCLIPModel
model = FlaxCLIPModel.from_pretrained({str(tmp_path)!r})
inputs = inputs_of("CLIPModel", CONFIGS["plain"])
call = jax.jit(lambda params, rows: model(**rows, params=params))
expected = call(model.params, inputs)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
spread = lambda leaf: NamedSharding(mesh, P(None, "model") if leaf.ndim == 2 else P())
model.params = jax.tree.map(lambda leaf: jax.device_put(leaf, spread(leaf)), model.params)
kernel = model.params["text_model"]["encoder"]["layers"]["0"]["mlp"]["fc1"]["kernel"]
assert len(kernel.sharding.device_set) == 4 and kernel.addressable_shards[0].data.shape == (32, 28)
rows = {{name: jax.device_put(value, NamedSharding(mesh, P("data"))) for name, value in inputs.items()}}
output = call(model.params, rows)
for a, b in zip(jax.tree.leaves(output), jax.tree.leaves(expected), strict=True):
    assert relative(a, b) < 1e-5
model.save_pretrained({str(tmp_path / "again")!r})
again = FlaxCLIPModel.from_pretrained({str(tmp_path / "again")!r})
pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True)
assert all(np.array_equal(a, b) for a, b in pairs)
print(len(jax.devices()), "devices")
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
    )
    assert out.strip() == "4 devices"


def test_it_needs_no_other_framework_and_changes_no_global_setting():
    run(
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'tensorflow', 'keras', 'transformers']))\n"
        "import jax; before = dict(jax.config.values)\n"
        "from clipmb.flax import FlaxCLIPModel\n"
        "assert dict(jax.config.values) == before\n"
    )
    out = run(
        "import sys; sys.modules['flax'] = None\n"
        "from clipmb import MissingBackendError\n"
        "try:\n    import clipmb.flax\nexcept MissingBackendError as error: print(error)"
    )
    assert 'pip install "clipmb[flax]"' in out


# -- the client of record: maxdiffusion -------------------------------------------------------------------------------


def test_maxdiffusion(tmp_path):
    folder = tmp_path / "pipeline"
    write_checkpoint(folder / "text_encoder", CONFIG, "CLIPTextModel")
    write_checkpoint(folder / "text_encoder_2", CONFIG, "CLIPTextModelWithProjection")
    encoder = flax.FlaxCLIPTextModel.from_pretrained(
        str(folder), subfolder="text_encoder", from_pt=True, dtype=jnp.bfloat16
    )
    second, params = flax.FlaxCLIPTextModelWithProjection.from_pretrained(
        str(folder), subfolder="text_encoder_2", from_pt=True, _do_init=False, dtype=jnp.bfloat16
    )
    made = flax.FlaxCLIPTextModelWithProjection(second.config, _do_init=False, dtype=jnp.float32)
    ids = text_inputs(CONFIG)["input_ids"]
    assert isinstance(encoder, flax.FlaxCLIPTextPreTrainedModel)
    assert isinstance(made, flax.FlaxCLIPTextPreTrainedModel)
    encoder.params = encoder.to_bf16(encoder.params)
    states = jax.jit(lambda params, ids: encoder(ids, params=params, train=False)[0])(encoder.params, ids)
    assert states.shape == (4, 11, 32)
    assert states.dtype == jnp.bfloat16
    embeds, *_ = made(ids, params=params, train=False, output_hidden_states=True).to_tuple()
    output = jax.jit(lambda params, ids: made(ids, params=params, output_hidden_states=True))(params, ids)
    assert relative(output["text_embeds"], embeds) < 2e-6
    assert len(output["hidden_states"]) == 4
    assert (
        relative(output.hidden_states[-2], second(ids, params=params, output_hidden_states=True).hidden_states[-2])
        < 0.05
    )


def test_modules_inside_other_modules():
    class SafetyChecker(nn.Module):
        config: CLIPConfig

        def setup(self):
            self.vision_model = flax.FlaxCLIPVisionModule(self.config.vision_config)
            self.visual_projection = nn.Dense(self.config.projection_dim, use_bias=False)

        def __call__(self, clip_input):
            return self.visual_projection(self.vision_model(clip_input)[1])

    checker = SafetyChecker(CONFIG)
    pixels = jnp.asarray(image_inputs(CONFIG)["pixel_values"])
    params = checker.init(jax.random.key(0), pixels.transpose(0, 2, 3, 1))["params"]
    vision = flax.FlaxCLIPVisionModelWithProjection(CONFIG.vision_config, _do_init=False)
    assert jax.tree.structure(params["vision_model"]["vision_model"]) == jax.tree.structure(
        vision.params_shape_tree["vision_model"]
    )
    inner = {"vision_model": params["vision_model"]["vision_model"], "visual_projection": params["visual_projection"]}
    found = checker.apply({"params": params}, pixels.transpose(0, 2, 3, 1))
    assert relative(found, vision(pixels, params=inner).image_embeds) < 2e-6


def test_ids_that_are_constants_of_someones_jit_are_checked(tmp_path):
    model = flax.FlaxCLIPTextModel.from_pretrained(write_checkpoint(tmp_path, CONFIGS["plain"], "CLIPTextModel"))
    good, bad = jnp.array([[97, 5, 98]]), jnp.array([[97, 99, 98]])
    found = jax.jit(lambda params: model(good, params=params)[0])(model.params)
    assert np.allclose(found, model(good)[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"\[0, 99\)"):
        jax.jit(lambda params: model(bad, params=params)[0])(model.params)


def test_an_engine_computes_where_it_was_told(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    run(
        "import os, jax, numpy as np\n"
        "from clipmb.flax.engine import Engine\n"
        "engine = Engine.load(os.environ['FOLDER'], device='cpu:1')\n"
        "ids = np.array([[97, 5, 98]])\n"
        "found = engine._text(input_ids=ids, attention_mask=None, params=engine.model.params)\n"
        "assert found.devices() == {jax.devices()[1]}, found.devices()\n",
        FOLDER=str(folder),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
