"""The TensorFlow backend's own interface: inputs, graphs, XLA, training, files. Its numbers: tests/reference."""

from __future__ import annotations

import collections
import functools

import cases
import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import ALL_HEADS, CONFIGS, STRESS, TEXT, VISION, inputs_of, relative
from processes import python

import clipmb.tf
from clipmb.common.checkpoint.safetensors import map_file
from clipmb.common.config import CLIPConfig, CLIPTextConfig
from clipmb.common.outputs import CLIPOutput, ModelOutput
from clipmb.common.parameters import specs
from clipmb.tf.engine import Engine
from clipmb.tf.layers import LayerNorm, bicubic_weights
from clipmb.tf.losses import contrastive_loss, normalize
from clipmb.tf.modeling import TFCLIPEncoderLayer

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # Keras' variables under numpy 2
)

PLAIN = CONFIGS["plain"]
TEXTS, IMAGES = cases.text_inputs(PLAIN), cases.image_inputs(PLAIN)
BOTH = {**TEXTS, **IMAGES}


def build(head: str = "CLIPModel", config: CLIPConfig = PLAIN, dtype: str = "float32", seed: int = 0, **options):
    part = cases.config_of(head, config)
    cls, arrays = getattr(clipmb.tf, f"TF{head}"), cases.random_arrays(part, head, seed)
    return cls.from_pretrained(None, config=part, state_dict=arrays, dtype=dtype, **options)


@pytest.fixture(scope="module")
def model():
    return build()


def flat(output, path=""):
    """Every tensor of an output by its path."""
    if isinstance(output, dict):
        return {k: v for name, value in output.items() for k, v in flat(value, f"{path}.{name}").items()}
    if isinstance(output, tuple | list):
        return {k: v for i, value in enumerate(output) for k, v in flat(value, f"{path}.{i}").items()}
    return {path: np.asarray(output, np.float64)}


def assert_equal(a, b, bound: float) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    far = {name: relative(a[name], b[name]) for name in a if relative(a[name], b[name]) > bound}
    assert not far


def signature(model) -> list:
    return [tf.TensorSpec(spec.shape, tf.int64 if spec.dtype.is_integer else spec.dtype, name) for name, spec in
            model.input_signature.items()]  # fmt: skip


# Weights and files


@pytest.mark.parametrize("head", ALL_HEADS)
def test_every_head_saves_the_bits_it_loads(head, tmp_path):
    folder = cases.write_checkpoint(tmp_path / "a", PLAIN, head)
    cls = getattr(clipmb.tf, f"TF{head}")
    model, info = cls.from_pretrained(folder, output_loading_info=True, from_pt=True)
    assert not any(info.values())
    model.save_pretrained(tmp_path / "b")
    before, after = map_file(folder / "model.safetensors"), map_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, strict=True)
    assert cls.from_pretrained(tmp_path / "b", from_tf=True, from_flax=True).config.architectures == [head]


def test_weights_carry_the_names_of_the_table(model):
    table = {"/".join(spec.path("tf")): spec for spec in specs(PLAIN, "CLIPModel")}
    paths = {w.path.removeprefix(f"{model.name}/").replace("layers.", "layers/"): w for w in model.weights}
    assert paths.keys() == table.keys()
    assert model.text_model.encoder.layers[2].self_attn.q_proj.kernel.path.endswith(
        "text_model/encoder/layers.2/self_attn/q_proj/kernel"
    )
    assert model.logit_scale.shape == ()
    assert model.num_parameters() == sum(int(np.prod(spec.shape)) for spec in table.values())
    embeddings = sum(int(np.prod(spec.shape)) for spec in table.values() if spec.kind == "embedding")
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == embeddings
    model.text_model.trainable = False
    assert model.num_parameters(only_trainable=True) < model.num_parameters()
    model.text_model.trainable = True


def test_the_classifier_counts_trainable_parameters_like_pytorch():
    """Its logits do not depend on post_layernorm, which is trainable all the same, until somebody freezes it."""
    model = build("CLIPForImageClassification")
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    assert not any("post_layernorm" in weight.path for weight in model.trainable_weights)
    assert len(model.trainable_variables) == len(model.weights) - 2
    model.vision_model.trainable = False
    assert model.num_parameters(only_trainable=True) == 48 * 7 + 7  # the classifier


def test_loading_draws_no_random_numbers(monkeypatch):
    def drawn(*args, **kwargs):
        raise AssertionError("drawn")

    monkeypatch.setattr(keras.initializers.RandomNormal, "__call__", drawn)
    build()
    with pytest.raises(AssertionError, match="drawn"):
        clipmb.tf.TFCLIPModel(PLAIN)


def test_missing_weights_are_drawn_and_the_others_kept(caplog):
    arrays = cases.random_arrays(PLAIN, "CLIPModel")
    del arrays["text_projection.weight"]
    model = clipmb.tf.TFCLIPModel.from_pretrained(None, config=PLAIN, state_dict=arrays, strict=False)
    assert "text_projection.weight" in caplog.text
    assert 0.5 < np.std(model.text_projection.kernel) / 32**-0.5 < 1.5
    np.testing.assert_array_equal(model.visual_projection.kernel, arrays["visual_projection.weight"].T)


def test_a_loaded_model_owns_its_weights():
    arrays = cases.random_arrays(PLAIN, "CLIPModel")
    before = {name: array.copy() for name, array in arrays.items()}
    variables = {name: keras.Variable(array) for name, array in arrays.items()}
    assert clipmb.tf.TFCLIPModel.from_pretrained(None, config=PLAIN, state_dict=variables).logit_scale.numpy() == 2
    model = clipmb.tf.TFCLIPModel.from_pretrained(None, config=PLAIN, state_dict=arrays)
    for weight in model.weights:
        weight.assign(weight * 0 + 7)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_of_weights(dtype, tmp_path):
    model = build(dtype=dtype)
    assert {weight.dtype for weight in model.weights} == {dtype}
    assert model(BOTH).logits_per_image.dtype == dtype
    model.save_pretrained(tmp_path)
    again = clipmb.tf.TFCLIPModel.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == dtype
    np.testing.assert_array_equal(again.text_projection.kernel.numpy(), model.text_projection.kernel.numpy())


