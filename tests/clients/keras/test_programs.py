"""Keras around our TensorFlow models: functional and Sequential models, callbacks, files, export, LoRA and int8."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import CONFIGS, config_of, inputs_of, random_arrays, relative

import clipmb

pytestmark = pytest.mark.filterwarnings("default")  # what Keras warns of itself is its own matter
CONFIG = CONFIGS["plain"]
SIZE = CONFIG.vision_config.image_size
PIXELS = inputs_of("CLIPVisionModel", CONFIG)["pixel_values"]
TEXTS = inputs_of("CLIPTextModel", CONFIG)
LABELS = np.array([0, 1, 2, 0])


def tower(head: str):
    kind = getattr(clipmb, f"TF{head}")
    config = config_of(head, CONFIG)
    return kind.from_pretrained(None, config=config, state_dict=random_arrays(config, head))


def functional() -> keras.Model:
    pixels = keras.Input((3, SIZE, SIZE), name="pixel_values")
    ids = keras.Input((None,), dtype="int64", name="input_ids")
    mask = keras.Input((None,), dtype="int64", name="attention_mask")
    image = tower("CLIPVisionModel")(pixels).pooler_output
    text = tower("CLIPTextModel")(ids, attention_mask=mask).pooler_output
    scores = keras.layers.Dense(3)(keras.layers.Concatenate()([image, text]))
    return keras.Model([pixels, ids, mask], scores)


class Pooled(keras.layers.Layer):
    """The pooled output of a vision tower, for models that pass one tensor on."""

    def call(self, output):
        return output["pooler_output"]


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((3, SIZE, SIZE)), tower("CLIPVisionModel"), Pooled(), keras.layers.Dense(3)])


MODELS = {
    "functional": (functional, [PIXELS, TEXTS["input_ids"], TEXTS["attention_mask"]]),
    "sequential": (sequential, PIXELS),
}


@pytest.fixture(params=MODELS)
def case(request):
    make, inputs = MODELS[request.param]
    keras.utils.set_random_seed(0)
    return make(), inputs


def load(path) -> keras.Model:
    return keras.saving.load_model(path, custom_objects={"Pooled": Pooled})


def test_training_checkpoints_and_files(case, tmp_path):
    model, inputs = case
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [weight.numpy() for weight in model.trainable_weights]
    best = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras", verbose=0)
    weights = keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True)
    dataset = tf.data.Dataset.from_tensors((inputs if isinstance(inputs, np.ndarray) else tuple(inputs), LABELS))
    model.fit(dataset, epochs=2, shuffle=False, verbose=0, callbacks=[best, weights])
    changed = [not np.array_equal(old, new) for old, new in zip(before, model.trainable_weights, strict=True)]
    assert sum(changed) > len(changed) / 2
    expected = model.predict_on_batch(inputs)
    again = load(tmp_path / "2.keras")
    np.testing.assert_array_equal(again.predict_on_batch(inputs), expected)
    assert relative(load(tmp_path / "1.keras").predict_on_batch(inputs), expected) > 1e-6
    again.set_weights([weight * 0 for weight in again.get_weights()])
    again.load_weights(tmp_path / "last.weights.h5")
    np.testing.assert_array_equal(again.predict_on_batch(inputs), expected)


def test_exported_models_serve_any_batch(case, tmp_path):
    model, inputs = case
    model.export(tmp_path / "served", verbose=False)
    layer = keras.layers.TFSMLayer(tmp_path / "served", call_endpoint="serve")
    rows = inputs[:2] if isinstance(inputs, np.ndarray) else [value[:2] for value in inputs]
    assert relative(layer(rows), model(rows)) < 1e-5


def test_int8_and_lora_reach_the_towers(case, tmp_path):
    model, inputs = case
    expected = model(inputs)
    towers = [layer for layer in model.layers if isinstance(layer, keras.Model)]
    for each in towers:
        for layer in each._flatten_layers():
            if isinstance(layer, keras.layers.Dense):
                layer.enable_lora(2)
    assert any("lora" in weight.name for weight in model.trainable_weights)
    assert relative(model(inputs), expected) < 1e-5
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        model.quantize("int8")
    kinds = {weight.dtype for each in towers for weight in each.weights if weight.path.endswith("/kernel")}
    assert "int8" in kinds
    assert 1e-6 < relative(model(inputs), expected) < 0.1
