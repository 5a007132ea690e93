"""The TensorFlow heads against PyTorch's, with gradients, and against the three of transformers 4.57.6."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import torch  # before tensorflow
from cases import ALL_HEADS, CONFIGS, STRESS, TEXT, VISION, config_of, inputs_of, relative

import clipmb.pt
import clipmb.tf

import keras  # isort: skip
import tensorflow as tf  # isort: skip
import transformers  # isort: skip
from clipmb.common.config import ACTIVATIONS, CLIPConfig
from clipmb.common.parameters import KINDS, specs
from clipmb.pt import layers as pt_layers
from clipmb.pt import modeling as pt_modeling
from clipmb.tf import layers as tf_layers
from clipmb.tf import modeling as tf_modeling

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # Keras' variables under numpy 2
)

BOUNDS = {"float32": 1e-5, "float64": 1e-12}
POOLED = ("pooler_output", "text_embeds", "image_embeds")


def bound_of(name: str, dtype: str) -> float:
    return 2e-6 if dtype == "float32" and name.rpartition(".")[2] in POOLED else BOUNDS[dtype]


def pair(head: str, config: CLIPConfig, dtype: str, **options):
    part = config_of(head, config)
    arrays = cases.random_arrays(part, head, dtype=dtype)
    loaded = [cls.from_pretrained(None, config=part, state_dict=arrays, dtype=dtype, **options)
              for cls in (getattr(clipmb.pt, head), getattr(clipmb.tf, f"TF{head}"))]  # fmt: skip
    return loaded[0], loaded[1]


def fields(output, prefix: str = "") -> dict:
    """Every tensor of an output by its path."""
    found = {}
    for name, value in output.items() if hasattr(output, "items") else enumerate(output):
        nested = hasattr(value, "items") or isinstance(value, tuple)
        found.update(fields(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return found


def to_torch(inputs: dict) -> dict:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("head", ALL_HEADS)
@pytest.mark.parametrize(("dtype", "attention"), [("float32", "eager"), ("float64", "eager"), ("float64", "sdpa")])
def test_outputs_and_gradients_equal_pytorch(case, head, dtype, attention):
    config = CONFIGS[case]
    # Always against eager: the gradients of PyTorch's fused kernel are wrong where all that a token sees is padding.
    theirs, ours = pair(head, config, dtype, attn_implementation="eager")
    ours.set_attn_implementation(attention)
    inputs = inputs_of(head, config, 5)  # with a text that is all padding
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].astype(dtype)
    if head == "CLIPForImageClassification":
        inputs["labels"] = np.array([0, 6, 3, 1, 2])
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    options.update({"return_loss": True} if head == "CLIPModel" else {})
    expected = fields(theirs(**to_torch(inputs), **options))
    with tf.GradientTape() as tape:
        found = fields(ours(**inputs, **options))
        # A random direction in every output, so that no gradient cancels.
        rng = np.random.default_rng(0)
        directions = {name: rng.normal(size=value.shape).astype(dtype) for name, value in found.items()}
        total = tf.add_n([tf.reduce_sum(found[name] * direction) for name, direction in directions.items()])
    assert list(found) == list(expected)
    assert len(found) > 3
    for name, value in expected.items():
        assert found[name].dtype == dtype
        assert relative(found[name], value.detach()) <= bound_of(name, dtype), name

    sum((expected[name] * torch.from_numpy(direction)).sum() for name, direction in directions.items()).backward()
    table = specs(ours.config, head)
    for spec, gradient in zip(table, tape.gradient(total, [ours.parameter(spec) for spec in table]), strict=True):
        reference = theirs.get_parameter(spec.name).grad
        if reference is None:
            assert gradient is None, spec.name
            continue
        gradient = KINDS[spec.kind].to_canonical(tf.convert_to_tensor(gradient).numpy())
        if spec.name.endswith("k_proj.bias"):  # zero but for rounding: the softmax does not see it
            size = abs(theirs.get_parameter(spec.name.replace("bias", "weight")).grad).max().item()
            assert abs(gradient).max() <= BOUNDS[dtype] * size, spec.name
        else:
            assert relative(gradient, reference) <= BOUNDS[dtype], spec.name


@pytest.mark.parametrize("size", [(20, 20), (24, 24), (28, 16), (7, 45), (100, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpolated_positions_equal_pytorch(size, dtype):
    theirs, ours = pair("CLIPVisionModel", CONFIGS["plain"], dtype)
    inputs = {"pixel_values": cases.image_inputs(CONFIGS["plain"], 2, size)["pixel_values"].astype(dtype)}
    with torch.no_grad():
        expected = fields(theirs(**to_torch(inputs), interpolate_pos_encoding=True, output_hidden_states=True))
    found = fields(ours(inputs, interpolate_pos_encoding=True, output_hidden_states=True))
    for name, value in expected.items():
        assert relative(found[name], value) <= bound_of(name, dtype), name


def test_interpolation_alone_equals_pytorch():
    """Also in graphs of unknown size, with and without XLA."""
    table = np.random.default_rng(0).normal(size=(50, 8))
    signature = [tf.TensorSpec((50, 8), tf.float64), tf.TensorSpec((), tf.int32), tf.TensorSpec((), tf.int32)]
    graph = tf.function(tf_layers.interpolate_positions, input_signature=signature)
    for rows, columns in ((7, 7), (7, 8), (14, 14), (1, 1), (3, 20), (50, 9)):
        expected = pt_layers.interpolate_positions(torch.from_numpy(table), rows, columns)
        assert relative(tf_layers.interpolate_positions(tf.constant(table), rows, columns), expected) < 1e-14
        assert relative(graph(table, rows, columns), expected) < 1e-14
        xla = tf.function(lambda x, r=rows, c=columns: tf_layers.interpolate_positions(x, r, c), jit_compile=True)
        assert relative(xla(tf.constant(table)), expected) < 1e-14


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_pytorch(name):
    x = np.concatenate([np.linspace(-12, 12, 2001), [-1e3, 1e3]])
    for dtype, bound in (("float64", 1e-15), ("float32", 3e-7)):
        ours = tf_layers.ACTIVATIONS[name](tf.constant(x, dtype))
        theirs = pt_layers.ACTIVATIONS[name](torch.tensor(x, dtype=getattr(torch, dtype)))
        assert ours.dtype == dtype
        assert relative(ours[:-2], theirs[:-2]) <= bound
        assert relative(ours, theirs) <= bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_bias_of_attention_equals_pytorch(dtype):
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 2, 1]])
    ours = tf_modeling.attention_bias(tf.constant(mask), tf.zeros((5, 4, 8), dtype))
    theirs = pt_modeling.attention_bias(torch.from_numpy(mask), torch.zeros(5, 4, 8, dtype=getattr(torch, dtype)))
    np.testing.assert_array_equal(tf.cast(ours, tf.float64), theirs.double())
    assert np.isneginf(tf.cast(ours, tf.float64)).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_as_close_to_the_truth_as_pytorch(dtype):
    config = CLIPConfig({**TEXT, **STRESS}, {**VISION, **STRESS}, projection_dim=24)
    (theirs, ours), (truth, _) = pair("CLIPModel", config, dtype), pair("CLIPModel", config, "float64")
    inputs = inputs_of("CLIPModel", config, 5)
    with torch.no_grad():
        exact = fields(truth(**to_torch(inputs)))
        expected = fields(theirs(**to_torch(inputs)))
    found = fields(ours(inputs))
    for name, value in exact.items():
        error = relative(expected[name].double(), value)
        assert relative(tf.cast(found[name], tf.float64), value) < 2 * error + 1e-4, name


@pytest.mark.parametrize(
    ("labels", "num_labels", "problem_type"),
    [
        (np.array([0, 3, -100, 2]), 5, None),
        (np.array([0.5, 3, -1, 2], np.float32), 1, None),
        (np.array([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [0.5, 1, 1]], np.float32), 3, None),
        (np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]), 3, "multi_label_classification"),
        (np.array([[0.0, 1, 0], [1, 1, 0], [0, 0, 0], [0.5, 1, 1]], np.float32), 3, "regression"),
    ],
)
def test_losses_of_classification_equal_pytorch(labels, num_labels, problem_type):
    config = CLIPConfig(TEXT, VISION, num_labels=num_labels, problem_type=problem_type)
    theirs, ours = pair("CLIPForImageClassification", config, "float64")
    pixels = cases.image_inputs(config)["pixel_values"]
    expected = theirs(torch.from_numpy(pixels).double(), torch.from_numpy(labels)).loss
    found = ours(pixels, labels).loss
    assert found.shape == ()
    assert relative(found, expected.detach()) < 1e-12


def test_a_training_step_equals_pytorch():
    theirs, ours = pair("CLIPModel", CONFIGS["stress"], "float64")
    inputs = inputs_of("CLIPModel", CONFIGS["stress"])
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = theirs(
            **to_torch({**inputs, "pixel_values": inputs["pixel_values"].astype("float64")}), return_loss=True
        ).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    ours.compile(keras.optimizers.SGD(0.01), jit_compile=False)
    data = tf.data.Dataset.from_tensors(inputs)
    assert ours.fit(data, epochs=3, shuffle=False, verbose=0).history["loss"] == pytest.approx(losses, rel=1e-6)
    for spec in specs(ours.config, "CLIPModel"):
        found = KINDS[spec.kind].to_canonical(ours.parameter(spec).numpy())
        assert relative(found, theirs.get_parameter(spec.name).detach()) < 1e-7  # Keras' rates are float32


# transformers: its TensorFlow models are those of tf_keras, which lives beside Keras 3.


def canonical(name: str) -> str:
    """The canonical name of a weight of the reference, which scopes by the names of layers."""
    name = name.removesuffix(":0").partition("/clip/")[2].replace("layers_._", "layers.").replace("/", ".")
    stem, _, leaf = name.rpartition(".")
    leaf = {"kernel": "weight", "embeddings": "weight", "gamma": "weight", "beta": "bias"}.get(leaf, leaf)
    return f"{stem}.{leaf}" if stem else leaf


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("head", ["CLIPModel", "CLIPTextModel", "CLIPVisionModel"])
def test_the_former_tensorflow_models_agree(head, case):
    config = CONFIGS[case]
    part = config_of(head, config)
    arrays = cases.random_arrays(part, head)
    name = type(part).__name__
    theirs = getattr(transformers, f"TF{head}")(getattr(transformers, name).from_dict(part.to_dict()))
    theirs.build_in_name_scope()
    table = {spec.name: spec for spec in specs(part, head)}
    assert {canonical(weight.name) for weight in theirs.weights} == table.keys()
    for weight in theirs.weights:
        spec = table[canonical(weight.name)]
        weight.assign(KINDS[spec.kind].to_framework(arrays[spec.name]).reshape(weight.shape))
    ours = getattr(clipmb.tf, f"TF{head}").from_pretrained(
        None, config=part, state_dict=arrays, attn_implementation="eager"
    )
    # Without the left-padded row, of which the reference's frameworks differ from each other.
    inputs = {name: value[[0, 1, 3]] for name, value in inputs_of(head, config).items()}
    options = {"output_hidden_states": True, "output_attentions": True}
    options.update({"return_loss": True} if head == "CLIPModel" else {})
    expected = fields(theirs({name: tf.constant(value) for name, value in inputs.items()}, **options))
    found = fields(ours(inputs, **options))
    assert list(found) == list(expected)
    for name, value in expected.items():
        value = tf.reshape(value, ()) if name == "loss" else value  # theirs is (1,)
        assert relative(found[name], value) <= bound_of(name, "float32"), name