def test_policies_of_keras():
    arrays = cases.random_arrays(PLAIN, "CLIPModel")
    load = clipmb.tf.TFCLIPModel.from_pretrained
    mixed = load(None, config=PLAIN, state_dict=arrays, dtype="mixed_bfloat16")
    policy = keras.DTypePolicy("mixed_float16")
    assert load(None, config=PLAIN, state_dict=arrays, dtype=policy).dtype_policy.name == policy.name
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    assert mixed.compute_dtype == "bfloat16"
    output, exact = mixed(BOTH, return_loss=True), build()(BOTH, return_loss=True)
    assert output.logits_per_text.dtype == output.text_model_output.last_hidden_state.dtype == tf.bfloat16
    assert output.loss.dtype == tf.float32
    assert 1e-5 < relative(tf.cast(output.text_embeds, tf.float32), exact.text_embeds) < 0.05
    assert clipmb.tf.TFCLIPTextModel(PLAIN.text_config, dtype=keras.DTypePolicy("float64")).dtype == "float64"
    keras.config.set_dtype_policy("float16")
    try:
        assert clipmb.tf.TFCLIPModel(PLAIN).dtype == load(None, config=PLAIN, state_dict=arrays).dtype == "float16"
    finally:
        keras.config.set_dtype_policy("float32")


def test_statistics_of_low_precision_are_taken_in_float32():
    """Sums of 4,096 ones in bfloat16 stop at 256, and squares of float16 overflow above 255."""
    norm = LayerNorm(4096, eps=1e-5)
    norm.dtype_policy = "float16"
    norm.gamma_initializer, norm.beta_initializer = "ones", "zeros"
    norm.build()
    x = np.where(np.arange(4096) % 2, 1000.0, -1000.0)[None]
    np.testing.assert_allclose(norm(x), np.sign(x), rtol=1e-3)
    np.testing.assert_allclose(np.asarray(normalize(tf.ones((1, 4096), tf.bfloat16)), np.float32), 1 / 64, rtol=1e-2)
    assert contrastive_loss(tf.zeros((300, 300), tf.bfloat16)).numpy() == pytest.approx(np.log(300), rel=1e-6)


def test_fresh_weights_follow_the_factors_of_the_config():
    config = CLIPConfig({**TEXT, "hidden_size": 64, "initializer_factor": 2.0}, {**VISION, "initializer_range": 0.5})
    keras.utils.set_random_seed(3)
    model = clipmb.tf.TFCLIPModel(config)
    drawn, tails = 0, 0
    for spec in specs(config, "CLIPModel"):
        values = np.asarray(model.parameter(spec))
        if not spec.std:
            assert (values == np.float32(spec.mean)).all()
        elif values.size > 500:
            assert values.std() == pytest.approx(spec.std, rel=0.12), spec.name
            assert abs(values.mean()) < 0.12 * spec.std
        if spec.std:
            drawn, tails = drawn + values.size, tails + (abs(values) > 2.5 * spec.std).sum()
    assert tails / drawn == pytest.approx(0.0124, rel=0.2)  # a truncated normal has none
    keras.utils.set_random_seed(3)
    again = clipmb.tf.TFCLIPModel(config)
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    before = np.asarray(again.text_projection.kernel)
    again.init_weights()
    assert (np.asarray(again.text_projection.kernel) != before).all()


def test_keras_weight_files(tmp_path, model):
    model.save_weights(tmp_path / "model.weights.h5")
    other = build(seed=5)
    assert relative(other(BOTH).logits_per_text, model(BOTH).logits_per_text) > 0.01
    other.load_weights(tmp_path / "model.weights.h5")
    for a, b in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_keras_files(head, tmp_path):
    model = build(head, dtype="float64")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is type(model)
    assert again.dtype == "float64"
    assert again.config.to_dict() == model.config.to_dict()
    assert_equal(again(inputs_of(head, PLAIN)), model(inputs_of(head, PLAIN)), 0)


# Inputs


def test_inputs_may_be_anything_array_like(model):
    expected = model(**BOTH)
    assert type(expected) is CLIPOutput
    tensors = {name: tf.constant(value) for name, value in BOTH.items()}
    for inputs in (
        BOTH,
        tensors,
        collections.UserDict(BOTH),
        {name: value.tolist() for name, value in BOTH.items()},
        {**BOTH, "input_ids": BOTH["input_ids"].astype(np.int32), "attention_mask": BOTH["attention_mask"] == 1},
        {**BOTH, "pixel_values": BOTH["pixel_values"].astype(np.float64)},
        {**BOTH, "position_ids": np.tile(np.arange(11), (4, 1))},
        {**BOTH, "position_ids": np.arange(11)[None]},
    ):
        assert_equal(model(inputs), expected, 0)
    assert_equal(model(BOTH["input_ids"], BOTH["pixel_values"], BOTH["attention_mask"]), expected, 0)
    assert_equal(model(TEXTS, pixel_values=BOTH["pixel_values"]), expected, 0)
    for features, given, bare in (
        (model.get_text_features, TEXTS, "text_projection"),
        (model.get_image_features, IMAGES, "visual_projection"),
    ):
        kwargs = {"output_attentions": False, "output_hidden_states": True, "return_dict": False, "training": True}
        for result in (features(given), features(**given), features(given, **kwargs)):
            assert result.shape == (4, 24)
            np.testing.assert_array_equal(result, features(given))
        tower = model.text_model if "text" in bare else model.vision_model
        assert_equal(features(given), getattr(model, bare)(tower(**given).pooler_output), 1e-6)


