"""`clipmb.export`: files for other runtimes, and that nothing stays of those that compute something else."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import CONFIGS, STRESS, TEXT, VISION, image_inputs, random_arrays, relative, text_inputs, write_checkpoint
from conftest import ENGINES
from PIL import Image
from processes import clipmb as command
from processes import excerpt, python

import clipmb
from clipmb import (
    CheckpointError,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPPipeline,
    CLIPTokenizerFast,
    MissingBackendError,
    backends,
    exporting,
)
from clipmb.common.checkpoint import write_safetensors
from clipmb.common.hub import Source
from clipmb.common.image.resampling import rule_name
from clipmb.common.processor import image_processor_of
from clipmb.common.saving import Transaction
from clipmb.layouts import LAYOUTS
from clipmb.onnx import export as writer
from clipmb.onnx import preprocessing
from clipmb.onnx.engine import ONNXModel
from clipmb.onnx.graph import clip
from clipmb.onnx.sensitivity import ranked
from clipmb.verification import demo_photos

pytestmark = pytest.mark.backend("onnx")
TARGETS = [pytest.param(to, marks=pytest.mark.backend(row.backend)) for to, row in exporting.TARGETS.items()]
CASES = {  # each pooling rule and each activation of published models
    "plain": CONFIGS["plain"],
    "legacy eos": CLIPConfig(
        {**TEXT, **STRESS, "eos_token_id": 2}, {**VISION, **STRESS}, projection_dim=24, num_labels=7
    ),
}
TAKES = {"text": ("input_ids", "attention_mask"), "image": ("pixel_values",)}
FC1 = "text_model.encoder.layers.0.mlp.fc1.weight"
TAKES["both"] = (*TAKES["text"], *TAKES["image"])
GIVES = {"text": ("text_embeds",), "image": ("image_embeds",)}
GIVES["both"] = ("logits_per_image", "logits_per_text", *GIVES["text"], *GIVES["image"])
FILES = {"both": "model", "text": "text_model", "image": "vision_model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint for each config, written once."""
    return {name: write_checkpoint(tmp_path_factory.mktemp("checkpoint"), config) for name, config in CASES.items()}


