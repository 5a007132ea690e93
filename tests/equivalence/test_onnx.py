"""The ONNX engine against the first framework: every stage, and a graph that ONNX's own checker accepts."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import onnx
import pytest
from cases import CONFIGS, TEXT, VISION, image_inputs, random_arrays, relative, text_inputs, write_checkpoint
from conftest import BACKENDS

from clipmb import CLIPConfig, backends
from clipmb.onnx.engine import ONNXModel
from clipmb.onnx.graph import ACTIVATIONS, TOWERS, clip
from clipmb.verification import BOUNDS

pytestmark = [pytest.mark.backend("onnx"), pytest.mark.several(engines=True)]
CASES = {
    **CONFIGS,
    "a rest of a patch": CLIPConfig(TEXT, {**VISION, "image_size": 22}, projection_dim=24),
    "no blocks": CLIPConfig({**TEXT, "num_hidden_layers": 0}, {**VISION, "num_hidden_layers": 0}, projection_dim=24),
}
NO_FLOAT64 = ("gelu", "gelu_10", "gelu_python", "laplace", "mish")  # onnxruntime has no such Erf or Softplus


@functools.cache
def engine(folder, backend, dtype="float32"):
    return backends.engine(backend).load(folder, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random checkpoint of a config."""
    return functools.cache(lambda case: write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CASES[case]))


def assert_stages_agree(found, expected, dtype):
    pooled, other = BOUNDS[dtype]
    assert list(found) == list(expected)
    far = [
        f"{stage}: {relative(found[stage], values):.1e}"
        for stage, values in expected.items()
        if found[stage].dtype != values.dtype
        or not relative(found[stage], values) <= (pooled if stage.endswith(("pooled", "projected")) else other)
    ]
    assert not far


def inputs(config, dtype="float32", batch=5):
    texts = text_inputs(config, batch)
    pixels = image_inputs(config)["pixel_values"]
    return texts["input_ids"], texts["attention_mask"], pixels.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_every_stage(folder, case, dtype):
    if case == "stress" and dtype == "float64":
        with pytest.raises(ValueError, match=r"every operator of the graph in float64.*Erf"):
            engine(folder(case), "onnx", dtype)
        return
    ids, mask, pixels = inputs(CASES[case], dtype)
    for given in (mask, None):
        found, expected = (
            engine(folder(case), name, dtype).stages(ids, given, pixels) for name in ("onnx", BACKENDS[0])
        )
        assert_stages_agree(found, expected, dtype)


@pytest.mark.parametrize("case", ["plain", "legacy eos"])
def test_every_number_of_rows_and_tokens(folder, case):
    ours, theirs = (engine(folder(case), name) for name in ("onnx", BACKENDS[0]))
    for batch, seq in ((1, 1), (1, 13), (3, 7), (17, 2)):
        texts = text_inputs(CASES[case], batch, max(seq, 8))
        ids, mask = texts["input_ids"][:, :seq].astype(np.int32), texts["attention_mask"][:, :seq]
        assert relative(ours.text_features(ids, mask), theirs.text_features(ids, mask)) <= BOUNDS["float32"][0]
        pixels = np.random.default_rng(batch).normal(size=(batch, 3, 20, 20)).astype(np.float32)
        assert relative(ours.image_features(pixels), theirs.image_features(pixels)) <= BOUNDS["float32"][0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(folder, activation):
    """Against the true values: in float32 two frameworks are up to twice as far from each other."""
    changed = {"text_config": {"hidden_act": activation}, "vision_config": {"hidden_act": activation}}
    ids, mask, pixels = inputs(CASES["plain"], "float64")
    true = backends.engine(BACKENDS[0]).load(folder("plain"), dtype="float64", **changed).stages(ids, mask, pixels)
    for dtype in ("float32", "float64")[: 1 if activation in NO_FLOAT64 else 2]:
        found = backends.engine("onnx").load(folder("plain"), dtype=dtype, **changed)
        stages = found.stages(ids, mask, pixels.astype(dtype))
        assert_stages_agree(stages, {stage: values.astype(dtype) for stage, values in true.items()}, dtype)


def test_every_activation_of_the_configs_is_there():
    from clipmb.common.config import ACTIVATIONS as NAMES

    assert set(ACTIVATIONS) == set(NAMES)


def test_float16_is_as_near_as_that_of_the_framework(folder):
    ids, _, pixels = inputs(CASES["plain"])
    true = engine(folder("plain"), BACKENDS[0]).stages(ids, None, pixels)
    found, expected = (
        engine(folder("plain"), name, "float16").stages(ids, None, pixels) for name in ("onnx", BACKENDS[0])
    )
    for stage, values in true.items():
        assert relative(found[stage], values) <= 2 * relative(expected[stage], values) + 2**-10, stage


def test_int8_keeps_directions(folder):
    ids, mask, pixels = inputs(CASES["plain"])
    exact, quantised = engine(folder("plain"), "onnx"), engine(folder("plain"), "onnx", "int8")
    for found, expected in (
        (quantised.image_features(pixels), exact.image_features(pixels)),
        (quantised.text_features(ids, mask), exact.text_features(ids, mask)),
    ):
        cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
        assert cosines.min() > 0.99
        assert np.abs(found - expected).max() > 0
    graph = clip(CASES["plain"], exact.model.arrays, "image", quantised=True)
    kinds = {array.dtype.name for name, array in graph.tensors.items() if name.endswith("fc1.weight.int8")}
    assert kinds == {"int8"}
    kept = clip(CASES["plain"], exact.model.arrays, "image", quantised=True, keep=list(exact.model.arrays))
    assert not [name for name in kept.tensors if name.endswith(".int8")]


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    "options", [{}, {"quantised": True}, {"dtype": "float16"}, {"normalized": True}, {"hidden_states": True}], ids=str
)
def test_the_graph_is_valid(tower, options):
    config = CASES["stress"]
    graph = clip(config, random_arrays(config, "CLIPModel"), tower, **options)
    onnx.checker.check_model(graph.model(embedded=True), full_check=True)
    bare = graph.model(embedded=False)
    assert bare.ByteSize() < graph.model(embedded=True).ByteSize() / 2