def test_positions_differ_by_row(model):
    rows = np.stack([np.arange(11), np.arange(11)[::-1], np.arange(1, 12), np.arange(2, 13)])
    both = model.get_text_features(input_ids=TEXTS["input_ids"], position_ids=rows)
    for i in range(4):
        one = model.get_text_features(input_ids=TEXTS["input_ids"][i : i + 1], position_ids=rows[i : i + 1])
        assert relative(both[i : i + 1], one) < 2e-6
    assert relative(both[1], model.get_text_features(input_ids=TEXTS["input_ids"])[1]) > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m({**BOTH, "token_type_ids": 0}), TypeError, "^TFCLIPModel takes .*Received: token_type_ids. Rem"),
        (lambda m: m(BOTH, input_ids=[[1]]), TypeError, "^TFCLIPModel takes each input once. Received: .*input_ids"),
        (lambda m: m(*range(12)), TypeError, "^TFCLIPModel takes each input once. Received: .*positional 11"),
        (lambda m: m.get_text_features(pixel_values=0), TypeError, "^TFCLIPModel.get_text_features takes"),
        (lambda m: m(**IMAGES), ValueError, "^The text tower needs input_ids"),
        (lambda m: m(**TEXTS), ValueError, "^The vision tower needs pixel_values"),
        (lambda m: m.get_text_features([1, 2]), ValueError, r"^input_ids must have the shape .*Received: \(2,\)"),
        (lambda m: m.get_text_features([[1.0, 2.0]]), TypeError, "^input_ids must be integers. Received: float32"),
        (lambda m: m.get_text_features([[1] * 14]), ValueError, "^Sequence length must be at most .* Received: 14"),
        (lambda m: m.get_text_features([[1, 99]]), ValueError, r"^input_ids must lie in \[0, 99\). Received: val"),
        (lambda m: m.get_text_features([[-1, 9]]), ValueError, "^input_ids must lie in .*from -1 to 9. Use the tok"),
        (lambda m: m.get_text_features([[1]], position_ids=[[13]]), ValueError, "^position_ids must lie in"),
        (lambda m: m.get_text_features([[1, 2]], [[1]]), ValueError, "^attention_mask must have the shape"),
        (lambda m: m.get_image_features(np.zeros((1, 3, 24, 24))), ValueError, r"^Input image size \(24\*24\)"),
        (lambda m: m.get_image_features(np.zeros((1, 20, 20, 3))), ValueError, "^pixel_values must have the shape"),
        (lambda m: m({**TEXTS, **cases.image_inputs(PLAIN, 3)}, return_loss=True), ValueError, "^return_loss=True"),
        (lambda m: clipmb.tf.TFCLIPModel(PLAIN.text_config), TypeError, "^TFCLIPModel is built from a CLIPConfig"),
        (lambda m: clipmb.tf.TFCLIPForImageClassification(CLIPConfig(num_labels=0)), ValueError, "^num_labels must be"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(model, call, error, words):
    with pytest.raises(error, match=words):
        call(model)


def test_tuples_keep_everything(model):
    outputs = model(BOTH, return_dict=False, output_hidden_states=True, return_loss=True)
    assert [type(value).__name__ for value in outputs[-2:]] == ["tuple", "tuple"]
    assert len(outputs) == 7
    assert len(outputs[5][2]) == 4
    quiet = build("CLIPTextModel", return_dict=False, output_hidden_states=True)
    assert len(quiet(TEXTS)[2]) == 4


def test_functional_models_of_keras(model):
    ids, pixels = keras.Input((None,), dtype="int32"), keras.Input((3, 20, 20))
    output = model(input_ids=ids, pixel_values=pixels)
    assert type(output) is CLIPOutput
    wrapped = keras.Model([ids, pixels], [output.logits_per_text, output.text_model_output.pooler_output])
    logits, pooled = wrapped([BOTH["input_ids"].astype(np.int32), BOTH["pixel_values"]])
    expected = model(input_ids=BOTH["input_ids"], pixel_values=BOTH["pixel_values"])
    assert_equal((logits, pooled), (expected.logits_per_text, expected.text_model_output.pooler_output), 0)


def test_subclasses_may_add_layers():
    class Headed(clipmb.tf.TFCLIPTextModel):
        def __init__(self, config):
            super().__init__(config)
            self.extra = keras.layers.Dense(3)

        def call(self, input_ids=None, training=False):
            return self.extra(super().call(input_ids, training=training).pooler_output)

    model = Headed(PLAIN.text_config)
    assert model({"input_ids": TEXTS["input_ids"]}).shape == (4, 3)
    assert len(model.weights) == len(specs(PLAIN.text_config, "CLIPTextModel")) + 2


@pytest.mark.parametrize("adding", ["layer", "lora", "int8"])
def test_nothing_that_a_model_holds_is_lost_by_saving(adding, tmp_path):
    model = build("CLIPTextModelWithProjection")
    if adding == "layer":
        model.extra = keras.layers.Dense(3)
        model.extra.build((None, 4))
    elif adding == "lora":
        model.text_projection.enable_lora(2)
    else:
        model.text_projection.quantize("int8")
    with pytest.raises(
        ValueError, match=r"weights of CLIP alone. Received: [1-3] others: .*(extra|dense|text_projection)"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("CLIPModel", "visual_projection"),
        ("CLIPTextModelWithProjection", "text_projection"),
        ("CLIPForImageClassification", "classifier"),
    ],
)
def test_a_layer_in_the_place_of_another_is_what_is_trained_and_saved(head, name, tmp_path):
    model = build(head)
    before = [weight.path for weight in model.weights]
    old, bias = getattr(model, name), name == "classifier"
    new = keras.layers.Dense(11, use_bias=bias)
    setattr(model, name, new)
    with pytest.raises(ValueError, match=rf"all weights of CLIP. Received: a model without {name}\.weight"):
        model.save_pretrained(tmp_path)  # it has none yet
    new.build((None, old.inputs))
    own = {id(weight) for weight in new.weights}
    assert not {id(weight) for weight in old.weights} & {id(weight) for weight in model.weights}
    assert own <= {id(weight) for weight in model.trainable_weights}
    assert [weight.path for weight in model.weights if id(weight) not in own] == [
        path for path in before if f"/{name}/" not in path
    ]
    model.save_pretrained(tmp_path)
    saved = map_file(tmp_path / "model.safetensors")
    cases.assert_same(saved[f"{name}.weight"], new.kernel.numpy().T)
    setattr(model, name, keras.Sequential([new]))
    with pytest.raises(ValueError, match=rf"CLIP alone. Received: {1 + bias} others"):
        model.save_pretrained(tmp_path)