def run(path, inputs):
    """Runs a file with those of the inputs that it takes; returns name to array, in order."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    return dict(zip(names, values, strict=True))


def run_torch(path, tower, inputs):
    import torch

    outputs = torch.export.load(path).module()(**{name: torch.from_numpy(inputs[name]) for name in TAKES[tower]})
    return {name: value.detach().numpy() for name, value in outputs.items()}


def run_tensorflow(path, tower, inputs):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    function = loaded.signatures["serving_default"]
    return {
        name: value.numpy() for name, value in function(**{n: tf.constant(inputs[n]) for n in TAKES[tower]}).items()
    }


def run_openvino(path, tower, inputs):
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = compiled({name: inputs[name] for name in TAKES[tower]})
    return {name: values[name] for name in GIVES[tower]}


def run_litert(path, tower, inputs):
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path)).get_signature_runner()(**{name: inputs[name] for name in TAKES[tower]})


def run_jax(path, tower, inputs):
    import jax

    program = jax.export.deserialize(bytearray(path.read_bytes()))
    with jax.enable_x64(True):
        return {k: np.asarray(v) for k, v in program.call(**{name: inputs[name] for name in TAKES[tower]}).items()}


RUNS = {
    "onnx": lambda path, tower, inputs: run(path, inputs),
    "openvino": run_openvino,
    "torch-export": run_torch,
    "saved-model": run_tensorflow,
    "litert": run_litert,
    "stablehlo": run_jax,
}


def inputs_of(config, batch=5):
    return text_inputs(config, batch) | image_inputs(config, batch)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow), "legacy eos", "shipped"])
def test_every_tower_computes_what_the_checkpoint_does(folder, tmp_path, case, to):
    model = folder.get(case, clipmb.small_model())
    config = CLIPConfig.from_pretrained(model)
    record = clipmb.export(model, tmp_path / "out", to)
    assert json.loads((tmp_path / "out/export.json").read_text()) == record
    found = {path for path in (tmp_path / "out" / to).rglob("*") if path.is_file()}
    assert {tmp_path / "out" / name for name in record["files"]} == found
    for path in found:
        entry = record["files"][path.relative_to(tmp_path / "out").as_posix()]
        assert entry == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    engine = backends.engine(ENGINES[0]).load(model)
    assert list(record["towers"]) == list(FILES)
    given = inputs_of(config)
    given["input_ids"][given["input_ids"] == 98] = max(98, config.text_config.eos_token_id)
    for batch, seq in ((1, 11), (5, 7)):
        inputs = {name: array[:, :seq] if "pixel" not in name else array for name, array in given.items()}
        inputs = {name: array[:batch] for name, array in inputs.items()}
        expected = {
            "text_embeds": engine.text_features(inputs["input_ids"], inputs["attention_mask"]),
            "image_embeds": engine.image_features(inputs["pixel_values"]),
        }
        unit = {key: value / np.linalg.norm(value, axis=1, keepdims=True) for key, value in expected.items()}
        logits = unit["image_embeds"] @ unit["text_embeds"].T * engine.logit_scale
        whole = {"logits_per_image": logits, "logits_per_text": logits.T, **unit}
        for tower, name in FILES.items():
            entry = record["towers"][tower]
            assert entry["load"].partition(".")[0] == f"{to}/{name}"
            wanted = whole if tower == "both" else {f"{tower}_embeds": expected[f"{tower}_embeds"]}
            assert entry["outputs"].keys() == wanted.keys()
            assert all(output["difference"] <= 1e-5 for output in entry["outputs"].values())
            made = RUNS[to](tmp_path / "out" / entry["load"], tower, inputs)
            assert made.keys() == wanted.keys()
            for key, value in wanted.items():
                assert relative(made[key], value) <= 1e-5, (tower, key, batch)


@pytest.mark.parametrize("case", CASES)
def test_onnx_files_pass_the_checker(folder, tmp_path, case):
    clipmb.export(folder[case], tmp_path / "out")
    for name in FILES.values():
        model = onnx.load(tmp_path / f"out/onnx/{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
    outputs = [output.name for output in onnx.load(tmp_path / "out/onnx/model.onnx").graph.output]
    assert outputs == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]


@pytest.mark.parametrize(
    ("to", "dtype"),
    [
        pytest.param(to, dtype, marks=pytest.mark.backend(row.backend))
        for to, row in exporting.TARGETS.items()
        for dtype in row.dtypes
        if "float16" in dtype and to != "onnx"
    ],
)
def test_half_precision_of_the_other_targets(tmp_path, to, dtype):
    record = clipmb.export(clipmb.small_model(), tmp_path / "out", to, tower="image", dtype=dtype, normalize=True)
    end = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    assert record["towers"]["image"]["load"].startswith(f"{to}/vision_model_{end}")
    assert sum(entry["bytes"] for entry in record["files"].values()) < 2.2e6  # 860,000 parameters
    [output] = record["towers"]["image"]["outputs"].values()
    assert output["difference"] > 1e-6
    assert output["cosine"] > 0.999
    pictures = clipmb.held_out_pictures()[0][:3]
    pixels = CLIPImageProcessor.from_pretrained(clipmb.small_model())(pictures, return_tensors="np")["pixel_values"]
    made = RUNS[to](tmp_path / "out" / record["towers"]["image"]["load"], "image", {"pixel_values": pixels})
    assert made["image_embeds"].dtype == np.float32
    assert np.linalg.norm(made["image_embeds"], axis=1) == pytest.approx(1, abs=1e-2)


def test_the_folder_has_what_programs_load_beside(tmp_path):
    model = clipmb.small_model()
    clipmb.export(model, tmp_path / "out", tower="both")
    assert CLIPTokenizerFast.from_pretrained(tmp_path / "out")("a cat") == CLIPTokenizerFast.from_pretrained(model)(
        "a cat"
    )
    mine = CLIPImageProcessor.from_pretrained(tmp_path / "out").to_dict()
    assert mine == CLIPImageProcessor.from_pretrained(model).to_dict()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("clip", ["CLIPModel"])
    clipmb.export(model, tmp_path / "image", tower="image")
    assert not (tmp_path / "image/tokenizer.json").exists()
    clipmb.export(model, tmp_path / "text", tower="text")
    assert not (tmp_path / "text/preprocessor_config.json").exists()


@pytest.mark.parametrize(("dtype", "suffix", "least"), [("float16", "_fp16", 0.99999), ("int8", "_int8", 0.99)])
def test_smaller_files(tmp_path, dtype, suffix, least):
    model = clipmb.small_model()
    record = clipmb.export(model, tmp_path / "out", dtype=dtype, normalize=True)
    sizes = {name: entry["bytes"] for name, entry in record["files"].items()}
    assert sorted(sizes) == [f"onnx/{name}{suffix}.onnx" for name in sorted(FILES.values())]
    cosines = [found["cosine"] for entry in record["towers"].values() for found in entry["outputs"].values()]
    assert min(cosines) >= least
    pictures, _labels = clipmb.held_out_pictures()
    pixels = CLIPImageProcessor.from_pretrained(model)(pictures[:16], return_tensors="np")["pixel_values"]
    found = run(tmp_path / f"out/onnx/vision_model{suffix}.onnx", {"pixel_values": pixels})["image_embeds"]
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    pipeline = CLIPPipeline.from_pretrained(model, backend="onnx")
    assert (found * pipeline.encode_image(pictures[:16])).sum(1).min() >= least


@pytest.mark.parametrize("tower", FILES)
def test_which_weights_are_quantised(folder, tmp_path, tower):
    clipmb.export(folder["plain"], tmp_path / "out", tower=tower, dtype="int8", min_cosine=0)
    graph = onnx.load(tmp_path / f"out/onnx/{FILES[tower]}_int8.onnx").graph
    names = {constant.name.removesuffix(".int8") for constant in graph.initializer if constant.name.endswith(".int8")}
    assert names == exporting.quantised(CASES["plain"], tower)
    assert len(names) == 6 * {"both": 5, "text": 3, "image": 2}[tower]


def test_weights_that_are_kept(folder, tmp_path):
    names = [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)]
    all_of_it = clipmb.export(folder["plain"], tmp_path / "a", tower="text", dtype="int8", min_cosine=0)
    record = clipmb.export(folder["plain"], tmp_path / "b", tower="text", dtype="int8", keep=names, min_cosine=0)
    assert record["keep"] == names
    graph = onnx.load(tmp_path / "b/onnx/text_model_int8.onnx").graph
    constants = {constant.name for constant in graph.initializer}
    assert set(names) <= constants
    assert {f"{name}.int8" for name in names}.isdisjoint(constants)
    assert (
        record["files"]["onnx/text_model_int8.onnx"]["bytes"] > all_of_it["files"]["onnx/text_model_int8.onnx"]["bytes"]
    )


@pytest.mark.backend("tf")
def test_operators_that_litert_lacks(tmp_path):
    config = CLIPConfig({**TEXT, "hidden_act": "laplace"}, VISION, projection_dim=24)
    model = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ValueError, match=r"LiteRT must have every operator .*Received: Erf\. Export to another"):
        clipmb.export(model, tmp_path / "out", "litert", tower="text")
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("to", TARGETS)
def test_int32_ids_of_one_length(folder, tmp_path, to):
    record = clipmb.export(folder["plain"], tmp_path / "out", to, tower="text", ids="int32", length=7)
    path = tmp_path / "out" / record["towers"]["text"]["load"]
    inputs = {name: array[:, :7].astype(np.int32) for name, array in text_inputs(CASES["plain"], 3, 11).items()}
    engine = backends.engine("onnx").load(folder["plain"])
    expected = engine.text_features(inputs["input_ids"], inputs["attention_mask"])
    assert relative(RUNS[to](path, "text", inputs)["text_embeds"], expected) <= 1e-5
    if to == "onnx":  # the other runtimes do not say
        takes = [(entry.name, entry.type, entry.shape[1]) for entry in ort.InferenceSession(path).get_inputs()]
        assert takes == [("input_ids", "tensor(int32)", 7), ("attention_mask", "tensor(int32)", 7)]


def test_large_weights_lie_in_a_second_file(tmp_path):
    config = CASES["plain"]
    graph = clip(config, random_arrays(config, "CLIPModel"), "both")
    inputs = inputs_of(config)
    one, two = tmp_path / "one/model.onnx", tmp_path / "two/model.onnx"
    for path in (one, two):
        path.parent.mkdir()
    assert graph.save(one) == [one]
    assert graph.save(two, largest=1000) == [two, two.with_name("model.onnx_data")]
    assert two.stat().st_size < one.stat().st_size / 2
    onnx.checker.check_model(str(two), full_check=True)
    for name, array in run(one, inputs).items():
        np.testing.assert_array_equal(run(two, inputs)[name], array)


def test_the_most_sensitive_products_stay_in_float(folder, tmp_path):
    """Those that lose the most when they alone have 8 bits, and no more than the cosine needs."""
    given = {"dtype": "int8", "tower": "text"}
    names = sorted(exporting.quantised(CASES["plain"], "text"))

    def cosine(name, **more):
        record = clipmb.export(folder["plain"], tmp_path / name, **{**given, "min_cosine": 0, **more})
        return record["towers"]["text"]["outputs"]["text_embeds"]["cosine"], record["keep"]

    plain, kept = cosine("plain")
    assert kept == []
    model = backends.engine("onnx").load(folder["plain"]).model
    inputs = {name: array for name, array in text_inputs(CASES["plain"], 6).items() if name in TAKES["text"]}
    right = model.run("text", inputs)["text_embeds"]
    order = ranked(model, "text", names, {**inputs, "text": right})
    assert sorted(name for _, name in order) == names
    assert [loss for loss, _ in order] == sorted((loss for loss, _ in order), reverse=True)
    assert order[0][0] > 2 * order[-1][0] > 0
    alone = ONNXModel(model.config, model.arrays, quantised=True, keep=set(names) - {order[0][1]})
    found = alone.run("text", inputs)["text_embeds"]
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(right, axis=1)
    assert order[0][0] == pytest.approx(1 - ((found * right).sum(1) / lengths).min(), abs=1e-6)

    reached, two = cosine("two", keep=2)
    assert len(two) == 2
    assert reached > plain
    bound = (plain + reached) / 2
    better, kept = cosine("auto", keep="auto", min_cosine=bound)
    assert 1 <= len(kept) <= 2
    assert set(kept) <= set(two)
    assert better >= bound > plain
    assert cosine("again", keep="auto", min_cosine=bound) == (better, kept)
    assert cosine("none", keep="auto", min_cosine=plain - 1e-6) == (plain, [])
    assert cosine("zero", keep=0) == (plain, [])
    every = cosine("all", keep="auto", min_cosine=1 - 1e-6)[1]
    assert len(every) > len(kept)


def test_accuracy_of_int8(tmp_path):
    model = clipmb.small_model()
    record = clipmb.export(model, tmp_path / "out", dtype="int8", keep=1)
    scores = record["zero_shot"]
    assert (scores["data"], scores["int8"]["images"], scores["int8"]["classes"]) == ("held_out_pictures()", 360, 360)
    for i, (picture, label) in enumerate(zip(*clipmb.held_out_pictures(), strict=True)):
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "data" / label / f"{i}.png")
    assert scores["float32"] == clipmb.evaluate(model, tmp_path / "data", "onnx")["zero_shot"]
    assert scores["int8"] != scores["float32"]
    assert abs(scores["int8"]["top5"] - scores["float32"]["top5"]) < 0.03
    done = command(
        "export", model, "--out", tmp_path / "b", "--dtype", "int8", "--data", tmp_path / "data", "--keep", "1"
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "b/export.json").read_text())["zero_shot"]
    assert again["float32"] == scores["float32"]
    assert f"{again['int8']['top1']:.2%}" in done.stdout  # which depends a little on the pictures of a batch
    assert f"Left in float32: {', '.join(record['keep'])}" in done.stdout
    assert clipmb.export(model, tmp_path / "c", dtype="int8", tower="image")["zero_shot"] is None
    (tmp_path / "captions").mkdir()
    picture.save(tmp_path / "captions/a.png")
    (tmp_path / "captions/a.txt").write_text("an apple")
    with pytest.raises(ValueError, match="data= must have labels"):
        clipmb.export(model, tmp_path / "d", dtype="int8", data=tmp_path / "captions")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("tower", "dtype"), [("all", "float32"), ("image", "float16"), ("image", "int8")])
def test_preprocessing_in_the_file(tmp_path, tower, dtype):
    """Pictures of any size give what the image processor and the model give."""
    model = clipmb.small_model()
    record = clipmb.export(model, tmp_path / "out", tower=tower, dtype=dtype, with_preprocessing=True)
    assert record["preprocessing"] == rule_name("installed")
    engine = backends.engine("onnx").load(model)
    processor = CLIPImageProcessor.from_pretrained(model)
    for part in ("image", "both") if tower == "all" else (tower,):
        path = tmp_path / "out" / record["towers"][part]["load"]
        onnx.checker.check_model(str(path), full_check=True)
        assert [entry.name for entry in ort.InferenceSession(path).get_inputs() if entry.shape[-1] == 3] == ["images"]
        for size in ((70, 50), (30, 200), (200, 30), (500, 333)):
            images = np.stack([np.asarray(Image.open(photo).convert("RGB").resize(size)) for photo in demo_photos()])
            pixels = processor(images, input_data_format="channels_last", return_tensors="np")["pixel_values"]
            wanted = engine.image_features(pixels)
            texts = {"input_ids": np.full((1, 3), 5), "attention_mask": np.ones((1, 3), np.int64)}
            found = run(path, {"images": images, **texts})["image_embeds"]
            unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (found, wanted)]
            if dtype == "float32":
                assert relative(*unit) <= 1e-5
            assert (unit[0] * unit[1]).sum(1).min() > 0.99


def test_preprocessing_is_an_option_of_onnx_files_with_pictures(folder, tmp_path):
    for given in ({"to": "stablehlo"}, {"tower": "text"}, {"layout": "immich"}):
        with pytest.raises(ValueError, match="with_preprocessing= is of ONNX files that take pictures"):
            clipmb.export(folder["plain"], tmp_path / "out", with_preprocessing=True, **given)
    with pytest.raises(ValueError, match="with_preprocessing must be True or False"):
        clipmb.export(folder["plain"], tmp_path / "out", with_preprocessing="yes")
    other = tmp_path / "other"
    shutil.copytree(folder["plain"], other)
    CLIPImageProcessor(size=20, crop_size=20, resample=0).save_pretrained(other)
    with pytest.raises(ValueError, match=r"has the filters 2 \(bilinear\) and 3"):
        clipmb.export(other, tmp_path / "out", with_preprocessing=True)
    CLIPImageProcessor(size=20, crop_size=16).save_pretrained(other)
    with pytest.raises(ValueError, match="3 channels of 20 x 20 pixels"):
        clipmb.export(other, tmp_path / "out", with_preprocessing=True)
    assert left(tmp_path) == ["other"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logits_near_to_zero(folder, tmp_path, dtype):
    """As of a photograph to which no text is similar: what is left of them is rounding."""
    config, arrays = CASES["plain"], random_arrays(CASES["plain"], "CLIPModel")
    engine = backends.engine("onnx").load(folder["plain"])
    processor = image_processor_of(Source.of(folder["plain"], {}), config.vision_config)
    pixels = processor(demo_photos(), return_tensors="np")["pixel_values"]
    direction = engine.image_features(pixels)[0].astype(np.float64)
    direction /= np.linalg.norm(direction)
    weight = arrays["text_projection.weight"]
    arrays["text_projection.weight"] = (weight - np.outer(direction, direction @ weight)).astype(np.float32)
    with Transaction(tmp_path / "model") as save:
        save.write("config.json", config.to_json_string())
        write_safetensors(save, arrays)
    record = clipmb.export(tmp_path / "model", tmp_path / "out", tower="both", dtype=dtype)
    assert record["towers"]["both"]["outputs"]["logits_per_image"]["cosine"] > 0.999


class TestNothingStays:
    """Of an export that fails: not the folder, and nothing beside it."""

    @pytest.mark.parametrize("tower", FILES)
    def test_of_a_file_that_computes_something_else(self, folder, tmp_path, monkeypatch, tower):
        def spoilt(model, part, path, **form):
            name = "text_projection.weight" if tower == "text" else "visual_projection.weight"
            array = model.arrays[name]
            model.arrays[name] = array + np.float32(1e-4) * np.abs(array).max() * (np.arange(array.size) == 3).reshape(
                array.shape
            )
            try:
                return written(model, part, path, **form)
            finally:
                model.arrays[name] = array

        written = writer.write
        monkeypatch.setattr(writer, "write", spoilt)
        with pytest.raises(CheckpointError, match=r"differ by at most 1e-05.*Received: a difference of .*Nothing was"):
            clipmb.export(folder["plain"], tmp_path / "out", tower=tower)
        assert left(tmp_path) == []

    def test_of_a_file_that_preprocesses_otherwise(self, tmp_path, monkeypatch):
        """By a few levels of a few pixels, which the embeddings hardly show."""

        def weight(graph, distance):
            near = graph.op("Less", distance, graph.constant(1, np.float64))
            factor = graph.op("Where", near, graph.constant(1, np.float64), graph.constant(1.0002, np.float64))
            return graph.op("Mul", preprocessing._bicubic(graph, distance), factor)

        monkeypatch.setitem(preprocessing.FILTERS, 3, preprocessing.Filter(2.0, weight))
        with pytest.raises(
            CheckpointError, match=r"to the bits of the image processor. Received: 0\.\d+% of the values"
        ):
            clipmb.export(clipmb.small_model(), tmp_path / "out", tower="image", with_preprocessing=True)
        assert left(tmp_path) == []

    def test_of_a_file_without_an_output(self, folder, tmp_path, monkeypatch):
        def cut(*args, **form):
            [path] = written(*args, **form)
            model = onnx.load(path)
            del model.graph.output[:]
            model.graph.output.append(onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))
            model.graph.node.append(onnx.helper.make_node("Identity", ["image_embeds"], ["other"]))
            onnx.save(model, path)
            return [path]

        written = writer.write
        monkeypatch.setattr(writer, "write", cut)
        right = r"must have an output image_embeds of shape \(1, 24\). Received: none"
        with pytest.raises(CheckpointError, match=right):
            clipmb.export(folder["plain"], tmp_path / "out", tower="image")
        assert left(tmp_path) == []

    def test_of_one_that_cannot_be_run(self, folder, tmp_path, monkeypatch):
        def cut(*args, **form):
            paths = written(*args, **form)
            paths[0].write_bytes(paths[0].read_bytes()[:1000])
            return paths

        written = writer.write
        monkeypatch.setattr(writer, "write", cut)
        with pytest.raises(CheckpointError, match=r"model.onnx cannot be run, so nothing was written: .*Protobuf"):
            clipmb.export(folder["plain"], tmp_path / "out")
        assert left(tmp_path) == []

    @pytest.mark.parametrize("dtype", ["int8", "float16"])
    def test_below_the_least_cosine(self, folder, tmp_path, dtype):
        with pytest.raises(
            CheckpointError, match=r"have a cosine of at least 1 .*Pass another dtype, keep= or a lower"
        ):
            clipmb.export(folder["plain"], tmp_path / "new/out", dtype=dtype, min_cosine=1)
        assert left(tmp_path) == []

    def test_of_results_that_are_not_finite(self, tmp_path):
        config = CASES["plain"]
        arrays = random_arrays(config, "CLIPModel")
        arrays["visual_projection.weight"] *= 1e5  # beyond float16
        with Transaction(tmp_path / "model") as save:
            save.write("config.json", config.to_json_string())
            write_safetensors(save, arrays)
        with pytest.raises(CheckpointError, match=r"image_embeds .*cosine of -1.000000"):
            clipmb.export(tmp_path / "model", tmp_path / "out", tower="image", dtype="float16", min_cosine=0)
        assert left(tmp_path) == ["model"]

    def test_where_no_room_is_left(self, folder, tmp_path, monkeypatch):
        def full(*args, **form):
            raise OSError(28, "No space left on device", "onnx/model.onnx")

        monkeypatch.setattr(writer, "write", full)
        with pytest.raises(OSError, match=r"could not be written: No space left") as error:
            clipmb.export(folder["plain"], tmp_path / "out")
        assert error.value.filename == str(tmp_path / "out")
        assert left(tmp_path) == []


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A checkpoint for each config with CLIP's vocabulary, whose tokenizer it therefore has."""
    found = {}
    for name, eos in (("plain", 49407), ("legacy eos", 2)):
        config = CASES[name].to_dict()
        config["text_config"] |= {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": eos}
        found[name] = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CLIPConfig.from_dict(config))
    return found