def test_embeddings_of_length_1(folder):
    arrays = engine(folder("plain"), "onnx").model.arrays
    ids, mask, pixels = inputs(CASES["plain"])
    config = CASES["plain"]
    for tower, given in (("image", {"pixel_values": pixels}), ("text", {"input_ids": ids, "attention_mask": mask})):
        model = ONNXModel(config, arrays)
        plain = model.run(tower, given)[f"{tower}_embeds"]
        session = model._started(clip(config, arrays, tower, normalized=True))
        found = session.run(None, given)[0]
        np.testing.assert_allclose(found, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=2e-6)


def test_bad_requests(folder):
    load = backends.engine("onnx").load
    for options, words in (
        ({"dtype": "bfloat16"}, "dtype of onnxruntime must be one of"),
        ({"dtype": "int4"}, "dtype of ONNXModel must be one of"),
        ({"device": "abacus"}, "device of onnxruntime must be one of"),
        ({"device": "cuda"}, "onnxruntime must have CUDAExecutionProvider"),
    ):
        with pytest.raises(ValueError, match=words):
            load(folder("plain"), **options)
    ids, mask, _ = inputs(CASES["plain"])
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 99\)"):
        engine(folder("plain"), "onnx").text_features(np.full_like(ids, 99), mask)
    with pytest.raises(ValueError, match="tower must be one of"):
        clip(CASES["plain"], {}, "sound")


def test_pixels_of_every_dtype(folder):
    model = engine(folder("plain"), "onnx")
    pixels = np.arange(2 * 3 * 20 * 20).reshape(2, 3, 20, 20) % 256
    expected = model.image_features(pixels.astype(np.float32))
    for dtype in ("uint8", "int64", "float16", "float64", ">f4", ml_dtypes.bfloat16):
        np.testing.assert_array_equal(model.image_features(pixels.astype(dtype)), expected)
    for dtype in ("complex64", "str", "object"):
        with pytest.raises(TypeError, match="pixel_values must be real numbers"):
            model.image_features(pixels.astype(dtype))


def test_weights_come_back(folder):
    found, expected = (engine(folder("plain"), name).weights() for name in ("onnx", BACKENDS[0]))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("kind", ["normal", "equal", "alternating", "one large", "zero"])
def test_no_two_products_of_int8_saturate(folder, kind):
    """Without VNNI, onnxruntime adds two of them in 16 bits: 255 * 128 fits."""
    arrays = engine(folder("plain"), "onnx").model.arrays
    name = next(name for name in arrays if name.startswith("text_model") and name.endswith("fc1.weight"))
    rng = np.random.default_rng(0)
    weight = rng.normal(size=arrays[name].shape).astype(np.float32)
    if kind == "equal":
        weight[:] = -0.3
    if kind == "alternating":
        weight[:] = 0.3 * (-1) ** np.arange(weight.shape[1])
    if kind == "one large":
        weight[:, 5] = 60
    if kind == "zero":
        weight[:3] = 0
    graph = clip(CASES["plain"], {**arrays, name: weight}, "text", quantised=True)
    whole, scale = graph.tensors[f"{name}.int8"], graph.tensors[f"{name}.scale"]
    levels = whole.astype(int)
    assert whole.dtype == np.int8
    for sign in (1, -1):
        part = np.maximum(sign * levels, 0)
        assert (part[:-1] + part[1:]).max() * 255 < 2**15
    assert (np.abs(levels * scale - weight.T) <= scale * 0.5001).all()
    assert (np.abs(levels).max(0)[(weight != 0).any(1)] >= 63).all()
    if kind in ("alternating", "one large"):
        assert np.abs(levels).max() >= 120