# Graphs and XLA


@pytest.mark.parametrize("head", ALL_HEADS)
def test_one_graph_for_every_batch(head):
    model = build(head)
    traces = []

    @tf.function(input_signature=signature(model))
    def graph(*tensors):
        traces.append(1)
        inputs = dict(zip(model.input_signature, tensors, strict=True))
        return model(inputs, output_hidden_states=True, output_attentions=True)

    model.set_attn_implementation("eager")
    for batch in (4, 2):
        inputs = inputs_of(head, PLAIN, batch)
        output = graph(*inputs.values())
        eager = model(inputs, output_hidden_states=True, output_attentions=True)
        assert type(output) is type(eager)
        assert_equal(output, eager, 1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_xla(attention, dtype):
    model = build(dtype=dtype, attn_implementation=attention)
    inputs = {**cases.text_inputs(PLAIN, 5), **cases.image_inputs(PLAIN, 5)}  # with a row that is all padding
    compiled = tf.function(model, jit_compile=True)
    bound = 1e-12 if dtype == "float64" else 2e-6
    assert_equal(compiled(**inputs, return_loss=True), model(inputs, return_loss=True), bound)


def test_fused_attention_equals_eager():
    inputs = {**cases.text_inputs(PLAIN, 5), **cases.image_inputs(PLAIN, 5)}
    eager, fused = (build(dtype="float64", attn_implementation=name) for name in ("eager", "sdpa"))
    assert_equal(fused(inputs), eager(inputs), 1e-12)
    assert_equal(
        fused.get_text_features(inputs["input_ids"]), eager.get_text_features(inputs["input_ids"]), 1e-12
    )  # causal without a mask


def test_the_attention_of_a_config_is_kept():
    config = CLIPConfig(TEXT, VISION, projection_dim=24, attn_implementation={"text_config": "eager"})
    loaded = build(config=config)
    assert loaded.config is not config
    assert loaded.config.text_config.attn_implementation == "eager"
    assert loaded.config.vision_config.attn_implementation is None
    text = CLIPTextConfig(**TEXT, attn_implementation="eager")
    arrays = cases.random_arrays(text, "CLIPTextModel")
    load = clipmb.tf.TFCLIPTextModel.from_pretrained
    assert load(None, config=text, state_dict=arrays).config.attn_implementation == "eager"
    changed = load(None, config=text, state_dict=arrays, attn_implementation="sdpa")
    assert changed.config.attn_implementation == "sdpa"


def test_attentions_under_fused_attention_warn_once_and_are_computed(model, monkeypatch):
    monkeypatch.setattr("clipmb.common.errors._said", set())
    with pytest.warns(UserWarning, match="attn_implementation='eager'"):
        output = model(BOTH, output_attentions=True)
    model(BOTH, output_attentions=True)  # a second warning would be an error
    eager = build(attn_implementation="eager")
    assert_equal(output, eager(BOTH, output_attentions=True), 1e-5)
    weights = output.text_model_output.attentions
    assert len(weights) == 3
    assert weights[0].shape == (4, 4, 11, 11)
    np.testing.assert_allclose(tf.reduce_sum(weights[0], -1), 1, rtol=1e-6)


def test_ids_outside_are_never_silent(model):
    bad = np.array([[97, 99, 98], [97, 5, 98]])
    spec = [tf.TensorSpec((None, None), tf.int64)]
    graph = tf.function(model.get_text_features, input_signature=spec)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"input_ids must lie in \[0, 99\)"):
        graph(bad)
    xla = tf.function(model.get_text_features, input_signature=spec, jit_compile=True)(bad).numpy()
    assert np.isnan(xla[0]).all()  # XLA cannot raise
    assert relative(xla[1:], model.get_text_features(bad[1:])) < 2e-6
    with pytest.raises(ValueError, match=r"^input_ids must lie in \[0, 99\)"):
        model.check_ids(bad)
    with pytest.raises(ValueError, match=r"^position_ids must lie in \[0, 13\)"):
        model.check_ids(bad[1:], [[0, 1, 13]])
    model.check_ids(TEXTS["input_ids"])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_sizes_unknown_until_the_call_are_checked_at_the_call(model, jit_compile):
    spec = [tf.TensorSpec((None, None, None, None), tf.float32)]
    graph = tf.function(model.get_image_features, input_signature=spec, jit_compile=jit_compile)
    assert graph(IMAGES["pixel_values"]).shape == (4, 24)
    for shape in ((1, 3, 100, 4), (1, 3, 24, 24), (1, 1, 20, 20)):  # the first has as many patches
        with pytest.raises(tf.errors.InvalidArgumentError):
            graph(np.zeros(shape, np.float32))
    spec = [tf.TensorSpec((None, None), tf.int64)] * 2
    texts = tf.function(model.get_text_features, input_signature=spec, jit_compile=jit_compile)
    assert relative(texts(*TEXTS.values()), model.get_text_features(TEXTS)) < 2e-6
    for ids, mask in (((1, 14), (1, 14)), ((2, 5), (1, 5)), ((2, 5), (2, 1))):
        with pytest.raises(tf.errors.InvalidArgumentError):
            texts(np.ones(ids, np.int64), np.ones(mask, np.int64))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpolated_positions_in_graphs_of_any_size(dtype):
    model = build("CLIPVisionModel", dtype=dtype)
    spec = [tf.TensorSpec((None, 3, None, None), dtype)]
    bound = 1e-12 if dtype == "float64" else 2e-6
    for jit_compile in (False, True):
        graph = tf.function(
            lambda pixels: model(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output,
            input_signature=spec,
            jit_compile=jit_compile,
        )
        for size in ((20, 20), (28, 16), (23, 45)):
            pixels = cases.image_inputs(PLAIN, 2, size)["pixel_values"].astype(dtype)
            expected = model(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
            assert_equal(graph(pixels), expected, bound)
    at_home = model(IMAGES, interpolate_pos_encoding=True).pooler_output
    np.testing.assert_array_equal(at_home, model(IMAGES).pooler_output)


def test_bicubic_weights():
    np.testing.assert_array_equal(bicubic_weights(5, 5), np.eye(5))
    for size, new in ((5, 9), (7, 3), (1, 4)):
        np.testing.assert_allclose(tf.reduce_sum(bicubic_weights(size, new), axis=1), 1, rtol=1e-14)
        np.testing.assert_allclose(
            bicubic_weights(size, new)[::-1, ::-1], bicubic_weights(size, new), rtol=0, atol=1e-14
        )
    quarter = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]  # the cubic with a = -0.75 a quarter past a point
    np.testing.assert_array_equal(bicubic_weights(5, 10)[5, 1:], quarter)
    assert bicubic_weights(5, 10)[1, 0] == quarter[0] + quarter[1]  # the border is repeated


# Training


def loss_gradients(model, training=True):
    """The loss, and the gradients except those that are zero but for rounding: the softmax does not see k_proj.bias."""
    weights = [weight for weight in model.trainable_weights if "k_proj/bias" not in weight.path]
    with tf.GradientTape() as tape:
        loss = model(BOTH, return_loss=True, training=training).loss
    return loss, {weight.path: tf.convert_to_tensor(g) for weight, g in zip(weights, tape.gradient(loss, weights))}  # noqa: B905


def test_every_weight_has_a_gradient(model):
    loss, gradients = loss_gradients(model)
    assert loss.shape == ()
    assert len(gradients) == len(model.weights) - 5
    assert all(np.isfinite(g).all() and np.any(g) for g in gradients.values())


def test_gradients_pass_rows_that_are_all_padding():
    for attention in ("eager", "sdpa"):
        model = build("CLIPTextModel", attn_implementation=attention)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(cases.text_inputs(PLAIN, 5)).last_hidden_state ** 2)
        assert all(np.isfinite(tf.convert_to_tensor(g)).all() for g in tape.gradient(loss, model.trainable_weights))