class TestLayouts:
    """What other programs find in the folder that is written for them."""

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_file_computes_what_the_checkpoint_does(self, tokenized, tmp_path, layout, case):
        record = clipmb.export(tokenized[case], tmp_path / "out", layout=layout)
        assert (record["layout"], list(record["towers"])) == (layout, list(LAYOUTS[layout].files))
        pipeline = CLIPPipeline.from_pretrained(tokenized[case])
        texts, pictures = ["a cat", "two dogs and a red car"], clipmb.held_out_pictures()[0][:3]
        tokens = CLIPTokenizerFast()(texts, padding="max_length", max_length=13, return_tensors="np")
        pixels = image_processor_of(Source.of(tokenized[case], {}), pipeline.config.vision_config)(
            pictures, return_tensors="np"
        )
        unit = layout != "triton"
        expected = {
            "text": pipeline.encode_text(texts, normalize=unit),
            "image": pipeline.encode_image(pictures, normalize=unit),
        }
        given = {**tokens, **pixels}
        if layout == "immich":
            given = {"text": tokens["input_ids"].astype(np.int32), "image": pixels["pixel_values"]}
        for tower in ("text", "image"):
            path = tmp_path / "out" / record["towers"][tower]["load"]
            assert path.name == "model.onnx"
            takes = [entry.name for entry in ort.InferenceSession(path).get_inputs()]
            assert takes == ([tower] if layout == "immich" else list(TAKES[tower]))
            [(name, found)] = run(path, given).items()
            assert name == ("embedding" if layout == "immich" else f"{tower}_embeds")
            assert relative(found, expected[tower]) <= 1e-5

    def test_of_immich(self, tokenized, tmp_path):
        clipmb.export(tokenized["plain"], tmp_path / "out", layout="immich", length=11)
        found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
        assert {"textual/tokenizer.json", "textual/tokenizer_config.json"} <= found
        assert sorted(path for path in found if path == "textual/model.onnx" or not path.startswith("textual/")) == [
            "config.json", "export.json", "textual/model.onnx", "visual/model.onnx", "visual/preprocess_cfg.json",
        ]  # fmt: skip
        text_cfg = json.loads((tmp_path / "out/config.json").read_text())["text_cfg"]
        assert text_cfg["context_length"] == 11
        [entry] = ort.InferenceSession(tmp_path / "out/textual/model.onnx").get_inputs()
        assert (entry.type, entry.shape) == ("tensor(int32)", ["batch", 11])
        settings = json.loads((tmp_path / "out/visual/preprocess_cfg.json").read_text())
        assert settings == {
            "size": 20, "mode": "RGB", "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711], "interpolation": "bicubic", "resize_mode": "shortest",
        }  # fmt: skip

    def test_of_triton(self, tokenized, tmp_path):
        clipmb.export(tokenized["plain"], tmp_path / "out", layout="triton", ids="int32", length=9, dtype="float16")
        assert (tmp_path / "out/clip_text/config.pbtxt").read_text().splitlines() == [
            'backend: "onnxruntime"',
            "max_batch_size: 64",
            'input { name: "input_ids" data_type: TYPE_INT32 dims: [ 9 ] }',
            'input { name: "attention_mask" data_type: TYPE_INT32 dims: [ 9 ] }',
            'output { name: "text_embeds" data_type: TYPE_FP32 dims: [ 24 ] }',
            "dynamic_batching { }",
        ]
        whole = (tmp_path / "out/clip/config.pbtxt").read_text().splitlines()
        assert (whole[1], "dynamic_batching { }" in whole) == ("max_batch_size: 0", False)
        assert 'output { name: "logits_per_text" data_type: TYPE_FP32 dims: [ -1, -1 ] }' in whole
        assert 'input { name: "pixel_values" data_type: TYPE_FP32 dims: [ -1, 3, 20, 20 ] }' in whole
        assert all((tmp_path / "out" / name / "1/model.onnx").is_file() for name in ("clip", "clip_text", "clip_image"))
        assert (tmp_path / "out/tokenizer.json").is_file()

    def test_of_one_tower(self, tokenized, tmp_path):
        for layout in LAYOUTS:
            clipmb.export(tokenized["plain"], tmp_path / layout, layout=layout, tower="image")
            assert not [*(tmp_path / layout).rglob("tokenizer.json")]
            clipmb.export(tokenized["plain"], tmp_path / f"{layout} text", layout=layout, tower="text")
            assert not [*(tmp_path / f"{layout} text").rglob("preprocess*.json")]

    @pytest.mark.parametrize(
        ("change", "received"),
        [({"resample": 2}, "resample"), ({"do_normalize": False}, "do_normalize"), ({"size": 21}, "size")],
    )
    def test_pictures_that_immich_would_preprocess_in_another_way(self, tokenized, tmp_path, change, received):
        model = tmp_path / "model"
        shutil.copytree(tokenized["plain"], model)
        CLIPImageProcessor(**{"size": 20, "crop_size": 20, **change}).save_pretrained(model)
        with pytest.raises(ValueError, match=rf"immich resizes the short side to 20 .*Received: .*{received}"):
            clipmb.export(model, tmp_path / "out", layout="immich")
        clipmb.export(model, tmp_path / "texts", layout="immich", tower="text")
        assert left(tmp_path) == ["model", "texts"]

    @pytest.mark.parametrize("layout", ["fastembed", "immich"])
    def test_texts_that_nothing_tokenizes(self, folder, tmp_path, layout):
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            clipmb.export(folder["plain"], tmp_path / "out", layout=layout)
        assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": "tensorrt"}, r"layout must be .*fastembed.*Received: 'tensorrt'"),
        ({"layout": "immich", "to": "saved-model"}, r"layout of immich is of ONNX files. Received: to='saved-model'"),
        ({"layout": "immich", "tower": "both"}, r"tower of immich must be .*Received: 'both'"),
        ({"layout": "fastembed", "tower": "both"}, r"tower of fastembed must be .*Received: 'both'"),
        ({"layout": "immich", "ids": "int64"}, r"ids of immich must be one of 'int32'. Received: 'int64'"),
        ({"layout": "fastembed", "ids": "int32"}, r"ids of fastembed must be one of 'int64'. Received: 'int32'"),
        ({"layout": "fastembed", "length": 7}, r"fastembed passes texts of any length. Received: length=7. Leave it"),
        ({"to": "coreml"}, r"to must be .*onnx.*Received: 'coreml'"),
        ({"tower": "vision"}, r"tower must be .*image.*Received: 'vision'"),
        ({"dtype": "bfloat16"}, r"dtype of onnx must be .*Received: 'bfloat16'"),
        ({"to": "stablehlo", "dtype": "int8"}, r"dtype of stablehlo must be .*Received: 'int8'"),
        ({"to": "openvino", "dtype": "int8"}, r"dtype of openvino must be .*float32.*float16.*Received: 'int8'"),
        ({"to": "litert", "dtype": "bfloat16"}, r"dtype of litert must be .*float32.*float16.*Received: 'bfloat16'"),
        ({"ids": "int16"}, r"ids must be .*Received: 'int16'"),
        ({"length": 0}, r"length must be a whole number.*Received: 0"),
        ({"length": 1000}, r"length must be at most the model's context, 13"),
        ({"tower": "image", "length": 7}, r"ids= and length= are of texts. Received: tower='image'"),
        ({"tower": "image", "ids": "int32"}, r"ids= and length= are of texts"),
        ({"normalize": "no"}, r"normalize must be True or False. Received: 'no'"),
        ({"keep": [FC1]}, r"keep= applies to int8 only. Received: 'float32'"),
        ({"keep": FC1, "dtype": "int8"}, r'keep must be a list of names, "auto" or a number'),
        ({"keep": True, "dtype": "int8"}, r'keep must be a list of names, "auto" or a number. Received: True'),
        ({"keep": -1, "dtype": "int8"}, r"keep must be a whole number.*Received: -1"),
        ({"keep": 13, "dtype": "int8", "tower": "image"}, r"keep must be a whole number from 0 to 12.*Received: 13"),
        ({"keep": "auto"}, r"keep= applies to int8 only. Received: 'float32'"),
        ({"data": "photos"}, r"data= is for int8 of both towers. Received: dtype='float32'"),
        ({"data": "photos", "dtype": "int8", "tower": "text"}, r"data= is for int8 of both towers"),
        ({"keep": ["no.weight"], "dtype": "int8"}, r"keep= must hold names of weights that are quantised.*no.weight"),
        ({"keep": ["text_projection.weight"], "dtype": "int8"}, r"names of weights that are quantised"),
        ({"keep": ["text_model.embeddings.token_embedding.weight"], "dtype": "int8"}, r"weights that are quantised"),
        ({"keep": [FC1], "dtype": "int8", "tower": "image"}, r"names of weights that are quantised"),
        ({"min_cosine": 2, "dtype": "int8"}, r"min_cosine must be a number from 0 to 1.*Received: 2"),
        ({"min_cosine": "high", "dtype": "int8"}, r"min_cosine must be a number from 0 to 1.*Received: 'high'"),
        ({"min_cosine": 0.9}, r"float32 is held to a difference of 1e-05. Received: .*min_cosine=0.9"),
    ],
)
def test_arguments(folder, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        clipmb.export(folder["plain"], tmp_path / "out", **given)
    assert left(tmp_path) == []


def test_folders_and_options(folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="out must be a new or empty folder"):
            clipmb.export(folder["plain"], tmp_path / name)
    with pytest.raises(TypeError, match="export has no such options"):
        clipmb.export(folder["plain"], tmp_path / "out", opset=17)
    with pytest.raises(ValueError, match="other than the working directory"):
        clipmb.export(folder["plain"], "")
    (tmp_path / "empty").mkdir()
    clipmb.export(folder["plain"], tmp_path / "empty", tower="image")
    assert left(tmp_path) == ["empty", "file", "full"]


@pytest.mark.parametrize(
    ("module", "runtime", "blocked"),
    [
        pytest.param(
            "clipmb.onnx.export",
            "onnxruntime",
            ("torch", "tensorflow", "keras", "jax", "flax", "clipmb"),
            marks=pytest.mark.backend("onnx"),
        ),
        pytest.param(
            "clipmb.onnx.openvino",
            "openvino",
            ("torch", "tensorflow", "keras", "jax", "flax", "onnx", "onnxruntime", "clipmb"),
            marks=pytest.mark.backend("onnx"),
        ),
        pytest.param(
            "clipmb.pt.export",
            "torch",
            ("tensorflow", "keras", "jax", "flax", "clipmb"),
            marks=pytest.mark.backend("pt"),
        ),
        pytest.param(
            "clipmb.tf.saved_model", "tensorflow", ("torch", "jax", "flax", "clipmb"), marks=pytest.mark.backend("tf")
        ),
        pytest.param(
            "clipmb.tf.litert",
            "ai_edge_litert",
            ("torch", "tensorflow", "keras", "jax", "flax", "clipmb"),
            marks=pytest.mark.backend("tf"),
        ),
        pytest.param(
            "clipmb.flax.export",
            "jax",
            ("torch", "tensorflow", "keras", "flax", "clipmb"),
            marks=pytest.mark.backend("flax"),
        ),
    ],
)
def test_files_run_where_only_their_runtime_can_be_imported(tmp_path, module, runtime, blocked):
    """A stand-in for the runtime tries to import the others."""
    (tmp_path / f"{runtime}.py").write_text(
        f"import importlib\nfor name in {blocked}:\n    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        continue\n    raise SystemExit(f'{name} was imported')\nraise SystemExit(7)\n"
    )
    script = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['run', 'a', 'b', 'c']\n"
    script += f"runpy.run_path({str(importlib.import_module(module).RUN)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize(
    ("to", "package"),
    [
        pytest.param("openvino", "openvino", marks=pytest.mark.backend("onnx")),
        pytest.param("litert", "ai_edge_litert", marks=pytest.mark.backend("tf")),
    ],
)
def test_a_missing_runtime_is_named_with_the_pip_command(folder, tmp_path, monkeypatch, to, package):
    monkeypatch.delitem(sys.modules, exporting.TARGETS[to].module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingBackendError, match=rf'needs {package}, .*pip install "clipmb\[{to}\]"'):
        clipmb.export(folder["plain"], tmp_path / "out", to)
    assert left(tmp_path) == []


