"""model.weights.h5: round trips, and Keras itself as the other side."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from cases import ALL_HEADS, CONFIGS, assert_same, config_of, image_inputs
from conftest import TESTS
from format_cases import arrays_of, heads_and_configs, read_as, write_as
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import output

from clipmb import CheckpointError
from clipmb.common.checkpoint import formats
from clipmb.common.hub import Source

CONFIG = CONFIGS["plain"]
FORMAT = "keras-weights"

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",  # Keras' variables under numpy 2
)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_round_trip(tmp_path, head, dtype):
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head, dtype)
    assert write_as(FORMAT, tmp_path, arrays, part, head, "1KB") == ["model.weights.h5"]
    assert_same(read_as(FORMAT, tmp_path, part, head), arrays)


@settings(max_examples=15, deadline=None)
@given(case=heads_and_configs(ALL_HEADS), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_round_trip_of_random_configurations(tmp_path_factory, case, dtype):
    head, part = case
    folder = tmp_path_factory.mktemp("keras")
    arrays = arrays_of(part, head, dtype)
    write_as(FORMAT, folder, arrays, part, head)
    assert_same(read_as(FORMAT, folder, part, head), arrays)


def keras_model(head: str, arrays=None, dtype: str = "float32", config=CONFIG):
    import clipmb.tf

    part = config_of(head, config)
    cls = getattr(clipmb.tf, f"TF{head}")
    return cls(part, dtype=dtype) if arrays is None else cls.from_pretrained(
        None, config=part, state_dict=arrays, dtype=dtype
    )  # fmt: skip


@pytest.mark.backend("tf")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_what_keras_writes_is_read(tmp_path, head, dtype):
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head, dtype)
    keras_model(head, arrays, dtype).save_weights(tmp_path / "model.weights.h5")
    assert_same(read_as(FORMAT, tmp_path, part, head), arrays)
    other = (tmp_path / "model.weights.h5").rename(tmp_path / "mine.h5")
    assert_same(read_as(FORMAT, other, part, head), arrays)


@pytest.mark.backend("tf")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ALL_HEADS)
def test_keras_loads_what_is_written(tmp_path, head, dtype):
    part = config_of(head, CONFIG)
    arrays = arrays_of(part, head, dtype)
    write_as(FORMAT, tmp_path, arrays, part, head)
    model = keras_model(head, dtype=dtype)
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same(model.to_arrays(), arrays)


@pytest.mark.backend("tf")
def test_the_same_file_as_keras_but_for_its_empty_groups(tmp_path):
    arrays = arrays_of(CONFIG, "CLIPModel")
    write_as(FORMAT, tmp_path, arrays, CONFIG, "CLIPModel")
    keras_model("CLIPModel", arrays).save_weights(tmp_path / "keras.weights.h5")

    def content(path: Path) -> dict[str, bytes]:
        found = {}
        with h5py.File(path) as file:
            file.visititems(lambda n, item: found.update({n: item[()].tobytes()} if hasattr(item, "shape") else {}))
        return found

    assert content(tmp_path / "model.weights.h5") == content(tmp_path / "keras.weights.h5")


@pytest.mark.backend("tf")
def test_more_than_ten_blocks(tmp_path):
    """Names end in numbers, whose order as text is another."""
    config = type(CONFIG)(
        {**CONFIG.text_config.to_dict(), "num_hidden_layers": 12},
        {**CONFIG.vision_config.to_dict(), "num_hidden_layers": 11},
        projection_dim=24,
    )
    arrays = arrays_of(config, "CLIPModel")
    write_as(FORMAT, tmp_path, arrays, config, "CLIPModel")
    model = keras_model("CLIPModel", config=config)
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same(model.to_arrays(), arrays)


@pytest.mark.backend("tf")
def test_the_state_of_an_optimizer_is_passed_over(tmp_path):
    head = "CLIPForImageClassification"
    model = keras_model(head, arrays_of(CONFIG, head))
    model.compile(optimizer="adam", metrics=["accuracy"], jit_compile=False)
    model.fit(image_inputs(CONFIG), np.zeros(4, int), epochs=1, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        assert "optimizer" in file
    assert_same(read_as(FORMAT, tmp_path, CONFIG, head), model.to_arrays())


def test_no_framework_is_imported(tmp_path):
    code = """
import sys
for name in ("tensorflow", "keras", "torch", "jax", "flax"):
    sys.modules[name] = None
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from cases import assert_same
from format_cases import CLIPConfig, arrays_of, read_as, write_as
small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 6}
config = CLIPConfig({**small, "hidden_size": 8, "vocab_size": 9}, {**small, "hidden_size": 12})
arrays = arrays_of(config, "CLIPModel")
for name in ("tf-h5", "flax-msgpack", "keras-weights"):
    write_as(name, Path(sys.argv[1]) / name, arrays, config, "CLIPModel")
    assert_same(read_as(name, Path(sys.argv[1]) / name, config, "CLIPModel"), arrays)
"""
    output("-c", code, tmp_path, TESTS)


def test_unknown_arrays_are_reported(tmp_path):
    write_as(FORMAT, tmp_path, arrays_of(CONFIG, "CLIPModel"), CONFIG, "CLIPModel")
    with h5py.File(tmp_path / "model.weights.h5", "r+") as file:
        file["layers/linear_2/vars/0"] = np.zeros((2, 2), "f4")
    with pytest.raises(CheckpointError) as caught:
        read_as(FORMAT, tmp_path, CONFIG, "CLIPModel")
    assert caught.value.problems == ["unexpected: layers/linear_2/vars/0"]


def test_another_kind_of_h5_file_is_not_claimed(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["temperature"] = np.zeros(3)
    with pytest.raises(CheckpointError, match="no weights"):
        formats.load(Source(str(tmp_path / "x.h5")))


def test_truncation_is_a_checkpoint_error(tmp_path):
    write_as(FORMAT, tmp_path, arrays_of(CONFIG, "CLIPModel"), CONFIG, "CLIPModel")
    path = tmp_path / "model.weights.h5"
    content = path.read_bytes()
    for size in [0, 8, 2048, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"model\.weights\.h5"):
            formats.load(Source(str(tmp_path)))