def test_dropout_draws_one_mask_for_each_row_and_head():
    config = CLIPConfig({**TEXT, "attention_dropout": 0.5}, {**VISION, "attention_dropout": 0.5}, projection_dim=24)
    model = build(config=config, attn_implementation="eager")
    ids = np.repeat(TEXTS["input_ids"][:1], 2, 0)
    whole = model.text_model(ids, output_attentions=True)
    dropped = model.text_model(ids, output_attentions=True, training=True)
    kept = dropped.attentions[0].numpy() != 0
    np.testing.assert_allclose(
        dropped.attentions[0].numpy()[kept], 2 * whole.attentions[0].numpy()[kept], rtol=1e-5
    )  # returned after dropout
    masks = kept[..., np.tril_indices(11)[0], np.tril_indices(11)[1]].reshape(8, -1)  # (batch * heads, below)
    assert len({mask.tobytes() for mask in masks}) == 8
    assert 0.4 < masks.mean() < 0.6
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for features, inputs in ((model.get_text_features, TEXTS), (model.get_image_features, IMAGES)):
            assert_equal(features(inputs, training=False), features(inputs), 0)
            first = features(inputs, training=True)
            assert relative(first, features(inputs)) > 1e-2
            assert relative(first, features(inputs, training=True)) > 1e-2