def test_command(folder, tmp_path):
    done = command("export", folder["plain"], "--out", tmp_path / "out", "--tower", "image", "--normalize", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["tower"], record["normalize"], list(record["files"])) == ("image", True, ["onnx/vision_model.onnx"])
    again = command("export", folder["plain"], "--out", tmp_path / "out")
    assert again.returncode == 1
    assert again.stderr.startswith("error: out must be a new or empty folder")
    bad = command("export", folder["plain"], "--out", tmp_path / "b", "--dtype", "int8", "--min-cosine", "1")
    assert bad.returncode == 1
    assert "Nothing was written" in bad.stderr
    assert left(tmp_path) == ["out"]


def test_a_killed_export_leaves_nothing_for_long(folder, tmp_path):
    export = f"import clipmb; clipmb.export({str(folder['plain'])!r}, {str(tmp_path / 'out')!r}, tower='image')"
    killed = f"import os, signal; os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL); {export}"
    assert python("-c", killed).returncode == -9
    assert len(left(tmp_path)) == 1
    clipmb.export(folder["plain"], tmp_path / "out", tower="image")
    assert left(tmp_path) == ["out"]


def test_every_target_is_described():
    for name, target in exporting.TARGETS.items():
        assert target.backend in backends.BACKENDS, name
        assert "float32" in target.dtypes, name


def test_openvino_tells_nobody_that_it_is_imported():
    """Its telemetry forks the process, in which other frameworks have threads, and asks the network."""
    script = "import os\nos.fork = lambda: os._exit(3)\nimport clipmb.onnx.openvino, openvino_telemetry"
    done = python("-c", script)
    assert done.returncode == 0, excerpt(done.stderr)