@pytest.mark.parametrize(
    ("attention", "mode"), [("eager", "eager"), ("eager", "graph"), ("sdpa", "eager"), ("sdpa", "xla")]
)
def test_gradient_checkpointing_recomputes_the_same(attention, mode, monkeypatch):
    text, vision = ({**part, "attention_dropout": 0.3, "num_hidden_layers": 2} for part in (TEXT, VISION))
    config = CLIPConfig(text, vision, projection_dim=24)
    results, calls = [], []
    call = TFCLIPEncoderLayer.call

    @functools.wraps(call)  # Keras reads its signature
    def counted(self, *args, **kwargs):
        calls.append(self)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(TFCLIPEncoderLayer, "call", counted)
    for checkpointing in (False, True):
        model = build(config=config, dtype="float64", attn_implementation=attention)
        for tower in (model.text_model, model.vision_model):
            tower.encoder.seed_generator.state.assign([1, 2])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing is checkpointing
        calls.clear()
        step = loss_gradients if mode == "eager" else tf.function(loss_gradients, jit_compile=mode == "xla")
        loss, gradients = step(model)
        results.append((loss, list(gradients.values())))
        assert len(calls) == (8 if checkpointing else 4)
        calls.clear()
        loss_gradients(model, training=False)
        assert len(calls) == 4
        if checkpointing and mode == "graph":  # the recomputation is not merged with the first computation
            graph = step.get_concrete_function(model).graph
            assert sum(op.type == "Erf" or op.type == "Sigmoid" for op in graph.get_operations()) == 8
    assert_equal(*results, 0 if mode == "eager" else 1e-12)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def dataset(inputs: dict, batch: int = 2):
    return tf.data.Dataset.from_tensor_slices(inputs).batch(batch)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_uses_the_contrastive_loss(jit_compile):
    model = build()
    expected = np.mean(
        [model({k: v[i : i + 2] for k, v in BOTH.items()}, return_loss=True).loss for i in (0, 2)]
    )  # batches of 2
    model.compile(keras.optimizers.SGD(0.01), jit_compile=jit_compile)
    assert model.evaluate(dataset(BOTH), verbose=0) == pytest.approx(expected, rel=1e-5)
    losses = model.fit(dataset(BOTH), epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[2] < losses[1] < losses[0]
    assert losses[0] < expected * 1.05


def test_fit_steps_along_the_gradient():
    model, twin = build(), build()
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    model.fit(dataset(BOTH, 4), shuffle=False, verbose=0)
    _, gradients = loss_gradients(twin)
    for before, after in zip(twin.weights, model.weights, strict=True):
        if before.path in gradients:
            assert relative(after - before, -0.1 * gradients[before.path]) < 1e-3


def test_fit_in_mixed_precision_and_as_tuples():
    arrays = cases.random_arrays(PLAIN, "CLIPModel")
    model = clipmb.tf.TFCLIPModel.from_pretrained(
        None, config=PLAIN, state_dict=arrays, dtype="mixed_bfloat16", return_dict=False
    )
    model.gradient_checkpointing_enable()
    model.compile(keras.optimizers.SGD(0.01))
    losses = model.fit(BOTH, batch_size=2, epochs=3, shuffle=False, verbose=0).history["loss"]  # numpy, no dataset
    assert losses[2] < losses[0]
    assert model.logit_scale.dtype == "float32"


def test_predict_joins_batches(model):
    model.compile()
    output = model.predict(dataset(BOTH), verbose=0)
    assert type(output) is CLIPOutput
    assert_equal(output.text_embeds, model(BOTH).text_embeds, 2e-6)
    assert output.text_model_output.last_hidden_state.shape == (4, 11, 32)
    assert isinstance(keras.tree.map_structure(lambda x: x, output), ModelOutput)


def test_classification_trains_on_labels_in_or_beside_the_inputs():
    labels = np.array([1, 0, 6, 3])
    model = build("CLIPForImageClassification")
    own = model(IMAGES, labels=labels)
    logits = own.logits.numpy()
    expected = -np.log(np.exp(logits)[range(4), labels] / np.exp(logits).sum(-1)).mean()
    assert own.loss.numpy() == pytest.approx(expected, rel=1e-5)
    half = model(IMAGES, labels=np.where(np.arange(4) < 2, labels, -100)).loss
    assert half.numpy() == pytest.approx(model(IMAGES["pixel_values"][:2], labels[:2]).loss.numpy(), rel=1e-5)
    inside = tf.data.Dataset.from_tensor_slices({**IMAGES, "labels": labels}).batch(4)
    beside = tf.data.Dataset.from_tensor_slices((IMAGES, labels)).batch(4)
    accuracy = (logits.argmax(-1) == labels).mean()
    for data in (inside, beside):
        model.compile(keras.optimizers.SGD(0.0), metrics=["sparse_categorical_accuracy"], jit_compile=False)
        assert model.evaluate(data, verbose=0) == pytest.approx([expected, accuracy], rel=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = build("CLIPForImageClassification")
    model.compile(keras.optimizers.SGD(1e-3), loss=loss, jit_compile=False)
    assert model.fit(beside, shuffle=False, verbose=0).history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert model.evaluate(beside, verbose=0) < expected
    bare = build("CLIPForImageClassification")
    bare.compile()
    with pytest.raises(ValueError, match="No loss to compute"):
        bare.evaluate(dataset(IMAGES), verbose=0)


# Vocabulary, serving, engine


def test_the_vocabulary_grows_and_shrinks(tmp_path):
    model = build()
    expected = model(BOTH).text_embeds
    table = model.resize_token_embeddings(101, pad_to_multiple_of=8)
    assert table is model.get_input_embeddings()
    assert model.config.text_config.vocab_size == table.input_dim == 104
    assert_equal(model(BOTH).text_embeds, expected, 0)
    assert model.get_text_features([[97, 103, 98]]).shape == (1, 24)
    assert len(model.weights) == len(specs(PLAIN, "CLIPModel"))
    assert any(weight is table.embeddings for weight in model.trainable_weights)
    model.save_pretrained(tmp_path)
    assert_equal(clipmb.tf.TFCLIPModel.from_pretrained(tmp_path)(BOTH).text_embeds, expected, 0)
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"\[0, 50\)"):
        model(BOTH)
    for size in (0, 2.5):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            model.resize_token_embeddings(size)
    vision = build("CLIPVisionModel")
    with pytest.raises(ValueError, match="text tower have token embeddings"):
        vision.resize_token_embeddings(9)
    assert vision.get_input_embeddings() is vision.vision_model.embeddings.patch_embedding


@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModelWithProjection", "CLIPForImageClassification"])
def test_saved_models_serve_any_batch(head, tmp_path):
    model = build(head)
    model.export(tmp_path / "saved")
    served = tf.saved_model.load(tmp_path / "saved").signatures
    for batch in (4, 1):
        inputs = {name: tf.cast(value, tf.int32 if value.dtype == np.int64 else tf.float32)
                  for name, value in inputs_of(head, PLAIN, batch).items()}  # fmt: skip
        result = served["serving_default"](**inputs)
        expected = {name: value for name, value in model(inputs).items() if tf.is_tensor(value)}
        assert_equal(result, expected, 2e-6)
        if head == "CLIPModel":
            pixels = inputs.pop("pixel_values")
            shorter = {name: value[:, :7] for name, value in inputs.items()}
            assert_equal(served["text_features"](**shorter)["text_features"], model.get_text_features(shorter), 2e-6)
            assert_equal(served["image_features"](pixel_values=pixels)["image_features"],
                         model.get_image_features(pixels), 2e-6)  # fmt: skip
    features = {"text_features", "image_features"} if head == "CLIPModel" else set()
    texts = {"int64_serving", "serving_without_mask"} if "input_ids" in inputs_of(head, PLAIN) else set()
    assert set(served) == {"serving_default", *features, *texts}


def test_saved_models_have_the_signatures_that_are_given(tmp_path):
    model = clipmb.tf.TFCLIPTextModel(PLAIN.text_config)
    ids = tf.TensorSpec((None, 7), tf.int64, "ids")

    @tf.function(input_signature=[ids])
    def pooled(ids):
        return {"pooled": model(ids).pooler_output}

    with pytest.raises(ValueError, match="Pass saved_model=True"):
        model.save_pretrained(tmp_path, signatures={"mine": pooled})
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path, saved_model=True, signatures={"mine": pooled})
    loaded = tf.saved_model.load(str(tmp_path / "saved_model" / "1"))
    assert list(loaded.signatures) == ["mine"]
    given = np.arange(14).reshape(2, 7)
    assert np.allclose(loaded.signatures["mine"](ids=tf.constant(given))["pooled"], model(given).pooler_output)


@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModelWithProjection", "CLIPVisionModel"])
def test_saved_models_serve_int64_and_texts_without_mask(head, tmp_path):
    model = build(head)
    model.save_pretrained(tmp_path, True, version=3)
    assert (tmp_path / "model.safetensors").exists()
    folder = tmp_path / "saved_model" / "3"
    inputs = {name: tf.constant(value) for name, value in inputs_of(head, PLAIN).items()}
    inputs["pixel_values"] = tf.cast(inputs["pixel_values"], tf.float32) if "pixel_values" in inputs else None
    inputs = {name: value for name, value in inputs.items() if value is not None}
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    layer, served = keras.layers.TFSMLayer(folder), tf.saved_model.load(folder).signatures
    for given, signature in ((inputs, "int64_serving"), (bare, "serving_without_mask")):
        expected = {name: value for name, value in model(given).items() if tf.is_tensor(value)}
        for dtype in (tf.int32, tf.int64):
            cast = {name: tf.cast(value, dtype) if name != "pixel_values" else value for name, value in given.items()}
            assert_equal(layer(cast), expected, 2e-6)
            if signature in served and dtype == (tf.int64 if signature == "int64_serving" else tf.int32):
                assert_equal(served[signature](**cast), expected, 2e-6)
    assert ("int64_serving" in served) is ("input_ids" in inputs)


def test_a_model_from_a_config_as_in_transformers():
    model = clipmb.tf.TFCLIPModel.from_config(PLAIN, name="clip")
    assert (model.name, model.config.to_dict()) == ("clip", PLAIN.to_dict())
    again = clipmb.tf.TFCLIPModel.from_config(model.get_config())
    assert (again.name, again.config.to_dict()) == ("clip", PLAIN.to_dict())


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_engine(compile, dtype, tmp_path):
    folder = cases.write_checkpoint(tmp_path, PLAIN)
    engine, model = Engine.load(folder, dtype=dtype, device="cpu", compile=compile), build(dtype=dtype)
    kind = np.float64 if dtype == "float64" else np.float32
    bound = {"float32": 2e-6, "bfloat16": 2e-2, "float64": 1e-12}[dtype]
    for texts in (TEXTS, {"input_ids": TEXTS["input_ids"][:2, :9].astype(np.int32)}):
        result = engine.text_features(**texts)
        assert result.dtype == kind
        assert relative(result, tf.cast(model.get_text_features(texts), tf.float64)) < bound
    images = engine.image_features(IMAGES["pixel_values"])
    assert images.dtype == kind
    assert relative(images, tf.cast(model.get_image_features(IMAGES), tf.float64)) < bound
    found = engine.stages(TEXTS["input_ids"], TEXTS["attention_mask"], IMAGES["pixel_values"])
    assert found["text.block.2"].shape == (4, 11, 32)
    assert relative(found["vision.projected"], images) < bound
    assert engine.logit_scale == pytest.approx(np.exp(2.0))
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"input_ids must lie in \[0, 99\)"):
        engine.text_features(np.array([[1, 99]]))
    engine.free()


# Installation


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (
            "os.environ['KERAS_BACKEND'] = 'torch'",
            "ImportError: clipmb.tf needs Keras 3 on the TensorFlow b",
        ),
        ("sys.modules['tensorflow'] = None", "MissingBackendError: clipmb[tf] needs tensorflow"),
        ("sys.modules['keras'] = None", "MissingBackendError: clipmb[tf] needs keras"),
    ],
)
def test_what_is_not_installed_is_named_with_the_fix(prepare, words):
    code = f"import os, sys; {prepare}; import clipmb.tf"
    done = python("-c", code)
    assert done.returncode == 1
    assert words in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr or 'pip install "clipmb[tf]"' in done.stderr


def test_stress_config_is_exact_in_float64():
    """A knob that only one precision follows (an epsilon, an activation's constant) shows between two of them."""
    config = CLIPConfig({**TEXT, **STRESS}, {**VISION, **STRESS}, projection_dim=24)
    assert_equal(build(config=config)(BOTH), build(config=config, dtype="float64")(BOTH), 5e-6)
    assert isinstance(config.text_config, CLIPTextConfig)


# Models that change


def trained(model):
    model.compile(optimizer=keras.optimizers.Adam(1e-2), jit_compile=False)
    model.fit(dataset(BOTH), shuffle=False, verbose=0)
    return model


def values(model) -> dict:
    return {weight.path: weight.numpy() for weight in model.weights}


def test_fit_goes_on_with_a_table_of_another_size():
    model = trained(build())
    predicted = model.predict(BOTH, verbose=0).text_embeds
    moments = {v.path: v.numpy() for v in model.optimizer.variables}
    table = model.resize_token_embeddings(PLAIN.text_config.vocab_size + 8)
    names = [[weight.path.partition("/")[2] for weight in each.weights] for each in (model, build())]
    assert names[0] == names[1]
    assert_equal(model.predict(BOTH, verbose=0).text_embeds, predicted, 0)
    before = table.embeddings.numpy()
    table.embeddings.assign(before * 2)
    assert relative(model.predict(BOTH, verbose=0).text_embeds, predicted) > 1e-3
    table.embeddings.assign(before)
    model.make_train_function()
    kept = {v.path: v.numpy() for v in model.optimizer.variables}
    assert kept.keys() == moments.keys()
    for name, value in moments.items():
        np.testing.assert_array_equal(kept[name][: len(value)] if value.ndim else kept[name], value)
    new = PLAIN.text_config.vocab_size + 3
    texts = {**TEXTS, "input_ids": np.full_like(TEXTS["input_ids"], new)}
    model.fit(dataset({**texts, **IMAGES}), shuffle=False, verbose=0)
    after = model.get_input_embeddings().embeddings.numpy()
    assert np.abs(after[new] - before[new]).max() > 1e-4
    np.testing.assert_array_equal(after[new + 1], before[new + 1])
    assert model.optimizer.iterations == 2 * len(list(dataset(BOTH)))


@pytest.mark.parametrize("change", ["freeze", "attention", "checkpointing", "embeddings", "thaw"])
def test_compiled_functions_follow_the_model(change):
    model = build()
    if change == "thaw":
        model.vision_model.trainable = False
    trained(model)
    model.evaluate(dataset(BOTH), verbose=0)
    model.predict(BOTH, verbose=0)
    made = model.train_function, model.test_function, model.predict_function
    model.fit(dataset(BOTH), shuffle=False, verbose=0)
    model.evaluate(dataset(BOTH), verbose=0)
    model.predict(BOTH, verbose=0)
    assert made == (model.train_function, model.test_function, model.predict_function)
    if change in ("freeze", "thaw"):
        model.vision_model.trainable = change == "thaw"
    elif change == "attention":
        model.set_attn_implementation("eager")
    elif change == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        new = keras.layers.Embedding(PLAIN.text_config.vocab_size, PLAIN.text_config.hidden_size)
        new.build()
        model.set_input_embeddings(new)
    before = values(model)
    model.fit(dataset(BOTH), shuffle=False, verbose=0)
    model.evaluate(dataset(BOTH), verbose=0)
    model.predict(BOTH, verbose=0)
    assert not set(made) & {model.train_function, model.test_function, model.predict_function}
    for weight in model.weights:
        frozen = change == "freeze" and weight.path.split("/")[1] == "vision_model"
        assert np.array_equal(before[weight.path], weight.numpy()) is frozen, weight.path


def test_the_config_takes_over_the_size_of_a_replaced_vocabulary(tmp_path):
    model = build()
    new = keras.layers.Embedding(107, PLAIN.text_config.hidden_size)
    new.build()
    model.set_input_embeddings(new)
    model.save_pretrained(tmp_path)
    again = clipmb.tf.TFCLIPModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.get_input_embeddings().embeddings, new.embeddings)


def test_every_table_is_reached_through_its_layer():
    model = build()
    expected = model(BOTH)
    for embeddings, fields in (
        (model.text_model.embeddings, [{}, {"position_ids": np.arange(TEXTS["input_ids"].shape[1])[None]}]),
        (model.vision_model.embeddings, [{}]),
    ):
        layer = embeddings.position_embedding
        layer.enable_lora(2)
        layer.lora_embeddings_b.assign(np.resize([1.0, -2.0, 3.0], layer.lora_embeddings_b.shape))
        for field in fields:
            assert relative(model({**BOTH, **field}).logits_per_text, expected.logits_per_text) > 1e-3
        layer.lora_embeddings_b.assign(np.zeros(layer.lora_embeddings_b.shape))
    assert_equal(model(BOTH), expected, 0)
    model.text_model.embeddings.token_embedding.enable_lora(2)
    with pytest.raises(ValueError, match="quantized or has LoRA"):
        model.resize_token_embeddings(5)


def test_quantize_makes_every_product_and_table_int8():
    model = build()
    expected = model(BOTH).logits_per_text
    with pytest.warns(
        UserWarning, match="does not have a `quantize` method"
    ):  # norms and patches, which stay as they are
        model.quantize("int8")
    for weight in model.weights:
        large = weight.path.endswith(("/kernel", "/embeddings")) and "patch_embedding" not in weight.path
        assert (weight.dtype == "int8") is large, weight.path
    assert 1e-6 < relative(model(BOTH).logits_per_text, expected) < 0.1


def test_a_config_turns_gradient_checkpointing_on(monkeypatch):
    config = CLIPConfig.from_dict({**PLAIN.to_dict(), "gradient_checkpointing": True})
    model = clipmb.tf.TFCLIPModel(config)
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    calls = []
    original = clipmb.tf.modeling.recomputed
    monkeypatch.setattr("clipmb.tf.modeling.recomputed", lambda *args: calls.append(1) or original(*args))
    model.gradient_checkpointing_enable(every_n_layers=2)
    model(BOTH, training=True)
    layers = (PLAIN.text_config.num_hidden_layers, PLAIN.vision_config.num_hidden_layers)
    assert len(calls) == sum((count + 1) // 2 for count in layers)
    with pytest.raises(ValueError, match="every_n_layers"):
        model.gradient_checkpointing_enable(every_n_layers=0)


@pytest.mark.parametrize("mean_resizing", [True, False])
def test_new_rows_are_drawn_around_the_mean_or_initially(mean_resizing):
    model = build()
    old = model.get_input_embeddings().embeddings.numpy()
    new = model.resize_token_embeddings(len(old) + 500, mean_resizing=mean_resizing).embeddings.numpy()[len(old) :]
    spread = 1e-4 if mean_resizing else 1
    np.testing.assert_allclose(new.mean(0), old.mean(0) if mean_resizing else 0, atol=0.3 * spread * old.std())
    if mean_resizing:
        np.testing.assert_allclose(new.std(0), 1e-9**0.5 * old.std(0), rtol=0.2)
    else:
        assert new.std() == pytest.approx(0.02 * PLAIN.text_config.initializer_factor, rel=0.1)
